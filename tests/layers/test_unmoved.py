"""An optimizer that was made before `wrap` is noticed, and no other."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from minirank import load_adapter, merge, save_adapter, unwrap, wrap
from minirank.layers import unmoved


def small_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))


def train(model, optimizers, steps=6, accumulation=1):
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(1))
    for _ in range(steps):
        for optimizer in optimizers:
            optimizer.zero_grad()
        for _ in range(accumulation):
            model(x).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()


def sgd(model, trained=False):
    return torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad or not trained], lr=0.1
    )


def adapters(model):
    return [p for name, p in model.named_parameters() if "lora_" in name]


def test_an_optimizer_made_before_wrap_is_named_once_at_the_line_of_its_step():
    model = small_model()
    optimizer = sgd(model)
    wrap(model, {"0": 2, "2": 1})
    before = [parameter.clone() for parameter in adapters(model)]
    with pytest.warns(UserWarning, match=r"this SGD was made before wrap") as caught:
        train(model, [optimizer], steps=12)
    assert [warning.filename for warning in caught] == [__file__]
    for parameter, value in zip(adapters(model), before, strict=True):
        torch.testing.assert_close(parameter, value, rtol=0, atol=0)


def test_after_load_adapter_too(tmp_path):
    saved = small_model()
    wrap(saved, {"0": 2})
    save_adapter(saved, tmp_path / "adapter.safetensors")
    model = small_model()
    optimizer = sgd(model)
    load_adapter(model, tmp_path / "adapter.safetensors")
    with pytest.warns(UserWarning, match="made before wrap"):
        train(model, [optimizer])


@pytest.mark.parametrize("gate", [None, 1.0, 0.0])
@pytest.mark.parametrize("trained", [True, False])
def test_an_optimizer_made_after_wrap_says_nothing(gate, trained):
    model = small_model()
    wrap(model, {"0": 2, "2": 1}, gate=gate)
    train(model, [sgd(model, trained)], accumulation=2)


def test_two_optimizers_of_which_the_later_trains_the_adapters_say_nothing():
    model = small_model()
    early = sgd(model)
    wrap(model, {"0": 2})
    train(model, [early, sgd(model, trained=True)])


def test_gradients_of_zero_move_nothing_and_say_nothing():
    model = small_model()
    early = sgd(model)
    wrap(model, {"0": 2})
    late = sgd(model, trained=True)
    for _ in range(6):
        (0.0 * model(torch.ones(1, 6)).sum()).backward()
        early.step()
        late.step()


def test_a_group_added_after_wrap_is_enough():
    model = small_model()
    optimizer = sgd(model)
    wrap(model, {"0": 2})
    optimizer.add_param_group({"params": adapters(model)})
    train(model, [optimizer])


def test_frozen_adapters_and_training_without_them_say_nothing():
    model = small_model()
    optimizer = sgd(model)
    wrap(model, {"0": 2}, trainable=["2"])
    for parameter in adapters(model):
        parameter.requires_grad_(False)
    train(model, [optimizer])


def test_evaluation_and_another_model_say_nothing():
    model, other = small_model(), small_model()
    wrap(model, {"0": 2})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(other, [sgd(other)])


def test_layers_that_were_taken_out_and_are_kept_say_nothing():
    model = small_model()
    layers = [*wrap(model, {"0": 2, "2": 1}).values()]
    train(model, [sgd(model, trained=True)])  # which leaves gradients
    merge(model)
    unwrap(model)
    model.requires_grad_(True)
    train(model, [sgd(model)])  # all of it, without adapters
    layers += wrap(model, {"0": 1, "2": 2}).values()  # as in a second stage
    train(model, [sgd(model)])
    assert layers


def test_layers_taken_out_before_an_optimizer_was_made_say_nothing():
    model = small_model()
    layers = wrap(model, {"0": 2})
    model(torch.ones(2, 6)).sum().backward()
    unwrap(model)
    train(model, [sgd(model)])
    assert layers


def test_adapters_frozen_after_their_training_say_nothing():
    model = small_model()
    wrap(model, {"0": 2}, trainable=["2"])
    train(model, [sgd(model, trained=True)])
    rest = torch.optim.SGD([p for n, p in model.named_parameters() if "lora_" not in n], lr=0.1)
    for parameter in adapters(model):
        parameter.requires_grad_(False)
    train(model, [rest])


def test_a_learning_rate_that_starts_at_zero_says_nothing():
    model = small_model()
    wrap(model, {"0": 2}, trainable=None)
    rest = torch.optim.SGD([p for n, p in model.named_parameters() if "lora_" not in n], lr=0.1)
    train(model, [rest, torch.optim.SGD(adapters(model), lr=0.0)])


def test_layers_that_an_optimizer_trains_cost_other_optimizers_nothing():
    model = small_model()
    layers = wrap(model, {"0": 2, "2": 1})
    assert all(layer in unmoved._wrapped for layer in layers.values())
    train(model, [sgd(model, trained=True)], steps=1)
    assert not any(layer in unmoved._wrapped for layer in layers.values())
