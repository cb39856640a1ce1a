"""How far are each method's ranks from the best? Every division of a small budget is trained.

    python examples/exhaustive_search.py teacher --out exhaustive_teacher.json
    python examples/exhaustive_search.py digits --out exhaustive_digits.json
    python examples/exhaustive_search.py digits --quick

Two small networks with four linear layers that get ranks:

    teacher   two residual blocks of width 24 learn from a teacher. The changes planted in it have
              full rank, with singular values that fall by a power of their number; scale and power
              are drawn for each layer. No division is perfect, and none is known to be the best.
    digits    a network that reads handwritten digits (8 × 8, from scikit-learn) meets them
              mirrored. Its head is frozen.

Every division of the budget (uniform ranks of 2) is trained: all ranks from 0 to 6 of the four
layers that fit the budget and leave no room for another rank. Each is trained with as many seeds as
the methods; for the teacher every seed is another teacher. The learning rate is the best one of
uniform ranks, by the development split.

A method's regret is the mean test loss of its ranks minus that of the best division of that seed.
"beaten by" is the share of all divisions that are better. A division taken by chance is beaten by
half of them. Where the arms draw their ranks is described in study.py and arms.py; ranks are looked
up among the divisions, so that nothing but the ranks differs.
"""

from __future__ import annotations

import itertools
import statistics
from argparse import Namespace
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from arms import ARMS
from compare import mean_and_error, plus_minus
from study import Context, Progress, Ranks, Task, study_parser
from study_results import KNOWN, LARGEST, UNIFORM, Results
from torch import Tensor, nn

from minirank import linear_targets

LARGEST_RANK = 6
Batch = tuple[Tensor, Tensor]  # inputs (n, d), and what is to come out


class Small(Task):
    """What both tasks share: batches of pairs, and held-out splits."""

    rank = 2
    max_rank = LARGEST_RANK
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    tuning_seeds: tuple[int, ...] = (0, 1, 2, 3, 4)

    def held_out(self, seed: int) -> tuple[Batch, Batch]:
        """Development split, test split."""
        raise NotImplementedError

    def calibration(self, seed: int) -> list[Batch]:
        x, y = self.held_out(seed)[0]
        return list(zip(torch.split(x, 64), torch.split(y, 64), strict=True))

    @torch.no_grad()
    def evaluate(self, model: nn.Module, seed: int) -> dict[str, float]:
        model.eval()
        dev, test = self.held_out(seed)
        return {"dev": float(self.loss_fn(model, dev)), "test": float(self.loss_fn(model, test))}


# ---- a teacher whose changes have falling singular values ----------------------------------------

WIDTH = 24


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.down(F.gelu(self.up(x)))
        return y


def residual_network(seed: int) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(Residual(), Residual())


@lru_cache
def teacher(seed: int) -> nn.Sequential:
    """The network with changes of full rank: σ_i = scale · i^-power, both drawn for each layer."""
    model = residual_network(seed).requires_grad_(False)
    generator = torch.Generator().manual_seed(1_000_000 + seed)
    for layer in linear_targets(model).values():
        scale, power = (torch.rand(2, generator=generator) * 2).tolist()
        sigma = scale * torch.arange(1, WIDTH + 1) ** -(0.5 + power)
        U, V = (torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator)).Q for _ in range(2))
        layer.get_parameter("weight").add_(U @ sigma.diag() @ V.T)
    return model


class FallingTeacher(Small):
    name = "a teacher whose changes have falling singular values"
    rates: tuple[float, ...] = (1e-2, 2e-2, 4e-2)
    first_rate = 2e-2
    steps = 400

    def model(self, seed: int) -> nn.Module:
        return residual_network(seed)

    def loss_fn(self, model: nn.Module, batch: Batch) -> Tensor:
        return F.mse_loss(model(batch[0]), batch[1])

    def batch(self, seed: int, size: int, generator: torch.Generator) -> Batch:
        x = torch.randn(size, WIDTH, generator=generator)
        with torch.no_grad():
            return x, teacher(seed)(x)

    def held_out(self, seed: int) -> tuple[Batch, Batch]:
        generator = torch.Generator().manual_seed(2_000_000 + seed)
        return self.batch(seed, 1024, generator), self.batch(seed, 2048, generator)

    def training_batches(self, seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(3_000_000 + seed)
        while True:
            yield self.batch(seed, 64, generator)


# ---- digits --------------------------------------------------------------------------------------


class Digits(Small):
    """Mirrored digits, for a network that reads them as they are."""

    name = "a reader of digits meets them mirrored"
    rates: tuple[float, ...] = (3e-3, 1e-2, 3e-2)
    first_rate = 1e-2
    steps = 300
    targets = "body.*"

    def __init__(self) -> None:
        from sklearn.datasets import load_digits  # type: ignore[import-untyped]

        images, labels = load_digits(return_X_y=True)
        x = torch.tensor(images, dtype=torch.float32).view(-1, 8, 8) / 16 - 0.3
        y = torch.tensor(labels)
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
        self.upright = x[order].flatten(1), y[order]
        self.mirrored = x[order].flip(2).flatten(1), y[order]
        self.reader = self._trained_reader()

    def _trained_reader(self) -> dict[str, Tensor]:
        model = digits_network()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        x, y = self.upright
        generator = torch.Generator().manual_seed(0)
        for _ in range(600):
            rows = torch.randint(1000, (64,), generator=generator)
            loss = F.cross_entropy(model(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        return model.state_dict()

    def model(self, seed: int) -> nn.Module:
        model = digits_network()
        model.load_state_dict(self.reader)
        return model

    def loss_fn(self, model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    def held_out(self, seed: int) -> tuple[Batch, Batch]:
        x, y = self.mirrored
        return (x[1000:1300], y[1000:1300]), (x[1300:], y[1300:])

    def training_batches(self, seed: int) -> Iterator[Batch]:
        x, y = self.mirrored
        generator = torch.Generator().manual_seed(1_000_000 + seed)
        while True:
            rows = torch.randint(1000, (64,), generator=generator)
            yield x[rows], y[rows]


def digits_network() -> nn.Module:
    """64 → 32 → 32 → 32 → 32 → 10; the last layer is the head."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes = [64, 32, 32, 32, 32]
        body = nn.Sequential()
        for d_in, d_out in itertools.pairwise(sizes):
            body.extend([nn.Linear(d_in, d_out), nn.GELU()])
        model = nn.Sequential()
        model.add_module("body", body)
        model.add_module("head", nn.Linear(32, 10))
    return model


# ---- the search ----------------------------------------------------------------------------------


def divisions(costs: Mapping[str, int], budget: int, largest: int) -> list[Ranks]:
    """All ranks from 0 to `largest` that fit the budget and leave no room for another rank.

    >>> divisions({"a": 1, "b": 2}, 4, 3)
    [{'a': 0, 'b': 2}, {'a': 2, 'b': 1}, {'a': 3, 'b': 0}]
    """
    found = []
    for ranks in itertools.product(range(largest + 1), repeat=len(costs)):
        left = budget - sum(r * c for r, c in zip(ranks, costs.values(), strict=True))
        room = any(r < largest and c <= left for r, c in zip(ranks, costs.values(), strict=True))
        if left >= 0 and not room:
            found.append(dict(zip(costs, ranks, strict=True)))
    return found


def label(ranks: Mapping[str, int]) -> str:
    return "-".join(map(str, ranks.values()))


def search(task: Small, results: Results, arms: list[str]) -> None:
    """Train every division with every seed, and let every arm choose."""
    for seed in task.seeds:
        context = Context(task, seed)
        for rate in task.rates:
            if results.find("runs", arm=UNIFORM, seed=seed, lr=rate) is None:
                uniform = dict.fromkeys(context.names, task.rank)
                figures = task.evaluate(context.train(uniform, rate), seed)
                results.add("runs", {"arm": UNIFORM, "seed": seed, "lr": rate, **figures})
    rate = results.best_rate(UNIFORM)
    if results.content.setdefault("rate", rate) != rate:
        raise SystemExit(
            f"the divisions of {results.path} were trained at a learning rate of "
            f"{results.content['rate']:g}, and with these seeds {rate:g} is the best: give another "
            "--out"
        )
    context = Context(task, task.seeds[0])
    every = divisions(context.costs, context.budget, task.max_rank)
    progress = Progress(len(task.seeds) * len(every))
    for seed in task.seeds:
        context = Context(task, seed)
        for ranks in every:
            if results.find("divisions", ranks=label(ranks), seed=seed) is None:
                figures = task.evaluate(context.train(ranks, rate), seed)
                record = {"ranks": label(ranks), "seed": seed, **figures}
                results.add("divisions", record, save=len(results.content["divisions"]) % 20 == 0)
                progress.step(f"seed {seed}, {label(ranks)}: test {figures['test']:.4g}")
            else:
                progress.skip()
        for name in arms:
            if results.find("ranks", arm=name, seed=seed) is None:
                arm = ARMS[name]
                chosen = arm.ranks(context) if arm.ranks else None
                if arm.train is not None:
                    chosen = arm.train(context, rate).ranks
                if chosen is not None:
                    results.add("ranks", {"arm": name, "seed": seed, "ranks": label(chosen)})
                    look_up(results, name, seed, rate, label(chosen))
    results.save()


def look_up(results: Results, arm: str, seed: int, rate: float, ranks: str) -> None:
    """The figures of a division are those of the arm that chose it."""
    division = results.find("divisions", ranks=ranks, seed=seed)
    if division is not None and results.find("runs", arm=arm, seed=seed, lr=rate) is None:
        figures = {"dev": division["dev"], "test": division["test"]}
        results.add("runs", {"arm": arm, "seed": seed, "lr": rate, **figures})


def division_losses(results: Results) -> dict[int, dict[str, float]]:
    """{seed: {division: test loss}}"""
    losses: dict[int, dict[str, float]] = {}
    for record in results.content["divisions"]:
        losses.setdefault(record["seed"], {})[record["ranks"]] = record["test"]
    return losses


def regret_table(task: Small, results: Results, arms: list[str]) -> str:
    """Regret and rank among all divisions, mean ± standard error over the seeds."""
    losses = division_losses(results)
    best = {seed: min(values.values()) for seed, values in losses.items()}
    middle = statistics.fmean(statistics.median(values.values()) for values in losses.values())
    rate = results.best_rate(UNIFORM)
    lines = [
        f"{task.name}: {len(next(iter(losses.values())))} divisions, {task.steps} steps at "
        f"learning rate {rate:g}, seeds {', '.join(map(str, losses))}",
        f"test loss of the best division {statistics.fmean(best.values()):.4f}, of the median "
        f"division {middle:.4f}",
        f"{'arm':<26} {'test loss':>18} {'regret':>18} {'beaten by, %':>14}",
    ]
    for name in arms:
        chosen = {r["seed"]: r["ranks"] for r in results.content["ranks"] if r["arm"] == name}
        chosen = {s: ranks for s, ranks in chosen.items() if ranks in losses.get(s, {})}
        if len(chosen) < len(losses):
            if chosen:
                lines.append(f"{name:<26} its ranks are no division for some seeds")
            continue
        found = {seed: losses[seed][ranks] for seed, ranks in chosen.items()}
        beaten = [
            100 * statistics.fmean(loss < found[seed] for loss in losses[seed].values())
            for seed in found
        ]
        mean = plus_minus(*mean_and_error(list(found.values())), 4)
        regret = plus_minus(*mean_and_error([found[s] - best[s] for s in found]), 4)
        share = plus_minus(*mean_and_error(beaten), 0)
        lines.append(f"{name:<26} {mean:>18} {regret:>18} {share:>14}")
    return "\n".join(lines)


# Arms whose ranks need not be one of the divisions, or are not known here.
LEFT_OUT = (LARGEST, KNOWN, "adalora", "attention only", "feed-forward only")
CHOSEN = [name for name in ARMS if name not in LEFT_OUT]


def run(kind: Literal["teacher", "digits"], options: Namespace) -> None:
    task = FallingTeacher() if kind == "teacher" else Digits()
    arms = options.arms or CHOSEN
    if options.quick:
        task.steps, task.seeds, task.rates = 4, task.seeds[:2], task.rates[:1]
    if options.seeds is not None:
        task.seeds = tuple(options.seeds)
    if options.rates is not None:
        task.rates = tuple(options.rates)
    task.tuning_seeds = task.seeds
    settings = {"task": kind, "steps": task.steps, "torch": torch.__version__}
    results = Results(options.out, task.about(), settings)
    results.content.setdefault("divisions", [])
    search(task, results, arms)
    print(f"\n{regret_table(task, results, arms)}")
    if options.plot is not None:
        save_plot(options, task, results, arms)


def save_plot(options: Namespace, task: Small, results: Results, arms: list[str]) -> None:
    """All divisions in grey and the arms as dots, for each seed, over the best loss."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.2 + 0.25 * len(arms)), layout="constrained")
    axes = figure.subplots()
    losses = division_losses(results)
    best = {seed: min(values.values()) for seed, values in losses.items()}
    every = sorted(v / best[seed] for seed, values in losses.items() for v in values.values())
    rows = ["every division", *arms]
    axes.plot(every, [0] * len(every), "|", color="0.6", markersize=12, alpha=0.3)
    for y, name in enumerate(arms, 1):
        ratios = [loss / best[seed] for seed, loss in results.losses(name).items()]
        axes.plot(ratios, [y] * len(ratios), "o", color="C0", alpha=0.6)
    axes.set_yticks(range(len(rows)), rows)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.set_xlabel("test loss over that of the best division (one dot for each seed)")
    axes.set_title(task.name, fontsize=10)
    figure.savefig(options.plot, dpi=130)


def main() -> None:
    parser = study_parser(__doc__)
    parser.add_argument("task", choices=["teacher", "digits"])
    options = parser.parse_args()
    run(options.task, options)


if __name__ == "__main__":
    main()
