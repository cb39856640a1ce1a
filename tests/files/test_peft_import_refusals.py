"""What import_peft refuses: by its name, saying what to do, and with nothing changed."""

from __future__ import annotations

import copy
import json
import math
import re

import peft
import pytest
import torch
from helpers.models import TOKENS, assert_unchanged, inputs, snapshot, wrapped, zoo
from helpers.peft_cases import (
    chain,
    gpt2,
    in_peft,
    made,
    peft_trained,
    rewrite,
    tensors_of,
    trained,
)
from safetensors.torch import save_file
from torch import nn

from minirank import export_peft, import_peft, wrap

# ---- what is not plain LoRA ---------------------------------------------------------------------


def import_refused(model, folder, *parts, error=ValueError):
    """`parts` in the message, in their order; the model as it was."""
    before = snapshot(model)
    with pytest.raises(
        error, match="(?s)" + ".*".join(re.escape(part) for part in parts)
    ) as caught:
        import_peft(model, folder)
    assert_unchanged(model, before)
    assert str(folder) in str(caught.value)
    return str(caught.value)


# PEFT does not know its own trained biases there.
@pytest.mark.filterwarnings("ignore:Adapter 'default'. 2 LoRA tensor.s. have invalid shape")
@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"use_dora": True}, "use_dora=True"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"bias": "all"}, "bias='all'"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"modules_to_save": ["fc2"]}, "modules_to_save=['fc2']"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
    ],
    ids=str,
)
def test_real_adapters_of_other_kinds_are_refused_by_name(tmp_path, options, named):
    config = peft.LoraConfig(target_modules=["fc"], r=2, **options)
    peft_trained(chain(dtype=torch.float32), config, inputs(3, 6, dtype=torch.float32), tmp_path)
    message = import_refused(chain(), tmp_path, named)
    assert ("convert" if "init_lora_weights" in options else "merge_and_unload") in message


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (
            peft.AdaLoraConfig(target_modules=["fc"], total_step=10, init_r=2, target_r=1),
            "'ADALORA'",
        ),
        (peft.IA3Config(target_modules=["fc"], feedforward_modules=[]), "'IA3'"),
        (peft.LoHaConfig(target_modules=["fc"], r=2), "'LOHA'"),
    ],
    ids=["AdaLoRA", "IA3", "LoHa"],
)
def test_real_adapters_of_other_methods_are_refused_by_name(tmp_path, config, named):
    peft_trained(chain(), config, inputs(3, 6), tmp_path)
    import_refused(chain(), tmp_path, f"peft_type {named}, expected 'LORA'", "merge_and_unload()")


# PEFT warns of the tied embedding, asks transformers by an old name, and looks for the files of a
# model without any.
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:Could not find a config file in  - will assume:UserWarning")
@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"target_modules": ["wte"]}, "transformer.wte.lora_embedding_A'"),
        (
            {"target_modules": ["c_attn"], "trainable_token_indices": {"wte": [1]}},
            "trainable_token_indices={'wte': [1]}",
        ),
    ],
    ids=["embedding", "tokens"],
)
def test_real_adapters_of_embeddings_are_refused_by_name(tmp_path, options, named):
    config = peft.LoraConfig(r=2, fan_in_fan_out=True, **options)
    peft_trained(gpt2(), config, TOKENS, tmp_path)
    import_refused(gpt2(), tmp_path, named, "expected", "linear layers")


# As above; and PEFT saves the weight of a head beside its adapter, and says so.
@pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word_embeddings=True` and")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:Could not find a config file in  - will assume:UserWarning")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")
def test_a_head_that_peft_saved_beside_its_adapter_is_refused_with_the_way_out(tmp_path):
    theirs = peft_trained(
        gpt2(), peft.LoraConfig(target_modules=["lm_head"], r=2), TOKENS, tmp_path
    )
    assert len(tensors_of(tmp_path)) > 2
    import_refused(
        gpt2(), tmp_path, "lm_head", "expected lora_A and lora_B", "save_embedding_layers=False"
    )
    theirs.save_pretrained(tmp_path, save_embedding_layers=False)
    model = gpt2()
    assert list(import_peft(model, tmp_path)) == ["lm_head"]
    torch.testing.assert_close(model(TOKENS).logits, theirs(TOKENS).logits, rtol=1e-12, atol=1e-12)


def test_a_real_adapter_of_a_convolution_is_refused_by_name(tmp_path):
    plain = made(nn.Conv2d, 3, 4, 3)
    model = nn.ModuleDict({"convolution": plain})
    with torch.random.fork_rng():
        theirs = peft.get_peft_model(
            copy.deepcopy(model), peft.LoraConfig(target_modules=["convolution"], r=2)
        )
    theirs.save_pretrained(tmp_path)
    import_refused(
        model, tmp_path, "'convolution' has", "(2, 3, 3, 3)", "expected lora_A (r, d_in)"
    )


@pytest.fixture
def folder(tmp_path):
    """A plain adapter of fc and xfc, as PEFT saves it."""
    export_peft(trained(chain(), [({"fc": 2, "xfc": 1}, {"alpha": 4})]), tmp_path / "ours")
    in_peft(chain(), tmp_path / "ours").save_pretrained(tmp_path / "peft")
    return tmp_path / "peft"


def test_what_peft_saved_is_accepted(folder):
    assert list(import_peft(chain(), folder)) == ["fc", "xfc"]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("target_parameters", ["fc.weight"]),
        ("layer_replication", [[0, 1], [0, 2]]),
        ("alora_invocation_tokens", [1, 2]),
        ("use_qalora", True),
        ("loftq_config", {"loftq_bits": 4}),
        ("corda_config", {"corda_method": "kpm"}),
        ("lora_ga_config", {"direction": "ArB2r"}),
        ("use_bdlora", {"nblocks": 2}),
        ("arrow_config", {"top_k": 3}),
        ("megatron_config", {"hidden_size": 8}),
        ("an_option_of_the_year_2030", 0.5),
    ],
)
def test_options_that_may_change_the_function_are_refused_by_name(folder, option, value):
    rewrite(folder, **{option: value})
    import_refused(
        chain(), folder, "adapter_config.json", f"sets {option}={value!r}, expected plain LoRA"
    )


@pytest.mark.parametrize(
    "start", ["loftq", "corda", "lora_ga", "PiSSA", "a_start_of_the_year_2030"]
)
def test_starts_that_may_change_the_base_are_refused_by_name(folder, start):
    rewrite(folder, init_lora_weights=start)
    import_refused(
        chain(), folder, f"init_lora_weights={start!r}", "path_initial_model_for_weight_conversion"
    )


# ---- damaged files -----------------------------------------------------------------------------


def test_missing_files(folder):
    import_refused(
        chain(), folder / "nowhere", "nowhere", "save_pretrained", error=FileNotFoundError
    )
    tensors = folder / "adapter_model.safetensors"
    import_refused(chain(), tensors, "expected a folder", error=FileNotFoundError)
    tensors.unlink()
    import_refused(
        chain(),
        folder,
        "no adapter_model.safetensors",
        "copied completely?",
        error=FileNotFoundError,
    )
    (folder / "adapter_model.bin").touch()
    import_refused(chain(), folder, "pickled adapter_model.bin", "save it anew with PEFT")
    (folder / "adapter_config.json").unlink()
    import_refused(chain(), folder, "adapter_config.json", error=FileNotFoundError)


@pytest.mark.parametrize("keep", [0, 1, 30])
def test_files_that_were_cut_off(folder, keep):
    for name, part in [
        ("adapter_config.json", "is no JSON"),
        ("adapter_model.safetensors", "not a whole safetensors"),
    ]:
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[:keep])
        import_refused(chain(), folder, name, part, "damaged")
        (folder / name).write_bytes(whole[:-1])
        import_refused(chain(), folder, name, part)
        (folder / name).write_bytes(whole)
    import_peft(chain(), folder)


@pytest.mark.parametrize("text", [b"[]", b"{}", b"3", b'{"r": 8}', b"null"])
def test_json_that_is_no_configuration(folder, text):
    (folder / "adapter_config.json").write_bytes(text)
    import_refused(chain(), folder, "no configuration of PEFT", "peft_type")
    (folder / "adapter_config.json").write_bytes(b"\xff\xfe")
    import_refused(chain(), folder, "is no JSON")


def number(value):
    return {"alpha_pattern": {}, "lora_alpha": value}, (
        "'fc' has alpha",
        "expected a finite positive number",
    )


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        *(number(value) for value in ("8", True, 0, -1, math.nan, math.inf, [8])),
        ({"alpha_pattern": {"fc": None}}, ("'fc' has alpha None",)),
        ({"rank_pattern": {}, "r": 3}, ("'fc' has rank 2", "and 3", "expected the same")),
        ({"rank_pattern": {"^fc": 2}, "r": "1"}, ("'xfc' has rank 1", "'1'")),
        ({"rank_pattern": {"(": 2}}, ("'(' in rank_pattern is no regular expression",)),
        ({"alpha_pattern": {"*fc": 2}}, ("'*fc' in alpha_pattern is no regular expression",)),
        ({"rank_pattern": [2]}, ("rank_pattern=[2], expected an object",)),
        ({"alpha_pattern": 4}, ("alpha_pattern=4, expected an object",)),
        *(
            ({"lora_dropout": value}, (f"lora_dropout={value!r}", "below 1"))
            for value in ("0", 1.0, -0.1, True, [], math.nan)
        ),
    ],
    ids=str,
)
def test_numbers_that_make_no_layer(folder, changes, parts):
    rewrite(folder, **changes)
    import_refused(chain(), folder, *parts)


def with_tensors(folder, change):
    tensors = {
        key.removeprefix("base_model.model."): value for key, value in tensors_of(folder).items()
    }
    change(tensors)
    save_file(
        {f"base_model.model.{key}": value for key, value in tensors.items()},
        folder / "adapter_model.safetensors",
    )


NAN = torch.tensor([[math.nan] * 6] * 2, dtype=torch.float64)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda t: t.pop("fc.lora_B.weight"), ("'fc' has {'lora_A': (2, 6)}", "lora_B (d_out, r)")),
        (lambda t: t.pop("fc.lora_A.weight"), ("'fc' has {'lora_B': (6, 2)}", "lora_A (r, d_in)")),
        (lambda t: t.clear(), ("holds no tensors",)),
        (lambda t: t.update({"fc.lora_A.weight": NAN}), ("fc.lora_A is not finite",)),
        (
            lambda t: t.update({"fc.lora_B.weight": NAN.T.contiguous() * math.inf}),
            ("fc.lora_B is not finite",),
        ),
        (
            lambda t: t.update({"fc.lora_A.weight": torch.ones(2)}),
            ("'fc' has", "(2,)", "expected lora_A (r, d_in)"),
        ),
        (
            lambda t: t.update({"fc.lora_A.weight": torch.tensor(1.0)}),
            ("'fc' has", "()", "expected lora_A (r, d_in)"),
        ),
        (
            lambda t: t.update({"fc.lora_B.weight": torch.ones(6)}),
            ("'fc' has shapes", "(6,)", "expected lora_A"),
        ),
        (
            lambda t: t.update({"fc.lora_B.weight": torch.ones(6, 3).double()}),
            ("'fc' has shapes", "(6, 3)", "one rank"),
        ),
        (
            lambda t: t.update({"fc.lora_B.weight": torch.ones(6, 2)}),
            ("'fc' have types", "float64", "float32"),
        ),
        (
            lambda t: t.update({k: v.int() for k, v in t.items()}),
            ("'fc' have types", "int32", "floating-point"),
        ),
        (
            lambda t: t.update({"fc.lora_B.bias": torch.ones(6)}),
            ("holds", "fc.lora_B.bias'", "expected lora_A and lora_B"),
        ),
        (
            lambda t: t.update({"fc.lora_A.default.weight": NAN}),
            ("holds", "fc.lora_A.default.weight'"),
        ),
    ],
    ids=range(13),
)
def test_tensors_that_make_no_layer(folder, change, parts):
    with_tensors(folder, change)
    import_refused(chain(), folder, *parts)


def test_ranks_of_zero_and_above_the_layers_size(tmp_path):
    config = peft.LoraConfig(target_modules=["fc2"], r=5)  # 6 → 4: PEFT takes any rank
    peft_trained(chain(), config, inputs(3, 6), tmp_path)
    import_refused(chain(), tmp_path, "'fc2' has rank 5, expected at most min(d_in, d_out) = 4")
    rewrite(tmp_path, r=0)
    none = {"fc2.lora_A.weight": torch.ones(0, 6), "fc2.lora_B.weight": torch.ones(4, 0)}
    with_tensors(tmp_path, lambda t: (t.clear(), t.update(none)))
    import_refused(chain(), tmp_path, "'fc2' has rank 0", "positive")


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


# ---- another model -----------------------------------------------------------------------------


def test_names_that_the_model_lacks_come_with_close_ones(folder):
    model = chain(("enc.fc", "xfc"))
    import_refused(
        model, folder, "the model has no 'fc'", "a part of it?", "did you mean", "'enc.fc'"
    )


def test_modules_of_other_shapes(folder):
    with torch.random.fork_rng():
        model = nn.ModuleDict({"fc": nn.Linear(6, 7), "xfc": nn.Linear(6, 6)})
    import_refused(model, folder, "'fc'", "(6, 6), the model has (7, 6)")


def test_modules_that_have_an_adapter_or_are_not_linear(folder):
    model = chain()
    wrap(model, {"xfc": 1})
    import_refused(model, folder, "'xfc' already has an adapter", "unwrap()")
    import_refused(
        nn.ModuleDict({"fc": nn.Tanh(), "xfc": nn.Tanh()}),
        folder,
        "'fc' is of type Tanh, not a linear layer",
    )


def test_a_model_without_its_weights(folder):
    import_refused(chain().to("meta"), folder, "'fc' is on the meta device")
