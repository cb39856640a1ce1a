"""Exact diagonals of the Hessian of the mean loss, with respect to the weights of linear layers. Each layer counts
alone, and by its outputs: of a weight that is used elsewhere as well (tied to another module, or penalised by the
loss), only the use in this layer.

Two ways to the same numbers. `hessian_diagonal_reference` takes one Hessian-vector product per weight: slow, and so
plain that nobody doubts it. `exact_hessian_diagonal` goes through the outputs z = W x + b of each layer: W acts only
through z, linearly, so by the chain rule

    h(W_ij) = Σ over samples, positions t, t' of  ∂²L / ∂z_ti ∂z_t'i · x_tj x_t'j

and d_out × positions products per batch give the whole diagonal, however large d_in is. One product serves all samples
of a batch at once, as long as samples do not interact: the Hessian over z is then block-diagonal, and the blocks of a
sum of columns can be read apart. A layer that is called again on its own outputs adds the curvature of that path,

    2 Σ over t, t' of  ∂L / ∂z_t'i · ∂x_t'j / ∂z_ti · x_tj
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.targets import Targets
from ..measure import (
    LossFn,
    batch_length,
    differentiable_loss,
    differentiable_twice,
    repeatable,
)
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


def exact_hessian_diagonal(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Iterable[Any],
    targets: Targets = None,
    *,
    chunk_size: int = 64,
    batch_weight: Callable[[Any], float] = batch_length,
    independent: bool = True,
) -> Estimate:
    """The exact diagonal through the layers' outputs (see the top of the file).

    Cost per batch: one forward and one backward pass with its graph kept, and d_out · positions Hessian-vector
    products per layer, `chunk_size` of them at a time. Memory: `chunk_size` times that of one backward pass.

    Args:
        targets: see `linear_targets`.
        chunk_size: products taken together. 1 takes them one by one, for models that torch.vmap cannot handle.
        batch_weight: what a batch's mean loss weighs in the total; the number of its samples. For a loss that is a
            mean over tokens, give their number.
        independent: the first dimension of every layer's input counts samples, and no sample's loss depends on
            another sample. It is checked on each batch. False: no such assumption (a loss across samples, BatchNorm's
            batch statistics, inputs that come flattened), at positions = all rows of the batch.

    Returns: {name: (d_out, d_in)} on the module's device, in the dtype of its output; a half-precision model is
    computed in float32. Entries can be negative. The standard errors are over batches, see `Estimate`.

    Raises ValueError: samples interact, no batch, a loss that is not a finite scalar with its graph or not
    deterministic, a layer that no batch reaches or that does not compute W x + b.
    """
    modules = curvature_targets(model, targets, chunk_size)
    total = DiagonalMean(modules)
    with differentiable_twice(model):
        for batch in repeatable(model, loss_fn, batches):
            weight = batch_weight(batch)
            with shifted_outputs(modules) as calls:
                loss = differentiable_loss(model, loss_fn, batch)
            slopes = slopes_of(loss, calls, twice=True)
            if independent:
                check_independent(shifts_of(calls), [g for found in slopes.values() for g in found])
            for name, found in calls.items():
                h = _diagonal(found, slopes[name], chunk_size, independent) if found else None
                total.add(name, h, weight)
    return total.result()


def _diagonal(
    found: list[Call], slopes: list[Tensor], chunk_size: int, independent: bool
) -> Tensor:
    """One layer, one batch, from each call's x, shift and ∂L/∂z. → (d_out, d_in)."""
    inputs, shifts = [call.x for call in found], [call.shift for call in found]
    x = rows([x.detach() for x in inputs], independent)  # (n, T, d_in)
    g = rows(slopes, independent)  # (n, T, d_out)
    h = x.new_zeros(g.shape[2], x.shape[2], dtype=g.dtype)
    # The gradient of a sum over samples holds one column of each sample's block.
    for index, columns in _columns(g.sum(0), shifts, chunk_size):
        t, i = index // len(h), index % len(h)
        every = rows(columns, independent, batched=True)  # (K, n, T, d_out)
        block = every[torch.arange(len(index)), :, :, i]  # (K, n, T): ∂²L / ∂z_ti ∂z_t'i over t'
        mixed = torch.einsum("knt,ntj->knj", block, x)
        h.index_add_(0, i, (mixed * x[:, t].transpose(0, 1)).sum(1))
    if len(inputs) > 1 and any(x.requires_grad for x in inputs):
        w, back = path_slopes(inputs, shifts)
        if independent:
            check_independent(w, back)
        for index, columns in _columns(rows(back, independent).sum(0), w, chunk_size):
            t, i = index // len(h), index % len(h)
            moved = rows(
                columns, independent, batched=True
            )  # (K, n, T, d_in): ∂x_t'j / ∂z_ti over t', j
            path = torch.einsum(
                "knt,kntj->knj", g.detach()[:, :, i].permute(2, 0, 1), moved
            )  # (K, n, d_in)
            h.index_add_(0, i, 2 * (path * x[:, t].transpose(0, 1)).sum(1))
    return h


def _columns(
    slope: Tensor, inputs: list[Tensor], chunk_size: int
) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """∂ slope_k / ∂ inputs for every entry k of `slope`, (T, d_out): chunks of (indices k, (K, *input.shape) each)."""
    if not slope.requires_grad:  # everything is linear here: no second derivative
        return
    for start in range(0, slope.numel(), chunk_size):
        index = torch.arange(start, min(start + chunk_size, slope.numel()), device=slope.device)
        vectors = slope.new_zeros(len(index), slope.numel())
        vectors[torch.arange(len(index)), index] = 1
        yield index, products([slope], inputs, [vectors.view(-1, *slope.shape)])


def hessian_diagonal_reference(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Iterable[Any],
    targets: Targets = None,
    *,
    chunk_size: int = 64,
    batch_weight: Callable[[Any], float] = batch_length,
) -> Estimate:
    """The exact diagonal, entry by entry: e_kᵀ H e_k for each weight k, W being replaced by W + E at E = 0.

    Cost per batch: d_out · d_in Hessian-vector products per layer. Makes no assumption on the samples. Arguments,
    result and errors as for `exact_hessian_diagonal`.
    """
    modules = curvature_targets(model, targets, chunk_size)
    total = DiagonalMean(modules)
    with differentiable_twice(model):
        for batch in repeatable(model, loss_fn, batches):
            weight = batch_weight(batch)
            E = weight_shifts(modules)
            with shifted_outputs(modules, E) as calls:
                loss = differentiable_loss(model, loss_fn, batch)
            for name, slope in zip(E, gradients(loss, list(E.values()), twice=True), strict=True):
                h = torch.zeros_like(slope).flatten()
                for index, (columns,) in _columns(slope, [E[name]], chunk_size):
                    h[index] = columns.flatten(1)[torch.arange(len(index)), index]
                total.add(name, h.detach().view_as(slope) if calls[name] else None, weight)
    return total.result()
