"""Does allocating ranks help a small decoder? SmolLM2 reads German manual pages.

    python examples/smollm2_study.py --text manpages --out smollm2_study.json
    python examples/smollm2_study.py --quick      # a tiny random Llama, in seconds

Model, text and installation are those of smollm2.py, which looks at massive activations. Here the
protocol and the arms are those of all studies (study.py, arms.py): 210 linear layers, the budget of
uniform ranks of 2, at most 8 ranks a layer, 20 steps of two sequences of 128 tokens. Training and
losses are in bfloat16 by autocast, scores in float32.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import torch
from smollm2 import (
    TARGETS,
    Batch,
    Text,
    batches,
    evaluate,
    load,
    loss_fn,
    sequence_order,
)
from study import Task, run_study, study_parser
from torch import Tensor, nn


class Decoder(Task):
    """See this file's first lines.

    Args:
        model: the decoder. Every training gets a copy.
        text: what it reads.
    """

    name = "SmolLM2 reads German manual pages"
    targets = TARGETS
    rank = 2
    max_rank = 8
    rates = (4e-3, 8e-3)
    first_rate = 4e-3
    steps = 20
    seeds = (0, 1, 2)
    tuning_seeds = (0,)

    def __init__(self, model: nn.Module, text: Text) -> None:
        self.plain, self.text = model, text

    def model(self, seed: int) -> nn.Module:
        return copy.deepcopy(self.plain)

    def loss_fn(self, model: nn.Module, batch: Batch) -> Tensor:
        return loss_fn(model, batch)

    def training_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return loss_fn(model, batch)

    def batch_weight(self, batch: Batch) -> float:
        return len(batch["input_ids"])

    def calibration(self, seed: int) -> list[Batch]:
        return batches(self.text.dev, 4)

    def few_samples(self, seed: int) -> list[Batch]:
        return batches(self.text.dev[:8], 4)

    def training_batches(self, seed: int) -> Iterator[Batch]:
        for rows in sequence_order(len(self.text.train), 2, seed):
            yield {"input_ids": self.text.train[rows]}

    def evaluate(self, model: nn.Module, seed: int) -> dict[str, float]:
        return {"dev": evaluate(model, self.text.dev), "test": evaluate(model, self.text.test)}

    def kinds(self, seed: int) -> dict[str, list[str]]:
        names = self.names(self.plain)
        attention = [name for name in names if ".self_attn." in name]
        feed_forward = [name for name in names if ".mlp." in name]
        return {"attention": attention, "feed-forward": feed_forward}


ARMS = (
    "uniform",
    "uniform, largest",
    "singular values",
    "random",
    "feed-forward only",
    "fisher after warm-up",
    "eva",
    "plain, roomy",
)


def main() -> None:
    parser = study_parser(__doc__)
    parser.add_argument("--text", type=Path, help="a folder with *.1.gz manual pages below it")
    options = parser.parse_args()
    model, text = load(options.text, quick=options.quick)
    task = Decoder(model, text)
    if options.quick:
        task.steps = 2
    settings = {"sequences": [list(part.shape) for part in text]}
    run_study(task, options, settings, arms=ARMS)


if __name__ == "__main__":
    main()
