"""What counts as an optimizer, and what `resize` does with several and with uncommon ones."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from minirank import resize, wrap
from minirank.layers.optimizers import as_optimizers, parameter_slots

schedule_free_kinds = pytest.mark.parametrize(
    "kind", ["AdamWScheduleFree", "RAdamScheduleFree", "SGDScheduleFree"]
)


def wrapped(ranks=None, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    return model, wrap(model, ranks or {"0": 3, "2": 2}, **options)


def adapters(model):
    return [p for p in model.parameters() if p.requires_grad]


def train(model, optimizers, steps=3):
    x = torch.linspace(-1, 1, 24, dtype=torch.float64).view(4, 6)
    for _ in range(steps):
        for optimizer in optimizers:
            optimizer.zero_grad()
        model(x).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()


def test_each_parameter_stays_with_its_own_optimizer():
    model, layers = wrapped(gate=1.0)
    matrices = [p for p in adapters(model) if p.ndim == 2]
    gates = [p for p in adapters(model) if p.ndim == 1]
    optimizers = [torch.optim.SGD(matrices, 0.1, momentum=0.9), torch.optim.Adam(gates)]
    train(model, optimizers)
    before = copy.deepcopy(optimizers[0].state[layers["0"].lora_A]["momentum_buffer"])
    moment = optimizers[1].state[layers["0"].gate]["exp_avg"].clone()
    resized = resize(model, {"0": 4, "2": 1}, optimizers)
    assert {name: change.new_rank for name, change in resized.items()} == {"0": 4, "2": 1}
    for optimizer, keys in zip(optimizers, [("lora_A", "lora_B"), ("gate",)], strict=True):
        held = [id(p) for group in optimizer.param_groups for p in group["params"]]
        assert held == [id(getattr(layers[name], key)) for name in layers for key in keys]
    state = optimizers[0].state[layers["0"].lora_A]["momentum_buffer"]
    assert torch.equal(state[:3], before)
    assert torch.equal(state[3:], torch.zeros(1, 6, dtype=torch.float64))
    assert torch.equal(optimizers[1].state[layers["0"].gate]["exp_avg"][:3], moment)
    values = [p.detach().clone() for p in adapters(model)]
    train(model, optimizers)
    assert all(not torch.equal(p, value) for p, value in zip(adapters(model), values, strict=True))


def test_muon_for_matrices_beside_adamw():
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("from torch 2.9")
    model, layers = wrapped(gate=1.0)
    matrices = [p for p in adapters(model) if p.ndim == 2]
    gates = [p for p in adapters(model) if p.ndim == 1]
    optimizers = [torch.optim.Muon(matrices), torch.optim.AdamW(gates)]
    train(model, optimizers)
    momentum = optimizers[0].state[layers["0"].lora_B]["momentum_buffer"].clone()
    keep = resize(model, {"0": 2}, optimizers)["0"].keep
    state = optimizers[0].state[layers["0"].lora_B]
    assert torch.equal(state["momentum_buffer"], momentum[:, keep])
    train(model, optimizers)


def test_a_parameter_in_no_optimizer_or_in_two_is_refused():
    model, layers = wrapped()
    first = torch.optim.SGD(layers["0"].parameters(recurse=False), 0.1)
    second = torch.optim.Adam(layers["2"].parameters(recurse=False))
    with pytest.raises(ValueError, match=r"does not hold 2\.lora_A: make it after wrap"):
        resize(model, {"2": 1}, [first])
    both = torch.optim.Adam(adapters(model))
    with pytest.raises(ValueError, match=r"SGD and Adam, hold one parameter, of shape \(3, 6\)"):
        resize(model, {"2": 1}, [first, both])
    assert layers["2"].rank == 2
    resize(model, {"0": 1, "2": 1}, (first, second))
    assert (layers["0"].rank, layers["2"].rank) == (1, 1)


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (3, "or a list of them, got int"),
        (["adam"], "got a list that holds str"),
        (nn.Linear(2, 2), "got Linear: give the optimizer inside it"),
    ],
)
def test_what_is_no_optimizer_is_named(optimizer, message):
    model, layers = wrapped()
    with pytest.raises(TypeError, match=message):
        resize(model, {"0": 1}, optimizer)
    assert layers["0"].rank == 3
    assert as_optimizers(None) == []


def test_codes_of_quantised_moments_are_reset_and_named():
    """Their scales belong to blocks of entries, here by chance as many as there are ranks."""
    model, layers = wrapped()
    optimizer = torch.optim.Adam(adapters(model))
    train(model, [optimizer])
    codes = torch.ones(3, 6, dtype=torch.uint8)
    optimizer.state[layers["0"].lora_A] = {"state1": codes, "absmax1": torch.ones(3)}
    change = resize(model, {"0": 2}, optimizer)["0"]
    assert change.state_reset == ("lora_A.state1",)
    assert layers["0"].lora_A not in optimizer.state


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", ["AdamW8bit", "AdamW4bit"])
def test_torchao_trains_on_after_a_resize(kind):
    optim = pytest.importorskip("torchao.optim")
    model = nn.Sequential(nn.Linear(1024, 8), nn.Linear(8, 6))
    layers = wrap(model, {"0": 8, "1": 2})
    optimizer = getattr(optim, kind)(adapters(model), lr=1e-3)

    def step():
        optimizer.zero_grad()
        model(torch.ones(2, 1024)).square().sum().backward()
        optimizer.step()

    with torch.compiler.set_stance("force_eager"):  # torchao compiles its step, which takes long
        for ranks in ({"0": 4}, {"0": 8, "1": 1}):
            step()
            change = resize(model, ranks, optimizer)["0"]
            # The moments of A, 8192 and 4096 entries, are quantised; those of B are not.
            assert "lora_A.exp_avg" in change.state_reset
            assert "lora_B.exp_avg" not in change.state_reset
        before = layers["0"].lora_B.detach().clone()
        step()
    assert not torch.equal(before, layers["0"].lora_B)


@pytest.mark.parametrize("evaluating", [False, True])
@schedule_free_kinds
def test_schedule_free_iterates_of_survivors_stay_and_those_of_new_ranks_start_there(
    kind, evaluating
):
    schedulefree = pytest.importorskip("schedulefree")
    model, layers = wrapped(gate=1.0)
    optimizer = getattr(schedulefree, kind)(adapters(model), lr=0.05)
    optimizer.train()
    train(model, [optimizer], 12)
    if evaluating:
        optimizer.eval()
    z = optimizer.state[layers["0"].lora_A]["z"].clone()
    keep = torch.tensor([True, False, True])
    before = layers["0"].lora_A.detach()[keep].clone()
    _resize_keeping(model, keep, 5, optimizer)
    layer = layers["0"]
    for key, axis in {"lora_A": 0, "lora_B": 1, "gate": 0}.items():
        parameter = getattr(layer, key)
        new_z = optimizer.state[parameter]["z"]
        assert torch.equal(new_z.narrow(axis, 2, 3), parameter.detach().narrow(axis, 2, 3))
    assert torch.equal(optimizer.state[layer.lora_A]["z"][:2], z[keep])
    assert torch.equal(layer.lora_A.detach()[:2], before)
    # Between training and evaluation the new ranks stay where they are.
    started = layer.lora_A.detach()[2:].clone()
    optimizer.train() if evaluating else optimizer.eval()
    torch.testing.assert_close(layer.lora_A.detach()[2:], started)


def _resize_keeping(model, keep, rank, optimizer):
    resize(model, SimpleNamespace(ranks={"0": rank}, keep={"0": keep}), optimizer)


@pytest.mark.parametrize(
    "kind", ["AdamWScheduleFreeReference", "AdamWScheduleFreeClosure", "ScheduleFreeWrapper"]
)
def test_other_schedule_free_optimizers_are_refused_by_name(kind):
    schedulefree = pytest.importorskip("schedulefree")
    model, _ = wrapped()
    given = adapters(model)
    if kind == "ScheduleFreeWrapper":
        given = torch.optim.SGD(given, 0.1)
    with pytest.raises(TypeError, match=rf"{kind} keeps averaged parameters .*AdamWScheduleFree"):
        resize(model, {"0": 1}, getattr(schedulefree, kind)(given))


def test_slots_say_where_a_parameter_is():
    model, layers = wrapped()
    optimizer = torch.optim.SGD([{"params": [p]} for p in adapters(model)], 0.1)
    slot = parameter_slots([optimizer])[id(layers["2"].lora_B)]
    assert (slot.group is optimizer.param_groups[3], slot.place) == (True, 0)
