"""The diagonal of a loss's Hessian over the weights of linear layers: exact, and by Hutchinson.

L  a number       the mean loss over all samples of all batches
W  (d_out, d_in)  the weight of one layer
g  (d_out, d_in)  ∂L / ∂W
H  (N, N)         ∂²L / ∂W², with N = d_out · d_in
v  as W           random signs, independent of each other

hessian_diagonal  H_kk = ∂g_k / ∂W_k, by one backward pass for each entry k
hutchinson        the mean of v ⊙ H v. Its expectation is diag(H), since E[v_k v_l] = 0 for
                  k ≠ l (Hutchinson 1990; Bekas, Kokiopoulou and Saad 2007)
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel


def hessian_diagonal(
    model: nn.Module, loss_fn: Callable[..., Tensor], batches: Iterable[Any], targets: list[str]
) -> dict[str, Tensor]:
    """diag(H) of each layer: {name: (d_out, d_in)}."""
    L, weights = mean_loss(model, loss_fn, batches, targets)
    diagonals = {}
    for name, W in weights.items():
        (g,) = gradients(L, [W], twice=True)
        h = [gradients(g_k, [W])[0].flatten()[k] for k, g_k in enumerate(g.flatten())]
        diagonals[name] = torch.stack(h).view_as(W)
    return diagonals


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
    g, diagonals = gradients(L, Ws, twice=True), [torch.zeros_like(W) for W in Ws]
    for _ in range(samples):
        rng: dict[str, Any] = {"generator": generator, "device": generator.device}
        v = [torch.randint(0, 2, W.shape, **rng).to(W) * 2 - 1 for W in Ws]
        g_v = torch.stack([(a * b).sum() for a, b in zip(g, v, strict=True)]).sum()
        Hv = gradients(g_v, Ws)  # one product for all layers together
        for h, a, b in zip(diagonals, v, Hv, strict=True):
            h += a * b / samples
    return dict(zip(targets, diagonals, strict=True))


@torch.enable_grad()
def mean_loss(
    model: nn.Module, loss_fn: Callable[..., Tensor], batches: Iterable[Any], targets: list[str]
) -> tuple[Tensor, dict[str, nn.Parameter]]:
    """L of a copy of the model in eval mode, with its graph, and that copy's {name: W}."""
    model = copy.deepcopy(model).eval().requires_grad_()
    weights = {name: model.get_submodule(name).get_parameter("weight") for name in targets}
    total, n = torch.zeros(()), 0
    for batch in batches:
        first = next(iter(batch.values())) if isinstance(batch, Mapping) else batch
        samples = len(first[0] if isinstance(first, (tuple, list)) else first)
        with sdpa_kernel(SDPBackend.MATH):  # the only kernel of attention to differentiate twice
            total = total + samples * loss_fn(model, batch)
        n += samples
    return total / n, weights


def gradients(value: Tensor, inputs: Sequence[Tensor], twice: bool = False) -> Sequence[Tensor]:
    """∂value / ∂inputs; with `twice`, they can be differentiated again."""
    if not value.requires_grad:  # as the gradient of a linear loss, which is constant
        return [torch.zeros_like(x) for x in inputs]
    return torch.autograd.grad(
        value, inputs, retain_graph=True, create_graph=twice, materialize_grads=True
    )


def demo() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    task = (model, lambda model, x: model(x).logsumexp(1).mean(), [torch.randn(32, 4)], ["0", "2"])
    exact = hessian_diagonal(*task)
    print("exact traces:", {name: round(float(h.sum()), 3) for name, h in exact.items()})
    for samples in (10, 100, 1000):
        h = hutchinson(*task, generator=torch.Generator().manual_seed(0), samples=samples)
        error = max(float((h[name] - exact[name]).abs().max()) for name in exact)
        print(f"Hutchinson, {samples:4} samples: largest error of an entry {error:.3f}")


if __name__ == "__main__":
    demo()
