"""The Gauss-Newton diagonal: a stand-in for the Hessian's that is never negative.

    L    a number       the mean loss over the samples of one batch
    W    (d_out, d_in)  the weight of one layer, N = d_out · d_in entries
    y    (n, …)         the model's output for the batch, M entries
    J    (M, N)         ∂y / ∂W
    H_y  (M, M)         ∂²L / ∂y²

By the chain rule the Hessian over W is Jᵀ H_y J + Σ over m of ∂L/∂y_m · ∂²y_m/∂W². Gauss-Newton
leaves the second term out (Schraudolph 2002). If L is convex in y, the diagonal of the first term
is never negative.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


@torch.inference_mode(False)  # which also turns gradients on
def gauss_newton_diagonal(
    model: nn.Module, loss_fn: Callable[..., Tensor], batches: Iterable[Any], targets: list[str]
) -> dict[str, Tensor]:
    """diag(Jᵀ H_y J), a mean over all samples of all batches: {name: (d_out, d_in)}.

    `loss_fn` calls the model once and uses nothing of it but its output, the tensor y.
    """
    model = copy.deepcopy(model).eval()
    weights = {n: model.get_submodule(n).get_parameter("weight").requires_grad_() for n in targets}
    outputs: list[Tensor] = []
    model.register_forward_hook(lambda module, inputs, y: outputs.append(y))
    sums, n = dict.fromkeys(targets, torch.zeros(())), 0
    for batch in batches:
        loss_fn(model, batch)
        y = outputs.pop()
        y_alone = y.detach().requires_grad_()
        L = loss_fn(Constant(y_alone), batch)
        (slope,) = torch.autograd.grad(L, y_alone, create_graph=True)
        H_y = jacobian(slope, y_alone)
        for name, W in weights.items():
            J = jacobian(y, W)
            h = torch.einsum("ak,ab,bk->k", J, H_y, J).view_as(W)
            sums[name] = sums[name].to(h) + length(batch) * h
        n += length(batch)
    return {name: h / n for name, h in sums.items()}


class Constant(nn.Module):
    """A model that gives y, whatever its input: with it the loss is a function of y alone."""

    def __init__(self, y: Tensor) -> None:
        super().__init__()
        self.y = y

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.y


def jacobian(values: Tensor, x: Tensor) -> Tensor:
    """∂values / ∂x, by one backward pass for each value: (values.numel(), x.numel())."""
    if not values.requires_grad:  # as the gradient of a linear loss, which is constant
        return x.new_zeros(values.numel(), x.numel())
    rows: list[Tensor] = []
    for value in values.flatten():
        rows += torch.autograd.grad(value, x, retain_graph=True, materialize_grads=True)
    return torch.stack(rows).flatten(1)


def length(batch: Any) -> int:
    """How many samples: the first dimension of the batch's first tensor."""
    if isinstance(batch, Tensor):
        return len(batch)
    return length(next(iter(batch.values() if isinstance(batch, Mapping) else batch)))


def demo() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 4)
    y = torch.sin(2 * x[:, :1])
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for step in range(301):
        loss = (model(x) - y).square().mean()
        if step % 100 == 0:
            h = gauss_newton_diagonal(
                model, lambda m, x: (m(x) - y).square().mean(), [x], ["0", "2"]
            )
            traces = {name: round(float(diagonal.sum()), 3) for name, diagonal in h.items()}
            print(f"step {step:3}: loss {loss:.4f}, traces {traces}")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


if __name__ == "__main__":
    demo()
