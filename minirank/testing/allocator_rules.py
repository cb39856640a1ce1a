"""The oracle for other implementations: checks that a LoRA layer or an allocator of your own runs on itself.

    from minirank import testing
    testing.check_lora_layer(my_layer, x, weight=W, bias=b, A=A, B=B, scaling=s)
    testing.check_allocator(my_allocator)

Each raises AssertionError with what was expected and what came. The library's own classes pass the same checks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..allocators.allocation import Allocation
from ..allocators.allocator import Allocator
from ..layers.targets import layer_shape, walk


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Assert that the block leaves the model as it was: modules, values, `requires_grad`, gradients, modes, hooks; and
    the state of the global CPU random generator."""
    before = _state(model)
    yield
    after = _state(model)
    for key in before.keys() | after.keys():
        old, new = before.get(key), after.get(key)
        same = (
            torch.equal(old, new)
            if isinstance(old, Tensor) and isinstance(new, Tensor)
            else old == new
        )
        assert same, f"{key} changed: expected {old}, got {new}"


def _state(model: nn.Module) -> dict[str, object]:
    state: dict[str, object] = {"the global random state": torch.get_rng_state()}
    for name, module in model.named_modules():
        hooks = [
            len(module._forward_hooks),
            len(module._forward_pre_hooks),
            len(module._backward_hooks),
        ]
        state[f"module {name!r} (identity, mode, numbers of hooks)"] = (
            id(module),
            module.training,
            hooks,
        )
        for key, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None:
                state[f"{name}.{key} (identity, requires_grad)"] = (
                    id(tensor),
                    tensor.requires_grad,
                )
                state[f"{name}.{key}"] = tensor.detach().clone()
                state[f"{name}.{key}.grad"] = None if tensor.grad is None else tensor.grad.clone()
    return state


def check_allocator(allocator: Allocator) -> None:
    """The rules of score() / allocate(budget): `allocator` must be fresh, its model on the CPU.

    score() returns finite tensors of shape () or (r,) and changes nothing; allocate() raises before it, then meets
    budgets in ranks exactly and in parameters tightly, between the bounds, changes nothing, and raises ValueError for
    budgets that cannot be met.
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
    modules = dict(walk(model))
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
            _check_ranks(allocator.allocate(budget, min_rank=0), limits, allocator.grows)
            capped = {name: -(-limit // 2) for name, limit in limits.items()}
            if budget <= sum(capped.values()):
                allocation = allocator.allocate(budget, min_rank=0, max_rank=capped)
                _check_ranks(allocation, capped, allocator.grows)
        costs = allocator.allocate(0, min_rank=0).costs
        for share in (0.0, 0.31, 0.77, 1.0):
            budget = int(share * sum(limit * costs[name] for name, limit in limits.items()))
            allocation = allocator.allocate(budget, unit="parameters", min_rank=0)
            _check_ranks(allocation, limits, allocator.grows)
        for budget in (-1, sum(limits.values()) + 1):
            try:
                allocator.allocate(budget, min_rank=0)
            except ValueError:
                continue
            raise AssertionError(
                f"a budget of {budget} ranks cannot be met, and must raise ValueError"
            )


def _check_ranks(allocation: Allocation, limits: dict[str, int], grows: bool) -> None:
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
    if allocation.unit == "ranks":
        assert sum(ranks.values()) == allocation.budget, (
            f"{ranks} miss the budget of {allocation.budget}"
        )
        return
    left = allocation.budget - sum(rank * costs[name] for name, rank in ranks.items())
    assert left >= 0, f"{ranks} exceed the budget of {allocation.budget} parameters by {-left}"
    room = [name for name, rank in ranks.items() if rank < limits[name] and costs[name] <= left]
    assert not room, f"{left} parameters are left, and another rank fits into {room}"


def check_lora_layer(
    layer: nn.Module,
    x: Tensor,
    *,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: float,
    gate: Tensor | None = None,
    tolerance: float | None = None,
) -> None:
    """layer(x) against y = W x + b + s · B (gate ⊙ A x), computed in float64 from the plain matrices.

    x: (…, d_in); weight: (d_out, d_in); bias: (d_out,); A: (r, d_in); B: (d_out, r); gate: (r,). `tolerance` is the
    largest difference allowed, relative to the largest entry of y; None: (d_in + r) rounding errors of x's dtype.
    """
    exact = [None if t is None else t.detach().double() for t in (x, weight, bias, A, B, gate)]
    x64, W, b, A64, B64, c = exact
    assert x64 is not None
    assert W is not None
    assert A64 is not None
    assert B64 is not None
    h = x64 @ A64.t()
    expected = (
        x64 @ W.t() + scaling * ((h if c is None else h * c) @ B64.t()) + (0 if b is None else b)
    )
    got = layer(x).detach().double()
    assert got.shape == expected.shape, (
        f"expected shape {tuple(expected.shape)}, got {tuple(got.shape)}"
    )
    limit = (
        tolerance if tolerance is not None else (x.shape[-1] + len(A64)) * torch.finfo(x.dtype).eps
    )
    error = float(
        (got - expected).abs().max() / expected.abs().max().clamp(min=torch.finfo(x.dtype).tiny)
    )
    assert error <= limit, f"the largest relative difference is {error:.3g}, allowed is {limit:.3g}"
