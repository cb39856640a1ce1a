"""ShapLoRA: gates set to zero by coalitions that `minirank/shapley.py` draws (`coalition_masks`).

Here are the parts of one coalition's score: the adapters of a model, the gates set to zero outside
the coalition, and the gradients over a whole data set. In this file, λ is the paper's gate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..checks import require
from ..layers.lora import LoRALinear
from ..layers.resize import separate_layers
from ..measure import NO_BATCH, LossFn, finite_loss

WeightedBatch = tuple[Any, float]


class Adapter(NamedTuple):
    """The adapter of one layer in ShapLoRA's letters, or its gradients or importances."""

    gate: Tensor  # λ, (r,)
    P: Tensor  # lora_B, (d_out, r), or (experts, d_out, r)
    Q: Tensor  # lora_A, (r, d_in), or (experts, r, d_in)


def scorable_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The LoRA layers of `model`, by name.

    Raises:
        ValueError: there is no layer with a rank, or one without a gate, frozen, merged, disabled
            or sharing a parameter with another.
    """
    layers = separate_layers(model)
    if not any(layer.rank for layer in layers.values()):
        raise ValueError(
            "the model has no LoRA layer with ranks to score: wrap(model, ranks, gate=0.0), "
            "then train it"
        )
    for name, layer in layers.items():
        if layer.gate is None:
            raise ValueError(
                f"{name!r} has no gates, by which coalitions are formed: "
                "wrap(model, ranks, gate=0.0)"
            )
        if not all(parameter.requires_grad for parameter in layer.parameters(recurse=False)):
            raise ValueError(
                f"the adapter of {name!r} is frozen: requires_grad_(True) its lora_A, lora_B and "
                "gate"
            )
        if layer.merged or not layer.enabled:
            state = "merged: unmerge(model)" if layer.merged else "disabled: set its .enabled"
            raise ValueError(
                f"{name!r} is {state} before scoring, so that its gates have an effect"
            )
    return layers


def adapters(layers: Mapping[str, LoRALinear]) -> dict[str, Adapter]:
    """The parameters of every layer's adapter."""
    return {
        name: Adapter(layer.gate, layer.lora_B, layer.lora_A)
        for name, layer in layers.items()
        if layer.gate is not None
    }


def by_module(values: Tensor, layers: Mapping[str, LoRALinear]) -> dict[str, Tensor]:
    """One value per rank of all layers together, (ranks,) → {name: (r,)}."""
    sizes = [layer.rank for layer in layers.values()]
    return dict(zip(layers, values.split_with_sizes(sizes), strict=True))


def wide(parameter: Tensor) -> Tensor:
    """The values without a graph, in float32 or better."""
    return parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32))


@contextmanager
def coalition(layers: Mapping[str, LoRALinear], mask: Tensor) -> Iterator[None]:
    """Eq 6: inside the block λ = 0 for every rank outside the coalition.

    Args:
        mask: bool (ranks of all layers,), true for the ranks in the coalition.

    Afterwards the gates have their values again, bit for bit.
    """
    gates = [layer.gate for layer in layers.values() if layer.gate is not None]
    before = [gate.detach().clone() for gate in gates]
    try:
        with torch.no_grad():
            for gate, inside in zip(gates, by_module(mask, layers).values(), strict=True):
                gate.masked_fill_(~inside.to(gate.device), 0.0)
        yield
    finally:
        with torch.no_grad():
            for gate, value in zip(gates, before, strict=True):
                gate.copy_(value)


@contextmanager
def gradients_for_adapters_only(
    model: nn.Module, layers: Mapping[str, LoRALinear]
) -> Iterator[None]:
    """Inside the block no gradient is computed for any other parameter."""
    of_adapters = {id(w) for adapter in adapters(layers).values() for w in adapter}
    others = [(p, p.requires_grad) for p in model.parameters() if id(p) not in of_adapters]
    try:
        for parameter, _ in others:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, requires_grad in others:
            parameter.requires_grad_(requires_grad)


def weighted_batches(
    batches: Iterable[Any], batch_weight: Callable[[Any], float]
) -> list[WeightedBatch]:
    """Every batch with its weight. A list, so that all coalitions see the same data, even of a
    loader that shuffles."""
    data = [(batch, float(batch_weight(batch))) for batch in batches]
    for _, weight in data:
        expected = "a finite number of at least 0"
        require(0 <= weight < math.inf, "batch_weight(batch)", weight, expected)
    return data


def mean_gradient(
    model: nn.Module,
    loss_fn: LossFn,
    data: Iterable[WeightedBatch],
    parameters: Sequence[Tensor],
) -> list[Tensor]:
    """∂L/∂w for every w in `parameters`, L being the weighted mean loss over `data`.

    The model's mode and the `grad` of its parameters are left alone.

    Returns:
        Tensors of the parameters' shapes, in float32 or better. Zero for a parameter that no batch
        reaches.

    Raises:
        ValueError: `data` is empty or weighs nothing, a loss is not finite, or no loss depends on
            the parameters.
    """
    sums = [torch.zeros_like(wide(w)) for w in parameters]
    total, depends = 0.0, False
    for batch, weight in data:
        if weight == 0:
            continue  # a mean over nothing is NaN, and so is NaN · 0
        total += weight
        for i, gradient in enumerate(_gradient(model, loss_fn, batch, parameters)):
            if gradient is not None:
                sums[i].add_(gradient, alpha=weight)
                depends = True
    if total == 0:
        raise ValueError(NO_BATCH)
    if not depends:
        raise ValueError(
            "the loss depends on no adapter: loss_fn must return it with its graph (no "
            "torch.no_grad(), no detach(), no re-entrant checkpointing), and call the model that "
            "has the LoRA layers"
        )
    return [gradient_sum / total for gradient_sum in sums]


def _gradient(
    model: nn.Module, loss_fn: LossFn, batch: Any, parameters: Sequence[Tensor]
) -> Sequence[Tensor | None]:
    """∂L/∂w of one batch; None for a parameter that the loss does not depend on."""
    loss = finite_loss(model, loss_fn, batch)
    if not loss.requires_grad:
        return []  # the batch reaches no adapter
    return torch.autograd.grad(loss, list(parameters), allow_unused=True)
