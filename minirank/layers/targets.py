"""Which modules get ranks: find the linear layers of any nn.Module and name them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn

from ..checks import LONGEST_NAME, quoted_names, shortened, warn_caller
from ..placement import require_unsharded
from .attention import PACKED_NAMES, is_packed_attention
from .coverage import (
    NOT_SELECTED,
    coverage,
    is_out_proj,
    percent,
    tied_heads,
)
from .experts import ExpertStack
from .hints import did_you_mean
from .linear import CONVOLUTIONS, linear_shape
from .lora import LoRALinear
from .modules import aliases, all_names, expert_stacks, modules_and_stacks, modules_by_name
from .names import joined, name_variants, named_modules, plain_name

Targets = str | Sequence[str] | type[nn.Module] | Callable[[str, nn.Module], bool] | None


def linear_targets(model: nn.Module, targets: Targets = None) -> dict[str, nn.Module]:
    """The linear-like modules of `model` that `targets` selects, by name, in module order.

    LoRA layers and what is inside them are not listed. A module with several names is listed once,
    under its first name. The out_proj of an nn.MultiheadAttention is listed only if its exact name
    is given, since nothing can be measured there; `unpack_attention` makes it a layer like others.
    A tied head (a linear layer whose weight is an embedding's) is listed if a name, glob or
    function selects it, but not by None or a type: an adapter there makes two weights out of the
    one in files. Stacks of experts (experts.py), parameters and no modules, are selected by names
    and globs that match no linear layer: "*.experts.*" in most models.

    Args:
        model: any module; `linear_shape` says what counts as linear-like. The wrappers of
            torch.compile, DataParallel and DistributedDataParallel have no part in names; names
            that have theirs, such as "_orig_mod.fc", are understood.
        targets: None: every linear-like module. A string or a list of strings: exact names, or
            globs over the whole dotted name (`*` also crosses dots). A type: its instances. A
            function (name, module) -> bool: the modules that it accepts. Any name of a module
            with several names selects it.

    Returns: {name: module}; of a stack, {name of the parameter: ExpertStack}.

    Warns:
        UserWarning: `targets` is None, and this reaches fewer of the model's weights than it leaves
            out, such as a head alone.

    Raises:
        ValueError: the model has no linear layer; a name, glob, type or function selects none; a
            stack is selected whose layout is not known; the model has PEFT's modules; or FSDP1 or
            DeepSpeed ZeRO-3 keeps its parameters in pieces.
        TypeError: a list of anything but names.

    >>> from minirank import linear_targets
    >>> model = nn.ModuleDict({"q": nn.Linear(4, 4), "up": nn.Linear(4, 8), "act": nn.ReLU()})
    >>> list(linear_targets(model)), list(linear_targets(model, "u*"))
    (['q', 'up'], ['up'])
    """
    refuse_peft(model)
    require_unsharded(model)
    linear, names = _linear_modules(model), all_names(model)
    stacks: dict[str, nn.Module] = {}
    if targets is None or isinstance(targets, type) or callable(targets):
        selected = _accepted_names(model, linear, names, targets)
    else:
        selected = set()
        for pattern in [targets] if isinstance(targets, str) else targets:
            matched = _matching_names(linear, names, pattern)
            selected |= matched
            if not matched:
                stacks |= _matching_stacks(model, pattern)
    if not selected and not stacks:
        raise ValueError(_explain_no_target(model, linear, targets))
    if targets is None:
        _warn_of_small_part(model, selected)
    if not stacks:
        return {name: module for name, module in linear.items() if name in selected}
    found = {name: linear[name] for name in selected} | stacks
    return {name: found[name] for name in modules_and_stacks(model) if name in found}


def layers_called(model: nn.Module, targets: Targets = None) -> dict[str, nn.Module]:
    """`linear_targets` for those who measure the inputs of layers: stacks of experts are refused.

    >>> list(layers_called(nn.Sequential(nn.Linear(2, 2))))
    ['0']
    """
    layers = linear_targets(model, targets)
    refuse_stacks([name for name, layer in layers.items() if isinstance(layer, ExpertStack)])
    return layers


def refuse_stacks(names: Sequence[str]) -> None:
    """Raise ValueError, which names them, if there are any such stacks."""
    if names:
        raise ValueError(
            f"{quoted_names(names)}: a stack of experts is a parameter that its module reads, so "
            "that no inputs of single experts can be measured here. Leave it out of targets and "
            "give it ranks of your own choice, wrap(model, {**allocation.ranks, name: rank}); or "
            "take UniformRanks, L1RA, ShapLoRA or SingularValues without data, which need no inputs"
        )


def refuse_peft(model: nn.Module) -> None:
    """Raise ValueError, which names them, if PEFT has put modules of its own into the model."""
    found = {
        name: module
        for name, module in named_modules(model)
        if type(module).__module__.startswith("peft.")
    }
    if found:
        kinds = ", ".join(dict.fromkeys(type(module).__name__ for module in found.values()))
        raise ValueError(
            f"expected a model without PEFT's modules, but {type(model).__name__} has {len(found)} "
            f"({kinds}): give the model from before get_peft_model(), or what peft_model.unload() "
            "returns (merge_and_unload() keeps the adapters in the weights)"
        )


def _accepted_names(
    model: nn.Module,
    linear: Mapping[str, nn.Module],
    names: Mapping[str, tuple[str, ...]],
    targets: type[nn.Module] | Callable[[str, nn.Module], bool] | None,
) -> set[str]:
    tied = tied_heads(modules_by_name(model))

    def accepted(name: str, module: nn.Module) -> bool:
        if targets is None:
            return name not in tied
        if isinstance(targets, type):
            return isinstance(module, targets) and name not in tied
        return any(targets(alias, module) for alias in names[name])

    ordinary = {name: module for name, module in linear.items() if not is_out_proj(module)}
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
    for variant in name_variants(pattern):
        exact = {name for name in linear if variant in names[name]}
        matched = exact or {
            name
            for name, module in linear.items()
            if not is_out_proj(module) and any(fnmatchcase(n, variant) for n in names[name])
        }
        if matched:
            return matched
    return set()


def _matching_stacks(model: nn.Module, pattern: str) -> dict[str, nn.Module]:
    """The stacks of experts, by first names, that one exact name or glob selects."""
    stacks = expert_stacks(model)
    matched = _matching_names(stacks, aliases(stacks), pattern)
    if not matched:
        raise ValueError(explain_no_match(model, pattern, globs=True))
    for name in matched:
        _ = stacks[name].shape  # which raises if it is not known
    return {name: stacks[name] for name in matched}


def _explain_no_target(model: nn.Module, linear: Mapping[str, nn.Module], targets: Targets) -> str:
    wrapped = sum(isinstance(module, LoRALinear) for module in model.modules())
    tied = tied_heads(modules_by_name(model)) & linear.keys()
    hint = f". To adapt the tied head, give its name: {quoted_names(sorted(tied))}" if tied else ""
    if any(map(is_packed_attention, model.modules())):
        hint += ". unpack_attention(model) gives every nn.MultiheadAttention four linear layers"
    return (
        f"expected at least one linear layer to give ranks to, but targets={targets!r} selects "
        f"none in {type(model).__name__}: it has {len(linear)} linear layers and "
        f"{wrapped} with an adapter{hint}"
    )


def _warn_of_small_part(model: nn.Module, selected: Collection[str]) -> None:
    """Warn of default targets that reach less than half of the matrix entries, and fewer weights
    than they leave out."""
    adapted = [n for n, m in modules_by_name(model).items() if isinstance(m, LoRALinear)]
    part = coverage(model, [*selected, *adapted])
    left_out = [group for group in part.left_out if group.kind not in (NOT_SELECTED, "tied head")]
    if part.share < 0.5 and len(selected) + len(adapted) < sum(g.number for g in left_out):
        listed = ", ".join(
            f"{group.number:,} × {group.kind} ({group.reason}), such as "
            f"{shortened(group.example, LONGEST_NAME)!r}"
            for group in left_out
        )
        warn_caller(
            f"the default targets are {quoted_names(sorted(selected))} alone, with "
            f"{percent(part.reached, part.total)} of the model's matrix entries. Left out are "
            f"{listed}. All ranks go to those found: if that is meant, name them as targets",
        )


def _linear_modules(model: nn.Module) -> dict[str, nn.Module]:
    modules = modules_by_name(model)
    return {
        name: modules[name]
        for name in all_names(model)
        if not isinstance(modules[name], LoRALinear) and linear_shape(modules[name]) is not None
    }


# ---- words for errors ---------------------------------------------------------------------------


def unpacking_hint(model: nn.Module, pattern: str) -> str:
    """What to do if a name or glob means parts of an nn.MultiheadAttention; else an empty string.

    >>> unpacking_hint(nn.TransformerEncoderLayer(4, 2), "*.q")[:46]
    "'self_attn' is an nn.MultiheadAttention, which"
    """
    for name, module in modules_by_name(model).items():
        if is_packed_attention(module):
            inside = [joined(name, key) for key in ("q", "k", "v", "out", *PACKED_NAMES)]
            meant = [name, *inside]
            if any(fnmatchcase(part, v) for part in meant for v in name_variants(pattern)):
                return (
                    f"{name!r} is an nn.MultiheadAttention, which stacks its projections in one "
                    "parameter. unpack_attention(model) gives it linear layers q, k, v and out"
                )
    return ""


def explain_no_match(model: nn.Module, pattern: str, *, globs: bool = False) -> str:
    """Why `pattern` selects no linear layer of `model`, and what to write instead.

    Args:
        globs: whether a glob was allowed, not an exact name alone.

    >>> print(explain_no_match(nn.ModuleDict({"norm": nn.LayerNorm(4)}), "norm"))
    'norm' is of type LayerNorm, not a linear layer with a 2-D floating-point weight
    """
    modules, linear = modules_by_name(model), _linear_modules(model)
    module = modules.get(plain_name(pattern, modules))
    packed = unpacking_hint(model, pattern)
    if packed and not any(fnmatchcase(name, pattern) for name in linear):
        return f"{pattern!r} is no layer: {packed}"
    if isinstance(module, LoRALinear):
        return (
            f"{pattern!r} already has an adapter: unwrap() the model first, or change the rank by "
            "resize()"
        )
    stacks = expert_stacks(model)
    if module is not None:
        what = f"{pattern!r} is of type {type(module).__name__}, not a linear layer"
        if any(name.startswith(f"{pattern}.") for name in linear):
            inside = f"'{pattern}.*'" if globs else f"linear_targets(model, '{pattern}.*')"
            return f"{what}; for those inside it: {inside}"
        if isinstance(module, CONVOLUTIONS):
            return (
                f"{what}: of convolutions, only those with kernel 1, stride 1, one group, no "
                "padding and torch's own forward are linear layers, over their channels"
            )
        stacked = [name for name in stacks if name.startswith(f"{pattern}.")]
        if stacked:
            return f"{what}; the stacks of experts inside it have names: {quoted_names(stacked)}"
        return f"{what} with a 2-D floating-point weight"
    matched = [name for name in linear if fnmatchcase(name, pattern)]
    matched = matched or [name for name in stacks if fnmatchcase(name, pattern)]
    if not matched:
        hint = did_you_mean(pattern, [*linear, *stacks], globs=globs)
        return f"{pattern!r} matches no linear layer of the model: {hint}"
    if all(name in linear and is_out_proj(linear[name]) for name in matched):
        return (
            f"{pattern!r} matches only an nn.MultiheadAttention's out_proj: give its exact name to "
            "adapt it alone. unpack_attention(model) gives the attention linear layers q, k, v and "
            "out"
        )
    return (
        f"{pattern!r} is a glob, where exact names are expected: it matches "
        f"{quoted_names(matched, 4)}. linear_targets(model, {pattern!r}) lists them"
    )
