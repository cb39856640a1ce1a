"""What counts as a linear layer, and which way round its weight lies."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..packed import holds_packed_data, left_as_they_are, own_tensors, packed_shape
from ..placement import working_device


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """(d_out, d_in) if `module` is linear-like, else None.

    No class is asked for by name, and nothing is called. Either `module.weight` is a 2-D
    floating-point tensor of at least 16 bits,

    - of shape (out_features, in_features), both attributes of the module: nn.Linear, its
      subclasses and look-alikes;
    - or of shape (d_in, nf), with an attribute `nf`: transformers' Conv1D, which stores the
      transpose.

    Or the weight lies packed (quantised), and the module is taken at its word. It must

    - declare positive integers in_features and out_features, and have a forward of its own
      (nn.Linear's will do if the weight is a tensor subclass that has a dequantize() of its own);
    - hold packed data itself, in parameters, buffers or attributes: integers of up to 32 bits or
      floating-point numbers of 8 bits, with at least one bit for each of d_out · d_in weights, or
      such a tensor subclass;
    - hold fewer plain floating-point numbers than d_out · d_in, so that no weight can lie there;
    - and hold no modules with parameters, and no packed layer.

    These are the layers of bitsandbytes, torchao, quanto, HQQ and GPTQ, and torch's dynamically
    quantised nn.Linear, which has no backward pass.

    Not linear-like: a lazy weight; a packed `weight` of three or more dimensions (stacked experts);
    a module that only contains linear layers, such as PEFT's; nn.Bilinear.

    >>> linear_shape(nn.Linear(3, 5)), linear_shape(nn.LayerNorm(3))
    ((5, 3), None)
    """
    plain = _plain_shape(module)
    return packed_shape(module) if plain is None else plain


def is_packed(module: nn.Module) -> bool:
    """Whether the weight of a linear-like module lies packed, so that it cannot be read as it is.

    >>> is_packed(nn.Linear(3, 5))
    False
    """
    return _plain_shape(module) is None and packed_shape(module) is not None


def _plain_shape(module: nn.Module) -> tuple[int, int] | None:
    weight = read_weight(module)
    if weight is None or is_lazy(weight) or weight.ndim != 2:
        return None
    if not weight.is_floating_point() or holds_packed_data(weight):
        return None
    rows, columns = weight.shape
    if is_transposed(module):
        return (columns, rows) if columns == module.nf else None
    features = (getattr(module, "out_features", None), getattr(module, "in_features", None))
    return (rows, columns) if features == (rows, columns) else None


def weight_place(module: nn.Module) -> tuple[torch.dtype, torch.device]:
    """The dtype and device of numbers that go beside a linear-like module's weight.

    Beside a packed weight the dtype is float32: what it is stored in is no type to compute in.

    >>> weight_place(nn.Linear(3, 5, dtype=torch.float64))
    (torch.float64, device(type='cpu'))
    """
    if is_packed(module):
        tensors = own_tensors(module)
        place = working_device(module, tensors[0]) if tensors else torch.device("cpu")
        return torch.float32, place
    weight = read_weight(module)
    assert weight is not None  # the module is linear-like
    return weight.dtype, working_device(module, weight)


def is_transposed(module: nn.Module) -> bool:
    """Whether the weight is stored as (d_in, d_out), as in transformers' Conv1D.

    >>> is_transposed(nn.Linear(3, 5))
    False
    """
    return isinstance(getattr(module, "nf", None), int) and not hasattr(module, "out_features")


def read_weight(module: nn.Module) -> Tensor | None:
    """`module.weight`, if it is a tensor, read without side effects.

    A parametrized weight is computed at every reading. In training mode spectral_norm then steps
    its estimate, and other parametrizations draw random numbers.

    >>> read_weight(nn.Linear(3, 5)).shape, read_weight(nn.ReLU())
    (torch.Size([5, 3]), None)
    """
    parametrizations = getattr(module, "parametrizations", None)
    if isinstance(parametrizations, nn.ModuleDict):
        modes = [(inner, inner.training) for inner in parametrizations.modules()]
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            try:
                parametrizations.eval()
                weight = getattr(module, "weight", None)
            finally:
                for inner, training in modes:
                    inner.training = training
    else:
        weight = getattr(module, "weight", None)
    return weight if isinstance(weight, Tensor) else None


def applies_weight(module: nn.Module) -> bool:
    """Whether module(x) = W x + b with W = `module.weight`.

    That is so for nn.Linear's own forward. A packed layer is taken at its word and not called. Any
    other forward (of a masked or normalised layer, say) is tried on a few vectors, without the
    module's hooks.

    >>> class Scaled(nn.Linear):
    ...     def forward(self, x):
    ...         return 2 * super().forward(x)
    >>> applies_weight(nn.Linear(3, 5)), applies_weight(Scaled(3, 5))
    (True, False)
    """
    if type(module).forward is nn.Linear.forward or is_packed(module):
        return True
    weight, shape = read_weight(module), linear_shape(module)
    if weight is None or shape is None:
        return False
    W = weight.detach().t() if is_transposed(module) else weight.detach()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, shape[1], generator=generator, device=generator.device).to(W.device, W.dtype)
    try:
        with left_as_they_are([module]), torch.random.fork_rng(devices=[]), torch.no_grad():
            offset = module.forward(torch.zeros_like(x))
            difference = module.forward(x) - offset - x @ W.t()
    except Exception:  # user code, of any kind, that does not take a plain (n, d_in) input
        return False
    # Each entry of W x is a sum of d_in products, and rounds like one.
    scale = x.abs() @ W.abs().t() + offset.abs() + torch.finfo(W.dtype).tiny
    return bool((difference.abs() <= 32 * torch.finfo(W.dtype).eps * scale).all())
