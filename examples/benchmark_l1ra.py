"""What L1RA adds to a training step, on MiniLM with LoRA of rank 2 in its 36 linear layers.

    python examples/benchmark_l1ra.py --out examples/results/l1ra_benchmark.json

Four trainings take turns, step by step, on the same batch: plain LoRA; LoRA with gates that train;
the same with `l1ra.step()` after the optimizer's step; and the same with an update in each step
that moves up to 12 of the 72 ranks. The time inside `l1ra.step()` is printed too.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from tagging import Batch, batches, build_model, load_data, loss_fn, make_optimizer
from timing import interleaved, table
from torch import nn

from minirank import L1RA, UniformRanks, wrap


class Training(NamedTuple):
    step: Callable[[], None]
    l1ra: L1RA | None
    seconds: list[float]  # inside l1ra.step(), for each step


def training(batch: Batch, tags: int, gate: float | None, interval: int | None) -> Training:
    """A training that can go step by step; with L1RA if an `interval` is given."""
    model = build_model(0, tags).train()
    uniform = UniformRanks(model, ["encoder.*"])
    uniform.score()
    wrap(model, uniform.allocate(72), alpha=32, reference_rank=16, gate=gate, trainable=["head"])
    optimizer = make_optimizer(model)
    l1ra = L1RA(model, optimizer, interval=interval) if interval else None
    seconds: list[float] = []

    def step() -> None:
        loss = loss_fn(model, batch)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(
            [p for group in optimizer.param_groups for p in group["params"]], 1.0
        )
        optimizer.step()
        if l1ra is not None:
            start = time.perf_counter()
            l1ra.step()
            seconds.append(time.perf_counter() - start)

    return Training(step, l1ra, seconds)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--sentences", type=int, default=24, help="per batch")
    parser.add_argument("--out", help="write the figures to this JSON file")
    options = parser.parse_args()
    data = load_data()
    batch = next(batches(data.train, options.sentences, generator=torch.Generator().manual_seed(0)))
    never = 10**9
    plain = training(batch, len(data.tags), None, None)
    gated = training(batch, len(data.tags), 1.0, None)
    between = training(batch, len(data.tags), 1.0, never)
    updating = training(batch, len(data.tags), 1.0, 1)
    l1ra = updating.l1ra
    assert l1ra is not None

    def nothing() -> None:
        pass

    @torch.no_grad()
    def drop_gates() -> None:
        """Of every third module with two ranks, make the next update prune the last one."""
        for gate in [gate for gate in l1ra.gates.values() if len(gate) > 1][::3][:12]:
            gate[-1] = -1.0

    contenders = {
        "plain LoRA": plain.step,
        "+ gates": gated.step,
        "+ l1ra.step()": between.step,
        "+ an update": updating.step,
    }
    after = dict.fromkeys(contenders, nothing) | {"+ an update": drop_gates}
    figures = table(
        "one training step", interleaved(contenders, options.repeats, after), "plain LoRA"
    )
    inside = {"between updates": between.seconds[1:], "with an update": updating.seconds[1:]}
    alone = table("inside l1ra.step()", inside, "between updates")
    moved = [sum(update.pruned.values()) for update in l1ra.history.updates[1:]]
    print(f"an update moved {min(moved)} to {max(moved)} ranks")
    if options.out:
        content = {
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "repeats": options.repeats,
            "step": figures,
            "inside": alone,
            "ranks_moved": [min(moved), max(moved)],
        }
        Path(options.out).write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
