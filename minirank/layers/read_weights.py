"""Adapters of layers that nobody calls, because another module reads their weight instead.

A LoRA layer's `weight` is W + ΔW, so that the adapter has its effect there too: in Mamba's dt_proj,
in the qkv of torchvision's Swin, in the out_proj of nn.MultiheadAttention. Two things are lost on
the way, and torch says nothing. Adapter dropout needs the layer's inputs. And a parent that takes
`weight.data` or detaches the weight gets W + ΔW, but gives the adapter no gradient.

So a reading in training is noted here. The next steps of an optimizer that holds the adapter show
what became of it, and one warning names the layers. A step without any gradient at all shows
nothing, nor does one before which the weight was not read. (Compiled code notes no readings.)
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..checks import quoted_names, warn_caller

STEPS_WITHOUT_GRADIENT = 3  # before the warning

_names: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()  # of layers that `wrap` made
# {layer whose weight was read: steps after a reading that found no gradient}
_read: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
_read_again: WeakSet[nn.Module] = WeakSet()  # those of them that were read since the last such step
_settled: WeakSet[nn.Module] = WeakSet()  # nothing is wrong there, or it was said
_watching: list[Any] = []  # the handle of the hook on all optimizers, from the first note on


def note_name(layer: nn.Module, name: str) -> None:
    """Remember how to call this LoRA layer in a warning."""
    _names[layer] = name


def note_read(layer: nn.Module) -> None:
    """Remember that the weight of this LoRA layer was read, in training."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or layer in _settled:
        return
    _read.setdefault(layer, 0)
    _read_again.add(layer)
    if not _watching:
        # After the step, which may take the gradients by itself, from a closure.
        _watching.append(register_optimizer_step_post_hook(_judge_readings))


def _judge_readings(optimizer: Optimizer, args: object, kwargs: object) -> None:
    """Warn of the layers that this optimizer trains, and whose weight was read in vain."""
    if not _read:
        return
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if all(parameter.grad is None for parameter in parameters):
        return
    held = {id(parameter) for parameter in parameters}
    undropped, detached = [], []
    for layer, steps in list(_read.items()):
        up: nn.Parameter | None = layer._parameters.get("lora_B")
        if up is None or not up.requires_grad or id(up) not in held:
            continue
        if up.grad is not None:
            _settle(layer)
            if getattr(layer, "dropout", 0) and not getattr(layer, "has_dropped", False):
                undropped.append(layer)
        elif layer not in _read_again:
            continue
        elif steps + 1 < STEPS_WITHOUT_GRADIENT:
            _read[layer] = steps + 1
            _read_again.discard(layer)
        else:
            _settle(layer)
            detached.append(layer)
    if undropped:
        warn_caller(
            f"{_listed(undropped)}: adapter dropout has no effect, since another module reads the "
            "weight and never calls the layer. The adapter itself works. To train without this "
            "warning, wrap such layers in a call of their own, with dropout=0"
        )
    if detached:
        warn_caller(
            f"{_listed(detached)}: another module reads the weight, and the adapter has got no "
            f"gradient in {STEPS_WITHOUT_GRADIENT} steps: it detaches the weight, or does not use "
            "it, so that this adapter does not train. Let it read the weight with its gradient, or "
            "leave the layer out"
        )


def _settle(layer: nn.Module) -> None:
    del _read[layer]
    _read_again.discard(layer)
    _settled.add(layer)


def _listed(layers: list[nn.Module]) -> str:
    return quoted_names([_names.get(layer, str(layer).partition("\n")[0]) for layer in layers])
