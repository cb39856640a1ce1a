"""ShapLoRA in use: what score() leaves alone, the two stages, and what is refused."""

from __future__ import annotations

import copy
import math
import sys

import pytest
import torch
from helpers.models import assert_unchanged, snapshot
from helpers.shaplora_cases import RANKS, Net, data, flat, loss_fn, scored, trained
from helpers.terminal import Terminal

from minirank import ShapLoRA, UniformRanks, merge, wrap

# ---- nothing changes ----------------------------------------------------------------------------


def test_score_leaves_everything_as_it_was():
    model = trained().train()
    model.drop.eval()
    model.norm.weight.requires_grad_(False)
    loss_fn(model, data()[0]).backward()  # gradients from before are kept
    before, state = snapshot(model), torch.get_rng_state()
    scored(model, coalitions=18)
    assert_unchanged(model, before)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("call", [1, 2, 5, 20])
def test_everything_is_restored_after_an_exception(call):
    calls = []

    def failing(model, batch):
        calls.append(1)
        if len(calls) == call:
            raise OSError("the disk is on fire")
        return loss_fn(model, batch)

    model = trained().train()
    before, state = snapshot(model), torch.get_rng_state()
    allocator = ShapLoRA(model, failing, data(), coalitions=18, progress=False)
    with pytest.raises(OSError, match="on fire"):
        allocator.score()
    assert_unchanged(model, before)
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(RuntimeError, match="call score"):
        allocator.allocate(3)


def test_only_the_adapters_take_gradients_inside():
    seen = []

    def looking(model, batch):
        seen.append({name for name, p in model.named_parameters() if p.requires_grad})
        return loss_fn(model, batch)

    model = trained()
    model.norm.requires_grad_(True)
    scored(model, loss=looking, coalitions=18)
    assert set.union(*seen) == {
        f"{name}.{part}" for name in RANKS for part in ("lora_A", "lora_B", "gate")
    }


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_scoring_works_where_gradients_are_off(context):
    expected, _ = scored(coalitions=18)
    model, batches = trained(), data()
    with context():
        scores, _ = scored(model, batches, coalitions=18)
    assert torch.equal(flat(scores), flat(expected))


def test_scores_do_not_alias_the_allocators_own():
    scores, allocator = scored(coalitions=18)
    expected = allocator.allocate(4).ranks
    for score in scores.values():
        score.zero_()
    assert allocator.allocate(4).ranks == expected


# ---- two stages --------------------------------------------------------------------------------


def two_stages(first_stage):
    """The workflow as the README has it; `first_stage` trains the trial copy in its own way. None:
    no first stage."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Net().double()
    if first_stage is not None:
        trial = copy.deepcopy(model)
        wrap(trial, RANKS, gate=0.0)
        first_stage(trial)
        shaplora = ShapLoRA(trial, loss_fn, data((5,), seed=9), coalitions=18, progress=False)
        shaplora.score()
        shaplora.allocate(4)
    wrap(model, {"up": 1, "mid": 2, "down": 1})  # the same ranks, whatever the first stage found
    train(model, steps=5, lr=0.1)
    return model


def train(model, steps, lr):
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=lr)
    model.train()
    for _ in range(steps):
        for batch in data((4, 6)):
            optimizer.zero_grad()
            loss_fn(model, batch).backward()
            optimizer.step()


def test_nothing_of_stage_one_leaks_into_stage_two():
    def first_stage(steps, lr):
        def train_with_its_own_randomness(trial):
            with torch.random.fork_rng():  # dropout draws from the global generator
                train(trial, steps, lr)

        return train_with_its_own_randomness

    results = []
    for stage_one in (None, first_stage(2, 0.01), first_stage(9, 0.5)):
        torch.manual_seed(3)
        results.append(
            {name: value.clone() for name, value in two_stages(stage_one).state_dict().items()}
        )
    for other in results[1:]:
        assert other.keys() == results[0].keys()
        for name, value in other.items():
            assert torch.equal(value, results[0][name]), name


# ---- errors ------------------------------------------------------------------------------------


def ungated():
    model = trained()
    wrap(model := Net().double(), RANKS)
    return model


def frozen():
    model = trained()
    model.mid.lora_A.requires_grad_(False)
    return model


def merged():
    model = trained()
    merge(model)
    return model


def switched_off():
    model = trained()
    model.up.enabled = False
    return model


def partly_gated():
    model = trained(ranks={"up": 3})
    wrap(model, {"mid": 2})
    return model


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (Net, "no LoRA layer with ranks to score: wrap"),
        (ungated, "'up' has no gates"),
        (partly_gated, "'mid' has no gates"),
        (frozen, "the adapter of 'mid' is frozen: requires_grad_"),
        (merged, "'up' is merged: unmerge"),
        (switched_off, "'up' is disabled"),
    ],
)
def test_a_model_that_cannot_be_scored_is_refused_at_once(make, match):
    model = make()
    before = snapshot(model)
    with pytest.raises(ValueError, match=match):
        ShapLoRA(model, loss_fn, data())
    assert_unchanged(model, before)


@pytest.mark.parametrize("importance", ["sensitivity", "magnitude"])
def test_an_untrained_model_is_told_so(importance):
    model = Net().double()
    wrap(model, RANKS, gate=0.0)
    allocator = ShapLoRA(model, loss_fn, data(), importance=importance, progress=False)
    with pytest.raises(ValueError, match=r"every gate is zero.*: train the model first"):
        allocator.score()


@pytest.mark.parametrize("coalitions", [0, 18])
def test_an_untrained_model_with_gates_of_one_is_told_so(coalitions):
    """B is zero, and every product of a parameter with its gradient too."""
    model = Net().double()
    wrap(model, RANKS, gate=1.0)
    before = snapshot(model)
    allocator = ShapLoRA(model, loss_fn, data(), coalitions=coalitions, progress=False)
    with pytest.raises(ValueError, match=r"every rank is exactly zero.*: train the model first"):
        allocator.score()
    with pytest.raises(RuntimeError, match="call score"):
        allocator.allocate(3)
    assert_unchanged(model, before)


def test_one_trained_gate_is_enough():
    model = Net().double()
    layers = wrap(model, RANKS, gate=0.0)
    layers["mid"].gate.data[1] = 0.3
    scores, allocator = scored(model, coalitions=18)
    assert flat(scores).nonzero().flatten().tolist() == [4]
    assert allocator.allocate(1).ranks == {"up": 0, "mid": 1, "down": 0}


def test_frozen_after_it_was_made():
    model = trained()
    allocator = ShapLoRA(model, loss_fn, data(), progress=False)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="is frozen"):
        allocator.score()


@pytest.mark.parametrize(
    ("option", "error", "match"),
    [
        ({"coalitions": 20}, ValueError, "coalitions must be a multiple of 18"),
        ({"coalitions": -18}, ValueError, "coalitions must be an integer of at least 18"),
        ({"coalitions": None}, ValueError, "coalitions must be"),
        (
            {"importance": "hessian"},
            ValueError,
            r"importance must be one of \('sensitivity', 'magnitude'\)",
        ),
        ({"loss_fn": "mse"}, TypeError, "loss_fn must be a function, got str"),
        ({"batch_weight": 3}, TypeError, "batch_weight must be a function, got int"),
        (
            {"batches": 3},
            TypeError,
            "batches must be an iterable of what loss_fn takes, got one int",
        ),
        (
            {"batches": {"x": 3}},
            TypeError,
            r"what loss_fn takes, got one dict: put a single batch in a list, \[batch\]",
        ),
    ],
)
def test_wrong_arguments_are_told_at_once(option, error, match):
    with pytest.raises(error, match=match):
        ShapLoRA(trained(), **{"loss_fn": loss_fn, "batches": data(), **option})


OTHER = trained().eval()  # whose own parameters give the loss a graph


@pytest.mark.parametrize(
    ("option", "match"),
    [
        ({"batches": []}, "batches is empty"),
        ({"batches": iter(())}, "a generator that was used up"),
        ({"batch_weight": lambda batch: 0}, "weigh nothing"),
        (
            {"batch_weight": lambda batch: -1.0},
            r"batch_weight\(batch\) must be a finite number of at least 0, got -1.0",
        ),
        ({"batch_weight": lambda batch: math.nan}, r"batch_weight\(batch\) must be"),
        ({"batch_weight": lambda batch: math.inf}, r"batch_weight\(batch\) must be"),
        (
            {"loss": lambda model, batch: loss_fn(model, batch).detach()},
            "the loss depends on no adapter",
        ),
        (
            {"loss": lambda model, batch: (model(batch[0]) - batch[1]).square()},
            "must return a scalar",
        ),
        ({"loss": lambda model, batch: loss_fn(model, batch).item()}, "must return a scalar"),
        (
            {"loss": lambda model, batch: loss_fn(model, batch) * math.nan},
            "the loss of a batch is nan: check the data",
        ),
        (
            {"loss": lambda model, batch: loss_fn(model, batch) + math.inf},
            "the loss of a batch is inf",
        ),  # finite slope
        (
            {"loss": lambda model, batch: (0 * loss_fn(model, batch)).sqrt()},
            "the sensitivity of 'up' is not finite",
        ),
        ({"loss": lambda model, batch: loss_fn(OTHER, batch)}, "the loss depends on no adapter"),
    ],
)
def test_wrong_data_and_losses_are_told_by_score(option, match):
    model = trained()
    before = snapshot(model)
    with pytest.raises(ValueError, match=match):
        scored(model, coalitions=18, **option)
    assert_unchanged(model, before)


def test_magnitudes_that_are_not_finite_are_told_too():
    model = trained()
    model.mid.lora_B.data[0, 0] = math.nan
    with pytest.raises(ValueError, match="the magnitude of 'mid' is not finite"):
        scored(model, importance="magnitude")


def test_a_bar_in_a_terminal_alone_that_can_be_switched_off(monkeypatch, capsys):
    ShapLoRA(trained(), loss_fn, data(), coalitions=18).score()
    assert capsys.readouterr().err == ""  # no terminal
    monkeypatch.setattr("sys.stderr", Terminal())
    scored(coalitions=18)
    assert sys.stderr.getvalue() == ""
    ShapLoRA(trained(), loss_fn, data(), coalitions=18).score()
    assert "coalitions" in sys.stderr.getvalue()


def test_a_tuple_of_tensors_that_may_be_one_batch():
    def loss_of_pairs(model, batch):
        raise TypeError("one tensor is no pair")

    batch = (torch.ones(2, 3), torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"raised TypeError on a batch.* pass \[batches\]"):
        ShapLoRA(trained(), loss_of_pairs, batch, coalitions=18, progress=False).score()


def test_uniform_ranks_start_stage_one():
    model = Net()
    uniform = UniformRanks(model)
    uniform.score()
    layers = wrap(model, uniform.allocate(6), gate=0.0)
    assert [layer.rank for layer in layers.values()] == [2, 2, 2]
    assert ShapLoRA(model, loss_fn, data(dtype=torch.float32)).seed == 0
