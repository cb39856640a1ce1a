"""Hutchinson's estimates of the Hessian diagonal: for a random vector v of independent signs, E[v ⊙ H v] = diag(H).

One Hessian-vector product serves all layers. The signs can be those of the weights, as in the textbook, or of the
outputs z = W x + b of the layers, one for every sample and position: see hessian.py for why these suffice. There

    h(W_ij) ≈ Σ over samples of  (Σ_t v_ti x_tj) (Σ_t' (H_z v)_t'i x_t'j)

which has the exact diagonal as its mean, since E[v_ti v_sk] = 1 for (t, i) = (s, k) and 0 otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.targets import Targets
from ..measure import LossFn, batch_length, differentiable_loss
from .estimate import DiagonalMean, Estimate
from .layer_outputs import (
    Call,
    check_independent,
    curvature_targets,
    gradients,
    path_slopes,
    products,
    rows,
    shifted_outputs,
    shifts_of,
    slopes_of,
    weight_shifts,
)
from .sampling import Probed, check_sampling, outer_products, probe, random_signs


def hutchinson_weights(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Iterable[Any],
    targets: Targets = None,
    *,
    generator: torch.Generator,
    samples: int = 100,
    tolerance: float | None = None,
    chunk_size: int = 10,
    batch_weight: Callable[[Any], float] = batch_length,
) -> Estimate:
    """The Hessian diagonal by random signs on the weights (Hutchinson 1990; Bekas, Kokiopoulou and Saad 2007).

    Target: the exact diagonal on `batches`. Bias: none. Variance of one sample's entry i: Σ over j ≠ i of H_ij², over
    the weights j of all targets, and of their traces 2 Σ over i ≠ j of H_ij² (weighted over batches, which get
    vectors of their own). Makes no assumption on the samples of a batch.

    Cost of a sample: a Hessian-vector product per batch; and for every `chunk_size` samples, a forward pass and a
    backward pass with its graph kept per batch. Memory: `chunk_size` times one backward pass and the diagonals.

    Args:
        generator: of the random signs. One seed gives one result on every device if it is a CPU generator.
        samples: random vectors per batch, at most.
        tolerance: stop once the standard error of every trace is at most this fraction of the mean |trace| over the
            layers (checked after every `chunk_size` samples, from 10 on), or `samples` are used up: the result's
            standard errors tell. None: take all samples. A run stopped this way errs a little more often than its
            standard errors say.
        chunk_size: products taken together, and samples per pass over the batches, which more than one pass iterates
            anew. 1 takes them one by one, for models that torch.vmap cannot handle.
        batch_weight: what a batch's mean loss weighs in the total; the number of its samples.

    Returns: {name: (d_out, d_in)}, entries of either sign; float32 for a half-precision model; with standard errors
    over probes.

    Raises ValueError: as for `exact_hessian_diagonal`, and batches that a second pass finds used up. TypeError: no
    generator.
    """
    modules = curvature_targets(model, targets, chunk_size)
    check_sampling(samples, tolerance, generator)

    def one_batch(batch: Any, count: int) -> Probed:
        E = weight_shifts(modules)
        with shifted_outputs(modules, E) as calls:
            loss = differentiable_loss(model, loss_fn, batch)
        slopes = gradients(loss, list(E.values()), twice=True)
        signs = [random_signs(e, count, generator) for e in E.values()]
        found = {}
        for name, v, Hv in zip(E, signs, products(slopes, list(E.values()), signs), strict=True):
            h = v * Hv
            found[name] = (h.sum(0), h.sum((1, 2))) if calls[name] else None
        return found

    total = DiagonalMean(modules, over="probes")
    return probe(
        model, loss_fn, batches, one_batch, total, samples, tolerance, chunk_size, batch_weight
    )


def hutchinson_outputs(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Iterable[Any],
    targets: Targets = None,
    *,
    generator: torch.Generator,
    samples: int = 100,
    tolerance: float | None = None,
    chunk_size: int = 10,
    batch_weight: Callable[[Any], float] = batch_length,
    independent: bool = True,
) -> Estimate:
    """The Hessian diagonal by random signs on the layers' outputs (see the top of the file; the chain rule is the one
    of `exact_hessian_diagonal`).

    Target: the exact diagonal on `batches`. Bias: none. Variance: as for `hutchinson_weights`, with the Hessian over
    the outputs in place of the one over weights; every sample has its own signs, so that a batch of n averages n of
    them. Usually smaller per entry, and not always for the trace.

    Cost and memory: as for `hutchinson_weights`, and per sample two matrix products of the size of a layer's gradient.

    Args: as for `hutchinson_weights`; `independent` as for `exact_hessian_diagonal`, checked on each batch's first
    pass. False: a batch counts as one sample, which has more variance.

    Returns and raises: as for `hutchinson_weights`; also ValueError for samples that interact.
    """
    modules = curvature_targets(model, targets, chunk_size)
    check_sampling(samples, tolerance, generator)
    total = DiagonalMean(modules, over="probes")

    def one_batch(batch: Any, count: int) -> Probed:
        with shifted_outputs(modules) as calls:
            loss = differentiable_loss(model, loss_fn, batch)
        slopes = slopes_of(loss, calls, twice=True)
        shifts, flat = shifts_of(calls), [g for found in slopes.values() for g in found]
        check = independent and not total.samples
        if check:
            check_independent(shifts, flat)
        signs = [random_signs(shift, count, generator) for shift in shifts]
        curved = iter(products(flat, shifts, signs))
        of_call = iter(signs)
        found = {}
        for name, of_layer in calls.items():
            v = [next(of_call) for _ in of_layer]
            Hv = [next(curved) for _ in of_layer]
            found[name] = (
                _through_outputs(of_layer, slopes[name], v, Hv, independent, check)
                if of_layer
                else None
            )
        return found

    return probe(
        model, loss_fn, batches, one_batch, total, samples, tolerance, chunk_size, batch_weight
    )


def _through_outputs(
    found: list[Call],
    slopes: list[Tensor],
    v: list[Tensor],
    Hv: list[Tensor],
    independent: bool,
    check: bool,
) -> tuple[Tensor, Tensor]:
    """One layer, one batch; v and Hv: (K, *shift.shape) for every call → what `outer_products` returns."""
    inputs, shifts = [call.x for call in found], [call.shift for call in found]
    x = rows([x.detach() for x in inputs], independent)
    signs = rows(v, independent, batched=True)  # (K, n, T, d_out)
    h, traces = outer_products(signs, rows(Hv, independent, batched=True), x, x)
    if len(inputs) > 1 and any(x.requires_grad for x in inputs):
        # The layer is called again on its own outputs: 2 Σ (Σ_t v_ti x_tj) (Σ_t' ∂L/∂z_t'i · (∂x/∂z v)_t'j)
        w, back = path_slopes(inputs, shifts)
        if check:
            check_independent(w, back)
        moved = rows(products(back, w, v), independent, batched=True)  # (K, n, T, d_in)
        g = rows([slope.detach() for slope in slopes], independent).expand_as(signs)
        path, path_traces = outer_products(signs, g, x, moved)
        h, traces = h + 2 * path, traces + 2 * path_traces
    return h, traces
