"""From scores to whole ranks that use a budget exactly. Plain Python: torch is not needed to read or to run it.

Two roundings, one for each kind of score:

- `proportional_ranks`: one share per module (Sensitivity-LoRA Eq 15: r_w = θ_w / Σθ · R). Shares beyond a module's
  bounds are redistributed over the others, then largest remainders get the ranks that rounding down left over.
- `best_ranks`: one score per existing rank (ShapLoRA's sensitivities). The best are kept, globally.

Both count each rank of a module at a cost: 1 for a budget in ranks, which is met exactly, or d_out + d_in for a
budget in trainable parameters, which is never exceeded and leaves no room for a further rank. Ties go to the module
that comes first. Arithmetic is on `Fraction`s, so neither ties nor sums depend on floating-point rounding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

from .checks import is_integer


def proportional_ranks(
    scores: Mapping[str, float],
    budget: int,
    *,
    costs: Mapping[str, int] | None = None,
    lower: Mapping[str, int],
    upper: Mapping[str, int],
) -> dict[str, int]:
    """Whole ranks as nearly proportional to `scores` as bounds and budget allow.

    Args:
        scores: one share per module, finite and not negative; only their ratios matter. Modules of score zero get
            `lower`, and share equally what the others cannot take; all zero means equal shares. With `costs`, what is
            left at the end goes to any module whose next rank still fits, whatever its score.
        budget: total rank, or total cost if `costs` is given.
        costs: positive cost per rank of each module. None: 1 each.
        lower, upper: bounds per module, 0 ≤ lower ≤ upper.

    Returns: {module: rank} with lower ≤ rank ≤ upper and Σ rank = budget; with `costs`, Σ rank · cost ≤ budget and
    no module below its upper bound has room for one more.

    Raises ValueError: no module, a score that is negative or not finite, or a budget that the bounds make impossible.
    """
    names = list(scores)
    cost = [1 if costs is None else costs[name] for name in names]
    low, high = [lower[name] for name in names], [upper[name] for name in names]
    check_budget(scores, budget, cost, low, high, what="ranks" if costs is None else "parameters")
    weights = []
    for name in names:
        if scores[name] < 0:
            raise ValueError(
                f"score of {name!r} is {scores[name]}: shares of a budget cannot be negative; clamp it"
            )
        weights.append(Fraction(scores[name]))

    ideal = _ideal_ranks(weights, Fraction(budget), cost, low, high)
    ranks = [math.floor(value) for value in ideal]
    left = budget - sum(rank * c for rank, c in zip(ranks, cost, strict=True))
    by_remainder = sorted(
        range(len(names)), key=lambda i: (ranks[i] - ideal[i], i)
    )  # largest first, then in order
    hand_out(ranks, left, by_remainder, cost, high)
    return dict(zip(names, ranks, strict=True))


def hand_out(
    ranks: list[int], left: int, order: Sequence[int], cost: Sequence[int], high: Sequence[int]
) -> int:
    """Add to `ranks`, in place, one each in `order`, round after round, wherever there is room below `high` and `left`
    pays the cost. Returns what is left."""
    fits = True
    while fits:
        fits = False
        for i in order:
            if ranks[i] < high[i] and cost[i] <= left:
                ranks[i], left, fits = ranks[i] + 1, left - cost[i], True
    return left


def _ideal_ranks(
    weights: Sequence[Fraction],
    budget: Fraction,
    cost: Sequence[int],
    low: Sequence[int],
    high: Sequence[int],
) -> list[Fraction]:
    """The real-valued r_i = clip(t · weight_i, low_i, high_i) with Σ cost_i r_i = budget.

    The sum grows with t and is linear between the points where some r_i meets a bound, so bisection over those points
    finds the segment that holds the budget, and one division the t in it.
    """

    def clipped(t: Fraction) -> list[Fraction]:
        return [
            min(max(t * w, Fraction(lo)), Fraction(hi))
            for w, lo, hi in zip(weights, low, high, strict=True)
        ]

    def spent(ranks: Sequence[Fraction]) -> Fraction:
        return sum((r * c for r, c in zip(ranks, cost, strict=True)), Fraction(0))

    positive = [i for i, w in enumerate(weights) if w > 0]
    corners = sorted(
        {Fraction(bound[i]) / weights[i] for i in positive for bound in (low, high)} | {Fraction(0)}
    )
    if (
        spent(clipped(corners[-1])) < budget
    ):  # every positive share is at its bound: equal shares for the zeros
        rest = [Fraction(0) if w > 0 else Fraction(1) for w in weights]
        taken = [high[i] if w > 0 else low[i] for i, w in enumerate(weights)]
        return _ideal_ranks(
            rest,
            budget,
            cost,
            taken,
            [h if w == 0 else t for h, w, t in zip(high, weights, taken, strict=True)],
        )
    first, last = 0, len(corners) - 1
    while first < last:  # the first corner at which the budget is spent
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


def best_ranks(
    scores: Mapping[str, Sequence[float]],
    budget: int,
    *,
    costs: Mapping[str, int] | None = None,
    lower: Mapping[str, int],
    upper: Mapping[str, int],
) -> dict[str, list[bool]]:
    """Keep the ranks with the highest scores, over all modules together.

    Args:
        scores: one finite score per existing rank of each module; any sign.
        budget, costs, lower, upper: as in `proportional_ranks`. Each module first keeps its own best `lower` ranks;
            the rest go by score, ties by module and then rank order, to what still fits.

    Returns: {module: keep mask}; the number kept is the budget exactly, or costs at most the budget with no room left.

    Raises ValueError: as `proportional_ranks`; a module that has fewer ranks than `lower` also counts as impossible.
    """
    names = list(scores)
    cost = [1 if costs is None else costs[name] for name in names]
    low = [lower[name] for name in names]
    high = [min(upper[name], len(scores[name])) for name in names]
    flat = {f"rank {i} of {name}": score for name in names for i, score in enumerate(scores[name])}
    check_budget(flat, budget, cost, low, high, what="ranks" if costs is None else "parameters")

    order = {
        name: sorted(range(len(scores[name])), key=lambda i: (-scores[name][i], i))
        for name in names
    }
    keep = {name: [False] * len(scores[name]) for name in names}
    for name, least in zip(names, low, strict=True):
        for i in order[name][:least]:
            keep[name][i] = True
    left = budget - sum(least * c for least, c in zip(low, cost, strict=True))
    queue = [
        (-scores[name][i], m, i) for m, name in enumerate(names) for i in order[name][low[m] :]
    ]
    for _, m, i in sorted(queue):
        if cost[m] <= left and sum(keep[names[m]]) < high[m]:
            keep[names[m]][i] = True
            left -= cost[m]
    return keep


def check_budget(
    scores: Mapping[str, float],
    budget: int,
    cost: Sequence[int],
    low: Sequence[int],
    high: Sequence[int],
    what: str,
) -> None:
    """Raise ValueError unless the scores are finite and some ranks within the bounds meet the budget."""
    if not cost:
        raise ValueError("there is no module to give ranks to: the scores are empty")
    if not is_integer(budget, -math.inf):
        raise ValueError(f"budget must be an integer number of {what}, got {budget!r}")
    for name, score in scores.items():
        if not math.isfinite(score):
            raise ValueError(f"score of {name!r} is {score}: expected finite numbers")
    for lo, hi in zip(low, high, strict=True):
        if not 0 <= lo <= hi:
            raise ValueError(
                f"expected 0 ≤ min_rank ≤ max_rank (or the ranks a module has), got {lo} and {hi}"
            )
    least = sum(lo * c for lo, c in zip(low, cost, strict=True))
    most = sum(hi * c for hi, c in zip(high, cost, strict=True))
    if budget < least:
        raise ValueError(
            f"a budget of {budget} {what} is below the {least} that min_rank takes: raise it or lower min_rank"
        )
    if budget > most:
        raise ValueError(
            f"a budget of {budget} {what} is above the {most} that all modules together can take: lower it (or raise "
            "max_rank, which is at most min(d_out, d_in))"
        )
