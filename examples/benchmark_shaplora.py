"""What ShapLoRA's scoring costs on MiniLM, beside as many forward and backward passes without it.

    python examples/benchmark_shaplora.py --out examples/results/benchmark_shaplora.json

All contenders run on one model with rank 4 in each of its 36 linear layers, over the same data:

- the passes as in training, with gradients for the adapters and the head;
- the passes with gradients for the adapters alone;
- the latter with batches three times as long and a third as many passes: scoring three
  coalitions in one pass, with gates for each sample, would cost at least as much;
- `ShapLoRA.score()`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from tagging import Batch, batches, build_model, load_data, loss_fn, words
from timing import interleaved, table
from torch import nn

from minirank import ShapLoRA, UniformRanks, lora_layers, wrap


def passes(
    model: nn.Module, data: Sequence[Batch], times: int, trained: Sequence[nn.Parameter]
) -> None:
    """`times` forward and backward passes over the data, with gradients for `trained` alone."""
    before = [(p, p.requires_grad) for p in model.parameters()]
    for parameter, _ in before:
        parameter.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
    for _ in range(times):
        for batch in data:
            loss_fn(model, batch).backward()  # type: ignore[no-untyped-call]
        for parameter in trained:
            parameter.grad = None
    for parameter, requires_grad in before:
        parameter.requires_grad_(requires_grad)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--sentences", type=int, default=24, help="to score, in batches of 8 (default 24)"
    )
    parser.add_argument("--coalitions", type=int, default=18)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", help="write the figures to this JSON file")
    options = parser.parse_args()

    data = load_data()
    model = build_model(0, len(data.tags)).eval()
    uniform = UniformRanks(model, ["encoder.*"])
    uniform.score()
    layers = wrap(model, uniform.allocate(36 * 4), scaling=2.0, gate=0.0, trainable=["head"])
    for layer in layers.values():  # as if trained
        nn.init.constant_(layer.get_parameter("gate"), 0.1)
    sentences = data.dev[:: len(data.dev) // options.sentences][: options.sentences]
    validation = list(batches(sentences, 8))
    longer = [{key: value.repeat(3, 1) for key, value in batch.items()} for batch in validation]
    adapters = [p for layer in lora_layers(model).values() for p in layer.parameters(recurse=False)]
    head = [p for name, p in model.named_parameters() if name.startswith("head")]
    allocator = ShapLoRA(
        model,
        loss_fn,
        validation,
        coalitions=options.coalitions,
        batch_weight=words,
        progress=False,
    )
    count = options.coalitions
    contenders = {
        "passes as in training": lambda: passes(model, validation, count, adapters + head),
        "adapters alone": lambda: passes(model, validation, count, adapters),
        "... three in one pass": lambda: passes(model, longer, count // 3, adapters),
        "ShapLoRA.score()": allocator.score,
    }
    print(
        f"MiniLM, {options.sentences} sentences, {count} passes, torch {torch.__version__}, "
        f"{torch.get_num_threads()} thread(s)"
    )
    figures = table("scoring", interleaved(contenders, options.repeats), "passes as in training")
    if options.out:
        content = {
            "options": vars(options),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
        }
        Path(options.out).write_text(json.dumps({**content, "scoring": figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
