"""Does allocating ranks help? One plot of several studies: a row for each task, a dot for each arm.

    cd examples/results
    python ../does_it_help.py planted_teacher.json tagging_brown.json --plot does_it_help.png

Each argument is a file that a study wrote (study.py). A dot is the arm's test loss over that of
uniform ranks at the same number of parameters: left of the line it helps. It is the geometric mean
over seeds, and its bar is two standard errors, paired by seed. Of the planted teachers only those
count that nothing was chosen on.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from compare import mean_and_error
from study_results import KNOWN, LARGEST, UNIFORM, Results

ARMS = {
    KNOWN: ("*", "0.2", "best known ranks"),
    LARGEST: ("D", "0.6", "uniform, largest (more parameters)"),
    "random": ("x", "0.4", "random ranks"),
    "proxy": ("v", "C3", "Sensitivity-LoRA, default"),
    "fisher after warm-up": ("^", "C1", "Sensitivity-LoRA, Fisher after warm-up"),
    "eva": ("<", "C5", "EVA"),
    "l1ra, from the budget": (">", "C6", "L1RA from the budget"),
    "l1ra, from room": ("<", "C4", "L1RA from room, pruned once"),
    "shaplora": ("p", "C8", "ShapLoRA, as published"),
    "plain, roomy": ("s", "C2", "ShapLoRA, roomy first training, no coalitions"),
    "singular values of outputs": ("h", "C9", "singular values, weighted by inputs"),
    "singular values": ("o", "C0", "singular values of a roomy first training"),
}


def ratio(results: Results, arm: str) -> tuple[float, float, float] | None:
    """(geometric mean of loss over uniform's, lower end, upper end of two standard errors)."""
    seeds = held_out_seeds(results)
    base, losses = results.losses(UNIFORM, seeds), results.losses(arm, seeds)
    logs = [math.log(losses[seed] / base[seed]) for seed in losses if seed in base]
    if not logs:
        return None
    mean, error = mean_and_error(logs)
    half = 2 * (error or 0.0)
    return math.exp(mean), math.exp(mean - half), math.exp(mean + half)


def held_out_seeds(results: Results) -> list[int]:
    """The seeds that nothing was chosen on, where these are other tasks; else all.

    Of the planted teachers a seed is a task. Elsewhere it is another training on the same data, and
    what is chosen is chosen on the development split.
    """
    seeds, tuning = results.content["seeds"], results.content["tuning_seeds"]
    others = [seed for seed in seeds if seed not in tuning]
    is_task = "planted" in results.content["settings"]
    return others if is_task and others else list(seeds)


def draw(files: list[Path], path: Path) -> None:
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(10, 1.6 + 0.75 * len(files)), layout="constrained")
    axes = figure.subplots()
    present = []
    labels = []
    for row, file in enumerate(files):
        results = Results(file)
        labels.append(f"{results.content['name']}\n({len(held_out_seeds(results))} seeds)")
        found = {arm: r for arm in ARMS if (r := ratio(results, arm)) is not None}
        present += [arm for arm in found if arm not in present]
        for i, (arm, (mean, low, high)) in enumerate(found.items()):
            marker, colour, _ = ARMS[arm]
            y = row - 0.35 + 0.7 * i / max(1, len(found) - 1)
            axes.plot([low, high], [y, y], "-", color=colour, linewidth=1.2)
            axes.plot(mean, y, marker, color=colour, markersize=6)
        axes.axhline(row + 0.5, color="0.85", linewidth=0.8)
    axes.axvline(1.0, color="0.3", linewidth=1)
    axes.set_xscale("log")
    axes.set_yticks(range(len(files)), labels)
    axes.set_ylim(len(files) - 0.5, -0.5)
    axes.set_xlabel("test loss over that of uniform ranks at equal parameters (left: better)")
    handles = [
        Line2D([], [], marker=ARMS[a][0], color=ARMS[a][1], linestyle="", label=ARMS[a][2])
        for a in ARMS
        if a in present
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--plot", type=Path, required=True)
    options = parser.parse_args()
    for file in options.files:
        results = Results(file)
        print(f"{results.content['name']}, seeds {held_out_seeds(results)}")
        for arm in ARMS:
            found = ratio(results, arm)
            if found is not None:
                print(f"  {arm:<28} {found[0]:.4f}  ({found[1]:.4f} to {found[2]:.4f})")
    draw(options.files, options.plot)


if __name__ == "__main__":
    main()
