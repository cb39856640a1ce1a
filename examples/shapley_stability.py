"""How much do ShapLoRA's scores depend on which coalitions were drawn, and on how many?

    # a quarter of an hour:
    python examples/shapley_stability.py --out examples/results/shapley_stability.json

MiniLM with rank 4 in each of its 36 linear layers (144 players) is trained on the task of
tagging.py, then scored on sentences of the development split with several draws of coalitions. The
script prints the Spearman correlations between these scores. (The paper reports 0.96 to 0.99
between seeds.)
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from pathlib import Path

import torch
from shapley_fidelity import spearman
from tagging import batches, build_model, evaluate, load_data, loss_fn, train, words
from torch import Tensor

from minirank import ShapLoRA, UniformRanks, wrap


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=250, help="of training (default 250)")
    parser.add_argument(
        "--coalitions",
        type=int,
        nargs="+",
        default=[18, 90],
        help="how many, each with two seeds (default 18 and 90)",
    )
    parser.add_argument(
        "--sentences",
        type=int,
        default=60,
        help="of the development split, for --coalitions (default 60)",
    )
    parser.add_argument(
        "--few",
        type=int,
        default=12,
        help="sentences of the development split, for up to --most coalitions (default 12)",
    )
    parser.add_argument(
        "--most", type=int, default=900, help="coalitions scored on the few sentences (default 900)"
    )
    parser.add_argument(
        "--limit",
        type=int,
        help="use only so many development sentences, to see that the script runs",
    )
    parser.add_argument("--out", help="write the figures to this JSON file")
    options = parser.parse_args()

    data = load_data()
    data = data._replace(dev=data.dev[: options.limit])
    model = build_model(0, len(data.tags))
    uniform = UniformRanks(model, ["encoder.*"])
    uniform.score()
    wrap(model, uniform.allocate(36 * 4), scaling=2.0, gate=0.0, trainable=["head"])
    train(model, data.train, steps=options.steps, seed=0)
    dev = evaluate(model, data.dev)
    print(
        f"dev split after {options.steps} steps: {dev['accuracy']:.2f} %, loss {dev['loss']:.4f}",
        flush=True,
    )

    scores: dict[str, Tensor] = {}
    records = {}

    def add(coalitions: int, seed: int, sentences: int) -> None:
        chosen = list(batches(data.dev[:: len(data.dev) // sentences][:sentences], 24))
        allocator = ShapLoRA(
            model,
            loss_fn,
            chosen,
            coalitions=coalitions,
            batch_weight=words,
            generator=seed,
            progress=False,
        )
        key = f"{coalitions} coalitions, seed {seed}, {sentences} sentences"
        start = time.perf_counter()
        scores[key] = torch.cat(list(allocator.score().values()))
        seconds = time.perf_counter() - start
        records[key] = {"seconds": seconds, "scores": scores[key].tolist()}
        print(f"{key}: {seconds:.0f} s", end="")
        if coalitions:
            errors = torch.cat(list(allocator.standard_errors.values()))
            records[key]["standard_errors"] = errors.tolist()
            share = (errors / scores[key]).median()
            print(f", standard errors {100 * share:.1f} % of the scores (median)", end="")
        print(flush=True)

    add(0, 0, options.sentences)
    for coalitions, seed in itertools.product(options.coalitions, (0, 1)):
        add(coalitions, seed, options.sentences)
    for coalitions in (*options.coalitions, options.most):
        add(coalitions, 2 + coalitions, options.few)  # seeds that have no coalitions in common
    pairs = {
        f"{a} | {b}": spearman(scores[a], scores[b]) for a, b in itertools.combinations(scores, 2)
    }
    for pair, value in pairs.items():
        print(f"{value:.3f}  {pair}")
    if options.out:
        environment = {"torch": torch.__version__, "threads": torch.get_num_threads()}
        content = {
            "options": vars(options),
            "environment": environment,
            "dev": dev,
            "spearman": pairs,
            "runs": records,
        }
        Path(options.out).write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
