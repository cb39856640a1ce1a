"""hessian.py: both exact diagonals against the plain reference, on every kind of module they claim,
and against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch
from helpers.curvature_cases import CASES, assert_equals, build, by_reference, classify
from torch import nn

from minirank import reference
from minirank.curvature import exact_hessian_diagonal, hessian_diagonal_reference


@pytest.mark.parametrize(
    "options", [{}, {"chunk_size": 1}, {"chunk_size": 1000}, {"independent": False}]
)
@pytest.mark.parametrize("case", CASES)
def test_fast_diagonal_equals_the_reference(case, options):
    make, batches = CASES[case]
    model = build(make)
    found = exact_hessian_diagonal(model, classify, batches, **options)
    expected = by_reference(reference.hessian_diagonal, model, classify, batches, found)
    assert_equals(found, expected, rtol=1e-12, atol=1e-15)
    assert all(h.abs().max() > 1e-6 for h in expected.values())


@pytest.mark.parametrize("chunk_size", [1, 7, 1000])
@pytest.mark.parametrize("case", CASES)
def test_entry_by_entry_equals_the_reference(case, chunk_size):
    make, batches = CASES[case]
    model = build(make)
    found = hessian_diagonal_reference(model, classify, batches, chunk_size=chunk_size)
    expected = by_reference(reference.hessian_diagonal, model, classify, batches, found)
    assert_equals(found, expected, rtol=1e-12, atol=1e-15)


def test_a_quadratic_has_the_hessian_that_algebra_gives():
    """L = mean ‖W x‖² over samples: h(W_ij) = 2 mean_n x_nj² / 1, for every row."""
    model = build(lambda: nn.Sequential(nn.Linear(4, 3, bias=False)))
    x = torch.randn(9, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    h = exact_hessian_diagonal(model, lambda m, b: m(b).square().sum(1).mean(), [x])["0"]
    torch.testing.assert_close(h, (2 * x.square().mean(0)).expand(3, 4), rtol=1e-14, atol=0)


def test_a_loss_that_is_linear_in_a_layer_has_no_curvature_there():
    model = build(lambda: nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)))
    for estimate in (exact_hessian_diagonal, hessian_diagonal_reference):
        h = estimate(model, lambda m, b: m(b).sum(), [torch.ones(2, 4, dtype=torch.float64)])
        assert all(torch.equal(d, torch.zeros_like(d)) for d in h.values())
        assert h["0"].shape == (3, 4)
