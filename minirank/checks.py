"""Checks of arguments, and the words of their errors. Knows nothing of LoRA."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence

import torch

LONGEST_NAME = 80  # of a module, in a list of several


def require(condition: bool, name: str, value: object, expected: str) -> None:
    """Raise ValueError unless `condition` holds: "`name` must be `expected`, got `value`"."""
    if not condition:
        raise ValueError(f"{name} must be {expected}, got {value!r}")


def is_integer(value: object, least: float, most: float = math.inf) -> bool:
    """Whether `value` is an int (bool is none) from `least` to `most`."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def require_integer(name: str, value: object, least: int) -> None:
    """Raise ValueError unless `value` is an int (bool is none) of at least `least`."""
    require(is_integer(value, least), name, value, f"an integer of at least {least}")


def as_generator(generator: torch.Generator | int) -> torch.Generator:
    """A seed becomes a CPU generator, so that one seed gives one result on every device."""
    if isinstance(generator, torch.Generator):
        return generator
    return torch.Generator().manual_seed(generator)


def quoted_names(names: Sequence[str], count: int = 3) -> str:
    """The first few names, quoted, for an error message: "'a', 'b', 'c' and 4 more"."""
    shown = ", ".join(repr(shortened(name, LONGEST_NAME)) for name in names[:count])
    return f"{shown} and {len(names) - count} more" if len(names) > count else shown


def shortened(text: str, width: int) -> str:
    """The text, with "…" for its middle if it is longer than `width`. The end stays longer."""
    if len(text) <= width:
        return text
    end = max(2 * (width - 1) // 3, 0)
    return f"{text[: max(width - 1 - end, 0)]}…{text[len(text) - end :]}"


def warn_caller(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn, and point to the line outside of this package from which it was called."""
    package = __name__.rpartition(".")[0]
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and _is_inside(frame.f_globals.get("__name__", ""), package):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


def _is_inside(module: str, package: str) -> bool:
    return module == package or module.startswith((f"{package}.", "torch.", "contextlib"))


def require_function(name: str, value: object) -> None:
    """Raise TypeError unless `value` can be called."""
    if not callable(value):
        raise TypeError(f"{name} must be a function, got {type(value).__name__}: {value!r:.60}")


def require_batches(batches: object) -> None:
    """Raise TypeError unless `batches` is an iterable of batches. A mapping is one batch, since
    iterating over it gives its keys."""
    expected = (
        f"batches must be an iterable of what loss_fn takes, got one {type(batches).__name__}"
    )
    if isinstance(batches, Mapping):
        raise TypeError(f"{expected}: put a single batch in a list, [batch]")
    if not isinstance(batches, Iterable):
        raise TypeError(expected)
