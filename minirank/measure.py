"""Measure a model and leave it as it was found."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
    """Eval mode; gradients on (as leaving inference mode implies); attention by the kernel with second derivatives."""
    with measuring(model), torch.inference_mode(False), sdpa_kernel(SDPBackend.MATH):
        yield


def scalar_loss(model: nn.Module, loss_fn: LossFn, batch: Any) -> Tensor:
    """loss_fn(model, batch), checked: a floating-point tensor of shape ()."""
    loss: Any = loss_fn(model, batch)
    if not isinstance(loss, Tensor) or loss.ndim != 0 or not loss.is_floating_point():
        got = f"{loss.dtype} of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"loss_fn(model, batch) must return a scalar floating-point tensor (the mean loss), got {got}")
    return loss


def batch_length(batch: Any) -> int:
    """Samples in a batch: the leading dimension of its first tensor (in a mapping or sequence, at any depth)."""
    if isinstance(batch, Tensor):
        return batch.shape[0] if batch.ndim else 1
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, Sequence) else ()
    for part in parts:
        if isinstance(part, (Tensor, Mapping, Sequence)) and not isinstance(part, str):
            return batch_length(part)
    raise ValueError(f"found no tensor in a batch of type {type(batch).__name__}: pass batch_weight=, a function")


class WeightedMean:
    """The mean over batches of each layer's diagonal."""

    def __init__(self, names: Iterable[str]) -> None:
        self.sums: dict[str, Tensor | None] = dict.fromkeys(names)
        self.weights = dict.fromkeys(self.sums, 0.0)

    def add(self, name: str, h: Tensor, weight: float) -> None:
        before = self.sums[name]
        self.sums[name] = h * weight if before is None else before + h * weight
        self.weights[name] += weight

    def result(self) -> dict[str, Tensor]:
        result = {}
        for name, total in self.sums.items():
            if total is None:
                raise ValueError("batches is empty: give at least one (a generator that was used up gives none)")
            result[name] = total / self.weights[name]
        return result
