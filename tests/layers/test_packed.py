"""Packed (quantised) layers: what counts, what is left as it was, and adapters beside them."""

from __future__ import annotations

import copy
import re
import warnings

import pytest
import torch
from helpers.estimators import LOSS_BASED
from helpers.models import randomize
from helpers.packed import (
    EVERY,
    LIBRARIES,
    TOYS,
    FourBitLinear,
    Int8Linear,
    RepackingLinear,
    bits,
    data,
    dequantized,
    loss_fn,
    packed_model,
)
from torch import nn

from minirank import (
    L1RA,
    SensitivityLoRA,
    ShapLoRA,
    UniformRanks,
    linear_targets,
    load_adapter,
    lora_layers,
    merge,
    resize,
    save_adapter,
    unwrap,
    wrap,
)
from minirank.curvature import input_second_moment
from minirank.layers.linear import is_packed, linear_shape
from minirank.measure import measuring
from minirank.packed import dequantized_weight

every = pytest.mark.parametrize("pack", EVERY.values(), ids=EVERY.keys())
toys = pytest.mark.parametrize("pack", TOYS.values(), ids=TOYS.keys())
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
RANKS = {"0": 3, "2": 2, "4": 1}


def train(model, steps=12, dtype=torch.float32):
    """The losses before and after some steps, with an evaluation in between."""
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(steps):
        for batch in data(dtype):
            model.train()
            loss = loss_fn(model, batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        model.eval()
        with torch.no_grad():
            loss_fn(model, batch)
    return losses[0], losses[-1], optimizer


# ---- what counts --------------------------------------------------------------------------------


@every
def test_packed_layers_are_targets_like_any_other(pack):
    model = packed_model(pack)
    assert [linear_shape(model[i]) for i in (0, 2, 4)] == [(64, 64), (64, 64), (4, 64)]
    assert [is_packed(module) for module in model] == [True, False, True, False, False]
    assert list(linear_targets(model)) == ["0", "2", "4"]
    allocator = UniformRanks(model)
    allocator.score()
    assert allocator.allocate(6).ranks == {"0": 2, "2": 2, "4": 2}


def test_what_holds_no_packed_weight_is_no_packed_layer():
    class Spline(nn.Module):
        """Declares what a linear layer declares, and is none."""

        def __init__(self, **tensors):
            super().__init__()
            self.in_features, self.out_features = 8, 8
            for name, tensor in tensors.items():
                self.register_buffer(name, tensor)

        def forward(self, x):
            return x

    class Container(Spline):
        def __init__(self, inner):
            super().__init__(codes=torch.zeros(8, 8, dtype=torch.int8))
            self.inner = inner

    codes = torch.zeros(8, 8, dtype=torch.int8)
    assert linear_shape(Spline(codes=codes)) == (8, 8)
    no_forward = nn.Module()
    no_forward.in_features = no_forward.out_features = 8
    no_forward.register_buffer("codes", codes)
    half_declared = Spline(codes=codes)
    half_declared.in_features = 8.0
    raw = nn.Linear(8, 8)
    raw.weight = nn.Parameter(codes, requires_grad=False)  # torch's own forward cannot use it
    masked = nn.Linear(8, 8)
    masked.register_buffer("mask", torch.ones(8, 8, dtype=torch.uint8))
    assert not is_packed(masked)
    for module in (
        Spline(),
        Spline(codes=codes[:1, :7]),  # too few bits
        Spline(steps=torch.zeros(64, dtype=torch.int64)),  # indices or counters
        Spline(mask=torch.ones(8, 8, dtype=torch.bool)),
        Spline(codes=codes, table=torch.zeros(8, 8)),  # room for a weight of its own
        Spline(weight=torch.zeros(2, 8, 8, dtype=torch.int8)),  # stacked experts
        Container(nn.Linear(8, 8)),
        Container(Int8Linear(nn.Linear(8, 8))),
        no_forward,
        half_declared,
        raw,
        nn.Bilinear(8, 8, 8),
        nn.BatchNorm1d(8),
    ):
        assert linear_shape(module) is None, module


def test_pefts_layers_around_packed_ones_are_not_caught():
    peft = pytest.importorskip("peft")
    model = packed_model(LIBRARIES["bitsandbytes 8 bits"])
    config = peft.LoraConfig(r=2, target_modules=["0"])
    inside = peft.get_peft_model(model, config).get_submodule("base_model.model.0")
    assert linear_shape(inside) is None
    assert linear_shape(inside.base_layer) == (64, 64)


# ---- left as they were --------------------------------------------------------------------------


@dtypes
@every
def test_scoring_changes_no_bit(pack, dtype):
    model = packed_model(pack, dtype)
    before = bits(model)
    SensitivityLoRA(model, loss_fn, data(dtype)).score()
    assert bits(model) == before
    for name in ("Hutchinson, weights", "Gauss-Newton", "empirical Fisher"):
        LOSS_BASED[name](model, loss_fn, data(dtype))
        assert bits(model) == before, name


@every
def test_wrap_and_unwrap_change_no_bit(pack):
    model = packed_model(pack)
    before = bits(model)
    flags = [p.requires_grad for p in model.parameters()]
    wrap(model, RANKS)
    assert unwrap(model) == ["0", "2", "4"]
    assert bits(model) == before
    assert [p.requires_grad for p in model.parameters()] == flags


def test_the_guard_restores_what_a_call_changes_and_tells_what_it_would_have_been():
    """Without the guard this test's toy does change: so the tests above can fail."""
    model = packed_model(Int8Linear)
    before, x = bits(model), data(torch.bfloat16)[0][0]
    with measuring(model), torch.no_grad():
        model[0](x)
        assert model[0].bias.dtype == torch.bfloat16
    assert bits(model) == before
    model[0](x)
    assert bits(model) != before


@pytest.mark.parametrize("pack", [RepackingLinear, LIBRARIES["bitsandbytes 4 bits"]])
def test_a_layer_that_repacks_in_evaluation_is_kept_from_it(pack):
    model = packed_model(pack).eval()
    model[0].support_avx512bf16_for_cpu = model[2].support_avx512bf16_for_cpu = True
    before = bits(model)
    input_second_moment(model, loss_fn, data())
    assert bits(model) == before

    wrap(model, RANKS)
    first, last, _ = train(model)  # with evaluations
    assert last < first / 2
    unwrap(model)
    assert saved(bits(model)) == saved(before)


def saved(bits):
    """Without notes such as the type of the first input."""
    return {name: value for name, value in bits.items() if name.startswith("state ")}


def test_a_repacked_layer_is_refused_by_name():
    model = packed_model(RepackingLinear).eval()
    with torch.no_grad():
        model(data()[0][0])
    message = "no gradient passes through '0'.*repacked.*load the model again"
    with pytest.raises(ValueError, match=message):
        wrap(model, {"4": 1})
    for estimate in LOSS_BASED.values():
        with pytest.raises(ValueError, match=message):
            estimate(model, loss_fn, data())
    assert set(input_second_moment(model, loss_fn, data())) == {"0", "2", "4"}


def test_4_bit_layers_without_an_adapter_are_warned_of():
    with pytest.warns(UserWarning, match="'2': bitsandbytes repacks .* set support_avx512") as told:
        wrap(packed_model(RepackingLinear), {"0": 1, "2": 0})
    assert told[0].filename == __file__


# ---- adapters -----------------------------------------------------------------------------------


@dtypes
@every
def test_an_adapter_is_float32_starts_at_zero_and_trains(pack, dtype):
    model = packed_model(pack, dtype)
    x = data(dtype)[0][0]
    before = model(x)
    layers = wrap(model, RANKS)
    assert layers["0"].lora_A.dtype == layers["2"].lora_B.dtype == torch.float32
    assert layers["4"].lora_A.dtype == dtype  # beside a plain weight
    assert model(x).dtype == before.dtype == dtype
    assert torch.equal(model(x), before)
    first, last, optimizer = train(model, dtype=dtype)
    assert last < first / 2
    resize(model, {"0": 1, "2": 5}, optimizer)
    assert model(x).dtype == dtype
    loss_fn(model, data(dtype)[0]).backward()
    assert layers["0"].lora_A.grad.abs().sum() > 0


@toys
def test_an_adapter_computes_the_formula(pack):
    model = packed_model(pack, torch.float64)
    layers = wrap(model, RANKS, scaling=2.0, dtype=torch.float64)
    randomize(layers)
    x = data(torch.float64)[0][0]
    layer = layers["0"]
    expected = layer.base(x) + x @ layer.delta_weight().T
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), model(x))
    assert twin[0].base is not layer.base


@toys
def test_l1ra_and_shaplora_work_beside_packed_layers(pack):
    model = packed_model(pack)
    wrap(model, RANKS, gate=1.0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    l1ra = L1RA(model, optimizer, l1=30.0, interval=2)
    for _ in range(3):
        for batch in data():
            optimizer.zero_grad()
            loss_fn(model, batch).backward()
            optimizer.step()
            l1ra.step()
    assert l1ra.history.updates
    assert {name: layer.rank for name, layer in lora_layers(model).items()} != RANKS
    unwrap(model)
    layers = wrap(model, RANKS, gate=0.0)
    randomize(layers)
    shaplora = ShapLoRA(model, loss_fn, data(), coalitions=18)
    assert {name: len(score) for name, score in shaplora.score().items()} == RANKS


# ---- the weight ---------------------------------------------------------------------------------


@every
def test_the_weight_of_an_adapted_layer_is_dequantised_plus_delta(pack):
    if pack is Int8Linear:
        return  # it does not say how: the next test
    model = packed_model(pack)
    x = torch.eye(64)
    with torch.no_grad():
        W = (model[2](x)).t()  # no bias: W itself, up to how the layer rounds its input
    layer = wrap(model, RANKS)["2"]
    torch.testing.assert_close(layer.base_weight.float(), W, rtol=0.02, atol=2e-3)
    randomize(layer)
    expected = layer.base_weight + layer.delta_weight()
    torch.testing.assert_close(layer.weight, expected, rtol=1e-6, atol=1e-6)
    assert layer.weight.requires_grad  # a parent that reads it trains the adapter
    layer.enabled = False
    assert torch.equal(layer.weight, layer.base_weight)


def test_a_layer_that_does_not_say_how_to_dequantise_is_refused_where_w_is_read():
    layer = wrap(packed_model(Int8Linear), RANKS)["0"]
    for read in (lambda: layer.weight, layer.merged_weight, lambda: layer.base_weight):
        with pytest.raises(ValueError, match=r"Int8Linear is packed.*give it a method dequantize"):
            read()
    wrong = FourBitLinear(nn.Linear(8, 8))
    wrong.dequantize = lambda: torch.zeros(4)
    with pytest.raises(ValueError, match=r"dequantize\(\) gave torch.float32 of shape \(4,\)"):
        dequantized_weight(wrong, (8, 8))


@every
def test_merge_is_refused_and_works_in_the_model_that_is_not_quantised(pack, tmp_path):
    model = packed_model(pack)
    layers = wrap(model, RANKS)
    randomize(layers)
    x = data()[0][0]
    expected = model(x).detach()
    before = bits(model)
    message = "weight of '0' is packed.*save_adapter.*other_base=True"
    with pytest.raises(ValueError, match=message):
        merge(model)
    assert bits(model) == before

    save_adapter(model, tmp_path / "adapter")
    if pack is Int8Linear:
        return
    plain = dequantized(unwrapped(model))
    load_adapter(plain, tmp_path / "adapter", other_base=True)
    merge(plain)
    unwrap(plain)
    scale = float(expected.abs().max())
    torch.testing.assert_close(plain(x), expected, rtol=0.05, atol=0.05 * scale)


def unwrapped(model):
    unwrap(model)
    return model


def test_plain_layers_of_a_mixed_model_merge():
    model = packed_model(LIBRARIES["torchao int8"])
    layers = wrap(model, {"4": 2})
    randomize(layers)
    x = data()[0][0]
    expected = model(x).detach()
    assert merge(model) == ["4"]
    torch.testing.assert_close(model(x), expected)


# ---- no backward pass ---------------------------------------------------------------------------


@pytest.fixture
def dynamic():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates it
        return torch.ao.quantization.quantize_dynamic(
            nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 4)), {nn.Linear}
        )


def test_torchs_dynamic_layers_are_scored_by_the_proxy_alone(dynamic):
    allocator = SensitivityLoRA(dynamic, loss_fn, data())
    allocator.score()
    ranks = allocator.allocate(4).ranks
    assert sum(ranks.values()) == 4
    message = "'0' is a Linear without gradients.*quantize_dynamic"
    for estimate in LOSS_BASED.values():
        with pytest.raises(ValueError, match=message):
            estimate(dynamic, loss_fn, data())
    with pytest.raises(ValueError, match=message):
        wrap(dynamic, {"0": 1})
    assert not lora_layers(dynamic)


def test_a_packed_layer_that_cuts_the_gradient_is_named():
    class Cutting(Int8Linear):
        def forward(self, x):
            return super().forward(x.detach())

    model = packed_model(Cutting)
    for estimate in LOSS_BASED.values():
        with pytest.raises(ValueError, match=re.escape("no gradient passes through '2'")):
            estimate(model, loss_fn, data())
