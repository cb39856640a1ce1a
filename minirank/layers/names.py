"""Names of modules, in which the wrappers of torch.compile and DataParallel leave no trace."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import TypeVar

from torch import Tensor, nn

T = TypeVar("T")

COMPILED = "_orig_mod"  # where torch.compile's wrapper holds the module
PARALLEL = "module"  # where DataParallel and DistributedDataParallel hold it


def without_wrappers(module: nn.Module) -> nn.Module:
    """The module inside the wrappers of torch.compile, DataParallel, DistributedDataParallel.

    >>> model = nn.Sequential(nn.ReLU())
    >>> without_wrappers(nn.DataParallel(model)) is model, without_wrappers(model) is model
    (True, True)
    """
    inner = _wrapped_module(module)
    while inner is not None:
        module, inner = inner, _wrapped_module(inner)
    return module


def _wrapped_module(module: nn.Module) -> nn.Module | None:
    """The module that this one wraps, if it is a wrapper."""
    if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return module._modules[PARALLEL]
    if COMPILED in module._modules:  # a scripted module's children are no dictionary with get()
        return module._modules[COMPILED]
    return None


def modules_in_wrappers(model: nn.Module) -> set[int]:
    """The ids of the modules that a wrapper holds directly.

    torch.compile's wrapper goes on calling the module that it was made for. So nothing can be put
    into that module's place.

    >>> fc = nn.Linear(2, 2)
    >>> modules_in_wrappers(nn.Sequential(nn.DataParallel(fc))) == {id(fc)}
    True
    """
    wrapped = [_wrapped_module(module) for module in model.modules()]
    return {id(inner) for inner in wrapped if inner is not None}


def named_modules(
    module: nn.Module, prefix: str = "", enter: Callable[[nn.Module], bool] = lambda _: True
) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of every module under each of its names, from the outside in.

    Args:
        enter: whether the modules inside of this one are listed too.

    >>> [name for name, _ in named_modules(nn.DataParallel(nn.Sequential(nn.ReLU())))]
    ['', '0']
    """
    module = without_wrappers(module)
    yield prefix, module
    if enter(module):
        for key, child in module._modules.items():
            if child is not None:
                yield from named_modules(child, joined(prefix, key), enter)


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """{name: parameter}, each under all of its names.

    >>> list(named_parameters(nn.DataParallel(nn.Linear(2, 2))))
    ['weight', 'bias']
    """
    return {
        joined(name, key): parameter
        for name, module in named_modules(model)
        for key, parameter in module._parameters.items()
        if parameter is not None
    }


def named_buffers(model: nn.Module) -> dict[str, Tensor]:
    """{name: buffer}, each under all of its names."""
    return {
        joined(name, key): buffer
        for name, module in named_modules(model)
        for key, buffer in module._buffers.items()
        if buffer is not None
    }


def joined(name: str, key: str) -> str:
    """The name of what a module holds under `key`.

    >>> joined("encoder", "weight"), joined("", "weight")
    ('encoder.weight', 'weight')
    """
    return f"{name}.{key}" if name else key


def each_once(named: Iterable[tuple[str, T]]) -> dict[str, T]:
    """{first name: module or tensor}

    >>> shared = nn.ReLU()
    >>> list(each_once(named_modules(nn.Sequential(shared, shared))))
    ['', '0']
    """
    seen: set[int] = set()
    result = {}
    for name, thing in named:
        if id(thing) not in seen:
            seen.add(id(thing))
            result[name] = thing
    return result


def name_variants(name: str) -> list[str]:
    """A name or glob as it is, and without what wrappers put into it.

    >>> name_variants("module._orig_mod.encoder.*")
    ['module._orig_mod.encoder.*', 'module.encoder.*', 'encoder.*']
    """
    parts = [part for part in name.split(".") if part != COMPILED]
    inner = parts[1:] if parts[:1] == [PARALLEL] else parts
    return list(dict.fromkeys([name, ".".join(parts), ".".join(inner)]))


def plain_name(name: str, known: Collection[str]) -> str:
    """The first of the name's variants that is among the known names; else the name as it is.

    >>> plain_name("_orig_mod.fc", ["fc"]), plain_name("module.fc", ["module.fc", "fc"])
    ('fc', 'module.fc')
    """
    return next((variant for variant in name_variants(name) if variant in known), name)


def with_plain_names(named: Mapping[str, T], known: Collection[str]) -> dict[str, T]:
    """What stands under each name, under its plain name; under its own where two have one.

    >>> with_plain_names({"_orig_mod.fc": 1}, ["fc"]), with_plain_names({"module.fc": 1}, ["up"])
    ({'fc': 1}, {'module.fc': 1})
    """
    plain = {plain_name(name, known): thing for name, thing in named.items()}
    return plain if len(plain) == len(named) else dict(named)
