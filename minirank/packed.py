"""Layers whose weight lies packed: quantised, by whatever library, in whatever layout.

No library is imported to recognise its layers. They are told by what they hold, and where a
library has a trap of its own, by the attribute that opens it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

HALF = (torch.float16, torch.bfloat16)
REPACKS = "support_avx512bf16_for_cpu"  # an attribute of bitsandbytes' Linear4bit


# ---- what is packed -----------------------------------------------------------------------------


def holds_packed_data(tensor: Tensor) -> bool:
    """Whether a tensor's entries are not the weight itself, but a code for it.

    So are integers, floating-point numbers of 8 bits, and tensor subclasses that dequantise
    themselves, whatever type they say they have.

    >>> holds_packed_data(torch.zeros(2, dtype=torch.int8)), holds_packed_data(torch.zeros(2))
    (True, False)
    """
    if tensor.is_floating_point():
        return tensor.dtype.itemsize < 2 or dequantizes_itself(tensor)
    return not tensor.is_complex() and tensor.dtype != torch.bool


def dequantizes_itself(tensor: Tensor) -> bool:
    """Whether this is a tensor subclass with a method of its own that gives the dequantised values.

    >>> dequantizes_itself(torch.zeros(2))
    False
    """
    kind = type(tensor)
    has_own_method = kind.dequantize is not Tensor.dequantize
    return has_own_method or hasattr(kind, "get_original_weight")  # the latter: torchao's NF4


def own_tensors(module: nn.Module) -> list[Tensor]:
    """The parameters, buffers and tensor attributes of the module itself.

    >>> [tuple(tensor.shape) for tensor in own_tensors(nn.Linear(3, 5))]
    [(5, 3), (5,)]
    """
    values = [*module._parameters.values(), *module._buffers.values(), *vars(module).values()]
    return [value for value in values if isinstance(value, Tensor) and not is_lazy(value)]


def packed_shape(module: nn.Module) -> tuple[int, int] | None:
    """(d_out, d_in) of a linear layer whose weight lies packed, else None; nothing is computed.

    `minirank.layers.linear.linear_shape` says what counts.

    >>> packed_shape(nn.Linear(3, 5))
    """
    if isinstance(module, torch.jit.ScriptModule):
        return None
    d_out, d_in = getattr(module, "out_features", None), getattr(module, "in_features", None)
    if not (isinstance(d_out, int) and isinstance(d_in, int)) or min(d_out, d_in) < 1:
        return None
    weight = stored_weight(module)
    if hasattr(module, "parametrizations") or not _computes_from_packed_data(module, weight):
        return None
    inner = [child for child in module.modules() if child is not module]
    if any(child._parameters or packed_shape(child) for child in inner):
        return None
    return (d_out, d_in) if _holds_weight(module, d_out * d_in) else None


def packed_modules(model: nn.Module) -> list[nn.Module]:
    """The modules of `model`, itself included, whose weight lies packed."""
    return [module for module in model.modules() if packed_shape(module) is not None]


def stored_weight(module: nn.Module) -> Tensor | None:
    """The parameter or buffer `weight` of the module; None without one, or if it is scripted."""
    if isinstance(module, torch.jit.ScriptModule):  # its `_parameters` is no dict
        return None
    weight = module._parameters.get("weight")
    return module._buffers.get("weight") if weight is None else weight


def _computes_from_packed_data(module: nn.Module, weight: Tensor | None) -> bool:
    """Whether the module has a forward that can do without a plain weight."""
    forward = type(module).forward
    if weight is None:
        return forward not in (nn.Module.forward, nn.Linear.forward)
    if is_lazy(weight) or weight.ndim > 2 or not holds_packed_data(weight):
        return False
    # torch's own linear function takes packed data from a tensor subclass alone.
    return forward is not nn.Linear.forward or dequantizes_itself(weight)


def _holds_weight(module: nn.Module, entries: int) -> bool:
    """Whether the module holds packed data for so many weights, and too little else for them."""
    if is_dynamically_quantized(module):
        return True
    tensors = own_tensors(module)
    plain = sum(
        tensor.numel()
        for tensor in tensors
        if tensor.is_floating_point() and not holds_packed_data(tensor)
    )
    return most_packed_weights(tensors) >= entries > plain


def most_packed_weights(tensors: Iterable[Tensor]) -> int:
    """How many weights the packed data among these tensors can stand for: at one bit for each, or
    as many as a tensor that dequantises itself says.

    >>> most_packed_weights([torch.zeros(3, dtype=torch.int8), torch.zeros(9)])
    24
    """
    count = 0
    for tensor in tensors:
        if dequantizes_itself(tensor):
            count += tensor.numel()
        elif holds_packed_data(tensor) and tensor.dtype.itemsize <= 4:  # not indices and counters
            count += 8 * tensor.numel() * tensor.dtype.itemsize
    return count


def is_dynamically_quantized(module: nn.Module) -> bool:
    """Whether this is a linear layer of torch's dynamic quantisation.

    >>> is_dynamically_quantized(nn.Linear(3, 5))
    False
    """
    homes = (kind.__module__ for kind in type(module).__mro__)
    return any(home.startswith("torch.ao.nn.quantized.dynamic.modules.linear") for home in homes)


def why_no_backward(module: nn.Module) -> str | None:
    """Why no gradient passes through the module, and what to do; None if nothing is known.

    >>> why_no_backward(nn.Linear(3, 5))
    """
    if is_dynamically_quantized(module):
        return (
            "torch's dynamic quantisation has no backward pass, so nothing below such a layer can "
            "be trained or differentiated: take the model before quantize_dynamic, or quantise it "
            "by a library whose layers have one, such as torchao or bitsandbytes"
        )
    if is_repacked(module):
        return (
            "bitsandbytes repacked this 4-bit layer for inference when it was called on the CPU "
            "in evaluation mode. That rounded its weight once more, and no gradient passes through "
            "it any more: load the model again, and score or wrap it before it is evaluated"
        )
    return None


def require_not_repacked(model: nn.Module) -> None:
    """Raise ValueError if bitsandbytes has repacked a layer of `model`, which cuts its gradient."""
    for name, module in model.named_modules():
        if is_repacked(module):
            where = repr(name) if name else f"this {type(module).__name__}"
            raise ValueError(f"no gradient passes through {where}: {why_no_backward(module)}")


def would_repack(module: nn.Module) -> bool:
    """Whether bitsandbytes would repack the weight in an evaluation on the CPU."""
    weight = stored_weight(module)
    on_cpu = weight is not None and weight.device.type == "cpu"
    return on_cpu and bool(vars(module).get(REPACKS, False))


def is_repacked(module: nn.Module) -> bool:
    """Whether bitsandbytes has put a 4-bit weight into the layout of its CPU inference."""
    state = getattr(stored_weight(module), "quant_state", None)
    return bool(getattr(state, "packing_format_for_cpu", False))


# ---- dequantised --------------------------------------------------------------------------------


def dequantized_weight(module: nn.Module, shape: tuple[int, int]) -> Tensor:
    """The weight (d_out, d_in) that the module's packed data stands for, by its own word.

    In turn: the weight's own `dequantize()` (torchao, quanto), the module's own (HQQ), and
    bitsandbytes' two kinds.

    Raises:
        ValueError: there is none of these, or it gives no floating-point tensor of this shape.
    """
    values = _own_dequantized(module)
    fits = isinstance(values, Tensor) and values.shape == shape and values.is_floating_point()
    if not fits:
        got = "" if values is None else f" (its dequantize() gave {_described(values)})"
        raise ValueError(
            f"the weight of this {type(module).__name__} is packed, and the layer does not say how "
            f"to dequantise it to {shape}{got}: give it a method dequantize() that returns the "
            "weight, or use a model that is not quantised"
        )
    result: Tensor = values.detach()
    return result


def _own_dequantized(module: nn.Module) -> Any:
    """What the weight or the module gives as dequantised; None if neither has such a method."""
    weight = stored_weight(module)
    if weight is None or not dequantizes_itself(weight):
        of_module: Any = getattr(module, "dequantize", None)
        if callable(of_module):
            return of_module()
        return None if weight is None else _bitsandbytes_weight(module, weight)
    is_nf4 = hasattr(weight, "get_original_weight")  # whose dequantize() needs an argument
    of_weight: Any = getattr(weight, "get_original_weight" if is_nf4 else "dequantize")
    return of_weight()


def _described(values: object) -> str:
    if isinstance(values, Tensor):
        return f"{values.dtype} of shape {tuple(values.shape)}"
    return type(values).__name__


def _bitsandbytes_weight(module: nn.Module, weight: Tensor) -> Tensor | None:
    """The weight of a Linear8bitLt or Linear4bit, or None if this is neither."""
    if type(weight).__name__ == "Int8Params" and weight.dtype == torch.int8:
        # The row maxima move from the weight to the module's state in the first forward pass.
        scales = getattr(weight, "SCB", None)
        if scales is None:
            scales = getattr(getattr(module, "state", None), "SCB", None)
        return None if scales is None else weight.detach() * (scales / 127)[:, None]
    state = getattr(weight, "quant_state", None)
    functional = getattr(sys.modules.get("bitsandbytes"), "functional", None)
    if state is None or functional is None or is_repacked(module):
        return None
    values: Tensor = functional.dequantize_4bit(weight.detach(), state)
    return values


# ---- called, and left as it was -----------------------------------------------------------------


@contextmanager
def left_as_they_are(modules: Iterable[nn.Module]) -> Iterator[None]:
    """A block in which quantised modules may be called, and after which they are as before.

    Quantised layers change themselves when they are called: bitsandbytes casts a bias to the type
    of the input, in place, and notes the type of the first input; its 4-bit layer repacks its
    weight on the CPU, with a loss, when it is called in evaluation mode without gradients. The
    latter is switched off in the block.
    """
    kept = [_Kept(module) for module in modules]
    try:
        for each in kept:
            if getattr(each.module, REPACKS, False):
                setattr(each.module, REPACKS, False)
        yield
    finally:
        for each in kept:
            each.put_back()


class _Kept:
    """The attributes of a module, and the data and attributes of its own parameters."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        # Not what nn.Module itself keeps (hooks, children, …), which others may change meanwhile.
        self.attributes = {
            key: value
            for key, value in vars(module).items()
            if key != "training" and not isinstance(value, dict)
        }
        tensors = [*module._parameters.values(), *module._buffers.values()]
        self.tensors = [
            (tensor, tensor.data, dict(vars(tensor)))
            for tensor in tensors
            if tensor is not None and not hasattr(type(tensor), "__tensor_flatten__")
        ]

    def put_back(self) -> None:
        for key, value in self.attributes.items():
            if vars(self.module).get(key) is not value:
                setattr(self.module, key, value)
        for tensor, data, attributes in self.tensors:
            if tensor.dtype != data.dtype or tensor.data_ptr() != data.data_ptr():
                tensor.data = data
            vars(tensor).update(attributes)


def call_as_it_is(module: nn.Module, x: Tensor) -> Any:
    """module(x), which does not repack a 4-bit layer of bitsandbytes for inference on the CPU."""
    if not getattr(module, REPACKS, False):
        return module(x)
    setattr(module, REPACKS, False)
    try:
        return module(x)
    finally:
        setattr(module, REPACKS, True)


# ---- half precision -----------------------------------------------------------------------------


def half_type(module: nn.Module) -> torch.dtype | None:
    """The half-precision type in which a packed module computes; None if it is another one, or the
    input's.

    >>> half_type(nn.Linear(3, 5)), half_type(nn.Linear(3, 5).half())
    (None, torch.float16)
    """
    types = [getattr(module, "compute_dtype", None)] + [t.dtype for t in own_tensors(module)]
    return next((dtype for dtype in types if dtype in HALF), None)


def type_of_derivatives(module: nn.Module) -> torch.dtype:
    """The widest floating-point type that a packed module names or holds, float32 at least.

    >>> type_of_derivatives(nn.Linear(3, 5).half()), type_of_derivatives(nn.Linear(3, 5).double())
    (torch.float32, torch.float64)
    """
    widest = torch.float32
    for dtype in [getattr(module, "compute_dtype", None)] + [t.dtype for t in own_tensors(module)]:
        if isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1:
            widest = torch.promote_types(widest, dtype)
    return widest


@contextmanager
def float32_outside(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside the block, the modules take and give float32, and compute in their own half precision.

    A packed weight cannot be cast to float32 as other tensors are.
    """
    replaced: list[tuple[nn.Module, Any]] = []
    try:
        for module in modules:
            dtype = half_type(module)
            if dtype is not None:
                replaced.append((module, vars(module).get("forward")))
                # Not by hooks: others see float32 on both sides of the layer.
                module.forward = _between(module.forward, dtype)
        yield
    finally:
        for module, own_forward in replaced:
            if own_forward is None:
                del module.forward
            else:  # another library had replaced it before
                module.forward = own_forward


def _between(forward: Any, dtype: torch.dtype) -> Any:
    def in_own_type(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        z = forward(x.to(dtype) if x.is_floating_point() else x, *args, **kwargs)
        return z.float() if isinstance(z, Tensor) and z.dtype in HALF else z

    return in_own_type
