"""Shapley values of any game, exact and sampled, and the coalitions that ShapLoRA samples. Knows nothing of LoRA.

A game of n players is a function `value(mask)`: mask is bool (n,), a fresh CPU tensor that is true for the players of
the coalition S, and the result is what S is worth, v(S), any finite number. The Shapley value of player i is what i
adds to those who came before, v(S ∪ {i}) - v(S), averaged over all n! orders in which the players can come:

    φ_i = Σ over S without i of |S|! (n - |S| - 1)! / n! · (v(S ∪ {i}) - v(S))

It is the only rule with these four properties (L. S. Shapley, 1953): the φ_i sum to v(all) - v(none); players whose
contributions are always equal have equal φ; one that never adds anything has 0; φ of v + w is φ of v plus φ of w.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import as_generator, require_integer

Game = Callable[[Tensor], float]  # (mask: bool (n,)) -> v(S)

MAX_EXACT_PLAYERS = 20  # 2^20 evaluations: more than a million
PROBABILITIES = tuple(k / 10 for k in range(1, 10))  # ShapLoRA's p


def exact_shapley_values(value: Game, n_players: int) -> Tensor:
    """φ of every player by the formula above: (n,) float64, on the CPU.

    Every one of the 2^n coalitions is evaluated once, in the order of the binary numbers whose bit i is player i.

    Raises ValueError: n_players is not from 1 to 20, or a coalition is worth NaN or infinity.
    """
    require_integer("n_players", n_players, 1)
    if n_players > MAX_EXACT_PLAYERS:
        raise ValueError(
            f"{n_players} players have 2^{n_players} coalitions; exact Shapley values are for at most "
            f"{MAX_EXACT_PLAYERS} players: take sampled_shapley_values"
        )
    players = torch.arange(n_players, device="cpu")
    masks = (torch.arange(2**n_players, device="cpu")[:, None] >> players) & 1 == 1  # (2^n, n)
    worths = [_worth(value, masks[number]) for number in range(2**n_players)]
    worth = torch.tensor(worths, dtype=torch.float64, device="cpu")
    size = masks.sum(1)
    # |S|! (n - |S| - 1)! / n! for |S| = 0 … n - 1, without the factorials
    weight = worth.new_tensor(
        [1 / (n_players * math.comb(n_players - 1, s)) for s in range(n_players)]
    )
    result = worth.new_empty(n_players)
    for i in range(n_players):
        without = ~masks[
            :, i
        ]  # in the same order as those with i, since the bits above and below agree
        result[i] = (weight[size[without]] * (worth[masks[:, i]] - worth[without])).sum()
    return result


class Sampled(NamedTuple):
    """An estimate of Shapley values: each (n,) float64, on the CPU."""

    values: Tensor
    standard_errors: Tensor


def sampled_shapley_values(
    value: Game, n_players: int, *, pairs: int = 100, generator: torch.Generator | int = 0
) -> Sampled:
    """φ estimated from random orders of the players, each taken forwards and backwards (antithetic pairs).

    Unbiased, and the estimates sum to v(all) - v(none) as φ does. Standard errors are over the pairs, which are
    independent, and fall as 1 / sqrt(pairs). Where players interact only two by two, every pair is exact: whoever does
    not come before a player in one of its orders does so in the other.

    Args:
        pairs: at least 2. Costs 2 + 2 · pairs · (n - 1) evaluations.
        generator: a torch.Generator or a seed.

    Source: Castro, Gómez, Tejada (2009); with antithetic pairs Mitchell, Cooper, Frank, Holmes (2022).

    Raises ValueError: a count out of its range, or a coalition is worth NaN or infinity.
    """
    require_integer("n_players", n_players, 1)
    require_integer("pairs", pairs, 2)
    generator = as_generator(generator)
    empty = torch.zeros(n_players, dtype=torch.bool, device="cpu")
    nobody, everybody = _worth(value, empty), _worth(value, ~empty)
    means = torch.empty(pairs, n_players, dtype=torch.float64, device="cpu")

    def contributions(order: Tensor) -> Tensor:
        """What each player adds when they come in this order: (n,)."""
        mask = empty.clone()
        worth = [nobody]
        for player in order[:-1]:
            mask[player] = True
            worth.append(_worth(value, mask))
        result = means.new_empty(n_players)
        result[order] = means.new_tensor([*worth, everybody]).diff()
        return result

    for k in range(pairs):
        order = torch.randperm(n_players, generator=generator, device=generator.device).cpu()
        means[k] = (contributions(order) + contributions(order.flip(0))) / 2
    return Sampled(means.mean(0), standard_error(means))


def coalition_masks(
    n_players: int, coalitions: int = 90, *, generator: torch.Generator | int = 0
) -> Tensor:
    """ShapLoRA's sample of coalitions (arXiv 2601.17921, after Eq 10): bool (coalitions, n), on the CPU.

    For p = 0.1, 0.2, … 0.9 every player is in with probability p, independently; each mask is followed by its
    complement; and all that `coalitions` / 18 times. So every player is in exactly half of them.

    Raises ValueError: `coalitions` is not a positive multiple of 18.
    """
    require_integer("n_players", n_players, 1)
    per_repeat = 2 * len(PROBABILITIES)
    require_integer("coalitions", coalitions, per_repeat)
    if coalitions % per_repeat:
        raise ValueError(
            f"coalitions must be a multiple of {per_repeat} (p = 0.1 … 0.9, each mask with its complement), got "
            f"{coalitions}: the paper takes 18, 90 or 900"
        )
    generator = as_generator(generator)
    # In float32, whatever the default type: one seed, one sample.
    p = torch.tensor(PROBABILITIES * (coalitions // per_repeat), dtype=torch.float32, device="cpu")[
        :, None
    ]
    drawn = (
        torch.rand(
            len(p), n_players, generator=generator, device=generator.device, dtype=p.dtype
        ).cpu()
        < p
    )
    return torch.stack([drawn, ~drawn], dim=1).flatten(0, 1)


def standard_error(samples: Tensor) -> Tensor:
    """Of the mean over the first axis, from independent samples: (k, …) → (…)."""
    return samples.std(dim=0) / math.sqrt(len(samples))


def _worth(value: Game, mask: Tensor) -> float:
    given = value(mask.clone())
    worth = float(
        given.detach() if isinstance(given, Tensor) else given
    )  # a loss may come with its graph
    if not math.isfinite(worth):
        members = mask.nonzero().flatten().tolist()
        raise ValueError(
            f"the coalition of players {members} is worth {worth}: expected a finite number"
        )
    return worth
