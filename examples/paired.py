"""Compare methods that compare.py ran at different times, by differences paired by seed.

    cd examples/results
    python ../paired.py compare_ranks.json:uniform shaplora_ranks.json:shaplora

Each argument is a file that `compare.py --out` wrote, a colon, and the name of a method in it.
Several files with different seeds can be joined by +. The others are compared with the first
argument. A seed that one of the arguments lacks is left out. Runs can be compared only if their
model, data and training are the same, so the options that decide these must be equal.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from compare import mean_and_error, plus_minus

DECISIVE_OPTIONS = ("targets", "steps")  # if they differ, more than the ranks differs
Runs = dict[int, dict[str, Any]]  # by seed


def load(argument: str) -> tuple[Runs, dict[str, Any], float]:
    """(runs by seed, the decisive options, mean number of adapter parameters) of FILE:METHOD."""
    paths, _, method = argument.rpartition(":")
    runs: Runs = {}
    parameters: list[float] = []
    for path in paths.split("+"):
        content = json.loads(Path(path).read_text())
        runs_of_method = {run["seed"]: run for run in content["runs"] if run["method"] == method}
        if not runs_of_method:
            present = sorted({run["method"] for run in content["runs"]})
            raise SystemExit(f"{path!r} has no runs of {method!r}, but of {present}")
        runs |= runs_of_method
        parameters += [content["summary"]["parameters"][method]["mean"]] * len(runs_of_method)
    options = {key: content["options"][key] for key in DECISIVE_OPTIONS}
    return runs, options, sum(parameters) / len(parameters)


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
    for argument, (_, other_options, _) in loaded.items():
        if other_options != options:
            raise SystemExit(
                f"{argument} ran with {other_options}, {arguments[0]} with {options}: "
                "not comparable"
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
            figures = f"{cell(values, digits):>17}  difference {cell(differences, digits, '+'):>18}"
            print(f"  test {name:<14} {figures}   {each}")
        for name in ("scoring_seconds", "training_seconds"):
            print(f"  {name:<19} {cell([runs[seed][name] for seed in seeds], 0):>17}")


if __name__ == "__main__":
    main()
