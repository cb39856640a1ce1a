"""hutchinson.py and sampling.py: every vector of signs enumerated gives the exact diagonal and the
stated variance; drawn ones cover it as often as their standard errors say."""

from __future__ import annotations

import importlib
import itertools

import pytest
import torch
import torch.nn.functional as F
from helpers.curvature_cases import CASES, build, classify, mlp, pairs
from helpers.estimators import coverage_of_traces, seeded
from torch import nn

from minirank import reference, testing
from minirank.curvature import (
    diagnostics,
    exact_hessian_diagonal,
    hutchinson_outputs,
    hutchinson_weights,
)
from minirank.curvature.sampling import random_signs

# torch.func.hessian's own, in torch 2.13
pytestmark = pytest.mark.filterwarnings(
    "ignore:`torch.jit.script` is deprecated:DeprecationWarning"
)

BOTH = [hutchinson_weights, hutchinson_outputs]

hutchinson = importlib.import_module("minirank.curvature.hutchinson")


def tiny():
    return nn.Sequential(nn.Linear(3, 2, bias=False), nn.Tanh(), nn.Linear(2, 2, bias=False))


class TinyRecurrence(nn.Module):
    """One layer, called again on its own outputs."""

    def __init__(self):
        super().__init__()
        self.step = nn.Linear(2, 2)

    def forward(self, x):
        return self.step(torch.tanh(self.step(x)) + x)


class TinySequence(nn.Module):
    """Two positions that meet behind the layer."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 2)

    def forward(self, x):
        return torch.tanh(self.inner(x)).prod(1)


TINY = {
    "mlp": (tiny, pairs((3,), (2,))),
    "recurrence": (TinyRecurrence, pairs((2,), (2,))),
    "sequence": (TinySequence, pairs((2, 3), (2,))),
}


def two_classes(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1] % 2)


def enumerate_signs(monkeypatch, shapes):
    """Let the estimator draw every combination of signs over tensors of these shapes; returns how
    many there are."""
    total = sum(torch.Size(shape).numel() for shape in shapes)
    every = torch.tensor(list(itertools.product([1.0, -1.0], repeat=total)), dtype=torch.float64)
    parts = [
        p.view(-1, *s)
        for p, s in zip(
            every.split([torch.Size(s).numel() for s in shapes], 1), shapes, strict=True
        )
    ]
    queue = iter(parts)
    monkeypatch.setattr(
        hutchinson, "random_signs", lambda like, count, generator: next(queue)[:count]
    )
    return len(every)


@pytest.mark.parametrize("independent", [True, False])
@pytest.mark.parametrize("case", TINY)
def test_outputs_the_mean_over_all_signs_is_the_exact_diagonal(case, independent, monkeypatch):
    make, batches = TINY[case]
    model = build(make)
    shapes = {"mlp": [(2, 2), (2, 2)], "recurrence": [(2, 2), (2, 2)], "sequence": [(2, 2, 2)]}[
        case
    ]
    count = enumerate_signs(monkeypatch, shapes)
    h = hutchinson_outputs(
        model,
        two_classes,
        batches,
        generator=seeded(),
        samples=count,
        chunk_size=count,
        independent=independent,
    )
    for name, exact in exact_hessian_diagonal(model, two_classes, batches).items():
        torch.testing.assert_close(h[name], exact, rtol=1e-12, atol=1e-15)
        assert exact.abs().max() > 1e-4


def test_weights_the_mean_over_all_signs_is_the_exact_diagonal_and_the_variance_the_stated_one(
    monkeypatch,
):
    model, batches = build(lambda: nn.Sequential(tiny()[0], nn.Tanh())), pairs((3,), (4,))
    count = enumerate_signs(monkeypatch, [(2, 3)])
    h = hutchinson_weights(
        model, two_classes, batches, generator=seeded(), samples=count, chunk_size=count
    )
    expected = reference.hessian_diagonal(model, two_classes, batches, ["0"])
    torch.testing.assert_close(h["0"], expected["0"], rtol=1e-12, atol=1e-15)

    def loss(weight):
        return two_classes(lambda x: torch.tanh(x @ weight.t()), batches[0])

    H = torch.func.hessian(loss)(model[0].weight.detach()).reshape(6, 6)
    off = H - H.diagonal().diag()
    variance = (
        2 * off.square().sum() / (count - 1)
    )  # of the mean of `count` values, estimated from n − 1
    torch.testing.assert_close(h.standard_errors["0"] ** 2, float(variance), rtol=1e-10, atol=0)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("estimate", BOTH)
def test_unbiased_on_every_kind_of_module(estimate, case):
    """|trace − exact| below 4.5 standard errors: false alarm once in 100,000 traces."""
    make, batches = CASES[case]
    model = build(make)
    exact = exact_hessian_diagonal(model, classify, batches)
    found = estimate(model, classify, batches, generator=seeded(1), samples=400, chunk_size=100)
    assert (found.samples, found.over) == (400, "probes")
    for name, h in exact.items():
        assert abs(float(found[name].sum() - h.sum())) < 4.5 * found.standard_errors[name]
        assert found.standard_errors[name] < 0.6 * float(h.abs().sum())


def test_signs_on_the_weights_have_the_mean_and_the_variance_of_the_reference():
    """Ratios of deviations from 400 values each: 5 standard errors of 5 %."""
    model, batches = build(mlp), pairs((5,), (6,))
    found = hutchinson_weights(
        model, classify, batches, generator=seeded(1), samples=400, chunk_size=100
    )
    generator = seeded(2)
    singles = [
        reference.hutchinson(model, classify, batches, list(found), generator=generator, samples=1)
        for _ in range(400)
    ]
    for name, h in found.items():
        traces = torch.stack([single[name].sum() for single in singles])
        error = float(traces.std()) / 400**0.5
        assert 0.75 < found.standard_errors[name] / error < 1.25
        assert abs(float(h.sum() - traces.mean())) < 4.5 * 2**0.5 * error


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("estimate", BOTH)
def test_standard_errors_are_those_of_single_samples(estimate, case):
    make, batches = CASES[case]
    model, together, apart = build(make), seeded(), seeded()
    found = estimate(model, classify, batches, generator=together, samples=5, chunk_size=1)
    singles = [estimate(model, classify, batches, generator=apart, samples=1) for _ in range(5)]
    for name in found:
        mean, error = found[name], found.standard_errors[name]
        torch.testing.assert_close(
            mean, sum(one[name] for one in singles) / 5, rtol=1e-10, atol=1e-14
        )
        traces = torch.stack([one[name].sum() for one in singles])
        torch.testing.assert_close(error, float(traces.std()) / 5**0.5, rtol=1e-8, atol=1e-14)


@pytest.mark.parametrize("estimate", BOTH)
def test_a_95_percent_interval_of_a_trace_covers_the_exact_one_in_92_to_98_percent(estimate):
    model, batches = build(mlp), pairs((5,), (6, 3))
    exact = exact_hessian_diagonal(model, classify, batches)
    assert 0.92 <= coverage_of_traces(estimate, exact, model, classify, batches) <= 0.98


@pytest.mark.parametrize("estimate", BOTH)
def test_chunks_passes_and_vmap_change_nothing_but_rounding(estimate):
    model, batches = build(mlp), pairs((5,), (4,))
    whole = estimate(model, classify, batches, generator=seeded(), samples=6, chunk_size=6)
    one_by_one = estimate(model, classify, batches, generator=seeded(), samples=1, chunk_size=6)
    assert one_by_one.standard_errors["0"] == float("inf")
    assert one_by_one.samples == 1
    assert whole.weights == one_by_one.weights == dict.fromkeys(whole, 4.0)
    parts = estimate(model, classify, batches, generator=seeded(), samples=7, chunk_size=3)
    assert parts.samples == 7
    assert parts.weights == whole.weights


def test_one_sign_vector_per_sample_whatever_the_chunks():
    """On a diagonal Hessian a single sample is exact, so every way of drawing must give it."""
    model = nn.Sequential(nn.Linear(2, 3, bias=False)).double()
    batch = torch.eye(2, dtype=torch.float64)[:1] * 3

    def squares(model, batch):
        return model(batch).square().sum(1).mean()

    exact = exact_hessian_diagonal(model, squares, [batch])["0"]
    for estimate, samples, chunk in itertools.product(BOTH, (1, 5), (1, 2, 5)):
        found = estimate(
            model, squares, [batch], generator=seeded(), samples=samples, chunk_size=chunk
        )["0"]
        torch.testing.assert_close(found[:, :1], exact[:, :1], rtol=1e-14, atol=0)


@pytest.mark.parametrize("estimate", BOTH)
def test_batches_of_unequal_size_weigh_as_told(estimate):
    """Every sample has the same Hessian, c · I: so the batches' means c differ, and no sign
    matters."""
    model = nn.Sequential(nn.Linear(1, 2, bias=False)).double()

    def scaled(model, batch):
        return (model(torch.ones_like(batch)).square().sum(1) * batch[:, 0]).mean() / 2

    batches = [
        torch.full((1, 1), 1.0, dtype=torch.float64),
        torch.full((3, 1), 5.0, dtype=torch.float64),
    ]
    for options, expected in (({}, 4.0), ({"batch_weight": lambda batch: 1}, 3.0)):
        found = estimate(
            model, scaled, batches, generator=seeded(), samples=5, chunk_size=2, **options
        )["0"]
        torch.testing.assert_close(
            found, torch.full((2, 1), expected, dtype=torch.float64), rtol=1e-14, atol=0
        )


@pytest.mark.parametrize("independent", [True, False])
def test_independence_is_checked_on_every_batch_of_the_first_pass_alone(independent, monkeypatch):
    """Each check costs a Hessian-vector product."""
    checks = []
    monkeypatch.setattr(diagnostics, "check_independent", lambda *tensors: checks.append(tensors))
    options = {"samples": 6, "chunk_size": 2, "independent": independent, "generator": seeded()}
    hutchinson_outputs(build(mlp), classify, pairs((5,), (4, 2, 3)), **options)
    assert len(checks) == (3 if independent else 0)


@pytest.mark.parametrize("estimate", BOTH)
def test_tolerance_stops_on_the_standard_error(estimate):
    model, batches = build(mlp), pairs((5,), (6,))
    options = {"samples": 5000, "chunk_size": 50}
    found = estimate(model, classify, batches, generator=seeded(), tolerance=0.05, **options)
    assert 50 <= found.samples < 5000
    scale = sum(abs(float(h.sum())) for h in found.values()) / len(found)
    assert max(found.standard_errors.values()) <= 0.05 * scale
    coarse = estimate(model, classify, batches, generator=seeded(), tolerance=0.2, **options)
    assert coarse.samples < found.samples


@pytest.mark.parametrize("estimate", BOTH)
def test_a_negative_trace_does_not_stop_early(estimate):
    """With no curvature upwards at all; a rule on the relative change of a running trace stops at
    once here."""
    model, batches = build(mlp), pairs((5,), (6,))
    exact = exact_hessian_diagonal(model, lambda m, b: -classify(m, b), batches)
    found = estimate(
        model,
        lambda m, b: -classify(m, b),
        batches,
        generator=seeded(),
        tolerance=0.1,
        samples=5000,
        chunk_size=20,
    )
    assert found.samples > 20
    for name, h in exact.items():
        assert abs(float(found[name].sum() - h.sum())) < 4.5 * found.standard_errors[name]
    assert float(sum(h.sum() for h in exact.values())) < 0


@pytest.mark.parametrize("estimate", BOTH)
def test_the_generator_alone_decides(estimate):
    model, batches = build(mlp), pairs((5,), (4,))
    with testing.unchanged(model):
        first = estimate(model, classify, batches, generator=seeded(5), samples=4)
    torch.manual_seed(99)
    again = estimate(model, classify, batches, generator=seeded(5), samples=4)
    other = estimate(model, classify, batches, generator=seeded(6), samples=4)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)
    generator = seeded(5)
    estimate(model, classify, batches, generator=generator, samples=4)
    fresh = estimate(model, classify, batches, generator=generator, samples=4)
    assert not any(torch.equal(first[name], fresh[name]) for name in first)


@pytest.mark.parametrize("estimate", BOTH)
def test_batches_that_can_be_iterated_once(estimate):
    model, batches = build(mlp), pairs((5,), (4, 2))
    expected = estimate(model, classify, batches, generator=seeded(), samples=4)
    found = estimate(model, classify, iter(batches), generator=seeded(), samples=4)
    assert all(torch.equal(found[name], h) for name, h in expected.items())
    with pytest.raises(
        ValueError, match=r"iterated only once, but 4 samples in chunks of 2 .* give a list"
    ):
        estimate(model, classify, iter(batches), generator=seeded(), samples=4, chunk_size=2)
    with pytest.raises(ValueError, match="batches is empty"):
        estimate(model, classify, [], generator=seeded(), samples=4)


@pytest.mark.parametrize("estimate", BOTH)
@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"samples": 0}, "samples must be at least 1, got 0"),
        ({"tolerance": 0.0}, r"tolerance must be above 0 .* got 0.0"),
        ({"chunk_size": 0}, "chunk_size must be at least 1"),
    ],
)
def test_options_out_of_range_are_errors(estimate, options, match):
    with pytest.raises(ValueError, match=match):
        estimate(build(mlp), classify, pairs((5,), (2,)), generator=seeded(), **options)


@pytest.mark.parametrize("estimate", BOTH)
def test_a_seed_is_no_generator(estimate):
    """Every call would start anew, and groups of batches would share their vectors."""
    with pytest.raises(TypeError, match=r"random vectors need generator=torch\.Generator.* got 0"):
        estimate(build(mlp), classify, pairs((5,), (2,)), generator=0)


def test_signs_are_plus_and_minus_one_evenly():
    signs = random_signs(torch.zeros(50, 20), 10, seeded())
    assert signs.shape == (10, 50, 20)
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    assert abs(float(signs.mean())) < 0.05  # 5 standard errors of 10,000


def test_samples_that_interact_are_detected_and_done_without_the_assumption():
    model, batches = build(mlp), pairs((5,), (3,))

    def contrastive(model, batch):
        z = F.normalize(model(batch[0]), dim=1)
        return -torch.logsumexp(z @ z.t(), 1).mean()

    with pytest.raises(ValueError, match="samples of a batch interact"):
        hutchinson_outputs(model, contrastive, batches, generator=seeded())
    exact = exact_hessian_diagonal(model, contrastive, batches, independent=False)
    found = hutchinson_outputs(
        model, contrastive, batches, generator=seeded(), samples=500, independent=False
    )
    plain = hutchinson_weights(model, contrastive, batches, generator=seeded(), samples=500)
    for name, h in exact.items():
        for estimate in (found, plain):
            assert abs(float(estimate[name].sum() - h.sum())) < 4.5 * estimate.standard_errors[name]
