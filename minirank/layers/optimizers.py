"""What counts as an optimizer: one or several, learning rates of any kind, and schedule-free ones.

A schedule-free optimizer (arXiv 2405.15682) keeps two iterates of every parameter: z, which takes
the steps, and x, the average of all z. The model holds y = (1 − β) z + β x while it trains, and x
after `optimizer.eval()`. The state holds z; x is computed. So whoever changes a parameter from
outside has to change both z and x: the next step would undo anything less.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

Optimizers: TypeAlias = Optimizer | Sequence[Optimizer]

SCHEDULE_FREE = ("AdamWScheduleFree", "RAdamScheduleFree", "SGDScheduleFree")


class Slot(NamedTuple):
    """The place of a parameter in an optimizer."""

    optimizer: Optimizer
    group: dict[str, Any]  # its parameter group
    place: int  # its index in group["params"]


def as_optimizers(optimizer: Optimizers | None) -> list[Optimizer]:
    """One optimizer, a sequence of them or None, as a list.

    A wrapper that has the optimizer as its `optimizer` (accelerate, Lightning) is replaced by it,
    since steps are counted and parameters lie there.

    Raises:
        TypeError: something else, or a kind of schedule-free optimizer whose iterates are unknown.

    >>> parameter = nn.Parameter(torch.ones(2))
    >>> [type(o).__name__ for o in as_optimizers(torch.optim.SGD([parameter], lr=0.1))]
    ['SGD']
    """
    if optimizer is None:
        return []
    several = isinstance(optimizer, list | tuple)
    given: list[Any] = list(optimizer) if isinstance(optimizer, list | tuple) else [optimizer]
    optimizers = [_innermost(one) for one in given]
    for one in optimizers:
        kind = type(one).__name__
        if not isinstance(one, Optimizer) and "ScheduleFree" not in kind:
            raise TypeError(
                "expected a torch.optim.Optimizer, a wrapper that has it as its `optimizer`, or a "
                f"list of them, got {'a list that holds ' if several else ''}{kind}: give the "
                "optimizer inside it, if it wraps one"
            )
        if "ScheduleFree" in kind and not is_schedule_free(one):
            raise TypeError(
                f"{kind} keeps averaged parameters in a way that is unknown here, so that changes "
                f"of gates and ranks would be undone: use one of {', '.join(SCHEDULE_FREE)}"
            )
    return optimizers


def _innermost(optimizer: Any) -> Any:
    inner = getattr(optimizer, "optimizer", None)
    return _innermost(inner) if isinstance(inner, Optimizer) else optimizer


def is_schedule_free(optimizer: Optimizer) -> bool:
    """Whether this is a schedule-free optimizer of the kind described at the top of this file.

    >>> is_schedule_free(torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1))
    False
    """
    return any(kind.__name__ in SCHEDULE_FREE for kind in type(optimizer).__mro__)


def parameter_slots(optimizers: Sequence[Optimizer]) -> dict[int, Slot]:
    """{id of a parameter: its place}.

    Raises:
        ValueError: two optimizers hold one parameter.

    >>> parameter = nn.Parameter(torch.ones(2))
    >>> slot = parameter_slots([torch.optim.SGD([parameter], lr=0.1)])[id(parameter)]
    >>> slot.group["lr"], slot.place
    (0.1, 0)
    """
    slots: dict[int, Slot] = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for place, parameter in enumerate(group["params"]):
                first = slots.setdefault(id(parameter), Slot(optimizer, group, place))
                if first.optimizer is not optimizer:
                    raise ValueError(
                        f"two optimizers, {type(first.optimizer).__name__} and "
                        f"{type(optimizer).__name__}, hold one parameter, of shape "
                        f"{tuple(parameter.shape)}: give each parameter to one of them"
                    )
    return slots


def set_learning_rate(group: dict[str, Any], lr: float) -> None:
    """Set a group's learning rate, in place if it is a tensor: such optimizers insist on theirs.

    >>> group = {"lr": torch.tensor(0.5)}
    >>> set_learning_rate(group, 0.25)
    >>> group["lr"]
    tensor(0.2500)
    """
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(lr)
    else:
        group["lr"] = lr


def new_learning_rate(like: float | Tensor, lr: float) -> float | Tensor:
    """`lr` as a number or as a new tensor, as `like` is.

    >>> new_learning_rate(0.5, 0.25), new_learning_rate(torch.tensor(0.5), 0.25)
    (0.25, tensor(0.2500))
    """
    return torch.full_like(like, lr) if isinstance(like, Tensor) else lr


class Iterates(NamedTuple):
    """The two iterates of a parameter in a schedule-free optimizer."""

    z: Tensor
    x: Tensor
    weight: float  # the parameter is z + weight · (x − z) now


def iterates(slot: Slot, parameter: nn.Parameter) -> Iterates | None:
    """A parameter's z and x, or None if its optimizer keeps the parameter alone."""
    z = slot.optimizer.state.get(parameter, {}).get("z")
    if z is None or not is_schedule_free(slot.optimizer):
        return None
    group = slot.group
    beta = group["betas"][0] if "betas" in group else group["momentum"]
    if not group["train_mode"]:
        return Iterates(z, parameter.detach().clone(), 1.0)
    return Iterates(z, torch.lerp(z, parameter.detach(), 1 / beta), beta)


def start_iterates(
    slot: Slot, state: Mapping[str, Any], parameter: nn.Parameter, axis: int, kept: int
) -> None:
    """Let z start where the parameter does, in place, for the ranks after the `kept` first ones.

    `state` is the new parameter's. Of an optimizer that is not schedule-free, nothing changes.
    """
    if "z" not in state or not is_schedule_free(slot.optimizer):
        return
    added = parameter.shape[axis] - kept
    state["z"].narrow(axis, kept, added).copy_(parameter.detach().narrow(axis, kept, added))
