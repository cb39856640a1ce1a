"""The LoRA layer: its function, merging, resizing, and one file there and back."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ... import reference
from ..case import Arguments, CaseSpec, Contract, Implementation

LORA = "y = W x + b + s · B (gate ⊙ A x)"


def normal(*shape: int, seed: int) -> Tensor:
    """Standard normal numbers, float64, the same for a seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


# ---- lora_forward --------------------------------------------------------------------------------


def forward_arguments(
    *leading: int,
    d_in: int = 5,
    d_out: int = 4,
    rank: int = 3,
    bias: bool = True,
    gate: bool = False,
    view: Callable[[Tensor], Tensor] = lambda x: x,
) -> Arguments:
    x = view(normal(*leading, d_in, seed=1))
    b = normal(d_out, seed=3) if bias else None
    A, B = normal(rank, d_in, seed=4), normal(d_out, rank, seed=5)
    c = normal(rank, seed=6) if gate else None
    return Arguments((x, normal(d_out, d_in, seed=2), b, A, B, 1.7), {"gate": c} if gate else {})


def gradients(implementation: Implementation, arguments: Arguments) -> Any:
    """The gradients of Σ cotangent · y over x, A, B and gate."""
    x, W, b, A, B, scaling = arguments.positional
    c = arguments.options.get("gate")
    named = {"x": x, "A": A, "B": B, **({} if c is None else {"gate": c})}
    cotangent = normal(*x.shape[:-1], len(W), seed=7).to(x)
    backward = getattr(implementation, "backward", None)
    if backward is not None:
        given = backward(x, W, b, A, B, scaling, c, cotangent)
        return {f"gradient of {name}": given[name] for name in named}
    leaves = {name: value.detach().clone().requires_grad_() for name, value in named.items()}
    options = {} if c is None else {"gate": leaves["gate"]}
    y = implementation(leaves["x"], W, b, leaves["A"], leaves["B"], scaling, **options)
    found = torch.autograd.grad(y, list(leaves.values()), cotangent, materialize_grads=True)
    return {f"gradient of {name}": g for name, g in zip(named, found, strict=True)}


FORWARD = (
    CaseSpec("rank 1", LORA, partial(forward_arguments, 2, rank=1), terms=8),
    CaseSpec("rank 0", LORA, partial(forward_arguments, 2, rank=0), terms=8),
    CaseSpec("no bias", LORA, partial(forward_arguments, 2, bias=False), terms=10),
    CaseSpec("one vector", LORA, partial(forward_arguments, gate=True), terms=10),
    CaseSpec("gate", LORA, partial(forward_arguments, 3, gate=True), terms=10),
    CaseSpec("positions", LORA, partial(forward_arguments, 2, 3, gate=True), terms=10),
)


def gate_twice(x, W, b, A, B, scaling, gate=None):  # type: ignore[no-untyped-def]
    return reference.lora_forward(x, W, b, A, B, scaling, None if gate is None else gate * gate)


CONTRACTS = (
    Contract(
        "lora_forward",
        f"arXiv 2106.09685, {LORA}",
        reference.lora_forward,
        (
            *FORWARD,
            CaseSpec(
                "gradients",
                LORA,
                partial(forward_arguments, 3, gate=True),
                gradients,
                terms=20,
                needs_gradients=True,
            ),
        ),
        {"the layer with the gate applied twice": gate_twice},
    ),
)
