"""How much of a model the targets reach, and what is left out and why: `coverage`.

Matrix entries are the entries of the weights that multiply activations, of two or more dimensions:
in linear, convolutional, recurrent and attention layers, stacked in experts, or bare parameters of
a module. Embeddings, position tables, biases and norms are not counted. A weight in two places is
counted once, and a quantised layer counts d_out · d_in, however it is stored.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import is_lazy

from ..checks import is_integer, shortened
from ..packed import most_packed_weights, own_tensors, stored_weight
from .attention import is_packed_attention
from .linear import linear_shape
from .lora import LoRALinear
from .names import each_once, joined, named_modules

TABLE_WIDTH = 100

STACK = "stack of experts"

# {kind of weight: why it is left out}, in the order of the table
REASONS = {
    "attention in_proj": "a parameter; see unpack_attention",
    "attention out_proj": "never called; see unpack_attention",
    STACK: "a 3-D parameter; adapted if named",
    "bare matrix": "a parameter, not a layer",
    "convolution": "a kernel above 1, strides, groups, padding, own forward",
    "recurrent weight": "not linear",
    "packed layer": "quantised",
    "tied head": "an embedding's weight; adapted if named",
    "lazy layer": "no shape yet; run the model once",
    "linear layer": "not among the targets",
}
NOT_SELECTED = "linear layer"  # the kind that the user left out

# Parameters of two or more dimensions with such a name do not multiply activations as a matrix.
NO_MATRIX = re.compile(r"bias|embed|(^|_)pos|token|table|latent|scale|norm|mask|_log$")


class LeftOut(NamedTuple):
    """Weights of one kind that the targets do not reach."""

    kind: str
    number: int  # of weights
    entries: int
    reason: str
    example: str  # the name of the first module


class Coverage(NamedTuple):
    """Which part of a model's matrix entries the targets reach, and what is left out.

    Its text is empty if everything is reached.

    >>> print(Coverage(30, 40, (LeftOut("convolution", 1, 10, "wider than 1", "stem"),)))
    The targets reach 75 % of the model's matrix entries. Left out:
       25 %  1 × convolution (wider than 1): stem
    """

    reached: int
    total: int
    left_out: tuple[LeftOut, ...]

    @property
    def share(self) -> float:
        """reached / total; 1 if the model has no matrices."""
        return self.reached / self.total if self.total else 1.0

    def __str__(self) -> str:
        if not self.left_out:
            return ""
        reached = percent(self.reached, self.total)
        lines = [f"The targets reach {reached} of the model's matrix entries. Left out:"]
        return "\n".join([*lines, *(self._line(group) for group in self.left_out)])

    def _line(self, group: LeftOut) -> str:
        share = f"{percent(group.entries, self.total):>5}"
        names = ":" if group.number == 1 else ", such as"
        start = f"  {share}  {group.number:,} × {group.kind} ({group.reason}){names} "
        return start + shortened(group.example, TABLE_WIDTH - len(start))


def percent(part: int, total: int) -> str:
    """A share in whole percent. What is not 0 or all is not rounded to it.

    >>> percent(1, 3), percent(1, 1000), percent(999, 1000)
    ('33 %', '<1 %', '>99 %')
    """
    if 0 < part < 0.01 * total:
        return "<1 %"
    if 0.99 * total < part < total:
        return ">99 %"
    return f"{round(100 * part / total) if total else 100} %"


def coverage(model: nn.Module, names: Iterable[str]) -> Coverage:
    """How many of the model's matrix entries the modules `names` hold, and what else there is.

    Args:
        names: of linear-like modules, stacks of experts or LoRA layers.

    >>> model = nn.Sequential(nn.Conv1d(4, 4, 3), nn.Linear(4, 12))
    >>> coverage(model, ["1"]).share
    0.5
    """
    single: dict[int, tuple[str, int] | None] = {}  # {id of a module: its kind and entries}

    def enter(module: nn.Module) -> bool:
        """Whether the matrices of the modules inside are their own, not parts of this one's."""
        if id(module) not in single:
            single[id(module)] = _single_matrix(module)
        return single[id(module)] is None and not isinstance(module, nn.RNNBase)

    every_name = list(named_modules(model, enter=enter))
    modules, named = each_once(every_name), dict(every_name)
    wanted = set(names)
    reached_ids = {id(named[name]) for name in wanted if name in named}
    tied = tied_heads(modules)
    reached: dict[int, int] = {}  # {id of a weight: entries}
    left: dict[int, tuple[str, str, int]] = {}  # {id of a weight: (kind, module, entries)}
    for name, module in modules.items():
        for kind, key, entries, weight in _matrices(module, single[id(module)]):
            full_name = joined(name, weight) if kind == STACK else name
            if id(module) in reached_ids or full_name in wanted:
                reached[key] = entries
            else:
                left.setdefault(key, ("tied head" if name in tied else kind, full_name, entries))
    groups: dict[str, list[tuple[str, int]]] = {kind: [] for kind in REASONS}
    for key, (kind, name, entries) in left.items():
        if key not in reached:
            groups[kind].append((name, entries))
    left_out = tuple(
        LeftOut(kind, len(found), sum(entries for _, entries in found), REASONS[kind], found[0][0])
        for kind, found in groups.items()
        if found
    )
    total = sum(reached.values()) + sum(group.entries for group in left_out)
    return Coverage(sum(reached.values()), total, left_out)


def is_out_proj(module: nn.Module) -> bool:
    """Whether this is the out_proj of an nn.MultiheadAttention, which nobody calls.

    >>> is_out_proj(nn.MultiheadAttention(4, 2).out_proj)
    True
    """
    return isinstance(module, NonDynamicallyQuantizableLinear)


def tied_heads(modules: Mapping[str, nn.Module]) -> set[str]:
    """The names of those linear-like modules whose weight is an embedding's too.

    >>> words, head = nn.Embedding(9, 4), nn.Linear(4, 9)
    >>> head.weight = words.weight
    >>> tied_heads({"words": words, "head": head})
    {'head'}
    """
    embedded = {id(stored_weight(module)) for module in modules.values() if is_embedding(module)}
    embedded -= {id(None)}
    return {
        name
        for name, module in modules.items()
        if id(stored_weight(module)) in embedded and not is_embedding(module)
    }


def is_embedding(module: nn.Module) -> bool:
    """Whether it looks up rows of its weight: nn.Embedding, nn.EmbeddingBag and look-alikes.

    >>> is_embedding(nn.Embedding(9, 4)), is_embedding(nn.Linear(4, 9))
    (True, False)
    """
    return hasattr(module, "num_embeddings") and hasattr(module, "embedding_dim")


def stacked_parameters(module: nn.Module) -> list[str]:
    """The names of those parameters of the module itself that stack the matrices of experts.

    >>> import torch
    >>> experts = nn.Module()
    >>> experts.up, experts.bias = nn.Parameter(torch.ones(8, 3, 5)), nn.Parameter(torch.ones(8, 5))
    >>> stacked_parameters(experts), stacked_parameters(nn.Conv1d(2, 2, 2))
    (['up'], [])
    """
    stacks = [
        key
        for key, parameter in module._parameters.items()
        if parameter is not None
        and parameter.ndim == 3
        and _kind_of_parameter(module, key, parameter) == STACK
    ]
    if not stacks or is_embedding(module) or _single_matrix(module) is not None:
        return []
    return stacks


# ---- the matrices of one module -----------------------------------------------------------------


def _matrices(
    module: nn.Module, single: tuple[str, int] | None
) -> Iterator[tuple[str, int, int, str]]:
    """(kind, id of the weight, entries, the weight's name) of each matrix of the module itself.

    Args:
        single: its `_single_matrix`.
    """
    if single is not None:
        weight = stored_weight(module.base if isinstance(module, LoRALinear) else module)
        yield single[0], id(module if weight is None else weight), single[1], "weight"
    elif not is_embedding(module):
        for key, parameter in module._parameters.items():
            kind = None if parameter is None else _kind_of_parameter(module, key, parameter)
            if parameter is not None and kind is not None:
                yield kind, id(parameter), parameter.numel(), key


def _single_matrix(module: nn.Module) -> tuple[str, int] | None:
    """(kind, entries) of a module that is one matrix, whatever it stores; else None."""
    if isinstance(module, LoRALinear):
        weights = math.prod(module.leading_shape)
        return NOT_SELECTED, weights * module.out_features * module.in_features
    if any(is_lazy(p) for p in module._parameters.values() if p is not None):
        return "lazy layer", 0
    shape = linear_shape(module)
    if shape is not None:
        kind = "attention out_proj" if is_out_proj(module) else NOT_SELECTED
        return kind, shape[0] * shape[1]
    if isinstance(module, _ConvNd):
        inputs = module.in_channels * module.out_channels // module.groups
        return "convolution", inputs * math.prod(module.kernel_size)
    packed = _packed_shape(module)
    return None if packed is None else ("packed layer", packed[0] * packed[1])


def _packed_shape(module: nn.Module) -> tuple[int, int] | None:
    """(d_out, d_in) of a module that declares them, and holds packed data for so many weights."""
    declared: tuple[Any, Any] = (
        getattr(module, "out_features", None),
        getattr(module, "in_features", None),
    )
    if not all(is_integer(size, 1) for size in declared):
        return None
    inner = [child for child in module.modules() if child is not module]
    if any(linear_shape(child) is not None for child in inner):
        return None
    if type(module).__module__.startswith("torch.ao.nn."):  # which hides the data from Python
        return declared
    # Not in a float kernel of an activation or a spline, say, nor in indices and counters.
    tensors = [tensor for part in [module, *inner] for tensor in own_tensors(part)]
    return declared if most_packed_weights(tensors) >= declared[0] * declared[1] else None


def _kind_of_parameter(module: nn.Module, key: str, parameter: nn.Parameter) -> str | None:
    """The kind of a parameter that multiplies activations, else None."""
    if parameter.ndim < 2 or not parameter.is_floating_point() or NO_MATRIX.search(key):
        return None
    if is_packed_attention(module):
        return "attention in_proj"
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        return "recurrent weight"
    if 1 in parameter.shape[:-1] or hasattr(module, "normalized_shape"):
        return None  # a table of positions, (1, n, d), or a norm over several dimensions
    return STACK if parameter.ndim == 3 else "bare matrix"
