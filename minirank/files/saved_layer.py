"""What every file format shares: a LoRA layer apart from its base, and the checks on the way to a file and back."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import quoted_names
from ..layers.lora import RANK_DIM, LoRALinear
from ..layers.targets import did_you_mean, first_names, layer_shape, modules_by_name
from ..layers.wrap import lora_layers, resolve_ranks


@dataclass(frozen=True)
class SavedLayer:
    """A LoRA layer without its base."""

    tensors: Mapping[
        str, Tensor
    ]  # lora_A (r, d_in), lora_B (d_out, r), and gate (r,) where there are gates
    alpha: float
    reference_rank: float
    scaling: float
    gate: float | None = None  # start value, also of ranks to come
    dropout: float = 0.0
    enabled: bool = True
    base: Mapping[str, Any] | None = None  # fingerprint of the module that it was trained beside

    @classmethod
    def of(cls, layer: LoRALinear, base: Mapping[str, Any] | None = None) -> SavedLayer:
        """What `layer` is now; its tensors are shared, not copied."""
        return cls(
            tensors={key: value.detach() for key, value in layer.named_parameters(recurse=False)},
            alpha=layer.alpha,
            reference_rank=layer.reference_rank,
            scaling=layer.scaling,
            gate=layer.initial_gate,
            dropout=layer.dropout,
            enabled=layer.enabled,
            base=base,
        )

    @property
    def rank(self) -> int:
        return self.tensors["lora_A"].shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)"""
        return self.tensors["lora_B"].shape[0], self.tensors["lora_A"].shape[1]

    def around(self, base: nn.Module) -> LoRALinear:
        """The layer, in its own dtype, on the device of `base`."""
        options = {"alpha": self.alpha, "reference_rank": self.reference_rank, "gate": self.gate}
        dtype = self.tensors["lora_A"].dtype
        layer = LoRALinear(base, 0, dropout=self.dropout, dtype=dtype, **options)  # type: ignore[arg-type]
        for key, value in self.tensors.items():
            setattr(layer, key, nn.Parameter(value.to(layer.lora_A.device)))
        layer.scaling, layer.enabled = self.scaling, self.enabled
        return layer

    def check(self, name: str) -> None:
        """Raises ValueError if these tensors and numbers make no layer."""
        expected = {"lora_A", "lora_B"} if self.gate is None else {"lora_A", "lora_B", "gate"}
        if self.tensors.keys() != expected:
            raise ValueError(
                f"{name!r} has the tensors {sorted(self.tensors)}, expected {sorted(expected)}"
            )
        shapes = {key: tuple(value.shape) for key, value in self.tensors.items()}
        if any(len(shape) != (1 if key == "gate" else 2) for key, shape in shapes.items()):
            raise ValueError(
                f"{name!r} has shapes {shapes}: expected lora_A (r, d_in), lora_B (d_out, r), gate (r,)"
            )
        if len({shape[RANK_DIM[key]] for key, shape in shapes.items()}) != 1:
            raise ValueError(
                f"{name!r} has shapes {shapes}: expected one rank in lora_A (r, d_in) and lora_B (d_out, r)"
            )
        if self.rank > min(self.shape):
            raise ValueError(
                f"{name!r} has rank {self.rank}, expected at most min(d_in, d_out) = {min(self.shape)}: more add "
                "nothing, and a LoRALinear does not hold them: train with fewer"
            )
        dtypes = {value.dtype for value in self.tensors.values()}
        if len(dtypes) != 1 or not dtypes.pop().is_floating_point:
            found = {key: str(value.dtype) for key, value in self.tensors.items()}
            raise ValueError(
                f"the tensors of {name!r} have types {found}, expected one floating-point type"
            )
        for key, value in self.tensors.items():
            if not torch.isfinite(value).all():
                raise ValueError(f"{name}.{key} is not finite: was the training stable?")
        if not math.isfinite(self.scaling):
            raise ValueError(f"the scaling of {name!r} is {self.scaling}, expected a finite number")


def savable_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The LoRA layers of `model`; ValueError if there is none, or one that is merged or on the meta device."""
    layers = lora_layers(model)
    if not layers:
        raise ValueError("the model has no LoRA layer to save: wrap() puts them in")
    if model in layers.values():
        raise ValueError(
            "the model itself is a LoRALinear, which has no name: save a model that holds it"
        )
    merged = [name for name, layer in layers.items() if layer.merged]
    if merged:
        raise ValueError(
            f"{quoted_names(merged)} merged, where the file needs A, B and the base's own weight: unmerge() first, or unwrap() "
            "and save the plain model with ΔW in its weights"
        )
    without = [name for name, layer in layers.items() if any(p.is_meta for p in layer.parameters())]
    if without:
        raise ValueError(
            f"{quoted_names(without)} on the meta device, without values to save: load the model's weights first"
        )
    return layers


def match_modules(model: nn.Module, shapes: Mapping[str, tuple[int, int]]) -> dict[str, str]:
    """{name in a file: first name of that module in `model`}, in module order, every module being there, plain, and
    (d_out, d_in) as given. Raises ValueError."""
    modules, first = modules_by_name(model), first_names(model)
    missing = [name for name in shapes if name not in modules]
    if missing:
        raise ValueError(
            f"the model has no {quoted_names(missing)}, which the file has an adapter for: is it the whole model that was "
            f"saved, or a part of it? {did_you_mean(missing[0], modules)}"
        )
    order = {name: i for i, name in enumerate(resolve_ranks(model, dict.fromkeys(shapes, 0)))}
    for name, shape in shapes.items():
        there = layer_shape(modules[name])
        if there != shape:
            raise ValueError(
                f"{name!r}: the file's adapter is for (d_out, d_in) = {shape}, the model has {there}"
            )
    if len(order) < len(shapes):
        count = Counter(first[name] for name in shapes)
        same = [name for name in shapes if count[first[name]] > 1]
        raise ValueError(
            f"{quoted_names(same)} are one module of the model, which the file has several adapters for"
        )
    return {name: first[name] for name in sorted(shapes, key=lambda name: order[first[name]])}


def warn_of_losses(model: nn.Module, saved: Collection[str]) -> None:
    """Warn the caller's caller of parameters that may have trained and are no adapter's nor named in `saved`."""
    kept = {id(p) for layer in lora_layers(model).values() for p in layer.parameters(recurse=False)}
    kept |= {id(p) for name, p in model.named_parameters(remove_duplicate=False) if name in saved}
    lost = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in kept]
    if lost:
        warnings.warn(
            f"{quoted_names(lost)} require a gradient and will not be in the file, which holds the adapters. What trained "
            "besides must be saved too (save_adapter's `modules`, or your own file); freeze the rest, as "
            "wrap(…, trainable=[…]) does",
            stacklevel=3,
        )
