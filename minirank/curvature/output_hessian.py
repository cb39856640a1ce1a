"""The Hessian H_y of the loss over the model's output y, as H_y = S Sᵀ.

The loss is a sum over the rows of y (…, C), so H_y has one block (C, C) per row. Three kinds of
losses are recognised, by a few products H_y v:

- cross-entropy with softmax: H_y = a (diag(p) − p pᵀ), for any C;
- a sum over the entries of y, such as a squared error or a binary cross-entropy: H_y is diagonal,
  for any C;
- any other convex loss: H_y is computed and taken apart numerically, for C up to DENSE_LIMIT.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .diagnostics import NUDGE, check_resolved, rounding_bound
from .layer_outputs import Call, loss_gradients, vector_jacobian_products

DENSE_LIMIT = 512  # columns of y

HalfHessian = Callable[[Tensor], Tensor]  # ξ → S ξ, both (K, n, T, C)


@contextmanager
def shifted_output(module: nn.Module) -> Iterator[list[Call]]:
    """Record every call of the module: its output (as `x`), and a shift of zeros added to it.

    What follows the module sees the output as data: the loss depends on what came before it by the
    shift alone. So derivatives of the loss end here, and the output's own graph is whole.
    """
    calls: list[Call] = []

    def hook(module: nn.Module, args: Any, output: Any) -> Tensor:
        if not isinstance(output, Tensor):
            raise ValueError(
                f"the output of {type(module).__name__} is a {type(output).__name__}, not a "
                "tensor: name the module whose output tensor enters the loss, such as "
                'output="classifier" or output="lm_head"'
            )
        calls.append(Call(output, torch.zeros_like(output, requires_grad=True)))
        return output.detach() + calls[-1].shift

    handle = module.register_forward_hook(hook)
    try:
        yield calls
    finally:
        handle.remove()


def half_hessian(loss: Tensor, shift: Tensor, y: Tensor) -> HalfHessian:
    """ξ → S ξ with S Sᵀ = H_y.

    y: (n, T, C). shift: zeros, added to the output that y is; of the output's own shape.
    Raises ValueError if the loss mixes rows of y, is not convex in y, or is of no recognised kind
    with C above DENSE_LIMIT.
    """
    (gradient,) = loss_gradients(loss, [shift], differentiable=True)

    def hessian_times(vectors: Tensor) -> Tensor:
        """H_y v for K vectors v: (K, n, T, C) → (K, n, T, C)"""
        of_shift = vectors.view(-1, *shift.shape)
        return vector_jacobian_products([gradient], [shift], [of_shift])[0].view(vectors.shape)

    trial = _try_products(hessian_times, y)
    half = _softmax_half(y, trial)
    if half is not None:
        return half
    check_resolved(trial.rounding, float(trial.Hv.abs().max()))
    return _diagonal_half(trial) or _dense_half(hessian_times, y, trial.allowed_difference)


class _Trial(NamedTuple):
    """Products that tell what kind of matrix H_y is, each (n, T, C)."""

    v: Tensor  # random
    Hv: Tensor
    row_sums: Tensor  # H_y times ones
    rounding: float  # a bound on the rounding error of Hv
    allowed_difference: float  # between products that should be equal


def _try_products(hessian_times: Callable[[Tensor], Tensor], y: Tensor) -> _Trial:
    """Raises ValueError unless H_y has one block per row of y: scaled rows give scaled products."""
    generator = torch.Generator().manual_seed(0)
    draw: dict[str, Any] = {
        "generator": generator,
        "device": generator.device,
        "dtype": torch.float64,
    }
    v = torch.randn(y.shape, **draw).to(y)
    scales = torch.rand(*y.shape[:-1], 1, **draw).to(y) + 0.5
    Hv, H_scaled, H_nudged, row_sums = hessian_times(
        torch.stack([v, scales * v, NUDGE * v, torch.ones_like(v)])
    )
    rounding = rounding_bound(Hv, H_nudged)
    allowed_difference = max(torch.finfo(y.dtype).eps ** 0.5 * float(Hv.abs().max()), rounding)
    if float((H_scaled - scales * Hv).abs().max()) > allowed_difference:
        raise ValueError(
            "the loss mixes rows of the model's output (a loss across samples or positions), or "
            "is not a function of `output` alone. gauss_newton needs a sum over rows of one "
            "output: use hutchinson_outputs"
        )
    return _Trial(v, Hv, row_sums, rounding, allowed_difference)


def _softmax_half(y: Tensor, trial: _Trial) -> HalfHessian | None:
    """S ξ = √(a p) ξ − p Σ √(a p) ξ if H_y = a (diag(p) − p pᵀ) with p = softmax(y), else None.

    All products are entry by entry; a is the weight of the row in the mean loss. Then H_y v = a p u
    with u = v − Σ p v. So H_y v / p should be a u, for an a that least squares give. This quotient
    keeps its digits where p is close to 1 or 0.
    """
    if y.shape[-1] == 1:
        return None
    p = y.softmax(-1)
    u = trial.v - (p * trial.v).sum(-1, keepdim=True)
    quotient = torch.where(p > 1e3 * torch.finfo(p.dtype).tiny, trial.Hv / p, 0)
    nonzero = (quotient != 0).to(y)
    a = (quotient * u).sum(-1, keepdim=True) / (nonzero * u.square()).sum(-1, keepdim=True).clamp(
        min=1e-30
    )
    allowed = 1e3 * torch.finfo(y.dtype).eps * a * u.abs().amax(-1, keepdim=True)
    if not bool(((quotient - nonzero * a * u).abs() <= allowed).all()):
        return None
    root = (a * p).sqrt()
    return lambda xi: root * xi - p * (root * xi).sum(-1, keepdim=True)


def _diagonal_half(trial: _Trial) -> HalfHessian | None:
    """S ξ = √(diagonal) ξ if H_y is diagonal, which its row sums then are; else None."""
    difference = float((trial.Hv - trial.row_sums * trial.v).abs().max())
    is_diagonal = difference <= trial.allowed_difference  # False for NaN too
    if not is_diagonal:
        return None
    root = _nonnegative_root(trial.row_sums, trial.allowed_difference)
    return lambda xi: root * xi


def _dense_half(
    hessian_times: Callable[[Tensor], Tensor], y: Tensor, allowed_difference: float
) -> HalfHessian:
    """S = V √Λ, from the eigenvectors V and eigenvalues Λ of each row's block of H_y."""
    C = y.shape[-1]
    if C > DENSE_LIMIT:
        raise ValueError(
            f"the loss over an output of {C} columns is neither a softmax cross-entropy nor a sum "
            f"over its entries. For other losses gauss_newton takes at most {DENSE_LIMIT} columns: "
            "use hutchinson_outputs"
        )
    units = torch.eye(C, dtype=y.dtype, device=y.device)[:, None, None].expand(-1, *y.shape)
    blocks = hessian_times(units.contiguous()).permute(1, 2, 0, 3)  # (n, T, C, C)
    eigenvalues, eigenvectors = torch.linalg.eigh(blocks)
    S = eigenvectors * _nonnegative_root(eigenvalues, allowed_difference).unsqueeze(-2)
    return lambda xi: torch.einsum("ntcd,kntd->kntc", S, xi)


def _nonnegative_root(values: Tensor, allowed_difference: float) -> Tensor:
    if float(values.min()) < -allowed_difference:
        raise ValueError(
            "the loss is not convex in the model's output, and gauss_newton needs one that is: "
            "name a later output=, or use hutchinson_outputs"
        )
    return values.clamp(min=0).sqrt()
