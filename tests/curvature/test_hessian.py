"""hessian.py: both exact diagonals against the dense Hessian of torch.func, on every kind of module they claim."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from models import Conv1DLike
from torch import nn

from minirank.hessian import exact_hessian_diagonal, hessian_diagonal_reference
from minirank.measure import batch_length

# torch.func.hessian's own, in torch 2.13
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")


def dense_diagonal(model, loss_fn, batches, name):
    """The diagonal of the dense Hessian of the sample-weighted mean loss over one layer's real weight."""
    key = f"{name}.weight"

    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, batch):
            return loss_fn(self.model, batch)

    def total(weight):
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            losses = [torch.func.functional_call(Loss(), {f"model.{key}": weight}, (batch,)) for batch in batches]
        sizes = [batch_length(batch) for batch in batches]
        return sum(n * loss for n, loss in zip(sizes, losses, strict=True)) / sum(sizes)

    weight = model.get_parameter(key).detach()
    model.eval()
    hessian = torch.func.hessian(total)(weight).reshape(weight.numel(), weight.numel())
    return hessian.diagonal().reshape(weight.shape)


class Attention(nn.Module):
    """Embedding, attention by the default kernel, LayerNorm, GELU, residuals, a projection called twice, pooling."""

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
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4, bias=False), nn.Sigmoid(), nn.Linear(4, 3))


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


def transposed(model, name, h):
    return h.t() if isinstance(model.get_submodule(name), Conv1DLike) else h


@pytest.mark.parametrize("options", [{}, {"chunk_size": 1}, {"chunk_size": 1000}, {"independent": False}])
@pytest.mark.parametrize("case", CASES)
def test_fast_diagonal_equals_the_dense_hessian(case, options):
    make, batches = CASES[case]
    model = build(make)
    diagonal = exact_hessian_diagonal(model, classify, batches, **options)
    for name, h in diagonal.items():
        dense = dense_diagonal(model, classify, batches, name)
        torch.testing.assert_close(transposed(model, name, h), dense, rtol=1e-12, atol=1e-15, msg=name)
        assert dense.abs().max() > 1e-6


@pytest.mark.parametrize("chunk_size", [1, 7, 1000])
@pytest.mark.parametrize("case", CASES)
def test_reference_equals_the_dense_hessian(case, chunk_size):
    make, batches = CASES[case]
    model = build(make)
    diagonal = hessian_diagonal_reference(model, classify, batches, chunk_size=chunk_size)
    for name, h in diagonal.items():
        dense = dense_diagonal(model, classify, batches, name)
        torch.testing.assert_close(transposed(model, name, h), dense, rtol=1e-12, atol=1e-15, msg=name)


def test_a_quadratic_has_the_hessian_that_algebra_gives():
    """L = mean ‖W x‖² over samples: h(W_ij) = 2 mean_n x_nj² / 1, for every row."""
    model = build(lambda: nn.Sequential(nn.Linear(4, 3, bias=False)))
    x = torch.randn(9, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    h = exact_hessian_diagonal(model, lambda m, b: m(b).square().sum(1).mean(), [x])["0"]
    torch.testing.assert_close(h, (2 * x.square().mean(0)).expand(3, 4), rtol=1e-14, atol=0)


def test_a_loss_that_is_linear_in_a_layer_has_no_curvature_there():
    model = build(lambda: nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)))
    for estimate in (exact_hessian_diagonal, hessian_diagonal_reference):
        h = estimate(model, lambda m, b: m(b).sum(), [torch.ones(2, 4, dtype=torch.float64)])
        assert all(torch.equal(d, torch.zeros_like(d)) for d in h.values())
        assert h["0"].shape == (3, 4)
