"""Which modules get ranks: find the linear layers of any nn.Module and name them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..placement import require_unsharded
from .linear import linear_shape
from .lora import LoRALinear

Targets = str | Sequence[str] | type[nn.Module] | Callable[[str, nn.Module], bool] | None


def linear_targets(model: nn.Module, targets: Targets = None) -> dict[str, nn.Module]:
    """The linear-like modules of `model` that `targets` selects, by name, in module order.

    LoRA layers and what is inside them are not listed. A module with several names is listed once,
    under its first name. The out_proj of an nn.MultiheadAttention is listed only if its exact name
    is given, since nothing can be measured there.

    Args:
        model: any module; `linear_shape` says what counts as linear-like.
        targets: None: every linear-like module. A string or a list of strings: exact names, or
            globs over the whole dotted name (`*` also crosses dots). A type: its instances. A
            function (name, module) -> bool: the modules that it accepts. Any name of a module
            with several names selects it.

    Returns: {name: module}.

    Raises:
        ValueError: the model has no linear layer, or a name, glob, type or function selects none;
            or FSDP1 or DeepSpeed ZeRO-3 keeps its parameters in pieces.
        TypeError: a list of anything but names.

    >>> from minirank import linear_targets
    >>> model = nn.ModuleDict({"q": nn.Linear(4, 4), "up": nn.Linear(4, 8), "act": nn.ReLU()})
    >>> list(linear_targets(model)), list(linear_targets(model, "u*"))
    (['q', 'up'], ['up'])
    """
    require_unsharded(model)
    linear, names = _linear_modules(model), all_names(model)
    if targets is None or isinstance(targets, type) or callable(targets):
        selected = _accepted_names(linear, names, targets)
    else:
        selected = set()
        for pattern in [targets] if isinstance(targets, str) else targets:
            matched = _matching_names(linear, names, pattern)
            if not matched:
                raise ValueError(explain_no_match(model, pattern))
            selected |= matched
    if not selected:
        wrapped = sum(isinstance(module, LoRALinear) for module in model.modules())
        raise ValueError(
            f"expected at least one linear layer to give ranks to, but targets={targets!r} selects "
            f"none in {type(model).__name__}: it has {len(linear)} linear-like modules and "
            f"{wrapped} with an adapter"
        )
    return {name: module for name, module in linear.items() if name in selected}


def _accepted_names(
    linear: Mapping[str, nn.Module],
    names: Mapping[str, tuple[str, ...]],
    targets: type[nn.Module] | Callable[[str, nn.Module], bool] | None,
) -> set[str]:
    def accepted(name: str, module: nn.Module) -> bool:
        if targets is None:
            return True
        if isinstance(targets, type):
            return isinstance(module, targets)
        return any(targets(alias, module) for alias in names[name])

    ordinary = {name: module for name, module in linear.items() if not _is_out_proj(module)}
    return {name for name, module in ordinary.items() if accepted(name, module)}


def _matching_names(
    linear: Mapping[str, nn.Module], names: Mapping[str, tuple[str, ...]], pattern: str
) -> set[str]:
    """First names of the linear modules that one exact name or glob selects."""
    if not isinstance(pattern, str):
        raise TypeError(
            "expected targets to be names, one type or one function, but the list holds "
            f"{pattern!r}: give a function (name, module) -> bool to select by several types"
        )
    exact = {name for name in linear if pattern in names[name]}
    return exact or {
        name
        for name, module in linear.items()
        if not _is_out_proj(module) and any(fnmatchcase(alias, pattern) for alias in names[name])
    }


def _is_out_proj(module: nn.Module) -> bool:
    """Whether this is the out_proj of an nn.MultiheadAttention, which nobody calls."""
    return isinstance(module, NonDynamicallyQuantizableLinear)


def _linear_modules(model: nn.Module) -> dict[str, nn.Module]:
    modules = modules_by_name(model)
    return {
        name: modules[name]
        for name in all_names(model)
        if not isinstance(modules[name], LoRALinear) and linear_shape(modules[name]) is not None
    }


# ---- names --------------------------------------------------------------------------------------


def modules_by_name(module: nn.Module, prefix: str = "") -> dict[str, nn.Module]:
    """Every module under each of its names, LoRA layers included, what is inside them left out.

    >>> shared = nn.ReLU()
    >>> list(modules_by_name(nn.Sequential(shared, shared)))
    ['', '0', '1']
    """
    modules = {prefix: module}
    if not isinstance(module, LoRALinear):
        for key, child in module._modules.items():
            if child is not None:
                modules |= modules_by_name(child, f"{prefix}.{key}" if prefix else key)
    return modules


def all_names(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """{first name: every name} of each module, in module order, without what is inside LoRA layers.

    >>> shared = nn.ReLU()
    >>> all_names(nn.Sequential(shared, shared))
    {'': ('',), '0': ('0', '1')}
    """
    names: dict[int, list[str]] = {}
    for name, module in modules_by_name(model).items():
        names.setdefault(id(module), []).append(name)
    return {aliases[0]: tuple(aliases) for aliases in names.values()}


def first_names(model: nn.Module) -> dict[str, str]:
    """{any name of a module: its first name}.

    >>> shared = nn.ReLU()
    >>> first_names(nn.Sequential(shared, shared))
    {'': '', '0': '0', '1': '0'}
    """
    return {alias: name for name, aliases in all_names(model).items() for alias in aliases}


def as_patterns(patterns: str | Iterable[str], argument: str) -> list[str]:
    """The names and globs of an argument that is one of them or several.

    Raises TypeError, which names the `argument`, if it holds anything else.

    >>> as_patterns("head", "trainable")
    ['head']
    """
    if isinstance(patterns, str):
        return [patterns]
    listed: list[object] = list(patterns) if isinstance(patterns, Iterable) else [patterns]
    for pattern in listed:
        if not isinstance(pattern, str):
            raise TypeError(
                f"{argument} must be names or globs of modules, got {pattern!r:.60} of type "
                f"{type(pattern).__name__}"
            )
    return [str(pattern) for pattern in listed]


def matching_modules(model: nn.Module, pattern: str, argument: str) -> dict[str, nn.Module]:
    """The modules of any kind, LoRA layers included, with the name `pattern` or one it matches.

    Raises ValueError, which names the `argument` that the pattern came from, if there is none.

    >>> model = nn.ModuleDict({"head": nn.Linear(4, 2), "norm": nn.LayerNorm(4)})
    >>> list(matching_modules(model, "h*", "trainable"))
    ['head']
    """
    modules = modules_by_name(model)
    matching = {
        name: module
        for name, module in modules.items()
        if name == pattern or fnmatchcase(name, pattern)
    }
    if not matching:
        raise ValueError(
            f"{argument}={pattern!r} matches no module: {did_you_mean(pattern, modules)}"
        )
    return matching


def layer_shape(module: nn.Module) -> tuple[int, int] | None:
    """(d_out, d_in) of a linear-like module or of a LoRA layer around one, else None.

    >>> layer_shape(LoRALinear(nn.Linear(3, 5), 1))
    (5, 3)
    """
    if isinstance(module, LoRALinear):
        return module.out_features, module.in_features
    return linear_shape(module)


def exact_pattern(names: Iterable[str]) -> str:
    r"""A regular expression that matches these names in full and no others, for PEFT.

    PEFT takes it as target_modules.

    >>> exact_pattern(["layer.0.q", "head"])
    '(layer\\.0\\.q|head)'
    """
    return f"({'|'.join(map(re.escape, names))})"


def exact_key(name: str) -> str:
    r"""A key of PEFT's rank_pattern or alpha_pattern for this name alone.

    PEFT also tries each key after any prefix, which the leading ^ prevents.

    >>> exact_key("layer.0.q")
    '^layer\\.0\\.q'
    """
    return f"^{re.escape(name)}"


# ---- words for errors ---------------------------------------------------------------------------


def did_you_mean(name: str, known: Collection[str]) -> str:
    """A hint for an error message: the known names that look like `name`.

    >>> did_you_mean("encoder.fd", ["encoder.fc", "decoder.fc"])
    "did you mean 'encoder.fc', 'decoder.fc'?"
    """
    leaf = name.rsplit(".", 1)[-1]
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    close += [k for k in known if k.rsplit(".", 1)[-1] == leaf and k not in close][:3]
    if not close:
        return f"known names start {list(known)[:3]}"
    return f"did you mean {', '.join(map(repr, close[:4]))}?"


def explain_no_match(model: nn.Module, pattern: str) -> str:
    """Why `pattern` selects no linear layer of `model`, and what to write instead.

    >>> print(explain_no_match(nn.ModuleDict({"norm": nn.LayerNorm(4)}), "norm"))
    'norm' is of type LayerNorm, not a linear layer with a 2-D floating-point weight
    """
    module, linear = modules_by_name(model).get(pattern), _linear_modules(model)
    if isinstance(module, LoRALinear):
        return f"{pattern!r} already has an adapter: use resize(), or unwrap() the model first"
    if module is not None:
        what = f"{pattern!r} is of type {type(module).__name__}, not a linear layer"
        if any(name.startswith(f"{pattern}.") for name in linear):
            return f"{what}; for those inside it: '{pattern}.*'"
        return f"{what} with a 2-D floating-point weight"
    matched = [name for name in linear if fnmatchcase(name, pattern)]
    if not matched:
        return f"{pattern!r} matches no linear layer of the model: {did_you_mean(pattern, linear)}"
    if all(_is_out_proj(linear[name]) for name in matched):
        return (
            f"{pattern!r} matches only an nn.MultiheadAttention's out_proj: give its exact name to "
            "adapt it"
        )
    return (
        f"{pattern!r} is a glob, where exact names are expected: it matches "
        f"{', '.join(map(repr, matched[:4]))}"
    )
