"""Every allocator goes through the same rules, and the rules catch allocators that break them."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from minirank import (
    L1RA,
    LoRALinear,
    RankScoreAllocator,
    SensitivityLoRA,
    ShapLoRA,
    ShareAllocator,
    SingularValues,
    UniformRanks,
    lora_layers,
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


def trained():
    model = wrapped()
    for layer in lora_layers(model).values():
        layer.lora_B.data.normal_(generator=torch.Generator().manual_seed(1))
    return model


ALLOCATORS = {
    "uniform": lambda: UniformRanks(Block()),
    "sensitivity": lambda: SensitivityLoRA(Block(), loss_fn, batches(), progress=False),
    "scores per rank": lambda: RankScores(wrapped()),
    "L1RA": gated,
    "ShapLoRA": lambda: warmed_up(coalitions=18, generator=torch.Generator().manual_seed(2)),
    "ShapLoRA without coalitions": lambda: warmed_up(coalitions=0),
    "ShapLoRA by magnitude": lambda: warmed_up(importance="magnitude"),
    "singular values": lambda: SingularValues(trained()),
    "singular values with data": lambda: SingularValues(trained(), loss_fn, batches()),
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
        KeepsMoreThanItGives: "the keep mask of 'up' from .*: expected 0 kept, its rank, got 3",
        ForgetsAMask: r"expected keep masks for \['up', 'down'\], got \['up'\]",
        InventsAMask: r"expected keep masks for \['up', 'down'\], got \['up', 'down', 'side'\]",
        CutsAMask: r"the keep mask of 'up' from .*: expected shape \(3,\), got \(1,\)",
        ChangesTheModel: "up.weight changed",
        LeavesEvalMode: "mode, numbers of hooks",
        DrawsFromTheGlobalGenerator: "random state changed",
        LosesARank: "expected ranks that sum to 1, got 0",
        NeedsNoScores: r"allocate\(\) before score\(\): expected RuntimeError, got no exception",
        RaisesKeyErrorBeforeScores: "expected RuntimeError, got KeyError",
        GivesNaN: "score of 'up': expected finite numbers, got nan",
        NamesAnUnknownModule: "expected linear layers of the model, got 'side', which is none",
        NamesANorm: "expected linear layers of the model, got 'norm', which is none",
        ForgetsToStore: r"at allocate\(0, .* expected no exception, got RuntimeError: .*call score",
        GivesANegativeShare: "expected no exception, got ValueError: score of 'up' is -1.0",
        GivesFloats: r"at score\(\): expected no exception, got AttributeError",
        ReturnsFloats: "score of 'up': expected a tensor, got 1.0",
        ReturnsRanks: "expected an Allocation, got {'up'",
        ignoring("min_rank", "ranks"): r"FAILED +min_rank, ranks .*unit='ranks', min_rank=",
        ignoring("min_rank", "parameters"): r"FAILED +min_rank, parameters .*unit='parameters'",
        ignoring("max_rank", "ranks"): r"FAILED +max_rank, ranks .*unit='ranks', .*max_rank=",
        ignoring("max_rank", "parameters"): r"FAILED +max_rank, parameters .*unit='parameters'",
        accepting("ranks"): r"unit='ranks', .*: expected ValueError, got no exception",
        accepting("parameters"): r"unit='parameters', .*: expected ValueError, got no exception",
    }


def text_of(broken, **options):
    """The report on an allocator that breaks rules, in one line."""
    with pytest.raises(testing.ConformanceError) as caught:
        testing.check_allocator(broken, **options)
    assert isinstance(caught.value, AssertionError)
    return " ".join(str(caught.value).split())


@pytest.mark.parametrize(("broken", "message"), broken_allocators().items())
def test_the_rules_catch_broken_allocators(broken, message):
    assert re.search(message, text_of(broken(Block())))


def test_all_broken_rules_are_reported():
    class BreaksTwo(UniformRanks):
        def score(self):
            torch.rand(1)
            return super().score()

        def allocate(self, budget, *, unit="ranks", **options):
            lost = unit == "ranks" and budget == 7
            return super().allocate(budget - lost, unit=unit, **options)

    text = text_of(BreaksTwo(Block()))
    assert "FAILED score() leaves the model" in text
    assert "FAILED budget, ranks (Σ r = budget) at allocate(7, " in text
    assert text.count("FAILED") == 2


def test_rules_without_scores_are_skipped_with_a_reason():
    class Raises(UniformRanks):
        def score(self):
            raise KeyError("up")

    text = text_of(Raises(Block()))
    assert text.count("FAILED") == 1
    assert "SKIPPED budget, ranks (Σ r = budget) the scores are not what they must be" in text


def test_equal_scores_must_meet_the_budget_too():
    class KeepsAboveAThreshold(RankScores):
        """Ranks whose score is above that of the first that falls out: none, if all are equal."""

        def score(self):
            return self.store_scores({"up": torch.arange(3.0), "down": 0.5 + torch.arange(4.0)})

        def ranks_from_scores(self, scores, constraints):
            ranks, keep = super().ranks_from_scores(scores, constraints)
            if len(set(torch.cat(list(scores.values())).tolist())) == 1 and any(ranks.values()):
                ranks = dict.fromkeys(ranks, 0)
                keep = {name: torch.zeros_like(mask) for name, mask in keep.items()}
            return ranks, keep

    text = text_of(KeepsAboveAThreshold(wrapped()))
    assert "FAILED ties, ranks" in text
    assert text.count("FAILED") == 2  # in both units


def test_the_scores_are_the_measured_ones_afterwards():
    allocator = RankScores(wrapped())
    testing.check_allocator(allocator)
    ranks = allocator.allocate(4).ranks
    allocator.score()
    assert allocator.allocate(4).ranks == ranks


def test_an_allocator_without_parameter_budgets():
    class RanksOnly(UniformRanks):
        def allocate(self, budget, *, min_rank=0, max_rank=None):
            return super().allocate(budget, min_rank=min_rank, max_rank=max_rank)

    report = testing.check_allocator(RanksOnly(Block()), units=("ranks",))
    assert not any("parameters" in result.case for result in report)
    assert "unexpected keyword argument 'unit'" in text_of(RanksOnly(Block()))


@pytest.mark.parametrize("units", [(), ("rank",), "ranks"])
def test_unknown_units_are_refused(units):
    with pytest.raises(ValueError, match="expected units among"):
        testing.check_allocator(UniformRanks(Block()), units=units)


def test_the_report_tells_all_rules():
    report = testing.check_allocator(RankScores(wrapped()))
    assert {result.status for result in report} == {"passed"}
    assert "check_allocator (the rules of score() and allocate(budget)): 19 of 19" in str(report)


def test_a_dominant_module_breaks_no_rule():
    class Steep(ShareAllocator):
        def score(self):
            return self.store_scores({str(i): torch.tensor(50.0**-i) for i in range(12)})

    model = nn.Sequential(*[nn.Linear(16, 16) for _ in range(12)])
    steep = Steep(model)
    steep.score()
    with pytest.warns(UserWarning, match=r"'0' takes \d+% of the budget"):
        steep.allocate(12)
    testing.check_allocator(Steep(model))  # warnings are errors in this suite
