"""lora.py: the layer against its exact_output, its gradients, its initial values and its ranks."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from helpers.models import (
    Conv1DLike,
    LinearLike,
    delta_by_hand,
    exact_output,
    inputs,
    layer,
    randomize,
)
from torch import nn

from minirank import LoRALinear, reference
from minirank.layers.resize import resized_parameters

GATES = [None, 1.0, 0.5, 0.0]
EXACT = {"rtol": 1e-13, "atol": 1e-13}


# ---- the function ------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5,), (1, 5), (4, 5), (2, 3, 5), (0, 5), (2, 0, 5)], ids=str)
@pytest.mark.parametrize("gate", GATES)
def test_forward_is_the_references(gate, shape):
    for bias, stabilized in itertools.product((True, False), repeat=2):
        lora = layer(gate=gate, bias=bias, rank_stabilized=stabilized)
        x = inputs(*shape)
        y = lora(x)
        assert y.shape == (*shape[:-1], 7)
        torch.testing.assert_close(
            y, exact_output(lora, x, 6 / math.sqrt(3) if stabilized else 6 / 3), **EXACT
        )


@pytest.mark.parametrize(
    ("d_in", "d_out", "rank"), [(1, 1, 1), (1, 6, 1), (6, 1, 1), (4, 9, 4), (9, 4, 4)]
)
def test_every_rank_up_to_the_smaller_side_works(d_in, d_out, rank):
    lora = layer(d_in, d_out, rank, gate=1.0)
    x = inputs(3, d_in)
    torch.testing.assert_close(lora(x), exact_output(lora, x, 6 / rank), **EXACT)


def test_non_contiguous_and_broadcast_inputs():
    lora = layer()
    for x in (
        inputs(5, 4).T,
        inputs(4, 3, 5).transpose(0, 1),
        inputs(1, 5).expand(4, 5),
        inputs(4, 10)[:, ::2],
    ):
        torch.testing.assert_close(lora(x), exact_output(lora, x, 2), **EXACT)


def test_nested_inputs_work_as_they_do_in_the_base():
    lora = layer()
    parts = [inputs(2, 5), inputs(4, 5, seed=3)]
    y = lora(torch.nested.nested_tensor(parts, layout=torch.jagged))
    for got, part in zip(y.unbind(), parts, strict=True):
        torch.testing.assert_close(got, exact_output(lora, part, 2), **EXACT)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_new_layer_is_the_base_bit_for_bit(dtype, gate):
    for adapter_dtype in (None, torch.float32):
        lora = LoRALinear(nn.Linear(5, 7, dtype=dtype), 3, alpha=6, gate=gate, dtype=adapter_dtype)
        assert lora.lora_A.ne(0).all()
        for x in (inputs(4, 5, dtype=dtype), inputs(2, 3, 5, dtype=dtype)):
            assert torch.equal(lora(x), lora.base(x))
            assert lora(x).dtype == dtype


def test_rank_zero_is_the_base():
    lora = layer(rank=0)
    x = inputs(4, 5)
    assert torch.equal(lora(x), lora.base(x))
    assert torch.equal(lora.delta_weight(), torch.zeros(7, 5, dtype=torch.float64))
    assert torch.equal(lora.weight, lora.base.weight)


def test_dropout_zeroes_the_input_of_the_adapter_only_and_only_in_training():
    lora, x = layer(dropout=0.4, gate=1.0), inputs(6, 5)
    torch.testing.assert_close(lora.eval()(x), exact_output(lora, x, 2), **EXACT)
    lora.train()
    torch.manual_seed(3)
    y = lora(x)
    torch.manual_seed(3)
    mask = F.dropout(torch.ones_like(x), 0.4)
    assert 0 < int(mask.eq(0).sum()) < mask.numel()
    adapter = 2 * F.linear(F.linear(x * mask, lora.lora_A) * lora.gate, lora.lora_B)
    torch.testing.assert_close(y, lora.base(x) + adapter, **EXACT)


@pytest.mark.parametrize("gate", GATES)
def test_gradients_are_exact(gate):
    lora = layer(4, 3, 2, gate=gate)
    parameters = {name: p for name, p in lora.named_parameters() if not name.startswith("base")}

    def function(x, *values):
        return torch.func.functional_call(lora, dict(zip(parameters, values, strict=True)), (x,))

    x = inputs(2, 4).requires_grad_()
    assert len(parameters) == (2 if gate is None else 3)
    assert torch.autograd.gradcheck(function, (x, *parameters.values()))
    lora(x).sum().backward()
    assert all(p.grad is not None and p.grad.ne(0).any() for p in parameters.values())
    assert lora.base.weight.grad is None
    assert lora.base.bias.grad is None


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("bias", [True, False])
def test_outputs_and_gradients_are_the_references(gate, bias):
    lora = layer(gate=gate, bias=bias)
    W, b = lora.base.weight.detach(), lora.base.bias
    parameters = dict(lora.named_parameters(recurse=False))
    twins = {name: p.detach().clone().requires_grad_() for name, p in parameters.items()}
    x, twin_x = (inputs(2, 3, 5).requires_grad_() for _ in range(2))
    expected = reference.lora_forward(
        twin_x, W, b, twins["lora_A"], twins["lora_B"], 2.0, twins.get("gate")
    )
    expected.square().sum().backward()
    y = lora(x)
    y.square().sum().backward()
    torch.testing.assert_close(y, expected, **EXACT)
    torch.testing.assert_close(x.grad, twin_x.grad, rtol=1e-12, atol=1e-12)
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter.grad, twins[name].grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gate", GATES)
def test_the_weight_is_differentiable_like_the_layer(gate):
    """Parents that read `weight` instead of calling the layer train the adapter as well."""
    called, read = layer(gate=gate), layer(gate=gate)
    x = inputs(4, 5)
    called(x).square().sum().backward()
    F.linear(x, read.weight, read.bias).square().sum().backward()
    for name, parameter in called.named_parameters():
        if not name.startswith("base"):
            torch.testing.assert_close(
                read.get_parameter(name).grad, parameter.grad, rtol=1e-12, atol=1e-12
            )


# ---- scaling and ΔW ----------------------------------------------------------------------------


def test_scaling_is_alpha_over_the_reference_rank_or_its_root():
    base = nn.Linear(8, 8)
    assert LoRALinear(base, 4, alpha=16).scaling == 4
    assert LoRALinear(base, 4, alpha=16, rank_stabilized=True).scaling == 8
    assert LoRALinear(base, 4, alpha=16, reference_rank=2).scaling == 8
    assert LoRALinear(base, 4, alpha=16, reference_rank=6.25, rank_stabilized=True).scaling == 6.4
    assert LoRALinear(base, 4).scaling == LoRALinear(base, 4, reference_rank=3).scaling == 1
    assert LoRALinear(base, 0, alpha=2).scaling == 2


def test_scaling_can_be_given_itself():
    lora = LoRALinear(nn.Linear(8, 8), 4, scaling=0.3)
    assert (lora.scaling, lora.reference_rank) == (0.3, 4)
    assert lora.alpha == pytest.approx(1.2, rel=1e-15)
    assert LoRALinear(nn.Linear(8, 8), 0, scaling=2).scaling == 2
    of_tensors = LoRALinear(nn.Linear(8, 8), 4, scaling=torch.tensor(2.0), gate=torch.tensor(0.5))
    numbers = of_tensors.scaling, of_tensors.alpha, of_tensors.reference_rank
    assert numbers == (2.0, 8.0, 4.0)
    assert {type(number) for number in (*numbers, of_tensors.initial_gate)} == {float}
    for other in ({"alpha": 1.0}, {"reference_rank": 4}, {"rank_stabilized": True}):
        with pytest.raises(ValueError, match="give either scaling, or alpha"):
            LoRALinear(nn.Linear(8, 8), 4, scaling=0.3, **other)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(
    "base", [nn.Linear(5, 7), Conv1DLike(7, 5), LinearLike(5, 7)], ids=lambda m: type(m).__name__
)
def test_delta_weight_and_weight(base, gate):
    base = copy.deepcopy(base).double()
    lora = LoRALinear(base, 3, alpha=6, gate=gate)
    randomize(lora)
    delta = delta_by_hand(lora, scaling=2)
    torch.testing.assert_close(lora.delta_weight(), delta, **EXACT)
    expected = base.weight + (delta.T if isinstance(base, Conv1DLike) else delta)
    torch.testing.assert_close(lora.weight, expected, **EXACT)
    twin, x = copy.deepcopy(base), inputs(4, 5)
    twin.weight = nn.Parameter(expected.detach())
    torch.testing.assert_close(lora(x), twin(x), rtol=1e-12, atol=1e-12)
    lora.enabled = False
    assert torch.equal(lora(x), base(x))
    assert lora.weight is base.weight


def test_the_real_conv1d_of_transformers():
    base = pytest.importorskip("transformers.pytorch_utils").Conv1D(7, 5).double()
    lora = LoRALinear(base, 3)
    randomize(lora)
    assert (lora.in_features, lora.out_features) == (5, 7)
    x = inputs(2, 3, 5)
    torch.testing.assert_close(
        lora(x), x @ (base.weight + delta_by_hand(lora).T) + base.bias, **EXACT
    )


def test_delta_weight_of_a_half_precision_adapter_is_computed_in_float32():
    lora = layer(dtype=torch.bfloat16)
    delta = lora.delta_weight()
    assert delta.dtype == torch.float32
    torch.testing.assert_close(delta.double(), delta_by_hand(lora), rtol=1e-5, atol=1e-6)
    assert lora.weight.dtype == torch.bfloat16
    assert torch.equal(lora.weight, (lora.base.weight.float() + delta).bfloat16())


@pytest.mark.parametrize("gate", GATES)
def test_contributions_are_the_norms_of_each_rank(gate):
    lora = layer(gate=gate)
    expected = []
    for i in range(3):
        one = copy.deepcopy(lora)
        randomize(one)
        with torch.no_grad():
            one.lora_B[:, [j for j in range(3) if j != i]] = 0
        expected.append(torch.linalg.matrix_norm(delta_by_hand(one)))
    torch.testing.assert_close(lora.contributions(), torch.stack(expected), **EXACT)


# ---- initial values ----------------------------------------------------------------------------


def test_initial_distributions_are_those_of_the_papers():
    base = nn.Linear(400, 300)
    n = 100 * 400

    def check_normal(values, std):  # six standard errors of the mean and of the variance
        assert abs(values.mean()) < 6 * std / math.sqrt(values.numel())
        assert abs(values.var() / std**2 - 1) < 6 * math.sqrt(2 / values.numel())

    plain = LoRALinear(base, 100)
    bound = 1 / math.sqrt(400)
    assert bound * (1 - 20 / n) < plain.lora_A.abs().max() <= bound
    assert abs(plain.lora_A.mean()) < 6 * bound / math.sqrt(3 * n)
    assert plain.lora_B.eq(0).all()
    assert plain.gate is None
    l1ra = LoRALinear(base, 100, gate=1.0, reference_rank=8)
    check_normal(l1ra.lora_A, 1 / 8)
    assert l1ra.lora_B.eq(0).all()
    assert l1ra.gate.eq(1).all()
    shaplora = LoRALinear(base, 100, gate=0.0)
    check_normal(shaplora.lora_A, 0.02)
    check_normal(shaplora.lora_B, 0.02)
    assert shaplora.gate.eq(0).all()
    assert LoRALinear(base.double(), 2, gate=0.3).gate.tolist() == [0.3, 0.3]


@pytest.mark.parametrize("gate", [None, 1.0, 0.0])
def test_a_seed_reproduces_and_the_global_generator_is_not_touched(gate):
    base = nn.Linear(6, 6)
    state = torch.get_rng_state()
    one, same, other = (LoRALinear(base, 3, gate=gate, generator=seed) for seed in (1, 1, 2))
    resized_parameters(one, torch.tensor([True, False, True]), 2, generator=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one.lora_A, same.lora_A)
    assert torch.equal(one.lora_B, same.lora_B)
    assert not torch.equal(one.lora_A, other.lora_A)
    generator = torch.Generator().manual_seed(1)
    first, second = (LoRALinear(base, 3, gate=gate, generator=generator) for _ in range(2))
    assert torch.equal(first.lora_A, one.lora_A)
    assert not torch.equal(first.lora_A, second.lora_A)


def test_a_seed_gives_the_same_values_in_every_dtype():
    single = LoRALinear(nn.Linear(6, 6), 3, generator=1).lora_A
    half = LoRALinear(nn.Linear(6, 6, dtype=torch.bfloat16), 3, generator=1).lora_A
    assert torch.equal(half, single.bfloat16())
    base = nn.Linear(6, 6)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(LoRALinear(base, 3, generator=1).lora_A, single)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": -1}, "rank must be"),
        ({"rank": 6}, r"min\(d_in, d_out\) = 5"),
        ({"rank": 2.0}, "rank must be"),
        ({"rank": True}, "rank must be"),
        ({"alpha": 0}, "alpha"),
        ({"alpha": math.nan}, "alpha"),
        ({"scaling": 0}, "scaling must be a finite positive number"),
        ({"scaling": math.inf}, "scaling"),
        ({"scaling": math.nan}, "scaling"),
        ({"scaling": True}, "scaling must be a finite positive number, got True"),
        ({"alpha": True}, "alpha must be a finite positive number, got True"),
        ({"reference_rank": True}, "reference_rank must be a finite positive number, got True"),
        ({"scaling": 1e308}, "out of the range of float64"),
        ({"alpha": 1e308, "reference_rank": 0.1}, "out of the range of float64"),
        ({"alpha": 1e-320, "reference_rank": 1e10}, "out of the range of float64"),
        ({"gate": True}, "gate must be None"),
        ({"reference_rank": -2}, "reference_rank"),
        ({"reference_rank": math.inf}, "reference_rank"),
        ({"gate": 1.5}, "gate"),
        ({"gate": math.nan}, "gate"),
        ({"dropout": 1.0}, "dropout"),
        ({"dropout": -0.1}, "dropout"),
        ({"dtype": torch.int8}, "dtype"),
    ],
)
def test_bad_numbers_are_refused_and_leave_the_base_trainable(options, message):
    base = nn.Linear(5, 7)
    with pytest.raises(ValueError, match=message):
        LoRALinear(base, **{"rank": 2, **options})
    assert base.weight.requires_grad
    assert base.bias.requires_grad


def test_only_linear_modules_are_taken_and_only_once():
    for module in (nn.Conv2d(3, 3, 3), nn.Embedding(3, 3), nn.LazyLinear(3), nn.ReLU()):
        with pytest.raises(TypeError, match=type(module).__name__):
            LoRALinear(module, 1)
    with pytest.raises(TypeError, match="already has an adapter"):
        LoRALinear(layer(), 1)
