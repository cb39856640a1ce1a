"""The LoRA layer (arXiv 2106.09685), with a gate for each rank, as all three methods use it.

y = W x + b + s · B (gate ⊙ A x)

W     (d_out, d_in)  the frozen weight
b     (d_out,)       its bias, or None
A     (r, d_in)      the down-projection; starts uniform in ±1/√d_in
B     (d_out, r)     the up-projection; starts at zero
gate  (r,)           a factor for each rank, called c by L1RA and λ by ShapLoRA; None means 1
s     a number       the scaling, alpha / r when the layer is made, and fixed from then on
ΔW    (d_out, d_in)  s · B diag(gate) A
"""

from __future__ import annotations

import torch
from torch import Tensor


def lora_forward(
    x: Tensor,
    W: Tensor,
    b: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: float,
    gate: Tensor | None = None,
) -> Tensor:
    """x: (…, d_in) → y: (…, d_out), in x's dtype. A, B and gate may have a wider one."""
    h = x.to(A.dtype) @ A.T  # (…, r)
    if gate is not None:
        h = gate.to(h.dtype) * h
    y = x @ W.T + (scaling * (h @ B.T)).to(x.dtype)
    return y if b is None else y + b.to(x.dtype)


def merged_weight(
    W: Tensor, A: Tensor, B: Tensor, scaling: float, gate: Tensor | None = None
) -> Tensor:
    """W + ΔW, summed in float32 or better and rounded once, to W's dtype: (d_out, d_in)."""
    wide = torch.promote_types(torch.promote_types(W.dtype, A.dtype), torch.float32)
    gated_B = B.to(wide) if gate is None else B.to(wide) * gate.to(wide)
    return (W.to(wide) + scaling * gated_B @ A.to(wide)).to(W.dtype)


class Layer:
    """A layer that can be merged for inference. `transposed`: W is (d_in, d_out), as in GPT-2."""

    def __init__(
        self,
        W: Tensor,
        b: Tensor | None,
        A: Tensor,
        B: Tensor,
        scaling: float,
        gate: Tensor | None = None,
        transposed: bool = False,
    ) -> None:
        self.weight, self.bias, self.transposed = W, b, transposed
        self.adapter = (A, B, scaling, gate)
        self.original: Tensor | None = None  # W, while self.weight holds W + ΔW

    def __call__(self, x: Tensor) -> Tensor:
        W = self.weight.T if self.transposed else self.weight
        if self.original is None:
            return lora_forward(x, W, self.bias, *self.adapter)
        return x @ W.T if self.bias is None else x @ W.T + self.bias

    def merge(self) -> None:
        if self.original is None:
            W = self.weight.T if self.transposed else self.weight
            merged = merged_weight(W, *self.adapter)
            self.original, self.weight = self.weight, merged.T if self.transposed else merged

    def unmerge(self) -> None:
        """W itself comes back, since (W + ΔW) − ΔW would have rounding errors."""
        if self.original is not None:
            self.weight, self.original = self.original, None


def demo() -> None:
    torch.manual_seed(0)
    x, W, A, B = torch.randn(5, 8), torch.randn(6, 8), torch.randn(2, 8), torch.randn(6, 2)
    layer = Layer(W, None, A, B, scaling=8 / 2)  # alpha = 8
    before = layer(x)
    layer.merge()
    print(f"merged: the output changes by {(layer(x) - before).abs().max():.0e}, which is rounding")
    layer.unmerge()
    print(f"unmerged: W is back bit for bit: {torch.equal(layer.weight, W)}")
    A, B = torch.cat([A, torch.randn(2, 8)]), torch.cat([B, torch.zeros(6, 2)], dim=1)
    for scaling, how in ((8 / 2, "kept at 8 / 2"), (8 / 4, "computed anew as 8 / 4")):
        change = (lora_forward(x, W, None, A, B, scaling) - before).abs().max()
        print(f"two ranks added, scaling {how}: the output changes by {change:.2g}")


if __name__ == "__main__":
    demo()
