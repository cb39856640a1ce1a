"""Does one module take so much of a budget that the allocation makes little sense?

Scores can be extreme. In Llama-like decoders a few tokens have inputs that are thousands of times
larger than those of the others: massive activations (arXiv 2402.17762). By the mean square input,
three of the 210 layers of SmolLM2-135M take 89 % of a budget of parameters, and 168 get nothing.
That is no sampling error, and more data gives the same ranks. So `allocate` warns, and names a
bound.

A module is dominant if it takes more than `SHARE` of the budget, and more than `FACTOR` times the
rank that it would have if all scores were equal, under the same bounds. (That rank counts as 1 and
as the modules' average at least.) Modules whose inputs are massive are judged together: they are
dominant if those above `FACTOR` take more than `SHARE` in sum. A bound that the user gave makes no
module dominant, nor does a budget of few ranks or a model of few modules.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor

from ..budget import proportional_ranks
from ..checks import quoted_names, warn_caller
from .allocation import Allocation
from .constraints import Constraints

SHARE = 1 / 4  # of the budget
FACTOR = 3  # times an even rank
ADVISED_FACTOR = 2  # max_rank, in even ranks
# The share of a layer's mean square input in one feature. Measured: 0.89 and 0.94 for two layers
# of SmolLM2 where activations are massive, up to 0.74 for its other layers, 0.30 for MiniLM.
MASSIVE = 0.8
MIN_FEATURES = 16  # with fewer, one of them can well hold as much
PATTERN = r"'.*' takes? \d+% of the budget"  # of the warning


def dominant_modules(
    ranks: Mapping[str, int], constraints: Constraints, massive: Collection[str] = ()
) -> list[str]:
    """The modules that take too much of the budget, in order.

    Args:
        ranks: the allocation.
        constraints: that it keeps to.
        massive: modules with massive inputs, which are judged together.

    >>> ten = [f"layer {i}" for i in range(10)]
    >>> bounds = dict.fromkeys(ten, 0), dict.fromkeys(ten, 64)
    >>> constraints = Constraints(20, "ranks", dict.fromkeys(ten, 128), *bounds)
    >>> dominant_modules({**dict.fromkeys(ten, 1), "layer 3": 11}, constraints)
    ['layer 3']
    """
    costs = constraints.budget_costs or dict.fromkeys(ranks, 1)
    threshold = SHARE * constraints.budget
    large = {name for name, rank in ranks.items() if rank * costs[name] > threshold}
    suspects = large | {name for name in massive if ranks[name] > FACTOR}
    if not suspects:
        return []
    even = even_ranks(constraints)
    average = sum(even.values()) / len(even)  # which no rounding has made too small
    above = {name for name in suspects if ranks[name] > FACTOR * max(1, average, even[name])}
    found = above & large
    massive_above = above & set(massive)
    if sum(ranks[name] * costs[name] for name in massive_above) > threshold:
        found |= massive_above
    return [name for name in ranks if name in found]


def even_ranks(constraints: Constraints) -> dict[str, int]:
    """The ranks that equal scores get under the same budget and bounds."""
    return proportional_ranks(
        dict.fromkeys(constraints.costs, 1),
        constraints.budget,
        costs=constraints.budget_costs,
        lower=constraints.lower,
        upper=constraints.upper,
    )


def massive_inputs(diagonals: Mapping[str, Tensor]) -> dict[str, float]:
    """{module: the share of its mean square input in one feature}, where that is nearly all.

    Args:
        diagonals: {module: (d_in,), or (d_out, d_in)}; the latter are no input moments.

    >>> import torch
    >>> massive_inputs({"a": torch.tensor([48.0] + 16 * [0.0]), "b": torch.ones(16)})
    {'a': 1.0}
    """
    shares = {}
    for name, h in diagonals.items():
        if h.ndim == 1 and h.numel() >= MIN_FEATURES and (total := float(h.sum())) > 0:
            share = float(h.max()) / total
            if share > MASSIVE:
                shares[name] = share
    return shares


def warn_of_dominance(
    allocation: Allocation, constraints: Constraints, massive: Mapping[str, float]
) -> None:
    """Warn, once for all modules, if some take too much of the budget.

    Args:
        massive: as `massive_inputs` returns it.
    """
    dominant = dominant_modules(allocation.ranks, constraints, massive)
    if dominant:
        warn_caller(_message(dominant, allocation, constraints, massive))


def _message(
    dominant: list[str],
    allocation: Allocation,
    constraints: Constraints,
    massive: Mapping[str, float],
) -> str:
    ranks = allocation.ranks
    costs = constraints.budget_costs or dict.fromkeys(ranks, 1)
    spent = sum(ranks[name] * costs[name] for name in dominant)
    without = sum(rank == 0 for rank in ranks.values())
    even = even_ranks(constraints)
    average = max(1, round(sum(even.values()) / len(even)))
    several = len(dominant) > 1
    others = (
        f"{without} of {len(ranks)} modules get no rank" if without else "every module gets a rank"
    )
    parts = [
        f"{quoted_names(dominant)} {'take' if several else 'takes'} "
        f"{spent / constraints.budget:.0%} of the budget: "
        f"{', '.join(str(ranks[name]) for name in dominant[:3])} ranks, where an even share is "
        f"{average}; {others}."
    ]
    features = [name for name in dominant if name in massive]
    if features:
        parts.append(
            f"One input feature holds {massive[features[0]]:.0%} of the mean square input of "
            f"{features[0]!r}: a few tokens with massive activations can decide its score, which "
            "more data does not change."
        )
    # With no module below its even rank, a bound leaves room for the whole budget.
    bound = max(ADVISED_FACTOR * average, *even.values(), *constraints.lower.values())
    parts.append(f"Bound the ranks, as in allocate(…, max_rank={bound}), or take uniform ranks")
    return " ".join(parts)
