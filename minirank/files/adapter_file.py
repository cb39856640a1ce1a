"""One adapter in one safetensors file: save_adapter, load_adapter.

The file holds A, B and gates under `<module>.lora_A`, …, as they are, and in its metadata (key "minirank", JSON) the
rest of what makes the function: scaling, start values of gates, dropout; a fingerprint of the base weights beside each
adapter; what chose the ranks; and a checksum of all tensors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..allocators.allocation import Allocation
from ..allocators.table import draw_table
from ..checks import quoted_names
from ..layers.lora import RANK_DIM, LoRALinear
from ..layers.targets import first_names, matching_modules, modules_by_name
from ..layers.wrap import insert_layers
from .base_fingerprint import fingerprint, same_base
from .safetensors_file import (
    checksum,
    read_safetensors,
    safetensors_bytes,
    tensor_bytes,
    write_files,
)
from .saved_layer import SavedLayer, match_modules, savable_layers, warn_of_losses

FORMAT = 1  # of the metadata; a reader refuses a higher one
FIELDS = (
    "rank",
    "shape",
    "alpha",
    "reference_rank",
    "scaling",
    "gate",
    "dropout",
    "enabled",
    "base",
)


@dataclass(frozen=True, repr=False)
class SavedAdapter:
    """What a file holds; prints as a table of ranks."""

    layers: Mapping[str, SavedLayer]
    others: Mapping[
        str, Tensor
    ]  # parameters and buffers of other modules, by their names in the plain model
    method: str = ""  # which chose the ranks, for this budget
    budget: int | None = None
    unit: str = "rank"

    @property
    def ranks(self) -> dict[str, int]:
        return {name: layer.rank for name, layer in self.layers.items()}

    def __str__(self) -> str:
        unit = "ranks" if self.unit == "rank" else self.unit
        budget = "" if self.budget is None else f" (budget {self.budget:,} {unit})"
        total = f"{self.method or 'adapter'}: {sum(self.ranks.values()):,} ranks{budget}"
        besides = f"\nbesides: {', '.join(self.others)}" if self.others else ""
        return f"{total}\n{draw_table(self.ranks)}{besides}"

    __repr__ = __str__


def save_adapter(
    model: nn.Module,
    path: str | PathLike[str],
    *,
    allocation: Allocation | None = None,
    modules: str | Sequence[str] = (),
) -> None:
    """Write the LoRA layers of `model` to one safetensors file, bit for bit, the old file being replaced at once.

    Args:
        path: of the file, in an existing folder.
        allocation: where the ranks came from; its method, budget and unit are written down.
        modules: names or globs of other modules whose parameters and buffers go into the file: a head that was trained.

    Warns (UserWarning) of parameters that require a gradient and are not in the file: if they trained, they are lost.

    Raises ValueError: no LoRA layer, one that is merged or not finite, ranks that are not the allocation's, a name
    that matches nothing. OSError: from the file system. The old file is still there then.
    """
    layers = savable_layers(model)
    others = _others(model, [modules] if isinstance(modules, str) else modules)
    saved = {name: SavedLayer.of(layer, fingerprint(layer.base)) for name, layer in layers.items()}
    for name, one in saved.items():
        one.check(name)
    if allocation is not None:
        given = {
            first_names(model).get(name, name): rank
            for name, rank in allocation.ranks.items()
            if rank > 0
        }
        if given != {name: layer.rank for name, layer in layers.items() if layer.rank}:
            raise ValueError(
                "the model's ranks are not those of the allocation: leave it out, or pass "
                "dataclasses.replace(allocation, ranks=…) with the ranks that the layers have now"
            )
    warn_of_losses(model, others)
    tensors = {
        f"{name}.{key}": value for name, one in saved.items() for key, value in one.tensors.items()
    } | others
    record = {
        "format": FORMAT,
        "method": allocation.method if allocation else "",
        "budget": allocation.budget if allocation else None,
        "unit": allocation.unit if allocation else "rank",
        "layers": {name: {key: getattr(one, key) for key in FIELDS} for name, one in saved.items()},
        "others": list(others),
    }
    text = json.dumps(record)
    metadata = {"minirank": text, "checksum": checksum(tensors, text)}
    write_files({Path(path): safetensors_bytes(tensors, metadata)})


@torch.inference_mode(False)  # parameters made in inference mode could not train
def load_adapter(
    model: nn.Module,
    path: str | PathLike[str],
    *,
    other_base: bool = False,
    trainable: str | Sequence[str] | None = None,
) -> dict[str, LoRALinear]:
    """Wrap the plain `model` with the layers of a file that `save_adapter` wrote, on the devices of its modules. They
    are as they were when saved, bit for bit, and can be trained, resized and merged.

    Args:
        other_base: accept other base weights than those the adapter was trained beside. A model in another
            floating-point type is no other base: it is compared as far as the coarser type tells.
        trainable: as in `wrap`.

    Returns: the layers by name. Modules that the file holds besides get its values, in their own dtype.

    Raises FileNotFoundError; ValueError: a file that is cut off, damaged, foreign, or of a newer format; modules that
    the model lacks, has with other shapes, or that have an adapter already; other base weights (or buffers beside
    them); values that the model's types cannot hold. Nothing has changed then.
    """
    adapter = read_adapter(path)
    modules = modules_by_name(model)
    names = match_modules(model, {name: layer.shape for name, layer in adapter.layers.items()})
    changed = [
        name
        for name, layer in adapter.layers.items()
        if layer.base is not None and not same_base(modules[name], layer.base)
    ]
    if changed and not other_base:
        raise ValueError(
            f"{quoted_names(changed)}: not the base weights that the adapter was trained beside. Load that model, or pass "
            "other_base=True if this one is meant"
        )
    others = _places(model, adapter.others)
    before = [place.detach().clone() for place, _ in others]
    copied: list[Tensor] = []
    try:
        for place, value in others:
            _copy(place, value)
            copied.append(place)
        return insert_layers(
            model, {first: adapter.layers[name].around for name, first in names.items()}, trainable
        )
    except BaseException:
        for place, value in zip(copied, before, strict=False):
            _copy(place, value)
        raise


def read_adapter(path: str | PathLike[str]) -> SavedAdapter:
    """What the file holds, checked as far as that goes without the model. Raises as `load_adapter`."""
    tensors, metadata = read_safetensors(Path(path))
    text = metadata.get("minirank")
    if text is None:
        raise ValueError(
            f"{str(path)!r} was not written by save_adapter (for PEFT's folders there is import_peft)"
        )
    try:
        record = json.loads(text)
        if record["format"] > FORMAT:
            raise ValueError(
                f"format {record['format']}, while this version reads up to {FORMAT}: update minirank"
            )
        if metadata.get("checksum") != checksum(tensors, text):
            raise ValueError("wrong checksum: damaged, or changed by another program")
        others = {name: tensors.pop(name) for name in record["others"]}
        layers = {name: _layer(tensors, name, fields) for name, fields in record["layers"].items()}
        adapter = SavedAdapter(layers, others, record["method"], record["budget"], record["unit"])
        if tensors:
            raise ValueError(f"the tensors {quoted_names(list(tensors))} belong to no layer")
    except (
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        OverflowError,
        RecursionError,
    ) as error:
        what = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"{str(path)!r} cannot be used: {what}") from error
    return adapter


def _layer(tensors: dict[str, Tensor], name: str, fields: Mapping[str, Any]) -> SavedLayer:
    """The layer of this name, checked; its tensors are taken out of `tensors`."""
    own = {key: tensors.pop(f"{name}.{key}") for key in RANK_DIM if f"{name}.{key}" in tensors}
    numbers = {key: fields[key] for key in FIELDS if key not in ("rank", "shape")}
    layer = SavedLayer(own, **numbers)
    layer.check(name)
    if [layer.rank, list(layer.shape)] != [fields["rank"], fields["shape"]]:
        raise ValueError(
            f"{name!r} has rank {layer.rank} and shape {layer.shape}, announced {fields}"
        )
    return layer


def _others(model: nn.Module, patterns: Sequence[str]) -> dict[str, Tensor]:
    """Parameters and persistent buffers of the modules that the patterns name, LoRA layers left out."""
    found: dict[int, tuple[str, Tensor]] = {}  # each once, under its first name
    for pattern in patterns:
        for prefix, chosen in matching_modules(model, pattern, "modules").items():
            for name, module in modules_by_name(chosen, prefix).items():
                if isinstance(module, LoRALinear):
                    continue
                for key, tensor in [*module._parameters.items(), *module._buffers.items()]:
                    if tensor is not None and key not in module._non_persistent_buffers_set:
                        found.setdefault(
                            id(tensor), (f"{name}.{key}" if name else key, tensor.detach())
                        )
    return dict(found.values())


def _places(model: nn.Module, others: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """[(tensor of the model, what it gets, in its own dtype)]. Raises ValueError if it cannot hold the file's value."""
    plain = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    places: dict[int, tuple[str, Tensor, Tensor]] = {}
    for name, value in others.items():
        there = plain.get(name)
        if there is None or is_lazy(there) or there.is_meta:
            what = (
                "none"
                if there is None
                else "one without values (lazy, or on the meta device): load its weights"
            )
            raise ValueError(
                f"the file holds {name!r}, of shape {tuple(value.shape)}; the model has {what}"
            )
        floating = there.is_floating_point() and value.is_floating_point()
        if there.shape != value.shape or not (floating or there.dtype == value.dtype):
            raise ValueError(
                f"the file holds {name!r}, {value.dtype} of shape {tuple(value.shape)}; the model has {there.dtype} of "
                f"shape {tuple(there.shape)}"
            )
        new = value.to(there.dtype)
        if floating and bool((value.isfinite() & ~new.double().isfinite()).any()):
            raise ValueError(
                f"the file's {name!r} overflows {there.dtype}, the model's type: convert it to a wider one"
            )
        first, _, known = places.setdefault(id(there), (name, there, new))
        if known is not new and tensor_bytes(known) != tensor_bytes(new):
            raise ValueError(
                f"{first!r} and {name!r} are one tensor of the model, which the file has two values for"
            )
    return [(there, new) for _, there, new in places.values()]


def _copy(place: Tensor, value: Tensor) -> None:
    """What was made in inference mode can be written to only there."""
    with torch.inference_mode(place.is_inference()), torch.no_grad():
        place.copy_(value)
