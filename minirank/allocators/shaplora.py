"""ShapLoRA: ranks by their Shapley sensitivity on validation data (arXiv 2601.17921).

    ΔW = s · P Λ Q (Eq 3): rank i of a module is the player (λ_i, P[:, i], Q[i, :]); the players of
    all modules play together

    paper     code            meaning
    λ_i       gate[i]         starts at 0: wrap(model, ranks, gate=0.0)
    P, Q      lora_B, lora_A  (d_out, r), (r, d_in), Gaussian at the start
    S         mask            a coalition: λ = 0 for every rank outside (Eq 6)
    SAN       san             Eq 7     SAN(i | S) = ipt(λ_i) + mean_j ipt(P_ji) + mean_j ipt(Q_ij)
    ipt(w)    ipt             Eq 8     |w · ∂L/∂w|, with ∂L/∂w over the whole validation set
    score     score()         Eq 9     the mean of SAN(i | S) over coalitions,
                              Eq 10    of which a sample is taken

A rank outside S scores exactly 0: λ_i is zero, and so are λ_i · ∂L/∂λ_i and the factor λ_i of
∂L/∂P[:, i] and ∂L/∂Q[i, :]. The mean of Eq 10 is over all coalitions, and every rank is in half of
them.

The score is no estimate of the Shapley value of a loss. At the minimum a rank with a direction of
its own meets no gradient, whoever else is on, and scores 0. Ranks that share a direction score as
soon as some of them are off (examples/results/README.md has measurements).

    trial = copy.deepcopy(model)                            # stage one, thrown away
    wrap(trial, {name: 8 for name in names}, gate=0.0)
    ...                                                     # train it to convergence
    shaplora = ShapLoRA(trial, loss_fn, validation_batches)
    shaplora.score()
    wrap(model, shaplora.allocate(4 * len(names)))          # stage two: the untouched model

Departures from the paper, and what it leaves open:

- Gradients are accumulated over the whole validation set, in evaluation mode, and |w · ∂L/∂w| is
  taken once per coalition. So scores do not depend on the batch size. A loss that is a mean over
  words or tokens needs `batch_weight`, their number.
- The average of Eq 10 is over all sampled coalitions, those without the rank included.
- The coalitions come from `generator`, the same ones at every `score()`. Standard errors are
  reported.
- The paper's ablations are one argument each: `coalitions=0` (plain sensitivity), 18 or 900 masks,
  `importance="magnitude"` (|w| in place of |w · ∂L/∂w|), and the training data as `batches`.
- The second stage may use any form of the layer: `gate=0.0` again as in the paper, or plain LoRA.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from tqdm.auto import tqdm

from ..checks import require, require_batches, require_function, warn_caller
from ..distributed import (
    check_same,
    from_first,
    gathered,
    number_of_shards,
    on_all,
    require_same,
)
from ..layers.lora import LoRALinear
from ..measure import (
    LossFn,
    batch_length,
    called,
    finite_loss,
    measuring,
    repeatable,
    with_hint_at_one_batch,
)
from ..shapley import coalition_masks, standard_error
from ..tensor_bytes import checksum
from .allocator import RankScoreAllocator
from .masked_gates import (
    Adapter,
    WeightedBatch,
    adapters,
    by_module,
    coalition,
    gradients_for_adapters_only,
    mean_gradient,
    scorable_layers,
    weighted_batches,
    wide,
)

Importance = Literal["sensitivity", "magnitude"]


def ipt(w: Tensor, gradient: Tensor) -> Tensor:
    """Eq 8, |w · ∂L/∂w|, entry by entry.

    >>> ipt(torch.tensor([2.0, -3.0]), torch.tensor([-1.0, 4.0]))
    tensor([ 2., 12.])
    """
    return (w * gradient).abs()


def san(ipt_gate: Tensor, ipt_P: Tensor, ipt_Q: Tensor) -> Tensor:
    """Eq 7, of every rank of one module. ipt_gate: (r,); ipt_P: (d_out, r); ipt_Q: (r, d_in) → (r,)

    A stack of experts has one more axis in front of P and Q, over which the means go too.

    (`minirank.reference.san` takes the parameters and their gradients instead.)

    >>> san(torch.tensor([10.0]), torch.tensor([[1.0], [3.0]]), torch.tensor([[4.0, 6.0]]))
    tensor([17.])
    """
    in_P, in_Q = ipt_P.mean(-2), ipt_Q.mean(-1)  # (r,), or (experts, r)
    if in_P.ndim == 2:
        in_P, in_Q = in_P.mean(0), in_Q.mean(0)
    return ipt_gate + in_P + in_Q


class ShapLoRA(RankScoreAllocator):
    """Ranks after a first training, by their Shapley sensitivity; one global pruning by score.

    To train anew, give the Allocation to `wrap` and the untouched model. To prune in place, give it
    to `resize` and this model.

    Args:
        model: with gated LoRA layers, wrap(model, ranks, gate=0.0), trained; not changed.
        loss_fn: (model, batch) -> scalar mean loss.
        batches: validation data, iterated once by each `score()` and held until it ends.
        coalitions: how many; a multiple of 18 (see `shapley.coalition_masks`). 0: no coalitions,
            all ranks are on, the paper's ablation "sensitivity".
        importance: "magnitude" takes ipt(w) = |w| in Eq 7, without data and coalitions: an
            ablation.
        batch_weight: batch -> number, what the mean loss of a batch is a mean over. Default: the
            number of its samples. 0 leaves the batch out.
        generator: a torch.Generator or a seed, for the coalitions. Every `score()` takes the same
            ones. From a seed they are
            `shapley.coalition_masks(number of ranks, coalitions, generator=seed)`, with the ranks
            in the order of `lora_layers`.
        progress: show a bar over the coalitions, in a terminal or a notebook. No bar is written to
            a file or a pipe. False: never.
        group: processes that share out the coalitions. Each holds the same model and **all** of the
            validation data, which is checked; each gets what one process would get, bit for bit.
            None: no communication.

    Cost: a forward and a backward pass over the data for every coalition, with gradients for the
    adapters alone; and two forward passes of one batch, to see that the loss repeats. float16
    adapters lose small gradients: wrap with dtype=torch.float32.

    After `score()`, `standard_errors` holds those of the scores, {name: (r,)}, over the pairs of a
    coalition and its complement (empty without coalitions). They treat the fixed grid of p as
    random, so they are too large rather than too small.

    Raises:
        TypeError: an argument of the wrong kind; a single mapping as `batches`.
        ValueError: no LoRA layer, one without a gate, frozen, disabled or merged, two that share a
            parameter; an option out of its range.

    Source: ShapLoRA (arXiv 2601.17921), Eqs 6–10.

    >>> from minirank import wrap
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    >>> layers = wrap(model, {"0": 2, "1": 1}, gate=0.0)
    >>> for layer, gates in zip(layers.values(), ([2.0, 0.01], [1.0])):
    ...     layer.gate.data = torch.tensor(gates)  # as if trained
    >>> shaplora = ShapLoRA(
    ...     model, lambda model, x: model(x).square().mean(), [torch.randn(8, 4)], progress=False
    ... )
    >>> scores = shaplora.score()
    >>> {name: tuple(score.shape) for name, score in scores.items()}
    {'0': (2,), '1': (1,)}
    >>> shaplora.allocate(2).keep  # the rank whose gate is almost 0 is pruned
    {'0': tensor([ True, False]), '1': tensor([True])}
    """

    method = "ShapLoRA"

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        batches: Iterable[Any],
        *,
        coalitions: int = 90,
        importance: Importance = "sensitivity",
        batch_weight: Callable[[Any], float] = batch_length,
        generator: torch.Generator | int = 0,
        progress: bool = True,
        group: ProcessGroup | None = None,
    ) -> None:
        super().__init__(model)
        known = get_args(Importance)
        require(importance in known, "importance", importance, f"one of {known}")
        require_function("loss_fn", loss_fn)
        require_function("batch_weight", batch_weight)
        require_batches(batches)
        if number_of_shards(batches) > 1:
            warn_caller(
                f"the batches are this process's part of the data of {number_of_shards(batches)} "
                "processes, so that each process would get other scores, and no mean of them is "
                "right: give every process all of the validation data, and group= to share out the "
                "coalitions"
            )
        self.loss_fn = loss_fn
        self.batches = batches
        self.batch_weight = batch_weight
        self.coalitions = coalitions
        self.importance: Importance = importance
        self.progress = progress
        self.group = group
        if isinstance(generator, torch.Generator):
            # `score` could not draw from it twice alike, so one draw becomes the seed.
            generator = int(torch.randint(2**62, (), generator=generator, device=generator.device))
        self.seed = generator
        self.standard_errors: dict[str, Tensor] = {}
        # Refuse a model that cannot be scored, and a wrong number of coalitions, at once.
        self._masks(scorable_layers(model))

    def score(self) -> dict[str, Tensor]:
        """Measure all coalitions, and store the scores for `allocate`.

        Returns:
            {name: Shapley sensitivity of its ranks, (r,), float64}.

        Raises:
            ValueError: as for this class; no batch, a loss or score that is not finite, a loss that
                is not deterministic or takes no gradient through a layer that it calls; a model
                that was not trained, whose gates or scores are all zero.
        """
        layers = scorable_layers(self.model)
        if not any(adapter.gate.any() for adapter in adapters(layers).values()):
            raise ValueError(
                "every gate is zero, as wrap(model, ranks, gate=0.0) leaves them: "
                "train the model first"
            )
        if self.importance == "magnitude":
            sample = _all_san(_magnitudes(layers))[None]
        else:
            sample = self._sensitivities(layers)
        scores = by_module(sample.mean(0), layers)  # Eqs 9, 10
        self._check_scores(scores)
        pairs = (sample[0::2] + sample[1::2]) / 2 if len(sample) > 1 else None
        self.standard_errors = {} if pairs is None else by_module(standard_error(pairs), layers)
        return self.store_scores(scores)

    def _masks(self, layers: Mapping[str, LoRALinear]) -> Tensor:
        """The coalitions: bool (coalitions, ranks of all layers). Without coalitions one of all."""
        players = sum(layer.rank for layer in layers.values())
        if self.coalitions == 0:
            return torch.ones(1, players, dtype=torch.bool, device="cpu")
        return coalition_masks(players, self.coalitions, generator=self.seed)

    def _sensitivities(self, layers: Mapping[str, LoRALinear]) -> Tensor:
        """SAN of every player in every coalition: (coalitions, players)."""
        masks = self._masks(layers)
        loss_fn = with_hint_at_one_batch(self.loss_fn, self.batches)
        # Leaving inference mode also turns gradients on.
        with (
            measuring(self.model),
            torch.inference_mode(False),
            gradients_for_adapters_only(self.model, layers),
            called(layers, without_gradient=True) as cut_off,
        ):
            batches = repeatable(self.model, loss_fn, self.batches)
            if self.group is None:
                data = weighted_batches(batches, self.batch_weight)
                return self._sensitivities_of(masks, layers, data, cut_off)
            check_same(self.model, self.group)
            advice = "Give ShapLoRA the same coalitions= and generator= on all processes."
            require_same("what coalitions are drawn", checksum({"": masks}), advice, self.group)
            data = on_all(lambda: weighted_batches(batches, self.batch_weight), self.group)
            self._require_same_data(data, self.group)
            return shared_out(
                masks,
                lambda own: self._sensitivities_of(own, layers, data, cut_off),
                self.group,
            )

    def _sensitivities_of(
        self,
        masks: Tensor,
        layers: Mapping[str, LoRALinear],
        data: list[WeightedBatch],
        cut_off: set[str],
    ) -> Tensor:
        """SAN of every player in these coalitions: (coalitions, players)."""
        disable = None if self.progress else True  # None: show it where there is a terminal
        sample = []
        for mask in tqdm(masks, desc="coalitions", disable=disable, leave=False):
            with coalition(layers, mask):  # Eq 6
                sample.append(self._sensitivity(layers, data, cut_off))
        return torch.stack(sample)

    @torch.no_grad()
    def _require_same_data(self, data: list[WeightedBatch], group: ProcessGroup) -> None:
        """Raise RuntimeError on all processes unless each has all of the validation data."""

        def losses() -> list[float]:
            return [float(finite_loss(self.model, self.loss_fn, batch)) for batch, _ in data]

        advice = (
            "ShapLoRA needs all of the validation data on every process (no DistributedSampler): "
            "the mean of scores on shards is not the score, since |w · ∂L/∂w| is not linear"
        )
        weights = [weight for _, weight in data]
        require_same("the weights of the validation batches", weights, advice, group)
        # Processors of different kinds round differently, so that half of the digits must agree.
        own_losses = on_all(losses, group)
        first = from_first(own_losses, group)
        equal = all(
            math.isclose(own, other, rel_tol=1e-4, abs_tol=1e-6)
            for own, other in zip(own_losses, first, strict=True)
        )
        alike = all(gathered(equal, group))
        if not alike:
            raise RuntimeError(f"the validation batches differ between processes. {advice}")

    def _sensitivity(
        self, layers: Mapping[str, LoRALinear], data: list[WeightedBatch], cut_off: set[str]
    ) -> Tensor:
        """SAN of every player with the gates as they are: (players,).

        Args:
            cut_off: the names of the layers that have been called while gradients were off.
        """
        weights = adapters(layers)
        flat = [w for adapter in weights.values() for w in adapter]
        remaining = iter(mean_gradient(self.model, self.loss_fn, data, flat))
        gradients = {
            name: Adapter(gate=next(remaining), P=next(remaining), Q=next(remaining))
            for name in weights
        }
        for name, layer in layers.items():
            reached = any(g.any() for g in gradients[name])
            if name in cut_off and layer.rank and not reached:
                raise ValueError(
                    f"{name!r} is called where no gradient is taken (no_grad(), re-entrant "
                    "checkpointing), and its ranks would all score 0: take that out of loss_fn and "
                    "the model (use_reentrant=False)"
                )
        return _all_san(_importance(w, gradients[name]) for name, w in weights.items())

    def _check_scores(self, scores: Mapping[str, Tensor]) -> None:
        """Raise ValueError unless the scores are finite, and not all zero."""
        for name, score in scores.items():
            if not torch.isfinite(score).all():
                raise ValueError(
                    f"the {self.importance} of {name!r} is not finite: check the data and the "
                    "weights"
                )
        if not any(score.any() for score in scores.values()):
            raise ValueError(
                f"the {self.importance} of every rank is exactly zero, as before training, when "
                "lora_B is zero: train the model first (or check that the loss depends on the "
                "adapters)"
            )


def shared_out(masks: Tensor, measure: Callable[[Tensor], Tensor], group: ProcessGroup) -> Tensor:
    """measure(masks), of which every process measures a part, row by row.

    A coalition and its complement are neighbours and stay together. All processes measure as many
    pairs, some of them twice if need be, since a sharded model communicates in its passes.

    Args:
        masks: (coalitions, players), the same on all processes.
        measure: masks → one row per mask.
    """
    neighbours = 1 if len(masks) == 1 else 2
    units = torch.arange(len(masks), device="cpu").view(-1, neighbours)
    processes = dist.get_world_size(group)
    rounds = math.ceil(len(units) / processes)

    def share_of(process: int) -> Tensor:
        turns = torch.arange(process, rounds * processes, processes, device="cpu")
        return units[turns % len(units)].flatten()

    shares = [share_of(process) for process in range(processes)]
    own = shares[dist.get_rank(group)]
    parts = gathered(on_all(lambda: measure(masks[own]), group), group)
    rows = parts[0].new_empty(len(masks), parts[0].shape[1])
    for share, part in zip(shares, parts, strict=True):
        rows[share] = part
    return rows


def _importance(w: Adapter, gradient: Adapter) -> Adapter:
    """Eq 8 of every entry of one layer's adapter."""
    return Adapter(
        gate=ipt(wide(w.gate), gradient.gate),
        P=ipt(wide(w.P), gradient.P),
        Q=ipt(wide(w.Q), gradient.Q),
    )


def _magnitudes(layers: Mapping[str, LoRALinear]) -> list[Adapter]:
    """|w| in place of |w · ∂L/∂w|: the ablation "magnitude"."""
    return [Adapter(*(wide(w).abs() for w in adapter)) for adapter in adapters(layers).values()]


def _all_san(importances: Iterable[Adapter]) -> Tensor:
    """Eq 7 of every player: (players,), float64, on the CPU."""
    return torch.cat([san(*importance).cpu().double() for importance in importances])
