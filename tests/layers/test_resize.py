"""resize.py: ranks change in the middle of training, and the optimizer's state goes with them bit for bit."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from helpers.models import (
    TOKENS,
    assert_unchanged,
    delta_by_hand,
    randomize,
    snapshot,
    wrapped,
    zoo,
)
from helpers.models import (
    layer as make_layer,
)
from torch import nn

from minirank import L1RA, ShapLoRA, lora_layers, merge, resize, wrap
from minirank.layers import resize as resize_file
from minirank.layers.resize import resized_parameters

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.001),
    "momentum": lambda p: torch.optim.SGD(p, 0.001, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, 0.01),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, foreach=False),
    "amsgrad": lambda p: torch.optim.Adam(p, 0.01, amsgrad=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.01),
}
if hasattr(torch.optim, "Adafactor"):  # from torch 2.5
    OPTIMIZERS["adafactor"] = lambda p: torch.optim.Adafactor(p, 0.01)
RANKS = {"body.up": 4, "body.conv": 3, "blocks.0.0": 3, "head": 4}
NEW = {"body.up": 2, "body.conv": 5, "blocks.0.0": 3, "head": 0}  # fewer, more, as before, none
AXIS = {"lora_A": 0, "lora_B": 1, "gate": 0}


def train(model, optimizer, steps=3):
    for _ in range(steps):
        optimizer.zero_grad()
        model(TOKENS).square().mean().backward()
        optimizer.step()


def in_training(optimizer="adam", gate=1.0, **options):
    _, model, layers = wrapped(ranks=RANKS, gate=gate, **options)
    optimizer = OPTIMIZERS[optimizer]([p for p in model.parameters() if p.requires_grad])
    train(model, optimizer)
    return model, layers, optimizer


def largest(layer, rank):
    """The `rank` ranks with the largest ‖s · gate_i · B[:, i] A[i, :]‖, by definition."""
    norms = []
    for i in range(layer.rank):
        gate = 1 if layer.gate is None else layer.gate[i]
        norms.append(
            torch.linalg.matrix_norm(gate * torch.outer(layer.lora_B[:, i], layer.lora_A[i])).item()
        )
    chosen = sorted(range(layer.rank), key=lambda i: (-norms[i], i))[:rank]
    return [i in chosen for i in range(layer.rank)]


def pick(tensor, axis, mask):
    return tensor[mask] if axis == 0 else tensor[:, mask]


# ---- the function ------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", [None, 1.0, 0.0])
def test_growing_keeps_the_function(gate):
    _, model, layers = wrapped(ranks=RANKS, gate=gate)
    y, scalings = model(TOKENS), [layer.scaling for layer in layers.values()]
    report = resize(model, {"body.up": 6, "head": 6})
    torch.testing.assert_close(model(TOKENS), y, rtol=1e-12, atol=1e-12)
    assert {name: (r.old_rank, r.new_rank) for name, r in report.items()} == {
        "body.up": (4, 6),
        "head": (4, 6),
    }
    assert [layer.scaling for layer in layers.values()] == scalings
    assert lora_layers(model) == layers
    assert layers["body.up"].lora_A[4:].ne(0).all()


@pytest.mark.parametrize("gate", [None, 1.0, 0.0])
def test_shrinking_takes_away_the_least_contributions_and_nothing_else(gate):
    _, model, layers = wrapped(ranks=RANKS, gate=gate)
    for name, rank in (("body.up", 2), ("body.conv", 1), ("head", 3)):
        layer, before = layers[name], copy.deepcopy(layers[name])
        mask = largest(before, rank)
        report = resize(model, {name: rank})[name]
        assert report.keep.tolist() == mask
        with torch.no_grad():
            before.lora_B[:, ~torch.tensor(mask)] = 0
        torch.testing.assert_close(
            layer.delta_weight(), delta_by_hand(before), rtol=1e-13, atol=1e-13
        )
        assert layer.scaling == before.scaling


def test_equal_contributions_keep_the_earlier_ranks():
    model = nn.Sequential(nn.Linear(64, 64))
    wrap(model, {"0": 64})  # B = 0: every contribution is zero
    assert resize(model, {"0": 20})["0"].keep.tolist() == [True] * 20 + [False] * 44


def test_rank_zero_is_the_base_function_and_grows_again():
    model, layers, optimizer = in_training()
    resize(model, dict.fromkeys(RANKS, 0), optimizer)
    assert torch.equal(model(TOKENS), zoo()(TOKENS))
    assert layers["head"].lora_A.shape == (0, 6)
    resize(model, {"head": 2}, optimizer)
    assert torch.equal(model(TOKENS), zoo()(TOKENS))
    before = layers["head"].lora_B.detach().clone()
    train(model, optimizer)
    assert layers["head"].lora_B.ne(before).any()
    assert not torch.equal(model(TOKENS), zoo()(TOKENS))


def test_masks_of_an_allocation_choose_the_survivors_even_at_the_same_rank():
    model, layers, optimizer = in_training()
    before = {name: copy.deepcopy(layer) for name, layer in layers.items()}
    keep = {
        "body.up": torch.tensor([False, True, False, True]),
        "blocks.0.0": torch.tensor([True, False, True]),
    }
    ranks = {"body.up": 2, "blocks.0.0": 3, "like": 0}  # "blocks.0.0": one goes, a fresh one comes
    report = resize(model, SimpleNamespace(ranks=ranks, keep=keep), optimizer)
    assert report.keys() == keep.keys()
    for name, mask in keep.items():
        assert torch.equal(report[name].keep, mask)
        survivors = int(mask.sum())
        assert torch.equal(layers[name].lora_A[:survivors], before[name].lora_A[mask])
        assert torch.equal(layers[name].lora_B[:, :survivors], before[name].lora_B[:, mask])
    assert layers["blocks.0.0"].lora_B[:, 2].eq(0).all()
    assert layers["blocks.0.0"].gate[2] == 1


def test_nothing_to_do_changes_nothing():
    model, _, optimizer = in_training()
    before, state = snapshot(model), pickle.dumps(optimizer.state_dict())
    assert resize(model, {**RANKS, "like": 0, "alias": 3}, optimizer) == {}
    assert_unchanged(model, before)
    assert pickle.dumps(optimizer.state_dict()) == state


@pytest.mark.parametrize("gate", [None, 0.0])
def test_a_seed_reproduces_the_new_ranks_and_the_global_generator_is_not_touched(gate):
    models, state = [wrapped(ranks=RANKS, gate=gate)[1] for _ in range(3)], torch.get_rng_state()
    for model, seed in zip(models, (5, torch.Generator().manual_seed(5), 6), strict=True):
        resize(model, {"body.up": 6, "head": 6}, generator=seed)
    assert torch.equal(torch.get_rng_state(), state)
    a, same, other = (model.head.lora_A for model in models)
    assert torch.equal(a, same)
    assert not torch.equal(a, other)
    assert not torch.equal(a[4:], models[0].body["up"].lora_A[4:])


# ---- the optimizer -----------------------------------------------------------------------------


@pytest.mark.parametrize("gate", [None, 1.0])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_survivors_keep_values_gradients_and_moments_bit_for_bit_and_new_ranks_start_at_zero(
    name, gate
):
    model, layers, optimizer = in_training(name, gate)
    groups = [dict(group, params=None) for group in optimizer.param_groups]
    old = {
        name: dict(copy.deepcopy(layer).named_parameters(recurse=False))
        for name, layer in layers.items()
    }
    gradients = {
        (n, k): p.grad.clone()
        for n, x in layers.items()
        for k, p in x.named_parameters(recurse=False)
    }
    states = {
        (n, k): copy.deepcopy(optimizer.state.get(p, {}))
        for n, x in layers.items()
        for k, p in x.named_parameters(recurse=False)
    }
    report = resize(model, NEW, optimizer)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}
    assert {id(p) for p in optimizer.state} <= held
    assert [dict(group, params=None) for group in optimizer.param_groups] == groups
    assert report.keys() == {"body.up", "body.conv", "head"}
    for n, layer in layers.items():
        mask = report[n].keep if n in report else torch.ones(layer.rank, dtype=torch.bool)
        count = int(mask.sum())
        assert layer.rank == NEW[n]
        for k, parameter in layer.named_parameters(recurse=False):
            axis, state = AXIS[k], optimizer.state.get(parameter, {})
            assert torch.equal(parameter.narrow(axis, 0, count), pick(old[n][k], axis, mask))
            assert (parameter.grad is None) == (layer.rank == 0)
            carried = {"": (gradients[n, k], parameter.grad)} if layer.rank else {}
            assert state.keys() == states[n, k].keys()
            carried |= {entry: (states[n, k][entry], value) for entry, value in state.items()}
            for entry, (before, after) in carried.items():
                averaged = AVERAGED_OVER_RANKS.get(k) == entry
                if entry == "step" or averaged or n not in report:
                    assert before is after is None or torch.equal(before, after), entry
                elif before is not None:
                    assert after.shape == parameter.shape or entry in AVERAGED_OVER_RANKS.values()
                    assert after.shape[axis] == layer.rank
                    assert torch.equal(after.narrow(axis, 0, count), pick(before, axis, mask)), (
                        entry
                    )
                    assert after.narrow(axis, count, layer.rank - count).eq(0).all(), entry
    train(model, optimizer)  # and it still trains
    assert all(torch.isfinite(p).all() for p in model.parameters())


AVERAGED_OVER_RANKS = {"lora_A": "col_var", "lora_B": "row_var"}  # Adafactor's


@pytest.mark.skipif("adafactor" not in OPTIMIZERS, reason="from torch 2.5")
def test_adafactors_factors_survive_rank_one_where_their_shapes_say_nothing():
    model, layers, optimizer = in_training("adafactor")
    for rank in (1, 3, 1, 6):
        report = resize(model, {"head": rank}, optimizer)
        assert not report or report["head"].state_reset == ()
        A, B = (optimizer.state[p] for p in (layers["head"].lora_A, layers["head"].lora_B))
        assert (A["row_var"].shape, A["col_var"].shape) == ((rank, 1), (1, 6))
        assert (B["row_var"].shape, B["col_var"].shape) == ((11, 1), (1, rank))
        train(model, optimizer)


@pytest.mark.parametrize("name", ["momentum", "adam", "adamw", "amsgrad"])
def test_training_goes_on_as_if_the_pruned_rank_had_never_been(name):
    """A rank whose A row and B column are zero gets no gradient: pruning it must not change the others' training."""
    runs = []
    for prune in (False, True):
        model, layers, _ = in_training()
        with torch.no_grad():
            layers["body.up"].lora_A[1] = 0
            layers["body.up"].lora_B[:, 1] = 0
        optimizer = OPTIMIZERS[name]([p for p in model.parameters() if p.requires_grad])
        train(model, optimizer)
        if prune:
            assert resize(model, {"body.up": 3}, optimizer)["body.up"].keep.tolist() == [
                True,
                False,
                True,
                True,
            ]
        train(model, optimizer, 4)
        runs.append(model(TOKENS))
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-11, atol=1e-11)


def test_schedulers_clipping_and_parameter_groups_go_on_working():
    _, model, layers = wrapped(ranks=RANKS, gate=1.0)
    gates = [layer.gate for layer in layers.values()]
    others = [p for p in model.parameters() if p.requires_grad and not any(p is g for g in gates)]
    optimizer = torch.optim.AdamW(
        [{"params": gates, "lr": 0.1, "weight_decay": 0.0}, {"params": others}], lr=0.01
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    train(model, optimizer)
    scheduler.step()
    resize(model, NEW, optimizer)
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [
        id(layer.gate) for layer in layers.values()
    ]
    before = {
        name: p.detach().clone()
        for name, p in model.named_parameters()
        if p.requires_grad and p.numel()
    }
    optimizer.zero_grad()
    model(TOKENS).square().mean().backward()
    assert nn.utils.clip_grad_norm_(model.parameters(), 1e-3) > 1e-3
    norms = [p.grad.norm() for p in model.parameters() if p.grad is not None]
    torch.testing.assert_close(torch.stack(norms).norm().item(), 1e-3, rtol=1e-2, atol=0)
    optimizer.step()
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.1 / 4, 0.01 / 4]
    unused = {"blocks.0.1", "blocks.1.1"}
    changed = {
        name
        for name, p in model.named_parameters()
        if name in before and not torch.equal(p, before[name])
    }
    assert before.keys() - changed <= unused
    state = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(state)
    train(model, optimizer, 1)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_layer_without_ranks_takes_no_steps_even_where_gradients_are_not_set_to_none(name):
    """An empty gradient would be enough to count some, which no saved state could tell of; Adafactor divides by its
    size."""
    model, layers, optimizer = in_training(name)
    resize(model, {"head": 0}, optimizer)
    parameters = dict(layers["head"].named_parameters(recurse=False))
    steps = {
        key: copy.copy(optimizer.state.get(p, {}).get("step")) for key, p in parameters.items()
    }
    for _ in range(2):
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        model(TOKENS).square().mean().backward()
    for key, parameter in parameters.items():
        assert parameter.grad is None
        assert optimizer.state.get(parameter, {}).get("step") == steps[key]
    resize(model, {"head": 2}, optimizer)
    train(model, optimizer)
    assert layers["head"].lora_B.any()


def test_without_an_optimizer_the_gradients_still_follow():
    model, layers, _ = in_training()
    gradient = layers["body.up"].lora_B.grad.clone()
    report = resize(model, {"body.up": 2})
    assert torch.equal(layers["body.up"].lora_B.grad, gradient[:, report["body.up"].keep])
    model.zero_grad()
    resize(model, {"body.up": 3})
    assert layers["body.up"].lora_B.grad is None


def test_a_frozen_adapter_parameter_need_not_be_in_the_optimizer():
    _, model, layers = wrapped(ranks=RANKS)
    for layer in layers.values():
        layer.lora_A.requires_grad_(False)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.01)
    train(model, optimizer)
    resize(model, NEW, optimizer)
    assert not any(layer.lora_A.requires_grad for layer in layers.values())
    before = layers["body.conv"].lora_B.detach().clone()
    train(model, optimizer)
    assert layers["body.conv"].lora_B.ne(before).all(dim=0).all()


def test_a_compiled_model_follows_new_ranks():
    torch._dynamo.reset()
    _, model, layers = wrapped(ranks=RANKS)
    compiled = torch.compile(model, backend="eager")
    compiled(TOKENS)
    for ranks in ({"head": 2}, {"head": 6, "body.up": 0}):
        resize(model, ranks)
        randomize(layers)
        torch.testing.assert_close(compiled(TOKENS), model(TOKENS), rtol=1e-13, atol=1e-13)


# ---- refusals ----------------------------------------------------------------------------------

MASK = torch.tensor([True, True, False, False])
BAD = {
    "unknown name": ({"body.up": 1, "hea": 1}, "'hea' has no adapter.*did you mean 'head'"),
    "no adapter": ({"body.up": 1, "like": 1}, "'like' has no adapter"),
    "rank too high": ({"body.up": 1, "head": 7}, "from 0 to 6, got 7"),
    "negative rank": ({"body.up": 1, "head": -1}, "got -1"),
    "rank is a float": ({"body.up": 1, "head": 2.0}, r"got 2\.0"),
    "two ranks for one module": ({"alias": 1, "blocks.0.0": 2}, "are one module"),
    "no ranks": ({}, "non-empty"),
    "mask of another length": (
        SimpleNamespace(ranks={"body.conv": 2, "head": 2}, keep={"head": MASK[:3]}),
        "shape",
    ),
    "mask keeps too many": (
        SimpleNamespace(ranks={"body.conv": 2, "head": 1}, keep={"head": MASK}),
        "2 survivors",
    ),
    "mask is not bool": (
        SimpleNamespace(ranks={"body.conv": 2, "head": 2}, keep={"head": MASK.int()}),
        "bool",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_refused_resize_changes_neither_model_nor_optimizer(case):
    model, _, optimizer = in_training()
    ranks, message = BAD[case]
    before, state = snapshot(model), pickle.dumps(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        resize(model, ranks, optimizer)
    assert_unchanged(model, before)
    assert pickle.dumps(optimizer.state_dict()) == state


def test_an_optimizer_that_misses_a_parameter_is_refused():
    model, layers, _ = in_training()
    partial = torch.optim.Adam(
        [p for p in model.parameters() if p.requires_grad and p is not layers["head"].gate]
    )
    stale = torch.optim.Adam(zoo().parameters())
    before, groups = snapshot(model), [list(o.param_groups[0]["params"]) for o in (partial, stale)]
    for other, message in (
        (partial, r"does not hold head\.gate"),
        (stale, r"does not hold body\.up\.lora_A"),
    ):
        with pytest.raises(ValueError, match=message):
            resize(model, {"body.up": 2, "head": 1}, other)
    assert_unchanged(model, before)
    for other, params in zip((partial, stale), groups, strict=True):
        assert all(a is b for a, b in zip(other.param_groups[0]["params"], params, strict=True))


@pytest.mark.parametrize("key", ["lora_A", "lora_B", "gate"])
def test_layers_that_share_a_parameter_are_refused(key):
    """Cut for one layer, it would be lost to the other, or to the optimizer."""
    model, layers, _ = in_training()
    setattr(layers["head"], key, getattr(layers["body.up"], key))
    optimizer = torch.optim.Adam(p for p in model.parameters() if p.requires_grad)
    before = snapshot(model)
    message = rf"'body\.up' and 'head' share their {key}"
    with pytest.raises(ValueError, match=message):
        resize(model, {"body.up": 2}, optimizer)
    with pytest.raises(ValueError, match=message):
        L1RA(model, optimizer, interval=1)
    with pytest.raises(ValueError, match=message):
        ShapLoRA(model, lambda model, batch: model(batch).mean(), [TOKENS])
    assert_unchanged(model, before)


def test_a_merged_layer_is_refused():
    model, _, optimizer = in_training()
    merge(model, untie=True)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"'head' is merged: unmerge\(\)"):
        resize(model, {"head": 2}, optimizer)
    assert_unchanged(model, before)


def test_an_exception_halfway_changes_nothing(monkeypatch):
    model, _, optimizer = in_training()
    calls, resized = [], resize_file.resized_parameters

    def fail_at_the_third(layer, *args, **kwargs):
        calls.append(layer)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return resized(layer, *args, **kwargs)

    monkeypatch.setattr(resize_file, "resized_parameters", fail_at_the_third)
    before, state = snapshot(model), pickle.dumps(optimizer.state_dict())
    with pytest.raises(KeyboardInterrupt):
        resize(model, NEW, optimizer)
    assert_unchanged(model, before)
    assert pickle.dumps(optimizer.state_dict()) == state


def test_a_rank_that_is_not_finite_goes_first():
    model = nn.Sequential(nn.Linear(4, 4))
    layer = wrap(model, {"0": 3})["0"]
    randomize(layer)
    with torch.no_grad():
        layer.lora_B[0, 1] = float("nan")
    assert resize(model, {"0": 2})["0"].keep.tolist() == [True, False, True]


# ---- one layer's parameters ----------------------------------------------------------------------


@pytest.mark.parametrize("gate", [None, 1.0, 0.5, 0.0])
def test_resized_gives_survivors_bit_for_bit_and_new_ranks_that_contribute_nothing(gate):
    lora = make_layer(gate=gate)
    before = {name: p.detach().clone() for name, p in lora.named_parameters()}
    new = resized_parameters(lora, torch.tensor([True, False, True]), add=2)
    assert new.keys() == before.keys() - {"base.weight", "base.bias"}
    assert torch.equal(new["lora_A"][:2], before["lora_A"][[0, 2]])
    assert torch.equal(new["lora_B"][:, :2], before["lora_B"][:, [0, 2]])
    assert new["lora_A"].shape == (4, 5)
    assert new["lora_B"].shape == (7, 4)
    assert new["lora_A"][2:].ne(0).all()
    if gate is not None:
        assert torch.equal(new["gate"][:2], before["gate"][[0, 2]])
        assert new["gate"][2:].eq(gate).all()
    added = new["lora_B"][:, 2:] if gate != 0 else new["gate"][2:]
    assert added.eq(0).all()
    for name, parameter in lora.named_parameters():
        assert torch.equal(parameter, before[name])
    lora.lora_A.requires_grad_(False)
    new = resized_parameters(lora, torch.ones(3, dtype=torch.bool), add=1)
    assert [new["lora_A"].requires_grad, new["lora_B"].requires_grad] == [False, True]


def test_resized_refuses_masks_and_ranks_that_do_not_fit():
    lora, keep = make_layer(), torch.ones(3, dtype=torch.bool)
    for mask in (keep[:2], keep.int(), torch.ones(4, dtype=torch.bool)):
        with pytest.raises(ValueError, match="keep must be bool"):
            resized_parameters(lora, mask)
    for add in (-1, 3):
        with pytest.raises(ValueError, match=f"add={add} would give rank.*at most 5"):
            resized_parameters(lora, keep, add=add)
