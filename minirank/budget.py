"""From scores to whole ranks that use a budget exactly. Plain Python: torch is not needed to read
or to run it.

There are two ways to round, one for each kind of score:

- `proportional_ranks`: one share per module (Sensitivity-LoRA, Eq 15: r_w = θ_w / Σθ · R). The
  shares of modules that are at a bound go to the others. Then the largest remainders get the ranks
  that rounding down left over.
- `best_ranks`: one score per existing rank (ShapLoRA's sensitivities). The ranks with the highest
  scores are kept.

Each rank of a module has a cost. A budget in ranks counts 1 for each and is met exactly. A budget
in trainable parameters counts d_out + d_in: it is never exceeded, and no further rank fits into
what is left. Ties go to the module that comes first. The arithmetic is on `Fraction`s, so that
neither ties nor sums depend on floating-point rounding.

Departures: Sensitivity-LoRA's paper does not say how it rounds, and its published ranks do not sum
to the budget. Here the sum is exact. A rule that the paper tried and rejected (sort the modules,
then give groups of equal size one rank more or less than the average) is not implemented.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import NamedTuple

from .checks import is_integer


def proportional_ranks(
    scores: Mapping[str, float],
    budget: int,
    *,
    costs: Mapping[str, int] | None = None,
    lower: Mapping[str, int] | None = None,
    upper: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """Whole ranks as nearly proportional to `scores` as the bounds and the budget allow.

    Args:
        scores: {module: share}, finite and not negative. Only their ratios matter. Modules of score
            zero get `lower`, and share equally what the others cannot take. If all scores are zero,
            all shares are equal. With `costs`, what is left at the end goes to any module whose
            next rank still fits, whatever its score.
        budget: total rank; with `costs`, total cost.
        costs: {module: positive cost of one rank}. None: 1 each.
        lower, upper: {module: bound of its rank}, 0 ≤ lower ≤ upper. None: 0, and no upper bound.

    Returns:
        {module: rank} with lower ≤ rank ≤ upper and Σ rank = budget. With `costs`, Σ rank · cost ≤
        budget, and no module below its upper bound has room for one more rank.

    Raises:
        ValueError: there is no module, a score is negative or not finite, or the bounds make the
            budget impossible.

    Source: Sensitivity-LoRA, Eq 15 (arXiv 2509.09119). The paper does not say how to round.

    >>> proportional_ranks({"query": 48, "value": 31, "output": 21}, 10)  # shares 4.8, 3.1, 2.1
    {'query': 5, 'value': 3, 'output': 2}
    >>> proportional_ranks({"narrow": 1.0, "wide": 1.0}, 100, costs={"narrow": 10, "wide": 40})
    {'narrow': 2, 'wide': 2}
    """
    limits = checked_limits(list(scores), budget, costs, lower, upper)
    check_finite(scores)
    for name, score in scores.items():
        if score < 0:
            raise ValueError(
                f"score of {name!r} is {score}: shares of a budget cannot be negative; clamp it"
            )

    weights = [Fraction(score) for score in scores.values()]
    ideal = _ideal_ranks(weights, Fraction(budget), limits)
    ranks = [math.floor(value) for value in ideal]
    largest_remainder_first = sorted(range(len(ranks)), key=lambda i: (ranks[i] - ideal[i], i))
    hand_out(ranks, budget - limits.cost_of(ranks), largest_remainder_first, limits)
    return dict(zip(scores, ranks, strict=True))


def best_ranks(
    scores: Mapping[str, Sequence[float]],
    budget: int,
    *,
    costs: Mapping[str, int] | None = None,
    lower: Mapping[str, int] | None = None,
    upper: Mapping[str, int] | None = None,
) -> dict[str, list[bool]]:
    """Keep the ranks with the highest scores, over all modules together.

    Args:
        scores: {module: one finite score per existing rank}, of any sign.
        budget, costs, lower, upper: as in `proportional_ranks`. Each module first keeps its own
            best `lower` ranks. The other ranks follow by score, and each is kept if it still fits.
            Ties go to the earlier module, then to the earlier rank.

    Returns:
        {module: one bool per rank, true for the ranks to keep}. Their number is the budget. With
        `costs`, they cost at most the budget, and no further rank fits.

    Raises:
        ValueError: as `proportional_ranks`; also a module that has fewer ranks than `lower`.

    >>> best_ranks({"query": [0.9, 0.1, 0.5], "value": [0.4, 0.8]}, 3)
    {'query': [True, False, True], 'value': [False, True]}
    """
    names = list(scores)
    most = {name: len(scores[name]) for name in names}
    if upper is not None:
        most = {name: min(upper[name], most[name]) for name in names}
    limits = checked_limits(names, budget, costs, lower, most)
    check_finite(flat_scores(scores))

    keep = [[False] * len(scores[name]) for name in names]
    queue = []  # (-score, module, rank) of the ranks that no lower bound keeps
    for m, name in enumerate(names):
        best_first = sorted((-score, i) for i, score in enumerate(scores[name]))
        for _, i in best_first[: limits.lower[m]]:
            keep[m][i] = True
        queue += [(minus_score, m, i) for minus_score, i in best_first[limits.lower[m] :]]
    left = budget - limits.cost_of(limits.lower)
    for _, m, i in sorted(queue):
        if limits.cost[m] <= left and sum(keep[m]) < limits.upper[m]:
            keep[m][i] = True
            left -= limits.cost[m]
    return dict(zip(names, keep, strict=True))


class Limits(NamedTuple):
    """What one rank of each module costs, and the bounds of its rank: lists in the order of the
    modules."""

    cost: list[int]
    lower: list[int]
    upper: list[int]

    def cost_of(self, ranks: Sequence[int]) -> int:
        """What so many ranks of each module cost together."""
        return sum(rank * cost for rank, cost in zip(ranks, self.cost, strict=True))


def checked_limits(
    names: Sequence[str],
    budget: int,
    costs: Mapping[str, int] | None,
    lower: Mapping[str, int] | None,
    upper: Mapping[str, int] | None,
) -> Limits:
    """The costs and bounds of the modules `names`, in their order.

    Args:
        budget, costs, lower, upper: as in `proportional_ranks`.

    Raises:
        ValueError: unless there is a module, and some ranks within the bounds meet the budget.
    """
    unit = "ranks" if costs is None else "parameters"
    if not names:
        raise ValueError("there is no module to give ranks to: the scores are empty")
    if not is_integer(budget, -math.inf):
        raise ValueError(f"budget must be an integer number of {unit}, got {budget!r}")
    cost = [1 if costs is None else costs[name] for name in names]
    low = [0 if lower is None else lower[name] for name in names]
    # Without a bound: the budget, which pays for no more ranks than that.
    high = [
        max(budget, least) if upper is None else upper[name]
        for name, least in zip(names, low, strict=True)
    ]
    limits = Limits(cost, low, high)
    for name, least, most in zip(names, limits.lower, limits.upper, strict=True):
        if not 0 <= least <= most:
            raise ValueError(
                "expected 0 ≤ min_rank ≤ max_rank (or ≤ the ranks that a module has), got "
                f"{least} and {most} for {name!r}"
            )
    least, most = limits.cost_of(limits.lower), limits.cost_of(limits.upper)
    if budget < least:
        ranks = costs is not None and budget >= sum(limits.lower)
        hint = '. If it counts ranks: unit="ranks"' if ranks else ""
        raise ValueError(
            f"a budget of {budget} {unit} is below the {least} that min_rank takes: "
            f"raise it or lower min_rank{hint}"
        )
    if budget > most:
        # A rank costs d_out + d_in, so that parameters are many more than ranks.
        parameters = costs is None and budget > 2 * most
        hint = '. If it counts trainable parameters: unit="parameters"' if parameters else ""
        raise ValueError(
            f"a budget of {budget} {unit} is above the {most} that all modules together can take: "
            f"lower it (or raise max_rank, which is at most min(d_out, d_in)){hint}"
        )
    return limits


def check_finite(scores: Mapping[str, float]) -> None:
    """Raise ValueError unless the scores are finite.

    scores: {what the error message calls it: score}, of modules or of single ranks.
    """
    for name, score in scores.items():
        if not math.isfinite(score):
            raise ValueError(f"score of {name!r} is {score}: expected finite numbers")


def flat_scores(scores: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The score of every rank, under the name that error messages give it: "rank 2 of
    encoder.query"."""
    return {f"rank {i} of {name}": score for name in scores for i, score in enumerate(scores[name])}


def hand_out(ranks: list[int], left: int, order: Sequence[int], limits: Limits) -> int:
    """Give one rank each to the modules in `order`, round after round, while `left` pays for a rank
    and a module is below its upper bound. Adds to `ranks` in place. Returns what is left."""
    fits = True
    while fits:
        fits = False
        for m in order:
            if ranks[m] < limits.upper[m] and limits.cost[m] <= left:
                ranks[m] += 1
                left -= limits.cost[m]
                fits = True
    return left


def _ideal_ranks(weights: Sequence[Fraction], budget: Fraction, limits: Limits) -> list[Fraction]:
    """The real-valued r_i = clip(t · weight_i, lower_i, upper_i) with Σ cost_i r_i = budget.

    The sum grows with t. It is linear between its corners, the values of t at which some r_i meets
    a bound. So bisection over the corners finds the segment in which the budget is spent, and one
    division finds t in it.
    """

    def clipped(t: Fraction) -> list[Fraction]:
        return [
            min(max(t * weight, Fraction(least)), Fraction(most))
            for weight, least, most in zip(weights, limits.lower, limits.upper, strict=True)
        ]

    def spent(ranks: Sequence[Fraction]) -> Fraction:
        costs = zip(ranks, limits.cost, strict=True)
        return sum((rank * cost for rank, cost in costs), Fraction(0))

    corners = _corners(weights, limits)
    if spent(clipped(corners[-1])) < budget:  # every positive share is at its upper bound
        return _ideal_ranks_of_zeros(weights, budget, limits)
    first, last = 0, len(corners) - 1
    while first < last:  # look for the first corner at which the budget is spent
        middle = (first + last) // 2
        if spent(clipped(corners[middle])) >= budget:
            last = middle
        else:
            first = middle + 1
    end = clipped(corners[last])
    if last == 0 or spent(end) == budget:
        return end
    start = clipped(corners[last - 1])
    part = (budget - spent(start)) / (spent(end) - spent(start))
    return [a + part * (b - a) for a, b in zip(start, end, strict=True)]


def _corners(weights: Sequence[Fraction], limits: Limits) -> list[Fraction]:
    """The values of t, from 0, at which t · weight_i meets a bound of module i, in ascending
    order."""
    corners = {Fraction(0)}
    for weight, least, most in zip(weights, limits.lower, limits.upper, strict=True):
        if weight > 0:
            corners |= {least / weight, most / weight}
    return sorted(corners)


def _ideal_ranks_of_zeros(
    weights: Sequence[Fraction], budget: Fraction, limits: Limits
) -> list[Fraction]:
    """Modules with a positive weight stay at their upper bound. The others share the rest
    equally."""
    equal = [Fraction(0) if weight > 0 else Fraction(1) for weight in weights]
    lower = [
        most if weight > 0 else least
        for weight, least, most in zip(weights, limits.lower, limits.upper, strict=True)
    ]
    return _ideal_ranks(equal, budget, limits._replace(lower=lower))
