"""Does a LoRA layer compute its function?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import reference
from .case import Implementation, fitting_twins
from .comparison import Difference, differences
from .contracts.forward import FORWARD_TWINS, LORA
from .report import ConformanceError, Report, Result

SOURCE = "arXiv 2106.09685"


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
        ConformanceError: another shape, or a larger difference. Its text is a report of one result,
            with a hint where the numbers are those of a common fault.

    >>> import torch
    >>> from minirank import LoRALinear
    >>> from minirank.testing import check_lora_layer
    >>> base = torch.nn.Linear(4, 3)
    >>> layer = LoRALinear(base, 2, alpha=6)
    >>> matrices = {"weight": base.weight, "bias": base.bias, "A": layer.lora_A, "B": layer.lora_B}
    >>> check_lora_layer(layer, torch.ones(5, 4), **matrices, scaling=3.0)
    """
    matrices = (weight, bias, A, B, scaling, gate)
    if tolerance is None:
        tolerance = (x.shape[-1] + len(A)) * torch.finfo(x.dtype).eps
    y = layer(x)
    difference = _difference(y, reference.lora_forward, x, matrices, tolerance)
    if difference.wrong:
        largest = _difference(y, reference.lora_forward, x, matrices, 1.0).allowed
        twins = fitting_twins(
            FORWARD_TWINS, lambda twin: not _difference(y, twin, x, matrices, tolerance).wrong
        )
        result = _failed(difference, largest, tolerance, twins)
        raise ConformanceError(Report("lora_forward", SOURCE, (result,)))


def _difference(
    y: Tensor, function: Implementation, x: Tensor, matrices: tuple[Any, ...], tolerance: float
) -> Difference:
    """How far y is from what `function` gives in float64."""
    wide = [v.detach().double() if isinstance(v, Tensor) else v for v in (x, *matrices)]
    exact = {"y": function(*wide)}
    rounded = {"y": exact["y"].to(x.dtype)}
    (found,) = differences(exact, rounded, {"y": y}, dtype=x.dtype, terms=0.0, tolerance=tolerance)
    return found


def _failed(
    difference: Difference, largest: float, tolerance: float, twins: tuple[str, ...]
) -> Result:
    told = [f"equals {twins[0]}"] if twins else []
    if difference.allowed:  # the shapes are equal
        relative = difference.error / largest
        told = [
            f"the largest relative difference is {relative:.3g}, allowed is {tolerance:.3g}",
            *told,
        ]
    return Result(
        case="check_lora_layer",
        equation=LORA,
        status="failed",
        entry=difference.entry,
        expected=difference.expected,
        got=difference.got,
        error=difference.error,
        allowed=difference.allowed,
        hint="; ".join(told),
        twins=twins,
    )
