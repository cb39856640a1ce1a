"""Hutchinson's estimate of the Hessian diagonal, by random signs (Hutchinson 1990; Bekas,
Kokiopoulou and Saad 2007).

    L  a number       the mean loss over all samples of all batches
    W  (d_out, d_in)  the weight of one layer
    g  (d_out, d_in)  ∂L / ∂W
    H  (N, N)         ∂²L / ∂W², over the weights of all targets together
    v  as W           random signs, independent of each other

The mean of v ⊙ H v is diag(H), since E[v_k v_l] = 0 for k ≠ l. The product H v is the gradient of
the number g · v, so that one backward pass serves all layers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel


@torch.inference_mode(False)  # which also turns gradients on
def hutchinson(
    model: nn.Module,
    loss_fn: Callable[..., Tensor],
    batches: Iterable[Any],
    targets: list[str],
    *,
    generator: torch.Generator,
    samples: int,
) -> dict[str, Tensor]:
    """An unbiased estimate of diag(H), whose variance falls as 1 / samples."""
    L, weights = mean_loss(model, loss_fn, batches, targets)
    Ws = list(weights.values())
    g = gradients(L, Ws, twice=True)
    diagonals = [torch.zeros_like(W) for W in Ws]
    rng: Any = {"generator": generator, "device": generator.device}
    for _ in range(samples):
        v = [torch.randint(0, 2, W.shape, **rng).to(W) * 2 - 1 for W in Ws]
        g_v = torch.stack([(a * b).sum() for a, b in zip(g, v, strict=True)]).sum()
        Hv = gradients(g_v, Ws)  # one product for all layers together
        for h, a, b in zip(diagonals, v, Hv, strict=True):
            h += a * b / samples
    return dict(zip(targets, diagonals, strict=True))


def mean_loss(
    model: nn.Module, loss_fn: Callable[..., Tensor], batches: Iterable[Any], targets: list[str]
) -> tuple[Tensor, dict[str, nn.Parameter]]:
    """L of a copy of the model in eval mode, with its graph, and that copy's {name: W}."""
    model = copy.deepcopy(model).eval()
    weights = {name: model.get_submodule(name).get_parameter("weight") for name in targets}
    for W in weights.values():
        W.requires_grad_()
    total, n = torch.zeros(()), 0
    for batch in batches:
        n += length(batch)
        with sdpa_kernel(SDPBackend.MATH):  # the only kernel of attention to differentiate twice
            total = total + length(batch) * loss_fn(model, batch)
    return total / n, weights


def length(batch: Any) -> int:
    """How many samples: the first dimension of the batch's first tensor."""
    if isinstance(batch, Tensor):
        return len(batch)
    return length(next(iter(batch.values() if isinstance(batch, Mapping) else batch)))


def gradients(value: Tensor, inputs: Sequence[Tensor], twice: bool = False) -> Sequence[Tensor]:
    """∂value / ∂inputs; with `twice`, they can be differentiated again."""
    if not value.requires_grad:  # as the gradient of a linear loss, which is constant
        return [torch.zeros_like(x) for x in inputs]
    return torch.autograd.grad(
        value, inputs, retain_graph=True, create_graph=twice, materialize_grads=True
    )


def demo() -> None:
    """For a linear model with a squared error, diag(H) is known: twice the mean of x²."""
    torch.manual_seed(0)
    x = torch.randn(64, 4) * torch.tensor([3.0, 2.0, 1.0, 0.5])
    model = nn.Sequential(nn.Linear(4, 1))
    print("exact:", (2 * x.square().mean(0)).tolist())
    for samples in (10, 100, 1000):
        seed = torch.Generator().manual_seed(0)
        h = hutchinson(
            model, lambda m, x: m(x).square().mean(), [x], ["0"], generator=seed, samples=samples
        )
        print(f"{samples:4} vectors:", h["0"][0].tolist())


if __name__ == "__main__":
    demo()
