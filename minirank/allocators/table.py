"""Ranks as a table of text: layers down, kinds of module across."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

BAR = " ▏▎▍▌▋▊▉█"  # eighths of a cell
BAR_WIDTH = 4


class Grid(NamedTuple):
    """Ranks by layer and kind of module."""

    rows: list[str]  # layers, "encoder.layer.0"
    columns: list[str]  # kinds, "attention.self.query"
    ranks: dict[tuple[int, int], int]  # by (row, column); absent: the layer has no such module


def arrange(ranks: Mapping[str, int]) -> Grid:
    """Split every dotted name after its first number: the part before is the layer, the rest is the
    kind of module. A name without a number is split before its last part.

    >>> arrange({"layer.0.query": 3, "layer.1.query": 1, "head": 2})  # doctest: +ELLIPSIS
    Grid(rows=['layer.0', 'layer.1', ''], columns=['query', 'head'], ranks={(0, 0): 3, ...})
    """
    cells = {_split(name): rank for name, rank in ranks.items()}
    rows = list(dict.fromkeys(layer for layer, _ in cells))
    columns = list(dict.fromkeys(kind for _, kind in cells))
    return Grid(
        rows,
        columns,
        {(rows.index(layer), columns.index(kind)): rank for (layer, kind), rank in cells.items()},
    )


def _split(name: str) -> tuple[str, str]:
    """(layer, kind of module)"""
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    end = numbers[0] + 1 if numbers else len(parts) - 1
    return ".".join(parts[:end]), ".".join(parts[end:])


def draw_table(ranks: Mapping[str, int]) -> str:
    """One line per layer and one column per kind of module, with sums in the last column and line.

    A heading is stacked at the dots of its name. A bar of full length is the largest rank. "·" is
    rank 0, which a last line says. A blank means that the layer has no such module.

    >>> print(draw_table({"layer.0.query": 4, "layer.0.value": 1, "layer.1.query": 0}))
             query   value     sum
    layer.0  4 ████  1 █         5
    layer.1  ·                   0
    sum      4       1           5
    · is rank 0: no adapter
    """
    grid = arrange(ranks)
    top = max(ranks.values(), default=0) or 1
    digits = len(str(top))
    headings = [column.split(".") for column in grid.columns]
    widths = [max(digits + 1 + BAR_WIDTH, *map(len, heading)) for heading in headings]
    first_width = max([len("sum"), *map(len, grid.rows)])

    def line(name: str, cells: Sequence[object], total: object) -> str:
        columns = "".join(f"  {cell!s:<{width}}" for cell, width in zip(cells, widths, strict=True))
        return f"{name:<{first_width}}{columns}  {total:>5}".rstrip()

    stacked = _stacked(headings)
    lines = [line("", parts, "") for parts in stacked[:-1]] + [line("", stacked[-1], "sum")]
    for i, row in enumerate(grid.rows):
        in_row = [grid.ranks.get((i, j)) for j in range(len(grid.columns))]
        cells = [_cell(rank, top, digits) for rank in in_row]
        lines.append(line(row, cells, sum(rank or 0 for rank in in_row)))
    sums = [
        sum(grid.ranks.get((i, j), 0) for i in range(len(grid.rows)))
        for j in range(len(grid.columns))
    ]
    lines.append(line("sum", sums, sum(sums)))
    if 0 in ranks.values():
        lines.append("· is rank 0: no adapter")
    return "\n".join(lines)


def _stacked(headings: Sequence[Sequence[str]]) -> list[list[str]]:
    """The parts of every heading one above the other, line by line; the last parts are in the last
    line. At least one line."""
    height = max(map(len, headings), default=1)
    padded = [[""] * (height - len(heading)) + list(heading) for heading in headings]
    return [[heading[level] for heading in padded] for level in range(height)]


def _cell(rank: int | None, top: int, digits: int) -> str:
    """The rank, right-aligned to `digits`, and its bar. None: the layer has no such module."""
    if rank is None:
        return ""
    if rank == 0:
        return f"{'·':>{digits}}"
    eighths = round(rank / top * BAR_WIDTH * 8)
    bar = BAR[-1] * (eighths // 8) + (BAR[eighths % 8] if eighths % 8 else "")
    return f"{rank:>{digits}} {bar}"
