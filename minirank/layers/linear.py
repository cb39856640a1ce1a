"""What counts as a linear layer, which way round its weight lies, and where its features are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..packed import holds_packed_data, left_as_they_are, own_tensors, packed_shape
from ..placement import working_device

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# What parents may read of a convolution: to pad its input by themselves, say.
SETTINGS = (
    "in_channels",
    "out_channels",
    "kernel_size",
    "stride",
    "padding",
    "dilation",
    "groups",
    "padding_mode",
)


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """(d_out, d_in) if `module` is linear-like, else None.

    No other library's class is asked for by name, and nothing is called. Either `module.weight` is
    a floating-point tensor of at least 16 bits,

    - of shape (out_features, in_features), both attributes of the module: nn.Linear, its
      subclasses and look-alikes;
    - or of shape (d_in, nf), with an attribute `nf`: transformers' Conv1D, which stores the
      transpose;
    - or of shape (out_channels, in_channels, 1, …) in an nn.Conv1d, Conv2d or Conv3d with stride 1,
      one group, no padding and torch's own forward: a linear layer over the channels, at every
      position by itself.

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

    Not linear-like: any other convolution; a lazy weight; a packed `weight` of three or more
    dimensions (stacked experts); a module that only contains linear layers, such as PEFT's;
    nn.Bilinear.

    >>> linear_shape(nn.Linear(3, 5)), linear_shape(nn.LayerNorm(3))
    ((5, 3), None)
    >>> linear_shape(nn.Conv2d(3, 5, kernel_size=1)), linear_shape(nn.Conv2d(3, 5, kernel_size=3))
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
    if weight is None or is_lazy(weight) or weight.ndim < 2:
        return None
    if not weight.is_floating_point() or holds_packed_data(weight):
        return None
    rows, columns = weight.shape[:2]
    if isinstance(module, CONVOLUTIONS):
        of_channels = (module.out_channels, module.in_channels, *(1 for _ in module.kernel_size))
        return (rows, columns) if weight.shape == of_channels and _is_pointwise(module) else None
    if weight.ndim > 2:
        return None
    if is_transposed(module):
        return (columns, rows) if columns == module.nf else None
    features = (getattr(module, "out_features", None), getattr(module, "in_features", None))
    return (rows, columns) if features == (rows, columns) else None


def _is_pointwise(module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> bool:
    """Whether a convolution with a kernel of size 1 takes every position once, as it is.

    A subclass with a forward of its own may do more, as move axes, or normalise the outputs.
    """
    padding = module.padding  # a string, or a number for each dimension
    unpadded = isinstance(padding, str) or not any(padding)
    own_forward = type(module).forward not in (kind.forward for kind in CONVOLUTIONS)
    return unpadded and not own_forward and all(step == 1 for step in module.stride)


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


def as_matrix(weight: Tensor) -> Tensor:
    """A linear-like module's weight without the dimensions of a convolution's kernel, as a view.

    >>> as_matrix(nn.Conv2d(3, 5, 1).weight).shape
    torch.Size([5, 3])
    """
    return weight.flatten(1) if weight.ndim > 2 else weight


# ---- where the features are ---------------------------------------------------------------------


def feature_dim(module: nn.Module) -> int:
    """Which dimension of a linear-like module's inputs and outputs holds features.

    >>> feature_dim(nn.Linear(3, 5)), feature_dim(nn.Conv2d(3, 5, 1))
    (-1, -3)
    """
    return -1 - len(module.kernel_size) if isinstance(module, CONVOLUTIONS) else -1


def convolution_settings(module: nn.Module) -> dict[str, Any]:
    """{attribute: value} of what else than its weight parents may read of a convolution.

    >>> convolution_settings(nn.Conv1d(3, 5, 1))["stride"], convolution_settings(nn.Linear(3, 5))
    ((1,), {})
    """
    is_convolution = isinstance(module, CONVOLUTIONS)
    return {key: getattr(module, key) for key in SETTINGS} if is_convolution else {}


def features_last(x: Tensor, dim: int) -> Tensor:
    """An input or output with its features in the last dimension and samples in the first, a view.

    Args:
        x: with features in dimension `dim`: (…, d), (n, d, …), or (d, …) of a convolution without
            samples, which is taken as one sample.
        dim: the `feature_dim` of the module.

    >>> features_last(torch.zeros(2, 3, 7, 9), -3).shape, features_last(torch.zeros(3, 7), -2).shape
    (torch.Size([2, 7, 9, 3]), torch.Size([1, 7, 3]))
    """
    if dim == -1:
        return x
    return (x if x.ndim > -dim else x[None]).movedim(dim, -1)


def features_back(rows: Tensor, dim: int, like: Tensor) -> Tensor:
    """What `features_last` gives, (…, d), in the shape of the output `like`, as a view.

    >>> features_back(torch.zeros(1, 7, 3), -2, torch.zeros(3, 7)).shape
    torch.Size([3, 7])
    """
    return rows if dim == -1 else rows.movedim(-1, dim).view(like.shape)


# ---- what a module holds and computes -----------------------------------------------------------


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


def has_torch_forward(module: nn.Module) -> bool:
    """Whether torch's own nn.Linear or nn.Conv1d, Conv2d or Conv3d computes the output.

    >>> has_torch_forward(nn.Linear(3, 5)), has_torch_forward(nn.ReLU())
    (True, False)
    """
    return type(module).forward is nn.Linear.forward or type(module) in CONVOLUTIONS


def applies_weight(module: nn.Module) -> bool:
    """Whether module(x) = W x + b with W = `module.weight`.

    That is so for torch's own layers. A packed layer is taken at its word and not called. Any other
    forward (of a masked or normalised layer, say) is tried on a few vectors, without the module's
    hooks.

    >>> class Scaled(nn.Linear):
    ...     def forward(self, x):
    ...         return 2 * super().forward(x)
    >>> applies_weight(nn.Linear(3, 5)), applies_weight(Scaled(3, 5))
    (True, False)
    """
    if has_torch_forward(module) or is_packed(module):
        return True
    weight, shape = read_weight(module), linear_shape(module)
    if weight is None or shape is None:
        return False
    W = weight.detach().t() if is_transposed(module) else as_matrix(weight.detach())
    dim = feature_dim(module)
    positions = (4, *(2 for _ in range(-dim - 1)))
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(*positions, shape[1], generator=generator, device=generator.device)
    x = drawn.to(W.device, W.dtype)
    module_input = x.movedim(-1, dim)
    try:
        with left_as_they_are([module]), torch.random.fork_rng(devices=[]), torch.no_grad():
            offset = module.forward(torch.zeros_like(module_input)).movedim(dim, -1)
            difference = module.forward(module_input).movedim(dim, -1) - offset - x @ W.t()
    except Exception:  # user code, of any kind, that does not take a plain (n, d_in) input
        return False
    # Each entry of W x is a sum of d_in products, and rounds like one.
    scale = x.abs() @ W.abs().t() + offset.abs() + torch.finfo(W.dtype).tiny
    return bool((difference.abs() <= 32 * torch.finfo(W.dtype).eps * scale).all())
