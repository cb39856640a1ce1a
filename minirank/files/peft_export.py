"""LoRA folders as PEFT (0.15 or newer) reads them: export_peft. PEFT itself is not needed.

    adapter_config.json         r, alpha, and patterns by which layers differ
    adapter_model.safetensors   base_model.model.<module>.lora_A.weight (r, d_in), ….lora_B.weight (d_out, r)

PEFT computes y = W x + b + alpha / r · B A x, with alpha / sqrt(r) if use_rslora. A layer's `scaling`, whichever way it
came about, becomes alpha = scaling · r; gates are multiplied into B; layers of rank 0 are left out.
"""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Iterable
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..checks import quoted_names
from ..layers.linear import is_transposed
from ..layers.lora import LoRALinear
from ..layers.targets import all_names, exact_key, exact_pattern, first_names, modules_by_name
from .safetensors_file import safetensors_bytes, write_files
from .saved_layer import SavedLayer, savable_layers, warn_of_losses

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."


def export_peft(
    model: nn.Module,
    folder: str | PathLike[str],
    *,
    portable: bool = False,
    base_model_name_or_path: str | None = None,
    task_type: str | None = None,
) -> None:
    """Write a folder (made if need be) for `peft.PeftModel.from_pretrained(plain_model, folder)`.

    Args:
        model: whose names the adapter is for: to use it with a part of your model, give that part.
        portable: multiply the scaling into B and set every alpha to the layer's rank, so that loaders which ignore
            alpha_pattern (vLLM, diffusers) compute the same function.
        base_model_name_or_path, task_type: written to the configuration as they are.

    Where B is multiplied by gates or scaling it is rounded once to its type; all else is bit for bit. PEFT has one
    dropout for all layers: the largest is written. It adapts nn.Linear and transformers' Conv1D, no look-alikes.

    Warns (UserWarning) of parameters that require a gradient and are not in the files, and of an
    nn.TransformerEncoderLayer, whose fast path leaves PEFT's adapters out.

    Raises ValueError: no LoRA layer with ranks, one that is merged, disabled or not finite; or that PEFT would compute
    otherwise: a module in several places, of which PEFT adapts one, and nn.MultiheadAttention's out_proj. OSError: from
    the file system. The old files are still there then.
    """
    layers = {name: layer for name, layer in savable_layers(model).items() if layer.rank > 0}
    if not layers:
        raise ValueError(
            "every layer has rank 0, which PEFT's files cannot say: there is nothing to export"
        )
    check_places(model, layers)
    tensors: dict[str, Tensor] = {}
    alphas: dict[str, float] = {}
    for name, layer in layers.items():
        if not layer.enabled:
            raise ValueError(
                f"{name!r} is disabled, which PEFT's files cannot say: enable it, or resize it to 0"
            )
        SavedLayer.of(layer).check(name)
        # PEFT multiplies by alpha / r: by 1 if portable.
        B = _folded(layer, layer.scaling if portable else 1.0)
        if not torch.isfinite(B).all():
            raise ValueError(
                f"{name}.lora_B times gates or scaling overflows {B.dtype}: convert to a wider type"
            )
        alphas[name] = float(layer.rank) if portable else layer.scaling * layer.rank
        tensors |= {f"{name}.lora_A.weight": layer.lora_A.detach(), f"{name}.lora_B.weight": B}
    warn_of_losses(model, ())
    _warn_of_fast_paths(model)
    config = {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base_model_name_or_path,
        "inference_mode": True,
        "r": max(layer.rank for layer in layers.values()),
        "lora_alpha": max(alphas.values()),
        "target_modules": exact_pattern(layers),
        "rank_pattern": {exact_key(name): layer.rank for name, layer in layers.items()},
        "alpha_pattern": {exact_key(name): alpha for name, alpha in alphas.items()},
        "lora_dropout": max(layer.dropout for layer in layers.values()),
        "fan_in_fan_out": all(is_transposed(layer.base) for layer in layers.values()),
        "use_rslora": False,
        "bias": "none",
    }
    files = {
        TENSORS: safetensors_bytes(
            {PREFIX + key: tensor for key, tensor in tensors.items()}, {"format": "pt"}
        ),
        CONFIG: (json.dumps(config, indent=2, sort_keys=True, allow_nan=False) + "\n").encode(),
    }
    Path(folder).mkdir(parents=True, exist_ok=True)
    write_files({Path(folder, name): content for name, content in files.items()})


def check_places(model: nn.Module, names: Iterable[str]) -> None:
    """Raises ValueError for a module whose adapter PEFT would leave out, or apply in one of several places."""
    modules, aliases, first = modules_by_name(model), all_names(model), first_names(model)
    parents = {id(module): module for module in modules.values()}.values()
    places = Counter(id(child) for parent in parents for child in parent._modules.values())
    for name in names:
        module = modules[name]
        if places[id(module)] > 1:
            same = aliases[first[name]]
            raise ValueError(
                f"{quoted_names(same)} are one module, of which PEFT adapts {same[0]!r} only, minirank all places"
            )
        base = module.base if isinstance(module, LoRALinear) else module
        if isinstance(base, NonDynamicallyQuantizableLinear):
            raise ValueError(
                f"{name!r}: nn.MultiheadAttention reads its weight without calling it, so that PEFT's adapter has no "
                "effect there: leave it out (resize it to 0)"
            )


def _warn_of_fast_paths(model: nn.Module) -> None:
    for name, module in modules_by_name(model).items():
        read = (
            (module.linear1, module.linear2)
            if isinstance(module, nn.TransformerEncoderLayer)
            else ()
        )
        if any(isinstance(linear, LoRALinear) for linear in read):
            warnings.warn(
                f"evaluating {name!r} in PEFT, its fast path would leave the adapters of linear1 and linear2 out: call "
                "torch.backends.mha.set_fastpath_enabled(False) there",
                stacklevel=3,
            )


def _folded(layer: LoRALinear, factor: float) -> Tensor:
    """factor · B diag(gate) in the adapter's dtype: (d_out, r)."""
    B = layer.lora_B.detach()
    if layer.gate is None and factor == 1.0:
        return B
    gate = 1.0 if layer.gate is None else layer.gate.detach().double()
    return (factor * B.double() * gate).to(B.dtype)
