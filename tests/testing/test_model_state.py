"""`unchanged` sees every kind of change to a model, and to the global random generator."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from minirank import testing


def model():
    result = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)).eval()
    result(torch.ones(2, 3)).sum().backward()
    return result


def replace_a_module(model):
    model[2] = nn.Linear(3, 2)


def replace_a_parameter(model):
    model[0].weight = nn.Parameter(model[0].weight.detach().clone())


def add_a_module(model):
    model.append(nn.Tanh())


CHANGES = {
    "0.weight": lambda m: m[0].weight.data[0, 0].add_(1),
    "0.weight (identity, requires_grad)": lambda m: m[0].weight.requires_grad_(False),
    "0.weight.grad": lambda m: m[0].weight.grad.zero_(),
    "2.bias.grad": lambda m: setattr(m[2].bias, "grad", None),
    "1.running_mean": lambda m: m[1].running_mean.add_(1),
    "module '1' (identity, mode": lambda m: m[1].train(),
    "module '0' (identity, mode": lambda m: m[0].register_forward_hook(lambda *_: None),
    "the global random state": lambda _: torch.rand(1),
    "module '2' (identity": replace_a_module,
    "0.weight (identity": replace_a_parameter,
    "module '3'": add_a_module,
}


@pytest.mark.parametrize("changed", CHANGES)
def test_a_change_is_named(changed):
    with (
        torch.random.fork_rng(),
        pytest.raises(AssertionError) as caught,
        testing.unchanged(tested := model()),
    ):
        CHANGES[changed](tested)
    assert str(caught.value).startswith(changed)
    assert " changed: expected " in str(caught.value)


def test_nan_is_no_change_and_another_nan_or_zero_is_one():
    tested = model()
    tested[1].running_mean[0] = torch.nan
    tested[0].weight.grad[0, 0] = torch.nan
    with testing.unchanged(tested):
        tested(torch.ones(2, 3))
    for change in (lambda x: x.neg_(), lambda x: x.nan_to_num_(0.0)):
        with pytest.raises(AssertionError, match="running_mean changed"), testing.unchanged(tested):
            change(tested[1].running_mean)


def test_a_forward_pass_changes_nothing():
    tested = model()
    with testing.unchanged(tested):
        tested(torch.ones(2, 3))
