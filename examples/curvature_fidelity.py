"""Which curvature estimate can be trusted? Each against the exact Hessian diagonal, where that can be afforded.

    python examples/curvature_fidelity.py --quick                        # under a minute
    python examples/curvature_fidelity.py --out f.json --plot f.png      # the figures of the README

Two models on part-of-speech tags (see tagging.py), one thread:

small: a transformer of 4 blocks and width 24, trained here from scratch, once per seed, in float64; exact for all its
    25 linear layers on 32 sentences of 12 words.
MiniLM, exact: the pretrained encoder under a head that was trained alone first (at a random head the loss is far from
    a minimum); exact for the six linear layers of some of its blocks on a few sentences cut to some sub-words.
MiniLM, sampled: the same model, all 36 layers, 24 whole sentences. No exact diagonal is affordable there, so traces
    are held against Hutchinson's estimate on outputs with many samples, whose own standard errors are printed.

For every estimate: rank correlations of the traces over layers with the reference's, relative errors ‖estimate −
reference‖ / ‖reference‖ of the traces and of all entries, products (backward passes or Hessian-vector products per
batch), seconds, and how many ranks differ (half of Σ |difference|) from those that SensitivityLoRA gives with the
reference's curvature at an average of 2 and of 8. Sampled estimates are drawn anew for every seed.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
import zlib
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tagging import IGNORE, Batch, Data, Example, Tagger, batches, build_model, evaluate, load_data, loss_fn, train
from tagging import read_sentences as read
from torch import Tensor, nn

from minirank import SensitivityLoRA, curvature, linear_targets

Diagonals = Mapping[str, Tensor]
Row = dict[str, Any]  # one estimate's figures, a list each: one value per seed
AVERAGES = (2, 8)  # ranks per layer


def order(values: Tensor) -> Tensor:
    """(n,) → (n, n), the signs of all differences: 0 for ties."""
    return (values[:, None] - values).sign().double()


def kendall(a: Tensor, b: Tensor) -> float:
    """Kendall's τ_b of two (n,); nan if all values of one are tied."""
    x, y = order(a), order(b)
    return float((x * y).sum() / (x.square().sum() * y.square().sum()).sqrt())


def spearman(a: Tensor, b: Tensor) -> float:
    """Spearman's ρ of two (n,), ties at their mean rank; nan if all values of one are tied."""
    x, y = order(a).sum(1), order(b).sum(1)
    return float(x @ y / (x.norm() * y.norm()))


def relative_error(estimate: Tensor, reference: Tensor, scaled: bool) -> float:
    """‖c · estimate − reference‖ / ‖reference‖, c being 1, or with `scaled` the factor that makes it smallest."""
    c = estimate @ reference / estimate.square().sum() if scaled else 1.0
    return float((c * estimate - reference).norm() / reference.norm())


def traces(diagonals: Diagonals) -> Tensor:
    return torch.stack([h.double().sum() for h in diagonals.values()])


def entries(diagonals: Diagonals, model: nn.Module) -> Tensor:
    """All entries, those that a layer's rows share once per row."""
    d_out = {name: model.get_submodule(name).weight.shape[0] for name in diagonals}
    return torch.cat([(h if h.ndim == 2 else h.expand(d_out[n], -1)).double().flatten() for n, h in diagonals.items()])


def sensitivity_ranks(model: nn.Module, diagonals: Diagonals) -> list[Tensor] | None:
    """SensitivityLoRA's ranks at every average; None if the mean trace is negative, which it refuses."""
    allocator = SensitivityLoRA(
        model, loss_fn, [], targets=list(diagonals), curvature=lambda *_: diagonals, progress=False
    )
    try:
        allocator.score()
    except ValueError as error:
        print(f"  no allocation: {error}")
        return None
    return [torch.tensor(list(allocator.allocate(a * len(diagonals)).ranks.values())) for a in AVERAGES]


class Contender(NamedTuple):
    family: str
    samples: int | None  # random ones
    products: int
    estimate: Callable[..., Diagonals]
    free_scale: bool  # errors are meaningful only up to one factor for all layers

    @property
    def name(self) -> str:
        return self.family + (f", {self.samples}" if self.samples else "") + (" *" if self.free_scale else "")


def contenders(counts: list[int], exact_products: int) -> list[Contender]:
    """exact_products: backward passes of the exact Gauss-Newton diagonal, 0 to leave it out."""

    def shared_by_rows(model: nn.Module, *arguments: Any, **options: Any) -> Diagonals:
        diagonals = curvature.input_second_moment(model, *arguments)
        return {n: h.expand(model.get_submodule(n).weight.shape[0], -1) for n, h in diagonals.items()}

    sampled: dict[str, Callable[..., Diagonals]] = {
        "Hutchinson, weights": curvature.hutchinson_weights,
        "Hutchinson, outputs": curvature.hutchinson_outputs,
        "Gauss-Newton, sampled": partial(curvature.gauss_newton),
    }
    found = [Contender(f, k, k, partial(e, samples=k), False) for f, e in sampled.items() for k in counts]
    if exact_products:
        found.append(Contender("Gauss-Newton, exact", None, exact_products, curvature.gauss_newton, False))
    found.append(Contender("empirical Fisher", None, 1, curvature.empirical_fisher, True))
    found.append(Contender("input second moment", None, 0, curvature.input_second_moment, True))
    found.append(Contender("the same, N = d_out d_in", None, 0, shared_by_rows, True))
    return found


def words(batch: Batch) -> int:
    """What a batch's mean loss weighs: it is a mean over words."""
    return int((batch["labels"] != IGNORE).sum())


def measure(contender: Contender, model: nn.Module, data: list[Batch], targets: list[str], seed: int) -> Diagonals:
    options: dict[str, Any] = {}
    if contender.samples:
        options["generator"] = torch.Generator().manual_seed(seed)
    if contender.products:
        options["batch_weight"] = words
    return contender.estimate(model, loss_fn, data, targets, **options)


def study(
    model: nn.Module, data: list[Batch], reference: Diagonals, choice: list[Contender], seeds: list[int]
) -> dict[str, Row]:
    """Every contender against the reference; the seeds are those of the random signs."""
    expected, wanted = traces(reference), sensitivity_ranks(model, reference)
    every = entries(reference, model)
    found: dict[str, Row] = {}
    for contender in choice:
        row: Row = {"products": contender.products, "family": contender.family}
        for seed in seeds if contender.samples else seeds[:1]:
            start = time.perf_counter()
            diagonals = measure(contender, model, data, list(reference), seed)
            values = {"seconds": time.perf_counter() - start}
            t, h = traces(diagonals), entries(diagonals, model)
            values |= {"spearman": spearman(t, expected), "kendall": kendall(t, expected)}
            values |= {"trace error": relative_error(t, expected, contender.free_scale)}
            values |= {"entry error": relative_error(h, every, contender.free_scale)}
            ranks = sensitivity_ranks(model, diagonals)
            for i, average in enumerate(AVERAGES):
                moved = (ranks[i] - wanted[i]).abs().sum() / 2 if ranks and wanted else math.nan
                values[f"moved at {average}"] = float(moved)
            for key, value in values.items():
                row.setdefault(key, []).append(value)
        found[contender.name] = row
    uniform = {f"moved at {a}": [float((w - a).abs().sum() / 2)] for a, w in zip(AVERAGES, wanted or [], strict=False)}
    found["uniform ranks"] = {"products": 0, "family": "uniform ranks", **uniform}
    return found


def table(title: str, rows: Mapping[str, Row]) -> str:
    columns = {"spearman": 3, "kendall": 3, "trace error": 3, "entry error": 3, "moved at 2": 1, "moved at 8": 1}
    lines = [f"\n{title}", f"{'':<27}{'products':>9}{'seconds':>9}" + "".join(f"{c:>15}" for c in columns)]
    for name, row in rows.items():
        seconds = f"{statistics.mean(row['seconds']):.2f}" if "seconds" in row else ""
        line = f"{name:<27}{row['products']:>9,}{seconds:>9}"
        for column, digits in columns.items():
            line += f"{spread(row.get(column, []), digits):>15}"
        lines.append(line)
    return "\n".join(lines)


def spread(values: list[float], digits: int) -> str:
    """Mean ± standard deviation."""
    known = [v for v in values if not math.isnan(v)]
    cell = f"{statistics.mean(known):.{digits}f}" if known else "–"
    return cell + (f" ± {statistics.stdev(known):.{digits}f}" if len(known) > 1 else "")


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.before(x)
        q, k, v = (f(y).unflatten(-1, (2, -1)).transpose(-2, -3) for f in (self.q, self.k, self.v))  # 2 heads
        attended = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ v
        x = x + self.o(attended.transpose(-2, -3).flatten(-2))
        mixed: Tensor = x + self.down(nn.functional.gelu(self.up(self.between(x))))
        return mixed


class SmallTagger(nn.Module):
    def __init__(self, symbols: int, length: int, tags: int, width: int = 24, blocks: int = 4) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(symbols, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(blocks)))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, tags))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, T) → (B, T, C). All sentences have one length: there is nothing to mask."""
        logits: Tensor = self.head(self.blocks(self.words(input_ids) + self.places.weight[: input_ids.shape[1]]))
        return logits


def small_data(length: int, common: int = 2000, endings: int = 256) -> Data:
    """The first words of each sentence; a word is one of the common ones, or its last three letters' hash."""
    splits = {s: read(Path(__file__).parent / "data" / f"brown_{s}.txt") for s in ("train", "dev", "test")}
    uses = Counter(word.lower() for sentence, _ in splits["train"] for word in sentence)
    index = {word: i for i, (word, _) in enumerate(uses.most_common(common))}
    tags = sorted({tag for _, of_sentence in splits["train"] for tag in of_sentence})

    def symbol(word: str) -> int:
        return index.get(word.lower(), common + zlib.crc32(word[-3:].encode()) % endings)

    examples = {
        split: [
            Example([symbol(w) for w in sentence[:length]], [tags.index(t) for t in marks[:length]])
            for sentence, marks in sentences
            if len(sentence) >= length
        ]
        for split, sentences in splits.items()
    }
    return Data(examples["train"], examples["dev"], examples["test"], tags)
