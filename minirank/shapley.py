"""Shapley values of any game, exact and sampled, and the coalitions that ShapLoRA samples.

A game of n players is a function `value(mask)`. The mask is a bool tensor (n,) on the CPU, a new
one for each call, and True for the players of a coalition S. The function returns what S is worth,
v(S), as a finite number. The Shapley value of player i is what i adds to those who came before,
v(S ∪ {i}) − v(S), averaged over all n! orders in which the players can come:

    φ_i = Σ over S without i of |S|! (n − |S| − 1)! / n! · (v(S ∪ {i}) − v(S))

It is the only rule with these four properties (L. S. Shapley, 1953):

- efficiency: all φ_i together are v(all players) − v(no player);
- symmetry: two players whose contributions are always equal have equal φ;
- null player: a player who never adds anything has φ = 0;
- additivity: φ of the game v + w is φ of v plus φ of w.

This file knows nothing of LoRA. `minirank.reference.shapley` has the same by definition.
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
COALITIONS_PER_REPEAT = 2 * len(PROBABILITIES)  # each mask with its complement


def exact_shapley_values(value: Game, n_players: int) -> Tensor:
    """The Shapley value of every player, by the formula at the top of this file.

    Args:
        value: the game. It is called once for each of the 2^n coalitions, in the order of the
            binary numbers whose bit i is player i.
        n_players: from 1 to 20.

    Returns: φ, (n,), float64, on the CPU.

    Raises:
        ValueError: `n_players` is out of range, or a coalition is worth NaN or infinity.

    Two left gloves and a right one; only a pair is worth something:

    >>> exact_shapley_values(lambda mask: float(min(mask[0] + mask[1], mask[2])), 3)
    tensor([0.1667, 0.1667, 0.6667], dtype=torch.float64)
    """
    require_integer("n_players", n_players, 1)
    if n_players > MAX_EXACT_PLAYERS:
        raise ValueError(
            f"{n_players} players have 2^{n_players} coalitions; exact Shapley values are for at "
            f"most {MAX_EXACT_PLAYERS} players: take sampled_shapley_values"
        )
    players = torch.arange(n_players, device="cpu")
    masks = (torch.arange(2**n_players, device="cpu")[:, None] >> players) & 1 == 1  # (2^n, n)
    worths = [_worth(value, mask) for mask in masks]
    worth = torch.tensor(worths, dtype=torch.float64, device="cpu")
    size = masks.sum(1)
    # |S|! (n − |S| − 1)! / n! for |S| = 0 … n − 1, without the factorials
    weight = worth.new_tensor(
        [1 / (n_players * math.comb(n_players - 1, s)) for s in range(n_players)]
    )
    phi = worth.new_empty(n_players)
    for i in range(n_players):
        # Both selections are in the order of the players other than i, so that they pair up.
        with_i, without_i = worth[masks[:, i]], worth[~masks[:, i]]
        phi[i] = (weight[size[~masks[:, i]]] * (with_i - without_i)).sum()
    return phi


class Sampled(NamedTuple):
    """An estimate of Shapley values: each (n,), float64, on the CPU."""

    values: Tensor
    standard_errors: Tensor


def sampled_shapley_values(
    value: Game, n_players: int, *, pairs: int = 100, generator: torch.Generator | int = 0
) -> Sampled:
    """An unbiased estimate of the Shapley values, from random orders of the players.

    Each order is taken forwards and backwards (an antithetic pair). The estimates sum to
    v(all) − v(none), as φ does. If players interact only two by two, every single pair is exact:
    whoever comes after a player in one of its orders comes before that player in the other.

    Args:
        value: the game. It is called 2 + 2 · pairs · (n − 1) times.
        n_players: at least 1.
        pairs: how many orders are drawn, at least 2. Standard errors fall as 1 / sqrt(pairs).
        generator: a torch.Generator or a seed, for the orders.

    Returns: the values, and their standard errors over the pairs, which are independent.

    Raises:
        ValueError: a count is out of range, or a coalition is worth NaN or infinity.

    Source: Castro, Gómez and Tejada (2009); antithetic pairs: Mitchell, Cooper, Frank and Holmes
    (2022).

    >>> estimate = sampled_shapley_values(lambda mask: float(mask.sum()) ** 2, 4, pairs=2)
    >>> estimate.values
    tensor([4., 4., 4., 4.], dtype=torch.float64)
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
    """ShapLoRA's sample of coalitions (arXiv 2601.17921, after Eq 10).

    For p = 0.1, 0.2, … 0.9 every player is in with probability p, independently. Each mask is
    followed by its complement. All of this is done `coalitions` / 18 times. So every player is in
    exactly half of the coalitions. A smaller sample from a seed is the start of a larger one.

    Args:
        n_players: at least 1.
        coalitions: a positive multiple of 18; the paper takes 18, 90 or 900.
        generator: a torch.Generator or a seed. One seed gives one sample on every device.

    Returns: bool (coalitions, n), on the CPU.

    Raises:
        ValueError: a count is out of range.

    >>> coalition_masks(5, 18).sum(0)
    tensor([9, 9, 9, 9, 9])
    """
    require_integer("n_players", n_players, 1)
    require_integer("coalitions", coalitions, COALITIONS_PER_REPEAT)
    if coalitions % COALITIONS_PER_REPEAT:
        raise ValueError(
            f"coalitions must be a multiple of {COALITIONS_PER_REPEAT} (p = 0.1 … 0.9, each mask "
            f"with its complement), got {coalitions}: the paper takes 18, 90 or 900"
        )
    generator = as_generator(generator)
    # float32, whatever the default dtype is, so that a seed always gives the same sample
    p = torch.tensor(
        PROBABILITIES * (coalitions // COALITIONS_PER_REPEAT), dtype=torch.float32, device="cpu"
    )[:, None]
    uniform = torch.rand(
        len(p), n_players, generator=generator, device=generator.device, dtype=p.dtype
    )
    masks = uniform.cpu() < p
    return torch.stack([masks, ~masks], dim=1).flatten(0, 1)


def standard_error(samples: Tensor) -> Tensor:
    """Of the mean over the first axis, for independent samples: (k, …) → (…)."""
    return samples.std(dim=0) / math.sqrt(len(samples))


def _worth(value: Game, mask: Tensor) -> float:
    given = value(mask.clone())
    worth = float(given.detach() if isinstance(given, Tensor) else given)  # may come with a graph
    if not math.isfinite(worth):
        members = mask.nonzero().flatten().tolist()
        raise ValueError(
            f"the coalition of players {members} is worth {worth}: expected a finite number"
        )
    return worth
