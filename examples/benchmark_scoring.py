"""What Sensitivity-LoRA's scoring costs on MiniLM, beside the same forward passes without it.

python examples/benchmark_scoring.py
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from tagging import batches, build_model, load_data, loss_fn
from timing import interleaved, table

from minirank import SensitivityLoRA, curvature


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sentences", type=int, default=240)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", help="write the figures to this JSON file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    data = load_data()
    model = build_model(0, len(data.tags)).eval()
    calibration = list(batches(data.dev[: arguments.sentences], 24))

    @torch.no_grad()
    def forward_passes() -> None:
        for batch in calibration:
            loss_fn(model, batch)

    allocator = SensitivityLoRA(model, loss_fn, calibration, targets="encoder.*", progress=False)
    contenders = {
        "forward passes": forward_passes,
        "input_second_moment": lambda: curvature.input_second_moment(
            model, loss_fn, calibration, "encoder.*"
        ),
        "SensitivityLoRA.score()": allocator.score,
    }
    print(
        f"MiniLM, 36 layers, {arguments.sentences} sentences, torch {torch.__version__}, "
        f"{arguments.threads} thread(s)"
    )
    results = table("calibration", interleaved(contenders, arguments.repeats), "forward passes")
    if arguments.out:
        Path(arguments.out).write_text(
            json.dumps({"options": vars(arguments), "calibration": results}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
