"""The empirical Fisher diagonal: squared gradients of single samples.

    L_i  a number       the loss of sample i alone, with the label that the batch gives
    W    (d_out, d_in)  the weight of one layer
    h    (d_out, d_in)  the mean over all samples i of (∂L_i / ∂W)²

It is cheap, and often taken for the Hessian. It is near the Gauss-Newton diagonal where the
predicted probabilities are how often each label occurs, and vanishes where the model fits the
labels perfectly (Kunstner, Balles and Hennig 2019).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


@torch.inference_mode(False)  # which also turns gradients on
def empirical_fisher(
    model: nn.Module, loss_fn: Callable[..., Tensor], batches: Iterable[Any], targets: list[str]
) -> dict[str, Tensor]:
    """{name: (d_out, d_in)}, by one backward pass for each sample."""
    model = copy.deepcopy(model).eval()
    weights = [model.get_submodule(n).get_parameter("weight").requires_grad_() for n in targets]
    sums, n = [torch.zeros_like(W) for W in weights], 0
    for batch in batches:
        for sample in samples_of(batch):
            L_i = loss_fn(model, sample)
            gradients = torch.autograd.grad(L_i, weights, materialize_grads=True)
            for h, gradient in zip(sums, gradients, strict=True):
                h += gradient.square()
            n += 1
    return {name: h / n for name, h in zip(targets, sums, strict=True)}


def samples_of(batch: Any) -> list[Any]:
    """A batch of n samples, a tensor, tuple or mapping of tensors (n, …), as n batches of one."""
    if isinstance(batch, Tensor):
        return [batch[i : i + 1] for i in range(len(batch))]
    if isinstance(batch, Mapping):
        return [dict(zip(batch, s, strict=True)) for s in samples_of(tuple(batch.values()))]
    return list(zip(*map(samples_of, batch), strict=True))


def demo() -> None:
    """Labels drawn from the model itself make the Fisher's mean the Hessian; others do not."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3))
    x = torch.randn(4000, 4)
    drawn = model(x).softmax(1).multinomial(1)[:, 0]
    for labels, how in ((drawn, "drawn from the model"), (model(x).argmax(1), "its best guesses")):
        batch = {"x": x, "labels": labels}
        h = empirical_fisher(
            model, lambda m, b: nn.functional.cross_entropy(m(b["x"]), b["labels"]), [batch], ["0"]
        )
        p = model(x).softmax(1)
        hessian = ((p * (1 - p)).T @ x.square() / len(x)).sum()  # of the cross-entropy, exactly
        print(f"labels {how}: trace {h['0'].sum():.3f}, of the Hessian {hessian:.3f}")


if __name__ == "__main__":
    demo()
