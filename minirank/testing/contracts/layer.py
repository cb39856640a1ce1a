"""Layer: merging and unmerging. And the contracts of the LoRA layer, all in order."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ... import reference
from ..case import Arguments, CaseSpec, Contract, Implementation
from ..comparison import Bits
from ..round_trip import round_trip
from .forward import (
    FORWARD,
    FORWARD_TWINS,
    LORA,
    MERGE,
    MERGE_TWINS,
    SQUARE,
    forward_arguments,
    in_dtype,
)
from .layouts import normal as normal  # where other contracts look for it
from .resize import RESIZE_TWINS, RESIZES
from .round_trip import TRIP_TWINS, TRIPS

LAYER = "merge and unmerge keep the function; W comes back bit for bit"


def layer_arguments(
    *leading: int, bias: bool = True, transposed: bool = False, **sizes: Any
) -> Arguments:
    """(W, b, A, B, scaling, x), and the options of Layer."""
    given = forward_arguments(*(leading or (3,)), bias=bias, **sizes)
    x, W, b, A, B, scaling = given.positional
    W[0, 0] = -0.0  # W + ΔW − ΔW would return 0.0
    options = {**given.options, **({"transposed": True} if transposed else {})}
    return Arguments((W.T.contiguous() if transposed else W, b, A, B, scaling, x), options)


def life(implementation: Implementation, arguments: Arguments, steps: Sequence[str] = ()) -> Any:
    """y and the weight at first, and after each step: "merge" or "unmerge"."""
    *given, x = arguments.positional
    layer = implementation(*given, **arguments.options)
    W = given[0]
    outcome: dict[str, Any] = {}
    done: list[str] = []
    for step in ("", *steps):
        if step:
            getattr(layer, step)()
            done.append(step)
        when = f" after {', '.join(done)}" if done else ""
        y, weight = layer(x), layer.weight.detach().clone()  # a layer may change its own weight
        outcome[f"weight{when}"] = weight if step == "merge" else Bits(weight)
        outcome[f"dtype of weight{when}"] = in_dtype(weight, W.dtype, "W")
        outcome[f"y{when}"] = y
        outcome[f"dtype of y{when}"] = in_dtype(y, x.dtype, "x")
    return outcome


def half_precision_life(
    implementation: Implementation, arguments: Arguments, steps: Sequence[str]
) -> Any:
    W, b, A, B, scaling, x = arguments.positional
    base, adapter = torch.bfloat16, torch.float32
    positional = (W.to(base), None if b is None else b.to(base), A.to(adapter), B.to(adapter))
    options = {key: value.to(adapter) for key, value in arguments.options.items()}
    given = Arguments((*positional, scaling, x.to(base)), options)
    return life(implementation, given, steps)


def two_layers(implementation: Implementation, arguments: Arguments) -> Any:
    """Two layers around one W. What one does is nothing to the other."""
    W, b, A, B, scaling, x = arguments.positional
    first = implementation(W, b, A, B, scaling, **arguments.options)
    second = implementation(W, b, A.flip(0), B, 0.5 * scaling, **arguments.options)
    first.merge()
    outcome = {
        "y of the other layer": second(x),
        "weight of the other layer": Bits(second.weight.detach().clone()),
    }
    second.merge()
    first.unmerge()
    outcome |= {"y of the one": first(x), "weight of the one": Bits(first.weight.clone())}
    outcome |= {"y of the other, merged": second(x), "weight of the other, merged": second.weight}
    return outcome


def layer_case(name: str, *steps: str, **sizes: Any) -> CaseSpec:
    arguments = partial(layer_arguments, *sizes.pop("leading", (3,)), **sizes)
    terms = 2 * (sizes.get("d_in", 5) + sizes.get("rank", 3)) + 4
    return CaseSpec(name, LAYER, arguments, partial(life, steps=steps), terms)


BOTH = ("merge", "unmerge")
LAYERS = (
    layer_case("y", gate=True),
    layer_case("rank 0", *BOTH, rank=0),
    layer_case("rank 1", *BOTH, rank=1),
    layer_case("merged", "merge"),
    layer_case("merged, gate", "merge", gate=True),
    layer_case("merged twice", "merge", "merge", gate=True),
    layer_case("unmerged", *BOTH, gate=True),
    layer_case("unmerged twice", *BOTH, "unmerge", gate=True),
    layer_case("unmerged, never merged", "unmerge", gate=True),
    layer_case("unmerged, then merged", "unmerge", "merge", gate=True),
    layer_case("merged twice, unmerged once", "merge", "merge", "unmerge", gate=True),
    layer_case("merged and unmerged three times", *(3 * BOTH), gate=True),
    layer_case("a large update", *BOTH, "merge", gate=True, scaling=3e4),
    layer_case("no bias", *BOTH, bias=False),
    layer_case("transposed", *BOTH, gate=True, transposed=True),
    layer_case("transposed, merged twice", "merge", "merge", transposed=True),
    layer_case("transposed, square", *BOTH, **SQUARE, gate=True, transposed=True),
    layer_case("square", *BOTH, **SQUARE, gate=True),
    layer_case("positions", *BOTH, leading=(2, 3), gate=True),
    CaseSpec(
        "two layers of one W", LAYER, partial(layer_arguments, 3, gate=True), two_layers, terms=20
    ),
    CaseSpec(
        "bfloat16 W, float32 adapter",
        LAYER,
        partial(layer_arguments, 2, 3, gate=True),
        partial(half_precision_life, steps=(*BOTH, "merge")),
        terms=4,
        floating=False,
    ),
)


class Unguarded(reference.Layer):
    """Merging twice adds ΔW twice."""

    def merge(self) -> None:
        kept, self.original = self.original, None
        super().merge()
        if kept is not None:
            self.original = kept


class Subtracting(reference.Layer):
    """Unmerging subtracts ΔW."""

    def unmerge(self) -> None:
        if self.original is not None:
            W = self.weight.T if self.transposed else self.weight
            A, B, scaling, gate = self.adapter
            W = reference.merged_weight(W, A, B, -scaling, gate)
            self.weight, self.original = W.T if self.transposed else W, None


class AdapterTwice(reference.Layer):
    """A merged layer still adds its adapter."""

    def __call__(self, x: Tensor) -> Tensor:
        W = self.weight.T if self.transposed else self.weight
        return reference.lora_forward(x, W, self.bias, *self.adapter)


class NoMerge(reference.Layer):
    """merge() does nothing."""

    def merge(self) -> None:
        pass


class WithoutUnmerge(reference.Layer):
    """unmerge() does nothing."""

    def unmerge(self) -> None:
        pass


class MergedWithoutGate(reference.Layer):
    """The merged weight lacks the gate."""

    def merge(self) -> None:
        adapter, self.adapter = self.adapter, (*self.adapter[:3], None)
        super().merge()
        self.adapter = adapter


class MergedWithoutScaling(reference.Layer):
    """The merged weight lacks the scaling."""

    def merge(self) -> None:
        A, B, scaling, gate = self.adapter
        self.adapter = (A, B, 1.0, gate)
        super().merge()
        self.adapter = (A, B, scaling, gate)


class OtherLayout(reference.Layer):
    """The layout is not heeded: `transposed` is taken for False."""

    def __init__(self, *args: Any, transposed: bool = False, **options: Any) -> None:
        super().__init__(*args, **options)


class AlwaysUpright(reference.Layer):
    """The weight is (d_out, d_in) whatever the layout given."""

    def __init__(self, W: Tensor, *args: Any, transposed: bool = False, **options: Any) -> None:
        super().__init__(W.T if transposed else W, *args, **options)


LAYER_TWINS: dict[str, Implementation] = {
    "a layer whose second merge adds ΔW again": Unguarded,
    "a layer that subtracts ΔW to unmerge": Subtracting,
    "a layer that, merged, still adds its adapter to W + ΔW": AdapterTwice,
    "a layer that never merges": NoMerge,
    "a layer that never unmerges": WithoutUnmerge,
    "a layer that merges without its gate": MergedWithoutGate,
    "a layer that merges without its scaling": MergedWithoutScaling,
    "a layer that takes a transposed W for (d_out, d_in)": OtherLayout,
    "a layer that turns a transposed W to (d_out, d_in)": AlwaysUpright,
}


def unmerged_like(forward_twin: Implementation) -> Implementation:
    """A layer that computes, while it is not merged, what a wrong lora_forward computes."""

    class Changed(reference.Layer):
        def __call__(self, x: Tensor) -> Tensor:
            if self.original is not None:
                return super().__call__(x)
            W = self.weight.T if self.transposed else self.weight
            y: Tensor = forward_twin(x, W, self.bias, *self.adapter)
            return y

    return Changed


LAYER_TWINS |= {
    sentence: unmerged_like(twin)
    for sentence, twin in FORWARD_TWINS.items()
    if "gradient" not in sentence
}


CONTRACTS = (
    Contract(
        "lora_forward", f"arXiv 2106.09685, {LORA}", reference.lora_forward, FORWARD, FORWARD_TWINS
    ),
    Contract("merged_weight", "arXiv 2106.09685", reference.merged_weight, MERGE, MERGE_TWINS),
    Contract(
        "resize", "arXiv 1412.6980, Algorithm 1, by ranks", reference.resize, RESIZES, RESIZE_TWINS
    ),
    Contract("Layer", f"arXiv 2106.09685, {LORA}", reference.Layer, LAYERS, LAYER_TWINS),
    Contract("round_trip", "safetensors", round_trip, TRIPS, TRIP_TWINS),
)
