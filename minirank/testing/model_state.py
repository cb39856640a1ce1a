"""Is the model the same after a block of code as before it?"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..tensor_bytes import tensor_bytes


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Assert that the block leaves `model` and the global CPU random generator as they were.

    Compared are the identity of every module, parameter and buffer, their values, gradients and
    `requires_grad`, the classes, the modes (train or eval), and the numbers of hooks.

    Raises:
        AssertionError: something changed. The message names the first difference.

    >>> import torch
    >>> from minirank.testing import unchanged
    >>> model = torch.nn.Linear(2, 1)
    >>> with unchanged(model):
    ...     y = model(torch.ones(1, 2))
    >>> with unchanged(model):
    ...     model = model.eval()
    Traceback (most recent call last):
    AssertionError: module '' (identity, mode, numbers of hooks) changed: ...
    """
    before = _state(model)
    yield
    after = _state(model)
    for key in dict.fromkeys([*before, *after]):
        old, new = before.get(key), after.get(key)
        if isinstance(old, Tensor) and isinstance(new, Tensor):
            same = _same_bits(old, new)
        else:
            same = old == new
        assert same, f"{key} changed: expected {old}, got {new}"


def _same_bits(old: Tensor, new: Tensor) -> bool:
    """Whether type, shape and entries are the same; a NaN is the same as itself."""
    if (old.dtype, old.shape) != (new.dtype, new.shape):
        return False
    return tensor_bytes(old) == tensor_bytes(new)


def _state(model: nn.Module) -> dict[str, object]:
    """{what it is: its value or a copy of it}"""
    state: dict[str, object] = {}
    for name, module in model.named_modules():
        hooks = [
            len(module._forward_hooks),
            len(module._forward_pre_hooks),
            len(module._backward_hooks),
            len(module._backward_pre_hooks),
        ]
        key = f"module {name!r} (identity, mode, numbers of hooks)"
        state[key] = (id(module), module.training, hooks)
        # Parametrizations change the class; some patch the forward method of one instance.
        state[f"module {name!r} (class, own forward)"] = (type(module), vars(module).get("forward"))
        for leaf, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is None:
                continue
            state[f"{name}.{leaf} (identity, requires_grad)"] = (id(tensor), tensor.requires_grad)
            state[f"{name}.{leaf}"] = tensor.detach().clone()
            state[f"{name}.{leaf}.grad"] = None if tensor.grad is None else tensor.grad.clone()
    state["the global random state"] = torch.get_rng_state()
    return state
