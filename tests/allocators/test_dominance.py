"""dominance.py: `allocate` warns where one module takes too much, and only there."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from torch import nn

from minirank import L1RA, SensitivityLoRA, ShareAllocator, UniformRanks, wrap
from minirank.allocators.constraints import Constraints
from minirank.allocators.dominance import dominant_modules, even_ranks, massive_inputs


def linear_stack(count, width=32):
    return nn.Sequential(*[nn.Linear(width, width) for _ in range(count)])


class Given(ShareAllocator):
    """Shares that are given."""

    method = "given"

    def __init__(self, model, shares):
        super().__init__(model)
        self.shares = shares

    def score(self):
        return self.store_scores({str(i): torch.tensor(s) for i, s in enumerate(self.shares)})


def scored(shares):
    allocator = Given(linear_stack(len(shares)), shares)
    allocator.score()
    return allocator


def constraints(names, budget, cost=1, unit="ranks", lower=0, upper=64):
    by_name = [dict.fromkeys(names, value) for value in (cost, lower, upper)]
    return Constraints(budget, unit, *by_name)


def test_allocate_names_the_module_its_share_and_the_bound_to_give():
    allocator = scored([20.0] + 19 * [1.0])
    with pytest.warns(UserWarning, match="of the budget") as caught:
        allocation = allocator.allocate(40)
    assert allocation.ranks["0"] == 21  # 20 / 39 of 40 ranks
    (warning,) = caught
    text = str(warning.message)
    assert text.startswith("'0' takes 52% of the budget: 21 ranks, where an even share is 2;")
    assert "every module gets a rank" in text
    assert warning.filename == __file__  # the caller's line, not one of the library
    (bound,) = re.findall(r"max_rank=(\d+)", text)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bounded = allocator.allocate(40, max_rank=int(bound))
    assert max(bounded.ranks.values()) == int(bound)


def test_the_unit_of_the_budget_decides_what_a_quarter_is():
    names = [str(i) for i in range(20)]
    ranks = {**dict.fromkeys(names, 1), "3": 11}
    in_ranks = constraints(names, 30)
    assert dominant_modules(ranks, in_ranks) == ["3"]
    narrow = {**dict.fromkeys(names, 192), "3": 64}  # its 11 ranks take 16 % of the parameters
    budget = sum(rank * narrow[name] for name, rank in ranks.items())
    assert dominant_modules(ranks, Constraints(budget, "parameters", narrow, *in_ranks[3:])) == []
    wide = {**dict.fromkeys(names, 64), "3": 192}
    budget = sum(rank * wide[name] for name, rank in ranks.items())
    in_parameters = Constraints(budget, "parameters", wide, *in_ranks[3:])
    assert dominant_modules(ranks, in_parameters) == ["3"]


def test_more_than_a_quarter_and_more_than_three_even_ranks():
    names = [str(i) for i in range(20)]
    rest = dict.fromkeys(names, 1)
    assert dominant_modules({**rest, "3": 10}, constraints(names, 40)) == []  # a quarter
    assert dominant_modules({**rest, "3": 11}, constraints(names, 40)) == ["3"]
    four = names[:4]
    assert dominant_modules({"0": 30, "1": 4, "2": 3, "3": 3}, constraints(four, 40)) == []
    assert dominant_modules({"0": 31, "1": 3, "2": 3, "3": 3}, constraints(four, 40)) == ["0"]


def test_tiny_budgets_and_few_modules_are_no_reason():
    names = [str(i) for i in range(20)]
    for budget in (1, 2, 3):
        ranks = {**dict.fromkeys(names, 0), "7": budget}  # an even share is 0
        assert dominant_modules(ranks, constraints(names, budget)) == []
    for count in (1, 2, 3):
        ranks = {**dict.fromkeys(names[:count], 0), "0": 60}
        assert dominant_modules(ranks, constraints(names[:count], 60)) == []


def test_an_even_share_is_not_rounded_down():
    ranks = {"0": 1, "1": 1, "2": 1, "3": 4}  # of seven, the last gets 1 where scores are equal
    bounds = constraints(list(ranks), 7)
    assert even_ranks(bounds)["3"] == 1
    assert dominant_modules(ranks, bounds) == []
    assert dominant_modules({"0": 0, "1": 0, "2": 1, "3": 6}, bounds) == ["3"]


def test_bounds_that_the_user_gave_are_no_reason():
    allocator = scored([1.0] * 20)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert allocator.allocate(40, min_rank={"4": 21}).ranks["4"] == 21
        others = {str(i): 1 for i in range(20) if i != 4}
        assert allocator.allocate(40, max_rank=others).ranks["4"] == 21


def test_the_advised_bound_respects_a_min_rank():
    allocator = scored([60.0] + 19 * [1.0])
    with pytest.warns(UserWarning, match=r"max_rank=8\)"):
        allocator.allocate(60, min_rank={"7": 8})
    allocator.allocate(60, min_rank={"7": 8}, max_rank=8)


def test_the_advised_bound_leaves_room_for_the_budget_where_most_modules_are_narrow():
    narrow = [nn.Linear(1, 8) for _ in range(15)]
    allocator = Given(nn.Sequential(*narrow, *linear_stack(5, 200)), 19 * [1.0] + [100.0])
    allocator.score()
    with pytest.warns(UserWarning, match="of the budget") as caught:
        allocator.allocate(115)  # five times 20 if even, and one for each narrow module
    (bound,) = re.findall(r"max_rank=(\d+)", str(caught[0].message))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert allocator.allocate(115, max_rank=int(bound)).total_rank == 115


def test_massive_inputs_are_judged_together():
    names = [str(i) for i in range(20)]
    ranks = {**dict.fromkeys(names, 1), "3": 8, "5": 8}
    bounds = constraints(names, 34)
    assert dominant_modules(ranks, bounds) == []  # 8 is less than a quarter of 34
    assert dominant_modules(ranks, bounds, massive=["3", "5"]) == ["3", "5"]
    assert dominant_modules(ranks, bounds, massive=["0", "1"]) == []
    assert dominant_modules(ranks, bounds, massive=["3"]) == []


def test_massive_inputs_are_those_of_one_feature_among_many():
    spread, few = torch.ones(100), torch.tensor([100.0, 1.0])
    one = torch.cat([torch.tensor([500.0]), torch.ones(99)])
    matrix = torch.cat([torch.tensor([500.0]), torch.ones(99)]).reshape(10, 10)
    diagonals = {"spread": spread, "few": few, "one": one, "matrix": matrix, "0": torch.zeros(50)}
    assert massive_inputs(diagonals) == {"one": pytest.approx(500 / 599)}


class HasMassiveToken(nn.Module):
    """Twenty layers, of which the last gets one token per sequence with a huge feature."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(32, 32) for _ in range(19)])
        self.last = nn.Linear(32, 32)

    def forward(self, x):
        for layer in self.layers:
            x = x + 0.1 * layer(x).tanh()
        spike = torch.zeros_like(x)
        spike[:, 0, 3] = 1000.0
        return self.last(x + spike)


def massive_allocator(**options):
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(4, 16, 32, generator=generator) for _ in range(8)]
    return SensitivityLoRA(
        HasMassiveToken(), lambda m, x: m(x).square().mean(), batches, progress=False, **options
    )


def test_the_warning_explains_massive_activations():
    allocator = massive_allocator()
    allocator.score()
    with pytest.warns(UserWarning, match=r"'last' takes \d+% .* massive activations") as caught:
        allocator.allocate(60)
    assert re.search(r"One input feature holds (9\d|100)% of", str(caught[0].message))


def test_to_be_sure_is_not_to_be_right():
    allocator = massive_allocator(groups=4)
    allocator.score()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # stability notes it, and allocate warns
        stability = allocator.stability(60)
        bounded = allocator.stability(60, max_rank=6)
        assert allocator.settle(60, max_moved=20).dominant == ("last",)
    assert stability.dominant == ("last",)
    assert "To be sure of that is not to be right" in str(stability)
    assert bounded.dominant == ()
    assert "To be sure" not in str(bounded)


def test_a_net_with_normal_inputs_does_not_warn():
    generator = torch.Generator().manual_seed(1)
    block = [nn.Sequential(nn.Linear(24, 24), nn.GELU(), nn.LayerNorm(24)) for _ in range(12)]
    model = nn.Sequential(*block)
    one_hot = nn.functional.one_hot(torch.arange(24).repeat(4), 24).float()
    for x in (torch.randn(96, 24, generator=generator), one_hot):
        allocator = SensitivityLoRA(model, lambda m, x: m(x).mean(), [x], progress=False)
        allocator.score()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for budget in (1, 5, 12, 24, 96):
                allocator.allocate(budget)


def test_uniform_ranks_and_the_updates_of_l1ra_do_not_warn():
    model = nn.Sequential(nn.Linear(8, 8), *[nn.Linear(64, 64) for _ in range(20)])
    uniform = UniformRanks(model)
    uniform.score()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for budget in (1, 7, 21, 400):
            uniform.allocate(budget)
        stack = linear_stack(20)
        wrap(stack, {**{str(i): 1 for i in range(20)}, "3": 16}, scaling=1.0, gate=1.0)
        optimizer = torch.optim.SGD([p for p in stack.parameters() if p.requires_grad], 0.1)
        l1ra = L1RA(stack, optimizer, l1=0.1, interval=1)
        stack(torch.randn(4, 32)).square().mean().backward()
        optimizer.step()
        l1ra.step()


def test_even_ranks_are_those_of_equal_scores_within_the_bounds():
    names = ["a", "b", "c"]
    assert even_ranks(constraints(names, 9, lower=1)) == {"a": 3, "b": 3, "c": 3}
    assert even_ranks(constraints(names, 9, upper=3)._replace(lower={"a": 3, "b": 0, "c": 0})) == {
        "a": 3,
        "b": 3,
        "c": 3,
    }
