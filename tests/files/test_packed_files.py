"""Adapters beside packed layers, on disk: our own file, and PEFT's folder both ways."""

from __future__ import annotations

import warnings

import pytest
import torch
from helpers.models import randomize
from helpers.packed import (
    EVERY,
    LIBRARIES,
    TOYS,
    FourBitLinear,
    data,
    packed_model,
)
from torch import nn

from minirank import (
    SensitivityLoRA,
    export_peft,
    import_peft,
    load_adapter,
    save_adapter,
    wrap,
)
from minirank.files.base_fingerprint import base_fingerprint, same_base

every = pytest.mark.parametrize("pack", EVERY.values(), ids=EVERY.keys())
RANKS = {"0": 3, "2": 2, "4": 1}


def adapted(pack, dtype=torch.float32, **options):
    model = packed_model(pack, dtype)
    randomize(wrap(model, RANKS, scaling=2.0, **options))
    return model


@every
def test_an_adapter_is_saved_and_loaded_beside_a_packed_base(pack, tmp_path):
    model, again = adapted(pack), packed_model(pack)
    x = data()[0][0]
    model(x)  # the layers of some libraries move their scales when they are first called
    save_adapter(model, tmp_path / "adapter")
    layers = load_adapter(again, tmp_path / "adapter")
    assert layers["0"].lora_A.dtype == torch.float32
    assert torch.equal(again(x), model(x))


@every
def test_another_packed_base_is_refused(pack, tmp_path):
    save_adapter(adapted(pack), tmp_path / "adapter")
    with pytest.raises(ValueError, match="'0', '2', '4': not the base weights"):
        load_adapter(packed_model(pack, seed=1), tmp_path / "adapter")


@every
def test_a_fingerprint_sees_the_scales_too(pack):
    """Twice the weight has the same codes in every library here."""
    linear = nn.Linear(64, 64, bias=False)
    twice = nn.Linear(64, 64, bias=False)
    with torch.no_grad():
        twice.weight.copy_(2 * linear.weight)
    if pack is FourBitLinear:
        pytest.skip("its step is a plain number, which its state_dict does not hold")
    fingerprint = base_fingerprint(pack(linear))
    assert same_base(pack(linear), fingerprint)
    assert not same_base(pack(twice), fingerprint)


def test_a_fingerprint_changes_nothing_and_is_the_same_after_a_call():
    model = packed_model(LIBRARIES["bitsandbytes 8 bits"])
    before = base_fingerprint(model[0])
    model(data()[0][0])
    assert base_fingerprint(model[0]) == before


@every
def test_export_and_import_in_pefts_format(pack, tmp_path):
    model, again = adapted(pack, gate=1.0), packed_model(pack)
    export_peft(model, tmp_path)
    import_peft(again, tmp_path)
    x = data()[0][0]
    expected = model(x).detach()
    allowed = 1e-5 * float(expected.abs().max())
    torch.testing.assert_close(again(x), expected, rtol=1e-5, atol=allowed)


@pytest.mark.parametrize("name", ["bitsandbytes 8 bits", "torchao int8"])
def test_pefts_own_layers_compute_the_same(name, tmp_path):
    peft = pytest.importorskip("peft")
    # In one mode, since bitsandbytes rounds differently in training; and no adapter below its
    # layers, which round their input to 8 bits: a rounding difference could become a whole step.
    model = packed_model(LIBRARIES[name]).eval()
    randomize(wrap(model, {"2": 2, "4": 1}, scaling=2.0))
    export_peft(model, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT cannot merge into torchao's layers
        theirs = peft.PeftModel.from_pretrained(packed_model(LIBRARIES[name]), tmp_path)
    x = data()[0][0]
    torch.testing.assert_close(theirs(x), model(x), rtol=1e-5, atol=1e-4)


def test_the_ranks_of_a_packed_model_go_to_peft():
    peft = pytest.importorskip("peft")
    model = packed_model(LIBRARIES["bitsandbytes 8 bits"])
    allocator = SensitivityLoRA(model, lambda model, batch: model(batch[0]).square().mean(), data())
    allocator.score()
    allocation = allocator.allocate(9)
    config = peft.LoraConfig(
        target_modules=allocation.target_modules,
        rank_pattern=allocation.rank_pattern,
        alpha_pattern=allocation.alpha_pattern(2.0),
    )
    matrices = {
        name.split(".")[2]: len(parameter)
        for name, parameter in peft.get_peft_model(model, config).named_parameters()
        if "lora_A" in name
    }
    assert matrices == {name: rank for name, rank in allocation.ranks.items() if rank}
    assert allocation.ranks["0"] > 0


def test_toys_cover_both_ways_to_hold_a_packed_weight():
    held = {name: hasattr(packed_model(pack)[0], "weight") for name, pack in TOYS.items()}
    assert held == {"int8": True, "4 bits": False}
