"""names.py: names without the wrappers of torch.compile, DataParallel, DistributedDataParallel."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from minirank import linear_targets, lora_layers, merge, resize, unmerge, unwrap, wrap
from minirank.layers.names import named_modules, plain_name


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.body(x))


NAMES = ["body.0", "body.2", "head"]
X = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(3, 4)


def net():
    torch.manual_seed(0)
    return Net().double()


def compiled(module):
    return torch.compile(module, backend="eager")


def with_compiled_body(model):
    model.body = compiled(model.body)
    return model


WRAPPED = {
    "compiled": compiled,
    "parallel": nn.DataParallel,
    "compiled, then parallel": lambda model: nn.DataParallel(compiled(model)),
    "parallel, then compiled": lambda model: compiled(nn.DataParallel(model)),
    "a compiled block": with_compiled_body,
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_wrappers_leave_no_trace_in_names(kind):
    plain, model = net(), WRAPPED[kind](net())
    raw = [name for name, m in model.named_modules() if type(m) is nn.Linear]
    assert raw != NAMES  # what PyTorch calls them
    assert list(linear_targets(model)) == NAMES
    assert list(linear_targets(model, "body.*")) == NAMES[:2]
    layers = wrap(model, {"body.2": 2, "head": 1})
    assert list(layers) == list(lora_layers(model)) == NAMES[1:]
    torch.testing.assert_close(model(X), plain(X), rtol=0, atol=1e-12)
    for layer in layers.values():
        nn.init.ones_(layer.lora_B)
    assert (model(X) - plain(X)).abs().max() > 0.01  # the wrapper calls the adapters
    assert list(resize(model, {"head": 2})) == ["head"]
    assert merge(model) == unmerge(model) == NAMES[1:]
    assert unwrap(model) == NAMES[1:]


@pytest.mark.parametrize("kind", WRAPPED)
def test_names_with_a_wrapper_are_understood(kind):
    model = WRAPPED[kind](net())
    raw = [name for name, m in model.named_modules() if type(m) is nn.Linear]
    assert list(linear_targets(model, raw)) == NAMES
    assert list(linear_targets(model, raw[0][:-1] + "*")) == NAMES[:2]
    layers = wrap(model, dict.fromkeys(raw[:2], 1), trainable=[raw[2]])
    assert list(layers) == NAMES[:2]
    assert all(parameter.requires_grad for parameter in net_head(model).parameters())
    assert list(resize(model, {raw[1]: 2})) == ["body.2"]


def net_head(model):
    return dict(named_modules(model))["head"]


def test_distributed_data_parallel_leaves_no_trace(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        model = nn.parallel.DistributedDataParallel(net())
        assert list(linear_targets(model)) == NAMES
        assert list(linear_targets(model, "module.body.*")) == NAMES[:2]
    finally:
        torch.distributed.destroy_process_group()


def test_a_child_that_is_called_module_keeps_its_name():
    model = nn.ModuleDict({"module": nn.ModuleDict({"fc": nn.Linear(2, 2)}), "fc": nn.Linear(2, 2)})
    assert list(linear_targets(model, "module.fc")) == ["module.fc"]
    assert plain_name("module.fc", ["fc", "module.fc"]) == "module.fc"


def test_a_layer_with_a_wrapper_of_its_own_is_refused():
    model = net()
    model.head = compiled(model.head)
    assert list(linear_targets(model)) == NAMES
    with pytest.raises(ValueError, match="'head' has a wrapper of its own"):
        wrap(model, {"body.0": 1, "head": 1})
    assert not lora_layers(model)
    with pytest.raises(TypeError, match="the model itself is a Linear"):
        wrap(compiled(nn.Linear(2, 2)), {"": 1})
