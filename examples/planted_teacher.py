"""Which method finds the ranks that a task needs, where these are known?

    python examples/planted_teacher.py --out planted_teacher.json    # ten teachers, all arms
    python examples/planted_teacher.py --quick                       # seconds, to see that it runs

A network of three frozen transformer blocks (width 48, 18 linear layers) has random weights W_l. A
teacher is the same network with weights W_l + Δ_l. The ranks of the planted changes Δ_l are drawn
for each layer, by default from 0, 0, 1, 2 and 8, and all their singular values are 1.2. The student
is the network, and LoRA has to learn the changes from the teacher's outputs. The budget is the
number of parameters that the planted ranks take, so that ranks are known with which the student can
become its teacher.

- Data: random vectors, new ones in every step; 32 sequences of 8 vectors in a batch. The
  development split and the test split are 256 sequences each.
- Loss: the squared error, over that of the untrained student. So 1 is the loss before the training.
- Seeds are teachers. Learning rates, and all that is chosen, are chosen on the first five; the
  other five are for the report.

`--planted`, `--budget-factor`, `--steps` and `--spectral-norm` vary the task.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from study import Ranks, Task, run_study, study_parser
from torch import Tensor, nn

WIDTH, HIDDEN, HEADS, BLOCKS = 48, 96, 4, 3
POSITIONS, BATCH, HELD_OUT = 8, 32, 256
UNEVEN = (0, 0, 1, 2, 8)
Batch = tuple[Tensor, Tensor]  # inputs and what the teacher makes of them, (n, POSITIONS, WIDTH)


class Block(nn.Module):
    """A transformer block with its normalisations first, and without dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """(n, T, WIDTH) → (n, T, WIDTH)"""
        n, T, _ = x.shape
        normed = self.attention_norm(x)
        q, k, v = (
            layer(normed).view(n, T, HEADS, -1).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, T, WIDTH)
        x = x + self.out(attended)
        y: Tensor = x + self.down(F.gelu(self.up(self.mlp_norm(x))))
        return y


def network(seed: int) -> nn.Sequential:
    """The student before the training. The global random generator is not used."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(*(Block() for _ in range(BLOCKS)))


class Teacher:
    """A network with planted changes, and what it says about data.

    Args:
        seed: draws the network, the planted ranks and changes, and the held-out data.
        choices: the ranks that a layer's change may have.
        spectral_norm: all singular values of a change that are not zero.
    """

    def __init__(self, seed: int, choices: tuple[int, ...], spectral_norm: float) -> None:
        self.model = network(seed).requires_grad_(False)
        generator = torch.Generator().manual_seed(1_000_000 + seed)
        layers = {n: m for n, m in self.model.named_modules() if isinstance(m, nn.Linear)}
        drawn = torch.randint(len(choices), (len(layers),), generator=generator).tolist()
        if all(choices[i] == 0 for i in drawn):
            drawn[0] = choices.index(max(choices))
        self.ranks: Ranks = {n: choices[i] for n, i in zip(layers, drawn, strict=True)}
        for name, layer in layers.items():
            rank = self.ranks[name]
            U, V = (
                torch.linalg.qr(torch.randn(size, rank, generator=generator)).Q
                for size in layer.weight.shape
            )
            layer.weight += spectral_norm * U @ V.T
        self.dev, self.test = (self.batch(HELD_OUT, generator) for _ in range(2))
        student = network(seed)
        with torch.no_grad():
            self.error_before = float(F.mse_loss(student(self.dev[0]), self.dev[1]))

    def batch(self, sequences: int, generator: torch.Generator) -> Batch:
        x = torch.randn(sequences, POSITIONS, WIDTH, generator=generator)
        with torch.no_grad():
            return x, self.model(x)


class PlantedTeacher(Task):
    """See this file's first lines.

    Args:
        planted: the ranks that a layer's change may have.
        budget_factor: the budget over the parameters of the planted ranks.
    """

    rates = (1.2e-2, 2.4e-2, 4.8e-2)
    first_rate = 2.4e-2
    seeds = tuple(range(10))
    tuning_seeds = tuple(range(5))

    def __init__(
        self,
        planted: tuple[int, ...] = UNEVEN,
        budget_factor: float = 1.0,
        steps: int = 600,
        spectral_norm: float = 1.2,
    ) -> None:
        self.planted, self.budget_factor, self.steps = planted, budget_factor, steps
        self.spectral_norm = spectral_norm
        self.max_rank = max(*planted, 8)
        drawn = ", ".join(map(str, planted))
        self.name = f"planted ranks {drawn}; budget {budget_factor:g} of the need"
        self._teachers: dict[int, Teacher] = {}

    def teacher(self, seed: int) -> Teacher:
        if seed not in self._teachers:
            self._teachers[seed] = Teacher(seed, self.planted, self.spectral_norm)
        return self._teachers[seed]

    def model(self, seed: int) -> nn.Module:
        return network(seed)

    def loss_fn(self, model: nn.Module, batch: Batch) -> Tensor:
        """The squared error, not divided by that of the untrained student."""
        return F.mse_loss(model(batch[0]), batch[1])

    def calibration(self, seed: int) -> list[Batch]:
        x, y = self.teacher(seed).dev
        return list(zip(torch.split(x, BATCH), torch.split(y, BATCH), strict=True))

    def training_batches(self, seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(2_000_000 + seed)
        while True:
            yield self.teacher(seed).batch(BATCH, generator)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, seed: int) -> dict[str, float]:
        model.eval()
        teacher = self.teacher(seed)
        return {
            split: float(self.loss_fn(model, batch)) / teacher.error_before
            for split, batch in (("dev", teacher.dev), ("test", teacher.test))
        }

    def best_known(self, seed: int) -> Ranks | None:
        return self.teacher(seed).ranks if self.budget_factor == 1 else None

    def kinds(self, seed: int) -> dict[str, list[str]]:
        names = self.names(self.model(seed))
        feed_forward = [name for name in names if name.endswith(("up", "down"))]
        return {
            "attention": [name for name in names if name not in feed_forward],
            "feed-forward": feed_forward,
        }

    def budget(self, seed: int) -> int:
        costs = self.costs(self.model(seed))
        planted = sum(rank * costs[name] for name, rank in self.teacher(seed).ranks.items())
        return round(self.budget_factor * planted)


def main() -> None:
    parser = study_parser(__doc__)
    parser.add_argument(
        "--planted", type=int, nargs="+", default=list(UNEVEN), help="ranks of a layer's change"
    )
    parser.add_argument("--budget-factor", type=float, default=1.0, help="budget over need")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--spectral-norm", type=float, default=1.2, help="of each planted change")
    options = parser.parse_args()
    task = PlantedTeacher(
        planted=tuple(options.planted),
        budget_factor=options.budget_factor,
        steps=6 if options.quick else options.steps,
        spectral_norm=options.spectral_norm,
    )
    settings = {
        "planted": options.planted,
        "budget_factor": options.budget_factor,
        "spectral_norm": options.spectral_norm,
    }
    run_study(task, options, settings, halves=True)


if __name__ == "__main__":
    main()
