"""Stacks of experts in a PEFT folder: what PEFT's target_parameters are, and how it names them.

PEFT puts a wrapper around the module that holds the parameter. For a second parameter of that
module it puts another one around the first, so that the names of the tensors depend on which
parameters have adapters: the one that the module lists last is outermost.

    ….experts.lora_A.weight             (experts · r, d_in)  of the last one, down_proj
    ….experts.lora_B.weight             (d_out, r · experts)
    ….experts.base_layer.lora_A.weight  …                    of the one before, gate_up_proj

In lora_A the ranks of one expert are neighbours, in lora_B the experts of one rank. Compared with
PEFT 0.21.2: it computes the same function from these files. It warns that patterns of stacks were
ignored, which is not so. Whether an expert is (d_out, d_in) it reads from the module's attribute
`is_transposed`, as this package does: where it had to be set here, set it there too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from ..checks import quoted_names
from ..layers.experts import LoRAExperts
from ..layers.lora import LoRALinear
from ..layers.targets import expert_stacks, modules_by_name
from .peft_folder import PREFIX


def stacks_among(layers: Mapping[str, LoRALinear]) -> list[str]:
    """The names of those layers that are stacks of experts."""
    return [name for name, layer in layers.items() if isinstance(layer, LoRAExperts)]


def stack_tensors(
    model: nn.Module, name: str, stacks: Sequence[str], A: Tensor, B: Tensor
) -> dict[str, Tensor]:
    """PEFT's tensors of one stack, by their names in the file.

    Args:
        name: of the stack.
        stacks: the names of all stacks in the file.
        A: (experts, r, d_in).
        B: (experts, d_out, r).
    """
    holder, _, key = name.rpartition(".")
    listed = list(modules_by_name(model)[holder]._parameters)
    later = [other for other in listed[listed.index(key) + 1 :] if f"{holder}.{other}" in stacks]
    wrapper = PREFIX + holder + ".base_layer" * len(later)
    return {
        f"{wrapper}.lora_A.weight": A.flatten(0, 1),
        f"{wrapper}.lora_B.weight": B.permute(1, 2, 0).flatten(1),
    }


def require_stacks_as_in_peft(model: nn.Module, layers: Mapping[str, LoRALinear]) -> None:
    """Raise ValueError, which names it, for a stack that PEFT would adapt otherwise, or not at all.

    layers: all those that are exported.
    """
    stacks = stacks_among(layers)
    dropped = [name for name, layer in layers.items() if layer.dropout]
    if stacks and dropped:
        raise ValueError(
            f"{quoted_names(dropped)} have adapter dropout, beside which PEFT adapts no stack of "
            f"experts ({quoted_names(stacks)}): set their .dropout to 0, or export them apart"
        )
    for name in stacks:
        layer = layers[name]
        assert isinstance(layer, LoRAExperts)
        if "." not in name:
            raise ValueError(
                f"{name!r} is a parameter of the model itself, which PEFT does not adapt: export a "
                "model that holds it in a module"
            )
        if layer.base.experts == 1:
            raise ValueError(
                f"{name!r} is a stack of one expert, which PEFT takes for something else: resize "
                "it to 0, or merge(model) and save the plain model"
            )
        longer = [other for other in expert_stacks(model) if other.endswith(f".{name}")]
        if longer:
            raise ValueError(
                f"{name!r} is the end of {quoted_names(longer)} too, which PEFT would adapt as "
                "well: resize it to 0, or give the longer one an adapter"
            )
