"""LoRA adapters of mixed ranks and alphas as PEFT 0.15 or newer writes and reads them.

    adapter_config.json       config   r, lora_alpha, and patterns for the layers that differ
    adapter_model.safetensors tensors  "base_model.model.NAME.lora_A.weight"  A  (r, d_in)
                                       "base_model.model.NAME.lora_B.weight"  B  (d_out, r)

    ΔW = alpha / r · B A, or alpha / sqrt(r) · B A if use_rslora; transposed if fan_in_fan_out

The keys of rank_pattern and alpha_pattern are regular expressions. A key holds for a layer if it
matches the whole name, or its end behind a dot; of several, the first one counts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import sqrt
from typing import Any

import torch
from torch import Tensor

PREFIX = "base_model.model."


def peft_export(
    layers: Mapping[str, Mapping[str, Any]],
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, config) of {name: dict(A, B, gate or None, scaling)}.

    PEFT knows no gates, so B takes them up. It has no layers of rank 0, so they are left out.
    """
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for name, layer in layers.items():
        rank = len(layer["A"])
        if rank > 0:
            B = layer["B"] if layer["gate"] is None else layer["B"] * layer["gate"]
            tensors[f"{PREFIX}{name}.lora_A.weight"] = layer["A"]
            tensors[f"{PREFIX}{name}.lora_B.weight"] = B
            ranks[name] = rank
            alphas[name] = layer["scaling"] * rank  # PEFT divides by the rank again
    config = {
        "peft_type": "LORA",
        "r": max(ranks.values(), default=1),
        "lora_alpha": max(alphas.values(), default=1.0),
        # As a list, they would be taken for endings: "fc" would match "enc.fc" too.
        "target_modules": "(" + "|".join(map(re.escape, ranks)) + ")",
        "rank_pattern": {f"^{re.escape(name)}": rank for name, rank in ranks.items()},
        "alpha_pattern": {f"^{re.escape(name)}": alpha for name, alpha in alphas.items()},
        "use_rslora": False,
        "fan_in_fan_out": False,
        "lora_dropout": 0.0,
        "bias": "none",
    }
    return tensors, config


def peft_delta_weight(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], name: str
) -> Tensor | None:
    """ΔW of the layer `name`, in the layout of its weight. None if it has no adapter."""
    if f"{PREFIX}{name}.lora_A.weight" not in tensors:
        return None
    A = tensors[f"{PREFIX}{name}.lora_A.weight"]
    B = tensors[f"{PREFIX}{name}.lora_B.weight"]
    rank = of_layer(config.get("rank_pattern"), name, config.get("r", 8))
    alpha = of_layer(config.get("alpha_pattern"), name, config.get("lora_alpha", 8))
    scaling = alpha / (sqrt(rank) if config.get("use_rslora") else rank)
    delta_weight: Tensor = scaling * B @ A
    return delta_weight.T if config.get("fan_in_fan_out") else delta_weight


def of_layer(pattern: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """The value of the first key that matches the layer's name."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return (pattern or {}).get(name, default)  # a name such as "w[0]" does not match itself


def demo() -> None:
    torch.manual_seed(0)
    layers: dict[str, Any] = {}
    for name, rank in (("h.1.fc", 1), ("h.10.fc", 3), ("h.2.fc", 0)):
        A, B = torch.randn(rank, 5), torch.randn(4, rank)
        layers[name] = {"A": A, "B": B, "gate": torch.rand(rank), "scaling": 2.0}
    tensors, config = peft_export(layers)
    for key in ("target_modules", "r", "lora_alpha", "rank_pattern", "alpha_pattern"):
        print(f"{key:15}{config[key]}")
    for name, layer in layers.items():
        ours = layer["scaling"] * (layer["B"] * layer["gate"]) @ layer["A"]
        theirs = peft_delta_weight(tensors, config, name)
        error = "no adapter" if theirs is None else f"{(theirs - ours).abs().max():.0e}"
        print(f"{name:8} the loaded ΔW differs by: {error}")


if __name__ == "__main__":
    demo()
