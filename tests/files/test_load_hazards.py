"""A load that fails changes nothing; one that does not gives what was saved, wherever and whenever it runs."""

from __future__ import annotations

import json
import os
import re
import sys

import pytest
import torch
from helpers.models import assert_unchanged, same_bits, snapshot, wrapped, zoo
from torch import nn

import minirank
from minirank import export_peft, import_peft, load_adapter, lora_layers, save_adapter, wrap

PACKAGE = os.path.dirname(minirank.__file__)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "adapter.safetensors"


# ---- loading -----------------------------------------------------------------------------------


def interrupted(call, model, line):
    """Whether call(model) was interrupted, which happens when it comes to its n-th line in the package."""
    lines = 0

    def trace(frame, event, _):
        nonlocal lines
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        lines += event == "line"
        if lines == line:
            sys.settrace(None)
            raise KeyboardInterrupt
        return trace

    old = sys.gettrace()
    sys.settrace(trace)
    try:
        call(model)
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(old)
    return False


def assert_all_or_nothing(call, every):
    line, model = 1, zoo()
    before = snapshot(model)
    while interrupted(call, model, line):
        assert_unchanged(model, before)
        line += every
    assert line > 50 * every
    assert lora_layers(model)


def test_an_interrupted_load_leaves_the_model(path):
    _, model, _ = wrapped(ranks={"like": 2, "body.up": 1})
    save_adapter(model, path, modules="body.norm")
    assert_all_or_nothing(
        lambda model: load_adapter(model, path, trainable=["body.norm"]), every=11
    )


def test_an_interrupted_wrap_leaves_the_model():
    assert_all_or_nothing(
        lambda model: wrap(model, {"like": 2, "blocks.0.0": 1}, trainable=["body.norm"]), every=5
    )


class Body(nn.Module):
    """A linear layer, and a head of the buffers that are given."""

    def __init__(self, **buffers):
        super().__init__()
        self.linear, self.head = nn.Linear(4, 4), nn.Module()
        nn.init.ones_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        for name, value in buffers.items():
            self.head.register_buffer(name, value)


def saved_body(path, **buffers):
    model = Body(**buffers)
    wrap(model, {"linear": 2})
    save_adapter(model, path, modules="head")


MISFITS = {
    "has one without values": (torch.ones(3), torch.ones(3, device="meta")),
    "has one without values (lazy": (torch.ones(3), nn.UninitializedBuffer()),
    "torch.int64 of shape (1,); the model has torch.int8": (
        torch.tensor([300]),
        torch.zeros(1, dtype=torch.int8),
    ),
    "torch.int64 of shape (); the model has torch.bool": (torch.tensor(3), torch.tensor(True)),
    "the model has torch.complex64": (torch.tensor(3), torch.tensor(1j)),
    "'head.y' overflows torch.float16": (torch.tensor([1e6]), torch.zeros(1).half()),
    "single memory location": (torch.ones(3), torch.zeros(1).expand(3)),
}


@pytest.mark.parametrize("message", MISFITS)
def test_a_value_that_the_model_cannot_hold_is_refused_and_nothing_changes(path, message):
    value, place = MISFITS[message]
    saved_body(path, x=torch.ones(2), y=value)
    model = Body(x=torch.zeros(2), y=place)
    linear, flags = model.linear, [p.requires_grad for p in model.parameters()]
    with pytest.raises((ValueError, RuntimeError)) as caught:
        load_adapter(model, path)
    assert message in str(caught.value)
    assert model.linear is linear
    assert [p.requires_grad for p in model.parameters()] == flags
    assert torch.equal(model.head.x, torch.zeros(2))


def test_values_that_are_not_finite_come_as_they_are(path):
    saved_body(path, x=torch.tensor([float("nan"), float("inf"), 1.0]))
    model = Body(x=torch.zeros(3).half())
    load_adapter(model, path)
    assert torch.equal(model.head.x.nan_to_num(7.0, 8.0), torch.tensor([7.0, 8.0, 1.0]).half())


def test_two_values_for_what_is_now_one_tensor_are_refused(path):
    saved_body(path, x=torch.ones(2), y=torch.zeros(2))
    same = torch.zeros(2)
    with pytest.raises(ValueError, match=r"'head\.x' and 'head\.y' are one tensor of the model"):
        load_adapter(Body(x=same, y=same), path)
    saved_body(path, x=torch.ones(2), y=torch.ones(2))
    load_adapter(Body(x=same, y=same), path)
    assert torch.equal(same, torch.ones(2))


def test_a_model_made_in_inference_mode_gets_its_values(path):
    saved_body(path, x=torch.ones(2))
    with torch.inference_mode():
        model = Body(x=torch.zeros(2))
    load_adapter(model, path)
    assert torch.equal(model.head.x, torch.ones(2))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_default_device_does_not_matter(path, dtype):
    _, model, layers = wrapped()
    fresh = zoo(dtype)
    with torch.device("meta"):
        save_adapter(model, path, modules="body.norm")
        loaded = load_adapter(fresh, path)
    assert all(same_bits(loaded[name].lora_B, layer.lora_B) for name, layer in layers.items())


# ---- the base ----------------------------------------------------------------------------------


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
def test_a_base_that_differs_in_a_buffer_is_another_base(path, kind):
    model = nn.Sequential(kind(2))
    wrap(model, {"0": 2})
    save_adapter(model, path)
    with pytest.raises(ValueError, match="'0': not the base weights"):
        load_adapter(nn.Sequential(kind(3)), path)
    assert load_adapter(nn.Sequential(kind(2)), path)


# ---- PEFT --------------------------------------------------------------------------------------


def test_each_pattern_is_compiled_once(tmp_path, monkeypatch):
    """re keeps 512 patterns: beyond that, trying all of them on all layers would compile each anew, every time."""
    count = 600
    model, plain = (nn.ModuleList(nn.Linear(2, 2) for _ in range(count)) for _ in range(2))
    wrap(model, {str(i): 1 for i in range(count)})
    export_peft(model, tmp_path)
    compiler = re._compiler if hasattr(re, "_compiler") else re.sre_compile
    compile, compiled = compiler.compile, []
    monkeypatch.setattr(compiler, "compile", lambda *args: compiled.append(args) or compile(*args))
    assert len(import_peft(plain, tmp_path)) == count
    assert len(compiled) <= count + 5


@pytest.mark.parametrize("change", [{"alpha_pattern": {}, "lora_alpha": 10**400}, None])
def test_a_configuration_beyond_all_numbers_is_refused(tmp_path, change):
    export_peft(wrapped(ranks={"like": 2})[1], tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text(
        "[" * 100_000 if change is None else json.dumps(json.loads(config.read_text()) | change)
    )
    with pytest.raises(
        ValueError, match="is no JSON" if change is None else "'like' has alpha 1000"
    ):
        import_peft(zoo(), tmp_path)
