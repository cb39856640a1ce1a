"""diagnostics.py: interactions of samples are found beside a product that is known already, where
signs cancel by chance too, and at the cost of one more product."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers.curvature_cases import build, classify, pairs
from helpers.estimators import seeded
from torch import nn

from minirank.curvature import diagnostics, gauss_newton, hutchinson_outputs
from minirank.curvature.diagnostics import Product, check_independent
from minirank.curvature.sampling import random_signs


def known_product(values, variables, v):
    return Product(
        [v], torch.autograd.grad(values, variables, [v], retain_graph=True, materialize_grads=True)
    )


def half_of_square(x, mixing):
    """∂/∂x of ½ Σ (mixing x)², with its graph."""
    (gradient,) = torch.autograd.grad((mixing @ x).square().sum() / 2, x, create_graph=True)
    return gradient


def leaf(*shape, dtype):
    return torch.randn(*shape, generator=seeded(), dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_known_product_tells_samples_that_interact_from_others(dtype):
    x, v = leaf(4, 3, dtype=dtype), torch.randn(4, 3, generator=seeded(1), dtype=dtype)
    apart = half_of_square(x, torch.diag(torch.arange(1, 5, dtype=dtype)))
    check_independent([apart], [x], known_product([apart], [x], v))
    slightly = torch.eye(4, dtype=dtype)
    slightly[0, 1] = 100 * torch.finfo(dtype).eps ** 0.5  # no rounding explains this
    mixed = half_of_square(x, slightly)
    with pytest.raises(ValueError, match="samples of a batch interact"):
        check_independent([mixed], [x], known_product([mixed], [x], v))


def confident_gradient(margin):
    """The gradient by its logits of a cross-entropy in float32, where every row prefers its label
    by about `margin`; and the logits."""
    labels = torch.arange(12) % 3
    logits = margin * F.one_hot(labels, 3) + torch.randn(12, 3, generator=seeded()) / 50
    logits.requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(logits, labels), logits, create_graph=True)
    return gradient, logits


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("margin", [2, 8, 10, 12, 14, 15])
def test_rounding_counts_the_same_beside_a_known_product(margin, seed):
    """Beyond a margin of 12, this Hessian in float32 is rounding."""
    values, variables = confident_gradient(margin)
    known = known_product([values], [variables], random_signs(variables, 1, seeded(seed))[0])
    for product in (None, known):
        if margin <= 12:
            check_independent([values], [variables], product)
        else:
            with pytest.raises(ValueError, match="lost in rounding"):
                check_independent([values], [variables], product)


@pytest.mark.parametrize(("known", "products"), [(True, 1), (False, 2)])
def test_a_sound_batch_costs_one_product_beside_a_known_one(known, products, monkeypatch):
    x, v = leaf(4, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    values = half_of_square(x, torch.eye(4, dtype=torch.float64))
    product = known_product([values], [x], v) if known else None
    calls, grad = [], torch.autograd.grad
    monkeypatch.setattr(
        diagnostics.torch.autograd, "grad", lambda *a, **k: calls.append(a) or grad(*a, **k)
    )
    check_independent([values], [x], product)
    assert len(calls) == products


class Summed(nn.Module):
    """Both outputs of a sample take the sum of all outputs of the batch."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 2, bias=False)

    def forward(self, x):
        z = self.inner(x)
        return z + z.sum()


def square_of_sum(model, batch):
    return model(batch[0]).sum().square()


@pytest.mark.parametrize("first", [[], [1]], ids=["first batch", "after a batch of one sample"])
def test_signs_that_cancel_hide_no_interaction(first):
    """Two samples with two outputs each: the signs of both cancel with a chance of 1/4."""
    linear, summed = build(lambda: nn.Sequential(nn.Linear(3, 2, bias=False))), build(Summed)
    batches = pairs((3,), [*first, 2])

    def squared(model, batch):
        return model(batch[0]).square().mean()

    for seed in range(12):
        options = {"samples": 1, "generator": seeded(seed)}
        with pytest.raises(ValueError, match="samples of a batch interact"):
            hutchinson_outputs(linear, square_of_sum, batches, **options)
        with pytest.raises(ValueError, match="samples of a batch interact"):
            gauss_newton(summed, squared, batches, **options)


@pytest.mark.parametrize("estimate", [hutchinson_outputs, gauss_newton])
def test_an_interaction_that_only_a_later_batch_has_is_detected(estimate):
    class Sometimes(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.head = nn.Linear(5, 4), nn.Linear(4, 3)

        def forward(self, x):
            h = torch.tanh(self.inner(x))
            return self.head(h - h.mean(0) if len(x) == 3 else h)

    model = build(Sometimes)
    options = {"samples": 1, "generator": seeded()}
    estimate(model, classify, pairs((5,), (4, 2, 4)), **options)
    with pytest.raises(ValueError, match="samples of a batch interact"):
        estimate(model, classify, pairs((5,), (4, 2, 3)), **options)
