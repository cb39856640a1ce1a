"""The input second moment: Sensitivity-LoRA's own stand-in for the Hessian diagonal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..layers.targets import Targets, linear_targets
from ..measure import LossFn, measuring, scalar_loss
from .estimate import DiagonalMean, Estimate, check_tolerance

DEFAULT_MASK = "attention_mask"
Mask = str | Callable[[Any], Tensor] | None


def input_second_moment(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Iterable[Any],
    targets: Targets = None,
    *,
    mask: Mask = DEFAULT_MASK,
    tolerance: float | None = None,
) -> Estimate:
    """h_j = mean over tokens of x_j², x being the input of the layer (Sensitivity-LoRA, appendix E).

    Estimates: for z = W x, the Hessian over a row of W is E[(∂²L/∂z_i²) x xᵀ] where the output curvature and x are
    independent. This is its diagonal for unit output curvature, the proxy of post-training quantisation (OBQ, GPTQ);
    a constant factor per model cancels in Eqs 11–15, one per layer does not: that is its bias. As a mean over the
    tokens of `batches` it is exact; the standard errors are over batches. Cost: the forward passes, in the model's own
    precision; no gradient is taken.

    Args:
        loss_fn: (model, batch) -> scalar; called for its forward pass, its value is not used.
        batches: any iterable; it is streamed once. Every token weighs the same, whatever its batch's size.
        targets: see `linear_targets`.
        mask: which tokens count: a key of batches that are mappings, or a function batch -> tensor; nonzero means a
            real token. Its shape is that of a layer's input but for the last dimension, flattened or not; layers with
            one row per sample (a pooler) count whole. None: every token. The default key is used where a batch has
            it; one that you name must be there. It holds for all targets: measure the encoder and the decoder of a
            sequence-to-sequence model apart, each with its own mask.

    Returns: {name: (d_in,)} on the module's device, float32 or better. Means are over all calls of a module.

    Raises ValueError: no batch, a loss that is not a scalar, a mask that fits no input, an input that is not finite
    (the first such layer is named), or a layer that no batch reached. The model is as before in any case.
    """
    check_tolerance(tolerance)
    modules = linear_targets(model, targets)
    total = DiagonalMean(modules)
    rows = _MeanSquares()
    inputs = {name: _BatchMean(name, rows) for name in modules}
    hooks = []
    batch_count = 0
    try:
        for name, module in modules.items():
            hooks.append(module.register_forward_pre_hook(inputs[name].observe, with_kwargs=True))
        with measuring(model), torch.no_grad():
            for batch in batches:
                batch_count += 1
                rows.start(_token_mask(mask, batch))
                scalar_loss(model, loss_fn, batch)
                for name, of_batch in inputs.items():
                    total.add(name, *of_batch.take())
                if total.known_to(tolerance):
                    break
    finally:
        for handle in hooks:
            handle.remove()
    for name, weight in total.weights.items():
        if batch_count and not weight:
            raise ValueError(
                f"no token reached {name!r} in {batch_count} batches: leave it out of targets, or give more data"
            )
    return total.result()


class _MeanSquares:
    """Mean of x_j² over the real tokens of a layer's input; computed once for layers that get the same tensor, as
    query, key and value projections do."""

    def start(self, tokens: _Tokens | None) -> None:
        self.tokens = tokens  # of the batch at hand
        self.last: tuple[Tensor, int] | None = (
            None  # an input, held so that no other takes its place, and its version
        )
        self.result = 0, torch.empty(0)

    def of(self, x: Tensor, name: str) -> tuple[int, Tensor]:
        """(number of tokens, mean: (d_in,))"""
        version = -1 if x.is_inference() else x._version
        if self.last is None or self.last[0] is not x or self.last[1] != version or version < 0:
            self.last, self.result = (x, version), self._compute(x.detach(), name)
        return self.result

    def _compute(self, x: Tensor, name: str) -> tuple[int, Tensor]:
        rows = x.to(torch.promote_types(x.dtype, torch.float32)).reshape(-1, x.shape[-1])
        if self.tokens is not None and not self.tokens.fit(x.shape[:-1]):
            raise ValueError(
                f"the mask of shape {tuple(self.tokens.shape)} does not fit the input of {name!r}, of shape "
                f"{tuple(x.shape)}: give a mask of its leading dimensions, or mask=None to count every row"
            )
        if (
            self.tokens is not None
            and len(self.tokens.positions) < len(rows) == self.tokens.shape.numel()
        ):
            # A choice of rows, not a product with zeros: padding may hold NaN.
            rows = rows.index_select(0, self.tokens.positions.to(rows.device)).square_()
        else:
            rows = rows.square()
        return len(rows), rows.sum(0) / max(len(rows), 1)


class _BatchMean:
    """The mean over every call of one layer in a batch, by a forward pre-hook."""

    def __init__(self, name: str, rows: _MeanSquares) -> None:
        self.name, self.rows = name, rows
        self.count = 0
        self.mean: Tensor | None = None  # (d_in,)

    def observe(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        count, mean = self.rows.of(args[0] if args else next(iter(kwargs.values())), self.name)
        self.count += count
        if count:
            self.mean = (
                mean if self.mean is None else self.mean + (mean - self.mean) * (count / self.count)
            )

    def take(self) -> tuple[Tensor | None, int]:
        """(mean, tokens) of the batch that ends here."""
        mean, count = self.mean, self.count
        self.mean, self.count = None, 0
        return mean, count


class _Tokens(NamedTuple):
    """Which positions of a batch are real."""

    shape: torch.Size
    positions: Tensor  # int64, positions in the flattened mask

    def fit(self, leading: torch.Size) -> bool:
        return leading in (self.shape, (self.shape.numel(),)) or leading.numel() == self.shape[0]


def _token_mask(mask: Mask, batch: Any) -> _Tokens | None:
    if callable(mask):
        tokens = mask(batch)
    elif mask is None:
        return None
    elif not isinstance(batch, Mapping) or mask not in batch:
        if mask == DEFAULT_MASK:
            return None
        keys = f"with keys {list(batch)}" if isinstance(batch, Mapping) else "which has no keys"
        raise ValueError(
            f"mask={mask!r} is not in a batch of type {type(batch).__name__}, {keys}: give a key that every batch has, "
            "or a function batch -> tensor"
        )
    else:
        tokens = batch[mask]
    if not isinstance(tokens, Tensor) or tokens.ndim == 0:
        raise ValueError(
            f"mask must give a tensor with one entry per token of the batch, got {tokens!r}"
        )
    return _Tokens(tokens.shape, (tokens != 0).flatten().nonzero().flatten())
