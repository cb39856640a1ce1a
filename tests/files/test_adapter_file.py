"""An adapter file gives back what was saved, bit for bit, and nothing that was not."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from helpers.models import (
    TOKENS,
    assert_unchanged,
    inputs,
    randomize,
    same_bits,
    snapshot,
    wrapped,
    zoo,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from minirank import (
    L1RA,
    LoRALinear,
    ShapLoRA,
    UniformRanks,
    load_adapter,
    lora_layers,
    merge,
    read_adapter,
    resize,
    save_adapter,
    unwrap,
    wrap,
)
from minirank.files.safetensors_file import read_safetensors, safetensors_bytes
from minirank.tensor_bytes import checksum

ATTRIBUTES = ("alpha", "reference_rank", "scaling", "initial_gate", "dropout", "enabled", "rank")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "adapter.safetensors"


def assert_same_layers(layers, others):
    assert list(layers) == list(others)
    for name, layer in layers.items():
        ours, theirs = (
            dict(layer.named_parameters(recurse=False)),
            dict(others[name].named_parameters(recurse=False)),
        )
        assert ours.keys() == theirs.keys()
        assert all(same_bits(ours[key], theirs[key]) for key in ours)
        assert [getattr(layer, key) for key in ATTRIBUTES] == [
            getattr(others[name], key) for key in ATTRIBUTES
        ]


# ---- the way there and back --------------------------------------------------------------------


@pytest.mark.parametrize("gate", [None, 1.0, 0.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_loaded_adapter_is_the_saved_one_bit_for_bit(path, dtype, gate):
    options = {
        "gate": gate,
        "alpha": 3.0,
        "dropout": 0.25,
        "rank_stabilized": True,
        "generator": 7,
    }
    _, model, layers = wrapped(dtype, **options)
    y = model(TOKENS)
    save_adapter(model, path)
    assert torch.equal(model(TOKENS), y)
    fresh = zoo(dtype)
    loaded = load_adapter(fresh, path, trainable=[])
    assert loaded == lora_layers(fresh)
    assert_same_layers(layers, loaded)
    assert torch.equal(fresh(TOKENS), y)
    assert all(
        p.requires_grad for layer in loaded.values() for p in layer.parameters(recurse=False)
    )
    again = path.with_name("again")
    save_adapter(fresh, again)
    assert again.read_bytes() == path.read_bytes()


def test_layers_may_differ_in_everything(path):
    model = zoo(torch.bfloat16)
    wrap(model, {"body.up": 2}, alpha=3, gate=1.0, dtype=torch.float32)
    wrap(model, {"body.conv": 3, "head": 2}, alpha=5, reference_rank=4, dropout=0.5)
    wrap(model, {"blocks.0.0": 2, "blocks.1.0": 1}, gate=0.0)
    layers = lora_layers(model)
    randomize(layers)
    resize(model, {"head": 0, "blocks.1.0": 5})
    layers["body.conv"].scaling = -0.3  # turned down by hand
    layers["body.up"].enabled = False
    save_adapter(model, path)
    loaded = load_adapter(zoo(torch.bfloat16), path)
    assert_same_layers(layers, loaded)
    assert loaded["head"].rank == 0
    assert read_adapter(path).ranks == {name: layer.rank for name, layer in layers.items()}


def test_an_adapter_without_ranks_can_be_loaded_and_grow(path):
    model = zoo()
    wrap(model, {"like": 2})
    resize(model, {"like": 0})
    save_adapter(model, path)
    fresh = zoo()
    assert load_adapter(fresh, path)["like"].rank == 0
    assert torch.equal(fresh(TOKENS), zoo()(TOKENS))
    resize(fresh, {"like": 3})
    assert lora_layers(fresh)["like"].rank == 3


@pytest.mark.parametrize("gate", [None, 1.0, 0.0])
def test_training_and_resizing_go_on_as_if_nothing_had_happened(path, gate):
    _, model, _ = wrapped(gate=gate, alpha=3.0)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=0.01)

    def step(model, optimizer):
        optimizer.zero_grad()
        model(TOKENS).square().mean().backward()
        optimizer.step()

    step(model, optimizer)
    save_adapter(model, path)
    fresh = zoo()
    load_adapter(fresh, path, trainable=[])
    other = torch.optim.Adam([p for p in fresh.parameters() if p.requires_grad], lr=0.01)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one, its in ((model, optimizer), (fresh, other)):
        step(one, its)
        resize(one, {"body.up": 5, "head": 1}, its, generator=3)
        step(one, its)
    assert_same_layers(lora_layers(model), lora_layers(fresh))


def test_l1ra_goes_on_from_the_file_in_the_middle_of_its_course(path):
    def course(model):
        optimizer = torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad], lr=0.02, weight_decay=0.3
        )
        return optimizer, L1RA(model, optimizer, l1=2.0, interval=4, generator=5)

    def steps(model, optimizer, l1ra, count):
        for _ in range(count):
            optimizer.zero_grad()
            (model(TOKENS).square().mean() + model.head(inputs(2, 6)).square().mean()).backward()
            optimizer.step()
            l1ra.step()

    model = zoo()
    layers = wrap(model, {"body.up": 3, "like": 3, "blocks.1.0": 3}, gate=1.0, generator=5)
    layers["like"].gate.data[1] = 0.01  # which will fall at once; its rank goes to another layer
    optimizer, l1ra = course(model)
    steps(model, optimizer, l1ra, 9)
    assert set(l1ra.ranks.values()) != {3}
    save_adapter(model, path)
    state = copy.deepcopy((optimizer.state_dict(), l1ra.state_dict()))
    steps(model, optimizer, l1ra, 11)

    fresh = zoo()
    load_adapter(fresh, path, trainable=[])
    optimizer, again = course(fresh)
    optimizer.load_state_dict(state[0])
    again.load_state_dict(state[1])
    steps(fresh, optimizer, again, 11)
    assert_same_layers(lora_layers(model), lora_layers(fresh))
    assert again.history.state_dict() == l1ra.history.state_dict()


def test_shaplora_scores_the_same_from_the_file(path):
    _, model, _ = wrapped(gate=0.0)
    save_adapter(model, path)
    fresh = zoo()
    load_adapter(fresh, path)

    def scores(model):
        return ShapLoRA(
            model,
            lambda m, b: m(b).square().mean(),
            [TOKENS],
            coalitions=18,
            generator=1,
            progress=False,
        ).score()

    ours, theirs = scores(model), scores(fresh)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_names_may_be_other_names_of_the_same_modules(path):
    """The file has the first name. In a model put together in another order, it is the second."""

    def model(order):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            linear = nn.Linear(4, 4)
        return nn.ModuleDict(dict.fromkeys(order, linear))

    one = model("ab")
    wrap(one, {"a": 2})
    save_adapter(one, path)
    other = model("ba")
    assert list(load_adapter(other, path)) == ["b"]
    assert other["a"] is other["b"]


def test_layers_come_in_the_order_of_the_model(path):
    def model(order):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            linears = {name: nn.Linear(4, 4) for name in "abc"}
        return nn.ModuleDict({name: linears[name] for name in order})

    one = model("abc")
    wrap(one, {"a": 1, "b": 2, "c": 3})
    save_adapter(one, path)
    loaded = load_adapter(model("cab"), path)
    assert {name: layer.rank for name, layer in loaded.items()} == {"c": 3, "a": 1, "b": 2}
    assert "".join(loaded) == "cab"


def test_loading_in_inference_mode_gives_layers_that_can_train(path):
    _, model, _ = wrapped()
    save_adapter(model, path)
    fresh = zoo()
    with torch.inference_mode():
        load_adapter(fresh, path, trainable=[])
    fresh(TOKENS).sum().backward()
    assert all(p.grad is not None for p in fresh.parameters() if p.requires_grad)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_saved_on_a_gpu_loads_on_the_cpu_and_back(path):
    _, model, layers = wrapped(torch.float32)
    save_adapter(model.cuda(), path)
    assert_same_layers(
        load_adapter(zoo(torch.float32), path),
        {n: copy.deepcopy(x).cpu() for n, x in layers.items()},
    )
    assert all(
        layer.lora_A.is_cuda for layer in load_adapter(zoo(torch.float32).cuda(), path).values()
    )


# ---- where the ranks came from ------------------------------------------------------------------


def test_the_file_says_where_its_ranks_came_from(path):
    model = zoo()
    uniform = UniformRanks(model)
    uniform.score()
    allocation = uniform.allocate(9)
    wrap(model, allocation)
    save_adapter(model, path, allocation=allocation)
    read = read_adapter(path)
    assert (read.method, read.budget, read.unit) == ("uniform", 9, "ranks")
    assert str(read).splitlines()[0] == "uniform: 9 ranks (budget 9 ranks)"
    table = dataclasses.replace(allocation, coverage=None)  # which the file does not know
    assert str(table).splitlines()[1:] == str(read).splitlines()[1:]
    assert allocation.ranks["blocks.0.0"] > 0
    aliased = {("alias" if n == "blocks.0.0" else n): rank for n, rank in allocation.ranks.items()}
    save_adapter(model, path, allocation=dataclasses.replace(allocation, ranks=aliased))
    resize(model, {"like": 4})
    with pytest.raises(ValueError, match=r"not those of the allocation.*dataclasses.replace"):
        save_adapter(model, path, allocation=allocation)
    ranks = {name: layer.rank for name, layer in lora_layers(model).items()}
    save_adapter(model, path, allocation=dataclasses.replace(allocation, ranks=ranks))
    assert read_adapter(path).ranks["like"] == 4


# ---- a file of minirank 0.1 --------------------------------------------------------------------

GOLDEN = Path(__file__).parent / "data" / "adapter_0_1.safetensors"  # written by minirank 0.1.0


def golden_base():
    """The plain model whose adapters, and trained norm, are in the golden file."""
    model = nn.Sequential(
        OrderedDict(
            first=nn.Linear(3, 2), second=nn.Linear(2, 2, bias=False), norm=nn.BatchNorm1d(2, eps=0)
        )
    )
    with torch.no_grad():
        model.first.weight.copy_(torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, 0.0]]))
        model.first.bias.copy_(torch.tensor([0.0, 1.0]))
        model.second.weight.copy_(torch.tensor([[1.0, -1.0], [0.0, 2.0]]))
    return model.double().eval()


def test_a_file_of_0_1_loads_to_the_numbers_worked_out_by_hand():
    model = golden_base()
    layers = load_adapter(model, GOLDEN)
    x = torch.tensor([[1.0, 2.0, 3.0]]).double()
    # first: W x + b = (7, 3). A x = (3, 3), times gates (1.5, 3), B: (1.5, 6), scaling 3 / 2.
    h = model.first(x)
    assert h.tolist() == [[7 + 2.25, 3 + 9.0]]
    # second: W h = (-2.75, 24). A h = 21.25, B: (0, 21.25), scaling 4 / sqrt(4).
    assert model.second(h).tolist() == [[-2.75, 24 + 42.5]]
    # norm: (y - (1, 2.5)) / sqrt(1, 4) · (2, 1) + (0.25, -1).
    assert model(x).tolist() == [[-7.25, 31.0]]
    assert [(layer.rank, layer.alpha, layer.scaling) for layer in layers.values()] == [
        (2, 3.0, 1.5),
        (1, 4.0, 2.0),
    ]
    assert [(layer.initial_gate, layer.dropout) for layer in layers.values()] == [
        (1.0, 0.0),
        (None, 0.25),
    ]
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        *(f"first.{key}" for key in ("lora_A", "lora_B", "gate")),
        *("second.lora_A", "second.lora_B"),
        *("norm.weight", "norm.bias"),
    }
    other = golden_base()
    other.first.bias.data[0] = 1
    refuse(GOLDEN, "'first': not the base weights", other)


def test_a_file_of_0_1_is_read_in_the_words_of_today():
    read = read_adapter(GOLDEN)
    assert read.ranks == {"first": 2, "second": 1}
    assert (read.method, read.budget, read.unit) == ("uniform", 3, "ranks")
    assert read.other_tensors["norm.num_batches_tracked"].item() == 7
    assert str(read).startswith("uniform: 3 ranks (budget 3 ranks)\n")


# ---- what is refused: when saving --------------------------------------------------------------


def without_layers():
    return zoo()


def a_bare_layer():
    return LoRALinear(nn.Linear(3, 3), 1)


def merged():
    _, model, _ = wrapped()
    merge(model, untie=True)
    return model


def not_finite():
    _, model, layers = wrapped()
    layers["like"].lora_B.data[2, 1] = float("nan")
    return model


def on_meta():
    return wrapped()[1].to("meta")


REFUSED = {
    "no LoRA layer to save": without_layers,
    "itself is a LoRALinear": a_bare_layer,
    r"'.*', '.*', '.*' and 2 more cannot be saved while merged.*unmerge\(\) first": merged,
    "like.lora_B is not finite": not_finite,
    "meta device": on_meta,
}


@pytest.mark.filterwarnings("ignore:.*require a gradient:UserWarning")
@pytest.mark.parametrize("message", REFUSED)
def test_a_refused_save_leaves_the_old_file_and_the_model(path, message):
    path.write_bytes(b"old")
    model = REFUSED[message]()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        save_adapter(model, path)
    assert path.read_bytes() == b"old"
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert_unchanged(model, before)


def test_modules_that_do_not_exist_are_refused_with_a_hint(path):
    _, model, _ = wrapped()
    with pytest.raises(ValueError, match="modules='haed' matches no module: did you mean 'head'"):
        save_adapter(model, path, modules=["haed"])
    assert not path.exists()


# ---- what is refused: when loading -------------------------------------------------------------


@pytest.fixture
def saved(path):
    _, model, _ = wrapped(gate=1.0)
    save_adapter(model, path, modules="body.norm")
    return path


def refuse(path, message, model=None, **options):
    """Loading raises this, and changes nothing."""
    model = zoo() if model is None else model
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        load_adapter(model, path, **options)
    assert_unchanged(model, before)


def craft(path, change):
    """A file with a right checksum, whose tensors and record `change` has altered."""
    tensors, metadata = read_safetensors(path)
    record = json.loads(metadata["minirank"])
    change(tensors, record)
    text = json.dumps(record)
    path.write_bytes(
        safetensors_bytes(tensors, {"minirank": text, "checksum": checksum(tensors, text)})
    )


def set_entry(name, index, value):
    def change(tensors, _):
        tensors[name][index] = value

    return change


def set_field(name, key, value):
    return lambda _, record: record["layers"][name].update({key: value})


CRAFTED = {
    "format 3, while this version reads up to 2: update": lambda _, record: record.update(format=3),
    "body.up.lora_A is not finite": set_entry("body.up.lora_A", (0, 0), float("nan")),
    "like.gate is not finite": set_entry("like.gate", 0, float("inf")),
    "'like' has the tensors \\['gate', 'lora_A'\\]": lambda tensors, _: tensors.pop("like.lora_B"),
    "'like' has the tensors \\['lora_A', 'lora_B'\\]": lambda tensors, _: tensors.pop("like.gate"),
    "'more.lora_A' belong to no layer": lambda tensors, _: tensors.update(
        {"more.lora_A": torch.ones(1, 1)}
    ),
    "'like.gate', 'like.lora_A', 'like.lora_B' belong": lambda _, record: record["layers"].pop(
        "like"
    ),
    "expected one rank": lambda tensors, _: tensors.update({"like.gate": torch.ones(5).double()}),
    "expected lora_A \\(r, d_in\\)": lambda tensors, _: tensors.update(
        {"like.gate": torch.ones(6, 1).double()}
    ),
    "expected one floating-point type": lambda tensors, _: tensors.update(
        {"like.gate": torch.ones(6)}
    ),
    "torch.int64.*expected one floating-point type": lambda tensors, _: tensors.update(
        {f"like.{key}": tensors[f"like.{key}"].long() for key in ("lora_A", "lora_B", "gate")}
    ),
    "has rank 7, expected at most .* = 6": lambda tensors, _: tensors.update(
        {
            "like.lora_A": torch.ones(7, 6),
            "like.lora_B": torch.ones(6, 7),
            "like.gate": torch.ones(7),
        }
    ),
    "'like' has rank 6 and shape \\(6, 6\\), announced": set_field("like", "rank", 5),
    "KeyError: 'scaling'": lambda _, record: record["layers"]["like"].pop("scaling"),
    "scaling of 'like' is nan": set_field("like", "scaling", float("nan")),
    "TypeError": set_field("like", "scaling", "1"),
    "KeyError: 'others'": lambda _, record: record.pop("others"),
    "KeyError: 'body.norm.weight'": lambda tensors, _: tensors.pop("body.norm.weight"),
}


@pytest.mark.parametrize("message", CRAFTED)
def test_a_file_that_contradicts_itself_is_refused(saved, message):
    craft(saved, CRAFTED[message])
    refuse(saved, message)


def test_whole_numbers_do_not_become_weights(saved):
    craft(
        saved,
        lambda tensors, _: tensors.update({"body.norm.weight": torch.ones(8, dtype=torch.long)}),
    )
    refuse(saved, "the file holds 'body.norm.weight', torch.int64 .*; the model has torch.float64")


def test_an_unaltered_crafted_file_loads(saved):
    craft(saved, lambda *_: None)
    load_adapter(zoo(), saved)


@pytest.mark.parametrize("field", ["alpha", "reference_rank", "dropout", "gate"])
def test_a_number_out_of_range_is_refused_by_name(saved, field):
    craft(saved, set_field("like", field, -1.0))
    refuse(saved, rf"'like'.*{field}|{field}.*-1.0")


FOREIGN = {
    "empty": b"",
    "text": b"hello, this is a text that is no adapter\n" * 9,
    "zip": b"PK\x03\x04" + bytes(999),
    "huge header": (2**62).to_bytes(8, "little") + bytes(99),
    "no header": bytes(100),
}


@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN.keys())
def test_a_file_of_another_kind_is_refused(path, content):
    path.write_bytes(content)
    refuse(
        path, "is not a whole safetensors file .*: it was cut off or damaged, or is something else"
    )


def test_a_safetensors_file_of_another_program_is_refused(path):
    path.write_bytes(safetensors_bytes({"like.lora_A": torch.ones(2, 6)}, {"format": "pt"}))
    refuse(path, "was not written by save_adapter .*import_peft")


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_a_file_cut_off_anywhere_is_refused(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("cut") / "file"
    save_adapter(wrapped(gate=1.0)[1], path)
    content = path.read_bytes()
    path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    refuse(path, "not a whole safetensors file")


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_a_flipped_bit_anywhere_is_refused_or_changes_nothing(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("flip") / "file"
    _, model, layers = wrapped(gate=1.0)
    save_adapter(model, path)
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    fresh = zoo()
    before = snapshot(fresh)
    try:
        loaded = load_adapter(fresh, path)
    except ValueError:
        assert_unchanged(fresh, before)
    else:  # in the spaces that fill the header up, say
        assert_same_layers(layers, loaded)


def other_shape():
    model = zoo()
    model.like = nn.Linear(7, 6).double()
    return model


def lacking():
    model = zoo()
    del model.body["up"]
    return model


def renamed():
    model = zoo()
    model.bodies = model.body
    del model.body
    return model


def adapted():
    return wrapped(ranks={"like": 2})[1]


def other_norm():
    model = zoo()
    model.body["norm"] = nn.LayerNorm(7).double()
    return model


MODELS = {
    "'like': the file's adapter is for .* = \\(6, 6\\), the model has \\(6, 7\\)": other_shape,
    "the model has no 'body.up', which the file has an adapter for: is it the whole model": lacking,
    "the model has no 'body.up', 'body.conv'.*did you mean 'bodies.up'": renamed,
    "'like' already has an adapter": adapted,
    "the file holds 'body.norm.weight', .*\\(8,\\); the model has .*shape \\(7,\\)": other_norm,
    "'.*' is on the meta device: load its weights": lambda: zoo().to("meta"),
}


@pytest.mark.parametrize("message", MODELS)
def test_a_model_that_does_not_fit_is_refused_and_unchanged(saved, message):
    refuse(saved, message, MODELS[message]())


def test_a_part_of_the_model_is_refused_with_a_hint(saved):
    refuse(
        saved,
        "the model has no .*is it the whole model that was saved, or a part of it",
        zoo().body,
    )


def test_two_adapters_for_what_is_now_one_module_are_refused(path):
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    wrap(model, {"a": 2, "b": 2})
    save_adapter(model, path)
    one = nn.Linear(4, 4)
    refuse(
        path,
        "'a', 'b' are one module of the model, which the file has several adapters for",
        nn.ModuleDict({"a": one, "b": one}),
        other_base=True,
    )


def test_a_wrong_name_in_trainable_is_refused(saved):
    refuse(saved, "trainable='haed' matches no module", trainable=["haed"])


def test_another_base_model_is_refused_unless_it_is_meant(saved):
    refuse(saved, r"'.*' and 2 more: not the base weights .*other_base=True", zoo(seed=1))
    other = zoo(seed=1)
    layers = load_adapter(other, saved, other_base=True, trainable=[])
    assert_same_layers(layers, wrapped(gate=1.0)[2])
    changed = zoo()
    with torch.no_grad():
        changed.body["conv"].bias[0].nextafter_(torch.tensor(9.0).double())
    refuse(saved, "'body.conv': not the base weights", changed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_base_in_another_type_is_the_same_base(saved, dtype):
    layers = load_adapter(zoo(dtype), saved)
    assert all(layer.lora_A.dtype == torch.float64 for layer in layers.values())
    refuse(saved, "not the base weights", zoo(dtype, seed=1))


def test_what_unwrap_gives_back_can_be_loaded_again(saved):
    model = zoo()
    before = snapshot(model)
    for _ in range(2):
        load_adapter(model, saved, trainable=None)
        unwrap(model)
    assert_unchanged(model, before)
