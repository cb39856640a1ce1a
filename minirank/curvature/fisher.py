"""The empirical Fisher diagonal: squared gradients of single samples, from one backward pass for all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from ..layers.targets import Targets
from ..measure import (
    LossFn,
    batch_length,
    differentiable_loss,
    differentiable_twice,
    repeatable,
)
from .estimate import DiagonalMean, Estimate, check_tolerance
from .layer_outputs import (
    check_independent,
    curvature_targets,
    rows,
    shifted_outputs,
    shifts_of,
    slopes_of,
)
from .sampling import outer_products


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

    Target: n · Σ over the n samples of a batch of (its own part of ∂L/∂W)², n · part being the gradient of its own
    loss. As a stand-in for the Hessian it is biased without bound: it is near the Gauss-Newton diagonal where the
    model's predictions fit the labels as often as they claim, and vanishes where it fits them perfectly (Kunstner,
    Balles and Hennig 2019). Never negative. No sampling but that of the data. A sample is an entry of the first
    dimension, such as a sentence, whatever the loss is a mean over: where that is words, a batch of longer sentences
    has smaller squares, so keep their lengths alike.

    Cost: one forward and one backward pass per batch, and for one batch three products with the Hessian, to see that
    samples do not interact.

    Args:
        tolerance: stop before the end of the batches once every trace's standard error over batches is at most this
            fraction of the mean trace (from 10 batches on).
        batch_weight: as for `exact_hessian_diagonal`. Samples are counted by the first dimension of a layer's input.

    Returns: {name: (d_out, d_in)}, with standard errors over batches.

    Raises ValueError: as for `exact_hessian_diagonal`. There is no form without independent samples.
    """
    modules = curvature_targets(model, targets, 1)
    check_tolerance(tolerance)
    total = DiagonalMean(modules)
    with differentiable_twice(model):
        checked = False
        for batch in repeatable(model, loss_fn, batches):
            weight = batch_weight(batch)
            with shifted_outputs(modules) as calls:
                loss = differentiable_loss(model, loss_fn, batch)
            # The first batch in which samples could interact must show that they do not.
            several = not checked and any(
                shift.ndim > 1 and shift.shape[0] > 1 for shift in shifts_of(calls)
            )
            slopes = slopes_of(loss, calls, twice=several)
            if several:
                check_independent(
                    shifts_of(calls), [g for found in slopes.values() for g in found], curved=False
                )
                checked = True
            for name, found in calls.items():
                if not found:
                    total.add(name, None, weight)
                    continue
                g = rows(
                    [slope.detach() for slope in slopes[name]], independent=True
                )  # (n, T, d_out)
                x = rows([call.x.detach() for call in found], independent=True)
                squares, _ = outer_products(g[None], g[None], x, x)
                total.add(name, len(g) * squares, weight)
            if total.known_to(tolerance):
                break
    return total.result()
