"""Comparing what came with what was expected, entry by entry."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Rule(NamedTuple):
    """An outcome that is right or wrong, where there is no number to compare.

    The reference's own outcome has `holds` True. `expected` says what the rule is. A wrong twin
    breaks it in the same way if its `got` is the same.
    """

    holds: bool
    expected: str
    got: str
    note: str = ""  # what is odd about it if it holds, a hint if it does not


class Bits(NamedTuple):
    """A tensor that must come back bit for bit, in its dtype and shape."""

    tensor: Tensor


class Note(NamedTuple):
    """Something odd about an outcome that is not wrong. It is told, and never compared."""

    text: str


class Allowance(NamedTuple):
    """What rounding may do; see `differences`."""

    dtype: torch.dtype
    terms: float
    tolerance: float | None


class Difference(NamedTuple):
    """How far one leaf of the result is from what was expected."""

    entry: str
    expected: str
    got: str
    error: float
    allowed: float
    note: str = ""  # what is odd about it, although it may pass; of a Rule also why it fails

    @property
    def wrong(self) -> bool:
        return not self.error <= self.allowed  # NaN is wrong


INFINITE = float("inf")


def leaves(outcome: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(entry, leaf) of every leaf of nested mappings and sequences."""
    if isinstance(outcome, (Rule, Bits, Note)):
        yield path, outcome
    elif isinstance(outcome, Mapping):
        for key, value in outcome.items():
            yield from leaves(value, f"{path}[{key!r}]" if path else str(key))
    elif isinstance(outcome, (list, tuple)):
        for index, value in enumerate(outcome):
            yield from leaves(value, f"{path}[{index}]")
    else:
        yield path, outcome


def kept(outcome: Any) -> dict[str, Any]:
    """The leaves of an outcome, with every rule kept: what an outcome that judges itself needs."""
    return {
        entry: leaf._replace(holds=True) if isinstance(leaf, Rule) else leaf
        for entry, leaf in leaves(outcome)
    }


def differences(
    exact: Any,
    rounded: Any,
    got: Any,
    *,
    dtype: torch.dtype,
    terms: float,
    tolerance: float | None,
) -> Iterator[Difference]:
    """Every leaf of `got` against the right outcome.

    Args:
        exact: the reference's outcome in float64.
        rounded: the reference's own outcome in the dtype of the case.
        got: what came.
        dtype: of the case; plain Python numbers are as exact as that.
        terms: of how many terms an entry is a sum.
        tolerance: the largest error allowed, relative to the largest entry. None: `terms` rounding
            errors, or twice what the reference itself loses, whichever is larger.
    """
    for entry, leaf in leaves(got):
        if isinstance(leaf, Note):
            yield Difference(entry, "", "", 0.0, 0.0, leaf.text)
    wanted, own, came = (
        {entry: leaf for entry, leaf in leaves(outcome) if not isinstance(leaf, Note)}
        for outcome in (exact, rounded, got)
    )
    for entry in [*wanted, *(entry for entry in came if entry not in wanted)]:
        if entry not in came:
            yield Difference(entry or "result", _text(wanted[entry]), "nothing", INFINITE, 0.0)
        elif entry not in wanted:
            yield Difference(entry or "result", "nothing", _text(came[entry]), INFINITE, 0.0)
        else:
            where = entry or "result"
            allowance = Allowance(dtype, terms, tolerance)
            yield _difference(where, wanted[entry], own[entry], came[entry], allowance)


def _difference(entry: str, exact: Any, rounded: Any, got: Any, allowance: Allowance) -> Difference:
    if isinstance(exact, Rule):
        # A wrong twin's rule does not hold: an outcome equals it if it says the same.
        holds = isinstance(got, Rule) and (got.holds if exact.holds else got == exact)
        note = got.note if isinstance(got, Rule) else ""
        return Difference(entry, exact.expected, _text(got), 0.0 if holds else INFINITE, 0.0, note)
    if isinstance(exact, Bits):
        return _of_bits(entry, rounded.tensor, got.tensor if isinstance(got, Bits) else got)
    if isinstance(exact, (Tensor, float)):
        return _of_numbers(entry, exact, rounded, got, allowance)
    value = got.item() if hasattr(got, "item") and getattr(got, "ndim", 0) == 0 else got
    same = type(value) in (bool, int, float, str, type(None)) and value == exact
    note = "a floating-point number where a whole one is expected" if type(value) is float else ""
    odd = note if same and not isinstance(exact, str) else ""
    return Difference(entry, _text(exact), _text(got), 0.0 if same else INFINITE, 0.0, odd)


def _of_bits(entry: str, expected: Tensor, got: Any) -> Difference:
    if not isinstance(got, Tensor):
        return Difference(entry, _text(expected), _text(got), INFINITE, 0.0)
    if (expected.dtype, expected.shape) != (got.dtype, got.shape):
        return Difference(entry, _kind(expected), _kind(got), INFINITE, 0.0)
    a, b = dense(expected), dense(got)
    unequal = torch.zeros(len(a), dtype=torch.bool)
    if len(a):
        bytes_differ = a.view(torch.uint8) != b.view(torch.uint8)
        unequal = bytes_differ.reshape(len(a), -1).any(1)
    if not unequal.any():
        return Difference(entry, "the same bits", "the same bits", 0.0, 0.0)
    place = int(unequal.nonzero()[0])
    index = _index(place, expected.shape)
    return Difference(
        f"{entry}{index}", repr(a[place].item()), repr(b[place].item()), INFINITE, 0.0
    )


def dense(tensor: Tensor) -> Tensor:
    """The entries in a row, on the CPU. (contiguous() leaves a single number with its stride.)"""
    return torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.detach().reshape(-1))


def _of_numbers(entry: str, exact: Any, rounded: Any, got: Any, allowance: Allowance) -> Difference:
    right, own = _tensor(exact, torch.float64), _tensor(rounded, allowance.dtype)
    try:
        came = _tensor(got, torch.float64).detach().cpu()
    except (TypeError, ValueError, RuntimeError):
        return Difference(entry, _kind(right), _text(got), INFINITE, 0.0)
    right, own = right.detach().cpu(), own.detach().cpu()
    if right.shape != came.shape:
        a, b = f"shape {tuple(right.shape)}", f"shape {tuple(came.shape)}"
        return Difference(entry, a, b, INFINITE, 0.0)
    if not right.is_floating_point():
        unequal = (right != came).reshape(-1)
        if not unequal.any():
            return Difference(entry, "equal", "equal", 0.0, 0.0)
        place = int(unequal.nonzero()[0])
        a, b = (str(t.reshape(-1)[place].item()) for t in (right, came))
        return Difference(f"{entry}{_index(place, right.shape)}", a, b, INFINITE, 0.0)
    precision, note, shape = own.dtype, "", right.shape
    if came.dtype == torch.float32 and precision == torch.float64:
        note = f"the result is {_name(came.dtype)}, where {_name(precision)} came in"
        precision = came.dtype
    right, own, came = (
        right.double().reshape(-1),
        own.double().reshape(-1),
        came.double().reshape(-1),
    )
    if not len(right):
        return Difference(entry, "no entry", "no entry", 0.0, 0.0, note)
    scale = float(right.abs().max())
    if allowance.tolerance is None:
        rounding = allowance.terms * torch.finfo(precision).eps * scale
        allowed = max(rounding, 2 * float((own - right).abs().max()))
    else:
        allowed = allowance.tolerance * scale
    errors = (came - right).abs().nan_to_num(nan=INFINITE, posinf=INFINITE)
    place = int(errors.argmax())
    at = f"{entry}{_index(place, shape)}"
    a, b = (f"{t[place].item():.10g}" for t in (right, came))
    # What is allowed is never zero, so that a report can tell a share of it.
    return Difference(at, a, b, float(errors[place]), max(allowed, 1e-300), note)


def _tensor(value: Any, dtype: torch.dtype) -> Tensor:
    """`value` as a tensor; a plain Python number in `dtype`, not in the default one."""
    return torch.as_tensor(value, dtype=dtype if isinstance(value, float) else None)


def _index(place: int, shape: torch.Size) -> str:
    """The place in the flattened tensor as an index: 5 in shape (2, 3) is "[1, 2]"."""
    index = []
    for size in reversed(shape):
        index.append(place % size)
        place //= size
    return str(index[::-1]) if index else ""


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _kind(tensor: Tensor) -> str:
    return f"{_name(tensor.dtype)} of shape {tuple(tensor.shape)}"


def _text(value: Any) -> str:
    if isinstance(value, Rule):
        return value.got
    if isinstance(value, Bits):
        return _kind(value.tensor)
    if isinstance(value, Tensor):
        return _kind(value) if value.numel() > 1 else f"{value.tolist()}"
    return f"{value!r:.200}"
