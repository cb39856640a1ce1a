"""linear.py: what counts as a linear layer, and which way round its weight lies."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.models import Conv1DLike, LinearLike, assert_unchanged, snapshot
from torch import nn

from minirank import linear_targets, wrap
from minirank.layers.linear import is_transposed, linear_shape, read_weight


def test_linear_modules_their_subclasses_and_look_alikes():
    class Sub(nn.Linear):
        nf = 3  # some other meaning

    for module in (
        nn.Linear(3, 5),
        nn.Linear(3, 5, bias=False),
        LinearLike(3, 5),
        Conv1DLike(5, 3),
        Sub(3, 5),
    ):
        assert linear_shape(module) == (5, 3), module
        assert is_transposed(module) == isinstance(module, Conv1DLike)
    assert linear_shape(nn.Linear(3, 5, dtype=torch.bfloat16)) == (5, 3)
    assert linear_shape(nn.Linear(3, 5, device="meta")) == (5, 3)
    assert linear_shape(nn.MultiheadAttention(4, 2).out_proj) == (4, 4)


def test_square_weights_are_told_apart_by_their_attributes():
    assert not is_transposed(nn.Linear(4, 4))
    assert is_transposed(Conv1DLike(4, 4))


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.complex64], ids=str
)
def test_quantised_and_complex_weights_are_not_linear(dtype):
    module = nn.Linear(3, 5)
    module.weight = nn.Parameter(torch.ones(5, 3).to(dtype), requires_grad=False)
    assert linear_shape(module) is None


def test_other_modules_are_not_linear():
    wrong = LinearLike(3, 5)
    wrong.in_features = 4
    wrong_conv = Conv1DLike(5, 3)
    wrong_conv.nf = 4
    packed = nn.Linear(3, 5)
    del packed.weight
    packed.weight = "packed"
    others = [
        nn.Embedding(5, 3),
        nn.Conv2d(3, 5, 3),
        nn.LayerNorm(3),
        nn.Bilinear(3, 3, 5),
        nn.LazyLinear(3),
    ]
    for module in [*others, nn.ReLU(), nn.Sequential(nn.Linear(3, 5)), wrong, wrong_conv, packed]:
        assert linear_shape(module) is None, module


def test_looking_at_a_parametrized_weight_changes_nothing():
    """spectral_norm steps its estimate whenever its weight is read in training mode."""

    class Noise(nn.Module):
        def forward(self, weight):
            return weight + torch.randn_like(weight)

    for name, register in {
        "spectral": nn.utils.parametrizations.spectral_norm,
        "noise": lambda m: nn.utils.parametrize.register_parametrization(m, "weight", Noise()),
    }.items():
        model = nn.Sequential(nn.Linear(5, 3)).train()
        register(model[0])
        with torch.no_grad():
            model[0].parametrizations.weight.original.normal_()  # off the estimate's fixed point
        before, state = snapshot(model), torch.get_rng_state()
        assert linear_targets(model) == {"0": model[0]}, name
        wrap(copy.deepcopy(model), {"0": 1})
        assert_unchanged(model, before)
        assert torch.equal(torch.get_rng_state(), state)
        twin = copy.deepcopy(model)
        layer = wrap(twin, {"0": 1})["0"]
        for name, buffer in model.named_buffers():
            assert torch.equal(layer.base.get_buffer(name.removeprefix("0.")), buffer), name
    assert torch.equal(
        read_weight(nn.utils.parametrizations.weight_norm(linear := nn.Linear(3, 2))), linear.weight
    )
