"""An estimate from a packed model is that of the same model dequantised."""

from __future__ import annotations

import pytest
import torch
from helpers.curvature_cases import assert_equals
from helpers.estimators import LOSS_BASED
from helpers.packed import LIBRARIES, FourBitLinear, data, dequantized, loss_fn, packed_model

from minirank.curvature import input_second_moment

ESTIMATORS = LOSS_BASED | {"input second moment": input_second_moment}
every = pytest.mark.parametrize("estimate", ESTIMATORS.values(), ids=ESTIMATORS.keys())


@every
def test_a_packed_toy_equals_its_dequantised_twin_in_float64(estimate):
    model = packed_model(FourBitLinear, torch.float64, width=8)
    batches = data(torch.float64, width=8)
    expected = estimate(dequantized(model), loss_fn, batches, targets=["0", "4"])
    found = estimate(model, loss_fn, batches, targets=["0", "4"])
    assert_equals(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("pack", "tolerance"),
    [
        ("torchao int8", 1e-4),
        ("torchao int4", 1e-4),
        ("quanto int8", 1e-4),
        ("hqq 4 bits", 1e-4),
        ("bitsandbytes 8 bits", 0.05),  # it rounds its input to 8 bits
        ("bitsandbytes 4 bits", 1e-4),
    ],
)
@pytest.mark.parametrize("name", ["empirical Fisher", "Gauss-Newton", "Hutchinson, outputs"])
def test_a_quantised_layer_equals_its_dequantised_twin(pack, tolerance, name):
    model = packed_model(LIBRARIES[pack])
    estimate = ESTIMATORS[name]
    expected = estimate(dequantized(model), loss_fn, data())
    for layer, diagonal in estimate(model, loss_fn, data()).items():
        allowed = tolerance * float(expected[layer].abs().max())
        torch.testing.assert_close(diagonal, expected[layer], rtol=tolerance, atol=allowed)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@every
def test_a_half_precision_model_computes_its_packed_layers_in_its_own_type(estimate, dtype):
    """They cannot be cast to float32; the results are float32 all the same."""
    model = packed_model(FourBitLinear, dtype, width=8)
    found = estimate(model, loss_fn, data(dtype, width=8), targets=["0", "4"])
    twin = dequantized(model).float()
    batches = [(x.float(), labels) for x, labels in data(dtype, width=8)]
    expected = estimate(twin, loss_fn, batches, targets=["0", "4"])
    for name, diagonal in found.items():
        assert diagonal.dtype == torch.float32
        scale = float(expected[name].abs().max())
        torch.testing.assert_close(diagonal, expected[name], rtol=0.1, atol=0.05 * scale)
    assert "forward" not in vars(model[0])
