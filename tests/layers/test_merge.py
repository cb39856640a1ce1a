"""merge.py: W + ΔW by hand on a deep copy, and every bit of the base back afterwards."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from helpers.models import (
    TOKENS,
    Conv1DLike,
    assert_unchanged,
    inputs,
    randomize,
    snapshot,
    with_deltas_by_hand,
    wrapped,
)
from torch import nn

from minirank import LoRALinear, lora_layers, merge, reference, unmerge, unwrap, wrap


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_merging_puts_the_sum_into_the_weight_and_unmerging_takes_it_out_bit_for_bit(dtype):
    plain, model, layers = wrapped(dtype)
    before, expected = snapshot(model), with_deltas_by_hand(plain, layers)
    for _ in range(20):
        assert merge(model, untie=True) == list(layers)
        assert merge(model, untie=True) == []
        for name, layer in layers.items():
            W = layer.base.weight
            assert W.dtype == dtype
            assert not W.requires_grad
            # A sum in float32 or better, then one rounding to W's own precision.
            work = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
            torch.testing.assert_close(
                W, expected.get_submodule(name).weight, rtol=torch.finfo(dtype).eps, atol=20 * work
            )
            assert torch.equal(layer.weight, W)
        if dtype == torch.float64:
            torch.testing.assert_close(model(TOKENS), expected(TOKENS), rtol=1e-12, atol=1e-12)
        assert unmerge(model) == list(layers)
        assert unmerge(model) == []
        assert_unchanged(model, before)


def test_training_and_evaluating_do_not_merge():
    _, model, layers = wrapped()
    before = [layer.base.weight.clone() for layer in layers.values()]
    for switch in (model.eval, model.train, model.eval):
        switch()
        assert not any(layer.merged for layer in layers.values())
        assert all(
            torch.equal(x.base.weight, w) for x, w in zip(layers.values(), before, strict=True)
        )


def test_merging_a_tied_weight_is_refused_or_unties_it():
    plain, model, layers = wrapped()
    before, expected = snapshot(model), with_deltas_by_hand(plain, layers)(TOKENS)
    with pytest.raises(ValueError, match=r"'head' is tied to emb\.weight.*untie=True"):
        merge(model)
    assert_unchanged(model, before)
    merge(model, untie=True)
    assert torch.equal(model.emb.weight, plain.emb.weight)
    torch.testing.assert_close(model(TOKENS), expected, rtol=1e-12, atol=1e-12)
    unmerge(model)
    assert model.head.base.weight is model.emb.weight
    assert_unchanged(model, before)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["lora_A", "lora_B", "gate"])
def test_an_adapter_that_is_not_finite_refuses_to_merge_and_nothing_is_merged(name, value):
    _, model, layers = wrapped(gate=1.0)
    with torch.no_grad():
        layers["like"].get_parameter(name).view(-1)[-1] = value
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"'like' is not finite"):
        merge(model, untie=True)
    assert_unchanged(model, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_entry_of_the_weight_that_is_not_finite_refuses_to_merge(dtype, value):
    model = nn.Sequential(nn.Linear(6, 5, dtype=dtype))
    layer = wrap(model, {"0": 1})["0"]
    with torch.no_grad():
        layer.base.weight[3, 2] = value
    with pytest.raises(ValueError, match=r"'0' is not finite"):
        merge(model)
    assert not layer.merged


def test_infinities_of_both_signs_refuse_to_merge():
    model = nn.Sequential(nn.Linear(6, 5))
    layer = wrap(model, {"0": 1})["0"]
    with torch.no_grad():
        layer.base.weight[0, 0], layer.base.weight[4, 5] = math.inf, -math.inf
    with pytest.raises(ValueError, match=r"'0' is not finite"):
        merge(model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_one_entry_that_overflows_in_half_precision_refuses_to_merge(dtype):
    model = nn.Sequential(nn.Linear(6, 5, dtype=dtype))
    layer = wrap(model, {"0": 1}, scaling=1.0)["0"]
    largest = torch.finfo(dtype).max
    with torch.no_grad():
        layer.base.weight[3, 2] = largest
        layer.lora_A.zero_()[0, 2] = 1.0
        layer.lora_B.zero_()[3, 0] = largest / 64
    with pytest.raises(ValueError, match=rf"'0' is not finite in {dtype}"):
        merge(model)


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
def test_finite_entries_whose_sum_overflows_merge(dtype):
    model = nn.Sequential(nn.Linear(6, 5, dtype=dtype))
    layer = wrap(model, {"0": 1})["0"]
    nn.init.constant_(layer.base.weight, torch.finfo(dtype).max / 2)
    assert not layer.base.weight.sum().isfinite()
    assert merge(model) == ["0"]
    assert layer.base.weight.isfinite().all()


def test_a_sum_that_overflows_in_half_precision_refuses_to_merge():
    model = nn.Sequential(
        nn.Linear(3, 3, dtype=torch.float16), nn.Linear(3, 3, dtype=torch.float16)
    )
    layer = wrap(model, {"0": 1, "1": 1})["1"]
    nn.init.constant_(layer.lora_A, 300.0)
    nn.init.constant_(layer.lora_B, 300.0)  # finite each, but 90,000 > 65,504
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"'1' is not finite in torch\.float16"):
        merge(model)
    assert_unchanged(model, before)


def test_a_computed_weight_is_adapted_but_not_merged():
    model = nn.Sequential(
        nn.Linear(4, 4), nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    ).double()
    W, b, x = (
        model[1].weight.detach(),
        model[1].bias.detach(),
        torch.randn(3, 4, dtype=torch.float64),
    )
    layers = wrap(model, {"0": 2, "1": 2})
    randomize(layers)
    delta = layers["1"].delta_weight()
    torch.testing.assert_close(layers["1"](x), x @ (W + delta).T + b, rtol=1e-12, atol=1e-12)
    before = snapshot(model)
    with pytest.raises(ValueError, match="parametrization"):
        merge(model)
    assert_unchanged(model, before)
    unwrap(model)
    assert all(p.requires_grad for p in model.parameters())


def test_merging_passes_over_tensors_without_a_plain_storage():
    model = nn.Sequential(nn.Linear(3, 3), nn.LazyLinear(2), nn.Linear(3, 3, device="meta"))
    model.register_buffer("graph", torch.eye(3).to_sparse())
    wrap(model, {"0": 1})
    assert merge(model) == ["0"]


def test_the_functions_take_a_single_layer_as_the_model():
    layer = LoRALinear(nn.Linear(3, 3), 1)
    assert lora_layers(layer) == {"": layer}
    assert merge(layer) == unmerge(layer) == [""]


def test_changing_the_dtype_while_merged_changes_the_weight_that_comes_back():
    plain, model, layers = wrapped(torch.float32)
    merge(model, untie=True)
    model.to(torch.float64)
    unmerge(model)
    assert model.head.base.weight is model.emb.weight
    assert torch.equal(layers["body.up"].base.weight, plain.body["up"].weight.double())
    expected = with_deltas_by_hand(plain.double(), layers)
    torch.testing.assert_close(model(TOKENS), expected(TOKENS), rtol=1e-12, atol=1e-12)


class Masked(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, self.weight * (self.weight > self.weight.min()), self.bias)


class Cosine(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(nn.functional.normalize(x, dim=-1), self.weight)


class TwoInputs(nn.Linear):
    def forward(self, x, scale):
        return super().forward(x) * scale


class Renamed(nn.Linear):
    def forward(self, x):
        return super().forward(x)


@pytest.mark.parametrize("kind", [Masked, Cosine, TwoInputs])
def test_a_layer_that_does_not_apply_its_weight_as_it_is_does_not_merge(kind):
    model = nn.Sequential(nn.Linear(4, 4), kind(4, 4))
    randomize(wrap(model, {"0": 1, "1": 1}))
    before = snapshot(model)
    with pytest.raises(
        ValueError, match=rf"'1' is a {kind.__name__} that does not compute W x \+ b"
    ):
        merge(model)
    assert_unchanged(model, before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_subclass_that_applies_its_weight_merges_whatever_its_bias(dtype):
    model = nn.Sequential(Renamed(4, 4)).to(dtype)
    nn.init.constant_(model[0].bias, 1e3)
    randomize(wrap(model, {"0": 1}))
    assert merge(model) == ["0"]


def test_a_float32_adapter_beside_a_float64_weight_merges_in_float64():
    model = nn.Sequential(nn.Linear(4, 4)).double()
    W = model[0].weight.detach().clone()
    layer = wrap(model, {"0": 2}, dtype=torch.float32)["0"]
    assert torch.equal(layer.merged_weight(), W)  # B = 0; a detour by float32 would round W
    randomize(layer)
    expected = W + layer.lora_B.double() @ layer.lora_A.double()
    merge(model)
    torch.testing.assert_close(layer.base.weight, expected, rtol=1e-15, atol=1e-15)


def test_wrapping_merging_and_unwrapping_work_under_inference_mode():
    model = nn.Sequential(nn.Linear(4, 4))
    with torch.inference_mode():
        layer = wrap(model, {"0": 2})["0"]
        randomize(layer)
        merge(model)
        unwrap(model)
    assert not layer.lora_A.is_inference()
    assert not model[0].weight.is_inference()
    assert model[0].weight.requires_grad


# ---- against the reference ----------------------------------------------------------------------


@pytest.mark.parametrize("gate", [None, 0.5])
@pytest.mark.parametrize("adapter", [None, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_merged_weight_is_the_references(dtype, adapter, gate):
    lora = LoRALinear(nn.Linear(5, 7, dtype=dtype), 3, scaling=2.0, gate=gate, dtype=adapter)
    randomize(lora)
    expected = reference.merged_weight(lora.base.weight, lora.lora_A, lora.lora_B, 2.0, lora.gate)
    assert lora.merged_weight().dtype == expected.dtype == dtype
    # Both sum four terms of size one or so in float32 or better, and round once to W's type.
    work = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    torch.testing.assert_close(
        lora.merged_weight(), expected, rtol=torch.finfo(dtype).eps, atol=8 * work
    )


@pytest.mark.parametrize("gate", [None, 0.5])
@pytest.mark.parametrize(
    "base", [nn.Linear(5, 7), Conv1DLike(7, 5)], ids=lambda m: type(m).__name__
)
def test_a_layer_merges_and_unmerges_as_the_references_does(base, gate):
    lora = LoRALinear(copy.deepcopy(base).double(), 3, scaling=2.0, gate=gate)
    randomize(lora)
    twin = reference.Layer(
        lora.base.weight.detach().clone(),
        lora.base.bias.detach(),
        lora.lora_A.detach(),
        lora.lora_B.detach(),
        2.0,
        None if gate is None else lora.gate.detach(),
        transposed=isinstance(base, Conv1DLike),
    )
    x = inputs(2, 3, 5)
    for change, change_twin in [
        (merge, twin.merge),
        (merge, twin.merge),
        (unmerge, twin.unmerge),
        (unmerge, twin.unmerge),
    ]:
        change(lora)
        change_twin()
        torch.testing.assert_close(lora.base.weight, twin.weight, rtol=1e-14, atol=1e-14)
        torch.testing.assert_close(lora(x), twin(x), rtol=1e-13, atol=1e-13)
    assert torch.equal(lora.base.weight, twin.weight)
