"""Arguments and results as JSON beside a safetensors file, for other languages.

{"$tensor": key}                a tensor of the safetensors file
{"$map": [[name, value], …]}    a mapping. Its order counts: ties go to the earlier module
{"$number": text}               "NaN", "Infinity", "-Infinity", or a number with "allowed"
"allowed": number               beside $tensor or $number: the largest error that passes
null, true, 3, 1.7, "text", []  themselves
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..tensor_bytes import tensor_bytes
from .comparison import Bits, differences


class NotPlainData(Exception):
    """A value that has no place in JSON and tensors; the text says which."""


class Expected(NamedTuple):
    """A number or tensor of a result, with the largest error that passes."""

    value: Any
    allowed: float


# ---- writing ------------------------------------------------------------------------------------


class Tensors:
    """Tensors for a safetensors file, under "0", "1", …. Equal ones, bit for bit, are kept once."""

    def __init__(self) -> None:
        self.by_name: dict[str, Tensor] = {}
        self._names: dict[tuple[Any, ...], str] = {}

    def put(self, tensor: Tensor) -> str:
        """The name under which the tensor, or one equal to it, is kept."""
        content = (tensor.dtype, tuple(tensor.shape), tensor_bytes(tensor))
        name = self._names.setdefault(content, str(len(self._names)))
        self.by_name.setdefault(name, tensor.detach().clone())
        return name


def encoded(value: Any, name: str, tensors: Tensors) -> Any:
    """`value` as JSON, with its tensors in `tensors`. `name` is what an error calls it.

    Raises NotPlainData for anything but tensors, numbers, text, None, and mappings and sequences.
    """
    if isinstance(value, Expected):
        inner = encoded(value.value, name, tensors)
        plain = inner if isinstance(inner, dict) else {"$number": json_number(inner)}
        return plain | {"allowed": value.allowed}
    if isinstance(value, Bits):
        return encoded(value.tensor, name, tensors)
    if isinstance(value, Tensor):
        return {"$tensor": tensors.put(value)}
    if isinstance(value, Mapping):
        return {"$map": [[key, encoded(item, key, tensors)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        return [encoded(item, name, tensors) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {"$number": json_number(value)}
    if isinstance(value, (bool, int, float, str, type(None))):
        return value
    raise NotPlainData(f"{name} is a {type(value).__name__}")


def json_number(value: float) -> str:
    """The shortest text that reads as the same number; JSON itself knows no NaN and no infinity."""
    if math.isnan(value):
        return "NaN"
    return repr(value).replace("inf", "Infinity")


def with_allowed(exact: Any, rounded: Any, terms: float, dtype: torch.dtype) -> Any:
    """A right result with the allowed error beside each of its tensors and numbers.

    Args:
        exact: in float64.
        rounded: the reference's own, in the dtype of the case. The result gets its dtypes.
        terms: of how many terms an entry is a sum.
        dtype: of the case: what plain numbers are computed in.
    """
    if isinstance(exact, Bits):
        return with_allowed(exact.tensor, rounded.tensor, terms, dtype)
    if isinstance(exact, Mapping):
        values, own = list(exact.values()), [rounded[key] for key in exact]
        return dict(zip(exact, with_allowed(values, own, terms, dtype), strict=True))
    if isinstance(exact, (list, tuple)):
        if exact and all(isinstance(value, float) for value in exact):  # as one tensor
            numbers = torch.tensor(exact, dtype=torch.float64)
            allowed = allowed_error(numbers, torch.tensor(rounded, dtype=dtype), terms)
            return [Expected(value, allowed) for value in exact]
        return [with_allowed(a, b, terms, dtype) for a, b in zip(exact, rounded, strict=True)]
    if isinstance(exact, float):
        return with_allowed([exact], [rounded], terms, dtype)[0]
    if not isinstance(exact, Tensor) or not exact.is_floating_point():
        return exact
    stored = exact.to(rounded.dtype)
    rounding = float((stored.double() - exact.double()).abs().max()) if exact.numel() else 0.0
    return Expected(stored, allowed_error(exact, rounded, terms, rounding))


def allowed_error(exact: Tensor, rounded: Tensor, terms: float, rounding: float = 0.0) -> float:
    """What a comparison of the kit allows, and `rounding`."""
    (difference,) = differences(
        exact, rounded, rounded, dtype=rounded.dtype, terms=terms, tolerance=None
    )
    return rounded_up(difference.allowed + rounding)


def rounded_up(error: float) -> float:
    """A number of three digits, at least as large."""
    digits = float(f"{error:.2e}")
    return digits if digits >= error else float(f"{error * 1.01:.2e}")


# ---- reading ------------------------------------------------------------------------------------


def decoded(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The value that `encoded` wrote. A JSON object without "$" names is a mapping too.

    Raises ValueError for a tensor that the safetensors file lacks.
    """
    if isinstance(value, list):
        return [decoded(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if "$tensor" in value:
        if value["$tensor"] not in tensors:
            raise ValueError(f"the safetensors file has no tensor {value['$tensor']!r}")
        return tensors[value["$tensor"]]
    if "$map" in value:
        return {name: decoded(item, tensors) for name, item in value["$map"]}
    if "$number" in value:
        return float(value["$number"])
    return {name: decoded(item, tensors) for name, item in value.items()}


def shaped_like(right: Any, value: Any) -> Any:
    """`value` with its lists of numbers as tensors, where `right` has tensors.

    What does not fit stays as it is, for a comparison to find.
    """
    if isinstance(right, Bits):
        return shaped_like(right.tensor, value)
    if isinstance(right, Tensor) and isinstance(value, (list, bool, int, float)):
        return _as_tensor(right, value)
    if isinstance(right, float) and type(value) is int:
        return float(value)
    if isinstance(right, Mapping) and isinstance(value, Mapping):
        return {key: shaped_like(right.get(key), item) for key, item in value.items()}
    if isinstance(right, (list, tuple)) and isinstance(value, list) and len(right) == len(value):
        return type(right)(shaped_like(a, b) for a, b in zip(right, value, strict=True))
    return value


def _as_tensor(right: Tensor, value: Any) -> Any:
    try:
        tensor = torch.tensor(value, dtype=right.dtype)
    except (TypeError, ValueError, RuntimeError):
        return value
    return tensor.reshape(right.shape) if not tensor.numel() and not right.numel() else tensor
