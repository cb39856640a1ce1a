"""The diagonal of a loss's Hessian over the weights of linear layers, exactly. For small models.

    L  a number       the mean loss over all samples of all batches
    W  (d_out, d_in)  the weight of one layer; if it is tied, all of its uses count
    g  (d_out, d_in)  ∂L / ∂W
    H  (N, N)         ∂²L / ∂W², with N = d_out · d_in

H_kk = ∂g_k / ∂W_k, by one backward pass for each entry k. hutchinson.py estimates it by fewer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel


@torch.inference_mode(False)  # which also turns gradients on
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
    """Far from a minimum the diagonal has negative entries, at a minimum it has none."""
    torch.manual_seed(0)
    x = torch.randn(64, 4)
    y = torch.sin(2 * x[:, :1])
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    adam = torch.optim.Adam(model.parameters(), lr=0.01)
    for step in range(801):
        loss = (model(x) - y).square().mean()
        if step % 400 == 0:
            h = hessian_diagonal(model, lambda m, x: (m(x) - y).square().mean(), [x], ["0", "2"])
            negative = sum(int((diagonal < 0).sum()) for diagonal in h.values())
            traces = {name: round(float(diagonal.sum()), 2) for name, diagonal in h.items()}
            print(f"step {step:3}: loss {loss:.4f}, {negative} negative entries, traces {traces}")
        adam.zero_grad()
        torch.autograd.backward(loss)
        adam.step()


if __name__ == "__main__":
    demo()
