"""import_peft: the function of adapters that PEFT trained, and what becomes of them here."""

from __future__ import annotations

import copy
import json
import re

import peft
import pytest
import torch
from helpers.models import TOKENS, assert_unchanged, inputs, snapshot, with_deltas_by_hand
from helpers.peft_cases import (
    REGEX,
    chain,
    config_of,
    gpt2,
    in_peft,
    peft_trained,
    rewrite,
    scalings,
    tensors_of,
    trained,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from minirank import (
    export_peft,
    import_peft,
    load_adapter,
    lora_layers,
    merge,
    reference,
    resize,
    save_adapter,
    wrap,
)
from minirank.reference.peft_format import of_layer

ALL = ["fc", "enc.fc", "xfc", "enc.xfc", "fc2"]

# LoraConfig's arguments, and the names it takes them for. "fc" alone also means enc.fc.
CONFIGS = {
    "plain": ({"target_modules": ["fc", "fc2"]}, ["fc", "enc.fc", "fc2"]),
    "short keys": (
        {"target_modules": ["fc", "xfc"], "rank_pattern": {"fc": 3}, "alpha_pattern": {"xfc": 5}},
        ["fc", "enc.fc", "xfc", "enc.xfc"],
    ),
    "two keys match": (
        {
            "target_modules": ["fc"],
            "rank_pattern": {"^fc": 4, "enc.fc": 1, "fc": 3},
            "alpha_pattern": {"enc.fc": 7, "fc": 5},
        },
        ["fc", "enc.fc"],
    ),
    "keys are patterns": (
        {
            "target_modules": r"(enc\.)?x?fc",
            "rank_pattern": {"enc.*": 3, "x.c": 1},
            "alpha_pattern": {".fc": 5.5},
        },
        ["fc", "enc.fc", "xfc", "enc.xfc"],
    ),
    "rank-stabilised": (
        {"target_modules": ["fc2"], "use_rslora": True, "r": 3, "alpha_pattern": {"fc2": 5}},
        ["fc2"],
    ),
    "dropout": ({"target_modules": ["fc"], "lora_dropout": 0.25}, ["fc", "enc.fc"]),
    "excluded": ({"target_modules": ["fc"], "exclude_modules": ["enc.fc"]}, ["fc"]),
    "gaussian": ({"target_modules": ["fc"], "init_lora_weights": "gaussian"}, ["fc", "enc.fc"]),
    "random": ({"target_modules": ["fc"], "init_lora_weights": False}, ["fc", "enc.fc"]),
}


def assert_same_delta_weights(layers, tensors, config):
    """Those of the reference. Only `layers` have one."""
    for name, layer in layers.items():
        expected = reference.peft_delta_weight(tensors, config, name)
        delta = layer.delta_weight().detach()
        delta = delta.T if config.get("fan_in_fan_out") else delta
        atol = 1e-14 * float(delta.abs().max())
        torch.testing.assert_close(delta, expected, rtol=1e-14, atol=atol)
    assert len(tensors) == 2 * len(layers)


def check_import(plain, folder, theirs, x, names):
    """The imported layers, equal to those of `theirs`: bits, scaling, function."""
    model = copy.deepcopy(plain)
    layers = import_peft(model, folder, trainable=[])
    assert sorted(layers) == sorted(names)
    assert {name: layer.scaling for name, layer in layers.items()} == scalings(theirs)
    assert_same_delta_weights(layers, tensors_of(folder), config_of(folder))
    for name, layer in layers.items():
        for key, value in layer.named_parameters(recurse=False):
            assert torch.equal(value, tensors_of(folder)[f"base_model.model.{name}.{key}.weight"])
            assert value.requires_grad
        assert layer.alpha == theirs.get_submodule(f"base_model.model.{name}").lora_alpha["default"]
        assert (
            layer.reference_rank
            == layer.rank
            == theirs.get_submodule(f"base_model.model.{name}").r["default"]
        )
    y, expected = model(x), theirs(x)
    y, expected = (y, expected) if isinstance(y, torch.Tensor) else (y.logits, expected.logits)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    return model


if "orthogonal" in str(peft.LoraConfig.__annotations__["init_lora_weights"]):  # PEFT 0.18 or newer
    CONFIGS["orthogonal"] = (
        {"target_modules": ["fc"], "init_lora_weights": "orthogonal"},
        ["fc", "enc.fc"],
    )


@pytest.mark.parametrize("case", CONFIGS)
def test_what_peft_trained_computes_the_same_here(tmp_path, case):
    options, names = CONFIGS[case]
    x = inputs(3, 6)
    theirs = peft_trained(
        chain(), peft.LoraConfig(**{"r": 2, "lora_alpha": 3, **options}), x, tmp_path
    )
    assert not torch.allclose(theirs(x), chain()(x))
    model = check_import(chain(), tmp_path, theirs, x, names)
    assert {layer.dropout for layer in lora_layers(model).values()} == {
        options.get("lora_dropout", 0.0)
    }


PATTERNS = ["fc", "^fc", r"^enc\.fc", "enc.fc", ".fc", ".*xfc", "x?fc", "fc2", r"a\+b", r"w\[0\]"]
PATTERNS += [re.escape(name) for name in REGEX] + [name for name in REGEX if name[0].isalpha()]


@settings(max_examples=60, deadline=None)
@given(
    names=st.sets(st.sampled_from([*ALL, *REGEX]), min_size=1),
    rank_pattern=st.dictionaries(st.sampled_from(PATTERNS), st.integers(1, 4)),
    alpha_pattern=st.dictionaries(st.sampled_from(PATTERNS), st.floats(0.01, 100)),
    defaults=st.fixed_dictionaries({"r": st.integers(1, 4)}, optional={"lora_alpha": st.just(3)}),
    use_rslora=st.booleans(),
    transposed=st.booleans(),
)
def test_random_folders_have_the_delta_weights_of_the_reference(
    tmp_path_factory, names, rank_pattern, alpha_pattern, defaults, use_rslora, transposed
):
    """Mixed ranks and alphas, by patterns of which several match one name, or by the defaults."""
    config = {
        "peft_type": "LORA",
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "use_rslora": use_rslora,
        "fan_in_fan_out": transposed,
        **defaults,
    }
    every_name = [*ALL, *REGEX]
    model = chain(every_name, every_name if transposed else ())
    generator, tensors = torch.Generator().manual_seed(0), {}
    for name in names:
        rank = of_layer(rank_pattern, name, defaults["r"])
        d_out = 4 if name == every_name[-1] else 6
        for key, shape in (("lora_A", (rank, 6)), ("lora_B", (d_out, rank))):
            tensors[f"base_model.model.{name}.{key}.weight"] = torch.randn(
                shape, generator=generator, dtype=torch.float64
            )
    folder = tmp_path_factory.mktemp("adapter")
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    assert_same_delta_weights(import_peft(model, folder), tensors, config)


def test_the_first_key_that_matches_wins(tmp_path):
    """The order in the file counts, not the length of the key or of the match."""
    peft_trained(chain(), peft.LoraConfig(target_modules=["fc"], r=2), inputs(3, 6), tmp_path)
    for alphas, expected in [({"fc": 5, "enc.fc": 7}, 5), ({"enc.fc": 7, "fc": 5}, 7)]:
        rewrite(tmp_path, alpha_pattern=alphas)
        layers = import_peft(chain(), tmp_path)
        assert (layers["fc"].alpha, layers["enc.fc"].alpha) == (5, expected)
        assert scalings(in_peft(chain(), tmp_path)) == {"fc": 5 / 2, "enc.fc": expected / 2}


def test_peft_sorts_the_keys_when_it_saves(tmp_path):
    """The fault in PEFT: what it trained is not what it loads. Import does as PEFT's loading."""
    config = peft.LoraConfig(target_modules=["fc"], r=2, alpha_pattern={"fc": 5, "enc.fc": 7})
    theirs, x = peft_trained(chain(), config, inputs(3, 6), tmp_path), inputs(3, 6)
    assert scalings(theirs) == {"fc": 5 / 2, "enc.fc": 5 / 2}
    loaded = in_peft(chain(), tmp_path)
    assert not torch.allclose(loaded(x), theirs(x))
    check_import(chain(), tmp_path, loaded, x, ["fc", "enc.fc"])
    config = peft.LoraConfig(target_modules=["fc"], r=2, rank_pattern={"fc": 1, "enc.fc": 3})
    peft_trained(chain(), config, x, tmp_path)
    with pytest.raises(RuntimeError, match="size mismatch"):
        in_peft(chain(), tmp_path)
    with pytest.raises(
        ValueError, match=r"'enc\.fc' has rank 1 .* 3 .*two patterns.*PEFT's saving sorts them"
    ):
        import_peft(chain(), tmp_path)


# PEFT warns since the key matches no name as a pattern, but gives the layer its rank all the same.
@pytest.mark.filterwarnings(
    "ignore:The following (rank|alpha)_pattern keys did not match any targeted module"
)
def test_a_key_that_is_the_name_counts_where_it_does_not_match_as_a_pattern(tmp_path):
    names = [name for name in REGEX if name not in ("c*", "$h", "^t", "back\\slash")]
    config = peft.LoraConfig(
        target_modules=list(REGEX[:-1]),
        r=1,
        rank_pattern=dict.fromkeys(names[:3], 2),
        alpha_pattern={name: 3 + i for i, name in enumerate(names)},
    )
    x = inputs(3, 6)
    theirs = peft_trained(chain(REGEX), config, x, tmp_path)
    assert scalings(theirs)["w[0]"] == 4 / 2
    check_import(chain(REGEX), tmp_path, theirs, x, REGEX[:-1])


# PEFT asks transformers by an old name. PEFT 0.15 looks for the files of a model without any.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:Could not find a config file in  - will assume:UserWarning")
@pytest.mark.parametrize(
    ("options", "names"),
    [
        (
            {"target_modules": "all-linear"},
            [
                f"h.{i}.{leaf}"
                for i in (0, 1)
                for leaf in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
            ],
        ),
        (
            {"target_modules": ["c_attn"], "layers_to_transform": [1], "layers_pattern": "h"},
            ["h.1.attn.c_attn"],
        ),
        (
            {"target_modules": ["c_proj"], "exclude_modules": ["mlp.c_proj"]},
            [f"h.{i}.attn.c_proj" for i in (0, 1)],
        ),
    ],
    ids=["all-linear", "layers_to_transform", "exclude_modules"],
)
def test_a_transformer_of_conv1d_layers(tmp_path, options, names):
    config = peft.LoraConfig(
        r=2, lora_alpha=5, fan_in_fan_out=True, task_type="CAUSAL_LM", **options
    )
    theirs = peft_trained(gpt2(), config, TOKENS, tmp_path)
    check_import(gpt2(), tmp_path, theirs, TOKENS, [f"transformer.{name}" for name in names])


def test_a_start_that_distributes_ranks(tmp_path):
    """EVA finds the ranks in data, and PEFT writes what it found under full names."""
    eva = {"init_lora_weights": "eva", "eva_config": peft.EvaConfig()}
    config, x = (
        peft.LoraConfig(target_modules=["a", "b", "c"], r=2, **eva),
        inputs(40, 6, dtype=torch.float32),
    )
    x[:, 1:] *= 0.1
    with torch.random.fork_rng():
        theirs = peft.get_peft_model(
            chain("abcd", dtype=torch.float32), config, low_cpu_mem_usage=True
        )
        peft.initialize_lora_eva_weights(
            theirs,
            [{"x": part} for part in x.split(8)],
            prepare_model_inputs_fn=None,
            prepare_layer_inputs_fn=lambda given, *_: (
                given[0] if isinstance(given, tuple) else given
            ),
            show_progress_bar=False,
        )
        for layer in theirs.modules():
            if isinstance(layer, peft.tuners.lora.LoraLayer):
                torch.nn.init.normal_(layer.lora_B["default"].weight)
        theirs.save_pretrained(tmp_path)
    model = chain("abcd", dtype=torch.float32)
    assert len({layer.rank for layer in import_peft(model, tmp_path).values()}) > 1
    torch.testing.assert_close(model(x), theirs.eval()(x), rtol=1e-5, atol=1e-5)


def test_a_start_that_changes_the_base_counts_once_peft_has_converted_it(tmp_path):
    """PiSSA, saved as the difference to its start: plain LoRA of twice the rank."""
    plain, x = chain(dtype=torch.float32), inputs(3, 6, dtype=torch.float32)
    config = peft.LoraConfig(target_modules=["fc"], r=2, lora_alpha=3, init_lora_weights="pissa")
    with torch.random.fork_rng():
        theirs = peft.get_peft_model(copy.deepcopy(plain), config)
        theirs.peft_config["default"].init_lora_weights = True
        theirs.save_pretrained(tmp_path / "start")
        with torch.no_grad():
            for name, parameter in theirs.named_parameters():
                if "lora_" in name:
                    parameter += 0.3
        theirs.save_pretrained(
            tmp_path / "end", path_initial_model_for_weight_conversion=tmp_path / "start"
        )
    model = copy.deepcopy(plain)
    assert {layer.rank for layer in import_peft(model, tmp_path / "end").values()} == {4}
    torch.testing.assert_close(model(x), theirs.eval()(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)]
)
def test_models_in_other_types(tmp_path, dtype, bound):
    """PEFT's adapters are float32 beside a half-precision base, and stay so."""
    x = inputs(3, 6, dtype=dtype)
    config = peft.LoraConfig(target_modules=["fc"], r=2, lora_alpha=3)
    theirs = peft_trained(chain(dtype=dtype), config, x, tmp_path)
    model = chain(dtype=dtype)
    layers = import_peft(model, tmp_path)
    assert {layer.lora_A.dtype for layer in layers.values()} == {torch.float32}
    assert model(x).dtype == dtype
    torch.testing.assert_close(model(x), theirs(x), rtol=bound, atol=bound)


def test_the_configuration_may_lack_what_has_a_default(tmp_path):
    theirs = peft_trained(
        chain(), peft.LoraConfig(target_modules=["fc"], r=2), inputs(3, 6), tmp_path
    )
    keep = {"peft_type", "r", "target_modules"}
    rewrite(tmp_path, **dict.fromkeys(set(config_of(tmp_path)) - keep))
    assert config_of(tmp_path).keys() == keep
    check_import(chain(), tmp_path, theirs, inputs(3, 6), ["fc", "enc.fc"])  # lora_alpha is 8


def test_importing_reads_no_random_numbers_and_takes_trainable_as_wrap_does(tmp_path):
    export_peft(trained(chain(), [({"fc": 2, "xfc": 1}, {})]), tmp_path)
    state, model = torch.get_rng_state(), chain()
    import_peft(model, tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    own = {f"{name}.{key}" for name in ("fc", "xfc") for key in ("lora_A", "lora_B")}
    others = {
        f"{name}.{key}" for name in ("enc.fc", "enc.xfc", "fc2") for key in ("weight", "bias")
    }
    assert {name for name, p in model.named_parameters() if p.requires_grad} == own
    model = chain()
    import_peft(model, tmp_path, trainable=None)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == own | others
    model = chain()
    import_peft(model, tmp_path, trainable="fc2")
    assert {n for n, p in model.named_parameters() if p.requires_grad} == own | {
        "fc2.weight",
        "fc2.bias",
    }
    before = snapshot(fresh := chain())
    with pytest.raises(ValueError, match="trainable='nothing' matches no module"):
        import_peft(fresh, tmp_path, trainable="nothing")
    assert_unchanged(fresh, before)
    with torch.inference_mode():
        assert not import_peft(fresh, tmp_path)["fc"].lora_A.is_inference()


def test_an_imported_adapter_is_resized_trained_merged_saved_and_exported_again(tmp_path):
    x = inputs(3, 6)
    config = peft.LoraConfig(
        target_modules=["fc", "xfc"], r=3, lora_alpha=4, alpha_pattern={"xfc": 7}
    )
    peft_trained(chain(), config, x, tmp_path / "theirs")
    model = chain()
    layers = import_peft(model, tmp_path / "theirs", trainable=[])
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    before, fixed = (
        model(x).square().mean(),
        {name: layer.scaling for name, layer in layers.items()},
    )
    for ranks in ({"fc": 5}, {"xfc": 1, "enc.fc": 0}, {"enc.fc": 2}):
        resize(model, ranks, optimizer)
        for _ in range(5):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    assert model(x).square().mean() < before
    assert {name: layer.rank for name, layer in layers.items()} == {
        "fc": 5,
        "enc.fc": 2,
        "xfc": 1,
        "enc.xfc": 3,
    }
    assert {name: layer.scaling for name, layer in layers.items()} == fixed
    y = model(x)
    torch.testing.assert_close(with_deltas_by_hand(chain(), layers)(x), y, rtol=1e-12, atol=1e-12)
    save_adapter(model, tmp_path / "own.safetensors")
    loaded = chain()
    load_adapter(loaded, tmp_path / "own.safetensors")
    assert torch.equal(loaded(x), y)
    for portable in (False, True):
        export_peft(model, tmp_path / "again", portable=portable)
        torch.testing.assert_close(
            in_peft(chain(), tmp_path / "again")(x), y, rtol=1e-12, atol=1e-12
        )
    merge(model)
    torch.testing.assert_close(model(x), y, rtol=1e-12, atol=1e-12)


def test_each_pattern_is_compiled_once(tmp_path, monkeypatch):
    """re keeps 512 patterns. More of them, tried on all layers, would be compiled over and over."""
    count = 600
    model, plain = (nn.ModuleList(nn.Linear(2, 2) for _ in range(count)) for _ in range(2))
    wrap(model, {str(i): 1 for i in range(count)})
    export_peft(model, tmp_path)
    compiler = re._compiler if hasattr(re, "_compiler") else re.sre_compile
    compile, compiled = compiler.compile, []
    monkeypatch.setattr(compiler, "compile", lambda *args: compiled.append(args) or compile(*args))
    assert len(import_peft(plain, tmp_path)) == count
    assert len(compiled) <= count + 5
