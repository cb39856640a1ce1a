"""A base is recognised in every type, and in its own type a single bit tells it from another."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from minirank import load_adapter, save_adapter, wrap
from minirank.files.base_fingerprint import base_fingerprint, same_base


def linear(dtype=torch.float32, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Linear(5, 7).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_module_is_recognised_in_every_type_and_another_one_in_none(dtype):
    fingerprint = base_fingerprint(linear())
    assert same_base(linear(dtype), fingerprint)
    assert same_base(linear(), base_fingerprint(linear(dtype)))
    assert not same_base(linear(dtype, seed=1), fingerprint)
    without_bias = linear(dtype)
    without_bias.register_parameter("bias", None)
    assert not same_base(without_bias, fingerprint)


def test_in_the_same_type_one_bit_is_enough_to_tell_modules_apart():
    for key in ("weight", "bias"):
        changed = linear()
        with torch.no_grad():
            changed.get_parameter(key).view(-1)[3].nextafter_(torch.tensor(9.0))
        assert not same_base(changed, base_fingerprint(linear()))


def test_rounding_to_the_coarser_type_is_forgiven_and_twice_that_is_not():
    fingerprint = base_fingerprint(linear())
    for factor, same in ((1 + 2**-9, True), (1 + 2**-6, False)):
        changed = linear()
        with torch.no_grad():
            changed.weight.mul_(factor)
        assert same_base(changed.bfloat16(), fingerprint) == same


# ---- when an adapter is loaded ------------------------------------------------------------------


class Masked(nn.Linear):
    def __init__(self, every):
        super().__init__(4, 4)
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)
        self.register_buffer("mask", torch.arange(16).reshape(4, 4) % every == 0)


class Frozen(nn.Module):
    """A linear layer whose weight is a buffer: it has no parameters."""

    in_features = out_features = 4

    def __init__(self, value):
        super().__init__()
        self.register_buffer("weight", torch.full((4, 4), float(value)))


@pytest.mark.parametrize("kind", [Masked, Frozen])
def test_a_base_that_differs_in_a_buffer_is_another_base(tmp_path, kind):
    path = tmp_path / "adapter.safetensors"
    model = nn.Sequential(kind(2))
    wrap(model, {"0": 2})
    save_adapter(model, path)
    with pytest.raises(ValueError, match="'0': not the base weights"):
        load_adapter(nn.Sequential(kind(3)), path)
    assert load_adapter(nn.Sequential(kind(2)), path)
