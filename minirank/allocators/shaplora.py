"""ShapLoRA: ranks by their Shapley sensitivity on validation data, after a warm-up training (arXiv 2601.17921).

    ΔW = s · P Λ Q (Eq 3): rank i of a module is the player (λ_i, P[:, i], Q[i, :]), over all modules together

    paper     code            meaning
    λ_i       gate[i]         starts at 0: wrap(model, ranks, gate=0.0)
    P, Q      lora_B, lora_A  (d_out, r), (r, d_in), Gaussian at the start
    S         mask            a coalition: λ = 0 for every rank outside (Eq 6)
    SAN       san             Eq 7    SAN(i | S) = ipt(λ_i) + mean_j ipt(P_ji) + mean_j ipt(Q_ij)
    ipt(w)    ipt             Eq 8    |w · ∂L/∂w|, ∂L/∂w over the whole validation set
    the score                 Eqs 9, 10   the mean of SAN(i | S) over the sampled coalitions

A rank outside S has λ_i = 0, and so has λ_i · ∂L/∂λ_i; ∂L/∂P[:, i] and ∂L/∂Q[i, :] carry the factor λ_i. So it scores
exactly 0 there. The mean of Eq 10 is over all coalitions, and every rank is in half of them.

It is no estimate of the Shapley value of a loss. At the minimum a rank with a direction of its own meets no gradient,
whoever else is on, and scores 0; ranks that share one score as soon as some are off (README, "What it measured").

    trial = copy.deepcopy(model)                            # stage one, thrown away
    wrap(trial, {name: 8 for name in names}, gate=0.0)
    ...                                                     # train it to convergence
    shaplora = ShapLoRA(trial, loss_fn, validation_batches)
    shaplora.score()
    wrap(model, shaplora.allocate(4 * len(names)))          # stage two: the untouched model, trained anew

Open in the paper: gradients are accumulated over the whole validation set and |w · ∂L/∂w| is taken once per coalition,
so that the batch size does not matter; the coalitions come from a generator; standard errors are reported.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..checks import require
from ..layers.lora import LoRALinear
from ..layers.resize import separate_layers
from ..measure import (
    NO_BATCH,
    LossFn,
    batch_length,
    called_without_gradient,
    measuring,
    repeatable,
    scalar_loss,
)
from ..shapley import coalition_masks, standard_error
from .allocation import Allocator

Importance = Literal["sensitivity", "magnitude"]


def ipt(w: Tensor, gradient: Tensor) -> Tensor:
    """Eq 8, |w · ∂L/∂w|, entry by entry."""
    return (w * gradient).abs()


def san(ipt_gate: Tensor, ipt_P: Tensor, ipt_Q: Tensor) -> Tensor:
    """Eq 7, of every rank of one module. ipt_gate: (r,); ipt_P: (d_out, r); ipt_Q: (r, d_in) → (r,)."""
    return ipt_gate + ipt_P.mean(0) + ipt_Q.mean(1)


class ShapLoRA(Allocator):
    """score() → {name: Shapley sensitivity of its ranks, (r,)}, then allocate(budget): one global pruning by score.
    To retrain, give the Allocation to `wrap` and the untouched model; to prune in place, to `resize` and this one.

    Args:
        model: with gated LoRA layers (`wrap(model, ranks, gate=0.0)`), trained; not changed.
        loss_fn: (model, batch) -> scalar mean loss.
        batches: validation data, iterated once by each `score()` and held until it ends. The training data instead is
            one of the paper's ablations.
        coalitions: how many; a multiple of 18 (see `shapley.coalition_masks`). 0: none, all ranks are on: the paper's
            ablation "sensitivity".
        importance: "magnitude" takes ipt(w) = |w| in Eq 7, without data and coalitions: an ablation.
        batch_weight: batch -> number, what the mean loss of a batch is a mean over. Default: its samples; a loss that
            is a mean over words or tokens needs their number to be independent of the batch size. 0 leaves it out.
        generator: a torch.Generator or a seed, for the coalitions. Every `score()` takes the same ones; from a seed,
            `shapley.coalition_masks(number of ranks, coalitions, generator=seed)`, ranks in the order of lora_layers.
        progress: show a bar over the coalitions.

    Cost: a forward and a backward pass over the data for every coalition, with gradients for the adapters alone; and
    two forward passes of one batch, to see that the loss repeats.
    float16 adapters lose small gradients: wrap with dtype=torch.float32.

    After `score()`, `standard_errors` holds those of the scores, (r,) per module, over the pairs of a coalition and its
    complement (empty without coalitions). They count the planned spread of p as if it were chance, so they are
    too large rather than too small.

    Raises ValueError: no LoRA layer, one without a gate, frozen, disabled or merged, two that share a parameter; an
    option out of range. From `score()` also: no batch, a loss or score that is not finite, a loss that is not
    deterministic or takes no gradient through a layer that it calls, gates that are all zero.
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
    ) -> None:
        super().__init__(model)
        known = get_args(Importance)
        require(importance in known, "importance", importance, f"one of {known}")
        for name, function in (("loss_fn", loss_fn), ("batch_weight", batch_weight)):
            if not callable(function):
                raise TypeError(
                    f"{name} must be a function, got {type(function).__name__}: {function!r:.60}"
                )
        if not isinstance(batches, Iterable):
            raise TypeError(
                f"batches must be an iterable of what loss_fn takes, got one {type(batches).__name__}"
            )
        self.loss_fn, self.batches, self.batch_weight = loss_fn, batches, batch_weight
        self.coalitions, self.progress = coalitions, progress
        self.importance: Importance = importance
        if isinstance(generator, torch.Generator):  # which `score` could not draw from twice alike
            generator = int(torch.randint(2**62, (), generator=generator, device=generator.device))
        self.seed = generator
        self.standard_errors: dict[str, Tensor] = {}
        self._masks(
            _scorable_layers(model)
        )  # refuses what cannot be scored, and a wrong number of coalitions, at once

    def _masks(self, layers: Mapping[str, LoRALinear]) -> Tensor:
        """bool (coalitions, players), the players being the ranks of all layers; without coalitions, (1, players)."""
        players = sum(layer.rank for layer in layers.values())
        if self.coalitions == 0:
            return torch.ones(1, players, dtype=torch.bool, device="cpu")
        return coalition_masks(players, self.coalitions, generator=self.seed)

    def _measure(self) -> dict[str, Tensor]:
        layers = _scorable_layers(self.model)
        if not any(layer.gate.any() for layer in layers.values() if layer.gate is not None):
            raise ValueError(
                "every gate is zero, as wrap(model, ranks, gate=0.0) leaves them: train the model first"
            )
        if self.importance == "magnitude":
            sample = _san_of_all(layers, [_wide(w).abs() for w in _adapters(layers)])[None]
        else:
            sample = self._sensitivities(layers)
        scores = _by_module(sample.mean(0), layers)  # Eqs 9, 10
        for name, score in scores.items():
            if not torch.isfinite(score).all():
                raise ValueError(
                    f"the {self.importance} of {name!r} is not finite: check the data and the weights"
                )
        pairs = (sample[0::2] + sample[1::2]) / 2 if len(sample) > 1 else None
        self.standard_errors = {} if pairs is None else _by_module(standard_error(pairs), layers)
        return scores

    def _sensitivities(self, layers: Mapping[str, LoRALinear]) -> Tensor:
        """SAN of every player in every coalition: (coalitions, players)."""
        bar = tqdm(self._masks(layers), desc="coalitions", disable=not self.progress, leave=False)
        # Leaving inference mode also turns gradients on.
        with (
            measuring(self.model),
            torch.inference_mode(False),
            _adapters_only(self.model, layers),
            called_without_gradient(layers) as lost,
        ):
            data = _weighted(repeatable(self.model, self.loss_fn, self.batches), self.batch_weight)
            return torch.stack([self._sensitivity(layers, mask, data, lost) for mask in bar])

    def _sensitivity(
        self,
        layers: Mapping[str, LoRALinear],
        mask: Tensor,
        data: list[tuple[Any, float]],
        lost: set[str],
    ) -> Tensor:
        """SAN(i | S) of every player i, (players,), S being those where `mask` is true."""
        adapters = _adapters(layers)
        with _coalition(layers, mask):
            gradient = mean_gradient(self.model, self.loss_fn, data, adapters)
            for i, (name, layer) in enumerate(layers.items()):
                if (
                    name in lost
                    and layer.rank
                    and not any(g.any() for g in gradient[3 * i : 3 * i + 3])
                ):
                    raise ValueError(
                        f"{name!r} is called where no gradient is taken (no_grad(), re-entrant checkpointing), and its "
                        "ranks would all score 0: take that out of loss_fn and the model (use_reentrant=False)"
                    )
            return _san_of_all(
                layers, [ipt(_wide(w), g) for w, g in zip(adapters, gradient, strict=True)]
            )


def mean_gradient(
    model: nn.Module,
    loss_fn: LossFn,
    data: Iterable[tuple[Any, float]],
    parameters: Sequence[Tensor],
) -> list[Tensor]:
    """∂L/∂w for every w in `parameters`, in its shape, float32 or better; L is the mean loss over `data`, pairs of a
    batch and its weight. Zero for a parameter that no batch reaches. The model's mode and its `grad`s are left alone.

    Raises ValueError: `data` is empty or weighs nothing, a loss is not finite, or none depends on the parameters.
    """
    sums = [torch.zeros_like(_wide(w)) for w in parameters]
    total, depends = 0.0, False
    for batch, weight in data:
        if weight == 0:
            continue  # the mean over nothing is NaN, and NaN · 0 as well
        total += weight
        loss = scalar_loss(model, loss_fn, batch)
        if not torch.isfinite(loss):
            raise ValueError(
                f"the loss of a batch is {loss.item()}: check the data and the model's weights"
            )
        if not loss.requires_grad:
            continue  # a batch that reaches no adapter
        gradients = torch.autograd.grad(loss, list(parameters), allow_unused=True)
        for sum_, gradient in zip(sums, gradients, strict=True):
            if gradient is not None:
                sum_.add_(gradient, alpha=weight)
                depends = True
    if total == 0:
        raise ValueError(NO_BATCH)
    if not depends:
        raise ValueError(
            "the loss depends on no adapter: loss_fn must return it with its graph (no torch.no_grad(), no detach(), "
            "no re-entrant checkpointing), and call the model that has the LoRA layers"
        )
    return [sum_ / total for sum_ in sums]


def _weighted(
    batches: Iterable[Any], batch_weight: Callable[[Any], float]
) -> list[tuple[Any, float]]:
    """Every batch with its weight. A list, so that all coalitions see the same data, even of a loader that shuffles."""
    data = [(batch, float(batch_weight(batch))) for batch in batches]
    for _, weight in data:
        require(0 <= weight < math.inf, "batch_weight(batch)", weight, "a number of at least 0")
    return data


def _scorable_layers(model: nn.Module) -> dict[str, LoRALinear]:
    layers = separate_layers(model)
    if not any(layer.rank for layer in layers.values()):
        raise ValueError(
            "the model has no LoRA layer with ranks to score: wrap(model, ranks, gate=0.0), then train it"
        )
    for name, layer in layers.items():
        if layer.gate is None:
            raise ValueError(
                f"{name!r} has no gates, by which coalitions are formed: wrap(model, ranks, gate=0.0)"
            )
        if not all(w.requires_grad for w in layer.parameters(recurse=False)):
            raise ValueError(
                f"the adapter of {name!r} is frozen: requires_grad_(True) its lora_A, lora_B and gate"
            )
        if layer.merged or not layer.enabled:
            state = "merged: unmerge(model)" if layer.merged else "disabled: set its .enabled"
            raise ValueError(
                f"{name!r} is {state} before scoring, so that its gates have an effect"
            )
    return layers


def _adapters(layers: Mapping[str, LoRALinear]) -> list[Tensor]:
    """λ, P and Q of every layer in turn."""
    return [
        w
        for layer in layers.values()
        for w in (layer.gate, layer.lora_B, layer.lora_A)
        if w is not None
    ]


def _san_of_all(layers: Mapping[str, LoRALinear], ipts: Sequence[Tensor]) -> Tensor:
    """Eq 7 of every player, (players,), float64, on the CPU; `ipts` in the order of `_adapters`."""
    each = [san(*ipts[3 * i : 3 * i + 3]) for i in range(len(layers))]
    return torch.cat([one.cpu().double() for one in each])


def _by_module(values: Tensor, layers: Mapping[str, LoRALinear]) -> dict[str, Tensor]:
    """(players,) → {name: (r,)}"""
    return dict(
        zip(layers, values.split_with_sizes([layer.rank for layer in layers.values()]), strict=True)
    )


def _wide(w: Tensor) -> Tensor:
    return w.detach().to(torch.promote_types(w.dtype, torch.float32))


@contextmanager
def _adapters_only(model: nn.Module, layers: Mapping[str, LoRALinear]) -> Iterator[None]:
    """No gradient is computed for any other parameter inside the block."""
    kept = {id(w) for w in _adapters(layers)}
    others = [(p, p.requires_grad) for p in model.parameters() if id(p) not in kept]
    try:
        for parameter, _ in others:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, requires_grad in others:
            parameter.requires_grad_(requires_grad)


@contextmanager
def _coalition(layers: Mapping[str, LoRALinear], mask: Tensor) -> Iterator[None]:
    """Eq 6: inside the block λ = 0 for every rank where `mask`, (players,), is false. Restored bit for bit."""
    gates = [layer.gate for layer in layers.values() if layer.gate is not None]
    before = [gate.detach().clone() for gate in gates]
    try:
        with torch.no_grad():
            for gate, inside in zip(gates, _by_module(mask, layers).values(), strict=True):
                gate.masked_fill_(~inside.to(gate.device), 0.0)
        yield
    finally:
        with torch.no_grad():
            for gate, value in zip(gates, before, strict=True):
                gate.copy_(value)
