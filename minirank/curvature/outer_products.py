"""From layer outputs to weights: the sum over samples of products of two outer products."""

from __future__ import annotations

from torch import Tensor

BLOCK = 2**18  # numbers computed together: what stays in a processor's cache is fastest
LARGE = 2**13  # numbers of one sample from which a call for each sample costs least


def outer_products(u: Tensor, v: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Σ over samples n of (Σ_t u_nti x_ntj)(Σ_t v_nti y_ntj), over positions t, for K samples of u
    and v.

    u, v: (K, n, T, d_out). x: (n, T, d_in). y: like x, or (K, n, T, d_in).
    Returns: the sum over the K, (d_out, d_in), and the trace of each of the K, (K,).
    Memory: the result twice, and for each factor BLOCK numbers, or one sample's outer product if
    that is more.
    """
    if x.shape[1] == 1 and y is x:  # one position: Σ_n u_ni v_ni x_nj²
        uv, squares = (u * v)[:, :, 0], x[:, 0].square()
        return uv.sum(0).t() @ squares, uv.sum(2) @ squares.sum(1)
    total = x.new_zeros(u.shape[-1], x.shape[-1])
    traces = x.new_zeros(len(u))
    of_one = total if len(u) == 1 else x.new_empty(total.shape)
    block_size = max(1, BLOCK // total.numel())
    for k in range(len(u)):
        of_one.zero_()
        for first in range(0, len(x), block_size):
            block = slice(first, first + block_size)
            left = u[k, block].transpose(1, 2) @ x[block]  # (block, d_out, d_in)
            if v is u and y is x:
                right = left
            else:
                y_block = y[block] if y.ndim == 3 else y[k, block]
                right = v[k, block].transpose(1, 2) @ y_block
            _add_products(of_one, left, right)
        traces[k] = of_one.sum()
        if of_one is not total:
            total += of_one
    return total, traces


def _add_products(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += Σ over samples of left · right, entry by entry. left, right: (n, d_out, d_in)."""
    if total.numel() < LARGE:
        total += (left * right).sum(0)
        return
    for of_left, of_right in zip(left, right, strict=True):
        total.addcmul_(of_left, of_right)
