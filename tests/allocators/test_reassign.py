"""reassign.py: L1RA's rule against the reference, and what must hold whatever the gates."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minirank import reference
from minirank.allocators.reassign import reassign


def run(gates, budget=None, *, lower=1, upper=9, **options):
    """`reassign` with the same bounds for all modules, and the budget that is in use."""
    costs = options.get("costs") or dict.fromkeys(gates, 1)
    budget = sum(len(g) * costs[n] for n, g in gates.items()) if budget is None else budget
    return reassign(
        gates,
        budget,
        lower=dict.fromkeys(gates, lower),
        upper=dict.fromkeys(gates, upper),
        **options,
    )


BOOLEANS = st.booleans()
GATE = st.sampled_from([0.0, 0.0, 0.0, 0.1, 0.25, 0.5, 0.9, 1.0, 1.0])


@st.composite
def cases(draw, with_costs=BOOLEANS):
    names = [f"m{i}" for i in range(draw(st.integers(1, 5)))]
    upper = {name: draw(st.integers(0, 6)) for name in names}
    lower = {name: draw(st.integers(0, min(2, upper[name]))) for name in names}
    gates = {name: draw(st.lists(GATE, max_size=7)) for name in names}
    in_parameters = draw(with_costs)
    costs = {name: draw(st.integers(1, 9)) if in_parameters else 1 for name in names}
    least, most = (sum(bound[n] * costs[n] for n in names) for bound in (lower, upper))
    budget = draw(st.integers(least, most))
    return (
        gates,
        budget,
        costs if in_parameters else None,
        lower,
        upper,
        draw(st.sampled_from([0.0, 0.0, 0.25])),
    )


@settings(max_examples=1500, deadline=None)
@given(case=cases())
def test_against_the_reference_and_the_invariants(case):
    gates, budget, costs, lower, upper, threshold = case
    result = reassign(gates, budget, lower, upper, costs=costs, threshold=threshold)
    if costs is None:
        assert result == reference.l1ra_reassign(gates, budget, lower, upper, threshold)
    ones = costs or dict.fromkeys(gates, 1)
    spent = sum(rank * ones[name] for name, rank in result.ranks.items())
    assert spent == budget if costs is None else spent <= budget
    assert not [
        n for n, rank in result.ranks.items() if rank < upper[n] and spent + ones[n] <= budget
    ]
    for name, rank in result.ranks.items():
        assert lower[name] <= rank <= upper[name]
        assert len(result.keep[name]) == len(gates[name])
        assert sum(result.keep[name]) <= rank
        kept = [gate for gate, keep in zip(gates[name], result.keep[name], strict=True) if keep]
        pruned = [
            gate for gate, keep in zip(gates[name], result.keep[name], strict=True) if not keep
        ]
        assert not kept or not pruned or max(pruned) <= min(kept)


@settings(max_examples=300, deadline=None)
@given(case=cases(), cost=st.integers(1, 9), rest=st.integers(0, 8))
def test_equal_costs_divide_the_budget(case, cost, rest):
    gates, _, _, lower, upper, threshold = case
    ranks = (sum(lower.values()) + sum(upper.values())) // 2
    rest = min(rest, cost - 1) if ranks < sum(upper.values()) else 0
    result = reassign(
        gates,
        ranks * cost + rest,
        lower,
        upper,
        costs=dict.fromkeys(gates, cost),
        threshold=threshold,
    )
    assert result == reference.l1ra_reassign(gates, ranks, lower, upper, threshold)


@settings(max_examples=600, deadline=None)
@given(case=cases(st.just(True)))
def test_with_costs_ranks_are_pruned_in_the_order_of_the_reference(case):
    """The masks are those of the largest budget in ranks, from what the threshold leaves down,
    whose ranks can be paid."""
    gates, budget, costs, lower, upper, threshold = case
    keep = reassign(gates, budget, lower, upper, costs=costs, threshold=threshold).keep
    ranks = sum(upper.values())  # nothing is pruned beyond the threshold and the upper bounds
    while True:
        _, expected = reference.l1ra_reassign(gates, ranks, lower, upper, threshold)
        left = {name: max(sum(mask), lower[name]) for name, mask in expected.items()}
        if sum(left[name] * costs[name] for name in gates) <= budget:
            break
        ranks = sum(left.values()) - 1
    assert keep == expected


@settings(max_examples=600, deadline=None)
@given(case=cases(st.just(True)))
def test_with_costs_ranks_go_round_the_modules_in_order(case):
    gates, budget, costs, lower, upper, threshold = case
    ranks, keep = reassign(gates, budget, lower, upper, costs=costs, threshold=threshold)
    given = {name: ranks[name] - max(sum(keep[name]), lower[name]) for name in gates}
    left = budget - sum(rank * costs[name] for name, rank in ranks.items())

    def smallest(name):
        kept = [gate for gate, stays in zip(gates[name], keep[name], strict=True) if stays]
        return min(kept, default=-math.inf)

    ordered = sorted(gates, key=lambda name: -smallest(name))
    intact = [n for n in ordered if all(keep[n]) and all(gate > threshold for gate in gates[n])]
    others = [name for name in ordered if name not in intact]
    for receivers in (intact, others):
        for first, second in itertools.combinations(receivers, 2):
            # A module falls behind only when it is full, or when the other's rank costs less.
            if given[first] < given[second]:
                assert ranks[first] == upper[first] or costs[first] > costs[second]
            if given[second] < given[first] - 1:
                assert ranks[second] == upper[second] or costs[second] > costs[first]
    # The others get what no intact module could take.
    after_intact = left + sum(given[name] * costs[name] for name in others)
    for name in intact:
        assert ranks[name] == upper[name] or costs[name] > after_intact


def test_the_papers_rule():
    """Two ranks fall; they go to the modules that lost none, the one whose smallest gate is larger
    first."""
    gates = {"loses": [0.9, 0.0, 0.8, 0.0], "second": [0.7, 0.6], "first": [0.8, 0.65]}
    result = run(gates)
    assert result.ranks == {"loses": 2, "second": 3, "first": 3}
    assert result.keep == {
        "loses": [True, False, True, False],
        "second": [True, True],
        "first": [True, True],
    }
    assert run(gates | {"loses": [0.9, 0.7, 0.8, 0.0]}).ranks == {
        "loses": 3,
        "second": 2,
        "first": 3,
    }


def test_round_robin_goes_round_more_than_once():
    gates = {"a": [0.0] * 5 + [1.0], "b": [0.5], "c": [0.6]}
    assert run(gates).ranks == {"a": 1, "b": 3, "c": 4}


def test_nothing_falls_nothing_moves():
    gates = {"a": [1.0, 0.2], "b": [0.3]}
    assert run(gates) == ({"a": 2, "b": 1}, {"a": [True, True], "b": [True]})


def test_a_gate_at_the_threshold_falls_and_one_above_stays():
    assert run({"a": [0.25, 0.26, 0.24], "b": [1.0]}, threshold=0.25).keep["a"] == [
        False,
        True,
        False,
    ]


def test_if_every_gate_of_a_module_falls_the_largest_stays_and_of_equal_ones_the_first():
    assert run({"a": [0.1, 0.2, 0.15], "b": [1.0]}, threshold=0.5).keep["a"] == [False, True, False]
    assert run({"a": [0.0, 0.0], "b": [1.0]}).keep["a"] == [True, False]


def test_all_gates_at_zero_spreads_the_ranks_evenly():
    result = run({"a": [0.0] * 5, "b": [0.0], "c": [0.0]})
    assert result.ranks == {"a": 3, "b": 2, "c": 2}
    assert result.keep == {"a": [True] + [False] * 4, "b": [True], "c": [True]}


def test_one_module_gets_its_own_ranks_back_as_fresh_ones():
    assert run({"a": [0.0, 0.5, 0.0]}) == ({"a": 3}, {"a": [False, True, False]})


def test_freed_ranks_that_no_other_module_can_take_are_not_lost():
    result = run({"a": [0.0, 0.9, 0.8], "b": [0.0, 0.95], "c": [1.0] * 4}, upper=4)
    assert result.ranks == {"a": 3, "b": 2, "c": 4}
    assert result.keep == {"a": [False, True, True], "b": [False, True], "c": [True] * 4}
    # ... and of the modules that lost some, the one with the larger surviving gates comes first.
    result = run({"a": [0.0, 0.0, 0.0, 0.8], "b": [0.0, 0.95], "c": [1.0] * 4}, upper=4)
    assert result.ranks == {"a": 3, "b": 3, "c": 4}


def test_a_module_that_is_kept_from_losing_its_last_rank_is_not_given_more():
    assert run({"a": [0.0], "b": [0.0, 0.9], "c": [0.2]}).ranks == {"a": 1, "b": 1, "c": 2}


def test_budget_of_one_rank_per_module_can_never_move():
    assert run({"a": [0.0], "b": [1.0], "c": [0.5]}).ranks == {"a": 1, "b": 1, "c": 1}


def test_a_smaller_budget_takes_the_smallest_gates_of_all():
    result = run({"a": [0.9, 0.3, 0.2], "b": [0.8, 0.25]}, 3)
    assert result == ({"a": 2, "b": 1}, {"a": [True, True, False], "b": [True, False]})
    assert run({"a": [0.5, 0.5], "b": [0.5, 0.5]}, 3).keep == {
        "a": [True, True],
        "b": [True, False],
    }


def test_a_larger_budget_grows_where_the_gates_are_highest():
    assert run({"a": [0.9, 0.3], "b": [0.8]}, 6).ranks == {"a": 3, "b": 3}
    assert run({"a": [0.9, 0.3], "b": [0.8]}, 4).ranks == {"a": 2, "b": 2}


def test_bounds_that_the_present_ranks_violate():
    result = reassign({"a": [], "b": [0.5] * 4}, 4, lower={"a": 1, "b": 0}, upper={"a": 9, "b": 2})
    assert result == ({"a": 2, "b": 2}, {"a": [], "b": [True, True, False, False]})
    result = reassign(
        {"a": [0.9], "b": [0.5] * 3}, 4, lower={"a": 2, "b": 0}, upper={"a": 2, "b": 9}
    )
    assert result == ({"a": 2, "b": 2}, {"a": [True], "b": [True, True, False]})


def test_modules_without_ranks_come_last_but_do_come():
    assert run({"empty": [], "a": [0.0, 0.2]}, lower=0, upper=1).ranks == {"empty": 1, "a": 1}
    assert run({"empty": [], "a": [1.0], "b": [0.0, 1.0]}, lower=0).ranks == {
        "empty": 0,
        "a": 2,
        "b": 1,
    }


def test_a_budget_in_parameters_is_not_exceeded_and_used_up():
    gates, costs = (
        {"wide": [1.0, 0.0], "narrow": [0.9, 0.8], "dear": [1.0]},
        {"wide": 10, "narrow": 3, "dear": 20},
    )
    result = run(gates, costs=costs)  # 10 are freed: "dear" cannot be paid, "narrow" three times
    assert result.ranks == {"wide": 1, "narrow": 5, "dear": 1}
    gates["narrow"] = [
        0.9,
        0.0,
    ]  # 13 are freed and nobody can take them: back to "wide", once, and "narrow"
    assert run(gates, costs=costs).ranks == {"wide": 2, "narrow": 2, "dear": 1}


def test_what_a_smaller_budget_leaves_over_goes_to_modules_that_lost_nothing():
    result = run(
        {"a": [0.1, 0.9], "b": [0.2, 0.95], "c": [0.5]}, 20, costs={"a": 1, "b": 10, "c": 1}
    )
    assert result.ranks == {"a": 1, "b": 1, "c": 9}


@pytest.mark.parametrize(
    ("gates", "budget", "message"),
    [
        ({}, 1, "no module"),
        ({"a": [math.nan], "b": [1.0]}, 2, "rank 0 of a.*nan.*finite"),
        ({"a": [1.0], "b": [1.0]}, 1, "below the 2"),
        ({"a": [1.0], "b": [1.0]}, 19, "above the 18"),
        ({"a": [1.0]}, 1.5, "integer"),
    ],
)
def test_what_cannot_be_met_is_refused(gates, budget, message):
    with pytest.raises(ValueError, match=message):
        run(gates, budget)
