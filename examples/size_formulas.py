"""Memory and arithmetic of each step, computed from a decoder's shapes.

    python examples/size_formulas.py        # 1, 8 and 70 billion parameters

The sums Σ go over the linear layers of the blocks, which get adapters of rank r. τ counts the
tokens of a batch, T those of a sequence, K random vectors, V the vocabulary, d the hidden size.

    W             Σ d_out d_in + 2 layers · d + d + V d (twice if the head is not tied)
    N             Σ d_out d_in
    P             Σ r (d_out + d_in), the parameters of the adapters
    training      bytes(W) + 4 P (adapters) + 4 P (gradients) + 8 P (Adam)
    accumulators  input moment: 4 Σ d_in; the others: 4 N for the mean and 4 N for a batch
    linear        l = 2 τ (N + V d) FLOPs
    attention     a = 4 τ T · heads · head size · layers
    forward       f = l + a
    backward      b = l + 2 a - e, to the layers' outputs; the weights are frozen. Nothing is taken
                  to the input of the first layer: e = 2 τ (its q, k and v)
    product       h = 2 l + 6 a - 2 e, one with the Hessian
    squares       g = 2 τ N, the gradient of every sample by every weight

`score_work` has the FLOPs of scores in these units, for each batch, and `WORK_ONCE` what is taken
once more: two forward passes, to see that the loss repeats, and products that test what a curvature
assumes. After a change of the curvatures these two are to be changed as well:
`real_sizes.count_table` says whether they hold.

real_sizes.py compares these with what it measures. They leave out all work that is not a matrix
product (norms, softmax, the loss over V columns, Adam, the squares themselves, and Eqs 8-10 of
Sensitivity-LoRA, which sort N numbers: the stage "metrics"), and all memory for what is between:
logits, graphs, a copy of what each layer reads, and what the C library keeps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Llama(NamedTuple):
    """The shapes of a Llama-like decoder."""

    hidden: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool  # the output head is the embedding

    @property
    def linears(self) -> list[tuple[int, int]]:
        """(d_out, d_in) of every linear layer of the blocks."""
        size = self.hidden // self.heads
        d, kv = self.hidden, size * self.kv_heads
        block = [(d, d), (kv, d), (kv, d), (d, d), (self.mlp, d), (self.mlp, d), (d, self.mlp)]
        return block * self.layers


LLAMAS = {
    "SmolLM2-135M": Llama(576, 1536, 30, 9, 3, 49152, tied=True),
    "Llama-3.2-1B": Llama(2048, 8192, 16, 32, 8, 128256, tied=True),
    "Llama-2-7B": Llama(4096, 11008, 32, 32, 32, 32000, tied=False),
    "Llama-3-8B": Llama(4096, 14336, 32, 32, 8, 128256, tied=False),
    "Llama-3-70B": Llama(8192, 28672, 80, 64, 8, 128256, tied=False),
}


def matrix_entries(llama: Llama) -> int:
    """N."""
    return sum(d_out * d_in for d_out, d_in in llama.linears)


def weights(llama: Llama) -> int:
    """W, all parameters."""
    embeddings = llama.vocab * llama.hidden * (1 if llama.tied else 2)
    return matrix_entries(llama) + (2 * llama.layers + 1) * llama.hidden + embeddings


def adapter_parameters(llama: Llama, rank: int) -> int:
    """P."""
    return sum(rank * (d_out + d_in) for d_out, d_in in llama.linears)


def training_bytes(llama: Llama, rank: int, bytes_per_weight: int = 4) -> int:
    return bytes_per_weight * weights(llama) + 16 * adapter_parameters(llama, rank)


def moment_bytes(llama: Llama) -> int:
    return sum(4 * d_in for _, d_in in llama.linears)


class Work(NamedTuple):
    """What scores take for each batch, in units of the table above: n f + n b + …"""

    forward: float
    backward: float = 0
    products: float = 0
    squares: float = 0


def score_work(vectors: int) -> dict[str, Work]:
    """For each batch, with all checks. Random vectors: one pass over the batches draws them all."""
    return {
        "input moment": Work(forward=1),
        "Fisher": Work(forward=1, backward=1, squares=1),
        "Gauss-Newton": Work(forward=1, backward=1 + vectors, squares=vectors),
        "Hutchinson": Work(forward=1, backward=1, products=1 + vectors, squares=2 * vectors),
    }


WORK_ONCE = {
    "input moment": Work(forward=0),
    "Fisher": Work(forward=2, products=2),
    "Gauss-Newton": Work(forward=2, backward=1),
    "Hutchinson": Work(forward=2, products=1),
}


def units(llama: Llama, sequences: int, length: int) -> Mapping[str, float]:
    """FLOPs of a forward pass, a backward pass, a product and the squares of one batch."""
    tokens = sequences * length
    N = matrix_entries(llama)
    linear = 2 * tokens * (N + llama.vocab * llama.hidden)
    attention = 4 * tokens * length * llama.hidden * llama.layers
    first_inputs = 2 * tokens * sum(d_out * d_in for d_out, d_in in llama.linears[:3])
    return {
        "forward": linear + attention,
        "backward": linear + 2 * attention - first_inputs,
        "products": 2 * linear + 6 * attention - 2 * first_inputs,
        "squares": 2 * tokens * N,
    }


def flops(work: Work, unit: Mapping[str, float]) -> float:
    total: float = sum(count * unit[name] for name, count in work._asdict().items())
    return total


def score_flops(llama: Llama, settings: Mapping[str, int]) -> dict[str, float]:
    """{curvature: FLOPs}, with the settings of real_sizes.py."""
    unit = units(llama, settings["batch"], settings["length"])
    return {
        name: settings["score_batches"] * flops(work, unit) + flops(WORK_ONCE[name], unit)
        for name, work in score_work(settings["vectors"]).items()
    }


def training_flops(llama: Llama, settings: Mapping[str, int]) -> float:
    """Of one step: both passes, and 6 τ P for the adapters."""
    unit = units(llama, settings["train_batch"], settings["length"])
    tokens = settings["train_batch"] * settings["length"]
    P = adapter_parameters(llama, settings["rank"])
    return unit["forward"] + unit["backward"] + 6 * tokens * P


def shaplora_flops(llama: Llama, settings: Mapping[str, int]) -> float:
    """Of all coalitions on one batch, and two forward passes more."""
    unit = units(llama, settings["batch"], settings["length"])
    tokens = settings["batch"] * settings["length"]
    P = adapter_parameters(llama, settings["rank"])
    once = unit["forward"] + unit["backward"] + 6 * tokens * P
    return settings["coalitions"] * once + 2 * (unit["forward"] + 2 * tokens * P)


def bytes_table(rank: int) -> str:
    rows = {
        "parameters W": weights,
        "in adapted matrices N": matrix_entries,
        f"in adapters P, rank {rank}": lambda llama: adapter_parameters(llama, rank),
        "training, W in float32, GB": lambda llama: training_bytes(llama, rank) / 1e9,
        "training, W in bfloat16, GB": lambda llama: training_bytes(llama, rank, 2) / 1e9,
        "of it adapters to Adam, GB": lambda llama: 16 * adapter_parameters(llama, rank) / 1e9,
        "input moment, MB": lambda llama: moment_bytes(llama) / 1e6,
        "other curvature, mean, GB": lambda llama: 4 * matrix_entries(llama) / 1e9,
        "... while a batch is added": lambda llama: 8 * matrix_entries(llama) / 1e9,
    }
    lines = [f"{'':<28}" + "".join(f"{name:>15}" for name in LLAMAS)]
    for title, formula in rows.items():
        cells = [formula(llama) for llama in LLAMAS.values()]  # type: ignore[no-untyped-call]
        lines.append(f"{title:<28}" + "".join(f"{_cell(value):>15}" for value in cells))
    return "\n".join(lines)


def flops_table(settings: Mapping[str, int]) -> str:
    """TFLOPs of a forward pass of a batch, and all other work in such passes."""
    lines = [f"{'in forward passes':<28}" + "".join(f"{name:>15}" for name in LLAMAS)]
    forward = {
        name: units(llama, settings["batch"], settings["length"])["forward"]
        for name, llama in LLAMAS.items()
    }
    cells = "".join(f"{_cell(value / 1e12):>15}" for value in forward.values())
    lines.append(f"{'one, of a batch, TFLOPs':<28}{cells}")
    scores = {name: score_flops(llama, settings) for name, llama in LLAMAS.items()}
    for curvature in score_work(1):
        cells = "".join(f"{scores[n][curvature] / forward[n]:>15.1f}" for n in LLAMAS)
        lines.append(f"{f'score: {curvature}':<28}{cells}")
    share = settings["batch"] / settings["train_batch"]
    for title, formula, factor in (
        ("score: ShapLoRA", shaplora_flops, 1.0),
        ("a training step (its batch)", training_flops, share),
    ):
        cells = "".join(
            f"{factor * formula(llama, settings) / forward[name]:>15.1f}"
            for name, llama in LLAMAS.items()
        )
        lines.append(f"{title:<28}{cells}")
    return "\n".join(lines)


def _cell(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.3g}"


if __name__ == "__main__":
    print(bytes_table(rank=8))
    print()
    print(
        flops_table(
            {
                **{"length": 128, "batch": 2, "score_batches": 2, "train_batch": 1},
                **{"vectors": 4, "rank": 8, "coalitions": 18},
            }
        )
    )
