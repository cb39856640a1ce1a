"""Does a LoRA layer compute its function?"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def check_lora_layer(
    layer: nn.Module,
    x: Tensor,
    *,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: float,
    gate: Tensor | None = None,
    tolerance: float | None = None,
) -> None:
    """Compare layer(x) with y = W x + b + s · B (gate ⊙ A x), computed here in float64.

    Args:
        layer: a module of any class, called once.
        x: (…, d_in), the input.
        weight: W, (d_out, d_in).
        bias: b, (d_out,), or None.
        A: (r, d_in).
        B: (d_out, r).
        scaling: s.
        gate: (r,), or None for a layer without gates.
        tolerance: the largest difference allowed, relative to the largest entry of y. None: (d_in +
            r) rounding errors of x's type.

    Raises:
        AssertionError: another shape, or a larger difference.

    >>> import torch
    >>> from minirank import LoRALinear
    >>> from minirank.testing import check_lora_layer
    >>> base = torch.nn.Linear(4, 3)
    >>> layer = LoRALinear(base, 2, alpha=6)
    >>> matrices = {"weight": base.weight, "bias": base.bias, "A": layer.lora_A, "B": layer.lora_B}
    >>> check_lora_layer(layer, torch.ones(5, 4), **matrices, scaling=3.0)
    """
    precision = torch.finfo(x.dtype)
    expected = _exact(x, weight, bias, A, B, scaling, gate)
    got = layer(x).detach().double()
    assert got.shape == expected.shape, (
        f"expected shape {tuple(expected.shape)}, got {tuple(got.shape)}"
    )
    allowed = (x.shape[-1] + len(A)) * precision.eps if tolerance is None else tolerance
    largest = expected.abs().max().clamp(min=precision.tiny)
    error = float((got - expected).abs().max() / largest)
    assert error <= allowed, (
        f"the largest relative difference is {error:.3g}, allowed is {allowed:.3g}"
    )


def _exact(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: float,
    gate: Tensor | None,
) -> Tensor:
    """W x + b + s · B (gate ⊙ A x) in float64: (…, d_out)."""
    x = x.detach().double()
    h = x @ A.detach().double().t()  # (…, r)
    if gate is not None:
        h = h * gate.detach().double()
    y = x @ weight.detach().double().t() + scaling * (h @ B.detach().double().t())
    return y if bias is None else y + bias.detach().double()
