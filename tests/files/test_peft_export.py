"""export_peft: real PEFT computes the same function from the folder, and saves the same tensors."""

from __future__ import annotations

import os
import warnings

import peft
import pytest
import torch
from helpers.models import (
    TOKENS,
    assert_unchanged,
    delta_by_hand,
    inputs,
    snapshot,
    with_deltas_by_hand,
    wrapped,
)
from helpers.peft_cases import (
    REGEX,
    SUFFIXES,
    chain,
    config_of,
    gpt2,
    in_peft,
    rewrite,
    scalings,
    tensors_of,
    trained,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from minirank import export_peft, import_peft, linear_targets, lora_layers, reference, resize

# PEFT says so of every mixture of nn.Linear and Conv1D, and then uses the right layout for each.
mixed = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to")

CALLS = {
    "suffixes": (
        (),
        [
            ({"fc": 1, "xfc": 2}, {"alpha": 4}),
            ({"enc.fc": 3, "fc2": 4}, {"alpha": 1, "dropout": 0.1}),
        ],
    ),
    "regex characters": (
        (REGEX,),
        [({name: 1 + i % 4 for i, name in enumerate(REGEX[:-1])}, {"alpha": 7})],
    ),
    "one reference rank": ((), [({"fc": 1, "enc.fc": 6}, {"alpha": 3, "reference_rank": 2.5})]),
    "rank-stabilised": ((), [({"fc": 1, "enc.fc": 5}, {"alpha": 3, "rank_stabilized": True})]),
    "gates from 1": ((), [({"fc": 2, "enc.fc": 3}, {"gate": 1.0, "alpha": 5}), ({"xfc": 2}, {})]),
    "gates from 0": ((), [({"fc": 2, "enc.fc": 3}, {"gate": 0.0})]),
    "full rank": ((), [(dict.fromkeys(SUFFIXES[:-1], 6) | {"fc2": 4}, {})]),
    "Conv1D": ((SUFFIXES, SUFFIXES), [({"fc": 2, "fc2": 3}, {"alpha": 3})]),
    "Conv1D and Linear": (
        (SUFFIXES, ("enc.fc", "fc2")),
        [({"fc": 2, "enc.fc": 1, "fc2": 3}, {"alpha": 3})],
    ),
    "no bias": ((SUFFIXES, (), False), [({"fc": 2, "fc2": 3}, {})]),
}


@mixed
@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("case", CALLS)
def test_peft_computes_the_same_function_and_saves_the_same_tensors(tmp_path, case, portable):
    arguments, calls = CALLS[case]
    model, x = trained(chain(*arguments), calls), inputs(3, 6)
    export_peft(model, tmp_path, portable=portable)
    theirs = in_peft(chain(*arguments), tmp_path)
    torch.testing.assert_close(theirs(x), model(x), rtol=1e-12, atol=1e-12)
    layers = lora_layers(model)
    torch.testing.assert_close(
        theirs(x), with_deltas_by_hand(chain(*arguments), layers)(x), rtol=1e-12, atol=1e-12
    )
    # alpha / r rounds twice.
    expected = {name: 1.0 if portable else layer.scaling for name, layer in layers.items()}
    assert scalings(theirs) == pytest.approx(expected, rel=1e-15)
    theirs.save_pretrained(tmp_path / "again")
    ours, again = tensors_of(tmp_path), tensors_of(tmp_path / "again")
    assert ours.keys() == again.keys()
    assert all(
        torch.equal(ours[key], again[key]) and ours[key].dtype == again[key].dtype for key in ours
    )
    for name, layer in layers.items():
        assert torch.equal(ours[f"base_model.model.{name}.lora_A.weight"], layer.lora_A)
        if layer.gate is None and not portable:
            assert torch.equal(ours[f"base_model.model.{name}.lora_B.weight"], layer.lora_B)


@mixed
def test_peft_merges_it_to_the_weights_built_by_hand(tmp_path):
    arguments, calls = CALLS["Conv1D and Linear"]
    model = trained(chain(*arguments), calls)
    export_peft(model, tmp_path)
    expected = with_deltas_by_hand(chain(*arguments), lora_layers(model))
    merged = in_peft(chain(*arguments), tmp_path).merge_and_unload()
    torch.testing.assert_close(merged.state_dict(), expected.state_dict(), rtol=1e-12, atol=1e-12)


# PEFT asks transformers by an old name. It warns of a tied head, whose adapter does not touch the
# embedding unless merged. PEFT 0.15 looks for the files of a model that never had any.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:Could not find a config file in  - will assume:UserWarning")
@pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word_embeddings=True` and")
@mixed
@pytest.mark.parametrize("head", [0, 3])
def test_a_whole_transformer(tmp_path, head):
    """Conv1D in the blocks, nn.Linear for the head, which is tied to the embedding."""
    plain, model = gpt2(), gpt2()
    ranks = {name: 1 + i for i, name in enumerate(linear_targets(model, "*.h.*"))}
    trained(model, [(ranks, {"alpha": 2}), ({"lm_head": head}, {})][: 1 + bool(head)])
    export_peft(model, tmp_path)
    theirs = in_peft(plain, tmp_path)
    torch.testing.assert_close(theirs(TOKENS).logits, model(TOKENS).logits, rtol=1e-12, atol=1e-12)
    theirs.save_pretrained(
        tmp_path / "again", save_embedding_layers=False
    )  # else with a head's own weight
    ours, again = tensors_of(tmp_path), tensors_of(tmp_path / "again")
    assert ours.keys() == again.keys()
    assert all(torch.equal(ours[key], again[key]) for key in ours)


def test_peft_loads_a_model_with_embedding_norm_and_tied_head(tmp_path):
    """No look-alike of nn.Linear, which PEFT does not adapt, and no module in two places."""
    plain, model, _ = wrapped(ranks={"body.up": 2, "blocks.1.0": 3, "head": 4})
    export_peft(model, tmp_path)
    torch.testing.assert_close(
        in_peft(plain, tmp_path)(TOKENS), model(TOKENS), rtol=1e-12, atol=1e-12
    )


def test_layers_of_rank_zero_are_left_out(tmp_path):
    model = trained(chain(), [({"fc": 2, "enc.fc": 2, "xfc": 1}, {"alpha": 6})])
    resize(model, {"enc.fc": 0})
    export_peft(model, tmp_path)
    assert {key.split(".lora")[0] for key in tensors_of(tmp_path)} == {
        "base_model.model.fc",
        "base_model.model.xfc",
    }
    theirs = in_peft(chain(), tmp_path)
    assert list(scalings(theirs)) == ["fc", "xfc"]
    x = inputs(3, 6)
    torch.testing.assert_close(theirs(x), model(x), rtol=1e-12, atol=1e-12)


# One rounding of the adapter's part per layer and side. PEFT adds in the wider type, minirank in
# the base's.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize(
    ("base", "adapter"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
)
def test_every_adapter_type_is_kept(tmp_path, base, adapter, portable):
    model = trained(chain(dtype=base), [({"fc": 1, "enc.fc": 3}, {"alpha": 3, "dtype": adapter})])
    export_peft(model, tmp_path, portable=portable)
    assert {value.dtype for value in tensors_of(tmp_path).values()} == {adapter}
    # By default PEFT widens half-precision adapters to float32. An adapter that already is float32,
    # beside a half-precision base, must stay so.
    theirs = in_peft(chain(dtype=base), tmp_path, autocast_adapter_dtype=adapter != base)
    x = inputs(3, 6, dtype=base)
    assert theirs(x).dtype == model(x).dtype
    torch.testing.assert_close(theirs(x), model(x), rtol=TOLERANCE[base], atol=TOLERANCE[base])
    theirs.save_pretrained(tmp_path / "again")
    ours, again = tensors_of(tmp_path), tensors_of(tmp_path / "again")
    assert ours.keys() == again.keys()
    assert all(
        torch.equal(ours[key], again[key]) and ours[key].dtype == again[key].dtype for key in ours
    )


RANKS = st.dictionaries(st.sampled_from(SUFFIXES), st.integers(0, 4), min_size=1).filter(
    lambda r: any(r.values())
)


@settings(max_examples=50, deadline=None)
@given(
    ranks=RANKS,
    alpha=st.floats(0.01, 100),
    gate=st.sampled_from([None, 0.0, 0.3, 1.0]),
    stabilized=st.booleans(),
    portable=st.booleans(),
    dropout=st.sampled_from([0.0, 0.25]),
)
def test_random_adapters_survive_the_way_to_peft_and_back(
    tmp_path_factory, ranks, alpha, gate, stabilized, portable, dropout
):
    folder, x = tmp_path_factory.mktemp("adapter"), inputs(3, 6)
    options = {"alpha": alpha, "gate": gate, "rank_stabilized": stabilized, "dropout": dropout}
    model = trained(chain(), [(ranks, options)]).eval()
    export_peft(model, folder, portable=portable)
    theirs = in_peft(chain(), folder)
    # The deltas are of the size of alpha.
    bound = {"rtol": 1e-12, "atol": 1e-12 * (1 + alpha)}
    torch.testing.assert_close(theirs(x), model(x), **bound)
    theirs.save_pretrained(folder / "again")
    for written_by in (folder, folder / "again"):
        back = chain()
        layers = import_peft(back, written_by)
        assert {name: layer.rank for name, layer in layers.items()} == {
            n: r for n, r in ranks.items() if r
        }
        assert all(layer.dropout == dropout and layer.gate is None for layer in layers.values())
        torch.testing.assert_close(back(x), model(x), **bound)


# ---- the reference ------------------------------------------------------------------------------

NAMES = [*SUFFIXES, *REGEX]


def as_reference(layers):
    """Layers as `reference.peft_export` takes them."""
    return {
        name: {
            "A": layer.lora_A.detach(),
            "B": layer.lora_B.detach(),
            "gate": None if layer.gate is None else layer.gate.detach(),
            "scaling": layer.scaling,
        }
        for name, layer in layers.items()
    }


@settings(max_examples=60, deadline=None)
@given(
    ranks=st.dictionaries(st.sampled_from(NAMES), st.integers(1, 4), min_size=1),
    emptied=st.sets(st.sampled_from(NAMES)),
    alphas=st.tuples(st.floats(0.01, 100), st.floats(0.01, 100)),
    gates=st.tuples(*2 * [st.sampled_from([None, 0.0, 0.3, 1.0])]),
    stabilized=st.booleans(),
    transposed=st.sampled_from([(), NAMES, NAMES[::2]]),
    portable=st.booleans(),
)
def test_random_adapters_have_the_delta_weights_of_the_reference(
    tmp_path_factory, ranks, emptied, alphas, gates, stabilized, transposed, portable
):
    """Two calls of `wrap` with scalings and gates of their own; some layers pruned to rank 0."""
    folder, model = tmp_path_factory.mktemp("adapter"), chain(NAMES, transposed)
    for half, alpha, gate in zip((NAMES[::2], NAMES[1::2]), alphas, gates, strict=True):
        if part := {name: rank for name, rank in ranks.items() if name in half}:
            trained(model, [(part, {"alpha": alpha, "gate": gate, "rank_stabilized": stabilized})])
    emptied = [name for name in ranks if name in emptied][: len(ranks) - 1]
    if emptied:
        resize(model, dict.fromkeys(emptied, 0))
    export_peft(model, folder, portable=portable)
    tensors, config = tensors_of(folder), config_of(folder)
    layers = {name: layer for name, layer in lora_layers(model).items() if layer.rank > 0}
    assert config["fan_in_fan_out"] == all(name in transposed for name in layers)
    for name in NAMES:
        delta = reference.peft_delta_weight(tensors, config, name)
        if name not in layers:
            assert delta is None
            continue
        by_hand = delta_by_hand(layers[name])
        expected = by_hand.T if config["fan_in_fan_out"] else by_hand
        atol = 1e-14 * float(by_hand.abs().max())
        torch.testing.assert_close(delta, expected, rtol=1e-14, atol=atol)
    if not portable:
        their_tensors, their_config = reference.peft_export(as_reference(layers))
        torch.testing.assert_close(tensors, their_tensors, rtol=1e-15, atol=0)
        for key in ("r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern"):
            assert config[key] == their_config[key]


# ---- portable ----------------------------------------------------------------------------------


def test_a_portable_adapter_needs_no_alpha_pattern(tmp_path):
    model = trained(
        chain(), [({"fc": 1}, {"alpha": 4}), ({"enc.fc": 3}, {"alpha": 1, "gate": 1.0})]
    )
    export_peft(model, tmp_path, portable=True)
    config, tensors = config_of(tmp_path), tensors_of(tmp_path)
    assert config["alpha_pattern"] == {"^fc": 1, r"^enc\.fc": 3} == config["rank_pattern"]
    assert config["lora_alpha"] == config["r"] == 3
    by_hand = chain()  # a loader that ignores every pattern: W + B A
    with torch.no_grad():
        for name in lora_layers(model):
            A, B = (
                tensors[f"base_model.model.{name}.{key}.weight"] for key in ("lora_A", "lora_B")
            )
            by_hand.get_submodule(name).weight += B @ A
    x = inputs(3, 6)
    torch.testing.assert_close(by_hand(x), model(x), rtol=1e-12, atol=1e-12)


def test_what_is_not_portable_says_so_by_its_alpha_pattern(tmp_path):
    """Shows that the loader of the test above would be wrong without portable=True."""
    model = trained(chain(), [({"fc": 1}, {"alpha": 4}), ({"enc.fc": 3}, {"alpha": 1})])
    export_peft(model, tmp_path)
    config = config_of(tmp_path)
    assert config["alpha_pattern"] == {"^fc": 4.0, r"^enc\.fc": 1.0}
    assert config["lora_alpha"] == 4.0
    rewrite(tmp_path, alpha_pattern={})
    assert scalings(in_peft(chain(), tmp_path)) == {"fc": 4.0, "enc.fc": 4 / 3}


# ---- the file ----------------------------------------------------------------------------------


def test_the_configuration_holds_what_was_given_and_defaults(tmp_path):
    model = trained(chain(), [({"fc": 1}, {"dropout": 0.1}), ({"xfc": 2}, {"dropout": 0.3})])
    export_peft(
        model,
        tmp_path / "new" / "folder",
        base_model_name_or_path="some/model",
        task_type="FEATURE_EXTRACTION",
    )
    config = config_of(tmp_path / "new" / "folder")
    assert config["base_model_name_or_path"] == "some/model"
    assert config["task_type"] == "FEATURE_EXTRACTION"
    assert config["lora_dropout"] == 0.3  # the largest
    assert config["inference_mode"]
    assert sorted(os.listdir(tmp_path / "new" / "folder")) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_exporting_changes_neither_the_model_nor_the_global_random_numbers(tmp_path):
    model = trained(chain(), [({"fc": 1}, {"gate": 1.0})])
    before, state = snapshot(model), torch.get_rng_state()
    export_peft(model, tmp_path, portable=True)
    assert_unchanged(model, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_peft_reads_it_without_a_warning_about_the_configuration(tmp_path):
    export_peft(trained(chain(), [({"fc": 1}, {})]), tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        peft.PeftConfig.from_pretrained(tmp_path)


# ---- PEFT's faults -----------------------------------------------------------------------------


def test_peft_takes_a_list_of_names_for_suffixes():
    """The fault in PEFT: one name, two layers. Written as export_peft does, it is one."""
    with torch.random.fork_rng():
        listed = peft.get_peft_model(chain(), peft.LoraConfig(target_modules=["fc"]))
        exact = peft.get_peft_model(chain(), peft.LoraConfig(target_modules="(fc)"))
    assert list(scalings(listed)) == ["fc", "enc.fc"]
    assert list(scalings(exact)) == ["fc"]


def test_peft_rescales_when_the_rank_changes_and_export_does_not(tmp_path):
    """The fault in PEFT: fewer ranks at one lora_alpha scale more. Here the function stays."""
    model, x = trained(chain(), [({"fc": 4}, {"alpha": 8})]), inputs(3, 6)
    with torch.no_grad():
        lora_layers(model)["fc"].lora_B[:, 1:] = 0  # three ranks that do nothing
    y = model(x)
    resize(model, {"fc": 1})
    torch.testing.assert_close(model(x), y, rtol=1e-12, atol=1e-12)
    export_peft(model, tmp_path)
    theirs = in_peft(chain(), tmp_path)
    assert scalings(theirs) == {"fc": 2.0}
    torch.testing.assert_close(theirs(x), y, rtol=1e-12, atol=1e-12)
    rewrite(tmp_path, lora_alpha=8, alpha_pattern={})
    rescaled = in_peft(chain(), tmp_path)
    assert scalings(rescaled) == {"fc": 8.0}
    assert not torch.allclose(rescaled(x), y)
