"""wrap.py: what wrap changes and leaves alone, refused calls, and the way out."""

from __future__ import annotations

import copy
import warnings
from types import SimpleNamespace

import pytest
import torch
from helpers.models import (
    RANKS,
    TOKENS,
    ZOO_LINEAR,
    assert_unchanged,
    randomize,
    snapshot,
    with_deltas_by_hand,
    wrapped,
    zoo,
)
from torch import nn

from minirank import (
    LoRALinear,
    UniformRanks,
    disabled,
    lora_layers,
    merge,
    unmerge,
    unwrap,
    wrap,
)

# ---- the way in ---------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", [None, 1.0, 0.0])
def test_the_wrapped_model_computes_the_same_function_bit_for_bit(gate):
    plain, model = zoo(), zoo()
    state = torch.get_rng_state()
    layers = wrap(model, RANKS, gate=gate)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model(TOKENS), plain(TOKENS))
    assert {name: layer.rank for name, layer in layers.items()} == RANKS
    assert layers == lora_layers(model)
    assert list(layers) == [name for name in ZOO_LINEAR if name in RANKS]


@pytest.mark.parametrize("gate", [None, 1.0, 0.0])
def test_a_trained_model_is_the_plain_one_with_w_plus_delta_w(gate):
    plain, model, layers = wrapped(gate=gate, alpha=3.0)
    expected = with_deltas_by_hand(plain, layers)(TOKENS)
    assert not torch.allclose(expected, plain(TOKENS))
    torch.testing.assert_close(model(TOKENS), expected, rtol=1e-12, atol=1e-12)


def test_only_the_named_slots_change_and_the_bases_are_the_original_modules():
    model = zoo()
    before = dict(model.named_modules(remove_duplicate=False))
    layers = wrap(model, {"alias": 2, "like": 0, "head": 1})
    for name, module in before.items():
        if name in ("blocks.0.0", "alias"):
            assert model.get_submodule(name) is layers["blocks.0.0"]
            assert layers["blocks.0.0"].base is module
        elif name == "head":
            assert model.head.base is module
        else:
            assert model.get_submodule(name) is module
    assert model.head.base.weight is model.emb.weight


def test_with_none_only_the_wrapped_weights_are_frozen():
    model = zoo()
    model.body["up"].bias.requires_grad_(False)
    model.like.weight.requires_grad_(False)
    before = {name: p.requires_grad for name, p in zoo().named_parameters()} | {
        "like.weight": False
    }
    wrap(model, {"body.up": 1, "head": 1}, trainable=None)
    frozen = {"body.up.weight", "body.up.bias", "emb.weight", "head.weight"}
    for name, parameter in model.named_parameters():
        plain_name = name.replace(".base.", ".")
        assert parameter.requires_grad == (
            ".lora_" in name or (plain_name not in frozen and before[plain_name])
        ), name
    unwrap(model)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (before[name] and name != "body.up.bias"), name


@pytest.mark.parametrize(
    ("trainable", "expected"),
    [
        ((), set()),
        ("body.norm", {"body.norm.weight", "body.norm.bias"}),
        (["*norm", "like"], {"body.norm.weight", "body.norm.bias", "like.weight"}),
        ("blocks.1.0", {"blocks.1.0.weight", "blocks.1.0.bias"}),
        (
            "body.*",
            {"body.norm.weight", "body.norm.bias", "body.conv.weight", "body.conv.bias"},
        ),  # body.up is adapted
    ],
)
def test_trainable_names_what_trains_beside_the_adapters(trainable, expected):
    model = zoo()
    model.register_parameter(
        "table", nn.Parameter(torch.ones(2, dtype=torch.int8), requires_grad=False)
    )
    wrap(model, {"body.up": 1, "head": 1}, trainable=trainable)
    trained = {
        name for name, p in model.named_parameters() if p.requires_grad and ".lora_" not in name
    }
    assert trained == expected
    assert all(p.requires_grad for name, p in model.named_parameters() if ".lora_" in name)
    wrap(
        model, {"body.conv": 1}, trainable="*"
    )  # earlier adapters keep training, adapted weights stay frozen
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (
            ".base." not in name and name not in ("emb.weight", "table")
        ), name


def names_that_train(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def adapter_names(*modules):
    return {f"{module}.{part}" for module in modules for part in ("lora_A", "lora_B")}


def test_only_the_adapters_train_unless_more_is_named():
    model = zoo()
    wrap(model, {"body.up": 1, "head": 1, "like": 0})
    assert names_that_train(model) == adapter_names("body.up", "head")


def test_every_call_says_what_trains_beside_all_adapters():
    model = zoo()
    wrap(model, {"body.up": 1, "body.conv": 1}, trainable="body.norm")
    norm = {"body.norm.weight", "body.norm.bias"}
    assert names_that_train(model) == norm | adapter_names("body.up", "body.conv")
    model.body["up"].lora_A.requires_grad_(False)  # by hand
    wrap(model, {"blocks.1.0": 1}, trainable=["like", "body.norm"])
    expected = {"like.weight"} | norm | adapter_names("body.up", "body.conv", "blocks.1.0")
    assert names_that_train(model) == expected
    model.body["up"].lora_A.requires_grad_(False)
    wrap(model, {"head": 1}, trainable=None)
    expected |= adapter_names("head")
    assert names_that_train(model) == expected - {"body.up.lora_A"}
    wrap(model, {"like": 1}, trainable="body.norm")  # like trained as a plain layer until now
    assert names_that_train(model) == expected - {"like.weight"} | adapter_names("like")


def test_a_later_call_warns_of_what_it_freezes():
    model = zoo()
    wrap(model, {"body.up": 1}, trainable=["body.norm", "like"])
    with pytest.warns(UserWarning, match=r"freezes 'body\.norm', which required") as caught:
        wrap(model, {"head": 1}, trainable="like")
    assert caught[0].filename == __file__
    assert names_that_train(model) == {"like.weight"} | adapter_names("body.up", "head")


def test_a_model_around_an_adapted_one_is_frozen_too():
    inner = nn.ModuleDict({"q": nn.Linear(4, 4), "norm": nn.LayerNorm(4)})
    wrap(inner, {"q": 1}, trainable="norm")
    model = nn.ModuleDict({"encoder": inner, "pooler": nn.Linear(4, 4), "head": nn.Linear(4, 2)})
    with pytest.warns(UserWarning, match=r"freezes 'pooler', which required"):
        wrap(model, {"head": 1}, trainable="encoder.norm")
    assert names_that_train(model) == (
        {"encoder.norm.weight", "encoder.norm.bias"} | adapter_names("encoder.q", "head")
    )


def test_a_warning_that_is_an_error_leaves_the_model_unchanged():
    model = zoo()
    wrap(model, {"body.up": 1}, trainable="body.norm")
    before = snapshot(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match=r"freezes 'body\.norm'"):
            wrap(model, {"like": 1})
    assert_unchanged(model, before)
    assert list(lora_layers(model)) == ["body.up"]


def test_a_module_tied_to_an_adapted_layer_is_refused_in_a_later_call_too():
    for ranks_of_calls in ([{"head": 1, "like": 1}], [{"head": 1}, {"like": 1}]):
        model = zoo()  # head.weight is emb.weight
        for ranks in ranks_of_calls[:-1]:
            wrap(model, ranks)
        with pytest.raises(ValueError, match="trainable='emb' names only layers that get"):
            wrap(model, ranks_of_calls[-1], trainable=["emb"])


def inference_model():
    with torch.inference_mode():
        return nn.ModuleDict({"q": nn.Linear(4, 4), "head": nn.Linear(4, 2)})


def test_parameters_of_inference_mode_cannot_be_named():
    model = inference_model()
    for _ in ("requires a gradient", "frozen"):
        before = snapshot(model)
        with pytest.raises(ValueError, match=r"'head' names parameters .*inference_mode\(\)"):
            wrap(model, {"q": 1}, trainable=["head"])
        assert_unchanged(model, before)
        model.requires_grad_(False)
    model = inference_model()
    layers = wrap(model, {"q": 1})
    assert names_that_train(model) == adapter_names("q")
    layers["q"](torch.ones(1, 4)).sum().backward()
    unwrap(model)
    assert names_that_train(model) == {"q.weight", "q.bias"}


@pytest.mark.parametrize("trainable", [[1], 1, True, nn.Linear(2, 2), ["head", None]])
def test_trainable_that_is_no_name_is_told_so(trainable):
    model = zoo()
    before = snapshot(model)
    with pytest.raises(TypeError, match="trainable must be names or globs of modules, got "):
        wrap(model, {"body.up": 1}, trainable=trainable)
    assert_unchanged(model, before)


def test_freezing_does_not_need_the_values_of_lazy_parameters():
    model = nn.ModuleDict({"q": nn.Linear(3, 3), "lazy": nn.LazyLinear(2)})
    wrap(model, {"q": 1})
    assert names_that_train(model) == adapter_names("q")
    model["lazy"](torch.ones(1, 4))
    assert names_that_train(model) == adapter_names("q")
    model = nn.ModuleDict({"q": nn.Linear(3, 3), "lazy": nn.LazyLinear(2)})
    for parameter in model.parameters():
        parameter.requires_grad = False
    wrap(model, {"q": 1}, trainable="lazy")
    assert names_that_train(model) == adapter_names("q") | {"lazy.weight", "lazy.bias"}


def test_scaling_is_given_whole_and_is_the_same_in_every_layer():
    layers = wrapped(scaling=0.1, gate=1.0)[2]
    assert {layer.scaling for layer in layers.values()} == {0.1}  # no 0.1 * 3.2 / 3.2
    # The gated start of A depends on the reference rank, which is the average as without scaling.
    assert {layer.reference_rank for layer in layers.values()} == {16 / 5}
    alphas = [layer.alpha for layer in layers.values()]
    assert alphas == pytest.approx([0.1 * 16 / 5] * 5, rel=1e-15)
    x = wrap(zoo(), RANKS, scaling=2.0, gate=1.0)["head"].lora_A
    assert torch.equal(x, wrap(zoo(), RANKS, alpha=6.4, gate=1.0)["head"].lora_A)


def test_options_reach_every_layer_and_the_reference_rank_is_the_average():
    for layer in wrapped(alpha=8, gate=0.5, dropout=0.25, dtype=torch.float32)[2].values():
        assert layer.scaling == 8 / (16 / 5)
        assert layer.lora_A.dtype == torch.float32
        assert (layer.gate is not None, layer.dropout, layer.initial_gate) == (True, 0.25, 0.5)
    layers = wrapped(ranks={"body.up": 4, "alias": 2, "blocks.0.0": 2, "like": 0}, alpha=6)[
        2
    ]  # three modules
    assert [layer.scaling for layer in layers.values()] == [3, 3]
    layers = wrapped(alpha=6, reference_rank=4, rank_stabilized=True)[2]
    assert {layer.scaling for layer in layers.values()} == {3}
    assert {layer.scaling for layer in wrapped()[2].values()} == {1}


def test_anything_with_ranks_serves_as_an_allocation():
    model = zoo()
    layers = wrap(model, SimpleNamespace(ranks={"head": 2, "like": 0}, keep=None))
    assert {name: layer.rank for name, layer in layers.items()} == {"head": 2}


def test_a_seed_reproduces_every_layer_and_layers_differ():
    def draws(generator, ranks=RANKS):
        return {
            name: layer.lora_A for name, layer in wrap(zoo(), ranks, generator=generator).items()
        }

    reverse = dict(reversed(RANKS.items()))  # the order of the request does not matter
    first = draws(3)
    for same in (draws(torch.Generator().manual_seed(3)), draws(3, reverse)):
        assert list(same) == list(first)
        assert all(torch.equal(same[name], first[name]) for name in first)
    assert not torch.equal(draws(4)["head"], first["head"])
    first, second = wrap(zoo(), {"blocks.0.0": 2, "blocks.1.0": 2}).values()
    assert not torch.equal(first.lora_A, second.lora_A)


class Container(nn.Module):
    """Linear-like itself, with a linear layer inside."""

    def __init__(self):
        super().__init__()
        self.inner, self.in_features, self.out_features = nn.Linear(6, 6), 6, 6

    weight = property(lambda self: self.inner.weight)


BAD = {
    "unknown name": ({"nothing": 1}, {}, "matches no linear layer"),
    "one bad name among good ones": (
        {"body.up": 1, "head": 1, "hea": 1},
        {},
        "did you mean 'head'",
    ),
    "a suffix only": ({"up": 1}, {}, r"did you mean 'body\.up'"),
    "a glob": ({"body.*": 1}, {}, r"'body\.\*' is a glob.*exact names.*'body\.up'"),
    "not linear": ({"body.up": 1, "body.norm": 1}, {}, "LayerNorm"),
    "rank too high": ({"body.up": 1, "head": 7}, {}, r"from 0 to min\(11, 6\), got 7"),
    "negative rank": ({"body.up": 1, "head": -1}, {}, "got -1"),
    "rank is a float": ({"body.up": 1, "head": 1.0}, {}, r"got 1\.0"),
    "rank is a bool": ({"body.up": True}, {}, "got True"),
    "every rank is 0": ({"body.up": 0}, {}, "every rank is 0"),
    "no ranks": ({}, {}, "non-empty"),
    "no mapping": (["body.up"], {}, "non-empty"),
    "two ranks for one module": ({"alias": 1, "blocks.0.0": 2}, {}, "are one module"),
    "meta device": ({"body.up": 1, "meta": 1}, {}, "meta device"),
    "already adapted": ({"body.up": 1, "done": 1}, {}, r"by resize\(\)"),
    "one inside another": ({"body.up": 1, "box.inner": 1, "box": 1}, {}, r"contains 'box\.inner'"),
    "one inside another, adapted before": (
        {"body.up": 1, "full": 1},
        {},
        r"contains 'full\.inner'",
    ),
    "bad alpha": ({"body.up": 1}, {"alpha": -1.0}, "alpha"),
    "bad scaling": ({"body.up": 1}, {"scaling": 0.0}, "scaling must be a finite positive number"),
    "scaling and alpha": ({"body.up": 1}, {"scaling": 2.0, "alpha": 1}, "either scaling, or alpha"),
    "bad gate": ({"body.up": 1}, {"gate": 2.0}, "gate"),
    "bad dropout": ({"body.up": 1}, {"dropout": 1.0}, "dropout"),
    "bad dtype": ({"body.up": 1}, {"dtype": torch.int32}, "dtype"),
    "trainable matches nothing": (
        {"body.up": 1},
        {"trainable": ["like", "lik"]},
        "did you mean 'like'",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_refused_wrap_changes_nothing(case):
    ranks, options, message = BAD[case]
    model = zoo()
    model.meta, model.done, model.box = (
        nn.Linear(6, 6, device="meta"),
        LoRALinear(nn.Linear(6, 6), 1),
        Container(),
    )
    model.full = Container()
    wrap(model, {"full.inner": 1}, trainable=None)
    model.like.weight.requires_grad_(False)
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        wrap(model, ranks, **options)
    assert_unchanged(model, before)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_halfway_changes_nothing(error, monkeypatch):
    calls, initial_ranks = [], LoRALinear.initial_ranks

    def fail_at_the_third(self, *args):
        calls.append(self)
        if len(calls) == 3:
            raise error
        return initial_ranks(self, *args)

    monkeypatch.setattr(LoRALinear, "initial_ranks", fail_at_the_third)
    model = zoo()
    before = snapshot(model)
    with pytest.raises(error):
        wrap(model, RANKS)
    assert_unchanged(model, before)


def test_a_model_that_is_the_layer_itself_is_refused():
    with pytest.raises(TypeError, match=r"nn\.Sequential\(model\)"):
        wrap(nn.Linear(3, 3), {"": 1})
    with pytest.raises(TypeError, match=r"take its \.base"):
        unwrap(LoRALinear(nn.Linear(3, 3), 1))


@pytest.mark.parametrize(
    "mode", ["train", "eval", "no_grad"]
)  # eval without gradients takes PyTorch's fast path
@pytest.mark.parametrize("merged", [False, True])
def test_transformer_layers_that_read_weights_see_the_adapter(mode, merged):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.TransformerEncoderLayer(
            8, 2, 12, dropout=0.0, batch_first=True, dtype=torch.float64
        )
    model.train(mode == "train")
    plain, x = copy.deepcopy(model), torch.randn(2, 3, 8, dtype=torch.float64)
    layers = wrap(model, {"self_attn.out_proj": 2, "linear1": 3, "linear2": 3}, gate=1.0)
    with torch.set_grad_enabled(mode != "no_grad"):
        torch.testing.assert_close(model(x), plain(x), rtol=1e-12, atol=1e-12)
        randomize(layers)
        if merged:
            merge(model)
        expected = with_deltas_by_hand(plain, layers)
        torch.testing.assert_close(model(x), expected(x), rtol=1e-11, atol=1e-11)
        assert not torch.allclose(model(x), plain(x))
    if mode == "train" and not merged:
        model(x).square().sum().backward()
        assert all(
            p.grad.ne(0).any() for layer in layers.values() for p in layer.parameters(recurse=False)
        )


def test_trainable_that_names_only_adapted_layers_is_refused():
    model = nn.ModuleDict({"q": nn.Linear(4, 4), "head": nn.Linear(4, 2), "norm": nn.LayerNorm(4)})
    before = snapshot(model)
    with pytest.raises(ValueError, match="trainable='head' names only layers that get an adapter"):
        wrap(model, {"q": 1, "head": 1}, trainable=["head"])
    assert_unchanged(model, before)
    wrap(model, {"q": 1, "head": 0}, trainable=["head", "norm"])
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        *("q.lora_A", "q.lora_B"),
        *("head.weight", "head.bias"),
        *("norm.weight", "norm.bias"),
    }


def test_an_allocator_in_the_place_of_its_allocation_is_told_what_to_pass():
    model = zoo()
    with pytest.raises(ValueError, match=r"an allocator: pass its allocate\(budget\)"):
        wrap(model, UniformRanks(model))
    with pytest.raises(ValueError, match=r"got \{\}$"):
        wrap(model, {})


# ---- the way out --------------------------------------------------------------------------------


def test_unwrap_restores_modules_bits_and_flags():
    model = zoo()
    model.like.weight.requires_grad_(False)
    before, keys = snapshot(model), list(model.state_dict())
    randomize(wrap(model, RANKS, gate=1.0, trainable=None))
    merge(model, untie=True)
    unmerge(model)
    assert unwrap(model) == [name for name in ZOO_LINEAR if name in RANKS]
    assert_unchanged(model, before)
    assert list(model.state_dict()) == keys
    assert unwrap(model) == []


@pytest.mark.parametrize("calls", [1, 2])
def test_unwrap_makes_a_weight_trainable_again_that_two_layers_share(calls):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    model[2].requires_grad_(False)
    before = snapshot(model)
    for ranks in [{"0": 1, "1": 1, "2": 1}] if calls == 1 else [{"0": 1}, {"1": 1, "2": 1}]:
        wrap(model, ranks, trainable=None)
    model[2].requires_grad_(True)
    unwrap(model)
    assert_unchanged(model, before)


def test_unwrapping_a_merged_model_leaves_a_plain_one_with_the_sum():
    plain, model, layers = wrapped(trainable=None)
    expected = with_deltas_by_hand(plain, layers)
    merge(model, untie=True)
    unwrap(model)
    assert not lora_layers(model)
    assert [name for name, _ in model.named_modules()] == [
        name for name, _ in plain.named_modules()
    ]
    torch.testing.assert_close(model.state_dict(), expected.state_dict(), rtol=1e-13, atol=1e-13)
    assert all(p.requires_grad for p in model.parameters())


def test_disabled_is_the_base_model_inside_the_block_only():
    plain, model, layers = wrapped()
    y = model(TOKENS)
    layers["like"].enabled = False
    partly = model(TOKENS)
    with disabled(model):
        assert torch.equal(model(TOKENS), plain(TOKENS))
    with pytest.raises(ZeroDivisionError), disabled(model):
        raise ZeroDivisionError
    assert torch.equal(model(TOKENS), partly)
    layers["like"].enabled = True
    assert torch.equal(model(TOKENS), y)
    merge(model, untie=True)
    with pytest.raises(ValueError, match=r"unmerge\(\)"), disabled(model):
        pass
    assert torch.equal(model(TOKENS), model(TOKENS))
    assert all(layer.enabled for layer in layers.values())
