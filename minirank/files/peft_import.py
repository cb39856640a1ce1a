"""A folder that PEFT wrote: import_peft. PEFT itself is not needed.

For the format, and for what is refused and why, see the folder's docstring.
"""

from __future__ import annotations

import functools
import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.lora import LoRALinear
from ..layers.names import with_plain_names
from ..layers.targets import modules_by_name
from ..layers.wrap import insert_layers
from .peft_folder import CONFIG_FILE, PREFIX, TENSORS_FILE, check_places
from .safetensors_file import read_safetensors
from .saved_layer import SavedLayer, find_modules

# What the options of PEFT's LoraConfig mean for a trained adapter. Any other option that is set is
# refused, since it may change the function.
USED = {
    "peft_type",
    "r",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "lora_dropout",
}
ABOUT_THE_FILE = {
    "task_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
}
WHERE = {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"}
WITHOUT_EFFECT = {
    "fan_in_fan_out",  # the module itself says so
    "ensure_weight_tying",
    "megatron_core",
    "qalora_group_size",
    "runtime_config",
    "eva_config",
}
CHECKED_APART = {"init_lora_weights", "bias"}
ACCEPTED = USED | ABOUT_THE_FILE | WHERE | WITHOUT_EFFECT | CHECKED_APART

STARTS_THAT_KEEP_THE_BASE = (None, True, False, "gaussian", "eva", "orthogonal")

ADVICE = (
    "PEFT can load it, and merge_and_unload() there gives a plain model with the adapter in its "
    "weights"
)


@torch.inference_mode(False)  # parameters made in inference mode could not train
def import_peft(
    model: nn.Module, folder: str | PathLike[str], *, trainable: str | Sequence[str] | None = ()
) -> dict[str, LoRALinear]:
    """Wrap the plain `model` with the LoRA layers of a folder that PEFT, or `export_peft`, wrote.

    A and B are the file's, bit for bit. The layers can be trained, resized and merged.

    Args:
        trainable: what trains beside the adapters, as in `wrap`. PEFT's folder does not say.

    Returns: the layers by name.

    Warns:
        UserWarning: the model had other adapters already, and this call freezes modules that
            trained until now.

    Raises:
        FileNotFoundError: there is no such folder, or a file is missing in it.
        ValueError: the folder holds anything but plain LoRA on linear layers (DoRA, AdaLoRA,
            trained biases, modules_to_save, starts that change the base weights, …), which is
            named; a file is damaged; the model lacks a module, has it with another shape, or with
            an adapter already. The model is left unchanged.

    >>> import copy, tempfile, torch
    >>> from minirank import export_peft, import_peft, wrap
    >>> plain = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    >>> model, again = copy.deepcopy(plain), copy.deepcopy(plain)
    >>> layers = wrap(model, {"0": 3, "1": 1}, scaling=2.0)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     export_peft(model, folder)
    ...     {name: layer.rank for name, layer in import_peft(again, folder).items()}
    {'0': 3, '1': 1}
    """
    config, tensors = _read_config(Path(folder, CONFIG_FILE)), _read_tensors(Path(folder))
    try:
        layers = with_plain_names(_layers(config, tensors), modules_by_name(model))
        names = find_modules(model, {name: layer.full_shape for name, layer in layers.items()})
        check_places(model, names)
        builders = {first: layers[name].build_around for name, first in names.items()}
        return insert_layers(model, builders, trainable)
    except ValueError as error:
        raise ValueError(f"{str(folder)!r} cannot be imported: {error}") from error


# ---- the configuration --------------------------------------------------------------------------


def _read_config(path: Path) -> dict[str, Any]:
    """The checked content of adapter_config.json."""
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
    _check_method(path, config)
    _check_values(path, config)
    return config


def _check_method(path: Path, config: Mapping[str, Any]) -> None:
    """Raise ValueError unless it is plain LoRA on unchanged base weights."""
    if config["peft_type"] != "LORA":
        raise ValueError(
            f"{str(path)!r} has peft_type {config['peft_type']!r}, expected 'LORA'. {ADVICE}"
        )
    start = config.get("init_lora_weights")
    if start not in STARTS_THAT_KEEP_THE_BASE:
        raise ValueError(
            f"{str(path)!r} has init_lora_weights={start!r}, which may have changed the base "
            "weights, expected a start that leaves them. PEFT converts pissa, olora, corda and "
            "lora_ga to plain LoRA: save_pretrained with path_initial_model_for_weight_conversion"
        )
    refused = {key: value for key, value in config.items() if value and key not in ACCEPTED}
    if config.get("bias", "none") != "none":
        refused["bias"] = config["bias"]
    if refused:
        listed = ", ".join(f"{key}={value!r}" for key, value in refused.items())
        raise ValueError(
            f"{str(path)!r} sets {listed}, expected plain LoRA on linear layers. {ADVICE}"
        )


def _check_values(path: Path, config: Mapping[str, Any]) -> None:
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


class _LayerNumbers:
    """What PEFT takes for r and alpha of each layer.

    The first pattern that matches the name counts; else the key that is the name (such as "w[0]",
    which as a pattern does not match itself); else the default, which is 8 if the file has none.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = config
        # re's own cache holds 512 patterns, and a large model has more.
        self._compile = functools.cache(re.compile)

    def rank(self, name: str) -> Any:
        return self._number(name, "rank_pattern", "r")

    def alpha(self, name: str) -> Any:
        return self._number(name, "alpha_pattern", "lora_alpha")

    def _number(self, name: str, patterns_key: str, default_key: str) -> Any:
        patterns = self._config.get(patterns_key) or {}
        for pattern, number in patterns.items():
            try:
                if self._compile(rf"(.*\.)?({pattern})$").match(name):
                    return number
            except re.error as error:
                raise ValueError(
                    f"{pattern!r} in {patterns_key} is no regular expression ({error})"
                ) from error
        return patterns.get(name, self._config.get(default_key, 8))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


# ---- the tensors --------------------------------------------------------------------------------


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    if not Path(folder, TENSORS_FILE).is_file():
        if Path(folder, "adapter_model.bin").is_file():
            raise ValueError(
                f"{str(folder)!r} has a pickled adapter_model.bin, no {TENSORS_FILE}: save it anew "
                "with PEFT"
            )
        raise FileNotFoundError(
            f"{str(folder)!r} has {CONFIG_FILE} but no {TENSORS_FILE}: was it copied completely?"
        )
    return read_safetensors(Path(folder, TENSORS_FILE))[0]


def _layers(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, SavedLayer]:
    """The checked layers by their names in the files."""
    numbers, dropout = _LayerNumbers(config), config.get("lora_dropout", 0.0)
    layers = {}
    for name, matrices in _matrices_by_layer(tensors).items():
        rank = _checked_rank(name, matrices, numbers)
        alpha = _checked_alpha(name, numbers)
        scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        layers[name] = SavedLayer(matrices, alpha, float(rank), scaling, dropout=dropout)
        layers[name].check(name)
    return layers


def _matrices_by_layer(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """{name of the layer: {"lora_A": …, "lora_B": …}}; ValueError for tensors of other kinds."""
    by_layer: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        parts = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.(lora_[AB])\.weight", key)
        if parts is None:
            raise ValueError(
                f"{TENSORS_FILE} holds {key!r}, expected lora_A and lora_B of linear layers only. "
                f"{ADVICE}; save_pretrained(save_embedding_layers=False) there leaves weights out "
                "that did not train"
            )
        by_layer.setdefault(parts[1], {})[parts[2]] = tensor
    if not by_layer:
        raise ValueError(
            f"{TENSORS_FILE} holds no tensors, expected lora_A and lora_B of every layer"
        )
    return by_layer


def _checked_rank(name: str, matrices: Mapping[str, Tensor], numbers: _LayerNumbers) -> int:
    if matrices.keys() != {"lora_A", "lora_B"} or matrices["lora_A"].ndim != 2:
        shapes = {key: tuple(tensor.shape) for key, tensor in matrices.items()}
        raise ValueError(f"{name!r} has {shapes}, expected lora_A (r, d_in) and lora_B (d_out, r)")
    rank, announced = matrices["lora_A"].shape[0], numbers.rank(name)
    if rank != announced or rank == 0:
        raise ValueError(
            f"{name!r} has rank {rank} in {TENSORS_FILE} and {announced!r} in {CONFIG_FILE}, "
            "expected the same positive one: are the two files of one adapter? (If two patterns "
            "match the name: PEFT's saving sorts them)"
        )
    return rank


def _checked_alpha(name: str, numbers: _LayerNumbers) -> float:
    alpha = numbers.alpha(name)
    if not _is_number(alpha) or not 0 < alpha <= sys.float_info.max:
        raise ValueError(
            f"{name!r} has alpha {alpha!r} in {CONFIG_FILE}, expected a finite positive number"
        )
    return float(alpha)
