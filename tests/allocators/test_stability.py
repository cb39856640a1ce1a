"""stability.py: the jackknife where it has a closed form, coverage by simulation, and what
SensitivityLoRA reports."""

from __future__ import annotations

import copy
import functools
import itertools
import math

import pytest
import torch
from helpers.estimators import seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from minirank import Allocation, SensitivityLoRA, UniformRanks, curvature, testing
from minirank.allocators.sensitivity import (
    effective_rank,
    matrix_metrics,
    sensitivity_metrics,
    smooth_metrics,
)
from minirank.allocators.stability import (
    Groups,
    Jackknife,
    interpolated_effective_rank,
    resample,
    resampled_stability,
)
from minirank.curvature.estimate import Estimate


def estimate(value, weight):
    diagonals = {"a": torch.tensor([value], dtype=torch.float64)}
    return Estimate(diagonals, samples=1, over="batches", standard_errors={}, weights={"a": weight})


def plain(h):
    return h["a"]


# ---- groups and the jackknife ------------------------------------------------------------------


def test_of_a_plain_mean_the_jackknife_gives_the_textbook_error():
    xs = [1.0, 4.0, 4.0, 7.0, 11.0]
    groups = Groups(5)
    for x in xs:
        groups.add(estimate(x, 2.0), 1)
    score, deviations = groups.jackknife(plain)
    assert score.tolist() == pytest.approx([5.4], rel=1e-14)
    error = torch.tensor(xs, dtype=torch.float64).std() / math.sqrt(5)
    torch.testing.assert_close(deviations.square().sum(0).sqrt()[0], error, rtol=1e-12, atol=0)


def test_unequal_groups_follow_busing_and_others():
    """Their estimator written out: 1/g Σ (θ̃_j − θ_J)² / (h_j − 1) with the pseudovalues
    θ̃_j = h_j θ − (h_j − 1) θ_(−j) and the center θ_J = g θ − Σ (1 − 1/h_j) θ_(−j)."""
    xs, ws = (
        torch.tensor([1.0, 4.0, 6.0, 9.0], dtype=torch.float64),
        torch.tensor([1.0, 2.0, 2.0, 5.0]),
    )
    groups = Groups(4)
    for x, w in zip(xs.tolist(), ws.tolist(), strict=True):
        groups.add(estimate(x, w), 1)

    def squared(h):
        return h["a"].square()

    theta = float((xs * ws).sum() / ws.sum()) ** 2
    h, without = [], []
    for j in range(4):
        rest = [i for i in range(4) if i != j]
        h.append(float(ws.sum() / ws[j]))
        without.append(float((xs[rest] * ws[rest]).sum() / ws[rest].sum()) ** 2)
    pseudo = [h[j] * theta - (h[j] - 1) * without[j] for j in range(4)]
    center = 4 * theta - sum((1 - 1 / h[j]) * without[j] for j in range(4))
    variance = sum((pseudo[j] - center) ** 2 / (h[j] - 1) for j in range(4)) / 4
    score, deviations = groups.jackknife(squared)
    assert float(score) == pytest.approx(theta, rel=1e-12)
    assert float(deviations.square().sum()) == pytest.approx(variance, rel=1e-10)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.floats(-5, 5), st.floats(0.5, 5)), min_size=1, max_size=70),
    st.integers(4, 6),
)
def test_groups_join_without_loss(batches, least):
    groups, stream = Groups(least), iter(batches)
    while group := list(itertools.islice(stream, groups.batches_per_group)):
        weight = sum(w for _, w in group)
        groups.add(estimate(sum(x * w for x, w in group) / weight, weight), len(group))
        assert len(groups) < 2 * least
    total = sum(w for _, w in batches)
    assert float(groups.mean()["a"]) == pytest.approx(
        sum(x * w for x, w in batches) / total, rel=1e-9, abs=1e-9
    )
    assert len(groups) >= min(len(batches), least)


def test_what_is_no_estimate_weighs_by_its_batches():
    groups = Groups(4)
    groups.add({"a": torch.tensor([1.0])}, 1)
    groups.add({"a": torch.tensor([4.0])}, 2)
    assert groups.mean()["a"].tolist() == [3.0]


def test_95_percent_intervals_of_theta_cover_92_to_98_percent():
    """θ of Eqs 8–14 for six matrices, whose groups of batches vary together and apart; 10 to 19
    groups of them."""
    n, generator = 6, seeded(0)
    truth = torch.rand(n, 12, generator=generator, dtype=torch.float64)
    truth *= torch.logspace(-0.5, 0.5, n, dtype=torch.float64)[:, None]

    def metrics(h):
        return smooth_metrics([h[str(i)] for i in range(n)]).flatten()

    def theta(metrics):
        """Eqs 11–14 of many draws at once: (draws, 3n) → (draws, n)"""
        S_g, S_topk, S_er = metrics.view(-1, 3, n).unbind(1)

        def weighted(S):
            return S.std(1, correction=0, keepdim=True) / S.mean(1, keepdim=True).square() * S

        return weighted(S_g) + weighted(weighted(S_topk) + weighted(S_er.ceil()))

    expected = theta(metrics({str(i): truth[i] for i in range(n)}))[0]
    one = sensitivity_metrics(matrix_metrics(list(truth)))
    torch.testing.assert_close(one.theta, expected, rtol=1e-12, atol=0)
    hits, runs = torch.zeros(n), 250
    for run in range(runs):
        groups, left = Groups(10), 40 + run % 40
        while left > 0:
            count = min(groups.batches_per_group, left)
            left -= count
            common = (
                -torch.rand(count, n, 1, 4, generator=generator, dtype=torch.float64).log().mean(3)
            )
            own = -torch.rand(count, n, 12, generator=generator, dtype=torch.float64).log()
            groups.add({str(i): h for i, h in enumerate((truth * common * own).mean(0))}, count)
        draws = theta(resample(*groups.jackknife(metrics), 500, generator))
        low, high = draws.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0)
        hits += (low <= expected) & (expected <= high)
    assert 0.92 <= float(hits.mean()) / runs <= 0.98
    assert float(hits.min()) / runs > 0.9  # each matrix by itself: 3.5 standard errors below 95 %


def test_resampled_scores_have_the_stated_spread():
    deviations = torch.tensor(
        [[3.0, 0.0], [4.0, 1.0], [0.0, -1.0], [0.0, 0.0], [0.0, 0.0]], dtype=torch.float64
    )
    score = torch.tensor([10.0, 20.0], dtype=torch.float64)
    draws = resample(score, deviations, 200_000, seeded())
    torch.testing.assert_close(draws.mean(0), score, rtol=0, atol=0.1)
    t = 2.776  # Student's 97.5 % quantile for 4 degrees of freedom
    inside = ((draws - score).abs() < t * deviations.square().sum(0).sqrt()).double().mean(0)
    assert torch.all((inside - 0.95).abs() < 0.005), inside
    correlation = torch.corrcoef(draws.t())[0, 1]
    assert abs(float(correlation) - 4 / (5 * math.sqrt(2))) < 0.03


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(-1, 5), min_size=1, max_size=40), st.floats(0.05, 1))
def test_the_smooth_effective_rank_rounds_up_to_the_count(entries, share):
    h = torch.tensor(entries, dtype=torch.float64)
    smooth = interpolated_effective_rank(h, share)
    assert smooth.ceil() == effective_rank(h, share)
    if smooth:
        nudged = interpolated_effective_rank(h * (1 + 1e-9 * torch.arange(len(h))), share)
        assert abs(float(nudged - smooth)) < 1e-4


def test_the_smooth_effective_rank_does_not_jump_where_the_count_does():
    """Of 4, 4, 2: two entries reach 0.8 of the sum. More than that takes a part of the third."""
    h = torch.tensor([4.0, 4.0, 2.0], dtype=torch.float64)
    for share, smooth, count in ((0.6, 1.5, 2), (0.8, 2.0, 2), (0.801, 2.005, 3), (1.0, 3.0, 3)):
        assert interpolated_effective_rank(h, share).item() == pytest.approx(smooth, rel=1e-12)
        assert effective_rank(h, share) == count


# ---- the report --------------------------------------------------------------------------------


def largest_gets_all(scores):
    ranks = {"a": 0, "b": 0}
    ranks["ab"[int(scores.argmax())]] = 3
    return Allocation(ranks, {"a": 2, "b": 2}, 3, method="test")


def report(score, spread, **options):
    deviations = torch.eye(5, dtype=torch.float64)[:, :2] * spread
    arguments = {
        "confidence": 0.9,
        "resamples": 500,
        "generator": seeded(),
        "batches": 7,
        **options,
    }
    metrics = Jackknife(torch.tensor(score, dtype=torch.float64), deviations)
    return resampled_stability(torch.exp, largest_gets_all, metrics, **arguments)


def test_a_clear_lead_is_settled_and_a_tie_is_open():
    settled = report([1.0, 5.0], 0.01)
    assert (settled.max_moved, settled.same, settled.open) == (0, 1.0, {})
    assert "none of them would move" in str(settled)
    low, high = settled.score_intervals[
        "b"
    ]  # scores are exp of the metrics; t of 4 degrees of freedom: 2.13
    assert math.log(low) == pytest.approx(5 - 0.0213, abs=0.003)
    assert math.log(high) == pytest.approx(5 + 0.0213, abs=0.003)
    tie = report([5.0, 5.001], 1.0)
    assert tie.open == {"a": (0, 3), "b": (0, 3)}
    assert tie.max_moved == 3
    assert 0.4 < tie.same < 0.6
    assert "b  rank 3, from 0 to 3" in str(tie)


def test_confidence_decides_what_counts_as_open():
    """Score differences have a standard error of √2: b loses in a share of P(t₄ < −2/√2) ≈ 11 % of
    resamples."""
    assert report([3.0, 5.0], 1.0, confidence=0.5).open == {}
    assert report([3.0, 5.0], 1.0, confidence=0.5).max_moved == 0
    assert set(report([3.0, 5.0], 1.0, confidence=0.95).open) == {"a", "b"}
    assert report([3.0, 5.0], 1.0, confidence=0.95).max_moved == 3


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95])
def test_confidence_out_of_range(confidence):
    with pytest.raises(ValueError, match=r"confidence must be above 0 and below 1 \(0.95: 95 %\)"):
        report([1.0, 5.0], 1.0, confidence=confidence)
    with pytest.raises(ValueError, match="resamples must be at least 2"):
        report([1.0, 5.0], 1.0, resamples=1)


# ---- SensitivityLoRA ---------------------------------------------------------------------------


def model_and_batches(count, seed=0, sizes=(8,)):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(60, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 8)
        ).double()
    generator = seeded(seed)
    scale = torch.logspace(0.5, -0.5, 60, dtype=torch.float64)
    batches = [
        torch.randn(sizes[i % len(sizes)], 60, generator=generator, dtype=torch.float64) * scale
        for i in range(count)
    ]
    return model, batches


def loss_fn(model, batch):
    return model(batch).square().mean()


def allocator(model, batches, **options):
    return SensitivityLoRA(model, loss_fn, batches, progress=False, **options)


@pytest.mark.parametrize(
    "estimator", [curvature.input_second_moment, curvature.exact_hessian_diagonal]
)
def test_groups_change_no_score(estimator):
    model, batches = model_and_batches(27, sizes=(8, 3, 5))
    together = allocator(model, batches, curvature=estimator)
    by_group = allocator(model, iter(batches), curvature=estimator, groups=5)
    with testing.unchanged(model):
        scores = by_group.score()
    for name, theta in together.score().items():
        torch.testing.assert_close(scores[name], theta, rtol=1e-9, atol=0)
    assert by_group.allocate(10).ranks == together.allocate(10).ranks


def test_the_default_device_changes_nothing():
    model, batches = model_and_batches(27, sizes=(8, 3, 5))
    expected, tested = (allocator(model, batches, groups=5) for _ in range(2))
    expected.score()
    with torch.device("meta"):
        tested.score()
        assert tested.stability(10) == expected.stability(10)
        uniform = UniformRanks(model)
        uniform.score()
        assert uniform.allocate(10).total_rank == 10


def width(result):
    return sum(high - low for low, high in result.score_intervals.values())


def test_more_data_settles_more():
    model, batches = model_and_batches(320)
    few, many = allocator(model, batches[:20], groups=10), allocator(model, batches, groups=10)
    few.score(), many.score()
    first, last = few.stability(12), many.stability(12)
    assert width(last) < 0.5 * width(first)
    assert last.max_moved <= first.max_moved
    assert last.allocation.ranks == many.allocate(12).ranks
    assert 10 <= last.groups < 20
    assert (first.batches, last.batches) == (20, 320)
    assert "(from 320 batches)" in str(last)
    assert last.open.keys() <= last.intervals.keys() == last.allocation.ranks.keys()
    for name, (low, high) in last.intervals.items():
        assert low <= last.allocation.ranks[name] <= high
    same = many.stability(12)
    assert same == last  # seeded


def test_ranks_of_new_data_lie_in_the_intervals_as_often_as_stated():
    """Of 40 independent calibrations, intervals of 95 % per module hold the ranks that 4,000
    batches give: at least 90 % of the 120 times (a lower bound, since whole ranks make intervals
        wider than asked)."""
    model, batches = model_and_batches(4000, seed=9)
    settled = allocator(model, batches)
    settled.score()
    truth = settled.allocate(60).ranks
    inside = 0
    for seed in range(40):
        one = allocator(model, model_and_batches(20, seed=100 + seed)[1], groups=10)
        one.score()
        intervals = one.stability(60, resamples=80).intervals
        inside += sum(low <= truth[name] <= high for name, (low, high) in intervals.items())
    assert inside >= 0.9 * 40 * len(truth)


def test_settle_takes_no_more_batches_than_it_needs():
    model, batches = model_and_batches(2000)
    taken = []

    def counted():
        for batch in batches:
            taken.append(1)
            yield batch

    one = allocator(model, counted(), groups=10)
    result = one.settle(12, max_moved=1)
    assert result.max_moved <= 1
    assert 10 <= len(taken) < 2000
    assert one.allocate(12).ranks == result.allocation.ranks
    again = allocator(model, batches[: len(taken)], groups=10)
    again.score()
    assert again.allocate(12).ranks == result.allocation.ranks
    assert again.stability(12) == result


def test_settle_stops_where_it_was_told_to():
    """A stricter aim needs more data; a plain score() afterwards takes all of it again."""
    model, batches = model_and_batches(600)
    taken = {}
    for moved in (0, 2):
        one = allocator(model, batches, groups=4)
        taken[moved] = one.settle(60, max_moved=moved)
        assert taken[moved].max_moved <= moved
        groups_after = one.score() and one.stability(60).groups
        whole = allocator(model, batches, groups=4)
        whole.score()
        assert groups_after == whole.stability(60).groups
        assert one.allocate(60) == whole.allocate(60)
    assert width(taken[2]) > 1.5 * width(taken[0])  # fewer batches


def results_of(one):
    """What a run leaves behind: scores by their allocation, metrics, diagonals and stability."""
    diagonals = {name: h.clone() for name, h in one.curvatures.items()}
    return one.allocate(12), copy.deepcopy(one.metrics), diagonals, one.stability(12)


@pytest.mark.parametrize("fails_at", [2, 11, 37])
@pytest.mark.parametrize("call", ["settle", "score"])
def test_a_run_that_fails_leaves_the_results_of_the_one_before(fails_at, call):
    model, batches = model_and_batches(40)
    one = allocator(model, batches, groups=4)
    one.score()
    before = results_of(one)
    assert before[-1].batches == 40

    def broken():
        yield from model_and_batches(fails_at, seed=5)[1]
        raise OSError("the disk is on fire")

    one.batches = broken()
    with pytest.raises(OSError, match="on fire"):
        # max_moved=-1 is never reached, so that settle asks and goes on.
        one.settle(12, max_moved=-1) if call == "settle" else one.score()
    after = results_of(one)
    assert after[:2] == before[:2]
    assert after[3] == before[3]
    assert all(torch.equal(after[2][name], h) for name, h in before[2].items())
    one.batches = iter(batches[:3])  # too few to tell how sure the ranks are
    with pytest.raises(ValueError, match="3 batches are too few"):
        one.settle(12)
    assert results_of(one)[3] == before[3]


def test_settle_answers_from_the_batches_that_it_took():
    model, batches = model_and_batches(40)
    one = allocator(model, batches, groups=4)
    one.score()
    whole = results_of(one)
    result = one.settle(12, max_moved=12)
    assert result.batches == 4
    first_four = allocator(model, batches[:4], groups=4)
    first_four.score()
    assert results_of(one)[1] == results_of(first_four)[1] != whole[1]
    assert results_of(one)[3] == results_of(first_four)[3] == result


def test_settle_at_the_end_of_the_batches_says_how_far_it_came():
    model, batches = model_and_batches(12)
    with pytest.warns(UserWarning, match=r"not settled: \d+ of 40 may still move.*all 12 batches"):
        result = allocator(model, batches, groups=10).settle(40, confidence=0.999)
    assert result.max_moved > 0
    assert result.groups == 12


def test_random_vectors_count_as_sampling_error():
    model, batches = model_and_batches(1)
    hutchinson = functools.partial(curvature.hutchinson_outputs, generator=seeded(), samples=2)
    noisy = allocator(model, batches * 40, curvature=hutchinson, groups=10)
    noisy.score()
    exact = allocator(model, batches * 40, curvature=curvature.exact_hessian_diagonal, groups=10)
    exact.score()
    assert width(exact.stability(12)) < 1e-9
    assert width(noisy.stability(12)) > 1e-2


def test_parameter_budgets_and_bounds_are_those_of_allocate():
    model, batches = model_and_batches(40)
    one = allocator(model, batches, groups=10)
    one.score()
    options = {"unit": "parameters", "min_rank": 1, "max_rank": {"0": 2}}
    result = one.stability(700, **options)
    assert result.allocation == one.allocate(700, **options)
    assert result.intervals["0"][0] >= 1
    assert result.intervals["0"][1] <= 2


def test_errors_say_what_to_do():
    model, batches = model_and_batches(12)
    with pytest.raises(ValueError, match="groups must be at least 4, to tell how they vary, got 3"):
        allocator(model, batches, groups=3)
    few = allocator(model, batches[:3], groups=10)
    assert few.score().keys() == {"0", "2", "4"}
    with pytest.raises(
        ValueError, match="3 batches are too few to tell how scores vary: give at least 4"
    ):
        few.stability(12)
    with pytest.raises(ValueError, match="batches is empty"):
        allocator(model, [], groups=4).score()
    with pytest.raises(
        RuntimeError,
        match=r"needs scores of groups of batches: make it with SensitivityLoRA\(…, groups=10\)",
    ):
        allocator(model, batches).stability(12)
    with pytest.raises(RuntimeError, match=r"stability needs scores: call score\(\) first"):
        allocator(model, batches, groups=10).stability(12)
    with pytest.raises(RuntimeError, match="settle needs scores of groups of batches"):
        allocator(model, batches).settle(12)
    one = allocator(model, batches, groups=4)
    with pytest.raises(TypeError, match="confidense"):
        one.settle(12, confidense=0.5)
    with pytest.raises(ValueError, match="budget"):
        one.settle(-1)
