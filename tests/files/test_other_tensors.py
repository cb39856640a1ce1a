"""What trained beside the adapters comes along in the file, and trains again when it is loaded."""

from __future__ import annotations

import copy
import inspect
import json

import pytest
import torch
from helpers.models import (
    TOKENS,
    assert_unchanged,
    inputs,
    randomize,
    same_bits,
    snapshot,
    zoo,
)
from torch import nn

from minirank import load_adapter, lora_layers, read_adapter, save_adapter, wrap
from minirank.files.safetensors_file import read_safetensors, safetensors_bytes
from minirank.tensor_bytes import checksum


@pytest.fixture
def path(tmp_path):
    return tmp_path / "adapter.safetensors"


class Classifier(nn.Module):
    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 4))
        self.head = nn.ModuleDict({"out": nn.Linear(4, 3), "norm": nn.BatchNorm1d(3)})
        self.head.register_buffer("scratch", torch.zeros(2), persistent=False)
        self.to(dtype)

    def forward(self, x):
        return self.head["norm"](self.head["out"](self.body(x)))


def classifier(dtype=torch.float64, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Classifier(dtype)


@pytest.mark.parametrize("modules", ["head", ["head"], ["head.*"], ["h*", "body"]])
def test_other_trained_modules_come_along_with_their_buffers(path, modules):
    model = classifier()
    wrap(model, {"body.0": 2}, trainable=["head"])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    model(inputs(5, 4)).square().sum().backward()
    optimizer.step()
    model.eval()
    save_adapter(model, path, modules=modules)
    if "body" not in modules:
        model.body[1].load_state_dict(
            classifier().body[1].state_dict()
        )  # its running mean was not asked for
    fresh = classifier().eval()
    fresh.head["out"].reset_parameters()
    load_adapter(fresh, path)
    assert torch.equal(fresh(inputs(5, 4)), model(inputs(5, 4)))
    expected = {
        "head.out.weight",
        "head.out.bias",
        *(f"head.norm.{key}" for key in nn.BatchNorm1d(3).state_dict()),
    }
    assert set(read_adapter(path).other_tensors) >= expected
    assert not [
        name for name in read_adapter(path).other_tensors if "scratch" in name or "lora" in name
    ]


def test_other_modules_take_the_type_of_the_model_that_they_come_into(path):
    model = classifier()
    wrap(model, {"body.0": 2}, trainable=["head"])
    save_adapter(model, path, modules="head")
    fresh = classifier(torch.float32, seed=0)
    weight = fresh.head["out"].weight
    load_adapter(fresh, path)
    assert fresh.head["out"].weight is weight
    assert torch.equal(weight, model.head["out"].weight.float())


def test_a_tied_parameter_is_saved_once_and_not_missed(path):
    model = zoo()
    wrap(model, {"like": 2}, trainable=["emb"])
    save_adapter(model, path, modules=["head"])  # the same parameter
    assert list(read_adapter(path).other_tensors) == ["head.weight"]
    assert "beside the adapters: 1 tensor with 66 entries (head.weight)" in repr(read_adapter(path))
    save_adapter(model, path, modules=["head", "emb"])
    assert list(read_adapter(path).other_tensors) == ["head.weight"]


def test_what_trains_and_is_not_saved_is_warned_of(path):
    model = classifier()
    wrap(model, {"body.0": 2}, trainable=["head"])
    with pytest.warns(
        UserWarning,
        match=r"'head.out.weight', 'head.out.bias', 'head.norm.weight' and 1 more require",
    ):
        save_adapter(model, path, modules=())
    with pytest.warns(UserWarning, match=r"'head.norm.weight', 'head.norm.bias' require") as caught:
        save_adapter(model, path, modules="head.out")
    assert caught[0].filename == __file__
    lora_layers(model)["body.0"].base.bias.requires_grad_(True)
    with pytest.warns(UserWarning, match=r"'body.0.base.bias' require"):
        save_adapter(model, path, modules="head")


# ---- by default: what trains -------------------------------------------------------------------


def trains(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def trained(make, *, freeze=(), **options):
    """A model whose adapter and whatever else requires a gradient took a step."""
    model = make()
    wrap(model, {"body.0": 2}, **options)
    for name in freeze:
        model.get_parameter(name).requires_grad_(False)
    randomize(lora_layers(model))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    model(inputs(5, 4)).square().sum().backward()
    optimizer.step()
    return model.eval()


def assert_comes_back(model, path, make):
    """The same function, and the same parameters train."""
    again = make().eval()
    load_adapter(again, path)
    assert torch.equal(again(inputs(5, 4)), model(inputs(5, 4)))
    assert trains(again) == trains(model)
    return again


HEAD = {"head.out.weight", "head.out.bias", "head.norm.weight", "head.norm.bias"}
BUFFERS = {f"head.norm.{key}" for key in ("running_mean", "running_var", "num_batches_tracked")}


def frozen_norm():
    """A classifier whose body's BatchNorm keeps its buffers, as it is in evaluation mode."""
    model = classifier()
    model.body[1] = nn.Identity()
    return model


def test_a_head_that_trains_is_saved_with_its_buffers_and_trains_again(path):
    model = trained(frozen_norm, trainable=["head"])
    save_adapter(model, path)
    read = read_adapter(path)
    assert read.other_tensors.keys() == HEAD | BUFFERS
    assert set(read.trainable) == HEAD
    assert_comes_back(model, path, frozen_norm)


def test_of_a_module_that_trains_in_part_only_the_trained_parameters_are_saved(path):
    model = trained(frozen_norm, trainable=["head.out"], freeze=["head.out.weight"])
    model.head["norm"].reset_running_stats()
    save_adapter(model, path)
    assert list(read_adapter(path).other_tensors) == ["head.out.bias"]
    assert_comes_back(model, path, frozen_norm)


def test_a_model_that_was_wrapped_without_freezing_is_saved_but_for_the_adapted_layers(path):
    model = trained(classifier, trainable=None)
    save_adapter(model, path)
    rest = {f"body.1.{key}" for key in nn.BatchNorm1d(6).state_dict()}
    rest |= {"body.3.weight", "body.3.bias"}
    read = read_adapter(path)
    assert read.other_tensors.keys() == HEAD | BUFFERS | rest
    assert trains(model) > HEAD | {"body.3.weight", "body.0.lora_A"}
    assert_comes_back(model, path, classifier)
    shown = str(read).splitlines()
    assert shown[-2] == (
        "beside the adapters: 14 tensors with 81 entries (body.1.weight, body.1.bias, "
        "body.1.running_mean, body.1.running_var, body.1.num_batches_tracked, body.3.weight "
        "and 8 more)"
    )
    assert shown[-1].startswith("trains beside them: 8 parameters (body.1.weight, body.1.bias, ")
    assert shown[-1].endswith(" and 2 more)")


def test_adapters_alone_are_all_that_the_file_holds_and_that_trains(path):
    model = trained(lambda: frozen_norm().eval())  # else the head's buffers move without training
    save_adapter(model, path)
    read = read_adapter(path)
    assert (dict(read.other_tensors), read.trainable) == ({}, ())
    assert "beside" not in str(read)
    again = assert_comes_back(model, path, frozen_norm)
    assert trains(again) == {"body.0.lora_A", "body.0.lora_B"}


class WeightInBuffer(nn.Module):
    """A linear layer without parameters, so that its adapter is all that could train in it."""

    in_features = out_features = 4

    def __init__(self):
        super().__init__()
        self.register_buffer("weight", torch.eye(4))


def test_buffers_beside_adapters_do_not_count_as_trained(path):
    model = nn.Sequential(WeightInBuffer(), nn.BatchNorm1d(4, affine=False))
    wrap(model, {"0": 2})
    save_adapter(model, path)
    assert not read_adapter(path).other_tensors


def test_what_trains_is_remembered_even_where_it_is_not_in_the_file(path):
    model = trained(frozen_norm, trainable=["head"])
    with pytest.warns(UserWarning, match="require a gradient"):
        save_adapter(model, path, modules=())
    again = frozen_norm()
    load_adapter(again, path)
    assert trains(again) == trains(model)
    assert same_bits(again.head["out"].weight, frozen_norm().head["out"].weight)


def test_a_module_that_is_named_and_does_not_train_is_saved_and_does_not_train(path):
    model = trained(frozen_norm, trainable=["head.out"])
    save_adapter(model, path, modules=["head"])
    assert read_adapter(path).other_tensors.keys() == HEAD | BUFFERS
    assert_comes_back(model, path, frozen_norm)


def test_tied_parameters_train_again_under_every_name(path):
    model = zoo()
    wrap(model, {"like": 2}, trainable=["head"])  # head.weight is emb.weight
    with torch.no_grad():
        model.head.weight += 1
    save_adapter(model, path)
    assert list(read_adapter(path).other_tensors) == ["emb.weight"]
    assert read_adapter(path).trainable == ("emb.weight",)
    again = zoo()
    load_adapter(again, path)
    assert torch.equal(again(TOKENS), model(TOKENS))
    assert trains(again) == trains(model) == {"emb.weight", "like.lora_A", "like.lora_B"}


def test_the_caller_may_say_what_trains(path):
    model = trained(frozen_norm, trainable=["head"])
    save_adapter(model, path)
    adapters = {"body.0.lora_A", "body.0.lora_B"}
    everything = {name for name, _ in frozen_norm().named_parameters()}
    for trainable, expected in [
        ((), adapters),
        (["head.out"], adapters | {"head.out.weight", "head.out.bias"}),
        ("body.3", adapters | {"body.3.weight", "body.3.bias"}),
        (None, adapters | (everything - {"body.0.weight", "body.0.bias"})),
    ]:
        again = frozen_norm().eval()
        load_adapter(again, path, trainable=trainable)
        assert trains(again) == expected
        assert torch.equal(again(inputs(5, 4)), model(inputs(5, 4)))


def test_adapters_train_after_loading_even_if_they_were_frozen(path):
    model = trained(frozen_norm)
    lora_layers(model)["body.0"].lora_A.requires_grad_(False)
    save_adapter(model, path)
    again = frozen_norm()
    load_adapter(again, path)
    assert trains(again) == {"body.0.lora_A", "body.0.lora_B"}


def test_a_second_file_says_anew_what_trains(path):
    model = trained(frozen_norm, trainable=["head"])
    save_adapter(model, path)
    other = frozen_norm()
    wrap(other, {"body.3": 1})
    save_adapter(other, path.with_name("other"))
    again = frozen_norm()
    load_adapter(again, path)
    with pytest.warns(UserWarning, match=r"freezes 'head\.out', 'head\.norm', which") as caught:
        load_adapter(again, path.with_name("other"))
    assert caught[0].filename == __file__
    adapters = {f"body.{i}.lora_{matrix}" for i in (0, 3) for matrix in "AB"}
    assert trains(again) == adapters
    again = frozen_norm()
    load_adapter(again, path.with_name("other"))
    load_adapter(again, path)
    assert trains(again) == adapters | HEAD
    again = frozen_norm()
    load_adapter(again, path)
    load_adapter(again, path.with_name("other"), trainable=["head"])
    assert trains(again) == adapters | HEAD


def test_a_parameter_that_trained_and_is_not_in_the_model_is_refused(path):
    with pytest.warns(UserWarning, match="require a gradient"):
        save_adapter(trained(frozen_norm, trainable=["head"]), path, modules=())
    model = frozen_norm()
    del model.head["norm"]
    before = snapshot(model)
    with pytest.raises(
        ValueError,
        match=r"'head\.norm\.weight', 'head\.norm\.bias' trained, which the model",
    ):
        load_adapter(model, path)
    assert_unchanged(model, before)
    load_adapter(model, path, trainable=["head.out"])


def test_the_signature_says_what_the_default_is():
    assert "= AS_SAVED" in str(inspect.signature(load_adapter))


# ---- into another model -------------------------------------------------------------------------


class Body(nn.Module):
    """A linear layer, and a head of the buffers that are given."""

    def __init__(self, **buffers):
        super().__init__()
        self.linear, self.head = nn.Linear(4, 4), nn.Module()
        nn.init.ones_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        for name, value in buffers.items():
            self.head.register_buffer(name, value)


def saved_body(path, **buffers):
    model = Body(**buffers)
    wrap(model, {"linear": 2})
    save_adapter(model, path, modules="head")


MISFITS = {
    "has one without values": (torch.ones(3), torch.ones(3, device="meta")),
    "has one without values (lazy": (torch.ones(3), nn.UninitializedBuffer()),
    "torch.int64 of shape (1,); the model has torch.int8": (
        torch.tensor([300]),
        torch.zeros(1, dtype=torch.int8),
    ),
    "torch.int64 of shape (); the model has torch.bool": (torch.tensor(3), torch.tensor(True)),
    "the model has torch.complex64": (torch.tensor(3), torch.tensor(1j)),
    "'head.y' overflows torch.float16": (torch.tensor([1e6]), torch.zeros(1).half()),
    "single memory location": (torch.ones(3), torch.zeros(1).expand(3)),
}


@pytest.mark.parametrize("message", MISFITS)
def test_a_value_that_the_model_cannot_hold_is_refused_and_nothing_changes(path, message):
    value, place = MISFITS[message]
    saved_body(path, x=torch.ones(2), y=value)
    model = Body(x=torch.zeros(2), y=place)
    linear, flags = model.linear, [p.requires_grad for p in model.parameters()]
    with pytest.raises((ValueError, RuntimeError)) as caught:
        load_adapter(model, path)
    assert message in str(caught.value)
    assert model.linear is linear
    assert [p.requires_grad for p in model.parameters()] == flags
    assert torch.equal(model.head.x, torch.zeros(2))


def test_values_that_are_not_finite_come_as_they_are(path):
    saved_body(path, x=torch.tensor([float("nan"), float("inf"), 1.0]))
    model = Body(x=torch.zeros(3).half())
    load_adapter(model, path)
    assert torch.equal(model.head.x.nan_to_num(7.0, 8.0), torch.tensor([7.0, 8.0, 1.0]).half())


def test_two_values_for_what_is_now_one_tensor_are_refused(path):
    saved_body(path, x=torch.ones(2), y=torch.zeros(2))
    same = torch.zeros(2)
    with pytest.raises(ValueError, match=r"'head\.x' and 'head\.y' are one tensor of the model"):
        load_adapter(Body(x=same, y=same), path)
    saved_body(path, x=torch.ones(2), y=torch.ones(2))
    load_adapter(Body(x=same, y=same), path)
    assert torch.equal(same, torch.ones(2))


def test_a_model_made_in_inference_mode_gets_its_values(path):
    saved_body(path, x=torch.ones(2))
    with torch.inference_mode():
        model = Body(x=torch.zeros(2))
    load_adapter(model, path)
    assert torch.equal(model.head.x, torch.ones(2))


# ---- what has several names, no values yet, or cannot train ------------------------------------


class Untied(nn.Module):
    def __init__(self, tie):
        super().__init__()
        self.emb, self.q, self.h = nn.Embedding(4, 3), nn.Linear(3, 3), nn.Linear(3, 4, bias=False)
        if tie:
            self.h.weight = self.emb.weight


def untied_twin(model):
    twin = Untied(tie=False)
    twin.load_state_dict(model.state_dict())
    return twin


@pytest.mark.parametrize("modules", [None, "h", ["emb"], ["h", "emb"]])
def test_a_tied_tensor_comes_back_under_all_its_names(path, modules):
    model = Untied(tie=True)
    plain = untied_twin(model)
    wrap(model, {"q": 1}, trainable=["h"])
    with torch.no_grad():
        model.h.weight += 1
    save_adapter(model, path, modules=modules)
    load_adapter(plain, path)
    assert same_bits(plain.emb.weight, model.h.weight)
    assert same_bits(plain.h.weight, model.h.weight)
    assert trains(plain) == {"emb.weight", "h.weight", "q.lora_A", "q.lora_B"}


def test_a_further_name_need_not_be_in_the_model(path):
    model = Untied(tie=True)
    plain = untied_twin(model)
    del plain.h
    wrap(model, {"q": 1}, trainable=["h"])
    with torch.no_grad():
        model.h.weight += 1
    save_adapter(model, path)
    load_adapter(plain, path)
    assert same_bits(plain.emb.weight, model.emb.weight)


def test_a_tied_parameter_that_is_not_in_the_file_trains_under_all_its_names(path):
    model = Untied(tie=True)
    plain = untied_twin(model)
    wrap(model, {"q": 1}, trainable=["h"])
    with pytest.warns(UserWarning, match="require a gradient"):
        save_adapter(model, path, modules=())
    load_adapter(plain, path)
    assert trains(plain) == {"emb.weight", "h.weight", "q.lora_A", "q.lora_B"}


def test_a_lazy_module_without_values_is_told_so(path):
    model = nn.ModuleDict({"q": nn.Linear(3, 3), "lazy": nn.LazyLinear(2)})
    wrap(model, {"q": 1}, trainable=["lazy"])
    for modules in (None, "lazy"):
        with pytest.raises(ValueError, match=r"'lazy\.weight' is a lazy .* run the model once"):
            save_adapter(model, path, modules=modules)
    assert not path.exists()


def head_model():
    return nn.ModuleDict({"a": nn.Linear(4, 4), "h": nn.Linear(4, 2)})


def test_a_head_loads_into_a_model_of_inference_mode(path):
    model = head_model()
    plain = {name: value.clone() for name, value in model.state_dict().items()}
    wrap(model, {"a": 1}, trainable=["h"])
    with torch.no_grad():
        model.h.weight += 1
    save_adapter(model, path)
    for requires_grad in (True, False):
        with torch.inference_mode():
            again = head_model().requires_grad_(requires_grad)
            again.load_state_dict(plain)
        load_adapter(again, path)
        assert same_bits(again.h.weight, model.h.weight)
        assert again.h.weight.requires_grad == requires_grad


def test_a_file_of_0_1_with_tensors_that_cannot_train(path):
    """It does not say which of its tensors trained: parameters that can do, nothing else."""

    def make():
        model = head_model()
        codes = nn.Parameter(torch.ones(2, dtype=torch.int8), requires_grad=False)
        model.h.register_parameter("codes", codes)
        model.h.register_buffer("mean", torch.zeros(2))
        return model

    model = make()
    again = copy.deepcopy(model)
    wrap(model, {"a": 1}, trainable=["h"])
    save_adapter(model, path, modules=["h"])
    tensors, metadata = read_safetensors(path)
    record = json.loads(metadata["minirank"])
    del record["trainable"], record["tied"]
    text = json.dumps(record | {"format": 1})
    metadata = {"minirank": text, "checksum": checksum(tensors, text)}
    path.write_bytes(safetensors_bytes(tensors, metadata))
    load_adapter(again, path)
    assert trains(again) == {"a.lora_A", "a.lora_B", "h.weight", "h.bias"}
    read = read_adapter(path)
    assert read.trainable is None
    assert str(read).splitlines()[-1] == "trains beside them: the parameters among these"


# ---- statistics that move without a gradient ---------------------------------------------------


def test_running_statistics_that_moved_and_are_not_saved_are_warned_of(path):
    model = classifier()
    wrap(model, {"body.0": 2}, trainable=["head"])
    save_adapter(model, path)  # no batch has moved them yet
    model(inputs(5, 4))
    with pytest.warns(UserWarning, match=r"'body\.1' in training mode, where every") as caught:
        save_adapter(model, path)
    assert caught[0].filename == __file__
    save_adapter(model, path, modules=["head", "body.1"])
    again = classifier().eval()
    load_adapter(again, path)
    assert same_bits(again.body[1].running_mean, model.body[1].running_mean)
    model.body[1].momentum = 0.0
    save_adapter(model, path)
    model.body[1].momentum = None  # the average over all batches
    with pytest.warns(UserWarning, match=r"'body\.1' in training mode"):
        save_adapter(model, path)
    model.body[1].eval()
    save_adapter(model, path)


def test_norms_without_running_statistics_are_not_warned_of(path):
    model = classifier()
    model.body[1] = nn.BatchNorm1d(6, track_running_stats=False, dtype=torch.float64)
    wrap(model, {"body.0": 2}, trainable=["head"])
    model(inputs(5, 4))
    save_adapter(model, path)
