"""Shapley values by definition (L. S. Shapley 1953), and the coalitions that ShapLoRA samples.

n       integer   the number of players
S       a set     a coalition; as a mask, bool (n,), True for the players in S
v(S)    a number  what the coalition is worth
φ       (n,)      Shapley values: what a player adds to those who came before, v(S ∪ {i}) − v(S),
                  averaged over all n! orders in which the players can come
p       a number  the chance of a player to be in a sampled coalition

φ_i = Σ over S without i of |S|! (n − |S| − 1)! / n! · (v(S ∪ {i}) − v(S))
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import permutations
from math import factorial

import torch
from torch import Tensor


def exact_shapley_values(value: Callable[[Tensor], float], n: int) -> Tensor:
    """φ: (n,), float64. All n! orders are taken, so n should be at most 8."""

    @cache
    def v(S: frozenset[int]) -> float:
        mask = torch.zeros(n, dtype=torch.bool)
        mask[list(S)] = True
        return float(value(mask))

    phi = [0.0] * n
    for order in permutations(range(n)):
        for k, player in enumerate(order):
            phi[player] += v(frozenset(order[: k + 1])) - v(frozenset(order[:k]))
    return torch.tensor(phi, dtype=torch.float64) / factorial(n)


def coalition_masks(ranks: list[int], coalitions: int, generator: torch.Generator) -> Tensor:
    """ShapLoRA's sample (after its Eq 10): bool (coalitions, Σ ranks), the players being ranks.

    For p = 0.1, 0.2, … 0.9 every player is in with probability p, and each mask is followed by its
    complement. This gives 18 masks. It is repeated coalitions / 18 times, so `coalitions` is a
    multiple of 18. Every player is in exactly half of the masks.
    """
    masks = []
    for _ in range(coalitions // 18):
        for p in range(1, 10):
            shares = torch.rand(sum(ranks), generator=generator, device=generator.device)
            mask = shares < p / 10
            masks += [mask, ~mask]
    return torch.stack(masks)


def demo() -> None:
    """Two left gloves and one right glove: only a pair is worth anything."""
    phi = exact_shapley_values(lambda S: float(min(S[0] + S[1], S[2])), 3)
    for player, share in zip(
        ("left glove", "left glove", "right glove"), phi.tolist(), strict=True
    ):
        print(f"{player:12} {share:.4f}")
    print(f"sum {phi.sum():.4f}, as the pair is worth")
    masks = coalition_masks([2, 3], 18, torch.Generator().manual_seed(0))
    print(f"{len(masks)} coalitions of 5 ranks; each rank is in {masks.sum(0).tolist()} of them")


if __name__ == "__main__":
    demo()
