"""What the estimators by random vectors share: the vectors, and the loop that draws them.

A probe is one random vector for each batch, and what these vectors tell together: a mean over the
batches. The user's argument `samples` counts probes. Elsewhere "sample" means a sample of the data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import require
from ..measure import differentiable_twice, repeatable
from .averaging import NOTHING_IDLE, DiagonalAverage, TraceAverage, check_tolerance
from .estimate import Estimate
from .objective import Objective
from .unreached import warn_of_idle_layers


class ProbedDiagonal(NamedTuple):
    """What K random vectors tell of one layer's diagonal, on one batch."""

    total: Tensor  # (d_out, d_in), the sum of the K diagonals
    traces: Tensor  # (K,), the trace of each


# (batch, K, whether this is the first pass over the batches) → {name: what K random vectors tell};
# None for a layer that the batch does not reach
ProbeBatch = Callable[[Any, int, bool], Mapping[str, ProbedDiagonal | None]]


def mean_over_probes(
    objective: Objective,
    probe_batch: ProbeBatch,
    *,
    samples: int,
    tolerance: float | None,
    chunk_size: int,
) -> Estimate:
    """The mean over `samples` probes, or fewer: until the standard errors are within `tolerance`.

    The value of one probe is a weighted mean over all batches, each with a random vector of its
    own. One pass over the batches draws `chunk_size` vectors for each batch.
    """
    diagonals, traces = DiagonalAverage(objective.layers), TraceAverage(objective.layers)
    drawn = 0
    with differentiable_twice(objective.model):
        while drawn < samples and not traces.errors_within(tolerance):
            count = min(chunk_size, samples - drawn)
            first_pass = drawn == 0
            last_batch, pass_traces = _one_pass(
                objective, probe_batch, count, first_pass, diagonals
            )
            drawn += count
            if pass_traces is None and not first_pass:
                raise ValueError(
                    f"the batches can be iterated only once, but {samples} samples in chunks of "
                    f"{chunk_size} need several passes: give a list or a DataLoader, or "
                    "chunk_size=samples"
                )
            if pass_traces is None:
                break  # checked_means() names the fault
            for name, values in pass_traces.items():
                for value in values:
                    traces.add(name, value)
        unreached = diagonals.unreached() if traces.samples else []
        idle = objective.idle_diagonals(last_batch, unreached) if unreached else NOTHING_IDLE
    estimate = Estimate(
        diagonals.checked_means(idle),
        samples=traces.samples,
        over="probes",
        standard_errors=traces.standard_errors,
        weights={name: weight / drawn for name, weight in diagonals.weights.items()},
        idle=tuple(idle),
    )
    warn_of_idle_layers(idle)
    return estimate


def _one_pass(
    objective: Objective,
    probe_batch: ProbeBatch,
    count: int,
    first_pass: bool,
    diagonals: DiagonalAverage,
) -> tuple[Any, dict[str, list[float]] | None]:
    """Draw `count` vectors for every batch and add their diagonals to `diagonals`.

    Returns: the last batch, and {name: the trace of each of the `count` probes, a mean over the
    batches}; None instead if the batches weigh nothing together.
    """
    batches = objective.batches
    if first_pass:
        batches = repeatable(objective.model, objective.loss_fn, batches)
    batch, weight_sum = None, 0.0
    trace_sums: dict[str, Tensor] = {}
    for batch in batches:
        weight = objective.batch_weight(batch)
        weight_sum += weight
        for name, probed in probe_batch(batch, count, first_pass).items():
            if probed is None:
                diagonals.add(name, None, weight * count)
                continue
            diagonals.add(name, probed.total.div_(count), weight * count)
            weighted = probed.traces * weight
            trace_sums[name] = trace_sums[name] + weighted if name in trace_sums else weighted
    if weight_sum == 0:
        return batch, None
    return batch, {
        name: (trace_sums[name] / weight_sum).tolist() if name in trace_sums else [0.0] * count
        for name in objective.layers
    }


def random_signs(like: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` vectors of ±1 with equal chance, (count, *like.shape), drawn on the generator's
    device."""
    shape = (count, *like.shape)
    number = math.prod(shape)
    # Each of the eight bits of a random byte is a sign.
    byte, bit = (torch.arange(size, device=like.device) for size in (256, 8))
    signs_of_byte = ((byte[:, None] >> bit & 1) * 2 - 1).to(like)
    random_bytes = torch.randint(
        0, 256, (-(-number // 8),), generator=generator, device=generator.device
    )
    signs = signs_of_byte.index_select(0, random_bytes.to(like.device))
    return signs.flatten()[:number].view(shape)


def check_sampling(
    samples: int, tolerance: float | None, generator: torch.Generator | None
) -> None:
    # A seed is refused: every call would start anew, and groups of batches would get the same
    # vectors.
    if not isinstance(generator, torch.Generator):
        raise TypeError(
            f"random vectors need generator=torch.Generator().manual_seed(…), got {generator!r}"
        )
    check_tolerance(tolerance)
    require(samples >= 1, "samples", samples, "at least 1")
