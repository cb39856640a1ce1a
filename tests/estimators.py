"""Every curvature that differentiates the loss, under one call: for tests of what they all must do."""

from __future__ import annotations

import torch

from minirank.curvature import (
    empirical_fisher,
    exact_hessian_diagonal,
    gauss_newton,
    hessian_diagonal_reference,
    hutchinson_outputs,
    hutchinson_weights,
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def sampled(estimate):
    """`estimate` with few samples from a seed of its own, so that two calls agree."""

    def call(*args, **options):
        return estimate(*args, **{"generator": seeded(), "samples": 3, **options})

    return call


LOSS_BASED = {
    "exact": exact_hessian_diagonal,
    "reference": hessian_diagonal_reference,
    "Hutchinson, weights": sampled(hutchinson_weights),
    "Hutchinson, outputs": sampled(hutchinson_outputs),
    "Gauss-Newton": gauss_newton,
    "Gauss-Newton, sampled": sampled(gauss_newton),
    "empirical Fisher": empirical_fisher,
}
