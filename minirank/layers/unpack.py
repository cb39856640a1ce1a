"""Packed attention becomes linear layers, and packed attention again.

What is copied, and what is shared. nn.MultiheadAttention stacks three weights in in_proj_weight and
three biases in in_proj_bias. The linear layers q, k and v get copies of their rows, and the stacked
parameters are empty until they are packed again: two parameters in one memory would be refused as
tied by `merge` and by safetensors, and a stale one would be used without a word. All other
parameters are the same objects before, while and after: the weight and bias of out_proj, the
separate weights of attention with other key and value sizes, bias_k and bias_v.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..checks import quoted_names, warn_caller
from ..packed import holds_packed_data
from ..placement import is_sharded, require_unsharded
from .attention import STACKED, UnpackedAttention, copy_settings, is_packed_attention, share_hooks
from .lora import LoRALinear
from .merge import owners_of_storages, storage_key
from .names import joined, modules_in_wrappers, without_wrappers
from .replaced import forget_replaced, note_replaced
from .targets import (
    all_names,
    as_patterns,
    first_names,
    matching_modules,
    modules_by_name,
    refuse_peft,
)
from .wrap import lora_layers, replace_modules, take_out

PARAMETERS = {*STACKED, "q_proj_weight", "k_proj_weight", "v_proj_weight"}
LATER = "make the optimizer after that, from the parameters that require a gradient"
LAYERS = ("q", "k", "v", "out")

MOVED = (
    "its forward has been replaced (by accelerate, which offloads it or moves its inputs?): load "
    "the model onto one device"
)

# An attribute of an nn.TransformerEncoder that made nested tensors until it was unpacked.
NESTED_BEFORE = "used_nested_tensor_before_unpacking"


# ---- unpack -------------------------------------------------------------------------------------


@torch.inference_mode(False)  # parameters made in inference mode could not train
def unpack_attention(
    model: nn.Module, targets: str | Sequence[str] | None = None
) -> dict[str, UnpackedAttention]:
    """Give every nn.MultiheadAttention linear layers `q`, `k`, `v` and `out` that it calls.

    The function stays the same, with all options of nn.MultiheadAttention, and `linear_targets`,
    scores, `wrap`, `merge` and files see four linear layers more. Call it before `wrap` and before
    the optimizer is made: in_proj_weight and in_proj_bias are split into new parameters. Adapters
    that were trained here fit into models that are unpacked too, in PEFT as well. A state_dict has
    the names of the linear layers until `pack_attention`.

    The fast path of torch's transformer layers for inference is not taken. It puts zeros at padded
    positions of the outputs of an nn.TransformerEncoder; these are computed now, as they are in
    training mode.

    Requires_grad, dtype, device, mode and the hooks on the attention are kept, and a module in two
    places stays one. Hooks that rename entries of a state_dict rest until `pack_attention`.

    Args:
        model: holds the attention modules. They are replaced in place.
        targets: names or globs that each match at least one nn.MultiheadAttention; None: all.

    Returns: the new modules by name. Empty if all attention is unpacked already.

    Warns:
        UserWarning: a subclass of nn.MultiheadAttention is left as it is.

    Raises:
        ValueError: there is no such module; its stacked weights are tied, sharded or quantised; its
            forward is another library's (offloading); it holds more than torch's own, or is
            compiled by itself; its out_proj has an adapter. The model is left unchanged.
        TypeError: the model itself is the attention, so that it has no parent; or `targets` holds
            anything but names.

    >>> from minirank import linear_targets, pack_attention, unpack_attention
    >>> model = nn.TransformerEncoderLayer(4, 2, 8)
    >>> list(unpack_attention(model))
    ['self_attn']
    >>> list(linear_targets(model, "self_attn.*"))
    ['self_attn.q', 'self_attn.k', 'self_attn.v', 'self_attn.out']
    >>> pack_attention(model), model.self_attn.in_proj_weight.shape
    (['self_attn'], torch.Size([12, 4]))
    """
    refuse_peft(model)
    require_unsharded(model)
    _require_a_parent(model, nn.MultiheadAttention)
    attentions = _selected(model, targets)
    _require_unpackable(model, attentions)
    unpacked = {name: UnpackedAttention(packed) for name, packed in attentions.items()}
    for new in unpacked.values():
        (packed,) = new.packed
        for key, parts in _parts(new).items():
            stacked = packed._parameters[key]
            if stacked is not None:
                stacked.grad = None
                stacked.data = stacked.data.new_empty(0)
                note_replaced(parts, stacked, f"unpack_attention() has split {key}: {LATER}")
    replace_modules(model, {id(new.packed[0]): new for new in unpacked.values()})
    _switch_nested_tensors(model)
    return unpacked


def _parts(attention: UnpackedAttention) -> dict[str, list[tuple[nn.Module, str]]]:
    """{name of a stacked parameter: the (layer, name) of its parts}"""
    layers = [_plain(attention, key) for key in ("q", "k", "v")]
    return {key: [(layer, key.rpartition("_")[2]) for layer in layers] for key in STACKED}


def _plain(attention: UnpackedAttention, key: str) -> nn.Module:
    """One of the four linear layers, without its adapter."""
    layer = attention._modules[key]
    assert layer is not None
    return layer.base if isinstance(layer, LoRALinear) else layer


def _require_a_parent(model: nn.Module, kind: type[nn.Module]) -> None:
    itself = without_wrappers(model)
    if isinstance(itself, kind):
        raise TypeError(
            f"the model itself is the {type(itself).__name__}, so it has no parent to put another "
            "module into: give nn.ModuleList([model])"
        )


def _selected(
    model: nn.Module, targets: str | Sequence[str] | None
) -> dict[str, nn.MultiheadAttention]:
    """The nn.MultiheadAttention modules that the targets select, by first names, in order."""
    modules, first = modules_by_name(model), first_names(model)
    matched: set[str] = set()
    if targets is None:
        matched.update(modules)
    else:
        for pattern in as_patterns(targets, "targets"):
            found = matching_modules(model, pattern, "targets")
            if not _of_kind(found, (nn.MultiheadAttention, UnpackedAttention)):
                raise ValueError(_explain_no_attention(modules, pattern, found))
            matched |= found.keys()
    names = list(dict.fromkeys(first[name] for name in modules if name in matched))
    of_torch = {name: modules[name] for name in names if is_packed_attention(modules[name])}
    others = [name for name in _of_kind(modules, nn.MultiheadAttention) if name in names]
    others = [name for name in others if name not in of_torch]
    unpacked = _of_kind({name: modules[name] for name in names}, UnpackedAttention)
    if not of_torch and not unpacked:
        hint = f". {_of_subclasses(modules, others)}" if others else ""
        raise ValueError(
            f"expected at least one nn.MultiheadAttention to unpack, but {type(model).__name__} "
            f"has none{hint}"
        )
    if others:
        warn_caller(_of_subclasses(modules, others))
    return of_torch  # type: ignore[return-value]


def _of_kind(
    modules: Mapping[str, nn.Module], kind: type[nn.Module] | tuple[type[nn.Module], ...]
) -> list[str]:
    return [name for name, module in modules.items() if isinstance(module, kind)]


def _explain_no_attention(
    modules: Mapping[str, nn.Module], pattern: str, found: Iterable[str]
) -> str:
    inside = [
        name
        for name in _of_kind(modules, nn.MultiheadAttention)
        if any(name.startswith(f"{parent}.") for parent in found)
    ]
    hint = f": those inside it are {quoted_names(inside)}" if inside else ""
    return f"targets={pattern!r} matches no nn.MultiheadAttention{hint}"


def _of_subclasses(modules: Mapping[str, nn.Module], names: Sequence[str]) -> str:
    kinds = ", ".join(dict.fromkeys(type(modules[name]).__name__ for name in names))
    return (
        f"{quoted_names(names)} ({kinds}) is left as it is, since a subclass of "
        "nn.MultiheadAttention may compute something else. (fully_shard and parametrizations make "
        "subclasses: unpack first)"
    )


# ---- what cannot be unpacked --------------------------------------------------------------------


def _require_unpackable(model: nn.Module, attentions: Mapping[str, nn.MultiheadAttention]) -> None:
    """Raise ValueError, which names it, unless every one can be replaced without loss."""
    fixed = modules_in_wrappers(model)
    owners = owners_of_storages(model)
    for name, packed in attentions.items():
        reason = _why_not(packed, fixed)
        if reason is not None:
            raise ValueError(f"{name!r} cannot be unpacked: {reason}")
        for key in STACKED:
            stacked = packed._parameters[key]
            if stacked is not None:
                own = joined(name, key)
                _require_stacked(own, stacked)
                _require_no_tie(own, stacked, owners)


def _why_not(packed: nn.MultiheadAttention, fixed: Collection[int]) -> str | None:
    """Why another module in its place would lose something; None if it would not."""
    if id(packed) in fixed:
        return (
            "it has a wrapper of its own (torch.compile?), which goes on calling it: unpack the "
            "model first, then compile the attention or what holds it"
        )
    if any("forward" in vars(module) for module in packed.modules()):
        return f"{MOVED}, then unpack"
    out = packed._modules.get("out_proj")
    if isinstance(out, LoRALinear):
        return (
            "its out_proj has an adapter: unwrap() the model first (after merge(), to keep the "
            "adapter in the weight), and unpack before wrap()"
        )
    if out is None or type(out) not in (NonDynamicallyQuantizableLinear, nn.Linear):
        return f"its out_proj is a {type(out).__name__}, not torch's own"
    named = {*packed._parameters, *packed._buffers, *packed._modules}
    extra = named - PARAMETERS - {"out_proj", "bias_k", "bias_v"}
    extra |= {f"out_proj.{key}" for key in {*out._parameters, *out._buffers} - {"weight", "bias"}}
    if extra or not packed._parameters.keys() >= PARAMETERS:
        return (
            "it does not hold the parameters of torch's own, but "
            f"{quoted_names(sorted(extra or named), 6)} (weight_norm?): remove that first"
        )
    if any(map(is_sharded, packed.parameters())):
        return "its parameters are sharded (FSDP2 or tensor parallelism): unpack before sharding"
    return None


def _require_stacked(name: str, stacked: nn.Parameter) -> None:
    plain = type(stacked) is nn.Parameter and type(stacked.data) is Tensor
    if not plain or holds_packed_data(stacked) or not stacked.is_floating_point():
        raise ValueError(
            f"expected {name!r} to be a plain floating-point parameter, got {type(stacked.data)} "
            f"of {stacked.dtype}: unpack the model before it is quantised"
        )
    if stacked.is_inference():
        raise ValueError(
            f"{name!r} was made under torch.inference_mode(), and could not be packed again: make "
            "or load the model outside of it"
        )
    if len(stacked) == 0 or len(stacked) % 3:
        raise ValueError(
            f"expected {name!r} to hold three parts of one size, got shape {tuple(stacked.shape)}"
        )


def _require_no_tie(name: str, stacked: nn.Parameter, owners: Mapping[int, set[str]]) -> None:
    others = owners[storage_key(stacked)] - {name}
    if others:
        raise ValueError(
            f"{name!r} is tied to {quoted_names(sorted(others))}: its parts would be parameters of "
            "their own, and tied no more. Give each a parameter of its own, or leave both out of "
            "`targets`"
        )


# ---- pack ---------------------------------------------------------------------------------------


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
    _require_a_parent(model, UnpackedAttention)
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
            "first, to keep them in the weights, or unwrap(model), to drop them. (save_adapter "
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
    _switch_nested_tensors(model)
    return list(attentions)


def _require_packable(name: str, attention: UnpackedAttention, fixed: Collection[int]) -> None:
    if id(attention) in fixed:
        raise ValueError(
            f"{name!r} has a wrapper of its own (torch.compile?), which goes on calling it: pack "
            "the attention in the model that is not compiled"
        )
    for key in LAYERS:
        layer = _plain(attention, key)
        expected = {"weight", "bias"}
        if type(layer) is not nn.Linear or {*layer._parameters, *layer._buffers} != expected:
            raise ValueError(
                f"expected {joined(name, key)!r} to be a plain nn.Linear, got a "
                f"{type(layer).__name__}: its weight cannot be packed"
            )
    if any("forward" in vars(module) for module in attention.modules()):
        raise ValueError(f"{name!r} cannot be packed: {MOVED}, then pack")
    for key, parts in _parts(attention).items():
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
    for key, parts in _parts(attention).items():
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
        parts = [layer.get_parameter(part) for layer, part in _parts(attention)[key]]
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
        places += [(packed, f"{key}_proj_weight", _plain(attention, key).weight) for key in "qkv"]
    for module, key, now in places:
        before = module._parameters.get(key)
        if before is None or now is None or before is now:
            continue
        if id(before) in shared or type(now.data) is not Tensor or before.is_meta != now.is_meta:
            module._parameters[key] = now
        else:
            before.data, before.grad = now.data, now.grad
            before.requires_grad = now.requires_grad


# ---- both ---------------------------------------------------------------------------------------


def _switch_nested_tensors(model: nn.Module) -> None:
    """Keep nn.TransformerEncoder from nested tensors, which unpacked attention cannot take, while
    it holds any."""
    for encoder in model.modules():
        if not isinstance(encoder, nn.TransformerEncoder):
            continue
        unpacked = any(isinstance(module, UnpackedAttention) for module in encoder.modules())
        if unpacked and getattr(encoder, "use_nested_tensor", False):
            encoder.use_nested_tensor = False
            setattr(encoder, NESTED_BEFORE, True)
        elif not unpacked and hasattr(encoder, NESTED_BEFORE):
            encoder.use_nested_tensor = True
            delattr(encoder, NESTED_BEFORE)
