"""Ranks as a table of text: layers down, kinds of module across."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

WIDTH = 100  # columns of the widest table
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

    No line is wider than 100 columns. A wider grid is cut into blocks of columns, one below the
    other; or it becomes a list with one line per module, where that has fewer lines.

    >>> print(draw_table({"layer.0.query": 4, "layer.0.value": 1, "layer.1.query": 0}))
             query   value     sum
    layer.0  4 ████  1 █         5
    layer.1  ·                   0
    sum      4       1           5
    · is rank 0: no adapter
    """
    ranks = {printable(name): rank for name, rank in ranks.items()}
    top = max(ranks.values(), default=0) or 1
    grid = arrange(ranks)
    lines = _grid_lines(grid, top)
    if max(map(len, lines)) > WIDTH:
        lines = _grid_lines(grid, top, gap=1)
    if max(map(len, lines)) > WIDTH:
        blocks = _block_lines(grid, top)
        lines = _list_lines(grid, top)
        if blocks is not None and len(blocks) <= len(lines):
            lines = blocks
    if 0 in ranks.values():
        lines.append("· is rank 0: no adapter")
    return "\n".join(lines)


def _grid_lines(grid: Grid, top: int, columns: range | None = None, gap: int = 2) -> list[str]:
    """The grid, or those of its columns and the layers that have them. The layers' sums come after
    the last column of all.

    Args:
        top: the rank with a bar of full length.
        gap: spaces between two columns.
    """
    every = range(len(grid.columns))
    columns = every if columns is None else columns
    with_sums = columns.stop == every.stop
    rows = range(len(grid.rows))
    digits = len(str(top))
    headings = [grid.columns[j].split(".") for j in columns]
    widths = [max(digits + 1 + BAR_WIDTH, *map(len, heading)) for heading in headings]
    first_width, sum_width = max([len("sum"), *map(len, grid.rows)]), _sum_width(grid)

    def line(name: str, cells: Sequence[object], total: object) -> str:
        texts = zip(map(str, cells), widths, strict=True)
        parts = "".join(f"{'':{gap}}{text:<{width}}" for text, width in texts)
        return f"{name:<{first_width}}{parts}  {total if with_sums else '':>{sum_width}}".rstrip()

    stacked = _stacked(headings)
    lines = [line("", parts, "") for parts in stacked[:-1]] + [line("", stacked[-1], "sum")]
    for i in rows:
        in_row = [grid.ranks.get((i, j)) for j in every]
        cells = [_cell(in_row[j], top, digits) for j in columns]
        if not with_sums and not any(cells):
            continue
        lines.append(line(grid.rows[i], cells, sum(rank or 0 for rank in in_row)))
    sums = [sum(grid.ranks.get((i, j), 0) for i in rows) for j in columns]
    lines.append(line("sum", sums, sum(grid.ranks.values())))
    return lines


def _block_lines(grid: Grid, top: int) -> list[str] | None:
    """Blocks of as many columns as fit, with an empty line between them. None if one is too wide
    by itself."""
    blocks: list[list[str]] = []
    start = 0
    while start < len(grid.columns):
        fitting = None
        for stop in range(start + 1, len(grid.columns) + 1):
            block = _grid_lines(grid, top, range(start, stop))
            if max(map(len, block)) > WIDTH:
                break
            fitting, next_start = block, stop
        if fitting is None:
            return None
        blocks.append(fitting)
        start = next_start
    return [line for block in blocks for line in ["", *block]][1:]


def _list_lines(grid: Grid, top: int) -> list[str]:
    """One line per module under the name of its layer, which has the layer's sum."""
    digits = len(str(top))
    sum_width = _sum_width(grid)
    end_width = digits + 1 + BAR_WIDTH + 2 + sum_width
    longest = max(len(name) for name in [*grid.rows, *(f"  {name}" for name in grid.columns)])
    name_width = min(longest, WIDTH - end_width - 2)

    def line(name: str, cell: str, total: object) -> list[str]:
        *first, last = _pieces(name, name_width)
        return [
            *first,
            f"{last:<{name_width}}  {cell:<{digits + 1 + BAR_WIDTH}}  {total:>{sum_width}}",
        ]

    lines = line("", "", "sum")
    for i, row in enumerate(grid.rows):
        in_row = {j: rank for (k, j), rank in grid.ranks.items() if k == i}
        lines += line(row, "", sum(in_row.values()))
        for j, rank in in_row.items():
            lines += line(f"  {grid.columns[j]}", _cell(rank, top, digits), "")
    return [text.rstrip() for text in [*lines, *line("sum", "", sum(grid.ranks.values()))]]


def _sum_width(grid: Grid) -> int:
    return max(5, len(str(sum(grid.ranks.values()))))


def _pieces(name: str, width: int) -> list[str]:
    """A name that is wider than `width`, cut into several lines, the further ones indented."""
    if len(name) <= width:
        return [name]
    cut = name.rfind(".", 5, width) + 1 or width
    return [name[:cut], *_pieces(f"    {name[cut:]}", width)]


def printable(name: str) -> str:
    r"""The name on one line: line breaks and their like are escaped.

    >>> printable("a\nb")
    'a\\nb'
    """
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)


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
