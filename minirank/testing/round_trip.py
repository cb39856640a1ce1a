"""Adapters through one file and back: what a format for LoRA adapters must keep."""

from __future__ import annotations

import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import load, save_file

TENSORS = ("A", "B", "gate")


def round_trip(
    layers: Mapping[str, Mapping[str, Any]], path: str | PathLike[str]
) -> dict[str, dict[str, Any]]:
    """Write `layers` to one safetensors file, and return what the file holds, bit for bit.

    Args:
        layers: {name: dict(A (r, d_in), B (d_out, r), gate (r,) or None, scaling)}.
        path: of the file.

    >>> import tempfile, torch
    >>> layer = {"A": torch.ones(1, 3), "B": torch.ones(2, 1), "gate": None, "scaling": 0.1}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     found = round_trip({"enc.fc": layer}, f"{folder}/adapter.safetensors")
    >>> found["enc.fc"]["A"], found["enc.fc"]["gate"], found["enc.fc"]["scaling"]
    (tensor([[1., 1., 1.]]), None, 0.1)
    """
    tensors = {
        f"{name}.{key}": layer[key].detach().contiguous().clone()
        for name, layer in layers.items()
        for key in TENSORS
        if layer[key] is not None
    }
    scalings = {name: layer["scaling"] for name, layer in layers.items()}
    save_file(tensors, path, {"scalings": json.dumps(scalings)})
    read = load(Path(path).read_bytes())
    with safetensors.safe_open(path, "pt") as file:
        scalings = json.loads(file.metadata()["scalings"])
    return {
        name: {key: read.get(f"{name}.{key}") for key in TENSORS} | {"scaling": scaling}
        for name, scaling in scalings.items()
    }
