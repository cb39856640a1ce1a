"""Models of transformers work as they are: three families through every method and every file."""

from __future__ import annotations

import copy
import re
import warnings
from functools import partial

import pytest
import torch
from helpers.models import (
    assert_unchanged,
    delta_by_hand,
    randomize,
    same_bits,
    snapshot,
    with_deltas_by_hand,
)
from safetensors.torch import load_file

from minirank import (
    L1RA,
    SensitivityLoRA,
    ShapLoRA,
    UniformRanks,
    curvature,
    disabled,
    export_peft,
    import_peft,
    linear_targets,
    load_adapter,
    lora_layers,
    merge,
    save_adapter,
    unmerge,
    unwrap,
    wrap,
)

pytest.importorskip("transformers")
from helpers.transformer_models import (
    FAMILIES,
    OTHER_FAMILIES,
    batches,
    logits,
    loss_fn,
    other_family,
    train,
)

pytestmark = [
    # transformers 5 renames what PEFT 0.21 asks every model for.
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),
    # torch 2.4's own checkpointing meets torch's deprecation.
    pytest.mark.filterwarnings("ignore:.*torch.cpu.amp.autocast.* is deprecated:FutureWarning"),
    # PEFT 0.15 looks on the hub for the configuration of any base model, even one without a name.
    pytest.mark.filterwarnings("ignore:Could not find a config file in  - will assume:UserWarning"),
]
every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
decoders = pytest.mark.parametrize(
    "family", [FAMILIES["gpt2"], FAMILIES["llama"]], ids=["gpt2", "llama"]
)


@pytest.fixture(autouse=True)
def _own_generator():
    """PEFT draws its adapters from the global one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def adapted(family, seed=0, trainable=(), **options):
    """A model with an adapter of different ranks as if trained, one module being left out."""
    model = family(seed)
    ranks = {name: i % 4 for i, name in enumerate(family.names)}
    layers = wrap(model, ranks, alpha=3, trainable=list(trainable), **options)
    randomize(layers)
    for layer in layers.values():
        layer.lora_B.data /= 4
    return model


def trainable_names(model):
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


# ---- every method ------------------------------------------------------------------------------


def words(batch):
    """How many words the loss is a mean over.

    A decoder's is one less for each sentence; but all batches have as many sentences.
    """
    return (batch["labels"] != -100).sum().item()


def uniform(family):
    return UniformRanks(family(), family.targets)


def sensitivity(family, measured=curvature.input_second_moment):
    model = family()
    return SensitivityLoRA(
        model, loss_fn, batches(model), targets=family.targets, curvature=measured, progress=False
    )


def fisher(family):
    return sensitivity(family, partial(curvature.empirical_fisher, batch_weight=words))


def gauss_newton(family):
    return sensitivity(
        family, partial(curvature.gauss_newton, output=family.head, batch_weight=words)
    )


def l1ra(family):
    model = family()
    wrap(model, dict.fromkeys(family.names, 2), gate=1.0)
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    moving = L1RA(model, optimizer, l1=0.5, gate_lr=0.5, interval=2)
    train(model, 4, optimizer, moving.step)
    assert [update.step for update in moving.history.updates] == [2, 4]
    assert any(update.given for update in moving.history.updates)  # a rank moved
    assert sum(layer.rank for layer in lora_layers(model).values()) == 2 * len(family.names)
    return moving


def shaplora(family):
    model = family()
    wrap(model, dict.fromkeys(family.names, 3), gate=0.0)
    train(model)
    return ShapLoRA(
        model, loss_fn, batches(model), coalitions=18, batch_weight=words, progress=False
    )


@every_family
@pytest.mark.parametrize("method", [uniform, sensitivity, fisher, gauss_newton, l1ra, shaplora])
def test_a_method_meets_its_budget_and_only_its_adapters_and_the_head_train(family, method):
    allocator, budget = method(family), 2 * len(family.names)
    before = snapshot(allocator.model)
    allocator.score()
    allocation = allocator.allocate(budget)
    assert_unchanged(allocator.model, before)
    assert allocation.total_rank == budget
    assert list(allocation.ranks) == family.names

    plain, model = family(), family()
    wrap(
        model,
        allocation,
        alpha=4,
        gate=0.0 if method is shaplora else None,
        trainable=[family.head],
    )
    layers = lora_layers(model)
    assert {n: x.rank for n, x in layers.items()} == {
        n: r for n, r in allocation.ranks.items() if r
    }
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model)
    moved = {name for name, p in model.named_parameters() if not same_bits(p, start[name])}
    adapters = {
        f"{n}.{key}"
        for n, layer in layers.items()
        for key, _ in layer.named_parameters(recurse=False)
    }
    head = {
        n
        for n, p in model.named_parameters()
        if any(p is q for q in model.get_submodule(family.head).parameters())
    }
    assert head  # of GPT-2 it is the embedding
    assert moved == adapters | head
    assert not torch.allclose(logits(model), logits(plain), atol=1e-3)


@every_family
@pytest.mark.parametrize("method", [sensitivity, gauss_newton])
def test_what_stands_in_the_padding_makes_no_difference_to_the_scores(family, method):
    allocator = method(family)
    scores = allocator.score()
    for batch in allocator.batches:
        batch["input_ids"] = batch["input_ids"].where(batch["attention_mask"] == 1, 20)
    for name, score in allocator.score().items():
        torch.testing.assert_close(score, scores[name], rtol=1e-4, atol=1e-5)


# ---- our file ----------------------------------------------------------------------------------


@every_family
@pytest.mark.parametrize("gate", [None, 0.5])
def test_a_saved_adapter_and_head_come_back_bit_for_bit_on_the_same_base_only(
    family, gate, tmp_path
):
    model = adapted(family, trainable=[family.head], gate=gate, dropout=0.1)
    train(model)
    save_adapter(model, tmp_path / "a.safetensors")
    again = family()
    load_adapter(again, tmp_path / "a.safetensors")
    assert same_bits(logits(again), logits(model))
    assert trainable_names(again) == trainable_names(model)
    assert not torch.allclose(logits(again), logits(family()), atol=1e-2)

    other = family(seed=1)
    before = snapshot(other)
    with pytest.raises(ValueError, match="not the base weights"):
        load_adapter(other, tmp_path / "a.safetensors")
    assert_unchanged(other, before)


@every_family
def test_a_trained_head_that_is_not_saved_is_warned_of(family, tmp_path):
    model = adapted(family, trainable=[family.head])
    with pytest.warns(UserWarning, match="will not be in the file"):
        save_adapter(model, tmp_path / "a.safetensors", modules=())


@every_family
def test_bfloat16_models_run_and_their_adapters_come_back(family, tmp_path):
    make = lambda: family().to(torch.bfloat16)  # noqa: E731
    for dtype in (None, torch.float32):
        model = make()
        layers = wrap(model, dict.fromkeys(family.names, 2), dtype=dtype)
        train(model)
        assert {p.dtype for x in layers.values() for p in x.parameters(recurse=False)} == {
            dtype or torch.bfloat16
        }
        save_adapter(model, tmp_path / "a.safetensors")
        again = make()
        load_adapter(again, tmp_path / "a.safetensors")
        assert logits(model).dtype == torch.bfloat16
        assert same_bits(logits(again), logits(model))
        assert not torch.equal(logits(model), logits(make()))


# ---- PEFT --------------------------------------------------------------------------------------


def assert_same_function(one, two):
    """Logits within a millionth of the largest, in float32."""
    y = logits(two)
    assert (logits(one) - y).abs().max() <= 1e-6 * y.abs().max()


@every_family
@pytest.mark.parametrize("gate", [None, 0.5])
def test_the_real_peft_computes_what_was_exported_and_what_it_saves_comes_back(
    family, gate, tmp_path
):
    peft = pytest.importorskip("peft")
    model = adapted(family, gate=gate)
    export_peft(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(family(), tmp_path / "ours").eval()
    assert_same_function(theirs, model)

    theirs.save_pretrained(tmp_path / "theirs")
    ours, saved = (
        load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("ours", "theirs")
    )
    assert ours.keys() == saved.keys()
    assert all(same_bits(ours[key], saved[key]) for key in ours)
    for folder in ("ours", "theirs"):
        again = family()
        import_peft(again, tmp_path / folder)
        assert_same_function(again, model)


LEAVES = {
    "bert": ["query", "value", "intermediate.dense"],
    "gpt2": ["c_attn", "c_proj"],  # the attention's and the feed-forward's
    "llama": ["q_proj", "k_proj", "down_proj"],
}


@every_family
@pytest.mark.parametrize("rslora", [False, True])
def test_what_the_real_peft_trained_is_imported(family, rslora, tmp_path):
    peft = pytest.importorskip("peft")
    kind = next(key for key, value in FAMILIES.items() if value is family)
    leaves = LEAVES[kind]
    config = peft.LoraConfig(
        target_modules=leaves,
        r=3,
        lora_alpha=5,
        use_rslora=rslora,
        rank_pattern={leaves[0]: 2},
        lora_dropout=0.1,
        fan_in_fan_out=kind == "gpt2",
        task_type=None if kind == "bert" else "CAUSAL_LM",
    )
    theirs = peft.get_peft_model(family(), config)
    train(theirs)
    theirs.save_pretrained(tmp_path)
    model = family()
    layers = import_peft(model, tmp_path)
    expected = [
        name for name in family.names if name.endswith(tuple(f".{leaf}" for leaf in leaves))
    ]
    assert sorted(layers) == sorted(expected)
    assert {x.rank for n, x in layers.items() if n.endswith(leaves[0])} == {2}
    assert_same_function(model, theirs)
    assert not torch.allclose(logits(model), logits(family()), atol=1e-3)


@every_family
def test_the_real_peft_takes_the_ranks_of_an_allocation(family):
    peft = pytest.importorskip("peft")
    allocator, budget = sensitivity(family), len(family.names)
    allocator.score()
    allocation = allocator.allocate(budget, max_rank={family.names[0]: 0, family.names[3]: 0})
    assert len(set(allocation.ranks.values())) > 2
    config = peft.LoraConfig(
        r=7,  # of none of them
        target_modules=allocation.target_modules,
        rank_pattern=allocation.rank_pattern,
        alpha_pattern=allocation.alpha_pattern(1.5),
        fan_in_fan_out=family is FAMILIES["gpt2"],
    )
    theirs = peft.get_peft_model(family(), config).base_model.model
    found = {n: m for n, m in theirs.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    assert {n: m.r["default"] for n, m in found.items()} == {
        n: r for n, r in allocation.ranks.items() if r
    }
    assert {m.scaling["default"] for m in found.values()} == {1.5}


# ---- merging, taking out -----------------------------------------------------------------------


@every_family
def test_merging_and_taking_out_leave_what_they_should(family):
    plain, model = family(), adapted(family)
    original = {key: value.clone() for key, value in plain.state_dict().items()}
    unmerged, by_hand = logits(model), logits(with_deltas_by_hand(plain, lora_layers(model)))
    torch.testing.assert_close(unmerged, by_hand, rtol=1e-5, atol=1e-5)
    with disabled(model):
        assert same_bits(logits(model), logits(plain))

    assert merge(model) == list(lora_layers(model))
    torch.testing.assert_close(logits(model), by_hand, rtol=1e-5, atol=1e-5)
    unmerge(model)
    assert same_bits(logits(model), unmerged)

    merged = copy.deepcopy(model)
    merge(merged)
    deltas = {name: delta_by_hand(layer) for name, layer in lora_layers(model).items()}
    unwrap(merged)
    assert merged.state_dict().keys() == original.keys()
    for key, value in merged.state_dict().items():
        delta = deltas.get(key.removesuffix(".weight"))
        if delta is None:
            assert same_bits(value, original[key]), key
        else:
            delta = delta.T if family is FAMILIES["gpt2"] else delta
            torch.testing.assert_close(value, (original[key] + delta).float(), rtol=1e-6, atol=1e-6)

    unwrap(model)
    assert model.state_dict().keys() == original.keys()
    assert all(same_bits(value, original[key]) for key, value in model.state_dict().items())
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [  # of `trainable=()`
        f"{name}.{key}"
        for name in lora_layers(adapted(family))
        for key, _ in plain.get_submodule(name).named_parameters()
    ]


@decoders
def test_merging_a_tied_head_is_refused_and_an_untied_one_is_merged(family):
    for tied in (True, False):
        model = family(tie_word_embeddings=tied)
        randomize(wrap(model, {"lm_head": 2}, alpha=1))
        before = logits(model)
        if tied:
            state = snapshot(model)
            with pytest.raises(
                ValueError, match=r"'lm_head' is tied to .*(wte|embed_tokens)\.weight.*untie=True"
            ):
                merge(model)
            assert_unchanged(model, state)
            merge(model, untie=True)
            assert model.get_input_embeddings().weight is not model.lm_head.base.weight
        else:
            merge(model)
        torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)
        unmerge(model)
        assert (model.get_input_embeddings().weight is model.lm_head.base.weight) == tied


@decoders
def test_a_merged_model_is_saved_and_loaded_by_transformers_itself(family, tmp_path):
    model = family(tie_word_embeddings=True)
    randomize(wrap(model, {family.names[0]: 2, "lm_head": 2}, alpha=1))
    merge(model, untie=True)
    unwrap(model)
    model.config.tie_word_embeddings = False
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert again.lm_head.weight is not again.get_input_embeddings().weight
    assert same_bits(logits(again), logits(model))


@decoders
def test_generation_goes_through_the_adapters_merged_or_not(family):
    prompt = {key: batches(family(), 1)[0][key][:2, :3] for key in ("input_ids", "attention_mask")}

    def generate(model):
        return model.generate(**prompt, do_sample=False, max_new_tokens=3, pad_token_id=0)

    model = adapted(family)
    tokens = generate(model)
    assert tokens.shape == (2, 6)
    for i in range(3):  # by hand, without the cache of keys and values
        with torch.no_grad():
            assert torch.equal(model(tokens[:, : 3 + i]).logits[:, -1].argmax(-1), tokens[:, 3 + i])
    assert not torch.equal(tokens, generate(family()))
    merge(model)
    assert torch.equal(generate(model), tokens)
    unwrap(model)
    assert torch.equal(generate(model), tokens)


@every_family
def test_gradient_checkpointing_gives_the_same_gradients(family):
    gradients = []
    for use_reentrant in (None, False, True):
        model = adapted(family, dropout=0.1).train()
        if use_reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        if use_reentrant:  # which needs an input that requires a gradient, as PEFT's models do
            model.enable_input_require_grads()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)  # for dropout
            loss_fn(model, batches(model)[0]).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for others in gradients[1:]:
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(others[name], gradient, rtol=1e-6, atol=1e-7)
            assert gradient.any(), name


@every_family
def test_the_kernel_of_attention_makes_no_difference(family):
    found, outputs = [], []
    for kernel in ("eager", "sdpa"):
        model = family(attn_implementation=kernel)
        # The second derivative of attention: fused kernels have none.
        signs = {"samples": 1, "generator": torch.Generator().manual_seed(0)}
        h = curvature.hutchinson_outputs(model, loss_fn, batches(model, 1), family.targets, **signs)
        found.append(torch.cat([diagonal.flatten() for diagonal in h.values()]))
        layers = wrap(model, dict.fromkeys(family.names, 2))
        randomize(layers)
        outputs.append(logits(model))
    assert (found[0] - found[1]).abs().max() <= 1e-4 * found[0].abs().max()
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)


# ---- names and shapes --------------------------------------------------------------------------


@every_family
def test_globs_select_the_blocks(family):
    assert list(linear_targets(family(), family.targets)) == family.names


def test_default_targets_leave_a_tied_head_out_so_that_the_model_can_be_saved(tmp_path):
    model = FAMILIES["gpt2"]()
    targets = linear_targets(model)
    assert "lm_head" not in targets
    assert list(linear_targets(model, "lm_head")) == ["lm_head"]
    wrap(model, dict.fromkeys(targets, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path)  # as Trainer's checkpoints do
        wrap(model, {"lm_head": 1})
        model.save_pretrained(tmp_path)  # a named tied head is saved as a copy


def test_globs_select_kinds_of_modules():
    llama, gpt2, bert = (FAMILIES[kind]() for kind in ("llama", "gpt2", "bert"))
    attention = [f"model.layers.{i}.self_attn.{n}_proj" for i in (0, 1) for n in "qkvo"]
    assert list(linear_targets(llama, "model.layers.*.self_attn.*")) == attention
    assert list(linear_targets(llama, ["*.q_proj", "*.v_proj"])) == [
        n for n in attention if n[-6] in "qv"
    ]
    assert list(linear_targets(llama))[-1] == "lm_head"
    assert list(linear_targets(gpt2, "*.attn.*")) == [
        f"transformer.h.{i}.attn.{n}" for i in (0, 1) for n in ("c_attn", "c_proj")
    ]
    assert list(linear_targets(bert, "*.layer.1.attention.self.*")) == [
        f"bert.encoder.layer.1.attention.self.{n}" for n in ("query", "key", "value")
    ]
    with pytest.raises(ValueError, match=re.escape("for those inside it: 'model.layers.*'")):
        linear_targets(llama, "model.layers")


def test_rows_and_columns_are_told_apart():
    shapes = {  # (d_out, d_in), of modules that are not square
        "bert": {"bert.encoder.layer.0.intermediate.dense": (24, 16)},
        "gpt2": {"transformer.h.0.attn.c_attn": (48, 16), "transformer.h.0.mlp.c_proj": (16, 64)},
        "llama": {
            "model.layers.0.self_attn.k_proj": (8, 16),
            "model.layers.0.mlp.down_proj": (16, 24),
        },
    }
    for kind, expected in shapes.items():
        allocator = UniformRanks(FAMILIES[kind](), list(expected))
        allocator.score()
        allocation = allocator.allocate(len(expected))
        assert allocation.costs == {name: sum(shape) for name, shape in expected.items()}
        layers = wrap(allocator.model, allocation)
        assert {name: (len(x.lora_B), x.lora_A.shape[1]) for name, x in layers.items()} == expected


# ---- other families ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", OTHER_FAMILIES)
def test_another_family_is_scored_trained_saved_and_read_by_the_real_peft(kind, tmp_path):
    peft = pytest.importorskip("peft")
    plain, model = other_family(kind), other_family(kind)
    allocator = SensitivityLoRA(
        model, loss_fn, batches(model), targets=OTHER_FAMILIES[kind][0], progress=False
    )
    allocator.score()
    allocation = allocator.allocate(2 * len(allocator.targets))
    layers = wrap(model, allocation)
    assert same_bits(logits(model), logits(plain))
    train(model, 1, torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=0.1))
    assert all(layer.lora_B.any() for layer in layers.values())
    save_adapter(model, tmp_path / "a.safetensors", allocation=allocation)
    again = other_family(kind)
    load_adapter(again, tmp_path / "a.safetensors")
    assert same_bits(logits(again), logits(model))
    export_peft(model, tmp_path / "peft")
    theirs = peft.PeftModel.from_pretrained(other_family(kind), tmp_path / "peft").eval()
    assert_same_function(theirs, model)
    assert not torch.allclose(logits(model), logits(plain), atol=1e-3)
    unwrap(model)
    assert all(same_bits(p, plain.state_dict()[key]) for key, p in model.state_dict().items())


def test_a_model_that_lays_its_sentences_end_to_end_has_the_curvature_that_the_refusal_names():
    kind = "OPT, rows of all sentences in one"
    model, targets = other_family(kind), OTHER_FAMILIES[kind][0]
    with pytest.raises(
        ValueError, match=r"seen: \[4, 28\]\): use gauss_newton\(…, independent=False\)"
    ):
        curvature.empirical_fisher(model, loss_fn, batches(model, 1), targets)
    found = curvature.gauss_newton(
        model, loss_fn, batches(model, 1), targets, output="lm_head", independent=False
    )
    assert all(diagonal.min() >= 0 and diagonal.any() for diagonal in found.values())
