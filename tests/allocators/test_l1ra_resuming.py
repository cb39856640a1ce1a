"""L1RA beside a model, an optimizer and wrappers that are not what it was made for."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from minirank import L1RA, lora_layers, resize, wrap

X = torch.randn(8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
UNKNOWN = "had been trained, with its gates"


def start(ranks=None, optimizer=torch.optim.Adam, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)).double()
    wrap(model, ranks or {"0": 3, "2": 3}, gate=1.0)
    return model, *trainer_of(model, optimizer, **options)


def trainer_of(model, optimizer=torch.optim.Adam, **options):
    optimizer = optimizer([p for p in model.parameters() if p.requires_grad], 0.05)
    return optimizer, L1RA(model, optimizer, **{"interval": 3, "l1": 1.5, **options})


def train(model, optimizer, l1ra, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        (model(X) - X.flip(1)).square().mean().backward()
        optimizer.step()
        l1ra.step()


def one_rank_is_weak(model):
    """Its gate falls at the first update, and the rank goes to the other layer."""
    gate = lora_layers(model)["0"].gate
    gate.data.copy_(torch.tensor([0.01, 0.5, 0.5]))


def moved_run(steps=6):
    model, optimizer, l1ra = start()
    one_rank_is_weak(model)
    train(model, optimizer, l1ra, steps)
    assert l1ra.ranks != {"0": 3, "2": 3}
    return model, optimizer, l1ra


# ---- the optimizer holds other parameters -------------------------------------------------------


def test_a_step_after_loading_other_ranks_raises_and_changes_nothing():
    source = moved_run()[0].state_dict()
    model, optimizer, l1ra = start()
    train(model, optimizer, l1ra, 1)
    (model(X) - X).square().mean().backward()
    optimizer.step()
    model.load_state_dict(source)  # between the optimizer's step and ours
    before = copy.deepcopy(model.state_dict())
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"does not hold 0\.lora_A.*resize\(model, ranks,"):
            l1ra.step()
    assert l1ra.steps == 1
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_a_state_is_not_loaded_beside_an_optimizer_that_holds_other_parameters():
    saved = moved_run()
    model, _, l1ra = start()
    model.load_state_dict(saved[0].state_dict())
    before = l1ra.history
    with pytest.raises(RuntimeError, match=r"does not hold 0\.lora_A"):
        l1ra.load_state_dict(saved[2].state_dict())
    assert l1ra.history is before
    assert l1ra.steps == 0


def test_a_frozen_adapter_need_not_be_held():
    model = start()[0]
    for parameter in (lora_layers(model)["2"].lora_A, lora_layers(model)["2"].lora_B):
        parameter.requires_grad_(False)
    train(model, *trainer_of(model, interval=50), 2)


@pytest.mark.parametrize("resize_first", [True, False])
def test_both_ways_to_go_on_are_exact(resize_first):
    whole = moved_run()
    saved = copy.deepcopy([x.state_dict() for x in whole])
    train(*whole, 9)
    model = start()[0]
    if resize_first:
        optimizer, l1ra = trainer_of(model)
        resize(model, saved[2]["ranks"], optimizer)
        model.load_state_dict(saved[0])
    else:
        model.load_state_dict(saved[0])
        optimizer, l1ra = trainer_of(model)
    optimizer.load_state_dict(saved[1])
    l1ra.load_state_dict(saved[2])
    train(model, optimizer, l1ra, 9)
    assert l1ra.history == whole[2].history
    assert all(torch.equal(x, model.state_dict()[k]) for k, x in whole[0].state_dict().items())


# ---- going on without the state -----------------------------------------------------------------


def test_a_trained_model_without_a_state_is_noticed_once():
    model = moved_run()[0]
    optimizer, l1ra = trainer_of(model)
    with pytest.warns(UserWarning, match=rf"'0' {UNKNOWN}.*l1ra\.load_state_dict") as caught:
        train(model, optimizer, l1ra, 1)
    assert [w.filename for w in caught] == [__file__]
    train(model, optimizer, l1ra, 2)  # warnings are errors here


def test_ordinary_starts_are_not_warned_of():
    train(*start(), 4)
    for ranks in ({"0": 0, "2": 5}, {"0": 5, "2": 1}):  # resized before the first step
        model = start()[0]
        resize(model, ranks)
        train(model, *trainer_of(model, min_rank=0), 4)
    model = start()[0]
    lora_layers(model)["0"].gate.data.fill_(0.5)  # another start of the user's
    train(model, *trainer_of(model), 4)
    model = start()[0]
    nn.init.ones_(lora_layers(model)["0"].lora_B)  # another start of A and B
    train(model, *trainer_of(model), 4)


# ---- optimizers inside of others ----------------------------------------------------------------


def test_accelerates_optimizer_is_understood():
    accelerate = pytest.importorskip("accelerate")
    runs = []
    for made_after in (False, True):
        model, optimizer, l1ra = start(interval=3)
        one_rank_is_weak(model)
        accelerator = accelerate.Accelerator(cpu=True)
        if made_after:
            model = start()[0]
            one_rank_is_weak(model)
            trained = [p for p in model.parameters() if p.requires_grad]
            model, optimizer = accelerator.prepare(model, torch.optim.Adam(trained, 0.05))
            l1ra = L1RA(model, optimizer, interval=3, l1=1.5)
            assert l1ra.optimizer is optimizer.optimizer
        else:
            model, optimizer = accelerator.prepare(model, optimizer)
        train(model, optimizer, l1ra, 9)
        assert l1ra.ranks != {"0": 3, "2": 3}
        runs.append((model.state_dict(), l1ra.history))
    assert runs[0][1] == runs[1][1]
    assert all(torch.equal(value, runs[1][0][key]) for key, value in runs[0][0].items())


def test_a_wrapper_that_is_not_understood_is_refused_before_anything_changes():
    model, optimizer, _ = start()
    groups = copy.deepcopy(optimizer.param_groups)

    class Wrapper:  # keeps its optimizer under another name
        def __init__(self, inner):
            self.inner, self.param_groups = inner, inner.param_groups

    with pytest.raises(TypeError, match=r"expected a torch\.optim\.Optimizer.*got Wrapper"):
        L1RA(model, Wrapper(optimizer), interval=3)
    assert len(optimizer.param_groups) == len(groups)
