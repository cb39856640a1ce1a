"""Files on disk: safetensors, written whole or not at all, and read with errors that say what is wrong."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, deserialize
from torch import Tensor

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
LONGEST_HEADER = 100_000_000  # bytes; safetensors reads no longer one


def tensor_bytes(tensor: Tensor) -> bytes:
    """The entries of `tensor`, of any device, in row-major order. Raises ValueError if they are not in its memory: one
    that wraps others (DTensor) would give what happens to lie there."""
    if (
        tensor.is_meta
        or tensor.layout != torch.strided
        or hasattr(type(tensor), "__tensor_flatten__")
    ):
        raise ValueError(
            f"a {type(tensor).__name__} on {tensor.device}, {tensor.layout}, where an ordinary tensor with values is "
            "expected: gather what is distributed, load what is on the meta device"
        )
    whole = (
        tensor.detach().cpu().contiguous().resolve_conj().resolve_neg()
    )  # as torch.conj() may leave them
    return ctypes.string_at(whole.data_ptr(), whole.nbytes)


def checksum(tensors: Mapping[str, Tensor], text: str = "") -> str:
    """SHA-256 of the text and of names, types, shapes and entries of the tensors, whatever their order."""
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def safetensors_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file: the length of its header in 8 bytes, the header in JSON, the tensors' entries.

    By hand, since safetensors.torch.save needs numpy. Wider types come first, so that every tensor is aligned.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    content: list[bytes] = []
    end = 0
    for name, tensor in sorted(
        tensors.items(), key=lambda item: (-item[1].element_size(), item[0])
    ):
        if name in header:
            raise ValueError(
                f"{name!r} is what safetensors calls its metadata, no name for a tensor: rename it"
            )
        if tensor.dtype not in DTYPES:
            raise ValueError(
                f"{name!r} is {tensor.dtype}, which cannot be saved: expected one of {list(DTYPES)}"
            )
        if tensor.is_meta:
            raise ValueError(
                f"{name!r} is on the meta device and has no values to save: load the model's weights"
            )
        content.append(tensor_bytes(tensor))
        start, end = end, end + len(content[-1])
        header[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > LONGEST_HEADER:
        raise ValueError(
            f"{len(text):,} bytes of names and metadata, a file holds {LONGEST_HEADER:,}: save fewer layers"
        )
    return b"".join([len(text).to_bytes(8, "little"), text, *content])


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors on the CPU, metadata). Raises FileNotFoundError; ValueError if it is no whole safetensors file."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {str(path)!r}")
    content = path.read_bytes()  # at once: by the next look, another file may be there
    try:
        entries = sorted(deserialize(content))  # type: ignore[no-untyped-call]
    except (SafetensorError, MemoryError, OverflowError) as error:
        raise ValueError(
            f"{str(path)!r} is not a whole safetensors file ({error}): it was cut off or damaged, or is something else"
        ) from error
    for name, entry in entries:
        if entry["dtype"] not in DTYPES.values():
            expected = ", ".join(DTYPES.values())
            raise ValueError(
                f"{str(path)!r} holds {name!r} as {entry['dtype']}, expected one of {expected}"
            )
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return {name: _tensor(**entry) for name, entry in entries}, header.get("__metadata__") or {}


def _tensor(dtype: str, shape: list[int], data: bytearray) -> Tensor:
    known = {code: of for of, code in DTYPES.items()}[dtype]
    if not data:  # which frombuffer refuses
        return torch.empty(shape, dtype=known, device="cpu")
    return torch.frombuffer(data, dtype=known).reshape(shape)


def write_files(files: Mapping[Path, bytes]) -> None:
    """Write all of them, in their folders, which must exist. Each appears under its name when all are on the disk, so
    that a crash or a full disk leaves the old ones whole; if one cannot, the others' old ones are put back."""
    parts: dict[Path, Path] = {}  # what is being written: what it will replace
    old: dict[Path, Path] = {}  # the same: a copy of what it replaces
    try:
        for path, content in files.items():
            target = Path(os.path.realpath(path))  # of a link: the file it points to
            if target.is_dir():
                raise IsADirectoryError(f"{str(path)!r} is a folder: expected the name of a file")
            if target.exists() and not target.is_file():  # a pipe or a device, which would be gone
                raise FileExistsError(
                    f"{str(path)!r} is no ordinary file: expected one, or a new name"
                )
            if not target.parent.is_dir():
                raise FileNotFoundError(
                    f"there is no folder {str(target.parent)!r} to write {target.name!r} in"
                )
            part = target.with_name(f".{uuid.uuid4().hex}.part")
            parts[part] = target
            with open(part, "xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for part, target in list(parts.items())[:-1]:
            if target.exists():
                old[part] = part.with_suffix(".old")
                shutil.copyfile(target, old[part])
        for part, target in parts.items():
            os.replace(part, target)
    except BaseException:
        if any(part.exists() for part in parts):
            for part, copy in old.items():
                if not part.exists():
                    os.replace(copy, parts[part])
        raise
    finally:
        for path in [*parts, *old.values()]:
            path.unlink(missing_ok=True)
