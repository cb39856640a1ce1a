"""Implementations of the curvature contracts with one fault each, for hints."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ... import reference
from ..case import Implementation

Diagonals = dict[str, Tensor]


def batch_size(batch: Any) -> int:
    first = next(iter(batch.values())) if isinstance(batch, Mapping) else batch
    return len(first[0] if isinstance(first, (tuple, list)) else first)


def usual_faults(right: Implementation) -> dict[str, Implementation]:
    """The faults that any mean over batches can have."""
    return {
        "the mean over batches weighted alike": partial(combined, right, lambda n: 1 / len(n)),
        "the sum over batches, each a mean": partial(combined, right, lambda n: 1.0),
        "the sum over samples in place of the mean": partial(combined, right, lambda n: n),
        "the result of the first batch alone": lambda m, f, b, t: right(m, f, b[:1], t),
        "the result of the last batch alone": lambda m, f, b, t: right(m, f, b[-1:], t),
        "the result in the modes that the model came in, not in eval mode": partial(in_mode, right),
        "twice the right result": partial(mapped_result, right, lambda h: 2 * h),
        "half the right result": partial(mapped_result, right, lambda h: h / 2),
    }


def combined(right: Implementation, weights: Callable[[Tensor], Any], *task: Any) -> Diagonals:
    """The results of single batches, summed with weights(their sizes)."""
    model, loss_fn, batches, targets = task
    parts = [right(model, loss_fn, [batch], targets) for batch in batches]
    given = weights(torch.tensor([batch_size(batch) for batch in batches]).double())
    factors = torch.as_tensor(given, dtype=torch.float64).expand(len(parts))
    return {
        name: sum((float(w) * part[name] for w, part in zip(factors, parts, strict=True)),
                  torch.zeros_like(parts[0][name]))
        for name in targets
    }  # fmt: skip


def in_mode(right: Implementation, *task: Any) -> Diagonals:
    model, *rest = task
    ours = copy.deepcopy(model)
    ours.eval = lambda: ours  # what the reference's copy calls
    with torch.random.fork_rng(devices=[]):
        result: Diagonals = right(ours, *rest)
    return result


def mapped_result(
    right: Implementation, function: Callable[[Tensor], Tensor], *task: Any
) -> Diagonals:
    return {name: function(h) for name, h in right(*task).items()}


# ---- through the outputs of layers ---------------------------------------------------------------


class Call(NamedTuple):
    """One call of a layer."""

    x: Tensor  # (…, d_in)
    shift: Tensor  # (…, d_out), zeros added to the output


def recorded(model: nn.Module, targets: list[str]) -> tuple[nn.Module, dict[str, list[Call]]]:
    """A copy of the model in eval mode whose target layers record their calls."""
    model = copy.deepcopy(model).eval().requires_grad_()
    calls: dict[str, list[Call]] = {name: [] for name in targets}

    def record(name: str, module: nn.Module, inputs: tuple[Tensor, ...], z: Tensor) -> Tensor:
        shift = torch.zeros_like(z, requires_grad=True)
        calls[name].append(Call(inputs[0].detach(), shift))
        return z + shift

    for name in targets:
        model.get_submodule(name).register_forward_hook(partial(record, name))
    return model, calls


def over_batches(
    of_batch: Callable[[nn.Module, Any, Any, list[str], dict[str, list[Call]]], Diagonals],
    *task: Any,
) -> Diagonals:
    """The mean over batches, weighted by their sizes, of what `of_batch` computes from calls."""
    given, loss_fn, batches, targets = task
    sums: Diagonals = {}
    n = 0
    for batch in batches:
        model, calls = recorded(given, targets)
        with sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
            found = of_batch(model, loss_fn, batch, targets, calls)
        for name, h in found.items():
            sums[name] = sums.get(name, torch.zeros_like(h)) + batch_size(batch) * h
        n += batch_size(batch)
    return {name: h / n for name, h in sums.items()}


Mask = Callable[[Tensor], Tensor]


def every_row(x: Tensor) -> Tensor:
    return torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device)


def one_position(place: int, x: Tensor) -> Tensor:
    """Of inputs (n, T, d_in) the position `place`; every row of others."""
    keep = torch.zeros_like(every_row(x))
    if x.ndim > 2:
        keep[:, place] = True
        return keep
    return ~keep


def hessian_by_rows(first_call: int, rows: Mask, *task: Any) -> Diagonals:
    """Σ over rows of ∂²L/∂z² x², without the terms between rows."""

    def of_batch(
        model: nn.Module, loss_fn: Any, batch: Any, targets: Any, calls: dict[str, list[Call]]
    ) -> Diagonals:
        L = loss_fn(model, batch)
        return {
            name: sum(
                (one_call(L, call, rows) for call in calls[name][first_call:]), torch.zeros(())
            )
            for name in targets
        }

    def one_call(L: Tensor, call: Call, rows: Mask) -> Tensor:
        x, shift = call
        (g,) = torch.autograd.grad(L, shift, create_graph=True, materialize_grads=True)
        second = [
            torch.autograd.grad(value, shift, retain_graph=True, materialize_grads=True)[
                0
            ].flatten()[k]
            if value.requires_grad
            else torch.zeros_like(value)
            for k, value in enumerate(g.flatten())
        ]
        keep = rows(x)
        S = torch.stack(second).view(*g.shape)[keep]
        return torch.einsum("ro,rj->oj", S, x[keep].square())

    return over_batches(of_batch, *task)


def fisher_by_rows(*task: Any) -> Diagonals:
    """The squares of the gradients of single rows, summed over the rows of a sample."""

    def of_batch(
        model: nn.Module, loss_fn: Any, batch: Any, targets: Any, calls: dict[str, list[Call]]
    ) -> Diagonals:
        L, n = loss_fn(model, batch), batch_size(batch)
        found = {}
        for name in targets:
            total = torch.zeros(())
            for x, shift in calls[name]:
                (g,) = torch.autograd.grad(L, shift, retain_graph=True, materialize_grads=True)
                total = total + torch.einsum("...o,...j->oj", (n * g).square(), x.square()) / n
            found[name] = total
        return found

    return over_batches(of_batch, *task)


# ---- Hessian -------------------------------------------------------------------------------------


def row_sums(*task: Any) -> Diagonals:
    """H · 1 in place of diag(H): a product with one vector of ones."""
    from ...reference.hessian import gradients, mean_loss

    L, weights = mean_loss(*task)
    Ws = list(weights.values())
    total = torch.stack([g.sum() for g in gradients(L, Ws, twice=True)]).sum()
    return dict(zip(weights, gradients(total, Ws), strict=True))


def squared_mean_gradient(*task: Any) -> Diagonals:
    from ...reference.hessian import gradients, mean_loss

    L, weights = mean_loss(*task)
    return {
        name: g.square()
        for name, g in zip(weights, gradients(L, list(weights.values())), strict=True)
    }


HESSIAN: dict[str, Implementation] = {
    "the Gauss-Newton diagonal, without the network's own curvature": (
        reference.gauss_newton_diagonal
    ),
    "the diagonal without the terms between positions, and between calls of a layer": (
        partial(hessian_by_rows, 0, every_row)
    ),
    "the diagonal of a layer's last call alone": partial(hessian_by_rows, -1, every_row),
    "the diagonal of the last position alone": partial(
        hessian_by_rows, 0, partial(one_position, -1)
    ),
    "the diagonal of the first position alone": partial(
        hessian_by_rows, 0, partial(one_position, 0)
    ),
    "the absolute values of the diagonal": (
        partial(mapped_result, reference.hessian_diagonal, torch.abs)
    ),
    "the diagonal with its negative entries set to zero": (
        partial(mapped_result, reference.hessian_diagonal, torch.relu)
    ),
    "the diagonal with the opposite sign": (
        partial(mapped_result, reference.hessian_diagonal, torch.neg)
    ),
    "the row sums of the Hessian in place of its diagonal": row_sums,
    "the empirical Fisher diagonal": reference.empirical_fisher,
    "the square of the mean gradient": squared_mean_gradient,
    **usual_faults(reference.hessian_diagonal),
}


# ---- Gauss-Newton --------------------------------------------------------------------------------


def gauss_newton_with(
    output_hessian: Callable[[Tensor], Tensor], between_rows: bool, *task: Any
) -> Diagonals:
    """Jᵀ f(H_y) J; or without the terms between the rows of a layer's outputs."""
    from ...reference.gauss_newton import Constant, jacobian

    def of_batch(
        model: nn.Module, loss_fn: Any, batch: Any, targets: Any, calls: dict[str, list[Call]]
    ) -> Diagonals:
        outputs: list[Tensor] = []
        handle = model.register_forward_hook(lambda module, inputs, y: outputs.append(y))
        loss_fn(model, batch)
        handle.remove()
        y = outputs[0]
        alone = y.detach().requires_grad_()
        (slope,) = torch.autograd.grad(loss_fn(Constant(alone), batch), alone, create_graph=True)
        H_y = output_hessian(jacobian(slope, alone))
        found = {}
        for name in targets:
            W = model.get_submodule(name).get_parameter("weight")
            if between_rows:
                J = jacobian(y, W)
                found[name] = torch.einsum("ak,ab,bk->k", J, H_y, J).view_as(W)
                continue
            total = torch.zeros_like(W)
            for x, shift in calls[name]:
                J = jacobian(y, shift)
                S = torch.einsum("ak,ab,bk->k", J, H_y, J).view_as(shift)
                total = total + torch.einsum("...o,...j->oj", S, x.square())
            found[name] = total
        return found

    return over_batches(of_batch, *task)


def outputs_summed(*task: Any) -> Diagonals:
    """Squared errors summed over the outputs of a sample, not averaged: C times too large."""
    model, loss_fn, batches, targets = task
    with torch.no_grad():
        first = batches[0]
        C = model(first[0] if isinstance(first, (tuple, list)) else first).shape[-1]
    return {
        name: C * h
        for name, h in reference.gauss_newton_diagonal(model, loss_fn, batches, targets).items()
    }


GAUSS_NEWTON: dict[str, Implementation] = {
    "the diagonal of the Hessian itself": reference.hessian_diagonal,
    "the empirical Fisher diagonal": reference.empirical_fisher,
    "the diagonal of JᵀJ, without H_y": (
        partial(gauss_newton_with, lambda H: torch.eye(len(H)).to(H), True)
    ),
    "Jᵀ diag(H_y) J, without the terms between outputs": (
        partial(gauss_newton_with, lambda H: H.diag().diag(), True)
    ),
    "the diagonal without the terms between positions, and between calls of a layer": (
        partial(gauss_newton_with, lambda H: H, False)
    ),
    "a sum over outputs in place of the loss's mean": outputs_summed,
    **usual_faults(reference.gauss_newton_diagonal),
}


# ---- Fisher --------------------------------------------------------------------------------------


def squared_batch_gradients(*task: Any) -> Diagonals:
    """The square of each batch's mean gradient, weighted by its size."""
    return combined(squared_mean_gradient, lambda n: n / n.sum(), *task)


def of_the_mean_loss(*task: Any) -> Diagonals:
    """Squares of what single samples add to the mean loss's gradient: too small by n² per batch."""

    def small(model: nn.Module, loss_fn: Any, batches: Any, targets: list[str]) -> Diagonals:
        h = reference.empirical_fisher(model, loss_fn, batches, targets)
        return {name: value / batch_size(batches[0]) ** 2 for name, value in h.items()}

    return combined(small, lambda n: n, *task)


def rows_as_samples(*task: Any) -> Diagonals:
    """Each row of the output taken as a sample: the mean over rows of their squared gradients."""

    def of_batch(
        model: nn.Module, loss_fn: Any, batch: Any, targets: Any, calls: dict[str, list[Call]]
    ) -> Diagonals:
        outputs: list[Tensor] = []
        handle = model.register_forward_hook(lambda module, inputs, y: outputs.append(y))
        loss = loss_fn(model, batch)
        handle.remove()
        y = outputs[0]
        (slope,) = torch.autograd.grad(loss, y, retain_graph=True)
        rows = slope.flatten(0, -2)
        weights = [model.get_submodule(name).get_parameter("weight") for name in targets]
        sums = [torch.zeros_like(W) for W in weights]
        for r in range(len(rows)):
            alone = torch.zeros_like(rows)
            alone[r] = rows[r]
            found = torch.autograd.grad(
                y, weights, alone.view_as(y), retain_graph=True, materialize_grads=True
            )
            for h, g in zip(sums, found, strict=True):
                h += len(rows) * g.square()
        return dict(zip(targets, sums, strict=True))

    return over_batches(of_batch, *task)


FISHER: dict[str, Implementation] = {
    "the square of the mean gradient of all samples": squared_mean_gradient,
    "the squares of each batch's mean gradient, not of single samples'": squared_batch_gradients,
    "the sum of squares of what each sample adds to the batch's mean gradient, without · n": (
        of_the_mean_loss
    ),
    "squares of single positions (and calls), summed after squaring": fisher_by_rows,
    "the mean over positions of the output, each taken as a sample": rows_as_samples,
    "the mean gradient's absolute value": (
        partial(mapped_result, squared_mean_gradient, torch.sqrt)
    ),
    "the square root of the right result": (
        partial(mapped_result, reference.empirical_fisher, torch.sqrt)
    ),
    "the Gauss-Newton diagonal": reference.gauss_newton_diagonal,
    "the Hessian diagonal": reference.hessian_diagonal,
    **usual_faults(reference.empirical_fisher),
}
