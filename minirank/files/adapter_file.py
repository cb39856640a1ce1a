"""One adapter in one safetensors file: save_adapter, load_adapter, read_adapter.

In the file: A, B and gates of every LoRA layer, its numbers (scaling, dropout, …), what trained
beside the adapters, a fingerprint of the base, and where the ranks came from.

Not in the file: the base weights; optimizers; L1RA's own state (its `state_dict`); frozen modules,
unless `modules` names them; and whether single adapters were frozen.

The folder's docstring has the format, and what is refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from ..allocators.allocation import Allocation
from ..allocators.table import draw_table
from ..checks import quoted_names, warn_caller
from ..distributed import on_all
from ..layers.lora import RANK_DIM, LoRALinear
from ..layers.names import named_buffers, named_parameters, plain_name, with_plain_names
from ..layers.targets import as_patterns, first_names, modules_and_stacks
from ..layers.wrap import insert_layers
from ..tensor_bytes import checksum
from .base_fingerprint import base_fingerprint, is_base_sharded, same_base
from .other_tensors import (
    converted_values,
    copy_value,
    moving_statistics,
    parameters_named,
    tensors_of_modules,
    tensors_that_train,
    tied_names,
    trainable_parameters,
)
from .safetensors_file import read_safetensors, safetensors_bytes, write_files
from .saved_layer import SavedLayer, find_modules, savable_layers, warn_of_losses

T = TypeVar("T")
FORMAT = 2  # of the metadata; a reader refuses a higher one. 1: minirank 0.1, without "trainable"
LAYER_FIELDS = {  # key of a layer's record: attribute of SavedLayer
    "rank": "rank",
    "shape": "shape",
    "alpha": "alpha",
    "reference_rank": "reference_rank",
    "scaling": "scaling",
    "gate": "initial_gate",
    "dropout": "dropout",
    "enabled": "enabled",
    "base": "base_fingerprint",
}


class AsSaved(Enum):
    """The default of `load_adapter`'s argument `trainable`."""

    AS_SAVED = "as saved"

    def __repr__(self) -> str:
        return self.name


AS_SAVED = AsSaved.AS_SAVED


@dataclass(frozen=True, repr=False)
class SavedAdapter:
    """What a file of `save_adapter` holds. It prints as a table of ranks."""

    layers: Mapping[str, SavedLayer]
    # Parameters and buffers of other modules, by their names in the plain model.
    other_tensors: Mapping[str, Tensor]
    # The names of the parameters beside the adapters that required a gradient. None: the file, of
    # minirank 0.1, does not say. The parameters among `other_tensors` train when it is loaded.
    trainable: tuple[str, ...] | None = ()
    # Where the ranks came from, if the allocation was given.
    method: str = ""
    budget: int | None = None
    unit: str = "ranks"
    # {name in `other_tensors` or `trainable`: further names that the tensor had, being tied}
    tied: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def ranks(self) -> dict[str, int]:
        """{name: rank} of every layer."""
        return {name: layer.rank for name, layer in self.layers.items()}

    def __str__(self) -> str:
        budget = "" if self.budget is None else f" (budget {self.budget:,} {self.unit})"
        total = f"{self.method or 'adapter'}: {sum(self.ranks.values()):,} ranks{budget}"
        lines = [total, draw_table(self.ranks)]
        if self.other_tensors:
            entries = sum(tensor.numel() for tensor in self.other_tensors.values())
            lines.append(
                f"beside the adapters: {_counted(len(self.other_tensors), 'tensor')} with "
                f"{entries:,} entries ({_listed(self.other_tensors)})"
            )
        if self.trainable is None and self.other_tensors:
            lines.append("trains beside them: the parameters among these")
        if self.trainable:
            lines.append(
                f"trains beside them: {_counted(len(self.trainable), 'parameter')} "
                f"({_listed(self.trainable)})"
            )
        return "\n".join(lines)

    __repr__ = __str__


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _listed(names: Sequence[str] | Mapping[str, object]) -> str:
    """The first six names."""
    shown = ", ".join(list(names)[:6])
    return f"{shown} and {len(names) - 6:,} more" if len(names) > 6 else shown


# ---- saving -------------------------------------------------------------------------------------


def save_adapter(
    model: nn.Module,
    path: str | PathLike[str],
    *,
    allocation: Allocation | None = None,
    modules: str | Sequence[str] | None = None,
    group: ProcessGroup | None = None,
) -> None:
    """Write the LoRA layers of `model`, and what trains beside them, to one safetensors file.

    The file holds every number bit for bit. An old file of that name is replaced in one step, when
    the new one is complete. The file also says which parameters require a gradient.

    Args:
        path: of the file, in an existing folder.
        allocation: where the ranks came from. Its method, budget and unit are written down.
        modules: what goes into the file beside the adapters.
            None: what trains, which is
            (a) of a module that trains whole (a head): its parameters and persistent buffers;
            (b) of any other module: only the parameters that require a gradient.
            After wrap(…, trainable=None) that can be nearly the whole model: every module without
            an adapter whose parameters nobody froze. `read_adapter` prints how much it is.
            Names or globs: these modules, whole, whether they train or not. (): the adapters alone.
        group: the processes that hold shards of the base (FSDP2). All of them call this; they
            gather the base's fingerprints, and the first process writes the file.
            None: no communication.

    A frozen module can change too: a BatchNorm in training mode updates its buffers. Name it in
    `modules`, or keep it in evaluation mode.

    Warns:
        UserWarning: parameters require a gradient and are not in the file. If they trained, they
            are lost. Or the base is sharded, and there is no `group`: the file cannot tell it from
            another one. Or a BatchNorm (or its like) is in training mode now, has seen batches, and
            is not in the file.

    Raises:
        ValueError: there is no LoRA layer, or one that is merged or not finite; the ranks are not
            those of the allocation; a name matches nothing; a lazy module that belongs in the
            file has no values yet. The old file is left as it was.
        TypeError: `modules` holds anything but names.
        OSError: from the file system. The old file is left as it was.

    >>> import tempfile, torch
    >>> from minirank import read_adapter, save_adapter, wrap
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    >>> layers = wrap(model, {"0": 2}, trainable=["1"])  # and then train it
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_adapter(model, f"{folder}/adapter.safetensors")
    ...     list(read_adapter(f"{folder}/adapter.safetensors").other_tensors)
    ['1.weight', '1.bias']
    """
    layers = savable_layers(model)
    if modules is None:
        others = tensors_that_train(model)
    else:
        others = tensors_of_modules(model, as_patterns(modules, "modules"))
    if group is None:
        _warn_of_sharded_bases(layers)
    saved = {
        name: SavedLayer.from_layer(layer, _fingerprint(layer.base, group))
        for name, layer in layers.items()
    }
    _on_all(lambda: _check(saved), group)
    if allocation is not None:
        _check_allocation(model, saved, allocation)
    warn_of_losses(
        model,
        others,
        "Name their modules in save_adapter(…, modules=[…]), or freeze them before training, as "
        "wrap(…, trainable=[…]) does",
    )
    _warn_of_moving_statistics(model, others)
    trainable = trainable_parameters(model)
    tensors = _named_tensors(saved) | others
    record = json.dumps(
        {
            "format": FORMAT,
            "method": allocation.method if allocation else "",
            "budget": allocation.budget if allocation else None,
            "unit": allocation.unit if allocation else "ranks",
            "layers": {name: _record_of(layer) for name, layer in saved.items()},
            "others": list(others),
            "trainable": trainable,
            "tied": tied_names(model, {*others, *trainable}),
        }
    )
    metadata = {"minirank": record, "checksum": checksum(tensors, record)}
    content = safetensors_bytes(tensors, metadata)
    writes = group is None or dist.get_rank(group) == 0
    _on_all(lambda: write_files({Path(path): content} if writes else {}), group)


def _check(layers: Mapping[str, SavedLayer]) -> None:
    for name, layer in layers.items():
        layer.check(name)


def _on_all(work: Callable[[], T], group: ProcessGroup | None) -> T:
    """work(); with a group, by all of its processes, and an error of one is raised on all."""
    return work() if group is None else on_all(work, group)


def _fingerprint(base: nn.Module, group: ProcessGroup | None) -> dict[str, dict[str, Any]] | None:
    """None for a sharded base that may not be gathered."""
    return None if group is None and is_base_sharded(base) else base_fingerprint(base)


def _warn_of_sharded_bases(layers: Mapping[str, LoRALinear]) -> None:
    sharded = [name for name, layer in layers.items() if is_base_sharded(layer.base)]
    if sharded:
        warn_caller(
            f"the base of {quoted_names(sharded)} is sharded over processes, and is not gathered "
            "without being asked to: load_adapter will not notice another base. Call save_adapter "
            "on all processes with group= to have the file know it"
        )


def _warn_of_moving_statistics(model: nn.Module, others: Mapping[str, Tensor]) -> None:
    """Warn the caller of `save_adapter`."""
    moving = moving_statistics(model, others)
    if moving:
        warn_caller(
            f"{quoted_names(moving)} in training mode, where every batch moves the running "
            "statistics, which will not be in the file. If batches ran so beside the adapters, the "
            "loaded model will compute something else: name the modules in save_adapter(…, "
            "modules=[…]), or keep them in evaluation mode",
        )


def _named_tensors(layers: Mapping[str, SavedLayer]) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": tensor
        for name, layer in layers.items()
        for key, tensor in layer.tensors.items()
    }


def _record_of(layer: SavedLayer) -> dict[str, Any]:
    return {key: getattr(layer, attribute) for key, attribute in LAYER_FIELDS.items()}


def _check_allocation(
    model: nn.Module, layers: Mapping[str, SavedLayer], allocation: Allocation
) -> None:
    first = first_names(model)
    allocated = {
        first.get(plain_name(name, first), name): rank
        for name, rank in allocation.ranks.items()
        if rank > 0
    }
    if allocated != {name: layer.rank for name, layer in layers.items() if layer.rank > 0}:
        raise ValueError(
            "the model's ranks are not those of the allocation: leave `allocation` out, or pass "
            "dataclasses.replace(allocation, ranks=…) with the ranks that the layers have now"
        )


# ---- loading ------------------------------------------------------------------------------------


@torch.inference_mode(False)  # parameters made in inference mode could not train
def load_adapter(
    model: nn.Module,
    path: str | PathLike[str],
    *,
    other_base: bool = False,
    trainable: str | Sequence[str] | AsSaved | None = AS_SAVED,
    group: ProcessGroup | None = None,
) -> dict[str, LoRALinear]:
    """Wrap the plain `model` with the layers of a file that `save_adapter` wrote.

    The layers are as they were when saved, bit for bit, on the devices of their modules. They can
    be trained, resized and merged. Other tensors of the file are copied into the model, in the
    model's own types, under every name that they had when saved.

    Args:
        other_base: accept other base weights than those that the adapter was trained beside. (The
            same model in another floating-point type counts as the same base. It is compared as
            closely as the coarser type allows.)
        trainable: what trains beside the adapters. AS_SAVED, the default: the parameters that did
            when the file was written, and everything else is frozen. (Parameters made under
            torch.inference_mode() cannot train, and are left as they are.) Otherwise as in `wrap`:
            names or globs of modules; () for the adapters alone; None to leave all other
            `requires_grad` as they are. The adapters themselves train, even if they were frozen
            when saved; and unless it is None, those of earlier calls too.
        group: the processes that hold shards of the base (FSDP2). All of them call this, and gather
            the base to compare it. None: no communication; then a sharded base needs
            other_base=True, unless the file has no fingerprint of it.

    Returns: the layers by name.

    Warns:
        UserWarning: the model had other adapters already, and this call freezes modules that
            trained until now.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is cut off, damaged, foreign, or of a newer format; the model lacks a
            module, has it with another shape, or with an adapter already; the base weights (or
            buffers beside them) differ; the model's types cannot hold the values. The model is
            left unchanged.

    >>> import copy, tempfile, torch
    >>> from minirank import load_adapter, save_adapter, wrap
    >>> plain = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    >>> trained, again = copy.deepcopy(plain), copy.deepcopy(plain)
    >>> layers = wrap(trained, {"0": 2}, trainable=["1"])  # and then train it
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_adapter(trained, f"{folder}/adapter.safetensors")
    ...     layers = load_adapter(again, f"{folder}/adapter.safetensors")
    >>> [name for name, parameter in again.named_parameters() if parameter.requires_grad]
    ['0.lora_A', '0.lora_B', '1.weight', '1.bias']
    """
    read = _on_all(lambda: read_adapter(path), group)
    adapter = _with_names_of(model, read)
    shapes = {name: layer.full_shape for name, layer in adapter.layers.items()}
    names = _on_all(lambda: find_modules(model, shapes), group)
    if not other_base:
        _check_base(model, adapter.layers, group)
    values = converted_values(model, adapter.other_tensors, adapter.tied)
    saved_trainable = adapter.other_tensors if adapter.trainable is None else adapter.trainable
    parameters = (
        parameters_named(model, saved_trainable, adapter.tied) if trainable is AS_SAVED else []
    )
    builders = {first: adapter.layers[name].build_around for name, first in names.items()}
    old_values = [tensor.detach().clone() for tensor, _ in values]
    copied: list[Tensor] = []
    try:
        for tensor, value in values:
            copied.append(tensor)  # first, so that an interrupted copy is undone too
            copy_value(tensor, value)
        if isinstance(trainable, AsSaved):
            return insert_layers(model, builders, (), parameters)
        return insert_layers(model, builders, trainable)
    except BaseException:
        for tensor, old_value in zip(copied, old_values, strict=False):
            copy_value(tensor, old_value)
        raise


def _with_names_of(model: nn.Module, adapter: SavedAdapter) -> SavedAdapter:
    """The adapter, its names without what a wrapper put into them where it was saved.

    Names such as "_orig_mod.fc" are in files of early versions of minirank.
    """
    modules = modules_and_stacks(model)
    tensors = {**named_parameters(model), **named_buffers(model)}

    def plain(names: Iterable[str]) -> tuple[str, ...]:
        return tuple(plain_name(name, tensors) for name in names)

    tied = {name: plain(aliases) for name, aliases in adapter.tied.items()}
    return replace(
        adapter,
        layers=with_plain_names(adapter.layers, modules),
        other_tensors=with_plain_names(adapter.other_tensors, tensors),
        trainable=None if adapter.trainable is None else plain(adapter.trainable),
        tied=with_plain_names(tied, tensors),
    )


def _check_base(
    model: nn.Module, layers: Mapping[str, SavedLayer], group: ProcessGroup | None
) -> None:
    modules = modules_and_stacks(model)
    known = {name: layer for name, layer in layers.items() if layer.base_fingerprint is not None}
    sharded = [name for name in known if is_base_sharded(modules[name])]
    if sharded and group is None:
        raise ValueError(
            f"the base of {quoted_names(sharded)} is sharded over processes, and cannot be "
            "compared with the one that the adapter was trained beside: call load_adapter on all "
            "processes with group=, or pass other_base=True"
        )
    changed = [
        name
        for name, layer in known.items()
        if layer.base_fingerprint is not None
        and not same_base(modules[name], layer.base_fingerprint)
    ]
    _on_all(lambda: _require_nothing_changed(changed), group)


def _require_nothing_changed(changed: Sequence[str]) -> None:
    if changed:
        raise ValueError(
            f"{quoted_names(changed)}: not the base weights that the adapter was trained beside. "
            "Load that model, or pass other_base=True if this one is meant"
        )


# ---- reading ------------------------------------------------------------------------------------


def read_adapter(path: str | PathLike[str]) -> SavedAdapter:
    """What a file of `save_adapter` holds, checked as far as that goes without the model.

    Print it to see the ranks, what the file holds beside the adapters, and what trained.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is cut off, damaged, foreign, or of a newer format.

    >>> import tempfile, torch
    >>> from minirank import read_adapter, save_adapter, wrap
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    >>> layers = wrap(model, {"0": 2}, trainable=["1"])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_adapter(model, f"{folder}/adapter.safetensors")
    ...     print(read_adapter(f"{folder}/adapter.safetensors"))
    adapter: 2 ranks
                   sum
    0    2 ████      2
    sum  2           2
    beside the adapters: 2 tensors with 10 entries (1.weight, 1.bias)
    trains beside them: 2 parameters (1.weight, 1.bias)
    """
    tensors, metadata = read_safetensors(Path(path))
    text = metadata.get("minirank")
    if text is None:
        raise ValueError(
            f"{str(path)!r} was not written by save_adapter (for PEFT's folders there is "
            "import_peft)"
        )
    try:
        return _adapter_from(tensors, text, metadata.get("checksum"))
    except (
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        OverflowError,
        RecursionError,
    ) as error:
        reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"{str(path)!r} cannot be used: {reason}") from error


def _adapter_from(
    tensors: dict[str, Tensor], text: str, expected_checksum: str | None
) -> SavedAdapter:
    """The adapter of a file's tensors, which are taken out of `tensors`, and its record."""
    record = json.loads(text)
    if record["format"] > FORMAT:
        raise ValueError(
            f"format {record['format']}, while this version reads up to {FORMAT}: update minirank"
        )
    if checksum(tensors, text) != expected_checksum:
        raise ValueError("wrong checksum: damaged, or changed by another program")
    others = {name: tensors.pop(name) for name in record["others"]}
    layers = {name: _take_layer(tensors, name, it) for name, it in record["layers"].items()}
    if tensors:
        raise ValueError(f"the tensors {quoted_names(list(tensors))} belong to no layer")
    return SavedAdapter(
        layers,
        others,
        None if record["format"] == 1 else tuple(record["trainable"]),
        record["method"],
        record["budget"],
        "ranks" if record["unit"] == "rank" else record["unit"],  # the word of minirank 0.1
        {name: tuple(aliases) for name, aliases in record.get("tied", {}).items()},
    )


def _take_layer(tensors: dict[str, Tensor], name: str, record: Mapping[str, Any]) -> SavedLayer:
    """The layer of this name, checked. Its tensors are taken out of `tensors`."""
    own = {key: tensors.pop(f"{name}.{key}") for key in RANK_DIM if f"{name}.{key}" in tensors}
    fields = {
        attribute: record[key]
        for key, attribute in LAYER_FIELDS.items()
        if key not in ("rank", "shape")
    }
    layer = SavedLayer(own, **fields)
    layer.check(name)
    if [layer.rank, list(layer.shape)] != [record["rank"], record["shape"]]:
        raise ValueError(
            f"{name!r} has rank {layer.rank} and shape {layer.shape}, announced {record}"
        )
    return layer
