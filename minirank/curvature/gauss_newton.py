"""The Gauss-Newton diagonal: a positive stand-in for the Hessian's, from first derivatives of the network.

With y the model's output, J = ∂y/∂W and H_y the Hessian of the loss over y, the Gauss-Newton matrix Jᵀ H_y J is the
Hessian without the curvature of the network itself (Schraudolph 2002); for a cross-entropy or a squared error it is the
Fisher matrix (Martens 2020). With H_y = S Sᵀ, its diagonal is the sum of squared gradients Jᵀ s over the columns s of
S, or the mean of squares for random mixtures s = S ξ of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..layers.targets import Targets, did_you_mean
from ..measure import (
    LossFn,
    batch_length,
    differentiable_loss,
    differentiable_twice,
    repeatable,
)
from .estimate import DiagonalMean, Estimate, check_tolerance
from .layer_outputs import (
    NUDGE,
    Call,
    Calls,
    check_independent,
    check_resolved,
    curvature_targets,
    gradients,
    products,
    rounding,
    rows,
    shifted_outputs,
    shifts_of,
)
from .sampling import Probed, check_sampling, outer_products, probe, random_signs

DENSE_LIMIT = 512  # columns of y for which an H_y that is neither diagonal nor softmax's is taken apart numerically


def gauss_newton(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Iterable[Any],
    targets: Targets = None,
    *,
    output: str = "",
    samples: int | None = None,
    generator: torch.Generator | None = None,
    tolerance: float | None = None,
    chunk_size: int = 10,
    batch_weight: Callable[[Any], float] = batch_length,
    independent: bool = True,
) -> Estimate:
    """The diagonal of the (generalised) Gauss-Newton matrix, exact or by Monte Carlo.

    Target: diag(Jᵀ H_y J) on `batches`. As a stand-in for the Hessian its bias is the network's own curvature, which
    fades as the residuals do; none for a network that is linear in W. Never negative. Sampled: unbiased for that
    target; random signs ξ mix the columns of S (drawing a label, as is usual, is another such mixture).

    Cost: per batch a forward pass, four products with the Hessian of the loss alone, and one backward pass for each
    entry of a sample's output (positions · C), or for each sample of ξ. Memory: `chunk_size` times one backward pass.

    Args:
        output: name of the module whose output tensor, of shape (…, C), is y: "" is the model itself. The loss must be
            convex in y and a sum over its rows: cross-entropies with softmax, squared errors and binary
            cross-entropies are recognised, at any C; what else there is may have 512 columns. For a transformers
            model that computes the loss itself, name its head, such as "classifier" or "lm_head".
        samples: None: exact. Otherwise random mixtures per batch, at most; they need `generator`.
        tolerance, chunk_size, batch_weight, independent: as for `hutchinson_outputs`; if exact, `tolerance` stops
            before the end of the batches.

    Returns: {name: (d_out, d_in)}, with standard errors over batches if exact, over probes if sampled.

    Raises ValueError: as for `exact_hessian_diagonal`; y is no tensor, comes more than once, or the loss is not convex
    in it or mixes its rows. TypeError: samples without a generator.
    """
    modules = curvature_targets(model, targets, chunk_size)
    check_tolerance(tolerance)
    names = dict(model.named_modules(remove_duplicate=False))
    if output not in names:
        raise ValueError(f"output={output!r} names no module: {did_you_mean(output, names)}")

    def run(batch: Any, checks: bool) -> _Run:
        with shifted_outputs(modules) as calls, _shifted_output(names[output]) as outputs:
            loss = differentiable_loss(model, loss_fn, batch)
        if len(outputs) != 1:
            raise ValueError(
                f"the output {output!r} came {len(outputs)} times in one loss, but must come once"
            )
        y = outputs[0].x
        if y.ndim == 0:
            raise ValueError(
                "the model's output is a single number: name the head whose output the loss takes, output=…"
            )
        if y.ndim < 2:  # one number per sample, or one sample alone
            y = y[:, None] if any(shift.ndim > 1 for shift in shifts_of(calls)) else y[None]
        y = rows([y], independent)
        if checks and independent:
            check_independent(shifts_of(calls), [y])
        half = _half_hessian(loss, outputs[0].shift, y.detach())
        if checks:
            _check_through_output(loss, calls, y, outputs[0].shift)
        return _Run(calls, y, half)

    if samples is not None:
        check_sampling(samples, tolerance, generator)
        assert generator is not None

        total = DiagonalMean(modules, over="probes")

        def one_batch(batch: Any, count: int) -> Probed:
            of = run(batch, checks=not total.samples)
            return _squares(of, random_signs(of.y, count, generator), independent)

        return probe(
            model, loss_fn, batches, one_batch, total, samples, tolerance, chunk_size, batch_weight
        )

    total = DiagonalMean(modules)
    with differentiable_twice(model):
        for batch in repeatable(model, loss_fn, batches):
            of, weight = run(batch, checks=True), batch_weight(batch)
            sums: dict[str, Tensor | None] = dict.fromkeys(modules)
            for xi in _unit_vectors(of.y, chunk_size):
                for name, found in _squares(of, xi, independent).items():
                    if found is not None:
                        before = sums[name]
                        sums[name] = found[0] if before is None else before + found[0]
            for name, h in sums.items():
                total.add(name, h, weight)
            if total.known_to(tolerance):
                break
    return total.result()


def _check_through_output(loss: Tensor, calls: Calls, y: Tensor, shift: Tensor) -> None:
    """The loss must reach the layers through y alone: by the chain rule, ∂L/∂z = (∂y/∂z)ᵀ ∂L/∂y."""
    shifts = shifts_of(calls)
    whole = torch.autograd.grad(loss, [shift, *shifts], retain_graph=True, materialize_grads=True)
    through = products([y], shifts, [whole[0].view(1, *y.shape)])
    for direct, of_y in zip(whole[1:], through, strict=True):
        if float((direct - of_y[0]).abs().max()) > torch.finfo(y.dtype).eps ** 0.5 * float(
            direct.abs().max()
        ):
            raise ValueError(
                "the loss depends on a layer by another way than the output (an auxiliary loss, a second head), which "
                "gauss_newton cannot see: name an output= through which all of it passes, or use hutchinson_outputs"
            )


class _Run(NamedTuple):
    """One batch's forward pass."""

    calls: Calls
    y: Tensor  # (n, T, C)
    half: Callable[[Tensor], Tensor]  # ξ (K, n, T, C) → S ξ, row by row


def _squares(of: _Run, xi: Tensor, independent: bool) -> Probed:
    """The squares of the gradient of y along S ξ, for each ξ of (K, n, T, C)."""
    found = iter(products([of.y], shifts_of(of.calls), [of.half(xi)]))
    result: dict[str, tuple[Tensor, Tensor] | None] = {}
    for name, calls in of.calls.items():
        result[name] = _squared([next(found) for _ in calls], calls, independent) if calls else None
    return result


def _squared(slopes: list[Tensor], calls: list[Call], independent: bool) -> tuple[Tensor, Tensor]:
    g = rows(slopes, independent, batched=True)
    x = rows([call.x.detach() for call in calls], independent)
    return outer_products(g, g, x, x)


def _unit_vectors(y: Tensor, chunk_size: int) -> Iterator[Tensor]:
    """Each entry of a sample's y, (T, C), for all samples at once: chunks of (K, n, T, C)."""
    n, T, C = y.shape
    for start in range(0, T * C, chunk_size):
        index = torch.arange(start, min(start + chunk_size, T * C), device=y.device)
        xi = y.new_zeros(len(index), n, T * C)
        xi[torch.arange(len(index)), :, index] = 1
        yield xi.view(-1, n, T, C)


def _half_hessian(loss: Tensor, shift: Tensor, y: Tensor) -> Callable[[Tensor], Tensor]:
    """ξ → S ξ with S Sᵀ = H_y, which is the Hessian over `shift` and has one block (C, C) per row of y."""
    (slope,) = gradients(loss, [shift], twice=True)
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y)
    scales = torch.rand(*y.shape[:-1], 1, generator=generator, dtype=torch.float64).to(y) + 0.5

    def times(vectors: Tensor) -> Tensor:
        return products([slope], [shift], [vectors.view(-1, *shift.shape)])[0].view(vectors.shape)

    Hv, H_scaled, H_nudged, H_ones = times(
        torch.stack([v, scales * v, NUDGE * v, torch.ones_like(v)])
    )
    noise = rounding(Hv, H_nudged)
    limit = max(torch.finfo(y.dtype).eps ** 0.5 * float(Hv.abs().max()), noise)
    if float((H_scaled - scales * Hv).abs().max()) > limit:
        raise ValueError(
            "the loss mixes rows of the model's output (a loss across samples or positions), or is not a function of "
            "`output` alone, on which gauss_newton rests: use hutchinson_outputs"
        )
    # a (diag(p) − p pᵀ): cross-entropy, a being the row's weight in the mean. Hv = a p ⊙ u, and Hv / p keeps its digits
    # where p is next to 1 or 0.
    p = y.softmax(-1)
    u = v - (p * v).sum(-1, keepdim=True)
    ratio = torch.where(p > 1e3 * torch.finfo(p.dtype).tiny, Hv / p, 0)
    live = (ratio != 0).to(y)
    a = (ratio * u).sum(-1, keepdim=True) / (live * u.square()).sum(-1, keepdim=True).clamp(
        min=1e-30
    )
    digits = 1e3 * torch.finfo(y.dtype).eps
    if (
        bool(((ratio - live * a * u).abs() <= digits * a * u.abs().amax(-1, keepdim=True)).all())
        and y.shape[-1] > 1
    ):
        root = (a * p).sqrt()
        return lambda xi: root * xi - p * (root * xi).sum(-1, keepdim=True)
    check_resolved(noise, float(Hv.abs().max()))
    if (
        float((Hv - H_ones * v).abs().max()) <= limit
    ):  # diagonal: squared error, binary cross-entropy
        root = _root(H_ones, limit)
        return lambda xi: root * xi
    C = y.shape[-1]
    if C > DENSE_LIMIT:
        raise ValueError(
            f"the loss over an output of {C} columns is neither a softmax cross-entropy nor a sum over its entries; to "
            f"take it apart, there may be {DENSE_LIMIT} columns: use hutchinson_outputs"
        )
    units = torch.eye(C, dtype=y.dtype, device=y.device)[:, None, None].expand(-1, *y.shape)
    values, vectors = torch.linalg.eigh(
        times(units.contiguous()).permute(1, 2, 0, 3)
    )  # (n, T, C, C)
    S = vectors * _root(values, limit).unsqueeze(-2)
    return lambda xi: torch.einsum("ntcd,kntd->kntc", S, xi)


def _root(values: Tensor, limit: float) -> Tensor:
    if float(values.min()) < -limit:
        raise ValueError(
            "the loss is not convex in the model's output, on which gauss_newton rests: name a later output="
        )
    return values.clamp(min=0).sqrt()


@contextmanager
def _shifted_output(module: nn.Module) -> Iterator[list[Call]]:
    """Record the module's output (x) and add to it a shift of zeros."""
    outputs: list[Call] = []

    def hook(module: nn.Module, args: Any, output: Any) -> Tensor:
        if not isinstance(output, Tensor):
            raise ValueError(
                f"the output of {type(module).__name__} is a {type(output).__name__}, not a tensor: name the module "
                'whose output tensor enters the loss, such as output="classifier" or output="lm_head"'
            )
        outputs.append(Call(output, torch.zeros_like(output, requires_grad=True)))
        return output + outputs[-1].shift

    handle = module.register_forward_hook(hook)
    try:
        yield outputs
    finally:
        handle.remove()
