"""L1RA's rule (arXiv 2509.04884): which ranks fall, and who gets theirs. Plain Python on numbers: gates in, ranks out.

1. Prune every rank whose gate is at the threshold; a module keeps its `lower` largest, whatever they are.
2. Hand out what that leaves of the budget, one rank each, round after round, in descending order of the modules'
   smallest gate, to those with no gate at the threshold: a module all of whose gates stay high can use more.
3. What they cannot take (each at its upper bound, or too dear) goes round the other modules, those with the larger
   surviving gates first. So no rank is ever lost: one that nobody else takes is replaced by a fresh one.

The paper leaves step 3 open, and its authors' code drops such ranks. Ties go to the module, or rank, that comes first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ..budget import check_budget, hand_out


class Reassignment(NamedTuple):
    ranks: dict[str, int]  # new totals: the survivors and as many fresh ranks as it takes
    keep: dict[str, list[bool]]  # which of the present ranks survive


def reassign(
    gates: Mapping[str, Sequence[float]],
    budget: int,
    *,
    costs: Mapping[str, int] | None = None,
    lower: Mapping[str, int],
    upper: Mapping[str, int],
    threshold: float = 0.0,
) -> Reassignment:
    """Prune and hand out, so that the ranks use `budget` exactly, whether it is smaller or larger than before.

    Args:
        gates: the gate of every present rank of each module, finite. A module may have none.
        budget: total rank, or total cost if `costs` is given.
        costs: positive cost per rank of each module. None: 1 each.
        lower, upper: bounds per module, 0 ≤ lower ≤ upper. Modules below `lower` get fresh ranks first; those above
            `upper` lose their smallest gates.
        threshold: a rank falls if its gate is at most this. If the others are still too many for the budget, the
            smallest of all modules' gates fall as well.

    Returns: ranks with lower ≤ rank ≤ upper and Σ rank = budget; with `costs`, Σ rank · cost ≤ budget and no module
    below its upper bound has room for one more.

    Raises ValueError: no module, a gate that is not finite, or a budget that the bounds make impossible.
    """
    names = list(gates)
    cost = [1 if costs is None else costs[name] for name in names]
    low, high = [lower[name] for name in names], [upper[name] for name in names]
    flat = {f"rank {i} of {name}": gate for name in names for i, gate in enumerate(gates[name])}
    check_budget(flat, budget, cost, low, high, what="ranks" if costs is None else "parameters")

    keep = [
        _survivors(gates[name], threshold, lo, hi)
        for name, lo, hi in zip(names, low, high, strict=True)
    ]
    ranks = [max(sum(mask), least) for mask, least in zip(keep, low, strict=True)]
    left = budget - sum(rank * c for rank, c in zip(ranks, cost, strict=True))

    # Later ranks of equal gates fall first, as in _survivors.
    smallest_first = sorted(
        (gate, -m, -i) for m, name in enumerate(names) for i, gate in enumerate(gates[name])
    )
    for _, minus_m, minus_i in smallest_first:
        m, i = -minus_m, -minus_i
        if left < 0 and keep[m][i] and ranks[m] > low[m]:
            keep[m][i] = False
            ranks[m], left = ranks[m] - 1, left + cost[m]

    smallest = [
        min(
            (gate for gate, kept in zip(gates[name], mask, strict=True) if kept),
            default=float("-inf"),
        )
        for name, mask in zip(names, keep, strict=True)
    ]
    order = sorted(range(len(names)), key=lambda m: (-smallest[m], m))
    first = [m for m in order if all(keep[m]) and all(gate > threshold for gate in gates[names[m]])]
    left = hand_out(ranks, left, first, cost, high)
    hand_out(ranks, left, [m for m in order if m not in first], cost, high)
    return Reassignment(dict(zip(names, ranks, strict=True)), dict(zip(names, keep, strict=True)))


def _survivors(gates: Sequence[float], threshold: float, lower: int, upper: int) -> list[bool]:
    largest_first = sorted(range(len(gates)), key=lambda i: (-gates[i], i))
    above = sum(gate > threshold for gate in gates)
    kept = set(largest_first[: min(max(above, lower), upper)])
    return [i in kept for i in range(len(gates))]
