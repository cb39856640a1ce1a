"""The contracts of θ, whole ranks, the best ranks and L1RA's rule: who passes, who is told what."""

from __future__ import annotations

import array
import math

import numpy as np
import pytest
import torch
from helpers.contract_checks import (
    assert_the_reference_passes,
    assert_the_twin_is_named,
    told,
)

from minirank import budget, reference, testing
from minirank.allocators.gates import shrink
from minirank.allocators.reassign import reassign
from minirank.allocators.sensitivity import matrix_metrics, sensitivity_metrics
from minirank.testing.contracts import ranks as contracts

CONTRACTS = {contract.name: contract for contract in contracts.CONTRACTS}


def cases_that_fail(mine, like):
    return {result.case.partition(", float")[0] for result in told(mine, like).failed}


@pytest.mark.parametrize("name", CONTRACTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_reference_passes(name, dtype):
    assert_the_reference_passes(CONTRACTS[name], dtype)


@pytest.mark.parametrize(
    ("name", "twin"), [(name, twin) for name in CONTRACTS for twin in CONTRACTS[name].wrong_twins]
)
def test_every_twin_fails_under_its_own_name(name, twin):
    assert_the_twin_is_named(CONTRACTS[name], twin)


# ---- the library's own functions -----------------------------------------------------------------


def own_theta(diagonals, topk_fraction=0.5, effective_share=0.85):
    metrics = matrix_metrics(diagonals.values(), topk_fraction, effective_share)
    return dict(zip(diagonals, sensitivity_metrics(metrics).theta.tolist(), strict=True))


def own_shares(scores, total, costs=None, lower=None, upper=None):
    if costs and upper:
        total = min(total, sum(upper[name] * costs[name] for name in scores))
    return budget.proportional_ranks(scores, total, costs=costs, lower=lower, upper=upper)


def own_best(scores, total, costs=None, lower=None, upper=None):
    if costs:
        most = {n: min(len(own), (upper or {}).get(n, len(own))) for n, own in scores.items()}
        total = min(total, sum(most[name] * costs[name] for name in scores))
    return budget.best_ranks(scores, total, costs=costs, lower=lower, upper=upper)


def own_shrink(gates, amount):
    gates = [gate.clone() for gate in gates]
    shrink(gates, amount)
    return gates


def own_reassign(gates, total, lower, upper, threshold=0.0):
    return reassign(gates, total, lower, upper, threshold=threshold)


@testing.parametrize(own_theta, like=reference.sensitivity_theta)
def test_our_theta(check):
    check()


@testing.parametrize(own_shares, like=reference.ranks_from_shares)
def test_our_ranks_from_shares(check):
    check()


@testing.parametrize(own_best, like=reference.best_ranks)
def test_our_best_ranks(check):
    check()


@testing.parametrize(own_shrink, like=reference.l1ra_shrink)
def test_our_shrink(check):
    check()


@testing.parametrize(own_reassign, like=reference.l1ra_reassign)
def test_our_reassign(check):
    check()


# ---- θ -------------------------------------------------------------------------------------------


def numpy_theta(diagonals, topk_fraction=0.5, effective_share=0.85):
    """Eqs 8-14 in NumPy, in the dtype of the diagonals, with the deviation of a sample."""

    def weighted(metric):
        if len(metric) < 2 or (metric == metric[0]).all():
            return 0 * metric
        return metric.std(ddof=1) / metric.mean() * (metric / metric.mean())

    traces, means, counts = [], [], []
    for h in diagonals.values():
        largest = np.sort(np.maximum(h.ravel(), 0))[::-1]
        sums = np.cumsum(largest)
        traces.append(h.sum())
        means.append(largest[: max(1, int(topk_fraction * h.size))].mean())
        counts.append(1 + np.sum(sums < effective_share * sums[-1]) if sums[-1] > 0 else 0)
    local = weighted(np.array(means)) + weighted(np.array(counts, dtype=float))
    theta = np.maximum(weighted(np.array(traces)) + weighted(local), 0)
    theta = theta if theta.any() else np.full_like(theta, 0.3)
    return dict(zip(diagonals, theta, strict=True))


def test_theta_in_numpy_with_the_sample_deviation_passes():
    convert = (lambda tensor: tensor.numpy(), torch.as_tensor)
    testing.check(numpy_theta, like=reference.sensitivity_theta, convert=convert)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_theta_times_a_factor_and_as_tensors_passes(dtype):
    def mine(diagonals, **options):
        theta = reference.sensitivity_theta(diagonals, **options)
        return {name: torch.tensor(7.0 * value, dtype=dtype) for name, value in theta.items()}

    report = testing.check(mine, like=reference.sensitivity_theta)
    assert bool(report.with_status("noted")) == (dtype == torch.float32)


def test_theta_of_a_quarter_of_the_diagonals_passes():
    def mine(diagonals, **options):
        return reference.sensitivity_theta({n: h / 4 for n, h in diagonals.items()}, **options)

    testing.check(mine, like=reference.sensitivity_theta)


def test_an_epsilon_in_a_denominator_is_caught():
    def weighted(metric):
        return metric.std(correction=0) / (metric.mean() + 1e-8) ** 2 * metric

    mine = contracts.Theta(weighted=weighted, of_trace=weighted, of_local=weighted)
    assert "tiny entries" in cases_that_fail(mine, reference.sensitivity_theta)


def test_theta_of_one_matrix_must_not_be_zero_or_nan():
    for wrong in (0.0, math.nan):

        def mine(diagonals, *, wrong=wrong, **options):
            theta = reference.sensitivity_theta(diagonals, **options)
            return theta if len(theta) > 1 else {name: wrong for name in theta}  # noqa: C420

        report = told(mine, reference.sensitivity_theta, "one θ ≥ 0 for each matrix")
        assert len(report.failed) == 2


def test_theta_row_by_row_is_caught():
    def mine(diagonals, **options):
        rows = {n: h if h.dim() == 1 else h.sum(0) for n, h in diagonals.items()}
        return reference.sensitivity_theta(rows, **options)

    failed = cases_that_fail(mine, reference.sensitivity_theta)
    assert failed == {"diagonals with rows", "views", "many matrices"}


# ---- whole ranks ---------------------------------------------------------------------------------


def float_shares(scores, total, costs=None, lower=None, upper=None):
    """In floating-point numbers, by bisection over t."""
    cost = costs or dict.fromkeys(scores, 1)
    low, high = lower or dict.fromkeys(scores, 0), upper or dict.fromkeys(scores, total)
    total = min(total, sum(high[n] * cost[n] for n in scores))
    share = {name: float(score) for name, score in scores.items()}
    if all(score == 0 for score in share.values()):
        share = dict.fromkeys(share, 1.0)
    full = {n: high[n] if share[n] else low[n] for n in share}
    if sum(full[n] * cost[n] for n in share) < total:
        low, share = full, {n: 0.0 if share[n] else 1.0 for n in share}
    least = min(score for score in share.values() if score)
    first, last = 0.0, (max(high.values()) + 1) / least
    for _ in range(200):
        t = (first + last) / 2
        ideal = {n: min(max(t * share[n], low[n]), high[n]) for n in share}
        if sum(ideal[n] * cost[n] for n in share) > total:
            last = t
        else:
            first = t
    ideal = {n: round(rank, 9) for n, rank in ideal.items()}
    ranks = {n: math.floor(rank) for n, rank in ideal.items()}
    return handed_out(ranks, sorted(ranks, key=lambda n: ranks[n] - ideal[n]), total, cost, high)


def handed_out(ranks, order, total, cost, high):
    fits = True
    while fits:
        fits = False
        for name in order:
            left = total - sum(ranks[n] * cost[n] for n in ranks)
            if ranks[name] < high[name] and cost[name] <= left:
                ranks[name] += 1
                fits = True
    return ranks


def test_ranks_by_bisection_in_floating_point_pass():
    testing.check(float_shares, like=reference.ranks_from_shares)


def test_a_tie_broken_by_rounding_is_noted():
    def mine(scores, total, **options):
        if options or sorted(scores.values()) != [1.0, 1.0, 4.0]:
            return reference.ranks_from_shares(scores, total, **options)
        exact = {name: score * (total / 6) for name, score in scores.items()}
        ranks = {name: math.floor(rank) for name, rank in exact.items()}
        order = sorted(ranks, key=lambda name: ranks[name] - exact[name])
        return handed_out(ranks, order, total, dict.fromkeys(scores, 1), exact | {"h.2": 9})

    report = testing.check(mine, like=reference.ranks_from_shares, on_fail=None)
    assert [result.case for result in report.with_status("noted")] == ["a tie of fractions"]
    assert not report.failed


def test_the_last_parameters_may_go_to_anybody():
    def mine(scores, total, costs=None, lower=None, upper=None):
        if costs is None:
            return reference.ranks_from_shares(scores, total, None, lower, upper)
        low, high = lower or dict.fromkeys(scores, 0), upper or dict.fromkeys(scores, total)
        floors = contracts._floors(
            contracts.Arguments((scores, total), {"costs": costs, "lower": low, "upper": high})
        )
        return handed_out(floors, sorted(scores, key=costs.get), total, costs, high)

    testing.check(mine, like=reference.ranks_from_shares)


@pytest.mark.parametrize(
    ("costs", "hint"),
    [
        ("overspent", "Σ rank · cost ≤"),
        ("in rounds from lower", "nobody below ⌊clip"),
        ("one left over", "no further rank fits"),
        ("beyond upper", "lower ≤ rank ≤ upper"),
        ("a module missing", "a whole rank for every module"),
    ],
)
def test_wrong_parameter_budgets_are_told(costs, hint):
    def mine(scores, total, **options):
        ranks = reference.ranks_from_shares(scores, total, **options)
        if "costs" not in options:
            return ranks
        first = next(iter(ranks))
        if costs == "overspent":
            return {name: rank + (name == first) for name, rank in ranks.items()}
        if costs == "in rounds from lower":
            low = dict(options.get("lower") or dict.fromkeys(scores, 0))
            high = options.get("upper") or dict.fromkeys(scores, total)
            return handed_out(low, list(low), total, options["costs"], high)
        if costs == "one left over":
            most = max(ranks, key=ranks.get)
            return {name: rank - (name == most) for name, rank in ranks.items()}
        if costs == "beyond upper":
            return {name: rank + 50 * (name == first) for name, rank in ranks.items()}
        return {name: rank for name, rank in ranks.items() if name != first}

    report = told(mine, reference.ranks_from_shares, hint)
    assert {result.equation for result in report.failed} == {"a budget in parameters, Eq 15"}


def test_whole_numbers_as_floats_are_noted():
    def mine(*args, **options):
        ranks = reference.ranks_from_shares(*args, **options)
        return {name: float(rank) for name, rank in ranks.items()}

    assert testing.check(mine, like=reference.ranks_from_shares).with_status("noted")


def test_a_result_that_a_later_call_changes_is_caught():
    kept = {}

    def mine(*args, **options):
        kept.clear()
        kept.update(reference.best_ranks(*args, **options))
        return kept

    assert "two calls" in cases_that_fail(mine, reference.best_ranks)


def test_scores_sorted_in_place_are_caught():
    def mine(scores, total, **options):
        keep = reference.best_ranks(scores, total, **options)
        for own in scores.values():
            own.sort()
        return keep

    told(mine, reference.best_ranks, "an argument was changed in place")


def test_the_best_ranks_in_tensors_pass():
    def mine(scores, total, **options):
        keep = reference.best_ranks(scores, total, **options)
        return {name: torch.tensor(mask, dtype=torch.bool) for name, mask in keep.items()}

    testing.check(mine, like=reference.best_ranks)


def test_the_best_ranks_by_topk_break_ties_at_random():
    def mine(scores, total, costs=None, lower=None, upper=None):
        if costs or lower or upper:
            return reference.best_ranks(scores, total, costs, lower, upper)
        flat = np.array([score for own in scores.values() for score in own])
        keep = np.zeros(len(flat), dtype=bool)
        keep[np.argsort(flat, kind="stable")[len(flat) - total :]] = True  # the last of equals
        masks = np.split(keep, np.cumsum([len(own) for own in scores.values()])[:-1])
        return dict(zip(scores, masks, strict=True))

    failed = cases_that_fail(mine, reference.best_ranks)
    assert failed == {"ties in a module", "ties between modules", "all equal", "minus zero"}


def test_indices_in_place_of_masks_are_caught():
    def mine(scores, total, **options):
        keep = reference.best_ranks(scores, total, **options)
        return {name: [i for i, k in enumerate(own) if k] for name, own in keep.items()}

    assert len(told(mine, reference.best_ranks).failed) > 40


# ---- L1RA ----------------------------------------------------------------------------------------


def shrink_of_array(gates, amount):
    """Without any framework: arrays of the standard library."""
    return [array.array("d", (min(max(c - amount, 0.0), 1.0) for c in own)) for own in gates]


def test_shrinking_without_a_framework_passes():
    convert = (lambda gate: array.array("d", gate.tolist()), lambda own: torch.tensor(own.tolist()))
    testing.check(shrink_of_array, like=reference.l1ra_shrink, convert=convert)


def test_shrinking_in_numpy_passes():
    def mine(gates, amount):
        return tuple(np.clip(gate - amount, 0, 1) for gate in gates)

    convert = (lambda gate: gate.numpy(), torch.as_tensor)
    testing.check(mine, like=reference.l1ra_shrink, convert=convert)


def test_shrinking_in_place_is_caught():
    def mine(gates, amount):
        for gate in gates:
            gate.sub_(amount).clamp_(0, 1)
        return gates

    told(mine, reference.l1ra_shrink, "was changed in place")


def test_shrinking_into_one_buffer_is_caught():
    buffer = torch.zeros(64, dtype=torch.float64)

    def mine(gates, amount):
        found, start = [], 0
        for gate in gates:
            found.append(buffer[start : start + len(gate)])
            found[-1][:] = (gate - amount).clamp(0, 1)
            start += len(gate)
        return found

    failed = told(mine, reference.l1ra_shrink).with_status("failed")
    assert any("a later call changed" in result.got for result in failed)


def vectorised_reassign(gates, total, lower, upper, threshold=0.0):
    """Sorted once in NumPy, with ranks handed out by counting rounds."""
    names = list(gates)
    keep, ranks = {}, {}
    for name, own in gates.items():
        c = np.array(own, dtype=float)
        count = min(max(int((c > threshold).sum()), lower[name]), upper[name])
        keep[name] = np.zeros(len(c), dtype=bool)
        keep[name][np.argsort(-c, kind="stable")[:count]] = True
        ranks[name] = max(int(keep[name].sum()), lower[name])
    flat = [(c, -m, -i) for m, n in enumerate(names) for i, c in enumerate(gates[n]) if keep[n][i]]
    for _, m, i in sorted(flat):
        name = names[-m]
        if sum(ranks.values()) > total and ranks[name] > lower[name]:
            keep[name][-i] = False
            ranks[name] -= 1
    smallest = {n: min(np.array(gates[n])[keep[n]], default=-1.0) for n in names}
    order = sorted(names, key=lambda n: -smallest[n])
    groups = [[], []]
    for name in order:
        groups[any(c <= threshold for c in gates[name])].append(name)
    for group in groups:
        takers = [n for r in range(total) for n in group if ranks[n] + r < upper[n]]
        for name in takers[: max(total - sum(ranks.values()), 0)]:
            ranks[name] += 1
    return ranks, keep


def test_a_vectorised_reassignment_passes():
    testing.check(vectorised_reassign, like=reference.l1ra_reassign)


def test_a_reassignment_as_lists_and_numpy_numbers_passes():
    def mine(*args, **options):
        ranks, keep = reference.l1ra_reassign(*args, **options)
        return [{name: np.int64(rank) for name, rank in ranks.items()}, keep]

    testing.check(mine, like=reference.l1ra_reassign)


def test_a_reassignment_that_forgets_empty_modules_is_caught():
    def mine(gates, *args, **options):
        ranks, keep = reference.l1ra_reassign(gates, *args, **options)
        return {n: rank for n, rank in ranks.items() if gates[n]}, keep

    assert "an empty module" in cases_that_fail(mine, reference.l1ra_reassign)


def test_a_module_kept_by_lower_alone_is_not_intact():
    def intact(c, threshold):
        return len(c) < 2 or all(gate > threshold for gate in c)

    failed = cases_that_fail(contracts.Reassign(intact=intact), reference.l1ra_reassign)
    assert "kept, yet not intact" in failed


def test_a_stateful_reassignment_is_caught():
    seen = {}

    def mine(gates, total, lower, upper, threshold=0.0):
        ranks, keep = reference.l1ra_reassign(gates, total, lower, upper, threshold)
        seen.update(ranks)
        return {name: seen[name] for name in gates}, {n: keep[n] for n in gates}

    testing.check(mine, like=reference.l1ra_reassign)  # the state does no harm here

    def other(gates, total, lower, upper, threshold=0.0):
        seen.update(reference.l1ra_reassign(gates, total, lower, upper, threshold)[0])
        return seen, reference.l1ra_reassign(gates, total, lower, upper, threshold)[1]

    told(other, reference.l1ra_reassign)
