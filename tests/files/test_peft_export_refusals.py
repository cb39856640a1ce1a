"""What export_peft refuses, warns of, and leaves as it was; and that PEFT gives the reason."""

from __future__ import annotations

import copy
import math
import os
import re

import peft
import pytest
import torch
from helpers.models import assert_unchanged, inputs, randomize, snapshot
from helpers.peft_cases import chain, config_of, in_peft, made, trained
from torch import nn

from minirank import LoRALinear, export_peft, import_peft, lora_layers, merge, resize, wrap


def refused(model, folder, message, **options):
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        export_peft(model, folder / "new", **options)
    assert_unchanged(model, before)
    assert not (folder / "new").exists()


def test_a_model_without_ranks_is_refused(tmp_path):
    refused(chain(), tmp_path, r"no LoRA layer to save: wrap\(\)")
    model = trained(chain(), [({"fc": 1, "xfc": 1}, {})])
    resize(model, {"fc": 0, "xfc": 0})
    refused(model, tmp_path, "every layer has rank 0.*nothing to export")


def test_merged_and_disabled_layers_are_refused(tmp_path):
    model = trained(chain(), [({"fc": 1, "xfc": 1}, {})])
    lora_layers(model)["xfc"].enabled = False
    refused(model, tmp_path, "'xfc' is disabled.*enable it, or resize it to 0")
    lora_layers(model)["xfc"].enabled = True
    merge(model)
    refused(model, tmp_path, r"'fc', 'xfc' cannot be saved while merged.*unmerge\(\)")


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("key", ["lora_A", "lora_B", "gate"])
def test_values_that_are_not_finite_are_refused(tmp_path, key, value, portable):
    model = trained(chain(), [({"fc": 2, "xfc": 1}, {"gate": 1.0})])
    with torch.no_grad():
        lora_layers(model)["fc"].get_parameter(key).view(-1)[-1] = value
    refused(
        model, tmp_path, rf"fc\.{key} is not finite: was the training stable", portable=portable
    )


def test_a_scaling_that_is_not_finite_is_refused(tmp_path):
    model = trained(chain(), [({"fc": 2}, {})])
    lora_layers(model)["fc"].scaling = math.inf
    refused(model, tmp_path, "scaling of 'fc' is inf")


@pytest.mark.parametrize(("options", "portable"), [({"gate": 1.0}, False), ({"alpha": 1e4}, True)])
def test_an_overflow_in_folding_is_refused(tmp_path, options, portable):
    model = trained(chain(dtype=torch.float16), [({"fc": 1}, options)])
    layer = lora_layers(model)["fc"]
    nn.init.constant_(layer.lora_B, 300.0)
    if layer.gate is not None:
        nn.init.constant_(layer.gate, 300.0)  # finite each, but 90,000 > 65,504
    refused(
        model,
        tmp_path,
        r"fc\.lora_B times gates or scaling overflows torch\.float16",
        portable=portable,
    )


def test_a_model_that_is_itself_a_layer_is_refused(tmp_path):
    refused(LoRALinear(nn.Linear(3, 3), 1), tmp_path, "itself is a LoRALinear, which has no name")


class TwoPlaces(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = self.first

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


class SharedParent(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(6, 6))
        self.second = self.first

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def test_a_module_in_two_places_is_refused_because_peft_adapts_one(tmp_path):
    plain = made(TwoPlaces)
    model = copy.deepcopy(plain)
    randomize(wrap(model, {"first": 2}))
    refused(model, tmp_path, "'first', 'second' are one module, of which PEFT adapts 'first' only")
    with torch.random.fork_rng():
        theirs = peft.get_peft_model(
            copy.deepcopy(plain), peft.LoraConfig(target_modules="first|second", r=2)
        )
    assert [
        name for name in ("first", "second") if hasattr(getattr(theirs.model, name), "lora_A")
    ] == ["first"]
    theirs.save_pretrained(tmp_path / "theirs")
    before = snapshot(plain)
    with pytest.raises(
        ValueError, match="'first', 'second' are one module, of which PEFT adapts 'first' only"
    ):
        import_peft(plain, tmp_path / "theirs")
    assert_unchanged(plain, before)


# PEFT 0.21 misses the parameters' second name in the file, but sets them all the same.
@pytest.mark.filterwarnings("ignore:Found missing adapter keys:UserWarning")
def test_a_module_in_a_parent_that_is_shared_has_one_place_and_is_exported(tmp_path):
    plain, x = made(SharedParent), inputs(3, 6)
    model = copy.deepcopy(plain)
    randomize(wrap(model, {"second.0": 2}))
    export_peft(model, tmp_path)
    torch.testing.assert_close(in_peft(plain, tmp_path)(x), model(x), rtol=1e-12, atol=1e-12)
    back = copy.deepcopy(plain)
    import_peft(back, tmp_path)
    torch.testing.assert_close(back(x), model(x), rtol=1e-12, atol=1e-12)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x)[0]


def test_an_attention_output_is_refused_because_peft_ignores_its_adapter(tmp_path):
    plain, x = made(Attention), inputs(2, 3, 6)
    model = copy.deepcopy(plain)
    randomize(wrap(model, {"attention.out_proj": 2}))
    refused(model, tmp_path, "'attention.out_proj': nn.MultiheadAttention reads its weight")
    config = peft.LoraConfig(target_modules=["out_proj"], r=2, init_lora_weights=False)
    with torch.random.fork_rng():
        theirs = peft.get_peft_model(copy.deepcopy(plain), config)
    torch.testing.assert_close(theirs(x), plain(x), rtol=1e-12, atol=1e-12)  # whatever the adapter
    assert not torch.allclose(model(x), plain(x))
    theirs.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"'attention\.out_proj': nn\.MultiheadAttention reads its weight"
    ):
        import_peft(plain, tmp_path)


def test_the_fast_path_of_an_encoder_layer_leaves_pefts_adapter_out_and_export_warns(tmp_path):
    with torch.random.fork_rng():
        plain = nn.Sequential(
            nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        ).eval()
    model, x = copy.deepcopy(plain), inputs(2, 3, 8, dtype=torch.float32)
    randomize(wrap(model, {"0.linear1": 3}))
    with pytest.warns(UserWarning, match=r"'0' in PEFT.*set_fastpath_enabled\(False\)") as caught:
        export_peft(model, tmp_path)
    assert caught[0].filename == __file__
    theirs = in_peft(plain, tmp_path)
    torch.testing.assert_close(theirs(x), plain(x), rtol=1e-5, atol=1e-5)  # the fault
    assert not torch.allclose(model(x), plain(x), atol=1e-2)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        torch.testing.assert_close(theirs(x), model(x), rtol=1e-5, atol=1e-5)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_parameters_that_train_besides_are_named_in_a_warning(tmp_path):
    model = trained(chain(), [({"fc": 1}, {"trainable": ["fc2"]})])
    with pytest.warns(
        UserWarning, match=re.escape("'fc2.weight', 'fc2.bias' require a gradient")
    ) as caught:
        export_peft(model, tmp_path)
    assert caught[0].filename == __file__
    model.fc2.requires_grad_(False)
    export_peft(model, tmp_path)  # a warning would be an error


# ---- old files ---------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_a_failed_export_leaves_the_old_files(tmp_path, monkeypatch, call):
    model = trained(chain(), [({"fc": 1}, {})])
    export_peft(model, tmp_path)
    old = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    resize(model, {"fc": 3})

    def full(*args):
        raise OSError("no space left")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match="no space left"):
        export_peft(model, tmp_path)
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == old
    export_peft(model, tmp_path)
    assert config_of(tmp_path)["r"] == 3
