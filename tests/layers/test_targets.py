"""targets.py: which linear layers a user's `targets` selects."""

from __future__ import annotations

import pytest
import torch
from helpers.models import ZOO_LINEAR, Conv1DLike, assert_unchanged, snapshot, zoo
from torch import nn

from minirank import LoRALinear, ShapLoRA, UniformRanks, linear_targets, wrap
from minirank.files.saved_layer import find_modules
from minirank.layers.modules import all_names


def nested():
    """ "fc" is a suffix of "enc.fc" and a prefix of "fc2"."""
    enc = nn.ModuleDict({"fc": nn.Linear(4, 4), "norm": nn.LayerNorm(4), "0": nn.Linear(4, 4)})
    return nn.ModuleDict({"fc": nn.Linear(4, 4), "enc": enc, "fc2": nn.Linear(4, 4)})


def test_none_selects_every_linear_module_once_in_module_order_but_no_tied_head():
    model = zoo()
    found = linear_targets(model)
    assert list(found) == [name for name in ZOO_LINEAR if name != "head"]
    assert all(module is model.get_submodule(name) for name, module in found.items())


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("fc", ["fc"]),
        (["fc2", "fc"], ["fc", "fc2"]),
        ("*fc", ["fc", "enc.fc"]),
        ("fc*", ["fc", "fc2"]),
        ("*.fc", ["enc.fc"]),
        ("enc.*", ["enc.fc", "enc.0"]),
        ("*", ["fc", "enc.fc", "enc.0", "fc2"]),
        ("f[c]2", ["fc2"]),
        (["enc.fc", "enc.*"], ["enc.fc", "enc.0"]),
        (nn.Linear, ["fc", "enc.fc", "enc.0", "fc2"]),
        (lambda name, module: name.endswith("fc") and module.in_features == 4, ["fc", "enc.fc"]),
    ],
)
def test_names_are_exact_and_globs_cover_the_whole_name(targets, expected):
    assert list(linear_targets(nested(), targets)) == expected


def test_a_type_selects_its_instances():
    assert list(linear_targets(zoo(), Conv1DLike)) == ["body.conv"]
    assert list(linear_targets(zoo(), nn.Linear)) == ["body.up", "blocks.0.0", "blocks.1.0"]


@pytest.mark.parametrize("targets", ["head", ["*.up", "h*"], "*", lambda name, _: name == "head"])
def test_a_tied_head_is_selected_where_it_is_named_or_accepted(targets):
    assert "head" in linear_targets(zoo(), targets)
    assert "head" not in linear_targets(zoo())


def test_a_model_of_a_tied_head_alone_is_told_to_name_it():
    words, head = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
    head.weight = words.weight
    with pytest.raises(ValueError, match="To adapt the tied head, give its name: '1'"):
        linear_targets(nn.Sequential(words, head))


def test_a_function_sees_no_module_that_is_not_linear():
    seen = []
    linear_targets(nested(), lambda name, module: seen.append((name, module)) or True)
    assert [name for name, _ in seen] == ["fc", "enc.fc", "enc.0", "fc2"]
    assert all(isinstance(module, nn.Linear) for _, module in seen)


@pytest.mark.parametrize(
    "targets", ["alias", ["alias", "blocks.0.0"], "al*", lambda name, _: name == "alias"]
)
def test_any_name_of_a_shared_module_selects_it_under_its_first(targets):
    model = zoo()
    assert list(linear_targets(model, targets)) == ["blocks.0.0"]
    assert all_names(model)["blocks.0.0"] == ("blocks.0.0", "alias")


def test_tied_weights_do_not_make_two_modules_one():
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    assert list(linear_targets(nn.Sequential(first, second))) == ["0", "1"]


def test_an_attention_output_is_selected_by_its_exact_name_alone():
    model = nn.TransformerEncoderLayer(4, 2, 8)
    assert list(linear_targets(model)) == ["linear1", "linear2"]
    for targets in ("*", nn.Linear, lambda name, module: True):
        assert list(linear_targets(model, targets)) == ["linear1", "linear2"]
    assert list(linear_targets(model, ["self_attn.out_proj"])) == ["self_attn.out_proj"]
    with pytest.raises(ValueError, match="give its exact name"):
        linear_targets(model, "*out_proj")


def test_adapted_layers_and_what_is_inside_them_are_not_listed():
    model = nested()
    wrap(model, {"enc.fc": 1})
    assert list(linear_targets(model)) == ["fc", "enc.0", "fc2"]
    with pytest.raises(ValueError, match="already has an adapter"):
        linear_targets(model, "enc.fc")
    with pytest.raises(ValueError, match="matches no linear layer"):
        linear_targets(model, "enc.fc.base")


def test_the_model_itself_may_be_the_linear_layer():
    model = nn.Linear(2, 2)
    assert linear_targets(model) == {"": model}
    assert list(linear_targets(model, "")) == [""]


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ("enc.fd", r"'enc.fd' matches no linear layer.*did you mean 'enc\.fc'"),
        ("decoder.fc2", "did you mean.*'fc2'"),
        (
            ["fc", "nothing"],
            r"'nothing' matches no.*the names that there are: 'fc', 'enc\.fc', 'enc\.0'",
        ),
        ("c", "matches no linear layer"),
        ("enc", r"is of type ModuleDict, not a linear layer; for those inside it: 'enc\.\*'"),
        ("enc.norm", "is of type LayerNorm, not a linear layer"),
        (
            nn.Conv2d,
            "selects none in ModuleDict: it has 4 linear layers and 0 with an adapter",
        ),
        (lambda name, module: False, "selects none"),
        ([], "selects none"),
    ],
)
def test_a_selection_that_finds_nothing_is_an_error_that_helps(targets, message):
    with pytest.raises(ValueError, match=message):
        linear_targets(nested(), targets)


def test_a_model_without_linear_layers_is_an_error():
    with pytest.raises(ValueError, match="has 0 linear layers and 1 with an adapter"):
        linear_targets(nn.Sequential(LoRALinear(nn.Linear(2, 2), 1)))


def test_selecting_changes_nothing():
    model, state = zoo().train(), torch.get_rng_state()
    before = snapshot(model)
    for targets in (None, "*", nn.Linear, lambda name, module: True):
        linear_targets(model, targets)
    assert_unchanged(model, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_list_of_types_is_told_what_targets_may_be():
    with pytest.raises(TypeError, match="names, one type or one function"):
        linear_targets(nn.Sequential(nn.Linear(2, 2)), (nn.Linear,))


# ---- PEFT's models -------------------------------------------------------------------------------

REFUSED = {
    "linear_targets": linear_targets,
    "linear_targets, named": lambda model: linear_targets(model, "*.up"),
    "wrap": lambda model: wrap(model, {"up": 1}),
    "UniformRanks": UniformRanks,
    "ShapLoRA": lambda model: ShapLoRA(model, lambda m, batch: m(batch), [torch.ones(1, 4)]),
    "load_adapter": lambda model: find_modules(model, {"up": (8, 4)}),
}


@pytest.mark.parametrize("call", REFUSED)
def test_a_model_with_pefts_modules_is_refused(call):
    LoraLayer = type("LoraLayer", (nn.Linear,), {"__module__": "peft.tuners.lora.layer"})
    model = nn.Sequential(nn.ModuleDict({"q": LoraLayer(4, 4), "up": nn.Linear(4, 8)}))
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"Sequential has 1 \(LoraLayer\): give .*unload\(\)"):
        REFUSED[call](model)
    assert_unchanged(model, before)


def test_a_real_peft_model_is_refused_until_it_is_unloaded():
    peft = pytest.importorskip("peft")
    plain = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    model = peft.get_peft_model(plain, peft.LoraConfig(target_modules=["0"]))
    for given in (model, model.get_base_model()):  # which still has PEFT's layers inside
        with pytest.raises(ValueError, match="without PEFT's modules"):
            linear_targets(given)
    assert list(linear_targets(model.unload())) == ["0", "1"]
