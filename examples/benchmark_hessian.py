"""How the exact Hessian diagonal grows with width, depth, positions and batch, and where its time
goes.

    python examples/benchmark_hessian.py --out benchmark_hessian.json
    python examples/benchmark_hessian.py --quick

The model is a tanh MLP as in benchmark_curvature.py, 20-w-…-w-10, in float64 on a batch of 64; for
positions, a transformer block on 8 sequences. One size grows at a time. All sizes take turns.
Figures are medians of processor seconds of one thread, and the slope s is that of a straight line
through log seconds by log size: seconds ~ size^s.

By arithmetic alone: a layer takes d_out · positions products with the Hessian, each as large as two
backward passes through all layers. So the matrix products grow with width³, depth², batch¹ and, in
the linear layers of the block, positions².

The profile says which part of the seconds passes in which step of minirank/curvature/hessian.py.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from benchmark_curvature import Batch, OneBlock, data, loss_fn, mlp
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from minirank.curvature import exact_hessian_diagonal, hessian
from minirank.curvature.objective import Objective

Case = tuple[int, nn.Module, Batch]  # the size that grows, the model, the batch
STEPS = {  # function of hessian.py → what it does
    "loss": "forward passes",
    "output_gradients": "gradient, with its graph",
    "check_independent": "test that samples do not interact",
    "vector_jacobian_products": "products with the Hessian",
    "einsum": "from outputs to weights (einsum)",
}


def growing(unit: int, doublings: int) -> dict[str, list[Case]]:
    factors = [2**i for i in range(doublings)]
    return {
        "width": [(unit * f, mlp(unit * f), data(64)) for f in factors],
        "depth": [(2 * f, mlp(unit, 2 * f), data(64)) for f in factors],
        "batch": [(64 * f, mlp(unit), data(64 * f)) for f in factors],
        "positions": [(4 * f, OneBlock(unit // 2).double(), data(8, 4 * f)) for f in factors],
    }


def diagonal(model: nn.Module, batch: Batch) -> None:
    exact_hessian_diagonal(model, loss_fn, [batch])


def counted_flops(model: nn.Module, batch: Batch) -> int:
    with FlopCounterMode(display=False) as counter:
        diagonal(model, batch)
    return int(counter.get_total_flops())


def processor_seconds(cases: list[Case], repeats: int) -> list[list[float]]:
    """Of each case, over the repeats. The cases take turns, and the first round is not counted."""
    seconds: list[list[float]] = [[] for _ in cases]
    for repeat in range(repeats + 1):
        for of_case, (_, model, batch) in zip(seconds, cases, strict=True):
            start = time.process_time()
            diagonal(model, batch)
            if repeat:
                of_case.append(time.process_time() - start)
    return seconds


def slope(sizes: list[int], values: list[float]) -> float:
    """Of the least-squares line through (log size, log value).

    >>> round(slope([1, 2, 4], [3.0, 12.0, 48.0]), 6)
    2.0
    """
    x = [math.log(size) for size in sizes]
    y = [math.log(value) for value in values]
    fit: float = statistics.linear_regression(x, y).slope
    return fit


# ---- where the time goes -----------------------------------------------------------------------


@contextmanager
def stopwatch(seconds: dict[str, float], name: str, owner: Any, attribute: str) -> Iterator[None]:
    """Inside the block, calls of owner.attribute add their processor seconds to seconds[name]."""
    function: Callable[..., Any] = getattr(owner, attribute)

    def timed(*arguments: Any, **options: Any) -> Any:
        start = time.process_time()
        try:
            return function(*arguments, **options)
        finally:
            seconds[name] += time.process_time() - start

    with mock.patch.object(owner, attribute, timed):
        yield


def profile(model: nn.Module, batch: Batch) -> dict[str, float]:
    """{step: processor seconds} of one diagonal; "the rest" is what no step takes."""
    seconds = dict.fromkeys(STEPS.values(), 0.0)
    owners = {"loss": Objective, "einsum": torch}
    with ExitStack() as stack:
        for attribute, name in STEPS.items():
            owner = owners.get(attribute, hessian)
            stack.enter_context(stopwatch(seconds, name, owner, attribute))
        start = time.process_time()
        diagonal(model, batch)
    total = time.process_time() - start
    return {**seconds, "the rest": total - sum(seconds.values()), "all": total}


def print_growth(title: str, figures: dict[str, Any]) -> None:
    print(f"\ngrowth with {title}")
    for size, seconds, flops in zip(
        figures["sizes"], figures["median_seconds"], figures["flops"], strict=True
    ):
        print(f"  {size:>6}{1e3 * seconds:>11.1f} ms{flops / 1e9:>11.3f} GFLOP"
              f"{flops / seconds / 1e9:>9.2f} GFLOP/s")  # fmt: skip
    print(f"  slope of seconds {figures['slope']:.2f}, of FLOPs {figures['flop_slope']:.2f}")


def print_profile(width: int, steps: dict[str, float]) -> None:
    print(f"\nwidth {width}: where the processor time goes")
    for name, seconds in steps.items():
        print(f"  {name:<36}{1e3 * seconds:>9.1f} ms{seconds / steps['all']:>8.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    unit, doublings = (4, 2) if options.quick else (32, 4)
    print(f"float64, one thread, torch {torch.__version__}, medians of {options.repeats}")
    results: dict[str, Any] = {"repeats": options.repeats, "torch": torch.__version__}
    for title, cases in growing(unit, doublings).items():
        seconds = processor_seconds(cases, options.repeats)
        medians = [statistics.median(of_case) for of_case in seconds]
        sizes = [size for size, *_ in cases]
        flops = [counted_flops(model, batch) for _, model, batch in cases]
        results[title] = {
            "sizes": sizes,
            "seconds": seconds,
            "median_seconds": medians,
            "flops": flops,
            "slope": slope(sizes, medians),
            "flop_slope": slope(sizes, [float(count) for count in flops]),
        }
        print_growth(title, results[title])
    results["profile"] = {}
    for width in (unit, 4 * unit):
        model, batch = mlp(width), data(64)
        runs = [profile(model, batch) for _ in range(options.repeats + 1)][1:]
        steps = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
        results["profile"][width] = steps
        print_profile(width, steps)
    if options.out:
        options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
