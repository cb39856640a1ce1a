"""LoRA folders as PEFT writes them: import_peft. PEFT itself is not needed. For the format see peft_export.py."""

from __future__ import annotations

import functools
import json
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.lora import LoRALinear
from ..layers.wrap import insert_layers
from .peft_export import CONFIG, PREFIX, TENSORS, check_places
from .safetensors_file import read_safetensors
from .saved_layer import SavedLayer, match_modules

# What the options of PEFT's LoraConfig mean for a trained adapter. Any other one that is set is refused: it may change
# the function.
USED = {
    "peft_type",
    "r",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "lora_dropout",
}
WITHOUT_EFFECT = {
    *(
        "task_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
    ),
    *(
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
    ),  # the tensors say which
    *(
        "fan_in_fan_out",
        "ensure_weight_tying",
        "megatron_core",
        "qalora_group_size",
        "runtime_config",
    ),
    *("eva_config", "init_lora_weights", "bias"),  # checked below
}
HARMLESS_STARTS = (
    None,
    True,
    False,
    "gaussian",
    "eva",
    "orthogonal",
)  # the others change the base weights

INSTEAD = "PEFT can load it, and merge_and_unload() there gives a plain model with the adapter in its weights"


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
    config, tensors = _read_config(Path(folder, CONFIG)), _read_tensors(Path(folder))
    try:
        layers = _layers(config, tensors)
        names = match_modules(model, {name: layer.shape for name, layer in layers.items()})
        check_places(model, names)
        return insert_layers(
            model, {first: layers[name].around for name, first in names.items()}, trainable
        )
    except ValueError as error:
        raise ValueError(f"{str(folder)!r} cannot be imported: {error}") from error


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no file {str(path)!r}: expected a folder as PEFT's save_pretrained writes it"
        )
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{str(path)!r} is no JSON ({error}): cut off or damaged? Save or copy it anew"
        ) from error
    if not isinstance(config, dict) or "peft_type" not in config:
        raise ValueError(
            f"{str(path)!r} is no configuration of PEFT: expected a JSON object with a peft_type"
        )
    if config["peft_type"] != "LORA":
        raise ValueError(
            f"{str(path)!r} has peft_type {config['peft_type']!r}, expected 'LORA'. {INSTEAD}"
        )
    start = config.get("init_lora_weights")
    if start not in HARMLESS_STARTS:
        raise ValueError(
            f"{str(path)!r} has init_lora_weights={start!r}, which may have changed the base weights, expected a start "
            "that leaves them. PEFT converts pissa, olora, corda and lora_ga to plain LoRA: save_pretrained with "
            "path_initial_model_for_weight_conversion"
        )
    special = {
        key: value for key, value in config.items() if value and key not in USED | WITHOUT_EFFECT
    }
    if config.get("bias", "none") != "none":
        special["bias"] = config["bias"]
    if special:
        listed = ", ".join(f"{key}={value!r}" for key, value in special.items())
        raise ValueError(
            f"{str(path)!r} sets {listed}, expected plain LoRA on linear layers. {INSTEAD}"
        )
    for key in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(key) or {}, dict):
            raise ValueError(
                f"{str(path)!r} has {key}={config[key]!r}, expected an object {{pattern: number}}"
            )
    dropout = config.get("lora_dropout", 0.0)
    if not _is_number(dropout) or not 0 <= dropout < 1:
        raise ValueError(
            f"{str(path)!r} has lora_dropout={dropout!r}, expected a number, at least 0 and below 1"
        )
    return config


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    if not Path(folder, TENSORS).is_file():
        if Path(folder, "adapter_model.bin").is_file():
            raise ValueError(
                f"{str(folder)!r} has a pickled adapter_model.bin, no {TENSORS}: save it anew with PEFT"
            )
        raise FileNotFoundError(
            f"{str(folder)!r} has {CONFIG} but no {TENSORS}: was it copied completely?"
        )
    return read_safetensors(Path(folder, TENSORS))[0]


def _layers(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, SavedLayer]:
    """The checked layers by their names in the files."""
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        found = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.(lora_[AB])\.weight", key)
        if found is None:
            raise ValueError(
                f"{TENSORS} holds {key!r}, expected lora_A and lora_B of linear layers only. {INSTEAD}; "
                "save_pretrained(save_embedding_layers=False) there leaves weights out that did not train"
            )
        pairs.setdefault(found[1], {})[found[2]] = tensor
    if not pairs:
        raise ValueError(f"{TENSORS} holds no tensors, expected lora_A and lora_B of every layer")
    compiled = functools.cache(
        re.compile
    )  # re's own cache holds 512, and a large model has more patterns
    layers = {}
    for name, pair in pairs.items():
        if pair.keys() != {"lora_A", "lora_B"} or pair["lora_A"].ndim != 2:
            shapes = {key: tuple(tensor.shape) for key, tensor in pair.items()}
            raise ValueError(
                f"{name!r} has {shapes}, expected lora_A (r, d_in) and lora_B (d_out, r)"
            )
        rank, announced = (
            pair["lora_A"].shape[0],
            _of_layer(config, "rank_pattern", "r", name, compiled),
        )
        if rank != announced or rank == 0:
            raise ValueError(
                f"{name!r} has rank {rank} in {TENSORS} and {announced!r} in {CONFIG}, expected the same positive one: "
                "are the two files of one adapter? (If two patterns match the name: PEFT's saving sorts them)"
            )
        alpha = _of_layer(config, "alpha_pattern", "lora_alpha", name, compiled)
        if not _is_number(alpha) or not 0 < alpha <= sys.float_info.max:
            raise ValueError(
                f"{name!r} has alpha {alpha!r} in {CONFIG}, expected a positive number, and no endless one"
            )
        scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        layers[name] = SavedLayer(
            pair, float(alpha), float(rank), scaling, dropout=config.get("lora_dropout", 0.0)
        )
        layers[name].check(name)
    return layers


def _of_layer(
    config: Mapping[str, Any],
    patterns: str,
    default: str,
    name: str,
    compiled: Callable[[str], re.Pattern[str]],
) -> Any:
    """What PEFT takes for this layer: the first pattern that matches, else the one that is its name (such as "w[0]",
    which as a pattern does not match itself), else the default; 8 if the file has none."""
    given = config.get(patterns) or {}
    for pattern, value in given.items():
        try:
            if compiled(rf"(.*\.)?({pattern})$").match(name):
                return value
        except re.error as error:
            raise ValueError(
                f"{pattern!r} in {patterns} is no regular expression ({error})"
            ) from error
    return given.get(name, config.get(default, 8))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
