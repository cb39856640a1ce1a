"""averaging.py: running means and standard errors against their textbook formulas; estimate.py."""

from __future__ import annotations

import copy
import math
import pickle
import statistics

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minirank.curvature import Estimate
from minirank.curvature.averaging import MIN_SAMPLES, BatchAverage, TraceAverage
from minirank.curvature.running_mean import RunningMean

values = st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=30)


@settings(max_examples=200, deadline=None)
@given(values)
def test_equal_weights_give_s_over_root_n(xs):
    running = RunningMean()
    for x in xs:
        running.add(x, 3.0)
    assert math.isclose(running.mean, statistics.fmean(xs), rel_tol=1e-12, abs_tol=1e-10)
    error = statistics.stdev(xs) / math.sqrt(len(xs))
    assert math.isclose(running.standard_error, error, rel_tol=1e-9, abs_tol=1e-9)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.floats(-1e3, 1e3), st.floats(0.1, 10)), min_size=2, max_size=30))
def test_unequal_weights_give_the_weighted_mean_and_its_error(pairs):
    """The unbiased variance for reliability weights, times Σw² / (Σw)²; here from two passes over
    all values."""
    running = RunningMean()
    for x, w in pairs:
        running.add(x, w)
    x, w = np.array(pairs).T
    mean = (w * x).sum() / w.sum()
    variance = (w * (x - mean) ** 2).sum() / (w.sum() - (w**2).sum() / w.sum())
    assert math.isclose(running.mean, mean, rel_tol=1e-10, abs_tol=1e-9)
    expected = math.sqrt(variance * (w**2).sum()) / w.sum()
    assert math.isclose(running.standard_error, expected, rel_tol=1e-6, abs_tol=1e-7)


def test_a_large_offset_does_not_swallow_the_spread():
    running = RunningMean()
    for x in (1e9 + 1, 1e9 + 2, 1e9 + 3):
        running.add(x)
    assert math.isclose(running.standard_error, 1 / math.sqrt(3), rel_tol=1e-6)


def test_fewer_than_two_values_tell_nothing_of_the_error():
    running = RunningMean()
    assert running.standard_error == math.inf
    running.add(1.0)
    running.add(5.0, 0.0)  # weighs nothing
    assert (running.count, running.mean, running.standard_error) == (1, 1.0, math.inf)


def test_unequal_weights_cover_as_stated():
    """Means of n = 1 … 40 samples as batches: 95 % intervals from 30 such batches (t = 2.05) cover
    92 to 98 %."""
    generator = torch.Generator().manual_seed(0)
    hits, runs = 0, 1000
    for _ in range(runs):
        running = RunningMean()
        for n in torch.randint(1, 41, (30,), generator=generator).tolist():
            running.add(
                float(-torch.rand(n, generator=generator, dtype=torch.float64).log().mean()), n
            )
        hits += abs(running.mean - 1) < 2.05 * running.standard_error
    assert 0.92 <= hits / runs <= 0.98


def diagonal(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def test_batch_average_weighs_and_counts_none_as_zero():
    average = BatchAverage(["a", "b"])
    average.add("a", diagonal(1, 2), 1)
    average.add("a", diagonal(5, 6), 3)
    average.add("b", None, 1)
    average.add("b", diagonal(4.0), 3)
    average.add("b", diagonal(9.0), 0)
    result = average.estimate()
    assert result["a"].tolist() == [4.0, 5.0]
    assert result["b"].tolist() == [3.0]
    assert result.weights == {"a": 4.0, "b": 4.0}
    assert (result.samples, result.over) == (2, "batches")
    assert set(result.standard_errors) == {"a", "b"}
    later = BatchAverage(["b"])
    later.add("b", diagonal(4.0), 3)
    later.add("b", None, 1)
    assert later.estimate()["b"].tolist() == [3.0]


def test_errors_are_held_against_the_mean_trace_over_layers():
    traces = TraceAverage(["large", "small"])
    for i in range(MIN_SAMPLES - 1):
        for name, mean in (("large", 1.8), ("small", -0.2)):
            traces.add(name, mean + (0.3 if i % 2 else -0.3))
    assert not traces.errors_within(10.0)  # too few to say
    traces.add("large", 2.1)
    traces.add("small", 0.1)
    # 0.1 = s / √n of ±0.3, ten times
    assert math.isclose(max(traces.standard_errors.values()), 0.1, rel_tol=1e-9)
    assert traces.errors_within(0.1001)  # the mean of |1.8| and |−0.2| is 1
    assert not traces.errors_within(0.0999)
    assert not traces.errors_within(None)


@pytest.mark.parametrize("weight", [-1, math.inf, math.nan])
def test_weights_out_of_range_are_errors(weight):
    with pytest.raises(ValueError, match="batch_weight must give a number of at least 0"):
        BatchAverage(["a"]).add("a", diagonal(1), weight)


def test_an_estimate_survives_copy_and_pickle():
    estimate = Estimate(
        {"a": diagonal(1, 2)},
        samples=3,
        over="probes",
        standard_errors={"a": 0.5},
        weights={"a": 2.0},
    )
    for twin in (
        copy.copy(estimate),
        copy.deepcopy(estimate),
        pickle.loads(pickle.dumps(estimate)),
    ):
        assert type(twin) is Estimate
        assert vars(twin) == vars(estimate)
        assert twin["a"].tolist() == [1, 2]
