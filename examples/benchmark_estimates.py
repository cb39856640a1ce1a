"""How fast do estimates of the Hessian diagonal converge, and what memory does a chunk take?

    python examples/benchmark_estimates.py

Errors: a tanh MLP 20-32-32-10 on a batch of 64, in float64. The contenders are Hutchinson's
estimate on weights and on layer outputs, that of curvlinops (if installed), and the sampled
Gauss-Newton diagonal, which converges to another matrix than the Hessian. Errors are relative to
the exact diagonal: to its largest entry, to its norm, and to each layer's trace (root mean square
over layers and seeds).

Memory: the growth of the process's peak while the exact diagonal is computed, for several chunk
sizes.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from benchmark_curvature import OneBlock, data, loss_fn, mlp, weights
from torch import Tensor, nn

from minirank.curvature import (
    exact_hessian_diagonal,
    gauss_newton,
    hutchinson_outputs,
    hutchinson_weights,
)

Diagonal = dict[str, Tensor]
Estimator = Callable[[nn.Module, Any, int, int], Diagonal]  # (model, batch, products, seed)


def ours(estimate: Callable[..., Diagonal]) -> Estimator:
    def run(model: nn.Module, batch: Any, products: int, seed: int) -> Diagonal:
        generator = torch.Generator().manual_seed(seed)
        return estimate(
            model, loss_fn, [batch], generator=generator, samples=products, chunk_size=100
        )

    return run


def estimators() -> dict[str, Estimator]:
    installed = {
        "Hutchinson, weights": ours(hutchinson_weights),
        "Hutchinson, outputs": ours(hutchinson_outputs),
        "Gauss-Newton, sampled": ours(gauss_newton),
    }
    try:
        from curvlinops import HessianLinearOperator, hutchinson_diag
    except ImportError:
        print("curvlinops is not installed: left out")
        return installed

    def curvlinops(model: nn.Module, batch: Any, products: int, seed: int) -> Diagonal:
        torch.manual_seed(seed)
        names = list(weights(model))
        parameters = [model.get_parameter(name) for name in names]
        H = HessianLinearOperator(
            model, nn.CrossEntropyLoss(), parameters, [batch], check_deterministic=False
        )
        parts = hutchinson_diag(H, products).split([p.numel() for p in parameters])
        named = zip(names, parameters, parts, strict=True)
        return {n.removesuffix(".weight"): h.detach().view_as(p) for n, p, h in named}

    return {**installed, "curvlinops": curvlinops}


def errors(estimate: Diagonal, exact: Diagonal) -> dict[str, float]:
    h, true = (torch.cat([d[name].flatten() for name in exact]) for d in (estimate, exact))
    traces = [float(estimate[name].sum() / exact[name].sum() - 1) for name in exact]
    return {
        "largest": float((h - true).abs().max() / true.abs().max()),
        "norm": float((h - true).norm() / true.norm()),
        "trace": math.sqrt(statistics.fmean(t**2 for t in traces)),
    }


def error_table(counts: list[int], seeds: int, unit: int) -> dict[str, Any]:
    model, batch = mlp(unit), data(2 * unit)
    exact = exact_hessian_diagonal(model, loss_fn, [batch])
    print(f"\n{sum(h.numel() for h in exact.values())} weights, {seeds} seeds")
    print(f"{'':<24}{'products':>9}{'largest entry':>15}{'norm':>8}{'traces':>8}{'ms':>9}")
    table: dict[str, Any] = {}
    for name, estimate in estimators().items():
        for products in counts:
            start = time.perf_counter()
            runs = [errors(estimate(model, batch, products, seed), exact) for seed in range(seeds)]
            seconds = (time.perf_counter() - start) / seeds
            mean = {key: statistics.fmean(run[key] for run in runs) for key in ("largest", "norm")}
            mean["trace"] = math.sqrt(statistics.fmean(run["trace"] ** 2 for run in runs))
            table.setdefault(name, {})[products] = {**mean, "seconds": seconds}
            print(
                f"{name:<24}{products:>9}{mean['largest']:>15.3f}{mean['norm']:>8.3f}"
                f"{mean['trace']:>8.3f}{1e3 * seconds:>9.1f}"
            )
    return table


def growth_megabytes(chunk_size: int, width: int, positions: int, samples: int) -> float:
    """By how much the exact diagonal of a transformer block raises the peak of this process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = OneBlock(width).double()
    batch = data(samples, positions)
    loss_fn(model, batch).backward()  # type: ignore[no-untyped-call]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    exact_hessian_diagonal(model, loss_fn, [batch], chunk_size=chunk_size)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def memory_table(
    chunk_sizes: list[int], width: int, positions: int, samples: int
) -> dict[int, float]:
    """{chunk size: megabytes}, each from a process of its own, since a peak does not come down."""
    context = multiprocessing.get_context("spawn")
    growth = {}
    print(
        f"exact diagonal of a transformer block, width {width}, {positions} positions, "
        f"{samples} samples, float64:"
    )
    print("growth of the process's peak memory after one backward pass")
    for chunk_size in chunk_sizes:
        with context.Pool(1) as pool:
            growth[chunk_size] = pool.apply(
                growth_megabytes, (chunk_size, width, positions, samples)
            )
        print(f"  chunk_size {chunk_size:>4}: {growth[chunk_size]:>6.0f} MB", flush=True)
    return growth


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--small", action="store_true", help="a width of 4, to see that it runs")
    parser.add_argument("--out", help="write the figures to this JSON file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    sizes = ([1, 4], 8, 4, 4) if arguments.small else ([1, 16, 64, 256], 64, 16, 32)
    results: dict[str, Any] = {"options": vars(arguments), "torch": torch.__version__}
    # Memory comes first, because a child process starts from its parent's peak.
    results["memory_mb"] = memory_table(*sizes)
    counts, unit = ([1, 10], 4) if arguments.small else ([10, 100, 1000], 32)
    results["errors"] = error_table(counts, arguments.seeds, unit)
    if arguments.out:
        Path(arguments.out).write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
