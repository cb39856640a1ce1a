"""wrap → train → resize → save → load → resize → merge → unmerge → unwrap on random models.

Whatever the shape of the model, the functions in between are the ones built by hand, and the base
comes out as it went in, bit for bit.
"""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.models import (
    Conv1DLike,
    LinearLike,
    assert_unchanged,
    randomize,
    same_bits,
    snapshot,
    with_deltas_by_hand,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from minirank import (
    linear_targets,
    load_adapter,
    lora_layers,
    merge,
    resize,
    save_adapter,
    unmerge,
    unwrap,
    wrap,
)
from minirank.layers.modules import all_names

SIZES = st.integers(1, 5)


@st.composite
def models(draw):
    """A chain of linear-like layers of odd shapes, nested at random.

    Some are used twice, some have a tied weight.
    """
    torch.manual_seed(draw(st.integers(0, 99)))
    chain, width = [], draw(SIZES)
    d_in = width
    for _ in range(draw(st.integers(1, 6))):
        kind = draw(
            st.sampled_from(["linear", "no bias", "conv", "like", "norm", "shared", "tied"])
        )
        earlier = [
            m
            for m in chain
            if getattr(m, "in_features", None) == width and isinstance(m, nn.Linear)
        ]
        d_out = draw(SIZES)
        if kind in ("shared", "tied") and earlier:
            module = draw(st.sampled_from(earlier))
            d_out = module.out_features
            if kind == "tied":
                weight, module = module.weight, nn.Linear(width, d_out)
                module.weight = weight
        elif kind == "norm":
            module, d_out = nn.LayerNorm(width), width
        elif kind == "conv":
            module = Conv1DLike(d_out, width)
        elif kind == "like":
            module = LinearLike(width, d_out)
        else:
            module = nn.Linear(width, d_out, bias=kind == "linear")
        for parameter in module.parameters():
            parameter.requires_grad_(draw(st.booleans()))
        chain.append(module)
        width = d_out
    chain.append(nn.Linear(width, 2))  # one linear layer at least
    while len(chain) > 2 and draw(st.booleans()):  # nest a stretch of it
        start = draw(st.integers(0, len(chain) - 2))
        stop = draw(st.integers(start + 1, len(chain) - 1))
        chain[start:stop] = [nn.Sequential(*chain[start:stop])]
    return nn.Sequential(*chain).double().train(draw(st.booleans())), d_in


def largest_rank(module):
    return min(module.weight.shape)


@pytest.mark.filterwarnings(
    "ignore:.*require a gradient:UserWarning"
)  # the models' own parameters may, at random
@settings(max_examples=500, deadline=None)
@given(model_and_width=models(), data=st.data())
def test_a_whole_life_leaves_the_base_bit_for_bit(tmp_path_factory, model_and_width, data):
    model, width = model_and_width
    plain, before = copy.deepcopy(model), snapshot(model)
    x = torch.randn(3, width, dtype=torch.float64)

    def same_as_by_hand():
        torch.testing.assert_close(
            model(x), with_deltas_by_hand(plain, layers)(x), rtol=1e-9, atol=1e-9
        )

    ranks = {
        n: data.draw(st.integers(0, largest_rank(m)), label=n)
        for n, m in linear_targets(model).items()
    }
    some_name = next(iter(ranks))
    ranks[some_name] = max(ranks[some_name], 1)
    aliases = {name: data.draw(st.sampled_from(all_names(model)[name])) for name in ranks}
    gate = data.draw(st.sampled_from([None, 1.0, 0.0]), label="gate")
    layers = wrap(
        model,
        {aliases[name]: rank for name, rank in ranks.items()},
        gate=gate,
        alpha=2.0,
        trainable=None,
    )
    assert {name: layer.rank for name, layer in layers.items()} == {
        n: r for n, r in ranks.items() if r
    }
    assert torch.equal(model(x), plain(x))

    randomize(layers)
    same_as_by_hand()
    optimizer = torch.optim.Adam(
        [p for layer in layers.values() for p in layer.parameters(recurse=False)]
    )
    for new_ranks in (
        None,
        {n: data.draw(st.integers(0, largest_rank(x.base))) for n, x in layers.items()},
    ):
        if new_ranks is not None:
            grown = all(rank >= layers[name].rank for name, rank in new_ranks.items())
            y = model(x)
            resize(model, new_ranks, optimizer)
            assert {name: layer.rank for name, layer in layers.items()} == new_ranks
            if grown:
                torch.testing.assert_close(model(x), y, rtol=1e-12, atol=1e-12)
        optimizer.zero_grad()
        loss = model(x).square().mean()
        if loss.requires_grad:  # not where every rank is 0 and every parameter frozen
            loss.backward()
        optimizer.step()
        same_as_by_hand()
        for layer in layers.values():
            for parameter in layer.parameters(recurse=False):
                assert optimizer.state[parameter]["exp_avg"].shape == parameter.shape

    path = tmp_path_factory.mktemp("life") / "adapter"
    save_adapter(model, path)
    loaded = copy.deepcopy(plain)
    before_loading = snapshot(loaded)
    load_adapter(loaded, path)
    ours, theirs = dict(model.named_parameters()), dict(loaded.named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(same_bits(ours[name], theirs[name]) for name in ours)
    assert torch.equal(loaded(x), model(x))
    assert unwrap(model) == list(layers)
    model.zero_grad()
    assert_unchanged(model, before)

    model, before, layers = loaded, before_loading, lora_layers(loaded)
    resize(model, {name: data.draw(st.integers(0, layer.rank)) for name, layer in layers.items()})
    wrapped = snapshot(model)
    assert merge(model, untie=True) == list(layers)
    same_as_by_hand()
    assert unmerge(model) == list(layers)
    assert_unchanged(model, wrapped)
    same_as_by_hand()
    assert unwrap(model) == list(layers)
    assert not lora_layers(model)
    assert_unchanged(model, before)
