"""The safetensors format, and files that are written whole or not at all.

The file: the length of the header (8 bytes), the header (JSON: names, types, shapes, offsets, and
text under "__metadata__"), the entries of the tensors. It is written here by hand, since
safetensors.torch.save needs numpy.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, deserialize
from torch import Tensor

from ..tensor_bytes import tensor_bytes

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
LONGEST_HEADER = 100_000_000  # bytes; safetensors refuses to read a longer one


# ---- tensors as bytes ---------------------------------------------------------------------------


def safetensors_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The content of a safetensors file. Raises ValueError for what the format cannot hold."""
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    contents: list[bytes] = []
    end = 0
    for name in _aligned_order(tensors):
        tensor = tensors[name]
        _check_savable(name, tensor)
        contents.append(tensor_bytes(tensor))
        start, end = end, end + len(contents[-1])
        header[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > LONGEST_HEADER:
        raise ValueError(
            f"{len(text):,} bytes of names and metadata, a file holds {LONGEST_HEADER:,}: save "
            "fewer layers"
        )
    return b"".join([len(text).to_bytes(8, "little"), text, *contents])


def _aligned_order(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names, wider types first, so that every tensor starts at a multiple of its width."""
    return sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))


def _check_savable(name: str, tensor: Tensor) -> None:
    if name == "__metadata__":
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


# ---- reading ------------------------------------------------------------------------------------


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors on the CPU, metadata).

    Raises FileNotFoundError; ValueError if it is no whole safetensors file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {str(path)!r}")
    # All at once: when it is opened a second time, another file may stand there.
    content = path.read_bytes()
    try:
        entries = sorted(deserialize(content))  # type: ignore[no-untyped-call]
    except (SafetensorError, MemoryError, OverflowError) as error:
        raise ValueError(
            f"{str(path)!r} is not a whole safetensors file ({error}): it was cut off or damaged, "
            "or is something else"
        ) from error
    for name, entry in entries:
        if entry["dtype"] not in DTYPES.values():
            raise ValueError(
                f"{str(path)!r} holds {name!r} as {entry['dtype']}, expected one of "
                f"{', '.join(DTYPES.values())}"
            )
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    tensors = {name: _tensor_from_bytes(**entry) for name, entry in entries}
    return tensors, header.get("__metadata__") or {}


def _tensor_from_bytes(dtype: str, shape: list[int], data: bytearray) -> Tensor:
    torch_dtype = {code: key for key, code in DTYPES.items()}[dtype]
    if not data:  # frombuffer refuses an empty buffer
        return torch.empty(shape, dtype=torch_dtype, device="cpu")
    return torch.frombuffer(data, dtype=torch_dtype).reshape(shape)


# ---- writing ------------------------------------------------------------------------------------


@dataclass
class _Replacement:
    """One file on its way to its place."""

    target: Path
    part: Path  # the new content, beside the target; gone once it has replaced the target
    backup: Path | None = None  # a copy of what the target was


def write_files(files: Mapping[Path, bytes]) -> None:
    """Write all files or none, into folders that exist.

    A file appears under its name only when all of them are on the disk. So a crash or a full disk
    leaves the old files whole. If one file cannot be replaced, the others get their old content
    back.

    Raises OSError, with the path.
    """
    replacements: list[_Replacement] = []
    try:
        for path, content in files.items():
            target = _checked_target(path)
            part = target.with_name(f".{uuid.uuid4().hex}.part")
            replacements.append(_Replacement(target, part))
            _write_to_disk(part, content)
        _replace_all(replacements)
    finally:
        for replacement in replacements:
            replacement.part.unlink(missing_ok=True)
            if replacement.backup is not None:
                replacement.backup.unlink(missing_ok=True)


def _checked_target(path: Path) -> Path:
    """The file to replace: `path`, or what the link at `path` points to."""
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise IsADirectoryError(f"{str(path)!r} is a folder: expected the name of a file")
    if target.exists() and not target.is_file():  # replacing a pipe or a device would remove it
        raise FileExistsError(f"{str(path)!r} is no ordinary file: expected one, or a new name")
    if not target.parent.is_dir():
        raise FileNotFoundError(
            f"there is no folder {str(target.parent)!r} to write {target.name!r} in"
        )
    return target


def _write_to_disk(path: Path, content: bytes) -> None:
    with open(path, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _replace_all(replacements: list[_Replacement]) -> None:
    """Put every new file into its place; if one cannot be, put the old ones back."""
    for replacement in replacements[:-1]:  # after the last one, nothing is left that could fail
        if replacement.target.exists():
            replacement.backup = replacement.part.with_suffix(".old")
            shutil.copyfile(replacement.target, replacement.backup)
    try:
        for replacement in replacements:
            os.replace(replacement.part, replacement.target)
    except BaseException:
        if any(replacement.part.exists() for replacement in replacements):
            _put_back(replacements)
        raise


def _put_back(replacements: list[_Replacement]) -> None:
    for replacement in replacements:
        if replacement.part.exists():  # its target was not replaced
            continue
        if replacement.backup is not None:
            os.replace(replacement.backup, replacement.target)
        else:
            replacement.target.unlink(missing_ok=True)
