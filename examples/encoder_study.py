"""Does allocating ranks help torch's own encoder? A small vision transformer meets mirrored digits.

    python examples/encoder_study.py --out encoder_study.json
    python examples/encoder_study.py --quick      # a few steps, in seconds

The model is an nn.TransformerEncoder with three layers of width 32 over 16 patches of 2 × 2 pixels.
It is trained on upright digits (8 × 8, from scikit-learn), and adapted to mirrored ones with its
embedding and head frozen. `unpack_attention` gives it 18 linear layers to adapt: q, k, v, out,
linear1 and linear2 in each encoder layer. Without it there are linear1 and linear2 alone, so that
the arm "feed-forward only" is what the plain model could get at the same number of parameters.

The protocol and the arms are those of all studies (study.py, arms.py). A seed is another split of
the data, another pretrained model, another start of the adapters and another order of the batches.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from study import Task, run_study, study_parser
from torch import Tensor, nn

from minirank import unpack_attention

WIDTH, LAYERS, PATCH = 32, 3, 2
PATCHES = (8 // PATCH) ** 2
TRAINED_ON, DEVELOPED_ON = 1000, 1300  # ends of the training and the development split
BATCH = 64
Batch = tuple[Tensor, Tensor]  # images (n, 8, 8) and labels (n,)


class VisionTransformer(nn.Module):
    """Patches → nn.TransformerEncoder → the mean over patches → ten classes."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Linear(PATCH * PATCH, WIDTH)
        self.positions = nn.Parameter(0.1 * torch.randn(1, PATCHES, WIDTH))
        layer = nn.TransformerEncoderLayer(
            WIDTH, 4, 2 * WIDTH, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, images: Tensor) -> Tensor:
        patches = images.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH).flatten(3).flatten(1, 2)
        x = self.encoder(self.embedding(patches) + self.positions)
        logits: Tensor = self.head(self.norm(x).mean(1))
        return logits


class Reader(NamedTuple):
    """One seed's data, shuffled, and a model that reads them as they are."""

    upright: Tensor  # (n, 8, 8)
    labels: Tensor  # (n,)
    state: dict[str, Tensor]


class MirroredDigits(Task):
    """See this file's first lines.

    Args:
        reader_steps: of the training on upright digits.
    """

    name = "a vision transformer that reads digits meets them mirrored"
    targets = "encoder.*"
    rank = 2
    max_rank = 8
    rates: tuple[float, ...] = (1e-2, 2e-2, 4e-2)
    first_rate = 2e-2
    steps = 300
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6, 7)
    tuning_seeds: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6, 7)

    def __init__(self, reader_steps: int = 1000) -> None:
        from sklearn.datasets import load_digits  # type: ignore[import-untyped]

        images, labels = load_digits(return_X_y=True)
        self.images = torch.tensor(images, dtype=torch.float32).view(-1, 8, 8) / 16 - 0.3
        self.labels = torch.tensor(labels)
        self.reader_steps = reader_steps
        self._readers: dict[int, Reader] = {}

    def reader(self, seed: int) -> Reader:
        if seed not in self._readers:
            order = torch.randperm(len(self.labels), generator=torch.Generator().manual_seed(seed))
            upright, labels = self.images[order], self.labels[order]
            self._readers[seed] = Reader(upright, labels, self._trained(seed, upright, labels))
        return self._readers[seed]

    def _trained(self, seed: int, upright: Tensor, labels: Tensor) -> dict[str, Tensor]:
        model = new_model(seed)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for rows in itertools.islice(shuffled_rows(seed), self.reader_steps):
            loss = self.loss_fn(model, (upright[rows], labels[rows]))
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        return model.state_dict()

    def model(self, seed: int) -> nn.Module:
        model = new_model(seed)
        model.load_state_dict(self.reader(seed).state)
        unpack_attention(model)
        return model

    def loss_fn(self, model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    def training_batches(self, seed: int) -> Iterator[Batch]:
        x, y = self.mirrored(seed)
        for rows in shuffled_rows(1_000_000 + seed):
            yield x[rows], y[rows]

    def mirrored(self, seed: int, start: int = 0, stop: int | None = None) -> Batch:
        reader = self.reader(seed)
        return reader.upright[start:stop].flip(2), reader.labels[start:stop]

    def calibration(self, seed: int) -> list[Batch]:
        x, y = self.mirrored(seed, TRAINED_ON, DEVELOPED_ON)
        return list(zip(torch.split(x, BATCH), torch.split(y, BATCH), strict=True))

    @torch.no_grad()
    def evaluate(self, model: nn.Module, seed: int) -> dict[str, float]:
        model.eval()
        figures = {}
        splits = {"dev": (TRAINED_ON, DEVELOPED_ON), "test": (DEVELOPED_ON, None)}
        for name, (start, stop) in splits.items():
            x, y = self.mirrored(seed, start, stop)
            logits = model(x)
            figures[name] = float(F.cross_entropy(logits, y))
            figures[f"{name}_accuracy"] = float((logits.argmax(1) == y).float().mean())
        return figures

    def kinds(self, seed: int) -> dict[str, list[str]]:
        names = self.names(self.model(seed))
        attention = [name for name in names if ".self_attn." in name]
        feed_forward = [name for name in names if name not in attention]
        return {"attention": attention, "feed-forward": feed_forward}


def new_model(seed: int) -> VisionTransformer:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return VisionTransformer()


def shuffled_rows(seed: int) -> Iterator[Tensor]:
    """Rows of the training split for one batch after the other, without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randint(TRAINED_ON, (BATCH,), generator=generator)


ARMS = (
    "uniform",
    "uniform, largest",
    "random",
    "attention only",
    "feed-forward only",
    "proxy",
    "fisher",
    "fisher after warm-up",
    "l1ra, published",
    "l1ra, from the budget",
    "l1ra, from room",
    "shaplora",
    "plain, roomy",
    "singular values",
    "singular values of outputs",
)


def main() -> None:
    parser = study_parser(__doc__)
    options = parser.parse_args()
    task = MirroredDigits(reader_steps=20 if options.quick else 1000)
    if options.quick:
        task.steps = 4
    run_study(task, options, {"width": WIDTH, "layers": LAYERS, "patch": PATCH}, arms=ARMS)


if __name__ == "__main__":
    main()
