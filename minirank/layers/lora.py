"""The LoRA layer that all three methods share (LoRA: arXiv 2106.09685).

    y = W x + b + s · B (gate ⊙ A x)

    symbol  code              shape / unit
    W       base.weight       (d_out, d_in), frozen; (d_in, d_out) in transformers' Conv1D
    A       lora_A            (r, d_in)
    B       lora_B            (d_out, r)
    c, λ    gate              (r,), only where asked for (L1RA calls it c, ShapLoRA λ)
    s       scaling           alpha / r_ref, or alpha / sqrt(r_ref) if rank-stabilised (arXiv 2312.03732)
    ΔW      delta_weight()    (d_out, d_in) = s · B diag(gate) A

`scaling` is fixed by a *reference* rank when the layer is made and never follows the rank afterwards: recomputing
alpha / r after pruning would silently change the trained function.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import as_generator, is_integer, require
from .linear import is_transposed, linear_shape, read_weight

RANK_DIM = {"lora_A": 0, "lora_B": 1, "gate": 0}  # the axis of each parameter that counts ranks


def select_ranks(value: Tensor, dim: int, keep: Tensor) -> Tensor:
    """The slices of `value` along `dim` where the bool mask `keep`, on any device, is true."""
    return value.index_select(dim, keep.nonzero().flatten().to(value.device))


def check_scaling(
    scaling: float | None,
    alpha: float | None,
    reference_rank: float | None,
    rank_stabilized: bool,
) -> None:
    """Raise ValueError unless the numbers are finite and positive and fix the scaling in one way only."""
    numbers = {"scaling": scaling, "alpha": alpha, "reference_rank": reference_rank}
    for name, number in numbers.items():
        expected = "a finite positive number"
        require(number is None or 0 < number < math.inf, name, number, expected)
    if scaling is not None and (alpha is not None or reference_rank is not None or rank_stabilized):
        raise ValueError(
            f"scaling={scaling!r} is the whole scale of the update: give either scaling, or alpha, "
            "reference_rank and rank_stabilized, from which it is computed"
        )


class LoRALinear(nn.Module):
    """A linear module with a low-rank update beside it. It holds `base` itself, whose dtype, device, hooks and
    identity survive, and freezes it. The function is exactly the base's when the layer is new.

    Args:
        base: a linear-like module (see `linear_shape`).
        rank: 0 ≤ rank ≤ min(d_in, d_out).
        alpha: numerator of the scaling. None: the reference rank, so that the plain scaling is 1.
        reference_rank: r_ref in the scaling. None: `rank`.
        rank_stabilized: scaling = alpha / sqrt(r_ref) instead of alpha / r_ref.
        scaling: s itself, in place of `alpha`, `reference_rank` and `rank_stabilized`.
        gate: None: no gate; A uniform in ±1/sqrt(d_in), B = 0, as in LoRA.
            0 < gate ≤ 1: trained gates from that value; A ~ N(0, 1/r_ref²), B = 0 (L1RA starts from 1).
            0.0: trained gates from 0; A and B ~ N(0, 0.02²) (ShapLoRA; the deviation is AdaLoRA's).
        dropout: probability of zeroing an entry of the adapter's input while training.
        dtype: of the adapter. None: the base weight's. float32 beside a half-precision base is supported.
        generator: a torch.Generator or a seed, for A and B. The global RNG is never read.

    Raises:
        TypeError: `base` is not linear-like or is a LoRALinear.
        ValueError: a number is out of its range.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    gate: nn.Parameter | None

    def __init__(
        self,
        base: nn.Module,
        rank: int,
        *,
        alpha: float | None = None,
        reference_rank: float | None = None,
        rank_stabilized: bool = False,
        scaling: float | None = None,
        gate: float | None = None,
        dropout: float = 0.0,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | int = 0,
    ) -> None:
        super().__init__()
        shape = None if isinstance(base, LoRALinear) else linear_shape(base)
        if shape is None:
            raise TypeError(
                f"expected an nn.Linear-like module with a floating-point weight, got {type(base).__name__}"
                + (
                    ", which already has an adapter: resize it instead"
                    if isinstance(base, LoRALinear)
                    else ""
                )
            )
        self.out_features, self.in_features = shape
        require(
            is_integer(rank, 0, min(shape)),
            "rank",
            rank,
            f"an integer from 0 to min(d_in, d_out) = {min(shape)}",
        )
        check_scaling(scaling, alpha, reference_rank, rank_stabilized)
        require(
            gate is None or 0 <= gate <= 1,
            "gate",
            gate,
            "None (no gate) or a start value from 0 to 1",
        )
        require(0 <= dropout < 1, "dropout", dropout, "at least 0 and below 1")
        require(dtype is None or dtype.is_floating_point, "dtype", dtype, "a floating-point type")
        self.reference_rank = float(reference_rank if reference_rank is not None else max(rank, 1))
        if scaling is not None:
            self.alpha, self.scaling = scaling * self.reference_rank, float(scaling)
        else:
            self.alpha = float(alpha if alpha is not None else self.reference_rank)
            self.scaling = self.alpha / (
                math.sqrt(self.reference_rank) if rank_stabilized else self.reference_rank
            )
        self.initial_gate = gate
        self.dropout = float(dropout)
        self.enabled = True  # False: the base function, the adapter being kept
        self.base = base
        weight = read_weight(base)
        assert weight is not None  # linear_shape() has seen it
        for name, value in self._new_ranks(
            rank, dtype or weight.dtype, weight.device, as_generator(generator)
        ).items():
            self.register_parameter(name, nn.Parameter(value))
        if gate is None:
            self.register_parameter("gate", None)
        self.training = base.training
        # A tuple, so that nn.Module does not list the parameter a second time.
        self._unmerged: tuple[nn.Parameter] | None = None
        self._base_requires_grad = {name: p.requires_grad for name, p in base.named_parameters()}
        base.requires_grad_(False)

    # ---- the function ---------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        """x: (…, d_in) → (…, d_out)."""
        y: Tensor = self.base(x)
        if self.rank == 0 or self.merged or not self.enabled:
            return y
        if x.dtype != self.lora_A.dtype and not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.lora_A.dtype)
        h = F.linear(
            F.dropout(x, self.dropout, self.training) if self.dropout else x, self.lora_A
        )  # (…, r)
        if self.gate is not None:
            h = h * self.gate
        if h.dtype != y.dtype or y.is_nested:
            return y + (self.scaling * F.linear(h, self.lora_B)).to(y.dtype)
        # y + s h Bᵀ as one fused multiply-add: no scaled copy of h Bᵀ, and no second pass over y.
        rows = y.reshape(-1, self.out_features)
        return torch.addmm(
            rows, h.reshape(-1, self.rank), self.lora_B.t(), alpha=self.scaling
        ).view(y.shape)

    def delta_weight(self) -> Tensor:
        """ΔW = s · B diag(gate) A: (d_out, d_in), float32 or better, differentiable."""
        B, A = self._factors()
        return B @ A

    def _factors(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """s · B diag(gate) and A, in `dtype`, the adapter's dtype or float32, whichever is the widest."""
        work = torch.promote_types(torch.promote_types(self.lora_A.dtype, dtype), torch.float32)
        B = self.lora_B.to(work) * self.scaling
        return B if self.gate is None else B * self.gate.to(work), self.lora_A.to(work)

    @property
    def weight(self) -> Tensor:
        """The weight that the layer now stands for, W + ΔW, in W's layout and dtype; differentiable.

        Some parents read a child's weight instead of calling it (nn.MultiheadAttention its out_proj, the fast path
        of nn.TransformerEncoderLayer its linears): handing them W alone would silently drop the adapter.
        """
        return self._base_weight if self.merged or not self.enabled else self.merged_weight()

    def merged_weight(self) -> Tensor:
        """W + ΔW in W's layout and dtype, computed in float32 or better, differentiable."""
        W = self._base_weight
        B, A = self._factors(W.dtype)
        return torch.addmm(
            W.to(A.dtype), *((A.t(), B.t()) if is_transposed(self.base) else (B, A))
        ).to(W.dtype)

    @property
    def bias(self) -> Tensor | None:
        bias = self.base.bias
        assert bias is None or isinstance(bias, Tensor)
        return bias

    @property
    def rank(self) -> int:
        return self.lora_A.shape[0]

    # ---- changing the rank ----------------------------------------------------------------------

    def contributions(self) -> Tensor:
        """‖s · gate_i · B[:, i] A[i, :]‖_F of every rank: (r,), float32 or better."""
        B, A = self._factors()
        norms: Tensor = B.detach().norm(dim=0) * A.detach().norm(dim=1)
        return norms

    def resized(
        self, keep: Tensor, add: int = 0, *, generator: torch.Generator | int = 0
    ) -> dict[str, nn.Parameter]:
        """The parameters of this layer with other ranks; the layer itself is not changed (resize.py does that).

        keep: (r,) bool, the ranks that survive, in their order; `add` new ones follow, drawn as at the start, whose
        contribution is exactly zero (B or the gate is), so that growing leaves the function as it is.
        """
        if keep.dtype != torch.bool or keep.shape != (self.rank,):
            raise ValueError(
                f"keep must be bool of shape ({self.rank},), got {keep.dtype} of shape {tuple(keep.shape)}"
            )
        new_rank, limit = int(keep.sum()) + add, min(self.in_features, self.out_features)
        if add < 0 or new_rank > limit:
            raise ValueError(
                f"add={add} would give rank {new_rank}; expected add ≥ 0 and a rank of at most {limit}"
            )
        fresh = self._new_ranks(add, self.lora_A.dtype, self.lora_A.device, as_generator(generator))
        result = {}
        for name, new in fresh.items():
            old = self.get_parameter(name)
            dim = RANK_DIM[name]
            value = torch.cat([select_ranks(old.detach(), dim, keep), new], dim)
            result[name] = nn.Parameter(value, requires_grad=old.requires_grad)
        return result

    def _new_ranks(
        self, rank: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator
    ) -> dict[str, Tensor]:
        # Drawn in float32 on the generator's device, so that a seed gives one result for every dtype and device.
        draw: dict[str, Any] = {
            "generator": generator,
            "device": generator.device,
            "dtype": torch.float32,
        }
        A_shape, B_shape = (rank, self.in_features), (self.out_features, rank)
        B = torch.zeros(B_shape, device=device, dtype=dtype)
        if self.initial_gate is None:
            A = (2 * torch.rand(A_shape, **draw) - 1) / math.sqrt(self.in_features)
        elif self.initial_gate == 0:
            A, B = 0.02 * torch.randn(A_shape, **draw), 0.02 * torch.randn(B_shape, **draw)
        else:
            A = torch.randn(A_shape, **draw) / self.reference_rank
        new = {"lora_A": A.to(device, dtype), "lora_B": B.to(device, dtype)}
        if self.initial_gate is not None:
            new["gate"] = torch.full((rank,), self.initial_gate, device=device, dtype=dtype)
        return new

    # ---- merging --------------------------------------------------------------------------------

    @property
    def merged(self) -> bool:
        return self._unmerged is not None

    @property
    def _base_weight(self) -> nn.Parameter:
        weight: nn.Parameter = self.base.weight  # type: ignore[assignment]  # linear_shape() has checked it
        return weight

    def merge(self, weight: Tensor) -> None:
        """Put `weight`, which `merged_weight()` gave, into the base. The original parameter object is kept aside,
        so that `unmerge` restores it bit for bit. `merge` in wrap.py checks, then calls this for every layer."""
        self._unmerged = (self._base_weight,)
        self.base.weight = nn.Parameter(weight.detach(), requires_grad=False)

    def unmerge(self) -> None:
        if self._unmerged is not None:
            self.base.weight = self._unmerged[0]
            self._unmerged = None

    def release_base(self) -> nn.Module:
        """The base, with those parameters trainable again that were; it keeps W + ΔW if merged. This layer is done."""
        # The weight put aside by a merge may go on living in another module, which it was tied to.
        parameters = [*self.base.named_parameters(), *(("weight", p) for p in self._unmerged or ())]
        self._unmerged = None
        for name, parameter in parameters:
            if self._base_requires_grad.get(name, False):
                parameter.requires_grad_(True)
        return self.base

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LoRALinear:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self._unmerged is not None:  # the original weight follows .to(), .half(), …, too
            self._unmerged[0].data = fn(self._unmerged[0].data)
        return self

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        if self.merged:
            raise RuntimeError(
                "the state of a merged layer would hold ΔW twice (in the weight and in A, B): "
                "unmerge() the model first, or unwrap() it to save a plain model with ΔW in its weights"
            )
        super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        if self.merged:
            raise RuntimeError(
                "loading a state into a merged layer would be undone by unmerge(): unmerge() first"
            )
        super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        state = f"{', gated' if self.gate is not None else ''}{', merged' if self.merged else ''}"
        return f"{self.in_features}, {self.out_features}, rank={self.rank}, scaling={self.scaling:g}{state}"
