"""Sensitivity-LoRA (arXiv 2509.09119): ranks from the diagonal of a Hessian, before training.

At a minimum the loss changes by dE ≈ ½ Σ h_ii δw_i² (Eq 7): a matrix with a large diagonal is sensitive, and gets more
ranks. For each weight matrix w, h is its diagonal, N entries; σ and μ² are taken over all matrices.

    code                    paper    meaning
    trace                   S_g      Eq 8    tr(H) = Σ h_ii
    topk_mean               S_topk   Eq 9    mean of the k largest h_ii, k = N/2
    effective_rank          S_er     Eq 10   smallest k whose k largest h_ii reach a share α of Σ h_ii
    weighted                β·S, γ·S Eq 11, 13   a metric times its own coefficient σ/μ²
    local                   S_l      Eq 12   β1 S_topk + β2 S_er
    theta                   θ        Eq 14   γ1 S_g + γ2 S_l
    budget.proportional_ranks        Eq 15   r_w = θ_w / Σθ · R

N is d_out · d_in for a diagonal over the whole matrix. The input proxy, shared by all rows, counts once: N = d_in, as
in the paper; so its traces and effective ranks are not on the scale of an exact diagonal's, nor need the ranks agree.

Departures: which H is an argument (the paper: the input proxy, here the default). An exact diagonal can be negative:
the local metrics clamp its entries at zero, the trace keeps their sign, and a negative θ counts as zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..checks import as_generator
from ..curvature.estimate import Estimate
from ..curvature.input_moment import input_second_moment
from ..layers.linear import linear_shape
from ..layers.targets import Targets, linear_targets
from ..measure import LossFn
from .allocation import Allocation, Allocator, Bound, Unit
from .stability import Diagonals, Groups, Stability, stability


def trace(h: Tensor) -> Tensor:
    """Eq 8, S_g = Σ h_ii. h: any shape → ()."""
    return h.sum()


def topk_mean(h: Tensor, fraction: float = 0.5) -> Tensor:
    """Eq 9, S_topk: the mean of the k = max(1, ⌊fraction · N⌋) largest entries, negative ones counting as 0. → ()."""
    k = max(1, math.floor(fraction * h.numel()))
    return h.flatten().clamp(min=0).topk(k).values.mean()


def effective_rank(h: Tensor, share: float = 0.85, *, whole: bool = True) -> Tensor:
    """Eq 10, S_er: the smallest k whose k largest entries sum to at least share · Σ h_ii, negative ones counting as 0.
    A count, in h's dtype; 0 if nothing is positive. → (). whole=False: where the sum, drawn as a line, meets the
    share, at most 1 below the count: what varies smoothly with h."""
    largest = h.flatten().clamp(min=0).sort(descending=True).values
    cumulative = largest.cumsum(0)
    if cumulative[-1] <= 0:
        return h.new_zeros(())
    before = (cumulative < share * cumulative[-1]).sum()  # k − 1
    if whole:
        return before.to(h.dtype) + 1
    missing = share * cumulative[-1] - (cumulative[before - 1] if before else 0)
    return before + (missing / largest[before]).clamp(1e-9, 1)


def weighted(metric: Tensor) -> Tensor:
    """Eqs 11 and 13: a metric times its σ/μ² over all matrices, (n,) → (n,). σ is the population's; the sample's would
    scale every θ alike. Computed as (σ/μ)(S/μ), which does not underflow; a metric equal everywhere gives 0."""
    mean = metric.mean()
    if mean == 0 or (metric == metric[0]).all():
        return torch.zeros_like(metric)
    return metric.std(correction=0) / mean * (metric / mean)


def matrix_metrics(
    diagonals: Iterable[Tensor],
    topk_fraction: float = 0.5,
    effective_share: float = 0.85,
    *,
    whole: bool = True,
) -> Tensor:
    """S_g, S_topk and S_er (Eqs 8–10) of each diagonal: (3, n), float64. `whole`: see `effective_rank`."""
    h = [diagonal.detach().double().cpu() for diagonal in diagonals]
    S_g = torch.stack([trace(x) for x in h])
    S_topk = torch.stack([topk_mean(x, topk_fraction) for x in h])
    S_er = torch.stack([effective_rank(x, effective_share, whole=whole) for x in h])
    return torch.stack([S_g, S_topk, S_er])


class Metrics(NamedTuple):
    """The metrics of all matrices, float64, each of shape (n,) in module order; `theta` is what `score` returns."""

    trace: Tensor
    topk_mean: Tensor
    effective_rank: Tensor
    local: Tensor
    theta: Tensor


def sensitivity_metrics(of_matrices: Tensor) -> Metrics:
    """Eqs 11–14 from `matrix_metrics`, (3, n). All metrics equal (θ = 0/0): uniform ones.

    Raises ValueError: the mean trace is not positive, so that σ/μ² says nothing.
    """
    S_g, S_topk, S_er = of_matrices
    if S_g.mean() <= 0:
        raise ValueError(
            f"the mean Hessian trace over {len(S_g)} matrices is {S_g.mean():.3g}; Eq 7 needs a minimum: train "
            "further, take more samples if it is an estimate, or use a curvature that is never negative: gauss_newton"
        )
    S_l = weighted(S_topk) + weighted(S_er)  # Eqs 11, 12
    theta = (weighted(S_g) + weighted(S_l)).clamp(min=0)  # Eqs 13, 14
    return Metrics(S_g, S_topk, S_er, S_l, theta if theta.any() else torch.ones_like(theta))


class Curvature(Protocol):
    """Any estimator: {name: (d_out, d_in)}, or (d_in,) for a diagonal that all rows share."""

    def __call__(
        self, model: nn.Module, loss_fn: LossFn, batches: Iterable[Any], targets: Targets, /
    ) -> Mapping[str, Tensor]: ...


class SensitivityLoRA(Allocator):
    """Ranks before training: score() → {name: θ, shape ()}, then allocate(budget).

    Args:
        model: with plain linear layers, pretrained; not changed.
        loss_fn: (model, batch) -> scalar mean loss.
        batches: calibration data, iterated once by each `score()`.
        targets: see `linear_targets`.
        curvature: a function (model, loss_fn, batches, targets) -> {name: (d_out, d_in) or (d_in,)}. Default: the
            paper's input second moment, which runs forward passes only. Bind options with functools.partial. It may
            only iterate over the batches, which it gets behind the progress bar.
        topk_fraction: k/N in Eq 9 (the paper: 1/2; also tried 1/3).
        effective_share: α in Eq 10 (the paper: 0.85; also tried 0.80).
        groups: measure the batches in this many groups (up to twice as many, at least 4), so that `stability` and
            `settle` can tell how sure the ranks are. Each must reach every target, and is held. None: all together.
        progress: show a bar over the batches.

    After `score()`, `curvatures` holds the diagonals and `metrics` each matrix's S_g, S_topk, S_er, S_l and θ.

    Raises ValueError: no target, an argument out of range; from `score()`, whatever the curvature raises, and a
    curvature that lacks a target, is not finite or has a wrong shape.
    """

    method = "Sensitivity-LoRA"

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        batches: Iterable[Any],
        *,
        targets: Targets = None,
        curvature: Curvature = input_second_moment,
        topk_fraction: float = 0.5,
        effective_share: float = 0.85,
        groups: int | None = None,
        progress: bool = True,
    ) -> None:
        super().__init__(model)
        for name, value in (("topk_fraction", topk_fraction), ("effective_share", effective_share)):
            if not 0 < value <= 1:
                raise ValueError(f"{name} must be above 0 and at most 1, got {value!r}")
        for name, function in (("loss_fn", loss_fn), ("curvature", curvature)):
            if not callable(function):
                raise TypeError(
                    f"{name} must be a function, got {type(function).__name__}: {function!r:.60}"
                )
        if not isinstance(batches, Iterable):
            raise TypeError(
                f"batches must be an iterable of what loss_fn takes, got one {type(batches).__name__}"
            )
        if groups is not None:
            Groups(groups)  # refuses too few before anything is measured
        self.loss_fn, self.batches, self.curvature = loss_fn, batches, curvature
        self.targets = linear_targets(model, targets)
        self.topk_fraction, self.effective_share, self.progress = (
            topk_fraction,
            effective_share,
            progress,
        )
        self.groups = groups
        self._measured: Groups | None = None
        self._enough: Callable[[Groups], bool] | None = None  # asked by settle()
        self.curvatures: dict[str, Tensor] = {}
        self.metrics: dict[str, dict[str, float]] = {}

    def _measure(self) -> dict[str, Tensor]:
        bar = tqdm(
            self.batches, desc="calibration", unit="batch", disable=not self.progress, leave=False
        )
        measured = None
        with bar:
            if self.groups is None:
                diagonals = self._curvature(bar)
            else:
                measured = self._by_group(bar, self.groups)
                diagonals = measured.mean()
        metrics = sensitivity_metrics(self._matrix_metrics(diagonals))
        self._measured = measured
        self.curvatures = dict(diagonals)
        self.metrics = {
            name: {key: float(values[i]) for key, values in metrics._asdict().items()}
            for i, name in enumerate(self.targets)
        }
        return dict(zip(self.targets, metrics.theta.unbind(), strict=True))

    def _by_group(self, batches: Iterable[Any], least: int) -> Groups:
        found, stream = Groups(least), iter(batches)
        while group := list(islice(stream, found.batches_per_group)):
            found.add(self._curvature(group), len(group))
            if len(found) == least and self._enough is not None and self._enough(found):
                break
        return found

    def _curvature(self, batches: Iterable[Any]) -> Diagonals:
        found = self.curvature(self.model, self.loss_fn, batches, list(self.targets))
        diagonals = {name: self._checked(name, found.get(name)) for name in self.targets}
        return found if isinstance(found, Estimate) else diagonals

    def _matrix_metrics(self, diagonals: Diagonals, *, whole: bool = True) -> Tensor:
        in_order = [diagonals[name] for name in self.targets]
        return matrix_metrics(in_order, self.topk_fraction, self.effective_share, whole=whole)

    def stability(
        self,
        budget: int,
        *,
        unit: Unit = "rank",
        min_rank: Bound = 0,
        max_rank: Bound = None,
        confidence: float = 0.95,
        resamples: int = 300,
        generator: torch.Generator | int = 0,
    ) -> Stability:
        """Which ranks of `allocate(budget)` would change within the sampling error of the scores? The error is that of
        the batches as a sample of such data, random vectors included. (Of these alone: give the same batches often.)

        Raises RuntimeError: no `groups`, or no `score`. ValueError: as for `allocate`."""
        if self.groups is None:
            raise RuntimeError("stability needs scores by group: SensitivityLoRA(…, groups=10)")
        if self._measured is None:
            raise RuntimeError("stability needs scores: call score() first")

        def theta(
            metrics: Tensor,
        ) -> Tensor:  # of drawn metrics: the local ones cannot be negative, and S_er counts
            S_g, S_topk, S_er = metrics.view(3, -1)
            if S_g.mean() <= 0:  # drawn far from a minimum, where Eqs 13 and 14 say nothing
                S_g = S_g.clamp(min=0) if (S_g > 0).any() else torch.ones_like(S_g)
            return sensitivity_metrics(
                torch.stack([S_g, S_topk.clamp(min=0), S_er.ceil().clamp(min=0)])
            ).theta

        def divide(scores: Tensor) -> Allocation:
            by_name = dict(zip(self.targets, scores.unbind(), strict=True))
            return self._divide(by_name, budget, unit, min_rank, max_rank)

        metrics, deviations = self._measured.jackknife(
            lambda h: self._matrix_metrics(h, whole=False).flatten()
        )
        sampling = (confidence, resamples, as_generator(generator), self._measured.batches)
        return stability(theta, divide, metrics, deviations, *sampling)

    def settle(self, budget: int, *, moved: int = 0, **options: Any) -> Stability:
        """`score()`, but of no more batches than it takes until at most `moved` ranks of `allocate(budget)` would move
        within the sampling error (asked at `groups` batches, and whenever they have doubled). With the batches at an
        end, the result's own `moved` tells how far it came. Options and errors: see `stability`."""
        if self.groups is None:
            raise RuntimeError("settle needs scores by group: SensitivityLoRA(…, groups=10)")

        def enough(found: Groups) -> bool:
            self._measured = found
            return self.stability(budget, **options).moved <= moved

        self._enough = enough
        try:
            self.score()
        finally:
            self._enough = None
        return self.stability(budget, **options)

    def _checked(self, name: str, diagonal: Tensor | None) -> Tensor:
        shape = linear_shape(self.targets[name])
        assert shape is not None  # linear_targets() selects by it
        if diagonal is None:
            raise ValueError(
                f"the curvature returned nothing for {name!r}: expected one tensor per target"
            )
        if diagonal.shape not in (shape, shape[1:]):
            raise ValueError(
                f"the curvature of {name!r} has shape {tuple(diagonal.shape)}: expected (d_out, d_in) = {shape}, "
                f"or (d_in,) = {shape[1:]} for a diagonal that all rows share"
            )
        if not torch.isfinite(diagonal).all():
            raise ValueError(
                f"the curvature of {name!r} is not finite: check the data, or the estimator"
            )
        return diagonal
