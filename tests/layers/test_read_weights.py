"""Layers whose weight another module reads: what does not work there is said once, and no more."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from minirank import L1RA, SingularValues, lora_layers, unpack_attention, wrap
from minirank.layers.experts import LoRAExperts

STEPS = 6


class Reader(nn.Module):
    """`read` is multiplied by, as in Swin; `called` is asked for its dtype, as in T5."""

    def __init__(self, detach=False):
        super().__init__()
        self.read, self.called, self.idle = (nn.Linear(4, 4) for _ in range(3))
        self.detach = detach

    def forward(self, x):
        weight = self.read.weight.data if self.detach else self.read.weight
        x = F.linear(x, weight, self.read.bias).tanh()
        return self.called(x.to(self.called.weight.dtype))


def made(ranks=("read", "called", "idle"), dropout=0.0, model=None, **options):
    torch.manual_seed(0)
    model = Reader() if model is None else model
    wrap(model, dict.fromkeys(ranks, 2), dropout=dropout, **options)
    return model


def trained(model, forward=None):
    """The warnings of a short training, at the lines of this file."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))
    forward = model if forward is None else forward
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(STEPS):
            optimizer.zero_grad()
            forward(x).square().mean().backward()
            optimizer.step()
    assert all(warning.filename == __file__ for warning in caught)
    return [str(warning.message) for warning in caught]


def test_dropout_without_effect_is_said_once():
    model = made(dropout=0.5)
    (message,) = trained(model)
    assert message.startswith("'read': adapter dropout has no effect")
    assert model.read.lora_B.any()  # it trains all the same
    assert trained(model) == []


def test_ordinary_use_is_silent():
    assert trained(made()) == []
    apart = made(["read"])
    wrap(apart, {"called": 2}, dropout=0.5)  # as the warning says
    assert trained(apart) == []
    assert trained(made(["called", "idle"], dropout=0.5)) == []
    logged = made(["called", "idle"], dropout=0.5)

    def forward(x):
        with torch.no_grad():
            _ = logged.idle.weight.norm()
        return logged(x)

    assert trained(logged, forward) == []


def test_a_weight_that_is_read_without_its_gradient_is_named():
    model = made(model=Reader(detach=True))
    (message,) = trained(model)
    assert message.startswith("'read': another module reads the weight, and the adapter has got no")
    assert "in 3 steps" in message
    assert not model.read.lora_B.any()
    assert model.called.lora_B.any()


def test_a_reading_before_steps_of_other_layers_is_no_reason_to_warn():
    model = made(["read", "idle"])
    _ = model.idle.weight.norm()  # for a report before training, say
    assert trained(model) == []


@pytest.mark.parametrize("detach", [False, True])
def test_gradients_from_a_closure_count(detach):
    model = made(model=Reader(detach=detach))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))

    def closure():
        loss = model(x).square().mean()
        loss.backward()
        return loss

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(STEPS):
            optimizer.zero_grad()
            optimizer.step(closure)
    assert len(caught) == detach


def test_steps_without_any_gradient_show_nothing():
    model = made()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(STEPS):
            model(torch.ones(8, 4))
            optimizer.step()
    assert trained(model) == []


def test_the_gates_of_other_methods_reach_a_weight_that_is_read():
    model = made(gate=1.0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    l1ra = L1RA(model, optimizer, l1=0.1, gate_lr=0.1, interval=4)
    x = torch.randn(8, 4)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        l1ra.step()
    assert (model.read.gate != model.idle.gate).any()
    assert set(SingularValues(model).score()) == {"read", "called", "idle"}


def test_packed_attention_and_its_unpacking():
    def attention():
        torch.manual_seed(0)
        return nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0)

    (message,) = trained(made(["self_attn.out_proj", "linear1"], 0.5, attention()))
    assert message.startswith("'self_attn.out_proj': adapter dropout")
    unpacked = attention()
    unpack_attention(unpacked)
    assert trained(made(["self_attn.out", "linear1"], 0.5, unpacked)) == []


def test_stacks_of_experts_are_read_by_design():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.is_transposed = nn.Parameter(torch.ones(2, 4, 4)), False

        def forward(self, x):
            return F.linear(x, self.up[0]) + F.linear(x, self.up[1])

    model = made(["0.up"], model=nn.Sequential(Experts()))
    assert isinstance(lora_layers(model)["0.up"], LoRAExperts)
    assert trained(model) == []


def test_a_copy_is_judged_by_itself():
    model = made(dropout=0.5)
    twin = copy.deepcopy(model)
    assert len(trained(model)) == 1
    (message,) = trained(twin)
    assert message.startswith("'LoRALinear(")


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_compiled_model_is_silent(dropout):
    model = made(dropout=dropout)
    assert trained(model, torch.compile(model, backend="eager")) == []


def test_dropout_breaks_no_graph():
    model = made(["0"], 0.5, nn.Sequential(nn.Linear(4, 4)))
    assert trained(model, torch.compile(model, backend="eager", fullgraph=True)) == []


def test_calls_by_a_compiled_model_count():
    model = made(["called"], 0.5)
    compiled = torch.compile(model, backend="eager")

    def forward(x):
        return compiled(x) + 0.01 * model.called.weight.norm()

    assert trained(model, forward) == []
