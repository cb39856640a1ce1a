"""What a file holds beside the adapters: parameters and buffers of other modules."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy

from ..checks import quoted_names
from ..layers.lora import LoRALinear
from ..layers.modules import matching_modules, modules_by_name
from ..layers.names import each_once, joined, named_buffers, named_parameters
from ..layers.wrap import can_train
from ..tensor_bytes import tensor_bytes

# ---- from the model -----------------------------------------------------------------------------


def trainable_parameters(model: nn.Module) -> list[str]:
    """The names of the parameters outside the LoRA layers that require a gradient, each once."""
    names: dict[int, str] = {}
    for name, module in modules_by_name(model).items():
        for key, parameter in _own_parameters(name, module):
            if parameter.requires_grad:
                names.setdefault(id(parameter), key)
    return list(names.values())


def tensors_that_train(model: nn.Module) -> dict[str, Tensor]:
    """What trains beside the adapters, by name.

    Of a module whose parameters all require a gradient: its parameters and persistent buffers, with
    those of the modules inside it. Elsewhere: the single parameters that require a gradient.
    """
    named_tensors: list[tuple[str, Tensor]] = []
    for name, module in modules_by_name(model).items():
        if _trains_as_a_whole(module):
            named_tensors += _all_tensors(name, module)
        else:
            named_tensors += [(k, p) for k, p in _own_parameters(name, module) if p.requires_grad]
    return _each_once(named_tensors)


def tensors_of_modules(model: nn.Module, patterns: Sequence[str]) -> dict[str, Tensor]:
    """Parameters and persistent buffers of the modules that the names or globs match.

    LoRA layers are left out. Raises ValueError for a pattern that matches no module.
    """
    named_tensors: list[tuple[str, Tensor]] = []
    for pattern in patterns:
        for name, module in matching_modules(model, pattern, "modules").items():
            named_tensors += _all_tensors(name, module)
    return _each_once(named_tensors)


def tied_names(model: nn.Module, names: Collection[str]) -> dict[str, list[str]]:
    """{name: the further names of the same parameter or buffer}, for those that have any."""
    aliases: dict[int, list[str]] = {}
    for name, tensor in _all_tensors("", model):
        aliases.setdefault(id(tensor), []).append(name)
    return {
        name: [alias for alias in several if alias != name]
        for several in aliases.values()
        for name in several
        if name in names and len(several) > 1
    }


def moving_statistics(model: nn.Module, saved: Collection[str]) -> list[str]:
    """The modules in training mode whose running statistics have moved and are not `saved`.

    In training mode every batch moves the running statistics of BatchNorm and its kin, even where
    their parameters are frozen. Those that no batch has reached yet are left out.

    Args:
        saved: names of the tensors that go into the file beside the adapters.
    """
    kept = {id(tensor) for name, tensor in _all_tensors("", model) if name in saved}
    return [
        name
        for name, module in modules_by_name(model).items()
        if isinstance(module, _NormBase)
        and module.training
        and module.momentum != 0  # it keeps its statistics
        and module.running_mean is not None
        and id(module.running_mean) not in kept
        and module.num_batches_tracked is not None
        and not module.num_batches_tracked.is_meta
        and bool(module.num_batches_tracked > 0)
    ]


def _trains_as_a_whole(module: nn.Module) -> bool:
    """Not so if a LoRA layer is inside it, whose base may be frozen."""
    parameters = list(module.parameters())
    inner = module.modules()
    return (
        bool(parameters)
        and all(parameter.requires_grad for parameter in parameters)
        and not any(isinstance(child, LoRALinear) for child in inner)
    )


def _all_tensors(prefix: str, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, parameter or persistent buffer), also of inner modules; none of LoRA layers."""
    for name, inner in modules_by_name(module, prefix).items():
        yield from _own_parameters(name, inner)
        if not isinstance(inner, LoRALinear):
            for key, buffer in inner._buffers.items():
                if buffer is not None and key not in inner._non_persistent_buffers_set:
                    yield joined(name, key), buffer


def _own_parameters(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """(name, parameter) of the module itself; none of a LoRA layer."""
    if not isinstance(module, LoRALinear):
        for key, parameter in module._parameters.items():
            if parameter is not None:
                yield joined(name, key), parameter


def _each_once(named_tensors: Sequence[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """{first name: tensor}: a tied tensor has several names.

    Raises ValueError for a lazy one, which has no values yet.
    """
    for name, tensor in named_tensors:
        if is_lazy(tensor):
            raise ValueError(
                f"{name!r} is a lazy {type(tensor).__name__} without values to save: run the model "
                "once, so that it gets its shape"
            )
    return {name: tensor.detach() for name, tensor in each_once(named_tensors).items()}


# ---- into the model -----------------------------------------------------------------------------


def converted_values(
    model: nn.Module, values: Mapping[str, Tensor], tied: Mapping[str, Sequence[str]]
) -> list[tuple[Tensor, Tensor]]:
    """Pairs (tensor of the model, the value that it gets, converted to its type).

    Args:
        values: the file's tensors by name.
        tied: {name: the further names that the tensor had when it was saved}. What the model has
            under one of these names gets the value too.

    Raises ValueError: the model has no such tensor, or it cannot hold the file's value.
    """
    model_tensors: dict[str, Tensor] = {**named_parameters(model), **named_buffers(model)}
    further = {
        alias: value
        for name, value in values.items()
        for alias in tied.get(name, ())
        if alias in model_tensors
    }
    pairs: dict[int, tuple[str, Tensor, Tensor]] = {}
    for name, value in (further | dict(values)).items():
        tensor = model_tensors.get(name)
        converted = _converted(name, value, tensor)
        assert tensor is not None  # else _converted has raised
        first_name, _, first_value = pairs.setdefault(id(tensor), (name, tensor, converted))
        if first_value is not converted and tensor_bytes(first_value) != tensor_bytes(converted):
            raise ValueError(
                f"{first_name!r} and {name!r} are one tensor of the model, which the file has two "
                "values for"
            )
    return [(tensor, converted) for _, tensor, converted in pairs.values()]


def parameters_named(
    model: nn.Module, names: Iterable[str], tied: Mapping[str, Sequence[str]]
) -> list[nn.Parameter]:
    """The model's parameters with these names that can train.

    Args:
        tied: {name: the further names that the parameter had when it was saved}. What the model has
            under one of these names counts too.

    Raises ValueError: the model has no tensor of a name.
    """
    names = list(names)
    parameters, buffers = named_parameters(model), named_buffers(model)
    missing = [name for name in names if name not in parameters and name not in buffers]
    if missing:
        raise ValueError(
            f"the file says that {quoted_names(missing)} trained, which the model does not have: "
            "is it the model that was saved? Otherwise name what shall train, trainable=[…]"
        )
    names += [alias for name in names for alias in tied.get(name, ())]
    return [parameters[n] for n in names if n in parameters and can_train(parameters[n])]


def _converted(name: str, value: Tensor, tensor: Tensor | None) -> Tensor:
    """`value` in the type of the model's `tensor`. Raises ValueError if it does not fit."""
    if tensor is None or is_lazy(tensor) or tensor.is_meta:
        reason = "one without values (lazy, or on the meta device): load its weights"
        raise ValueError(
            f"the file holds {name!r}, of shape {tuple(value.shape)}; the model has "
            f"{'none' if tensor is None else reason}"
        )
    floating = tensor.is_floating_point() and value.is_floating_point()
    if tensor.shape != value.shape or not (floating or tensor.dtype == value.dtype):
        raise ValueError(
            f"the file holds {name!r}, {value.dtype} of shape {tuple(value.shape)}; the model has "
            f"{tensor.dtype} of shape {tuple(tensor.shape)}"
        )
    converted = value.to(tensor.dtype)
    if floating and bool((value.isfinite() & ~converted.double().isfinite()).any()):
        raise ValueError(
            f"the file's {name!r} overflows {tensor.dtype}, the model's type: convert the model "
            "to a wider one"
        )
    return converted


def copy_value(tensor: Tensor, value: Tensor) -> None:
    """Overwrite the entries of `tensor`, in inference mode if that is where it was made."""
    with torch.inference_mode(tensor.is_inference()), torch.no_grad():
        tensor.copy_(value)
