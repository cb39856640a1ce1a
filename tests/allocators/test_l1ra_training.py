"""L1RA's invariants at every step of trainings, over random gate patterns, across saving, and where
ranks should go."""

from __future__ import annotations

import copy
import io
import itertools
from pathlib import Path

import pytest
import torch
from helpers.models import TOKENS, delta_by_hand, wrapped, zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

import minirank.allocators.l1ra
from minirank import L1RA, lora_layers, resize, wrap

RANKS = {"body.up": 2, "body.conv": 3, "blocks.0.0": 1, "like": 4}
AXIS = {"lora_A": 0, "lora_B": 1, "gate": 0}
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.02),
    "momentum": lambda p: torch.optim.SGD(p, 0.02, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, 0.02),
    "adamw": lambda p: torch.optim.AdamW(p, 0.02, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, centered=True, momentum=0.5),
    "nadam": lambda p: torch.optim.NAdam(p, 0.02),
}
if hasattr(torch.optim, "Adafactor"):  # from torch 2.5
    OPTIMIZERS["adafactor"] = lambda p: torch.optim.Adafactor(p, 0.02)
BOUNDS = {"min_rank": {"body.up": 1, "body.conv": 1, "like": 2}, "max_rank": {"like": 5}}

# Models of random weights look like trained ones.
random_start = pytest.mark.filterwarnings("ignore:.* had been trained, with its gates")


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


def own_parameters(layer):
    return dict(layer.named_parameters(recurse=False))


def check_invariants(l1ra, model, optimizer):
    ranks = {name: layer.rank for name, layer in lora_layers(model).items()}
    assert ranks == l1ra.ranks
    costs = {
        n: (x.in_features + x.out_features if l1ra.unit == "parameters" else 1)
        for n, x in l1ra._layers.items()
    }
    spent = sum(rank * costs[name] for name, rank in ranks.items())
    assert spent <= l1ra.budget
    for name, layer in l1ra._layers.items():
        most = min(layer.in_features, layer.out_features, bound(l1ra.max_rank, name, 99))
        assert bound(l1ra.min_rank, name, 0) <= layer.rank <= most
        assert (
            layer.rank == most or spent + costs[name] > l1ra.budget
        )  # with costs of 1: the sum is the budget
        assert layer.gate.min() >= 0 if layer.rank else True
        assert layer.gate.max() <= 1 if layer.rank else True
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in trainable(model))
    assert {id(p) for p in optimizer.state} <= set(held)
    for parameter, state in optimizer.state.items():
        for entry in state.values():
            if isinstance(entry, torch.Tensor) and entry.ndim:
                assert torch.broadcast_shapes(entry.shape, parameter.shape) == parameter.shape


def bound(bounds, name, default):
    value = bounds.get(name, default) if isinstance(bounds, dict) else bounds
    return default if value is None else value


def checked(resize_itself, output, seen):
    """resize(), with the function and the optimizer's state compared across it. `seen` counts what
    was compared."""

    def wrapper(model, allocation, optimizer, **options):
        layers = lora_layers(model)
        before = copy.deepcopy(layers)
        states = {
            (n, k): copy.deepcopy(optimizer.state.get(p, {}))
            for n, x in layers.items()
            for k, p in own_parameters(x).items()
        }
        y = output(model)
        report = resize_itself(model, allocation, optimizer, **options)
        for name, keep in allocation.keep.items():
            layer, old = layers[name], before[name]
            kept, moved = int(keep.sum()), name in report
            with torch.no_grad():
                old.lora_B[:, ~keep] = (
                    0  # takes away the pruned ranks' contribution and nothing else
                )
            torch.testing.assert_close(
                layer.delta_weight(), delta_by_hand(old), rtol=1e-13, atol=1e-13
            )
            assert layer.lora_B[:, kept:].eq(0).all()
            assert layer.gate[kept:].eq(1).all()
            seen["pruned"] += layer.rank < old.rank or not keep.all()
            seen["given"] += layer.rank > kept
            for key, parameter in own_parameters(layer).items():
                axis, state = AXIS[key], optimizer.state.get(parameter, {})
                was = own_parameters(before[name])[key]
                if key != "lora_B" or keep.all():
                    indices = keep.nonzero().flatten()
                    assert torch.equal(
                        parameter.narrow(axis, 0, kept), was.index_select(axis, indices)
                    )
                assert state.keys() == states[name, key].keys()
                for entry, value in state.items():
                    previous = states[name, key][entry]
                    if not isinstance(value, torch.Tensor) or value.ndim == 0 or not moved:
                        assert (
                            value == previous
                            if not isinstance(value, torch.Tensor)
                            else torch.equal(value, previous)
                        )
                    elif value.shape[axis] == layer.rank and previous.shape[axis] == len(keep):
                        assert torch.equal(
                            value.narrow(axis, 0, kept),
                            previous.index_select(axis, indices_of(keep)),
                        )
                        assert value.narrow(axis, kept, layer.rank - kept).eq(0).all()
                        seen["moments"] += 1
                    else:
                        assert torch.equal(value, previous)  # an average over the ranks
        if all(gate.detach()[~allocation.keep[n]].eq(0).all() for n, gate in gates(before).items()):
            torch.testing.assert_close(output(model), y, rtol=1e-10, atol=1e-10)
            seen["same function"] += 1
        return report

    return wrapper


def indices_of(keep):
    return keep.nonzero().flatten()


def gates(layers):
    return {name: layer.gate for name, layer in layers.items()}


@random_start
@pytest.mark.parametrize("unit", ["ranks", "parameters"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_invariants_hold_at_every_step_of_a_training(name, unit, monkeypatch):
    _, model, _ = wrapped(ranks=RANKS, gate=1.0, trainable=["emb"])
    seen = dict.fromkeys(("pruned", "given", "moments", "same function"), 0)
    output = lambda m: m(TOKENS).detach().clone()  # noqa: E731
    monkeypatch.setattr(minirank.allocators.l1ra, "resize", checked(resize, output, seen))
    optimizer = OPTIMIZERS[name](trainable(model))
    # Any of the gates can fall at any time: the penalty is large, and the targets never rest.
    l1ra = L1RA(model, optimizer, interval=2, l1=3.0, unit=unit, **BOUNDS)
    scheduler = LambdaLR(optimizer, lambda step: 1 / (1 + step / 20))
    generator = torch.Generator().manual_seed(3)
    for _ in range(60):
        target = torch.randn(2, 3, 11, generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        (model(TOKENS) - target).square().mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        l1ra.step()
        check_invariants(l1ra, model, optimizer)
    assert len(l1ra.history.updates) == 30
    assert all(update.state_reset == () for update in l1ra.history.updates)
    assert min(seen["pruned"], seen["given"], seen["same function"]) >= 8, seen
    assert seen["moments"] >= 20 or name == "sgd", seen
    assert len({tuple(update.ranks.values()) for update in l1ra.history.updates}) >= 4


# ---- random gates ------------------------------------------------------------------------------


@st.composite
def gated_chains(draw):
    """A chain of linear layers whose weights and factors are small whole numbers, so that sums are
    exact in any order, and gates of 0, ½ or 1."""
    widths = draw(st.lists(st.integers(1, 6), min_size=2, max_size=5))
    shapes = list(itertools.pairwise(widths))
    model = nn.Sequential(*(nn.Linear(*shape) for shape in shapes)).double()
    ranks = {str(i): draw(st.integers(1, min(shape))) for i, shape in enumerate(shapes)}
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    layers = wrap(model, ranks, gate=1.0, alpha=2.0, reference_rank=1.0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randint(-3, 4, parameter.shape, generator=generator))
        for layer in layers.values():
            pattern = draw(
                st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=layer.rank, max_size=layer.rank)
            )
            layer.gate.copy_(torch.tensor(pattern))
    return model, layers, widths[0]


@random_start
@settings(max_examples=300, deadline=None)
@given(case=gated_chains(), data=st.data())
def test_random_gates_move_ranks_and_not_the_function(case, data):
    model, layers, width = case
    unit = data.draw(st.sampled_from(["ranks", "parameters"]), label="unit")
    optimizer = torch.optim.Adam(trainable(model), 1e-30)
    costs = {
        n: x.in_features + x.out_features if unit == "parameters" else 1 for n, x in layers.items()
    }
    limits = {n: min(x.in_features, x.out_features) for n, x in layers.items()}
    least, most = sum(costs.values()), sum(limits[n] * costs[n] for n in layers)
    now = sum(x.rank * costs[n] for n, x in layers.items())
    budget = data.draw(
        st.sampled_from([now, None, *range(now, most + 1)]) | st.integers(least, most),
        label="budget",
    )
    l1ra = L1RA(
        model, optimizer, interval=1, l1=0.0, gate_lr=1e-30, unit=unit, budget=budget, generator=5
    )
    x = torch.arange(-2 * width, 2 * width, dtype=torch.float64).reshape(4, width)
    model(x).square().mean().backward()
    optimizer.step()  # of 1e-30: the moments are there, the parameters stay
    for parameter in model.parameters():
        if parameter.requires_grad:
            with torch.no_grad():
                parameter.copy_((2 * parameter).round() / 2)
    old = {n: (x.rank, x.gate.detach().clone()) for n, x in layers.items()}
    zero_before = {n: int(gate.eq(0).sum()) for n, (_, gate) in old.items()}
    y = model(x).detach().clone()
    update = l1ra.step()
    check_invariants(l1ra, model, optimizer)
    only_zeros = all(zero_before[name] >= pruned for name, pruned in update.pruned.items())
    if budget is None or budget >= now:
        assert only_zeros
    if only_zeros:
        assert torch.equal(
            model(x), y
        )  # bit for bit: whole and half numbers leave nothing to rounding
    for name, layer in layers.items():
        moved = update.given.get(name, 0) - update.pruned.get(name, 0)
        assert layer.rank == update.ranks[name] == old[name][0] + moved
        assert int(layer.gate.eq(0).sum()) == (
            zero_before[name] == old[name][0]
        )  # the one that min_rank keeps
        for parameter in own_parameters(layer).values():
            assert optimizer.state[parameter]["exp_avg"].shape == parameter.shape


@random_start
def test_growing_alone_keeps_the_outputs_of_random_weights():
    """Up to rounding, that is: a matrix product over more ranks may add up in another order."""
    for seed in range(20):
        _, model, layers = wrapped(ranks=RANKS, gate=1.0)
        with torch.no_grad():
            for layer in layers.values():
                layer.gate.uniform_(0.1, 1.0, generator=torch.Generator().manual_seed(seed))
        optimizer = torch.optim.SGD(trainable(model), 0.0)
        l1ra = L1RA(model, optimizer, interval=1, l1=0.0, gate_lr=1e-30, budget=14, generator=seed)
        y = model(TOKENS)
        model(TOKENS).sum().backward()
        optimizer.step()
        update = l1ra.step()
        assert not update.pruned
        assert sum(update.given.values()) == 4
        torch.testing.assert_close(model(TOKENS), y, rtol=1e-13, atol=1e-13)


# ---- corners -----------------------------------------------------------------------------------


def corner(ranks, gate_values, **options):
    model = nn.Sequential(*(nn.Linear(5, 5) for _ in ranks))
    layers = wrap(model, {str(i): r for i, r in enumerate(ranks)}, gate=1.0)
    with torch.no_grad():
        for layer, values in zip(layers.values(), gate_values, strict=True):
            layer.gate.copy_(torch.tensor(values))
    optimizer = torch.optim.SGD(trainable(model), 0.0)
    l1ra = L1RA(model, optimizer, interval=1, l1=0.0, **options)
    model(torch.ones(2, 5)).sum().backward()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad.zero_()
    optimizer.step()
    update = l1ra.step()
    check_invariants(l1ra, model, optimizer)
    return update, layers


def test_all_gates_at_zero():
    update, layers = corner([3, 1], [[0.0] * 3, [0.0]])
    assert update.ranks == {"0": 2, "1": 2}
    assert layers["0"].gate.tolist() == [0.0, 1.0]


def test_one_module_only():
    update, layers = corner([3], [[0.0, 0.5, 0.0]])
    assert update.ranks == {"0": 3}
    assert (update.pruned, update.given) == ({"0": 2}, {"0": 2})
    assert layers["0"].gate.tolist() == [0.5, 1.0, 1.0]


def test_a_budget_of_one_rank_per_module():
    update, _ = corner([1, 1, 1], [[0.0], [1.0], [0.0]])
    assert (update.ranks, update.pruned, update.given) == (dict.fromkeys("012", 1), {}, {})


def test_no_eligible_module():
    update, _ = corner([2, 5], [[0.0, 0.7], [1.0] * 5])
    assert update.ranks == {"0": 2, "1": 5}
    assert (update.pruned, update.given) == ({"0": 1}, {"0": 1})


def test_rank_zero_is_reached_and_left_again():
    update, layers = corner([2, 2], [[0.0, 0.0], [1.0, 0.5]], min_rank=0)
    assert update.ranks == {"0": 0, "1": 4}
    update, layers = corner([2, 2], [[0.0, 0.0], [1.0, 0.5]], min_rank=0, max_rank=3)
    assert update.ranks == {"0": 1, "1": 3}
    assert layers["0"].gate.tolist() == [1.0]


# ---- saving ------------------------------------------------------------------------------------


def start(ranks=RANKS, **options):
    model = zoo()
    layers = wrap(model, RANKS, alpha=4, gate=1.0, trainable=["emb"], generator=3)
    for layer in layers.values():  # so that they fall at different times
        nn.init.uniform_(layer.gate, 0.05, 1.0, generator=torch.Generator().manual_seed(layer.rank))
    if ranks != RANKS:
        resize(model, ranks)
    optimizer = torch.optim.AdamW(trainable(model), 0.05)
    l1ra = L1RA(
        model, optimizer, **{"l1": 2.0, "interval": 3, "generator": 11, "min_rank": 0, **options}
    )
    scheduler = LambdaLR(optimizer, lambda step: 0.97**step)
    return model, layers, optimizer, scheduler, l1ra


def train(model, layers, optimizer, scheduler, l1ra, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        target = torch.randn(2, 3, 11, generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        (model(TOKENS) - target).square().mean().backward()
        optimizer.step()
        scheduler.step()
        l1ra.step()


@pytest.mark.parametrize("cut", [7, 9, 20])
def test_a_saved_training_goes_on_bit_for_bit(cut):
    whole = start()
    train(*whole, range(30))
    first = start()
    train(*first, range(cut))
    file = io.BytesIO()
    torch.save([x.state_dict() for x in (first[0], *first[2:])], file)
    file.seek(0)
    states = torch.load(file, weights_only=True)
    ranks = states[-1]["ranks"]
    assert ranks != RANKS
    second = start(ranks, l1=0.5, interval=99, generator=0)  # the saved options count
    for x, state in zip((second[0], *second[2:]), states, strict=True):
        x.load_state_dict(state)
    train(*second, range(cut, 30))
    assert second[-1].history == whole[-1].history
    assert second[-1].steps == 30
    assert len({tuple(u.ranks.values()) for u in whole[-1].history.updates}) > 3
    for ours, theirs in zip(flat(second), flat(whole), strict=True):
        assert type(ours) is type(theirs)
        assert torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs


def flat(run):
    """Every number in the states of a run."""

    def walk(value):
        if isinstance(value, dict):
            for key in value:
                yield from walk(value[key])
        elif isinstance(value, list | tuple):
            for item in value:
                yield from walk(item)
        elif not callable(value):
            yield value

    for x in (run[0], *run[2:]):
        yield from walk(x.state_dict())


def test_a_state_may_have_been_loaded_onto_an_accelerator():
    """torch.load(map_location="cuda") moves every tensor, but generators take their state from the
    CPU only."""

    class Elsewhere:
        def __init__(self, tensor):
            self.cpu = tensor.clone

    state, fresh = start(generator=5)[-1].state_dict(), start()[-1]
    assert not torch.equal(fresh.generator.get_state(), state["generator"])
    fresh.load_state_dict({**state, "generator": Elsewhere(state["generator"])})
    assert torch.equal(fresh.generator.get_state(), state["generator"])


def test_a_state_of_version_0_1_says_rank_for_ranks():
    state = start()[-1].state_dict()
    state["options"]["unit"] = "rank"
    fresh = start()[-1]
    fresh.load_state_dict(state)
    assert fresh.unit == "ranks"
    assert state["options"]["unit"] == "rank"  # the caller's own


def test_a_state_between_the_optimizers_step_and_ours_is_complete():
    runs = []
    for saves in (False, True):
        model, _, optimizer, _, l1ra = run = start(interval=1)
        train(*run, range(2))
        model(TOKENS).sum().backward()
        optimizer.step()
        if saves:
            state = copy.deepcopy(l1ra.state_dict())
            l1ra.step()  # goes another way, and comes back
            resize(model, state["ranks"], optimizer)
            l1ra.load_state_dict(state)
            assert l1ra.step() is not None
        else:
            l1ra.step()
        runs.append((l1ra.steps, len(l1ra.history.updates)))
    assert runs == [(3, 3), (3, 3)]


def test_states_that_do_not_fit_are_refused_and_change_nothing():
    run = start()
    train(*run, range(20))
    l1ra, fresh = run[-1], start()[-1]
    assert l1ra.ranks != fresh.ranks
    before = fresh.state_dict()
    bad_options = {**l1ra.state_dict(), "options": {"l1": 1.0}}
    for state, message in (
        (l1ra.state_dict(), "resize"),
        ({"ranks": {}}, "expected"),
        (bad_options, "expected"),
    ):
        with pytest.raises(ValueError, match=message):
            fresh.load_state_dict(state)
    after = fresh.state_dict()
    assert torch.equal(before.pop("generator"), after.pop("generator"))
    assert before == after


# ---- where ranks should go ---------------------------------------------------------------------


def test_ranks_go_where_they_are_needed(monkeypatch):
    """Three layers that need 1, 6 and 2 ranks start with 3 each. All ten seeds of the example find
    them."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples"))
    import l1ra_planted

    for seed, shrinkage in ((0, "proximal"), (1, "proximal"), (2, "subgradient")):
        l1ra, error = l1ra_planted.train(seed, shrinkage=shrinkage)
        assert tuple(l1ra.ranks.values()) == (1, 6, 2)
        assert error < 0.05
    l1ra, error = l1ra_planted.train(0, l1=0.0, steps=500)  # without a penalty nothing moves
    assert tuple(l1ra.ranks.values()) == (3, 3, 3)
    assert error > 1
