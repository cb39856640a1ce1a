"""`Allocator`: score() measures a model, and allocate(budget) divides a budget by the scores.

An allocator of your own is a class with one method, `score`. Choose the base by what you score:

- `ShareAllocator`: one number per module, its share of the budget.
- `RankScoreAllocator`: one number for each existing rank of the LoRA layers; the best are kept.

    >>> import torch
    >>> from torch import nn
    >>> from minirank import linear_targets, testing
    >>> class LargestWeights(ShareAllocator):
    ...     method = "largest weights"
    ...     def score(self):
    ...         layers = linear_targets(self.model)
    ...         return self.store_scores({n: m.weight.norm() for n, m in layers.items()})
    >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    >>> _ = [nn.init.constant_(layer.weight, 1.0) for layer in model]
    >>> allocator = LargestWeights(model)
    >>> report = testing.check_allocator(LargestWeights(model))  # does it keep the rules?
    >>> allocator.score()  # √16 and √8
    {'0': tensor(4.), '1': tensor(2.8284)}
    >>> allocator.allocate(5).ranks
    {'0': 3, '1': 2}

For another rule than these two, derive from `Allocator` and write `ranks_from_scores` as well.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..budget import best_ranks, proportional_ranks
from ..layers.coverage import coverage
from ..layers.experts import LoRAExperts
from ..layers.lora import LoRALinear
from ..layers.targets import expert_stacks, modules_by_name, refuse_peft
from .allocation import Allocation, Unit
from .constraints import Bound, Constraints, constraints_for
from .dominance import warn_of_dominance

Ranks = dict[str, int]  # {module: rank}
KeepMasks = dict[str, Tensor]  # {module: bool (r,), true for the present ranks that survive}


class Allocator(ABC):
    """score() measures and never changes the model; allocate(budget) divides and never touches it.

    Args:
        model: the model to measure.

    Raises:
        ValueError: the model has PEFT's modules.
    """

    method: ClassVar[str] = "Allocator"  # its name in an Allocation
    grows: ClassVar[bool] = True  # whether a module can get more ranks than it has now

    def __init__(self, model: nn.Module) -> None:
        refuse_peft(model)
        self.model = model
        self._scores: dict[str, Tensor] | None = None

    @abstractmethod
    def score(self) -> dict[str, Tensor]:
        """Measure the model. The scores are returned, and stored for `allocate`.

        An implementation ends with `return self.store_scores(scores)`.

        Returns:
            {module: score}. Higher means more ranks, or ranks that are kept rather than others.
        """

    @abstractmethod
    def ranks_from_scores(
        self, scores: Mapping[str, Tensor], constraints: Constraints
    ) -> tuple[Ranks, KeepMasks | None]:
        """How this method's scores become ranks. Reads no state that `score` sets.

        Args:
            scores: as `score` returns them, float64, on the CPU.

        Returns:
            The ranks, and which of the present ranks survive if the method judges these.
        """

    def store_scores(self, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Store a copy of the scores for `allocate`, and return another."""
        self._scores = {name: score.detach().clone() for name, score in scores.items()}
        return {name: score.clone() for name, score in self._scores.items()}

    def allocate(
        self, budget: int, *, unit: Unit = "ranks", min_rank: Bound = 0, max_rank: Bound = None
    ) -> Allocation:
        """Divide `budget` by the last scores.

        Args:
            budget: with unit="ranks", the total rank, which is met exactly. With
                unit="parameters", trainable parameters Σ r · (d_out + d_in): these are not
                exceeded, and no further rank fits into what is left.
            min_rank, max_rank: one bound for all modules, or {module: bound} for some of them; the
                others have 0 and no upper bound. No rank exceeds min(d_out, d_in).

        Raises:
            RuntimeError: `score` has not run, or the scores are stale because the ranks or modules
                have changed since.
            ValueError: the bounds make the budget impossible, a name or the unit is unknown, or
                scores are not finite.

        Warns:
            UserWarning: a module takes more than a quarter of the budget and more than three times
                an even share. The warning names a `max_rank` to give. See dominance.py.
        """
        if self._scores is None:
            raise RuntimeError(f"{type(self).__name__}.allocate needs scores: call score() first")
        constraints = self._constraints(self._scores, budget, unit, min_rank, max_rank)
        allocation = self._divide(self._scores, constraints)
        warn_of_dominance(allocation, constraints, self._massive_inputs())
        stacks = {*expert_stacks(self.model)} | {
            name
            for name, layer in modules_by_name(self.model).items()
            if isinstance(layer, LoRAExperts)
        }
        return replace(
            allocation,
            coverage=coverage(self.model, self._scores),
            stacks=tuple(name for name in allocation.ranks if name in stacks),
        )

    def _constraints(
        self,
        scores: Mapping[str, Tensor],
        budget: int,
        unit: Unit,
        min_rank: Bound,
        max_rank: Bound,
    ) -> Constraints:
        """What an allocation by these scores must keep to."""
        return constraints_for(self.model, scores, budget, unit, min_rank, max_rank)

    def _divide(self, scores: Mapping[str, Tensor], constraints: Constraints) -> Allocation:
        """Divide the budget by these scores, whatever `score` has stored."""
        exact = {name: score.detach().double().cpu() for name, score in scores.items()}
        ranks, keep = self.ranks_from_scores(exact, constraints)
        c = constraints
        return Allocation(ranks, c.costs, c.budget, c.unit, self.method, keep)

    def _massive_inputs(self) -> dict[str, float]:
        """{module: share}, as `dominance.massive_inputs` has it, if the scores rest on inputs."""
        return {}


class ShareAllocator(Allocator):
    """Scores are shares of the budget, one for each module: ranks are proportional to them.

    `score` returns {module: tensor of shape ()}, finite and not negative; only ratios matter. See
    `minirank.budget.proportional_ranks`.
    """

    def ranks_from_scores(
        self, scores: Mapping[str, Tensor], constraints: Constraints
    ) -> tuple[Ranks, None]:
        for name, score in scores.items():
            if score.ndim != 0:
                raise ValueError(
                    f"the score of {name!r} has shape {tuple(score.shape)}: expected one share, "
                    "(); for one score per existing rank, derive from RankScoreAllocator"
                )
        shares = {name: float(score) for name, score in scores.items()}
        return proportional_ranks(
            shares,
            constraints.budget,
            costs=constraints.budget_costs,
            lower=constraints.lower,
            upper=constraints.upper,
        ), None


class RankScoreAllocator(Allocator):
    """Scores judge the existing ranks of LoRA layers, one by one: those with the best are kept.

    `score` returns {module: tensor of shape (r,)}, finite, of any sign. See
    `minirank.budget.best_ranks`. The scores belong to the ranks that were there: when a layer is
    resized they are stale.
    """

    grows = False

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        # {module: the layer's ranks_token at score()}: the same token means the same ranks
        self._scored_ranks: dict[str, object] = {}

    def store_scores(self, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Store a copy of the scores, and which ranks they belong to, for `allocate`.

        Returns:
            Another copy.

        Raises:
            ValueError: a score that is not of shape (r,) for a LoRA layer of rank r.
        """
        scored_ranks = {}
        modules = modules_by_name(self.model)
        for name, score in scores.items():
            layer = modules.get(name)
            if not isinstance(layer, LoRALinear):
                raise ValueError(f"expected scores of LoRA layers, and {name!r} is none: wrap it")
            if score.shape != (layer.rank,):
                raise ValueError(
                    f"the score of {name!r} has shape {tuple(score.shape)}: expected one score per "
                    f"existing rank, ({layer.rank},)"
                )
            scored_ranks[name] = layer.ranks_token
        stored = super().store_scores(scores)
        self._scored_ranks = scored_ranks
        return stored

    def allocate(
        self, budget: int, *, unit: Unit = "ranks", min_rank: Bound = 0, max_rank: Bound = None
    ) -> Allocation:
        self._require_fresh_scores()
        allocation = super().allocate(budget, unit=unit, min_rank=min_rank, max_rank=max_rank)
        if self.grows:
            return allocation
        assert self._scores is not None  # super().allocate needs them
        bounds = super()._constraints(self._scores, budget, unit, min_rank, max_rank).upper
        held = {name: len(score) for name, score in self._scores.items()}
        if allocation.ranks == held:
            return allocation  # nothing was pruned
        full = [n for n, r in allocation.ranks.items() if 0 < r == held[n] < bounds[n]]
        return replace(allocation, full=tuple(full))

    def _require_fresh_scores(self) -> None:
        """Raise RuntimeError if a layer has other ranks than those that were scored."""
        modules = modules_by_name(self.model)
        for name, token in self._scored_ranks.items():
            layer = modules.get(name)
            if not isinstance(layer, LoRALinear) or layer.ranks_token is not token:
                raise RuntimeError(
                    f"the scores are stale: {name!r} was resized or taken out since score(); "
                    "call score() again"
                )

    def _constraints(
        self,
        scores: Mapping[str, Tensor],
        budget: int,
        unit: Unit,
        min_rank: Bound,
        max_rank: Bound,
    ) -> Constraints:
        """With no upper bound above the present rank, unless the method grows modules."""
        constraints = super()._constraints(scores, budget, unit, min_rank, max_rank)
        if self.grows:
            return constraints
        upper = {name: min(bound, len(scores[name])) for name, bound in constraints.upper.items()}
        return constraints._replace(upper=upper)

    def ranks_from_scores(
        self, scores: Mapping[str, Tensor], constraints: Constraints
    ) -> tuple[Ranks, KeepMasks | None]:
        keep = best_ranks(
            {name: score.tolist() for name, score in scores.items()},
            constraints.budget,
            costs=constraints.budget_costs,
            lower=constraints.lower,
            upper=constraints.upper,
        )
        return {name: sum(mask) for name, mask in keep.items()}, mask_tensors(keep)


def mask_tensors(keep: Mapping[str, list[bool]]) -> KeepMasks:
    """{module: bool per rank} as tensors on the CPU, whatever the default device."""
    return {name: torch.tensor(mask, dtype=torch.bool, device="cpu") for name, mask in keep.items()}
