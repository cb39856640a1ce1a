"""From one score for each module to whole ranks that use up a budget (Sensitivity-LoRA, Eq 15).

    score         ≥ 0       of each module; its share of the budget
    budget        integer   the sum of all ranks; with costs, the most that they may cost together
    cost          integer   of one rank: 1, or d_out + d_in for a budget in trainable parameters
    lower, upper  integers  bounds of each module's rank
    t             Fraction  the factor common to all: rank = clip(t · score, lower, upper)

Fractions make the arithmetic exact, so that ties are ties.
"""

from __future__ import annotations

from fractions import Fraction
from math import floor

Ints = dict[str, int] | None


def ranks_from_shares(
    scores: dict[str, float],
    budget: int,
    costs: Ints = None,
    lower: Ints = None,
    upper: Ints = None,
) -> dict[str, int]:
    """Ranks in proportion to scores, by largest remainder. Ties go to the earlier module."""
    cost = costs or dict.fromkeys(scores, 1)
    low, high = lower or dict.fromkeys(scores, 0), upper or dict.fromkeys(scores, budget)
    exact = {name: Fraction(score) for name, score in scores.items()}
    ideal = ideal_ranks(exact, budget, cost, low, high)
    ranks = {name: floor(rank) for name, rank in ideal.items()}
    left = budget - sum(rank * cost[name] for name, rank in ranks.items())
    order = sorted(ranks, key=lambda name: ranks[name] - ideal[name])  # largest remainder first
    fits = True
    while fits:  # one rank each, round after round
        fits = False
        for name in order:
            if ranks[name] < high[name] and cost[name] <= left:
                ranks[name] += 1
                left -= cost[name]
                fits = True
    return ranks


def ideal_ranks(
    scores: dict[str, Fraction],
    budget: int,
    cost: dict[str, int],
    low: dict[str, int],
    high: dict[str, int],
) -> dict[str, Fraction]:
    """clip(t · score, low, high), with the t that spends the budget."""

    def ranks(t: Fraction) -> dict[str, Fraction]:
        return {n: min(max(t * s, Fraction(low[n])), Fraction(high[n])) for n, s in scores.items()}

    def spent(t: Fraction) -> Fraction:
        return sum((rank * cost[name] for name, rank in ranks(t).items()), Fraction(0))

    # spent(t) grows in a straight line between the points where some rank meets a bound.
    scored = [name for name, score in scores.items() if score > 0]
    t = Fraction(0)
    for end in sorted(bound[name] / scores[name] for name in scored for bound in (low, high)):
        if spent(end) >= budget:
            slope = (spent(end) - spent(t)) / (end - t) if end > t else 0
            return ranks(t + (budget - spent(t)) / slope if slope else end)
        t = end
    if len(scored) == len(scores):
        return ranks(t)  # every module is at its upper bound
    # The modules that score zero share evenly what the others, at their upper bounds, cannot hold.
    held = {name: high[name] if name in scored else low[name] for name in scores}
    return ideal_ranks(dict.fromkeys(scores, Fraction(1)), budget, cost, held, high)


def demo() -> None:
    theta = {"query": 0.7, "value": 2.9, "up": 5.4}
    print("ranks in proportion to", theta)
    print("  10 ranks:                ", ranks_from_shares(theta, 10))
    print(
        "  10 ranks, at most 4 each:", ranks_from_shares(theta, 10, upper=dict.fromkeys(theta, 4))
    )
    cost = {"query": 768, "value": 768, "up": 1920}
    print("  10,000 parameters:       ", ranks_from_shares(theta, 10_000, cost))


if __name__ == "__main__":
    demo()
