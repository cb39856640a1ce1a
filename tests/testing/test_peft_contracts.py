"""The contracts of PEFT's format: right implementations pass, wrong ones are named."""

from __future__ import annotations

import json
import re
from collections import Counter
from math import sqrt

import numpy as np
import pytest
import torch
from helpers.kit_cases import assert_twins_are_named, failed, tree
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import minirank
from minirank import LoRALinear, reference, testing
from minirank.reference.peft_format import PREFIX, of_layer

REFERENCES = [reference.peft_export, reference.peft_delta_weight]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("function", REFERENCES, ids=lambda function: function.__name__)
def test_the_reference_keeps_its_contract(function, dtype):
    report = testing.check(function, like=function, dtype=dtype)
    assert {result.status for result in report} == {"passed"}


@pytest.mark.parametrize("function", REFERENCES, ids=lambda function: function.__name__)
def test_every_wrong_twin_is_caught_and_named(function):
    assert_twins_are_named(function)


# ---- minirank's own functions --------------------------------------------------------------------


def model_of(layers):
    adapted = {}
    for name, layer in layers.items():
        A, B, gate = layer["A"], layer["B"], layer["gate"]
        base = nn.Linear(A.shape[1], B.shape[0], dtype=A.dtype)
        adapted[name] = LoRALinear(base, 0, gate=None if gate is None else 1.0)
        adapted[name].lora_A, adapted[name].lora_B = nn.Parameter(A), nn.Parameter(B)
        adapted[name].gate = None if gate is None else nn.Parameter(gate)
        adapted[name].scaling = layer["scaling"]
    return tree(adapted)


def read(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    return load_file(folder / "adapter_model.safetensors"), config


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.filterwarnings("ignore:.*require a gradient")
def test_our_export_keeps_the_contract(portable, tmp_path):
    def ours(layers):
        minirank.export_peft(model_of(layers), tmp_path, portable=portable)
        return read(tmp_path)

    report = testing.check(ours, like=reference.peft_export)
    assert {result.status for result in report} == {"passed"}


def test_our_import_keeps_the_contract(tmp_path):
    def ours(tensors, config, name):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        dense = {key: tensor.contiguous() for key, tensor in tensors.items()}
        save_file(dense, tmp_path / "adapter_model.safetensors")
        plain = {}
        for key, A in tensors.items():
            if key.endswith(".lora_A.weight"):
                layer = key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
                B = tensors[f"{PREFIX}{layer}.lora_B.weight"]
                d_in, d_out = A.shape[1], B.shape[0]
                stored = config.get("fan_in_fan_out")
                plain[layer] = Conv1D(d_out, d_in) if stored else nn.Linear(d_in, d_out)
        layers = minirank.import_peft(tree(plain), tmp_path)
        if name not in layers:
            return None
        update = layers[name].delta_weight().detach()
        return update.T if config.get("fan_in_fan_out") else update

    report = testing.check(ours, like=reference.peft_delta_weight)
    assert {result.status for result in report} == {"passed"}


# ---- peft_export ---------------------------------------------------------------------------------


def export_with(fold=lambda layer: (layer["A"], layer["B"], layer["scaling"]), **changes):
    """An export whose layers are `fold`ed, with entries of the configuration changed."""

    def mine(layers):
        folded = {}
        for name, layer in layers.items():
            c = 1.0 if layer["gate"] is None else layer["gate"]
            A, B, scaling = fold({**layer, "B": layer["B"] * c})
            folded[name] = {"A": A, "B": B, "gate": None, "scaling": scaling}
        tensors, config = reference.peft_export(folded)
        ranks = {name: len(layer["A"]) for name, layer in folded.items() if len(layer["A"])}
        return tensors, {**config, **{key: f(config, ranks) for key, f in changes.items()}}

    return mine


def rank_stabilized(layers):
    tensors, config = reference.peft_export(layers)
    ranks = config["rank_pattern"]
    alphas = {key: alpha / sqrt(ranks[key]) for key, alpha in config["alpha_pattern"].items()}
    return tensors, {**config, "use_rslora": True, "alpha_pattern": alphas}


def the_commonest_as_defaults(layers):
    tensors, config = reference.peft_export(layers)
    for default, pattern in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
        common = Counter(config[pattern].values()).most_common(1)[0][0]
        config[default] = common
        config[pattern] = {k: v for k, v in config[pattern].items() if v != common}
    return tensors, config


def other_numbers(layers):
    tensors, config = reference.peft_export(layers)
    config["rank_pattern"] = {k: np.int64(v) for k, v in config["rank_pattern"].items()}
    config["alpha_pattern"] = {
        k: torch.tensor(v, dtype=torch.float64) for k, v in config["alpha_pattern"].items()
    }
    return tensors, config


HARMLESS_EXPORTS = {
    "scaling in A": export_with(lambda la: (la["A"] * la["scaling"], la["B"], 1.0)),
    "scaling in B": export_with(lambda la: (la["A"], la["B"] * la["scaling"], 1.0)),
    "rank stabilized": rank_stabilized,
    "defaults": the_commonest_as_defaults,
    "numbers of other libraries": other_numbers,
    "anchored": export_with(
        target_modules=lambda config, ranks: "^(?:" + "|".join(map(re.escape, ranks)) + ")$"
    ),
    "ranks of another order": export_with(
        lambda la: (la["A"].flip(0), la["B"].flip(1), la["scaling"])
    ),
    "dense copies": export_with(lambda la: (la["A"].clone(), la["B"].contiguous(), la["scaling"])),
}


@pytest.mark.parametrize("name", HARMLESS_EXPORTS)
def test_harmless_exports_pass(name):
    report = testing.check(HARMLESS_EXPORTS[name], like=reference.peft_export, on_fail=None)
    assert not report.failed, str(report)


def doubled(key):
    return lambda config, ranks: {k: 2 * v for k, v in config[key].items()}


WRONG_EXPORTS = {
    "a list": (export_with(target_modules=lambda config, ranks: list(ranks)), "as a list"),
    "ranks twice as large": (export_with(rank_pattern=doubled("rank_pattern")), None),
    "alphas twice as large": (export_with(alpha_pattern=doubled("alpha_pattern")), None),
    "whole alphas": (
        export_with(
            alpha_pattern=lambda config, ranks: {
                k: round(v) for k, v in config["alpha_pattern"].items()
            }
        ),
        None,
    ),
    "DoRA": (export_with(use_dora=lambda config, ranks: True), None),
    "no peft_type": (export_with(peft_type=lambda config, ranks: None), None),
    "trained biases": (export_with(bias=lambda config, ranks: "all"), None),
    "A and B transposed": (export_with(lambda la: (la["B"].T, la["A"].T, la["scaling"])), None),
    "gates in A and B": (export_with(lambda la: (la["A"] * 2, la["B"] * 2, la["scaling"])), None),
    "keys without a prefix": (
        lambda layers: (
            {
                key.removeprefix(PREFIX): tensor
                for key, tensor in reference.peft_export(layers)[0].items()
            },
            reference.peft_export(layers)[1],
        ),
        None,
    ),
    "one rank for all": (
        export_with(rank_pattern=lambda config, ranks: {}),
        "without rank_pattern",
    ),
    "keys unescaped": (
        export_with(
            rank_pattern=lambda config, ranks: {f"^{name}": r for name, r in ranks.items()}
        ),
        None,
    ),
}


@pytest.mark.parametrize("name", WRONG_EXPORTS)
def test_wrong_exports_are_caught(name):
    mine, hint = WRONG_EXPORTS[name]
    failed(mine, reference.peft_export, hint)


# ---- peft_delta_weight ---------------------------------------------------------------------------


def test_harmless_readers_pass():
    def rank_by_rank(tensors, config, name):
        A = tensors.get(f"{PREFIX}{name}.lora_A.weight")
        if A is None:
            return None
        B = tensors[f"{PREFIX}{name}.lora_B.weight"]
        alpha = of_layer(config.get("alpha_pattern"), name, config.get("lora_alpha", 8))
        scaling = alpha / (sqrt(len(A)) if config.get("use_rslora") else len(A))
        update = sum(torch.outer(B[:, i], A[i]) for i in range(len(A))) * scaling
        return update.T.contiguous() if config.get("fan_in_fan_out") else update

    def scaling_first(tensors, config, name):
        scaled = {k: v * 3.0 if ".lora_A." in k else v / 3.0 for k, v in tensors.items()}
        return reference.peft_delta_weight(scaled, config, name)

    def in_numpy(tensors, config, name):
        given = {key: torch.as_tensor(value) for key, value in tensors.items()}
        found = reference.peft_delta_weight(given, config, name)
        return None if found is None else found.numpy()

    like = reference.peft_delta_weight
    for mine in (rank_by_rank, scaling_first):
        testing.check(mine, like=like)
    testing.check(in_numpy, like=like, convert=(np.asarray, torch.as_tensor))


def with_config(change):
    return lambda tensors, config, name: reference.peft_delta_weight(tensors, change(config), name)


def pattern_is_none(config):
    return {**config, "rank_pattern": dict(config["rank_pattern"])}


def sorted_keys(config):
    return {
        key: dict(sorted(value.items())) if isinstance(value, dict) else value
        for key, value in config.items()
    }


def raises_for_others(tensors, config, name):
    return config["lora_alpha"] * tensors[f"{PREFIX}{name}.lora_B.weight"]


def keeps_the_first_scaling(tensors, config, name):
    first = next(iter(tensors)).removeprefix(PREFIX).removesuffix(".lora_A.weight")
    one = reference.peft_delta_weight(tensors, config, name)
    if one is None:
        return None
    scaling = of_layer(config.get("alpha_pattern"), first, config.get("lora_alpha", 8))
    return one / of_layer(config.get("alpha_pattern"), name, config.get("lora_alpha", 8)) * scaling


WRONG_READERS = {
    "KeyError for null patterns": (with_config(pattern_is_none), None),
    "sorted keys": (with_config(sorted_keys), None),
    "KeyError for layers without adapter": (raises_for_others, None),
    "one scaling": (keeps_the_first_scaling, None),
    "no alpha_pattern": (
        with_config(lambda c: {**c, "alpha_pattern": {}}),
        "without alpha_pattern",
    ),
    "no rsLoRA": (with_config(lambda c: {**c, "use_rslora": False}), "asks for alpha / sqrt(r)"),
    "another default of alpha": (with_config(lambda c: {"lora_alpha": 16, **c}), None),
    "another default of r": (with_config(lambda c: {"r": 16, **c}), None),
}


@pytest.mark.parametrize("name", WRONG_READERS)
def test_wrong_readers_are_caught(name):
    mine, hint = WRONG_READERS[name]
    failed(mine, reference.peft_delta_weight, hint)


def test_the_fault_that_fits_most_cases_is_named():
    def plain_names(tensors, config, name):
        found = dict(config)
        for key in ("rank_pattern", "alpha_pattern"):
            pattern = config.get(key) or {}
            found[key] = {re.escape(name): pattern[name]} if name in pattern else {}
        return reference.peft_delta_weight(tensors, found, name)

    hints = Counter(
        result.hint.split(";")[0]
        for result in failed(plain_names, reference.peft_delta_weight)
        if result.twins  # the first failures alone are held against twins
    )
    assert set(hints) == {"equals ΔW with keys as plain names"}
