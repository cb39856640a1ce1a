"""Parameters that others have replaced, and optimizers that still step on them.

Other ranks are other shapes, so that a layer whose ranks change gets new parameters. An optimizer
that was made before and was not told goes on with the old ones: the adapters would stay as they
are, without a word. So every replacement is noted here while somebody keeps the old parameter, and
an optimizer that holds one is stopped before its next step. The same holds for the parameters that
`unpack_attention` splits and `pack_attention` puts together.
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

Places = list[tuple[nn.Module, str]]  # modules, and the names of parameters there


class Replaced(NamedTuple):
    """A parameter that is still alive, though others have its place."""

    old: weakref.ref[nn.Parameter]
    places: list[tuple[weakref.ref[nn.Module], str]]  # where its successors are
    by: str | None  # what replaced it, and what to do; None: other ranks of a LoRA layer


# {id of a replaced parameter: it}. Weak: an entry goes when nobody keeps the old parameter, and
# says nothing once the layer is gone.
_replaced: dict[int, Replaced] = {}
_watching: list[Any] = []  # the handle of the hook on all optimizers, from the first note on


def note_replaced(places: Places, old: nn.Parameter, by: str | None = None) -> None:
    """Remember that these places hold what trains now instead of `old`.

    Args:
        by: what an error says of it: "unpack_attention() has …: …". None: the layer of the place
            has other ranks.
    """
    key = id(old)

    def forget(reference: object) -> None:
        if key in _replaced and _replaced[key].old is reference:
            del _replaced[key]

    weak_places = [(weakref.ref(module), name) for module, name in places]
    _replaced[key] = Replaced(weakref.ref(old, forget), weak_places, by)
    if not _watching:
        _watching.append(register_optimizer_step_pre_hook(_require_present_parameters))


def forget_replaced(parameter: nn.Parameter) -> None:
    """The parameter is in its place again."""
    _replaced.pop(id(parameter), None)


def successors(old: nn.Parameter) -> list[nn.Parameter]:
    """What there is in place of `old` now, if a replacement was noted.

    >>> successors(nn.Parameter())
    []
    """
    if id(old) not in _replaced:
        return []
    modules = [(reference(), name) for reference, name in _replaced[id(old)].places]
    found = [m._parameters.get(name) for m, name in modules if m is not None]
    return [parameter for parameter in found if parameter is not None]


def _require_present_parameters(optimizer: Optimizer, args: object, kwargs: object) -> None:
    """Raise RuntimeError if the optimizer holds a parameter whose successor should train."""
    if not _replaced:
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) in _replaced:
                _require_no_successor(parameter)


def _require_no_successor(parameter: nn.Parameter) -> None:
    new = [p for p in successors(parameter) if p.requires_grad and p.numel() > 0]
    if not new or any(p is parameter for p in new):
        return
    entry = _replaced[id(parameter)]
    if entry.by is not None:
        raise RuntimeError(f"the optimizer holds a parameter that would not train: {entry.by}")
    raise RuntimeError(
        f"the optimizer holds a {entry.places[0][1]} of shape {tuple(parameter.shape)} that its "
        f"LoRA layer has replaced by one of shape {tuple(new[0].shape)}, which would not train: "
        "load_state_dict() brought other ranks or other parameters (assign=True), or resize() was "
        "not given this optimizer. Make the optimizer after that (with L1RA and the scheduler), or "
        "call resize(model, ranks, optimizer) before load_state_dict()"
    )
