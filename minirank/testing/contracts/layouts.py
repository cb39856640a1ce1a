"""Numbers for cases, and the ways a tensor may lie in memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

View = Callable[[Tensor], Tensor]


def normal(*shape: int, seed: int) -> Tensor:
    """Standard normal numbers, float64, the same for a seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def plain(tensor: Tensor) -> Tensor:
    return tensor


def with_gaps(tensor: Tensor) -> Tensor:
    """The same numbers in every second place of a larger tensor, which is NaN elsewhere."""
    whole = tensor.new_full([2 * size + 1 for size in tensor.shape], torch.nan)
    view = whole[(slice(1, None, 2),) * tensor.ndim]
    view.copy_(tensor)
    return view


def transposed(tensor: Tensor) -> Tensor:
    """The same numbers, with the last two dimensions stored the other way round."""
    return tensor.mT.contiguous().mT if tensor.ndim > 1 else tensor


def repeated(tensor: Tensor) -> Tensor:
    """The first row of `tensor` in the place of every row, stored once."""
    return tensor[:1].expand(tensor.shape)
