"""Cases: arguments that an implementation is called with, and what of its outcome is compared."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .comparison import Bits

Implementation = Callable[..., Any]


class Arguments(NamedTuple):
    """The arguments of one call."""

    positional: tuple[Any, ...]
    options: Mapping[str, Any] = {}  # by keyword


def call(implementation: Implementation, arguments: Arguments) -> Any:
    """The outcome of a plain call."""
    return implementation(*arguments.positional, **arguments.options)


@dataclass(frozen=True)
class CaseSpec:
    """One case of a contract, for every dtype.

    Args:
        name: short, unique in its contract: "rank 0".
        equation: the equation or rule that it is about.
        arguments: makes fresh arguments, with the same values at every call, tensors in float64.
        observe: (implementation, arguments) -> what is compared: nested mappings and sequences of
            tensors, numbers, `Bits` and `Rule`s. The reference's own outcome is the right one.
        terms: of how many terms an entry of the outcome is a sum: what rounding may add up to.
        floating: whether it is run for each dtype. False: once.
        needs_gradients: whether it differentiates the implementation.
        repeatable: whether equal arguments must give an equal outcome, and calls must not change
            what an earlier call returned. The kit then calls three times.
        judges_itself: the outcome consists of `Rule`s, and is not compared with the reference's.
    """

    name: str
    equation: str
    arguments: Callable[[], Arguments]
    observe: Callable[[Implementation, Arguments], Any] = call
    terms: float = 1.0
    floating: bool = True
    needs_gradients: bool = False
    repeatable: bool = True
    judges_itself: bool = False


@dataclass(frozen=True)
class Contract:
    """What an implementation is held to.

    Args:
        name: of the reference function.
        source: paper and equations.
        reference: the function that gives the right outcome.
        specs: the cases, smallest first.
        wrong_twins: {what is wrong about it: an implementation that has that fault}. A failed
            outcome that equals a twin's gets its sentence as a hint: "equals …".
    """

    name: str
    source: str
    reference: Implementation
    specs: tuple[CaseSpec, ...]
    wrong_twins: Mapping[str, Implementation] = field(default_factory=dict)


def fitting_twins(
    twins: Mapping[str, Implementation], fits: Callable[[Implementation], bool]
) -> tuple[str, ...]:
    """The sentences of the wrong twins that fit. One that cannot do the case does not."""
    found = []
    for sentence, twin in twins.items():
        try:
            fitting = fits(twin)
        except Exception:  # whatever a twin raises on arguments that it was not made for
            continue
        if fitting:
            found.append(sentence)
    return tuple(found)


def mapped(value: Any, function: Callable[[Any], Any]) -> Any:
    """`value` with function(tensor) or function(module) in place of each tensor and module."""
    if isinstance(value, (Tensor, nn.Module)):
        return function(value)
    if isinstance(value, Bits):
        return Bits(function(value.tensor))
    if isinstance(value, Arguments):
        return Arguments(mapped(value.positional, function), mapped(value.options, function))
    if isinstance(value, Mapping):
        return {key: mapped(item, function) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(mapped(item, function) for item in value))
    if isinstance(value, (list, tuple)):
        return type(value)(mapped(item, function) for item in value)
    return value


def cast(arguments: Arguments, dtype: torch.dtype, device: torch.device | str) -> Arguments:
    """The arguments with floating-point tensors and modules in `dtype`, all of it on `device`.

    Strides are kept, so that a view stays a view. Parameters keep their gradients.
    """

    def of_one(value: Tensor | nn.Module) -> Any:
        if isinstance(value, nn.Module):
            model = copy.deepcopy(value).to(device, dtype)
            for old, new in zip(value.parameters(), model.parameters(), strict=True):
                new.grad = None if old.grad is None else old.grad.to(device, dtype, copy=True)
            return model
        return _with_strides(value, dtype if value.is_floating_point() else value.dtype, device)

    result: Arguments = mapped(arguments, of_one)
    return result


def _with_strides(value: Tensor, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """value.to(device, dtype), where a view with gaps or repeated entries remains such a view."""
    if value.is_contiguous() or value.requires_grad:
        return value.to(device, dtype)
    length = value.untyped_storage().nbytes() // value.element_size()
    whole = value.as_strided((length,), (1,), 0).to(device, dtype)
    return whole.as_strided(value.shape, value.stride(), value.storage_offset())
