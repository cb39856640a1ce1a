"""L1RA (arXiv 2509.04884): ranks that move during training.

    ΔW = s · B diag(c) A, with a penalty λ ‖c‖₁ that drives the gates c of idle ranks to zero

    c   (r,)      the gates, in [0, 1], one for each rank; they start at 1
    λ   a number  the weight of the penalty
    η   a number  the gates' own learning rate, which stays constant
    T   steps     between two updates, which prune ranks and give them to other layers

Each step: Adam, then the gates shrink by ηλ. Every T steps: prune, reassign, and add the new ranks
with c = 1, a random row of A and a zero column of B, which leaves the function unchanged.
"""

from __future__ import annotations

import torch
from torch import Tensor


def l1ra_shrink(gates: list[Tensor], amount: float) -> list[Tensor]:
    """The proximal step: z in [0, 1] that minimises ½ (z − c)² + amount · |z|, for every gate."""
    return [(c - amount).clamp(0, 1) for c in gates]


def l1ra_reassign(
    gates: dict[str, list[float]],
    budget: int,
    lower: dict[str, int],
    upper: dict[str, int],
    threshold: float = 0.0,
) -> tuple[dict[str, int], dict[str, list[bool]]]:
    """({name: new rank}, {name: which of the old ranks stay}). The new ranks sum to the budget."""
    # 1a. Prune every rank whose gate is at the threshold, but keep the `lower` largest of a module.
    keep = {}
    for name, c in gates.items():
        above = sum(gate > threshold for gate in c)
        count = min(max(above, lower[name]), upper[name])
        stay = sorted(range(len(c)), key=lambda i: -c[i])[:count]  # ties: the earlier rank stays
        keep[name] = [i in stay for i in range(len(c))]
    ranks = {name: max(sum(keep[name]), lower[name]) for name in gates}

    # 1b. Beyond the budget, prune the smallest gates of all; ties: the later one goes.
    each = [(c[i], name, i) for name, c in gates.items() for i in range(len(c))]
    each.reverse()
    for _, name, i in sorted(each, key=lambda rank: rank[0]):
        if sum(ranks.values()) > budget and keep[name][i] and ranks[name] > lower[name]:
            keep[name][i] = False
            ranks[name] -= 1

    # 2. Hand the freed ranks round the modules with all gates above the threshold. 3. The others.
    def smallest(name: str) -> float:
        kept = [c for c, stays in zip(gates[name], keep[name], strict=True) if stays]
        return min(kept, default=float("-inf"))

    order = sorted(gates, key=smallest, reverse=True)  # ties: the earlier module first
    intact = [name for name in order if all(c > threshold for c in gates[name])]
    for receivers in (intact, [name for name in order if name not in intact]):
        while sum(ranks.values()) < budget and any(ranks[n] < upper[n] for n in receivers):
            for name in receivers:
                if sum(ranks.values()) < budget and ranks[name] < upper[name]:
                    ranks[name] += 1
    return ranks, keep


def demo() -> None:
    """Three layers have to change by a matrix of rank 1, 2 and 6. Each starts with 3 ranks."""
    torch.manual_seed(0)
    penalty, gate_lr, interval = 0.3, 0.02, 100  # λ, η, T
    P, Q = ({k: torch.linalg.qr(torch.randn(12, k)).Q for k in (1, 2, 6)} for _ in range(2))
    goals = {f"needs {k}": P[k] @ Q[k].T for k in P}
    A = {name: torch.randn(3, 12) / 3 for name in goals}  # A ~ N(0, 1 / r₀²)
    B = {name: torch.zeros(12, 3) for name in goals}
    c = {name: torch.ones(3) for name in goals}
    for step in range(1301):
        if step % interval == 0:
            gates = {name: c[name].tolist() for name in goals}
            ranks, keep = l1ra_reassign(gates, 9, dict.fromkeys(goals, 1), dict.fromkeys(goals, 12))
            if step == 0 or not all(map(all, keep.values())):  # ranks move
                print(f"step {step:4}: ranks {ranks}")
                for name, stay in keep.items():
                    add = ranks[name] - sum(stay)
                    A[name] = torch.cat([A[name][stay], torch.randn(add, 12) / 3]).detach()
                    B[name] = torch.cat([B[name][:, stay], torch.zeros(12, add)], dim=1).detach()
                    c[name] = torch.cat([c[name][stay], torch.ones(add)]).detach()
                factors = [x.requires_grad_() for x in (*A.values(), *B.values())]
                own = [x.requires_grad_() for x in c.values()]
                groups = [{"params": factors, "weight_decay": 0.5}, {"params": own, "lr": gate_lr}]
                # Adam starts anew, as in the authors' code. resize.py keeps its moments instead.
                adam = torch.optim.AdamW(groups, lr=0.01, weight_decay=0.0)
        x = torch.randn(32, 12)
        misses = [x @ ((B[name] * c[name]) @ A[name] - goal).T for name, goal in goals.items()]
        adam.zero_grad()
        torch.autograd.backward(torch.stack(misses).square().sum(-1).mean(-1).sum())
        adam.step()
        for gate in c.values():
            gate.data = l1ra_shrink([gate.detach()], gate_lr * penalty)[0]


if __name__ == "__main__":
    demo()
