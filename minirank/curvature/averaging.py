"""Weighted means, one value at a time: of the diagonals, and of their traces with standard
errors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from ..checks import require
from ..measure import NO_BATCH
from .estimate import Estimate
from .running_mean import RunningMean

MIN_SAMPLES = 10  # from fewer values, a standard error is itself too uncertain to stop on
NOTHING_IDLE: Mapping[str, Tensor] = MappingProxyType({})


class DiagonalAverage:
    """The weighted mean over batches of each layer's diagonal."""

    def __init__(self, names: Iterable[str]) -> None:
        self.means: dict[str, Tensor | None] = dict.fromkeys(names)
        self.weights = dict.fromkeys(self.means, 0.0)

    def add(self, name: str, diagonal: Tensor | None, weight: float) -> None:
        """`diagonal`: of any shape; None stands for zeros, for a batch that does not reach the
        layer."""
        if not 0 <= weight < math.inf:
            raise ValueError(f"batch_weight must give a number of at least 0, got {weight!r}")
        if weight == 0:
            return
        self.weights[name] += weight
        share = weight / self.weights[name]
        mean = self.means[name]
        if mean is None:
            self.means[name] = None if diagonal is None else diagonal * share
        elif diagonal is None:
            mean.mul_(1 - share)
        else:
            mean.lerp_(diagonal, share)

    def unreached(self) -> list[str]:
        """The layers that no batch reached so far."""
        return [name for name, mean in self.means.items() if mean is None]

    def checked_means(self, idle: Mapping[str, Tensor] = NOTHING_IDLE) -> dict[str, Tensor]:
        """The means, with zeros for idle layers. ValueError without a batch, or for another layer
        that was not reached or is not finite.

        idle: {name: zeros of the diagonal's shape}.
        """
        if not any(self.weights.values()):
            raise ValueError(NO_BATCH)
        means = {}
        for name, mean in self.means.items():
            if mean is None and name in idle:
                mean = idle[name]
            if mean is None:
                raise ValueError(
                    f"no batch reached {name!r}: leave it out of targets, or give other data"
                )
            if not torch.isfinite(mean).all():
                raise ValueError(
                    f"the curvature of {name!r} is not finite: check the data and the model's "
                    "weights"
                )
            means[name] = mean
        return means


class TraceAverage:
    """The mean of each layer's trace Σ h, and its standard error: is an estimate good enough?"""

    def __init__(self, names: Iterable[str]) -> None:
        self.running = {name: RunningMean() for name in names}

    def add(self, name: str, trace: float, weight: float = 1.0) -> None:
        self.running[name].add(trace, weight)

    @property
    def samples(self) -> int:
        return max(running.count for running in self.running.values())

    @property
    def standard_errors(self) -> dict[str, float]:
        return {name: running.standard_error for name, running in self.running.items()}

    def errors_within(self, tolerance: float | None) -> bool:
        """Whether every trace's standard error is at most `tolerance` · the mean |trace| over
        layers; False for None.

        The scale is not the layer's own trace, which may be near zero. Eqs 11 and 13 of
        Sensitivity-LoRA divide by the mean over layers too.
        """
        if tolerance is None or self.samples < MIN_SAMPLES:
            return False
        scale = sum(abs(running.mean) for running in self.running.values()) / len(self.running)
        return all(error <= tolerance * scale for error in self.standard_errors.values())


class BatchAverage:
    """Mean diagonals and traces over batches, when the diagonal of each batch is exact."""

    def __init__(self, names: Iterable[str]) -> None:
        names = list(names)
        self.diagonals = DiagonalAverage(names)
        self.traces = TraceAverage(names)

    def add(self, name: str, diagonal: Tensor | None, weight: float) -> None:
        self.diagonals.add(name, diagonal, weight)
        self.traces.add(name, 0.0 if diagonal is None else float(diagonal.sum()), weight)

    def estimate(self, idle: Mapping[str, Tensor] = NOTHING_IDLE) -> Estimate:
        """idle: as for `checked_means`."""
        return Estimate(
            self.diagonals.checked_means(idle),
            samples=self.traces.samples,
            over="batches",
            standard_errors=self.traces.standard_errors,
            weights=self.diagonals.weights,
            traces=self.traces.running,
            idle=tuple(idle),
        )


def check_tolerance(tolerance: float | None) -> None:
    require(
        tolerance is None or tolerance > 0,
        "tolerance",
        tolerance,
        "above 0 (0.01: one percent of the mean trace)",
    )
