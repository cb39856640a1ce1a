"""ShapLoRA (arXiv 2601.17921): ranks by their Shapley sensitivity, after a first training.

    ΔW = s · P diag(λ) Q (Eq 3). Rank i of a module is a player: (λ_i, P[:, i], Q[i, :])

    λ       gate  (r,)        starts at zero and is trained
    P       P     (d_out, r)  like LoRA's B, but Gaussian at the start
    Q       Q     (r, d_in)   like LoRA's A
    S       mask  bool (Σ r,) a coalition of players, over all modules: λ = 0 outside (Eq 6)
    L       loss              the mean loss over all samples of the validation set
    ipt(w)                    Eq 8: the importance of one parameter, |w · ∂L/∂w|
    SAN     san   (r,)        Eq 7: the importance of each rank in S, from the ipt of its players:
                              SAN(i | S) = ipt(λ_i) + mean_j ipt(P_ji) + mean_j ipt(Q_ij)
    score         (r,)        Eqs 9, 10: the mean of SAN(i | S) over the masks that shapley.py draws

The workflow: train with more ranks than the budget, score them on validation data, keep the best of
all modules together, throw the trained adapters away, and train anew with the ranks found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

Adapters = dict[str, dict[str, Tensor]]  # {module name: {"gate", "P", "Q"}}


def ipt(w: Tensor, gradient: Tensor) -> Tensor:
    return (w * gradient).abs()  # Eq 8


def san(
    gate: Tensor, P: Tensor, Q: Tensor, grad_gate: Tensor, grad_P: Tensor, grad_Q: Tensor
) -> Tensor:
    """SAN(i | S) of every rank i of one module, with λ as it is in S: (r,)."""
    return ipt(gate, grad_gate) + ipt(P, grad_P).mean(0) + ipt(Q, grad_Q).mean(1)  # Eq 7


@torch.inference_mode(False)  # gradients on
def shapley_sensitivity(
    loss: Callable[[Adapters, Any], Tensor], params: Adapters, batches: Iterable[Any], masks: Tensor
) -> dict[str, Tensor]:
    """The mean of SAN(i | S) over the coalitions `masks`, bool (K, Σ r): {name: (r,)}.

    `loss(adapters, batch)` must compute with the adapters that it is given, not with a module's.
    """
    batches = list(batches)
    ranks = [len(own["gate"]) for own in params.values()]
    scores = {name: torch.zeros_like(own["gate"]) for name, own in params.items()}
    for mask in masks:
        masked: Adapters = {}
        for (name, own), members in zip(params.items(), mask.split(ranks), strict=True):
            masked[name] = {key: w.detach().clone() for key, w in own.items()}
            masked[name]["gate"][~members] = 0.0  # Eq 6
        w = [own[key].requires_grad_() for own in masked.values() for key in ("gate", "P", "Q")]
        losses = [length(batch) * loss(masked, batch) for batch in batches]
        L = torch.stack(losses).sum() / sum(map(length, batches))
        gradients = torch.autograd.grad(L, w, materialize_grads=True)
        for i, score in enumerate(scores.values()):
            one = slice(3 * i, 3 * i + 3)
            score += san(*w[one], *gradients[one]).detach() / len(masks)  # Eqs 9, 10
    return scores


def length(batch: Any) -> int:
    """How many samples: the first dimension of the batch's first tensor."""
    if isinstance(batch, Tensor):
        return len(batch)
    return length(next(iter(batch.values() if isinstance(batch, Mapping) else batch)))


def demo() -> None:
    """One map has to change by rank 3, another not at all. (The coalitions: see shapley.py.)"""
    torch.manual_seed(0)
    goals = {"idle": torch.zeros(8, 8), "needs 3": torch.randn(8, 3) @ torch.randn(3, 8) / 3}
    params = {}
    for name in goals:
        params[name] = {"gate": torch.zeros(4), "P": torch.randn(8, 4), "Q": torch.randn(4, 8)}

    def loss(adapters: Adapters, x: Tensor) -> Tensor:
        deltas = [(own["P"] * own["gate"]) @ own["Q"] for own in adapters.values()]
        errors = [x @ (d - goal).T for d, goal in zip(deltas, goals.values(), strict=True)]
        return torch.stack(errors).square().mean(1).sum()

    adam = torch.optim.Adam([w.requires_grad_() for own in params.values() for w in own.values()])
    for _ in range(1000):
        adam.zero_grad()
        torch.autograd.backward(loss(params, torch.randn(32, 8)))
        adam.step()
    scores = shapley_sensitivity(loss, params, [torch.randn(64, 8)], torch.rand(90, 8) < 0.5)
    for name, score in scores.items():
        print(f"{name:8} scores of its ranks:", [round(s, 4) for s in score.tolist()])
    best = torch.cat(list(scores.values())).topk(3).indices // 4
    print("of the best 3 ranks:", {name: int((best == i).sum()) for i, name in enumerate(goals)})


if __name__ == "__main__":
    demo()
