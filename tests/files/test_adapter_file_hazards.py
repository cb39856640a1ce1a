"""An interrupted load changes nothing, and the default device changes nothing about a whole one."""

from __future__ import annotations

import os
import sys

import pytest
import torch
from helpers.models import assert_unchanged, same_bits, snapshot, wrapped, zoo

import minirank
from minirank import load_adapter, lora_layers, save_adapter, wrap

PACKAGE = os.path.dirname(minirank.__file__)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "adapter.safetensors"


# ---- loading -----------------------------------------------------------------------------------


def interrupted(call, model, line):
    """Run call(model), interrupted at its n-th line in the package; whether it came that far."""
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
    _, model, _ = wrapped(ranks={"like": 2, "body.up": 1}, trainable=["body.norm"])
    with torch.no_grad():
        model.body["norm"].weight += 1  # as if trained
    save_adapter(model, path)
    assert_all_or_nothing(lambda model: load_adapter(model, path), every=11)
    assert_all_or_nothing(
        lambda model: load_adapter(model, path, trainable=["body.norm"]), every=29
    )


def test_an_interrupted_wrap_leaves_the_model():
    assert_all_or_nothing(
        lambda model: wrap(model, {"like": 2, "blocks.0.0": 1}, trainable=["body.norm"]), every=5
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_default_device_does_not_matter(path, dtype):
    _, model, layers = wrapped()
    fresh = zoo(dtype)
    with torch.device("meta"):
        save_adapter(model, path, modules="body.norm")
        loaded = load_adapter(fresh, path)
    assert all(same_bits(loaded[name].lora_B, layer.lora_B) for name, layer in layers.items())
