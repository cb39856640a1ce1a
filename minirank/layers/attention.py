"""Attention that calls its linear layers: what `unpack_attention` puts in place of torch's.

    Q, K, V = q(query), k(key), v(value)
    y       = out(softmax(Q Kᵀ / √d_head + mask) V)      for each head

nn.MultiheadAttention computes this function too. But it stacks the weights of q, k and v in one
parameter, in_proj_weight (3·d, d), and multiplies by out_proj's weight without calling that module.
So nothing can be measured there, and no adapter fits in.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STACKED = ("in_proj_weight", "in_proj_bias")  # parameters of q, k and v, one behind another

# What readers of an nn.MultiheadAttention find there, and here no more.
PACKED_NAMES = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj")


class UnpackedAttention(nn.Module):
    """The function of an nn.MultiheadAttention, with linear layers `q`, `k`, `v` and `out`.

    It is called as nn.MultiheadAttention is, and returns the same. It holds copies of the rows of
    in_proj_weight and in_proj_bias. All other parameters are the same objects as in the packed
    module: those of out_proj, the separate weights of other key and value sizes, and bias_k and
    bias_v. So are the dictionaries of its hooks.

    Its function does not depend on the mode: where nn.MultiheadAttention and the layers around it
    have a fast path for inference, this module takes the ordinary one.

    Args:
        packed: an nn.MultiheadAttention, which stays as it is.

    >>> attention = nn.MultiheadAttention(4, 2)
    >>> unpacked, x = UnpackedAttention(attention), torch.randn(5, 1, 4)
    >>> torch.allclose(unpacked(x, x, x)[0], attention(x, x, x)[0], atol=1e-6)
    True
    """

    # nn.TransformerEncoderLayer asks for these two before it takes its fast path, which would read
    # the packed weights: with these answers it does not take it.
    in_proj_bias = None
    _qkv_same_embed_dim = False

    embed_dim: int
    num_heads: int
    dropout: float
    batch_first: bool
    add_zero_attn: bool
    bias_k: nn.Parameter | None
    bias_v: nn.Parameter | None

    def __init__(self, packed: nn.MultiheadAttention) -> None:
        super().__init__()
        self.register_parameter("bias_k", _optional(packed, "bias_k"))
        self.register_parameter("bias_v", _optional(packed, "bias_v"))
        copy_settings(packed, self)
        share_hooks(packed, self)
        weights, biases = _projections(packed)
        self.q = _linear(weights[0], biases[0], packed.training)
        self.k = _linear(weights[1], biases[1], packed.training)
        self.v = _linear(weights[2], biases[2], packed.training)
        out = packed.out_proj
        self.out = _linear(out.get_parameter("weight"), _optional(out, "bias"), out.training)
        # The module that `pack_attention` puts back. A tuple, so that nn.Module does not register
        # it.
        self.packed = (packed,)

    def __getattr__(self, name: str) -> Any:
        if name in PACKED_NAMES:
            raise AttributeError(
                f"this attention is unpacked, so it has no {name!r}, but linear layers q, k, v and "
                "out: pack_attention(model) puts the packed module back. (If an "
                "nn.TransformerEncoder asks for it, give unpack_attention() a model that holds the "
                "encoder, or set the encoder's use_nested_tensor to False)"
            )
        return super().__getattr__(name)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """The outputs and, if `need_weights`, the weights of attention.

        Args: those of nn.MultiheadAttention.forward, with these shapes, where d is embed_dim:
            query: (L, N, d); (N, L, d) if batch_first; or (L, d) without a batch.
            key, value: likewise, with S positions, and kdim and vdim features.
            key_padding_mask: (N, S), or (S,) without a batch. True is left out; a number is added.
            attn_mask: (L, S) or (N · num_heads, L, S). True is left out; a number is added.
            is_causal: says that `attn_mask` is the causal mask.

        Returns: the outputs, in the shape of `query`, and None or the weights: (N, L, S), or
            (N, num_heads, L, S) if not `average_attn_weights`; without N if there is no batch.
        """
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal=True says that attn_mask is causal: give attn_mask, too")
        _require_plain_inputs(query, key, value)
        batched = query.dim() == 3
        Q, K, V = (  # (N, L or S, d)
            self._batch_first(x, batched) for x in (self.q(query), self.k(key), self.v(value))
        )
        mask_shape = Q.shape[0], Q.shape[1], K.shape[1]
        _require_fitting(query, K, V, key_padding_mask, attn_mask, mask_shape, self.num_heads)
        K, V = (
            self._with_extra_positions(K, self.bias_k),
            self._with_extra_positions(V, self.bias_v),
        )
        Q, K, V = (self._by_head(x) for x in (Q, K, V))

        # The kernel makes the causal mask itself, unless something has to be added to it.
        hint = is_causal and key_padding_mask is None and not need_weights
        mask = self._mask(None if hint else attn_mask, key_padding_mask, query.dtype, mask_shape)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = (Q * math.sqrt(1 / Q.shape[3])) @ K.transpose(2, 3)  # (N, heads, L, S)
            if mask is not None:
                scores = scores + mask.to(scores.dtype)  # under autocast it is a wider one
            weights = torch.softmax(scores, 3)
            if dropout:
                weights = F.dropout(weights, dropout)
            heads = weights @ V
        else:
            heads = F.scaled_dot_product_attention(Q, K, V, mask, dropout, hint)
        y = self.out(self._as_given(heads.transpose(1, 2).flatten(2), batched))
        if weights is None:
            return y, None
        weights = weights.mean(1) if average_attn_weights else weights
        return y, weights if batched else weights.squeeze(0)

    def _batch_first(self, x: Tensor, batched: bool) -> Tensor:
        if not batched:
            return x.unsqueeze(0)
        return x if self.batch_first else x.transpose(0, 1)

    def _as_given(self, x: Tensor, batched: bool) -> Tensor:
        if not batched:
            return x.squeeze(0)
        return x if self.batch_first else x.transpose(0, 1)

    def _by_head(self, x: Tensor) -> Tensor:
        """(N, L or S, d) → (N, heads, L or S, d / heads)"""
        heads = self.num_heads, x.shape[2] // self.num_heads
        return x.reshape(*x.shape[:2], *heads).transpose(1, 2)

    def _with_extra_positions(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x, (N, S, d), with the positions that add_bias_kv and add_zero_attn put behind it."""
        parts = [x]
        if bias is not None:
            parts.append(bias.expand(x.shape[0], 1, x.shape[2]))
        if self.add_zero_attn:
            parts.append(x.new_zeros(x.shape[0], 1, x.shape[2]))
        return torch.cat(parts, 1) if len(parts) > 1 else x

    def _mask(
        self,
        attn_mask: Tensor | None,
        key_padding_mask: Tensor | None,
        dtype: torch.dtype,
        shape: tuple[int, int, int],
    ) -> Tensor | None:
        """What is added to the scores: it broadcasts to (N, heads, L, S + extra positions).

        shape: (N, L, S).
        """
        N, _, S = shape
        mask = None
        if attn_mask is not None:
            mask = _additive(attn_mask, dtype)
            mask = (
                mask[None, None]
                if mask.dim() == 2
                else mask.reshape(N, self.num_heads, *mask.shape[1:])
            )
        if key_padding_mask is not None:
            padding = _additive(key_padding_mask, dtype).view(N, 1, 1, S)
            mask = padding if mask is None else mask + padding
        extra = (self.bias_k is not None) + self.add_zero_attn
        return F.pad(mask, (0, extra)) if extra and mask is not None else mask

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}"


def is_packed_attention(module: nn.Module) -> bool:
    """Whether this is an nn.MultiheadAttention itself, and not of a subclass.

    >>> is_packed_attention(nn.MultiheadAttention(4, 2))
    True
    """
    return type(module) is nn.MultiheadAttention


def copy_settings(source: nn.Module, target: nn.Module) -> None:
    """Give `target` the plain attributes of `source`, such as num_heads, dropout and training.

    >>> attention = nn.MultiheadAttention(4, 2)
    >>> attention.dropout = 0.5
    >>> target = nn.Module()
    >>> copy_settings(attention, target)
    >>> target.num_heads, target.dropout
    (2, 0.5)
    """
    for key, value in vars(source).items():
        if not key.startswith("_") and key != "packed":
            setattr(target, key, value)


def share_hooks(source: nn.Module, target: nn.Module) -> None:
    """Give `target` the hooks of `source`, in the same dictionaries, so that the handle of a hook
    removes it from both."""
    for key in (
        "_forward_hooks",
        "_forward_hooks_with_kwargs",
        "_forward_hooks_always_called",
        "_forward_pre_hooks",
        "_forward_pre_hooks_with_kwargs",
        "_backward_hooks",
        "_backward_pre_hooks",
        "_is_full_backward_hook",
    ):
        setattr(target, key, getattr(source, key))


def _projections(
    packed: nn.MultiheadAttention,
) -> tuple[list[nn.Parameter], list[nn.Parameter | None]]:
    """The weights and the biases of q, k and v. Slices become parameters of their own."""
    if packed.in_proj_weight is not None:
        weights = split(packed.in_proj_weight)
    else:
        weights = [packed.q_proj_weight, packed.k_proj_weight, packed.v_proj_weight]
    biases: list[nn.Parameter | None] = [None, None, None]
    if packed.in_proj_bias is not None:
        biases[:] = split(packed.in_proj_bias)
    return weights, biases


def _optional(module: nn.Module, name: str) -> nn.Parameter | None:
    """A parameter that may be absent, as None or not at all."""
    return module._parameters.get(name)


def split(stacked: nn.Parameter) -> list[nn.Parameter]:
    """Copies of the three parts of a parameter, with its requires_grad and their gradients.

    >>> [part.tolist() for part in split(nn.Parameter(torch.arange(3.0)))]
    [[0.0], [1.0], [2.0]]
    """
    parts = []
    grads = [None] * 3 if stacked.grad is None else stacked.grad.chunk(3)
    for values, grad in zip(stacked.detach().chunk(3), grads, strict=True):
        part = nn.Parameter(values.clone(), requires_grad=stacked.requires_grad)
        part.grad = None if grad is None else grad.clone()
        parts.append(part)
    return parts


def _linear(weight: nn.Parameter, bias: nn.Parameter | None, training: bool) -> nn.Linear:
    """A linear layer with these parameters themselves."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = weight
    if bias is not None:
        linear.bias = bias
    return linear.train(training)


# ---- inputs -------------------------------------------------------------------------------------


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask as numbers that are added to the scores: minus infinity where it is True."""
    if mask.is_floating_point():
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -math.inf)


def _require_plain_inputs(query: Tensor, key: Tensor, value: Tensor) -> None:
    if query.is_nested or key.is_nested or value.is_nested:
        raise ValueError(
            "unpacked attention got a nested tensor, which it cannot compute with: give padded "
            "tensors and key_padding_mask. (If an nn.TransformerEncoder made it, give "
            "unpack_attention() a model that holds the encoder, or set the encoder's "
            "use_nested_tensor to False)"
        )
    dims = query.dim(), key.dim(), value.dim()
    if dims not in ((2, 2, 2), (3, 3, 3)):
        raise ValueError(
            "expected query, key and value of three dimensions, or of two without a batch, got "
            f"{dims[0]}, {dims[1]} and {dims[2]} dimensions"
        )


def _require_fitting(
    query: Tensor,
    K: Tensor,
    V: Tensor,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    shape: tuple[int, int, int],
    heads: int,
) -> None:
    """Raise unless the inputs fit together, so that nothing is broadcast by mistake.

    K, V: (N, S, d). shape: (N, L, S).
    """
    N, L, S = shape
    if K.shape[0] != N or V.shape != K.shape:
        raise ValueError(
            "expected one batch size, and as many keys as values, got (batch size, number) "
            f"{(N, L)} of queries, {tuple(K.shape[:2])} of keys and {tuple(V.shape[:2])} of values"
        )
    padding_shape = (N, S) if query.dim() == 3 else (S,)
    _require_mask("key_padding_mask", key_padding_mask, (padding_shape,))
    _require_mask("attn_mask", attn_mask, ((L, S), (N * heads, L, S)))


def _require_mask(name: str, mask: Tensor | None, shapes: tuple[tuple[int, ...], ...]) -> None:
    if mask is None:
        return
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(
            f"expected {name} of booleans or floating-point numbers, got {mask.dtype}: "
            f"{name}.bool() leaves out what is not 0"
        )
    if tuple(mask.shape) not in shapes:
        expected = " or ".join(map(str, shapes))
        raise ValueError(f"expected {name} of shape {expected}, got {tuple(mask.shape)}")
