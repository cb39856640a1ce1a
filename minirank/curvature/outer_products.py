"""From layer outputs to weights: the sum over samples of products of two outer products."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 2**17  # numbers computed together: what stays in a processor's cache is fastest
LARGE = 20_000  # numbers of a weight from which taking its samples one by one is fastest


def outer_products(u: Tensor, v: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Σ over samples n of (Σ_t u_nti x_ntj)(Σ_t v_nti y_ntj), over positions t, for K samples of u
    and v.

    u, v: (K, n, T, d_out). x: (n, T, d_in). y: like x, or (K, n, T, d_in).
    Returns: the sum over the K, (d_out, d_in), and the trace of each of the K, (K,).
    Memory: at most four times the result, or BLOCK numbers for each of three tensors.
    """
    if x.shape[1] == 1 and y is x:  # one position: Σ_n u_ni v_ni x_nj²
        uv, xx = (u * v)[:, :, 0], x[:, 0].square()
        return uv.sum(0).t() @ xx, uv.sum(2) @ xx.sum(1)
    squares = v is u and y is x
    total = x.new_zeros(u.shape[-1], x.shape[-1])
    traces = x.new_zeros(len(u))
    add_products = _add_by_sample if total.numel() >= LARGE else _add_by_block
    of_one = total if len(u) == 1 else torch.empty_like(total)
    for k in range(len(u)):
        of_one.zero_()
        add_products(of_one, u[k], v[k], x, y if y.ndim == 3 else y[k], squares)
        traces[k] = of_one.sum()
        if of_one is not total:
            total += of_one
    return total, traces


def _add_by_sample(
    total: Tensor, u: Tensor, v: Tensor, x: Tensor, y: Tensor, squares: bool
) -> None:
    """total += Σ over n of (Σ_t u_nti x_ntj)(Σ_t v_nti y_ntj).

    squares: whether both factors are equal.
    """
    left = torch.empty_like(total)
    right = left if squares else torch.empty_like(total)
    for u_n, v_n, x_n, y_n in zip(u.mT, v.mT, x, y, strict=True):
        torch.mm(u_n, x_n, out=left)
        if not squares:
            torch.mm(v_n, y_n, out=right)
        total.addcmul_(left, right)


def _add_by_block(total: Tensor, u: Tensor, v: Tensor, x: Tensor, y: Tensor, squares: bool) -> None:
    """The same as `_add_by_sample`, for as many samples together as BLOCK allows."""
    size = max(1, BLOCK // total.numel())
    for first in range(0, len(x), size):
        block = slice(first, first + size)
        left = u[block].transpose(1, 2) @ x[block]  # (block, d_out, d_in)
        right = left if squares else v[block].transpose(1, 2) @ y[block]
        total += (left * right).sum(0)
