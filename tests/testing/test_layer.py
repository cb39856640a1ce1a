"""Our layer passes the layer check, and the check catches each wrong ingredient."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from minirank import LoRALinear, testing


def layer_case(gate, dtype):
    generator = torch.Generator().manual_seed(3)
    layer = LoRALinear(nn.Linear(7, 5, dtype=dtype), 3, alpha=6, gate=gate)
    with torch.no_grad():
        for parameter in (
            layer.lora_A,
            layer.lora_B,
            *([] if layer.gate is None else [layer.gate]),
        ):
            parameter.normal_(generator=generator)
    matrices = {
        "weight": layer.base.weight,
        "bias": layer.base.bias,
        "A": layer.lora_A,
        "B": layer.lora_B,
    }
    x = torch.randn(2, 4, 7, dtype=dtype, generator=generator)
    return layer, x, matrices | {"scaling": 2.0, "gate": layer.gate}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gate", [None, 1.0, 0.0])
def test_our_layer_passes_the_layer_check(gate, dtype):
    layer, x, matrices = layer_case(gate, dtype)
    testing.check_lora_layer(layer, x, **matrices)


@pytest.mark.parametrize("wrong", ["scaling", "A", "B", "bias", "gate", "weight"])
def test_the_layer_check_catches_each_wrong_ingredient(wrong):
    layer, x, matrices = layer_case(1.0, torch.float64)
    matrices[wrong] = matrices[wrong] * 1.000001
    with pytest.raises(AssertionError, match="largest relative difference"):
        testing.check_lora_layer(layer, x, **matrices)
