"""The function whose curvature is taken, and the loop over its batches that all exact estimators
share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..checks import require, require_batches
from ..layers.linear import applies_weight
from ..layers.targets import Targets, layers_called
from ..measure import LossFn, differentiable_loss, differentiable_twice, repeatable
from ..packed import require_not_repacked, why_no_backward
from ..placement import is_offloaded, is_sharded
from .averaging import NOTHING_IDLE, BatchAverage
from .estimate import Estimate
from .layer_outputs import zero_weight_shifts
from .unreached import idle_layers, warn_of_idle_layers

# {name: diagonal of one batch's mean loss}; None for a layer that the batch does not reach
BatchDiagonals = Mapping[str, Tensor | None]


@dataclass(frozen=True)
class Objective:
    """The weighted mean over `batches` of loss_fn(model, batch), as a function of the weights of
    `layers`."""

    model: nn.Module
    loss_fn: LossFn
    batches: Iterable[Any]
    layers: Mapping[str, nn.Module]
    batch_weight: Callable[[Any], float]

    def __post_init__(self) -> None:
        require_batches(self.batches)

    def loss(self, batch: Any) -> Tensor:
        """The mean loss of one batch, (), with its graph."""
        return differentiable_loss(self.model, self.loss_fn, batch)

    def idle_diagonals(self, batch: Any, unreached: Sequence[str]) -> dict[str, Tensor]:
        """{name: zeros, (d_out, d_in)} of the unreached layers, if they are idle."""
        names = idle_layers(self.model, self.loss_fn, batch, self.layers, unreached)
        shifts = zero_weight_shifts({name: self.layers[name] for name in names})
        return {name: shift.detach() for name, shift in shifts.items()}


def curvature_targets(
    model: nn.Module, targets: Targets, *, second_derivatives: bool = True
) -> dict[str, nn.Module]:
    """The layers that `linear_targets` selects.

    Raises ValueError if one does not compute W x + b or lets no gradient pass, or if its weight is
    where the estimator cannot follow.
    """
    layers = layers_called(model, targets)
    require_not_repacked(model)
    if second_derivatives and any(map(is_sharded, model.parameters())):
        raise ValueError(
            "the model is sharded (its parameters are DTensors), and FSDP2 frees weights that "
            "second derivatives need: use gauss_newton, empirical_fisher or input_second_moment, "
            "which work there, or measure the model before it is sharded"
        )
    for name, layer in layers.items():
        reason = why_no_backward(layer)
        if reason is not None:
            raise ValueError(
                f"{name!r} is a {type(layer).__name__} without gradients, which this curvature "
                f"needs (input_second_moment does not): {reason}"
            )
        if is_offloaded(layer) and type(layer).forward is not nn.Linear.forward:
            raise ValueError(
                f"{name!r} is a {type(layer).__name__} that accelerate offloads, so that it cannot "
                "be tried whether it computes W x + b: use input_second_moment, or load the model "
                "onto devices that hold all of it"
            )
        if not applies_weight(layer):
            raise ValueError(
                f"{name!r} is a {type(layer).__name__} that does not compute W x + b from its "
                "weight, as this curvature needs: leave it out of targets"
            )
    return layers


def check_chunk_size(chunk_size: int) -> None:
    require(chunk_size >= 1, "chunk_size", chunk_size, "at least 1")


def mean_over_batches(
    objective: Objective,
    batch_diagonals: Callable[[Any], BatchDiagonals],
    tolerance: float | None = None,
) -> Estimate:
    """The weighted mean of batch_diagonals(batch) over the batches, or over the first of them if
    the standard errors are within `tolerance` before the end."""
    average = BatchAverage(objective.layers)
    with differentiable_twice(objective.model):
        for batch in repeatable(objective.model, objective.loss_fn, objective.batches):
            weight = objective.batch_weight(batch)
            for name, diagonal in batch_diagonals(batch).items():
                average.add(name, diagonal, weight)
            if average.traces.errors_within(tolerance):
                break
        unreached = average.diagonals.unreached() if average.traces.samples else []
        idle = objective.idle_diagonals(batch, unreached) if unreached else NOTHING_IDLE
    estimate = average.estimate(idle)
    warn_of_idle_layers(idle)
    return estimate
