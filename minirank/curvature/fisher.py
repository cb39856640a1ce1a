"""The empirical Fisher diagonal: squared gradients of single samples, from one backward pass for
all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from ..layers.targets import Targets
from ..measure import LossFn, batch_length
from ..placement import is_sharded
from .averaging import check_tolerance
from .diagnostics import check_independent_gradients, several_samples
from .estimate import Estimate
from .layer_outputs import (
    Call,
    all_shifts,
    in_call_order,
    output_gradients,
    shifted_outputs,
    stack_positions,
    stacked_inputs,
)
from .objective import BatchDiagonals, Objective, curvature_targets, mean_over_batches
from .outer_products import outer_products


def empirical_fisher(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Iterable[Any],
    targets: Targets = None,
    *,
    tolerance: float | None = None,
    batch_weight: Callable[[Any], float] = batch_length,
) -> Estimate:
    """The mean over samples of each sample's squared gradient.

    Target: the mean over the n samples of a batch of (∂ℓ/∂W)². ℓ is a sample's own loss, n times
    its part of the mean, with the label that the batch gives; none is drawn from the model.
    Bias: as a stand-in for the Hessian diagonal, without bound. It is near the Gauss-Newton
    diagonal where the predicted probabilities are how often each label occurs, and vanishes where
    the model fits the labels perfectly. Entries are never negative.
    Variance: none on `batches`; the standard errors are over batches, as samples of more such data.
    Cost: one forward and one backward pass per batch, and a matrix product for each sample and
    layer, as a backward pass has for the weights; for one batch also two products with the Hessian,
    to see that samples do not interact. (This is not checked for a model that FSDP2 has sharded,
    which cannot be differentiated twice.) All this took 1.6 training passes over 12 batches, see
    the folder's docstring.
    Memory: one pass, and the inputs of all layers and the gradients by their outputs; for the one
    batch that is checked also the backward pass's graph and two more sets of such gradients.

    A sample is an entry of the first dimension of a layer's input, such as a sentence, whatever the
    loss is a mean over. If the loss is a mean over words, a batch of longer sentences has smaller
    squares: keep their lengths alike.

    Args:
        model, loss_fn, batches, targets, batch_weight: as for `exact_hessian_diagonal`.
        tolerance: stop before the end of the batches, as soon as the standard error over batches of
            every trace is at most this fraction of the mean trace over the layers (from 10 batches
            on). None: take all batches.

    Returns: {name: (d_out, d_in)}, with standard errors over batches.

    Raises:
        ValueError: as for `exact_hessian_diagonal`. There is no form for samples that interact.

    Source: Kunstner, Balles and Hennig 2019 (arXiv 1905.12558), on what it is and is not.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 1, bias=False))
    >>> with torch.no_grad():
    ...     _ = model[0].weight.fill_(1.0)
    >>> x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    >>> h = empirical_fisher(model, lambda model, x: model(x).square().mean() / 2, [x])
    >>> h["0"].tolist()  # gradients z · x of the samples: (3, 6) and (21, 28)
    [[225.0, 410.0]]
    """
    layers = curvature_targets(model, targets, second_derivatives=False)
    check_tolerance(tolerance)
    objective = Objective(model, loss_fn, batches, layers, batch_weight)
    independence_checked = False
    sharded = any(map(is_sharded, model.parameters()))

    def batch_diagonals(batch: Any) -> BatchDiagonals:
        nonlocal independence_checked
        with shifted_outputs(layers) as calls:
            loss = objective.loss(batch)
        # The first batch in which samples could interact must show that they do not.
        shifts = all_shifts(calls)
        check = several_samples(shifts) and not independence_checked and not sharded
        gradients = output_gradients(loss, calls, differentiable=check)
        if check:
            check_independent_gradients(in_call_order(gradients), shifts)
            independence_checked = True
        return {
            name: _mean_square(layer_calls, gradients[name]) if layer_calls else None
            for name, layer_calls in calls.items()
        }

    return mean_over_batches(objective, batch_diagonals, tolerance)


def _mean_square(layer_calls: list[Call], gradients: list[Tensor]) -> Tensor:
    """One layer, one batch: n · Σ over samples of the squared gradient of their part of the mean,
    (d_out, d_in)."""
    g = stack_positions([gradient.detach() for gradient in gradients], independent=True)[None]
    x = stacked_inputs(layer_calls, independent=True)
    squares, _ = outer_products(g, g, x, x)  # g: (1, n, T, d_out); x: (n, T, d_in)
    return squares.mul_(len(x))
