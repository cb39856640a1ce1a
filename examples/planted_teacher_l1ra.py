"""Why does L1RA move so few ranks, and with which setting does it find planted ones?

    python examples/planted_teacher_l1ra.py --out planted_teacher_l1ra.json --plot l1ra.png
    python examples/planted_teacher_l1ra.py --quick       # seconds, to see that it runs

The task is that of planted_teacher.py. L1RA starts in one of two ways:

- "budget": uniform ranks that take the whole budget, as in the paper.
- "room": the largest rank in every layer. The first update prunes the smallest gates of all layers
  down to the budget (`L1RA(budget=…, start=…)`). No module keeps a rank by right (`min_rank=0`).

The mechanism is measured on one teacher, in trainings in which no rank moves. A layer is needed
where the planted rank is the largest, and unneeded where it is 0. Of their ranks, at some steps:

    pull        mean of −m̂/√v̂ of the gates' Adam state since the line before: how steadily the
                loss asks for larger gates, from −1 to 1. Adam moves a gate by η_c times this, and
                the penalty by η_c λ against it, so that gates stop to fall where the pull is λ.
    gate        mean gate
    |B||A|      mean of ‖b_i‖ ‖a_i‖ of the single ranks, which share the scale with the gate
    gates ~ 0   share of gates below 0.1
    σ ~ 0       share of ΔW's singular values below 0.05, of as many as there are ranks; the
                planted ones are 1.2

The search halves. All settings train on one teacher; the best of each start by development loss
train on all teachers of the development half; and the best of those is reported on the other half.
A setting says λ and in which share of the training the penalty alone takes a gate from 1 to 0:

    prune_in = 1 / (η_c λ · steps),  so  η_c = 1 / (prune_in · steps · λ)
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from arms import l1ra
from compare import mean_and_error, plus_minus
from planted_teacher import PlantedTeacher
from study import Context, Progress, uniform
from study_results import KNOWN, UNIFORM, Results, gap_closed

from minirank import L1RA, lora_layers

SEARCH_TEACHER, MECHANISM_TEACHER = 1, 0
PROMOTED = {"budget": 2, "room": 4}  # settings that go on to all teachers of the first half
BASE_RATES = {UNIFORM: (1.2e-2, 2.4e-2), KNOWN: (2.4e-2,)}
SMALL_GATE, SMALL_VALUE = 0.1, 0.05
MEASURED_AT = (10, 25, 50, 100, 150, 200, 300, 400, 500, 600)


class Setting(NamedTuple):
    """How L1RA runs. `start`, `stop` and `prune_in` are shares of the training."""

    begin: str  # "budget" or "room"
    l1: float
    prune_in: float  # 0 if l1 is: then gate_lr is as in the paper
    weight_decay: float = 0.0
    start: float = 0.0
    stop: float = 0.5
    updates: int = 20
    min_rank: int = 1
    lr: float = 2.4e-2

    def gate_lr(self, steps: int) -> float:
        """η_c.

        >>> round(Setting("budget", l1=0.1, prune_in=0.5).gate_lr(steps=1000), 6)
        0.02
        """
        return 1 / (self.prune_in * steps * self.l1) if self.l1 else 2e-2

    def train(self, context: Context, on_step: Callable[[L1RA], object] | None = None) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the search holds penalties that are too small
            return l1ra(
                context,
                self.lr,
                l1=self.l1,
                gate_lr=self.gate_lr(context.task.steps),
                weight_decay=self.weight_decay,
                updates=self.updates,
                start=self.start,
                stop=self.stop,
                roomy=self.begin == "room",
                min_rank=self.min_rank,
                on_step=on_step,
            )


ROOM = Setting("room", l1=0.1, prune_in=0.5, start=0.5, stop=0.5, min_rank=0)
BUDGET = Setting("budget", l1=0.3, prune_in=0.1)


def published(setting: Setting, steps: int) -> Setting:
    """With the paper's λ = 5e-3 and η_c = 2e-2."""
    return setting._replace(l1=5e-3, prune_in=1 / (5e-3 * 2e-2 * steps))


def unpenalised(setting: Setting) -> Setting:
    return setting._replace(l1=0.0, prune_in=0.0)


def grid(steps: int, quick: bool = False) -> list[Setting]:
    """The settings of the search, without repetition."""
    if quick:
        return [BUDGET, ROOM]
    settings = [
        BUDGET._replace(l1=l1, prune_in=n) for l1 in (0.03, 0.1, 0.3, 1) for n in (0.05, 0.2, 0.5)
    ]
    settings += [
        BUDGET._replace(l1=l1, prune_in=n, weight_decay=decay, min_rank=0)
        for l1, n in ((0.3, 0.05), (0.3, 0.2), (1, 0.2), (1, 0.5))
        for decay in (0, 0.1, 1)
    ]
    settings += [BUDGET._replace(l1=1, prune_in=0.2, min_rank=0, updates=n) for n in (5, 60)]
    settings += [ROOM._replace(l1=l1, prune_in=n) for l1 in (0.03, 0.1, 0.3, 1) for n in (0.2, 0.5)]
    settings += [ROOM._replace(l1=l1, prune_in=1) for l1 in (0.1, 0.3)]
    settings += [published(ROOM, steps), unpenalised(ROOM)]
    settings += [ROOM._replace(weight_decay=decay) for decay in (0.1, 0.3, 1)]
    settings += [ROOM._replace(start=at, stop=at) for at in (0.25, 0.75)]
    settings += [ROOM._replace(start=0.75, stop=0.75, weight_decay=0.1)]
    settings += [ROOM._replace(start=0.4, stop=0.6), ROOM._replace(min_rank=1)]
    settings += [ROOM._replace(lr=lr) for lr in (1.2e-2, 4.8e-2)]
    return list(dict.fromkeys(settings))


# ---- the mechanism -------------------------------------------------------------------------------


def mechanism_settings() -> dict[str, Setting]:
    budget = Setting("budget", l1=0.1, prune_in=500 / 600, start=1.0, stop=1.0)
    room = budget._replace(begin="room", min_rank=0)
    return {
        "from the budget, no decay": budget,
        "from the budget, decay 1": budget._replace(weight_decay=1.0),
        "from room, no decay": room,
        "from room, decay 0.1": room._replace(weight_decay=0.1),
    }


def pull(state: dict[str, torch.Tensor], betas: tuple[float, float]) -> torch.Tensor:
    """−m̂/√v̂ of an Adam state: (r,)

    >>> state = {"step": torch.tensor(1.0), "exp_avg": torch.tensor([-0.2]),
    ...          "exp_avg_sq": torch.tensor([0.004])}  # after one gradient of -2
    >>> pull(state, (0.9, 0.999))
    tensor([1.])
    """
    step = float(state["step"])
    mean = state["exp_avg"] / (1 - betas[0] ** step)
    square = state["exp_avg_sq"] / (1 - betas[1] ** step)
    steadiness: torch.Tensor = -mean / square.sqrt().clamp_min(1e-30)
    return steadiness


class Probe:
    """Measures the gates of needed and unneeded layers during a training."""

    def __init__(self, context: Context, at: Sequence[int]) -> None:
        planted = context.task.best_known(context.seed)
        assert planted is not None
        largest = max(planted.values())
        self.kinds = {
            "needed": [name for name in planted if planted[name] == largest],
            "unneeded": [name for name in planted if planted[name] == 0],
        }
        self.at, self.step = at, 0
        self.pulls: dict[str, list[float]] = {kind: [] for kind in self.kinds}
        self.lines: list[dict[str, Any]] = []

    @torch.no_grad()
    def __call__(self, allocator: L1RA) -> None:
        self.step += 1
        optimizer = allocator.optimizer
        assert isinstance(optimizer, torch.optim.Optimizer)
        betas = optimizer.param_groups[-1]["betas"]
        for kind, names in self.kinds.items():
            states = [optimizer.state[allocator.gates[name]] for name in names]
            self.pulls[kind].append(float(torch.cat([pull(s, betas) for s in states]).mean()))
        if self.step in self.at:
            self.lines += [self.line(allocator, kind) for kind in self.kinds]

    def line(self, allocator: L1RA, kind: str) -> dict[str, Any]:
        layers = [lora_layers(allocator.model)[name] for name in self.kinds[kind]]
        gates = torch.cat([allocator.gates[name] for name in self.kinds[kind]])
        sizes = torch.cat([x.lora_B.norm(dim=0) * x.lora_A.norm(dim=1) for x in layers])
        values = torch.cat([torch.linalg.svdvals(x.delta_weight())[: x.rank] for x in layers])
        pulls, self.pulls[kind] = self.pulls[kind], []
        return {
            "step": self.step,
            "kind": kind,
            "pull": statistics.fmean(pulls),
            "gate": float(gates.mean()),
            "BA": float(sizes.mean()),
            "small_gates": float((gates < SMALL_GATE).float().mean()),
            "small_values": float((values < SMALL_VALUE).float().mean()),
        }


def measure_mechanism(task: PlantedTeacher, results: Results) -> None:
    context = Context(task, MECHANISM_TEACHER)
    at = [step for step in MEASURED_AT if step < task.steps] + [task.steps]
    for name, setting in mechanism_settings().items():
        if results.find("mechanism", name=name) is None:
            probe = Probe(context, at)
            setting.train(context, probe)
            results.add("mechanism", {"name": name, **setting._asdict(), "lines": probe.lines})


def mechanism_table(results: Results) -> str:
    lines = [f"The mechanism (teacher {MECHANISM_TEACHER}, l1 0.1, no updates)"]
    for record in results.content["mechanism"]:
        lines += [
            f"\n{record['name']}",
            f"{'':>6} {'needed layers':^48} {'unneeded layers':^48}",
            f"{'step':>6} "
            + " ".join(
                [f"{'pull':>8} {'gate':>8} {'|B||A|':>8} {'gates ~ 0':>10} {'σ ~ 0':>10}"] * 2
            ),
        ]
        pairs = zip(record["lines"][::2], record["lines"][1::2], strict=True)
        for pair in pairs:
            figures = (
                f"{x['pull']:>+8.2f} {x['gate']:>8.3f} {x['BA']:>8.2f} {x['small_gates']:>10.2f} "
                f"{x['small_values']:>10.2f}"
                for x in pair
            )
            lines.append(f"{pair[0]['step']:>6} " + " ".join(figures))
    return "\n".join(lines)


# ---- the search ----------------------------------------------------------------------------------


def distance(ranks: dict[str, int], planted: dict[str, int]) -> int:
    """Σ |rank − planted|.

    >>> distance({"query": 2}, {"query": 1, "value": 3})
    4
    """
    return sum(abs(ranks.get(name, 0) - rank) for name, rank in planted.items())


class Study:
    """Trainings by (setting, teacher), each of which runs once."""

    def __init__(self, task: PlantedTeacher, results: Results) -> None:
        self.task, self.results = task, results
        self.contexts: dict[int, Context] = {}

    def context(self, seed: int) -> Context:
        return self.contexts.setdefault(seed, Context(self.task, seed))

    def run_all(self, settings: Sequence[Setting], seeds: Iterable[int], stage: str) -> None:
        jobs = [(s, seed) for seed in seeds for s in settings if self.record(s, seed) is None]
        progress = Progress(len(jobs))
        for setting, seed in jobs:
            context = self.context(seed)
            train = partial(setting.train, context)
            progress.step(self._run({**setting._asdict(), "seed": seed, "stage": stage}, train))

    def run_base(self, arm: str, lr: float, seed: int) -> None:
        """Plain LoRA, with uniform or with the planted ranks."""
        if self.results.find("base", arm=arm, lr=lr, seed=seed) is None:
            context = self.context(seed)
            ranks = uniform(context) if arm == UNIFORM else self.task.teacher(seed).ranks
            figures = self.task.evaluate(context.train(ranks, lr), seed)
            record = {"arm": arm, "lr": lr, "seed": seed, **figures}
            record["distance"] = distance(ranks, self.task.teacher(seed).ranks)
            self.results.add("base", record)

    def _run(self, keys: dict[str, Any], train: Callable[[], Any]) -> str:
        start, seed = time.process_time(), keys["seed"]
        trained = train()
        figures = {
            **self.task.evaluate(trained.model, seed),
            "distance": distance(trained.ranks, self.task.teacher(seed).ranks),
            "parameters": self.context(seed).cost_of(trained.ranks),
            "ranks": trained.ranks,
            "seconds": time.process_time() - start,
        }
        self.results.add("runs", {**keys, **figures})
        return f"{keys['stage']}, teacher {seed}: {figures['dev']:.4f}, {figures['seconds']:.1f} s"

    def record(self, setting: Setting, seed: int) -> dict[str, Any] | None:
        return self.results.find("runs", **setting._asdict(), seed=seed)

    def mean_dev(self, setting: Setting, seeds: Sequence[int]) -> float | None:
        """Mean development loss; None unless all of these teachers have run."""
        records = [self.record(setting, seed) for seed in seeds]
        losses = [record["dev"] for record in records if record is not None]
        return statistics.fmean(losses) if len(losses) == len(seeds) else None

    def best(
        self, begin: str, candidates: Iterable[Setting], seeds: Sequence[int], n: int
    ) -> list[Setting]:
        """The n settings with the lowest mean development loss. Ties: the earlier one."""
        scored = [(self.mean_dev(s, seeds), s) for s in candidates if s.begin == begin]
        return [s for _, s in sorted((d, s) for d, s in scored if d is not None)][:n]

    def base_losses(
        self, arm: str, tuning: Sequence[int], seeds: Sequence[int]
    ) -> dict[int, float]:
        rate = self.base_rate(arm, tuning)
        found = (self.results.find("base", arm=arm, lr=rate, seed=seed) for seed in seeds)
        return {record["seed"]: record["test"] for record in found if record is not None}

    def base_rate(self, arm: str, tuning: Sequence[int]) -> float:
        """The learning rate with the lowest mean development loss."""
        means = {}
        for lr in BASE_RATES[arm]:
            runs = [self.results.find("base", arm=arm, lr=lr, seed=seed) for seed in tuning]
            losses = [run["dev"] for run in runs if run is not None]
            if len(losses) == len(tuning):
                means[lr] = statistics.fmean(losses)
        return min(means, key=lambda lr: means[lr])


def describe(setting: Setting, steps: int) -> str:
    decay = f"{setting.weight_decay:g}"
    window = f"{setting.start:g}-{setting.stop:g}"
    return (
        f"{setting.begin:<7} {setting.l1:>6g} {setting.prune_in:>9.3g} "
        f"{setting.gate_lr(steps):>8.3g} {decay:>6} {window:>10} {setting.updates:>8} "
        f"{setting.min_rank:>8} {setting.lr:>6g}"
    )


HEADING = (
    f"{'begin':<7} {'l1':>6} {'prune in':>9} {'gate_lr':>8} {'decay':>6} {'start-stop':>10} "
    f"{'updates':>8} {'min_rank':>8} {'lr':>6}"
)


def search_table(study: Study, settings: Sequence[Setting], seeds: Sequence[int]) -> str:
    lines = [f"{HEADING} {'dev loss':>10} {'distance':>10}"]
    for setting in settings:
        dev = study.mean_dev(setting, seeds)
        if dev is not None:
            runs = [study.results.find("runs", **setting._asdict(), seed=seed) for seed in seeds]
            far = statistics.fmean(run["distance"] for run in runs if run is not None)
            lines.append(f"{describe(setting, study.task.steps)} {dev:>10.5f} {far:>10.1f}")
    return "\n".join(lines)


def report_row(
    study: Study, setting: Setting, tuning: Sequence[int], seeds: Sequence[int]
) -> dict[str, Any] | None:
    """Test figures of a setting over these teachers; None if one is missing."""
    records = [study.record(setting, seed) for seed in seeds]
    runs = [record for record in records if record is not None]
    if len(runs) < len(seeds):
        return None
    losses = {run["seed"]: run["test"] for run in runs}
    base = study.base_losses(UNIFORM, tuning, seeds)
    best = study.base_losses(KNOWN, tuning, seeds)
    return {
        "loss": mean_and_error(list(losses.values())),
        "gap": gap_closed(losses, base, best),
        "distance": mean_and_error([float(run["distance"]) for run in runs]),
    }


def report_table(
    study: Study, rows: dict[str, Setting], tuning: Sequence[int], seeds: Sequence[int]
) -> str:
    lines = [
        f"teachers {', '.join(map(str, seeds))}, test split; uniform at lr "
        f"{study.base_rate(UNIFORM, tuning):g}, planted at {study.base_rate(KNOWN, tuning):g}",
        f"{'':<38} {'loss':>20} {'gap closed':>16} {'distance':>14}",
    ]
    for arm in (UNIFORM, KNOWN):
        losses = list(study.base_losses(arm, tuning, seeds).values())
        ends = [study.results.find("base", arm=arm, seed=seed) for seed in seeds]
        far = mean_and_error([float(e["distance"]) for e in ends if e is not None])
        lines.append(
            f"{arm:<38} {plus_minus(*mean_and_error(losses), 5):>20} "
            f"{'0' if arm == UNIFORM else '1':>16} {plus_minus(*far, 1):>14}"
        )
    for name, setting in rows.items():
        row = report_row(study, setting, tuning, seeds)
        if row is not None:
            loss = plus_minus(row["loss"][0], row["loss"][1], 5)
            gap = plus_minus(row["gap"][0], row["gap"][1], 3, "+")
            distance = plus_minus(row["distance"][0], row["distance"][1], 1)
            lines.append(f"{name:<38} {loss:>20} {gap:>16} {distance:>14}")
    return "\n".join(lines)


def save_plot(path: Path, results: Results) -> None:
    """Gates of needed and unneeded layers, from both starts."""
    from matplotlib.figure import Figure

    records = [r for r in results.content["mechanism"] if "decay 1" not in r["name"]]
    figure = Figure(figsize=(9, 3), layout="constrained")
    axes = figure.subplots(1, len(records), sharey=True, squeeze=False)[0]
    for axis, record in zip(axes, records, strict=True):
        for kind, color in (("needed", "C0"), ("unneeded", "C1")):
            lines = [line for line in record["lines"] if line["kind"] == kind]
            steps = [line["step"] for line in lines]
            axis.plot(steps, [line["gate"] for line in lines], color=color, label=f"gate, {kind}")
            axis.plot(steps, [x["pull"] for x in lines], ":", color=color, label=f"pull, {kind}")
        axis.axhline(record["l1"], color="0.6", linewidth=1)
        axis.set_title(record["name"], fontsize=10)
        axis.set_xlabel("step")
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--out", type=Path, help="write all figures here, and resume from here")
    parser.add_argument("--plot", type=Path, help="draw the gates of the mechanism's trainings")
    options = parser.parse_args()
    task = PlantedTeacher(steps=4 if options.quick else options.steps)
    settings = {"steps": task.steps, "quick": options.quick, "torch": torch.__version__}
    results = Results(options.out, task.about(), settings)
    for name in ("mechanism", "base"):
        results.content.setdefault(name, [])
    study = Study(task, results)
    tuning = (SEARCH_TEACHER,) if options.quick else task.tuning_seeds
    others = (5,) if options.quick else tuple(s for s in task.seeds if s not in tuning)

    measure_mechanism(task, results)
    print(f"{mechanism_table(results)}\n")

    settings_tried = grid(task.steps, options.quick)
    study.run_all(settings_tried, [SEARCH_TEACHER], "search")
    print(f"The search, on teacher {SEARCH_TEACHER}, development split")
    print(f"{search_table(study, settings_tried, [SEARCH_TEACHER])}\n")
    promoted = [
        setting
        for begin, n in PROMOTED.items()
        for setting in study.best(begin, settings_tried, [SEARCH_TEACHER], n)
    ]
    study.run_all(promoted, tuning, "half")
    print(f"The best of these, on teachers {', '.join(map(str, tuning))}, development split")
    print(f"{search_table(study, promoted, tuning)}\n")

    rows = {}
    for begin in PROMOTED:
        (best,) = study.best(begin, promoted, tuning, 1)
        rows[f"L1RA from {begin}, best of the search"] = best
    rows["the same from room, without a penalty"] = unpenalised(best)
    rows["L1RA from budget, as published"] = published(
        Setting("budget", l1=0.0, prune_in=0.0, stop=1.0), task.steps
    )
    for arm in (UNIFORM, KNOWN):
        for seed in tuning:
            for lr in BASE_RATES[arm]:
                study.run_base(arm, lr, seed)
        for seed in others:
            study.run_base(arm, study.base_rate(arm, tuning), seed)
    study.run_all(list(rows.values()), (*others, *tuning), "report")
    print(HEADING)
    for name, setting in rows.items():
        print(f"{describe(setting, task.steps)}  {name}")
    for seeds in (tuning, others, (*tuning, *others)):
        print(f"\n{report_table(study, rows, tuning, seeds)}")
    if options.plot is not None:
        save_plot(options.plot, results)


if __name__ == "__main__":
    main()
