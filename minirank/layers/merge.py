"""W + ΔW goes into a layer's weight, and W comes back bit for bit.

A merged model costs what the base model costs. W itself is set aside, not computed back by
subtraction, so any number of merges leaves no rounding error behind.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..packed import dequantized_weight, dequantizes_itself
from ..placement import fsdp2_modules, require_here, require_unsharded
from .linear import applies_weight, is_packed, linear_shape
from .names import each_once, joined, named_modules

Layer = TypeVar("Layer", bound="Mergeable")


class Mergeable(nn.Module):
    """The half of a LoRA layer that merging owns.

    A subclass has `base`, a module with a `weight`, and `merged_weight()`, which gives W + ΔW.
    A merged layer refuses to save or load a state, and W follows the model's dtype and device.
    """

    base: nn.Module
    is_read = False  # whether others read the weight, and nobody calls the base

    def __init__(self) -> None:
        super().__init__()
        # W itself while `base` holds W + ΔW. A tuple, so that nn.Module does not register it.
        self.weight_set_aside: tuple[nn.Parameter] | None = None

    @property
    def merged(self) -> bool:
        """Whether the base holds W + ΔW now."""
        return self.weight_set_aside is not None

    @property
    def base_weight(self) -> Tensor:
        """The weight that the base holds now: W, or W + ΔW if merged. A packed W is dequantised.

        Raises ValueError: W is packed, and the base does not say how to dequantise it.
        """
        if is_packed(self.base):
            shape = linear_shape(self.base)
            assert shape is not None  # it is packed
            return dequantized_weight(self.base, shape)
        weight: Tensor = self.base.weight  # type: ignore[assignment]  # a linear-like module
        return weight

    def merged_weight(self) -> Tensor:
        raise NotImplementedError

    def _apply(self: Layer, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Layer:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.weight_set_aside is not None:  # it follows .to(), .half(), … like the others
            self.weight_set_aside[0].data = fn(self.weight_set_aside[0].data)
        return self

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        if self.merged:
            raise RuntimeError(
                "expected an unmerged layer: a merged layer's state would hold ΔW twice, in the "
                "weight and in A and B. unmerge() the model first, or unwrap() it to save a plain "
                "model with ΔW in its weights"
            )
        super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        if self.merged:
            raise RuntimeError(
                "expected an unmerged layer: unmerge() would undo what is loaded into a merged "
                "layer. unmerge() the model first"
            )
        super()._load_from_state_dict(*args, **kwargs)


@torch.inference_mode(False)  # parameters made in inference mode could not train
def merge(model: nn.Module, *, untie: bool = False) -> list[str]:
    """Put W + ΔW into the weight of every LoRA layer that is not merged yet.

    The sum is computed in float32 or better and rounded once, to W's dtype. A merged layer does
    not train, and its state_dict is refused, until `unmerge` or `unwrap`.

    W is set aside, so merging takes new memory of W's size. A hook of yours on the base, which
    changes its input or output, is no part of W: then the merged model computes something else.

    Args:
        model: holds LoRA layers, or is one.
        untie: merge weights that are tied to another module, too. The other module keeps W, so
            the two differ from then on. (transformers may tie them again when it loads the model:
            set its config.tie_word_embeddings to False.)

    Returns: the names of the layers merged now.

    Raises:
        ValueError: a tied weight without `untie`; W + ΔW is not finite; the weight is packed, or
            sharded (FSDP, ZeRO-3), or offloaded; or the base does not compute W x + b from a
            parameter `weight`. The model is left unchanged.

    >>> import torch
    >>> from minirank import merge, unmerge, wrap
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2))
    >>> layer = wrap(model, {"0": 1})["0"]
    >>> W, _ = layer.base.weight.clone(), torch.nn.init.ones_(layer.lora_B)
    >>> merge(model)
    ['0']
    >>> torch.allclose(layer.base.weight, W + layer.delta_weight())
    True
    >>> unmerge(model), torch.equal(layer.base.weight, W)
    (['0'], True)
    """
    layers = {name: layer for name, layer in _layers(model).items() if not layer.merged}
    require_unsharded(model)
    for name, layer in layers.items():
        require_here(name, dict(layer.named_parameters()), "merge")
    _require_no_fsdp2(model, layers)
    owners = {} if untie else owners_of_storages(model)
    weights = {}
    for name, layer in layers.items():
        _require_plain_weight(name, layer)
        _require_no_tie(name, layer, owners)
        weights[name] = _finite_merged_weight(name, layer)
    for name, layer in layers.items():
        weight = layer.base_weight
        assert isinstance(weight, nn.Parameter)  # _require_plain_weight() has seen it
        layer.weight_set_aside = (weight,)
        layer.base.weight = nn.Parameter(weights[name], requires_grad=False)
    return list(layers)


def unmerge(model: nn.Module) -> list[str]:
    """Put the original weights back, bit for bit, and tied again where they were tied.

    Args:
        model: holds LoRA layers, or is one.

    Returns: the names of the layers that were merged.

    >>> from torch import nn
    >>> from minirank import merge, unmerge, wrap
    >>> model = nn.Sequential(nn.Linear(3, 2))
    >>> layers = wrap(model, {"0": 1})
    >>> merge(model), unmerge(model), unmerge(model)
    (['0'], ['0'], [])
    """
    layers = {name: layer for name, layer in _layers(model).items() if layer.merged}
    for layer in layers.values():
        assert layer.weight_set_aside is not None  # it is merged
        layer.base.weight = layer.weight_set_aside[0]
        layer.weight_set_aside = None
    return list(layers)


def _layers(model: nn.Module) -> dict[str, Mergeable]:
    modules = each_once(named_modules(model))
    return {name: module for name, module in modules.items() if isinstance(module, Mergeable)}


def _require_no_fsdp2(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    managed = {part for module in fsdp2_modules(model) for part in module.modules()}
    for name, layer in layers.items():
        if not managed.isdisjoint(layer.modules()):
            raise ValueError(
                f"the weight of {name!r} is managed by FSDP2, which would put its shards back in "
                "the place of W + ΔW: save the adapter (export_peft), load it into an unsharded "
                "copy of the model, and merge there"
            )


def _require_plain_weight(name: str, layer: Mergeable) -> None:
    base = layer.base
    if is_packed(base):
        raise ValueError(
            f"the weight of {name!r} is packed (a quantised {type(base).__name__}) and cannot take "
            "W + ΔW without loss: keep the adapter unmerged. Or save_adapter(model, path), then "
            "load_adapter(plain, path, other_base=True) into the model that is not quantised, and "
            "merge there"
        )
    if base._parameters.get("weight") is None:
        raise ValueError(
            f"expected the weight of {name!r} to be a parameter, but it is computed (by a "
            "parametrization?) and cannot take W + ΔW: keep the adapter unmerged, or remove the "
            "parametrization first"
        )
    if not layer.is_read and not applies_weight(base):
        raise ValueError(
            f"{name!r} is a {type(base).__name__} that does not compute W x + b from its weight: "
            "merging would change its function. Keep the adapter unmerged"
        )


def _require_no_tie(name: str, layer: Mergeable, owners: Mapping[int, set[str]]) -> None:
    own_name = f"{name}.base.weight" if name else "base.weight"
    others = owners.get(storage_key(layer.base_weight), set()) - {own_name}
    if others:
        raise ValueError(
            f"the weight of {name!r} is tied to {', '.join(sorted(others))}, which would not get "
            "ΔW: merge(model, untie=True) accepts that the two differ from then on. Or keep the "
            "adapter unmerged"
        )


def owners_of_storages(model: nn.Module) -> dict[int, set[str]]:
    """{storage_key of a tensor: names of the parameters and buffers in that storage}

    >>> model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    >>> model[1].weight = model[0].weight
    >>> sorted(owners_of_storages(model)[storage_key(model[0].weight)])
    ['0.weight', '1.weight']
    """
    owners: dict[int, set[str]] = {}
    for module_name, module in each_once(named_modules(model)).items():
        for key, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None:
                owners.setdefault(storage_key(tensor), set()).add(joined(module_name, key))
    return owners


def storage_key(tensor: Tensor) -> int:
    """A number that names the tensor's storage or, if its values are not there, itself."""
    return tensor.untyped_storage().data_ptr() if _has_storage(tensor) else -id(tensor)


def _has_storage(tensor: Tensor) -> bool:
    if is_lazy(tensor) or tensor.is_meta or tensor.layout != torch.strided:
        return False
    if dequantizes_itself(tensor):  # its storage is elsewhere
        return False
    return tensor.numel() > 0


def _finite_merged_weight(name: str, layer: Mergeable) -> Tensor:
    with torch.no_grad():
        weight = layer.merged_weight()
        if not _is_finite(weight):
            raise ValueError(
                f"W + ΔW of {name!r} is not finite in {weight.dtype}: was the adapter's training "
                "stable?"
            )
    return weight


def _is_finite(weight: Tensor) -> bool:
    """Whether all entries are finite. Their sum tells it quickly, unless the sum itself overflows.

    >>> _is_finite(torch.full((2,), 6e4, dtype=torch.float16)), _is_finite(torch.tensor(torch.inf))
    (True, False)
    """
    return bool(weight.sum().isfinite()) or bool(torch.stack(weight.aminmax()).isfinite().all())
