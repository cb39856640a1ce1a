"""Sensitivity-LoRA (arXiv 2509.09119): ranks from the diagonal of a Hessian, before training.

At a minimum the loss changes by dE ≈ ½ Σ h_ii δw_i² (Eq 7). So a matrix with a large diagonal is
sensitive, and gets more ranks. For each weight matrix w, h is its diagonal with N entries; σ and μ
are the standard deviation and the mean over all matrices.

    code               paper        meaning
    trace              S_g          Eq 8       tr(H) = Σ h_ii
    topk_mean          S_topk       Eq 9       mean of the k largest h_ii, k = N/2
    effective_rank     S_er         Eq 10      smallest k whose k largest reach a share α of Σ h_ii
    weighted           β·S, γ·S     Eq 11, 13  a metric times its own coefficient σ/μ²
    Metrics.local      S_l          Eq 12      β1 S_topk + β2 S_er
    Metrics.theta      θ            Eq 14      γ1 S_g + γ2 S_l
    proportional_ranks r_w          Eq 15      θ_w / Σθ · R (budget.py)

Departures from the paper, and what it leaves open:

- Which Hessian is an argument, `curvature`. The paper's own is the proxy of post-training
  quantisation, the mean square of a layer's inputs, which is the default. Any function
  (model, loss_fn, batches, targets) → {name: (d_out, d_in) or (d_in,)} will do.
- N is d_out · d_in for a diagonal over the whole matrix. The input proxy, which all rows of a
  matrix share, counts once: N = d_in, as in the paper. So traces and effective ranks of the two
  kinds are on different scales, and the ranks can differ widely.
- Padding is left out of the calibration statistics: see `curvature.input_second_moment`.
- An exact diagonal can have negative entries. The local metrics count them as zero, the trace keeps
  their sign, a negative θ counts as zero, and a mean trace that is not positive is an error.
- If all metrics are equal, θ is 0/0. Here it is uniform.
- Rounding is not stated in the paper: see `minirank.budget`.
- Sampling errors are not stated in the paper: see settling.py and stability.py.
- In Llama-like decoders the paper's proxy gives most of the budget to a few layers: `allocate`
  warns of it, see dominance.py.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..checks import (
    as_generator,
    quoted_names,
    require,
    require_batches,
    require_function,
    warn_caller,
)
from ..curvature.estimate import Estimate
from ..curvature.input_moment import input_second_moment
from ..curvature.unreached import IdleLayerWarning, warn_of_idle_layers
from ..distributed import Pooled, from_first, number_of_shards
from ..layers.linear import linear_shape
from ..layers.targets import Targets, layers_called
from ..layers.wrap import lora_layers
from ..measure import NO_BATCH, LossFn, with_hint_at_one_batch
from .allocation import Allocation
from .allocator import ShareAllocator
from .constraints import Constraints
from .dominance import dominant_modules, massive_inputs
from .settling import Draws, SettlingAllocator, Value
from .stability import (
    Diagonals,
    Groups,
    Stability,
    check_groups,
    interpolated_effective_rank,
    resampled_stability,
)

# ---- Eqs 8–14 ----------------------------------------------------------------------------------


def trace(h: Tensor) -> Tensor:
    """Eq 8, S_g = Σ h_ii. h: any shape → ()."""
    return h.sum()


def topk_mean(h: Tensor, fraction: float = 0.5) -> Tensor:
    """Eq 9, S_topk: the mean of the k = max(1, ⌊fraction · N⌋) largest entries.

    h: any shape; negative entries count as 0. → ().

    >>> topk_mean(torch.tensor([1.0, 8.0, 2.0, 5.0]))  # (8 + 5) / 2
    tensor(6.5000)
    """
    k = max(1, math.floor(fraction * h.numel()))
    return h.flatten().clamp(min=0).topk(k, sorted=False).values.mean()


def effective_rank(h: Tensor, share: float = 0.85) -> Tensor:
    """Eq 10, S_er: the smallest k whose k largest entries sum to at least share · Σ h_ii.

    h: any shape; negative entries count as 0. → (), a count in h's dtype; 0 if no entry is
    positive. It is no rank of a matrix, and no entropy.

    >>> effective_rank(torch.tensor([1.0, 8.0, 2.0, 5.0]))  # 8 + 5 < 0.85 · 16 ≤ 8 + 5 + 2
    tensor(3.)
    """
    cumulative = h.flatten().clamp(min=0).sort(descending=True).values.cumsum(0)
    if cumulative[-1] <= 0:
        return h.new_zeros(())
    return (cumulative < share * cumulative[-1]).sum().to(h.dtype) + 1


def weighted(metric: Tensor) -> Tensor:
    """Eqs 11 and 13: a metric times its coefficient σ/μ² over all matrices. (n,) → (n,).

    σ is the population's; the sample's would scale every θ alike. The product is computed as
    (σ/μ)(S/μ), which does not underflow. A metric that is equal everywhere gives 0.

    >>> weighted(torch.tensor([1.0, 3.0]))  # σ = 1, μ = 2
    tensor([0.2500, 0.7500])
    """
    mean = metric.mean()
    if mean == 0 or (metric == metric[0]).all():
        return torch.zeros_like(metric)
    return metric.std(correction=0) / mean * (metric / mean)


class Metrics(NamedTuple):
    """The metrics of all matrices, float64, each of shape (n,) in module order."""

    trace: Tensor  # S_g
    topk_mean: Tensor  # S_topk
    effective_rank: Tensor  # S_er
    local: Tensor  # S_l
    theta: Tensor  # θ, which `score` returns


def matrix_metrics(
    diagonals: Iterable[Tensor], topk_fraction: float = 0.5, effective_share: float = 0.85
) -> Tensor:
    """S_g, S_topk and S_er (Eqs 8–10) of each diagonal: (3, n), float64, on the CPU."""
    return _matrix_metrics(diagonals, topk_fraction, partial(effective_rank, share=effective_share))


def sensitivity_metrics(metrics: Tensor) -> Metrics:
    """Eqs 11–14 from the (3, n) of `matrix_metrics`. If all metrics are equal, θ = 0/0 is uniform.

    Raises:
        ValueError: the mean trace is not positive, so that σ/μ² says nothing.
    """
    S_g, S_topk, S_er = metrics
    if S_g.mean() <= 0:
        raise ValueError(
            f"the mean Hessian trace over {len(S_g)} matrices is {S_g.mean():.3g}; Eq 7 needs a "
            "minimum: train further, take more samples if it is an estimate, or use a curvature "
            "that is never negative: gauss_newton"
        )
    S_l = weighted(S_topk) + weighted(S_er)  # Eqs 11, 12
    theta = (weighted(S_g) + weighted(S_l)).clamp(min=0)  # Eqs 13, 14
    return Metrics(S_g, S_topk, S_er, S_l, theta if theta.any() else torch.ones_like(theta))


# ---- the same for metrics with sampling errors -------------------------------------------------


def smooth_metrics(
    diagonals: Iterable[Tensor], topk_fraction: float = 0.5, effective_share: float = 0.85
) -> Tensor:
    """`matrix_metrics` with the smooth form of Eq 10, for the jackknife: (3, n), float64."""
    smooth = partial(interpolated_effective_rank, share=effective_share)
    return _matrix_metrics(diagonals, topk_fraction, smooth)


def theta_of_drawn(metrics: Tensor) -> Tensor:
    """θ of smooth metrics that were drawn within their errors: (3n,) → (n,).

    Rounding the smooth form of Eq 10 up gives its count. Local metrics cannot be negative, so drawn
    ones are clamped. If the drawn traces have a mean ≤ 0, σ/μ² has no meaning: negative traces
    become 0, and if none is positive, the traces are ignored.
    """
    S_g, S_topk, S_er = metrics.view(3, -1)
    if S_g.mean() <= 0:
        S_g = S_g.clamp(min=0) if (S_g > 0).any() else torch.ones_like(S_g)
    drawn = torch.stack([S_g, S_topk.clamp(min=0), S_er.ceil().clamp(min=0)])
    return sensitivity_metrics(drawn).theta


def _matrix_metrics(
    diagonals: Iterable[Tensor], topk_fraction: float, local_rank: Callable[[Tensor], Tensor]
) -> Tensor:
    """Eqs 8–10 with `local_rank` for Eq 10: (3, n)."""

    def of_one(diagonal: Tensor) -> Tensor:
        h = diagonal.detach().double().cpu()
        return torch.stack([trace(h), topk_mean(h, topk_fraction), local_rank(h)])

    return torch.stack([of_one(diagonal) for diagonal in diagonals], dim=1)


# ---- the allocator -----------------------------------------------------------------------------


class Curvature(Protocol):
    """Any estimator: {name: (d_out, d_in)}, or (d_in,) for a diagonal that all rows share."""

    def __call__(
        self, model: nn.Module, loss_fn: LossFn, batches: Iterable[Any], targets: Targets, /
    ) -> Mapping[str, Tensor]: ...


class Calibration(NamedTuple):
    """What one run over the batches measured."""

    diagonals: Diagonals
    metrics: Metrics
    groups: Groups | None


class SensitivityLoRA(ShareAllocator, SettlingAllocator[Groups]):
    """Ranks before training, by the curvature of the loss.

    Args:
        model: with plain linear layers, pretrained; not changed.
        loss_fn: (model, batch) -> scalar mean loss.
        batches: calibration data, iterated once by each `score()` or `settle()`.
        targets: see `linear_targets`.
        curvature: (model, loss_fn, batches, targets) -> {name: (d_out, d_in) or (d_in,)}. Default:
            the paper's input second moment, which runs forward passes only. Bind options with
            functools.partial. The function can iterate over the batches, but cannot call len() or
            index, since it gets them behind the progress bar. In Llama-like decoders take uniform
            ranks, or bound the ranks: `allocate(…, max_rank=n)`, n twice the average rank. On
            SmolLM2-135M nothing here was better than uniform ranks, and the default without a bound
            was much worse (examples/results/README.md).
        topk_fraction: k/N in Eq 9 (the paper: 1/2; it also tried 1/3).
        effective_share: α in Eq 10 (the paper: 0.85; it also tried 0.80).
        groups: measure the batches in this many groups (up to twice as many; at least 4), so that
            `stability` and `settle` can tell how sure the ranks are. Each group must reach some
            target. The measurements of all groups are held. None: all batches together.
        progress: show a bar over the batches, in a terminal or a notebook. No bar is written to a
            file or a pipe. False: never.

    After `score()` or `settle()`, `curvatures` holds the diagonals, {name: (d_out, d_in) or
    (d_in,)}, and `metrics` each matrix's S_g, S_topk, S_er, S_l and θ, {name: {metric: float}}. A
    call that raises leaves these, the scores and `stability` as they were.

    Raises:
        TypeError: an argument of the wrong kind; a single mapping as `batches`.
        ValueError: no target, or an option out of its range.

    Warns:
        UserWarning: `targets` is None and the model has LoRA layers, which are then left out; or
            the batches come from a loader that gives each of several processes a part of the data,
            and the curvature is not `minirank.distributed.pooled`.
        IdleLayerWarning, by `score` and `settle`: no token reaches some targets (an expert that is
            never chosen), which therefore score zero.

    Source: Sensitivity-LoRA (arXiv 2509.09119), Eqs 8–15.

    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    >>> batches = [torch.randn(32, 8) for _ in range(40)]
    >>> allocator = SensitivityLoRA(
    ...     model, lambda model, x: model(x).square().mean(), batches, groups=10, progress=False
    ... )
    >>> {name: round(float(theta), 2) for name, theta in allocator.score().items()}
    {'0': 0.86, '2': 0.43}
    >>> allocator.allocate(6).ranks
    {'0': 4, '2': 2}
    >>> allocator.stability(6).max_moved  # with other data of the same kind
    0
    >>> allocator.settle(6, max_moved=1).batches  # so many of the 40 are enough
    10
    """

    method = "Sensitivity-LoRA"
    _more = "Give more batches"

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
            require(0 < value <= 1, name, value, "above 0 and at most 1")
        require_function("loss_fn", loss_fn)
        require_function("curvature", curvature)
        require_batches(batches)
        if groups is not None:
            check_groups(groups)
        if number_of_shards(batches) > 1 and not isinstance(curvature, Pooled):
            warn_caller(
                f"the batches are this process's part of the data of {number_of_shards(batches)} "
                "processes, so that each process would get other scores and ranks: give "
                "curvature=minirank.distributed.pooled(curvature), which combines them, or score "
                "on one process and share the allocation (from_first)"
            )
        self.loss_fn = loss_fn
        self.batches = batches
        self.targets = _plain_targets(model, targets)
        self.curvature = curvature
        self.topk_fraction = topk_fraction
        self.effective_share = effective_share
        self.groups = groups
        self.progress = progress
        self.curvatures: dict[str, Tensor] = {}
        self.metrics: dict[str, dict[str, float]] = {}
        self._groups: Groups | None = None  # the measurements of the last run

    def score(self) -> dict[str, Tensor]:
        """Measure all batches, and store the scores for `allocate`.

        Returns:
            {name: θ, shape (), float64}.

        Raises:
            ValueError: the curvature lacks a target, is not finite or has a wrong shape; the mean
                trace is not positive; no batch; and whatever the curvature raises.
        """
        with self._progress_bar() as batches:
            if self.groups is None:
                calibration = self._calibration(self._diagonals(batches), None)
            else:
                groups = Groups(self.groups)
                for _ in self._fill(groups, batches):
                    pass
                calibration = self._calibration(groups.mean(), groups)
        return self._store(calibration)

    def _equal_scores(self) -> dict[str, Tensor]:
        return dict.fromkeys(self.targets, torch.ones((), device="cpu"))

    def _last_measurement(self) -> Groups:
        self._require_groups("stability")
        if self._groups is None:
            raise RuntimeError("stability needs scores: call score() first")
        return self._groups

    def _require_groups(self, asked: str) -> int:
        if self.groups is None:
            raise RuntimeError(
                f"{asked} needs scores of groups of batches: make it with "
                "SensitivityLoRA(…, groups=10)"
            )
        return self.groups

    def _looks(self) -> Generator[Groups, None, None]:
        groups = Groups(self._require_groups("settle"))
        looked_at = 0
        with self._progress_bar() as batches:
            for _ in self._fill(groups, batches):
                if len(groups) == groups.least:
                    looked_at = groups.batches
                    yield groups
        if not groups.batches:
            raise ValueError(NO_BATCH)
        if groups.batches > looked_at:
            yield groups

    def _agreed(self, value: Value) -> Value:
        if isinstance(self.curvature, Pooled):
            return from_first(value, self.curvature.group)
        return value

    def _progress_bar(self) -> Any:
        """The batches behind a bar."""
        disable = None if self.progress else True  # None: show it where there is a terminal
        return tqdm(self.batches, desc="calibration", unit="batch", disable=disable, leave=False)

    def _fill(self, groups: Groups, batches: Iterable[Any]) -> Iterator[None]:
        """Measure the batches into `groups`, group by group, with a pause after each."""
        stream = iter(batches)
        while group := self._next_batches(stream, groups.batches_per_group):
            with warnings.catch_warnings():
                # What one group does not reach, another may: _calibration() asks all of them.
                warnings.simplefilter("ignore", IdleLayerWarning)
                diagonals = self._diagonals(group)
            groups.add(diagonals, len(group))
            yield

    def _next_batches(self, stream: Iterator[Any], count: int) -> list[Any]:
        if isinstance(self.curvature, Pooled):  # every process must have as many
            return self.curvature.next_batches(stream, count)
        return list(islice(stream, count))

    def _diagonals(self, batches: Iterable[Any]) -> Diagonals:
        """The curvature of these batches, checked. An `Estimate` stays one."""
        loss_fn = with_hint_at_one_batch(self.loss_fn, self.batches)
        estimate = self.curvature(self.model, loss_fn, batches, list(self.targets))
        checked = {
            name: _checked_diagonal(name, module, estimate.get(name))
            for name, module in self.targets.items()
        }
        return estimate if isinstance(estimate, Estimate) else checked

    def _calibration(self, diagonals: Diagonals, groups: Groups | None) -> Calibration:
        metrics = matrix_metrics(
            [diagonals[name] for name in self.targets], self.topk_fraction, self.effective_share
        )
        if groups is not None:
            warn_of_idle_layers(groups.idle())
        return Calibration(diagonals, sensitivity_metrics(metrics), groups)

    def _adopt(self, groups: Groups) -> dict[str, Tensor]:
        return self._store(self._calibration(groups.mean(), groups))

    def _store(self, calibration: Calibration) -> dict[str, Tensor]:
        """Make a run's results the ones that this object answers from."""
        metrics = calibration.metrics
        self._groups = calibration.groups
        self.curvatures = dict(calibration.diagonals)
        self.metrics = {
            name: {key: float(values[i]) for key, values in metrics._asdict().items()}
            for i, name in enumerate(self.targets)
        }
        return self.store_scores(dict(zip(self.targets, metrics.theta.unbind(), strict=True)))

    def _stability_of(self, groups: Groups, constraints: Constraints, draws: Draws) -> Stability:
        def statistic(diagonals: Diagonals) -> Tensor:
            in_order = [diagonals[name] for name in self.targets]
            return smooth_metrics(in_order, self.topk_fraction, self.effective_share).flatten()

        def divide(theta: Tensor) -> Allocation:
            scores = dict(zip(self.targets, theta.unbind(), strict=True))
            return self._divide(scores, constraints)

        stability = resampled_stability(
            theta_of_drawn,
            divide,
            groups.jackknife(statistic),
            confidence=draws.confidence,
            resamples=draws.resamples,
            generator=as_generator(draws.generator),
            batches=groups.batches,
        )
        dominant = dominant_modules(
            stability.allocation.ranks, constraints, massive_inputs(groups.mean())
        )
        return replace(stability, dominant=tuple(dominant))

    def _massive_inputs(self) -> dict[str, float]:
        return massive_inputs(self.curvatures)


def _plain_targets(model: nn.Module, targets: Targets) -> dict[str, nn.Module]:
    """`linear_targets`, which leaves out layers that have an adapter: said here where nothing was
    named."""
    adapted = list(lora_layers(model)) if targets is None else []
    if not adapted:
        return layers_called(model, targets)
    advice = "score the plain model before wrap(), or unwrap(model) first"
    try:
        plain = layers_called(model)
    except ValueError as error:
        raise ValueError(
            f"every linear layer has an adapter ({quoted_names(adapted)}), and SensitivityLoRA "
            f"scores plain layers: {advice}"
        ) from error
    warn_caller(
        f"SensitivityLoRA scores plain linear layers, so {quoted_names(adapted)} will get no rank "
        f"here, having an adapter already. {advice.capitalize()}; or name targets=, if the other "
        "layers alone are meant",
    )
    return plain


def _checked_diagonal(name: str, module: nn.Module, diagonal: Tensor | None) -> Tensor:
    """Raise ValueError unless the diagonal is there, finite and of a right shape."""
    shape = linear_shape(module)
    assert shape is not None  # linear_targets() selects by it
    if diagonal is None:
        raise ValueError(
            f"the curvature returned nothing for {name!r}: expected one tensor per target"
        )
    if diagonal.shape not in (shape, shape[1:]):
        raise ValueError(
            f"the curvature of {name!r} has shape {tuple(diagonal.shape)}: expected (d_out, d_in) "
            f"= {shape}, or (d_in,) = {shape[1:]} for a diagonal that all rows share"
        )
    if not torch.isfinite(diagonal).all():
        raise ValueError(
            f"the curvature of {name!r} is not finite: check the data, or the estimator"
        )
    return diagonal
