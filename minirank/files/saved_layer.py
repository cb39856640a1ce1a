"""A LoRA layer without its base, which every file format shares, and the checks around it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import quoted_names, warn_caller
from ..layers.experts import ExpertStack, lora_layer
from ..layers.hints import did_you_mean
from ..layers.lora import RANK_DIM, LoRALinear
from ..layers.names import each_once, named_parameters
from ..layers.targets import (
    first_names,
    layer_shape,
    modules_and_stacks,
    refuse_peft,
    unpacking_hint,
)
from ..layers.wrap import lora_layers, resolve_ranks
from ..placement import require_unsharded


@dataclass(frozen=True)
class SavedLayer:
    """A LoRA layer without its base."""

    # lora_A (r, d_in), lora_B (d_out, r), in a stack of experts with a first axis for them; and
    # gate (r,) where the layer has gates
    tensors: Mapping[str, Tensor]
    alpha: float
    reference_rank: float
    scaling: float
    initial_gate: float | None = None  # new ranks start from it too; None: no gates
    dropout: float = 0.0
    enabled: bool = True
    base_fingerprint: Mapping[str, Any] | None = None  # None: of any base

    @classmethod
    def from_layer(
        cls, layer: LoRALinear, base_fingerprint: Mapping[str, Any] | None = None
    ) -> SavedLayer:
        """What `layer` is now. The tensors are shared with it, not copied."""
        return cls(
            tensors={key: value.detach() for key, value in layer.named_parameters(recurse=False)},
            alpha=layer.alpha,
            reference_rank=layer.reference_rank,
            scaling=layer.scaling,
            initial_gate=layer.initial_gate,
            dropout=layer.dropout,
            enabled=layer.enabled,
            base_fingerprint=base_fingerprint,
        )

    @property
    def rank(self) -> int:
        return self.tensors["lora_A"].shape[RANK_DIM["lora_A"]]

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)"""
        return self.tensors["lora_B"].shape[-2], self.tensors["lora_A"].shape[-1]

    @property
    def full_shape(self) -> tuple[int, ...]:
        """(d_out, d_in), in a stack of experts (experts, d_out, d_in)"""
        return (*self.tensors["lora_A"].shape[:-2], *self.shape)

    def build_around(self, base: nn.Module) -> LoRALinear:
        """A LoRALinear that holds `base`, with these tensors in their own type, on its device."""
        layer = lora_layer(
            base,
            0,
            alpha=self.alpha,
            reference_rank=self.reference_rank,
            gate=self.initial_gate,
            dropout=self.dropout,
            dtype=self.tensors["lora_A"].dtype,
        )
        for key, value in self.tensors.items():
            setattr(layer, key, nn.Parameter(value.to(layer.lora_A.device)))
        layer.scaling, layer.enabled = self.scaling, self.enabled
        return layer

    def check(self, name: str) -> None:
        """Raise ValueError, naming the layer, if these tensors and numbers make no LoRA layer."""
        self._check_shapes(name)
        dtypes = {key: value.dtype for key, value in self.tensors.items()}
        if len(set(dtypes.values())) != 1 or not dtypes["lora_A"].is_floating_point:
            listed = {key: str(dtype) for key, dtype in dtypes.items()}
            raise ValueError(
                f"the tensors of {name!r} have types {listed}, expected one floating-point type"
            )
        for key, value in self.tensors.items():
            if not torch.isfinite(value).all():
                raise ValueError(f"{name}.{key} is not finite: was the training stable?")
        if not math.isfinite(self.scaling):
            raise ValueError(f"the scaling of {name!r} is {self.scaling}, expected a finite number")

    def _check_shapes(self, name: str) -> None:
        expected = {"lora_A", "lora_B"} | (set() if self.initial_gate is None else {"gate"})
        if self.tensors.keys() != expected:
            raise ValueError(
                f"{name!r} has the tensors {sorted(self.tensors)}, expected {sorted(expected)}"
            )
        shapes = {key: tuple(value.shape) for key, value in self.tensors.items()}
        A, B, gate = shapes["lora_A"], shapes["lora_B"], shapes.get("gate", (0,))
        fit = len(A) == len(B) and len(A) in (2, 3) and A[:-2] == B[:-2]  # 3: a stack of experts
        if not fit or len(gate) != 1:
            raise ValueError(
                f"{name!r} has shapes {shapes}: expected lora_A (r, d_in), lora_B (d_out, r), "
                "gate (r,)"
            )
        if len({shape[RANK_DIM[key]] for key, shape in shapes.items()}) != 1:
            raise ValueError(
                f"{name!r} has shapes {shapes}: expected one rank in lora_A (r, d_in) and lora_B "
                "(d_out, r)"
            )
        if self.rank > min(self.shape):
            raise ValueError(
                f"{name!r} has rank {self.rank}, expected at most min(d_in, d_out) = "
                f"{min(self.shape)}. Further ranks add nothing, and a LoRALinear does not hold "
                "them: train with fewer"
            )


def savable_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The LoRA layers of `model` by name.

    Raises ValueError if there is none, or one that is merged or on the meta device.
    """
    require_unsharded(model)
    layers = lora_layers(model)
    if not layers:
        refuse_peft(model)
        raise ValueError("the model has no LoRA layer to save: wrap() puts them in")
    if model in layers.values():
        raise ValueError(
            "the model itself is a LoRALinear, which has no name: save a model that holds it"
        )
    merged = [name for name, layer in layers.items() if layer.merged]
    if merged:
        raise ValueError(
            f"{quoted_names(merged)} cannot be saved while merged: the file needs A, B and the "
            "base's own weight. unmerge() first, or unwrap() and save the plain model, with ΔW in "
            "its weights"
        )
    on_meta = [name for name, layer in layers.items() if any(p.is_meta for p in layer.parameters())]
    if on_meta:
        raise ValueError(
            f"{quoted_names(on_meta)} on the meta device, without values to save: load the "
            "model's weights first"
        )
    return layers


def find_modules(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """Where the adapters of a file belong in a plain model.

    Args:
        shapes: {name in the file: its `full_shape`}.

    Returns: {name in the file: first name of that module in `model`}, in the order of the model.

    Raises ValueError: a module that is missing, has another shape or an adapter already, or that
    the file has several adapters for.
    """
    refuse_peft(model)
    modules, first = modules_and_stacks(model), first_names(model)
    missing = [name for name in shapes if name not in modules]
    if missing:
        raise ValueError(
            f"the model has no {quoted_names(missing)}, which the file has an adapter for: is it "
            "the whole model that was saved, or a part of it? "
            f"{unpacking_hint(model, missing[0]) or did_you_mean(missing[0], modules)}"
        )
    positions = {name: i for i, name in enumerate(resolve_ranks(model, dict.fromkeys(shapes, 0)))}
    for name, shape in shapes.items():
        module = modules[name]
        actual: tuple[int, ...] | None = layer_shape(module)
        if isinstance(module, ExpertStack):
            actual = (module.experts, *module.shape)
        if actual != shape:
            sizes = "(d_out, d_in)" if len(shape) == 2 else "(experts, d_out, d_in)"
            raise ValueError(
                f"{name!r}: the file's adapter is for {sizes} = {shape}, the model has {actual}"
            )
    if len(positions) < len(shapes):
        adapters = Counter(first[name] for name in shapes)
        aliases = [name for name in shapes if adapters[first[name]] > 1]
        raise ValueError(
            f"{quoted_names(aliases)} are one module of the model, which the file has several "
            "adapters for"
        )
    return {name: first[name] for name in sorted(shapes, key=lambda name: positions[first[name]])}


def warn_of_losses(model: nn.Module, saved: Collection[str], advice: str) -> None:
    """Warn the caller's caller of parameters that may have trained and do not go into the file.

    Args:
        saved: names of the parameters that go into the file beside the adapters.
        advice: what to do about the others.
    """
    kept = {id(p) for layer in lora_layers(model).values() for p in layer.parameters(recurse=False)}
    parameters = named_parameters(model)
    kept |= {id(parameter) for name, parameter in parameters.items() if name in saved}
    lost = [
        name
        for name, parameter in each_once(parameters.items()).items()
        if parameter.requires_grad and id(parameter) not in kept
    ]
    if lost:
        warn_caller(
            f"{quoted_names(lost)} require a gradient and will not be in the file. If they "
            f"trained, what they learned is lost. {advice}",
        )
