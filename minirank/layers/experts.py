"""Adapters for stacks of experts: one parameter that holds a weight for each of several experts.

    W_e + s · B_e diag(gate) A_e    for every expert e

transformers keeps the experts of Mixtral, Qwen-MoE, GPT-OSS and others as 3-D parameters, (experts,
d_out, d_in) or (experts, d_in, d_out), which their module reads in its forward pass. No layer is
called, so that there are no inputs to multiply by A, then B. Instead the module reads W + ΔW, in
the parameter's place.

`wrap` and the others know a stack by the name of its parameter, and its adapter is a LoRA layer
like others, with one rank for all experts: A (experts, r, d_in), B (experts, d_out, r), gate (r,).

How it is done: the adapter is a submodule under the parameter's name, whose `base` holds the
parameter itself, and the module gets a subclass of its own class. There, reading the name calls the
adapter, which computes W + ΔW; within one forward pass of the module, once.

What it costs: W + ΔW has the size of W, is computed anew in every forward pass, and is kept for the
backward pass. (PEFT's target_parameters does the same.) In half precision the sum is computed in
float32, then rounded: changes of less than half a step of W's type are lost until they have grown.
`merge` before inference.

The adapter's name reads as a tensor, so that model.get_submodule(name), functional_call of
torch.func and torch.export do not find it: take lora_layers(model)[name], and unwrap to export.
Gradient checkpointing (use_reentrant=False) works around the module that holds the stack, as in
transformers, and not inside its forward: there only the first expert would make W + ΔW.

Which way round the weights lie is read from the module's attribute `is_transposed`, which
transformers' classes have. Where it is missing it has to be set: shapes alone do not tell.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from .lora import LoRALinear
from .pretrained import require_names_kept

READ = "_stacks_read_in_this_call"  # {(name, whether gradients are on): W + ΔW}
_readers: dict[type[Any], type[Any]] = {}  # {class of a module: its subclass that reads stacks}


class ExpertStack(nn.Module):
    """A parameter that stacks the weights of experts; what a `LoRAExperts` has as its base.

    Args:
        name: of the parameter, for error messages.
        module: the one that holds it.
        key: its name there.

    >>> experts = nn.Module()
    >>> experts.up, experts.is_transposed = nn.Parameter(torch.zeros(8, 3, 5)), True
    >>> ExpertStack("mlp.experts.up", experts, "up").shape
    (5, 3)
    """

    weight: nn.Parameter

    def __init__(self, name: str, module: nn.Module, key: str) -> None:
        super().__init__()
        weight = module._parameters[key]
        assert weight is not None  # the name is that of a parameter
        self.weight = weight
        self.training = module.training
        self.name = name
        self.experts = weight.shape[0]
        is_transposed = getattr(module, "is_transposed", None)
        self.transposed = is_transposed if isinstance(is_transposed, bool) else None

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in) of every expert. Raises ValueError if nothing says which way round."""
        _, rows, columns = self.weight.shape
        if self.transposed is None:
            holder, _, key = self.name.rpartition(".")
            module = f"model.get_submodule({holder!r})" if holder else "model"
            raise ValueError(
                f"{self.name!r} is a stack of {self.experts} experts of shape ({rows}, {columns}), "
                "and nothing says which way round: set the attribute that transformers' classes "
                f"have, {module}.is_transposed = False if an expert is (d_out, d_in), as in "
                f"F.linear(x, self.{key}[i]); True if it is (d_in, d_out), as in x @ self.{key}[i]"
            )
        return (columns, rows) if self.transposed else (rows, columns)

    def extra_repr(self) -> str:
        return f"{self.experts} experts, {tuple(self.weight.shape[1:])}"


class LoRAExperts(LoRALinear):
    """A LoRA layer around an `ExpertStack`. Calling it, without an argument, gives W + ΔW.

    The arguments are those of `LoRALinear`, but there is no dropout, since there are no inputs.

    >>> experts = nn.Module()
    >>> experts.up, experts.is_transposed = nn.Parameter(torch.zeros(8, 3, 5)), True
    >>> layer = LoRAExperts(ExpertStack("up", experts, "up"), rank=2)
    >>> layer.lora_A.shape, layer.lora_B.shape, layer().shape
    (torch.Size([8, 2, 3]), torch.Size([8, 5, 2]), torch.Size([8, 3, 5]))
    """

    base: ExpertStack
    is_read = True

    @property
    def leading_shape(self) -> tuple[int, ...]:
        return (self.base.experts,)

    def _checked_shape(self, base: nn.Module, dropout: float) -> tuple[int, int]:
        if not isinstance(base, ExpertStack):
            raise TypeError(f"expected an ExpertStack, got a {type(base).__name__}")
        if dropout:
            raise ValueError(
                f"dropout={dropout} needs the inputs of a layer, and {base.name!r} is a stack of "
                "experts, a parameter: wrap the stacks in a call of their own, with dropout=0"
            )
        return base.shape

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        state = super().state_dict(*args, **kwargs)
        prefix = kwargs.get("prefix", "")
        require_names_kept([name for name in state if name.startswith(prefix)])
        return state

    def forward(self) -> Tensor:  # type: ignore[override]
        """W + ΔW in the layout and type of W; W itself if merged, disabled or of rank 0."""
        if self.rank == 0:
            return self.base.weight
        self.require_averaged()
        return self.weight

    @property
    def bias(self) -> None:
        """A stack has none of its own."""
        return None

    def merged_weight(self) -> Tensor:
        W = self.base.weight
        with torch.autocast(W.device.type, enabled=False):
            sB, A = self.factors(W.dtype)
            left, right = (A.mT, sB.mT) if self.base.transposed else (sB, A)
            return torch.baddbmm(W.to(A.dtype), left, right).to(W.dtype)

    def contributions(self) -> Tensor:
        """‖s · gate_i · B[:, :, i] A[:, i, :]‖_F of every rank i, over all experts: (r,)."""
        norms: Tensor = super().contributions().norm(dim=0)
        return norms

    def extra_repr(self) -> str:
        return f"{self.base.experts} experts, {super().extra_repr()}"


def lora_layer(base: nn.Module, rank: int, **options: Any) -> LoRALinear:
    """The LoRA layer of the kind that goes around `base`, with the options of that kind.

    >>> lora_layer(nn.Linear(4, 2), 1)
    LoRALinear(
      4, 2, rank=1, scaling=1
      (base): Linear(in_features=4, out_features=2, bias=True)
    )
    """
    kind = LoRAExperts if isinstance(base, ExpertStack) else LoRALinear
    return kind(base, rank, **options)


# ---- in and out ---------------------------------------------------------------------------------


def put_into(module: nn.Module, key: str, layer: LoRAExperts) -> None:
    """Let `module` read the layer in place of its parameter `key`."""
    module._parameters[key] = None  # which keeps its place among the others
    module._modules[key] = layer
    if not isinstance(module, _ReadsStacks):
        module.__class__ = _reading(type(module))


def take_out_of(module: nn.Module, key: str) -> None:
    """Give `module` its parameter `key` back, as the layer's base holds it now."""
    layer = module._modules.pop(key)
    assert isinstance(layer, LoRAExperts)
    module._parameters[key] = layer.base.weight
    left = any(isinstance(child, LoRAExperts) for child in module._modules.values())
    if not left and isinstance(module, _ReadsStacks):
        module.__class__ = module.plain_class


class _ReadsStacks(nn.Module):
    """The part of a module's class that reads LoRAExperts as W + ΔW."""

    plain_class: type[Any]

    def __getattr__(self, name: str) -> Any:
        layer = self.__dict__.get("_modules", {}).get(name)
        if not isinstance(layer, LoRAExperts):
            return super().__getattr__(name)
        values = self.__dict__.get(READ)
        if values is None:
            return layer()
        # What is read without gradients has no graph, and would not do where they are on.
        key = (name, torch.is_grad_enabled())
        if key not in values:
            values[key] = layer()
        return values[key]

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced = super().__reduce_ex__(2)
        assert not isinstance(reduced, str)
        # pickle could not find the class, which no module holds under its name.
        return (_new, (self.plain_class,), *reduced[2:])


def _new(plain_class: type[Any]) -> Any:
    """An empty instance of the class that reads stacks, for copies and pickles to fill."""
    return object.__new__(_reading(plain_class))


def _reading(plain_class: type[Any]) -> type[Any]:
    """A subclass that reads stacks, and each of them once in a forward pass."""
    if plain_class in _readers:
        return _readers[plain_class]

    @functools.wraps(plain_class.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if READ in self.__dict__:
            return plain_class.forward(self, *args, **kwargs)
        self.__dict__[READ] = {}
        try:
            return plain_class.forward(self, *args, **kwargs)
        finally:
            del self.__dict__[READ]

    names = {"__module__": plain_class.__module__, "__qualname__": plain_class.__qualname__}
    members = {**names, "plain_class": plain_class, "forward": forward}
    _readers[plain_class] = type(plain_class.__name__, (_ReadsStacks, plain_class), members)
    return _readers[plain_class]
