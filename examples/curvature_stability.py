"""Does a curvature's order of the layers hold on other text, on less of it, and after fine-tuning?

    python examples/curvature_stability.py --quick                  # one estimate, under a minute
    python examples/curvature_stability.py --out stability.json     # as on the results page

The tables are of the same kind as those on stability in the paper on Sensitivity-LoRA. They are
made for its own curvature (the input second moment) and for the empirical Fisher. A figure is
Kendall's τ between two orders of MiniLM's 36 layers: by the trace, and by θ, which decides the
ranks. The task is that of tagging.py; the model is the pretrained encoder under a head that was
trained alone.

domains: three genres of the Brown corpus are compared: press (reportage, editorials, reviews),
    learned writing, and fiction. Which lines of brown_train.txt these are follows from
    make_brown.py, which keeps the corpus's order, by genre.
10 %: random tenths of the calibration data are compared with all of it, which is 300 sentences of
    the development split.
fine-tuning: the orders before and after fine-tuning are compared, on the same calibration data. All
    36 layers are trained by LoRA of rank 2, together with the head, and merged.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from agreement import kendall
from tagging import (
    Data,
    Example,
    Tagger,
    batches,
    build_model,
    evaluate,
    load_data,
    loss_fn,
    spread,
    train,
    words,
)
from torch import Tensor

from minirank import SensitivityLoRA, curvature, linear_targets, merge, unwrap, wrap
from minirank.allocators.sensitivity import Curvature

DOMAINS = {
    "press": (0, 972),
    "learned": (3171, 3981),
    "fiction": (3981, 6000),
}  # lines of brown_train.txt, counted from 0
TARGETS = ["encoder.*"]
PAPER = {"domains": "0.971 to 0.983", "10 %": "0.986", "fine-tuning": "at least 0.98"}
Measured = dict[str, Tensor]  # {"theta", "trace"}: (layers,)


def with_trained_head(data: Data, steps: int, seed: int = 0) -> Tagger:
    """The pretrained encoder, unchanged, under a head that was trained alone."""
    model = build_model(seed, len(data.tags))
    model.encoder.requires_grad_(False)
    train(model, data.train, steps=steps, seed=seed, head_lr=3e-2, progress=False)
    return model


ESTIMATES: dict[str, Curvature] = {
    "input second moment": curvature.input_second_moment,
    "empirical Fisher": partial(curvature.empirical_fisher, batch_weight=words),
}


def measure(estimate: str, model: Tagger, examples: list[Example]) -> Measured:
    data = list(batches(examples, 24))
    allocator = SensitivityLoRA(
        model, loss_fn, data, targets=TARGETS, curvature=ESTIMATES[estimate], progress=False
    )
    allocator.score()
    metrics_of_layers = allocator.metrics.values()
    return {
        key: torch.tensor([metrics[key] for metrics in metrics_of_layers])
        for key in ("theta", "trace")
    }


def tau(a: Measured, b: Measured) -> dict[str, float]:
    return {key: kendall(a[key], b[key]) for key in a}


def fine_tune(model: Tagger, examples: list[Example], steps: int, seed: int) -> None:
    """Train LoRA of rank 2 on all targets, as in compare.py, and merge it into plain layers."""
    ranks = dict.fromkeys(linear_targets(model, TARGETS), 2)
    wrap(model, ranks, scaling=2.0, trainable=["head"], generator=seed)
    train(model, examples, steps=steps, seed=seed, progress=False)
    merge(model)
    unwrap(model)


def report(
    estimate: str, comparisons: Mapping[str, Mapping[str, dict[str, float]]], seconds: float
) -> str:
    lines = [
        f"\n{estimate}, {seconds:.0f} s of measuring",
        f"{'':<36}{'τ of θ':>9}{'τ of trace':>12}",
    ]
    for comparison, pairs in comparisons.items():
        for label, values in pairs.items():
            lines.append(
                f"{comparison + ': ' + label:<36}{values['theta']:>9.3f}{values['trace']:>12.3f}"
            )
        lines.append(f"{'  published, larger models':<36}{PAPER[comparison]:>21}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="toy sizes, to see that it runs")
    parser.add_argument("--sentences", type=int, default=200, help="of each domain")
    parser.add_argument(
        "--tenths", type=int, default=3, help="random tenths of the development split"
    )
    parser.add_argument("--steps", type=int, default=250, help="of fine-tuning, 24 sentences each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="write every figure to this JSON file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.quick:
        options.sentences, options.tenths, options.steps = 4, 1, 2
    estimates = list(ESTIMATES)[:1] if options.quick else list(ESTIMATES)

    data = load_data()
    calibration = data.dev[:20] if options.quick else data.dev[::2]
    model = with_trained_head(data, steps=2 if options.quick else 200)
    accuracy = [evaluate(model, calibration)["accuracy"]]
    results: dict[str, Any] = {
        "layers": list(linear_targets(model, TARGETS)),
        "measured": {},
        "tau": {},
    }
    taus: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    seconds = dict.fromkeys(estimates, 0.0)
    whole: dict[str, Measured] = {}

    def timed(estimate: str, label: str, examples: list[Example]) -> Measured:
        start = time.process_time()
        measured = measure(estimate, model, examples)
        seconds[estimate] += time.process_time() - start
        key = results["measured"].setdefault(estimate, {})
        key[label] = {name: values.tolist() for name, values in measured.items()}
        return measured

    for estimate in estimates:
        whole[estimate] = timed(estimate, "calibration", calibration)
        texts = {
            name: spread(data.train[slice(*lines)], options.sentences)
            for name, lines in DOMAINS.items()
        }
        domains = {name: timed(estimate, name, examples) for name, examples in texts.items()}
        generator = torch.Generator().manual_seed(options.seed)
        tenths = {}
        for i in range(options.tenths):
            chosen = torch.randperm(len(calibration), generator=generator)[
                : len(calibration) // 10
            ].tolist()
            tenth = timed(estimate, f"tenth {i}", [calibration[j] for j in chosen])
            tenths[f"draw {i}"] = tau(tenth, whole[estimate])
        pairs = itertools.combinations(domains, 2)
        taus[estimate] = {
            "domains": {f"{a}, {b}": tau(domains[a], domains[b]) for a, b in pairs},
            "10 %": tenths,
        }
    fine_tune(model, data.train, options.steps, options.seed)
    accuracy.append(evaluate(model, calibration)["accuracy"])
    for estimate in estimates:
        after = timed(estimate, "after fine-tuning", calibration)
        taus[estimate]["fine-tuning"] = {f"{options.steps} steps": tau(whole[estimate], after)}
        print(report(estimate, taus[estimate], seconds[estimate]))
    before, after_training = accuracy
    print(
        f"\naccuracy on the calibration data: {before:.1f} % before, {after_training:.1f} % after "
        "fine-tuning"
    )
    if options.out:
        environment = {"torch": torch.__version__, "threads": torch.get_num_threads()}
        results |= {
            "options": vars(options),
            "environment": environment,
            "seconds": seconds,
            "accuracy": accuracy,
        }
        Path(options.out).write_text(json.dumps({**results, "tau": taus}, indent=1) + "\n")


if __name__ == "__main__":
    main()
