"""What a curvature function returns: diagonals, and how well their traces are known."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor

from ..measure import NO_BATCH

MIN_SAMPLES = 10  # below, a standard error is itself too uncertain to stop on
Over = Literal["batches", "probes"]


class RunningMean:
    """Weighted mean and its standard error in one pass (Welford 1962; weights: West 1979)."""

    def __init__(self) -> None:
        self.count = 0
        self.weight = self.squared_weights = self.mean = self._deviations = 0.0

    def add(self, value: float, weight: float = 1.0) -> None:
        if weight == 0:
            return
        self.count += 1
        self.weight += weight
        self.squared_weights += weight**2
        before = value - self.mean
        self.mean += before * (weight / self.weight)  # a ratio of 1 at first: no rounding then
        self._deviations += weight * before * (value - self.mean)

    @property
    def standard_error(self) -> float:
        """Of the mean of independent values of one variance; for equal weights s/√n. inf for less than two values."""
        if self.count < 2:
            return math.inf
        variance = self._deviations / (self.weight - self.squared_weights / self.weight)
        return math.sqrt(variance * self.squared_weights) / self.weight


class Estimate(dict[str, Tensor]):
    """{name: diagonal}, and

    samples: how many independent values the result is the mean of.
    over: what these are. "probes": random vectors, drawn for the given batches; the error is the distance from the
        exact value on these batches. "batches": the value on each batch is exact; the error is that of the batches as
        a sample of more such data.
    standard_errors: {name: of the trace Σ h, in its unit}; inf if samples < 2.
    weights: {name: what the batches weighed together (samples or tokens)}: estimates from separate batches combine to
        their weighted mean.
    """

    def __init__(
        self,
        diagonals: Mapping[str, Tensor],
        *,
        samples: int,
        over: Over,
        standard_errors: dict[str, float],
        weights: dict[str, float],
    ) -> None:
        super().__init__(diagonals)
        self.samples = samples
        self.over = over
        self.standard_errors = standard_errors
        self.weights = weights


class DiagonalMean:
    """The weighted mean over batches of each layer's diagonal, and the running means of the traces."""

    def __init__(self, names: Iterable[str], over: Over = "batches") -> None:
        self.over: Over = over
        self.means: dict[str, Tensor | None] = dict.fromkeys(names)
        self.weights = dict.fromkeys(self.means, 0.0)
        self.traces = {name: RunningMean() for name in self.means}

    def add(self, name: str, h: Tensor | None, weight: float) -> None:
        """h: any shape; None counts as zero, for a batch that does not reach a layer."""
        if not 0 <= weight < math.inf:
            raise ValueError(f"batch_weight must give a number of at least 0, got {weight!r}")
        if weight == 0:
            return
        self.weights[name] += weight
        share = weight / self.weights[name]
        before = self.means[name]
        if before is not None:
            self.means[name] = before * (1 - share) if h is None else before + (h - before) * share
        elif h is not None:
            self.means[name] = h * share
        if self.over == "batches":
            self.traces[name].add(0.0 if h is None else float(h.sum()), weight)

    def add_traces(self, traces: Mapping[str, Tensor]) -> None:
        """{name: (K,), the traces of K samples}, each a mean over all batches."""
        for name, values in traces.items():
            for value in values.tolist():
                self.traces[name].add(value)

    @property
    def samples(self) -> int:
        return max(running.count for running in self.traces.values())

    def known_to(self, tolerance: float | None) -> bool:
        """Whether every trace's standard error is at most tolerance · the mean |trace| over layers. Not its own trace:
        that may be near zero, and Eqs 11 and 13 of Sensitivity-LoRA divide by the mean over layers too."""
        if tolerance is None or self.samples < MIN_SAMPLES:
            return False
        scale = sum(abs(running.mean) for running in self.traces.values()) / len(self.traces)
        return all(running.standard_error <= tolerance * scale for running in self.traces.values())

    def result(self, passes: float = 1) -> Estimate:
        """`passes`: how often each batch was added."""
        if not any(self.weights.values()):
            raise ValueError(NO_BATCH)
        diagonals = {}
        for name, mean in self.means.items():
            if mean is None:
                raise ValueError(
                    f"no batch reached {name!r}: leave it out of targets, or give other data"
                )
            if not torch.isfinite(mean).all():
                raise ValueError(
                    f"the curvature of {name!r} is not finite: check the data and the model's weights"
                )
            diagonals[name] = mean
        return Estimate(
            diagonals,
            samples=self.samples,
            over=self.over,
            standard_errors={name: running.standard_error for name, running in self.traces.items()},
            weights={name: weight / passes for name, weight in self.weights.items()},
        )


def check_tolerance(tolerance: float | None) -> None:
    if tolerance is not None and not tolerance > 0:
        raise ValueError(
            f"tolerance must be above 0 (0.01: one percent of the mean trace), got {tolerance!r}"
        )
