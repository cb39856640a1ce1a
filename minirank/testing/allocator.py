"""Does an allocator follow the rules of score() and allocate(budget)?"""

from __future__ import annotations

import torch

from ..allocators.allocation import Allocation, Allocator
from ..layers.targets import layer_shape, modules_by_name
from .model_state import unchanged


def check_allocator(allocator: Allocator) -> None:
    """Check an allocator of your own against the rules that every method of this library follows.

    - allocate() before score() raises RuntimeError.
    - score() returns finite tensors of shape () or (r,) for linear layers.
    - allocate(budget) meets a budget of ranks exactly, within the bounds.
    - allocate(budget, unit="parameters") does not exceed the budget, and leaves no room for
      another rank.
    - score() and allocate() leave the model and the global CPU random generator unchanged.
    - A budget of ranks that cannot be met raises ValueError.

    Args:
        allocator: fresh, that is, before its first score(). Its model is on the CPU.

    Raises:
        AssertionError: a rule is broken. The message says what was expected and what came.

    >>> from torch import nn
    >>> from minirank import UniformRanks
    >>> from minirank.testing import check_allocator
    >>> check_allocator(UniformRanks(nn.Sequential(nn.Linear(5, 9), nn.Linear(9, 4))))
    """
    model = allocator.model
    try:
        allocator.allocate(1)
    except RuntimeError:
        pass
    else:
        raise AssertionError("allocate() before score() must raise RuntimeError")
    with unchanged(model):
        scores = allocator.score()
    assert scores, "score() returned no module"
    modules = modules_by_name(model)
    limits = {}
    for name, score in scores.items():
        shape = layer_shape(modules[name])
        assert shape is not None, (
            f"score() names {name!r}, which is not a linear layer of the model"
        )
        assert score.ndim <= 1, (
            f"score of {name!r}: expected shape () or (r,), got {tuple(score.shape)}"
        )
        assert torch.isfinite(score).all(), f"score of {name!r} is not finite: {score}"
        limits[name] = min(shape) if score.ndim == 0 or allocator.grows else len(score)
    with unchanged(model):
        for budget in sorted({0, 1, len(limits), sum(limits.values()) // 2, sum(limits.values())}):
            _check_ranks(allocator.allocate(budget), limits, allocator.grows)
            capped = {name: -(-limit // 2) for name, limit in limits.items()}
            if budget <= sum(capped.values()):
                _check_ranks(allocator.allocate(budget, max_rank=capped), capped, allocator.grows)
        costs = allocator.allocate(0).costs
        for share in (0.0, 0.31, 0.77, 1.0):
            budget = int(share * sum(limit * costs[name] for name, limit in limits.items()))
            _check_ranks(allocator.allocate(budget, unit="parameters"), limits, allocator.grows)
        for budget in (-1, sum(limits.values()) + 1):
            try:
                allocator.allocate(budget)
            except ValueError:
                continue
            raise AssertionError(
                f"a budget of {budget} ranks cannot be met, and must raise ValueError"
            )


def _check_ranks(allocation: Allocation, limits: dict[str, int], grows: bool) -> None:
    """Assert that the ranks keep to `limits`, that the masks fit, and that the budget is met."""
    ranks, costs = allocation.ranks, allocation.costs
    assert list(ranks) == list(limits), f"expected ranks for {list(limits)}, got {list(ranks)}"
    assert all(0 <= rank <= limits[name] for name, rank in ranks.items()), (
        f"ranks {ranks} exceed {limits}"
    )
    if allocation.keep is not None:
        kept = {name: int(mask.sum()) for name, mask in allocation.keep.items()}
        fits = all(
            count <= ranks[name] if grows else count == ranks[name] for name, count in kept.items()
        )
        assert kept.keys() == ranks.keys(), (
            f"expected keep masks for {list(ranks)}, got {list(kept)}"
        )
        assert fits, f"keep masks hold {kept}, but the ranks are {ranks}"
    if allocation.unit != "parameters":
        assert sum(ranks.values()) == allocation.budget, (
            f"{ranks} miss the budget of {allocation.budget}"
        )
        return
    left = allocation.budget - sum(rank * costs[name] for name, rank in ranks.items())
    assert left >= 0, f"{ranks} exceed the budget of {allocation.budget} parameters by {-left}"
    room = [name for name, rank in ranks.items() if rank < limits[name] and costs[name] <= left]
    assert not room, f"{left} parameters are left, and another rank fits into {room}"
