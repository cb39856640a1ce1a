"""Parameters that LoRA layers have replaced, and optimizers that still step on them.

Other ranks are other shapes, so that a layer whose ranks change gets new parameters. An optimizer
that was made before and was not told goes on with the old ones: the adapters would stay as they
are, without a word. So every replacement is noted here while somebody keeps the old parameter, and
an optimizer that holds one is stopped before its next step.
"""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

# {id of a replaced parameter that is still alive: (it, the layer, its name there)}. Weak: an entry
# goes when nobody keeps the old parameter, and says nothing once the layer is gone.
_replaced: dict[int, tuple[weakref.ref[nn.Parameter], weakref.ref[nn.Module], str]] = {}
_watching: list[Any] = []  # the handle of the hook on all optimizers, from the first note on


def note_replaced(layer: nn.Module, name: str, old: nn.Parameter) -> None:
    """Remember that `layer` has another parameter `name` now, in place of `old`."""
    key = id(old)

    def forget(reference: object) -> None:
        if key in _replaced and _replaced[key][0] is reference:
            del _replaced[key]

    _replaced[key] = weakref.ref(old, forget), weakref.ref(layer), name
    if not _watching:
        _watching.append(register_optimizer_step_pre_hook(_require_present_parameters))


def successor(old: nn.Parameter) -> nn.Parameter | None:
    """What a layer has in place of `old` now, if a replacement was noted.

    >>> successor(nn.Parameter())
    """
    if id(old) not in _replaced:
        return None
    _, layer_reference, name = _replaced[id(old)]
    layer = layer_reference()
    return None if layer is None else layer._parameters.get(name)


def _require_present_parameters(optimizer: Optimizer, args: object, kwargs: object) -> None:
    """Raise RuntimeError if the optimizer holds a parameter whose successor should train."""
    if not _replaced:
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) in _replaced:
                _require_no_successor(parameter)


def _require_no_successor(parameter: nn.Parameter) -> None:
    name, new = _replaced[id(parameter)][2], successor(parameter)
    if new is None or new is parameter or not new.requires_grad or new.numel() == 0:
        return
    raise RuntimeError(
        f"the optimizer holds a {name} of shape {tuple(parameter.shape)} that its LoRA layer has "
        f"replaced by one of shape {tuple(new.shape)}, which would not train: load_state_dict() "
        "brought other ranks or other parameters (assign=True), or resize() was not given this "
        "optimizer. Make the optimizer after that (with L1RA and the scheduler), or call "
        "resize(model, ranks, optimizer) before load_state_dict()"
    )
