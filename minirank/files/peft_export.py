"""A folder for PEFT (0.15 or newer): export_peft. PEFT itself is not needed.

PEFT computes y = W x + b + alpha / r · B A x. So a layer's `scaling`, whichever way it came about,
becomes alpha = scaling · r, and gates are multiplied into B. For the format see the folder's
docstring.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import warn_caller
from ..layers.attention import UnpackedAttention
from ..layers.experts import LoRAExperts
from ..layers.linear import is_transposed
from ..layers.lora import LoRALinear
from ..layers.targets import exact_key, exact_pattern, modules_by_name
from .peft_experts import require_stacks_as_in_peft, stack_tensors, stacks_among
from .peft_folder import CONFIG_FILE, PREFIX, TENSORS_FILE, check_places
from .safetensors_file import safetensors_bytes, write_files
from .saved_layer import SavedLayer, savable_layers, warn_of_losses


def export_peft(
    model: nn.Module,
    folder: str | PathLike[str],
    *,
    portable: bool = False,
    base_model_name_or_path: str | None = None,
    task_type: str | None = None,
) -> None:
    """Write a folder that `peft.PeftModel.from_pretrained(plain_model, folder)` reads.

    PEFT then computes the same function. A and B are written bit for bit. Only where B is
    multiplied by gates or by the scaling, it is rounded once to its type. Layers of rank 0 are left
    out. Only the adapters are written: save a head that trained beside them in a file of its own.

    Args:
        model: the adapter is for a model with these names. If a part of your model will use it, say
            an encoder without its head, pass that part.
        folder: made if need be.
        portable: multiply the scaling into B, and set every alpha to the layer's rank. Loaders that
            ignore alpha_pattern (vLLM, diffusers) then compute the same function.
        base_model_name_or_path, task_type: written to the configuration as they are.

    Warns:
        UserWarning: parameters require a gradient and are not in the files; or a layer is inside an
            nn.TransformerEncoderLayer, whose fast path leaves PEFT's adapters out.

    Raises:
        ValueError: there is no LoRA layer with ranks; one is merged, disabled or not finite; or
            PEFT would compute another function (a module in several places, and out_proj of
            nn.MultiheadAttention), or cannot load it (a stack of experts in a model with adapter
            dropout, and some others). The old files are left as they were.
        OSError: from the file system. The old files are left as they were.

    >>> import json, tempfile, torch
    >>> from minirank import export_peft, wrap
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    >>> layers = wrap(model, {"0": 3, "1": 1}, scaling=2.0)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     export_peft(model, folder)
    ...     with open(f"{folder}/adapter_config.json") as file:
    ...         json.load(file)["alpha_pattern"]
    {'^0': 6.0, '^1': 2.0}
    """
    layers = _exportable_layers(model)
    # PEFT multiplies by alpha / r, which is 1 if alpha is the rank.
    factors = {name: layer.scaling if portable else 1.0 for name, layer in layers.items()}
    alphas = {
        name: float(layer.rank) if portable else layer.scaling * layer.rank
        for name, layer in layers.items()
    }
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        A, B = layer.lora_A.detach(), _folded_B(name, layer, factors[name])
        if isinstance(layer, LoRAExperts):
            tensors |= stack_tensors(model, name, stacks_among(layers), A, B)
        else:
            tensors[f"{PREFIX}{name}.lora_A.weight"] = A
            tensors[f"{PREFIX}{name}.lora_B.weight"] = B
    config = _configuration(layers, alphas) | {
        "task_type": task_type,
        "base_model_name_or_path": base_model_name_or_path,
    }
    text = json.dumps(config, indent=2, sort_keys=True, allow_nan=False) + "\n"
    contents = {
        TENSORS_FILE: safetensors_bytes(tensors, {"format": "pt"}),
        CONFIG_FILE: text.encode(),
    }
    warn_of_losses(
        model,
        (),
        "Save them in a file of their own (save_adapter takes them along), or freeze them before "
        "training, as wrap(…, trainable=[…]) does",
    )
    _warn_of_fast_paths(model)
    Path(folder).mkdir(parents=True, exist_ok=True)
    write_files({Path(folder, name): content for name, content in contents.items()})


def _exportable_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The layers that have ranks, checked."""
    layers = {name: layer for name, layer in savable_layers(model).items() if layer.rank > 0}
    if not layers:
        raise ValueError(
            "every layer has rank 0, which PEFT's files cannot say: there is nothing to export"
        )
    check_places(model, layers)
    require_stacks_as_in_peft(model, layers)
    for name, layer in layers.items():
        if not layer.enabled:
            raise ValueError(
                f"{name!r} is disabled, which PEFT's files cannot say: enable it, or resize it to 0"
            )
        SavedLayer.from_layer(layer).check(name)
    return layers


def _configuration(layers: Mapping[str, LoRALinear], alphas: Mapping[str, float]) -> dict[str, Any]:
    """PEFT's LoraConfig. It has one dropout for all layers: here the largest."""
    stacks = stacks_among(layers)
    linear = {name: layer for name, layer in layers.items() if name not in stacks}
    of_stacks = {"target_parameters": stacks} if stacks else {}
    return of_stacks | {
        "peft_type": "LORA",
        "inference_mode": True,
        "r": max(layer.rank for layer in layers.values()),
        "lora_alpha": max(alphas.values()),
        "target_modules": exact_pattern(linear) if linear else [],
        "rank_pattern": {exact_key(name): layer.rank for name, layer in layers.items()},
        "alpha_pattern": {exact_key(name): alpha for name, alpha in alphas.items()},
        "lora_dropout": max(layer.dropout for layer in layers.values()),
        "fan_in_fan_out": all(is_transposed(layer.base) for layer in layers.values()),
        "use_rslora": False,
        "bias": "none",
    }


def _folded_B(name: str, layer: LoRALinear, factor: float) -> Tensor:
    """factor · B diag(gate) in the adapter's type: (d_out, r); ValueError if it overflows."""
    B = layer.lora_B.detach()
    if layer.gate is None and factor == 1.0:
        return B
    gate = 1.0 if layer.gate is None else layer.gate.detach().double()
    folded = (factor * B.double() * gate).to(B.dtype)
    if not torch.isfinite(folded).all():
        raise ValueError(
            f"{name}.lora_B times gates or scaling overflows {B.dtype}: convert to a wider type"
        )
    return folded


def _warn_of_fast_paths(model: nn.Module) -> None:
    """Warn of encoder layers that read the weights of adapted modules; at export_peft's call."""
    for name, module in modules_by_name(model).items():
        if not isinstance(module, nn.TransformerEncoderLayer):
            continue
        if isinstance(module.self_attn, UnpackedAttention):  # no fast path
            continue
        if any(isinstance(linear, LoRALinear) for linear in (module.linear1, module.linear2)):
            warn_caller(
                f"evaluating {name!r} in PEFT, its fast path would leave the adapters of linear1 "
                "and linear2 out: call torch.backends.mha.set_fastpath_enabled(False) there",
            )
