"""Is ShapLoRA's sensitivity a good stand-in for the Shapley value?

    python examples/shapley_fidelity.py --quick         # under a minute

    # the figures of the results page:
    python examples/shapley_fidelity.py --out examples/results/shapley_fidelity.json

Three 10 × 10 layers learn planted changes of rank 1, 4 and 1 from 200 noisy samples, with four
ranks each. They form one deep tanh network, or stand side by side, each with a loss of its own.
Their 12 ranks are the players of a game: the value of a set of ranks is minus the validation loss
with only these ranks on. The exact Shapley values take 4,096 evaluations. Each score is judged by
its Spearman correlation with the exact Shapley values, by the test loss after pruning to six ranks,
and by the test loss of a new training with the ranks that it found. The models are trained as for
ShapLoRA (gates start from 0) and as by L1RA (gates start from 1 and shrink).
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from minirank import L1RA, ShapLoRA, lora_layers, shapley, wrap
from minirank.allocators.shaplora import Importance

WIDTH, PLANTED, START, BUDGET, NOISE = 10, (1, 4, 1), 4, 6, 0.1
Batch = tuple[Tensor, Tensor]


class Layers(nn.Module):
    def __init__(self, deep: bool) -> None:
        super().__init__()
        self.deep = deep
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in PLANTED)

    def forward(self, x: Tensor) -> Tensor:
        """(n, d) → (n, d) through one layer after another, or (n, 3 d) from layers side by side."""
        if not self.deep:
            return torch.cat([layer(x) for layer in self.layers], dim=1)
        *hidden, last = self.layers
        for layer in hidden:
            x = layer(x).tanh()
        y: Tensor = last(x)
        return y


def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    return nn.functional.mse_loss(model(batch[0]), batch[1])


class Problem(NamedTuple):
    model: Layers  # untouched
    train: Batch
    validation: Batch
    test: Batch


def problem(deep: bool, seed: int) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    model, teacher = Layers(deep), Layers(deep)
    with torch.no_grad():
        for layer, goal, rank in zip(model.layers, teacher.layers, PLANTED, strict=True):
            layer.get_parameter("weight").normal_(0, WIDTH**-0.5, generator=generator)
            U, V = (
                torch.linalg.qr(torch.randn(WIDTH, rank, generator=generator)).Q for _ in range(2)
            )
            goal.get_parameter("weight").copy_(layer.get_parameter("weight") + U @ V.T)

        def sample(n: int) -> Batch:
            x = torch.randn(n, WIDTH, generator=generator)
            y: Tensor = teacher(x)
            return x, y + NOISE * torch.randn(y.shape, generator=generator)

        return Problem(model, sample(200), sample(100), sample(2000))


def trained(task: Problem, ranks: dict[str, int], training: str, steps: int, seed: int) -> Layers:
    """A copy of the untouched model with these ranks, trained on all training data in each step."""
    model = copy.deepcopy(task.model)
    by_l1ra = training == "L1RA"
    wrap(
        model,
        ranks,
        gate=1.0 if by_l1ra else 0.0,
        alpha=1,
        reference_rank=1,  # of a gated start too: L1RA's A is drawn from N(0, 1)
        generator=seed,
    )
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=1.0 if by_l1ra else 0.0)
    # Ranks do not move here: the interval never ends.
    l1ra = L1RA(model, optimizer, l1=0.3, interval=10**9, stop=steps // 2) if by_l1ra else None
    for _ in range(steps):
        optimizer.zero_grad()
        loss_fn(model, task.train).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if l1ra is not None:
            l1ra.step()
    return model


def game(model: nn.Module, data: Batch) -> shapley.Game:
    """v(S) = minus the loss on `data` with the ranks in S on and all others off.

    The model itself is left unchanged.
    """
    layers = list(lora_layers(model).values())
    trial = copy.deepcopy(model).eval()
    gates = [layer.gate for layer in lora_layers(trial).values() if layer.gate is not None]
    before = [gate.detach().clone() for gate in gates]

    @torch.no_grad()
    def value(mask: Tensor) -> float:
        inside = mask.split_with_sizes([layer.rank for layer in layers])
        for gate, original, present in zip(gates, before, inside, strict=True):
            gate.copy_(original * present)
        return -loss_fn(trial, data).item()

    return value


def scores_of(model: nn.Module, validation: Batch, seed: int) -> dict[str, Tensor]:
    """{title of the score: (ranks,), in the order of the layers}."""

    def by_shaplora(coalitions: int, importance: Importance = "sensitivity") -> Tensor:
        allocator = ShapLoRA(
            model,
            loss_fn,
            [validation],
            coalitions=coalitions,
            importance=importance,
            generator=seed,
            progress=False,
        )
        return torch.cat(list(allocator.score().values()))

    layers = lora_layers(model).values()
    return {
        "Shapley sensitivity": by_shaplora(90),
        "plain sensitivity": by_shaplora(0),
        "magnitude": by_shaplora(0, "magnitude"),
        "gates": torch.cat(
            [layer.gate.detach().abs() for layer in layers if layer.gate is not None]
        ),
        "size of s·λ·P Q": torch.cat([layer.contributions() for layer in layers]),
    }


def spearman(a: Tensor, b: Tensor) -> float:
    """Correlation of the places of the entries; ties share theirs.

    NaN if all entries of one tensor are equal.
    """

    def places(x: Tensor) -> Tensor:
        return (x[:, None] > x).sum(1).double() + (x[:, None] == x).sum(1).double() / 2

    x, y = (p - p.mean() for p in (places(a), places(b)))
    return float((x @ y) / (x.norm() * y.norm())) if x.any() and y.any() else math.nan


def best_of(score: Tensor, count: int) -> Tensor:
    mask = torch.zeros(len(score), dtype=torch.bool)
    mask[torch.sort(score, descending=True, stable=True).indices[:count]] = True
    return mask


Row = dict[str, float]  # one score's figures in one run


def judge(deep: bool, training: str, steps: int, seed: int) -> dict[str, Row]:
    task = problem(deep, seed)
    names = [f"layers.{i}" for i in range(len(PLANTED))]
    model = trained(task, dict.fromkeys(names, START), training, steps, seed)
    validation_game, test_game = game(model, task.validation), game(model, task.test)
    players = START * len(PLANTED)
    exact = shapley.exact_shapley_values(validation_game, players)

    def retrained(mask: Tensor) -> float:
        return retrained_with(tuple(mask.view(-1, START).sum(1).tolist()))

    @functools.cache  # several scores find the same ranks
    def retrained_with(ranks: tuple[int, ...]) -> float:
        again = trained(task, dict(zip(names, ranks, strict=True)), "ShapLoRA", steps, seed + 1)
        return loss_fn(again, task.test).item()

    rows = {}
    for name, score in {
        "exact Shapley value": exact,
        **scores_of(model, task.validation, seed),
    }.items():
        kept = best_of(score, BUDGET)
        layers = kept.view(-1, START).sum(1).tolist()
        rows[name] = {
            "spearman": spearman(score, exact),
            "pruned": -test_game(kept),
            "retrained": retrained(kept),
            **{f"rank {i}": float(rank) for i, rank in enumerate(layers)},
        }
    everyone = torch.ones(players, dtype=torch.bool)
    subsets = [
        best_of(torch.zeros(players).index_fill(0, torch.tensor(members), 1.0), BUDGET)
        for members in itertools.combinations(range(players), BUDGET)
    ]
    best = max(subsets, key=validation_game)
    uniform = best_of(torch.tensor([1.0, 1.0, 0.0, 0.0] * len(PLANTED)), BUDGET)
    rows["best six of all"] = {"pruned": -test_game(best), "retrained": retrained(best)}
    rows["mean of all sixes"] = {
        "pruned": statistics.fmean(-test_game(subset) for subset in subsets[::7])
    }
    rows["two in each layer"] = {"retrained": retrained(uniform)}
    rows["nothing pruned"] = {"pruned": -test_game(everyone)}
    return rows


def toys(steps: int, seeds: int, trainings: Sequence[str]) -> dict[str, Any]:
    summary: dict[str, Any] = {}
    for deep in (True, False):
        for training in trainings:
            title = f"{'deep network' if deep else 'separate layers'}, trained as by {training}"
            runs = [judge(deep, training, steps, seed) for seed in range(seeds)]
            print(f"\n{title}; {seeds} seeds, mean ± standard error")
            heads = f"{'Spearman':>16}{'test loss, pruned':>20}{'retrained':>18}"
            print(f"{'':<22}{heads}   mean ranks kept", flush=True)
            summary[title] = {}
            for name in runs[0]:
                cells = {
                    key: mean_and_error([run[name][key] for run in runs]) for key in runs[0][name]
                }
                text = [
                    f"{cells[k][0]:.3f} ± {cells[k][1]:.3f}" if k in cells else ""
                    for k in ("spearman", "pruned", "retrained")
                ]
                ranks = " ".join(
                    f"{cells[f'rank {i}'][0]:.1f}"
                    for i in range(len(PLANTED))
                    if f"rank {i}" in cells
                )
                print(f"{name:<22}{text[0]:>16}{text[1]:>20}{text[2]:>18}   {ranks}", flush=True)
                summary[title][name] = cells
    return summary


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """The mean of the finite values and its standard error."""
    finite = [v for v in values if math.isfinite(v)]
    error = statistics.stdev(finite) / math.sqrt(len(finite)) if len(finite) > 1 else math.nan
    return statistics.fmean(finite) if finite else math.nan, error


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="2 seeds of 300 steps, trained as for ShapLoRA"
    )
    parser.add_argument("--seeds", type=int, help="(default 8)")
    parser.add_argument("--steps", type=int, help="of training (default 1000)")
    parser.add_argument("--out", help="write the figures to this JSON file")
    options = parser.parse_args()
    steps = options.steps or (300 if options.quick else 1000)
    trainings = ("ShapLoRA",) if options.quick else ("ShapLoRA", "L1RA")
    figures = toys(steps, options.seeds or (2 if options.quick else 8), trainings)
    if options.out:
        environment = {"torch": torch.__version__, "threads": torch.get_num_threads()}
        content = {"options": vars(options), "environment": environment, **figures}
        Path(options.out).write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
