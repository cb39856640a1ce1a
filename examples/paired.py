"""Differences between methods that compare.py ran at different times, paired by seed.

    cd examples/results
    python ../paired.py compare_ranks.json:uniform shaplora_ranks.json:shaplora

Each argument is a file that `compare.py --out` wrote (or several with other seeds, joined by +), and the name of a
method in it. The first is what the others are compared with; a seed that one of them lacks is left out. Runs are
comparable if they share model, data and training: the options that decide those must be equal.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from compare import mean_and_error, plus_minus

SAME = ("targets", "steps")  # else the trainings differ in more than their ranks
Runs = dict[int, dict[str, Any]]  # by seed


def load(argument: str) -> tuple[Runs, dict[str, Any], float]:
    """(runs by seed, what must be the same, mean number of adapter parameters)"""
    paths, _, method = argument.rpartition(":")
    runs: Runs = {}
    parameters: list[float] = []
    for path in paths.split("+"):
        content = json.loads(Path(path).read_text())
        found = {run["seed"]: run for run in content["runs"] if run["method"] == method}
        if not found:
            raise SystemExit(
                f"{path!r} has no runs of {method!r}, but of {sorted({r['method'] for r in content['runs']})}"
            )
        runs |= found
        parameters += [content["summary"]["parameters"][method]["mean"]] * len(found)
    return runs, {key: content["options"][key] for key in SAME}, sum(parameters) / len(parameters)


def cell(values: list[float], digits: int, sign: str = "") -> str:
    return plus_minus(*mean_and_error(values), digits, sign)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="FILE:METHOD")
    arguments = parser.parse_args().runs
    loaded = {argument: load(argument) for argument in arguments}
    first, options, _ = loaded[arguments[0]]
    for argument, (_, its, _) in loaded.items():
        if its != options:
            raise SystemExit(
                f"{argument} ran with {its}, {arguments[0]} with {options}: not comparable"
            )
    seeds = sorted(set.intersection(*(set(runs) for runs, *_ in loaded.values())))
    print(
        f"seeds {seeds}, mean ± standard error; differences from {arguments[0]} are paired by seed"
    )
    for argument, (runs, _, parameters) in loaded.items():
        ranks = cell([sum(runs[seed]["ranks"].values()) for seed in seeds], 1)
        print(f"\n{argument}: {ranks} ranks, {parameters:,.0f} parameters")
        for name, part, figure, digits in (
            ("accuracy %", "test", "accuracy", 2),
            ("cross-entropy", "test", "loss", 4),
        ):
            values = [runs[seed][part][figure] for seed in seeds]
            differences = [
                value - first[seed][part][figure] for value, seed in zip(values, seeds, strict=True)
            ]
            each = " ".join(f"{value:.{digits}f}" for value in values)
            difference = cell(differences, digits, "+")
            print(
                f"  test {name:<14} {cell(values, digits):>17}  difference {difference:>18}   {each}"
            )
        for name in ("scoring_seconds", "training_seconds"):
            print(f"  {name:<19} {cell([runs[seed][name] for seed in seeds], 0):>17}")


if __name__ == "__main__":
    main()
