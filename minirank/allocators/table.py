"""Ranks as tables and heat maps a person can read: layers down, kinds of module (or time) across."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

BAR = " ▏▎▍▌▋▊▉█"  # eighths of a cell
BAR_WIDTH = 4


class Grid(NamedTuple):
    rows: list[str]  # layers, "encoder.layer.0"
    columns: list[str]  # kinds, "attention.self.query"
    ranks: dict[
        tuple[int, int], int
    ]  # (row, column) -> rank, absent where the layer has no such module


def arrange(ranks: Mapping[str, int]) -> Grid:
    """Split each dotted name behind its first number: what comes before is the layer, the rest the kind. Names
    without a number are kinds of their parent module."""
    cells = {_split(name): rank for name, rank in ranks.items()}
    rows, columns = (
        list(dict.fromkeys(r for r, _ in cells)),
        list(dict.fromkeys(c for _, c in cells)),
    )
    return Grid(
        rows, columns, {(rows.index(r), columns.index(c)): rank for (r, c), rank in cells.items()}
    )


def _split(name: str) -> tuple[str, str]:
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    end = numbers[0] + 1 if numbers else len(parts) - 1
    return ".".join(parts[:end]), ".".join(parts[end:])


def draw_table(ranks: Mapping[str, int]) -> str:
    """One line per layer, one column per kind (headings are stacked at their dots); a bar's full length is the
    largest rank; "·" is rank 0, blank means no such module. The last column and line are sums."""
    grid = arrange(ranks)
    top = max(ranks.values(), default=0) or 1
    heads = [column.split(".") for column in grid.columns]
    height = max((len(head) for head in heads), default=1)
    number = len(str(top))
    widths = [max(number + 1 + BAR_WIDTH, *(len(part) for part in head)) for head in heads]
    left = max([len("sum"), *(len(row) for row in grid.rows)])

    def line(name: str, cells: Sequence[object], total: object) -> str:
        columns = "".join(f"  {cell!s:<{width}}" for cell, width in zip(cells, widths, strict=True))
        return f"{name:<{left}}{columns}  {total:>5}"

    lines = []
    for level in range(height):
        parts = [
            head[level - height + len(head)] if level >= height - len(head) else ""
            for head in heads
        ]
        lines.append(line("", parts, "sum" if level == height - 1 else ""))
    for i, row in enumerate(grid.rows):
        cells = [_cell(grid.ranks.get((i, j)), top, number) for j in range(len(grid.columns))]
        lines.append(line(row, cells, sum(rank for (r, _), rank in grid.ranks.items() if r == i)))
    sums = [
        sum(rank for (_, c), rank in grid.ranks.items() if c == j) for j in range(len(grid.columns))
    ]
    lines.append(line("sum", sums, sum(sums)))
    return "\n".join(line.rstrip() for line in lines)


def _cell(rank: int | None, top: int, number: int) -> str:
    if rank is None:
        return ""
    eighths = round(rank / top * BAR_WIDTH * 8)
    bar = BAR[-1] * (eighths // 8) + (BAR[eighths % 8] if eighths % 8 else "")
    return f"{rank:>{number}} {bar}" if rank else f"{'·':>{number}}"


def draw_heat_map(ranks: Mapping[str, int], title: str, path: str | None = None) -> Any:
    """The same grid as a matplotlib Figure, written to `path` if given."""
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
    """{step: ranks of all modules} as a heat map, modules down and steps across; a number where a rank changed."""
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
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plotting needs matplotlib: pip install 'minirank[plot]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def whole_ticks(top: float) -> list[int]:
    """At most about eight whole numbers from 0 to `top`: there is no rank 2.5."""
    return list(range(0, int(top) + 1, max(1, round(top / 7))))


def fill_heat_map(axes: Any, ranks: Mapping[str, int], top: int) -> Any:
    """Draw the grid into matplotlib axes, `top` being the rank at the end of the colour scale; returns the image."""
    grid = arrange(ranks)
    columns, rows = range(len(grid.columns)), range(len(grid.rows))
    values = [[grid.ranks.get((i, j), float("nan")) for j in columns] for i in rows]
    image = axes.imshow(values, cmap="viridis", vmin=0, vmax=top or 1, aspect="auto")
    for (i, j), rank in grid.ranks.items():
        axes.text(
            j,
            i,
            str(rank),
            ha="center",
            va="center",
            color="white" if rank < 0.6 * top else "black",
        )
    axes.set_xticks(columns, [column.replace(".", "\n") for column in grid.columns], fontsize=8)
    axes.set_yticks(rows, grid.rows)
    return image
