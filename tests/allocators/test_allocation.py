"""allocation.py and table.py: the record, its table, and the rules every allocator shares."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import re
import weakref

import pytest
import torch
from torch import nn

from minirank import (
    Allocation,
    RankScoreAllocator,
    ShareAllocator,
    UniformRanks,
    lora_layers,
    resize,
    wrap,
)
from minirank.allocators.table import arrange


def mlp():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))


class ByHand:
    """Scores given by hand."""

    method = "by hand"

    def __init__(self, model, scores):
        super().__init__(model)
        self.scores = scores

    def score(self):
        return self.store_scores(
            {name: torch.tensor(score, dtype=torch.float64) for name, score in self.scores.items()}
        )


class Shares(ByHand, ShareAllocator):
    """() for each module"""


class RankScores(ByHand, RankScoreAllocator):
    """(r,) for each module"""


def scored(model, scores, kind=Shares):
    allocator = kind(model, scores)
    allocator.score()
    return allocator


# ---- allocate ----------------------------------------------------------------------------------


def test_allocate_before_score_says_so():
    with pytest.raises(RuntimeError, match="call score"):
        UniformRanks(mlp()).allocate(4)


def test_ranks_and_costs_follow_the_shares():
    allocation = scored(mlp(), {"0": 3.0, "2": 1.0}).allocate(4)
    assert allocation == Allocation({"0": 3, "2": 1}, {"0": 14, "2": 12}, 4, "ranks", "by hand")
    assert allocation.total_rank == 4
    assert allocation.parameters == 3 * 14 + 12


def test_a_rank_never_exceeds_the_smaller_dimension():
    assert scored(mlp(), {"0": 0.0, "2": 1.0}).allocate(9).ranks == {"0": 5, "2": 4}


def test_parameter_budget_counts_trainable_parameters():
    model = mlp()
    allocation = scored(model, {"0": 1.0, "2": 1.0}).allocate(55, unit="parameters")
    assert allocation.ranks == {
        "0": 2,
        "2": 2,
    }  # 52; a third rank of the cheaper module would need 12 more
    wrap(model, allocation)
    adapters = [p.numel() for p in model.parameters() if p.requires_grad]
    assert sum(adapters) == allocation.parameters == 52


def test_bounds_for_all_or_by_name():
    allocator = scored(mlp(), {"0": 1.0, "2": 0.0})
    assert allocator.allocate(5, min_rank=1).ranks == {"0": 4, "2": 1}
    assert allocator.allocate(5, min_rank={"2": 2}).ranks == {"0": 3, "2": 2}
    assert allocator.allocate(5, max_rank={"0": 2}).ranks == {"0": 2, "2": 3}
    assert allocator.allocate(5, max_rank=3).ranks == {"0": 3, "2": 2}


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"budget": 11}, "above the 10 that all modules"),
        ({"budget": 3, "min_rank": 2}, "below the 4 that min_rank takes"),
        ({"budget": -1}, "below the 0"),
        ({"budget": 4, "unit": "rank"}, "unit must be 'ranks' or 'parameters', got 'rank'"),
        ({"budget": 4, "min_rank": -1}, "min_rank must be integers of at least 0"),
        ({"budget": 4, "max_rank": 1.5}, "max_rank must be integers"),
        ({"budget": 4, "min_rank": {"1": 1}}, r"min_rank names \['1'\], which were not scored"),
        ({"budget": 4, "min_rank": {"0": 7}}, r"min_rank=7 of '0' is above min\(d_out, d_in\) = 6"),
        ({"budget": 4, "min_rank": 3, "max_rank": 2}, "min_rank ≤ max_rank"),
        ({"budget": 4.0}, "budget must be an integer"),
    ],
)
def test_what_cannot_be_met_is_an_error_that_says_why(arguments, match):
    with pytest.raises(ValueError, match=match):
        scored(mlp(), {"0": 1.0, "2": 1.0}).allocate(**arguments)


def test_a_budget_in_the_other_unit_is_told_so():
    allocator = scored(mlp(), {"0": 1.0, "2": 1.0})
    for budget, hinted in ((11, False), (20, False), (52, True)):
        with pytest.raises(ValueError, match="above the 10") as error:
            allocator.allocate(budget)
        assert ('unit="parameters"' in str(error.value)) == hinted
    for budget, hinted in ((1, False), (2, True), (8, True)):
        with pytest.raises(ValueError, match="below the 26 that min_rank takes") as error:
            allocator.allocate(budget, unit="parameters", min_rank=1)
        assert ('unit="ranks"' in str(error.value)) == hinted
    nothing = allocator.allocate(8, unit="parameters")
    with pytest.raises(ValueError, match=r"every rank is 0.*budget of parameters"):
        wrap(mlp(), nothing)


def test_bounds_take_names_with_a_wrapper():
    model = torch.nn.DataParallel(mlp())
    allocator = scored(model, {"0": 1.0, "2": 1.0})
    assert allocator.allocate(4, min_rank={"module.0": 3}).ranks == {"0": 3, "2": 1}


def test_scores_per_rank_give_masks():
    model = mlp()
    wrap(model, {"0": 3, "2": 2})
    allocation = scored(model, {"0": [0.1, 5.0, 0.2], "2": [0.3, 0.0]}, RankScores).allocate(3)
    assert allocation.ranks == {"0": 2, "2": 1}
    assert {name: mask.tolist() for name, mask in allocation.keep.items()} == {
        "0": [False, True, True],
        "2": [True, False],
    }
    kept = lora_layers(model)["0"].lora_A.detach()[1:].clone()
    resize(model, allocation)
    assert torch.equal(lora_layers(model)["0"].lora_A, kept)


def test_scores_per_rank_go_stale_when_ranks_change():
    model = mlp()
    wrap(model, {"0": 3, "2": 2})
    allocator = scored(model, {"0": [0.1, 5.0, 0.2], "2": [0.3, 0.0]}, RankScores)
    resize(model, allocator.allocate(4))
    with pytest.raises(RuntimeError, match="stale: '2' was resized"):
        allocator.allocate(4)


def test_a_layer_that_is_swapped_for_one_of_the_same_rank_is_noticed():
    model = mlp()
    wrap(model, {"0": 3, "2": 2})
    allocator = scored(model, {"0": [0.1, 5.0, 0.2], "2": [0.3, 0.0]}, RankScores)
    resize(model, {"0": 2})
    resize(model, {"0": 3})
    with pytest.raises(RuntimeError, match="stale: '0' was resized"):
        allocator.allocate(4)


def test_scores_do_not_keep_old_parameters_alive():
    model = mlp()
    wrap(model, {"0": 3, "2": 2})
    allocator = scored(model, {"0": [0.1, 5.0, 0.2], "2": [0.3, 0.0]}, RankScores)
    old = weakref.ref(lora_layers(model)["0"].lora_A)
    assert old() is not None
    resize(model, {"0": 2})
    assert old() is None
    with pytest.raises(RuntimeError, match="stale: '0' was resized"):
        allocator.allocate(4)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_of_model_and_allocator_knows_its_scores(clone):
    model = mlp()
    wrap(model, {"0": 3, "2": 2})
    allocator = scored(model, {"0": [0.1, 5.0, 0.2], "2": [0.3, 0.0]}, RankScores)
    twin = clone(allocator)
    assert twin.allocate(3) == allocator.allocate(3)
    resize(twin.model, {"0": 1})
    with pytest.raises(RuntimeError, match="stale: '0' was resized"):
        twin.allocate(3)
    assert allocator.allocate(3).total_rank == 3


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_knows_that_its_scores_are_stale(clone):
    model = mlp()
    wrap(model, {"0": 3, "2": 2})
    allocator = scored(model, {"0": [0.1, 5.0, 0.2], "2": [0.3, 0.0]}, RankScores)
    resize(model, {"0": 2})
    resize(model, {"0": 3})
    for copied in (clone(allocator), clone(clone(allocator))):
        with pytest.raises(RuntimeError, match="stale: '0' was resized"):
            copied.allocate(3)


def test_scores_hold_while_the_model_is_converted_or_loaded_and_not_when_a_factor_is_replaced():
    model = mlp()
    layers = wrap(model, {"0": 3, "2": 2})
    allocator = scored(model, {"0": [0.1, 5.0, 0.2], "2": [0.3, 0.0]}, RankScores)
    before = torch.__future__.get_swap_module_params_on_conversion()
    for swap in (True, False):
        torch.__future__.set_swap_module_params_on_conversion(swap)
        try:
            model.double()
            model.load_state_dict(copy.deepcopy(model.state_dict()))
            model.float()
        finally:
            torch.__future__.set_swap_module_params_on_conversion(before)
        assert allocator.allocate(3).total_rank == 3
    layers["0"].lora_A = nn.Parameter(torch.ones(3, layers["0"].in_features))
    with pytest.raises(RuntimeError, match="stale: '0' was resized"):
        allocator.allocate(3)


def test_scores_of_the_wrong_kind_are_told_so():
    with pytest.raises(ValueError, match=r"'0' has shape \(2,\): expected one share, \(\)"):
        scored(mlp(), {"0": [1.0, 2.0], "2": 1.0}).allocate(2)
    model = mlp()
    wrap(model, {"0": 3})
    for scores, match in (
        ({"0": [1.0, 2.0]}, r"'0' has shape \(2,\): expected one score per existing rank, \(3,\)"),
        ({"0": 1.0}, r"'0' has shape \(\)"),
        ({"2": [1.0, 2.0]}, "expected scores of LoRA layers, and '2' is none"),
    ):
        with pytest.raises(ValueError, match=match):
            scored(model, scores, RankScores)


def test_shares_of_a_layer_that_is_gone_are_stale():
    model = mlp()
    allocator = scored(model, {"0": 1.0, "2": 1.0})
    model[2] = nn.Identity()
    with pytest.raises(RuntimeError, match="no longer has a linear layer '2'"):
        allocator.allocate(4)


def test_changing_the_returned_scores_does_not_change_the_allocation():
    allocator = Shares(mlp(), {"0": 3.0, "2": 1.0})
    allocator.score()["0"].zero_()
    assert allocator.allocate(4).ranks == {"0": 3, "2": 1}


def test_shares_serve_several_budgets_and_survive_wrapping():
    model = mlp()
    allocator = scored(model, {"0": 1.0, "2": 1.0})
    wrap(model, allocator.allocate(4))
    assert allocator.allocate(6).ranks == {"0": 3, "2": 3}


# ---- uniform -----------------------------------------------------------------------------------


def test_uniform_is_the_same_rank_everywhere_and_the_first_modules_get_the_rest():
    allocator = UniformRanks(mlp())
    assert {name: score.item() for name, score in allocator.score().items()} == {"0": 1, "2": 1}
    assert allocator.allocate(4).ranks == {"0": 2, "2": 2}
    assert allocator.allocate(5).ranks == {"0": 3, "2": 2}


def test_uniform_plans_on_the_meta_device():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4096, 4096), nn.Linear(4096, 11008))
    allocator = UniformRanks(model)
    allocator.score()
    assert allocator.allocate(100_000, unit="parameters").ranks == {"0": 4, "1": 4}


# ---- the record --------------------------------------------------------------------------------

RANKS = {
    "model.layers.0.attn.q": 2,
    "model.layers.0.mlp.up": 12,
    "model.layers.1.attn.q": 0,
    "head": 4,
}


def allocation():
    return Allocation(RANKS, dict.fromkeys(RANKS, 10), 18, "ranks", "some method")


def test_the_record_is_frozen_and_pickles():
    with pytest.raises(dataclasses.FrozenInstanceError):
        allocation().budget = 3
    assert pickle.loads(pickle.dumps(allocation())) == allocation()


def test_the_table_shows_every_rank_sums_and_totals():
    text = str(allocation())
    lines = text.splitlines()
    assert lines[0] == "some method: 18 ranks, 180 parameters (budget 18 ranks)"
    assert [line.split() for line in lines[1:]] == [
        ["attn", "mlp"],
        ["q", "up", "head", "sum"],
        ["model.layers.0", "2", "▋", "12", "████", "14"],
        ["model.layers.1", "·", "0"],
        ["4", "█▍", "4"],
        ["sum", "2", "12", "4", "18"],
        ["·", "is", "rank", "0:", "no", "adapter"],
    ]
    assert (
        len({line.rfind(line.split()[-1]) + len(line.split()[-1]) for line in lines[2:-1]}) == 1
    )  # sums line up


def test_layers_are_told_from_kinds_at_the_first_number():
    grid = arrange({"h.0.mlp.0.fc": 1, "h.0.mlp.2.fc": 2, "h.1.mlp.0.fc": 3, "h.10": 4, "a.b": 5})
    assert grid.rows == ["h.0", "h.1", "h.10", "a"]
    assert grid.columns == ["mlp.0.fc", "mlp.2.fc", "", "b"]
    assert grid.ranks == {(0, 0): 1, (0, 1): 2, (1, 0): 3, (2, 2): 4, (3, 3): 5}


def test_an_empty_or_all_zero_allocation_prints():
    assert "0 ranks" in str(Allocation({"a": 0}, {"a": 3}, 0))
    assert "0 ranks" in str(Allocation({}, {}, 0))


def test_rank_pattern_keys_match_one_module_each_and_zero_ranks_are_absent():
    ranks = {"enc.fc": 3, "fc": 2, "x.fc1": 1, "a+b": 5, "off": 0}
    record = Allocation(ranks, dict.fromkeys(ranks, 1), 11)
    for name, rank in ranks.items():
        matches = [
            r for key, r in record.rank_pattern.items() if re.match(rf"(.*\.)?({key})$", name)
        ]
        assert matches == ([rank] if rank else [])
        assert bool(re.fullmatch(record.target_modules, name)) == bool(rank)
    assert not re.fullmatch(record.target_modules, "other.enc.fc")


def test_peft_gives_each_module_its_rank():
    peft = pytest.importorskip("peft")

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 6)
            self.enc = nn.ModuleDict({"fc": nn.Linear(6, 6), "off": nn.Linear(6, 6)})

        def forward(self, x):
            return self.enc["off"](self.enc["fc"](self.fc(x)))

    allocation = scored(Model(), {"fc": 1.0, "enc.fc": 3.0, "enc.off": 0.0}).allocate(4)
    config = peft.LoraConfig(
        target_modules=allocation.target_modules,
        rank_pattern=allocation.rank_pattern,
        alpha_pattern=allocation.alpha_pattern(2.0),
    )
    wrapped = peft.get_peft_model(Model(), config)
    layers = [m for m in wrapped.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    assert [layer.scaling["default"] for layer in layers] == [2.0, 2.0]
    got = {n: p.shape[0] for n, p in wrapped.named_parameters() if "lora_A" in n}
    assert got == {
        "base_model.model.fc.lora_A.default.weight": 1,
        "base_model.model.enc.fc.lora_A.default.weight": 3,
    }


def test_the_heat_map_shows_the_table(tmp_path):
    pytest.importorskip("matplotlib")
    figure = allocation().plot(str(tmp_path / "ranks.png"))
    assert (tmp_path / "ranks.png").stat().st_size > 1000
    axes = figure.axes[0]
    assert sorted(text.get_text() for text in axes.texts) == ["0", "12", "2", "4"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["attn\nq", "mlp\nup", "head"]
    assert "some method" in axes.get_title()


def test_plotting_without_matplotlib_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'minirank\[plot\]'"):
        allocation().plot()
