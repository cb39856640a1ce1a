"""The modules of a model under their names, stacks of experts among them, and names and globs that
select some."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

from torch import nn

from .coverage import stacked_parameters
from .experts import ExpertStack
from .hints import did_you_mean
from .linear import linear_shape
from .lora import LoRALinear
from .names import joined, name_variants, named_modules


def modules_by_name(module: nn.Module, prefix: str = "") -> dict[str, nn.Module]:
    """Every module under each of its names, LoRA layers included, what is inside them left out.

    >>> shared = nn.ReLU()
    >>> list(modules_by_name(nn.Sequential(shared, shared)))
    ['', '0', '1']
    """
    return dict(named_modules(module, prefix, enter=_is_no_adapter))


def expert_stacks(model: nn.Module) -> dict[str, ExpertStack]:
    """Every stack of experts without an adapter under each name of its parameter.

    >>> import torch
    >>> model = nn.Module()
    >>> model.experts = nn.Module()
    >>> model.experts.up, model.experts.is_transposed = nn.Parameter(torch.ones(8, 3, 5)), False
    >>> expert_stacks(model)
    {'experts.up': ExpertStack(8 experts, (3, 5))}
    """
    modules = modules_and_stacks(model)
    return {name: stack for name, stack in modules.items() if isinstance(stack, ExpertStack)}


def modules_and_stacks(model: nn.Module) -> dict[str, nn.Module]:
    """`modules_by_name`, and after each module the `expert_stacks` that it holds.

    >>> list(modules_and_stacks(nn.Sequential(nn.ReLU())))
    ['', '0']
    """
    named: dict[str, nn.Module] = {}
    made: dict[tuple[int, str], ExpertStack] = {}
    for name, module in modules_by_name(model).items():
        named[name] = module
        for key in stacked_parameters(module):
            place = (id(module), key)
            if place not in made:
                made[place] = ExpertStack(joined(name, key), module, key)
            named[joined(name, key)] = made[place]
    return named


def _is_no_adapter(module: nn.Module) -> bool:
    return not isinstance(module, LoRALinear)


def all_names(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """{first name: every name} of each module, in module order, without what is inside LoRA layers.

    >>> shared = nn.ReLU()
    >>> all_names(nn.Sequential(shared, shared))
    {'': ('',), '0': ('0', '1')}
    """
    return aliases(modules_by_name(model))


def aliases(modules: Mapping[str, nn.Module]) -> dict[str, tuple[str, ...]]:
    """{first name: every name} of each of these modules.

    >>> shared = nn.ReLU()
    >>> aliases({"a": shared, "b": shared})
    {'a': ('a', 'b')}
    """
    names: dict[int, list[str]] = {}
    for name, module in modules.items():
        names.setdefault(id(module), []).append(name)
    return {found[0]: tuple(found) for found in names.values()}


def first_names(model: nn.Module) -> dict[str, str]:
    """{any name of a module or stack of experts: its first name}.

    >>> shared = nn.ReLU()
    >>> first_names(nn.Sequential(shared, shared))
    {'': '', '0': '0', '1': '0'}
    """
    names = aliases(modules_and_stacks(model))
    return {alias: name for name, found in names.items() for alias in found}


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
    for variant in name_variants(pattern):
        matching = {
            name: module
            for name, module in modules.items()
            if name == variant or fnmatchcase(name, variant)
        }
        if matching:
            return matching
    hint = did_you_mean(pattern, modules, globs=True)
    raise ValueError(f"{argument}={pattern!r} matches no module: {hint}")


def layer_shape(module: nn.Module) -> tuple[int, int] | None:
    """(d_out, d_in) of a linear-like module, a stack of experts, or a LoRA layer around one; else
    None.

    Raises ValueError for a stack whose layout is not known.

    >>> layer_shape(LoRALinear(nn.Linear(3, 5), 1))
    (5, 3)
    """
    if isinstance(module, LoRALinear):
        return module.out_features, module.in_features
    return module.shape if isinstance(module, ExpertStack) else linear_shape(module)


def rank_cost(module: nn.Module) -> int:
    """Trainable parameters of one rank: d_out + d_in; in a stack of experts, that for each.

    Args:
        module: one that has a `layer_shape`.

    >>> rank_cost(nn.Linear(3, 5))
    8
    """
    if isinstance(module, LoRALinear):
        return module.rank_cost
    shape = layer_shape(module)
    assert shape is not None
    return sum(shape) * (module.experts if isinstance(module, ExpertStack) else 1)
