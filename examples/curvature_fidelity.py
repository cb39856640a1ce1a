"""Which curvature estimate can be trusted? Each is compared with the exact Hessian diagonal.

    python examples/curvature_fidelity.py --quick                        # under a minute
    python examples/curvature_fidelity.py --out f.json --plot f.png      # as on the results page

Three studies of part-of-speech taggers (see tagging.py), on one thread:

small: a BERT of 4 blocks and width 24, trained here from scratch, once per seed. The reference is
    the exact diagonal of all its 25 linear layers, in float64, on 16 whole sentences of 8
    sub-words.
MiniLM: the pretrained encoder under a head that was trained alone first, because under a random
    head the loss is far from a minimum. The reference is the exact diagonal of the linear layers of
    some blocks, on a few short whole sentences.
MiniLM, all layers: on 6 whole sentences of 20 sub-words, before and after fine-tuning. An exact
    diagonal would cost too much here. The reference for the traces is Hutchinson's estimate on
    outputs with 100 samples, whose standard error is printed.

The figures of an estimate are:

- rank correlations of its traces, one per layer, with those of the reference;
- relative errors ‖estimate − reference‖ / ‖reference‖ of the traces and of all entries;
- its products (backward passes or Hessian-vector products) and seconds of one thread;
- how many ranks differ (half of Σ |difference|) from those that SensitivityLoRA gives with the
  exact diagonal, at an average of 2 and of 8 ranks.

Each seed draws the sampled estimates anew.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from agreement import (
    Diagonals,
    Row,
    entries,
    kendall,
    relative_error,
    save_plot,
    spearman,
    table,
    traces,
)
from curvature_stability import fine_tune, with_trained_head
from tagging import (
    Batch,
    Data,
    Example,
    Tagger,
    batches,
    evaluate,
    load_data,
    loss_fn,
    train,
    words,
)
from torch import Tensor, nn

from minirank import SensitivityLoRA, curvature, linear_targets

AVERAGES = (2, 8)  # ranks per layer


def sensitivity_ranks(model: nn.Module, diagonals: Diagonals) -> list[Tensor] | None:
    """SensitivityLoRA's ranks at each average; None where the mean trace is not positive."""
    if traces(diagonals).mean() <= 0:
        return None
    names = list(diagonals)
    allocator = SensitivityLoRA(
        model, loss_fn, [], targets=names, curvature=lambda *_: diagonals, progress=False
    )
    allocator.score()
    return [
        torch.tensor(list(allocator.allocate(a * len(diagonals)).ranks.values())) for a in AVERAGES
    ]


class Contender(NamedTuple):
    family: str
    samples: int | None  # random ones
    products: int  # backward passes or Hessian-vector products
    estimate: Callable[..., Diagonals]
    free_scale: bool  # the estimate is meant only up to one factor, the same for all layers

    @property
    def name(self) -> str:
        return (
            self.family
            + (f", {self.samples}" if self.samples else "")
            + (" *" if self.free_scale else "")
        )


def contenders(counts: list[int], exact_products: int) -> list[Contender]:
    """The estimates to compare; those that draw random vectors once for each count.

    exact_products: backward passes of the exact Gauss-Newton diagonal; 0 leaves it out.
    """

    def shared_by_rows(model: nn.Module, *arguments: Any, **options: Any) -> Diagonals:
        diagonals = curvature.input_second_moment(model, *arguments)
        return {
            n: h.expand(model.get_parameter(f"{n}.weight").shape[0], -1)
            for n, h in diagonals.items()
        }

    sampled: dict[str, Callable[..., Diagonals]] = {
        "Hutchinson, weights": curvature.hutchinson_weights,
        "Hutchinson, outputs": curvature.hutchinson_outputs,
        "Gauss-Newton, sampled": curvature.gauss_newton,
    }
    chosen = [
        Contender(family, count, count, partial(estimate, samples=count), False)
        for family, estimate in sampled.items()
        for count in counts
    ]
    if exact_products:
        chosen.append(
            Contender("Gauss-Newton, exact", None, exact_products, curvature.gauss_newton, False)
        )
    chosen.append(Contender("empirical Fisher", None, 1, curvature.empirical_fisher, True))
    chosen.append(Contender("input second moment", None, 0, curvature.input_second_moment, True))
    return [*chosen, Contender("the same, N = d_out d_in", None, 0, shared_by_rows, True)]


def measure(
    contender: Contender, model: nn.Module, data: list[Batch], targets: list[str], seed: int
) -> Diagonals:
    options: dict[str, Any] = {"batch_weight": words} if contender.products else {}
    if contender.samples:
        options["generator"] = torch.Generator().manual_seed(seed)
    return contender.estimate(model, loss_fn, data, targets, **options)


def study(
    model: nn.Module,
    data: list[Batch],
    reference: Diagonals,
    choice: list[Contender],
    seeds: list[int],
) -> dict[str, Row]:
    """The figures of each contender against the reference. The seeds draw the random signs."""
    expected, wanted, every = (
        traces(reference),
        sensitivity_ranks(model, reference),
        entries(reference, reference),
    )
    if wanted is None:
        print("reference: no allocation, the mean trace is not positive")
    figures: dict[str, Row] = {}
    for contender in choice:
        row: Row = {"products": contender.products, "family": contender.family}
        for seed in seeds if contender.samples else seeds[:1]:
            start = time.process_time()
            diagonals = measure(contender, model, data, list(reference), seed)
            values = {"seconds": time.process_time() - start}
            t, h = traces(diagonals), entries(diagonals, reference)
            values |= {"spearman": spearman(t, expected), "kendall": kendall(t, expected)}
            values |= {"trace error": relative_error(t, expected, contender.free_scale)}
            values |= {"entry error": relative_error(h, every, contender.free_scale)}
            ranks = sensitivity_ranks(model, diagonals)
            values["refused"] = float(ranks is None)
            for average, r, w in zip(AVERAGES, ranks or [], wanted or [], strict=False):
                values[f"moved at {average}"] = float((r - w).abs().sum() / 2)
            for key, value in values.items():
                if not math.isnan(value):  # no correlation where all traces are equal
                    row.setdefault(key, []).append(value)
        figures[contender.name] = row
    uniform = {
        f"moved at {a}": [float((w - a).abs().sum() / 2)]
        for a, w in zip(AVERAGES, wanted or [], strict=False)
    }
    figures["uniform ranks"] = {"products": 0, "family": "uniform ranks", **uniform}
    return figures


def of_length(examples: list[Example], length: int, count: int) -> list[Batch]:
    """The first `count` whole sentences of `length` sub-words, as one batch."""
    chosen = [example for example in examples if len(example.input_ids) == length][:count]
    return list(batches(chosen, count))


def exact(model: nn.Module, data: list[Batch], targets: list[str]) -> tuple[Diagonals, Row]:
    start = time.process_time()
    diagonals = curvature.exact_hessian_diagonal(model, loss_fn, data, targets, batch_weight=words)
    seconds = time.process_time() - start
    products = sum(data[0]["labels"].shape[1] * len(h) for h in diagonals.values())
    return diagonals, {"products": products, "family": "exact", "seconds": [seconds]}


def describe(model: nn.Module, data: list[Batch], reference: Diagonals) -> str:
    with torch.no_grad():
        loss = sum(loss_fn(model, b) * words(b) for b in data) / sum(map(words, data))
    t = traces(reference)
    below = float((entries(reference, reference) < 0).double().mean())
    return (
        f"loss {float(loss):.3f} on {sum(map(words, data))} words; {len(t)} layers; "
        f"traces {t.min():.3g} to {t.max():.3g}, {int((t < 0).sum())} negative; "
        f"{100 * below:.0f} % of the entries negative"
    )


def small_tagger(data: Data, seed: int, steps: int) -> Tagger:
    config = transformers.BertConfig(
        hidden_size=24, num_hidden_layers=4, num_attention_heads=2, intermediate_size=48,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Tagger(
            transformers.BertModel(config, add_pooling_layer=False), nn.Linear(24, len(data.tags))
        )
    train(model, data.train, steps=steps, seed=seed, progress=False)
    return model


def small_study(data: Data, seeds: list[int], counts: list[int], quick: bool) -> dict[str, Row]:
    length, sentences, steps = (4, 2, 20) if quick else (8, 16, 1000)
    calibration = of_length(data.dev, length, sentences)
    merged: dict[str, Row] = {}
    for seed in seeds:
        model = small_tagger(data, seed, steps).double()
        accuracy = evaluate(model, data.dev)["accuracy"]
        reference, row = exact(model, calibration, list(linear_targets(model)))
        description = describe(model, calibration, reference)
        print(f"seed {seed}: dev accuracy {accuracy:.1f} %; {description}", flush=True)
        rows = study(
            model, calibration, reference, contenders(counts, length * len(data.tags)), [seed]
        )
        for name, of_seed in {"exact": row, **rows}.items():
            into = merged.setdefault(name, {})
            into |= {
                key: into.get(key, []) + v if isinstance(v, list) else v
                for key, v in of_seed.items()
            }
    return merged


def exact_study(
    model: Tagger, data: Data, options: argparse.Namespace, counts: list[int]
) -> dict[str, Row]:
    length, sentences = (3, 2) if options.quick else (options.length, options.sentences)
    names = [
        f"encoder.encoder.layer.{block}.*{'self.*' if options.quick else ''}"
        for block in options.blocks
    ]
    calibration = of_length(data.dev, length, sentences)
    reference, row = exact(model, calibration, list(linear_targets(model, names)))
    print(describe(model, calibration, reference), flush=True)
    choice = contenders(counts, length * len(data.tags))
    return {"exact": row, **study(model, calibration, reference, choice, options.seeds)}


def sampled_study(
    model: Tagger, data: Data, options: argparse.Namespace, counts: list[int]
) -> dict[str, Row]:
    length, sentences, samples = (4, 2, 2) if options.quick else (20, 6, 100)
    calibration = of_length(data.dev, length, sentences)
    settings: dict[str, Any] = {
        "samples": samples,
        "generator": torch.Generator().manual_seed(1000),
        "batch_weight": words,
    }
    start = time.process_time()
    targets = ["encoder.encoder.layer.5.*" if options.quick else "encoder.*"]
    reference = curvature.hutchinson_outputs(model, loss_fn, calibration, targets, **settings)
    seconds = time.process_time() - start
    noise = statistics.mean(reference.standard_errors.values()) / float(
        traces(reference).abs().mean()
    )
    print(describe(model, calibration, reference))
    print(f"standard errors of these traces: {100 * noise:.1f} % of the mean |trace|", flush=True)
    rows = study(model, calibration, reference, contenders(counts[:2], 0), options.seeds)
    # The entries of this reference are too noisy to compare with.
    of_traces = ("products", "family", "seconds", "spearman", "kendall", "trace error")
    rows = {
        name: {key: row[key] for key in of_traces if key in row}
        for name, row in rows.items()
        if "spearman" in row
    }
    return {"reference": {"products": samples, "family": "reference", "seconds": [seconds]}, **rows}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="toy sizes, to see that it runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--blocks", type=int, nargs="+", default=[3, 5], help="of MiniLM, for the exact diagonal"
    )
    parser.add_argument(
        "--length",
        type=int,
        default=6,
        help="sub-words of the sentences for the exact diagonal, [CLS] and [SEP] included",
    )
    parser.add_argument("--sentences", type=int, default=4, help="how many of these sentences")
    parser.add_argument("--out", help="write every figure to this JSON file")
    parser.add_argument("--plot", help="write the plot to this image file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    counts = [1] if options.quick else [1, 10, 100]
    if options.quick:
        options.seeds, options.blocks = options.seeds[:1], [5]
    data = load_data()
    studies: dict[str, dict[str, Row]] = {}

    def add(title: str, rows: dict[str, Row]) -> None:
        studies[title] = rows
        print(table(title, rows), "\n", flush=True)

    add(
        f"small BERT, {len(options.seeds)} seed(s)",
        small_study(data, options.seeds, counts, options.quick),
    )
    model = with_trained_head(data, steps=2 if options.quick else 200)
    judged = data.dev[:20] if options.quick else data.dev
    print(
        f"MiniLM, its head alone trained: dev accuracy {evaluate(model, judged)['accuracy']:.1f} %"
    )
    add(
        f"MiniLM, blocks {options.blocks}, its head alone trained",
        exact_study(model, data, options, counts),
    )
    add("MiniLM, all layers, its head alone trained", sampled_study(model, data, options, counts))
    fine_tune(model, data.train, steps=2 if options.quick else 250, seed=0)
    print(f"MiniLM, fine-tuned: dev accuracy {evaluate(model, judged)['accuracy']:.1f} %")
    add("MiniLM, all layers, fine-tuned", sampled_study(model, data, options, counts))
    print("mean ± standard deviation over seeds")
    print("*: errors after multiplying by the best factor, the same for all layers")
    if options.out:
        environment = {"torch": torch.__version__, "threads": torch.get_num_threads()}
        content = {"options": vars(options), "environment": environment, "studies": studies}
        Path(options.out).write_text(json.dumps(content, indent=1) + "\n")
    if options.plot:
        save_plot(options.plot, studies)


if __name__ == "__main__":
    main()
