"""What an optimizer knows of each rank, carried over when ranks are pruned or added.

Moments of surviving ranks are carried over slice by slice, bit for bit; those of new ranks start at
zero. Numbers that do not depend on the ranks, such as a step count, stay. Quantised entries, whose
scales belong to blocks that do not follow the ranks, cannot be carried over.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def select_ranks(value: Tensor, axis: int, keep: Tensor) -> Tensor:
    """The slices of `value` along `axis` where the bool mask `keep`, on any device, is true.

    >>> select_ranks(torch.tensor([1.0, 2.0, 3.0]), 0, torch.tensor([True, False, True]))
    tensor([1., 3.])
    """
    return value.index_select(axis, keep.nonzero().flatten().to(value.device))


def survivors_then_zeros(value: Tensor, axis: int, keep: Tensor, new_rank: int) -> Tensor:
    """The kept slices of `value` along `axis`, in their order, then zeros up to the new rank.

    >>> survivors_then_zeros(torch.tensor([1.0, 2.0]), 0, torch.tensor([False, True]), 3)
    tensor([2., 0., 0.])
    """
    kept = select_ranks(value, axis, keep)
    shape = list(value.shape)
    shape[axis] = new_rank
    result = value.new_zeros(shape)
    result.narrow(axis, 0, kept.shape[axis]).copy_(kept)
    return result


def carried_state(
    state: Mapping[str, Any], shape: torch.Size, axis: int, keep: Tensor, new_rank: int
) -> tuple[dict[str, Any], list[str]]:
    """One parameter's optimizer state after a change of rank, and the entries it could not keep.

    An optimizer expects all of its entries or none. So one entry that cannot be carried over resets
    the whole state of the parameter, which then starts afresh.

    Args:
        state: the optimizer's entries for the old parameter.
        shape: of the old parameter.
        axis: of the parameter, which counts its ranks; from the end if negative.
        keep: bool (old rank,), the surviving ranks.
        new_rank: survivors and new ranks together.

    >>> state = {"step": 7, "exp_avg": torch.ones(2, 3)}
    >>> keep = torch.tensor([True, False])
    >>> carried_state(state, torch.Size([2, 3]), 0, keep, new_rank=1)
    ({'step': 7, 'exp_avg': tensor([[1., 1., 1.]])}, [])
    """
    axis %= len(shape)
    carried: dict[str, Any] = {}
    lost: list[str] = []
    for entry, value in state.items():
        if isinstance(value, Tensor) and value.ndim > 0 and _is_quantised(value):
            lost.append(entry)
            continue
        if isinstance(value, Tensor) and value.ndim > 0:
            axes = _possible_rank_axes(entry, value.shape, shape, axis)
            if len(axes) != 1:
                lost.append(entry)
                continue
            rank_axis = axes.pop()
            if rank_axis is not None:
                value = survivors_then_zeros(value, rank_axis, keep, new_rank)
        elif isinstance(value, list | tuple | dict):  # LBFGS's history of flat vectors, say
            lost.append(entry)
        carried[entry] = value
    return ({}, lost) if lost else (carried, [])


def _is_quantised(value: Tensor) -> bool:
    """Whether these are codes of a few bits (bitsandbytes), or a type that hides them (torchao)."""
    return not value.is_floating_point() or type(value) not in (Tensor, nn.Parameter)


# torch.optim.Adafactor's factored second moment: means over the other axis of the parameter, which
# they keep at size 1: here the one that they do not average. At rank 1 their shapes alone could not
# be told from a full moment's.
FACTORS = {"row_var": -2, "col_var": -1}


def _possible_rank_axes(
    entry: str, shape: torch.Size, parameter: torch.Size, axis: int
) -> set[int | None]:
    """The axes of an optimizer's entry that may count the ranks; None stands for "no such axis".

    The answer is sure if there is exactly one. An entry is taken for a full moment, or for a
    statistic that keeps some axes of the parameter and has averaged the others away (to size 1, or
    dropped). An entry that has averaged over the ranks does not depend on their number.
    """
    if entry in FACTORS and len(shape) == len(parameter) >= 2:
        return {axis if FACTORS[entry] % len(shape) == axis else None}
    if shape == parameter:
        return {axis}
    if len(shape) == len(parameter):
        fits = all(size in (1, full) for size, full in zip(shape, parameter, strict=True))
        if not fits or parameter[axis] == 1:
            return set()
        return {axis if shape[axis] == parameter[axis] else None}
    if len(shape) == 1:  # one number per entry of one axis
        return {0 if d == axis else None for d, size in enumerate(parameter) if size == shape[0]}
    return set()
