"""Attention with every option, and what goes into it."""

from __future__ import annotations

import math
import warnings
from contextlib import contextmanager

import torch
from hypothesis import strategies as st
from torch import nn

MASKS = ["none", "bool", "float", "bool for each head", "float for each head", "causal"]

ATTENTION = st.fixed_dictionaries(
    {
        "heads": st.integers(1, 3),
        "bias": st.booleans(),
        "add_bias_kv": st.booleans(),
        "add_zero_attn": st.booleans(),
        "kdim": st.sampled_from([None, 5]),
        "vdim": st.sampled_from([None, 3]),
        "dropout": st.sampled_from([0.0, 0.4]),
        "batch_first": st.booleans(),
        "batched": st.booleans(),
        "training": st.booleans(),
        "inputs": st.sampled_from(["self", "memory", "three"]),
        "attn_mask": st.sampled_from(MASKS),
        "padding": st.sampled_from(["none", "bool", "float"]),
        "need_weights": st.booleans(),
        "average": st.booleans(),
        "sizes": st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4)),
        "seed": st.integers(0, 1000),
    }
)


@contextmanager
def slow_path():
    """A block in which torch takes the path that it takes in training."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def inputs_of(case):
    """(a list with the nn.MultiheadAttention, its arguments, its options) of a case."""
    torch.manual_seed(case["seed"])
    names = ("bias", "add_bias_kv", "add_zero_attn", "kdim", "vdim", "dropout", "batch_first")
    settings = {name: case[name] for name in names}
    d = 2 * case["heads"]
    attention = nn.MultiheadAttention(d, case["heads"], **settings, dtype=torch.float64)
    for parameter in attention.parameters():
        nn.init.normal_(parameter, std=0.7)
    attention.train(case["training"])
    N, L, S = case["sizes"]
    if case["attn_mask"] == "causal" or case["inputs"] == "self":
        S = L
    N = N if case["batched"] else 1

    def values(length, width):
        x = torch.randn(N, length, width, dtype=torch.float64)
        if not case["batched"]:
            x = x[0]
        elif not case["batch_first"]:
            x = x.transpose(0, 1)
        return x.clone().requires_grad_()

    plain = attention._qkv_same_embed_dim
    query = values(L, d)
    if case["inputs"] == "self" and plain:
        arguments = [query, query, query]
    elif case["inputs"] == "memory" and plain:
        memory = values(S, d)
        arguments = [query, memory, memory]
    else:
        arguments = [query, values(S, attention.kdim), values(S, attention.vdim)]
    options = {
        "need_weights": case["need_weights"],
        "average_attn_weights": case["average"],
        "attn_mask": _attn_mask(case["attn_mask"], N * case["heads"], L, S),
        "key_padding_mask": _padding(case["padding"], (N, S) if case["batched"] else (S,)),
        "is_causal": case["attn_mask"] == "causal",
    }
    return nn.ModuleList([attention]), arguments, options


def run(attention, arguments, options):
    """{name: outputs, weights and gradients}, from random numbers that are always the same."""
    leaves = list({id(x): x for x in arguments}.values())
    for tensor in [*leaves, *attention.parameters()]:
        tensor.grad = None
    torch.manual_seed(7)
    with slow_path(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Support for mismatched key_padding_mask")
        y, weights = attention(*arguments, **options)
    loss = (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum()
    found = {"y": y.detach()}
    if weights is not None:
        found["weights"] = weights.detach()
        loss = loss + weights.square().sum()
    loss.backward()
    found |= {f"gradient of input {i}": x.grad for i, x in enumerate(leaves)}
    return found | {f"gradient of {k}": g for k, g in _gradients(attention).items()}


def _gradients(attention):
    """{name: gradient} in the names of nn.MultiheadAttention, with those of q, k, v apart."""
    parameters = dict(attention.named_parameters())
    found = {}
    for name, parameter in parameters.items():
        if name.startswith("in_proj"):
            parts = parameter.grad.chunk(3)
            kind = name.removeprefix("in_proj_")
            found |= {f"{key}.{kind}": part for key, part in zip("qkv", parts, strict=True)}
        else:
            plain = name.replace("_proj_weight", ".weight").replace("out_proj.", "out.")
            found[plain] = parameter.grad
    return found


def _attn_mask(kind, of_heads, L, S):
    if kind == "none":
        return None
    if kind == "causal":
        return torch.ones(L, S, dtype=torch.bool).triu(1)
    shape = (of_heads, L, S) if kind.endswith("head") else (L, S)
    return _numbers_or_booleans(kind, shape)


def _padding(kind, shape):
    return None if kind == "none" else _numbers_or_booleans(kind, shape)


def _numbers_or_booleans(kind, shape):
    """A mask that leaves the first key of every query in."""
    left_out = torch.rand(shape) < 0.4
    left_out[..., 0] = False
    if kind.startswith("bool"):
        return left_out
    return torch.randn(shape, dtype=torch.float64).masked_fill(left_out, -math.inf)
