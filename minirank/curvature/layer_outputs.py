"""Differentiate through the outputs of linear layers.

A layer computes z = W x + b. The weight W acts only through z, and linearly, so derivatives by z,
together with the inputs x, give the derivatives by W. This file records x for every call of a
layer, adds a shift of zeros to z, and differentiates by the shift.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError

from ..layers.linear import (
    feature_dim,
    features_back,
    features_last,
    is_packed,
    linear_shape,
    weight_place,
)
from ..packed import type_of_derivatives


class Call(NamedTuple):
    """One call of a layer."""

    x: Tensor  # (…, d_in), its input
    shift: Tensor  # (…, d_out), zeros, added to its output


Calls = dict[str, list[Call]]  # {name: calls in one forward pass}


def layer_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """A layer's input, (…, d_in): the first argument of its call, by place or by name."""
    x: Tensor = args[0] if args else next(iter(kwargs.values()))
    return x


@contextmanager
def shifted_outputs(layers: Mapping[str, nn.Module]) -> Iterator[Calls]:
    """Record every call of the layers; its output gets a shift of zeros that requires gradients."""

    def zeros(name: str, x: Tensor, output: Tensor) -> Tensor:
        zero = output.detach().new_zeros(())
        return zero.expand(output.shape).requires_grad_()  # in the memory of one number

    with _recorded_calls(layers, zeros) as calls:
        yield calls


@contextmanager
def shifted_weights(
    layers: Mapping[str, nn.Module], weight_shifts: Mapping[str, Tensor]
) -> Iterator[Calls]:
    """Record every call of the layers, with W + E in place of W: each output gets a shift x Eᵀ.

    weight_shifts: {name: E}, see `zero_weight_shifts`.
    """

    def through_weight(name: str, x: Tensor, output: Tensor) -> Tensor:
        return x @ weight_shifts[name].t().to(x.dtype)

    with _recorded_calls(layers, through_weight) as calls:
        yield calls


def zero_weight_shifts(layers: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """{name: E}, zeros of shape (d_out, d_in) that require gradients."""
    weight_shifts = {}
    for name, layer in layers.items():
        shape = linear_shape(layer)
        assert shape is not None  # linear_targets() selects by it
        dtype, device = weight_place(layer)
        if is_packed(layer):
            dtype = type_of_derivatives(layer)
        weight_shifts[name] = torch.zeros(shape, dtype=dtype, device=device, requires_grad=True)
    return weight_shifts


@contextmanager
def _recorded_calls(
    layers: Mapping[str, nn.Module], make_shift: Callable[[str, Tensor, Tensor], Tensor]
) -> Iterator[Calls]:
    calls: Calls = {name: [] for name in layers}

    def hook_of(name: str) -> Callable[..., Tensor]:
        def hook(
            layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
        ) -> Tensor:
            if not torch.is_grad_enabled() or torch.is_autocast_enabled(output.device.type):
                raise ValueError(
                    f"{name!r} is called under no_grad(), re-entrant checkpointing or autocast, "
                    "where its curvature is lost or rough: take these out of loss_fn and the "
                    "model (checkpointing: use_reentrant=False), or leave it out of targets"
                )
            if output.numel() == 0:  # an expert that gets no token
                return output
            x = layer_input(args, kwargs)
            if x.requires_grad and not output.requires_grad and is_packed(layer):
                raise ValueError(
                    f"no gradient passes through {name!r}, a {type(layer).__name__}, so that the "
                    "curvature of the layers below it is lost: score by input_second_moment, which "
                    "needs no gradient"
                )
            # A copy, because the model may later change its tensor in place; in the dtype to which
            # the layer cast it.
            dim = feature_dim(layer)
            x = features_last(x.to(output.dtype, copy=True), dim)
            shift = make_shift(name, x, features_last(output, dim))
            calls[name].append(Call(x, shift))
            return output + features_back(shift, dim, output)

        return hook

    handles = []
    try:
        for name, layer in layers.items():
            # Before the user's own hooks, which may change the output.
            handles.append(
                layer.register_forward_hook(hook_of(name), with_kwargs=True, prepend=True)
            )
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def all_shifts(calls: Calls) -> list[Tensor]:
    """The shift of every call, layer by layer."""
    return [call.shift for layer_calls in calls.values() for call in layer_calls]


def in_call_order(per_layer: Mapping[str, Sequence[Tensor]]) -> list[Tensor]:
    """{name: one tensor per call} as one list, in the order of `all_shifts`."""
    return [tensor for of_calls in per_layer.values() for tensor in of_calls]


def by_layer(per_call: Iterable[Tensor], calls: Calls) -> dict[str, list[Tensor]]:
    """{name: one tensor per call of the layer}, from a list in the order of `all_shifts`."""
    remaining = iter(per_call)
    return {name: [next(remaining) for _ in layer_calls] for name, layer_calls in calls.items()}


def output_gradients(
    loss: Tensor, calls: Calls, *, differentiable: bool
) -> dict[str, list[Tensor]]:
    """∂loss/∂z for every call of every layer, each of the shape of z; see `loss_gradients`."""
    return by_layer(loss_gradients(loss, all_shifts(calls), differentiable=differentiable), calls)


def loss_gradients(
    loss: Tensor, variables: Sequence[Tensor], *, differentiable: bool
) -> list[Tensor]:
    """∂loss/∂variable for each variable; zeros where the loss ignores one.

    differentiable: keep the gradients' own graph, to differentiate them once more.
    """
    if not variables:
        return []
    if not loss.requires_grad:
        raise ValueError(
            "the loss is not connected to any target: loss_fn must return it with its graph (no "
            "detach(), item() or no_grad()), and call the model that it is given"
        )
    try:
        return list(
            torch.autograd.grad(
                loss, variables, create_graph=differentiable, materialize_grads=True
            )
        )
    except CheckpointError as error:
        raise ValueError(
            "the model recomputes activations (gradient checkpointing), which this curvature "
            "cannot follow: switch it off, or use one that goes through outputs, such as "
            "hutchinson_outputs"
        ) from error


def vector_jacobian_products(
    values: Sequence[Tensor], variables: Sequence[Tensor], vectors: Sequence[Tensor]
) -> list[Tensor]:
    """vᵀ ∂values/∂variables for K vectors v. If the values are a gradient: Hessian-vector products.

    vectors: one tensor per value, (K, *value.shape).
    Returns: one tensor per variable, (K, *variable.shape). All K are taken at once by torch.vmap,
    or without it if K = 1.
    """
    if not variables:
        return []
    count = len(vectors[0])
    pairs = [(value, v) for value, v in zip(values, vectors, strict=True) if value.requires_grad]
    products: Sequence[Tensor | None] = [None] * len(variables)
    if pairs:  # otherwise all values are constant
        products = torch.autograd.grad(
            [value for value, _ in pairs],
            variables,
            [v if count > 1 else v[0] for _, v in pairs],
            retain_graph=True,
            allow_unused=True,
            is_grads_batched=count > 1,
        )
    filled = []
    for product, variable in zip(products, variables, strict=True):
        if product is None:
            filled.append(variable.new_zeros(count, *variable.shape))
        else:
            filled.append(product if count > 1 else product[None])
    return filled


def feeds_itself(layer_calls: Sequence[Call]) -> bool:
    """Whether a layer may be called again on what its own outputs became, as in a recurrence."""
    return len(layer_calls) > 1 and any(call.x.requires_grad for call in layer_calls)


def recurrence_jacobian(layer_calls: Sequence[Call]) -> tuple[list[Tensor], list[Tensor]]:
    """The derivative J = ∂x/∂z of a layer's later inputs by its earlier outputs, if it feeds
    itself.

    By the double-backward trick: autograd computes products with Jᵀ only, but Jᵀw is linear in w.
    So differentiating Jᵀw by w gives products with J: J v is vector_jacobian_products(Jᵀw, w, v).
    The values of w do not matter; they are zero.

    Returns (w, Jᵀw), each with one tensor per call: w of the shapes of x, Jᵀw of the shapes of z.
    """
    w = [torch.zeros_like(call.x, requires_grad=True) for call in layer_calls]
    pairs = [(call.x, wc) for call, wc in zip(layer_calls, w, strict=True) if call.x.requires_grad]
    JTw = torch.autograd.grad(
        [x for x, _ in pairs],
        [call.shift for call in layer_calls],
        [wc for _, wc in pairs],
        create_graph=True,
        materialize_grads=True,
    )
    return w, list(JTw)


def stack_positions(per_call: Sequence[Tensor], independent: bool, batched: bool = False) -> Tensor:
    """A layer's tensors, one per call, as one: (n, …, d) → (n, T, d), T counting all positions.

    n counts samples. If samples may interact (`independent` is False), all rows are positions of
    one sample: (1, T, d). batched: every tensor has one more dimension in front, the result too.
    """
    first = 1 if batched else 0
    parts = []
    for x in per_call:
        n = x.shape[first] if independent and x.ndim > first + 1 else 1
        parts.append(x.reshape(*x.shape[:first], n, -1, x.shape[-1]))
    return parts[0] if len(parts) == 1 else torch.cat(parts, -2)


def stacked_inputs(layer_calls: Sequence[Call], independent: bool) -> Tensor:
    """The inputs of all calls of a layer, (n, T, d_in), without their graph."""
    return stack_positions([call.x.detach() for call in layer_calls], independent)
