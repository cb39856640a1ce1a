"""The LoRA layer that all three methods share (LoRA: arXiv 2106.09685).

    y = W x + b + s · B (gate ⊙ A x)

The folder's docstring (`__init__.py`) says what each symbol means and what shape it has.
Merging is in merge.py, changing the rank in resize.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import as_generator, is_integer, require
from ..packed import call_as_it_is, why_no_backward
from .data_parallel import require_averaged
from .linear import (
    as_matrix,
    convolution_settings,
    feature_dim,
    is_transposed,
    linear_shape,
    weight_place,
)
from .merge import Mergeable
from .pretrained import calling_save_pretrained, untied, warn_that_from_pretrained_cannot_read_it
from .read_weights import note_read
from .replaced import note_replaced, successors

# The axis of each parameter that counts ranks, from the end: a stack has one more axis
# in front (experts.py).
RANK_DIM = {"lora_A": -2, "lora_B": -1, "gate": -1}

CONVOLVE: dict[int, Callable[[Tensor, Tensor], Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class Scaling(NamedTuple):
    """The scaling of a layer, which is fixed when the layer is made."""

    reference_rank: float  # r_ref
    alpha: float
    s: float  # alpha / r_ref, or alpha / √r_ref if rank-stabilised


class LoRALinear(Mergeable):
    """A linear module with a trainable low-rank update beside its frozen weight.

    The layer holds `base` itself and freezes it: its dtype, device and hooks stay. A new layer
    computes exactly what `base` computes.

    Loading a state_dict with another number of ranks gives the layer new parameters of that rank.
    An optimizer made before still holds the old ones, and its next step raises: make it after
    loading, or call resize(model, ranks, optimizer) first.

    Args:
        base: a linear-like module (see `linear_shape`), with W (d_out, d_in).
        rank: number of ranks, 0 ≤ rank ≤ min(d_in, d_out).
        alpha: numerator of the scaling. None: the reference rank, so that s = 1 (√r_ref if
            `rank_stabilized`).
        reference_rank: r_ref in the scaling. None: `rank` (1 for rank 0).
        rank_stabilized: scaling = alpha / sqrt(r_ref) instead of alpha / r_ref.
        scaling: s itself, in place of `alpha`, `reference_rank` and `rank_stabilized`. (A `Scaling`
            holds all three; `wrap` makes one for all its layers.)
        gate: None: no gate; A uniform in ±1/sqrt(d_in), B = 0, as in LoRA.
            0 < gate ≤ 1: gates train from that value; A ~ N(0, 1/r_ref²), B = 0 (L1RA: 1.0).
            0.0: gates train from 0; A and B ~ N(0, 0.02²) (ShapLoRA; the deviation is AdaLoRA's).
        dropout: probability that an entry of the adapter's input is zeroed in training mode. It has
            no effect where another module reads `weight` instead of calling the layer; a warning
            says so in training (read_weights.py).
        dtype: of the adapter. None: the base weight's; beside a packed (quantised) weight float32,
            also in a half-precision model. float32 beside a half-precision base works.
        generator: a torch.Generator or a seed, for A and B. The global generator is never used.

    Raises:
        TypeError: `base` is not linear-like, or is a LoRALinear.
        ValueError: a number is out of its range, or `scaling` comes with what would compute it; or
            no gradient passes through `base`, which is quantised for inference alone.

    >>> import torch
    >>> layer = LoRALinear(torch.nn.Linear(8, 4), rank=2, scaling=2.0)
    >>> layer.lora_A.shape, layer.lora_B.shape, layer.delta_weight().shape
    (torch.Size([2, 8]), torch.Size([4, 2]), torch.Size([4, 8]))
    >>> x = torch.ones(3, 8)
    >>> torch.equal(layer(x), layer.base(x))  # B = 0 in a new layer
    True
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    gate: nn.Parameter | None
    # Names the present ranks: another object as soon as the layer gets other parameters. It keeps
    # its identity beside whoever holds it when both are copied or pickled together.
    ranks_token: object
    has_dropped = False  # whether dropout has had its effect here; compiled calls tell it, too
    told_of_save_pretrained = False  # whether the user has been warned, once for all of the model

    def __init__(
        self,
        base: nn.Module,
        rank: int,
        *,
        alpha: float | None = None,
        reference_rank: float | None = None,
        rank_stabilized: bool = False,
        scaling: float | Scaling | None = None,
        gate: float | None = None,
        dropout: float = 0.0,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | int = 0,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = self._checked_shape(base, dropout)
        _require_numbers(rank, (self.out_features, self.in_features), gate, dropout, dtype)
        if not isinstance(scaling, Scaling):
            scaling = fixed_scaling(max(rank, 1), scaling, alpha, reference_rank, rank_stabilized)
        self.reference_rank, self.alpha, self.scaling = scaling
        self.initial_gate = None if gate is None else float(gate)
        self.dropout = float(dropout)
        self.enabled = True  # False: the layer computes what its base computes
        self.training = base.training
        self.base = base
        self.feature_dim = feature_dim(base)
        for key, value in convolution_settings(base).items():
            setattr(self, key, value)
        self._make_parameters(rank, dtype, as_generator(generator))
        # What `unwrap` gives back to the base's parameters, which are frozen from here on.
        self.base_requires_grad = {name: p.requires_grad for name, p in base.named_parameters()}
        base.requires_grad_(False)

    def _checked_shape(self, base: nn.Module, dropout: float) -> tuple[int, int]:
        """(d_out, d_in) of a module that can get this layer. Raises TypeError or ValueError."""
        if isinstance(base, LoRALinear):
            raise TypeError(
                "expected a module without an adapter, but this LoRALinear already has an adapter: "
                "resize() changes its rank"
            )
        shape = linear_shape(base)
        if shape is None:
            raise TypeError(
                "expected an nn.Linear-like module with a 2-D floating-point weight, or a "
                "convolution with kernel 1, stride 1, one group, no padding and torch's own "
                f"forward, got a {type(base).__name__}"
            )
        reason = why_no_backward(base)
        if reason is not None:
            raise ValueError(f"the base is a {type(base).__name__} without gradients: {reason}")
        return shape

    @property
    def rank(self) -> int:
        """r, the number of ranks now."""
        return self.lora_A.shape[RANK_DIM["lora_A"]]

    @property
    def leading_shape(self) -> tuple[int, ...]:
        """What comes before (d_out, d_in) in the shape of W: () here, (experts,) for a stack."""
        return ()

    @property
    def rank_cost(self) -> int:
        """Trainable parameters of one rank, without its gate: d_in + d_out for each weight."""
        return math.prod(self.leading_shape) * (self.in_features + self.out_features)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        # Assignments end here; to(), and load_state_dict() of the same rank, do not.
        super().register_parameter(name, param)
        self.ranks_token = object()

    # ---- initial values -------------------------------------------------------------------------

    def _make_parameters(
        self, rank: int, dtype: torch.dtype | None, generator: torch.Generator
    ) -> None:
        base_dtype, device = weight_place(self.base)
        new = self.initial_ranks(rank, dtype or base_dtype, device, generator)
        for name, value in new.items():
            self.register_parameter(name, nn.Parameter(value))
        if self.initial_gate is None:
            self.register_parameter("gate", None)

    def initial_ranks(
        self, count: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """The start of `count` ranks: lora_A (count, d_in), lora_B (d_out, count), perhaps gate.

        Their ΔW is exactly zero, since B or the gate is.
        """
        # Drawn in float32 on the generator's device, so that a seed gives one result for every
        # dtype and device.
        draw: dict[str, Any] = {
            "generator": generator,
            "device": generator.device,
            "dtype": torch.float32,
        }
        shapes = self._shapes(count)
        A_shape, B_shape = shapes["lora_A"], shapes["lora_B"]
        B = torch.zeros(B_shape, device=device, dtype=dtype)
        if self.initial_gate is None:
            A = (2 * torch.rand(A_shape, **draw) - 1) / math.sqrt(self.in_features)
        elif self.initial_gate == 0:
            A = 0.02 * torch.randn(A_shape, **draw)
            B = 0.02 * torch.randn(B_shape, **draw)
        else:
            A = torch.randn(A_shape, **draw) / self.reference_rank
        new = {"lora_A": A.to(device, dtype), "lora_B": B.to(device, dtype)}
        if self.initial_gate is not None:
            new["gate"] = torch.full((count,), self.initial_gate, device=device, dtype=dtype)
        return new

    def _shapes(self, rank: int) -> dict[str, tuple[int, ...]]:
        """The shape of each parameter with so many ranks."""
        return {
            "lora_A": (*self.leading_shape, rank, self.in_features),
            "lora_B": (*self.leading_shape, self.out_features, rank),
            "gate": (rank,),
        }

    # ---- states ---------------------------------------------------------------------------------

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        state = super().state_dict(*args, **kwargs)
        saving = calling_save_pretrained()
        if saving is not None:
            model, stacklevel = saving
            weight = self.base._parameters.get("weight")
            if weight is not None:
                untied(state, kwargs.get("prefix", "") + "base.weight", weight, model)
            if not self.told_of_save_pretrained:
                for module in model.modules():
                    if isinstance(module, LoRALinear):
                        module.told_of_save_pretrained = True
                warn_that_from_pretrained_cannot_read_it(stacklevel)
        return state

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        before = {name: p for name, p in self._parameters.items() if p is not None}
        rank = None if self.merged else self._rank_to_adopt(state_dict, prefix)
        if rank is not None:
            for name, old in before.items():
                self.register_parameter(name, _with_rank(old, RANK_DIM[name], rank))
        errors = len(error_msgs)
        super()._load_from_state_dict(
            state_dict,
            prefix,
            local_metadata,
            strict,
            missing_keys,
            unexpected_keys,
            error_msgs,
        )
        if rank is not None and len(error_msgs) > errors:  # torch could not copy the values
            self._parameters.update(before)
        for name, old in before.items():
            if self._parameters[name] is not old:  # with assign=True too
                note_replaced([(self, name)], old)

    def _rank_to_adopt(self, state_dict: Mapping[str, Any], prefix: str) -> int | None:
        """The rank of the layer's tensors in a state, if it is another one and all of them fit.

        None leaves the layer as it is: torch loads what is of its size, and reports the rest.
        """
        mine = [name for name, parameter in self._parameters.items() if parameter is not None]
        saved = {name: state_dict.get(prefix + name) for name in RANK_DIM}
        shapes = {name: x.shape for name, x in saved.items() if isinstance(x, Tensor)}
        if shapes.keys() != set(mine) or len(shapes["lora_A"]) != self.lora_A.ndim:
            return None
        rank = shapes["lora_A"][RANK_DIM["lora_A"]]
        expected = self._shapes(rank)
        fits = all(tuple(shape) == expected[name] for name, shape in shapes.items())
        # The values of a DTensor lie on several devices, in shards that another rank would change.
        plain = all(type(self.get_parameter(name).data) is Tensor for name in mine)
        possible = rank != self.rank and rank <= min(self.in_features, self.out_features)
        return rank if fits and plain and possible else None

    # ---- the function ---------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        """y (…, d_out) for x (…, d_in), in the dtype of the base's output.

        A convolution has (n, d_in, …) and (n, d_out, …) instead.
        """
        y: Tensor = call_as_it_is(self.base, x)
        # Each is looked up once: nn.Module finds its parameters slowly.
        A, B, gate = self.lora_A, self.lora_B, self.gate
        rank = B.shape[-1]
        if rank == 0 or not self.enabled or self.merged:
            return y
        self.require_averaged()
        if x.dtype != A.dtype and not torch.is_autocast_enabled(x.device.type):
            x = x.to(A.dtype)
        if self.dropout and self.training:
            self.has_dropped = True
            x = F.dropout(x, self.dropout)
        if self.feature_dim != -1:
            return y + self._update_of_channels(x).to(y.dtype)
        h = F.linear(x, A)  # (…, r)
        if gate is not None:
            h = h * gate
        if h.dtype != y.dtype or y.is_nested:
            return y + (self.scaling * F.linear(h, B)).to(y.dtype)
        # y + s h Bᵀ as one fused multiply-add: no scaled copy of h Bᵀ, no second pass over y.
        if y.ndim == 2:
            return torch.addmm(y, h, B.t(), alpha=self.scaling)
        y_rows, h_rows = y.reshape(-1, self.out_features), h.reshape(-1, rank)
        return torch.addmm(y_rows, h_rows, B.t(), alpha=self.scaling).view(y.shape)

    def _update_of_channels(self, x: Tensor) -> Tensor:
        """s · B (gate ⊙ A x) at every position: (n, d_out, …) for x (n, d_in, …)."""
        kernel = (1,) * (-1 - self.feature_dim)
        convolve = CONVOLVE[len(kernel)]
        h = convolve(x, self.lora_A.view(*self.lora_A.shape, *kernel))  # (n, r, …)
        if self.gate is not None:
            h = h * self.gate.view(-1, *kernel)
        return self.scaling * convolve(h, self.lora_B.view(*self.lora_B.shape, *kernel))

    def require_averaged(self) -> None:
        """Raise RuntimeError if a DDP is training this layer, and does not know its parameters."""
        if self.training and not torch.compiler.is_compiling():
            require_averaged(self.lora_A, self.lora_B)

    def delta_weight(self) -> Tensor:
        """ΔW = s · B diag(gate) A, (d_out, d_in): float32 or better, differentiable."""
        sB, A = self.factors()
        return sB @ A

    @property
    def weight(self) -> Tensor:
        """The weight that the layer now stands for, in W's layout and dtype; differentiable.

        A packed W is dequantised for it; if the base does not say how, this raises ValueError.

        Some parents read a child's weight instead of calling it: nn.MultiheadAttention reads that
        of its out_proj, the fast path of nn.TransformerEncoderLayer those of its linears. They
        get W + ΔW here; W alone would silently drop the adapter.
        """
        if self.merged or not self.enabled:
            return self.base_weight
        if self.training:
            note_read(self)
        return self.merged_weight()

    @property
    def bias(self) -> Tensor | None:
        """b, (d_out,), or None: the base's own."""
        bias = self.base.bias
        assert bias is None or isinstance(bias, Tensor)
        return bias

    def merged_weight(self) -> Tensor:
        """W + ΔW of a layer that is not merged, in W's layout and dtype; differentiable.

        The sum is computed in float32 or better and rounded once.
        """
        W = self.base_weight
        sB, A = self.factors(W.dtype)
        left, right = (A.t(), sB.t()) if is_transposed(self.base) else (sB, A)
        total = torch.addmm(as_matrix(W).to(A.dtype), left, right).to(W.dtype)
        return total.view(W.shape)

    def contributions(self) -> Tensor:
        """‖s · gate_i · B[:, i] A[i, :]‖_F of every rank i: (r,), float32 or better.

        Every rank's part of ΔW has rank one, so its norm is that of its column times its row.
        """
        sB, A = self.factors()
        norms: Tensor = sB.detach().norm(dim=-2) * A.detach().norm(dim=-1)
        return norms

    def factors(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """s · B diag(gate) and A, in the widest of `dtype`, the adapter's dtype and float32."""
        work = torch.promote_types(torch.promote_types(self.lora_A.dtype, dtype), torch.float32)
        sB = self.lora_B.to(work) * self.scaling
        return sB if self.gate is None else sB * self.gate.to(work), self.lora_A.to(work)

    def extra_repr(self) -> str:
        gated = ", gated" if self.gate is not None else ""
        merged = ", merged" if self.merged else ""
        size = f"{self.in_features}, {self.out_features}"
        return f"{size}, rank={self.rank}, scaling={self.scaling:g}{gated}{merged}"


@torch.inference_mode(False)  # parameters made in inference mode could not train
def _with_rank(parameter: nn.Parameter, axis: int, rank: int) -> nn.Parameter:
    """A parameter like `parameter`, without values yet, for so many ranks along `axis`.

    If the parameter is another layer's too, which has replaced it by such a one, it is that one.
    """
    shape = list(parameter.shape)
    shape[axis] = rank
    for shared in successors(parameter):
        if list(shared.shape) == shape:
            return shared
    return nn.Parameter(parameter.new_empty(shape), requires_grad=parameter.requires_grad)


def fixed_scaling(
    default_reference_rank: float,
    scaling: float | None,
    alpha: float | None,
    reference_rank: float | None,
    rank_stabilized: bool,
) -> Scaling:
    """The scaling of new layers, from the arguments of `LoRALinear` or `wrap`.

    Args:
        default_reference_rank: r_ref where `reference_rank` is None.

    Raises:
        ValueError: a number that is not finite and positive, or `scaling` and what would compute
            it.
    """
    numbers = {"scaling": scaling, "alpha": alpha, "reference_rank": reference_rank}
    for name, number in numbers.items():
        allowed = number is None or (not isinstance(number, bool) and 0 < number < math.inf)
        require(allowed, name, number, "a finite positive number")
    if scaling is not None and (alpha is not None or reference_rank is not None or rank_stabilized):
        raise ValueError(
            f"scaling={scaling!r} is the whole scale of the update: give either scaling, or alpha, "
            "reference_rank and rank_stabilized, from which it is computed"
        )
    r_ref = float(default_reference_rank if reference_rank is None else reference_rank)
    if scaling is not None:
        s = float(scaling)
        numerator = s * r_ref
    else:
        numerator = float(r_ref if alpha is None else alpha)
        s = numerator / (math.sqrt(r_ref) if rank_stabilized else r_ref)
    if not (0 < numerator < math.inf and 0 < s < math.inf):
        raise ValueError(
            f"the scaling {s!r} = alpha / reference_rank, with alpha {numerator!r} and reference "
            f"rank {r_ref!r}, is out of the range of float64: give numbers nearer to 1"
        )
    return Scaling(r_ref, numerator, s)


def _require_numbers(
    rank: int,
    shape: tuple[int, int],
    gate: float | None,
    dropout: float,
    dtype: torch.dtype | None,
) -> None:
    limit = min(shape)
    expected = f"an integer from 0 to min(d_in, d_out) = {limit}"
    require(is_integer(rank, 0, limit), "rank", rank, expected)
    start = "None (no gate) or a start value from 0 to 1"
    in_range = gate is None or (not isinstance(gate, bool) and 0 <= gate <= 1)
    require(in_range, "gate", gate, start)
    require(0 <= dropout < 1, "dropout", dropout, "at least 0 and below 1")
    require(dtype is None or dtype.is_floating_point, "dtype", dtype, "a floating-point type")
