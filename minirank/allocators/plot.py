"""Ranks as heat maps: layers down, kinds of module (or time) across. Needs matplotlib, which is
imported when something is drawn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .table import arrange


def draw_heat_map(ranks: Mapping[str, int], title: str, path: str | None = None) -> Any:
    """The grid of `table.arrange` as a matplotlib Figure, which is written to `path` if given."""
    grid = arrange(ranks)
    figure = _new_figure(2.5 + 1.1 * len(grid.columns), 1.8 + 0.4 * len(grid.rows))
    axes = figure.subplots()
    image = fill_heat_map(axes, ranks, max(ranks.values(), default=0))
    axes.set_title(title, fontsize=10)
    figure.colorbar(image, label="rank", ticks=whole_ticks(image.norm.vmax))
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


def draw_rank_history(times: Mapping[int, Mapping[str, int]], path: str | None = None) -> Any:
    """{step: {module: rank}} as a heat map, modules down and steps across. A number stands where a
    rank changed."""
    steps, names = list(times), list(times[next(iter(times))])
    values = [[times[step][name] for step in steps] for name in names]
    top = max((max(row) for row in values), default=0)
    figure = _new_figure(3.5 + 0.32 * len(steps), 1.2 + 0.19 * len(names))
    axes = figure.subplots()
    image = axes.imshow(values, cmap="viridis", vmin=0, vmax=top or 1, aspect="auto")
    for i, row in enumerate(values):
        for j, rank in enumerate(row):
            if j == 0 or rank != row[j - 1]:
                color = "white" if rank < 0.6 * top else "black"
                axes.text(j, i, str(rank), ha="center", va="center", color=color, fontsize=7)
    axes.set_xticks(range(len(steps)), [str(step) for step in steps], fontsize=7, rotation=90)
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.set_xlabel("optimizer steps", fontsize=8)
    figure.colorbar(image, label="rank", ticks=whole_ticks(image.norm.vmax))
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


def _new_figure(width: float, height: float) -> Any:
    """An empty matplotlib Figure, sizes in inches."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plotting needs matplotlib: pip install 'minirank[plot]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def whole_ticks(top: float) -> list[int]:
    """Whole numbers from 0 to `top`, evenly spaced, at most about eight: there is no rank 2.5."""
    return list(range(0, int(top) + 1, max(1, round(top / 7))))


def fill_heat_map(axes: Any, ranks: Mapping[str, int], top: int) -> Any:
    """Draw the grid of `table.arrange` into matplotlib axes. `top` is the rank at the end of the
    colour scale. Returns the image."""
    grid = arrange(ranks)
    columns, rows = range(len(grid.columns)), range(len(grid.rows))
    values = [[grid.ranks.get((i, j), float("nan")) for j in columns] for i in rows]
    image = axes.imshow(values, cmap="viridis", vmin=0, vmax=top or 1, aspect="auto")
    for (i, j), rank in grid.ranks.items():
        color = "white" if rank < 0.6 * top else "black"
        axes.text(j, i, str(rank), ha="center", va="center", color=color)
    axes.set_xticks(columns, [column.replace(".", "\n") for column in grid.columns], fontsize=8)
    axes.set_yticks(rows, grid.rows)
    return image
