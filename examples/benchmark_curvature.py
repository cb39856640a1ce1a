"""What an exact Hessian diagonal costs, and how the cost grows.

    python examples/benchmark_curvature.py

The model is a tanh MLP 20-32-32-10 on a batch of 64, in float64. The contenders are minirank's two
exact diagonals, the dense Hessian of torch.func, its vmapped columns, and, where they are
installed, curvlinops (its Hessian operator times the identity) and BackPACK (DiagHessian). First
each is checked against the diagonal of the dense Hessian and timed. Then width, depth, batch and
sequence length grow, one at a time. All contenders take turns in one process; figures are medians
of the repeats.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timing import Work, interleaved, table
from torch import Tensor, nn

from minirank.curvature import exact_hessian_diagonal, hessian_diagonal_reference

Batch = tuple[Tensor, Tensor]


def mlp(width: int = 32, depth: int = 2) -> nn.Sequential:
    sizes = [20] + [width] * depth
    hidden = [
        m for d_in, d_out in itertools.pairwise(sizes) for m in (nn.Linear(d_in, d_out), nn.Tanh())
    ]
    return nn.Sequential(*hidden, nn.Linear(width, 10)).double()


class OneBlock(nn.Module):
    """A transformer block over a sequence; the mean over positions goes to 10 classes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(20, width)
        self.block = nn.TransformerEncoderLayer(
            width, 2, 2 * width, activation="gelu", batch_first=True
        )
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.block(self.up(x)).mean(1))
        return logits


def data(*shape: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, 20, dtype=torch.float64, generator=generator)
    return x, torch.randint(0, 10, shape[:1], generator=generator)


def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: p.detach()
        for name, p in model.named_parameters()
        if name.endswith("weight") and p.ndim == 2
    }


def functional_loss(model: nn.Module, batch: Batch) -> Any:
    """(a function from flat weights to the loss, the flat weights)."""
    start = weights(model)
    sizes = [w.numel() for w in start.values()]

    def loss(flat: Tensor) -> Tensor:
        parts = {
            n: p.view_as(w)
            for (n, w), p in zip(start.items(), torch.split(flat, sizes), strict=True)
        }
        logits = torch.func.functional_call(model, parts, (batch[0],))
        return F.cross_entropy(logits, batch[1])

    return loss, torch.cat([w.flatten() for w in start.values()])


def dense_hessian(model: nn.Module, batch: Batch) -> Tensor:
    loss, flat = functional_loss(model, batch)
    diagonal: Tensor = torch.func.hessian(loss)(flat).diagonal()
    return diagonal


def vmapped_columns(model: nn.Module, batch: Batch, chunk_size: int = 256) -> Tensor:
    """One Hessian-vector product per weight; one torch.vmap takes `chunk_size` of them together."""
    loss, flat = functional_loss(model, batch)
    gradient = torch.func.grad(loss)

    def entry(k: Tensor) -> Tensor:
        e = (torch.arange(len(flat)) == k).to(flat)
        product: Tensor = torch.func.jvp(gradient, (flat,), (e,))[1]
        return product @ e

    result: Tensor = torch.func.vmap(entry, chunk_size=chunk_size)(torch.arange(len(flat)))
    return result


def ours(model: nn.Module, batch: Batch) -> Tensor:
    return torch.cat(
        [h.flatten() for h in exact_hessian_diagonal(model, loss_fn, [batch]).values()]
    )


def reference(model: nn.Module, batch: Batch) -> Tensor:
    return torch.cat(
        [h.flatten() for h in hessian_diagonal_reference(model, loss_fn, [batch]).values()]
    )


def peers() -> dict[str, Any]:
    """Other libraries' exact diagonals, of those that are installed."""
    installed: dict[str, Any] = {}
    try:
        from curvlinops import HessianLinearOperator
    except ImportError:
        print("curvlinops is not installed: left out")
    else:

        def curvlinops_columns(model: nn.Module, batch: Batch) -> Tensor:
            parameters = [model.get_parameter(name) for name in weights(model)]
            H = HessianLinearOperator(
                model, nn.CrossEntropyLoss(), parameters, [batch], check_deterministic=False
            )
            dense: Tensor = H @ torch.eye(H.shape[1], dtype=torch.float64)
            return dense.diagonal()

        installed["curvlinops, H @ I"] = curvlinops_columns
    try:
        from backpack import backpack, extend
        from backpack.extensions import DiagHessian
    except ImportError:
        print("BackPACK is not installed: left out")
    else:

        def backpack_diagonal(model: nn.Module, batch: Batch) -> Tensor:
            extended, loss = extend(model), extend(nn.CrossEntropyLoss())
            with backpack(DiagHessian()):
                loss(extended(batch[0]), batch[1]).backward()
            parameters: list[Any] = [model.get_parameter(name) for name in weights(model)]
            diagonals = [parameter.diag_h.flatten() for parameter in parameters]
            model.zero_grad()
            return torch.cat(diagonals)

        installed["BackPACK, DiagHessian"] = backpack_diagonal
    return installed


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--small", action="store_true", help="a width of 4, to see that it runs")
    parser.add_argument("--out", help="write the figures to this JSON file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    unit = 4 if arguments.small else 32

    contenders: dict[str, Any] = {
        "minirank, outputs": ours,
        "minirank, reference": reference,
        "vmapped columns": vmapped_columns,
        "dense torch.func.hessian": dense_hessian,
        **peers(),
    }
    batch = data(2 * unit)
    results: dict[str, Any] = {"options": vars(arguments), "torch": torch.__version__, "error": {}}
    model = mlp(unit)
    expected = dense_hessian(model, batch)
    setting = f"float64, torch {torch.__version__}, {arguments.threads} thread(s)"
    print(f"{expected.numel()} weights, {setting}")
    for name, diagonal in contenders.items():
        error = float((diagonal(model, batch) - expected).abs().max() / expected.abs().max())
        results["error"][name] = error
        print(f"  {name:<26} largest error {error:.1e} of the largest entry")

    def on_a_new_model(diagonal: Callable[[nn.Module, Batch], Tensor]) -> Work:
        return lambda: diagonal(mlp(unit), batch)

    work = {name: on_a_new_model(diagonal) for name, diagonal in contenders.items()}
    results["mlp"] = table(
        "exact diagonal", interleaved(work, arguments.repeats), "minirank, outputs"
    )

    growth: dict[str, list[tuple[str, nn.Module, Batch]]] = {
        "width": [(f"width {w}", mlp(w), data(64)) for w in (unit, 2 * unit, 4 * unit)],
        "depth": [(f"depth {d}", mlp(unit, d), data(64)) for d in (2, 4, 8)],
        "batch": [(f"batch {n}", mlp(unit), data(n)) for n in (64, 256, 1024)],
        "positions": [
            (f"sequence {t}", OneBlock(unit // 2).double(), data(8, t)) for t in (4, 8, 16)
        ],
    }
    for title, sizes in growth.items():
        steps: dict[str, Work] = {name: partial(ours, model, batch) for name, model, batch in sizes}
        results[title] = table(
            f"growth with {title}", interleaved(steps, arguments.repeats), sizes[0][0]
        )
    if arguments.out:
        Path(arguments.out).write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
