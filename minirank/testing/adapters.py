"""LoRA adapters of mixed rank and alpha in PEFT's format, with the output that a loader must give.

Each adapter is a folder as PEFT ≥ 0.15 reads it, beside the weights of the layers of its model, an
input for each layer, and each layer's output. The layers are independent of each other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from math import sqrt
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..reference.peft_format import PREFIX, of_layer
from .case import Arguments, CaseSpec, Contract, Implementation

OUTPUT = "y = x (W + ΔW)ᵀ + b, ΔW = alpha / r · B A, or alpha / sqrt(r) · B A with rsLoRA"
ROWS = 3  # of each layer's input
D_IN, D_OUT = 7, 5


class BaseLayer(NamedTuple):
    """A layer of the model. Weight: (d_out, d_in); "Conv1D", as in GPT-2: (d_in, d_out)."""

    kind: str
    weight: Tensor
    bias: Tensor | None
    x: Tensor


class Adapter(NamedTuple):
    """What lies in an adapter's folder, and the model that it is for."""

    tensors: dict[str, Tensor]
    config: dict[str, Any]
    layers: dict[str, BaseLayer]


# ---- what a loader has to do --------------------------------------------------------------------


def load_and_run(adapter: Adapter) -> dict[str, Tensor]:
    """{name: y} of every layer of the model, adapted or not."""
    outputs = {}
    for name, layer in adapter.layers.items():
        transposed = layer.kind == "Conv1D"
        config = {**adapter.config, "fan_in_fan_out": transposed}
        delta_weight = reference.peft_delta_weight(adapter.tensors, config, name)
        W = layer.weight if delta_weight is None else layer.weight + delta_weight
        y = layer.x @ (W if transposed else W.T)
        outputs[name] = y if layer.bias is None else y + layer.bias
    return outputs


def details(adapter: Adapter, name: str) -> dict[str, Any]:
    """Rank, alpha and scaling of one layer, as PEFT reads them. Rank 0 is no adapter."""
    A = adapter.tensors.get(f"{PREFIX}{name}.lora_A.weight")
    if A is None:
        return {"rank": 0, "alpha": None, "scaling": None}
    alpha = of_layer(adapter.config["alpha_pattern"], name, adapter.config["lora_alpha"])
    divisor = sqrt(len(A)) if adapter.config["use_rslora"] else len(A)
    return {"rank": len(A), "alpha": alpha, "scaling": alpha / divisor}


# ---- the adapters -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """One adapter.

    Args:
        about: what goes wrong in a loader that fails here.
        ranks: {name of a layer of the model: rank}. 0: the layer has no adapter.
        config: what differs from PEFT's defaults. "target_modules" is filled in where it is absent.
        kind: of all layers: "Linear" or "Conv1D".
        square: d_out is d_in in all layers.
        fold: a factor on B for each layer.
    """

    about: str
    ranks: Mapping[str, int]
    config: Mapping[str, Any]
    kind: str = "Linear"
    square: bool = False
    fold: Mapping[str, float] | None = None


def exact(values: Mapping[str, Any]) -> dict[str, Any]:
    """A pattern whose keys match these names alone, written as minirank writes it."""
    layers = {
        name: {"A": torch.zeros(1, 1), "B": torch.zeros(1, 1), "gate": None, "scaling": value}
        for name, value in values.items()
    }
    keys = reference.peft_export(layers)[1]["alpha_pattern"]
    return dict(zip(keys, values.values(), strict=True))


def mixed(ranks: Mapping[str, int], alphas: Mapping[str, float], **more: Any) -> dict[str, Any]:
    """A configuration with exact patterns. Its r and lora_alpha hold for no layer."""
    adapted = {name: rank for name, rank in ranks.items() if rank}
    patterns = {"rank_pattern": exact(adapted), "alpha_pattern": exact(alphas)}
    return {"r": 16, "lora_alpha": 999.0, **patterns, **more}


BLOCKS = {"h.1.attn": 2, "h.1.fc": 1, "h.10.attn": 3, "h.10.fc": 5}
SUFFIXES = {"fc": 1, "enc.fc": 3, "dec.enc.fc": 2, "xfc": 2, "encfc": 4}
REGEX = {"w[0]": 2, "a+b": 1, "x(1)": 3, "q|v": 2, "x^2$": 1, "a.b": 3, "a-b": 2, "c*": 1}
REGEX |= {"$h": 3, "^t": 2, "n{2}": 1, "u?": 3, "back\\slash": 2}

RECIPES: Mapping[str, Recipe] = {
    "one-rank": Recipe(
        "no patterns at all: every layer has r and lora_alpha",
        {"up": 2, "down": 2},
        {"r": 2, "lora_alpha": 5.0},
    ),
    "ranks-by-layer": Recipe(
        "rank_pattern alone: each layer's scaling is lora_alpha over its own rank, 32 at rank 1",
        BLOCKS,
        {"r": 5, "lora_alpha": 32, "rank_pattern": exact({**BLOCKS})},
    ),
    "alphas-by-layer": Recipe(
        "alpha_pattern alone, with whole and fractional alphas; the layer without a key has "
        "lora_alpha",
        dict.fromkeys(BLOCKS, 2),
        {"r": 2, "lora_alpha": 3, "alpha_pattern": exact({"h.1.fc": 7, "h.10.fc": 0.75})},
    ),
    "ranks-and-alphas": Recipe(
        "both patterns, for every layer: r and lora_alpha hold for none; h.1 is not h.10",
        BLOCKS,
        mixed(BLOCKS, {"h.1.attn": 3.0, "h.1.fc": 1.5, "h.10.attn": 4.5, "h.10.fc": 20.0}),
    ),
    "rslora": Recipe(
        "use_rslora: the scaling is alpha over the root of the layer's own rank",
        BLOCKS,
        mixed(BLOCKS, dict.fromkeys(BLOCKS, 6.0), use_rslora=True),
    ),
    "rank-0": Recipe(
        "layers of rank 0 are in no file, and give the output of the plain model",
        {"h.0.fc": 0, "h.1.fc": 2, "h.2.fc": 0, "h.3.fc": 1},
        mixed({"h.1.fc": 2, "h.3.fc": 1}, {"h.1.fc": 4.0, "h.3.fc": 3.0}),
    ),
    "common-suffixes": Recipe(
        "fc, enc.fc and dec.enc.fc end alike, and each has a rank and an alpha of its own",
        SUFFIXES,
        mixed(SUFFIXES, {"fc": 1.0, "enc.fc": 12.0, "dec.enc.fc": 5.0, "xfc": 0.5, "encfc": 9.0}),
    ),
    "keys-as-endings": Recipe(
        "a key without ^ holds for a whole name, or for its end behind a dot: fc for enc.fc, not "
        "for xfc; h.1 not for h.10",
        {"fc": 3, "enc.fc": 3, "xfc": 2, "h.1": 1, "t.h.1": 1, "h.10": 2},
        {
            "r": 2,
            "lora_alpha": 2,
            "rank_pattern": {"fc": 3, "h.1": 1},
            "alpha_pattern": {"fc": 12, "h.1": 5},
        },
    ),
    "first-key-wins": Recipe(
        "of several keys that match, the first one of the file counts, not the longest",
        {"fc": 3, "enc.fc": 3, "dec.fc": 1, "up": 2},
        {
            "r": 2,
            "lora_alpha": 2,
            "rank_pattern": {"dec.fc": 1, "fc": 3, "enc.fc": 3},
            "alpha_pattern": {"dec.fc": 4, "fc": 12, "enc.fc": 6, ".*fc": 7},
        },
    ),
    "keys-as-regex": Recipe(
        "keys are regular expressions: one holds for several layers, and a dot is any character",
        {"h.0.fc": 2, "h.1.fc": 2, "h.2.fc": 1, "h.2.up": 1},
        {
            "r": 1,
            "lora_alpha": 2,
            "rank_pattern": {r"h\.[01]\.fc": 2},
            "alpha_pattern": {r"h\.(0|2)\..*": 5, "h.1.f.": 9},
        },
    ),
    "regex-characters": Recipe(
        "names with characters of regular expressions, escaped in the keys",
        REGEX,
        mixed(REGEX, {name: 2.0 + i for i, name in enumerate(REGEX)}),
    ),
    "unescaped-names": Recipe(
        "a key that does not match itself as a regular expression counts for the layer it spells",
        {"w[0]": 3, "w[1]": 1, "w0": 3},
        {
            "r": 1,
            "lora_alpha": 2,
            "rank_pattern": {"w[0]": 3},
            "alpha_pattern": {"w[0]": 12, "w[1]": 5},
        },
    ),
    "transposed": Recipe(
        "Conv1D as in GPT-2: the weight is (d_in, d_out), and ΔW is transposed",
        BLOCKS,
        mixed(BLOCKS, dict.fromkeys(BLOCKS, 4.0), fan_in_fan_out=True),
        kind="Conv1D",
    ),
    "transposed-square": Recipe(
        "the same with square matrices, whose shapes tell nothing",
        BLOCKS,
        mixed(BLOCKS, dict.fromkeys(BLOCKS, 4.0), fan_in_fan_out=True),
        kind="Conv1D",
        square=True,
    ),
    "portable": Recipe(
        "every alpha is the layer's rank, and the scaling is in B: the same numbers come out of a "
        "loader that ignores the patterns and multiplies by 1",
        BLOCKS,
        {
            "r": 5,
            "lora_alpha": 5,
            "rank_pattern": exact(BLOCKS),
            "alpha_pattern": exact({name: float(rank) for name, rank in BLOCKS.items()}),
        },
        fold={"h.1.attn": 0.5, "h.1.fc": 4.0, "h.10.attn": 2.0, "h.10.fc": 3.0},
    ),
}


def adapter_arguments(recipe: Recipe) -> Arguments:
    """The adapter of a recipe, with fixed numbers."""
    tensors: dict[str, Tensor] = {}
    layers: dict[str, BaseLayer] = {}
    for i, (name, rank) in enumerate(recipe.ranks.items()):
        generator = torch.Generator().manual_seed(100 + i)

        def normal(*shape: int, generator: torch.Generator = generator) -> Tensor:
            # Rounded to float32, since they are written to files of that dtype.
            return torch.randn(shape, generator=generator, dtype=torch.float64).float().double()

        d_in = D_IN + i % 4
        d_out = d_in if recipe.square else D_OUT + i % 2
        W = normal(d_out, d_in)
        bias = normal(d_out) if i % 2 else None
        weight = W.T.contiguous() if recipe.kind == "Conv1D" else W
        layers[name] = BaseLayer(recipe.kind, weight, bias, normal(ROWS, d_in))
        if rank:
            fold = 1.0 if recipe.fold is None else recipe.fold[name]
            tensors[f"{PREFIX}{name}.lora_A.weight"] = normal(rank, d_in)
            tensors[f"{PREFIX}{name}.lora_B.weight"] = fold * normal(d_out, rank)
    return Arguments((Adapter(tensors, configuration(recipe), layers),))


def configuration(recipe: Recipe) -> dict[str, Any]:
    """The content of adapter_config.json."""
    adapted = {
        name: {"A": torch.zeros(rank, 1), "B": torch.zeros(1, rank), "gate": None, "scaling": 1.0}
        for name, rank in recipe.ranks.items()
    }
    _, defaults = reference.peft_export(adapted)
    no_patterns: dict[str, Any] = {"rank_pattern": {}, "alpha_pattern": {}}
    return {**defaults, **no_patterns, "inference_mode": True, **recipe.config}


# ---- the contract -------------------------------------------------------------------------------


def with_config(**changes: Any) -> Implementation:
    """A loader that sees another configuration."""

    def twin(adapter: Adapter) -> dict[str, Tensor]:
        return load_and_run(adapter._replace(config={**adapter.config, **changes}))

    return twin


def with_patterns(read: Callable[[Adapter, str], tuple[float, float]]) -> Implementation:
    """A loader with another (rank, alpha) for each layer."""

    def twin(adapter: Adapter) -> dict[str, Tensor]:
        pairs = {name: read(adapter, name) for name in adapter.layers}
        ranks, alphas = (exact({n: pair[i] for n, pair in pairs.items()}) for i in (0, 1))
        changes = {"rank_pattern": ranks, "alpha_pattern": alphas}
        return load_and_run(adapter._replace(config={**adapter.config, **changes}))

    return twin


def own(adapter: Adapter, name: str) -> tuple[float, float]:
    found = details(adapter, name)
    return found["rank"] or 1, found["alpha"] or 1.0


def by_substring(adapter: Adapter, name: str) -> tuple[float, float]:
    """Patterns read as plain text that may stand anywhere in the name."""

    def value(pattern: Mapping[str, Any], default: float) -> float:
        keys = [key for key in pattern if key.lstrip("^").replace("\\", "") in name]
        return float(pattern[keys[0]]) if keys else default

    config = adapter.config
    rank = value(config["rank_pattern"], config["r"])
    return rank, value(config["alpha_pattern"], config["lora_alpha"])


def no_adapter(adapter: Adapter) -> dict[str, Tensor]:
    return load_and_run(adapter._replace(tensors={}))


def not_transposed(adapter: Adapter) -> dict[str, Tensor]:
    """ΔW (d_out, d_in) is added to a weight (d_in, d_out), which square matrices let pass."""
    outputs = {}
    for name, layer in adapter.layers.items():
        config = {**adapter.config, "fan_in_fan_out": False}
        delta_weight = reference.peft_delta_weight(adapter.tensors, config, name)
        W = layer.weight if delta_weight is None else layer.weight + delta_weight
        y = layer.x @ (W if layer.kind == "Conv1D" else W.T)
        outputs[name] = y if layer.bias is None else y + layer.bias
    return outputs


ADAPTERS = Contract(
    "adapters",
    "PEFT ≥ 0.15, adapter_config.json; rsLoRA: arXiv 2312.03732",
    load_and_run,
    tuple(
        CaseSpec(name, f"{OUTPUT}: {recipe.about}", partial(adapter_arguments, recipe), terms=24)
        for name, recipe in RECIPES.items()
    ),
    {
        "the output without any adapter": no_adapter,
        "the output without rank_pattern and alpha_pattern": with_config(
            rank_pattern={}, alpha_pattern={}
        ),
        "the output without alpha_pattern": with_config(alpha_pattern={}),
        "the output with alpha over r, without rank_pattern": with_patterns(
            lambda adapter, name: (adapter.config["r"], own(adapter, name)[1])
        ),
        "the output without use_rslora": with_config(use_rslora=False),
        "the output without any scaling": with_patterns(lambda *_: (1, 1.0)),
        "the output with alpha in place of alpha / r": with_patterns(
            lambda adapter, name: (1, own(adapter, name)[1])
        ),
        "the output with the patterns read as parts of names": with_patterns(by_substring),
        "the output with ΔW not transposed": not_transposed,
    },
)
