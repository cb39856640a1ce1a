"""budget.py: exact sums, bounds and tie-breaks, against closed forms, exhaustive search, random
hostile scores and the reference."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minirank import reference
from minirank.budget import best_ranks, proportional_ranks

HOSTILE = st.one_of(
    st.just(0.0),
    st.just(1.0),
    st.sampled_from([5e-324, 1e-300, 1e300, 1.7976931348623157e308, 0.1, 0.3]),
    st.floats(0, 1e6),
)


IN_PARAMETERS = st.booleans()


def bounds(names, low=0, high=100):
    return {"lower": dict.fromkeys(names, low), "upper": dict.fromkeys(names, high)}


@st.composite
def problems(draw, scores=HOSTILE):
    n = draw(st.integers(1, 9))
    names = [f"m{i}" for i in range(n)]
    lower = {name: draw(st.integers(0, 3)) for name in names}
    upper = {name: lower[name] + draw(st.integers(0, 9)) for name in names}
    costs = {name: draw(st.integers(1, 40)) for name in names}
    return {name: draw(scores) for name in names}, costs, lower, upper


# ---- shares per module -------------------------------------------------------------------------


def test_shares_that_come_out_whole_are_met_exactly():
    assert proportional_ranks({"a": 1, "b": 2, "c": 5}, 16, **bounds("abc")) == {
        "a": 2,
        "b": 4,
        "c": 10,
    }


def test_largest_remainders_get_what_rounding_down_left():
    # shares of 10: 4.8, 3.1, 2.1 -> 4, 3, 2 and one more for .8
    assert proportional_ranks({"a": 48, "b": 31, "c": 21}, 10, **bounds("abc")) == {
        "a": 5,
        "b": 3,
        "c": 2,
    }


def test_ties_go_to_the_earlier_module():
    assert proportional_ranks(dict.fromkeys("abc", 0.1), 10, **bounds("abc")) == {
        "a": 4,
        "b": 3,
        "c": 3,
    }
    assert proportional_ranks(dict.fromkeys("cba", 0.1), 10, **bounds("abc")) == {
        "c": 4,
        "b": 3,
        "a": 3,
    }


def test_a_capped_share_is_redistributed_in_proportion():
    ranks = proportional_ranks(
        {"a": 100, "b": 2, "c": 1},
        13,
        lower=dict.fromkeys("abc", 0),
        upper={"a": 4, "b": 99, "c": 99},
    )
    assert ranks == {"a": 4, "b": 6, "c": 3}


def test_min_rank_is_taken_from_the_others():
    assert proportional_ranks({"a": 0, "b": 1, "c": 1}, 9, **bounds("abc", low=1)) == {
        "a": 1,
        "b": 4,
        "c": 4,
    }


def test_all_zero_scores_share_equally():
    assert proportional_ranks(dict.fromkeys("abcd", 0.0), 8, **bounds("abcd")) == dict.fromkeys(
        "abcd", 2
    )


def test_zero_scores_get_what_the_positive_ones_cannot_take():
    assert proportional_ranks({"a": 1, "b": 0, "c": 0}, 9, **bounds("abc", high=5)) == {
        "a": 5,
        "b": 2,
        "c": 2,
    }


def test_extreme_ratios_do_not_lose_ranks():
    assert proportional_ranks({"a": 1e308, "b": 5e-324}, 7, **bounds("ab", high=5)) == {
        "a": 5,
        "b": 2,
    }


@settings(max_examples=600, deadline=None)
@given(problems(), st.data())
def test_rank_budget_is_met_exactly_within_bounds(problem, data):
    scores, _, lower, upper = problem
    budget = data.draw(st.integers(sum(lower.values()), sum(upper.values())))
    ranks = proportional_ranks(scores, budget, lower=lower, upper=upper)
    assert list(ranks) == list(scores)
    assert sum(ranks.values()) == budget
    assert all(lower[n] <= r <= upper[n] for n, r in ranks.items())


@settings(max_examples=600, deadline=None)
@given(problems(), st.data())
def test_parameter_budget_is_never_exceeded_and_leaves_no_room(problem, data):
    scores, costs, lower, upper = problem
    least, most = (sum(bound[n] * costs[n] for n in scores) for bound in (lower, upper))
    budget = data.draw(st.integers(least, most))
    ranks = proportional_ranks(scores, budget, costs=costs, lower=lower, upper=upper)
    left = budget - sum(ranks[n] * costs[n] for n in scores)
    assert left >= 0
    assert all(lower[n] <= r <= upper[n] for n, r in ranks.items())
    assert not [n for n in scores if ranks[n] < upper[n] and costs[n] <= left]


@settings(max_examples=600, deadline=None)
@given(problems(), IN_PARAMETERS, st.data())
def test_shares_against_the_reference(problem, in_parameters, data):
    scores, costs, lower, upper = problem
    costs = costs if in_parameters else dict.fromkeys(scores, 1)
    least, most = (sum(bound[n] * costs[n] for n in scores) for bound in (lower, upper))
    budget = data.draw(st.integers(least, most))
    options = {"costs": costs if in_parameters else None, "lower": lower, "upper": upper}
    expected = reference.ranks_from_shares(scores, budget, **options)
    assert proportional_ranks(scores, budget, **options) == expected


def test_without_bounds_only_the_budget_counts():
    scores = {"a": 2.0, "b": 1.0}
    assert proportional_ranks(scores, 9) == {"a": 6, "b": 3}
    assert proportional_ranks(scores, 9) == reference.ranks_from_shares(scores, 9)
    assert proportional_ranks(scores, 9, lower={"a": 0, "b": 5}) == {"a": 4, "b": 5}
    assert best_ranks({"a": [2.0, 1.0], "b": [3.0]}, 2) == {"a": [True, False], "b": [True]}
    with pytest.raises(ValueError, match="above the 3 that all modules"):
        best_ranks({"a": [2.0, 1.0], "b": [3.0]}, 4)


@settings(max_examples=300, deadline=None)
@given(problems(st.floats(0.01, 100)), st.data())
def test_every_rank_is_within_one_of_its_ideal_share(problem, data):
    """The ideal r_w = clip(t · θ_w, lower, upper) is recomputed here by bisection on t in floating
    point."""
    scores, _, lower, upper = problem
    budget = data.draw(st.integers(sum(lower.values()), sum(upper.values())))
    ranks = proportional_ranks(scores, budget, lower=lower, upper=upper)

    def ideal(t):
        return {n: min(max(t * s, lower[n]), upper[n]) for n, s in scores.items()}

    low, high = 0.0, 1e5
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(ideal(middle).values()) < budget else (low, middle)
    for name, value in ideal(high).items():
        assert abs(ranks[name] - value) < 1 + 1e-6


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=4), st.integers(0, 12))
def test_no_whole_number_split_is_closer_to_the_shares(weights, budget):
    """Without binding bounds, largest remainder minimises Σ (r_w - share_w)² over all splits of the
    budget."""
    scores = {f"m{i}": float(w) for i, w in enumerate(weights)}
    ranks = proportional_ranks(scores, budget, **bounds(scores, high=budget or 1))
    shares = [Fraction(w * budget, sum(weights)) for w in weights]

    def distance(split):
        return sum((r - s) ** 2 for r, s in zip(split, shares, strict=True))

    splits = (
        s for s in itertools.product(range(budget + 1), repeat=len(weights)) if sum(s) == budget
    )
    assert distance(ranks.values()) == min(map(distance, splits))


@settings(max_examples=200, deadline=None)
@given(problems(), st.data(), st.integers(-30, 30))
def test_only_ratios_of_scores_matter(problem, data, power):
    scores, _, lower, upper = problem
    scores = {n: s if 1e-200 < s < 1e200 else 0.0 for n, s in scores.items()}
    budget = data.draw(st.integers(sum(lower.values()), sum(upper.values())))
    scaled = {n: math.ldexp(s, power) for n, s in scores.items()}
    assert proportional_ranks(scores, budget, lower=lower, upper=upper) == proportional_ranks(
        scaled, budget, lower=lower, upper=upper
    )


# ---- scores per rank ---------------------------------------------------------------------------


def test_the_best_ranks_are_kept_over_all_modules():
    kept = best_ranks({"a": [0.9, 0.1, 0.5], "b": [0.4, 0.8]}, 3, **bounds("ab"))
    assert kept == {"a": [True, False, True], "b": [False, True]}


def test_ties_between_ranks_keep_the_exact_number_in_order():
    assert best_ranks({"a": [1.0] * 3, "b": [1.0] * 2}, 4, **bounds("ab")) == {
        "a": [True] * 3,
        "b": [True, False],
    }


@settings(max_examples=600, deadline=None)
@given(problems(st.lists(st.floats(-5, 5), max_size=6)), st.booleans(), st.data())
def test_kept_ranks_use_the_budget_and_no_better_rank_is_left_out(problem, in_parameters, data):
    scores, costs, lower, upper = problem
    lower = {n: min(lower[n], len(s)) for n, s in scores.items()}
    upper = {n: max(lower[n], upper[n]) for n in scores}
    cost = costs if in_parameters else dict.fromkeys(scores, 1)
    most = {n: min(upper[n], len(s)) for n, s in scores.items()}
    budget = data.draw(
        st.integers(sum(lower[n] * cost[n] for n in scores), sum(most[n] * cost[n] for n in scores))
    )
    kept = best_ranks(
        scores, budget, costs=costs if in_parameters else None, lower=lower, upper=upper
    )

    options = {"costs": costs if in_parameters else None, "lower": lower, "upper": upper}
    assert kept == reference.best_ranks(scores, budget, **options)
    ranks = {n: sum(mask) for n, mask in kept.items()}
    left = budget - sum(ranks[n] * cost[n] for n in scores)
    assert all(lower[n] <= ranks[n] <= most[n] for n in scores)
    assert left >= 0 if in_parameters else left == 0
    assert not [n for n in scores if ranks[n] < most[n] and cost[n] <= left]
    for n, mask in kept.items():  # within a module, by score
        inside = [s for s, keep in zip(scores[n], mask, strict=True) if keep]
        outside = [s for s, keep in zip(scores[n], mask, strict=True) if not keep]
        assert not inside or not outside or min(inside) >= max(outside)
    if not in_parameters:  # across modules, where bounds leave a choice
        movable_in = [
            min(s for s, k in zip(scores[n], kept[n], strict=True) if k)
            for n in scores
            if ranks[n] > lower[n]
        ]
        movable_out = [
            max(s for s, k in zip(scores[n], kept[n], strict=True) if not k)
            for n in scores
            if ranks[n] < most[n]
        ]
        assert not movable_in or not movable_out or min(movable_in) >= max(movable_out)


# ---- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite_are_named(bad):
    with pytest.raises(ValueError, match=r"score of 'b' is .*finite"):
        proportional_ranks({"a": 1.0, "b": bad}, 2, **bounds("ab"))
    with pytest.raises(ValueError, match=r"rank 1 of b.*finite"):
        best_ranks({"a": [1.0], "b": [1.0, bad]}, 2, **bounds("ab"))


def test_negative_shares_are_refused_but_negative_rank_scores_are_not():
    with pytest.raises(ValueError, match=r"'b'.*negative"):
        proportional_ranks({"a": 1.0, "b": -1e-9}, 2, **bounds("ab"))
    assert best_ranks({"a": [-2.0, -1.0]}, 1, **bounds("a")) == {"a": [False, True]}


@pytest.mark.parametrize(
    ("budget", "match"),
    [
        (2, "below the 3 that min_rank takes"),
        (31, "above the 30 that all modules"),
        (4.0, "integer"),
        (True, "integer"),
    ],
)
def test_budgets_that_cannot_be_met_say_which_bound_is_in_the_way(budget, match):
    with pytest.raises(ValueError, match=match):
        proportional_ranks(dict.fromkeys("abc", 1.0), budget, **bounds("abc", low=1, high=10))


def test_no_module_and_crossed_bounds_are_errors():
    with pytest.raises(ValueError, match="empty"):
        proportional_ranks({}, 0, lower={}, upper={})
    with pytest.raises(ValueError, match="min_rank ≤ max_rank"):
        proportional_ranks({"a": 1.0}, 2, lower={"a": 3}, upper={"a": 2})


def test_one_module_gets_everything():
    assert proportional_ranks({"a": 0.0}, 7, **bounds("a")) == {"a": 7}
