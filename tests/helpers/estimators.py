"""Every curvature that differentiates the loss, under one call: for tests of what they all must
do."""

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


def coverage_of_traces(estimate, exact, model, loss_fn, batches, runs=250):
    """How often 95 % intervals of the layers' traces from 40 samples hold the exact ones; 2.02 is
    Student's t for 39 degrees of freedom."""
    generator, hits = seeded(3), 0
    for _ in range(runs):
        found = estimate(model, loss_fn, batches, generator=generator, samples=40, chunk_size=40)
        hits += sum(
            abs(float(found[name].sum() - h.sum())) < 2.02 * found.standard_errors[name]
            for name, h in exact.items()
        )
    return hits / (runs * len(exact))


LOSS_BASED = {
    "exact": exact_hessian_diagonal,
    "reference": hessian_diagonal_reference,
    "Hutchinson, weights": sampled(hutchinson_weights),
    "Hutchinson, outputs": sampled(hutchinson_outputs),
    "Gauss-Newton": gauss_newton,
    "Gauss-Newton, sampled": sampled(gauss_newton),
    "empirical Fisher": empirical_fisher,
}
