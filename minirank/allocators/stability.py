"""How sure is an allocation, and how much data is enough for it?

`stability` of SensitivityLoRA and ShapLoRA asks which ranks would change within the sampling error
of the scores. `settle` asks it again and again while it measures, and stops when the ranks are sure
enough. Both are in settling.py; the statistics are here:

1. How does what was measured vary?
   - SensitivityLoRA measures calibration batches in groups. Leaving out each group in turn (the
     jackknife) tells how the metrics of the diagonals vary with the data, random vectors included.
     For groups of unequal weight this is the delete-a-group jackknife of Busing, Meijer and van der
     Leeden (1999).
   - ShapLoRA's scores are means over pairs of a coalition and its complement (`of_mean`).
2. New metrics of all modules, or scores of all ranks, are drawn jointly from a t-distribution with
   these errors.
3. They go through the remaining equations, to the scores and ranks that could as well have come
   out.

The papers state no sampling errors: all of this is an addition. 95 % intervals of θ cover 95 % in
simulation (the tests ask for 92 to 98).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import quoted_names, require
from ..curvature.estimate import Estimate
from ..measure import NO_BATCH
from .allocation import Allocation

Diagonals = Mapping[str, Tensor]
MIN_GROUPS = 4


def interpolated_effective_rank(h: Tensor, share: float = 0.85) -> Tensor:
    """Eq 10's effective rank, made smooth for the jackknife.

    Let C(k) be the sum of the k largest entries, interpolated linearly between whole k. Returned is
    the k with C(k) = share · Σ h_ii. Eq 10 counts whole entries, so it jumps: leaving out a group
    of batches changes it by 0 or by 1 or more, and the jackknife takes such jumps for large errors.
    The interpolation varies smoothly with h. It is at most 1 below the count, and rounding it up
    gives the count.

    Args:
        h: any shape; negative entries count as 0.

    Returns:
        shape (); 0 if no entry is positive.

    >>> interpolated_effective_rank(torch.tensor([4.0, 4.0, 2.0]), share=0.6)  # 4 + ½ · 4 = 6
    tensor(1.5000)
    """
    largest = h.flatten().clamp(min=0).sort(descending=True).values
    cumulative = largest.cumsum(0)
    if cumulative[-1] <= 0:
        return h.new_zeros(())
    full = (cumulative < share * cumulative[-1]).sum()  # entries that are needed in full
    missing = share * cumulative[-1] - (cumulative[full - 1] if full else 0)
    return full + (missing / largest[full]).clamp(1e-9, 1)


class Jackknife(NamedTuple):
    """A statistic of the data, and how it varies."""

    value: Tensor  # (n,), of all batches
    deviations: Tensor  # D, (groups, n): Dᵀ D is the covariance of `value`


def of_mean(mean: Tensor, samples: Tensor) -> Jackknife:
    """A mean of independent samples, and how it varies.

    Args:
        mean: (n,)
        samples: (groups, n), of which it is the mean.

    >>> of_mean(torch.tensor([2.0]), torch.tensor([[1.0], [2.0], [3.0]])).deviations.square().sum()
    tensor(0.3333)
    """
    groups = len(samples)
    return Jackknife(mean, (samples - samples.mean(0)) / math.sqrt(groups * (groups - 1)))


class Group(NamedTuple):
    """The measurement of some consecutive batches."""

    weights: Mapping[str, float]
    means: Diagonals
    idle: frozenset[str] = frozenset()  # layers that none of them reached


class Groups:
    """Measurements of consecutive groups of batches, as many as `least` to 2 · `least`.

    When there are 2 · `least` groups, neighbours are joined to `least`, and later groups take in
    twice as many batches. So a stream of any length is held in that many groups.
    """

    def __init__(self, least: int) -> None:
        check_groups(least)
        self.least = least
        self.batches_per_group = 1  # for the next group
        self.batches = 0
        self._groups: list[Group] = []

    def __len__(self) -> int:
        return len(self._groups)

    def add(self, diagonals: Diagonals, batches: int) -> None:
        """Add the measurement of the next `batches` batches. An `Estimate` counts by its own
        weights, anything else by its number of batches."""
        self.batches += batches
        if isinstance(diagonals, Estimate):
            weights = diagonals.weights
        else:
            weights = dict.fromkeys(diagonals, float(batches))
        idle = frozenset(diagonals.idle) if isinstance(diagonals, Estimate) else frozenset()
        self._groups.append(Group(weights, diagonals, idle))
        if len(self) == 2 * self.least:
            pairs = zip(self._groups[::2], self._groups[1::2], strict=True)
            self._groups = [_joined(a, b) for a, b in pairs]
            self.batches_per_group *= 2

    def mean(self) -> dict[str, Tensor]:
        """The weighted mean over all groups."""
        if not self._groups:
            raise ValueError(NO_BATCH)
        return dict(functools.reduce(_joined, self._groups).means)

    def idle(self) -> list[str]:
        """The layers that no group reached."""
        idle = functools.reduce(_joined, self._groups).idle
        return [name for name in self._groups[0].means if name in idle]

    def jackknife(self, statistic: Callable[[Diagonals], Tensor]) -> Jackknife:
        """The statistic of the mean, and its deviations over the groups.

        Args:
            statistic: diagonals → (n,). It must be smooth: of a count that jumps, the errors come
                out too large.

        Raises:
            ValueError: there are fewer than 4 groups.
        """
        if len(self) < MIN_GROUPS:
            raise ValueError(
                f"{len(self)} batches are too few to tell how scores vary: "
                f"give at least {MIN_GROUPS}"
            )
        mean = self.mean()
        shares = self._shares()
        value = statistic(mean)
        without = [
            statistic(_mean_without(group, share, mean))
            for group, share in zip(self._groups, shares, strict=True)
        ]
        # Busing and others' h_j. A group has one share in all modules, or nearly so.
        # A layer that nothing reached has no share.
        reached = [name for name, total in self._totals().items() if total > 0]
        h = value.new_tensor(
            [len(reached) / sum(share[name] for name in reached) for share in shares]
        )
        return Jackknife(value, _jackknife_deviations(value, torch.stack(without), h))

    def _totals(self) -> dict[str, float]:
        """{name: the weight of all groups}"""
        names = self._groups[0].means
        return {name: sum(group.weights[name] for group in self._groups) for name in names}

    def _shares(self) -> list[dict[str, float]]:
        """{name: the share of the weight} of each group; 0 if the layer has none."""
        totals = self._totals()
        return [
            {name: group.weights[name] / (total or 1) for name, total in totals.items()}
            for group in self._groups
        ]


def check_groups(groups: int) -> None:
    """Raise ValueError unless that many groups are enough to tell how they vary."""
    require(groups >= MIN_GROUPS, "groups", groups, f"at least {MIN_GROUPS}, to tell how they vary")


def _mean_without(group: Group, share: Mapping[str, float], mean: Diagonals) -> Diagonals:
    """The mean over the other groups. share: {name: this group's share of the weight}."""
    return {
        name: (mean[name] - share[name] * group.means[name]) / (1 - share[name])
        if share[name] < 1
        else torch.zeros_like(mean[name])  # no other group reached the layer
        for name in mean
    }


def _jackknife_deviations(value: Tensor, without: Tensor, h: Tensor) -> Tensor:
    """D with Dᵀ D = the variance of Busing and others: 1/g Σ_j (θ̃_j − θ_J)² / (h_j − 1).

    Args:
        value: θ, the statistic of all groups, (n,).
        without: θ_(−j), the statistic without each of the g groups, (g, n).
        h: h_j, the weight of all groups over that of group j, (g,).

    Returns:
        (g, n)
    """
    h = h[:, None]
    pseudovalues = h * value - (h - 1) * without  # θ̃_j
    center = (pseudovalues / h).sum(0)  # θ_J = g θ − Σ (1 − 1/h_j) θ_(−j)
    return (pseudovalues - center) / (len(h) * (h - 1)).sqrt()


def _joined(a: Group, b: Group) -> Group:
    """One group of both: weights are summed, means are averaged by weight."""
    weights = {name: weight + b.weights[name] for name, weight in a.weights.items()}
    means = {}
    for name, mean in a.means.items():
        share = b.weights[name] / weights[name] if weights[name] else 0.0
        means[name] = mean + (b.means[name] - mean) * share
    return Group(weights, means, a.idle & b.idle)


def resample(value: Tensor, deviations: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Values drawn within their errors.

    They follow the multivariate Student t about `value` with groups − 1 degrees of freedom and the
    scale Dᵀ D, as a covariance from few groups calls for.

    Args:
        value, deviations: a `Jackknife`, (n,) and (groups, n).

    Returns:
        (count, n), float64
    """
    groups = len(deviations)

    def standard_normal(columns: int) -> Tensor:
        return torch.randn(
            count, columns, generator=generator, dtype=torch.float64, device=generator.device
        ).cpu()

    normal = standard_normal(groups)
    chi_squared = standard_normal(groups - 1).square().sum(1, keepdim=True)
    widening = ((groups - 1) / chi_squared).sqrt()
    # A matrix product rounds some columns otherwise than others, and ties would not stay ties.
    error = torch.zeros(count, len(value), dtype=torch.float64, device="cpu")
    for factor, deviation in zip(normal.unbind(1), deviations, strict=True):
        error.addcmul_(factor[:, None], deviation)
    return value + widening * error


@dataclass(frozen=True)
class Stability:
    """What the sampling error leaves open in an allocation. Print it.

    Args:
        allocation: the allocation in question.
        confidence: the share of the resampled allocations that the intervals and `max_moved` hold.
        intervals: {module: (lowest, highest) rank}. Each module's interval holds for that module
            by itself, not for all modules at once.
        score_intervals: {what is scored: (lowest, highest) score}: "encoder.query" for a module,
            "rank 2 of encoder.query" for a method that scores every rank.
        max_moved: the smallest m such that, in a share `confidence` of the resampled allocations,
            at most m ranks are in another module than in `allocation`.
        same: the share of the resampled allocations that equal `allocation`.
        groups: how many measurements the errors rest on: groups of batches, or pairs of a coalition
            and its complement.
        batches: batches in these groups; 0 for ShapLoRA.
        dominant: modules that take so much of the budget that `allocate` warns of them. How sure
            the ranks are says nothing about that.
        coalitions: coalitions in the pairs of ShapLoRA, each with its complement, as its
            `coalitions=` counts them; 0 for SensitivityLoRA.
    """

    allocation: Allocation
    confidence: float
    intervals: Mapping[str, tuple[int, int]]
    score_intervals: Mapping[str, tuple[float, float]]
    max_moved: int
    same: float
    groups: int
    batches: int
    dominant: tuple[str, ...] = ()
    coalitions: int = 0

    @property
    def measured(self) -> str:
        """What was measured: "40 batches", or "90 coalitions"."""
        return f"{self.coalitions} coalitions" if self.coalitions else f"{self.batches} batches"

    @property
    def open(self) -> dict[str, tuple[int, int]]:
        """The modules whose rank would change within the sampling error, with their intervals."""
        return {
            name: interval for name, interval in self.intervals.items() if interval[0] < interval[1]
        }

    def __str__(self) -> str:
        ranks = self.allocation.ranks
        moved = f"at most {self.max_moved}" if self.max_moved else "none"
        others = "other coalitions" if self.coalitions else "other data of this kind"
        lines = [
            f"{self.allocation.method}, {self.allocation.total_rank} ranks: with "
            f"{self.confidence:.0%} confidence {moved} of them would move",
            f"with {others} (from {self.measured}); {len(self.open)} of "
            f"{len(ranks)} modules are open, {self.same:.0%} of resampled allocations are the same",
        ]
        width = max((len(name) for name in self.open), default=0)
        lines += [
            f"  {name:<{width}}  rank {ranks[name]}, from {low} to {high}"
            for name, (low, high) in self.open.items()
        ]
        if self.dominant:
            taken = sum(ranks[name] for name in self.dominant)
            lines.append(
                f"note: {quoted_names(self.dominant)} got {taken} of the ranks. To be sure of that "
                "is not to be right: this is about sampling error alone; see allocate's warning"
            )
        return "\n".join(lines)


def resampled_stability(
    score: Callable[[Tensor], Tensor],
    divide: Callable[[Tensor], Allocation],
    metrics: Jackknife,
    *,
    confidence: float,
    resamples: int,
    generator: torch.Generator,
    batches: int = 0,
    coalitions: int = 0,
    scored: Sequence[str] | None = None,
) -> Stability:
    """Which ranks change when the metrics are drawn anew within their errors.

    Args:
        score: metrics (n,) → scores.
        divide: scores → Allocation.
        batches, coalitions: for the report.
        scored: what the scores are of. None: of the modules, in the order of divide(scores).ranks.

    Raises:
        ValueError: `confidence` or `resamples` is out of its range, or whatever `divide` raises.
    """
    check_draws(confidence, resamples)
    allocation = divide(score(metrics.value))
    drawn = resample(metrics.value, metrics.deviations, resamples, generator)
    scores = torch.stack([score(one) for one in drawn])
    ranks = torch.tensor(
        [list(divide(one).ranks.values()) for one in scores], dtype=torch.float64, device="cpu"
    )  # (resamples, modules)
    moved = _moved_ranks(ranks, allocation)
    names = list(allocation.ranks)
    return Stability(
        allocation,
        confidence,
        {
            name: (int(low), int(high))
            for name, (low, high) in _intervals(names, ranks, confidence).items()
        },
        _intervals(names if scored is None else scored, scores, confidence),
        int(moved.quantile(confidence, interpolation="higher")),
        float((moved == 0).double().mean()),
        len(metrics.deviations),
        batches,
        coalitions=coalitions,
    )


def check_draws(confidence: float, resamples: int) -> None:
    """Raise ValueError unless allocations can be drawn so."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be above 0 and below 1 (0.95: 95 %), got {confidence!r}")
    if resamples < 2:
        raise ValueError(f"resamples must be at least 2, got {resamples}")


def _moved_ranks(ranks: Tensor, allocation: Allocation) -> Tensor:
    """How many ranks are in other modules than in `allocation`.

    ranks: (resamples, modules) → (resamples,). With a budget in parameters, the sums can differ.
    Then the larger of gains and losses counts.
    """
    base = torch.tensor(list(allocation.ranks.values()), dtype=ranks.dtype, device=ranks.device)
    change = ranks - base
    return torch.maximum(change.clamp(min=0).sum(1), (-change).clamp(min=0).sum(1))


def _intervals(
    names: Sequence[str], values: Tensor, confidence: float
) -> dict[str, tuple[Any, Any]]:
    """{name: (low, high)}: they hold a share `confidence` of its values.

    values: (resamples, names).
    """
    low = values.quantile((1 - confidence) / 2, dim=0, interpolation="lower").tolist()
    high = values.quantile((1 + confidence) / 2, dim=0, interpolation="higher").tolist()
    return dict(zip(names, zip(low, high, strict=True), strict=True))
