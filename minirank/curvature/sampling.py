"""What the sampled estimates share: drawing random vectors pass by pass, until enough is known."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..measure import LossFn, differentiable_twice, repeatable
from .estimate import DiagonalMean, Estimate, check_tolerance

# {name: (the sum of K samples' diagonals, (d_out, d_in); each one's trace, (K,))}, None for a layer without a call
Probed = Mapping[str, tuple[Tensor, Tensor] | None]
BLOCK = 2**18  # numbers


def probe(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Iterable[Any],
    one_batch: Callable[[Any, int], Probed],
    total: DiagonalMean,
    samples: int,
    tolerance: float | None,
    chunk_size: int,
    batch_weight: Callable[[Any], float],
) -> Estimate:
    """The mean over `samples` samples, or fewer if the tolerance is met: each is a weighted mean over all batches of
    one_batch's. A pass over the batches draws `chunk_size` of them, one_batch(batch, K) K at once."""
    drawn = 0
    with differentiable_twice(model):
        while drawn < samples and not total.known_to(tolerance):
            count = min(chunk_size, samples - drawn)
            traces: dict[str, Tensor | float] = dict.fromkeys(total.means, 0.0)
            weights = 0.0
            for batch in repeatable(model, loss_fn, batches) if drawn == 0 else batches:
                weight = batch_weight(batch)
                weights += weight
                for name, found in one_batch(batch, count).items():
                    total.add(name, None if found is None else found[0] / count, weight * count)
                    if found is not None:
                        traces[name] = traces[name] + found[1] * weight
            if weights == 0 and drawn:
                raise ValueError(
                    f"the batches can be iterated only once, but {samples} samples in chunks of {chunk_size} need "
                    "several passes: give a list or a DataLoader, or chunk_size=samples"
                )
            drawn += count
            if weights:
                total.add_traces(
                    {name: torch.as_tensor(t / weights).expand(count) for name, t in traces.items()}
                )
            else:
                break  # result() names the fault
    return total.result(passes=drawn)


def outer_products(u: Tensor, v: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Σ over samples n of (Σ_t u_nti x_ntj)(Σ_t v_nti y_ntj), for K samples of u and v.

    u, v: (K, n, T, d_out); x: (n, T, d_in); y: the same, or (K, n, T, d_in) → their sum (d_out, d_in), traces (K,).
    """
    if x.shape[1] == 1 and y is x:  # one position: Σ_n u_ni v_ni x_nj²
        uv, squares = (u * v)[:, :, 0], x[:, 0].square()
        return uv.sum(0).t() @ squares, uv.sum(2) @ squares.sum(1)
    total = x.new_zeros(u.shape[-1], x.shape[-1])
    traces = x.new_zeros(len(u))
    block = max(
        1, BLOCK // total.numel()
    )  # samples taken together: what stays in a processor's cache is fastest
    for k in range(len(u)):
        for first in range(0, len(x), block):
            some = slice(first, first + block)
            left = u[k, some].transpose(1, 2) @ x[some]  # (block, d_out, d_in)
            if v is u and y is x:
                left.square_()
            else:
                left.mul_(v[k, some].transpose(1, 2) @ (y[some] if y.ndim == 3 else y[k, some]))
            total += left[0] if len(left) == 1 else left.sum(0)
            traces[k] += left.sum()
    return total, traces


def random_signs(like: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """±1 with equal chance, (count, *like.shape), drawn on the generator's device."""
    bits = torch.randint(0, 2, (count, *like.shape), generator=generator, device=generator.device)
    return (2 * bits - 1).to(like)


def check_sampling(
    samples: int, tolerance: float | None, generator: torch.Generator | None
) -> None:
    if not isinstance(
        generator, torch.Generator
    ):  # a seed would give groups of batches the same vectors
        raise TypeError(
            f"random vectors need generator=torch.Generator().manual_seed(…), got {generator!r}"
        )
    check_tolerance(tolerance)
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
