"""What several processes cost: measured here on a small model, computed from shapes for large ones.

    python examples/benchmark_scale.py | tee examples/results/scale.txt

1. Measured: the bytes that each process hands to collectives, and seconds, at 1, 2 and 3 processes
   of one thread (gloo, on this machine). With fewer cores than processes the seconds say little.
2. Computed: the same bytes for models of 1, 7 and 70 billion parameters, from the shapes of models
   on the meta device, by the formulas that the table prints. The first part checks the formulas.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from minirank import L1RA, SensitivityLoRA, ShapLoRA, UniformRanks, linear_targets, wrap
from minirank.curvature import empirical_fisher, input_second_moment
from minirank.distributed import check_same, pooled, refresh, sync_gradients
from minirank.layers.linear import linear_shape

WIDTH, DEPTH, RANK, REPEATS = 256, 6, 8, 7
COALITIONS = 18  # of the measurement; 90 is the default, which part 2 takes
# hidden size, MLP size, layers, heads, key-value heads
LLAMAS = {
    "1B": (2048, 8192, 16, 32, 8),
    "7B": (4096, 11008, 32, 32, 32),
    "70B": (8192, 28672, 80, 64, 8),
}


Shapes = Sequence[tuple[int, int]]  # (d_out, d_in) of all targets
Measured = dict[str, tuple[float, int]]  # {what: (seconds, bytes in all_reduce)}


def payload(name: str, shapes: Shapes, rank: int, coalitions: int = 90) -> int:
    """Bytes that each process hands to collectives."""
    return {
        "pooled proxy": sum(4 * d_in for _, d_in in shapes),
        "pooled matrix diagonal": sum(4 * d_out * d_in for d_out, d_in in shapes),
        "ShapLoRA, all rows": 8 * coalitions * rank * len(shapes),
        "sync_gradients": sum(4 * rank * (d_out + d_in) for d_out, d_in in shapes),
    }[name]


FORMULAS = {
    "pooled proxy": "Σ 4 d_in",
    "pooled matrix diagonal": "Σ 4 d_out d_in",
    "ShapLoRA, all rows": "8 · coalitions · Σ r",
    "sync_gradients": "Σ 4 r (d_out + d_in)",
}


# ---- measured -----------------------------------------------------------------------------------


class Counted:
    """Counts the bytes of tensors that go into all_reduce while it is open."""

    def __enter__(self) -> Counted:
        self.bytes, self.original = 0, dist.all_reduce

        def counting(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.bytes += tensor.numel() * tensor.element_size()
            return self.original(tensor, *args, **kwargs)

        dist.all_reduce = counting
        return self

    def __exit__(self, *_: object) -> None:
        dist.all_reduce = self.original


def small_model() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(DEPTH)]
    return nn.Sequential(*layers)


def loss_fn(model: nn.Module, x: Tensor) -> Tensor:
    output: Tensor = model(x)
    return output.square().mean()


def measure(rank: int, count: int, port: int, path: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=count)
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randn(32, WIDTH, generator=generator) for _ in range(12)]
    results: Measured = {}

    def timed(name: str, work: Callable[[], object], repeats: int = REPEATS) -> None:
        seconds = []
        for _ in range(repeats):
            dist.barrier()
            with Counted() as counted:
                start = time.perf_counter()
                work()
                seconds.append(time.perf_counter() - start)
        results[name] = statistics.median(seconds), counted.bytes

    plain, own = small_model(), batches[rank::count]
    for name, curvature in (
        ("pooled proxy", input_second_moment),
        ("pooled matrix diagonal", empirical_fisher),
    ):
        allocator = SensitivityLoRA(
            plain, loss_fn, own, curvature=pooled(curvature), progress=False
        )
        timed(name, allocator.score)

    trial = small_model()
    layers = wrap(trial, dict.fromkeys(linear_targets(trial), RANK), gate=0.0)
    for layer in layers.values():
        nn.init.ones_(layer.get_parameter("gate"))
    shaplora = ShapLoRA(
        trial, loss_fn, batches[:4], coalitions=COALITIONS, group=dist.group.WORLD, progress=False
    )
    timed("ShapLoRA, all rows", shaplora.score)

    model = small_model()
    wrap(model, dict.fromkeys(linear_targets(model), RANK), gate=1.0)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    l1ra = L1RA(model, optimizer, l1=0.3, interval=1)
    ddp = nn.parallel.DistributedDataParallel(model)

    def backward(run: nn.Module) -> None:
        optimizer.zero_grad()
        loss_fn(run, own[0]).backward()  # type: ignore[no-untyped-call]

    timed("backward alone", lambda: backward(model))
    timed("backward in DDP", lambda: backward(ddp))
    backward(model)
    timed("sync_gradients", lambda: sync_gradients(model))
    timed("check_same", lambda: check_same(model))
    optimizer.step()
    timed("update of L1RA", l1ra.step, repeats=1)
    timed("refresh", lambda: refresh(ddp))
    timed("DDP made anew", lambda: nn.parallel.DistributedDataParallel(model))

    # Fixed capacity: every layer keeps twice its ranks, the dead ones with gate = 0 and B = 0. Then
    # no update replaces a parameter, but dead ranks are computed and sent too.
    wide = small_model()
    wrap(wide, dict.fromkeys(linear_targets(wide), 2 * RANK), gate=1.0)
    timed("backward, capacity 2 r", lambda: backward(wide))
    timed("sync, capacity 2 r", lambda: sync_gradients(wide))
    if rank == 0:
        torch.save(results, path)
    dist.destroy_process_group()
    # DDP keeps the group and its threads alive. A thread that frees a tensor while the interpreter
    # is torn down aborts the process, so this process ends without that teardown.
    os._exit(0)


def measured(counts: Sequence[int]) -> dict[int, Measured]:
    """By number of processes."""
    by_count = {}
    with tempfile.TemporaryDirectory() as folder:
        for count in counts:
            path = f"{folder}/{count}.pt"
            mp.spawn(  # type: ignore[attr-defined, no-untyped-call]
                measure, (count, 29500 + os.getpid() % 1000 + count, path), count
            )
            by_count[count] = torch.load(path)
    return by_count


def print_measured(by_count: dict[int, Measured]) -> None:
    print(f"Measured: {DEPTH} layers of {WIDTH} × {WIDTH}, rank {RANK}; medians of {REPEATS}")
    counts = list(by_count)
    columns = "".join(f"{f'{count} processes':>14}" for count in counts)
    print(f"{'':<24}{columns}{'bytes':>12}{'formula':>12}")
    shapes = [(WIDTH, WIDTH)] * DEPTH
    for name in by_count[counts[0]]:
        seconds = "".join(f"{1000 * by_count[count][name][0]:>11.1f} ms" for count in counts)
        counted = by_count[counts[-1]][name][1]
        formula = payload(name, shapes, RANK) if name in FORMULAS else None
        if name == "ShapLoRA, all rows":
            counted, formula = 0, None  # it gathers rows instead
        print(f"{name:<24}{seconds}{counted or '':>12}{formula or '':>12}")


# ---- computed -----------------------------------------------------------------------------------


def llama_shapes(hidden: int, mlp: int, layers: int, heads: int, kv_heads: int) -> Shapes:
    """(d_out, d_in) of a Llama's linear layers, from the model itself on the meta device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=32000,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    targets = linear_targets(model, "model.layers.*")
    allocator = UniformRanks(model, list(targets))
    allocator.score()
    ranks = allocator.allocate(16 * len(targets))
    shapes = [shape for module in targets.values() if (shape := linear_shape(module))]
    assert ranks.parameters == payload("sync_gradients", shapes, 16) // 4
    return shapes


def print_computed(sizes: Sequence[str]) -> None:
    shapes = {size: llama_shapes(*LLAMAS[size]) for size in sizes}
    parameters = {size: sum(a * b for a, b in shapes[size]) for size in sizes}
    counts = ", ".join(f"{size}: {count / 1e9:.2f} billion" for size, count in parameters.items())
    print(f"\nThe linear layers of the blocks hold {counts} weights")
    print("Computed: bytes of one process, float32, rank 16 for each layer, 90 coalitions")
    print(f"{'':<24}" + "".join(f"{size:>12}" for size in sizes) + "   formula")
    for name, formula in FORMULAS.items():
        cells = "".join(f"{readable(payload(name, shapes[size], 16)):>12}" for size in sizes)
        print(f"{name:<24}{cells}   {formula}")
    for count in (8, 64):
        factor = 2 * (count - 1) / count
        speed_up = 45 / -(-45 // count)
        print(
            f"{count} GPUs: a ring sends {factor:.2f} times these bytes per all-reduce; ShapLoRA's "
            f"45 pairs take 1/{speed_up:.1f} of the time of one"
        )


def readable(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--processes", type=int, nargs="+", default=[1, 2, 3])
    options.add_argument("--sizes", nargs="+", default=list(LLAMAS), choices=list(LLAMAS))
    chosen = options.parse_args()
    print_measured(measured(chosen.processes))
    print_computed(chosen.sizes)
