"""The record of ranks that move during training: prints as a table, plots as modules × time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from .table import draw_rank_history

SHOWN = 4  # modules named per line of the table


@dataclass(frozen=True)
class Update:
    """What one update did. `pruned` and `given` hold the modules with some; a module with both got fresh ranks."""

    step: int  # optimizer steps until then
    ranks: Mapping[str, int]  # of every module, afterwards
    pruned: Mapping[str, int]
    given: Mapping[str, int]
    parameters: int  # Σ r · (d_out + d_in), afterwards
    # Optimizer entries that could not be cut to the new ranks, so that their parameter's state starts afresh.
    state_reset: tuple[str, ...] = ()

    @property
    def total_rank(self) -> int:
        return sum(self.ranks.values())


@dataclass
class History:
    """Every update since the beginning."""

    initial: Mapping[str, int]  # ranks before the first update
    updates: list[Update] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [
            f"{sum(self.initial.values())} ranks over {len(self.initial)} modules, {len(self.updates)} updates"
        ]
        if self.updates:
            lines.append(f"{'step':>7}{'ranks':>7}{'parameters':>12}{'pruned':>8}  from → to")
        for u in self.updates:
            moves = (
                f"{_names(u.pruned)} → {_names(u.given)}"
                if u.pruned or u.given
                else "nothing moved"
            )
            lost = (
                f" (optimizer state reset: {len(u.state_reset)} entries)" if u.state_reset else ""
            )
            pruned = sum(u.pruned.values())
            lines.append(
                f"{u.step:>7}{u.total_rank:>7}{u.parameters:>12,}{pruned:>8}  {moves}{lost}"
            )
        return "\n".join(lines)

    def plot(self, path: str | None = None) -> Any:
        """Ranks over time, one row per module. Returns matplotlib's Figure, and writes it to `path` if given.
        Raises ImportError without matplotlib (pip install 'minirank[plot]')."""
        times = {0: self.initial, **{update.step: update.ranks for update in self.updates}}
        return draw_rank_history(times, path)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, names and containers."""
        return {
            "initial": dict(self.initial),
            "updates": [asdict(update) for update in self.updates],
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> History:
        updates = [
            Update(**{**u, "state_reset": tuple(u["state_reset"])}) for u in state["updates"]
        ]
        return cls(dict(state["initial"]), updates)


def _names(counts: Mapping[str, int]) -> str:
    shown = [
        name if count == 1 else f"{count}× {name}" for name, count in list(counts.items())[:SHOWN]
    ]
    more = [f"{len(counts) - SHOWN} more"] if len(counts) > SHOWN else []
    return ", ".join(shown + more) or "none"
