"""An attention mask that nobody has named: found in a batch that is a tuple."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def unnamed_mask(batch: Any) -> int | None:
    """Where a tuple or list holds an attention mask with zeros, beside token numbers; else None.

    Everything must agree, so that labels, types of tokens and masks of the loss are not taken for
    an attention mask: two integer tensors of one shape (n, T); one of zeros and ones, with a one in
    every row and all zeros at one end of it; and the other with one number wherever there is a
    zero, the padding token, and others elsewhere. At least one row must have two zeros.

    >>> ids = torch.tensor([[5, 7, 8], [6, 0, 0]])
    >>> unnamed_mask((ids, torch.tensor([[1, 1, 1], [1, 0, 0]])))
    1
    >>> unnamed_mask((ids, torch.tensor([[1, 0, 1], [0, 0, 1]]))) is None  # labels of the tokens
    True
    """
    if not isinstance(batch, tuple | list):
        return None
    tensors = {
        entry: value
        for entry, value in enumerate(batch)
        if isinstance(value, Tensor) and value.dtype in INTEGERS and value.ndim == 2
    }
    for entry, mask in tensors.items():
        for ids in tensors.values():
            other = ids is not mask and ids.shape == mask.shape and ids.dtype != torch.bool
            if other and _is_mask_of(mask, ids):
                return entry
    return None


def _is_mask_of(mask: Tensor, ids: Tensor) -> bool:
    real = mask != 0
    if real.all() or not torch.equal(mask, real.to(mask.dtype)) or not real.any(1).all():
        return False
    at_one_end = real.int().diff(dim=1).abs().sum(1) <= 1
    if not at_one_end.all() or int((~real).sum(1).max()) < 2:
        return False
    padding = ids[~real]
    return bool((padding == padding[0]).all()) and not bool((ids[real] == padding[0]).all())
