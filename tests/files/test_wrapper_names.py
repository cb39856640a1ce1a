"""Files carry no names of wrappers, and files that have them load."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.models import assert_unchanged, snapshot
from torch import nn

from minirank import (
    UniformRanks,
    export_peft,
    import_peft,
    load_adapter,
    lora_layers,
    read_adapter,
    save_adapter,
    wrap,
)
from minirank.files.safetensors_file import read_safetensors, safetensors_bytes

# Written while minirank put torch.compile's "_orig_mod." into names.
DATA = Path(__file__).parent / "data"


class Net(nn.Module):
    """Its head has a tied twin, which computes nothing here."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        self.words = nn.Embedding(3, 4)
        self.head = nn.Linear(4, 3)
        self.tied = nn.Linear(4, 3)
        self.tied.weight = self.head.weight

    def forward(self, x):
        return self.head(self.body(x))


def net():
    """The weights beside which the files in data/ were trained."""
    model = Net().double()
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            values = torch.linspace(-1, 1 + i, parameter.numel(), dtype=torch.float64)
            parameter.copy_(values.reshape(parameter.shape))
    return model


def compiled(model):
    return torch.compile(model, backend="eager")


X = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(3, 4)
KINDS = {"plain": lambda model: model, "compiled": compiled, "parallel": nn.DataParallel}


def expected(with_head):
    """What the model of the files computes, by hand."""
    model = net()
    A, B = (torch.linspace(-1, 1, 8).reshape(shape).double() for shape in ((2, 4), (4, 2)))
    with torch.no_grad():
        model.body[0].weight += 2.0 * B @ A
        model.head.bias += 1 if with_head else 0
        return model(X)


@pytest.mark.parametrize("kind", KINDS)
def test_an_early_file_of_a_compiled_model_loads(kind):
    path = DATA / "compiled_0_2.safetensors"
    assert list(read_adapter(path).ranks) == ["_orig_mod.body.0"]
    model = KINDS[kind](net())
    assert list(load_adapter(model, path)) == ["body.0"]
    torch.testing.assert_close(model(X), expected(with_head=True), rtol=0, atol=1e-12)
    trained = [id(parameter) for parameter in model.parameters() if parameter.requires_grad]
    head = model.module.head if kind == "parallel" else model.head
    assert {id(head.weight), id(head.bias)} <= set(trained)
    assert len(trained) == 4


@pytest.mark.parametrize("kind", KINDS)
def test_an_early_peft_folder_of_a_compiled_model_loads(kind):
    model = KINDS[kind](net())
    assert list(import_peft(model, DATA / "compiled_peft_0_2")) == ["body.0"]
    torch.testing.assert_close(model(X), expected(with_head=False), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_new_files_are_the_same_whatever_wraps_the_model(kind, tmp_path):
    files = {}
    for name, make in {"plain": KINDS["plain"], kind: KINDS[kind]}.items():
        model = make(net())
        allocator = UniformRanks(model, ["body.*"])
        allocator.score()
        allocation = allocator.allocate(3)
        assert allocation.target_modules == r"(body\.0)"
        wrap(model, allocation, trainable=["head"])
        save_adapter(model, tmp_path / name, allocation=allocation)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        export_peft(model, tmp_path / f"peft {name}")
        files[name] = [
            (tmp_path / name).read_bytes(),
            *(path.read_bytes() for path in sorted((tmp_path / f"peft {name}").iterdir())),
        ]
    assert files["plain"] == files[kind]
    again = KINDS[kind](net())
    assert list(load_adapter(again, tmp_path / "plain")) == ["body.0"]


def test_a_file_with_two_layers_for_one_is_refused(tmp_path):
    shutil.copytree(DATA / "compiled_peft_0_2", tmp_path / "folder")
    file, config = (
        tmp_path / "folder/adapter_model.safetensors",
        tmp_path / "folder/adapter_config.json",
    )
    tensors, _ = read_safetensors(file)
    twins = {key.replace("_orig_mod.", ""): value.clone() for key, value in tensors.items()}
    file.write_bytes(safetensors_bytes(tensors | twins, {"format": "pt"}))
    record = json.loads(config.read_text())
    record["rank_pattern"] = {}
    config.write_text(json.dumps(record))
    model = net()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"the model has no '_orig_mod\.body\.0'"):
        import_peft(model, tmp_path / "folder")
    assert_unchanged(model, before)
    assert not lora_layers(model)
