"""Every allocator goes through the same rules, and the rules catch allocators that break them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from minirank import (
    L1RA,
    LoRALinear,
    RankScoreAllocator,
    SensitivityLoRA,
    ShapLoRA,
    UniformRanks,
    testing,
    wrap,
)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(5, 9)
        self.drop = nn.Dropout(0.3)
        self.norm = nn.BatchNorm1d(9)
        self.down = nn.Linear(9, 4, bias=False)

    def forward(self, x):
        return self.down(self.norm(self.drop(self.up(x)).relu()))


def loss_fn(model, batch):
    return model(batch).square().mean()


def batches():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, 5, generator=generator) for n in (4, 6)]


class RankScores(RankScoreAllocator):
    """One score per existing rank, as L1RA and ShapLoRA give."""

    def score(self):
        return self.store_scores(
            {
                name: torch.arange(m.rank) * 1.0
                for name, m in self.model.named_modules()
                if isinstance(m, LoRALinear)
            }
        )


def wrapped():
    model = Block()
    wrap(model, {"up": 3, "down": 4})
    return model


def gated():
    model = Block()
    layers = wrap(model, {"up": 3, "down": 4}, gate=1.0)
    with torch.no_grad():
        layers["up"].gate.copy_(torch.tensor([0.3, 0.0, 0.9]))
    return L1RA(model, torch.optim.Adam(model.parameters()), interval=5)


def warmed_up(**options):
    model = Block()
    layers = wrap(model, {"up": 3, "down": 4}, gate=0.0)
    generator = torch.Generator().manual_seed(1)
    for layer in layers.values():
        layer.gate.data.normal_(generator=generator)  # as if trained
    return ShapLoRA(model, loss_fn, batches(), progress=False, **options)


ALLOCATORS = {
    "uniform": lambda: UniformRanks(Block()),
    "sensitivity": lambda: SensitivityLoRA(Block(), loss_fn, batches(), progress=False),
    "scores per rank": lambda: RankScores(wrapped()),
    "L1RA": gated,
    "ShapLoRA": lambda: warmed_up(coalitions=18, generator=torch.Generator().manual_seed(2)),
    "ShapLoRA without coalitions": lambda: warmed_up(coalitions=0),
    "ShapLoRA by magnitude": lambda: warmed_up(importance="magnitude"),
}


@pytest.mark.parametrize("make", ALLOCATORS.values(), ids=ALLOCATORS.keys())
def test_allocator_follows_the_rules(make):
    testing.check_allocator(make())


@pytest.mark.parametrize("make", ALLOCATORS.values(), ids=ALLOCATORS.keys())
def test_scoring_twice_gives_the_same(make):
    allocator = make()
    one, two = allocator.score(), allocator.score()
    assert all(torch.equal(one[name], two[name]) for name in one)


def broken_allocators():
    class ChangesTheModel(UniformRanks):
        def score(self):
            with torch.no_grad():
                self.model.up.weight[0, 0] += 1
            return super().score()

    class LeavesEvalMode(UniformRanks):
        def score(self):
            self.model.eval()
            return super().score()

    class DrawsFromTheGlobalGenerator(UniformRanks):
        def score(self):
            torch.rand(1)
            return super().score()

    class LosesARank(UniformRanks):
        def allocate(self, budget, **options):
            return super().allocate(max(budget - 1, 0), **options)

    class NeedsNoScores(UniformRanks):
        def allocate(self, budget, **options):
            self.score()
            return super().allocate(budget, **options)

    class GivesNaN(UniformRanks):
        def score(self):
            scores = super().score()
            return self.store_scores({name: score * float("nan") for name, score in scores.items()})

    class KeepsMoreThanItGives(RankScores):
        grows = True

        def __init__(self, model):
            super().__init__(wrapped())

        def ranks_from_scores(self, scores, constraints):
            ranks, _ = super().ranks_from_scores(scores, constraints)
            return ranks, {name: torch.ones(len(s), dtype=torch.bool) for name, s in scores.items()}

    class ForgetsAMask(KeepsMoreThanItGives):
        def ranks_from_scores(self, scores, constraints):
            ranks, keep = RankScores.ranks_from_scores(self, scores, constraints)
            return ranks, {"up": keep["up"]}

    return [
        KeepsMoreThanItGives,
        ForgetsAMask,
        ChangesTheModel,
        LeavesEvalMode,
        DrawsFromTheGlobalGenerator,
        LosesARank,
        NeedsNoScores,
        GivesNaN,
    ]


@pytest.mark.parametrize("broken", broken_allocators())
def test_the_rules_catch_broken_allocators(broken):
    with pytest.raises(AssertionError):
        testing.check_allocator(broken(Block()))
