"""Which modules get ranks: find the linear layers of any nn.Module and name them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from .linear import linear_shape
from .lora import LoRALinear

Targets = str | Sequence[str] | type[nn.Module] | Callable[[str, nn.Module], bool] | None


def linear_targets(model: nn.Module, targets: Targets = None) -> dict[str, nn.Module]:
    """The linear-like modules (see `linear.linear_shape`) of `model` that `targets` selects, by name, in module order.

    Args:
        targets: None: every one. A string or a list of strings: exact names, or globs over the whole dotted name
            (`*` also crosses dots). A type: instances of it. A function (name, module) -> bool: those it accepts.

    A module that is reachable under several names is listed once, under its first; any of its names selects it
    (`all_names` lists them). LoRA layers and what is inside them are not listed. nn.MultiheadAttention reads the
    weight of its out_proj without calling it, so nothing can be measured there: only its exact name selects it.

    Raises:
        ValueError: the model has no linear layer, or a name, glob, type or function selects none.
    """
    names = all_names(model)
    linear = _linear_modules(model)
    ordinary = {
        n: m for n, m in linear.items() if not isinstance(m, NonDynamicallyQuantizableLinear)
    }
    if targets is None:
        selected = set(ordinary)
    elif isinstance(targets, type):
        selected = {name for name, module in ordinary.items() if isinstance(module, targets)}
    elif callable(targets):
        selected = {
            name
            for name, module in ordinary.items()
            if any(targets(alias, module) for alias in names[name])
        }
    else:
        selected = set()
        for pattern in [targets] if isinstance(targets, str) else targets:
            if not isinstance(pattern, str):
                raise TypeError(
                    f"targets must be names, one type or one function; the list holds {pattern!r}"
                )
            found = {name for name in linear if pattern in names[name]}
            found = found or {
                n for n in ordinary if any(fnmatchcase(alias, pattern) for alias in names[n])
            }
            if not found:
                raise ValueError(no_match(model, pattern))
            selected |= found
    if not selected:
        wrapped = sum(isinstance(module, LoRALinear) for module in model.modules())
        raise ValueError(
            f"expected at least one linear layer to give ranks to, but targets={targets!r} selects none in "
            f"{type(model).__name__}: it has {len(linear)} linear-like modules and {wrapped} with an adapter"
        )
    return {name: module for name, module in linear.items() if name in selected}


def all_names(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """{first name: every name} of each module, in module order, without what is inside a LoRA layer."""
    names: dict[int, list[str]] = {}
    for name, module in walk(model):
        names.setdefault(id(module), []).append(name)
    return {found[0]: tuple(found) for found in names.values()}


def first_names(model: nn.Module) -> dict[str, str]:
    """{any name of a module: its first name}."""
    return {alias: name for name, aliases in all_names(model).items() for alias in aliases}


def walk(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Like `named_modules`, but under every name, and not into LoRA layers."""
    yield name, module
    if not isinstance(module, LoRALinear):
        for key, child in module._modules.items():
            if child is not None:
                yield from walk(child, f"{name}.{key}" if name else key)


def matching_modules(model: nn.Module, pattern: str, what: str) -> dict[str, nn.Module]:
    """The modules of any kind, LoRA layers included, whose name is `pattern` or matches it as a glob, under every name.
    Raises ValueError, naming the argument `what`, if there is none."""
    found = {
        name: module
        for name, module in walk(model)
        if name == pattern or fnmatchcase(name, pattern)
    }
    if not found:
        raise ValueError(
            f"{what}={pattern!r} matches no module: {close_names(pattern, dict(walk(model)))}"
        )
    return found


def layer_shape(module: nn.Module) -> tuple[int, int] | None:
    """(d_out, d_in) of a linear-like module or of a LoRA layer around one, else None."""
    if isinstance(module, LoRALinear):
        return module.out_features, module.in_features
    return linear_shape(module)


def exact_pattern(names: Iterable[str]) -> str:
    """A regular expression that matches these names in full and no others, as PEFT's target_modules wants it."""
    return f"({'|'.join(map(re.escape, names))})"


def exact_key(name: str) -> str:
    """A key of PEFT's rank_pattern or alpha_pattern for this name alone: PEFT also tries keys after any prefix."""
    return f"^{re.escape(name)}"


def close_names(name: str, known: Collection[str]) -> str:
    """A hint for an error message: the known names that look like `name`."""
    leaf = name.rsplit(".", 1)[-1]
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    close += [k for k in known if k.rsplit(".", 1)[-1] == leaf and k not in close][:3]
    return (
        f"did you mean {', '.join(map(repr, close[:4]))}?"
        if close
        else f"known names start {list(known)[:3]}"
    )


def no_match(model: nn.Module, pattern: str) -> str:
    """Why `pattern` selects no linear layer of `model`, and what to write instead."""
    module, linear = dict(walk(model)).get(pattern), _linear_modules(model)
    if isinstance(module, LoRALinear):
        return f"{pattern!r} already has an adapter: use resize(), or unwrap() the model first"
    if module is not None and any(name.startswith(f"{pattern}.") for name in linear):
        return f"{pattern!r} is a {type(module).__name__}, not a linear layer; for those inside it: '{pattern}.*'"
    if module is not None:
        return f"{pattern!r} is a {type(module).__name__}, not a linear layer with a 2-D floating-point weight"
    if found := [name for name in linear if fnmatchcase(name, pattern)]:
        if all(isinstance(linear[name], NonDynamicallyQuantizableLinear) for name in found):
            return f"{pattern!r} matches only an nn.MultiheadAttention's out_proj: give its exact name to adapt it"
        return f"{pattern!r} is a glob, where exact names are expected: it matches {', '.join(map(repr, found[:4]))}"
    return f"{pattern!r} matches no linear layer of the model: {close_names(pattern, linear)}"


def _linear_modules(model: nn.Module) -> dict[str, nn.Module]:
    modules = dict(walk(model))
    return {
        name: modules[name]
        for name in all_names(model)
        if not isinstance(modules[name], LoRALinear) and linear_shape(modules[name]) is not None
    }
