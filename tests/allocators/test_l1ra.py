"""L1RA's step(): when it shrinks, when it updates, whose learning rate is constant, and what is
refused."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from helpers.models import TOKENS, assert_unchanged, snapshot, wrapped
from torch import nn
from torch.optim import lr_scheduler

from minirank import L1RA, lora_layers, merge, reference, resize, wrap
from minirank.allocators.gates import shrink

RANKS = {"body.up": 2, "body.conv": 3, "blocks.0.0": 1, "like": 4}


def gated(ranks=RANKS, **options):
    """The zoo with gates of 1 and trained factors."""
    _, model, layers = wrapped(ranks=ranks, gate=1.0, **options)
    set_gates(layers, {name: [1.0] * layer.rank for name, layer in layers.items()})
    return model, layers


def set_gates(layers, values):
    with torch.no_grad():
        for name, gates in values.items():
            layers[name].gate.copy_(torch.tensor(gates))


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


def made(optimizer=torch.optim.Adam, ranks=RANKS, **options):
    model, layers = gated(ranks)
    optimizer = optimizer(trainable(model), lr=0.01)
    return model, layers, optimizer, L1RA(model, optimizer, **{"interval": 1000, **options})


def backward(model, optimizer, factor=1.0):
    optimizer.zero_grad()
    (model(TOKENS).square().mean() * factor).backward()


def train_step(model, optimizer, l1ra):
    backward(model, optimizer)
    optimizer.step()
    return l1ra.step()


def still_step(model, optimizer, l1ra):
    """A step with zero gradients: what changes is L1RA's work."""
    backward(model, optimizer, 0.0)
    optimizer.step()
    return l1ra.step()


def gates_of(layers):
    return {name: layer.gate.detach().clone() for name, layer in layers.items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- shrinking ---------------------------------------------------------------------------------


def test_the_proximal_step_minimises_its_objective():
    """clamp(c - t, 0, 1) is the minimiser of ½(z - c)² + t |z| over [0, 1]: found again on a fine
    grid."""
    c = torch.linspace(-0.5, 1.5, 41, dtype=torch.float64)
    z = torch.linspace(0, 1, 2001, dtype=torch.float64)
    for t in (0.0, 0.05, 0.3, 2.0):
        gates = [c.clone()]
        shrink(gates, t)
        assert torch.equal(gates[0], reference.l1ra_shrink([c], t)[0])
        objective = 0.5 * (z - c[:, None]) ** 2 + t * z.abs()
        torch.testing.assert_close(gates[0], z[objective.argmin(1)], rtol=0, atol=3e-4)


def test_the_authors_step_has_a_dead_zone():
    gates = [torch.tensor([0.5, 0.1, 0.11, 0.05, 0.0, -0.05, -0.5, 1.3, 1.05]), torch.empty(0)]
    shrink(gates, 0.1, "subgradient")
    torch.testing.assert_close(
        gates[0], torch.tensor([0.4, 0.1, 0.01, 0.05, 0.0, 0.0, 0.0, 1.0, 0.95])
    )


@pytest.mark.parametrize("shrinkage", ["proximal", "subgradient"])
def test_a_step_shrinks_what_the_optimizer_left(shrinkage):
    model, layers, optimizer, l1ra = made(l1=1.5, shrinkage=shrinkage)
    set_gates(layers, {"body.conv": [0.5, 0.029, 0.01]})
    backward(model, optimizer)
    optimizer.step()
    expected = gates_of(layers)
    assert not torch.equal(
        expected["body.conv"], torch.tensor([0.5, 0.029, 0.01], dtype=torch.float64)
    )
    for gate in expected.values():
        shrink([gate], 0.02 * 1.5, shrinkage)
    l1ra.step()
    assert equal(expected, gates_of(layers))


def test_a_layer_that_is_frozen_for_a_time_keeps_its_function():
    model, layers, optimizer, l1ra = made(interval=2, l1=20.0)
    frozen = layers["body.conv"].requires_grad_(False)
    before = frozen.delta_weight()
    for _ in range(4):
        train_step(model, optimizer, l1ra)
    assert [update.pruned for update in l1ra.history.updates] == [{}, {"body.up": 1, "like": 3}]
    assert torch.equal(frozen.delta_weight(), before)
    frozen.requires_grad_(True)
    train_step(model, optimizer, l1ra)
    assert frozen.gate.max() < 1
    for layer in layers.values():
        layer.gate.requires_grad_(False)
    expected = frozen.gate.tolist()
    train_step(model, optimizer, l1ra)
    assert frozen.gate.tolist()[: len(expected)] == expected


def test_gates_never_leave_0_to_1_after_a_step():
    model, layers, optimizer, l1ra = made(l1=0.0, gate_lr=0.3)
    for _ in range(10):
        train_step(model, optimizer, l1ra)
        assert all(gate.min() >= 0 and gate.max() <= 1 for gate in gates_of(layers).values())


def test_without_an_optimizer_step_nothing_happens():
    model, layers, optimizer, l1ra = made(interval=1, l1=1.0)
    before = snapshot(model)
    for _ in range(3):
        assert l1ra.step() is None
    assert_unchanged(model, before)
    assert l1ra.steps == 0
    assert not l1ra.history.updates
    train_step(model, optimizer, l1ra)
    assert l1ra.steps == 1
    after = gates_of(layers)
    assert l1ra.step() is None
    assert equal(after, gates_of(layers))


def test_gradient_accumulation_counts_optimizer_steps():
    model, _, optimizer, l1ra = made(interval=3)
    updates = []
    for micro in range(1, 25):
        (model(TOKENS).square().mean() / 4).backward()
        if micro % 4 == 0:
            optimizer.step()
            optimizer.zero_grad()
        if l1ra.step():
            updates.append(micro)
    assert l1ra.steps == 6
    assert updates == [12, 24]


@pytest.mark.parametrize(("stop", "shrinkages"), [(None, 7), (5, 5), (6, 6), (99, 7)])
def test_several_optimizer_steps_before_one_step_count_each(stop, shrinkages):
    model, layers, optimizer, l1ra = made(torch.optim.SGD, interval=5, l1=1.0, stop=stop)
    for _ in range(7):
        backward(model, optimizer, 0.0)
        optimizer.step()
    assert l1ra.step() is not None  # the interval's end is among them
    assert l1ra.steps == 7
    for gate in gates_of(layers).values():
        torch.testing.assert_close(
            gate, torch.full_like(gate, 1 - shrinkages * 0.02), rtol=1e-12, atol=0
        )


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_a_grad_scaler_skips_shrinks_nothing(fused):
    """Fused optimizers are called even then, and skip inside."""
    model, layers = gated(ranks={"body.up": 2, "like": 4})
    model.float()
    optimizer = torch.optim.AdamW(trainable(model), 0.01, fused=fused)
    l1ra = L1RA(model, optimizer, interval=2, l1=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    updates = []
    for step in range(6):
        overflows = step in (1, 4)
        before = gates_of(layers)
        optimizer.zero_grad()
        scaler.scale(
            model(TOKENS).square().mean() * (float("inf") if overflows else 1.0)
        ).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        updates.append(l1ra.step() is not None)
        scaler.update()
        assert equal(before, gates_of(layers)) is overflows
    assert l1ra.steps == 4
    assert updates == [False, False, True, False, False, True]


# ---- when ranks move ---------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:3 updates in a row pruned no rank:UserWarning")
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"interval": 1}, list(range(1, 13))),
        ({"interval": 5}, [5, 10]),
        ({"interval": 3, "start": 6}, [6, 9, 12]),
        ({"interval": 3, "start": 7, "stop": 9}, [9]),
        ({"interval": 4, "stop": 8}, [4, 8]),
        ({"interval": 4, "stop": 0}, []),
        ({"interval": 13}, []),
    ],
)
def test_updates_come_at_every_interval_inside_the_window(options, expected):
    model, layers, optimizer, l1ra = made(torch.optim.SGD, l1=0.1, **options)
    steps = [step for step in range(1, 13) if still_step(model, optimizer, l1ra)]
    assert steps == expected == [update.step for update in l1ra.history.updates]
    for gate in gates_of(
        layers
    ).values():  # which shrink from the beginning to the last possible update
        expected = 1 - min(12, options.get("stop", 12)) * 0.002
        torch.testing.assert_close(gate, torch.full_like(gate, expected), rtol=1e-12, atol=0)


def test_an_update_prunes_reassigns_and_records():
    model, layers, optimizer, l1ra = made(torch.optim.SGD, interval=1, l1=0.0)
    set_gates(
        layers, {"body.up": [0.9, 0.8], "body.conv": [0.0, 0.5, 0.0], "like": [1.0, 0.7, 0.9, 0.9]}
    )
    set_gates(layers, {"blocks.0.0": [0.75]})
    update = still_step(model, optimizer, l1ra)
    assert update.ranks == l1ra.ranks == {"body.up": 3, "body.conv": 1, "blocks.0.0": 2, "like": 4}
    assert update.pruned == {"body.conv": 2}
    assert update.given == {"body.up": 1, "blocks.0.0": 1}
    assert update.total_rank == 10
    assert update.parameters == 3 * 14 + 1 * 14 + 2 * 12 + 4 * 12
    assert l1ra.history.updates == [update]
    assert l1ra.history.initial == RANKS
    assert layers["body.up"].gate.tolist() == pytest.approx([0.9, 0.8, 1.0])
    assert layers["body.conv"].gate.tolist() == [0.5]
    assert layers["body.up"].lora_B[:, 2].eq(0).all()


def test_an_l1_that_moves_nothing_is_named_once():
    model, _, optimizer, l1ra = made(interval=1, l1=1e-3)
    for step in range(1, 6):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            still_step(model, optimizer, l1ra)
        messages = [(w.category, str(w.message), w.filename) for w in caught]
        if step == 3:
            ((category, message, filename),) = messages
            assert (category, filename) == (UserWarning, __file__)
            assert "3 updates in a row pruned no rank" in message
            assert "l1=0.001 and gate_lr=0.02, the penalty alone takes 50,000 steps" in message
        else:
            assert messages == []


@pytest.mark.parametrize(
    ("case", "l1"),
    [
        ("no penalty", 0.0),
        ("20 intervals are enough", 2.5),  # 20 · 0.02 · 2.5 = 1
        ("a gate at 0.9", 1e-3),
        ("a rank was pruned", 1e-3),
        ("frozen gates", 1e-3),
    ],
)
def test_an_l1_that_may_still_move_ranks_is_not_named(case, l1):
    model, layers, optimizer, l1ra = made(interval=1, l1=l1)
    for step in range(4):  # filterwarnings = error
        if case == "20 intervals are enough":
            for layer in layers.values():
                layer.gate.data.fill_(1.0)  # as if training pushed them back up
        if case == "a gate at 0.9":
            layers["body.up"].gate.data[0] = 0.9
        if case == "a rank was pruned" and step == 1:
            layers["body.up"].gate.data[0] = 0.0
        if case == "frozen gates":
            for layer in layers.values():
                layer.gate.requires_grad_(False)
        still_step(model, optimizer, l1ra)
    assert len(l1ra.history.updates) == 4


def test_the_threshold_decides_what_falls():
    values = {"body.conv": [0.0, 0.004, 0.05]}
    for options, kept in (
        ({}, [0.004, 0.05]),
        ({"threshold": 0.01}, [0.05]),
        (
            {"shrinkage": "subgradient", "gate_lr": 0.02, "l1": 0.25},
            [0.045],
        ),  # its dead zone ends at 0.005
        (
            {"shrinkage": "subgradient", "gate_lr": 0.02, "l1": 0.25, "threshold": 0.0},
            [0.004, 0.045],
        ),
    ):
        model, layers, optimizer, l1ra = made(torch.optim.SGD, interval=1, **{"l1": 0.0, **options})
        set_gates(layers, values)
        still_step(model, optimizer, l1ra)
        assert layers["body.conv"].gate.tolist()[: len(kept)] == pytest.approx(kept)
        assert len(layers["body.conv"].gate) == len(kept)


def test_bounds_hold_and_a_budget_is_reached_by_the_first_update():
    options = {"interval": 1, "l1": 0.0}
    bounds = {"min_rank": 2, "max_rank": {"body.conv": 3, "like": 5}}
    model, _, optimizer, l1ra = made(torch.optim.SGD, **options, **bounds, budget=14)
    # "blocks.0.0" is lifted to 2; the other three go to "body.up", "blocks.0.0" and "like", whose
    # gates are equal.
    assert still_step(model, optimizer, l1ra).ranks == {
        "body.up": 3,
        "body.conv": 3,
        "blocks.0.0": 3,
        "like": 5,
    }
    l1ra.budget = 9
    assert sum(still_step(model, optimizer, l1ra).ranks.values()) == 9
    model, _, optimizer, l1ra = made(
        torch.optim.SGD, **options, budget=100, unit="parameters", min_rank=0
    )
    update = still_step(model, optimizer, l1ra)
    assert 100 - 12 < update.parameters <= 100


def test_resetting_the_optimizer_forgets_everything_at_updates_only():
    model, layers, optimizer, l1ra = made(interval=3, reset_optimizer=True)
    for step in range(1, 7):
        train_step(model, optimizer, l1ra)
        assert bool(optimizer.state) is (step % 3 != 0)
    assert optimizer.param_groups[0]["params"][0] is layers["body.up"].lora_A


def test_manual_use_scores_allocates_resizes_and_training_goes_on():
    model, layers, optimizer, l1ra = made(interval=2)
    train_step(model, optimizer, l1ra)
    scores = l1ra.score()
    assert equal(scores, gates_of(layers))
    before = snapshot(model)
    for budget in (4, 7, 10, 13):
        allocation = l1ra.allocate(budget, min_rank=1)
        assert allocation.total_rank == budget
        assert {name: len(mask) for name, mask in allocation.keep.items()} == RANKS
    assert_unchanged(model, before)
    resize(model, allocation, optimizer)
    with pytest.raises(RuntimeError, match="stale"):
        l1ra.allocate(10)
    assert sum(train_step(model, optimizer, l1ra).ranks.values()) == 10  # the object's own budget
    train_step(model, optimizer, l1ra)


def test_allocate_and_updates_have_the_same_lower_bound():
    model, layers, optimizer, l1ra = made(torch.optim.SGD, interval=1, l1=0.0)
    set_gates(layers, {"body.up": [0.0, 0.0]})
    l1ra.score()
    planned = l1ra.allocate(10)
    assert planned.ranks["body.up"] == 1
    assert still_step(model, optimizer, l1ra).ranks == planned.ranks
    l1ra.score()
    with pytest.raises(ValueError, match="below the 4 that min_rank takes"):
        l1ra.allocate(3)
    assert l1ra.allocate(3, min_rank=0).total_rank == 3


def test_updates_and_scores_do_not_touch_each_other():
    model, layers, optimizer, l1ra = made(torch.optim.SGD, interval=1, l1=0.0)
    with pytest.raises(RuntimeError, match="call score"):
        l1ra.allocate(10)  # the constructor's check left no scores behind
    l1ra.score()
    scored = l1ra.allocate(8)
    set_gates(layers, {"like": [0.9, 0.2, 0.3, 0.4]})
    assert not still_step(model, optimizer, l1ra).pruned
    assert l1ra.allocate(8) == scored  # of the gates when they were scored
    l1ra.score()
    assert l1ra.allocate(8) != scored
    set_gates(layers, {"like": [0.9, 0.0, 0.3, 0.4]})
    assert still_step(model, optimizer, l1ra).pruned == {"like": 1}
    with pytest.raises(RuntimeError, match=r"the scores are stale: 'body\.up' was resized"):
        l1ra.allocate(8)


def test_a_merged_model_is_not_moved():
    model, _, optimizer, l1ra = made(interval=1)
    backward(model, optimizer)
    optimizer.step()
    merge(model, untie=True)
    with pytest.raises(ValueError, match="unmerge"):
        l1ra.step()


def test_gates_that_are_not_finite_are_named():
    model, layers, optimizer, l1ra = made(torch.optim.SGD, interval=1)
    backward(model, optimizer, 0.0)
    optimizer.step()
    set_gates(layers, {"like": [1.0, float("nan"), 1.0, 1.0]})
    ranks = l1ra.ranks
    with pytest.raises(ValueError, match=r"rank 1 of like.*nan"):
        l1ra.step()
    assert l1ra.ranks == ranks


# ---- the gates' parameter group ----------------------------------------------------------------


def test_gates_move_into_a_group_of_their_own_with_the_options_of_the_old_one():
    model, layers = gated()
    others = [layer.lora_A for layer in layers.values()]
    ids = {id(p) for p in others}
    rest = [p for p in trainable(model) if id(p) not in ids]
    optimizer = torch.optim.AdamW(
        [{"params": others}, {"params": rest, "betas": (0.5, 0.6), "weight_decay": 0.3}]
    )
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    L1RA(model, optimizer, interval=5, gate_lr=0.07)
    *old, own = optimizer.param_groups
    assert [id(p) for p in own["params"]] == [id(layer.gate) for layer in layers.values()]
    assert (own["lr"], own["weight_decay"], own["betas"]) == (0.07, 0.0, (0.5, 0.6))
    assert [group["weight_decay"] for group in old] == [0.01, 0.3]
    assert [len(group["params"]) for group in optimizer.param_groups] == [4, 4, 4]
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == held


def test_parameter_names_follow_the_gates():
    model, _ = gated()
    try:
        optimizer = torch.optim.AdamW(
            [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        )
    except TypeError:
        pytest.skip("optimizers take names from torch 2.6 on")
    l1ra = L1RA(model, optimizer, interval=1)
    train_step(model, optimizer, l1ra)
    names = {id(p): n for n, p in model.named_parameters()}
    for group in optimizer.param_groups:
        assert group["param_names"] == [names[id(p)] for p in group["params"]]


def test_a_group_that_the_user_made_is_checked():
    model, layers = gated()
    gates = [layer.gate for layer in layers.values()]
    ids = {id(gate) for gate in gates}
    others = [p for p in trainable(model) if id(p) not in ids]
    for options, message in (
        ({"lr": 0.02}, "weight_decay=0.5"),
        ({"lr": 0.03, "weight_decay": 0.0}, "lr=0.03"),
    ):
        optimizer = torch.optim.AdamW(
            [{"params": gates, **options}, {"params": others}], weight_decay=0.5
        )
        before = [dict(group) for group in optimizer.param_groups]
        with pytest.raises(ValueError, match=message):
            L1RA(model, optimizer, interval=5)
        assert [dict(group) for group in optimizer.param_groups] == before
    good = torch.optim.AdamW(
        [{"params": gates, "lr": 0.02, "weight_decay": 0.0}, {"params": others}]
    )
    scheduler = lr_scheduler.LambdaLR(
        good, lambda step: 0.1
    )  # made before, with the right number of groups
    before = [dict(group, params=list(group["params"])) for group in good.param_groups]
    l1ra = L1RA(model, good, interval=5)
    assert [dict(group, params=list(group["params"])) for group in good.param_groups] == before
    train_step(model, good, l1ra)
    scheduler.step()


SCHEDULERS = {
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.5**step),
    "exponential": lambda o: lr_scheduler.ExponentialLR(o, 0.5),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=9),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=4),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, threshold=10.0),
    "warm-up and decay": lambda o: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.ExponentialLR(o, 0.9)],
        milestones=[3],
    ),
}


@pytest.mark.filterwarnings(
    "ignore:The epoch parameter in:UserWarning"
)  # from inside torch 2.4's SequentialLR
@pytest.mark.parametrize("scheduler_first", [True, False])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_no_scheduler_changes_the_gates_learning_rate(name, scheduler_first):
    model, _, optimizer, l1ra = made(torch.optim.AdamW, interval=3)
    scheduler = SCHEDULERS[name](optimizer)
    used = []
    optimizer.register_step_pre_hook(
        lambda o, *_: used.append([group["lr"] for group in o.param_groups])
    )
    for _ in range(8):
        backward(model, optimizer)
        optimizer.step()
        if not scheduler_first:
            l1ra.step()
        scheduler.step(*([1.0] if name == "plateau" else []))
        if scheduler_first:
            l1ra.step()
    assert {rates[1] for rates in used} == {0.02}
    assert len({rates[0] for rates in used}) > 2  # the others' did change
    assert len(l1ra.history.updates) == 2


def test_a_scheduler_made_before_is_refused():
    model, _ = gated()
    optimizer = torch.optim.Adam(trainable(model), 0.01)
    lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    before = [list(map(id, group["params"])) for group in optimizer.param_groups]
    with pytest.raises(ValueError, match="before the scheduler"):
        L1RA(model, optimizer, interval=5)
    assert [list(map(id, group["params"])) for group in optimizer.param_groups] == before


# ---- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"interval": 0}, "interval"),
        ({"interval": True}, "interval"),
        ({"interval": 2.0}, "interval"),
        ({"l1": -1e-3}, "l1"),
        ({"l1": float("nan")}, "l1"),
        ({"gate_lr": 0.0}, "gate_lr"),
        ({"start": -1}, "start"),
        ({"start": 5, "stop": 4}, "stop"),
        ({"threshold": 1.0}, "threshold"),
        ({"threshold": -0.1}, "threshold"),
        ({"shrinkage": "lasso"}, "shrinkage"),
        ({"unit": "rank"}, "unit"),
        ({"budget": 3}, "below the 4 that min_rank"),
        ({"budget": 99}, "above"),
        ({"max_rank": 2}, "above"),
        ({"min_rank": {"nope": 1}}, "nope"),
    ],
)
def test_bad_options_are_refused_before_anything_changes(options, message):
    model, _ = gated()
    optimizer = torch.optim.Adam(trainable(model), 0.01)
    before, groups = (
        snapshot(model),
        [list(map(id, group["params"])) for group in optimizer.param_groups],
    )
    with pytest.raises(ValueError, match=message):
        L1RA(model, optimizer, **{"interval": 5, **options})
    assert_unchanged(model, before)
    assert [list(map(id, group["params"])) for group in optimizer.param_groups] == groups
    assert not optimizer._optimizer_step_post_hooks


def test_models_and_optimizers_it_cannot_work_with():
    ungated = nn.Sequential(nn.Linear(4, 4))
    wrap(ungated, {"0": 2})
    with pytest.raises(ValueError, match=r"no gated LoRA layer: wrap"):
        L1RA(ungated, torch.optim.Adam(trainable(ungated)), interval=5)
    from_zero = nn.Sequential(nn.Linear(4, 4))
    wrap(from_zero, {"0": 2}, gate=0.0)
    with pytest.raises(ValueError, match="start from 0"):
        L1RA(from_zero, torch.optim.Adam(trainable(from_zero)), interval=5)
    model, layers = gated()
    with pytest.raises(ValueError, match=r"does not hold the gate of 'body\.up'"):
        L1RA(model, torch.optim.Adam([layers["like"].gate]), interval=5)
    with pytest.raises(TypeError, match="LBFGS"):
        L1RA(model, torch.optim.LBFGS(trainable(model)), interval=5)
    layers["like"].gate.requires_grad_(False)
    with pytest.raises(ValueError, match="'like' does not train"):
        L1RA(model, torch.optim.Adam(trainable(model)), interval=5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_type_in_which_gates_cannot_shrink_is_refused(dtype):
    model = nn.Sequential(nn.Linear(4, 4, dtype=dtype))
    layer = wrap(model, {"0": 2}, gate=1.0)["0"]
    optimizer = torch.optim.SGD(trainable(model), 0.01)
    with pytest.raises(ValueError, match=r"dtype=torch\.float32"):
        L1RA(model, optimizer, interval=5)
    smallest = torch.finfo(dtype).eps / 4
    for l1, moves in ((0.9 * smallest, False), (1.1 * smallest, True)):  # what the limit rests on
        gate = layer.gate.detach().clone()
        shrink([gate], l1)
        assert bool(gate.lt(1).all()) is moves
    L1RA(model, optimizer, interval=5, l1=0.0)
    L1RA(nn.Sequential(model), torch.optim.SGD(trainable(model), 0.01), interval=5, l1=0.5)


def test_layers_without_gates_are_left_alone():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    wrap(model, {"0": 2}, gate=1.0)
    wrap(model, {"1": 3})
    optimizer = torch.optim.Adam(trainable(model), 0.01)
    l1ra = L1RA(model, optimizer, interval=1)
    assert l1ra.budget == 2
    optimizer.step()
    l1ra.step()
    assert {name: layer.rank for name, layer in lora_layers(model).items()} == {"0": 2, "1": 3}


# ---- copies ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"]
)
def test_copies_of_model_optimizer_and_l1ra_go_on_alike(clone):
    original = made(interval=3, l1=2.0, generator=7)
    for _ in range(4):
        train_step(original[0], *original[2:])
    twin = clone(original)
    for _ in range(8):
        for model, _, optimizer, l1ra in (original, twin):
            train_step(model, optimizer, l1ra)
    assert original[3].history == twin[3].history
    assert len(twin[3].history.updates) == 4
    ours, theirs = original[0].state_dict(), twin[0].state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
