"""Adapters that get gradients and never move, because the optimizer was made before `wrap`.

Such an optimizer holds the weights that `wrap` has frozen, and nothing of the adapters. Its steps
change nothing, and torch says nothing. So every wrapped layer is noted here, and an optimizer that
holds the weight of one, but not its adapter, is looked at for a few steps: another optimizer may
hold the adapter. If it has not moved by then, a warning says so, once.
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ..checks import warn_caller

STEPS_WITHOUT_CHANGE = 3  # before the warning


class Observed(NamedTuple):
    """A layer whose weight the optimizer holds, but not its adapter."""

    layer: weakref.ref[nn.Module]
    value: Tensor  # of lora_B, when the optimizer was first seen
    steps: int  # since then, with gradients


# No weak references to parameters: torch could not swap them any more when it loads a state.
_wrapped: weakref.WeakSet[nn.Module] = weakref.WeakSet()
# {optimizer: what is observed; None: nothing is wrong, or it was said}
_observed: weakref.WeakKeyDictionary[Optimizer, Observed | None] = weakref.WeakKeyDictionary()
_watching: list[Any] = []  # the handle of the hook on all optimizers, from the first note on


def note_wrapped(layer: nn.Module) -> None:
    """Remember this LoRA layer, whose base is frozen now."""
    _wrapped.add(layer)
    if not _watching:
        _watching.append(register_optimizer_step_pre_hook(_observe))


def _observe(optimizer: Optimizer, args: object, kwargs: object) -> None:
    """Warn if an adapter whose weight this optimizer holds has not moved for a few steps."""
    if optimizer not in _observed:
        _begin(optimizer)
        return
    observed = _observed[optimizer]
    layer = None if observed is None else observed.layer()
    up = None if layer is None else _moving_part(layer)
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
    """Note what the optimizer holds of the first layer that trains with it."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for layer in list(_wrapped):
        up = _moving_part(layer)
        if up is None:
            continue
        if id(up) in held:
            _observed[optimizer] = None
            return
        weights = dict(layer.named_parameters()).values()
        if any(id(weight) in held for weight in weights):
            _observed[optimizer] = Observed(weakref.ref(layer), up.detach().clone(), 1)
            return


def _moving_part(layer: nn.Module) -> nn.Parameter | None:
    """The layer's lora_B, if it has got a gradient."""
    up = layer._parameters.get("lora_B")
    return None if up is None or up.grad is None or up.numel() == 0 else up
