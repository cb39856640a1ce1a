"""The weighted mean of numbers and its standard error, in one pass."""

from __future__ import annotations

import math


class RunningMean:
    """The weighted mean of numbers and its standard error, in one pass (Welford 1962; with weights:
    West 1979)."""

    def __init__(self) -> None:
        self.count = 0
        self.weight = self.squared_weights = self.mean = self._deviations = 0.0

    def add(self, value: float, weight: float = 1.0) -> None:
        if weight == 0:
            return
        self.count += 1
        self.weight += weight
        self.squared_weights += weight**2
        deviation = value - self.mean
        # The ratio comes first: it is 1 for the first value, which is then taken over without
        # rounding.
        self.mean += deviation * (weight / self.weight)
        self._deviations += weight * deviation * (value - self.mean)

    def joined(self, other: RunningMean) -> RunningMean:
        """The mean of both sets of numbers (Chan, Golub and LeVeque 1983)."""
        joined = RunningMean()
        joined.count = self.count + other.count
        joined.weight = self.weight + other.weight
        joined.squared_weights = self.squared_weights + other.squared_weights
        if joined.weight:
            share = other.weight / joined.weight
            deviation = other.mean - self.mean
            joined.mean = self.mean + deviation * share
            between = deviation**2 * self.weight * share
            joined._deviations = self._deviations + other._deviations + between
        return joined

    @property
    def standard_error(self) -> float:
        """The standard error of the mean of independent values with one variance: s / √n for equal
        weights. It is inf for fewer than two values."""
        if self.count < 2:
            return math.inf
        variance = self._deviations / (self.weight - self.squared_weights / self.weight)
        return math.sqrt(variance * self.squared_weights) / self.weight
