"""How well two curvatures agree: rank correlations and relative errors, in a table and a plot."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

Diagonals = Mapping[str, Tensor]
Row = dict[str, Any]  # one estimate's figures; each list has one value per seed


def order(values: Tensor) -> Tensor:
    """(n,) → (n, n): the signs of all differences, 0 for ties."""
    return (values[:, None] - values).sign().double()


def kendall(a: Tensor, b: Tensor) -> float:
    """Kendall's τ_b of two (n,); nan if all values of one are tied."""
    x, y = order(a), order(b)
    return float((x * y).sum() / (x.square().sum() * y.square().sum()).sqrt())


def spearman(a: Tensor, b: Tensor) -> float:
    """Spearman's ρ of two (n,); ties share their mean rank; nan if all values of one are tied."""
    x, y = order(a).sum(1), order(b).sum(1)
    return float(x @ y / (x.norm() * y.norm()))


def relative_error(estimate: Tensor, reference: Tensor, scaled: bool) -> float:
    """‖c · estimate − reference‖ / ‖reference‖.

    c is 1, or, if `scaled`, the factor that makes the error smallest.
    """
    c = estimate @ reference / estimate.square().sum() if scaled else 1.0
    return float((c * estimate - reference).norm() / reference.norm())


def traces(diagonals: Diagonals) -> Tensor:
    return torch.stack([h.double().sum() for h in diagonals.values()])


def entries(diagonals: Diagonals, like: Diagonals) -> Tensor:
    """All entries in one tensor; a diagonal that rows share counts once for each row of `like`."""
    return torch.cat([h.expand_as(like[name]).double().flatten() for name, h in diagonals.items()])


def table(title: str, rows: Mapping[str, Row]) -> str:
    columns = {
        "spearman": 3,
        "kendall": 3,
        "trace error": 3,
        "entry error": 3,
        "moved at 2": 1,
        "moved at 8": 1,
    }
    lines = [
        f"\n{title}",
        f"{'':<27}{'products':>9}{'seconds':>9}" + "".join(f"{c:>15}" for c in columns),
    ]
    for name, row in rows.items():
        seconds = f"{statistics.mean(row['seconds']):.2f}" if "seconds" in row else ""
        line = f"{name:<27}{row['products']:>9,}{seconds:>9}"
        for column, digits in columns.items():
            line += f"{spread(row.get(column, []), digits):>15}"
        refused = row.get("refused", [])
        lines.append(
            line + (f"  {sum(refused):.0f} of {len(refused)} without ranks" if any(refused) else "")
        )
    return "\n".join(lines)


def spread(values: list[float], digits: int) -> str:
    """Mean ± standard deviation, as text."""
    cell = f"{statistics.mean(values):.{digits}f}" if values else "–"
    return cell + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


def save_plot(path: str, studies: Mapping[str, Mapping[str, Row]]) -> None:
    """Plot agreement against seconds for the first two studies, which have an exact reference."""
    from matplotlib.figure import Figure

    shown = list(studies.items())[:2]
    families = list(
        dict.fromkeys(row["family"] for rows in studies.values() for row in rows.values())
    )
    figure = Figure(figsize=(11, 7), layout="constrained")
    panels = figure.subplots(2, len(shown), squeeze=False, sharex="col", sharey="row")
    for column, (title, rows) in enumerate(shown):
        for axes, key in zip(panels[:, column], ("spearman", "moved at 8"), strict=True):
            for i, family in enumerate(families):
                members = [row for row in rows.values() if row["family"] == family and row.get(key)]
                if family == "uniform ranks" and members:
                    axes.axhline(
                        statistics.mean(members[0][key]), color="grey", linestyle=":", label=family
                    )
                elif members:
                    x = [statistics.mean(row["seconds"]) for row in members]
                    y = [statistics.mean(row[key]) for row in members]
                    axes.plot(x, y, "o-" if len(x) > 1 else "D", color=f"C{i}", label=family)
            axes.axvline(
                statistics.mean(rows["exact"]["seconds"]), color="black", label="exact diagonal"
            )
            axes.set_xscale("log")
            axes.grid(alpha=0.3)
        panels[0, column].set_title(title, fontsize=10)
        panels[1, column].set_xlabel("seconds")
    panels[0, 0].set_ylabel("Spearman correlation of the traces")
    panels[1, 0].set_ylabel("ranks that differ, average rank 8")
    lines, labels = panels[1, -1].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower center", ncols=5, fontsize=8)
    figure.savefig(path, dpi=130)
