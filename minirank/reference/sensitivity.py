"""Sensitivity-LoRA (arXiv 2509.09119): ranks before training, from the diagonal of a Hessian.

At a minimum of the loss a change δw costs ½ Σ h_i δw_i² (Eq 7). A matrix with a large Hessian
diagonal is therefore sensitive, and gets more ranks.

    x       (n, T, d_in), (n, d_in)  an input of a linear layer
    h       any shape, N entries     the Hessian diagonal of one weight matrix. The paper's proxy is
                                     the mean of x_j² over tokens, N = d_in, the same for all rows
    S_g     Eq 8    a number         the trace, Σ h_i
    S_topk  Eq 9    a number         the mean of the k largest h_i, k = N / 2
    S_er    Eq 10   a count          how many of the largest h_i add up to 85 % of Σ h_i
    S_l     Eq 12   a number         β1 S_topk + β2 S_er
    θ       Eq 14   a number         γ1 S_g + γ2 S_l, the matrix's share of the ranks
    β, γ    Eqs 11, 13               σ / μ² of their metric: deviation and mean over all matrices
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


@torch.inference_mode(False)
def input_second_moment(
    model: nn.Module, loss_fn: Callable[..., Tensor], batches: Iterable[Any], targets: list[str]
) -> dict[str, Tensor]:
    """The mean of x_j² over all tokens but padding (appendix E): {name: (d_in,)}, in float64."""
    sums: dict[str, Tensor] = {}
    counts = dict.fromkeys(targets, 0)
    real: Tensor | None = None  # bool (n, T): which tokens of the batch at hand are no padding

    def observe(name: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = (args[0] if args else next(iter(kwargs.values()))).detach()
        padded = real is not None and x.shape[:-1] == real.shape
        tokens = (x[real] if padded else x.reshape(-1, x.shape[-1])).double()  # (tokens, d_in)
        sums[name] = sums.get(name, 0) + tokens.square().sum(0)
        counts[name] += len(tokens)

    model = copy.deepcopy(model).eval()
    for name in targets:
        module = model.get_submodule(name)
        module.weight.requires_grad_()  # gradients keep nn.Transformer's layers off their fast path
        module.register_forward_pre_hook(partial(observe, name), with_kwargs=True)
    for batch in batches:
        masked = isinstance(batch, Mapping) and "attention_mask" in batch
        real = batch["attention_mask"] != 0 if masked else None
        loss_fn(model, batch)
    return {name: sums[name] / counts[name] for name in targets}


def sensitivity_theta(
    diagonals: Mapping[str, Tensor], topk_fraction: float = 0.5, effective_share: float = 0.85
) -> dict[str, float]:
    """θ of every matrix. Its ranks are θ / Σθ of the budget (Eq 15, in budget.py).

    The mean trace must be positive: otherwise σ/μ² means nothing, and θ can be inf.
    """
    traces, means, counts = [], [], []
    for h in diagonals.values():
        # An exact Hessian has negative entries too. They count as zero in Eqs 9 and 10.
        largest = h.double().flatten().clamp(min=0).sort(descending=True).values  # (N,)
        k = max(1, int(topk_fraction * len(largest)))
        sums = largest.cumsum(0)
        too_few = (sums < effective_share * sums[-1]).sum()
        traces.append(h.double().sum())  # Eq 8
        means.append(largest[:k].mean())  # Eq 9
        counts.append((too_few + (sums[-1] > 0)).double())  # Eq 10

    def weighted(metric: Tensor) -> Tensor:  # (matrices,) → (matrices,)
        """σ/μ² times the metric (Eqs 11, 13). A metric that is the same everywhere says nothing."""
        if metric.min() == metric.max():
            return torch.zeros_like(metric)
        return metric.std(correction=0) / metric.mean() * (metric / metric.mean())

    S_g, S_topk, S_er = torch.stack(traces), torch.stack(means), torch.stack(counts)
    S_l = weighted(S_topk) + weighted(S_er)  # Eq 12
    theta = (weighted(S_g) + weighted(S_l)).clamp(min=0)  # Eq 14
    shares = theta if theta.any() else torch.ones_like(theta)
    return dict(zip(diagonals, shares.tolist(), strict=True))


def demo() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
    inputs = torch.randn(256, 32) * torch.linspace(0, 3, 32)  # features of unequal size
    h = input_second_moment(model, lambda model, x: model(x).mean(), [inputs], ["0", "2"])
    theta = sensitivity_theta(h)
    print("layer    trace S_g    theta   of 24 ranks")
    for name, share in theta.items():
        print(f"{name:6}{h[name].sum():12.2f}{share:9.3f}{24 * share / sum(theta.values()):14.2f}")


if __name__ == "__main__":
    demo()
