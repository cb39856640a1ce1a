"""L1RA's rule (arXiv 2509.04884): which ranks are pruned, and which modules get new ones.

Plain Python on numbers: gates in, ranks out. Torch is not needed to read or to run it.

1. Prune every rank whose gate is at the threshold. A module keeps its `lower` largest gates,
   whatever their values are.
2. Hand out what is left of the budget, one rank each, round after round. The modules whose gates
   are all above the threshold come first, in descending order of their smallest gate: a module
   whose gates all stay high can use more ranks.
3. Ranks that these modules cannot take (they are at their upper bound, or a rank costs too much)
   go to the other modules, one each, in descending order of their smallest surviving gate. The
   module that lost a rank may get it back, as a fresh rank. So no rank is lost.

If the ranks that step 1 keeps exceed the budget, the smallest gates of all modules are pruned too,
before step 2.

Ties go to the module, or rank, that comes first.

Departures: the paper leaves step 3 open, and its authors' code drops such ranks. If all gates of a
module are at the threshold, the authors' code keeps the last one; here the largest one stays. The
paper has no budget in parameters: with `costs`, a freed rank goes where the next rank still fits,
until no further rank fits anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ..budget import Limits, check_finite, checked_limits, flat_scores, hand_out


class Reassignment(NamedTuple):
    """What `reassign` decides."""

    ranks: dict[str, int]  # every module's new rank: the ranks it keeps and its fresh ones
    keep: dict[str, list[bool]]  # for every present rank: true if it survives


def reassign(
    gates: Mapping[str, Sequence[float]],
    budget: int,
    lower: Mapping[str, int],
    upper: Mapping[str, int],
    *,
    costs: Mapping[str, int] | None = None,
    threshold: float = 0.0,
) -> Reassignment:
    """Prune and hand out, so that the ranks use `budget` exactly, be it smaller or larger than now.

    Args:
        gates: {module: the gate of each of its present ranks}, finite. A module may have none.
        budget: total rank; with `costs`, total cost.
        lower, upper: {module: bound of its rank}, 0 ≤ lower ≤ upper. Modules below `lower` get
            fresh ranks first. Modules above `upper` lose their smallest gates.
        costs: {module: positive cost of one rank}. None: 1 each.
        threshold: ranks with a gate of at most this are pruned. If the other ranks still exceed the
            budget, the smallest of all modules' gates are pruned as well.

    Returns:
        Ranks with lower ≤ rank ≤ upper and Σ rank = budget. With `costs`, Σ rank · cost ≤ budget,
        and no module below its upper bound has room for one more rank.

    Raises:
        ValueError: there is no module, a gate is not finite, or the bounds make the budget
            impossible.

    >>> gates = {"query": [0.9, 0.0, 0.0], "value": [0.8]}
    >>> new = reassign(gates, 4, lower={"query": 1, "value": 1}, upper={"query": 8, "value": 8})
    >>> new.ranks, new.keep
    ({'query': 1, 'value': 3}, {'query': [True, False, False], 'value': [True]})
    """
    names, of_modules = list(gates), [list(values) for values in gates.values()]
    limits = checked_limits(names, budget, costs, lower, upper)
    check_finite(flat_scores(gates))

    keep = [
        _above_threshold(values, threshold, least, most)
        for values, least, most in zip(of_modules, limits.lower, limits.upper, strict=True)
    ]
    _prune_to_budget(of_modules, keep, budget, limits)
    ranks = _kept_or_lower(keep, limits)
    left = budget - limits.cost_of(ranks)
    intact, others = _receivers(of_modules, keep, threshold)
    left = hand_out(ranks, left, intact, limits)
    hand_out(ranks, left, others, limits)
    return Reassignment(dict(zip(names, ranks, strict=True)), dict(zip(names, keep, strict=True)))


def _above_threshold(
    gates: Sequence[float], threshold: float, lower: int, upper: int
) -> list[bool]:
    """Which ranks of one module step 1 keeps: those above the threshold, at least the `lower`
    largest, at most the `upper` largest."""
    largest_first = sorted(range(len(gates)), key=lambda i: (-gates[i], i))
    above = sum(gate > threshold for gate in gates)
    kept = set(largest_first[: min(max(above, lower), upper)])
    return [i in kept for i in range(len(gates))]


def _kept_or_lower(keep: Sequence[Sequence[bool]], limits: Limits) -> list[int]:
    """Each module's rank before ranks are handed out: what it keeps, but at least `lower`."""
    return [max(sum(mask), least) for mask, least in zip(keep, limits.lower, strict=True)]


def _prune_to_budget(
    gates: Sequence[Sequence[float]], keep: list[list[bool]], budget: int, limits: Limits
) -> None:
    """Take the smallest gates of all modules out of `keep`, in place, while the ranks exceed the
    budget. Of equal gates, the later one goes first, as in `_above_threshold`."""
    ranks = _kept_or_lower(keep, limits)
    excess = limits.cost_of(ranks) - budget
    smallest_first = sorted(
        (gate, -m, -i) for m, values in enumerate(gates) for i, gate in enumerate(values)
    )
    for _, minus_m, minus_i in smallest_first:
        m, i = -minus_m, -minus_i
        if excess > 0 and keep[m][i] and ranks[m] > limits.lower[m]:
            keep[m][i] = False
            ranks[m] -= 1
            excess -= limits.cost[m]


def _receivers(
    gates: Sequence[Sequence[float]], keep: Sequence[Sequence[bool]], threshold: float
) -> tuple[list[int], list[int]]:
    """(modules that lost no rank and have all gates above the threshold, the other modules): each
    in descending order of the smallest surviving gate. Modules without one come last."""

    def smallest_surviving(m: int) -> float:
        surviving = [gate for gate, kept in zip(gates[m], keep[m], strict=True) if kept]
        return min(surviving, default=-math.inf)

    order = sorted(range(len(gates)), key=smallest_surviving, reverse=True)  # ties: the earlier
    intact = [m for m in order if all(keep[m]) and all(gate > threshold for gate in gates[m])]
    return intact, [m for m in order if m not in intact]
