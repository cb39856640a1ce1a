"""The record of ranks that move during training. It prints as a table and plots as a heat map."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ..checks import shortened
from .table import WIDTH, printable

NAMES_SHOWN = 4  # modules of one update
LONGEST_NAME = 40  # of these


@dataclass(frozen=True)
class Update:
    """What one update did. A module in both `pruned` and `given` got fresh ranks for pruned ones.

    Args:
        step: optimizer steps until then.
        ranks: {module: rank after the update}, of every module.
        pruned: {module: ranks that it lost}, without the modules that lost none.
        given: {module: fresh ranks that it got}, without the modules that got none.
        parameters: Σ r · (d_out + d_in) after the update.
        state_reset: the optimizer's entries that could not be cut to the new ranks, so that the
            state of their parameter started afresh.
    """

    step: int
    ranks: Mapping[str, int]
    pruned: Mapping[str, int]
    given: Mapping[str, int]
    parameters: int
    state_reset: tuple[str, ...] = ()

    @property
    def total_rank(self) -> int:
        """Σ r over all modules, after the update."""
        return sum(self.ranks.values())

    def line(self) -> str:
        """The line of the history's table, or several: each has at most 100 columns."""
        numbers = (
            f"{self.step:>7} {self.total_rank:>6} {self.parameters:>11,} "
            f"{sum(self.pruned.values()):>7}  "
        )
        first, *further = self._moves(WIDTH - len(numbers))
        return "\n".join([numbers + first, *(" " * len(numbers) + text for text in further)])

    def _moves(self, room: int) -> list[str]:
        """What moved, on one line if that has at most `room` columns; else a line for each side."""
        reset = f"(optimizer state reset: {len(self.state_reset)} entries)"
        lost = [reset] if self.state_reset else []
        moves = f"{_counted_names(self.pruned)} → {_counted_names(self.given)}"
        whole = " ".join([moves if self.pruned or self.given else "nothing moved", *lost])
        if len(whole) <= room:
            return [whole]
        given = _counted_names(self.given, room - len("→ "))
        return [_counted_names(self.pruned, room), f"→ {given}", *lost]


@dataclass
class History:
    """Every update since the beginning.

    Args:
        initial: {module: rank before the first update}.
        updates: in the order in which they happened.

    >>> history = History({"query": 2, "value": 2})
    >>> history.updates.append(Update(50, {"query": 1, "value": 3}, {"query": 1}, {"value": 1}, 64))
    >>> print(history)
    4 ranks over 2 modules, 1 updates
       step  ranks  parameters  pruned  from → to
         50      4          64       1  query → value
    """

    initial: Mapping[str, int]
    updates: list[Update] = field(default_factory=list)

    def __str__(self) -> str:
        total = sum(self.initial.values())
        lines = [f"{total} ranks over {len(self.initial)} modules, {len(self.updates)} updates"]
        if self.updates:
            lines.append(f"{'step':>7}{'ranks':>7}{'parameters':>12}{'pruned':>8}  from → to")
        lines += [update.line() for update in self.updates]
        return "\n".join(lines)

    def plot(self, path: str | None = None) -> Any:
        """Ranks over time as a heat map, modules down and steps across.

        Returns matplotlib's Figure, and writes it to `path` if given.

        Raises:
            ImportError: matplotlib is not installed (pip install 'minirank[plot]').
        """
        from .plot import draw_rank_history

        ranks_after = {update.step: update.ranks for update in self.updates}
        return draw_rank_history({0: self.initial, **ranks_after}, path)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, names and containers."""
        return {
            "initial": dict(self.initial),
            "updates": [asdict(update) for update in self.updates],
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> History:
        """The history that `state_dict` was called on."""
        updates = [
            Update(**{**fields, "state_reset": tuple(fields["state_reset"])})
            for fields in state["updates"]
        ]
        return cls(dict(state["initial"]), updates)


def _counted_names(counts: Mapping[str, int], room: int | None = None) -> str:
    """The first names, with their counts where these are not 1: "query, 2× value, 3 more".

    Args:
        room: for fewer names, until they have at most so many columns.
    """
    names = []
    for name, count in counts.items():
        times = "" if count == 1 else f"{count}× "
        names.append(times + shortened(printable(name), LONGEST_NAME))
    for shown in range(NAMES_SHOWN, 0, -1):
        more = [f"{len(names) - shown} more"] if len(names) > shown else []
        text = ", ".join(names[:shown] + more) or "none"
        if room is None or len(text) <= room:
            break
    return text
