"""Adapters that get gradients and never move, because the optimizer was made before `wrap`.

Such an optimizer holds the weights that `wrap` has frozen, and nothing of the adapters. Its steps
change nothing, and torch says nothing. So every wrapped layer is noted here, and an optimizer that
holds the weight of one, but not its adapter, is looked at for a few steps: another optimizer may
hold the adapter. If it has not moved by then, a warning says so, once. A layer is noted no more as
soon as an optimizer steps that holds its adapter, and when it is taken out.
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ..checks import warn_caller
from .replaced import successors

STEPS_WITHOUT_CHANGE = 3  # before the warning


class Observed(NamedTuple):
    """A layer whose weight the optimizer holds, but not its adapter."""

    layer: weakref.ref[nn.Module]
    value: Tensor  # of lora_B, when the optimizer was first seen
    steps: int  # since then, with gradients


# The layers that no optimizer is known to train. No weak references to parameters: torch could not
# swap them any more when it loads a state.
_wrapped: weakref.WeakSet[nn.Module] = weakref.WeakSet()
# {optimizer: what is observed; None: nothing is wrong, or it was said}
_observed: weakref.WeakKeyDictionary[Optimizer, Observed | None] = weakref.WeakKeyDictionary()
_watching: list[Any] = []  # the handle of the hook on all optimizers, from the first note on


def note_wrapped(layer: nn.Module) -> None:
    """Remember this LoRA layer, whose base is frozen now."""
    _wrapped.add(layer)
    if not _watching:
        _watching.append(register_optimizer_step_pre_hook(_observe))


def forget_wrapped(layer: nn.Module) -> None:
    """Nothing is wrong if this layer does not move any more: it is taken out of its model."""
    _wrapped.discard(layer)


def _observe(optimizer: Optimizer, args: object, kwargs: object) -> None:
    """Warn if an adapter whose weight this optimizer holds has not moved for a few steps."""
    if optimizer not in _observed:
        _begin(optimizer)
        return
    observed = _observed[optimizer]
    layer = None if observed is None else observed.layer()
    up = None if layer is None or layer not in _wrapped else _moving_part(layer)
    if observed is None or up is None or up.grad is None or not up.grad.any():
        return
    if not torch.equal(up.detach(), observed.value):
        _observed[optimizer] = None  # another optimizer trains it
    elif observed.steps < STEPS_WITHOUT_CHANGE:
        _observed[optimizer] = observed._replace(steps=observed.steps + 1)
    else:
        _observed[optimizer] = None
        warn_caller(
            f"the adapters get gradients, but have not moved in {STEPS_WITHOUT_CHANGE} steps: this "
            f"{type(optimizer).__name__} was made before wrap(), and holds the frozen weights "
            "instead. Make it after wrap(), from the parameters that require a gradient"
        )


def _begin(optimizer: Optimizer) -> None:
    """Note what the optimizer holds of the layers that train with it."""
    layers = list(_wrapped)
    if not layers:
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    held = {id(held_now) for p in parameters for held_now in [p, *successors(p)]}
    trained = [layer for layer in layers if id(layer._parameters.get("lora_B")) in held]
    for layer in trained:
        _wrapped.discard(layer)
    if trained:
        _observed[optimizer] = None
        return
    for layer in layers:
        up = _moving_part(layer)
        if up is not None and any(id(weight) in held for weight in layer.parameters()):
            _observed[optimizer] = Observed(weakref.ref(layer), up.detach().clone(), 1)
            return


def _moving_part(layer: nn.Module) -> nn.Parameter | None:
    """The layer's lora_B, if it is to train and has got a gradient."""
    up = layer._parameters.get("lora_B")
    if up is None or not up.requires_grad or up.grad is None or up.numel() == 0:
        return None
    return up
