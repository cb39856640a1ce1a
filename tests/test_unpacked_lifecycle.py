"""An nn.TransformerEncoder, unpacked, goes through all that the library does, and back."""

from __future__ import annotations

import functools
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from minirank import (
    L1RA,
    SensitivityLoRA,
    ShapLoRA,
    UniformRanks,
    export_peft,
    linear_targets,
    lora_layers,
    merge,
    pack_attention,
    unpack_attention,
    wrap,
)
from minirank.curvature import (
    empirical_fisher,
    exact_hessian_diagonal,
    gauss_newton,
    hutchinson_outputs,
    hutchinson_weights,
    input_second_moment,
)
from minirank.layers.coverage import coverage

LAYERS = [
    f"encoder.layers.0.{name}"
    for name in (
        "self_attn.q",
        "self_attn.k",
        "self_attn.v",
        "self_attn.out",
        "linear1",
        "linear2",
    )
]


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(4, 2, 6, activation="gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1)
        self.head = nn.Linear(4, 3)
        self.double()

    def forward(self, x, padding=None):
        hidden = self.encoder(x, src_key_padding_mask=padding)
        return self.head(hidden[:, 0])


def loss_fn(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def batches():
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(4, 3, 4, generator=generator, dtype=torch.float64),
            torch.randint(0, 3, (4,), generator=generator),
        )
        for _ in range(2)
    ]


CURVATURES = {
    "input moment": input_second_moment,
    "Fisher": empirical_fisher,
    "Gauss-Newton": gauss_newton,
    "Gauss-Newton, sampled": functools.partial(
        gauss_newton, samples=8, generator=torch.Generator().manual_seed(0)
    ),
    "Hessian": exact_hessian_diagonal,
    "Hutchinson, outputs": functools.partial(
        hutchinson_outputs, samples=4, generator=torch.Generator().manual_seed(0)
    ),
    "Hutchinson, weights": functools.partial(
        hutchinson_weights, samples=4, generator=torch.Generator().manual_seed(0)
    ),
}


@pytest.mark.parametrize("name", CURVATURES)
def test_every_curvature_scores_the_linear_layers(name):
    model = Classifier()
    unpack_attention(model)
    found = CURVATURES[name](model, loss_fn, batches())
    assert list(found) == [*LAYERS, "head"]
    for layer, diagonal in found.items():
        assert torch.isfinite(diagonal).all()
        assert diagonal.any(), layer


def test_the_hessian_is_that_of_the_packed_weight():
    """The rows of in_proj_weight, by a second derivative of the packed model."""
    model = Classifier().eval()
    W = model.encoder.layers[0].self_attn.in_proj_weight
    [batch, _] = batches()

    def loss(rows):
        values = {"encoder.layers.0.self_attn.in_proj_weight": rows.view_as(W)}
        logits = torch.func.functional_call(model, values, (batch[0],))
        return F.cross_entropy(logits, batch[1])

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        full = torch.autograd.functional.hessian(loss, W.detach().reshape(-1))
    expected = full.diagonal().view_as(W).chunk(3)
    unpack_attention(model)
    found = exact_hessian_diagonal(model, loss_fn, [batch], LAYERS[:3])
    for name, diagonal in zip(LAYERS[:3], expected, strict=True):
        torch.testing.assert_close(found[name], diagonal, rtol=1e-9, atol=1e-12)


def test_reach_before_and_after():
    model = Classifier()
    assert coverage(model, linear_targets(model)).share == pytest.approx(60 / 124)
    unpack_attention(model)
    assert coverage(model, linear_targets(model)).share == 1
    assert not coverage(model, linear_targets(model)).left_out
    pack_attention(model)
    assert coverage(model, linear_targets(model)).share == pytest.approx(60 / 124)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_scored_wrapped_trained_by_l1ra_merged_and_packed():
    model, data = Classifier(), batches()
    names = [name for name, _ in model.named_parameters()]
    attention = model.encoder.layers[0].self_attn
    W = attention.in_proj_weight
    before = W.detach().clone()
    padding = torch.zeros(4, 3, dtype=torch.bool)
    padding[0, 2] = True
    unpack_attention(model)
    allocator = SensitivityLoRA(model, loss_fn, data, progress=False)
    allocator.score()
    allocation = allocator.allocate(14, min_rank=1)
    assert allocation.coverage.share == 1
    wrap(model, allocation, gate=1.0, scaling=2.0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    l1ra = L1RA(model, optimizer, l1=5.0, interval=5, stop=18)
    losses = []
    for step in range(20):
        loss = loss_fn(model, data[step % 2])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        l1ra.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    ranks = {name: layer.rank for name, layer in lora_layers(model).items()}
    assert ranks != dict(allocation.ranks)  # L1RA has moved some
    model.eval()
    expected = model(data[0][0]), model(data[0][0], padding)
    merge(model)
    pack_attention(model)
    assert model.encoder.layers[0].self_attn is attention
    assert attention.in_proj_weight is W
    assert not torch.allclose(W, before)
    with torch.no_grad():  # the fast paths, too
        found = model(data[0][0]), model(data[0][0], padding)
    for value, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-12, atol=1e-12)
    assert [n for n, _ in model.named_parameters() if "self_attn" in n] == [
        name for name in names if "self_attn" in name
    ]


def test_shaplora_scores_the_ranks():
    model, data = Classifier(), batches()
    unpack_attention(model)
    layers = wrap(model, dict.fromkeys(LAYERS, 2), gate=0.0)
    with torch.no_grad():
        for layer in layers.values():
            layer.gate.fill_(0.5)
    allocator = ShapLoRA(model, loss_fn, data)
    scores = allocator.score()
    assert list(scores) == LAYERS
    assert sum(allocator.allocate(8).ranks.values()) == 8


def test_peft_adapts_the_unpacked_model_and_its_merged_model_packs(tmp_path):
    peft = pytest.importorskip("peft")
    model, twin = Classifier().eval(), Classifier().eval()
    for each in (model, twin):
        unpack_attention(each)
    layers = wrap(model, {name: 1 + i % 2 for i, name in enumerate(LAYERS)}, scaling=2.0)
    with torch.no_grad():
        for layer in layers.values():
            nn.init.normal_(layer.lora_B, std=0.3)
    x = batches()[0][0]
    expected = model(x)
    export_peft(model, tmp_path)
    adapted = peft.PeftModel.from_pretrained(twin, tmp_path)
    torch.testing.assert_close(adapted(x), expected, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="without PEFT's modules"):
        pack_attention(adapted)
    merged = adapted.merge_and_unload()
    assert pack_attention(merged) == ["encoder.layers.0.self_attn"]
    with torch.no_grad():
        torch.testing.assert_close(merged(x), expected, rtol=1e-6, atol=1e-6)


def test_the_packed_model_is_told_by_peft_export_and_by_scores(tmp_path):
    name = "encoder.layers.0.self_attn.out_proj"
    model = Classifier()
    with pytest.raises(ValueError, match=r"unpack_attention\(model\) first"):
        input_second_moment(model, loss_fn, batches(), [name])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        UniformRanks(model)
    wrap(model, {name: 1})
    with pytest.raises(ValueError, match=r"unpack_attention\(model\) before wrap\(\)"):
        export_peft(model, tmp_path)
    with pytest.raises(ValueError, match="its out_proj has an adapter"):
        unpack_attention(model)
