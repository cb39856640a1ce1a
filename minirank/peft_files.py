"""LoRA folders as PEFT (0.15 or newer) writes and reads them: export_peft, import_peft. PEFT itself is not needed.

    adapter_config.json         r, alpha, and patterns by which layers differ
    adapter_model.safetensors   base_model.model.<module>.lora_A.weight (r, d_in), ….lora_B.weight (d_out, r)

PEFT computes y = W x + b + alpha / r · B A x, with alpha / sqrt(r) if use_rslora. A layer's `scaling`, whichever way it
came about, becomes alpha = scaling · r; gates are multiplied into B; layers of rank 0 are left out.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from .files import read_safetensors, safetensors_bytes, write_files
from .linear import is_transposed
from .lora import LoRALinear
from .saved import SavedLayer, match, savable_layers, some, warn_of_losses
from .targets import all_names
from .wrap import insert

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
    dropout for all layers: the largest is written.

    Warns (UserWarning) of parameters that require a gradient and are not in the files.

    Raises ValueError: no LoRA layer with ranks, one that is merged, disabled or not finite; or that PEFT would compute
    otherwise: a module in several places, of which PEFT adapts one, and nn.MultiheadAttention's out_proj. OSError: from
    the file system. The old files are still there then.
    """
    layers = {name: layer for name, layer in savable_layers(model).items() if layer.rank > 0}
    if not layers:
        raise ValueError("every layer has rank 0, which PEFT's files cannot say: there is nothing to export")
    aliases = all_names(model)
    tensors: dict[str, Tensor] = {}
    alphas: dict[str, float] = {}
    for name, layer in layers.items():
        _check_exportable(name, layer, aliases[name])
        # PEFT multiplies by alpha / r: by 1 if portable.
        B = _folded(layer, layer.scaling if portable else 1.0)
        alphas[name] = float(layer.rank) if portable else layer.scaling * layer.rank
        tensors |= {f"{name}.lora_A.weight": layer.lora_A.detach(), f"{name}.lora_B.weight": B}
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{key} is not finite in {tensor.dtype}: was the training stable?")
    warn_of_losses(model, ())
    config = {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base_model_name_or_path,
        "inference_mode": True,
        "r": max(layer.rank for layer in layers.values()),
        "lora_alpha": max(alphas.values()),
        "target_modules": f"({'|'.join(re.escape(name) for name in layers)})",
        "rank_pattern": {f"^{re.escape(name)}": layer.rank for name, layer in layers.items()},
        "alpha_pattern": {f"^{re.escape(name)}": alpha for name, alpha in alphas.items()},
        "lora_dropout": max(layer.dropout for layer in layers.values()),
        "fan_in_fan_out": all(is_transposed(layer.base) for layer in layers.values()),
        "use_rslora": False,
        "bias": "none",
    }
    Path(folder).mkdir(parents=True, exist_ok=True)
    write_files(
        {
            Path(folder, TENSORS): safetensors_bytes(
                {PREFIX + key: tensor for key, tensor in tensors.items()}, {"format": "pt"}
            ),
            Path(folder, CONFIG): (json.dumps(config, indent=2, sort_keys=True) + "\n").encode(),
        }
    )


@torch.inference_mode(False)  # parameters made in inference mode could not train
def import_peft(
    model: nn.Module, folder: str | PathLike[str], *, trainable: str | Sequence[str] | None = None
) -> dict[str, LoRALinear]:
    """Wrap the plain `model` with the LoRA layers of a folder that PEFT, or `export_peft`, wrote. They can be trained,
    resized and merged. A and B are the file's, bit for bit.

    Args:
        trainable: as in `wrap`.

    Returns: the layers by name.

    Raises FileNotFoundError; ValueError: whatever is not plain LoRA on linear layers, by its name (DoRA, AdaLoRA,
    trained biases, modules_to_save, starts that change the base weights, …); damaged files; modules that the model
    lacks, has with other shapes, or that have an adapter already. Nothing has changed then.
    """
    config = _read_config(Path(folder, CONFIG))
    if not Path(folder, TENSORS).is_file() and Path(folder, "adapter_model.bin").is_file():
        raise ValueError(f"{str(folder)!r} has a pickled adapter_model.bin: load it in PEFT and save it anew")
    tensors, _ = read_safetensors(Path(folder, TENSORS))
    layers = _layers(config, tensors)
    for name, layer in layers.items():
        layer.check(name)
    names = match(model, {name: layer.shape for name, layer in layers.items()})
    return insert(model, {names[name]: layer.around for name, layer in layers.items()}, trainable)


def _check_exportable(name: str, layer: LoRALinear, aliases: Sequence[str]) -> None:
    if not layer.enabled:
        raise ValueError(f"{name!r} is disabled, which PEFT's files cannot say: enable it, or resize it to 0")
    if len(aliases) > 1:
        raise ValueError(f"{some(aliases)} are one module, of which PEFT would adapt {aliases[0]!r} only")
    if isinstance(layer.base, NonDynamicallyQuantizableLinear):
        raise ValueError(f"{name!r}: its parent attention reads the weight, and PEFT's adapter would have no effect")


def _folded(layer: LoRALinear, factor: float) -> Tensor:
    """factor · B diag(gate) in the adapter's dtype: (d_out, r)."""
    B = layer.lora_B.detach()
    if layer.gate is None and factor == 1.0:
        return B
    gate = 1.0 if layer.gate is None else layer.gate.detach().double()
    return (factor * B.double() * gate).to(B.dtype)


# ---- reading ------------------------------------------------------------------------------------------------------

# What the options of PEFT's LoraConfig mean for a trained adapter. Any other one that is set is refused: it may change
# the function.
USED = {"peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "lora_dropout"}
WITHOUT_EFFECT = {
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),  # the tensors say which
    *("fan_in_fan_out", "ensure_weight_tying", "megatron_core", "qalora_group_size", "runtime_config"),
    *("eva_config", "init_lora_weights", "bias"),  # checked below
}
HARMLESS_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")  # the others change the base weights


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no file {str(path)!r}: expected a folder as PEFT's save_pretrained writes it"
        )
    try:
        config = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is no JSON ({error}): cut off or damaged?") from error
    if not isinstance(config, dict) or "peft_type" not in config:
        raise ValueError(f"{str(path)!r} is no configuration of PEFT: it has no peft_type")
    if config["peft_type"] != "LORA":
        raise ValueError(f"{str(path)!r} is for {config['peft_type']}, expected plain LoRA (peft_type LORA)")
    if config.get("bias", "none") != "none":
        raise ValueError(f"bias={config['bias']!r}: trained biases are not plain LoRA")
    if config.get("init_lora_weights") not in HARMLESS_STARTS:
        raise ValueError(
            f"init_lora_weights={config['init_lora_weights']!r} starts from changed base weights: convert it to plain "
            "LoRA in PEFT (save_pretrained with path_initial_model_for_weight_conversion)"
        )
    special = {key: value for key, value in config.items() if value and key not in USED | WITHOUT_EFFECT}
    if special:
        listed = ", ".join(f"{key}={value!r}" for key, value in special.items())
        raise ValueError(f"{str(path)!r} sets {listed}, which is not plain LoRA on linear layers")
    return config


def _layers(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, SavedLayer]:
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        found = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.(lora_[AB])\.weight", key)
        if found is None:
            raise ValueError(f"{key!r} is no lora_A or lora_B of a linear layer, and so not plain LoRA")
        pairs.setdefault(found[1], {})[found[2]] = tensor
    if not pairs:
        raise ValueError("the file holds no tensors")
    layers = {}
    for name, pair in pairs.items():
        if pair.keys() != {"lora_A", "lora_B"} or pair["lora_A"].ndim != 2:
            raise ValueError(f"{name!r} has {sorted(pair)}, expected lora_A (r, d_in) and lora_B (d_out, r)")
        rank, announced = pair["lora_A"].shape[0], _of_layer(config, "rank_pattern", "r", name)
        if rank != announced:
            raise ValueError(f"{name!r} has rank {rank} in its tensors and {announced} in the configuration")
        alpha = _of_layer(config, "alpha_pattern", "lora_alpha", name)
        if not isinstance(alpha, int | float) or isinstance(alpha, bool):
            raise ValueError(f"{name!r} has alpha {alpha!r}, expected a number")
        scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        layers[name] = SavedLayer(pair, float(alpha), float(rank), scaling, dropout=config.get("lora_dropout", 0.0))
    return layers


def _of_layer(config: Mapping[str, Any], patterns: str, default: str, name: str) -> Any:
    """What PEFT takes for this layer: the first pattern that matches, else the default; 8 if the file has none."""
    for pattern, value in (config.get(patterns) or {}).items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", name):
                return value
        except re.error as error:
            raise ValueError(f"{patterns} has {pattern!r}, which is no regular expression ({error})") from error
    return config.get(default, 8)
