"""What one estimate of the curvature costs, in training passes, and where its time goes.

    python examples/benchmark_passes.py
    python examples/benchmark_passes.py --model minilm      # or smollm2, see smollm2.py
    python examples/benchmark_passes.py --model small       # the exact diagonal as well
    PYTHONPATH=/tmp/other python examples/benchmark_passes.py --before minirank_before

One pass is forward and backward with the gradients of all targets. An estimate is the empirical
Fisher, one random vector of the sampled Gauss-Newton diagonal, or one of Hutchinson's; each counts
its one-time checks. The default model is four transformer blocks of width 192 on 12 batches of 16
sequences of 24 positions. MiniLM reads 12 batches of 4 sentences. Of SmolLM2 the first 6 of 30
blocks, with its head, read 12 batches of 2 sequences of 32 tokens.

With --before, another version of minirank takes its turns too: a copy of its folder under another
name, which can be imported.

All contenders take turns in one process, and the processor's time counts, so that other processes
disturb little. Figures are medians of the repeats, and ratios of these medians. The peak of the
memory is the largest sum of the tensors that live together, the model's own not counted, in a run
on the first two batches.
"""

from __future__ import annotations

import argparse
import cProfile
import importlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timing import Work, interleaved, table
from torch import Tensor, nn

from minirank.layers.targets import linear_targets

PASS = "one pass"


class Task(NamedTuple):
    model: nn.Module
    loss_fn: Callable[[nn.Module, Any], Tensor]
    batches: list[Any]
    targets: str | None = None
    output: str = ""  # the module whose output is Gauss-Newton's y


class Block(nn.Module):
    """A pre-norm transformer block with a linear layer for each projection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.before(x)
        q, k, v = (
            layer(h).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.out(mixed)
        result: Tensor = x + self.down(F.gelu(self.up(self.between(x))))
        return result


def stack(width: int, positions: int, samples: int, count: int) -> Task:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        blocks = [Block(width, 4) for _ in range(4)]
        model = nn.Sequential(nn.Embedding(100, width), *blocks, nn.Linear(width, 10))
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 100, (count, samples, positions), generator=generator)
    labels = torch.randint(0, 10, (count, samples, positions), generator=generator)

    def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())

    return Task(model, loss_fn, list(zip(tokens, labels, strict=True)))


def minilm() -> Task:
    from tagging import batches, build_model, load_data, loss_fn

    data = load_data()
    model = build_model(0, len(data.tags)).eval()
    return Task(model, loss_fn, list(batches(data.dev[:48], 4)), "encoder.*")


def smollm2() -> Task:
    from smollm2 import TARGETS, load_smollm2

    model, _ = load_smollm2()
    decoder = model.get_submodule("model")
    decoder.layers = nn.ModuleList(list(decoder.get_submodule("layers").children())[:6])
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 40_000, (12, 2, 32), generator=generator)

    def loss_fn(model: nn.Module, batch: Tensor) -> Tensor:
        loss: Tensor = model(input_ids=batch, labels=batch).loss
        return loss

    return Task(model.eval(), loss_fn, list(tokens), TARGETS, "lm_head")


MODELS: dict[str, Callable[[], Task]] = {
    "stack": lambda: stack(192, 24, 16, 12),
    "small": lambda: stack(12, 4, 3, 2),
    "minilm": minilm,
    "smollm2": smollm2,
    "quick": lambda: stack(4, 2, 2, 2),
}


def one_pass(task: Task) -> Work:
    layers = linear_targets(task.model, task.targets)
    weights = [layer.get_parameter("weight") for layer in layers.values()]

    def work() -> None:
        for batch in task.batches:
            torch.autograd.grad(task.loss_fn(task.model, batch), weights)

    return work


def estimates(task: Task, curvature: ModuleType, *, exact: bool) -> dict[str, Work]:
    model, loss_fn, batches, targets, output = task

    def drawn() -> dict[str, Any]:
        return {"samples": 1, "generator": torch.Generator().manual_seed(0)}

    works: dict[str, Work] = {
        "empirical_fisher": lambda: curvature.empirical_fisher(model, loss_fn, batches, targets),
        "gauss_newton": lambda: curvature.gauss_newton(
            model, loss_fn, batches, targets, output=output, **drawn()
        ),
        "hutchinson": lambda: curvature.hutchinson_outputs(
            model, loss_fn, batches, targets, **drawn()
        ),
    }
    if exact:
        works["exact_hessian"] = lambda: curvature.exact_hessian_diagonal(
            model, loss_fn, batches, targets
        )
    return works


def contenders(task: Task, before: str | None, *, exact: bool) -> dict[str, Work]:
    works = {PASS: one_pass(task)}
    if before is not None:
        other = importlib.import_module(f"{before}.curvature")
        for name, work in estimates(task, other, exact=exact).items():
            works[f"{name}, before"] = work
    ours = importlib.import_module("minirank.curvature")
    return works | estimates(task, ours, exact=exact)


def peak_megabytes(work: Work) -> float:
    """The largest sum of the tensors that live together and that `work` made."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        work()
    changes = [
        event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"
    ]
    live = peak = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak / 2**20


def memory_table(works: dict[str, Work]) -> dict[str, float]:
    peaks = {name: peak_megabytes(work) for name, work in works.items()}
    print(f"\n{'peak of the memory':<35}{'MB':>9}   ratio to {PASS}")
    for name, peak in peaks.items():
        print(f"  {name:<33}{peak:>9.1f}   {peak / peaks[PASS]:.2f}")
    return peaks


def profiled(work: Work, rows: int) -> list[tuple[str, float, int]]:
    """(function, the share of the processor's time until it returns, its calls), the largest shares
    first; minirank's own functions and torch.autograd's.

    Shares overlap, since a function's share holds those of the functions that it calls.
    """
    profiler = cProfile.Profile(time.process_time)
    profiler.runcall(work)
    entries = profiler.getstats()
    total = max(entry.totaltime for entry in entries)
    shares = []
    for entry in entries:
        if isinstance(entry.code, str):  # a function written in C
            continue
        path = Path(entry.code.co_filename)
        if path.parent.name == "curvature" or path.parts[-2:] == ("autograd", "__init__.py"):
            name = f"{path.name}: {entry.code.co_name}"
            shares.append((name, entry.totaltime / total, entry.callcount))
    return sorted(shares, key=lambda share: -share[1])[:rows]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=list(MODELS)[:-1], default="stack")
    parser.add_argument("--before", help="a package: another version of minirank")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--rows", type=int, default=0, help="functions in each profile")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--out", help="write the figures to this JSON file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    name = "quick" if arguments.quick else arguments.model
    task = MODELS[name]()
    works = contenders(task, arguments.before, exact=name == "small")
    print(f"{name}: {len(linear_targets(task.model, task.targets))} layers")
    repeats = 1 if arguments.quick else arguments.repeats
    seconds = interleaved(works, repeats, clock=time.process_time)
    results: dict[str, Any] = {"options": vars(arguments), "torch": torch.__version__}
    results["passes"] = table("processor time", seconds, PASS)
    first_two = task._replace(batches=task.batches[:2])
    results["memory_mb"] = memory_table(contenders(first_two, arguments.before, exact=False))
    results["profile"] = {}
    for contender, work in works.items() if arguments.rows else ():
        results["profile"][contender] = rows = profiled(work, arguments.rows)
        print(f"\n{contender}: where its time goes")
        for function, share, calls in rows:
            print(f"  {function:<46}{100 * share:>6.1f} %{calls:>8} calls")
    if arguments.out:
        Path(arguments.out).write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
