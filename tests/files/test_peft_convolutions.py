"""Adapters of convolutions with a kernel of size 1, to PEFT and back, against PEFT itself."""

from __future__ import annotations

import warnings

import peft
import pytest
import torch
from helpers.models import inputs
from helpers.peft_cases import in_peft, made, peft_trained, tensors_of, trained
from torch import nn

from minirank import export_peft, import_peft, lora_layers

CONVOLUTION = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
RANKS = {"up": 2, "down": 3, "head": 1}
SHAPE = (2, 4, 3, 5, 2)


class Net(nn.Module):
    """Two convolutions over channels, and a linear head."""

    def __init__(self, dimensions):
        super().__init__()
        conv = CONVOLUTION[dimensions]
        self.up, self.down = conv(4, 6, 1, dilation=2), conv(6, 4, 1, bias=False)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.down(torch.tanh(self.up(x))).flatten(2).mean(-1))


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_peft_computes_the_same_function_and_it_comes_back(tmp_path, dimensions, portable):
    model = trained(made(Net, dimensions), [(RANKS, {"scaling": 3.0, "gate": 1.0})])
    x = inputs(*SHAPE[: dimensions + 2])
    export_peft(model, tmp_path / "ours", portable=portable)
    theirs = in_peft(made(Net, dimensions), tmp_path / "ours")
    torch.testing.assert_close(theirs(x), model(x), rtol=1e-12, atol=1e-12)
    theirs.save_pretrained(tmp_path / "theirs")
    saved = tensors_of(tmp_path / "theirs")
    assert all(torch.equal(saved[k], v) for k, v in tensors_of(tmp_path / "ours").items())
    again = made(Net, dimensions)
    assert list(import_peft(again, tmp_path / "theirs")) == list(RANKS)
    assert {name: layer.rank for name, layer in lora_layers(again).items()} == RANKS
    torch.testing.assert_close(again(x), model(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_what_peft_trained_is_imported(tmp_path, dimensions):
    plain, x = made(Net, dimensions), inputs(*SHAPE[: dimensions + 2])
    config = peft.LoraConfig(target_modules=["up", "down"], r=2, rank_pattern={"down": 3})
    theirs = peft_trained(plain, config, x, tmp_path)
    model = made(Net, dimensions)
    import_peft(model, tmp_path)
    assert not torch.allclose(model(x), plain(x))
    torch.testing.assert_close(model(x), theirs(x), rtol=1e-12, atol=1e-12)


NOT_LINEAR = r"'up' is of type Conv2d.*kernel 1, stride 1, one group"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stride": 2}, NOT_LINEAR),
        ({"padding": 1}, NOT_LINEAR),
        ({"groups": 2}, r"'up' has shapes.*lora_B.*expected one rank"),  # in groups there too
    ],
    ids=str,
)
def test_other_convolutions_with_such_a_kernel_are_refused_by_name(tmp_path, options, message):
    plain = nn.ModuleDict({"up": made(nn.Conv2d, 4, 4, 1, **options)})
    with warnings.catch_warnings(action="ignore"):  # PEFT cannot merge groups
        theirs = peft.get_peft_model(plain, peft.LoraConfig(target_modules=["up"], r=2))
    theirs.save_pretrained(tmp_path)
    model = nn.ModuleDict({"up": made(nn.Conv2d, 4, 4, 1, **options)})
    with pytest.raises(ValueError, match=message):
        import_peft(model, tmp_path)
