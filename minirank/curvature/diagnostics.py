"""Tests of what the estimators assume of a batch: samples do not interact, rounding is small.

Both are tested by products vᵀ A, A being the derivative ∂values/∂variables:

- If samples do not interact, A has one block per sample. Then scaling each sample's part of v
  scales that sample's part of the product.
- In exact arithmetic, both ways of scaling give the same. If they differ by little, rounding is
  little too. If they differ by more, the product with 0.83 v tells what rounding does: it should be
  0.83 times the product with v, whether samples interact or not.

So a sound batch costs two products, or one beyond a product that the estimator takes anyway. If
that product is with random signs, it can hide an interaction: signs cancel by chance. So the first
batch takes random numbers, which do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

NUDGE = 0.83  # any factor that is not a power of two, which would not round


class Product(NamedTuple):
    """A product vᵀ ∂values/∂variables that is known already."""

    vectors: Sequence[Tensor]  # v, one per value, of its shape
    result: Sequence[Tensor]  # one per variable, of its shape


def several_samples(variables: Sequence[Tensor]) -> bool:
    """Whether any of them has more than one sample, so that samples could interact."""
    return any(variable.ndim > 1 and variable.shape[0] > 1 for variable in variables)


def check_independent(
    values: Sequence[Tensor], variables: Sequence[Tensor], known: Product | None = None
) -> None:
    """Raise ValueError if samples interact in ∂values/∂variables, or if it is mostly rounding.

    The first dimension of every tensor must count samples.
    known: a product that was taken anyway; None: one with random numbers is taken.
    """
    trial = _try_scaling(values, variables, known)
    check_resolved(trial.rounding, trial.largest)
    if trial.samples_interact:
        _refuse(
            values,
            variables,
            "pass independent=False, which assumes nothing, or use hessian_diagonal_reference",
        )


class IndependenceCheck:
    """`check_independent` of one batch after another, beside products with random signs.

    The first batch with several samples is checked by random numbers instead, since signs could
    hide an interaction there: they can cancel by chance.
    """

    def __init__(self) -> None:
        self._checked_by_random_numbers = False

    def of_batch(
        self,
        values: Sequence[Tensor],
        variables: Sequence[Tensor],
        vectors: Sequence[Tensor],
        products: Sequence[Tensor],
    ) -> None:
        """Raise ValueError as `check_independent`.

        vectors, products: what `vector_jacobian_products` took and gave, for K vectors. The first
        of them is the known product.
        """
        known = None
        if self._checked_by_random_numbers:
            known = Product([v[0] for v in vectors], [product[0] for product in products])
        check_independent(values, variables, known)
        self._checked_by_random_numbers |= several_samples(variables)


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
    return 100 * _largest(nudged - NUDGE * product)


class _Trial(NamedTuple):
    samples_interact: bool
    rounding: float = 0.0  # a bound on the rounding error of all products
    largest: float = 0.0  # the largest |entry| of all products


def _try_scaling(
    values: Sequence[Tensor], variables: Sequence[Tensor], known: Product | None = None
) -> _Trial:
    """Compare products with random vectors, and with the same vectors scaled by sample. If these
    leave a doubt, another product tells rounding from interactions."""
    lengths = _first_dimensions(values, variables)
    if not variables:
        return _Trial(samples_interact=False)
    if len(lengths) > 1:
        return _Trial(samples_interact=True)
    with_graph = [index for index, value in enumerate(values) if value.requires_grad]
    if not with_graph:  # the derivative is zero
        return _Trial(samples_interact=False)

    def product(vectors: Sequence[Tensor]) -> Sequence[Tensor]:
        return torch.autograd.grad(
            [values[index] for index in with_graph],
            variables,
            vectors,
            retain_graph=True,
            materialize_grads=True,
        )

    (n,) = lengths
    generator = torch.Generator().manual_seed(0)
    # Scales that all differ try every pair of samples.
    scales = torch.rand(n, generator=generator, device=generator.device) + 0.5
    if known is None:
        vectors = [_same_for_all_samples(values[index], generator) for index in with_graph]
        plain = product(vectors)
    else:
        vectors, plain = [known.vectors[index] for index in with_graph], known.result
    scaled = product([v * _per_sample(scales, v) for v in vectors])
    differences = [
        _largest(torch.addcmul(s, p, _per_sample(scales, p), value=-1))
        for p, s in zip(plain, scaled, strict=True)
    ]
    sizes = [_largest(p) for p in plain]
    largest = max(sizes)
    eps = torch.finfo(plain[0].dtype).eps
    # Up to half of the digits of a variable's own product, or 100 roundings of the largest one
    allowed = [max(eps**0.5 * size, 100 * eps * largest) for size in sizes]
    if not _any_above(differences, allowed):  # which is far below 1 % of the largest entry
        return _Trial(samples_interact=False)
    if known is not None:  # Its terms may cancel by chance, which leaves rounding alone.
        return _try_scaling(values, variables)
    nudged = product([v * NUDGE for v in vectors])
    bounds = [rounding_bound(p, q) for p, q in zip(plain, nudged, strict=True)]
    allowed = [max(pair) for pair in zip(allowed, bounds, strict=True)]
    return _Trial(n > 1 and _any_above(differences, allowed), max(bounds), largest)


def _any_above(values: Sequence[float], limits: Sequence[float]) -> bool:
    return any(value > limit for value, limit in zip(values, limits, strict=True))


def _same_for_all_samples(value: Tensor, generator: torch.Generator) -> Tensor:
    """Random numbers of the shape of `value`, (n, …), the same for all n."""
    one = torch.randn(value.shape[1:], generator=generator, device=generator.device)
    return one.to(value).expand_as(value)


def _largest(x: Tensor) -> float:
    """The largest |entry|; NaN if there is one."""
    low, high = x.detach().aminmax()
    return float(torch.maximum(-low, high))


def _refuse(values: Sequence[Tensor], variables: Sequence[Tensor], way_out: str) -> None:
    lengths = sorted(_first_dimensions(values, variables))
    raise ValueError(
        "the samples of a batch interact (a loss across samples, batch statistics, or layer "
        f"inputs whose first dimension does not count samples; first dimensions seen: {lengths}): "
        f"{way_out}"
    )


def _first_dimensions(values: Sequence[Tensor], variables: Sequence[Tensor]) -> set[int]:
    return {tensor.shape[0] if tensor.ndim > 1 else 1 for tensor in (*variables, *values)}


def _per_sample(scales: Tensor, x: Tensor) -> Tensor:
    """The n scales in the shape that multiplies the samples of x, (n, …)."""
    return scales.to(x).view(-1, *[1] * (x.ndim - 1))
