"""Does allocating ranks help? One plot of several studies: a panel for each task, a line an arm.

    cd examples/results
    python ../does_it_help.py planted_teacher.json tagging_brown.json --plot does_it_help.png

Each argument is a file that a study wrote (study.py). A dot is the arm's test loss over that of
uniform ranks at the same number of parameters: left of the line it helps. It is the geometric mean
over seeds, and its bar is two standard errors, paired by seed. Each panel has an axis of its own.
Of the planted teachers only those count that nothing was chosen on.
"""

from __future__ import annotations

import argparse
import math
import textwrap
from pathlib import Path

from compare import mean_and_error
from study_results import KNOWN, LARGEST, UNIFORM, Results

SMALLEST = 1e-3  # smaller ratios are drawn here, as an arrowhead

ARMS = {
    KNOWN: ("*", "0.2", "the planted ranks"),
    LARGEST: ("D", "0.6", "uniform, largest (more parameters)"),
    "random": ("x", "0.4", "random ranks"),
    "proxy": ("v", "C3", "Sensitivity-LoRA, default"),
    "fisher": (">", "C1", "Sensitivity-LoRA on the Fisher"),
    "fisher after warm-up": ("^", "C1", "Sensitivity-LoRA on the Fisher, warm"),
    "eva": ("P", "C5", "EVA"),
    "l1ra, from the budget": ("d", "C6", "L1RA from the budget"),
    "l1ra, from room": ("X", "C4", "L1RA from room, pruned once"),
    "shaplora": ("p", "C8", "ShapLoRA, as published"),
    "plain, roomy": ("s", "C2", "ShapLoRA, roomy, no coalitions"),
    "singular values of outputs": ("h", "C9", "SingularValues with data"),
    "singular values": ("o", "C0", "SingularValues without data"),
}


def ratio(results: Results, arm: str) -> tuple[float, float, float] | None:
    """(geometric mean of loss over uniform's, lower end, upper end of two standard errors)."""
    seeds = held_out_seeds(results)
    base, losses = results.losses(UNIFORM, seeds), results.losses(arm, seeds)
    logs = [math.log(losses[seed] / base[seed]) for seed in losses if seed in base]
    if not logs:
        return None
    mean, error = mean_and_error(logs)
    if error is None:
        return None  # one seed is no comparison
    half = 2 * error
    return math.exp(mean), math.exp(mean - half), math.exp(mean + half)


def held_out_seeds(results: Results) -> list[int]:
    """The seeds that nothing was chosen on, where these are other tasks; else all.

    Of the planted teachers a seed is a task. Elsewhere it is another training on the same data, and
    what is chosen is chosen on the development split.
    """
    seeds, tuning = results.content["seeds"], results.content["tuning_seeds"]
    others = [seed for seed in seeds if seed not in tuning]
    is_task = "planted" in results.content["settings"]
    chosen = len(results.tried(UNIFORM)) > 1  # of one learning rate there was no choice
    return others if is_task and chosen and others else list(seeds)


def draw(files: list[Path], path: Path) -> None:
    """One panel for each task with an axis of its own, and one line for each arm."""
    from matplotlib.figure import Figure

    studies = [Results(file) for file in files]
    found = [{arm: ratio(results, arm) for arm in ARMS} for results in studies]
    arms = [arm for arm in ARMS if any(ratios[arm] is not None for ratios in found)]
    columns = min(3, len(files))
    rows = math.ceil(len(files) / columns)
    size = (3.0 + 2.6 * columns, rows * (1.0 + 0.19 * len(arms)))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False).flatten()
    for axes, results, ratios in zip(panels, studies, found, strict=False):
        for y, arm in enumerate(arms):
            triple = ratios[arm]
            if triple is None:
                continue
            mean, low, high = (max(value, SMALLEST) for value in triple)
            marker, colour, _ = ARMS[arm]
            axes.plot([low, high], [y, y], "-", color=colour, linewidth=1.5)
            axes.plot(mean, y, "<" if mean == SMALLEST else marker, color=colour, markersize=6)
        axes.axvline(1.0, color="0.3", linewidth=1)
        if min(triple[0] for triple in ratios.values() if triple is not None) < 0.3:
            axes.set_xscale("log")
        else:
            axes.locator_params(axis="x", nbins=5)  # labels of many digits would touch
        title = textwrap.fill(results.content["name"], 36)
        steps, seeds = results.content["settings"]["steps"], len(held_out_seeds(results))
        axes.set_title(f"{title}\n({steps} steps, {seeds} seeds)", fontsize=9)
        axes.tick_params(axis="x", labelsize=8)
        axes.grid(axis="y", color="0.93")
    for axes in panels[len(files) :]:
        axes.set_visible(False)
    for axes in panels[::columns]:
        axes.set_yticks(range(len(arms)), [ARMS[arm][2] for arm in arms], fontsize=8)
    panels[0].set_ylim(len(arms) - 0.5, -0.5)
    figure.supxlabel("test loss over that of uniform ranks at equal parameters (left: better)")
    figure.savefig(path, dpi=110)


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
