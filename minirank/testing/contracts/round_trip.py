"""round_trip: adapters through one file and back."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..case import Arguments, CaseSpec, Implementation, mapped
from ..comparison import Bits, Rule
from ..round_trip import round_trip
from .layouts import View, normal, plain, repeated, transposed, with_gaps

ROUND_TRIP = "what is read is what was written, bit for bit"


def saved_layer(
    seed: int, rank: int, gate: bool = True, scaling: float = 2.0, view: View = plain
) -> dict[str, Any]:
    return {
        "A": view(normal(rank, 6, seed=seed)),
        "B": view(normal(5, rank, seed=seed + 1)),
        "gate": view(normal(rank, seed=seed + 2)) if gate else None,
        "scaling": scaling,
    }


def one_layer(**options: Any) -> Arguments:
    return Arguments(({"fc": saved_layer(40, **options)},))


NAMES = (
    *("h.1", "h.10", "h_1", "h.1x", "fc", "enc.fc", "A", "mlp.gate", "mlp.B", "a+b", "w[0]"),
    *("encoder.layer.0.attention.query", "encoder.layer.1.attention.query", "q/v"),
    *("with space", "größe", "^t$", "back\\slash", 'quo"te', "x" * 60),
)


def many_names() -> Arguments:
    layers = {name: saved_layer(50 + 3 * i, rank=i % 4) for i, name in enumerate(NAMES)}
    return Arguments((layers,))


def with_and_without_gates() -> Arguments:
    return Arguments(({str(i): saved_layer(50 + 3 * i, 2, gate=i % 2 == 0) for i in range(4)},))


def hard_scalings() -> Arguments:
    numbers = (0.1 + 0.2, 1 / 3, 2.0**-40, 1e30, 16 / 7**0.5)
    layers = {f"l{i}": saved_layer(50 + 3 * i, 1, scaling=s) for i, s in enumerate(numbers)}
    return Arguments((layers,))


def hard_numbers() -> Arguments:
    """Numbers that decimal text, or a sum with zero, would not return."""
    layer = saved_layer(60, 2)
    layer["A"][0, :4] = torch.tensor([-0.0, 1e-45, 3e38, 1 / 3])
    layer["gate"][0] = -0.0
    return Arguments(({"fc": layer},))


def one_tensor_in_two_layers() -> Arguments:
    layer = saved_layer(60, 3)
    other = {**saved_layer(70, 3), "A": layer["A"]}
    return Arguments(({"q": layer, "v": other},))


def to_file_and_back(
    implementation: Implementation, arguments: Arguments, old_content: bytes = b""
) -> Any:
    (layers,) = arguments.positional
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "adapter")  # without a suffix: torch.load heeds it
        if old_content:
            path.write_bytes(old_content)
        found = implementation(layers, str(path))
        written = [content for content in contents_of(folder) if content != old_content]
        outcome = {name: bits_of_layer(layer) for name, layer in found.items()}
    count = f"{len(written)} file{'' if len(written) == 1 else 's'}"
    return {
        "layers": outcome,
        "files written": Rule(len(written) == 1, "1 file", count),
        "what is returned": read_anew(layers, found),
    }


def contents_of(folder: str) -> list[bytes]:
    return [file.read_bytes() for file in Path(folder).rglob("*") if file.is_file()]


def bits_of_layer(layer: Mapping[str, Any]) -> dict[str, Any]:
    gate = layer["gate"]
    return {
        "A": Bits(layer["A"].detach().clone()),
        "B": Bits(layer["B"].detach().clone()),
        "gate": None if gate is None else Bits(gate.detach().clone()),
        "scaling": Bits(torch.tensor(float(layer["scaling"]), dtype=torch.float64)),
    }


def read_anew(given: Mapping[str, Any], found: Mapping[str, Any]) -> Rule:
    """Tensors that were read from a file share no memory with those that were written."""

    def places(layers: Mapping[str, Any]) -> set[int]:
        values = itertools.chain.from_iterable(layer.values() for layer in layers.values())
        return {v.data_ptr() for v in values if isinstance(v, Tensor) and v.numel()}

    shared = bool(places(given) & places(found))
    return Rule(not shared, "read from the file", "what was given" if shared else "read")


def several_dtypes(implementation: Implementation, arguments: Arguments) -> Any:
    dtypes = itertools.cycle((torch.bfloat16, torch.float32, torch.float16, torch.float64))
    (layers,) = arguments.positional
    mixed = {
        name: mapped(layer, partial(Tensor.to, dtype=dtype))
        for (name, layer), dtype in zip(layers.items(), dtypes, strict=False)
    }
    return to_file_and_back(implementation, Arguments((mixed,)))


def trip_case(name: str, arguments: Callable[[], Arguments], **options: Any) -> CaseSpec:
    return CaseSpec(name, ROUND_TRIP, arguments, partial(to_file_and_back, **options))


TRIPS = (
    trip_case("one layer", partial(one_layer, rank=2)),
    trip_case("rank 1", partial(one_layer, rank=1)),
    trip_case("rank 0", partial(one_layer, rank=0)),
    trip_case("no gate", partial(one_layer, rank=2, gate=False)),
    trip_case("rank 0, no gate", partial(one_layer, rank=0, gate=False)),
    trip_case("with and without gates", with_and_without_gates),
    trip_case("scalings", hard_scalings),
    trip_case("numbers", hard_numbers),
    trip_case("names, mixed ranks", many_names),
    trip_case("tensors transposed", partial(one_layer, rank=3, view=transposed)),
    trip_case("tensors with gaps", partial(one_layer, rank=3, view=with_gaps)),
    trip_case("tensors repeated", partial(one_layer, rank=3, view=repeated)),
    trip_case("one tensor in two layers", one_tensor_in_two_layers),
    trip_case("an old file is replaced", partial(one_layer, rank=2), old_content=b"old" * 5000),
    CaseSpec("several dtypes", ROUND_TRIP, many_names, several_dtypes, floating=False),
)


def trip_twin(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Implementation:
    """The reference's outcome with each layer changed."""

    def twin(layers: Mapping[str, Any], path: str) -> dict[str, Any]:
        return {name: change(layer) for name, layer in round_trip(layers, path).items()}

    return twin


def through(dtype: torch.dtype) -> Implementation:
    return trip_twin(lambda layer: mapped(layer, lambda tensor: tensor.to(dtype).to(tensor.dtype)))


def gate_into_B(layer: dict[str, Any]) -> dict[str, Any]:
    gate = layer["gate"]
    return layer if gate is None else {**layer, "B": layer["B"] * gate, "gate": None}


def in_storage_order(layers: Mapping[str, Any], path: str) -> dict[str, Any]:
    """The bytes as they lie in memory, without regard to strides."""
    read = round_trip(layers, path)

    def dense(tensor: Tensor) -> Tensor:
        return torch.as_strided(tensor, tensor.shape, torch.empty(tensor.shape).stride()).clone()

    return {name: {**read[name], **mapped(layer, dense)} for name, layer in layers.items()}


def without_empty_layers(layers: Mapping[str, Any], path: str) -> dict[str, Any]:
    return {name: layer for name, layer in round_trip(layers, path).items() if len(layer["A"])}


def dots_as_underscores(layers: Mapping[str, Any], path: str) -> dict[str, Any]:
    read = round_trip(layers, path)
    last = {name.replace(".", "_"): layer for name, layer in read.items()}
    return {name: last[name.replace(".", "_")] for name in layers}


TRIP_TWINS: dict[str, Implementation] = {
    "the layers rounded to float32": through(torch.float32),
    "the layers rounded to bfloat16": through(torch.bfloat16),
    "the layers rounded to float16": through(torch.float16),
    "the layers with all tensors in float32": trip_twin(
        lambda layer: mapped(layer, lambda tensor: tensor.float())
    ),
    "the layers without their gates": trip_twin(lambda layer: {**layer, "gate": None}),
    "the layers with gates of one for None": trip_twin(
        lambda layer: (
            {**layer, "gate": layer["A"].new_ones(len(layer["A"]))}
            if layer["gate"] is None
            else layer
        )
    ),
    "the layers with None for gates of rank 0": trip_twin(
        lambda layer: layer if len(layer["A"]) else {**layer, "gate": None}
    ),
    "the layers with their gates multiplied into B": trip_twin(gate_into_B),
    "the layers with a scaling of 1": trip_twin(lambda layer: {**layer, "scaling": 1.0}),
    "the layers with their scaling rounded to float32": trip_twin(
        lambda layer: {**layer, "scaling": float(torch.tensor(layer["scaling"]).float())}
    ),
    "the layers with their scaling printed in 6 digits": trip_twin(
        lambda layer: {**layer, "scaling": float(f"{layer['scaling']:.6g}")}
    ),
    "the layers with the bytes of views in the order of the memory": in_storage_order,
    "the layers without those of rank 0": without_empty_layers,
    "the layers under names with _ for dots, where two became one": dots_as_underscores,
}
