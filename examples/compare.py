"""Which ranks train best? All methods get the same pretrained model, budget and order of the data.

    python examples/compare.py --quick                 # about 3 minutes on 2 cores

    # a table of the results page:
    python examples/compare.py --methods uniform sensitivity --seeds 0 1 2 3 4

    # with PEFT's methods, which run only if they are named:
    python examples/compare.py --methods uniform eva adalora adalora-as-is

The protocol:

- Task: that of tagging.py. MiniLM learns part-of-speech tags of the Brown corpus. The 36 linear
  layers of the encoder get ranks; the new head trains as well.
- Splits: training on the training split. Methods that need calibration or validation data get the
  development split: Sensitivity-LoRA and EVA all of it, ShapLoRA `--sentences` of it. The test
  split is used for the final figures alone.
- Seeds: one training per method and seed (0 to 2 by default, 0 to 4 in the tables of the results
  page). A seed fixes the head, the adapters' start, the order of the data, and ShapLoRA's
  coalitions. ShapLoRA and `adalora` train once more before, with the same seed and as many steps.
- Training (tagging.train): AdamW without weight decay, learning rates 3e-3 for adapters and 5e-3
  for the head, which rise over 20 steps and then fall to 0; 250 steps of 24 sentences on average;
  gradients clipped to norm 1; every adapter has a scaling of 2.
- Settings of L1RA and ShapLoRA: chosen on the development split with seed 100, which no table uses.
- PEFT's methods (peft_ranks.py): both take an average rank, so they get the whole number nearest to
  the budget. `eva` is EVA with the other settings at PEFT's defaults. `adalora` takes the ranks
  that AdaLoRA ends with, from 1.5 times the average rank (AdaLoRA's paper) at the start. The ranks
  of both are fitted to the budget, then plain LoRA is trained as by the other methods.
  `adalora-as-is` is the model that PEFT trained, with its own ranks, not fitted to the budget; a
  rank of it has one parameter more.
- Figures: mean ± standard error over seeds. Differences from the first method are paired by seed.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from peft_ranks import adalora as train_by_adalora
from peft_ranks import eva_ranks, fit_to_budget, load_peft
from tagging import (
    Batch,
    Data,
    Tagger,
    batches,
    build_model,
    evaluate,
    load_data,
    loss_fn,
    make_optimizer,
    spread,
    train,
    words,
)
from torch import nn

from minirank import (
    L1RA,
    Allocation,
    Allocator,
    SensitivityLoRA,
    ShapLoRA,
    UniformRanks,
    curvature,
    wrap,
)
from minirank.allocators.allocation import Unit
from minirank.allocators.history import History
from minirank.allocators.plot import fill_heat_map, whole_ticks
from minirank.allocators.sensitivity import Curvature
from minirank.allocators.shaplora import Importance
from minirank.allocators.table import arrange

SCALING = 2.0  # of every LoRA layer, whatever its rank
# L1RA's penalty, its gates' learning rate, and the share of the training in which it moves ranks.
# Of those tried on the development split with another seed, these are the mildest that move more
# than one rank in 250 steps.
L1, GATE_LR, STOP = 0.3, 0.05, 0.5
# The gates' learning rate in ShapLoRA's first training. The gates start from 0; at the adapters'
# learning rate of 0.003, 250 steps are too few for them.
FIRST_GATE_LR = 0.3


@dataclass(frozen=True)
class Options:
    budget: int
    unit: Unit
    targets: list[str]
    steps: int
    device: str
    l1: float
    gate_lr: float
    interval: int  # optimizer steps between L1RA's updates
    stop: int  # the optimizer step after which L1RA moves no rank
    coalitions: int  # that ShapLoRA scores; 0: none, all ranks are on
    importance: Importance  # of ShapLoRA
    sentences: int  # of the development split, on which ShapLoRA scores
    curvature: str  # of Sensitivity-LoRA
    first_gate_lr: float  # of the gates in ShapLoRA's first training
    first_rank: int | None  # of every layer in ShapLoRA's first training; None: twice the budget


@dataclass
class Run:
    """One method, one seed."""

    method: str
    seed: int
    allocation: Allocation
    scoring_seconds: float
    training_seconds: float
    training_loss: float
    dev: dict[str, float]
    test: dict[str, float]
    history: History | None


class Trained(NamedTuple):
    """What a method returns."""

    allocation: Allocation  # the ranks at the end
    scoring_seconds: float  # to find the ranks before the training, a first training included
    result: dict[str, float]  # what train() returned
    history: History | None = None  # of the ranks, if they moved during the training
    model: nn.Module | None = None  # the trained model, where it is not the one that was given


Method = Callable[[Tagger, Data, Options, int], Trained]

CURVATURES: dict[str, Curvature] = {
    "input_second_moment": curvature.input_second_moment,
    "empirical_fisher": partial(curvature.empirical_fisher, batch_weight=words),
}


# A method allocates ranks for the plain model, wraps it, and trains it in place (or returns another
# model). To add a method, write such a function and name it in METHODS.


def uniform(model: Tagger, data: Data, options: Options, seed: int) -> Trained:
    return allocate_then_train(UniformRanks(model, options.targets), model, data, options, seed)


def sensitivity(model: Tagger, data: Data, options: Options, seed: int) -> Trained:
    calibration = list(batches(data.dev, 24, device=options.device))
    estimate = CURVATURES[options.curvature]
    allocator = SensitivityLoRA(
        model, loss_fn, calibration, targets=options.targets, curvature=estimate
    )
    return allocate_then_train(allocator, model, data, options, seed)


def l1ra(model: Tagger, data: Data, options: Options, seed: int) -> Trained:
    allocator = UniformRanks(model, options.targets)
    allocator.score()
    start = allocator.allocate(options.budget, unit=options.unit, min_rank=1)
    # The scaling is that of the other methods. A starts from N(0, 1/16²), as in the authors' code.
    wrap(
        model,
        start,
        alpha=16 * SCALING,
        reference_rank=16,
        gate=1.0,
        trainable=["head"],
        generator=seed,
    )
    optimizer = make_optimizer(model)
    allocator_in_training = L1RA(
        model,
        optimizer,
        l1=options.l1,
        gate_lr=options.gate_lr,
        interval=options.interval,
        stop=options.stop,
        budget=options.budget,
        unit=start.unit,
        generator=seed,
    )
    result = train(
        model,
        data.train,
        steps=options.steps,
        seed=seed,
        optimizer=optimizer,
        on_step=lambda _: allocator_in_training.step(),
    )
    at_the_end = replace(start, ranks=allocator_in_training.ranks, method="L1RA")
    return Trained(at_the_end, 0.0, result, allocator_in_training.history)


def shaplora(model: Tagger, data: Data, options: Options, seed: int) -> Trained:
    start = time.perf_counter()
    # Stage one: a copy is trained with twice the budget, scored, and thrown away.
    trial = copy.deepcopy(model)
    uniform_ranks = UniformRanks(trial, options.targets)
    uniform_ranks.score()
    if options.first_rank is None:
        ranks = uniform_ranks.allocate(2 * options.budget, unit=options.unit)
    else:
        ranks = uniform_ranks.allocate(options.first_rank * len(uniform_ranks.targets))
    available = ranks.total_rank if options.unit == "ranks" else ranks.parameters
    if available < options.budget:
        raise SystemExit(
            f"--first-rank {options.first_rank} gives ShapLoRA {available:,} {options.unit} to "
            f"choose from, fewer than the budget of {options.budget:,}: raise it"
        )
    wrap(trial, ranks, scaling=SCALING, gate=0.0, trainable=["head"], generator=seed)
    optimizer = make_optimizer(trial, gate_lr=options.first_gate_lr)
    train(trial, data.train, steps=options.steps, seed=seed, optimizer=optimizer)
    validation = list(batches(spread(data.dev, options.sentences), 24, device=options.device))
    allocator = ShapLoRA(
        trial,
        loss_fn,
        validation,
        coalitions=options.coalitions,
        importance=options.importance,
        batch_weight=words,
        generator=seed,
    )
    first_stage = time.perf_counter() - start
    first_loss = evaluate(trial, data.dev)["loss"]
    print(
        f"seed {seed}, shaplora: dev loss {first_loss:.4f} after the first training, "
        f"at {ranks.total_rank} ranks"
    )
    # Stage two trains plain LoRA like the other methods, so that nothing differs but the ranks.
    trained = allocate_then_train(allocator, model, data, options, seed)
    return trained._replace(scoring_seconds=first_stage + trained.scoring_seconds)


def eva(model: Tagger, data: Data, options: Options, seed: int) -> Trained:
    start = time.perf_counter()
    plan, rank = uniform_plan(model, options)
    calibration = list(batches(data.dev, 24, device=options.device))
    ranks = eva_ranks(model, list(plan.ranks), calibration, logits, rank=rank, max_rank=2 * rank)
    allocation = fitted(plan, ranks, model, "EVA")
    return train_plain(allocation, time.perf_counter() - start, model, data, options, seed)


def adalora(model: Tagger, data: Data, options: Options, seed: int) -> Trained:
    start = time.perf_counter()
    as_is = adalora_as_is(model, data, options, seed)
    allocation = fitted(uniform_plan(model, options)[0], as_is.allocation.ranks, model, "AdaLoRA")
    return train_plain(allocation, time.perf_counter() - start, model, data, options, seed)


def adalora_as_is(model: Tagger, data: Data, options: Options, seed: int) -> Trained:
    plan, rank = uniform_plan(model, options)
    result: dict[str, float] = {}

    def train_the_copy(student: nn.Module, on_step: Callable[[int], None]) -> None:
        trained = train(student, data.train, steps=options.steps, seed=seed, on_step=on_step)
        result.update(trained)

    student, ranks = train_by_adalora(
        model,
        list(plan.ranks),
        rank=rank,
        start_rank=max(rank + 1, round(1.5 * rank)),
        steps=options.steps,
        scaling=SCALING,
        train=train_the_copy,
        trainable=["head"],
        seed=seed,
    )
    costs = {name: cost + 1 for name, cost in plan.costs.items()}  # an entry of E besides A and B
    allocation = replace(plan, ranks=ranks, costs=costs, method="AdaLoRA as is")
    return Trained(allocation, 0.0, result, model=student)


BY_DEFAULT: dict[str, Method] = {
    "uniform": uniform,
    "sensitivity": sensitivity,
    "l1ra": l1ra,
    "shaplora": shaplora,
}
BY_PEFT: dict[str, Method] = {"eva": eva, "adalora": adalora, "adalora-as-is": adalora_as_is}
METHODS = BY_DEFAULT | BY_PEFT


def uniform_plan(model: Tagger, options: Options) -> tuple[Allocation, int]:
    """(the uniform ranks at the budget, the average rank nearest to them)."""
    allocator = UniformRanks(model, options.targets)
    allocator.score()
    plan = allocator.allocate(options.budget, unit=options.unit)
    return plan, max(1, round(plan.total_rank / len(plan.ranks)))


def logits(model: nn.Module, batch: Batch) -> object:
    return model(batch["input_ids"], batch["attention_mask"])


def fitted(plan: Allocation, ranks: Mapping[str, int], model: Tagger, method: str) -> Allocation:
    """The ranks in their proportions at the budget of `plan`."""
    costs = plan.costs if plan.unit == "parameters" else None
    weights = dict(model.named_parameters())
    upper = {name: min(weights[f"{name}.weight"].shape) for name in ranks}
    return replace(plan, ranks=fit_to_budget(ranks, plan.budget, costs, upper), method=method)


def allocate_then_train(
    allocator: Allocator, model: Tagger, data: Data, options: Options, seed: int
) -> Trained:
    start = time.perf_counter()
    allocator.score()
    allocation = allocator.allocate(options.budget, unit=options.unit)
    return train_plain(allocation, time.perf_counter() - start, model, data, options, seed)


def train_plain(
    allocation: Allocation, seconds: float, model: Tagger, data: Data, options: Options, seed: int
) -> Trained:
    """Train plain LoRA of these ranks, which took so many seconds to find."""
    wrap(model, allocation, scaling=SCALING, trainable=["head"], generator=seed)
    return Trained(allocation, seconds, train(model, data.train, steps=options.steps, seed=seed))


def run(name: str, data: Data, options: Options, seed: int) -> Run:
    model = build_model(seed, len(data.tags), options.device)
    allocation, seconds, result, history, other = METHODS[name](model, data, options, seed)
    trained = model if other is None else other
    dev, test = evaluate(trained, data.dev), evaluate(trained, data.test)
    return Run(
        name, seed, allocation, seconds, result["seconds"], result["loss"], dev, test, history
    )


# ---- printing ----------------------------------------------------------------------------------


def mean_and_error(values: list[float]) -> tuple[float, float | None]:
    """The mean and its standard error, which is None for a single value."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return statistics.fmean(values), error


def plus_minus(mean: float, error: float | None, digits: int, sign: str = "") -> str:
    return f"{mean:{sign}.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


FIGURES: dict[str, Callable[[Run], float]] = {
    "test accuracy %": lambda r: r.test["accuracy"],
    "test loss": lambda r: r.test["loss"],
    "dev loss": lambda r: r.dev["loss"],
    "training loss": lambda r: r.training_loss,
    "parameters": lambda r: float(r.allocation.parameters),
    "scoring s": lambda r: r.scoring_seconds,
    "training s": lambda r: r.training_seconds,
}


Summary = dict[str, dict[str, dict[str, Any]]]


def summarise(runs: list[Run], methods: list[str]) -> Summary:
    """{figure: {method: {mean, standard error, and both of the paired difference}}}.

    Differences are from the first method.
    """
    summary: Summary = {}
    for figure, value in FIGURES.items():
        by_method = {m: {r.seed: value(r) for r in runs if r.method == m} for m in methods}
        summary[figure] = {}
        for method, by_seed in by_method.items():
            mean, error = mean_and_error(list(by_seed.values()))
            difference, difference_error = mean_and_error(
                [v - by_method[methods[0]][s] for s, v in by_seed.items()]
            )
            summary[figure][method] = {
                "mean": mean,
                "standard_error": error,
                "difference": difference,
                "difference_standard_error": difference_error,
            }
    return summary


def report(summary: Summary, methods: list[str], seeds: list[int]) -> str:
    lines = [f"{len(seeds)} seed(s), mean ± standard error; differences are paired by seed", ""]
    if len(seeds) < 5:
        lines[0] += " (with fewer than 5 seeds, the errors themselves are little more than guesses)"
    lines.append(
        f"{'':<16}"
        + "".join(f"  {m:>18}" for m in methods)
        + "".join(f"  {m + ' - ' + methods[0]:>26}" for m in methods[1:])
    )
    for figure, cells in summary.items():
        digits = decimals(figure)
        means = [
            plus_minus(cell["mean"], cell["standard_error"], digits) for cell in cells.values()
        ]
        differences = [
            plus_minus(
                cells[method]["difference"],
                cells[method]["difference_standard_error"],
                digits,
                sign="+",
            )
            for method in methods[1:]
        ]
        lines.append(
            f"{figure:<16}"
            + "".join(f"  {text:>18}" for text in means)
            + "".join(f"  {text:>26}" for text in differences)
        )
    return "\n".join(lines)


def decimals(figure: str) -> int:
    if figure == "parameters":
        return 0
    if figure.endswith(" s"):
        return 1
    return 2 if "%" in figure else 4


def report_kinds(runs: list[Run], methods: list[str]) -> str:
    """Where the ranks went: sums over the layers for each kind of module, means over the seeds."""
    grids = {m: [arrange(r.allocation.ranks) for r in runs if r.method == m] for m in methods}
    lines = ["ranks by kind of module, summed over layers, mean over seeds"]
    kinds = grids[methods[0]][0].columns
    width = max(len(kind) for kind in kinds)
    lines.append(f"{'':<{width}}" + "".join(f"  {m:>12}" for m in methods))
    for kind in kinds:
        sums = [
            [sum(n for (_, c), n in g.ranks.items() if g.columns[c] == kind) for g in grids[m]]
            for m in methods
        ]
        lines.append(
            f"{kind:<{width}}" + "".join(f"  {statistics.fmean(values):>12.1f}" for values in sums)
        )
    return "\n".join(lines)


def save_json(path: str, options: Options, runs: list[Run], summary: Summary) -> None:
    records = []
    for r in runs:
        plain = {k: v for k, v in vars(r).items() if k not in ("allocation", "history")}
        history = {"history": r.history.state_dict()} if r.history else {}
        records.append({**plain, "ranks": dict(r.allocation.ranks), **history})
    environment = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "python": sys.version.split()[0],
    }
    content = {
        "options": vars(options),
        "environment": environment,
        "summary": summary,
        "runs": records,
    }
    Path(path).write_text(json.dumps(content, indent=1) + "\n")


def save_plot(path: str, runs: list[Run], methods: list[str]) -> None:
    """Draw the first seed's ranks of all methods side by side, on one colour scale."""
    from matplotlib.figure import Figure

    first = {m: next(r.allocation for r in runs if r.method == m) for m in methods}
    top = max(max(allocation.ranks.values()) for allocation in first.values())
    figure = Figure(figsize=(7.2 * len(methods), 4), layout="constrained")
    panels = figure.subplots(1, len(methods), squeeze=False)[0]
    for axes, (method, allocation) in zip(panels, first.items(), strict=True):
        image = fill_heat_map(axes, allocation.ranks, top)
        axes.set_title(
            f"{method}: {allocation.total_rank} ranks, {allocation.parameters:,} parameters",
            fontsize=10,
        )
    figure.colorbar(image, ax=list(panels), label="rank", ticks=whole_ticks(top))
    figure.savefig(path, dpi=130)


def positive(text: str) -> int:
    """The type of an option that counts something from 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {value}")
    return value


def given(value: int | None, default: int) -> int:
    """The value of an option, or its default where the option is absent. 0 is a value."""
    return default if value is None else value


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="2 seeds of 40 steps")
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=list(METHODS),
        default=list(BY_DEFAULT),
        metavar="METHOD",
        help=f"some of {', '.join(METHODS)} (default: {', '.join(BY_DEFAULT)}); "
        "the others are compared with the first",
    )
    parser.add_argument(
        "--budget", type=int, default=72, help="total over all targets (default 72: 36 layers at 2)"
    )
    parser.add_argument(
        "--unit", choices=["ranks", "parameters"], default="ranks", help="what the budget counts"
    )
    parser.add_argument(
        "--targets", nargs="+", default=["encoder.*"], help="names or globs of linear layers"
    )
    parser.add_argument(
        "--steps", type=positive, help="training steps of 24 sentences (default 250; quick: 40)"
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", help="one training per method and seed (default 0 1 2)"
    )
    parser.add_argument(
        "--curvature",
        choices=list(CURVATURES),
        default="input_second_moment",
        help="of Sensitivity-LoRA",
    )
    parser.add_argument("--l1", type=float, default=L1, help=f"L1RA's penalty (default {L1})")
    parser.add_argument(
        "--gate-lr",
        type=float,
        default=GATE_LR,
        help=f"learning rate of L1RA's gates (default {GATE_LR})",
    )
    parser.add_argument(
        "--interval",
        type=positive,
        help="steps between L1RA's updates (default: 5 %% of the training)",
    )
    parser.add_argument(
        "--stop",
        type=float,
        default=STOP,
        help=f"share of the training in which L1RA moves ranks (default {STOP})",
    )
    parser.add_argument(
        "--coalitions",
        type=int,
        help="that ShapLoRA scores, a multiple of 18 (default 90; quick: 18); 0: none, all ranks "
        "are on",
    )
    parser.add_argument(
        "--importance",
        choices=get_args(Importance),
        default="sensitivity",
        help="of ShapLoRA; magnitude needs neither coalitions nor sentences",
    )
    parser.add_argument(
        "--sentences",
        type=positive,
        help="development sentences that ShapLoRA scores (default 120; quick: 16)",
    )
    parser.add_argument(
        "--first-gate-lr",
        type=float,
        default=FIRST_GATE_LR,
        help=f"learning rate of the gates in ShapLoRA's first training (default {FIRST_GATE_LR})",
    )
    parser.add_argument(
        "--first-rank",
        type=positive,
        help="of every layer in ShapLoRA's first training (default: twice the budget)",
    )
    parser.add_argument(
        "--limit",
        type=positive,
        help="use only so many sentences of each split, to see that the script runs",
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", help="write all figures to this JSON file")
    parser.add_argument("--plot", help="write a heat map of the ranks to this image file")
    parser.add_argument(
        "--history-plot", help="write L1RA's ranks over time, of the first seed, to this image file"
    )
    arguments = parser.parse_args()
    if BY_PEFT.keys() & set(arguments.methods):
        load_peft()  # raises at once where it is not installed
    if arguments.coalitions is not None and (arguments.coalitions < 0 or arguments.coalitions % 18):
        parser.error(f"--coalitions: expected 0 or a multiple of 18, got {arguments.coalitions}")
    steps = given(arguments.steps, 40 if arguments.quick else 250)
    seeds = arguments.seeds or ([0, 1] if arguments.quick else [0, 1, 2])
    options = Options(
        budget=arguments.budget,
        unit=arguments.unit,
        targets=arguments.targets,
        steps=steps,
        device=arguments.device,
        l1=arguments.l1,
        gate_lr=arguments.gate_lr,
        interval=given(arguments.interval, max(1, steps // 20)),
        stop=round(arguments.stop * steps),
        coalitions=given(arguments.coalitions, 18 if arguments.quick else 90),
        importance=arguments.importance,
        sentences=given(arguments.sentences, 16 if arguments.quick else 120),
        curvature=arguments.curvature,
        first_gate_lr=arguments.first_gate_lr,
        first_rank=arguments.first_rank,
    )

    data = load_data()
    if arguments.limit is not None:
        n = arguments.limit
        data = data._replace(train=data.train[:n], dev=data.dev[:n], test=data.test[:n])
    sizes = (
        f"{len(data.train)} training, {len(data.dev)} dev, {len(data.test)} test sentences, "
        f"{len(data.tags)} tags"
    )
    print(
        f"{sizes}; {options.steps} steps on {', '.join(options.targets)}, "
        f"budget {options.budget:,} {options.unit}"
    )
    runs = []
    for seed in seeds:
        for name in arguments.methods:
            result = run(name, data, options, seed)
            if seed == seeds[0]:
                print(f"\n{result.allocation}")
            figures = (
                f"test accuracy {result.test['accuracy']:.2f} %, loss {result.test['loss']:.4f}"
            )
            times = (
                f"{result.scoring_seconds:.1f} s scoring, {result.training_seconds:.0f} s training"
            )
            print(f"seed {seed}, {name}: {figures}, {times}", flush=True)
            runs.append(result)
    summary = summarise(runs, arguments.methods)
    print(f"\n{report(summary, arguments.methods, seeds)}")
    print(f"\n{report_kinds(runs, arguments.methods)}")
    if arguments.out:
        save_json(arguments.out, options, runs, summary)
    if arguments.plot:
        save_plot(arguments.plot, runs, arguments.methods)
    history = next((run.history for run in runs if run.history), None)
    if arguments.history_plot and history:
        history.plot(arguments.history_plot)


if __name__ == "__main__":
    main()
