"""Curvature through the outputs of linear layers: z = W x + b depends on W linearly, so what the loss does to z, and x,
say what it does to W. Here: record x and a shift of z for every call of a layer, and differentiate by the shifts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError

from ..layers.linear import applies_weight, linear_shape, read_weight
from ..layers.targets import Targets, linear_targets


class Call(NamedTuple):
    """One call of a layer."""

    x: Tensor  # (…, d_in)
    shift: Tensor  # (…, d_out), added to the output; zero


Calls = dict[str, list[Call]]
NUDGE = 0.83  # any factor that is no power of two


def curvature_targets(model: nn.Module, targets: Targets, chunk_size: int) -> dict[str, nn.Module]:
    """`linear_targets`, each checked to compute W x + b."""
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    modules = linear_targets(model, targets)
    for name, module in modules.items():
        if not applies_weight(module):
            raise ValueError(
                f"{name!r} is a {type(module).__name__} that does not compute W x + b from its weight, on which this "
                "curvature rests: leave it out of targets"
            )
    return modules


def weight_shifts(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """{name: E}, zeros of shape (d_out, d_in) that require gradients: W + E takes the place of W."""
    shifts = {}
    for name, module in modules.items():
        shape = linear_shape(module)
        assert shape is not None  # linear_targets() selects by it
        W = read_weight(module)
        assert W is not None
        shifts[name] = torch.zeros(shape, dtype=W.dtype, device=W.device, requires_grad=True)
    return shifts


@contextmanager
def shifted_outputs(
    modules: Mapping[str, nn.Module], E: Mapping[str, Tensor] | None = None
) -> Iterator[Calls]:
    """Record each call's input and add to its output the shift: zeros that require gradients, or x Eᵀ."""
    calls: Calls = {name: [] for name in modules}

    def hook_of(name: str) -> Callable[..., Tensor]:
        def hook(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
        ) -> Tensor:
            if not torch.is_grad_enabled() or torch.is_autocast_enabled(output.device.type):
                raise ValueError(
                    f"{name!r} is called under no_grad(), re-entrant checkpointing or autocast, where its curvature is "
                    "lost or rough: take these out of loss_fn and the model (checkpointing: use_reentrant=False), or "
                    "leave it out of targets"
                )
            # A copy, since the model may go on to change its tensor in place; as the layer may have cast it.
            x = (args[0] if args else next(iter(kwargs.values()))).to(output.dtype, copy=True)
            shift = torch.zeros_like(output, requires_grad=True) if E is None else x @ E[name].t()
            calls[name].append(Call(x, shift))
            return output + shift

        return hook

    handles = []
    try:
        for (
            name,
            module,
        ) in modules.items():  # before the user's own hooks, which may change the output
            handles.append(
                module.register_forward_hook(hook_of(name), with_kwargs=True, prepend=True)
            )
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def gradients(loss: Tensor, inputs: Sequence[Tensor], *, twice: bool) -> list[Tensor]:
    """∂loss/∂inputs, zeros where the loss ignores one; with `twice`, themselves differentiable."""
    if not inputs:
        return []
    if not loss.requires_grad:
        raise ValueError(
            "the loss is not connected to any target: loss_fn must return it with its graph (no detach(), item() or "
            "no_grad()), and call the model that it is given"
        )
    try:
        return list(torch.autograd.grad(loss, inputs, create_graph=twice, materialize_grads=True))
    except CheckpointError as error:
        raise ValueError(
            "the model recomputes activations (gradient checkpointing), which this curvature cannot follow: switch it "
            "off, or use one that goes through outputs, such as hutchinson_outputs"
        ) from error


def slopes_of(loss: Tensor, calls: Calls, *, twice: bool) -> dict[str, list[Tensor]]:
    """The gradients by the shift of every call."""
    found = iter(gradients(loss, shifts_of(calls), twice=twice))
    return {name: [next(found) for _ in of_layer] for name, of_layer in calls.items()}


def shifts_of(calls: Calls) -> list[Tensor]:
    return [call.shift for of_layer in calls.values() for call in of_layer]


def products(
    slopes: Sequence[Tensor], inputs: Sequence[Tensor], vectors: Sequence[Tensor]
) -> list[Tensor]:
    """vᵀ ∂slopes/∂inputs for K vectors, each a list of (K, *slope.shape): (K, *input.shape) for each input. All at once
    by torch.vmap, or without it if K = 1."""
    if not inputs:
        return []
    count = len(vectors[0])
    live = [(slope, v) for slope, v in zip(slopes, vectors, strict=True) if slope.requires_grad]
    results: Sequence[Tensor | None] = [None] * len(inputs)
    if live:  # else everything is linear here: no second derivative
        results = torch.autograd.grad(
            [slope for slope, _ in live],
            inputs,
            [v if count > 1 else v[0] for _, v in live],
            retain_graph=True,
            allow_unused=True,
            is_grads_batched=count > 1,
        )
    filled = []
    for result, given in zip(results, inputs, strict=True):
        zeros = given.new_zeros(count, *given.shape)
        filled.append(zeros if result is None else result if count > 1 else result[None])
    return filled


def path_slopes(
    inputs: Sequence[Tensor], shifts: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """(w, back) for a layer that is called again on its own outputs: ∂x/∂z · v is products(back, w, v), by
    differentiating twice, back = (∂x/∂z)ᵀ w being linear in w."""
    w = [torch.zeros_like(x, requires_grad=True) for x in inputs]
    live = [(x, weight) for x, weight in zip(inputs, w, strict=True) if x.requires_grad]
    back = torch.autograd.grad(
        [x for x, _ in live],
        shifts,
        [weight for _, weight in live],
        create_graph=True,
        materialize_grads=True,
    )
    return w, list(back)


def rows(tensors: Sequence[Tensor], independent: bool, batched: bool = False) -> Tensor:
    """Every call's (n, …, d) as one (n, T, d), the T positions being those of all calls; (1, rows, d) if samples may
    interact. `batched`: each tensor has a further leading dimension, and so has the result."""
    first = 1 if batched else 0
    parts = []
    for x in tensors:
        n = x.shape[first] if independent and x.ndim > first + 1 else 1
        parts.append(x.reshape(*x.shape[:first], n, -1, x.shape[-1]))
    return torch.cat(parts, -2)


def check_independent(
    inputs: Sequence[Tensor], slopes: Sequence[Tensor], *, curved: bool = True
) -> None:
    """Raise ValueError unless the samples, which the first dimension of every tensor must count, do not interact: then
    scaling each sample's part of a vector scales that sample's part of the product vᵀ ∂slopes/∂inputs. And, with
    `curved`, if that product, which the curvature is made of, is mostly rounding."""
    lengths = {tensor.shape[0] if tensor.ndim > 1 else 1 for tensor in (*inputs, *slopes)}
    live = [slope for slope in slopes if slope.requires_grad]
    if not inputs or (
        len(lengths) == 1 and (not live or _products_scale(live, inputs, max(lengths), curved))
    ):
        return
    way_out = "pass independent=False, which assumes nothing, or use hessian_diagonal_reference"
    if not curved:  # the Fisher, which is about single samples
        way_out = "use gauss_newton(…, independent=False), which assumes nothing"
    raise ValueError(
        "the samples of a batch interact (a loss across samples, batch statistics, or layer inputs whose first "
        f"dimension does not count samples; first dimensions seen: {sorted(lengths)}): {way_out}"
    )


def _products_scale(
    slopes: Sequence[Tensor], inputs: Sequence[Tensor], n: int, curved: bool
) -> bool:
    generator = torch.Generator().manual_seed(0)
    scales = (
        torch.rand(n, generator=generator) + 0.5
    )  # all different: every pair of samples is tried
    vectors = [torch.randn(g.shape[1:], generator=generator).to(g).expand_as(g) for g in slopes]
    plain, other, nudged = (
        torch.autograd.grad(slopes, inputs, v, retain_graph=True, materialize_grads=True)
        for v in (vectors, [_scaled(v, scales) for v in vectors], [v * NUDGE for v in vectors])
    )
    largest = max(float(p.abs().max()) for p in plain)
    noise = [rounding(p, q) for p, q in zip(plain, nudged, strict=True)]
    if curved:
        check_resolved(max(noise), largest)
    for p, scaled, least in zip(plain, other, noise, strict=True):  # each layer by its own measure
        eps = torch.finfo(p.dtype).eps
        limit = max(eps**0.5 * float(p.abs().max()), 100 * eps * largest, least)
        if n > 1 and float((_scaled(p, scales) - scaled).abs().max()) > limit:
            return False
    return True


def check_resolved(noise: float, largest: float) -> None:
    if noise > largest:
        raise ValueError(
            f"the curvature of a batch is lost in rounding (products up to {largest:.1e}, 1 % of them error or more): "
            "the loss is near zero for this precision. Use model.double(), with inputs in float64"
        )


def rounding(product: Tensor, nudged: Tensor) -> float:
    """A bound on what rounding does to a product A v, from A (NUDGE · v), which exact arithmetic would make
    proportional: where terms cancel, as in a saturated softmax, it can be far above machine precision."""
    return 100 * float((nudged - NUDGE * product).abs().max())


def _scaled(x: Tensor, scales: Tensor) -> Tensor:
    """x: (n, …), scales: (n,)"""
    return x * scales.to(x).view(-1, *[1] * (x.ndim - 1))
