"""Layers that no batch reached: idle ones, and ones whose weight is read without a call.

Estimators record the calls of a layer. A layer without any recorded input is one of two things:

- idle: the loss does not depend on it, like that of an expert to which no token is routed. Its
  diagonal is zero.
- read: another module takes its weight and multiplies by it, without calling the layer. The loss
  depends on it, but nothing can be measured by its calls. A score of zero would be wrong.

`read_without_call` tells which, by one forward pass in which these layers hold NaN.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import quoted_names, warn_caller
from ..layers.coverage import is_out_proj
from ..measure import LossFn, called, scalar_loss


class IdleLayerWarning(UserWarning):
    """No token of any batch reached some of the layers, which then score zero."""


def idle_layers(
    model: nn.Module,
    loss_fn: LossFn,
    batch: Any,
    layers: Mapping[str, nn.Module],
    unreached: Sequence[str],
) -> tuple[str, ...]:
    """The unreached layers, if the loss does not depend on them.

    If no layer at all is reached, none is called idle: something else is wrong then.

    Raises:
        ValueError: a layer's weight is read without a call.
    """
    if not unreached:
        return ()
    read = read_without_call(model, loss_fn, batch, {name: layers[name] for name in unreached})
    if read:
        raise ValueError(
            f"{quoted_names(read)}: the weight is used, but the module is never called. Another "
            "module reads the weight, so nothing can be measured there. Leave it out of the scores "
            f"({_targets_without(read, layers)}){_or_unpacked(read, layers)}. It can still get an "
            "adapter of a rank that you choose: this works if the weight is read anew at every "
            "forward pass, but adapter dropout has no effect"
        )
    return tuple(unreached) if len(unreached) < len(layers) else ()


def _or_unpacked(names: Sequence[str], layers: Mapping[str, nn.Module]) -> str:
    """What else to do, if one of these layers is the out_proj of an nn.MultiheadAttention."""
    if any(is_out_proj(module) for name in names for module in layers[name].modules()):
        return ", or unpack_attention(model) first, which gives linear layers that are called"
    return ""


def _targets_without(names: Sequence[str], layers: Iterable[str]) -> str:
    """What to write for `targets` to leave these layers out."""
    ends = tuple(dict.fromkeys(name.rpartition(".")[2] for name in names))
    if any(name.endswith(ends) for name in layers if name not in names):
        return "targets=lambda name, module: name not in {…}, with all their names"
    shown = repr(ends[0]) if len(ends) == 1 else repr(ends)
    return f"targets=lambda name, module: not name.endswith({shown})"


def warn_of_idle_layers(names: Iterable[str]) -> None:
    """Say which layers score zero because nothing reached them."""
    names = list(names)
    if names:
        warn_caller(
            f"no token of any batch reached {quoted_names(names)}, as happens to an expert that no "
            "token is routed to: the score is zero, which gives no rank beyond min_rank. If that "
            "is not meant, give more data, or leave what is idle out of targets",
            IdleLayerWarning,
        )


def read_without_call(
    model: nn.Module, loss_fn: LossFn, batch: Any, layers: Mapping[str, nn.Module]
) -> list[str]:
    """The names of the layers on which the loss of this batch depends, and which are not called.

    Without any, this takes two forward passes. Otherwise it takes one more for each layer, and one
    more for each that changes the loss to another number. The loss may be random.

    >>> class Reader(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.read, self.idle = nn.Linear(2, 2), nn.Linear(2, 2)
    ...     def forward(self, x):
    ...         return x @ self.read.weight
    >>> model = Reader()
    >>> layers = {"read": model.read, "idle": model.idle}
    >>> read_without_call(model, lambda model, x: model(x).sum(), torch.ones(1, 2), layers)
    ['read']
    """
    with _restored_buffers(model):
        with called(layers) as reached:
            loss = scalar_loss(model, loss_fn, batch).detach()
        silent = {name: layer for name, layer in layers.items() if name not in reached}

        def depends_on(layer: nn.Module) -> bool:
            with called({"": layer}) as by_chance, _nan_inside([layer]):
                other = _loss_or_none(model, loss_fn, batch)
            if by_chance:  # of a model that routes at random
                return False
            if other is None or not other.isfinite():
                return True
            return not _close(other, loss) and is_steady()

        def is_steady() -> bool:
            """Whether the loss is the same at another time, as no random one is."""
            again = _loss_or_none(model, loss_fn, batch)
            return again is not None and _close(again, loss)

        # A loss that is NaN already says nothing.
        if not silent or not loss.isfinite():
            return []
        with _nan_inside(silent.values()):
            other = _loss_or_none(model, loss_fn, batch)
        if other is not None and _close(other, loss):
            return []
        return [name for name, layer in silent.items() if depends_on(layer)]


def _loss_or_none(model: nn.Module, loss_fn: LossFn, batch: Any) -> Tensor | None:
    try:
        return scalar_loss(model, loss_fn, batch).detach()
    except Exception:  # user code, of any kind, that does not stand NaN
        return None


def _close(other: Tensor, loss: Tensor) -> bool:
    return torch.allclose(other, loss, rtol=torch.finfo(loss.dtype).eps ** 0.5)  # NaN: False


@contextmanager
def _nan_inside(modules: Iterable[nn.Module]) -> Iterator[None]:
    """A block in which the modules hold NaN. Their own tensors are put aside, not written to."""
    before: list[tuple[dict[str, Tensor | None], str, Tensor]] = []
    try:
        for module in modules:
            for inner in module.modules():
                for tensors in (inner._parameters, inner._buffers):
                    for key, tensor in list(tensors.items()):
                        if tensor is not None and _takes_nan(tensor):
                            before.append((tensors, key, tensor))  # type: ignore[arg-type]
                            tensors[key] = _nan_like(tensor)  # type: ignore[assignment]
        yield
    finally:
        for tensors, key, tensor in before:
            tensors[key] = tensor


def _takes_nan(tensor: Tensor) -> bool:
    """Whether this is a plain tensor of floating-point numbers: not sharded, not packed."""
    plain = type(tensor) in (Tensor, nn.Parameter)
    return plain and tensor.is_floating_point() and tensor.dtype.itemsize > 1


def _nan_like(tensor: Tensor) -> Tensor:
    """NaN in the shape of the tensor, in the memory of one number."""
    nan = torch.full((), torch.nan, dtype=tensor.dtype, device=tensor.device).expand(tensor.shape)
    return nn.Parameter(nan, requires_grad=False) if isinstance(tensor, nn.Parameter) else nan


@contextmanager
def _restored_buffers(model: nn.Module) -> Iterator[None]:
    """A block after which the buffers hold what they held before: a module may count in them."""
    before = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)
