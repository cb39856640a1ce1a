"""Hutchinson's estimates of the Hessian diagonal, from random vectors v of independent signs:

    E[v ⊙ H v] = diag(H)

In this file, "vector" means such a v, and "sample" a sample of the data. (The argument `samples`
counts vectors.) One Hessian-vector product serves all layers. The vector can have one sign for each
weight, as in the textbook. It can also have one sign for each output z = W x + b of the layers, at
every sample and position: hessian.py explains why the outputs suffice. There

    h(W_ij) ≈ Σ over samples of  (Σ_t v_ti x_tj) (Σ_t' (H_z v)_t'i x_t'j)

Its mean is the exact diagonal, because E[v_ti v_sk] = 1 for (t, i) = (s, k) and 0 otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.targets import Targets
from ..measure import LossFn, batch_length
from .diagnostics import IndependenceCheck, check_independent
from .estimate import Estimate
from .layer_outputs import (
    Call,
    all_shifts,
    by_layer,
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
from .objective import Objective, check_chunk_size, curvature_targets
from .outer_products import outer_products
from .sampling import ProbedDiagonal, check_sampling, mean_over_probes, random_signs


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
    """The Hessian diagonal, estimated by random signs on the weights.

    Target: the exact diagonal on `batches`.
    Bias: none.
    Variance, on one batch and with one vector: of entry i, Σ over j ≠ i of H_ij², j counting the
    weights of all targets; of the trace of a layer l, 2 Σ over i ≠ j in l of H_ij² + Σ over i in l
    and j in the other targets of H_ij². It falls as one over the number of vectors, and with the
    number of batches, since every batch has vectors of its own.
    Cost: for each vector, a Hessian-vector product per batch. For every `chunk_size` vectors, a
    forward pass and a backward pass with its graph kept per batch. Memory: `chunk_size` times one
    backward pass and the diagonals.

    Args:
        model, loss_fn, targets, batch_weight: as for `exact_hessian_diagonal`. Nothing is assumed
            about the samples of a batch.
        batches: iterated once for every `chunk_size` vectors.
        generator: draws the signs. A CPU generator gives one result for one seed on every device.
        samples: the number of random vectors per batch, at most.
        tolerance: stop as soon as the standard error of every trace is at most this fraction of the
            mean |trace| over the layers. This is checked after every `chunk_size` vectors, from
            10 vectors on. If `samples` vectors are too few, the result's standard errors say so. A
            run that was stopped errs a little more often than its standard errors say. None: take
            all vectors.
        chunk_size: Hessian-vector products taken at once, and so vectors per pass over the batches.
            1 takes them one by one, for models that torch.vmap cannot handle.

    Returns: {name: (d_out, d_in)} with standard errors over the vectors, which an `Estimate` calls
    "probes". Entries can be of either sign; float32 for a half-precision model.

    Raises:
        ValueError: as for `exact_hessian_diagonal`, but for samples that interact; or a second pass
            finds the batches used up.
        TypeError: `generator` is not a torch.Generator.

    Source: Hutchinson 1990 (traces); Bekas, Kokiopoulou and Saad 2007 (diagonals).

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 1, bias=False))
    >>> x = torch.tensor([[1.0, 0.0], [0.0, 4.0]])
    >>> h = hutchinson_weights(model, lambda model, x: model(x).square().mean() / 2, [x],
    ...                        generator=torch.Generator().manual_seed(0), samples=3)
    >>> h["0"].tolist(), h.samples, h.over  # exact, because this Hessian is diagonal
    ([[0.5, 8.0]], 3, 'probes')
    """
    check_chunk_size(chunk_size)
    layers = curvature_targets(model, targets)
    check_sampling(samples, tolerance, generator)
    objective = Objective(model, loss_fn, batches, layers, batch_weight)

    def probe_batch(
        batch: Any, count: int, first_pass: bool
    ) -> Mapping[str, ProbedDiagonal | None]:
        E = zero_weight_shifts(layers)
        with shifted_weights(layers, E) as calls:
            loss = objective.loss(batch)
        weight_shifts = list(E.values())
        gradients = loss_gradients(loss, weight_shifts, differentiable=True)
        signs = [random_signs(shift, count, generator) for shift in weight_shifts]
        products = vector_jacobian_products(gradients, weight_shifts, signs)
        probed: dict[str, ProbedDiagonal | None] = {}
        for name, v, Hv in zip(E, signs, products, strict=True):
            h = v * Hv  # (K, d_out, d_in)
            probed[name] = ProbedDiagonal(h.sum(0), h.sum((1, 2))) if calls[name] else None
        return probed

    return mean_over_probes(
        objective, probe_batch, samples=samples, tolerance=tolerance, chunk_size=chunk_size
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
    """The Hessian diagonal, estimated by random signs on the outputs of the layers.

    Target: the exact diagonal on `batches`.
    Bias: none.
    Variance: that of `hutchinson_weights`, with the Hessian over the outputs in place of the one
    over the weights. Every sample of a batch has signs of its own, so that a batch of n averages n
    of them. The variance of an entry is usually smaller; that of the trace is not always.
    Cost and memory: as for `hutchinson_weights`, and for each vector two matrix products of the
    size of a layer's gradient. In the first pass over the batches, one more Hessian-vector product
    per batch sees that samples do not interact (two for the first batch). One vector took 4.1
    training passes over 12 batches, see the folder's docstring.

    Args:
        model, loss_fn, batches, targets, batch_weight: as for `hutchinson_weights`.
        generator, samples, tolerance, chunk_size: as for `hutchinson_weights`.
        independent: as for `exact_hessian_diagonal`; checked on each batch in the first pass.
            False: the rows of a batch count as one sample, which has more variance.

    Returns: as for `hutchinson_weights`.

    Raises:
        ValueError: as for `hutchinson_weights`; or samples interact.
        TypeError: `generator` is not a torch.Generator.

    Source: `hutchinson_weights` by the chain rule at the top of this file.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 1, bias=False))
    >>> x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    >>> h = hutchinson_outputs(model, lambda model, x: model(x).square().mean() / 2, [x],
    ...                        generator=torch.Generator().manual_seed(0), samples=3)
    >>> h["0"].tolist()  # exact, because the Hessian over the one output is diagonal
    [[5.0, 10.0]]
    """
    check_chunk_size(chunk_size)
    layers = curvature_targets(model, targets)
    check_sampling(samples, tolerance, generator)
    objective = Objective(model, loss_fn, batches, layers, batch_weight)
    independence = IndependenceCheck()

    def probe_batch(
        batch: Any, count: int, first_pass: bool
    ) -> Mapping[str, ProbedDiagonal | None]:
        check = independent and first_pass
        with shifted_outputs(layers) as calls:
            loss = objective.loss(batch)
        gradients = output_gradients(loss, calls, differentiable=True)
        flat_gradients = in_call_order(gradients)
        shifts = all_shifts(calls)
        signs = [random_signs(shift, count, generator) for shift in shifts]
        products = vector_jacobian_products(flat_gradients, shifts, signs)
        if check:
            independence.of_batch(flat_gradients, shifts, signs, products)
        v, Hv = by_layer(signs, calls), by_layer(products, calls)
        probed: dict[str, ProbedDiagonal | None] = dict.fromkeys(layers)
        for name, layer_calls in calls.items():
            if not layer_calls:
                continue
            total, traces = _output_part(layer_calls, v[name], Hv[name], independent)
            if feeds_itself(layer_calls):
                part = _recurrence_part(layer_calls, gradients[name], v[name], independent, check)
                total, traces = total + part.total, traces + part.traces
            probed[name] = ProbedDiagonal(total, traces)
        return probed

    return mean_over_probes(
        objective, probe_batch, samples=samples, tolerance=tolerance, chunk_size=chunk_size
    )


def _output_part(
    layer_calls: list[Call], v: list[Tensor], Hv: list[Tensor], independent: bool
) -> ProbedDiagonal:
    """Σ (Σ_t v_ti x_tj) (Σ_t' (H_z v)_t'i x_t'j). v, Hv: for each call, (K, …, d_out)."""
    x = stacked_inputs(layer_calls, independent)
    signs = stack_positions(v, independent, batched=True)  # (K, n, T, d_out)
    products = stack_positions(Hv, independent, batched=True)
    return ProbedDiagonal(*outer_products(signs, products, x, x))


def _recurrence_part(
    layer_calls: list[Call],
    gradients: list[Tensor],
    v: list[Tensor],
    independent: bool,
    check: bool,
) -> ProbedDiagonal:
    """2 Σ (Σ_t v_ti x_tj) (Σ_t' ∂L/∂z_t'i (∂x/∂z v)_t'j), of a layer that feeds itself."""
    w, JTw = recurrence_jacobian(layer_calls)
    if check:
        check_independent(JTw, w)
    x = stacked_inputs(layer_calls, independent)
    signs = stack_positions(v, independent, batched=True)  # (K, n, T, d_out)
    Jv = stack_positions(vector_jacobian_products(JTw, w, v), independent, batched=True)
    g = stack_positions([gradient.detach() for gradient in gradients], independent)
    total, traces = outer_products(signs, g.expand_as(signs), x, Jv)  # Jv: (K, n, T, d_in)
    return ProbedDiagonal(2 * total, 2 * traces)
