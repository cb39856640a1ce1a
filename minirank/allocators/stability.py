"""How sure is an allocation? What it rests on has sampling errors; which ranks would change within them?

Calibration batches are measured in groups. Leaving out each group in turn (the jackknife) tells how the metrics of the
diagonals vary with the data, random vectors included; for groups of unequal weight this is the delete-a-group
jackknife of Busing, Meijer and van der Leeden (1999). Metrics drawn anew within these errors, of all modules together,
then go through the remaining equations to the scores and ranks that could as well have come out.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..curvature.estimate import Estimate
from ..measure import NO_BATCH
from .allocation import Allocation

Diagonals = Mapping[str, Tensor]
MIN_GROUPS = 4


class Groups:
    """Measurements of consecutive groups of batches. When there are 2 · `least`, neighbours are joined to `least`, and
    later groups take in twice as many batches: so a stream of any length is held as `least` to 2 · `least` groups."""

    def __init__(self, least: int) -> None:
        if least < MIN_GROUPS:
            raise ValueError(
                f"groups must be at least {MIN_GROUPS}, to tell how they vary, got {least!r}"
            )
        self.least = least
        self.batches_per_group = 1
        self.batches = 0
        self._groups: list[tuple[dict[str, float], Diagonals]] = []  # (weights, means)

    def __len__(self) -> int:
        return len(self._groups)

    def add(self, diagonals: Diagonals, batches: int) -> None:
        """An estimate's own weights count; anything else counts by its number of batches."""
        self.batches += batches
        weights = (
            diagonals.weights
            if isinstance(diagonals, Estimate)
            else dict.fromkeys(diagonals, float(batches))
        )
        self._groups.append((weights, diagonals))
        if len(self) == 2 * self.least:
            pairs = zip(self._groups[::2], self._groups[1::2], strict=True)
            self._groups = [_joined(a, b) for a, b in pairs]
            self.batches_per_group *= 2

    def mean(self) -> dict[str, Tensor]:
        if not self._groups:
            raise ValueError(NO_BATCH)
        return dict(functools.reduce(_joined, self._groups)[1])

    def jackknife(self, statistic: Callable[[Diagonals], Tensor]) -> tuple[Tensor, Tensor]:
        """(statistic of the mean, (n,), and deviations D, (groups, n)): Dᵀ D is its covariance. It must be smooth: a
        count that jumps makes errors too large."""
        if len(self) < MIN_GROUPS:
            raise ValueError(
                f"{len(self)} batches are too few to tell how scores vary: give at least {MIN_GROUPS}"
            )
        whole = self.mean()
        total = {name: sum(weights[name] for weights, _ in self._groups) for name in whole}
        value = statistic(whole)
        pseudo, ratio = [], []
        for weights, means in self._groups:
            share = {name: weights[name] / total[name] for name in whole}
            rest = {
                name: (mean - share[name] * means[name]) / (1 - share[name])
                for name, mean in whole.items()
            }
            h = 1 / (sum(share.values()) / len(share))
            ratio.append(h)
            pseudo.append(h * value - (h - 1) * statistic(rest))
        center = torch.stack(pseudo).mean(0)
        spread = [
            (p - center) / math.sqrt(len(self) * (h - 1))
            for p, h in zip(pseudo, ratio, strict=True)
        ]
        return value, torch.stack(spread)


def _joined(
    a: tuple[dict[str, float], Diagonals], b: tuple[dict[str, float], Diagonals]
) -> tuple[dict[str, float], Diagonals]:
    weights = {name: weight + b[0][name] for name, weight in a[0].items()}
    means = {
        name: mean + (b[1][name] - mean) * (b[0][name] / weights[name] if weights[name] else 0.0)
        for name, mean in a[1].items()
    }
    return weights, means


def resample(value: Tensor, deviations: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Values within their errors, (count, n): multivariate Student t about `value`, with groups − 1 degrees of freedom
    and the covariance Dᵀ D as its scale, which a covariance from few groups calls for."""
    groups = len(deviations)
    normal = torch.randn(
        count, groups, generator=generator, dtype=torch.float64, device=generator.device
    ).cpu()
    chi = torch.randn(
        count, groups - 1, generator=generator, dtype=torch.float64, device=generator.device
    ).cpu()
    widening = ((groups - 1) / chi.square().sum(1, keepdim=True)).sqrt()
    return value + widening * (normal @ deviations)


@dataclass(frozen=True)
class Stability:
    """What the sampling error leaves open in an allocation: print it.

    A module's interval of ranks (and of scores) holds those of a share `confidence` of the resampled allocations; each
    module's by itself, not all of them at once. `moved`: in that share of them, at most so many ranks differ from the
    allocation. `same`: the share in which none does.
    """

    allocation: Allocation
    confidence: float
    intervals: Mapping[str, tuple[int, int]]  # of ranks
    score_intervals: Mapping[str, tuple[float, float]]
    moved: int
    same: float
    groups: int
    batches: int

    @property
    def open(self) -> dict[str, tuple[int, int]]:
        """The modules whose rank would change within the sampling error, and the ranks between which."""
        return {
            name: interval for name, interval in self.intervals.items() if interval[0] < interval[1]
        }

    def __str__(self) -> str:
        ranks = self.allocation.ranks
        moved = f"at most {self.moved}" if self.moved else "none"
        lines = [
            f"{self.allocation.method}, {self.allocation.total_rank} ranks: with {self.confidence:.0%} confidence "
            f"{moved} of them would move",
            f"with other data of this kind (from {self.batches} batches); {len(self.open)} of {len(ranks)} modules are "
            f"open, {self.same:.0%} of resampled allocations are the same",
        ]
        width = max((len(name) for name in self.open), default=0)
        lines += [
            f"  {name:<{width}}  rank {ranks[name]}, from {lo} to {hi}"
            for name, (lo, hi) in self.open.items()
        ]
        return "\n".join(lines)


def stability(
    score: Callable[[Tensor], Tensor],
    divide: Callable[[Tensor], Allocation],
    metrics: Tensor,
    deviations: Tensor,
    confidence: float,
    resamples: int,
    generator: torch.Generator,
    batches: int,
) -> Stability:
    """`metrics` and `deviations` are those of `Groups.jackknife`; score(metrics) gives one score per module, in the
    order of divide(scores).ranks."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be above 0 and below 1 (0.95: 95 %), got {confidence!r}")
    if resamples < 2:
        raise ValueError(f"resamples must be at least 2, got {resamples}")
    allocation = divide(score(metrics))
    names = list(allocation.ranks)
    scores = torch.stack(
        [score(drawn) for drawn in resample(metrics, deviations, resamples, generator)]
    )
    ranks = torch.tensor(
        [list(divide(one).ranks.values()) for one in scores], dtype=torch.float64
    )  # (resamples, n)
    change = ranks - torch.tensor(list(allocation.ranks.values()), dtype=torch.float64)
    moved = torch.maximum(change.clamp(min=0).sum(1), (-change).clamp(min=0).sum(1))

    def intervals(values: Tensor) -> dict[str, tuple[Any, Any]]:
        low = values.quantile((1 - confidence) / 2, dim=0, interpolation="lower").tolist()
        high = values.quantile((1 + confidence) / 2, dim=0, interpolation="higher").tolist()
        return dict(zip(names, zip(low, high, strict=True), strict=True))

    return Stability(
        allocation,
        confidence,
        {name: (int(low), int(high)) for name, (low, high) in intervals(ranks).items()},
        intervals(scores),
        int(moved.quantile(confidence, interpolation="higher")),
        float((moved == 0).double().mean()),
        len(deviations),
        batches,
    )
