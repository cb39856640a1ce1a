"""The contracts of coalitions, SAN, the Shapley sensitivity and Shapley values: who passes, who is
told what."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
import torch
from helpers.contract_checks import (
    assert_the_reference_passes,
    assert_the_twin_is_named,
    told,
)
from torch import nn

from minirank import ShapLoRA, reference, shapley, testing, wrap
from minirank.allocators.masked_gates import by_module
from minirank.allocators.shaplora import ipt, san
from minirank.testing.contracts import shapley as contracts

CONTRACTS = {contract.name: contract for contract in contracts.CONTRACTS}


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


def own_masks(ranks, coalitions, generator):
    return shapley.coalition_masks(sum(ranks), coalitions, generator=generator)


def own_san(gate, P, Q, grad_gate, grad_P, grad_Q):
    return san(ipt(gate, grad_gate), ipt(P, grad_P), ipt(Q, grad_Q))


class Chain(nn.Module):
    """The adapters of the contract's losses as the LoRA layers of a model."""

    def __init__(self, params):
        super().__init__()
        self.names = list(params)
        width = next(iter(params.values()))["P"].shape[0]
        dtype = next(iter(params.values()))["P"].dtype
        for name in self.names:
            layer = nn.Linear(width, width, bias=False, dtype=dtype)
            nn.init.zeros_(layer.weight)
            self.add_module(name.replace(".", "_"), layer)


def own_sensitivity(loss, params, batches, masks):
    """ShapLoRA, with the coalitions given."""
    model = Chain(params)
    named = {name.replace(".", "_"): name for name in params}
    layers = wrap(
        model, {m: len(params[n]["gate"]) for m, n in named.items()}, gate=0.0, scaling=1.0
    )
    for module, layer in layers.items():
        own = params[named[module]]
        layer.gate.data, layer.lora_B.data, layer.lora_A.data = (
            own[key].clone() for key in ("gate", "P", "Q")
        )

    def loss_fn(model, batch):
        adapters = dict(params)  # wrap() makes no layer of rank 0
        for module in layers:
            layer = model.get_submodule(module)
            adapters[named[module]] = {"gate": layer.gate, "P": layer.lora_B, "Q": layer.lora_A}
        return loss(adapters, batch)

    allocator = ShapLoRA(model, loss_fn, batches, progress=False)
    allocator._masks = lambda layers: masks
    scores = by_module(allocator._sensitivities(layers).mean(0), layers)
    empty = next(iter(params.values()))["gate"][:0]
    return {name: scores.get(module, empty) for module, name in named.items()}


@testing.parametrize(own_masks, like=reference.coalition_masks)
def test_our_coalition_masks(check):
    check()


@testing.parametrize(own_san, like=reference.san)
def test_our_san(check):
    check()


@testing.parametrize(own_sensitivity, like=reference.shapley_sensitivity)
def test_our_shapley_sensitivity(check):
    check()


@testing.parametrize(shapley.exact_shapley_values, like=reference.exact_shapley_values)
def test_our_exact_shapley_values(check):
    check()


# ---- coalitions ----------------------------------------------------------------------------------


def shuffled(ranks, coalitions, generator):
    """Right: complements all at the end, rows in random order."""
    players = sum(ranks)
    p = torch.arange(1, 10).repeat(coalitions // 18)[:, None] / 10
    masks = torch.rand(len(p), players, generator=generator) < p
    both = torch.cat([masks, ~masks])
    return both[torch.randperm(len(both), generator=generator)]


def drawn_by_module(ranks, coalitions, generator):
    """Right: drawn module by module."""
    p = torch.arange(1, 10).repeat(coalitions // 18)[:, None] / 10
    parts = [torch.rand(len(p), rank, generator=generator) < p for rank in ranks]
    masks = torch.cat(parts, 1)
    return torch.stack([masks, ~masks], 1).flatten(0, 1)


def bernoulli(ranks, coalitions, generator):
    """Right: torch.bernoulli in place of a comparison."""
    p = torch.arange(1, 10, dtype=torch.float64).repeat(coalitions // 18) / 10
    masks = torch.bernoulli(p[:, None].expand(-1, sum(ranks)), generator=generator).bool()
    return torch.cat([masks, ~masks])


def in_numpy(ranks, coalitions, generator):
    """Right: NumPy draws, from a seed that the generator gives."""
    seed = int(torch.randint(2**62, (), generator=generator))
    p = np.tile(np.arange(1, 10) / 10, coalitions // 18)[:, None]
    masks = np.random.default_rng(seed).random((len(p), sum(ranks))) < p
    return np.concatenate([masks, ~masks])


@pytest.mark.parametrize("mine", [shuffled, drawn_by_module, bernoulli, in_numpy])
def test_other_right_samples_pass(mine):
    testing.check(mine, like=reference.coalition_masks)


@pytest.mark.parametrize("seed", range(8))
def test_right_samples_pass_from_other_seeds_too(seed):
    def mine(ranks, coalitions, generator):
        other = torch.Generator().manual_seed(
            1000 * seed + int(torch.randint(2**40, (), generator=generator))
        )
        return reference.coalition_masks(ranks, coalitions, other)

    testing.check(mine, like=reference.coalition_masks)


def sample(draw, with_complement=True):
    """A sample from draw(p, ranks, generator), a mask for each p."""

    def mine(ranks, coalitions, generator):
        rows = []
        for _ in range(coalitions // 18):
            for k in range(1, 10):
                rows += [mask := draw(k / 10, ranks, generator), ~mask]
                if not with_complement:
                    rows[-1] = ~draw(k / 10, ranks, generator)
        return torch.stack(rows)

    return mine


def uniform(ranks, generator):
    return torch.rand(sum(ranks), generator=generator)


def one_draw_per_module(p, ranks, generator):
    own = torch.rand(len(ranks), generator=generator) < p
    return own.repeat_interleave(torch.tensor(ranks))


def an_exact_number(p, ranks, generator):
    order = torch.randperm(sum(ranks), generator=generator)
    return order < round(p * sum(ranks))


def systematic(p, ranks, generator):
    start = torch.rand((), generator=generator)
    return (torch.arange(sum(ranks)) * 0.6180339887 + start).frac() < p


def the_first_ones(p, ranks, generator):
    return torch.arange(sum(ranks)) < torch.rand((), generator=generator) * 2 * p * sum(ranks)


def pairs(p, ranks, generator):
    half = torch.rand((sum(ranks) + 1) // 2, generator=generator) < p
    return half.repeat_interleave(2)[: sum(ranks)]


def one_half(p, ranks, generator):
    return uniform(ranks, generator) < 0.5


def any_p(p, ranks, generator):
    return uniform(ranks, generator) < torch.rand((), generator=generator)


def tenths_off(p, ranks, generator):
    return uniform(ranks, generator) < p - 0.05


def one_module_always_alike(p, ranks, generator):
    u = uniform(ranks, generator)
    return torch.cat([(u < p)[:1].expand(ranks[0]), (u < p)[ranks[0] :]])


DRAWS = {
    one_draw_per_module: "as with one draw per module",
    an_exact_number: "does not vary as independent draws do",
    systematic: "does not vary as independent draws do",
    pairs: "ranks of one coalition depend on each other",
    the_first_ones: "p = 0.1, 0.2, … 0.9",
    one_half: "p = 0.1, 0.2, … 0.9",
    any_p: "p = 0.1, 0.2, … 0.9",
    tenths_off: "p = 0.1, 0.2, … 0.9",
    one_module_always_alike: "",
}


@pytest.mark.parametrize("draw", DRAWS)
def test_wrong_draws_are_told(draw):
    told(sample(draw), reference.coalition_masks, DRAWS[draw])


def test_masks_without_their_complements_are_told():
    def draw(p, ranks, generator):
        return uniform(ranks, generator) < p

    report = told(sample(draw, False), reference.coalition_masks, "every mask with its complement")
    assert any("in exactly half" in result.expected for result in report.failed) or report.failed


def nested(ranks, coalitions, generator):
    """One draw of uniform numbers for all nine probabilities."""
    rows = []
    for _ in range(coalitions // 18):
        u = uniform(ranks, generator)
        for k in range(1, 10):
            rows += [u < k / 10, u >= k / 10]
    return torch.stack(rows)


def repeated(ranks, coalitions, generator):
    """The same 18 rows again and again."""
    return reference.coalition_masks(ranks, 18, generator).repeat(coalitions // 18, 1)


def test_rows_that_depend_on_each_other_are_told():
    told(nested, reference.coalition_masks, "coalitions depend on each other")
    report = told(repeated, reference.coalition_masks, "coalitions depend on each other")
    assert "modules of four" in {result.case for result in report.failed}


def test_a_seed_of_its_own_the_global_generator_and_one_that_stands_still_are_told():
    def own_seed(ranks, coalitions, generator):
        return reference.coalition_masks(ranks, coalitions, torch.Generator().manual_seed(0))

    def global_generator(ranks, coalitions, generator):
        return reference.coalition_masks(ranks, coalitions, torch.default_generator)

    def initial_seed(ranks, coalitions, generator):
        again = torch.Generator().manual_seed(generator.initial_seed())
        return reference.coalition_masks(ranks, coalitions, again)

    for mine in (own_seed, global_generator, initial_seed):
        report = told(mine, reference.coalition_masks)
        assert [result.case for result in report.failed] == ["the generator"]
    told(initial_seed, reference.coalition_masks, "it moves on")


def test_masks_as_numbers_or_of_another_shape_are_told():
    def numbers(*args):
        return reference.coalition_masks(*args).long()

    def turned(*args):
        return reference.coalition_masks(*args).T

    told(numbers, reference.coalition_masks, "bool of shape (18, 1)")
    told(turned, reference.coalition_masks, "bool of shape")


# ---- SAN -----------------------------------------------------------------------------------------


def numpy_san(gate, P, Q, grad_gate, grad_P, grad_Q):
    gates, columns, rows = (np.abs(w * g) for w, g in ((gate, grad_gate), (P, grad_P), (Q, grad_Q)))
    return gates + columns.mean(0) + rows.mean(1)


def test_san_in_numpy_passes():
    convert = (lambda tensor: tensor.numpy(), torch.as_tensor)
    testing.check(numpy_san, like=reference.san, convert=convert)


def test_a_wrong_san_in_numpy_gets_its_hint():
    def mine(gate, P, Q, grad_gate, grad_P, grad_Q):
        means = abs((P * grad_P).mean(0)) + abs((Q * grad_Q).mean(1))
        return np.abs(gate * grad_gate) + means

    convert = (lambda tensor: tensor.numpy(), torch.as_tensor)
    hint = "equals SAN with absolute values taken after the means (Eq 8)"
    told(mine, reference.san, hint, convert=convert)


def test_san_of_lists_passes():
    """Without any framework: lists of the standard library."""

    class Lists:
        def __init__(self, tensor):
            self.rows, self.shape = tensor.tolist(), tensor.shape

    def mine(gate, P, Q, grad_gate, grad_P, grad_Q):
        scores = Lists(torch.zeros(0))
        scores.rows = [
            abs(gate.rows[i] * grad_gate.rows[i])
            + math.fsum(abs(p[i] * g[i]) for p, g in zip(P.rows, grad_P.rows, strict=True))
            / P.shape[0]
            + math.fsum(abs(q * g) for q, g in zip(Q.rows[i], grad_Q.rows[i], strict=True))
            / Q.shape[1]
            for i in range(P.shape[1])
        ]
        return scores

    convert = (Lists, lambda lists: torch.tensor(lists.rows, dtype=torch.float64))
    testing.check(mine, like=reference.san, convert=convert)


def test_san_with_means_as_products_passes():
    def mine(gate, P, Q, grad_gate, grad_P, grad_Q):
        columns = (P * grad_P).abs().T @ torch.full_like(P[:, :1], 1 / len(P))
        rows = torch.einsum("ri,ri->r", Q.abs(), grad_Q.abs()) / Q.shape[1]
        return columns[:, 0] + rows + (gate * grad_gate).abs() if len(gate) else gate

    testing.check(mine, like=reference.san)


# ---- the Shapley sensitivity ---------------------------------------------------------------------


def with_zeros_skipped(loss, params, batches, masks):
    """Right: batch by batch in place, and scores of 0 outside a coalition without a computation."""
    data = [(contracts.length(batch), batch) for batch in batches]
    total = sum(size for size, _ in data)
    ranks = [len(own["gate"]) for own in params.values()]
    scores = {name: 0 * own["gate"] for name, own in params.items()}
    for mask in masks:
        S = {}
        for (name, own), inside in zip(params.items(), mask.split(ranks), strict=True):
            gate = torch.where(inside, own["gate"], 0.0)
            S[name] = {"gate": gate, "P": own["P"] * inside, "Q": own["Q"] * inside[:, None]}
            S[name] = {key: w.detach().requires_grad_() for key, w in S[name].items()}
        for size, batch in reversed(data):
            (loss(S, batch) * size / total).backward()
        for name, own in S.items():
            g = [torch.zeros_like(w) if w.grad is None else w.grad for w in own.values()]
            scores[name] += reference.san(*(w.detach() for w in own.values()), *g)
    return {name: score / len(masks) for name, score in scores.items()}


def over_tensors(loss, params, batches, masks):
    """Right: every distinct mask once, with its count."""
    distinct, counts = masks.unique(dim=0, return_counts=True)
    total = {name: torch.zeros_like(own["gate"]) for name, own in params.items()}
    for mask, count in zip(distinct, counts, strict=True):
        one = reference.shapley_sensitivity(loss, params, batches, mask[None])
        total = {name: total[name] + count * one[name] for name in params}
    return {name: score / len(masks) for name, score in total.items()}


@pytest.mark.parametrize("mine", [with_zeros_skipped, over_tensors])
def test_other_right_sensitivities_pass(mine):
    testing.check(mine, like=reference.shapley_sensitivity)


def test_a_narrower_result_is_noted():
    def mine(*args):
        return {n: s.float() for n, s in reference.shapley_sensitivity(*args).items()}

    report = testing.check(mine, like=reference.shapley_sensitivity, dtype=torch.float64)
    assert report.with_status("noted")


def test_params_left_changed_are_told():
    def mine(loss, params, batches, masks):
        scores = reference.shapley_sensitivity(loss, params, batches, masks)
        for own in params.values():
            own["gate"].zero_()
        return scores

    told(mine, reference.shapley_sensitivity, "was changed in place")


def test_gradients_that_add_up_over_batches_of_a_second_call_are_told():
    calls = []

    def mine(*args):
        calls.append(1)
        factor = len(calls)  # as with .grad that is never cleared
        return {n: factor * s for n, s in reference.shapley_sensitivity(*args).items()}

    report = testing.check(mine, like=reference.shapley_sensitivity, on_fail=None)
    assert "a second call" in report.failed[0].got


# ---- Shapley values ------------------------------------------------------------------------------


def over_coalitions(value, n):
    """Right: the formula over coalitions, from the largest to the smallest, in float64."""
    phi = np.zeros(n)
    for i in range(n):
        others = [j for j in range(n) if j != i]
        for size in reversed(range(n)):
            for S in combinations(others, size):
                mask = np.zeros(n, dtype=bool)
                mask[list(S)] = True
                without = value(mask)
                mask = mask.copy()
                mask[i] = True
                phi[i] += (value(mask) - without) / (n * math.comb(n - 1, size))
    return phi


def test_values_in_numpy_pass():
    convert = (lambda tensor: tensor.numpy(), torch.as_tensor)
    testing.check(over_coalitions, like=reference.exact_shapley_values, convert=convert)
    testing.check(over_coalitions, like=reference.exact_shapley_values)


def test_values_in_float32_are_noted():
    def mine(value, n):
        return reference.exact_shapley_values(value, n).float()

    assert testing.check(mine, like=reference.exact_shapley_values).with_status("noted")


def test_wrong_masks_are_told():
    def numbers(value, n):
        return reference.exact_shapley_values(lambda mask: value(mask.long()), n)

    def transposed(value, n):
        return reference.exact_shapley_values(lambda mask: value(mask[None]), n)

    told(numbers, reference.exact_shapley_values, "int64")
    told(transposed, reference.exact_shapley_values)


def test_sampled_values_are_told():
    def mine(value, n):
        return shapley.sampled_shapley_values(value, n, pairs=20).values

    assert len(told(mine, reference.exact_shapley_values).failed) > 5


def test_players_in_reverse_are_told():
    def mine(value, n):
        return reference.exact_shapley_values(value, n).flip(0)

    told(mine, reference.exact_shapley_values)
