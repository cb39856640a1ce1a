"""Is this the base model that an adapter was trained beside?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .files import checksum

SAMPLES = 16


def fingerprint(module: nn.Module) -> dict[str, dict[str, Any]]:
    """{parameter: its dtype, the SHA-256 of its entries, 16 of them}, in types that JSON has."""
    return {
        name: {"dtype": _name(p.dtype), "sha256": checksum({"": p}), "entries": _entries(p).tolist()}
        for name, p in module.named_parameters()
    }


def same_base(module: nn.Module, known: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether the parameters of `module` are the ones that `fingerprint` saw: bit for bit in the same dtype, else by
    the 16 entries, as well as the coarser of the two types tells."""
    parameters = dict(module.named_parameters())
    return parameters.keys() == known.keys() and all(_same(p, known[name]) for name, p in parameters.items())


def _same(parameter: Tensor, known: Mapping[str, Any]) -> bool:
    if _name(parameter.dtype) == known["dtype"]:
        return bool(checksum({"": parameter}) == known["sha256"])
    other = getattr(torch, known["dtype"])
    if not (parameter.is_floating_point() and other.is_floating_point):
        return False
    coarse = max(torch.finfo(parameter.dtype), torch.finfo(other), key=lambda info: info.eps)
    entries, expected = _entries(parameter), torch.tensor(known["entries"], dtype=torch.float64)
    # The second tolerance is the spacing of numbers near zero.
    return torch.allclose(entries, expected, rtol=coarse.eps, atol=coarse.tiny * coarse.eps, equal_nan=True)


def _entries(parameter: Tensor) -> Tensor:
    """Up to 16 entries, evenly spread: float64, on the CPU."""
    flat = parameter.detach().reshape(-1)
    places = torch.linspace(0, max(len(flat) - 1, 0), min(SAMPLES, len(flat)), dtype=torch.float64).long()
    return flat[places.to(flat.device)].double().cpu()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
