"""The figures of a study: a file that grows, and what is read from it.

study.py writes them. `Results(path)` reads a file again, for tables and plots of several studies.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compare import mean_and_error, plus_minus

UNIFORM, LARGEST, KNOWN = "uniform", "uniform, largest", "best known"  # arms that others refer to


class Results:
    """All figures of one study, in a file that grows with every run.

    Args:
        path: None keeps them in memory.
        about: the task's `name`, `seeds` and `tuning_seeds`. None reads a file as it is.
        settings: what the runs depend on. A file with other settings is refused.
    """

    def __init__(
        self,
        path: Path | None,
        about: Mapping[str, Any] | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.path = path
        self.content: dict[str, Any] = {"settings": dict(settings or {}), "ranks": [], "runs": []}
        if path is not None and path.exists():
            self.content = json.loads(path.read_text())
            present = self.content["settings"]
            if settings is not None and present != json.loads(json.dumps(dict(settings))):
                raise SystemExit(
                    f"{path} holds runs with {present}, not {dict(settings)}: give another --out"
                )
        self.content |= about or {}

    def save(self) -> None:
        if self.path is not None:
            unfinished = self.path.with_suffix(".part")
            unfinished.write_text(json.dumps(self.content, indent=1) + "\n")
            unfinished.replace(self.path)

    def find(self, table: str, **keys: Any) -> dict[str, Any] | None:
        """The first record of "ranks", "runs" or another table that has these values."""
        records: list[dict[str, Any]] = self.content[table]
        return next((r for r in records if all(r[k] == v for k, v in keys.items())), None)

    def add(self, table: str, record: dict[str, Any], *, save: bool = True) -> None:
        self.content[table].append(record)
        if save:
            self.save()

    def tried(self, arm: str) -> dict[float, float]:
        """{learning rate: mean development loss} of the rates that every tuning seed had.

        The mean is infinite where a training diverged, so that such a rate is never the best.
        """
        tuning = self.content["tuning_seeds"]
        by_rate: dict[float, dict[int, float]] = {}
        for run in self.content["runs"]:
            if run["arm"] == arm and run["seed"] in tuning:
                by_rate.setdefault(run["lr"], {})[run["seed"]] = run["dev"]
        return {
            rate: mean if math.isfinite(mean := statistics.fmean(losses.values())) else math.inf
            for rate, losses in sorted(by_rate.items())
            if len(losses) == len(tuning)
        }

    def best_rate(self, arm: str) -> float:
        tried = self.tried(arm)
        return min(tried, key=lambda rate: tried[rate])

    def losses(self, arm: str, seeds: Sequence[int] | None = None) -> dict[int, float]:
        """{seed: test loss at the arm's learning rate}, of these seeds or of all."""
        if not self.tried(arm):
            return {}
        rate = self.best_rate(arm)
        some = self.content["seeds"] if seeds is None else seeds
        runs = (self.find("runs", arm=arm, seed=seed, lr=rate) for seed in some)
        return {run["seed"]: run["test"] for run in runs if run is not None}


def paired(losses: Mapping[int, float], base: Mapping[int, float]) -> tuple[float, float | None]:
    """Mean and standard error of losses - base, over the seeds that both have."""
    return mean_and_error([losses[seed] - base[seed] for seed in losses if seed in base])


def has_headroom(mean: float, error: float | None) -> bool:
    """Whether a difference in loss is below zero by two standard errors."""
    return error is not None and mean < -2 * error


def headroom_line(mean: float, error: float | None) -> str:
    verdict = "headroom" if has_headroom(mean, error) else "no headroom"
    difference = plus_minus(mean, error, 4, "+")
    return f"gate: uniform ranks of the largest size differ by {difference}: {verdict}"


def gap_closed(
    losses: Mapping[int, float], uniform: Mapping[int, float], best: Mapping[int, float]
) -> tuple[float, float | None]:
    """The share of the gap between uniform and best losses that is closed: mean, standard error.

    It is taken per seed: (uniform - loss) / (uniform - best). 1 is as good as the best, 0 as
    uniform, and below 0 is worse than uniform. Seeds at which the best ranks are not better than
    uniform ones have no gap, and are left out.

    >>> gap_closed({0: 0.25, 1: 1.0}, {0: 1.0, 1: 1.0}, {0: 0.0, 1: 0.0})
    (0.375, 0.375)
    """
    shares = [
        (uniform[s] - losses[s]) / (uniform[s] - best[s])
        for s in losses
        if s in uniform and s in best and best[s] < uniform[s]
    ]
    return mean_and_error(shares) if shares else (math.nan, None)


def table(results: Results, arms: Sequence[str], seeds: Sequence[int] | None = None) -> str:
    """One row for each arm that has figures, over these seeds or all."""
    seeds = results.content["seeds"] if seeds is None else seeds
    settings = results.content["settings"]
    base, best = results.losses(UNIFORM, seeds), results.losses(KNOWN, seeds)
    width = max(len(name) for name in arms)
    rates = ", ".join(f"{rate:g}" for rate in results.tried(UNIFORM))
    lines = [
        f"{results.content['name']}: {settings['steps']} steps, at most {settings['max_rank']} "
        f"ranks a layer, seeds {', '.join(map(str, seeds))}; learning rates {rates}",
        f"{'arm':<{width}} {'parameters':>10} {'lr':>6} {'test loss':>18} {'difference':>20} "
        f"{'gap closed':>14} {'to find, s':>10}",
    ]
    for arm in arms:
        losses = results.losses(arm, seeds)
        if not losses:
            continue
        rate = results.best_rate(arm)
        records = [
            r
            for r in results.content["ranks"]
            if r["arm"] == arm and r["seed"] in losses and r.get("lr", rate) == rate
        ]
        parameters = statistics.fmean(r["parameters"] for r in records)
        seconds = statistics.fmean(r["seconds"] for r in records)
        loss = plus_minus(*mean_and_error(list(losses.values())), digits_of(base))
        difference = gap = ""
        if arm != UNIFORM:
            difference = plus_minus(*paired(losses, base), digits_of(base), "+")
        if best:
            gap = plus_minus(*gap_closed(losses, base, best), 2, "+")
        lines.append(
            f"{arm:<{width}} {parameters:>10,.0f} {rate:>6g} {loss:>18} {difference:>20} "
            f"{gap:>14} {seconds:>10.1f}"
        )
    return "\n".join(lines)


def digits_of(losses: Mapping[int, float]) -> int:
    """So many decimals that the mean loss has four digits that count."""
    mean = statistics.fmean(losses.values()) if losses else 1.0
    return max(4, 3 - math.floor(math.log10(mean))) if mean > 0 else 4


def save_plot(path: Path, results: Results, arms: Sequence[str], seeds: Sequence[int]) -> None:
    """One dot for each arm: the loss over that of uniform ranks, each seed in grey."""
    from matplotlib.figure import Figure

    base = results.losses(UNIFORM, seeds)
    ratios = {}
    for arm in arms:
        losses = results.losses(arm, seeds)
        values = [losses[s] / base[s] for s in losses if s in base]
        if values and arm != UNIFORM:
            ratios[arm] = values
    figure = Figure(figsize=(7, 0.8 + 0.28 * len(ratios)), layout="constrained")
    axes = figure.subplots()
    for y, values in enumerate(ratios.values()):
        axes.plot(values, [y] * len(values), ".", color="0.75", markersize=5)
        axes.plot(statistics.geometric_mean(values), y, "o", color="C0")
    axes.set_yticks(range(len(ratios)), list(ratios))
    axes.invert_yaxis()
    axes.axvline(1.0, color="0.4", linewidth=1)
    if any(min(values) < 0.5 for values in ratios.values()):
        axes.set_xscale("log")
    axes.set_xlabel("test loss over that of uniform ranks (blue: geometric mean)")
    axes.set_title(results.content["name"], fontsize=10)
    figure.savefig(path, dpi=130)
