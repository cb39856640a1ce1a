"""What a wrapped model's `save_pretrained` writes, and who can read it.

`save_pretrained` of transformers and diffusers asks the model for its state_dict. A wrapped layer's
weight is there under `<module>.base.weight`. Trainer can go on from that, but `from_pretrained`
looks for `<module>.weight`, starts that weight from random numbers, and only prints a report. No
hook of torch tells who asks for a state_dict, so the calling functions are looked at.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Collection
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn


def calling_save_pretrained() -> tuple[nn.Module, int] | None:
    """The model whose `save_pretrained` is running, and the stacklevel of its caller seen from the
    function that calls this one. None if no `save_pretrained` is running."""
    found = _caller_named_save_pretrained(sys._getframe(1))
    return None if found is None else (found[0], found[2] + 1)


def _caller_named_save_pretrained(frame: FrameType) -> tuple[nn.Module, FrameType, int] | None:
    """(the model, the frame of its `save_pretrained`, how many frames above `frame` it is)"""
    level = 1
    while frame.f_back is not None:
        frame, level = frame.f_back, level + 1
        if frame.f_code.co_name == "save_pretrained":
            model = frame.f_locals.get("self")
            if isinstance(model, nn.Module):
                return model, frame, level
    return None


def require_names_kept(names: Collection[str]) -> None:
    """Raise RuntimeError if a `save_pretrained` is running that would take these tensors apart.

    transformers writes stacks of experts in the format of their first release, as one tensor for
    each expert, and takes everything for a stack that has such a name.
    """
    found = _caller_named_save_pretrained(sys._getframe(1))
    if found is None:
        return
    model, frame, _ = found
    convert = frame.f_globals.get("revert_weight_conversion")
    if convert is None or not frame.f_locals.get("save_original_format"):
        return
    try:
        kept = convert(model, dict.fromkeys(names, torch.empty(1, 1, 1, device="meta")))
    except Exception:  # it cannot take such tensors apart
        kept = {}
    if set(kept) != set(names):
        raise RuntimeError(
            f"save_pretrained would take the adapter of {next(iter(names))!r} apart, since it "
            "writes stacks of experts in another format. To keep the adapters, "
            "save_adapter(model, path); to save a plain model, merge(model) and unwrap(model) "
            "first. save_pretrained(…, save_original_format=False) writes all as it is. In "
            'Trainer, set save_strategy="no" and save the adapters yourself'
        )


def warn_that_from_pretrained_cannot_read_it(stacklevel: int) -> None:
    """Warn whoever called `save_pretrained`."""
    warnings.warn(
        "save_pretrained writes the weights of adapted layers as '….base.weight'. Trainer can go "
        "on from that, but from_pretrained cannot read it: it would start these layers from random "
        "weights. To keep the adapters, save_adapter(model, path); to save a plain model with ΔW "
        "in its weights, merge(model) and unwrap(model) first",
        stacklevel=stacklevel + 1,
    )


def untied(state: dict[str, Any], key: str, weight: nn.Parameter, model: nn.Module) -> None:
    """Put a copy of the value under `key` if another module of `model` holds `weight` too.

    Of tied tensors `save_pretrained` writes one, but only if the names are those that the model's
    class knows: "lm_head.weight", not "lm_head.base.weight". It refuses others.
    """
    holders = [p is weight for module in model.modules() for p in module._parameters.values()]
    if holders.count(True) > 1 and isinstance(state.get(key), Tensor):
        state[key] = state[key].clone()
