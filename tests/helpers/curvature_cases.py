"""Models on which curvature is taken, and their data."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from helpers.models import Conv1DLike
from torch import nn


class Attention(nn.Module):
    """Embedding, attention by the default kernel, LayerNorm, GELU, residuals, a projection called
    twice, pooling."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.qkv = nn.Linear(4, 12)
        self.shared = nn.Linear(4, 4, bias=False)
        self.norm = nn.LayerNorm(4)
        self.conv = Conv1DLike(6, 4)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(6, 3)

    def forward(self, tokens):
        x = self.embed(tokens)
        q, k, v = (t[:, None] for t in self.qkv(x).chunk(3, -1))
        x = x + self.shared(F.scaled_dot_product_attention(q, k, v)[:, 0])
        x = self.norm(x + self.shared(x))
        return self.head(self.drop(F.gelu(self.conv(x))).mean(1))


def classify(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def build(make):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().double()


def mlp():
    return nn.Sequential(
        nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4, bias=False), nn.Sigmoid(), nn.Linear(4, 3)
    )


def encoder_layer():
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(4, 2, 6, activation="gelu", batch_first=True)
            self.head = nn.Linear(4, 3)

        def forward(self, x):
            return self.head(self.layer(x).mean(1))

    return Encoder()


def pairs(shape, sizes, tokens=False):
    generator = torch.Generator().manual_seed(1)
    batches = []
    for n in sizes:
        x = torch.randint(0, 7, (n, *shape), generator=generator) if tokens else None
        x = torch.randn(n, *shape, dtype=torch.float64, generator=generator) if x is None else x
        batches.append((x, torch.randint(0, 3, (n,), generator=generator)))
    return batches


def by_reference(function, model, loss_fn, batches, names):
    """A reference's {name: (d_out, d_in)}; it keeps the layout of the weight, Conv1D's being
    transposed."""
    diagonals = function(model, loss_fn, batches, list(names))
    return {
        name: h.t() if isinstance(model.get_submodule(name), Conv1DLike) else h
        for name, h in diagonals.items()
    }


def assert_equals(estimate, expected, rtol, atol):
    """Two results {name: diagonal} agree for every layer."""
    assert estimate.keys() == expected.keys()
    for name, diagonal in expected.items():
        torch.testing.assert_close(
            estimate[name], diagonal, rtol=rtol, atol=atol, msg=lambda text, n=name: f"{n}: {text}"
        )


def siamese():
    class Siamese(nn.Module):
        def __init__(self):
            super().__init__()
            self.arm = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
            self.head = nn.Linear(4, 3)

        def forward(self, x):
            return self.head(torch.cat([self.arm(x[:, 0]), self.arm(x[:, 1])], 1))

    return Siamese()


def deep_recurrence():
    class Recurrence(nn.Module):
        def __init__(self):
            super().__init__()
            self.step, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            for _ in range(4):
                x = torch.tanh(self.step(x)) + 0.5 * x
            return self.head(x)

    return Recurrence()


CASES = {
    "siamese": (siamese, pairs((2, 3), (2, 3))),
    "recurrence": (deep_recurrence, pairs((4,), (3, 2))),
    "mlp": (mlp, pairs((5,), (3, 8, 1))),
    "attention": (Attention, pairs((3,), (2, 5), tokens=True)),
    "encoder layer": (encoder_layer, pairs((3, 4), (2, 3))),
}
