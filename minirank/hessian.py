"""Exact diagonals of the Hessian of the mean loss, with respect to the weights of linear layers. Each layer counts
alone: of a weight that is tied to another module, only the use in this layer.

Two ways to the same numbers. `hessian_diagonal_reference` takes one Hessian-vector product per weight: slow, and so
plain that nobody doubts it. `exact_hessian_diagonal` goes through the outputs z = W x + b of each layer: W acts only
through z, linearly, so by the chain rule

    h(W_ij) = Σ over samples, positions t, t' of  ∂²L / ∂z_ti ∂z_t'i · x_tj x_t'j

and d_out × positions products per batch give the whole diagonal, however large d_in is. One product serves all samples
of a batch at once, as long as samples do not interact: the Hessian over z is then block-diagonal, and the blocks of a
sum of columns can be read apart. A layer that is called again on its own outputs adds the curvature of that path,

    2 Σ over t, t' of  ∂L / ∂z_t'i · ∂x_t'j / ∂z_ti · x_tj
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .linear import applies_weight, linear_shape
from .measure import LossFn, WeightedMean, batch_length, differentiable_twice, scalar_loss
from .targets import Targets, linear_targets


def exact_hessian_diagonal(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Iterable[Any],
    targets: Targets = None,
    *,
    chunk_size: int = 64,
    batch_weight: Callable[[Any], float] = batch_length,
    independent: bool = True,
) -> dict[str, Tensor]:
    """The exact diagonal through the layers' outputs (see the top of the file).

    Cost per batch: one forward and one backward pass with its graph kept, and d_out · positions Hessian-vector
    products per layer, `chunk_size` of them at a time. Memory: `chunk_size` times that of one backward pass.

    Args:
        targets: see `linear_targets`.
        chunk_size: products taken together. 1 takes them one by one, for models that torch.vmap cannot handle.
        batch_weight: what a batch's mean loss weighs in the total; the number of its samples. For a loss that is a
            mean over tokens, give their number.
        independent: the first dimension of every layer's input counts samples, and no sample's loss depends on
            another sample. It is checked on each batch. False: no such assumption (a loss across samples, BatchNorm's
            batch statistics, inputs that come flattened), at positions = all rows of the batch.

    Returns: {name: (d_out, d_in)} on the module's device, in the dtype of its output: convert a half-precision model
    first. Entries can be negative.

    Raises ValueError: samples interact, no batch, a loss that is not a finite scalar, a layer that no batch reaches or
    that does not compute W x + b.
    """
    modules = _checked(model, targets, chunk_size)
    total = WeightedMean(modules)
    with differentiable_twice(model):
        for batch in batches:
            weight = batch_weight(batch)
            calls: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in modules}
            with _shifted_outputs(modules, calls):
                loss = _finite_loss(model, loss_fn, batch)
            shifts = {name: [shift for _, shift in found] for name, found in calls.items()}
            flat = [shift for found in shifts.values() for shift in found]
            gradients = iter(torch.autograd.grad(loss, flat, create_graph=True, materialize_grads=True))
            slopes = {name: [next(gradients) for _ in found] for name, found in shifts.items()}
            if independent:
                _check_independent(flat, [g for found in slopes.values() for g in found])
            for name, found in calls.items():
                inputs = [x for x, _ in found]
                h = _diagonal(inputs, shifts[name], slopes[name], chunk_size, independent) if found else None
                total.add(name, h, weight)
    return total.result()


def _diagonal(
    inputs: list[Tensor], shifts: list[Tensor], slopes: list[Tensor], chunk_size: int, independent: bool
) -> Tensor:
    """One layer, one batch, from each call's x, shift and ∂L/∂z. → (d_out, d_in)."""
    x = _rows([x.detach() for x in inputs], independent)  # (n, T, d_in), the T positions being those of all calls
    g = _rows(slopes, independent)  # (n, T, d_out)
    h = x.new_zeros(g.shape[2], x.shape[2], dtype=g.dtype)
    # The gradient of a sum over samples holds one column of each sample's block.
    for index, columns in _columns(g.sum(0), shifts, chunk_size):
        t, i = index // len(h), index % len(h)
        every = _rows(columns, independent, products=len(index))  # (K, n, T, d_out)
        block = every[torch.arange(len(index)), :, :, i]  # (K, n, T): ∂²L / ∂z_ti ∂z_t'i over t'
        mixed = torch.einsum("knt,ntj->knj", block, x)
        h.index_add_(0, i, (mixed * x[:, t].transpose(0, 1)).sum(1))
    if len(inputs) > 1 and any(x.requires_grad for x in inputs):
        # ∂x/∂z · v by differentiating twice: its transpose times w is linear in w.
        w = [torch.zeros_like(x, requires_grad=True) for x in inputs]
        live = [(x, weight) for x, weight in zip(inputs, w, strict=True) if x.requires_grad]
        back = torch.autograd.grad(
            [x for x, _ in live], shifts, [weight for _, weight in live], create_graph=True, materialize_grads=True
        )
        if independent:
            _check_independent(w, back)
        for index, columns in _columns(_rows(back, independent).sum(0), w, chunk_size):
            t, i = index // len(h), index % len(h)
            moved = _rows(columns, independent, products=len(index))  # (K, n, T, d_in)
            path = torch.einsum("knt,kntj->knj", g.detach()[:, :, i].permute(2, 0, 1), moved)  # (K, n, d_in)
            h.index_add_(0, i, 2 * (path * x[:, t].transpose(0, 1)).sum(1))
    return h


def _columns(slope: Tensor, inputs: list[Tensor], chunk_size: int) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """∂ slope_k / ∂ inputs for every entry k of `slope`, (T, d_out): chunks of (indices k, (K, *input.shape) each)."""
    if not slope.requires_grad:  # everything is linear here: no second derivative
        return
    for start in range(0, slope.numel(), chunk_size):
        index = torch.arange(start, min(start + chunk_size, slope.numel()), device=slope.device)
        vectors = slope.new_zeros(len(index), slope.numel())
        vectors[torch.arange(len(index)), index] = 1
        yield index, _products(slope, inputs, vectors.view(-1, *slope.shape))


def hessian_diagonal_reference(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Iterable[Any],
    targets: Targets = None,
    *,
    chunk_size: int = 64,
    batch_weight: Callable[[Any], float] = batch_length,
) -> dict[str, Tensor]:
    """The exact diagonal, entry by entry: e_kᵀ H e_k for each weight k, W being replaced by W + E at E = 0.

    Cost per batch: d_out · d_in Hessian-vector products per layer. Makes no assumption on the samples. Arguments,
    result and errors as for `exact_hessian_diagonal`.
    """
    modules = _checked(model, targets, chunk_size)
    total = WeightedMean(modules)
    with differentiable_twice(model):
        for batch in batches:
            weight = batch_weight(batch)
            for name, module in modules.items():
                d_out, d_in = _shape(module)
                W = next(module.parameters())
                E = torch.zeros(d_out, d_in, dtype=W.dtype, device=W.device, requires_grad=True)
                calls: dict[str, list[tuple[Tensor, Tensor]]] = {name: []}
                with _shifted_outputs({name: module}, calls, E):
                    loss = _finite_loss(model, loss_fn, batch)
                if not calls[name]:
                    total.add(name, None, weight)
                    continue
                (slope,) = torch.autograd.grad(loss, E, create_graph=True, materialize_grads=True)
                h = torch.zeros_like(slope).flatten()
                for index, (columns,) in _columns(slope, [E], chunk_size):
                    h[index] = columns.flatten(1)[torch.arange(len(index)), index]
                total.add(name, h.detach().view(d_out, d_in), weight)
    return total.result()


def _products(slope: Tensor, inputs: list[Tensor], vectors: Tensor) -> list[Tensor]:
    """Hessian-vector products, (K, *input.shape) for each input; one by one if K = 1, without torch.vmap."""
    batched = len(vectors) > 1
    results = torch.autograd.grad(
        slope,
        inputs,
        vectors if batched else vectors[0],
        retain_graph=True,
        allow_unused=True,
        is_grads_batched=batched,
    )
    filled = []
    for result, given in zip(results, inputs, strict=True):
        zeros = given.new_zeros(len(vectors), *given.shape)
        filled.append(zeros if result is None else result if batched else result[None])
    return filled


def _rows(tensors: Sequence[Tensor], independent: bool, products: int | None = None) -> Tensor:
    """Every call's (n, …, d) as one (n, T, d); (1, rows, d) if samples may interact. With `products`, each tensor has
    that leading dimension besides, and so has the result."""
    first = 0 if products is None else 1
    parts = []
    for x in tensors:
        n = x.shape[first] if independent and x.ndim > first + 1 else 1
        parts.append(x.reshape(*x.shape[:first], n, -1, x.shape[-1]))
    return torch.cat(parts, -2)


@contextmanager
def _shifted_outputs(
    modules: Mapping[str, nn.Module], calls: dict[str, list[tuple[Tensor, Tensor]]], E: Tensor | None = None
) -> Iterator[None]:
    """Record each call's (input, shift) and add to its output the shift: zeros that require gradients, or x Eᵀ."""

    def hook_of(name: str) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
            # A copy, since the model may go on to change its tensor in place.
            x: Tensor = (args[0] if args else next(iter(kwargs.values()))).clone()
            shift = torch.zeros_like(output, requires_grad=True) if E is None else x @ E.t()
            calls[name].append((x, shift))
            return output + shift

        return hook

    # Before the user's own hooks, which may change the output.
    handles = [m.register_forward_hook(hook_of(n), with_kwargs=True, prepend=True) for n, m in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _check_independent(shifts: Sequence[Tensor], slopes: Sequence[Tensor]) -> None:
    """If samples do not interact, scaling each sample's part of a vector scales that sample's part of its product."""
    lengths = {shift.shape[0] if shift.ndim > 1 else 1 for shift in shifts}
    pairs = [(g, shift) for g, shift in zip(slopes, shifts, strict=True) if g.requires_grad]
    if lengths == {1}:
        return
    if len(lengths) == 1 and (not pairs or _products_scale(pairs, max(lengths))):
        return
    raise ValueError(
        "the samples of a batch interact (a loss across samples, batch statistics, or layer inputs whose first "
        f"dimension does not count samples; first dimensions seen: {sorted(lengths)}): pass independent=False, which "
        "assumes nothing, or use hessian_diagonal_reference"
    )


def _products_scale(pairs: Sequence[tuple[Tensor, Tensor]], n: int) -> bool:
    """For (∂L/∂z, z) of each call, all z with n samples."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.rand(n, generator=generator) + 0.5  # all different: every pair of samples is tried
    slopes, inputs = [g for g, _ in pairs], [z for _, z in pairs]
    vectors = [torch.randn(g.shape[1:], generator=generator).to(g).expand_as(g) for g in slopes]
    plain, other = (
        torch.autograd.grad(slopes, inputs, v, retain_graph=True, materialize_grads=True)
        for v in (vectors, [_scaled(v, scales) for v in vectors])
    )
    expected = [_scaled(p, scales) for p in plain]
    eps, largest = torch.finfo(plain[0].dtype).eps, max(float(p.abs().max()) for p in expected)
    limits = [max(eps**0.5 * float(p.abs().max()), 100 * eps * largest) for p in expected]  # each layer its own
    return all(float((p - q).abs().max()) <= m for p, q, m in zip(other, expected, limits, strict=True))


def _scaled(x: Tensor, scales: Tensor) -> Tensor:
    """x: (n, …), scales: (n,)"""
    return x * scales.to(x).view(-1, *[1] * (x.ndim - 1))


def _finite_loss(model: nn.Module, loss_fn: LossFn, batch: Any) -> Tensor:
    loss = scalar_loss(model, loss_fn, batch)
    if not torch.isfinite(loss):
        raise ValueError(f"the loss of a batch is {loss.item()}: check the data and the model's weights")
    return loss


def _checked(model: nn.Module, targets: Targets, chunk_size: int) -> dict[str, nn.Module]:
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    modules = linear_targets(model, targets)
    for name, module in modules.items():
        if not applies_weight(module):
            raise ValueError(
                f"{name!r} is a {type(module).__name__} that does not compute W x + b from its weight, on which the "
                "exact diagonal rests: leave it out of targets"
            )
    return modules


def _shape(module: nn.Module) -> tuple[int, int]:
    shape = linear_shape(module)
    assert shape is not None  # linear_targets() selects by it
    return shape
