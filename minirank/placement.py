"""Where a model's parameters lie: whole in this process, sharded over several, or offloaded.

Nothing is imported to find out: the classes' names and the attributes that these packages set say
it. What works, by kind:

- FSDP2 (`fully_shard`, DTensors): the plain model may be sharded before `wrap`, and adapters stay
  whole then. They train, move and resize. Sharded weights cannot be merged.
- FSDP1 (`FullyShardedDataParallel`) and DeepSpeed ZeRO-3: nothing; parameters are flattened or
  empty between the layers' own forward passes.
- Offloading by accelerate (`device_map` with "cpu" or "disk"): scoring. Several devices, without
  offloading: everything.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def require_unsharded(model: nn.Module) -> None:
    """Raise ValueError if FSDP1 or DeepSpeed ZeRO-3 keeps the model's parameters in pieces."""
    for module in model.modules():
        if any(kind.__name__ == "FullyShardedDataParallel" for kind in type(module).__mro__):
            raise ValueError(
                "the model is in FullyShardedDataParallel (FSDP1), which keeps its parameters in "
                "flat pieces: score, wrap, resize, merge and save the plain model, outside of it. "
                "FSDP2 can shard a model before wrap(): fully_shard(model), then wrap(model, …)"
            )
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "ds_id") and parameter.numel() == 0:
            raise ValueError(
                f"the model is partitioned by DeepSpeed ZeRO-3, so {name!r} is empty here: score "
                "and wrap a model that was loaded without zero.Init, before deepspeed.initialize; "
                "ZeRO stage 2 keeps parameters whole"
            )


def is_sharded(tensor: Tensor) -> bool:
    """Whether this is a DTensor, of which a process holds a part.

    >>> is_sharded(torch.ones(2))
    False
    """
    return type(tensor).__module__.startswith(
        ("torch.distributed.tensor", "torch.distributed._ten")
    )


def fsdp2_modules(model: nn.Module) -> list[nn.Module]:
    """The modules that `fully_shard` manages. Their parameters are whole for a time, and then parts
    again, from which what was written meanwhile is lost.

    >>> fsdp2_modules(nn.Linear(2, 2))
    []
    """
    return [
        module
        for module in model.modules()
        if any(kind.__name__ == "FSDPModule" for kind in type(module).__mro__)
    ]


def is_distributed(model: nn.Module) -> bool:
    """Whether processes hold parts of the model, so that its passes communicate.

    >>> is_distributed(nn.Linear(2, 2))
    False
    """
    return bool(fsdp2_modules(model)) or any(map(is_sharded, model.parameters()))


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate keeps the module's own tensors on the CPU or the disk between its calls.

    >>> is_offloaded(nn.Linear(2, 2))
    False
    """
    return _offloading_hook(module) is not None


def working_device(module: nn.Module, weight: Tensor) -> torch.device:
    """The device on which the module computes; its weight may be offloaded.

    >>> working_device(nn.Linear(2, 2), torch.ones(2))
    device(type='cpu')
    """
    hook = _offloading_hook(module) if weight.is_meta else None
    device = getattr(hook, "execution_device", None)
    return weight.device if device is None else torch.device(device)


def working_devices(model: nn.Module) -> list[torch.device]:
    """The devices on which the model computes, in module order, each once.

    >>> working_devices(nn.Linear(2, 2))
    [device(type='cpu')]
    """
    return list(
        dict.fromkeys(
            working_device(module, parameter)
            for module in model.modules()
            for parameter in module.parameters(recurse=False)
        )
    )


def _offloading_hook(module: nn.Module) -> Any:
    hook = getattr(module, "_hf_hook", None)
    hooks = getattr(hook, "hooks", (hook,))  # accelerate's SequentialHook holds several
    return next((one for one in hooks if getattr(one, "offload", False)), None)


def require_values(model: nn.Module) -> None:
    """Raise ValueError if parameters have no values, now or when their module is called."""
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta and not is_offloaded(module):
                where = f"{name}.{key}" if name else key
                raise ValueError(
                    f"the model is on the meta device ({where!r} is), where nothing can be "
                    "measured: load its weights first"
                )


def require_here(name: str, tensors: Mapping[str, Tensor], action: str) -> None:
    """Raise ValueError unless the tensors of a LoRA layer are whole and have values here.

    name: of the layer. tensors: {key: tensor}. action: what needs them, such as "resize".
    """
    for key, tensor in tensors.items():
        where = f"{name}.{key}" if name else key
        if is_sharded(tensor):
            raise ValueError(
                f"{action} needs {where} whole, but it is a DTensor (FSDP2 or tensor parallelism): "
                f"{_how_to_have_whole(key)}"
            )
        if tensor.is_meta:
            raise ValueError(
                f"{action} needs the values of {where}, but it is on the meta device, or offloaded "
                "by accelerate: load the model onto devices that hold all of it"
            )


def _how_to_have_whole(key: str) -> str:
    if key.startswith("base."):
        return (
            "save the adapter (export_peft), load it into an unsharded copy of the model, and "
            "merge there"
        )
    return "shard the plain model first, then wrap(), which keeps adapters whole"
