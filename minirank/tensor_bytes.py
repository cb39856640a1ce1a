"""The entries of tensors as bytes, and what tells tensors apart."""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor


def tensor_bytes(tensor: Tensor) -> bytes:
    """The entries of a tensor of any device, in row-major order.

    Raises ValueError if the tensor's own memory does not hold its values (meta, sparse, DTensor).
    """
    is_wrapper = hasattr(type(tensor), "__tensor_flatten__")  # DTensor: its memory holds anything
    if tensor.is_meta or tensor.layout != torch.strided or is_wrapper:
        raise ValueError(
            f"a {type(tensor).__name__} on {tensor.device}, {tensor.layout}, where an ordinary "
            "tensor with values is expected: gather what is distributed, load what is on the meta "
            "device"
        )
    # torch.conj() and others give views whose memory holds another sign.
    plain = tensor.detach().cpu().contiguous().resolve_conj().resolve_neg()
    return ctypes.string_at(plain.data_ptr(), plain.nbytes)


def checksum(tensors: Mapping[str, Tensor], text: str = "") -> str:
    """SHA-256 of the text and of the tensors' names, types, shapes and entries, in any order."""
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()
