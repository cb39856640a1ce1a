"""Measure a model and leave it as it was found."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

LossFn = Callable[[nn.Module, Any], Tensor]  # (model, batch) -> scalar mean loss: the only contract with user code


@contextmanager
def measuring(model: nn.Module) -> Iterator[None]:
    """Eval mode inside the block (dropout off, BatchNorm fixed), without the fused kernels by which nn.Transformer's
    layers then bypass their linear layers and their hooks. Afterwards, also after an exception, every module's own
    mode, the state of the random generators and the choice of kernels are as before."""
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("the model is on the meta device, where nothing can be measured: load its weights first")
    modes = [(module, module.training) for module in model.modules()]
    devices = {p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"}
    fused = torch.backends.mha.get_fastpath_enabled()
    with torch.random.fork_rng(devices=sorted(devices)):
        try:
            torch.backends.mha.set_fastpath_enabled(False)
            model.eval()
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fused)
            for module, training in modes:
                module.training = training


@contextmanager
def differentiable_twice(model: nn.Module) -> Iterator[None]:
    """Eval mode, gradients on (leaving inference mode implies it), no autocast, attention by its twice differentiable
    kernel."""
    device = next((p.device.type for p in model.parameters()), "cpu")
    with (
        measuring(model),
        torch.inference_mode(False),
        torch.autocast(device, enabled=False),
        sdpa_kernel(SDPBackend.MATH),
    ):
        yield


def scalar_loss(model: nn.Module, loss_fn: LossFn, batch: Any) -> Tensor:
    """loss_fn(model, batch), checked: a floating-point tensor of shape ()."""
    loss: Any = loss_fn(model, batch)
    if not isinstance(loss, Tensor) or loss.ndim != 0 or not loss.is_floating_point():
        got = f"{loss.dtype} of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"loss_fn(model, batch) must return a scalar floating-point tensor (the mean loss), got {got}")
    return loss


def batch_length(batch: Any) -> int:
    """Samples in a batch: the leading dimension of its first tensor that has one (in mappings and sequences, at any
    depth). Raises ValueError if there is none."""
    length = _length(batch)
    if length is None:
        raise ValueError(
            f"found no tensor with a leading dimension in a batch of type {type(batch).__name__}: pass batch_weight=, "
            "a function batch -> number (for SensitivityLoRA: functools.partial(curvature, batch_weight=…))"
        )
    return length


def _length(batch: Any) -> int | None:
    if isinstance(batch, Tensor):
        return batch.shape[0] if batch.ndim else None
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (list, tuple)) else ()
    return next((n for n in map(_length, parts) if n is not None), None)


class WeightedMean:
    """The mean over batches of each layer's diagonal; None counts as zero, for a batch that does not reach a layer."""

    def __init__(self, names: Iterable[str]) -> None:
        self.sums: dict[str, Tensor | None] = dict.fromkeys(names)
        self.weight = dict.fromkeys(self.sums, 0.0)

    def add(self, name: str, h: Tensor | None, weight: float) -> None:
        if not 0 <= weight < math.inf:
            raise ValueError(f"batch_weight must give a number of at least 0, got {weight!r}")
        self.weight[name] += weight
        if h is not None:
            before = self.sums[name]
            self.sums[name] = h * weight if before is None else before + h * weight

    def result(self) -> dict[str, Tensor]:
        if not any(self.weight.values()):
            raise ValueError(
                "batches is empty, or its batches weigh nothing: give at least one (a generator that was used up "
                "gives none)"
            )
        result = {}
        for name, total in self.sums.items():
            if total is None:
                raise ValueError(f"no batch reached {name!r}: leave it out of targets, or give other data")
            if not torch.isfinite(total).all():
                raise ValueError(f"the curvature of {name!r} is not finite: check the data and the model's weights")
            result[name] = total / self.weight[name]
        return result
