"""What the LoRA layer costs beside the bare model and PEFT: forward, training step, wrap, merge.

    python examples/benchmark_layer.py

The model is a stack of Linear(768, 768) layers, each with an adapter of rank 8; the batch is 128.
All contenders take turns in one process. The figures are medians of the repeats, and ratios of
these medians. PEFT is left out if it is not installed. First the script checks that minirank and
PEFT compute the same function.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path

import torch
from timing import Work, interleaved, table
from torch import Tensor, nn

from minirank import UniformRanks, lora_layers, merge, unmerge, wrap

SCALING = 3  # not a power of two, by which multiplication would be exact


def forward(model: nn.Module, x: Tensor) -> Work:
    def work() -> None:
        with torch.no_grad():
            model(x)

    return work


def training_step(model: nn.Module, x: Tensor) -> Work:
    def work() -> None:
        model(x).square().mean().backward()
        for parameter in model.parameters():
            parameter.grad = None

    return work


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", help="write the figures to this JSON file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    generator = torch.Generator().manual_seed(0)
    bare = nn.Sequential(
        *(nn.Linear(arguments.width, arguments.width) for _ in range(arguments.layers))
    )
    with torch.no_grad():
        for weight in bare.parameters():  # so that activations neither vanish nor explode
            weight.normal_(0, arguments.width**-0.5, generator=generator)
    x = torch.randn(arguments.batch, arguments.width, generator=generator)

    def wrapped() -> nn.Module:
        model = copy.deepcopy(bare)
        allocator = UniformRanks(model)
        allocator.score()
        wrap(
            model,
            allocator.allocate(arguments.rank * arguments.layers),
            scaling=SCALING,
        )
        return model

    ours = wrapped()
    with torch.no_grad():
        for layer in lora_layers(ours).values():
            layer.lora_B.normal_(0, 0.02, generator=generator)
    copies: list[Tensor] = []
    weights = [layer.base_weight for layer in lora_layers(ours).values()]
    models = {"bare": bare, "minirank": ours}
    wrapping: dict[str, Work] = {"minirank (with deepcopy)": wrapped}
    merging: dict[str, Work] = {
        "minirank": lambda: merge(ours),
        "copies of the weights alone": lambda: copies.extend(w.clone() for w in weights),
    }
    unmerging: dict[str, Work] = {
        "minirank": lambda: unmerge(ours),
        "copies of the weights alone": copies.clear,
    }
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        print("PEFT is not installed: no comparison (pip install 'minirank[examples]')")
    else:

        def wrapped_by_peft() -> nn.Module:
            config = LoraConfig(
                r=arguments.rank, lora_alpha=SCALING * arguments.rank, target_modules=r"\d+"
            )
            model: nn.Module = get_peft_model(copy.deepcopy(bare), config)
            return model

        theirs = wrapped_by_peft()
        state = dict(theirs.named_parameters())
        with torch.no_grad():
            for name, layer in lora_layers(ours).items():
                state[f"base_model.model.{name}.lora_A.default.weight"].copy_(layer.lora_A)
                state[f"base_model.model.{name}.lora_B.default.weight"].copy_(layer.lora_B)
            difference = (theirs(x) - ours(x)).abs().max()
            effect = (ours(x) - bare(x)).abs().max()
        print(
            f"minirank and PEFT differ by at most {difference:.1e}; "
            f"the adapters move the output by {effect:.1e}"
        )
        models["PEFT"] = theirs
        wrapping["PEFT (with deepcopy)"] = wrapped_by_peft
        merging["PEFT"] = theirs.merge_adapter  # type: ignore[assignment]
        unmerging["PEFT"] = theirs.unmerge_adapter  # type: ignore[assignment]

        def merge_with_check() -> None:
            theirs.merge_adapter(safe_merge=True)  # type: ignore[operator]

        merging["PEFT, safe_merge"] = merge_with_check
        unmerging["PEFT, safe_merge"] = unmerging["PEFT"]

    kind = f"Linear({arguments.width}, {arguments.width})"
    print(
        f"{arguments.layers} × {kind}, batch {arguments.batch}, rank {arguments.rank}, float32, "
        f"torch {torch.__version__}, {arguments.threads} thread(s)"
    )
    repeats = arguments.repeats
    trained = {name: model for name, model in models.items() if name != "bare"}
    results = {
        "forward": table(
            "forward", interleaved({n: forward(m, x) for n, m in models.items()}, repeats), "bare"
        ),
        "step": table(
            "forward + backward",
            interleaved({n: training_step(m, x) for n, m in trained.items()}, repeats),
            "minirank",
        ),
        "wrap": table("wrap", interleaved(wrapping, repeats), "minirank (with deepcopy)"),
        "merge": table("merge", interleaved(merging, repeats, after=unmerging), "minirank"),
    }
    if arguments.out:
        Path(arguments.out).write_text(
            json.dumps({"options": vars(arguments), **results}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
