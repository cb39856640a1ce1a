"""What export and import share: the names in a PEFT folder, and places that PEFT does not adapt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..checks import quoted_names
from ..layers.experts import LoRAExperts
from ..layers.lora import LoRALinear
from ..layers.targets import all_names, first_names, modules_by_name

CONFIG_FILE = "adapter_config.json"
TENSORS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."  # of every tensor's name


def check_places(model: nn.Module, names: Iterable[str]) -> None:
    """Raise ValueError for a module whose adapter PEFT would ignore, or apply in one of its places.

    Args:
        model: plain or with LoRA layers.
        names: of the modules with an adapter.
    """
    modules, aliases, first = modules_by_name(model), all_names(model), first_names(model)
    parents = {id(module): module for module in modules.values()}.values()
    places = Counter(id(child) for parent in parents for child in parent._modules.values())
    for name in names:
        module = modules[name]
        if isinstance(module, LoRAExperts):  # PEFT wraps the module that holds the stack
            name = name.rpartition(".")[0]
            module = modules[name]
        if places[id(module)] > 1:
            same = aliases[first[name]]
            raise ValueError(
                f"{quoted_names(same)} are one module, of which PEFT adapts {same[0]!r} only, "
                "minirank all places"
            )
        base = module.base if isinstance(module, LoRALinear) else module
        if isinstance(base, NonDynamicallyQuantizableLinear):
            raise ValueError(
                f"{name!r}: nn.MultiheadAttention reads its weight without calling it, so that "
                "PEFT's adapter has no effect there: leave it out (resize it to 0), or "
                "unpack_attention(model) before wrap(), and in PEFT likewise"
            )
