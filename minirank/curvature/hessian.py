"""Exact diagonals of the Hessian of the mean loss, with respect to the weights of linear layers.

`hessian_diagonal_reference` takes one Hessian-vector product per weight: slow, and too plain to be
in doubt. `exact_hessian_diagonal` gives the same numbers through the outputs z = W x + b of each
layer. W acts only through z, and linearly, so by the chain rule

    h(W_ij) = Σ over samples, positions t, t' of  ∂²L / ∂z_ti ∂z_t'i · x_tj x_t'j

and d_out · positions products per batch give the whole diagonal, however large d_in is. If samples
do not interact, the Hessian over z has one block per sample. One product then serves all samples of
a batch at once: it gives a sum of columns, one from each block, and these can be read apart.

A layer that is called again on its own outputs has inputs x that depend on earlier z. This adds

    2 Σ over t, t' of  ∂L / ∂z_t'i · ∂x_t'j / ∂z_ti · x_tj
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.targets import Targets
from ..measure import LossFn, batch_length
from .diagnostics import check_independent
from .estimate import Estimate
from .layer_outputs import (
    Call,
    all_shifts,
    feeds_itself,
    in_call_order,
    loss_gradients,
    output_gradients,
    recurrence_jacobian,
    shifted_outputs,
    shifted_weights,
    stack_positions,
    stacked_inputs,
    vector_jacobian_products,
    zero_weight_shifts,
)
from .objective import (
    BatchDiagonals,
    Objective,
    check_chunk_size,
    curvature_targets,
    mean_over_batches,
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
    """The exact diagonal of the Hessian, through the outputs of the layers.

    Target: h(W_ij) = ∂²L / ∂W_ij², L being the mean loss over all samples of `batches`.
    Bias: none. Variance: none on `batches`; the standard errors are over batches, as samples of
    more such data.
    Cost: for each batch a forward pass, a backward pass with its graph kept, and for each layer
    d_out · positions Hessian-vector products. Memory: `chunk_size` times that of one backward pass.

    Args:
        model: any nn.Module; it is measured in eval mode and left unchanged.
        loss_fn: (model, batch) -> scalar mean loss, with its graph.
        batches: any iterable; it is iterated once.
        targets: the linear layers; None: all. See `minirank.layers.targets.linear_targets`.
        chunk_size: Hessian-vector products taken at once. 1 takes them one by one, for models that
            torch.vmap cannot handle.
        batch_weight: batch -> the weight of its mean loss in the total; by default its number of
            samples. For a loss that is a mean over tokens, give their number.
        independent: True: the first dimension of every layer's input counts samples, and the loss
            of no sample depends on another. This is checked on each batch. False: nothing is
            assumed, at the cost of positions = all rows of the batch. That is for a loss across
            samples, batch statistics, or inputs that come flattened.

    Returns: {name: (d_out, d_in)}, on the layer's device, in the dtype of its output; float32 for a
    half-precision model. Entries can be negative.

    Raises:
        ValueError: samples interact; there is no batch; a loss is not a finite scalar, has no graph
            or is not deterministic; no batch reaches a layer; or a layer does not compute W x + b.

    Source: the chain rule, at the top of this file.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 1, bias=False))
    >>> x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    >>> h = exact_hessian_diagonal(model, lambda model, x: model(x).square().mean() / 2, [x])
    >>> h["0"].tolist()  # for ½ (w · x)², the mean of x_j²
    [[5.0, 10.0]]
    """
    check_chunk_size(chunk_size)
    layers = curvature_targets(model, targets)
    objective = Objective(model, loss_fn, batches, layers, batch_weight)

    def batch_diagonals(batch: Any) -> BatchDiagonals:
        with shifted_outputs(layers) as calls:
            loss = objective.loss(batch)
        gradients = output_gradients(loss, calls, differentiable=True)
        if independent:
            check_independent(in_call_order(gradients), all_shifts(calls))
        return {
            name: _layer_diagonal(layer_calls, gradients[name], chunk_size, independent)
            if layer_calls
            else None
            for name, layer_calls in calls.items()
        }

    return mean_over_batches(objective, batch_diagonals)


def _layer_diagonal(
    layer_calls: list[Call], gradients: list[Tensor], chunk_size: int, independent: bool
) -> Tensor:
    """One layer, one batch. gradients: ∂L/∂z of each call. → (d_out, d_in)."""
    x = stacked_inputs(layer_calls, independent)  # (n, T, d_in)
    g = stack_positions(gradients, independent)  # (n, T, d_out)
    d_out, d_in = g.shape[2], x.shape[2]
    h = x.new_zeros(d_out, d_in, dtype=g.dtype)
    shifts = [call.shift for call in layer_calls]
    # The gradient of a sum over samples holds one column of each sample's block.
    for index, columns in _jacobian_rows(g.sum(0), shifts, chunk_size):
        t, i = index // d_out, index % d_out
        stacked = stack_positions(columns, independent, batched=True)  # (K, n, T, d_out)
        block = stacked[
            torch.arange(len(index), device=index.device), :, :, i
        ]  # (K, n, T): ∂²L / ∂z_ti ∂z_t'i over t'
        mixed = torch.einsum("knt,ntj->knj", block, x)
        h.index_add_(0, i, (mixed * x[:, t].transpose(0, 1)).sum(1))
    if feeds_itself(layer_calls):
        _add_recurrence(h, layer_calls, g.detach(), x, chunk_size, independent)
    return h


def _add_recurrence(
    h: Tensor, layer_calls: list[Call], g: Tensor, x: Tensor, chunk_size: int, independent: bool
) -> None:
    """Add 2 Σ over t, t' of ∂L/∂z_t'i · ∂x_t'j/∂z_ti · x_tj to h.

    h: (d_out, d_in). g: (n, T, d_out). x: (n, T, d_in).
    """
    d_out = len(h)
    w, JTw = recurrence_jacobian(layer_calls)
    if independent:
        check_independent(JTw, w)
    summed = stack_positions(JTw, independent).sum(0)
    for index, rows in _jacobian_rows(summed, w, chunk_size):
        t, i = index // d_out, index % d_out
        dx_dz = stack_positions(rows, independent, batched=True)  # (K, n, T, d_in): ∂x_t'j / ∂z_ti
        path = torch.einsum("knt,kntj->knj", g[:, :, i].permute(2, 0, 1), dx_dz)  # (K, n, d_in)
        h.index_add_(0, i, 2 * (path * x[:, t].transpose(0, 1)).sum(1))


def _jacobian_rows(
    value: Tensor, variables: list[Tensor], chunk_size: int
) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """∂value_k / ∂variables for every entry k of `value`, `chunk_size` at a time: (the indices k,
    (K,); for each variable, (K, *variable.shape)). Nothing if `value` is constant, and all
    derivatives are zero."""
    if not value.requires_grad:
        return
    for start in range(0, value.numel(), chunk_size):
        index = torch.arange(start, min(start + chunk_size, value.numel()), device=value.device)
        units = value.new_zeros(len(index), value.numel())
        units[torch.arange(len(index), device=index.device), index] = 1
        yield index, vector_jacobian_products([value], variables, [units.view(-1, *value.shape)])


def hessian_diagonal_reference(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Iterable[Any],
    targets: Targets = None,
    *,
    chunk_size: int = 64,
    batch_weight: Callable[[Any], float] = batch_length,
) -> Estimate:
    """The exact diagonal of the Hessian, entry by entry: e_kᵀ H e_k for each weight k.

    This is the slow way for any model and loss: it assumes nothing about the samples of a batch. It
    shares its recording of layers and its loop over batches with the other estimators. For an
    independent check of them all, use `minirank.reference.hessian_diagonal`, which shares no line
    with them.

    Target, bias and variance: as for `exact_hessian_diagonal`.
    Cost: for each batch a forward pass, a backward pass with its graph kept, and for each layer
    d_out · d_in Hessian-vector products.

    Args, Returns, Raises: as for `exact_hessian_diagonal`; `independent` is not needed.

    Source: the definition. W + E takes the place of W, and the loss is differentiated twice by E at
    E = 0.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 1, bias=False))
    >>> x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    >>> h = hessian_diagonal_reference(model, lambda model, x: model(x).square().mean() / 2, [x])
    >>> h["0"].tolist()
    [[5.0, 10.0]]
    """
    check_chunk_size(chunk_size)
    layers = curvature_targets(model, targets)
    objective = Objective(model, loss_fn, batches, layers, batch_weight)

    def batch_diagonals(batch: Any) -> BatchDiagonals:
        E = zero_weight_shifts(layers)
        with shifted_weights(layers, E) as calls:
            loss = objective.loss(batch)
        gradients = loss_gradients(loss, list(E.values()), differentiable=True)
        return {
            name: _weight_diagonal(gradient, E[name], chunk_size) if calls[name] else None
            for name, gradient in zip(E, gradients, strict=True)
        }

    return mean_over_batches(objective, batch_diagonals)


def _weight_diagonal(gradient: Tensor, weight_shift: Tensor, chunk_size: int) -> Tensor:
    """∂gradient_k / ∂weight_shift_k for every entry k, (d_out, d_in)."""
    h = torch.zeros_like(gradient).flatten()
    for index, (rows,) in _jacobian_rows(gradient, [weight_shift], chunk_size):
        h[index] = rows.flatten(1)[torch.arange(len(index), device=index.device), index]
    return h.detach().view_as(gradient)
