"""What counts as a linear layer, and which way round its weight lies."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.parameter import is_lazy


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """(d_out, d_in) if `module` is linear-like, else None. The rule, which asks for no class by name:

    - `weight` is a 2-D floating-point tensor of shape (out_features, in_features), both being attributes:
      nn.Linear, its subclasses and look-alikes;
    - or of shape (d_in, nf), `nf` being an attribute: transformers' Conv1D, which stores the transpose.

    Quantised (integer) and lazy weights are not linear-like.
    """
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or is_lazy(weight) or weight.ndim != 2 or not weight.is_floating_point():
        return None
    rows, columns = weight.shape
    if is_transposed(module):
        return (columns, rows) if columns == module.nf else None
    features = (getattr(module, "out_features", None), getattr(module, "in_features", None))
    return (rows, columns) if features == (rows, columns) else None


def is_transposed(module: nn.Module) -> bool:
    """Whether the weight is (d_in, d_out), as in transformers' Conv1D."""
    return isinstance(getattr(module, "nf", None), int)
