"""Pruning and adding ranks of a LoRA layer in the middle of a training with Adam.

keep        bool (r,)                   which ranks stay
A, B, gate  (r, d_in), (d_out, r), (r,)   the adapter, as in lora.py
exp_avg     A, B, gate                  Adam's running mean of the gradients, entry by entry
exp_avg_sq  A, B, gate                  Adam's running mean of their squares
step        a number                    how many steps Adam has taken
scaling     a number                    stays: alpha / r, computed anew, would rescale the layer
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def resize(layer: dict[str, Any], keep: Tensor, add: int) -> dict[str, Any]:
    """Prune the ranks where `keep` is False, then append `add` new ones.

    `layer` holds A, B, gate, scaling, step, and the moments exp_avg and exp_avg_sq, each a dict of
    A, B and gate. A rank that stays keeps its moments. A new rank starts with moments of zero, and
    with a zero column of B, so that it leaves the function unchanged. The new tensors take no
    gradient, and share no memory with the old.
    """
    d_out, d_in = layer["B"].shape[0], layer["A"].shape[1]
    new = {
        "A": layer["A"].new_empty(add, d_in).uniform_(-1, 1) / d_in**0.5,  # as LoRA starts
        "B": layer["B"].new_zeros(d_out, add),
        "gate": layer["gate"].new_ones(add),
    }
    zeros = {key: torch.zeros_like(value) for key, value in new.items()}

    def changed(old: dict[str, Tensor], new: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            "A": torch.cat([old["A"][keep], new["A"].to(old["A"])]),
            "B": torch.cat([old["B"][:, keep], new["B"].to(old["B"])], dim=1),
            "gate": torch.cat([old["gate"][keep], new["gate"].to(old["gate"])]),
        }

    moments = {key: changed(layer[key], zeros) for key in ("exp_avg", "exp_avg_sq")}
    return {**layer, **changed(layer, new), **moments, "step": layer["step"] + 0}


def adam_step(layer: dict[str, Any], gradients: dict[str, Tensor], lr: float = 0.02) -> None:
    """One step of Adam (arXiv 1412.6980, Algorithm 1), in place."""
    beta1, beta2, epsilon = 0.9, 0.999, 1e-8
    layer["step"] += 1
    for key, gradient in gradients.items():
        mean, square = layer["exp_avg"][key], layer["exp_avg_sq"][key]
        mean.lerp_(gradient, 1 - beta1)
        square.lerp_(gradient.square(), 1 - beta2)
        unbiased_mean = mean / (1 - beta1 ** layer["step"])
        unbiased_square = square / (1 - beta2 ** layer["step"])
        layer[key].data -= lr * unbiased_mean / (unbiased_square.sqrt() + epsilon)


def demo() -> None:
    """Four ranks learn a map of rank 2. Two are pruned, then two are added, and Adam goes on."""
    torch.manual_seed(0)
    goal = torch.randn(6, 2) @ torch.randn(2, 8)  # (d_out, d_in)
    layer: dict[str, Any] = {"A": torch.randn(4, 8), "B": torch.zeros(6, 4), "gate": torch.ones(4)}
    for moment in ("exp_avg", "exp_avg_sq"):
        layer[moment] = {key: torch.zeros_like(layer[key]) for key in ("A", "B", "gate")}
    layer |= {"scaling": 1.0, "step": 0}

    def loss() -> Tensor:
        delta_weight: Tensor = layer["scaling"] * (layer["B"] * layer["gate"]) @ layer["A"]
        return (delta_weight - goal).square().mean()

    for prune, add in ((0, 0), (2, 0), (0, 2)):
        size = layer["B"].norm(dim=0) * layer["gate"].abs() * layer["A"].norm(dim=1)  # (r,)
        before = loss()
        keep = torch.ones(len(size), dtype=torch.bool)
        keep[size.argsort()[:prune]] = False  # the smallest contributions to ΔW
        layer = resize(layer, keep, add)
        print(f"{prune} ranks pruned, {add} added: loss {before:.1e} → {loss():.1e}", end="")
        for _ in range(200):
            parameters = [layer[key].requires_grad_() for key in ("A", "B", "gate")]
            gradients = torch.autograd.grad(loss(), parameters)
            adam_step(layer, dict(zip(("A", "B", "gate"), gradients, strict=True)))
        print(f", after 200 steps {loss():.1e} (Adam's step {layer['step']})")


if __name__ == "__main__":
    demo()
