"""A small gated network, its data and its scores, which the tests of ShapLoRA share."""

from __future__ import annotations

import torch
from helpers.models import Conv1DLike, LinearLike, randomize
from torch import nn

from minirank import ShapLoRA, reference, wrap

RANKS = {"up": 3, "mid": 2, "down": 2}
PLAYERS = 7
SCALING = 1.5


class Net(nn.Module):
    """A nested linear, a transposed one and a look-alike, with layers that differ between training
    and evaluation."""

    def __init__(self, dropout=0.5):
        super().__init__()
        self.up = nn.Linear(5, 6)
        self.mid = Conv1DLike(7, 6)
        self.down = LinearLike(7, 4)
        self.drop = nn.Dropout(dropout)
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x):
        return self.down(torch.tanh(self.mid(self.drop(self.norm(torch.tanh(self.up(x)))))))


def loss_fn(model, batch):
    x, y = batch
    return (model(x) - y).square().mean()


def data(sizes=(4, 6, 1), dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    n = sum(sizes)
    x = torch.randn(n, 5, generator=generator, dtype=torch.float64).to(dtype)
    y = torch.randn(n, 4, generator=generator, dtype=torch.float64).to(dtype)
    return list(zip(x.split(sizes), y.split(sizes), strict=True))


def trained(dtype=torch.float64, seed=0, ranks=RANKS, **options):
    """A wrapped model as if trained: no gate, P or Q is zero, and BatchNorm has seen something."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Net()
        model.norm.running_mean.normal_()
        model.norm.running_var.uniform_(0.5, 2)
        nn.init.uniform_(model.norm.weight, 0.5, 2)
    model = model.to(dtype)
    layers = wrap(model, ranks, **{"gate": 0.0, "alpha": SCALING, "reference_rank": 1, **options})
    randomize(layers, seed)
    return model


def scored(model=None, batches=None, loss=loss_fn, **options):
    allocator = ShapLoRA(
        trained() if model is None else model,
        loss,
        data() if batches is None else batches,
        progress=False,
        **options,
    )
    return allocator.score(), allocator


def flat(scores):
    return torch.cat(list(scores.values()))


def sample_of_sans(model, batches, masks):
    """SAN of every rank in every coalition by the reference: (coalitions, players)."""
    loss, parameters = written_out(model)
    scores = [
        reference.shapley_sensitivity(loss, parameters, batches, mask[None]) for mask in masks
    ]
    return torch.stack([flat(score) for score in scores])


def written_out(model):
    """(loss(params, batch), params) of a `Net`: in evaluation mode, without its modules."""
    norm = model.norm

    def apply(name, x, gate, P, Q):
        base = getattr(model, name).base
        y = x @ (base.weight if name == "mid" else base.weight.T)
        return y + (0 if base.bias is None else base.bias) + SCALING * ((x @ Q.T) * gate) @ P.T

    def loss(params, batch):
        x, y = batch
        h = torch.tanh(apply("up", x, **params["up"]))
        h = (h - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias
        h = torch.tanh(apply("mid", h, **params["mid"]))
        return (apply("down", h, **params["down"]) - y).square().mean()

    layers = {name: getattr(model, name) for name in RANKS}
    return loss, {
        name: {"gate": x.gate.detach(), "P": x.lora_B.detach(), "Q": x.lora_A.detach()}
        for name, x in layers.items()
    }
