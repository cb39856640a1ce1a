"""Is this the base model that an adapter was trained beside?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .safetensors_file import checksum

SAMPLES = 16


def fingerprint(module: nn.Module) -> dict[str, dict[str, Any]]:
    """{parameter or buffer: its dtype, the SHA-256 of its entries, 16 of them}, in types that JSON has."""
    return {
        name: {
            "dtype": _name(tensor.dtype),
            "sha256": checksum({"": tensor}),
            "entries": _entries(tensor).tolist(),
        }
        for name, tensor in _tensors(module).items()
    }


def same_base(module: nn.Module, known: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether the parameters and buffers of `module` are the ones that `fingerprint` saw: bit for bit in the same type,
    else by the 16 entries, as well as the coarser of the two types tells."""
    tensors = _tensors(module)
    return tensors.keys() == known.keys() and all(
        _same(tensor, known[name]) for name, tensor in tensors.items()
    )


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """What its function depends on: masks and frozen weights may be buffers."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _same(tensor: Tensor, known: Mapping[str, Any]) -> bool:
    if _name(tensor.dtype) == known["dtype"]:
        return bool(checksum({"": tensor}) == known["sha256"])
    other = getattr(torch, known["dtype"])
    if not (tensor.is_floating_point() and other.is_floating_point):
        return False
    coarse = max(torch.finfo(tensor.dtype), torch.finfo(other), key=lambda info: info.eps)
    entries, expected = (
        _entries(tensor),
        torch.tensor(known["entries"], dtype=torch.float64, device="cpu"),
    )
    # The second tolerance is the spacing of numbers near zero.
    return torch.allclose(
        entries, expected, rtol=coarse.eps, atol=coarse.tiny * coarse.eps, equal_nan=True
    )


def _entries(tensor: Tensor) -> Tensor:
    """Up to 16 entries, evenly spread: float64, on the CPU."""
    flat = tensor.detach().reshape(-1)
    count = min(SAMPLES, len(flat))
    places = torch.linspace(
        0, max(len(flat) - 1, 0), count, dtype=torch.float64, device="cpu"
    ).long()
    return flat[places.to(flat.device)].double().cpu()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
