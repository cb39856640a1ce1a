"""coverage.py: which share of the matrix entries is reached, and what is left out and why."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from helpers.models import zoo
from torch import nn

from minirank import UniformRanks, linear_targets, lora_layers, unwrap, wrap
from minirank.allocators.allocation import Allocation
from minirank.layers.coverage import REASONS, Coverage, LeftOut, coverage


class Packed(nn.Module):
    """A quantised layer: it declares its sizes, and stores two entries in a byte."""

    def __init__(self, d_in, d_out):
        super().__init__()
        self.in_features, self.out_features = d_in, d_out
        self.register_buffer("packed", torch.zeros(d_out * d_in // 2, dtype=torch.uint8))


class Spline(nn.Module):
    """Several numbers for each pair of an input and an output, as in a KAN. They are not packed."""

    def __init__(self, d_in, d_out):
        super().__init__()
        self.in_features, self.out_features = d_in, d_out
        self.kernel = nn.Parameter(torch.zeros(d_out, d_in, 3))
        self.norm = nn.BatchNorm1d(d_out)  # has a counter of integers


class Slopes(nn.Module):
    """An activation that knows its sizes."""

    def __init__(self, d_in, d_out):
        super().__init__()
        self.in_features, self.out_features = d_in, d_out
        self.slope = nn.Parameter(torch.ones(d_in))


class Experts(nn.Module):
    """Matrices of four experts, with biases, and a router, all in bare parameters."""

    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(4, 6, 3))
        self.gate_up_proj_bias = nn.Parameter(torch.zeros(4, 6))
        self.router = nn.Parameter(torch.zeros(4, 3))
        self.position_embeddings = nn.Parameter(torch.zeros(1, 9, 3))
        self.cls = nn.Parameter(torch.zeros(1, 1, 3))


def groups(part):
    return {group.kind: (group.number, group.entries, group.example) for group in part.left_out}


def tied():
    model = nn.ModuleDict({"words": nn.Embedding(9, 4), "up": nn.Linear(4, 6)})
    model["head"] = nn.Linear(4, 9, bias=False)
    model["head"].weight = model["words"].weight
    return model


def weight_normed(layer):
    return nn.utils.parametrizations.weight_norm(layer)


CASES = {  # model, names, reached, {kind: (weights, entries, first module)}
    "all": (lambda: nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3)), ["0"], 6, {}),
    "not selected": (
        lambda: nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 5)),
        ["0"],
        6,
        {"linear layer": (1, 15, "1")},
    ),
    "attention": (
        lambda: nn.TransformerEncoderLayer(4, 2, 8),
        ["linear1", "linear2"],
        64,
        {
            "attention in_proj": (1, 48, "self_attn"),
            "attention out_proj": (1, 16, "self_attn.out_proj"),
        },
    ),
    "attention, its out_proj named": (
        lambda: nn.MultiheadAttention(4, 2, kdim=3, vdim=5, add_bias_kv=True),
        ["out_proj"],
        16,
        {"attention in_proj": (3, 16 + 12 + 20, "")},
    ),
    "convolutions": (
        lambda: nn.Sequential(
            nn.Conv2d(4, 6, 3, groups=2), weight_normed(nn.Conv1d(2, 3, 5)), nn.Linear(2, 2)
        ),
        ["2"],
        4,
        {"convolution": (2, 4 * 6 // 2 * 9 + 2 * 3 * 5, "0")},
    ),
    "recurrent": (
        lambda: nn.Sequential(nn.LSTM(3, 5), nn.GRUCell(3, 2), nn.Linear(2, 2)),
        ["2"],
        4,
        {"recurrent weight": (4, 20 * 3 + 20 * 5 + 6 * 3 + 6 * 2, "0")},
    ),
    "experts": (
        lambda: nn.Sequential(Experts(), nn.Linear(2, 2)),
        ["1"],
        4,
        {"stack of experts": (1, 72, "0.gate_up_proj"), "bare matrix": (1, 12, "0")},
    ),
    "packed": (
        lambda: nn.Sequential(Packed(4, 6), nn.Linear(2, 2)),
        ["1"],
        4,
        {"packed layer": (1, 24, "0")},
    ),
    "sizes without packed data": (
        lambda: nn.Sequential(Spline(4, 6), Slopes(4, 4), nn.Linear(2, 2)),
        ["2"],
        4,
        {"stack of experts": (1, 4 * 6 * 3, "0.kernel")},
    ),
    "tied head": (tied, ["up"], 24, {"tied head": (1, 36, "head")}),
    "tied head, named": (tied, ["up", "head"], 60, {}),
    "lazy": (
        lambda: nn.Sequential(nn.LazyLinear(3), nn.LazyConv1d(3, 2), nn.Linear(2, 2)),
        ["2"],
        4,
        {"lazy layer": (2, 0, "0")},
    ),
    "a computed weight": (
        lambda: nn.Sequential(weight_normed(nn.Linear(2, 3)), nn.Linear(3, 2)),
        ["0"],
        6,
        {"linear layer": (1, 6, "1")},
    ),
    "nothing": (nn.ReLU, [], 0, {}),
}


@pytest.mark.filterwarnings("ignore:Lazy modules")
@pytest.mark.parametrize("case", CASES)
def test_entries_by_hand(case):
    make, names, reached, left_out = CASES[case]
    part = coverage(make(), names)
    assert (part.reached, groups(part)) == (reached, left_out)
    assert part.total == reached + sum(entries for _, entries, _ in left_out.values())
    assert part.share == (reached / part.total if part.total else 1.0)
    assert bool(str(part)) == bool(left_out)


def test_a_shared_module_and_a_shared_weight_count_once():
    shared, twin = nn.Linear(3, 3), nn.Linear(3, 3)
    twin.weight = shared.weight
    for names in (["0"], ["1"], ["2"], ["0", "2"]):
        assert coverage(nn.Sequential(shared, shared, twin), names) == Coverage(9, 9, ())


def test_packing_does_not_change_the_share():
    plain = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    packed = nn.Sequential(Packed(4, 6), copy.deepcopy(plain[1]))
    assert coverage(plain, ["1"]).share == coverage(packed, ["1"]).share == 12 / 36


def test_a_lora_layer_counts_as_its_base():
    model = zoo()
    before = coverage(model, ["like", "body.conv"])
    wrap(model, {"like": 2, "body.conv": 1})
    assert coverage(model, lora_layers(model)) == before
    unwrap(model)
    assert coverage(model, ["like", "body.conv"]) == before


def test_an_allocation_tells_what_is_left_out():
    allocator = UniformRanks(nn.TransformerEncoderLayer(4, 2, 8))
    allocator.score()
    allocation = allocator.allocate(4)
    assert allocation.coverage.share == 0.5
    assert str(allocation).splitlines()[-3:] == [
        "The targets reach 50 % of the model's matrix entries. Left out:",
        "   38 %  1 × attention in_proj (a parameter; see unpack_attention): self_attn",
        "   12 %  1 × attention out_proj (never called; see unpack_attention): self_attn.out_proj",
    ]
    twin = Allocation(allocation.ranks, allocation.costs, 4, method="uniform")
    assert twin.coverage is None
    assert twin == allocation
    assert pickle.loads(pickle.dumps(allocation)).coverage == allocation.coverage


def test_nothing_is_printed_when_all_is_reached():
    allocator = UniformRanks(nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 2)))
    allocator.score()
    assert str(allocator.allocate(4)).splitlines()[-1].startswith("sum")


@pytest.mark.parametrize("length", [10, 60, 5000])
def test_lines_fit_100_columns(length):
    found = tuple(LeftOut(kind, 1000, 10, reason, "x" * length) for kind, reason in REASONS.items())
    text = str(Coverage(0, 20, found)).splitlines()
    assert len(text) == 1 + len(REASONS)
    assert max(map(len, text)) <= 100
    assert ("x" * length in text[1]) == (length == 10)


# ---- the warning of default targets that find little ---------------------------------------------

LITTLE = {
    "packed": lambda: nn.Sequential(*(Packed(8, 8) for _ in range(4)), nn.Linear(8, 8)),
    "a convolutional net": lambda: nn.Sequential(
        *(nn.Conv2d(8, 8, 3) for _ in range(4)), nn.Linear(8, 3)
    ),
    "LSTM": lambda: nn.Sequential(nn.Embedding(5, 8), nn.LSTM(8, 8), nn.Linear(8, 3)),
}
ENOUGH = {
    "linear": lambda: nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3)),
    "an encoder layer": lambda: nn.TransformerEncoderLayer(8, 2, 8),
    "a tied head": tied,
    "convolutions below a large classifier": lambda: nn.Sequential(
        *(nn.Conv2d(2, 2, 3) for _ in range(4)), nn.Linear(32, 32), nn.Linear(32, 3)
    ),
    "a patch embedding": lambda: nn.Sequential(
        nn.Conv2d(3, 32, 16), nn.Linear(32, 32), nn.Linear(32, 32)
    ),
}


@pytest.mark.parametrize("kind", LITTLE)
def test_default_targets_that_find_only_a_head_warn(kind):
    model = LITTLE[kind]()
    with pytest.warns(
        UserWarning, match=r"default targets are '\d' alone, with \d+ % of.*Left out"
    ):
        found = linear_targets(model)
    assert list(linear_targets(model, list(found))) == list(found)  # named: no warning
    wrap(model, dict.fromkeys(found, 1))


def test_the_warning_points_at_the_call_outside_the_package():
    for call in (linear_targets, UniformRanks):
        with pytest.warns(UserWarning, match="default targets") as caught:
            call(LITTLE["packed"]())
        assert caught[0].filename == __file__


@pytest.mark.parametrize("kind", ENOUGH)
def test_ordinary_models_do_not_warn(kind):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert linear_targets(ENOUGH[kind]())


def test_a_wrapped_models_adapters_count_as_found():
    model = nn.Sequential(
        *(nn.Conv2d(4, 4, 3) for _ in range(3)), *(nn.Linear(4, 4) for _ in range(4))
    )
    wrap(model, {"3": 1, "4": 1, "5": 1})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list(linear_targets(model)) == ["6"]
