"""When does allocating ranks help? The harness that every study of it shares.

A study has a task (what a model is to learn) and arms (who decides the ranks). To add a task, write
a subclass of `Task`. To add an arm, write one function and name it in `arms.ARMS`.

The protocol of every study:

- Budget: all arms get the same number of trainable parameters, `Task.budget`, and no module gets
  more than `Task.max_rank` ranks. The scale of an adapter is the same for every arm and rank.
- Headroom gate: uniform ranks of `max_rank` contain every allocation that an arm may find. If they
  do not beat uniform ranks at the budget by two standard errors, no division of the budget can
  matter much. The study then says "no headroom" and stops, unless it is told to go on.
- Learning rate: every arm trains at every rate of the task's grid with the tuning seeds. The rate
  with the lowest mean development loss is used for all seeds, and the table shows it.
- Seeds: a seed fixes the task's model and data, the adapters' start, the order of the data and an
  arm's own draws. Differences are paired by seed.
- Figures: test losses, mean ± standard error over the seeds; and the share of the gap between
  uniform and the best known ranks that an arm closes, where the best ranks are known.
- Cost: processor seconds, so that other work on the machine does not count. The cost of an arm
  holds all that it takes to find the ranks, a first training included.

Every allocation and every training is written to `--out` as it ends, and none that is in the file
runs again.
"""

from __future__ import annotations

import argparse
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from study_results import (
    LARGEST,
    UNIFORM,
    Results,
    has_headroom,
    headroom_line,
    paired,
    save_plot,
    table,
)
from tagging import warm_up_then_decay
from torch import Tensor, nn
from tqdm import tqdm

from minirank import UniformRanks, linear_targets, wrap
from minirank.budget import proportional_ranks

Ranks = dict[str, int]


class Task(ABC):
    """What a model is to learn, and under which limits.

    Attributes:
        name: one line for tables.
        rank: the average rank, by which `budget` is counted unless a task counts another way.
        max_rank: no module gets more ranks, in any arm.
        rates: the grid of learning rates.
        first_rate: the learning rate of first trainings.
        steps: of one training.
        seeds, tuning_seeds: see the protocol. The tuning seeds come first.
        scaling: of every adapter.
        trainable: names of modules that train besides the adapters.
        gate_factor: the learning rate of ShapLoRA's gates, over that of the adapters.
        targets: which layers get ranks, as for `linear_targets`.
    """

    name: str
    rank: int
    max_rank: int
    rates: tuple[float, ...]
    first_rate: float
    steps: int
    seeds: tuple[int, ...]
    tuning_seeds: tuple[int, ...]
    scaling: float = 2.0
    trainable: tuple[str, ...] = ()
    gate_factor: float = 10.0
    targets: str | None = None

    @abstractmethod
    def model(self, seed: int) -> nn.Module:
        """The plain model, as it is before the training. Every call makes the same one."""

    @abstractmethod
    def loss_fn(self, model: nn.Module, batch: Any) -> Tensor:
        """The mean loss of a batch."""

    def training_loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The loss to train by. Default: `loss_fn`."""
        return self.loss_fn(model, batch)

    def batch_weight(self, batch: Any) -> float:
        """What the loss of the batch is a mean over. Default: its number of samples."""
        return len(batch[0])

    @abstractmethod
    def calibration(self, seed: int) -> list[Any]:
        """Batches of the development split, to score ranks on."""

    def few_samples(self, seed: int) -> list[Any]:
        """Less of them, for estimates that need many passes. Default: all of them."""
        return self.calibration(seed)

    def validation(self, seed: int) -> list[Any]:
        """Batches of the development split for ShapLoRA. Default: those of `few_samples`."""
        return self.few_samples(seed)

    def training_batches(self, seed: int) -> Iterator[Any]:
        """Batches to train on, without end."""
        raise NotImplementedError

    @abstractmethod
    def evaluate(self, model: nn.Module, seed: int) -> dict[str, float]:
        """{"dev": loss, "test": loss, …} of a trained model."""

    def best_known(self, seed: int) -> Ranks | None:
        """The best ranks, if they are known."""
        return None

    def kinds(self, seed: int) -> dict[str, list[str]]:
        """{"attention": names, "feed-forward": names}: arms that give these alone ranks."""
        return {}

    def optimizer(
        self, model: nn.Module, lr: float, gate_lr: float | None = None
    ) -> torch.optim.Optimizer:
        """AdamW without weight decay; gates at a rate of their own if `gate_lr` is given."""
        parameters = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        gates = [p for n, p in parameters if n.endswith("gate") and gate_lr is not None]
        gate_ids = {id(p) for p in gates}
        groups: list[dict[str, Any]] = [
            {"params": [p for _, p in parameters if id(p) not in gate_ids], "lr": lr}
        ]
        if gates:
            groups.append({"params": gates, "lr": gate_lr})
        return torch.optim.AdamW(groups, weight_decay=0.0)

    def train(
        self,
        model: nn.Module,
        seed: int,
        optimizer: torch.optim.Optimizer,
        *,
        steps: int,
        on_step: Callable[[int], object] | None = None,
    ) -> None:
        """Train what requires gradients: warm-up over a tenth of the steps, then linear decay.

        Gradients are clipped to norm 1. `on_step(step)` is called after each optimizer step.
        """
        schedule = warm_up_then_decay(optimizer, steps, max(1, steps // 10))
        data = self.training_batches(seed)
        model.train()
        for step in range(steps):
            loss = self.training_loss(model, next(data))
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            trained = [p for group in optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            if on_step is not None:
                on_step(step)

    # ---- what follows from these ----------------------------------------------------------------

    def about(self) -> dict[str, Any]:
        """What `Results` keeps of a task."""
        seeds, tuning = list(self.seeds), list(self.tuning_seeds)
        return {"name": self.name, "seeds": seeds, "tuning_seeds": tuning}

    def names(self, model: nn.Module) -> list[str]:
        return list(linear_targets(model, self.targets))

    def shapes(self, model: nn.Module) -> dict[str, tuple[int, int]]:
        """(d_out, d_in) of each target."""
        return {
            name: (layer.out_features, layer.in_features)
            for name, layer in linear_targets(model, self.targets).items()
            if isinstance(layer, nn.Linear)
        }

    def costs(self, model: nn.Module) -> dict[str, int]:
        """Trainable parameters of one rank of each target."""
        return {name: sum(shape) for name, shape in self.shapes(model).items()}

    def upper(self, model: nn.Module) -> dict[str, int]:
        """The largest rank of each target."""
        return {name: min(self.max_rank, *shape) for name, shape in self.shapes(model).items()}

    def budget(self, seed: int) -> int:
        """Trainable parameters of the adapters. Default: what `rank` everywhere costs."""
        return self.rank * sum(self.costs(self.model(seed)).values())


# ---- arms ----------------------------------------------------------------------------------------


class Context:
    """One task and seed, and what several arms share there: first trainings run once.

    Attributes:
        shared_seconds: processor seconds that the present arm owes for shared trainings that its
            own clock has not seen.
    """

    def __init__(self, task: Task, seed: int) -> None:
        self.task, self.seed = task, seed
        self.plain = task.model(seed)
        self.names = task.names(self.plain)
        self.costs = task.costs(self.plain)
        self.upper = task.upper(self.plain)
        self.budget = task.budget(seed)
        self.shared_seconds = 0.0
        self._shared: dict[Any, tuple[Any, float]] = {}

    def model(self) -> nn.Module:
        return self.task.model(self.seed)

    def shared(self, key: Any, make: Callable[[], Any]) -> Any:
        """make(), once for every key. Its seconds count for every arm that asks."""
        if key not in self._shared:
            start = time.process_time()
            value = make()
            self._shared[key] = value, time.process_time() - start
            self.shared_seconds -= self._shared[key][1]  # the arm's own clock has run meanwhile
        value, seconds = self._shared[key]
        self.shared_seconds += seconds
        return value

    def allocate(self, allocator: Any) -> Ranks:
        """The ranks of a scored allocator at the budget."""
        allocation = allocator.allocate(self.budget, unit="parameters", max_rank=self.task.max_rank)
        return dict(allocation.ranks)

    def divide(
        self,
        shares: Mapping[str, float],
        among: Sequence[str] | None = None,
        budget: int | None = None,
    ) -> Ranks:
        """Ranks in proportion to the shares, in the modules of `among` alone.

        What these modules cannot hold of the budget is left over.
        """
        some = list(shares) if among is None else list(among)
        room = sum(self.upper[name] * self.costs[name] for name in some)
        ranks = proportional_ranks(
            {name: shares[name] for name in some},
            min(self.budget if budget is None else budget, room),
            costs={name: self.costs[name] for name in some},
            upper={name: self.upper[name] for name in some},
        )
        return {name: ranks.get(name, 0) for name in self.names}

    def cost_of(self, ranks: Mapping[str, int]) -> int:
        return sum(rank * self.costs[name] for name, rank in ranks.items())

    @property
    def average_rank(self) -> int:
        """The whole number nearest to the average rank at the budget, at least 1."""
        return max(1, round(self.budget / sum(self.costs.values())))

    def wrapped(self, ranks: Mapping[str, int], gate: float | None = None) -> nn.Module:
        """The model with adapters of these ranks, before the training."""
        model, task = self.model(), self.task
        wrap(
            model,
            ranks,
            scaling=task.scaling,
            gate=gate,
            trainable=task.trainable,
            generator=self.seed,
        )
        return model

    def train(self, ranks: Mapping[str, int], lr: float) -> nn.Module:
        """Plain LoRA with these ranks."""
        model, task = self.wrapped(ranks), self.task
        task.train(model, self.seed, task.optimizer(model, lr), steps=task.steps)
        return model


class Trained(NamedTuple):
    model: nn.Module
    ranks: Ranks  # at the end


class Arm(NamedTuple):
    """Who decides the ranks: one of the two.

    ranks: before the training, which is then the same plain LoRA for all. May be None where the
        task does not know them.
    train: during a training of its own, at the given learning rate.
    """

    ranks: Callable[[Context], Ranks | None] | None = None
    train: Callable[[Context, float], Trained] | None = None


def uniform(context: Context) -> Ranks:
    allocator = UniformRanks(context.plain, context.names)
    allocator.score()
    return context.allocate(allocator)


def largest(context: Context) -> Ranks:
    return dict(context.upper)


def best_known(context: Context) -> Ranks | None:
    return context.task.best_known(context.seed)


# ---- running -------------------------------------------------------------------------------------


class Progress:
    """A bar over the runs, in a terminal, and a line for each of them, with the time left."""

    def __init__(self, total: int) -> None:
        self.left, self.done, self.start = total, 0, time.monotonic()
        self.bar = tqdm(total=total, desc="runs", disable=None)

    def skip(self) -> None:
        self.left -= 1
        self.bar.update()

    def step(self, text: str) -> None:
        self.skip()
        self.done += 1
        minutes = (time.monotonic() - self.start) / self.done * self.left / 60
        tqdm.write(f"{text}; {self.left} runs to go, about {minutes:.0f} min")


def run_arm(
    results: Results, arms: Mapping[str, Arm], name: str, context: Context, lr: float
) -> str | None:
    """One training, unless it is in the results. Returns a line about it, or None."""
    seed, arm = context.seed, arms[name]
    if results.find("runs", arm=name, seed=seed, lr=lr) is not None:
        return None
    start = time.process_time()
    if arm.train is not None:
        context.shared_seconds = 0.0
        model, ranks = arm.train(context, lr)
        # Written together with the run below, so that an interruption loses both or none.
        results.add("ranks", _ranks_record(name, context, ranks, 0.0) | {"lr": lr}, save=False)
    else:
        assert arm.ranks is not None
        record = results.find("ranks", arm=name, seed=seed)
        if record is None:
            context.shared_seconds = 0.0
            found = arm.ranks(context)
            if found is None:
                return None
            seconds = time.process_time() - start + context.shared_seconds
            record = _ranks_record(name, context, found, seconds)
            results.add("ranks", record)
        start = time.process_time()
        model = context.train(record["ranks"], lr)
    seconds = time.process_time() - start
    figures = context.task.evaluate(model, seed)
    results.add("runs", {"arm": name, "seed": seed, "lr": lr, "seconds": seconds, **figures})
    return f"{name}, seed {seed}, lr {lr:g}: test {figures['test']:.4g}, {seconds:.1f} s"


def _ranks_record(name: str, context: Context, ranks: Ranks, seconds: float) -> dict[str, Any]:
    cost = context.cost_of(ranks)
    return {
        "arm": name,
        "seed": context.seed,
        "ranks": ranks,
        "parameters": cost,
        "budget": context.budget,
        "seconds": seconds,
    }


def run(task: Task, arms: Mapping[str, Arm], results: Results, *, gate: bool = True) -> bool:
    """All arms, seeds and learning rates. Returns False if the gate stops the study."""
    first = [name for name in (UNIFORM, LARGEST) if name in arms]
    run_some(task, arms, first, results)
    if gate and LARGEST in arms:
        mean, error = paired(results.losses(LARGEST), results.losses(UNIFORM))
        print(headroom_line(mean, error))
        if not has_headroom(mean, error):
            return False
    run_some(task, arms, [name for name in arms if name not in first], results)
    return True


def run_some(task: Task, arms: Mapping[str, Arm], names: Sequence[str], results: Results) -> None:
    tuning, others = task.tuning_seeds, [s for s in task.seeds if s not in task.tuning_seeds]
    total = len(names) * (len(tuning) * len(task.rates) + len(others))
    progress = Progress(total)
    for seed in (*tuning, *others):
        context: Context | None = None
        for name in names:
            if seed in tuning:
                rates: Sequence[float] = task.rates
            else:
                # An arm without figures for the tuning seeds knows no ranks for this task.
                rates = [results.best_rate(name)] if results.tried(name) else []
            for lr in rates:
                if results.find("runs", arm=name, seed=seed, lr=lr) is not None:
                    progress.skip()
                    continue
                context = context or Context(task, seed)
                line = run_arm(results, arms, name, context, lr)
                progress.step(line) if line else progress.skip()


# ---- the command line ----------------------------------------------------------------------------


def study_parser(description: str | None) -> argparse.ArgumentParser:
    """The options that every study has."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    parser.add_argument("--arms", nargs="+", metavar="ARM", help="default: those of the task")
    parser.add_argument("--seeds", type=int, nargs="+", help="default: the task's own")
    parser.add_argument(
        "--rates", type=float, nargs="+", help="learning rates; default: the task's"
    )
    parser.add_argument("--no-gate", action="store_true", help="go on without headroom")
    parser.add_argument(
        "--out", type=Path, help="write all figures to this JSON file, and resume it"
    )
    parser.add_argument("--plot", type=Path, help="draw the differences from uniform ranks")
    return parser


def run_study(
    task: Task,
    options: argparse.Namespace,
    settings: Mapping[str, Any],
    *,
    arms: Sequence[str] | None = None,
    halves: bool = False,
) -> None:
    """Run a task with the arms of arms.py, and print its table.

    Args:
        settings: what the runs depend on, besides the task's steps, first rate and largest rank.
        arms: by default. None: all.
        halves: report on the tuning seeds and on the others apart.
    """
    from arms import ARMS

    if options.seeds is not None:
        task.tuning_seeds = tuple(s for s in options.seeds if s in task.tuning_seeds)
        task.tuning_seeds = task.tuning_seeds or (options.seeds[0],)
        task.seeds = tuple(options.seeds)
    if options.quick:
        task.seeds, task.tuning_seeds = task.seeds[:2], task.seeds[:1]
        task.rates = task.rates[:1]
    if options.rates is not None:
        task.rates = tuple(options.rates)
    names = options.arms or arms or list(ARMS)
    unknown = [name for name in names if name not in ARMS]
    if unknown:
        raise SystemExit(f"unknown arms {unknown}: known are {list(ARMS)}")
    chosen = {name: arm for name, arm in ARMS.items() if name in {UNIFORM, *names}}
    results = Results(
        options.out,
        task.about(),
        {
            **settings,
            "steps": task.steps,
            "max_rank": task.max_rank,
            "first_rate": task.first_rate,
            "torch": torch.__version__,
        },
    )
    run(task, chosen, results, gate=not (options.no_gate or options.quick))
    groups = [list(task.seeds)]
    if halves and len(task.seeds) > len(task.tuning_seeds):
        others = [seed for seed in task.seeds if seed not in task.tuning_seeds]
        groups = [list(task.tuning_seeds), others, list(task.seeds)]
    for seeds in groups:
        print(f"\n{table(results, list(chosen), seeds)}")
    if options.plot is not None:
        save_plot(options.plot, results, list(chosen), groups[-1])
