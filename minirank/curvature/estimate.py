"""What every estimator of this folder returns: the diagonals, and how well their traces are
known."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from .running_mean import RunningMean

Over = Literal["batches", "probes"]


class Estimate(dict[str, Tensor]):
    """A dict {name: diagonal} that also knows its sampling error.

    Attributes:
        samples: the number of independent values whose mean the diagonals are.
        over: what these values are. "probes": random vectors, drawn for the given batches; the
            error is the distance from the exact value on these batches. "batches": the value on
            each batch is exact; the error comes from the batches being a sample of more data of the
            same kind.
        standard_errors: {name: standard error of the trace Σ h, in the trace's unit}; inf if there
            are fewer than two samples.
        idle: the layers that no batch reached and whose diagonals are zero for that reason.
        weights: {name: the weight of all batches together (samples or tokens)}. Estimates from
            separate batches combine to their mean with these weights.

        traces: {name: the trace of each sample, as a mean with its error}, from which errors of
            several estimates combine; None where they are not known.

    >>> import torch
    >>> estimate = Estimate({"layer": torch.tensor([1.0, 2.0])}, samples=4, over="batches",
    ...                     standard_errors={"layer": 0.5}, weights={"layer": 32.0})
    >>> estimate["layer"].sum().item(), estimate.standard_errors["layer"]
    (3.0, 0.5)
    """

    def __init__(
        self,
        diagonals: Mapping[str, Tensor],
        *,
        samples: int,
        over: Over,
        standard_errors: dict[str, float],
        weights: dict[str, float],
        idle: tuple[str, ...] = (),
        traces: Mapping[str, RunningMean] | None = None,
    ) -> None:
        super().__init__(diagonals)
        self.samples = samples
        self.over = over
        self.standard_errors = standard_errors
        self.weights = weights
        self.idle = idle
        self.traces = traces
