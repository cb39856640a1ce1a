"""Linear layers of unpacked attention become packed attention again (unpack.py: the way there)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from ..checks import quoted_names
from ..packed import holds_packed_data
from ..placement import require_unsharded
from .attention import UnpackedAttention, copy_settings, share_hooks
from .modules import all_names, modules_by_name
from .names import joined, modules_in_wrappers
from .replaced import forget_replaced, note_replaced
from .targets import refuse_peft
from .unpack import (
    LATER,
    MOVED,
    parts_of,
    plain_layer,
    require_a_parent,
    switch_nested_tensors,
)
from .wrap import lora_layers, replace_modules, take_out

LAYERS = ("q", "k", "v", "out")


@torch.inference_mode(False)  # parameters made in inference mode could not train
def pack_attention(model: nn.Module) -> list[str]:
    """Put the modules back that `unpack_attention` replaced, with the weights that they have now.

    The modules and their parameters are the same objects as before, under their old names (but new
    parameters where they were on the meta device, and have been loaded by assignment). Merged
    layers keep W + ΔW and lose their adapters, as by `unwrap`. Make an optimizer that goes on
    training these weights after this call.

    Where q, k and v disagree about requires_grad, in_proj_weight gets back what it had before.

    Returns: the names of the modules that were packed.

    Raises:
        ValueError: an adapter of a linear layer is not merged, and would be lost; or q, k and v are
            not three plain linear layers of one dtype on one device any more. The model is left
            unchanged.
        TypeError: the model itself is the attention, so that it has no parent.

    >>> from minirank import merge, pack_attention, unpack_attention, wrap
    >>> model = nn.TransformerEncoderLayer(4, 2, 8)
    >>> unpacked = unpack_attention(model)
    >>> layers = wrap(model, {"self_attn.q": 1, "self_attn.v": 1})
    >>> merge(model), pack_attention(model)
    (['self_attn.q', 'self_attn.v'], ['self_attn'])
    >>> type(model.self_attn).__name__, type(model.self_attn.in_proj_weight).__name__
    ('MultiheadAttention', 'Parameter')
    """
    refuse_peft(model)
    require_unsharded(model)
    require_a_parent(model, UnpackedAttention)
    modules = modules_by_name(model)
    attentions = {
        name: module
        for name in all_names(model)
        if isinstance(module := modules[name], UnpackedAttention)
    }
    inside = {id(a._modules[key]) for a in attentions.values() for key in LAYERS}
    layers = {name: layer for name, layer in lora_layers(model).items() if id(layer) in inside}
    lost = [name for name, layer in layers.items() if not layer.merged and layer.rank]
    if lost:
        raise ValueError(
            f"the adapters of {quoted_names(lost)} are not merged, and would be lost: merge(model) "
            "first, to keep them in the weights. unwrap(model) now would drop them. (save_adapter "
            "keeps them in a file, for the unpacked model)"
        )
    fixed = modules_in_wrappers(model)
    for name, attention in attentions.items():
        _require_packable(name, attention, fixed)
    stacked = {name: _stacked(attention) for name, attention in attentions.items()}
    take_out(model, layers.values())
    replace_modules(model, {id(a): a.packed[0] for a in attentions.values()})
    holders = Counter(id(p) for module in model.modules() for p in module._parameters.values())
    shared = {key for key, count in holders.items() if count > 1}
    for name, attention in attentions.items():
        _give_back(attention, stacked[name], shared)
    switch_nested_tensors(model)
    return list(attentions)


def _require_packable(name: str, attention: UnpackedAttention, fixed: Collection[int]) -> None:
    if id(attention) in fixed:
        raise ValueError(
            f"{name!r} has a wrapper of its own (torch.compile?), which goes on calling it: pack "
            "the attention in the model that is not compiled"
        )
    for key in LAYERS:
        layer = plain_layer(attention, key)
        expected = {"weight", "bias"}
        if type(layer) is not nn.Linear or {*layer._parameters, *layer._buffers} != expected:
            raise ValueError(
                f"expected {joined(name, key)!r} to be a plain nn.Linear, got a "
                f"{type(layer).__name__}: its weight cannot be packed"
            )
    if any("forward" in vars(module) for module in attention.modules()):
        raise ValueError(f"{name!r} cannot be packed: {MOVED}, then pack")
    for key, parts in parts_of(attention).items():
        held = [layer._parameters[part] for layer, part in parts]
        tensors = [tensor for tensor in held if tensor is not None]
        plain = all(type(t.data) is Tensor and not holds_packed_data(t) for t in tensors)
        places = {(tensor.dtype, tensor.device) for tensor in tensors}
        expected_count = 0 if attention.packed[0]._parameters[key] is None else 3
        if key == "in_proj_weight":
            expected_count = 3
        if len(tensors) != expected_count or not plain or len(places) > 1:
            raise ValueError(
                f"{key} of {name!r} needs plain parameters of q, k and v, all with a bias or none, "
                "of one dtype and on one device, got "
                + ", ".join(f"{type(t.data).__name__} {t.dtype} {t.device}" for t in tensors)
            )


def _stacked(attention: UnpackedAttention) -> dict[str, tuple[Tensor, Tensor | None]]:
    """{name of a stacked parameter: (its values, its gradient)}"""
    result = {}
    for key, parts in parts_of(attention).items():
        if attention.packed[0]._parameters[key] is not None:
            held = [layer.get_parameter(part) for layer, part in parts]
            grads = [parameter.grad for parameter in held if parameter.grad is not None]
            grad = torch.cat(grads) if len(grads) == 3 else None
            result[key] = torch.cat([parameter.detach() for parameter in held]), grad
    return result


def _give_back(
    attention: UnpackedAttention,
    stacked: Mapping[str, tuple[Tensor, Tensor | None]],
    shared: Collection[int],
) -> None:
    """Put all that the attention has now into its packed module.

    stacked: of `_stacked`. shared: the ids of parameters that several modules hold.
    """
    (packed,) = attention.packed
    copy_settings(attention, packed)
    share_hooks(attention, packed)
    packed.out_proj.training = attention.out.training
    for key, (values, grad) in stacked.items():
        parameter = packed.get_parameter(key)
        parts = [layer.get_parameter(part) for layer, part in parts_of(attention)[key]]
        flags = {part.requires_grad for part in parts}
        if parameter.is_meta and not values.is_meta:  # torch cannot put the values into it
            parameter = nn.Parameter(values, requires_grad=parameter.requires_grad)
            packed._parameters[key] = parameter
        parameter.data = values
        parameter.grad = grad
        parameter.requires_grad = flags.pop() if len(flags) == 1 else parameter.requires_grad
        forget_replaced(parameter)
        for part in parts:
            note_replaced([(packed, key)], part, f"pack_attention() has put it in {key}: {LATER}")
    places: list[tuple[nn.Module, str, nn.Parameter | None]] = [
        (packed.out_proj, "weight", attention.out.get_parameter("weight")),
        (packed.out_proj, "bias", attention.out.bias),
        (packed, "bias_k", attention.bias_k),
        (packed, "bias_v", attention.bias_v),
    ]
    if packed.in_proj_weight is None:
        places += [
            (packed, f"{key}_proj_weight", plain_layer(attention, key).weight) for key in "qkv"
        ]
    for module, key, now in places:
        before = module._parameters.get(key)
        if before is None or now is None or before is now:
            continue
        if id(before) in shared or type(now.data) is not Tensor or before.is_meta != now.is_meta:
            module._parameters[key] = now
        else:
            before.data, before.grad = now.data, now.grad
            before.requires_grad = now.requires_grad
