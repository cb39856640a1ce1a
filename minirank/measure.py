"""Measure a model and leave it as it was found."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

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


def scalar_loss(model: nn.Module, loss_fn: LossFn, batch: Any) -> Tensor:
    """loss_fn(model, batch), checked: a floating-point tensor of shape ()."""
    loss: Any = loss_fn(model, batch)
    if not isinstance(loss, Tensor) or loss.ndim != 0 or not loss.is_floating_point():
        got = f"{loss.dtype} of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"loss_fn(model, batch) must return a scalar floating-point tensor (the mean loss), got {got}")
    return loss
