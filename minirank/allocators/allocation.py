"""`Allocation`: the ranks that a method gave, as a frozen record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from ..layers.coverage import Coverage
from ..layers.targets import exact_key, exact_pattern
from .table import draw_table

Unit = Literal["ranks", "parameters"]


@dataclass(frozen=True)
class Allocation:
    """The ranks that a method gave to each module.

    Print it; give it to `wrap` or `resize`; take its patterns to PEFT.

    Args:
        ranks: {module: rank}.
        costs: {module: trainable parameters of one rank, d_out + d_in}.
        budget: what was to be used, in `unit`.
        unit: "ranks" or "parameters".
        method: the name of the method.
        keep: {module: bool (r,), true for the present ranks that survive}, where the method judged
            existing ranks one by one. A module's rank can be higher than the number of its
            survivors: then it gets fresh ranks. None: the method did not judge existing ranks.
        coverage: which part of the model's matrices the modules are, and what is left out and why.
            It prints below the table, unless the modules are all there is. None: not known. `==`
            does not compare it.
        full: the modules that keep every rank that they had, where the method judged existing ranks
            and the bounds would have allowed more. A line below the table counts them: with more
            ranks in the first training they might have got more.
        stacks: those of the modules that are stacks of experts. In PEFT they are no target_modules
            but `target_parameters`.

    >>> allocation = Allocation({"0.query": 4, "0.value": 1}, {"0.query": 16, "0.value": 24}, 5)
    >>> allocation.total_rank, allocation.parameters
    (5, 88)
    >>> print(allocation)
    Allocation: 5 ranks, 88 parameters (budget 5 ranks)
         query   value     sum
    0    4 ████  1 █         5
    sum  4       1           5
    """

    ranks: Mapping[str, int]
    costs: Mapping[str, int]
    budget: int
    unit: Unit = "ranks"
    method: str = ""
    keep: Mapping[str, Tensor] | None = None
    coverage: Coverage | None = None
    full: tuple[str, ...] = ()
    stacks: tuple[str, ...] = ()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Allocation) and self._comparable() == other._comparable()

    def _comparable(self) -> dict[str, Any]:
        """The fields, with masks as lists, because == between tensors has no single answer."""
        fields = {key: value for key, value in vars(self).items() if key != "coverage"}
        if self.keep is None:
            return fields
        return {**fields, "keep": {name: mask.tolist() for name, mask in self.keep.items()}}

    @property
    def total_rank(self) -> int:
        """Σ r over all modules."""
        return sum(self.ranks.values())

    @property
    def parameters(self) -> int:
        """Trainable parameters: Σ r · (d_out + d_in)."""
        return sum(rank * self.costs[name] for name, rank in self.ranks.items())

    @property
    def rank_pattern(self) -> dict[str, int]:
        """For peft.LoraConfig(rank_pattern=…), PEFT ≥ 0.15.

        The keys are regular expressions that match one module each. Modules of rank 0 are absent,
        because PEFT has no rank 0: leave them out of its target_modules too, as `target_modules`
        does.

        >>> ranks, costs = {"enc.query": 4, "enc.value": 0}, {"enc.query": 9, "enc.value": 9}
        >>> Allocation(ranks, costs, budget=4).rank_pattern
        {'^enc\\\\.query': 4}
        """
        return {exact_key(name): rank for name, rank in self.ranks.items() if rank > 0}

    def alpha_pattern(self, scaling: float) -> dict[str, float]:
        """For peft.LoraConfig(alpha_pattern=…): one `scaling` for all layers, as in this library.

        PEFT scales each layer by alpha / r. So alpha = scaling · r gives every layer the same
        scaling; without the pattern, PEFT scales layers of higher rank down.
        """
        return {key: scaling * rank for key, rank in self.rank_pattern.items()}

    @property
    def target_modules(self) -> str | list[str]:
        """For peft.LoraConfig(target_modules=…): a regular expression that matches the full names
        of the modules with a rank above 0, and no other name. Stacks of experts are left out; if
        there is nothing else, this is [], as PEFT wants it beside `target_parameters`."""
        stacks = self.target_parameters
        names = [name for name, r in self.ranks.items() if r > 0 and name not in self.stacks]
        return [] if stacks and not names else exact_pattern(names)

    @property
    def target_parameters(self) -> list[str] | None:
        """For peft.LoraConfig(target_parameters=…): the stacks of experts with a rank above 0. None
        without any."""
        return [name for name in self.stacks if self.ranks[name] > 0] or None

    def plot(self, path: str | None = None) -> Any:
        """A heat map of the ranks, layers down and kinds of module across.

        Returns matplotlib's Figure, and writes it to `path` if given.

        Raises:
            ImportError: matplotlib is not installed (pip install 'minirank[plot]').
        """
        from .plot import draw_heat_map

        return draw_heat_map(self.ranks, f"{self.method} ranks, {self._totals()}", path)

    def _totals(self) -> str:
        budget = f"budget {self.budget:,} {self.unit}"
        return f"{self.total_rank:,} ranks, {self.parameters:,} parameters ({budget})"

    def __str__(self) -> str:
        heading = f"{self.method or 'Allocation'}: {self._totals()}"
        parts = [heading, draw_table(self.ranks), self._note_of_full(), str(self.coverage or "")]
        return "\n".join(part for part in parts if part)

    def _note_of_full(self) -> str:
        if not self.full:
            return ""
        keep = "keeps" if len(self.full) == 1 else "keep"
        return (
            f"{len(self.full)} of {len(self.ranks)} modules {keep} every rank of the first "
            "training, and might take more: give it more ranks, or set max_rank."
        )
