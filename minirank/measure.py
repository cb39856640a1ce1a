"""Contexts in which a model is measured and left unchanged, and checks of its loss."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

from .packed import HALF, float32_outside, left_as_they_are, own_tensors, packed_modules
from .placement import require_unsharded, require_values, working_devices

# (model, batch) -> scalar mean loss: the only contract with user code
LossFn = Callable[[nn.Module, Any], Tensor]
NO_BATCH = (
    "batches is empty, or its batches weigh nothing: give at least one (a generator that was used "
    "up before gives none)"
)


@contextmanager
def measuring(model: nn.Module) -> Iterator[None]:
    """A block in eval mode, after which the model is unchanged.

    Inside the block, dropout is off and BatchNorm is fixed; parameters have no gradient; compiled
    code runs as it was written; DistributedDataParallel sends no buffers, for which it would wait;
    and nn.Transformer's layers call their linear layers instead of a fused kernel. (Neither
    compiled code nor fused kernels run hooks.) After the block, also after an exception, the
    following are as before: every module's own mode, every parameter's gradient, the state of the
    random generators, the choice of kernels, and quantised layers, which change themselves when
    they are called (`left_as_they_are`).
    """
    require_unsharded(model)
    require_values(model)
    modes = [(module, module.training) for module in model.modules()]
    broadcasts = [
        (module, module.modules_buffers, module.require_forward_param_sync)
        for module in model.modules()
        if isinstance(module, DistributedDataParallel)
    ]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    devices = {device.index or 0 for device in working_devices(model) if device.type == "cuda"}
    fused = torch.backends.mha.get_fastpath_enabled()
    with (
        torch.random.fork_rng(devices=sorted(devices)),
        _not_compiled(),
        left_as_they_are(packed_modules(model)),
    ):
        try:
            torch.backends.mha.set_fastpath_enabled(False)
            # Not by eval(): some layers override it, to merge weights, which cannot be undone.
            for module, _ in modes:
                module.training = False
            for parameter, _ in gradients:
                parameter.grad = None
            for ddp, *_ in broadcasts:
                ddp.modules_buffers = []
            # Inside an autocast block of the caller, older versions of torch keep the casts of
            # parameters that were made under no_grad(). These have no graph, and torch would use
            # them where gradients are on.
            torch.clear_autocast_cache()
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fused)
            for module, training in modes:
                module.training = training
            for ddp, buffers, sync in broadcasts:
                ddp.modules_buffers, ddp.require_forward_param_sync = buffers, sync
            for parameter, gradient in gradients:
                parameter.grad = gradient


def _not_compiled() -> AbstractContextManager[Any]:
    """Compiled code runs as it was written. torch has this switch from 2.6 on. If nothing has
    loaded the compiler, there is no compiled code, and the compiler is not loaded for this."""
    switch = getattr(torch.compiler, "set_stance", None) if "torch._dynamo" in sys.modules else None
    return nullcontext() if switch is None else switch("force_eager")


@contextmanager
def called(
    modules: Mapping[str, nn.Module], *, without_gradient: bool = False
) -> Iterator[set[str]]:
    """Collect, inside the block, the names of the modules that are called; or of those alone that
    are called while gradients are off."""
    names: set[str] = set()

    def hook_of(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            if not (without_gradient and torch.is_grad_enabled()):
                names.add(name)

        return hook

    handles = [module.register_forward_pre_hook(hook_of(name)) for name, module in modules.items()]
    try:
        yield names
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def differentiable_twice(model: nn.Module) -> Iterator[None]:
    """A block in which the loss can be differentiated twice, after which the model is unchanged;
    see `measuring`.

    Gradients are on, autocast is off, half precision is replaced by float32, and attention uses the
    kernel that is twice differentiable.
    """
    device = next((device.type for device in working_devices(model)), "cpu")
    if any(parameter.is_meta and parameter.dtype in HALF for parameter in model.parameters()):
        raise ValueError(
            "the model holds weights in half precision that have no values here (offloaded, or on "
            "the meta device), and derivatives are taken in float32: load the model in float32 or "
            "onto devices that hold all of it, or use input_second_moment"
        )
    with (
        measuring(model),
        torch.inference_mode(False),  # this also switches gradients on
        _no_half_precision(model),
        torch.autocast(device, enabled=False),
        sdpa_kernel(SDPBackend.MATH),
    ):
        yield


@contextmanager
def _no_half_precision(model: nn.Module) -> Iterator[None]:
    """Inside the block, half-precision parameters, buffers and module inputs are float32.

    After the block the original tensors are back, bit for bit. A cast to half precision in the
    model's own code is not changed. Packed layers keep their tensors and compute as they do, and
    their outputs are float32.
    """
    packed = packed_modules(model)
    untouched = {id(t) for module in packed for t in own_tensors(module)}
    tensors = [t for t in (*model.parameters(), *model.buffers()) if id(t) not in untouched]
    half = [t for t in tensors if t.dtype in HALF]
    originals = [t.data for t in half]
    hooks = []
    try:
        for module in model.modules() if half else ():
            if not isinstance(module, torch.jit.ScriptModule):  # which takes no such hook
                hooks.append(module.register_forward_pre_hook(_in_float32, with_kwargs=True))
        for t in half:
            t.data = t.data.float()
        with float32_outside(packed):
            yield
    finally:
        for t, original in zip(half, originals, strict=True):
            t.data = original
        for handle in hooks:
            handle.remove()


def _in_float32(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    def cast(value: Any) -> Any:
        return value.float() if isinstance(value, Tensor) and value.dtype in HALF else value

    return tuple(map(cast, args)), {key: cast(value) for key, value in kwargs.items()}


def scalar_loss(model: nn.Module, loss_fn: LossFn, batch: Any) -> Tensor:
    """loss_fn(model, batch). Raises ValueError unless it is a floating-point tensor of shape ()."""
    loss: Any = loss_fn(model, batch)
    if not isinstance(loss, Tensor) or loss.ndim != 0 or not loss.is_floating_point():
        got = (
            f"{loss.dtype} of shape {tuple(loss.shape)}"
            if isinstance(loss, Tensor)
            else type(loss).__name__
        )
        raise ValueError(
            "loss_fn(model, batch) must return a scalar floating-point tensor (the mean loss), "
            f"got {got}"
        )
    return loss


def finite_loss(model: nn.Module, loss_fn: LossFn, batch: Any) -> Tensor:
    """`scalar_loss`; ValueError if it is not finite."""
    loss = scalar_loss(model, loss_fn, batch)
    if not torch.isfinite(loss):
        raise ValueError(
            f"the loss of a batch is {loss.item()}: check the data and the model's weights"
        )
    return loss


def differentiable_loss(model: nn.Module, loss_fn: LossFn, batch: Any) -> Tensor:
    """The scalar loss with its graph; call it inside `differentiable_twice`.

    Raises ValueError if the loss is not finite, or if loss_fn took gradients itself.
    """
    loss = finite_loss(model, loss_fn, batch)
    if any(parameter.grad is not None for parameter in model.parameters()):
        raise ValueError(
            "loss_fn called backward(): it must return the loss with its graph, and take no "
            "gradient"
        )
    return loss


def with_hint_at_one_batch(loss_fn: LossFn, batches: object) -> LossFn:
    """`loss_fn`, whose errors ask about `batches` if this is a tuple of tensors.

    Such a tuple is a valid iterable of batches. But (x, y) may also be one batch, where a list of
    such pairs was meant.
    """
    if not isinstance(batches, tuple) or not all(isinstance(part, Tensor) for part in batches):
        return loss_fn
    count = len(batches)

    def with_hint(model: nn.Module, batch: Any) -> Tensor:
        try:
            return loss_fn(model, batch)
        except Exception as error:  # user code, of any kind
            raise ValueError(
                f"loss_fn raised {type(error).__name__} on a batch. `batches` is a tuple of "
                f"{count} tensors, each of which counts as one batch: if the tuple itself is one "
                "batch, such as (x, y), pass [batches]"
            ) from error

    return with_hint


def repeatable(model: nn.Module, loss_fn: LossFn, batches: Iterable[Any]) -> Iterator[Any]:
    """The batches, one by one. The loss of the first is taken twice; ValueError if its two values
    differ."""
    for index, batch in enumerate(batches):
        if index == 0:
            first, second = (scalar_loss(model, loss_fn, batch).detach() for _ in range(2))
            # Some kernels add in varying order, so only half of the digits must agree. Random noise
            # would leave fewer.
            if abs(first - second) > torch.finfo(first.dtype).eps ** 0.5 * abs(first):
                raise ValueError(
                    f"the loss is not deterministic: one batch gave {float(first)} and then "
                    f"{float(second)}, in eval mode. Remove what is random in it (dropout by "
                    "function call, sampled data), or seed it"
                )
        yield batch


def batch_length(batch: Any) -> int:
    """The number of samples in a batch: the first dimension of its first tensor that has one.

    The tensor may be inside mappings, lists and tuples, at any depth. Raises ValueError if there is
    none.

    >>> batch_length({"text": "two sentences", "x": torch.zeros(2, 5)})
    2
    """
    length = _length(batch)
    if length is None:
        raise ValueError(
            f"found no tensor with a leading dimension in a batch of type {type(batch).__name__}: "
            "pass batch_weight=, a function batch -> number (for SensitivityLoRA: "
            "functools.partial(curvature, batch_weight=…))"
        )
    return length


def _length(batch: Any) -> int | None:
    if isinstance(batch, Tensor):
        return batch.shape[0] if batch.ndim else None
    if isinstance(batch, Mapping):
        parts = list(batch.values())
    else:
        parts = list(batch) if isinstance(batch, (list, tuple)) else []
    return next((n for n in map(_length, parts) if n is not None), None)
