"""Does L1RA put ranks where they are needed? Here the right answer is known.

    python examples/l1ra_planted.py                     # 10 seeds, both ways to shrink

    # Without weight decay, B grows as its gate shrinks, and the planted ranks are found less often:
    python examples/l1ra_planted.py --weight-decay 0

Three linear layers W_l (16 × 16) learn to compute (W_l + Δ_l) x. The planted changes Δ_l have rank
1, 6 and 2, and all their singular values are 1. Each layer starts with 3 ranks, and the budget
stays at 9. L1RA is not told which layer needs how many.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor, nn

from minirank import L1RA, wrap
from minirank.allocators.gates import Shrinkage

WIDTH = 16
PLANTED = (1, 6, 2)


def planted_problem(
    seed: int, ranks: tuple[int, ...] = PLANTED
) -> tuple[nn.ModuleList, list[Tensor], torch.Generator]:
    """(layers, what their weights should become, the generator that drew both).

    The generator goes on to draw the inputs.
    """
    generator = torch.Generator().manual_seed(seed)
    layers, targets = nn.ModuleList(), []
    for rank in ranks:
        layer = nn.Linear(WIDTH, WIDTH, bias=False, device="meta").to_empty(device="cpu")
        with torch.no_grad():
            layer.weight.normal_(0, WIDTH**-0.5, generator=generator)
        U, V = (torch.linalg.qr(torch.randn(WIDTH, rank, generator=generator)).Q for _ in range(2))
        layers.append(layer)
        targets.append(layer.weight.detach() + U @ V.T)
    return layers, targets, generator


def train(
    seed: int,
    *,
    shrinkage: Shrinkage = "proximal",
    l1: float = 0.3,
    weight_decay: float = 1.0,
    steps: int = 2000,
    reset_optimizer: bool = False,
) -> tuple[L1RA, float]:
    """Train on the planted problem of this seed.

    Returns: (the L1RA object, the squared error that is left; it is 9 at the start).
    """
    layers, targets, generator = planted_problem(seed)
    start = sum(PLANTED) // len(PLANTED)
    wrap(layers, {str(i): start for i in range(len(PLANTED))}, gate=1.0, generator=seed)
    trained = [parameter for parameter in layers.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=weight_decay)
    l1ra = L1RA(
        layers,
        optimizer,
        l1=l1,
        interval=steps // 20,
        shrinkage=shrinkage,
        reset_optimizer=reset_optimizer,
    )
    for _ in range(steps):
        x = torch.randn(32, WIDTH, generator=generator)
        errors = [
            (layer(x) - x @ target.T).square().sum(1).mean()
            for layer, target in zip(layers, targets, strict=True)
        ]
        loss = torch.stack(errors).sum()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        l1ra.step()
    return l1ra, loss.item()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--l1", type=float, default=0.3)
    parser.add_argument(
        "--weight-decay", type=float, default=1.0, help="of A and B; the gates have none"
    )
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument(
        "--reset-optimizer",
        action="store_true",
        help="forget the optimizer's state at every update, as the authors' code does",
    )
    parser.add_argument("--out", help="write every training's ranks to this JSON file")
    parser.add_argument(
        "--plot", help="write the ranks over time of the first training to this image file"
    )
    options = parser.parse_args()
    results: dict[str, list[tuple[int, ...]]] = {}
    for shrinkage in get_args(Shrinkage):
        results[shrinkage] = []
        for seed in range(options.seeds):
            l1ra, error = train(
                seed,
                shrinkage=shrinkage,
                l1=options.l1,
                weight_decay=options.weight_decay,
                steps=options.steps,
                reset_optimizer=options.reset_optimizer,
            )
            if options.plot and seed == 0 and shrinkage == "proximal":
                l1ra.history.plot(options.plot)
            ranks = tuple(l1ra.ranks.values())
            results[shrinkage].append(ranks)
            print(f"{shrinkage}, seed {seed}: ranks {ranks}, squared error {error:.4f}", flush=True)
        count = results[shrinkage].count(PLANTED)
        print(f"{shrinkage}: {PLANTED} found in {count} of {options.seeds}\n")
    if options.out:
        content = {
            "torch": torch.__version__,
            "options": vars(options),
            "planted": PLANTED,
            "ranks": results,
        }
        Path(options.out).write_text(json.dumps(content) + "\n")


if __name__ == "__main__":
    main()
