"""settling.py: when measuring stops, that the confidence holds over all looks, and ShapLoRA's part
in it. (SensitivityLoRA's is in test_stability.py.)"""

from __future__ import annotations

import contextlib
import math

import pytest
import torch
from helpers.estimators import seeded
from helpers.shaplora_cases import PLAYERS, data, flat, loss_fn, trained
from torch import nn

from minirank import SensitivityLoRA, ShapLoRA, resize, testing, wrap
from minirank.allocators.settling import Draws
from minirank.allocators.stability import of_mean, resample
from minirank.shapley import coalition_masks

BUDGET = 4


def allocator(model=None, loss=loss_fn, **options):
    model = trained() if model is None else model
    return ShapLoRA(model, loss, data(), progress=False, **options)


def answers(one):
    """What an allocator answers from, to compare."""
    return flat(one._scores).tolist(), flat(one.standard_errors).tolist(), one.stability(BUDGET)


# ---- when it stops -----------------------------------------------------------------------------


def test_both_methods_have_one_signature():
    assert SensitivityLoRA.settle is ShapLoRA.settle
    assert SensitivityLoRA.stability is ShapLoRA.stability


@pytest.mark.parametrize("generator", [5, seeded(3)], ids=["seed", "generator"])
@pytest.mark.parametrize(("max_moved", "coalitions"), [(PLAYERS, 18), (0, 72)])
def test_a_settled_run_has_the_scores_of_a_run_of_as_many_coalitions(
    generator, max_moved, coalitions
):
    one = allocator(coalitions=72, generator=generator)
    with testing.unchanged(one.model):
        if max_moved:
            result = one.settle(BUDGET, max_moved=max_moved)
        else:
            with pytest.warns(UserWarning, match="not settled"):
                result = one.settle(BUDGET, max_moved=-1)
    other = allocator(coalitions=coalitions, generator=one.seed)
    other.score()
    assert result.coalitions == coalitions
    assert answers(one) == answers(other)
    assert result == one.stability(BUDGET)
    allocated = one.allocate(BUDGET)
    assert result.allocation.ranks == allocated.ranks
    assert torch.equal(flat(result.allocation.keep), flat(allocated.keep))


def test_a_smaller_sample_of_coalitions_starts_a_larger_one():
    largest = coalition_masks(144, 900, generator=3)
    for coalitions in (18, 36, 90, 180):
        assert torch.equal(coalition_masks(144, coalitions, generator=3), largest[:coalitions])


def test_it_looks_at_18_coalitions_whenever_they_have_doubled_and_at_the_end():
    one, looks = allocator(coalitions=90), []
    one._stability_of = lambda sample, constraints, draws: (
        looks.append(len(sample.sans)) or ShapLoRA._stability_of(one, sample, constraints, draws)
    )
    with pytest.warns(UserWarning, match="all 90 coalitions are measured. The scores are kept. "):
        one.settle(BUDGET, max_moved=-1)
    assert looks == [18, 36, 72, 90]


def test_the_losses_that_are_saved():
    calls = []

    def counting(model, batch):
        calls.append(1)
        return loss_fn(model, batch)

    allocator(loss=counting, coalitions=900).settle(BUDGET, max_moved=PLAYERS)
    assert len(calls) == 18 * 3 + 2  # the first batch twice, to see that the loss repeats


# ---- its confidence ----------------------------------------------------------------------------


class Simulated(ShapLoRA):
    """Pairs whose mean is known: two modules of one rank, with scores that differ by 1 %."""

    truth = torch.tensor([1.0, 1.01], dtype=torch.float64)

    @contextlib.contextmanager
    def _measuring(self, layers, masks):
        generator = seeded(self.seed)

        def pairs(some):
            noise = torch.randn(len(some) // 2, 2, generator=generator, dtype=torch.float64)
            return (self.truth + 0.5 * noise).repeat_interleave(2, dim=0)

        yield pairs


def simulated(seed, coalitions=288):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    for layer in wrap(model, {"0": 1, "1": 1}, gate=0.0).values():
        nn.init.ones_(layer.gate)
    return Simulated(model, loss_fn, [1], coalitions=coalitions, generator=seed, progress=False)


@pytest.mark.filterwarnings("ignore:the ranks are not settled")
def test_many_looks_are_wrong_no_more_often_than_stated():
    """At a near tie every look is as likely to be wrong as it can be. Without shares of the error,
    5 looks at a confidence of 80 % are wrong in more than 20 % of the runs."""
    wrong = 0
    for seed in range(100):
        result = simulated(seed).settle(1, confidence=0.8, resamples=60)
        settled = result.coalitions < 288
        wrong += settled and result.allocation.ranks != {"0": 0, "1": 1}
    assert 0 < wrong <= 20


@pytest.mark.parametrize("confidence", [0.5, 0.95])
def test_the_looks_share_out_the_error(confidence):
    looks = [Draws(confidence, 300, 0).of_look(look) for look in range(1, 2000)]
    errors = [1 - look.confidence for look in looks]
    assert sum(errors) == pytest.approx(1 - confidence, rel=1e-3)
    assert sum(errors) < 1 - confidence
    assert all(look.resamples >= 0.999 / error for look, error in zip(looks, errors, strict=True))


def test_the_error_of_a_mean_is_the_standard_error():
    samples = torch.randn(12, 5, generator=seeded(), dtype=torch.float64)
    mean, deviations = of_mean(samples.mean(0), samples)
    assert torch.equal(mean, samples.mean(0))
    expected = samples.std(0) / math.sqrt(12)
    torch.testing.assert_close(deviations.square().sum(0).sqrt(), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("columns", [2, 5, 18])
def test_ties_stay_ties(columns):
    """Of layers with the same inputs, say. A difference of rounding would move ranks."""
    deviations = torch.randn(9, 1, generator=seeded(), dtype=torch.float64).expand(9, columns)
    drawn = resample(torch.ones(columns, dtype=torch.float64), deviations, 300, seeded(1))
    assert (drawn == drawn[:, :1]).all()
    assert len(drawn[:, 0].unique()) == 300


# ---- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize("fails_at", [1, 40, 18 * 3 + 20])
def test_a_run_that_fails_leaves_the_results_of_the_one_before(fails_at):
    calls = []

    def failing(model, batch):
        calls.append(1)
        if len(calls) == fails_at:
            raise OSError("the disk is on fire")
        return loss_fn(model, batch)

    one = allocator(coalitions=36)
    one.score()
    before = answers(one)
    one.loss_fn = failing
    with testing.unchanged(one.model), pytest.raises(OSError, match="on fire"):
        one.settle(BUDGET, max_moved=-1)
    assert answers(one) == before


def test_errors_come_before_any_measuring():
    def never(model, batch):
        raise AssertionError("measured")

    one = allocator(loss=never)
    with pytest.raises(ValueError, match="a budget of 8 ranks is above the 7"):
        one.settle(PLAYERS + 1)
    with pytest.raises(ValueError, match=r"max_moved must be an integer number of ranks, got 0\.5"):
        one.settle(BUDGET, max_moved=0.5)
    with pytest.raises(ValueError, match="confidence must be above 0 and below 1"):
        one.settle(BUDGET, confidence=95)
    with pytest.raises(RuntimeError, match=r"stability needs scores: call score\(\) first"):
        one.stability(BUDGET)
    for options in ({"coalitions": 0}, {"importance": "magnitude"}):
        without = allocator(loss=never, **options)
        with pytest.raises(RuntimeError, match="settle needs a sample of coalitions"):
            without.settle(BUDGET)
        with pytest.raises(RuntimeError, match="stability needs a sample of coalitions"):
            without.stability(BUDGET)


def test_stale_scores_and_what_the_report_says():
    one = allocator(coalitions=18)
    result = one.settle(BUDGET, max_moved=PLAYERS, min_rank=1)
    assert "with other coalitions (from 18 coalitions)" in str(result)
    assert (result.groups, result.batches) == (9, 0)
    assert list(result.score_intervals)[:2] == ["rank 0 of up", "rank 1 of up"]
    assert min(low for low, _ in result.intervals.values()) >= 1
    resize(one.model, one.allocate(BUDGET))
    with pytest.raises(RuntimeError, match="stale"):
        one.stability(2)
