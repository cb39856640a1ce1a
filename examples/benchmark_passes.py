"""What one estimate of the curvature costs, in training passes, and where its time goes.

    python examples/benchmark_passes.py
    python examples/benchmark_passes.py --model minilm

One pass is forward and backward with the gradients of all targets. An estimate is the empirical
Fisher, one random vector of the sampled Gauss-Newton diagonal, or one of Hutchinson's; each counts
its one-time checks. The default model is four transformer blocks of width 192 on 12 batches of 16
sequences of 24 positions. MiniLM reads 192 sentences.

All contenders take turns in one process, and the processor's time counts, so that other processes
disturb little. Figures are medians of the repeats, and ratios of these medians. With --memory, each
contender also runs once in a process of its own, whose peak is reported beside that of the pass.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import multiprocessing
import resource
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timing import Work, interleaved, table
from torch import Tensor, nn

from minirank.curvature import empirical_fisher, gauss_newton, hutchinson_outputs
from minirank.layers.targets import linear_targets

Task = tuple[nn.Module, Callable[[nn.Module, Any], Tensor], list[Any], str | None]

PASS = "one pass"


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


def stack(quick: bool) -> Task:
    width, positions, samples, count = (12, 4, 3, 2) if quick else (192, 24, 16, 12)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        blocks = [Block(width, 4) for _ in range(4)]
        model = nn.Sequential(nn.Embedding(100, width), *blocks, nn.Linear(width, 10))
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 100, (count, samples, positions), generator=generator)
    labels = torch.randint(0, 10, (count, samples, positions), generator=generator)

    def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())

    return model, loss_fn, list(zip(tokens, labels, strict=True)), None


def minilm(quick: bool) -> Task:
    from tagging import batches, build_model, load_data, loss_fn

    data = load_data()
    sentences = data.dev[: 12 if quick else 192]
    model = build_model(0, len(data.tags)).eval()
    return model, loss_fn, list(batches(sentences, 4 if quick else 16)), "encoder.*"


def contenders(task: Task) -> dict[str, Work]:
    model, loss_fn, batches, targets = task
    layers = linear_targets(model, targets)
    weights = [layer.get_parameter("weight") for layer in layers.values()]

    def one_pass() -> None:
        for batch in batches:
            torch.autograd.grad(loss_fn(model, batch), weights)

    def drawn() -> dict[str, Any]:
        return {"samples": 1, "generator": torch.Generator().manual_seed(0)}

    return {
        PASS: one_pass,
        "empirical_fisher": lambda: empirical_fisher(model, loss_fn, batches, targets),
        "gauss_newton, 1 vector": lambda: gauss_newton(model, loss_fn, batches, targets, **drawn()),
        "hutchinson, 1 vector": lambda: hutchinson_outputs(
            model, loss_fn, batches, targets, **drawn()
        ),
    }


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


def growth_megabytes(make: Callable[[], Task], name: str) -> float:
    """By how much one run of a contender raises the peak of this process."""
    torch.set_num_threads(1)
    work = contenders(make())[name]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    work()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def memory_table(make: Callable[[], Task]) -> dict[str, float]:
    """{contender: megabytes}, each from a process of its own, since a peak does not come down."""
    context = multiprocessing.get_context("spawn")
    growth = {}
    print("growth of the process's peak memory")
    for name in contenders(make()):
        with context.Pool(1) as pool:
            growth[name] = pool.apply(growth_megabytes, (make, name))
        print(f"  {name:<26}{growth[name]:>8.1f} MB", flush=True)
    return growth


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=["stack", "minilm"], default="stack")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--rows", type=int, default=16, help="functions in each profile")
    parser.add_argument("--memory", action="store_true", help="measure peaks as well")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    parser.add_argument("--out", help="write the figures to this JSON file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    make = partial({"stack": stack, "minilm": minilm}[arguments.model], arguments.quick)
    results: dict[str, Any] = {"options": vars(arguments), "torch": torch.__version__}
    if arguments.memory:
        # Memory comes first, because a child process starts from its parent's peak.
        results["memory_mb"] = memory_table(make)
    works = contenders(make())
    repeats = 1 if arguments.quick else arguments.repeats
    seconds = interleaved(works, repeats, clock=time.process_time)
    results["passes"] = table("processor time", seconds, PASS)
    results["profile"] = {}
    for name, work in works.items():
        results["profile"][name] = rows = profiled(work, arguments.rows)
        print(f"\n{name}: where its time goes")
        for function, share, calls in rows:
            print(f"  {function:<46}{100 * share:>6.1f} %{calls:>8} calls")
    if arguments.out:
        Path(arguments.out).write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
