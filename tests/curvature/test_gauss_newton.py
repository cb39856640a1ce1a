"""gauss_newton.py and fisher.py against the plain reference: dense Jᵀ H J, a loop over samples."""

from __future__ import annotations

import importlib
import itertools

import pytest
import torch
import torch.nn.functional as F
from helpers.curvature_cases import CASES, assert_equals, build, by_reference, classify, mlp, pairs
from helpers.estimators import coverage_of_traces, seeded
from torch import nn

from minirank import reference
from minirank.curvature import empirical_fisher, exact_hessian_diagonal, gauss_newton
from minirank.curvature.output_hessian import DENSE_LIMIT
from minirank.measure import batch_length

module = importlib.import_module("minirank.curvature.gauss_newton")


def smoothed(y, labels):
    return F.cross_entropy(y, labels, label_smoothing=0.1)


def partly_ignored(y, labels):
    return F.cross_entropy(y, torch.where(labels == 1, -100, labels), reduction="sum") / 7


def weighted_classes(y, labels):
    return F.cross_entropy(y, labels, weight=torch.tensor([1.0, 0.2, 3.0], dtype=y.dtype))


def squared(y, labels):
    return F.mse_loss(y, F.one_hot(labels, 3).to(y))


def binary(y, labels):
    return F.binary_cross_entropy_with_logits(y, F.one_hot(labels, 3).to(y))


def mixed(y, labels):
    """Convex, neither diagonal nor softmax's: taken apart numerically."""
    return (
        torch.logsumexp(y, -1) + (y[..., 0] - 2 * y[..., 1]).square() + y[..., 2].square() / 9
    ).mean()


def of_model(loss_of_output):
    """loss(y, labels) as a loss_fn(model, batch)."""
    return lambda model, batch: loss_of_output(model(batch[0]), batch[1])


LOSSES = {
    f.__name__: f
    for f in (F.cross_entropy, smoothed, partly_ignored, weighted_classes, squared, binary, mixed)
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("loss", LOSSES)
def test_exact_equals_the_reference(loss, case):
    make, batches = CASES[case]
    model, loss_fn = build(make), of_model(LOSSES[loss])
    found = gauss_newton(model, loss_fn, batches)
    assert found.over == "batches"
    expected = by_reference(reference.gauss_newton_diagonal, model, loss_fn, batches, found)
    assert_equals(found, expected, rtol=1e-7, atol=1e-13)
    for h in found.values():
        assert float(h.min()) >= 0
        assert float(h.max()) > 1e-6


def test_a_convolution_without_samples_is_one_sample():
    last = nn.AdaptiveAvgPool1d(1), nn.Flatten(-2)
    model = build(lambda: nn.Sequential(nn.Conv1d(3, 4, 1), nn.Tanh(), *last))

    def loss_fn(model, x):
        return model(x).square().sum()

    x = torch.randn(3, 5, dtype=torch.float64)
    found = gauss_newton(model, loss_fn, [x], batch_weight=lambda x: 1)
    assert_equals(found, gauss_newton(model, loss_fn, [x[None]]), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "options", [{"chunk_size": 1}, {"chunk_size": 100}, {"independent": False}]
)
def test_options_change_nothing(options):
    make, batches = CASES["encoder layer"]
    model = build(make)
    expected = gauss_newton(model, classify, batches)
    for name, h in gauss_newton(model, classify, batches, **options).items():
        torch.testing.assert_close(h, expected[name], rtol=1e-10, atol=1e-16)


class TokenModel(nn.Module):
    """One prediction per position, positions mixed by attention."""

    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.layer(x))


def token_loss(y, labels):
    targets = (labels[:, None] + torch.arange(y.shape[1])) % 3
    return F.cross_entropy(y.flatten(0, 1), targets.flatten())


def test_one_prediction_per_position():
    model, batches = build(TokenModel), pairs((3, 4), (2, 3))
    loss_fn = of_model(token_loss)
    found = gauss_newton(model, loss_fn, batches)
    expected = by_reference(reference.gauss_newton_diagonal, model, loss_fn, batches, found)
    assert_equals(found, expected, rtol=1e-7, atol=1e-13)
    sampled = gauss_newton(model, loss_fn, batches, samples=400, chunk_size=100, generator=seeded())
    for name, h in found.items():
        assert abs(float(sampled[name].sum() - h.sum())) < 4.5 * sampled.standard_errors[name]


def test_the_last_layer_and_a_linear_network_have_the_hessian_itself():
    make, batches = CASES["mlp"]
    model = build(make)
    exact, found = (
        exact_hessian_diagonal(model, classify, batches),
        gauss_newton(model, classify, batches),
    )
    torch.testing.assert_close(found["4"], exact["4"], rtol=1e-7, atol=1e-13)
    assert not torch.allclose(found["0"], exact["0"], rtol=0.1)
    linear = build(lambda: nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)))
    exact, found = (
        exact_hessian_diagonal(linear, classify, batches),
        gauss_newton(linear, classify, batches),
    )
    for name in exact:
        torch.testing.assert_close(found[name], exact[name], rtol=1e-7, atol=1e-13)


@pytest.mark.parametrize("loss", ["cross_entropy", "squared", "mixed"])
def test_the_mean_over_all_signs_is_the_exact_diagonal(loss, monkeypatch):
    model, batches, of_output = build(mlp), pairs((5,), (3,)), LOSSES[loss]
    every = torch.tensor(list(itertools.product([1.0, -1.0], repeat=9)), dtype=torch.float64).view(
        -1, 3, 1, 3
    )
    monkeypatch.setattr(module, "random_signs", lambda like, count, generator: every[:count])

    def loss_fn(model, batch):
        return of_output(model(batch[0]), batch[1])

    found = gauss_newton(model, loss_fn, batches, samples=512, chunk_size=512, generator=seeded())
    for name, h in gauss_newton(model, loss_fn, batches).items():
        torch.testing.assert_close(found[name], h, rtol=1e-10, atol=1e-16)
        assert found.over == "probes"


def test_a_95_percent_interval_of_a_sampled_trace_covers_92_to_98_percent():
    model, batches = build(mlp), pairs((5,), (6, 3))
    exact = gauss_newton(model, classify, batches)
    assert 0.92 <= coverage_of_traces(gauss_newton, exact, model, classify, batches) <= 0.98


def test_many_classes_need_no_dense_matrix():
    classes = DENSE_LIMIT + 100
    model = build(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, classes)))
    batches = [(torch.randn(2, 3, dtype=torch.float64, generator=seeded()), torch.tensor([5, 600]))]
    exact = gauss_newton(model, classify, batches, chunk_size=classes)
    sampled = gauss_newton(model, classify, batches, samples=200, chunk_size=50, generator=seeded())
    for name, h in exact.items():
        assert abs(float(sampled[name].sum() - h.sum())) < 4.5 * sampled.standard_errors[name]
    hessian = exact_hessian_diagonal(model, classify, batches, "2")["2"]
    torch.testing.assert_close(exact["2"], hessian, rtol=1e-6, atol=1e-13)

    def mixes(model, batch):
        y = model(batch[0])
        return (torch.logsumexp(y, 1) + y.sum(1).square()).mean()

    with pytest.raises(
        ValueError, match=r"an output of 612 columns is neither .* use hutchinson_outputs"
    ):
        gauss_newton(model, mixes, batches)


def test_certain_predictions_give_zeros_not_nan():
    model = nn.Sequential(nn.Linear(2, 3)).double()
    x = torch.tensor([[1e4, -1e4], [2e4, 1e4]], dtype=torch.float64)
    h = gauss_newton(model, classify, [(x, torch.tensor([0, 1]))])["0"]
    assert torch.isfinite(h).all()


def test_an_output_of_one_number_per_sample():
    class Regression(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.head = nn.Linear(5, 4), nn.Linear(4, 1)

        def forward(self, x):
            return self.head(torch.tanh(self.inner(x)))[:, 0]

    def error(y, labels):
        return (y - labels).square().mean()

    model, batches = build(Regression), pairs((5,), (4, 2))
    found = gauss_newton(model, of_model(error), batches)
    expected = by_reference(reference.gauss_newton_diagonal, model, of_model(error), batches, found)
    assert_equals(found, expected, rtol=1e-8, atol=1e-14)


class LossInside(nn.Module):
    """Like transformers' models: a record comes out, and the loss with it."""

    def __init__(self):
        super().__init__()
        self.body = mlp()
        self.classifier = nn.Linear(3, 3)

    def forward(self, x, labels):
        logits = self.classifier(torch.tanh(self.body(x)))
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def test_a_model_that_computes_its_loss_names_its_head():
    model, batches = build(LossInside), pairs((5,), (4, 2))

    def loss_fn(model, batch):
        return model(*batch)["loss"]

    with pytest.raises(
        ValueError, match=r"output of LossInside is a dict, not a tensor: .* output=\"classifier\""
    ):
        gauss_newton(model, loss_fn, batches)
    found = gauss_newton(model, loss_fn, batches, output="classifier")
    hessian = exact_hessian_diagonal(model, loss_fn, batches)
    torch.testing.assert_close(found["classifier"], hessian["classifier"], rtol=1e-7, atol=1e-13)
    with pytest.raises(ValueError, match=r"output='classifer' names no module.*classifier"):
        gauss_newton(model, loss_fn, batches, output="classifer")


def concave(model, batch):
    return -model(batch[0]).square().mean()


def saddle(model, batch):
    y = model(batch[0])
    return (y[:, 0] * y[:, 1]).mean()


def across_samples(model, batch):
    return model(batch[0]).sum(0).square().mean()


def twice(model, batch):
    return classify(model, batch) + classify(model, batch)


@pytest.mark.parametrize(
    ("loss_fn", "options", "match"),
    [
        (concave, {}, "not convex in the model's output"),
        (saddle, {}, "not convex in the model's output"),
        (across_samples, {}, "the loss mixes rows of the model's output"),
        (twice, {}, "the output '' came 2 times in one loss"),
        (classify, {"samples": 0, "generator": seeded()}, "samples must be at least 1"),
        (classify, {"tolerance": -1.0}, "tolerance must be above 0"),
    ],
)
def test_what_gauss_newton_refuses(loss_fn, options, match):
    with pytest.raises(ValueError, match=match):
        gauss_newton(build(mlp), loss_fn, pairs((5,), (4,)), **options)


@pytest.mark.parametrize("generator", [None, 0])
def test_samples_need_a_generator(generator):
    with pytest.raises(
        TypeError, match=r"random vectors need generator=torch\.Generator.* got (None|0)"
    ):
        gauss_newton(build(mlp), classify, pairs((5,), (4,)), samples=3, generator=generator)


def test_samples_that_meet_inside_the_network_are_detected():
    class Mixing(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.head = nn.Linear(5, 4), nn.Linear(4, 3)

        def forward(self, x):
            h = torch.tanh(self.inner(x))
            return self.head(h - h.mean(0))

    model, batches = build(Mixing), pairs((5,), (4, 2))
    with pytest.raises(ValueError, match="samples of a batch interact"):
        gauss_newton(model, classify, batches)
    with pytest.raises(ValueError, match="samples of a batch interact"):
        empirical_fisher(model, classify, batches)
    found = gauss_newton(model, classify, batches, independent=False)
    expected = by_reference(reference.gauss_newton_diagonal, model, classify, batches, found)
    assert_equals(found, expected, rtol=1e-7, atol=1e-13)


# ---- empirical Fisher --------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_empirical_fisher_equals_the_reference(case):
    make, batches = CASES[case]
    model = build(make)
    found = empirical_fisher(model, classify, batches)
    assert all(parameter.grad is None for parameter in model.parameters())
    expected = by_reference(reference.empirical_fisher, model, classify, batches, found)
    assert_equals(found, expected, rtol=1e-12, atol=1e-16)
    assert found.over == "batches"
    assert found.samples == len(batches)
    assert found.weights == dict.fromkeys(
        found, float(sum(batch_length(batch) for batch in batches))
    )


def test_tolerance_stops_before_the_end_of_the_batches():
    model, batches = build(mlp), pairs((5,), [8] * 200)
    for estimate in (empirical_fisher, gauss_newton):
        whole, part = (
            estimate(model, classify, batches),
            estimate(model, classify, batches, tolerance=0.1),
        )
        assert whole.samples == 200
        assert 10 <= part.samples < 200
        scale = sum(float(h.sum()) for h in part.values()) / len(part)
        assert max(part.standard_errors.values()) <= 0.1 * scale
