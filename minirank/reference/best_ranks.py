"""From one score for each rank to the ranks that stay: the best of all modules, as in ShapLoRA.

score         number    of each rank of each module, of any sign
budget        integer   how many ranks stay; with costs, the most that they may cost together
cost          integer   of one rank: 1, or d_out + d_in for a budget in trainable parameters
lower, upper  integers  bounds of each module's rank
"""

from __future__ import annotations

Ints = dict[str, int] | None


def best_ranks(
    scores: dict[str, list[float]],
    budget: int,
    costs: Ints = None,
    lower: Ints = None,
    upper: Ints = None,
) -> dict[str, list[bool]]:
    """Which ranks stay: each module's best `lower`, then the best of all. Ties: the earlier one."""
    cost = costs or dict.fromkeys(scores, 1)
    low, high = lower or dict.fromkeys(scores, 0), upper or dict.fromkeys(scores, budget)
    keep = {name: [False] * len(own) for name, own in scores.items()}
    left = budget
    each = [(score, name, i) for name, own in scores.items() for i, score in enumerate(own)]
    for bound in (low, high):
        for _, name, i in sorted(each, key=lambda rank: -rank[0]):
            if not keep[name][i] and sum(keep[name]) < bound[name] and cost[name] <= left:
                keep[name][i], left = True, left - cost[name]
    return keep


def demo() -> None:
    scores = {"query": [0.2, 0.9, 0.8], "up": [0.5, 0.7, 0.1]}
    print("the best 3 of", scores)
    print("  of all:             ", best_ranks(scores, 3))
    print("  at least 2 in each: ", best_ranks(scores, 4, lower={"query": 2, "up": 2}))
    cost = {"query": 768, "up": 1920}
    print("  in 2,500 parameters:", best_ranks(scores, 2500, cost))


if __name__ == "__main__":
    demo()
