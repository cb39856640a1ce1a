"""Does an allocator follow the rules of score() and allocate(budget)?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..allocators.allocation import Allocation, Unit
from ..allocators.allocator import Allocator
from ..allocators.constraints import Bound
from ..layers.targets import layer_shape, modules_by_name
from .model_state import unchanged

SHARES = (0.0, 0.31, 0.77, 1.0)  # of the way from the smallest possible budget to the largest


def check_allocator(allocator: Allocator) -> None:
    """Check an allocator of your own against the rules that every method of this library follows.

    - allocate() before score() raises RuntimeError.
    - score() returns finite tensors of shape () or (r,) for linear layers.
    - allocate(budget) meets a budget of ranks exactly.
    - allocate(budget, unit="parameters") does not exceed the budget, and leaves no room for
      another rank.
    - Both keep to min_rank and max_rank, for all modules or by name.
    - Masks, if there are any, fit the present ranks and the new ones.
    - score() and allocate() leave the model and the global CPU random generator unchanged.
    - A budget that cannot be met raises ValueError, in both units.

    Args:
        allocator: fresh, that is, before its first score(). Its model is on the CPU.

    Raises:
        AssertionError: a rule is broken, or score() or allocate() raises where it must not. The
            message says what was expected and what came.

    >>> from torch import nn
    >>> from minirank import UniformRanks
    >>> from minirank.testing import check_allocator
    >>> check_allocator(UniformRanks(nn.Sequential(nn.Linear(5, 9), nn.Linear(9, 4))))
    """
    _check_that_scores_are_needed(allocator)
    with unchanged(allocator.model):
        scores = _without_error("score()", allocator.score)
    modules = _checked_modules(allocator, scores)
    with unchanged(allocator.model):
        for lower, upper in _bounds_to_try(modules):
            for unit in ("ranks", "parameters"):
                rule = _Rule(modules, unit, lower, upper, allocator.grows)
                for budget in _budgets_to_try(rule):
                    _check_allocation(allocator, budget, rule)
                _check_that_it_refuses(allocator, rule.smallest - 1, rule)
                _check_that_it_refuses(allocator, rule.largest + 1, rule)


class _Module(NamedTuple):
    """What the rules need to know of a scored module."""

    cost: int  # trainable parameters of one rank: d_out + d_in
    limit: int  # the largest rank that it can get
    present: int | None  # how many present ranks were scored; None: it has one share


class _Rule(NamedTuple):
    """What an allocation must keep to."""

    modules: Mapping[str, _Module]
    unit: Unit
    lower: Mapping[str, int]
    upper: Mapping[str, int]
    grows: bool

    def spent(self, ranks: Mapping[str, int]) -> int:
        """What these ranks take from the budget."""
        if self.unit == "ranks":
            return sum(ranks.values())
        return sum(rank * self.modules[name].cost for name, rank in ranks.items())

    @property
    def smallest(self) -> int:
        """The smallest possible budget."""
        return self.spent(self.lower)

    @property
    def largest(self) -> int:
        """The largest possible budget."""
        return self.spent(self.upper)

    @property
    def options(self) -> dict[str, Any]:
        """The options of allocate()."""
        return {
            "unit": self.unit,
            "min_rank": _as_bound(self.lower),
            "max_rank": _as_bound(self.upper),
        }

    def __str__(self) -> str:
        return ", ".join(f"{key}={value!r}" for key, value in self.options.items())


def _as_bound(by_name: Mapping[str, int]) -> Bound:
    """The bound for min_rank or max_rank: one number if it is the same for all modules."""
    different = set(by_name.values())
    return different.pop() if len(different) == 1 else by_name


def _without_error(call: str, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """What the function returns. AssertionError if it raises."""
    try:
        return function(*args, **options)
    except Exception as error:  # user code, of any kind
        raise AssertionError(
            f"{call} must not raise, but raised {type(error).__name__}: {error}"
        ) from error


# ---- scores -------------------------------------------------------------------------------------


def _check_that_scores_are_needed(allocator: Allocator) -> None:
    try:
        allocator.allocate(1)
    except RuntimeError:
        return
    except Exception as error:  # user code, of any kind
        raise AssertionError(
            f"allocate() before score() must raise RuntimeError, got {type(error).__name__}"
        ) from error
    raise AssertionError("allocate() before score() must raise RuntimeError")


def _checked_modules(allocator: Allocator, scores: Mapping[str, Tensor]) -> dict[str, _Module]:
    """The scored modules, if the scores are what they must be."""
    assert isinstance(scores, Mapping), f"score() must return {{module: score}}, got {scores!r}"
    assert scores, "score() returned no module"
    known = modules_by_name(allocator.model)
    modules = {}
    for name, score in scores.items():
        shape = layer_shape(known[name]) if name in known else None
        assert shape is not None, (
            f"score() names {name!r}, which is not a linear layer of the model"
        )
        assert isinstance(score, Tensor), f"score of {name!r} must be a tensor, got {score!r}"
        assert score.ndim <= 1, (
            f"score of {name!r}: expected shape () or (r,), got {tuple(score.shape)}"
        )
        assert torch.isfinite(score).all(), f"score of {name!r} is not finite: {score}"
        present = len(score) if score.ndim else None
        limit = min(shape) if present is None or allocator.grows else present
        modules[name] = _Module(sum(shape), limit, present)
    return modules


# ---- allocations --------------------------------------------------------------------------------


def _bounds_to_try(
    modules: Mapping[str, _Module],
) -> list[tuple[dict[str, int], dict[str, int]]]:
    """Pairs (lower, upper): none; bounds of all modules; bounds of one, the first or the last.

    One of the two catches an allocator that ignores bounds, whichever module its scores prefer.
    """
    limits = {name: module.limit for name, module in modules.items()}
    none = dict.fromkeys(limits, 0)
    ones = {name: min(1, limit) for name, limit in limits.items()}
    halves = {name: -(-limit // 2) for name, limit in limits.items()}
    first, last = next(iter(limits)), next(reversed(limits))
    return [
        (none, limits),
        (ones, limits),
        (none, halves),
        (halves, limits),
        ({**none, first: halves[first]}, limits),
        ({**none, last: halves[last]}, limits),
        (none, {**limits, first: 0}),
        (none, {**limits, last: 0}),
    ]


def _budgets_to_try(rule: _Rule) -> list[int]:
    width = rule.largest - rule.smallest
    budgets = {rule.smallest + int(share * width) for share in SHARES}
    budgets |= {rule.smallest + extra for extra in (1, len(rule.modules)) if extra <= width}
    return sorted(budgets)


def _check_allocation(allocator: Allocator, budget: int, rule: _Rule) -> None:
    call = f"allocate({budget}, {rule})"
    allocation = _without_error(call, allocator.allocate, budget, **rule.options)
    assert isinstance(allocation, Allocation), f"{call} must return an Allocation"
    ranks = allocation.ranks
    names = list(rule.modules)
    assert list(ranks) == names, f"{call}: expected ranks for {names}, got {list(ranks)}"
    outside = [name for name in names if not rule.lower[name] <= ranks[name] <= rule.upper[name]]
    assert not outside, f"{call}: the ranks of {outside} are out of bounds in {ranks}"
    _check_masks(call, allocation, rule)
    _check_budget(call, ranks, budget, rule)


def _check_masks(call: str, allocation: Allocation, rule: _Rule) -> None:
    """Assert that the masks say of every present rank whether it survives, and fit the ranks."""
    masks, ranks = allocation.keep, allocation.ranks
    if masks is None:
        return
    assert masks.keys() == ranks.keys(), (
        f"{call}: expected keep masks for {list(ranks)}, got {list(masks)}"
    )
    for name, mask in masks.items():
        present, kept, rank = rule.modules[name].present, int(mask.sum()), ranks[name]
        assert present is None or mask.shape == (present,), (
            f"{call}: the keep mask of {name!r} has shape {tuple(mask.shape)}; expected "
            f"({present},)"
        )
        assert kept <= rank if rule.grows else kept == rank, (
            f"{call}: the keep mask of {name!r} holds {kept}, but its rank is {rank}"
        )


def _check_budget(call: str, ranks: Mapping[str, int], budget: int, rule: _Rule) -> None:
    """Assert that ranks are met exactly, or that parameters leave no room for another rank."""
    left = budget - rule.spent(ranks)
    if rule.unit == "ranks":
        assert left == 0, f"{call}: {ranks} miss the budget of {budget}"
        return
    assert left >= 0, f"{call}: {ranks} exceed the budget by {-left}"
    room = [
        name
        for name, module in rule.modules.items()
        if ranks[name] < rule.upper[name] and module.cost <= left
    ]
    assert not room, f"{call}: {left} parameters are left, and another rank fits into {room}"


def _check_that_it_refuses(allocator: Allocator, budget: int, rule: _Rule) -> None:
    call = f"allocate({budget}, {rule})"
    try:
        allocator.allocate(budget, **rule.options)
    except ValueError:
        return
    except Exception as error:  # user code, of any kind
        raise AssertionError(
            f"{call} cannot be met, and must raise ValueError, got {type(error).__name__}"
        ) from error
    raise AssertionError(f"{call} cannot be met, and must raise ValueError")
