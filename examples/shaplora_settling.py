"""How many coalitions does ShapLoRA.settle save, and does its confidence hold?

    python examples/shaplora_settling.py --quick                      # to see that it runs
    python examples/shaplora_settling.py --out shaplora_settling.json

Two trained models with 144 gated ranks: MiniLM on the task of tagging.py with a budget of 72 ranks,
and the student of planted_teacher.py with the parameters of the planted ranks. Each is measured
once with many coalitions, and what was measured is then taken for all there is: settle() runs many
times on pairs of a coalition and its complement that are drawn from it anew, for each p of the grid
apart. So the ranks that endless measuring would give are known, and every run can be judged:

    settled     runs that stopped because the ranks were sure, at the last look or before
    measured    coalitions, on average over all runs
    wrong       runs that settled, although more than max_moved ranks are in other modules than
                endless measuring would put them in; must not be above 1 − confidence
    ranks off   how many ranks are in other modules at the end, on average over all runs
"""

from __future__ import annotations

import argparse
import contextlib
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from arms import first_training
from planted_teacher import PlantedTeacher
from study import Context
from tagging import batches, build_model, load_data, loss_fn, spread, train, words
from torch import Tensor, nn

from minirank import ShapLoRA, UniformRanks, wrap
from minirank.allocators.constraints import Constraints
from minirank.allocators.settling import Draws
from minirank.allocators.shaplora import Sample
from minirank.allocators.stability import Stability
from minirank.layers.lora import LoRALinear
from minirank.shapley import PROBABILITIES

MAX_MOVED = (0, 2, 4, 7, 14)
CONFIDENCE = 0.95  # settle's default
UNSETTLED = "the ranks are not settled"


class Case(NamedTuple):
    """A trained model, how it is scored, and the budget."""

    model: nn.Module
    options: dict[str, Any]  # of ShapLoRA
    budget: dict[str, Any]  # of settle


def minilm(seed: int, options: argparse.Namespace) -> Case:
    data = load_data()
    model = build_model(seed, len(data.tags))
    uniform = UniformRanks(model, ["encoder.*"])
    uniform.score()
    ranks = uniform.allocate(36 * 4)
    wrap(model, ranks, scaling=2.0, gate=0.0, trainable=["head"], generator=seed)
    train(model, data.train, steps=options.steps, seed=seed, progress=False)
    chosen = list(batches(spread(data.dev, options.sentences), 24))
    return Case(
        model, {"loss_fn": loss_fn, "batches": chosen, "batch_weight": words}, {"budget": 72}
    )


def planted(seed: int, options: argparse.Namespace) -> Case:
    task = PlantedTeacher(steps=600 if options.steps >= 250 else options.steps)
    model = first_training(Context(task, seed), "roomy", gate=0.0)
    scoring = {
        "loss_fn": task.loss_fn,
        "batches": task.validation(seed),
        "batch_weight": task.batch_weight,
    }
    return Case(model, scoring, {"budget": task.budget(seed), "unit": "parameters"})


TASKS: dict[str, Callable[[int, argparse.Namespace], Case]] = {"MiniLM": minilm, "planted": planted}


class Replayed(ShapLoRA):
    """ShapLoRA whose coalitions are drawn from a population that was measured before.

    Args:
        population: pairs, (repeats, 9, players).
        replay: the seed of the draws. Measuring again draws the same again, so that answers are
            kept for the next `max_moved`.
    """

    def __init__(self, case: Case, coalitions: int, population: Tensor, replay: int) -> None:
        super().__init__(case.model, coalitions=coalitions, progress=False, **case.options)
        self.population, self.replay = population, replay
        self.answers: dict[tuple[int, Draws], Stability] = {}

    @contextlib.contextmanager
    def _measuring(
        self, layers: Mapping[str, LoRALinear], masks: Tensor
    ) -> Iterator[Callable[[Tensor], Tensor]]:
        repeats, grid, players = self.population.shape
        generator = torch.Generator().manual_seed(self.replay)

        def drawn(some: Tensor) -> Tensor:
            chosen = torch.randint(repeats, (len(some) // 2 // grid, grid), generator=generator)
            pairs = self.population[chosen, torch.arange(grid)].view(-1, players)
            return pairs.repeat_interleave(2, dim=0)  # both of a pair as their mean

        yield drawn

    def _stability_of(self, sample: Sample, constraints: Constraints, draws: Draws) -> Stability:
        key = len(sample.sans), draws
        if key not in self.answers:
            self.answers[key] = super()._stability_of(sample, constraints, draws)
        return self.answers[key]


def population_of(case: Case, coalitions: int, seed: int) -> Tensor:
    """What many coalitions measured: pairs, (repeats, 9, players)."""
    measured = ShapLoRA(
        case.model, coalitions=coalitions, generator=1000 + seed, progress=False, **case.options
    )
    measured.score()
    assert measured._sample is not None
    pairs = measured._sample.pairs()
    assert pairs is not None
    return pairs.view(-1, len(PROBABILITIES), pairs.shape[1])


def ranks_of_all(case: Case, population: Tensor) -> Mapping[str, int]:
    """What endless measuring would give."""
    allocator = ShapLoRA(case.model, progress=False, **case.options)
    pairs = population.flatten(0, 1).repeat_interleave(2, dim=0)
    allocator._adopt(Sample(allocator._trained_layers(), pairs))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a module that takes much
        return allocator.allocate(**case.budget).ranks


class Outcome(NamedTuple):
    settled: bool
    measured: int
    off: int  # ranks in other modules than endless measuring would put them in


def outcome(allocator: Replayed, case: Case, truth: Mapping[str, int], max_moved: int) -> Outcome:
    """Of one settle()."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = allocator.settle(max_moved=max_moved, confidence=CONFIDENCE, **case.budget)
    settled = not any(UNSETTLED in str(warning.message) for warning in caught)
    change = [rank - truth[name] for name, rank in result.allocation.ranks.items()]
    gained, lost = (sum(max(0, sign * c) for c in change) for sign in (1, -1))
    return Outcome(settled, result.coalitions, max(gained, lost))


def judged(case: Case, population: Tensor, coalitions: int, runs: int) -> list[dict[str, Any]]:
    """For each max_moved, `runs` replays of settle()."""
    truth = ranks_of_all(case, population)
    outcomes: dict[int, list[Outcome]] = {max_moved: [] for max_moved in MAX_MOVED}
    for replay in range(runs):
        allocator = Replayed(case, coalitions, population, replay)
        for max_moved, found in outcomes.items():
            found.append(outcome(allocator, case, truth, max_moved))
    return [
        {
            "coalitions": coalitions,
            "max_moved": max_moved,
            "runs": runs,
            "settled": sum(one.settled for one in found) / runs,
            "measured": sum(one.measured for one in found) / runs,
            "wrong": sum(one.settled and one.off > max_moved for one in found) / runs,
            "ranks off": sum(one.off for one in found) / runs,
        }
        for max_moved, found in outcomes.items()
    ]


def line(figures: Mapping[str, Any]) -> str:
    saved = 1 - figures["measured"] / figures["coalitions"]
    return (
        f"{figures['coalitions']:>9}{figures['max_moved']:>11}{figures['settled']:>9.0%}"
        f"{figures['measured']:>10.0f}{saved:>8.0%}{figures['wrong']:>8.1%}"
        f"{figures['ranks off']:>11.1f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="toy sizes, to see that it runs")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of trainings")
    parser.add_argument("--steps", type=int, default=250, help="of MiniLM's training")
    parser.add_argument("--sentences", type=int, default=24, help="of the development split")
    parser.add_argument("--population", type=int, default=720, help="coalitions that are measured")
    parser.add_argument("--at-most", type=int, nargs="+", default=[90, 720], help="coalitions=")
    parser.add_argument("--runs", type=int, default=40, help="of settle(), for each line")
    parser.add_argument("--out", help="write every figure to this JSON file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.quick:
        options.tasks, options.seeds, options.steps = ["planted"], [0], 4
        options.population, options.at_most, options.runs = 18, [36], 2

    results: list[dict[str, Any]] = []
    for task in options.tasks:
        for seed in options.seeds:
            case = TASKS[task](seed, options)
            population = population_of(case, options.population, seed)
            print(f"\n{task}, training {seed}: {case.budget}, confidence {CONFIDENCE:.0%}")
            print("  at most  max_moved  settled  measured   saved   wrong  ranks off", flush=True)
            for coalitions in options.at_most:
                for figures in judged(case, population, coalitions, options.runs):
                    print(line(figures), flush=True)
                    results.append({"task": task, "seed": seed, **figures})
    if options.out:
        content = {
            "options": vars(options),
            "environment": {"torch": torch.__version__, "threads": torch.get_num_threads()},
            "figures": results,
        }
        Path(options.out).write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
