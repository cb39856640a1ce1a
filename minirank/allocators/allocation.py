"""What every method shares: `Allocator`, with score() and allocate(budget), and `Allocation`, what that returns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..budget import best_ranks, proportional_ranks
from ..checks import is_integer
from ..layers.lora import LoRALinear
from ..layers.targets import (
    Targets,
    exact_key,
    exact_pattern,
    layer_shape,
    linear_targets,
    modules_by_name,
)
from .table import draw_heat_map, draw_table

Unit = Literal["rank", "parameters"]
Bound = int | Mapping[str, int] | None


@dataclass(frozen=True)
class Allocation:
    """The ranks that a method gave: print it, hand it to `wrap` or `resize`, take `rank_pattern` to PEFT."""

    ranks: Mapping[str, int]
    costs: Mapping[str, int]  # trainable parameters of one rank: d_out + d_in
    budget: int
    unit: Unit = "rank"
    method: str = ""
    # bool (r,) per module, where existing ranks were judged one by one: the survivors (fresh ranks may come on top).
    keep: Mapping[str, Tensor] | None = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Allocation) and self._comparable() == other._comparable()

    def _comparable(self) -> dict[str, Any]:
        """The fields, masks as lists: tensors have no single answer to ==."""
        keep = (
            None if self.keep is None else {name: mask.tolist() for name, mask in self.keep.items()}
        )
        return {**vars(self), "keep": keep}

    @property
    def total_rank(self) -> int:
        return sum(self.ranks.values())

    @property
    def parameters(self) -> int:
        """Trainable parameters: Σ r · (d_out + d_in)."""
        return sum(rank * self.costs[name] for name, rank in self.ranks.items())

    @property
    def rank_pattern(self) -> dict[str, int]:
        """For peft.LoraConfig(rank_pattern=…), PEFT ≥ 0.15. Keys are regular expressions that match one module each;
        modules of rank 0 are absent, so leave them out of `target_modules` (`target_modules` here does)."""
        return {exact_key(name): rank for name, rank in self.ranks.items() if rank > 0}

    def alpha_pattern(self, scaling: float) -> dict[str, float]:
        """For peft.LoraConfig(alpha_pattern=…): PEFT scales by alpha / r in each layer, so that alpha = scaling · r
        gives every layer the same `scaling`, as here. Without it, layers of higher rank are scaled down."""
        return {key: scaling * rank for key, rank in self.rank_pattern.items()}

    @property
    def target_modules(self) -> str:
        """For peft.LoraConfig(target_modules=…): a regular expression that matches the adapted modules in full."""
        return exact_pattern(name for name, rank in self.ranks.items() if rank > 0)

    def plot(self, path: str | None = None) -> Any:
        """A heat map of the ranks, layers down and kinds of module across. Returns matplotlib's Figure, and writes it
        to `path` if given. Raises ImportError without matplotlib (pip install 'minirank[plot]')."""
        return draw_heat_map(self.ranks, f"{self.method} ranks, {self._totals()}", path)

    def _totals(self) -> str:
        wanted = f"budget {self.budget:,} {'ranks' if self.unit == 'rank' else 'parameters'}"
        return f"{self.total_rank:,} ranks, {self.parameters:,} parameters ({wanted})"

    def __str__(self) -> str:
        return f"{self.method or 'Allocation'}: {self._totals()}\n{draw_table(self.ranks)}"


class Allocator(ABC):
    """score() measures and never changes the model; allocate(budget) divides and never touches it."""

    method = "Allocator"
    grows = False  # whether scores per existing rank can also lead to more ranks than there are

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._scores: dict[str, Tensor] | None = None
        self._scored_ranks: dict[str, nn.Parameter] = {}

    @abstractmethod
    def _measure(self) -> dict[str, Tensor]:
        """One tensor per module: () for a share, (r,) for one score per existing rank. Higher means keep."""

    def score(self) -> dict[str, Tensor]:
        """Measure; the result is also kept for `allocate`. One tensor per module: shape () for a share of the budget,
        (r,) for one score per existing rank. Higher means keep."""
        scores = self._measure()
        # resize() makes new parameters, so the same object means the same ranks.
        self._scored_ranks = {
            n: m.lora_A for n, m in modules_by_name(self.model).items() if isinstance(m, LoRALinear)
        }
        self._scores = scores
        return {name: score.clone() for name, score in scores.items()}

    def allocate(
        self, budget: int, *, unit: Unit = "rank", min_rank: Bound = 0, max_rank: Bound = None
    ) -> Allocation:
        """Divide `budget` by the last scores.

        Args:
            budget: total rank, met exactly; or, with unit="parameters", trainable parameters Σ r · (d_out + d_in),
                not exceeded and with no room left for a further rank.
            min_rank, max_rank: one bound for all modules, or {name: bound} for some (the others: 0 and no bound).
                No rank exceeds min(d_out, d_in).

        Raises:
            RuntimeError: `score` has not run, or the ranks changed since (stale).
            ValueError: a budget or bound that cannot be met, unknown names or unit, scores that are not finite.
        """
        if self._scores is None:
            raise RuntimeError(f"{type(self).__name__}.allocate needs scores: call score() first")
        return self._divide(self._scores, budget, unit, min_rank, max_rank)

    def _divide(
        self, given: Mapping[str, Tensor], budget: int, unit: Unit, min_rank: Bound, max_rank: Bound
    ) -> Allocation:
        if unit not in ("rank", "parameters"):
            raise ValueError(f"unit must be 'rank' or 'parameters', got {unit!r}")
        scores = {name: score.detach().double().cpu() for name, score in given.items()}
        modules = modules_by_name(self.model)
        shapes = {name: _shape(name, modules) for name in scores}
        costs = {name: d_out + d_in for name, (d_out, d_in) in shapes.items()}
        lower = _bounds(min_rank, "min_rank", shapes, default=0)
        upper = _bounds(max_rank, "max_rank", shapes, default=None)
        spending = None if unit == "rank" else costs
        if all(score.ndim == 0 for score in scores.values()):
            shares = {name: float(score) for name, score in scores.items()}
            ranks = proportional_ranks(shares, budget, costs=spending, lower=lower, upper=upper)
            return Allocation(ranks, costs, budget, unit, self.method)
        for name in scores:
            layer = modules[name]
            if not isinstance(layer, LoRALinear) or layer.lora_A is not self._scored_ranks.get(
                name
            ):
                raise RuntimeError(
                    f"the scores are stale: {name!r} was resized since score(); call score() again"
                )
        each = {name: score.tolist() for name, score in scores.items()}
        ranks, kept = self._judge(each, budget, spending, lower, upper)
        keep = {
            name: torch.tensor(mask, dtype=torch.bool, device="cpu") for name, mask in kept.items()
        }
        return Allocation(ranks, costs, budget, unit, self.method, keep)

    def _judge(
        self,
        scores: Mapping[str, list[float]],
        budget: int,
        costs: Mapping[str, int] | None,
        lower: Mapping[str, int],
        upper: Mapping[str, int],
    ) -> tuple[dict[str, int], dict[str, list[bool]]]:
        """Which of the existing ranks survive, and how many a module then has. Here: the best of all modules do."""
        kept = best_ranks(scores, budget, costs=costs, lower=lower, upper=upper)
        return {name: sum(mask) for name, mask in kept.items()}, kept


class UniformRanks(Allocator):
    """The baseline: the same rank for every module (ranks that do not divide evenly go to the first modules)."""

    method = "uniform"

    def __init__(self, model: nn.Module, targets: Targets = None) -> None:
        super().__init__(model)
        self.targets = linear_targets(model, targets)

    def _measure(self) -> dict[str, Tensor]:
        return {name: torch.ones(()) for name in self.targets}


def _shape(name: str, modules: Mapping[str, nn.Module]) -> tuple[int, int]:
    shape = layer_shape(modules[name]) if name in modules else None
    if shape is None:
        raise RuntimeError(
            f"the scores are stale: the model no longer has a linear layer {name!r}; call score() again"
        )
    return shape


def _bounds(
    bound: Bound, what: str, shapes: Mapping[str, tuple[int, int]], default: int | None
) -> dict[str, int]:
    given = bound if isinstance(bound, Mapping) else {}
    unknown = [name for name in given if name not in shapes]
    if unknown:
        raise ValueError(
            f"{what} names {unknown}, which were not scored; scored are {list(shapes)[:3]}, …"
        )
    result = {}
    for name, shape in shapes.items():
        value = given.get(name, default) if isinstance(bound, Mapping) else bound
        if value is not None and not is_integer(value, 0):
            raise ValueError(f"{what} must be integers of at least 0, got {value!r} for {name!r}")
        result[name] = (
            min(shape) if value is None else min(value, min(shape)) if what == "max_rank" else value
        )
        if result[name] > min(shape):
            raise ValueError(f"{what}={value} of {name!r} is above min(d_out, d_in) = {min(shape)}")
    return result
