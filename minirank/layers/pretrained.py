"""What a wrapped model's `save_pretrained` writes, and who can read it.

`save_pretrained` of transformers and diffusers asks the model for its state_dict. A wrapped layer's
weight is there under `<module>.base.weight`. Trainer can go on from that, but `from_pretrained`
looks for `<module>.weight`, starts that weight from random numbers, and only prints a report. No
hook of torch tells who asks for a state_dict, so the calling functions are looked at.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

from torch import Tensor, nn


def calling_save_pretrained() -> tuple[nn.Module, int] | None:
    """The model whose `save_pretrained` is running, and the stacklevel of its caller seen from the
    function that calls this one. None if no `save_pretrained` is running."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None:
        frame, level = frame.f_back, level + 1
        if frame.f_code.co_name == "save_pretrained":
            model = frame.f_locals.get("self")
            if isinstance(model, nn.Module):
                return model, level + 1
    return None


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
