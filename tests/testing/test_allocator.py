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

    class InventsAMask(KeepsMoreThanItGives):
        def ranks_from_scores(self, scores, constraints):
            ranks, keep = RankScores.ranks_from_scores(self, scores, constraints)
            return ranks, {**keep, "side": keep["up"]}

    class CutsAMask(KeepsMoreThanItGives):
        def ranks_from_scores(self, scores, constraints):
            ranks, keep = RankScores.ranks_from_scores(self, scores, constraints)
            return ranks, {name: mask[:1] for name, mask in keep.items()}

    class NamesAnUnknownModule(UniformRanks):
        def score(self):
            return self.store_scores({"side": torch.ones(())})

    class NamesANorm(UniformRanks):
        def score(self):
            return self.store_scores({"norm": torch.ones(())})

    class ForgetsToStore(UniformRanks):
        def score(self):
            return {name: torch.ones(()) for name in self.targets}

    class GivesANegativeShare(UniformRanks):
        def score(self):
            return self.store_scores({name: torch.tensor(-1.0) for name in self.targets})

    class GivesFloats(UniformRanks):
        def score(self):
            return self.store_scores(dict.fromkeys(self.targets, 1.0))

    class ReturnsFloats(UniformRanks):
        def score(self):
            super().score()
            return dict.fromkeys(self.targets, 1.0)

    class ReturnsRanks(UniformRanks):
        def allocate(self, budget, **options):
            return super().allocate(budget, **options).ranks

    class RaisesKeyErrorBeforeScores(UniformRanks):
        def allocate(self, budget, **options):
            if self._scores is None:
                raise KeyError("scores")
            return super().allocate(budget, **options)

    def ignoring(bound, in_unit):
        """An allocator that ignores a bound in one unit, if it can."""

        class Ignores(UniformRanks):
            def allocate(self, budget, *, unit="ranks", **options):
                super().allocate(budget, unit=unit, **options)  # an impossible budget is refused
                if unit == in_unit:
                    del options[bound]
                return super().allocate(budget, unit=unit, **options)

        return Ignores

    def accepting(what):
        class Accepts(UniformRanks):
            def allocate(self, budget, *, unit="ranks", **options):
                try:
                    return super().allocate(budget, unit=unit, **options)
                except ValueError:
                    if unit != what:
                        raise
                    return None

        return Accepts

    return {
        KeepsMoreThanItGives: "the keep mask of 'up' holds 3, but its rank is 0",
        ForgetsAMask: r"expected keep masks for \['up', 'down'\], got \['up'\]",
        InventsAMask: r"expected keep masks for \['up', 'down'\], got \['up', 'down', 'side'\]",
        CutsAMask: r"the keep mask of 'up' has shape \(1,\); expected \(3,\)",
        ChangesTheModel: "up.weight changed",
        LeavesEvalMode: "mode, numbers of hooks",
        DrawsFromTheGlobalGenerator: "random state changed",
        LosesARank: "miss the budget of 1",
        NeedsNoScores: r"allocate\(\) before score\(\) must raise RuntimeError",
        RaisesKeyErrorBeforeScores: "must raise RuntimeError, got KeyError",
        GivesNaN: "score of 'up' is not finite",
        NamesAnUnknownModule: "names 'side', which is not a linear layer",
        NamesANorm: "names 'norm', which is not a linear layer",
        ForgetsToStore: r"allocate\(0, .* must not raise, but raised RuntimeError: .*call score",
        GivesANegativeShare: "must not raise, but raised ValueError: score of 'up' is -1.0",
        GivesFloats: r"score\(\) must not raise, but raised AttributeError",
        ReturnsFloats: "score of 'up' must be a tensor, got 1.0",
        ReturnsRanks: "must return an Allocation",
        ignoring("min_rank", "ranks"): r"unit='ranks', min_rank=.* are out of bounds",
        ignoring("min_rank", "parameters"): r"unit='parameters', min_rank=.* are out of bounds",
        ignoring("max_rank", "ranks"): r"unit='ranks', .*max_rank=.* are out of bounds",
        ignoring("max_rank", "parameters"): r"unit='parameters', .*max_rank.* are out of bounds",
        accepting("ranks"): r"unit='ranks', .* cannot be met, and must raise ValueError",
        accepting("parameters"): r"unit='parameters', .* cannot be met, and must raise ValueError",
    }


@pytest.mark.parametrize(("broken", "message"), broken_allocators().items())
def test_the_rules_catch_broken_allocators(broken, message):
    with pytest.raises(AssertionError, match=message):
        testing.check_allocator(broken(Block()))
