"""Small models, and what they must compute, for several test files."""

from __future__ import annotations

import copy

import torch
from torch import nn

from minirank import LoRALinear, reference, wrap


class Conv1DLike(nn.Module):
    """Like transformers' Conv1D: the weight is stored as (d_in, d_out)."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.randn(nx, nf) / 4)
        self.bias = nn.Parameter(torch.randn(nf) / 4)

    def forward(self, x):
        return x @ self.weight + self.bias


class LinearLike(nn.Module):
    """No nn.Linear, but with its attributes."""

    def __init__(self, d_in, d_out):
        super().__init__()
        self.in_features, self.out_features = d_in, d_out
        self.weight = nn.Parameter(torch.randn(d_out, d_in) / 4)
        self.register_parameter("bias", None)

    def forward(self, x):
        return x @ self.weight.T


class Zoo(nn.Module):
    """Every way for a linear layer to sit in a model.

    Nested, shared under two names, tied, transposed, look-alike.
    """

    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(11, 6)
        self.body = nn.ModuleDict(
            {"up": nn.Linear(6, 8), "norm": nn.LayerNorm(8), "conv": Conv1DLike(6, 8)}
        )
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(2))
        self.alias = self.blocks[0][0]  # the module "blocks.0.0" under a second name
        self.like = LinearLike(6, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.emb.weight

    def forward(self, tokens):
        x = self.emb(tokens)
        x = self.body["conv"](self.body["norm"](torch.tanh(self.body["up"](x))))
        for block in self.blocks:
            x = x + block(x)
        return self.head(x + self.like(self.alias(x)))


ZOO_LINEAR = [
    "body.up",
    "body.conv",
    "blocks.0.0",
    "blocks.1.0",
    "like",
    "head",
]  # by hand, in module order


def zoo(dtype=torch.float64, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Zoo().to(dtype).eval()


RANKS = {"body.up": 2, "body.conv": 3, "blocks.0.0": 1, "like": 6, "head": 4}
TOKENS = torch.tensor([[1, 4, 2], [10, 0, 3]])


def randomize(layers, seed=1):
    """Adapter parameters as if trained: none of them zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in layers.values() if isinstance(layers, dict) else [layers]:
            for parameter in layer.parameters(recurse=False):
                parameter.copy_(
                    torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 2
                )


def layer(d_in=5, d_out=7, rank=3, *, dtype=torch.float64, trained=True, bias=True, **options):
    """A LoRALinear, whose scaling is alpha / rank = 2 unless the options say otherwise."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        result = LoRALinear(
            nn.Linear(d_in, d_out, bias=bias, dtype=dtype), rank, **{"alpha": 6, **options}
        )
    if trained:
        randomize(result)
    return result


def inputs(*shape, dtype=torch.float64, seed=2):
    return torch.randn(
        shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


def in_float64(lora):
    """(W, A, B, gate) of a layer, detached; gate is None if it has none."""
    tensors = (lora.base.weight, lora.lora_A, lora.lora_B, lora.gate)
    return [None if tensor is None else tensor.detach().double() for tensor in tensors]


def exact_output(lora, x, scaling):
    """What the layer must compute for x, in float64: the reference's forward pass."""
    W, A, B, gate = in_float64(lora)
    b = None if lora.base.bias is None else lora.base.bias.detach().double()
    return reference.lora_forward(x.double(), W, b, A, B, scaling, gate)


def delta_by_hand(layer, scaling=None):
    """s · B diag(gate) A as one sum over ranks, in float64; (d_out, d_in)."""
    A, B = layer.lora_A.detach().double(), layer.lora_B.detach().double()
    gate = (
        torch.ones(len(A), dtype=torch.float64)
        if layer.gate is None
        else layer.gate.detach().double()
    )
    result = torch.zeros(len(B), A.shape[1], dtype=torch.float64)
    for a, b, g in zip(A, B.T, gate, strict=True):
        result += (layer.scaling if scaling is None else scaling) * g * torch.outer(b, a)
    return result


def with_deltas_by_hand(plain, layers):
    """A copy of the plain model with W + ΔW for W: what the wrapped one must compute."""
    result = copy.deepcopy(plain)
    for name, layer in layers.items():
        module = result.get_submodule(name)
        delta = delta_by_hand(layer)
        delta = delta.T if hasattr(module, "nf") else delta
        module.weight = nn.Parameter(
            (module.weight.detach().double() + delta).to(module.weight.dtype)
        )
    return result


def snapshot(model):
    """Everything that a refused call must leave as it was: identities, bits, flags, modes."""
    modules = {name: (id(m), m.training) for name, m in model.named_modules(remove_duplicate=False)}
    tensors = {
        name: (
            id(t),
            t.requires_grad,
            t.dtype,
            t.detach().clone(),
            None if t.grad is None else t.grad.clone(),
        )
        for name, t in [
            *model.named_parameters(remove_duplicate=False),
            *model.named_buffers(remove_duplicate=False),
        ]
    }
    return modules, tensors


def assert_unchanged(model, before):
    modules, tensors = snapshot(model)
    assert modules == before[0]
    assert tensors.keys() == before[1].keys()
    for name, (*facts, value, grad) in tensors.items():
        *old_facts, old_value, old_grad = before[1][name]
        assert facts == old_facts, name
        assert same_bits(value, old_value), name
        assert (grad is None) == (old_grad is None), name
        assert grad is None or same_bits(grad, old_grad), name


def same_bits(a, b):
    """torch.equal, but NaN equals itself, -0.0 is not 0.0, and meta tensors have no bits."""
    if (a.dtype, a.shape, a.device) != (b.dtype, b.shape, b.device):
        return False
    return a.is_meta or torch.equal(
        *(t.detach().reshape(-1).contiguous().view(torch.uint8) for t in (a, b))
    )


def wrapped(dtype=torch.float64, ranks=RANKS, **options):
    """(a plain twin, the wrapped model with its adapter as if trained, its layers)"""
    plain, model = zoo(dtype), zoo(dtype)
    layers = wrap(model, ranks, **options)
    randomize(layers)
    return plain, model, layers
