"""Is this the base model that an adapter was trained beside?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.experts import ExpertStack
from ..layers.linear import is_packed
from ..packed import dequantizes_itself, left_as_they_are, require_not_repacked
from ..placement import is_sharded
from ..tensor_bytes import checksum

SAMPLES = 16  # entries of each tensor, for comparison across types


def base_fingerprint(module: nn.Module) -> dict[str, dict[str, Any]]:
    """What tells a base module from another one, in types that JSON has.

    {name of a parameter or buffer: {"dtype", "sha256" of its entries, 16 of the "entries"}}. A
    packed module counts by what its state_dict holds: packed data, scales, and what else it needs.
    A sharded module (FSDP2) is gathered, so that all processes have to call this.
    """
    return {
        name: {
            "dtype": _dtype_name(tensor.dtype),
            "sha256": checksum({"": tensor}),
            "entries": _sampled_entries(tensor).tolist(),
        }
        for name, tensor in _all_tensors(module).items()
    }


def same_base(module: nn.Module, fingerprint: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether `module` has the parameters and buffers whose `base_fingerprint` is given.

    In the same type they must be equal bit for bit. In another floating-point type the sampled
    entries are compared, as closely as the coarser of the two types allows.
    """
    tensors = _all_tensors(module)
    return tensors.keys() == fingerprint.keys() and all(
        _same_tensor(tensor, fingerprint[name]) for name, tensor in tensors.items()
    )


def _all_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters, and buffers, which may be masks or frozen weights."""
    if is_packed(module):
        require_not_repacked(module)
        with left_as_they_are([module]):  # bitsandbytes changes a layer that it saves
            state = module.state_dict()
        return plain_tensors({key: v for key, v in state.items() if isinstance(v, Tensor)})
    if isinstance(module, ExpertStack):  # the same numbers the other way round are another base
        return {"transposed weight" if module.transposed else "weight": module.weight}
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {name: _gathered(tensor) for name, tensor in tensors.items()}


def _gathered(tensor: Any) -> Tensor:
    """The whole of a DTensor; any other tensor as it is."""
    whole: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor
    return whole


def is_base_sharded(module: nn.Module) -> bool:
    """Whether processes hold the module in parts.

    >>> is_base_sharded(nn.Linear(2, 2))
    False
    """
    return any(map(is_sharded, module.parameters()))


def plain_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, where one that holds others (quantised data and scales) is replaced by
    them.

    >>> list(plain_tensors({"weight": torch.zeros(2)}))
    ['weight']
    """
    plain: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if dequantizes_itself(tensor) and hasattr(tensor, "__tensor_flatten__"):
            keys, _ = tensor.__tensor_flatten__()
            inner = {f"{name}.{key}": getattr(tensor, key) for key in keys}
            plain |= plain_tensors(inner)
        else:
            plain[name] = tensor
    return plain


def _same_tensor(tensor: Tensor, fingerprint: Mapping[str, Any]) -> bool:
    if _dtype_name(tensor.dtype) == fingerprint["dtype"]:
        return bool(checksum({"": tensor}) == fingerprint["sha256"])
    saved_dtype = getattr(torch, fingerprint["dtype"])
    if not (tensor.is_floating_point() and saved_dtype.is_floating_point):
        return False
    precisions = torch.finfo(tensor.dtype), torch.finfo(saved_dtype)
    coarser = max(precisions, key=lambda precision: precision.eps)
    saved_entries = torch.tensor(fingerprint["entries"], dtype=torch.float64, device="cpu")
    return torch.allclose(
        _sampled_entries(tensor),
        saved_entries,
        rtol=coarser.eps,
        atol=coarser.tiny * coarser.eps,  # the spacing of numbers near zero
        equal_nan=True,
    )


def _sampled_entries(tensor: Tensor) -> Tensor:
    """Up to 16 entries, evenly spread: float64, on the CPU."""
    flat = tensor.detach().reshape(-1)
    count, last = min(SAMPLES, len(flat)), max(len(flat) - 1, 0)
    indices = torch.linspace(0, last, count, dtype=torch.float64, device="cpu").long()
    return flat[indices.to(flat.device)].double().cpu()


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
