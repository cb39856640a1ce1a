"""Loading a state of other ranks, and optimizers that hold parameters which layers replaced."""

from __future__ import annotations

import copy
import io
import pickle
import re

import pytest
import torch
from torch import nn

from minirank import lora_layers, merge, resize, unwrap, wrap
from minirank.allocators.allocator import RankScoreAllocator
from minirank.layers import replaced

STALE = "the optimizer holds a lora_A of shape"


def model_of(ranks, gate=None, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    wrap(model, ranks, gate=gate, scaling=2.0, **options)
    return model


def trained(ranks, gate=None):
    """A model of random adapters."""
    model = model_of(ranks, gate)
    generator = torch.Generator().manual_seed(sum(ranks.values()))
    for layer in lora_layers(model).values():
        for parameter in layer.parameters(recurse=False):
            nn.init.uniform_(parameter, 0.1, 1.0, generator=generator)
    return model


def adapters(model):
    return [p for layer in lora_layers(model).values() for p in layer.parameters(recurse=False)]


def ranks_of(model):
    return {name: layer.rank for name, layer in lora_layers(model).items()}


X = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def train_step(model, optimizer):
    optimizer.zero_grad()
    model(X).square().mean().backward()
    optimizer.step()


# ---- loading -----------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", [None, 1.0])
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("swap", [True, False])
def test_a_state_brings_its_ranks(gate, strict, assign, swap):
    source, model = trained({"0": 4, "2": 1}, gate), model_of({"0": 2, "2": 3}, gate)
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        result = model.load_state_dict(
            torch.load(file, weights_only=True), strict=strict, assign=assign
        )
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert ranks_of(model) == {"0": 4, "2": 1}
    assert torch.equal(model(X), source(X))
    assert {p.shape for p in adapters(model)} == {p.shape for p in adapters(source)}
    train_step(model, torch.optim.Adam(adapters(model), 0.1))
    assert not torch.equal(model(X), source(X))


def test_rank_zero_is_adopted_and_left_again():
    source, model = trained({"0": 4, "2": 2}), model_of({"0": 4, "2": 2})
    full = copy.deepcopy(source.state_dict())
    resize(source, {"0": 0})
    model.load_state_dict(source.state_dict())
    assert ranks_of(model) == {"0": 0, "2": 2}
    model.load_state_dict(full)
    assert ranks_of(model) == {"0": 4, "2": 2}
    assert torch.equal(model.state_dict()["0.lora_A"], full["0.lora_A"])


def test_new_parameters_keep_what_the_old_ones_were():
    source = trained({"0": 4, "2": 1}, gate=1.0)
    model = model_of({"0": 2, "2": 1}, gate=1.0, dtype=torch.float32)
    layer = lora_layers(model)["0"]
    layer.lora_B.requires_grad_(False)
    token = layer.ranks_token
    untouched = lora_layers(model)["2"].lora_A
    with torch.inference_mode():
        model.load_state_dict(source.state_dict())
    assert {p.dtype for p in layer.parameters(recurse=False)} == {torch.float32}
    flags = {name: p.requires_grad for name, p in layer.named_parameters(recurse=False)}
    assert flags == {"lora_A": True, "lora_B": False, "gate": True}
    assert layer.ranks_token is not token
    assert lora_layers(model)["2"].lora_A is untouched  # its rank is the same: values are copied
    assert not any(p.is_inference() for p in model.parameters())


def test_layers_on_the_meta_device_adopt_what_is_assigned():
    source = trained({"0": 4, "2": 1})
    model = model_of({"0": 2, "2": 1}).to("meta")
    model.load_state_dict(source.state_dict(), assign=True)
    assert torch.equal(model(X), source(X))


def test_a_prefix_of_a_parent_is_understood():
    source, model = trained({"0": 4, "2": 1}), model_of({"0": 2, "2": 3})
    nn.ModuleDict({"module": model}).load_state_dict(nn.ModuleDict({"module": source}).state_dict())
    assert ranks_of(model) == {"0": 4, "2": 1}


def test_what_does_not_fit_stays_torchs_own_error_and_leaves_the_layer_as_it_is():
    state = trained({"0": 4, "2": 1}).state_dict()
    gated = trained({"0": 4, "2": 1}, gate=1.0).state_dict()
    double = torch.float64
    for name, bad, gate, message in (
        ("too many ranks", {**state, "0.lora_A": torch.ones(9, 6, dtype=double),
                            "0.lora_B": torch.ones(5, 9, dtype=double)}, None, "size mismatch"),
        ("A and B disagree", {**state, "0.lora_A": torch.ones(3, 6)}, None, "size mismatch"),
        ("other inputs", {**state, "0.lora_A": torch.ones(4, 7)}, None, "size mismatch"),
        ("one axis", {**state, "0.lora_A": torch.ones(4)}, None, "size mismatch"),
        ("no tensor", {**state, "0.lora_A": [1.0]}, None, "expected torch.Tensor"),
        ("a gate too many", gated, None, "size mismatch"),
        ("no gate", state, 1.0, "size mismatch"),
        ("no B", {k: v for k, v in state.items() if k != "0.lora_B"}, None, "size mismatch"),
        ("gate of other rank", {**gated, "0.gate": torch.ones(3)}, 1.0, "size mismatch"),
    ):  # fmt: skip
        for strict in (True, False):
            model = model_of({"0": 2, "2": 3}, gate)
            layer = lora_layers(model)["0"]
            before = {key: (p, p.clone()) for key, p in layer.named_parameters(recurse=False)}
            with pytest.raises(RuntimeError, match=message) as caught:
                model.load_state_dict(bad, strict=strict)
            sizes = r"0\.lora_A: .* in current model is torch\.Size\((.*)\)"
            for size in re.findall(sizes, str(caught.value)):
                assert size == "[2, 6]", name  # of the layer as it is
            assert layer.rank == 2, name
            for key, (parameter, _) in before.items():
                assert layer.get_parameter(key) is parameter, (name, key)


def test_values_that_cannot_be_copied_leave_the_old_parameters():
    class Broken(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            if function is torch.Tensor.copy_:
                raise ValueError("no values here")
            return super().__torch_function__(function, types, args, kwargs or {})

    state, model = trained({"0": 4, "2": 1}).state_dict(), trained({"0": 2, "2": 1})
    y, layer = model(X), lora_layers(model)["0"]
    before = dict(layer.named_parameters(recurse=False))
    bad = {**state, "0.lora_A": state["0.lora_A"].as_subclass(Broken)}
    with pytest.raises(RuntimeError, match="no values here"):
        layer.load_state_dict({key[2:]: value for key, value in bad.items() if key[0] == "0"})
    assert dict(layer.named_parameters(recurse=False)) == before
    assert torch.equal(model(X), y)


def test_a_merged_layer_adopts_nothing():
    model = trained({"0": 2, "2": 1})
    merge(model)
    with pytest.raises(RuntimeError, match=r"unmerge\(\)"):
        model.load_state_dict(trained({"0": 4, "2": 1}).state_dict())
    assert ranks_of(model) == {"0": 2, "2": 1}


# ---- optimizers that hold replaced parameters ---------------------------------------------------


def test_an_optimizer_from_before_is_stopped_before_it_changes_anything():
    model, source = trained({"0": 2, "2": 1}), trained({"0": 4, "2": 1})
    optimizer = torch.optim.SGD(adapters(model), 0.1)
    train_step(model, optimizer)
    model.load_state_dict(source.state_dict())
    with pytest.raises(RuntimeError, match=r"lora_A of shape \(2, 6\) .* shape \(4, 6\)"):
        train_step(model, optimizer)
    assert torch.equal(model(X), source(X))
    train_step(model, torch.optim.SGD(adapters(model), 0.1))  # made afterwards, all is well


def test_the_first_step_of_a_closure_is_stopped_too():
    model = trained({"0": 2, "2": 1})
    optimizer = torch.optim.SGD(adapters(model), 0.1)
    model.load_state_dict(trained({"0": 4, "2": 1}).state_dict())
    with pytest.raises(RuntimeError, match=STALE):
        optimizer.step(lambda: model(X).sum())


def test_resize_without_the_optimizer_and_assign_are_noticed_as_well():
    model = trained({"0": 2, "2": 1})
    optimizer = torch.optim.SGD(adapters(model), 0.1)
    resize(model, {"0": 3})
    with pytest.raises(RuntimeError, match=STALE):
        train_step(model, optimizer)
    optimizer = torch.optim.SGD(adapters(model), 0.1)
    model.load_state_dict(model.state_dict(), assign=True)
    with pytest.raises(RuntimeError, match=r"assign=True"):
        train_step(model, optimizer)


def test_resizing_first_keeps_the_optimizer():
    model, source = trained({"0": 2, "2": 1}), trained({"0": 4, "2": 1})
    optimizer = torch.optim.Adam(adapters(model), 0.1)
    state = source.state_dict()
    ranks = {name: state[f"{name}.lora_A"].shape[0] for name in lora_layers(model)}
    resize(model, ranks, optimizer)
    held = adapters(model)
    model.load_state_dict(state)
    assert all(a is b for a, b in zip(held, adapters(model), strict=True))
    train_step(model, optimizer)
    assert not torch.equal(model(X), source(X))


def test_no_optimizer_is_stopped_without_need():
    model = trained({"0": 2, "2": 1})
    old = torch.optim.SGD(adapters(model), 0.1)
    resize(model, {"0": 3}, old)
    train_step(model, old)  # it was told
    resize(model, {"0": 0})
    train_step(model, old)  # rank 0 has nothing to train
    resize(model, {"0": 2})
    for parameter in lora_layers(model)["0"].parameters(recurse=False):
        parameter.requires_grad_(False)
    train_step(model, old)  # frozen, so that it need not train
    lora_layers(model)["0"].requires_grad_(True)
    with pytest.raises(RuntimeError, match=STALE):
        old.step()
    unwrap(model)
    old.step()  # the layer is gone
    other = nn.Linear(2, 2)
    other(torch.ones(1, 2)).sum().backward()
    torch.optim.SGD(other.parameters(), 0.1).step()


def test_nothing_is_remembered_of_parameters_that_nobody_keeps():
    model = trained({"0": 2, "2": 1})
    before = len(replaced._replaced)
    optimizer = torch.optim.SGD(adapters(model), 0.1)
    for rank in (3, 4, 2):
        resize(model, {"0": rank}, optimizer)
    assert len(replaced._replaced) == before
    resize(model, {"0": 5})
    assert len(replaced._replaced) == before + 2
    pickle.loads(pickle.dumps((model, optimizer)))
    copy.deepcopy((model, optimizer))
    del optimizer
    assert len(replaced._replaced) == before


def test_scores_are_stale_after_other_ranks_are_adopted():
    model = trained({"0": 2, "2": 1})

    class Contributions(RankScoreAllocator):
        method = "contributions"

        def score(self):
            layers = lora_layers(self.model)
            return self.store_scores({n: x.contributions() for n, x in layers.items()})

    allocator = Contributions(model)
    allocator.score()
    model.load_state_dict(trained({"0": 2, "2": 1}).state_dict())
    assert allocator.allocate(2).total_rank == 2
    model.load_state_dict(trained({"0": 3, "2": 1}).state_dict())
    with pytest.raises(RuntimeError, match="stale: '0' was resized"):
        allocator.allocate(2)


def test_layers_that_share_a_parameter_share_it_after_loading_other_ranks():
    def shared(rank):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        first, second = wrap(model, {"0": rank, "1": rank}).values()
        second.lora_A = first.lora_A
        return model

    model = shared(1)
    state = shared(3).state_dict()
    model.load_state_dict(state)
    assert [layer.rank for layer in model] == [3, 3]
    assert model[1].lora_A is model[0].lora_A
    torch.testing.assert_close(model[1].lora_A.detach(), state["1.lora_A"], rtol=0, atol=0)
