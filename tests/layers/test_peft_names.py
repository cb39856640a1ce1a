"""Which form of names a model gets for PEFT. (What PEFT makes of them: test_expert_models.py.)"""

from __future__ import annotations

import sys
import types
import warnings

import pytest
import torch
from torch import nn

from minirank import UniformRanks, wrap
from minirank.layers.peft_names import PeftNames, peft_names, target_modules


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.is_transposed = nn.Parameter(torch.ones(2, 4, 4)), False


def model_with(**modules):
    return nn.ModuleDict({"experts": Experts(), **modules})


def test_models_with_stacks_get_lists_of_full_names():
    model = model_with(q=nn.Linear(4, 4), v=nn.Linear(4, 4))
    assert peft_names(model, ["q", "v"]) == PeftNames(as_list=True)
    assert target_modules(["q", "v"], as_list=True) == ["q", "v"]
    wrap(model, {"experts.up": 1, "q": 1})
    assert peft_names(model, ["q", "v"]) == PeftNames(as_list=True)
    del model["experts"]
    assert peft_names(model, ["q", "v"]) == PeftNames()


def test_a_name_that_ends_another_ones_needs_an_expression():
    for inner in (nn.Linear(4, 4), nn.ReLU()):
        model = model_with(q=nn.Linear(4, 4), xq=nn.Linear(4, 4), deep=nn.ModuleDict({"q": inner}))
        assert not peft_names(model, ["q"]).as_list
        assert peft_names(model, ["xq", "deep.q"]).as_list


def test_names_are_misread_in_known_families_alone(monkeypatch):
    mapping = types.SimpleNamespace(
        _MODEL_TO_CONVERSION_PATTERN={"known": "qwen2_moe", "v": "llava"}
    )
    monkeypatch.setitem(sys.modules, "transformers.conversion_mapping", mapping)
    model = model_with(down_proj=nn.Linear(4, 4), xdown_proj=nn.Linear(4, 4))
    names = ["down_proj", "xdown_proj"]
    for family, misread in {"known": ("down_proj",), "v": (), "other": (), None: ()}.items():
        model.config = types.SimpleNamespace(model_type=family)
        assert peft_names(model, names).misread == misread
    model.config.model_type = "known"
    allocator = UniformRanks(model)
    allocator.score()
    with pytest.warns(UserWarning, match=r"'down_proj': PEFT .* takes such names") as caught:
        assert allocator.allocate(2).target_modules == names
    assert [warning.filename for warning in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        print(allocator.allocate(2))  # who does not go to PEFT hears nothing of it
        assert allocator.allocate(1, max_rank={"down_proj": 0}).target_modules == ["xdown_proj"]
    monkeypatch.delitem(sys.modules, "transformers.conversion_mapping")
    assert peft_names(model, names) == PeftNames(as_list=True)
