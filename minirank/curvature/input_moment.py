"""The input second moment: Sensitivity-LoRA's own stand-in for the Hessian diagonal.

Padding is dropped here, by one rule. The batch's mask (`attention_mask` where a batch has that key;
see `mask`) says which tokens are real. An input with one row per entry of the mask, (n, T, d_in) or
(n · T, d_in), loses the rows of its padding tokens. An input with one row per sample, (n, d_in),
has no padding and counts whole. Any other shape is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..checks import require, require_batches, warn_caller
from ..layers.linear import linear_shape, weight_place
from ..layers.targets import Targets, layers_called
from ..measure import LossFn, measuring, scalar_loss
from .averaging import BatchAverage, check_tolerance
from .estimate import Estimate
from .layer_outputs import layer_input
from .padding import unnamed_mask
from .unreached import idle_layers, warn_of_idle_layers

DEFAULT_MASK = "attention_mask"
Mask = str | Callable[[Any], Tensor] | None


def input_second_moment(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Iterable[Any],
    targets: Targets = None,
    *,
    mask: Mask = DEFAULT_MASK,
    outlier_factor: float | None = None,
    tolerance: float | None = None,
) -> Estimate:
    """h_j = the mean over tokens of x_j², x being the input of the layer.

    Target: for z = W x, the Hessian over a row i of W is E[(∂²L/∂z_i²) x xᵀ] if the output
    curvature ∂²L/∂z_i² and x are independent. This is its diagonal for an output curvature of 1:
    the proxy of post-training quantisation (OBQ, GPTQ).
    Bias: as a stand-in for the Hessian diagonal, without bound. A constant factor of the whole
    model cancels in Eqs 11–15 of Sensitivity-LoRA; a factor of each layer does not.
    Variance: none, as a mean over the tokens of `batches`; the standard errors are over batches.
    Cost: one forward pass per batch, in the model's own precision. No gradient is taken.

    Llama-like decoders: a few tokens have massive inputs there, and so a few layers have nearly all
    of the moment. In SmolLM2-135M one token of each sequence has a mean square up to 265,000 times
    the median token's, in one layer. `outlier_factor=100` leaves such tokens out, but that alone
    does not suffice: the budget then goes to the last layer, whose ordinary inputs are large as
    well. So give `allocate` a `max_rank`, or take uniform ranks. (MiniLM, an encoder, has no token
    above 7 times the median, and `outlier_factor=100` changes nothing there.)

    Args:
        model: any nn.Module; it is measured in eval mode and left unchanged.
        loss_fn: (model, batch) -> scalar. Only its forward pass is used, not its value.
        batches: any iterable; it is iterated once. Every token weighs the same, whatever the size
            of its batch.
        targets: the linear layers; None: all. See `minirank.layers.targets.linear_targets`.
        mask: which tokens are real: a key of batches that are mappings, or a function batch ->
            tensor; nonzero means real. Its shape is that of a layer's input without the last
            dimension, flattened or not. Layers with one row per sample (a pooler) count whole.
            None: every token. The default key is used where a batch has it; a key that you name
            must be there. One mask holds for all targets: measure the encoder and the decoder of a
            sequence-to-sequence model apart, each with its own.
        outlier_factor: leave out a token whose mean square input, over the features, is more than
            this many times that of the median token of its batch. Each layer's inputs are judged by
            themselves; if the median is 0, none is left out. The result's `weights` tell how many
            tokens counted. None: every token counts, as in the paper.
        tolerance: stop before the end of the batches, as for `empirical_fisher`. None: take all
            batches.

    Returns: {name: (d_in,)}, which all rows of W share, on the layer's device, in float32 or
    better. A layer that is called several times counts all its calls.

    Raises:
        ValueError: there is no batch; a loss is not a scalar; the mask fits no input; an input is
            not finite (the first such layer is named); no token reaches any layer; or a layer's
            weight is read by another module, without a call of the layer.

    Warns:
        IdleLayerWarning: no token reaches some layers, which therefore get zeros.
        UserWarning: batches are tuples that seem to hold an attention mask, and `mask` is not
            given, so that padding counts. This is said once.

    Source: Sensitivity-LoRA (arXiv 2509.09119), appendix E.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 1))
    >>> x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    >>> input_second_moment(model, lambda model, x: model(x).mean(), [x])["0"].tolist()
    [5.0, 10.0]
    """
    check_tolerance(tolerance)
    require_batches(batches)
    require(
        outlier_factor is None or outlier_factor > 1,
        "outlier_factor",
        outlier_factor,
        "above 1 (100: a hundred times the median token)",
    )
    layers = layers_called(model, targets)
    return second_moment_of(layers, model, loss_fn, batches, mask, outlier_factor, tolerance)


def second_moment_of(
    layers: Mapping[str, nn.Module],
    model: nn.Module,
    loss_fn: LossFn,
    batches: Iterable[Any],
    mask: Mask = DEFAULT_MASK,
    outlier_factor: float | None = None,
    tolerance: float | None = None,
) -> Estimate:
    """`input_second_moment` of layers of any kind, LoRA layers too: {name: layer}."""
    average = BatchAverage(layers)
    mean_squares = _MeanSquares(outlier_factor)
    batch_means = {name: _BatchMean(name, mean_squares) for name in layers}
    hooks = []
    batch_count, padding_named = 0, False
    try:
        for name, layer in layers.items():
            hook = batch_means[name].observe
            hooks.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
        with measuring(model), torch.no_grad():
            for batch in batches:
                batch_count += 1
                if mask == DEFAULT_MASK and not padding_named:
                    padding_named = _warn_of_unnamed_mask(batch)
                mean_squares.start_batch(_real_tokens(mask, batch))
                scalar_loss(model, loss_fn, batch)
                for name, batch_mean in batch_means.items():
                    average.add(name, *batch_mean.finish_batch())
                if average.traces.errors_within(tolerance):
                    break
            for handle in hooks:
                handle.remove()
            unreached = average.diagonals.unreached() if batch_count else []
            names = idle_layers(model, loss_fn, batch, layers, unreached) if unreached else ()
    finally:
        for handle in hooks:
            handle.remove()
    if unreached and not names:
        raise ValueError(
            f"no token reached {unreached[0]!r} in {batch_count} batches, nor any other target: "
            "give more data, or other targets"
        )
    idle = {name: _zeros(layers[name]) for name in names}
    estimate = average.estimate(idle)
    warn_of_idle_layers(idle)
    return estimate


def _zeros(layer: nn.Module) -> Tensor:
    """The mean square of no input: zeros, (d_in,), on the layer's device."""
    shape = linear_shape(layer)
    assert shape is not None  # linear_targets() selects by it
    dtype, device = weight_place(layer)
    return torch.zeros(shape[1], dtype=torch.promote_types(dtype, torch.float32), device=device)


class _RealTokens(NamedTuple):
    """Which positions of a batch count."""

    shape: torch.Size  # of the mask
    positions: Tensor  # int64, of the real tokens in the flattened mask

    def fit(self, leading: torch.Size) -> bool:
        """Whether the mask fits an input of shape (*leading, d_in), by position or by sample."""
        return leading in (self.shape, (self.shape.numel(),)) or leading.numel() == self.shape[0]


class _MeanSquares:
    """The mean of x_j² over the real tokens of a layer's input. It is computed once for layers that
    get the same tensor, as query, key and value projections do."""

    def __init__(self, outlier_factor: float | None) -> None:
        self.outlier_factor = outlier_factor

    def start_batch(self, tokens: _RealTokens | None) -> None:
        self.tokens = tokens
        # The last input and its version. Holding the tensor keeps another one from taking its place
        # in memory.
        self.last: tuple[Tensor, int] | None = None
        self.last_result = 0, torch.empty(0)

    def of_input(self, x: Tensor, name: str) -> tuple[int, Tensor]:
        """x: (…, d_in), the input of layer `name` → (number of tokens; their mean, (d_in,))."""
        version = -1 if x.is_inference() else x._version
        if self.last is None or self.last[0] is not x or self.last[1] != version or version < 0:
            self.last, self.last_result = (x, version), self._compute(x.detach(), name)
        return self.last_result

    def _compute(self, x: Tensor, name: str) -> tuple[int, Tensor]:
        rows = x.to(torch.promote_types(x.dtype, torch.float32)).reshape(-1, x.shape[-1])
        tokens = self.tokens
        if tokens is not None and not tokens.fit(x.shape[:-1]):
            raise ValueError(
                f"the mask of shape {tuple(tokens.shape)} does not fit the input of {name!r}, of "
                f"shape {tuple(x.shape)}: give a mask of its leading dimensions, or mask=None to "
                "count every row"
            )
        if tokens is not None and len(tokens.positions) < len(rows) == tokens.shape.numel():
            # Rows are selected, not multiplied by zeros: padding may hold NaN.
            rows = rows.index_select(0, tokens.positions.to(rows.device)).square_()
        else:
            rows = rows.square()
        if self.outlier_factor is not None and len(rows):
            rows = _without_outliers(rows, self.outlier_factor)
        return len(rows), rows.sum(0) / max(len(rows), 1)


def _without_outliers(squares: Tensor, factor: float) -> Tensor:
    """x², (tokens, d_in), of the tokens whose mean is at most `factor` times the median token's.

    A token that is not finite stays, so that it is reported.
    """
    token_means = squares.mean(1)
    median = token_means.median()
    outliers = token_means.isfinite() & (token_means > factor * median) & (median > 0)
    return squares[~outliers]


class _BatchMean:
    """The mean over all calls of one layer in a batch, taken by a forward pre-hook."""

    def __init__(self, name: str, mean_squares: _MeanSquares) -> None:
        self.name, self.mean_squares = name, mean_squares
        self.tokens = 0
        self.mean: Tensor | None = None  # (d_in,)

    def observe(self, layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        count, mean = self.mean_squares.of_input(layer_input(args, kwargs), self.name)
        self.tokens += count
        if count:
            self.mean = (
                mean
                if self.mean is None
                else self.mean + (mean - self.mean) * (count / self.tokens)
            )

    def finish_batch(self) -> tuple[Tensor | None, int]:
        """(mean, tokens) of the batch that ends here; the next one starts from nothing."""
        mean, tokens = self.mean, self.tokens
        self.mean, self.tokens = None, 0
        return mean, tokens


def _real_tokens(mask: Mask, batch: Any) -> _RealTokens | None:
    """What the user's `mask` says of this batch; None: every token counts."""
    if mask is None:
        return None
    if callable(mask):
        values = mask(batch)
    elif isinstance(batch, Mapping) and mask in batch:
        values = batch[mask]
    elif mask == DEFAULT_MASK:
        return None
    else:
        keys = f"with keys {list(batch)}" if isinstance(batch, Mapping) else "which has no keys"
        raise ValueError(
            f"mask={mask!r} is not in a batch of type {type(batch).__name__}, {keys}: give a key "
            "that every batch has, or a function batch -> tensor"
        )
    if not isinstance(values, Tensor) or values.ndim == 0:
        raise ValueError(
            f"mask must give a tensor with one entry per token of the batch, got {values!r}"
        )
    return _RealTokens(values.shape, (values != 0).flatten().nonzero().flatten())


def _warn_of_unnamed_mask(batch: Any) -> bool:
    """Warn if the batch is a tuple that seems to hold a mask; whether it does."""
    entry = unnamed_mask(batch)
    if entry is None:
        return False
    warn_caller(
        f"entry {entry} of a batch looks like an attention mask with zeros in it, but a "
        f"{type(batch).__name__} has no names: padding tokens are counted like all others. To "
        f"leave them out, pass mask=lambda batch: batch[{entry}] (to SensitivityLoRA: "
        f"curvature=functools.partial(input_second_moment, mask=lambda batch: batch[{entry}])); "
        "mask=None counts every token, without this warning"
    )
    return True
