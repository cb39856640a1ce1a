"""Tests of what the estimators assume of a batch: samples do not interact, rounding is small.

Both are tested by products vᵀ A, A being the derivative ∂values/∂variables:

- If samples do not interact, A has one block per sample. Then scaling each sample's part of v
  scales that sample's part of the product.
- In exact arithmetic, 0.83 v gives 0.83 times the product. How far it is off tells what rounding
  does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

NUDGE = 0.83  # any factor that is not a power of two, which would not round


def check_independent(values: Sequence[Tensor], variables: Sequence[Tensor]) -> None:
    """Raise ValueError if samples interact in ∂values/∂variables, or if it is mostly rounding.

    The first dimension of every tensor must count samples.
    """
    trial = _try_scaling(values, variables)
    check_resolved(trial.rounding, trial.largest)
    if trial.samples_interact:
        _refuse(
            values,
            variables,
            "pass independent=False, which assumes nothing, or use hessian_diagonal_reference",
        )


def check_independent_gradients(values: Sequence[Tensor], variables: Sequence[Tensor]) -> None:
    """`check_independent` for an estimator that uses each sample's gradient, and no second
    derivative.

    Rounding in ∂values/∂variables then does not matter. Such an estimator has no form for samples
    that interact.
    """
    if _try_scaling(values, variables).samples_interact:
        _refuse(values, variables, "use gauss_newton(…, independent=False), which assumes nothing")


def check_resolved(rounding: float, largest: float) -> None:
    """Raise ValueError if the bound on rounding exceeds the largest product."""
    if rounding > largest:
        raise ValueError(
            f"the curvature of a batch is lost in rounding (products up to {largest:.1e}, 1 % of "
            "them error or more): the loss is near zero for this precision. Use model.double(), "
            "with inputs in float64"
        )


def rounding_bound(product: Tensor, nudged: Tensor) -> float:
    """A bound on the rounding error of product = A v, from nudged = A (NUDGE · v): 100 times what
    is seen.

    Where terms cancel, as in a saturated softmax, the error can be far above machine precision.
    """
    return 100 * float((nudged - NUDGE * product).abs().max())


class _Trial(NamedTuple):
    samples_interact: bool
    rounding: float = 0.0  # a bound on the rounding error of all products
    largest: float = 0.0  # the largest |entry| of all products


def _try_scaling(values: Sequence[Tensor], variables: Sequence[Tensor]) -> _Trial:
    """Compare products with random vectors, with the same vectors scaled by sample, and nudged."""
    lengths = _first_dimensions(values, variables)
    if not variables:
        return _Trial(samples_interact=False)
    if len(lengths) > 1:
        return _Trial(samples_interact=True)
    values_with_graph = [value for value in values if value.requires_grad]
    if not values_with_graph:  # the derivative is zero
        return _Trial(samples_interact=False)

    (n,) = lengths
    generator = torch.Generator().manual_seed(0)
    # Scales that all differ try every pair of samples.
    scales = torch.rand(n, generator=generator, device=generator.device) + 0.5
    vectors = [
        torch.randn(value.shape[1:], generator=generator, device=generator.device)
        .to(value)
        .expand_as(value)
        for value in values_with_graph
    ]
    plain, scaled, nudged = (
        torch.autograd.grad(
            values_with_graph, variables, v, retain_graph=True, materialize_grads=True
        )
        for v in (
            vectors,
            [_scale_samples(v, scales) for v in vectors],
            [v * NUDGE for v in vectors],
        )
    )
    largest = max(float(product.abs().max()) for product in plain)
    rounding = [rounding_bound(p, q) for p, q in zip(plain, nudged, strict=True)]
    samples_interact = n > 1 and any(
        float((_scale_samples(p, scales) - s).abs().max()) > _allowed_difference(p, largest, r)
        for p, s, r in zip(plain, scaled, rounding, strict=True)
    )
    return _Trial(samples_interact, max(rounding), largest)


def _allowed_difference(product: Tensor, largest: float, rounding: float) -> float:
    """Up to half of the digits of this variable's own product, or what rounding explains."""
    eps: float = torch.finfo(product.dtype).eps
    half_of_the_digits: float = eps**0.5 * float(product.abs().max())
    return max(half_of_the_digits, 100 * eps * largest, rounding)


def _refuse(values: Sequence[Tensor], variables: Sequence[Tensor], way_out: str) -> None:
    lengths = sorted(_first_dimensions(values, variables))
    raise ValueError(
        "the samples of a batch interact (a loss across samples, batch statistics, or layer "
        f"inputs whose first dimension does not count samples; first dimensions seen: {lengths}): "
        f"{way_out}"
    )


def _first_dimensions(values: Sequence[Tensor], variables: Sequence[Tensor]) -> set[int]:
    return {tensor.shape[0] if tensor.ndim > 1 else 1 for tensor in (*variables, *values)}


def _scale_samples(x: Tensor, scales: Tensor) -> Tensor:
    """x: (n, …). scales: (n,)."""
    return x * scales.to(x).view(-1, *[1] * (x.ndim - 1))
