"""Wrong implementations: the bugs of kernels, ports, refactorings and hasty engineers.

Each differs from its contract beyond rounding for some input inside the contract. The note says
what is wrong, and what shows it.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import pickle
import random
import re
from fractions import Fraction

import numpy as np
import torch

from minirank import reference

from . import Implementation, recorder
from .common import (
    MOMENTS,
    calls_of,
    diagonals_of,
    eval_copy,
    fresh,
    jacobian,
    mean_loss,
    output_of,
    regrown,
    samples_of,
    size_of,
    slope,
    twice,
    weights_in,
)

WRONG: list[Implementation] = []
wrong = recorder(WRONG)
PREFIX = "base_model.model."


# lora_forward


def gated(h, gate):
    return h if gate is None else gate * h


def plus(y, b):
    return y if b is None else y + b


@wrong("lora_forward", "The gate is applied before and after the rank dimension, so it is squared.")
def gate_twice(x, W, b, A, B, scaling, gate=None):
    h = gated(x.to(A.dtype) @ A.T, gate)
    up = B if gate is None else B * gate
    return plus(x @ W.T + (scaling * h @ up.T).to(x.dtype), b)


@wrong("lora_forward", "The gate is ignored; a gate other than ones shows it.")
def gate_ignored(x, W, b, A, B, scaling, gate=None):
    return plus(x @ W.T + (scaling * (x.to(A.dtype) @ A.T) @ B.T).to(x.dtype), b)


@wrong("lora_forward", "No gate is taken for a gate of zeros, so gate=None drops the adapter.")
def no_gate_is_zero(x, W, b, A, B, scaling, gate=None):
    gate = A.new_zeros(len(A)) if gate is None else gate
    return plus(x @ W.T + (scaling * (gate * (x.to(A.dtype) @ A.T)) @ B.T).to(x.dtype), b)


@wrong("lora_forward", "The scaling is taken for alpha and divided by the rank.")
def scaling_over_rank(x, W, b, A, B, scaling, gate=None):
    h = gated(x.to(A.dtype) @ A.T, gate)
    return plus(x @ W.T + (scaling / max(1, len(A)) * h @ B.T).to(x.dtype), b)


@wrong("lora_forward", "The scaling multiplies the bias as well as the update.")
def bias_scaled(x, W, b, A, B, scaling, gate=None):
    h = gated(x.to(A.dtype) @ A.T, gate)
    return x @ W.T + (scaling * plus(h @ B.T, b)).to(x.dtype)


@wrong("lora_forward", "A bias of None is not expected, and raises.")
def needs_a_bias(x, W, b, A, B, scaling, gate=None):
    h = gated(x.to(A.dtype) @ A.T, gate)
    return torch.nn.functional.linear(x, W) + b.to(x.dtype) + (scaling * h @ B.T).to(x.dtype)


@wrong("lora_forward", "The result of a vector keeps a batch dimension of one: (1, d_out).")
def vector_becomes_a_batch(x, W, b, A, B, scaling, gate=None):
    x = torch.atleast_2d(x)
    h = gated(x.to(A.dtype) @ A.T, gate)
    return plus(x @ W.T + (scaling * h @ B.T).to(x.dtype), b)


@wrong(
    "lora_forward", "The leading dimensions come back flattened; an input of 3 dimensions shows it."
)
def stays_flattened(x, W, b, A, B, scaling, gate=None):
    x = x.reshape(-1, x.shape[-1]) if x.dim() > 2 else x
    h = gated(x.to(A.dtype) @ A.T, gate)
    return plus(x @ W.T + (scaling * h @ B.T).to(x.dtype), b)


@wrong("lora_forward", "Made for (batch, tokens, d_in): an input of 4 dimensions raises.")
def at_most_three_dimensions(x, W, b, A, B, scaling, gate=None):
    shape = x.shape
    n, tokens, d_in = shape if x.dim() == 3 else (1, *torch.atleast_2d(x).shape)
    x = x.reshape(n * tokens, d_in)
    h = gated(x.to(A.dtype) @ A.T, gate)
    return plus(x @ W.T + (scaling * h @ B.T).to(x.dtype), b).view(*shape[:-1], len(W))


@wrong("lora_forward", "Reads the memory of x as if it were contiguous; a transposed x shows it.")
def reads_memory_as_contiguous(x, W, b, A, B, scaling, gate=None):
    strides = [math.prod(x.shape[i + 1 :]) for i in range(x.dim())]
    raw = x if x.stride()[-1:] == (0,) else torch.as_strided(x, x.shape, strides)
    h = gated(raw.to(A.dtype) @ A.T, gate)
    return plus(raw @ W.T + (scaling * h @ B.T).to(x.dtype), b)


@wrong("lora_forward", "x.view instead of reshape raises for a transposed x of 3 dimensions.")
def view_of_strided_input(x, W, b, A, B, scaling, gate=None):
    flat = x.view(-1, x.shape[-1])
    h = gated(flat.to(A.dtype) @ A.T, gate)
    y = plus(flat @ W.T + (scaling * h @ B.T).to(x.dtype), b)
    return y.view(*x.shape[:-1], len(W))


@wrong("lora_forward", "Squeezing drops the rank dimension, so an adapter of rank 1 fails.")
def rank_one_squeezed(x, W, b, A, B, scaling, gate=None):
    h = gated((x.to(A.dtype) @ A.T).squeeze(-1), None if gate is None else gate.squeeze())
    return plus(x @ W.T + (scaling * h @ B.squeeze(-1).T).to(x.dtype), b)


@wrong("lora_forward", "The early return for rank 0 forgets the bias.")
def rank_zero_without_bias(x, W, b, A, B, scaling, gate=None):
    if len(A) == 0:
        return x @ W.T
    return plus(x @ W.T + (scaling * gated(x.to(A.dtype) @ A.T, gate) @ B.T).to(x.dtype), b)


@wrong("lora_forward", "Gates are clamped to [0, 1] in the forward pass; a gate of 1.5 shows it.")
def gate_clamped(x, W, b, A, B, scaling, gate=None):
    gate = None if gate is None else gate.clamp(0, 1)
    return plus(x @ W.T + (scaling * gated(x.to(A.dtype) @ A.T, gate) @ B.T).to(x.dtype), b)


@wrong("lora_forward", "The result has the adapter's wider dtype; x in bfloat16, A in float32.")
def promoted_result(x, W, b, A, B, scaling, gate=None):
    return plus(x @ W.T + scaling * gated(x.to(A.dtype) @ A.T, gate) @ B.T, b)


@wrong("lora_forward", "The gate is detached, so that it has no gradient.")
def gate_without_gradient(x, W, b, A, B, scaling, gate=None):
    gate = None if gate is None else gate.detach()
    return plus(x @ W.T + (scaling * gated(x.to(A.dtype) @ A.T, gate) @ B.T).to(x.dtype), b)


@wrong(
    "lora_forward", "The adapter's input is detached: the gradient of x lacks the update's part."
)
def input_gradient_without_adapter(x, W, b, A, B, scaling, gate=None):
    h = gated(x.detach().to(A.dtype) @ A.T, gate)
    return plus(x @ W.T + (scaling * h @ B.T).to(x.dtype), b)


class FusedUpdate(torch.autograd.Function):
    """s · B (gate ⊙ A x) with a backward pass by hand, whose `fault` is one of three."""

    @staticmethod
    def forward(ctx, x, A, B, gate, scaling, fault):
        ctx.save_for_backward(x, A, B, gate)
        ctx.scaling, ctx.fault = scaling, fault
        return scaling * ((x @ A.T) * gate) @ B.T

    @staticmethod
    def backward(ctx, dy):
        x, A, B, gate = ctx.saved_tensors
        s = ctx.scaling
        x2, dy2 = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
        if ctx.fault == "first of the leading dimensions" and x.dim() > 2:
            x2, dy2 = x[0].reshape(-1, x.shape[-1]), dy[0].reshape(-1, dy.shape[-1])
        h, dh = x2 @ A.T, s * dy2 @ B
        dA = (dh if ctx.fault == "A without gate" else dh * gate).T @ x2
        dB = dy2.T @ (h * gate) * (1 if ctx.fault == "B without scaling" else s)
        return s * ((dy @ B) * gate) @ A, dA, dB, (dh * h).sum(0), None, None


def fused(fault):
    def forward(x, W, b, A, B, scaling, gate=None):
        gate = A.new_ones(len(A)) if gate is None else gate
        update = FusedUpdate.apply(x.to(A.dtype), A, B, gate, scaling, fault)
        return plus(x @ W.T + update.to(x.dtype), b)

    return forward


@wrong("lora_forward", "The backward pass by hand leaves the gate out of the gradient of A.")
def gradient_of_A_without_gate(x, W, b, A, B, scaling, gate=None):
    return fused("A without gate")(x, W, b, A, B, scaling, gate)


@wrong("lora_forward", "The backward pass by hand leaves the scaling out of the gradient of B.")
def gradient_of_B_without_scaling(x, W, b, A, B, scaling, gate=None):
    return fused("B without scaling")(x, W, b, A, B, scaling, gate)


@wrong(
    "lora_forward", "Gradients of A, B and gate sum over the first block only; x of 3 dimensions."
)
def gradient_of_first_block(x, W, b, A, B, scaling, gate=None):
    return fused("first of the leading dimensions")(x, W, b, A, B, scaling, gate)


BUFFERS: dict[tuple, torch.Tensor] = {}


def in_buffer(key, y):
    """The same storage for every result of one shape, as a preallocated output buffer is."""
    key = (key, tuple(y.shape), y.dtype)
    buffer = BUFFERS.setdefault(key, torch.empty_like(y.detach()))
    buffer.copy_(y.detach())
    return buffer


@wrong(
    "lora_forward", "One output buffer for each shape: a second call overwrites the first result."
)
def reused_output(x, W, b, A, B, scaling, gate=None):
    y = reference.lora_forward(x, W, b, A, B, scaling, gate)
    return y if y.requires_grad else in_buffer("forward", y)


@wrong("lora_forward", "Folds the update into W in place, so that the argument W is changed.")
def merges_into_the_argument(x, W, b, A, B, scaling, gate=None):
    y = reference.lora_forward(x, W, b, A, B, scaling, gate)
    W.data += (scaling * (B if gate is None else B * gate) @ A).to(W.dtype)
    return y


@wrong(
    "lora_forward",
    "Input features beyond a multiple of 4 are left out, as by a kernel without a tail.",
)
def no_tail_block(x, W, b, A, B, scaling, gate=None):
    d_in = x.shape[-1] // 4 * 4 or x.shape[-1]
    h = gated(x[..., :d_in].to(A.dtype) @ A[:, :d_in].T, gate)
    return plus(x @ W.T + (scaling * h @ B.T).to(x.dtype), b)


# merged_weight


def delta(A, B, scaling, gate):
    return scaling * (B if gate is None else B * gate) @ A


@wrong("merged_weight", "The gate is left out of the update.")
def merge_without_gate(W, A, B, scaling, gate=None):
    return (W.float() if W.dtype.itemsize < 4 else W).add(scaling * (B @ A).to(W)).to(W.dtype)


@wrong("merged_weight", "The gate is folded into A and into B, so it is squared.")
def merge_with_gate_squared(W, A, B, scaling, gate=None):
    gate = A.new_ones(len(A)) if gate is None else gate
    return (W.to(A.dtype) + scaling * (B * gate) @ (gate[:, None] * A)).to(W.dtype)


@wrong("merged_weight", "The scaling is divided by the rank once more.")
def merge_with_scaling_over_rank(W, A, B, scaling, gate=None):
    return reference.merged_weight(W, A, B, scaling / max(1, len(A)), gate)


@wrong(
    "merged_weight",
    "All is summed in W's dtype; W in bfloat16 with an adapter of rank 16 shows it.",
)
def merge_in_narrow_dtype(W, A, B, scaling, gate=None):
    A, B = A.to(W.dtype), B.to(W.dtype)
    gate = None if gate is None else gate.to(W.dtype)
    return W + delta(A, B, scaling, gate)


@wrong("merged_weight", "The update is rounded to W's dtype before it is added: two roundings.")
def merge_rounds_twice(W, A, B, scaling, gate=None):
    wide = torch.promote_types(A.dtype, torch.float32)
    update = delta(A.to(wide), B.to(wide), scaling, None if gate is None else gate.to(wide))
    return W + update.to(W.dtype)


@wrong("merged_weight", "The result keeps the wide dtype instead of W's; W in bfloat16 shows it.")
def merge_keeps_wide_dtype(W, A, B, scaling, gate=None):
    wide = torch.promote_types(torch.promote_types(W.dtype, A.dtype), torch.float32)
    return W.to(wide) + delta(A.to(wide), B.to(wide), scaling, gate)


@wrong("merged_weight", "W itself is changed in place and given back.")
def merge_in_place(W, A, B, scaling, gate=None):
    return W.data.copy_(reference.merged_weight(W, A, B, scaling, gate))


@wrong("merged_weight", "The update is added transposed; a square W shows it.")
def merge_transposed(W, A, B, scaling, gate=None):
    update = delta(A, B, scaling, gate)
    return (W.to(A.dtype) + (update.T if update.shape[0] == update.shape[1] else update)).to(
        W.dtype
    )


@wrong("merged_weight", "The update is subtracted.")
def merge_subtracts(W, A, B, scaling, gate=None):
    return reference.merged_weight(W, A, B, -scaling, gate)


@wrong("merged_weight", "The result is a buffer that the next call of the same shape overwrites.")
def merge_into_buffer(W, A, B, scaling, gate=None):
    return in_buffer("merge", reference.merged_weight(W, A, B, scaling, gate))


# resize


def resized(layer, keep, add, **changes):
    A, B, gate = fresh(layer, add)
    moments = {key: regrown(layer[key], keep, add) for key in MOMENTS}
    return {**layer, **regrown(layer, keep, add, A, B, gate), **moments, **changes}


@wrong("resize", "All moments start at zero again, those of surviving ranks too.")
def moments_reset(layer, keep, add):
    new = resized(layer, keep, add)
    for key in MOMENTS:
        new[key] = {name: torch.zeros_like(value) for name, value in new[key].items()}
    return new


@wrong("resize", "The moments of the gate are forgotten: zeros for surviving ranks.")
def moments_of_gate_reset(layer, keep, add):
    new = resized(layer, keep, add)
    for key in MOMENTS:
        new[key]["gate"] = torch.zeros_like(new["gate"])
    return new


@wrong(
    "resize", "Moments keep the first rows instead of the surviving ones; pruning rank 0 shows it."
)
def moments_misaligned(layer, keep, add):
    first = torch.arange(len(keep)) < int(keep.sum())
    return resized(layer, keep, add, **{k: regrown(layer[k], first, add) for k in MOMENTS})


@wrong("resize", "The second moment gets a copy of the first.")
def one_moment_for_both(layer, keep, add):
    return resized(layer, keep, add, exp_avg_sq=regrown(layer["exp_avg"], keep, add))


@wrong("resize", "New ranks inherit the mean of the old moments instead of zero.")
def moments_of_new_ranks_averaged(layer, keep, add):
    new = resized(layer, keep, add)
    mean = layer["exp_avg_sq"]["gate"].mean() if len(keep) else 0.0
    new["exp_avg_sq"]["gate"][int(keep.sum()) :] = mean
    return new


@wrong("resize", "Adam's step starts at zero again.")
def step_reset(layer, keep, add):
    step = layer["step"]
    return resized(layer, keep, add, step=step * 0 if isinstance(step, torch.Tensor) else 0)


@wrong("resize", "The scaling is computed anew as alpha over the new rank.")
def scaling_recomputed(layer, keep, add):
    rank = int(keep.sum()) + add
    return resized(layer, keep, add, scaling=layer["scaling"] * len(keep) / max(1, rank))


@wrong("resize", "Survivors of A are sorted by their norm, those of B are not.")
def survivors_sorted_in_A_alone(layer, keep, add):
    new, kept = resized(layer, keep, add), int(keep.sum())
    order = new["A"][:kept].norm(dim=1).argsort(descending=True)
    new["A"] = torch.cat([new["A"][:kept][order], new["A"][kept:]])
    return new


@wrong("resize", "New ranks stand first in A, B and gate, and last in the moments.")
def new_ranks_first_but_not_in_moments(layer, keep, add):
    new, kept = resized(layer, keep, add), int(keep.sum())
    order = torch.arange(kept + add).roll(add)
    return {**new, "A": new["A"][order], "B": new["B"][:, order], "gate": new["gate"][order]}


@wrong("resize", "New columns of B are random too, so that the function changes.")
def new_B_random(layer, keep, add):
    new = resized(layer, keep, add)
    new["B"][:, int(keep.sum()) :].normal_()
    return new


@wrong("resize", "New gates start at zero, as in ShapLoRA, instead of one.")
def new_gates_zero(layer, keep, add):
    new = resized(layer, keep, add)
    new["gate"][int(keep.sum()) :] = 0
    return new


@wrong("resize", "New rows of A are zeros: with B = 0 they would never learn.")
def new_A_zero(layer, keep, add):
    new = resized(layer, keep, add)
    new["A"][int(keep.sum()) :] = 0
    return new


@wrong("resize", "New rows of A come from a fixed seed: two calls give the same rows.")
def new_A_from_fixed_seed(layer, keep, add):
    new = resized(layer, keep, add)
    new["A"][int(keep.sum()) :].normal_(generator=torch.Generator().manual_seed(0))
    return new


@wrong("resize", "All new rows of A are one and the same row; adding two ranks shows it.")
def new_A_one_row_repeated(layer, keep, add):
    new, kept = resized(layer, keep, add), int(keep.sum())
    new["A"][kept:] = new["A"][kept : kept + 1].clone()
    return new


@wrong("resize", "The ranks to keep are those that get pruned.")
def keep_inverted(layer, keep, add):
    return resized(layer, ~keep, add)


@wrong("resize", "The given dict of the layer is changed instead of a new one made.")
def resize_in_place(layer, keep, add):
    layer.update(resized(layer, keep, add))
    return layer


@wrong("resize", "New ranks go into pruned slots only; more added than pruned ranks get lost.")
def slots_reused_only(layer, keep, add):
    return resized(layer, keep, min(add, int((~keep).sum())))


@wrong("resize", "Small gates come back as zero: survivors are not the same bit for bit.")
def survivors_cleaned(layer, keep, add):
    new = resized(layer, keep, add)
    new["gate"] = torch.where(new["gate"].abs() < 1e-2, 0.0, new["gate"])
    return new


# input_second_moment


def observed(model, loss_fn, batches, targets, update, prepare=eval_copy):
    """Calls `update(name, x, mask, inputs)` for every call of every target; mask bool or None."""
    model, mask = prepare(model), None

    def hook(name):
        return lambda module, inputs: update(name, inputs[0].detach(), mask)

    for name in targets:
        model.get_submodule(name).register_forward_pre_hook(hook(name))
    with torch.no_grad():
        for batch in batches:
            mask = (
                batch["attention_mask"]
                if isinstance(batch, dict) and "attention_mask" in batch
                else None
            )
            loss_fn(model, batch)


def tokens_of(x, mask):
    """The real tokens of an input: (tokens, d_in)."""
    masked = mask is not None and x.shape[:-1] == mask.shape
    return (x[mask != 0] if masked else x.reshape(-1, x.shape[-1])).double()


def mean_square(model, loss_fn, batches, targets, select=tokens_of, power=2, prepare=eval_copy):
    seen = {name: [] for name in targets}
    update = lambda name, x, mask: seen[name].append(select(x, mask))  # noqa: E731
    observed(model, loss_fn, batches, targets, update, prepare)
    return {name: torch.cat(x).pow(power).mean(0) for name, x in seen.items()}


@wrong("input_second_moment", "Padding counts as tokens, and its NaN gets into the mean.")
def padding_counted(model, loss_fn, batches, targets):
    return mean_square(model, loss_fn, batches, targets, lambda x, mask: tokens_of(x, None))


@wrong("input_second_moment", "Padding is set to zero by multiplication: NaN · 0 is NaN.")
def padding_multiplied_by_zero(model, loss_fn, batches, targets):
    sums, counts = dict.fromkeys(targets, 0.0), dict.fromkeys(targets, 0)

    def update(name, x, mask):
        masked = mask is not None and x.shape[:-1] == mask.shape
        weight = (mask != 0).double() if masked else torch.ones(x.shape[:-1]).double()
        sums[name] += (x.double().square() * weight[..., None]).reshape(-1, x.shape[-1]).sum(0)
        counts[name] += weight.sum()

    observed(model, loss_fn, batches, targets, update)
    return {name: sums[name] / counts[name] for name in targets}


@wrong("input_second_moment", "Padding is zero in the sum but counts in the number of tokens.")
def padding_in_the_denominator(model, loss_fn, batches, targets):
    def select(x, mask):
        masked = mask is not None and x.shape[:-1] == mask.shape
        x = torch.where((mask != 0)[..., None], x, 0.0) if masked else x
        return x.reshape(-1, x.shape[-1]).double()

    return mean_square(model, loss_fn, batches, targets, select)


@wrong(
    "input_second_moment",
    "Only mask entries of exactly 1 are real; a mask of 2 (packing) shows it.",
)
def mask_equals_one(model, loss_fn, batches, targets):
    return mean_square(
        model,
        loss_fn,
        batches,
        targets,
        lambda x, mask: tokens_of(x, None if mask is None else mask == 1),
    )


@wrong(
    "input_second_moment",
    "A mask stays in force for a later batch of the same shape that has none.",
)
def stale_mask(model, loss_fn, batches, targets):
    last = []

    def select(x, mask):
        last.extend([] if mask is None else [mask])
        return tokens_of(x, last[-1] if last else None)

    return mean_square(model, loss_fn, batches, targets, select)


@wrong("input_second_moment", "The number of real tokens divides pooled inputs (n, d_in) as well.")
def tokens_divide_everything(model, loss_fn, batches, targets):
    sums, counts = dict.fromkeys(targets, 0.0), dict.fromkeys(targets, 0)

    def update(name, x, mask):
        tokens = tokens_of(x, mask)
        sums[name] += tokens.square().sum(0)
        counts[name] += len(tokens) if mask is None else int((mask != 0).sum())

    observed(model, loss_fn, batches, targets, update)
    return {name: sums[name] / counts[name] for name in targets}


@wrong(
    "input_second_moment",
    "A mean over samples of their means over tokens; samples of unequal length show it.",
)
def samples_alike(model, loss_fn, batches, targets):
    def select(x, mask):
        if x.dim() < 3:
            return x.double()
        masked = mask is not None and x.shape[:-1] == mask.shape
        real = (mask != 0) if masked else torch.ones(x.shape[:-1]).bool()
        rows = [own[keep].double().square().mean(0) for own, keep in zip(x, real, strict=True)]
        return torch.stack(rows).sqrt()

    return mean_square(model, loss_fn, batches, targets, select)


@wrong("input_second_moment", "A mean of the batches' means; batches of unequal size show it.")
def moments_of_batches_alike(model, loss_fn, batches, targets):
    each = [mean_square(model, loss_fn, [batch], targets) for batch in batches]
    return {name: torch.stack([one[name] for one in each]).mean(0) for name in targets}


@wrong(
    "input_second_moment",
    "Only the last call of a module in a batch counts; one called twice shows it.",
)
def last_call_of_a_batch(model, loss_fn, batches, targets):
    batches, seen = list(batches), {}
    for i, batch in enumerate(batches):

        def update(name, x, mask, i=i):
            seen[name, i] = tokens_of(x, mask)

        observed(model, loss_fn, [batch], targets, update)
    xs = {name: torch.cat([seen[name, i] for i in range(len(batches))]) for name in targets}
    return {name: x.square().mean(0) for name, x in xs.items()}


@wrong("input_second_moment", "The sum over tokens instead of their mean.")
def sum_of_squares(model, loss_fn, batches, targets):
    seen = dict.fromkeys(targets, 0.0)

    def update(name, x, mask):
        seen[name] = seen[name] + tokens_of(x, mask).square().sum(0)

    observed(model, loss_fn, batches, targets, update)
    return seen


@wrong("input_second_moment", "The variance: the mean of the inputs is taken off first.")
def centred(model, loss_fn, batches, targets):
    second = mean_square(model, loss_fn, batches, targets)
    first = mean_square(model, loss_fn, batches, targets, power=1)
    return {name: second[name] - first[name].square() for name in targets}


@wrong("input_second_moment", "The root mean square.")
def root_mean_square(model, loss_fn, batches, targets):
    return {n: h.sqrt() for n, h in mean_square(model, loss_fn, batches, targets).items()}


@wrong("input_second_moment", "Only the first position of each sequence is seen.")
def first_position(model, loss_fn, batches, targets):
    return mean_square(
        model, loss_fn, batches, targets, lambda x, mask: (x[:, 0] if x.dim() > 2 else x).double()
    )


@wrong(
    "input_second_moment", "The model stays as it is: dropout in train mode disturbs the inputs."
)
def moments_in_train_mode(model, loss_fn, batches, targets):
    return mean_square(model, loss_fn, batches, targets, prepare=copy.deepcopy)


@wrong("input_second_moment", "The model itself is put into eval mode and left there.")
def left_in_eval_mode(model, loss_fn, batches, targets):
    return mean_square(model.eval(), loss_fn, batches, targets)


@wrong("input_second_moment", "The hooks stay on the model.")
def hooks_left(model, loss_fn, batches, targets):
    for name in targets:
        model.get_submodule(name).register_forward_pre_hook(lambda module, inputs: None)
    return mean_square(model, loss_fn, batches, targets)


@wrong("input_second_moment", "Squares are summed in bfloat16.")
def summed_in_bfloat16(model, loss_fn, batches, targets):
    return mean_square(
        model, loss_fn, batches, targets, lambda x, mask: tokens_of(x, mask).bfloat16()
    )


# hessian_diagonal


def full(model, loss_fn, batches, targets):
    model = eval_copy(model)
    return diagonals_of(mean_loss(model, loss_fn, batches), weights_in(model, targets))


@wrong("hessian_diagonal", "A mean of the batches' losses; batches of unequal size show it.")
def hessian_batches_alike(model, loss_fn, batches, targets):
    each = [full(model, loss_fn, [batch], targets) for batch in batches]
    return {name: torch.stack([one[name] for one in each]).mean(0) for name in targets}


@wrong(
    "hessian_diagonal",
    "The sum over batches instead of the mean over samples; two batches show it.",
)
def hessian_summed_over_batches(model, loss_fn, batches, targets):
    each = [full(model, loss_fn, [batch], targets) for batch in batches]
    return {name: torch.stack([one[name] for one in each]).sum(0) for name in targets}


@wrong("hessian_diagonal", "Only the last batch counts.")
def hessian_of_last_batch(model, loss_fn, batches, targets):
    return full(model, loss_fn, list(batches)[-1:], targets)


@wrong(
    "hessian_diagonal",
    "len(batch) is taken for the number of samples: of dicts and tuples it counts parts.",
)
def hessian_dict_batches_count_keys(model, loss_fn, batches, targets):
    model, batches = eval_copy(model), list(batches)
    losses = [len(batch) * twice(loss_fn, model, batch) for batch in batches]
    return diagonals_of(sum(losses) / sum(map(len, batches)), weights_in(model, targets))


@wrong(
    "hessian_diagonal", "The copy of the model stays in train mode: dropout and batch norm show it."
)
def hessian_in_train_mode(model, loss_fn, batches, targets):
    model = copy.deepcopy(model).requires_grad_()
    return diagonals_of(mean_loss(model, loss_fn, batches), weights_in(model, targets))


@wrong("hessian_diagonal", "All modules of the model are left in eval mode.")
def hessian_leaves_eval_mode(model, loss_fn, batches, targets):
    return full(model.eval(), loss_fn, batches, targets)


@wrong(
    "hessian_diagonal",
    "All modules end in the model's own mode; one that was in eval mode alone shows it.",
)
def hessian_restores_train_mode_everywhere(model, loss_fn, batches, targets):
    result = full(model, loss_fn, batches, targets)
    model.train(model.training)
    return result


@wrong("hessian_diagonal", "Gradients are left in the model's parameters.")
def hessian_leaves_gradients(model, loss_fn, batches, targets):
    result = full(model, loss_fn, batches, targets)
    for name, W in weights_in(model, targets).items():
        W.grad = torch.zeros_like(result[name])
    return result


@wrong("hessian_diagonal", "Frozen weights are left requiring gradients.")
def hessian_leaves_requires_grad(model, loss_fn, batches, targets):
    model.requires_grad_()
    return full(model, loss_fn, batches, targets)


@wrong("hessian_diagonal", "A weight that requires no gradient gets zeros.")
def hessian_of_frozen_weights_zero(model, loss_fn, batches, targets):
    trained = {name for name, W in weights_in(model, targets).items() if W.requires_grad}
    result = full(model, loss_fn, batches, targets)
    return {name: h if name in trained else h * 0 for name, h in result.items()}


def through_outputs(model, loss_fn, batches, targets, cross=True, last=False):
    """Σ ∂²L/∂z_ti ∂z_si · x_tj x_sj, each call of a module apart."""
    model, total = eval_copy(model), 0
    sums = dict.fromkeys(targets, 0.0)
    for batch in batches:
        for name in targets:
            loss, calls = calls_of(model, name, loss_fn, batch)
            for x, z in calls[-1:] if last else calls:
                (g,) = slope(loss, [z], again=True)
                H = jacobian(g, z).view(-1, z.shape[-1], z.numel() // z.shape[-1], z.shape[-1])
                H = H.diagonal(dim1=1, dim2=3)  # (positions, positions, d_out)
                H = H if cross else H * torch.eye(len(H)).to(H)[:, :, None]
                x = x.reshape(-1, x.shape[-1])
                h = torch.einsum("tso,ti,si->oi", H, x, x)
                sums[name] = sums[name] + size_of(batch) * h.detach()
        total += size_of(batch)
    return {name: h / total for name, h in sums.items()}


@wrong(
    "hessian_diagonal",
    "Terms between positions are left out: right for an MLP, wrong with attention.",
)
def hessian_positions_apart(model, loss_fn, batches, targets):
    return through_outputs(model, loss_fn, batches, targets, cross=False)


@wrong("hessian_diagonal", "Only the last call of a module counts; one called twice shows it.")
def hessian_of_last_call(model, loss_fn, batches, targets):
    return through_outputs(model, loss_fn, batches, targets, last=True)


@wrong("hessian_diagonal", "Each call of a module counts, but the terms between its calls do not.")
def hessian_calls_apart(model, loss_fn, batches, targets):
    return through_outputs(model, loss_fn, batches, targets)


@wrong("hessian_diagonal", "Entries below zero become zero.")
def hessian_clamped(model, loss_fn, batches, targets):
    return {n: h.clamp(min=0) for n, h in full(model, loss_fn, batches, targets).items()}


@wrong("hessian_diagonal", "Absolute values, as optimisers take them.")
def hessian_absolute(model, loss_fn, batches, targets):
    return {n: h.abs() for n, h in full(model, loss_fn, batches, targets).items()}


@wrong("hessian_diagonal", "The product with a vector of ones: sums of rows, not the diagonal.")
def hessian_row_sums(model, loss_fn, batches, targets):
    model = eval_copy(model)
    loss, result = mean_loss(model, loss_fn, batches), {}
    for name, W in weights_in(model, targets).items():
        result[name] = slope(slope(loss, [W], again=True)[0].sum(), [W])[0]
    return result


@wrong("hessian_diagonal", "The squared gradient of the mean loss.")
def hessian_as_squared_gradient(model, loss_fn, batches, targets):
    model = eval_copy(model)
    weights = weights_in(model, targets)
    g = slope(mean_loss(model, loss_fn, batches), list(weights.values()))
    return {name: own.square() for name, own in zip(weights, g, strict=True)}


@wrong("hessian_diagonal", "The result is laid out (d_in, d_out).")
def hessian_transposed(model, loss_fn, batches, targets):
    return {n: h.T.contiguous() for n, h in full(model, loss_fn, batches, targets).items()}


@wrong(
    "hessian_diagonal", "Differences of the gradient with a step of 0.1, wrong in the third digit."
)
def hessian_by_coarse_differences(model, loss_fn, batches, targets):
    model, batches = eval_copy(model), list(batches)
    result = {name: torch.zeros_like(W) for name, W in weights_in(model, targets).items()}
    for name, W in weights_in(model, targets).items():
        for k in range(W.numel()):
            pair = []
            for step in (0.1, -0.1):
                W.data.view(-1)[k] += step
                pair.append(slope(mean_loss(model, loss_fn, batches), [W])[0].flatten()[k])
                W.data.view(-1)[k] -= step
            result[name].view(-1)[k] = (pair[0] - pair[1]) / 0.2
    return result


# gauss_newton_diagonal


def gauss_newton(model, loss_fn, batches, targets, curvature=None, prepare=eval_copy, alike=False):
    """diag(Jᵀ H J), with H = curvature(H_y, y) in place of H_y."""
    model, total = prepare(model), 0
    sums = dict.fromkeys(targets, 0.0)
    for batch in batches:
        n = 1 if alike else size_of(batch)
        y, loss_of = output_of(model, loss_fn, batch)
        alone = y.detach().requires_grad_()
        H = jacobian(slope(loss_of(alone), [alone], again=True)[0], alone)
        H = H if curvature is None else curvature(H, y)
        for name, W in weights_in(model, targets).items():
            J = jacobian(y, W)
            h = (J * (H @ J)).sum(0).view_as(W)
            sums[name] = sums[name] + n * h.detach()
        total += n
    return {name: h / total for name, h in sums.items()}


@wrong(
    "gauss_newton_diagonal",
    "The whole Hessian, residual term included; a nonlinear model shows it.",
)
def gauss_newton_as_hessian(model, loss_fn, batches, targets):
    return full(model, loss_fn, batches, targets)


@wrong("gauss_newton_diagonal", "Only the diagonal of H_y; cross-entropy shows it.")
def gauss_newton_output_diagonal(model, loss_fn, batches, targets):
    return gauss_newton(model, loss_fn, batches, targets, lambda H, y: H.diag().diag())


@wrong(
    "gauss_newton_diagonal",
    "H_y is taken for the identity over rows, as if the loss were ½ (y − t)².",
)
def gauss_newton_identity(model, loss_fn, batches, targets):
    eye = lambda H, y: torch.eye(len(H)).to(H) / len(y)  # noqa: E731
    return gauss_newton(model, loss_fn, batches, targets, eye)


@wrong(
    "gauss_newton_diagonal",
    "H_y is that of softmax cross-entropy, whatever the loss; squares show it.",
)
def gauss_newton_always_softmax(model, loss_fn, batches, targets):
    def curvature(H, y):
        p = y.detach().reshape(-1, y.shape[-1]).softmax(-1)
        return torch.block_diag(*[(q.diag() - q.outer(q)) / len(p) for q in p])

    return gauss_newton(model, loss_fn, batches, targets, curvature)


@wrong("gauss_newton_diagonal", "The sum over samples instead of their mean.")
def gauss_newton_sum(model, loss_fn, batches, targets):
    n = sum(size_of(batch) for batch in batches)
    return {k: n * h for k, h in gauss_newton(model, loss_fn, batches, targets).items()}


@wrong("gauss_newton_diagonal", "A mean of the batches' means; batches of unequal size show it.")
def gauss_newton_batches_alike(model, loss_fn, batches, targets):
    return gauss_newton(model, loss_fn, batches, targets, alike=True)


@wrong("gauss_newton_diagonal", "Only the last batch counts.")
def gauss_newton_last_batch(model, loss_fn, batches, targets):
    return gauss_newton(model, loss_fn, list(batches)[-1:], targets)


@wrong("gauss_newton_diagonal", "The model stays in train mode; dropout or batch norm show it.")
def gauss_newton_in_train_mode(model, loss_fn, batches, targets):
    prepare = lambda model: copy.deepcopy(model).requires_grad_()  # noqa: E731
    return gauss_newton(model, loss_fn, batches, targets, prepare=prepare)


@wrong("gauss_newton_diagonal", "Squared gradients of samples: the empirical Fisher.")
def gauss_newton_as_fisher(model, loss_fn, batches, targets):
    return fisher(model, loss_fn, batches, targets)


@wrong("gauss_newton_diagonal", "The forward hook that catches the output stays on the model.")
def gauss_newton_leaves_hook(model, loss_fn, batches, targets):
    model.register_forward_hook(lambda module, inputs, y: None)
    return gauss_newton(model, loss_fn, batches, targets)


@wrong(
    "gauss_newton_diagonal",
    "One draw of labels in place of H_y: right on average, far off in one call.",
)
def gauss_newton_sampled_once(model, loss_fn, batches, targets):
    def curvature(H, y):
        v = torch.randint(0, 2, (len(H),)).to(H) * 2 - 1
        values, vectors = torch.linalg.eigh(H)
        root = vectors @ (values.clamp(min=0).sqrt() * v)
        return root.outer(root)

    return gauss_newton(model, loss_fn, batches, targets, curvature)


@wrong("gauss_newton_diagonal", "Terms between positions are left out; attention shows it.")
def gauss_newton_positions_apart(model, loss_fn, batches, targets):
    model, total, ys = eval_copy(model), 0, []
    model.register_forward_hook(lambda module, inputs, y: ys.append(y))
    sums = dict.fromkeys(targets, 0.0)
    for batch in batches:
        for name in targets:
            _, calls = calls_of(model, name, loss_fn, batch)
            y, alone = ys[-1], ys[-1].detach().requires_grad_()
            loss = loss_fn(lambda *inputs, alone=alone, **options: alone, batch)
            H = jacobian(slope(loss, [alone], again=True)[0], alone)
            for x, z in calls:
                J = jacobian(y, z)
                curvature = (J * (H @ J)).sum(0).view(-1, z.shape[-1])
                h = curvature.T @ x.detach().reshape(-1, x.shape[-1]).square()
                sums[name] = sums[name] + size_of(batch) * h.detach()
        total += size_of(batch)
    return {name: h / total for name, h in sums.items()}


# empirical_fisher


def fisher(model, loss_fn, batches, targets, split=samples_of, prepare=eval_copy):
    """The mean of squared gradients of the parts into which `split` takes each batch."""
    model, parts = prepare(model), [part for batch in batches for part in split(batch)]
    weights, sums = weights_in(model, targets), dict.fromkeys(targets, 0.0)
    for part in parts:
        gradients = slope(loss_fn(model, part), list(weights.values()))
        for name, g in zip(weights, gradients, strict=True):
            sums[name] = sums[name] + g.square()
    return {name: h / len(parts) for name, h in sums.items()}


@wrong("empirical_fisher", "The squared gradient of each batch's mean loss, not of each sample's.")
def fisher_of_batches(model, loss_fn, batches, targets):
    return fisher(model, loss_fn, batches, targets, split=lambda batch: [batch])


@wrong("empirical_fisher", "The sum over samples instead of their mean.")
def fisher_sum(model, loss_fn, batches, targets):
    n = sum(size_of(batch) for batch in batches)
    return {name: n * h for name, h in fisher(model, loss_fn, batches, targets).items()}


@wrong("empirical_fisher", "A mean of the batches' means; batches of unequal size show it.")
def fisher_batches_alike(model, loss_fn, batches, targets):
    each = [fisher(model, loss_fn, [batch], targets) for batch in batches]
    return {name: torch.stack([one[name] for one in each]).mean(0) for name in targets}


@wrong("empirical_fisher", "Only the last batch counts.")
def fisher_of_last_batch(model, loss_fn, batches, targets):
    return fisher(model, loss_fn, list(batches)[-1:], targets)


@wrong(
    "empirical_fisher",
    "Gradients of samples inside the mean loss: too small by the batch size squared.",
)
def fisher_of_mean_loss(model, loss_fn, batches, targets):
    model, total = eval_copy(model), 0
    weights, sums = weights_in(model, targets), dict.fromkeys(targets, 0.0)
    for batch in batches:
        for sample in samples_of(batch):
            loss = loss_fn(model, sample) / size_of(batch)
            for name, g in zip(weights, slope(loss, list(weights.values())), strict=True):
                sums[name] = sums[name] + g.square()
            total += 1
    return {name: h / total for name, h in sums.items()}


@wrong("empirical_fisher", "The model stays in train mode; dropout shows it.")
def fisher_in_train_mode(model, loss_fn, batches, targets):
    prepare = lambda model: copy.deepcopy(model).train().requires_grad_()  # noqa: E731
    return fisher(model, loss_fn, batches, targets, prepare=prepare)


@wrong("empirical_fisher", "The mean of absolute gradients, not of squared ones.")
def fisher_absolute(model, loss_fn, batches, targets):
    model, batches = eval_copy(model), list(batches)
    weights, sums = weights_in(model, targets), dict.fromkeys(targets, 0.0)
    for sample in (sample for batch in batches for sample in samples_of(batch)):
        for name, g in zip(
            weights, slope(loss_fn(model, sample), [*weights.values()]), strict=True
        ):
            sums[name] = sums[name] + g.abs()
    return {name: h / sum(map(size_of, batches)) for name, h in sums.items()}


def fisher_from_calls(model, loss_fn, batches, targets, combine, last=False):
    """Per-sample gradients as sums of outer products of ∂L/∂z and x."""
    model, total = eval_copy(model), 0
    sums = dict.fromkeys(targets, 0.0)
    for sample in (sample for batch in batches for sample in samples_of(batch)):
        for name in targets:
            loss, calls = calls_of(model, name, loss_fn, sample)
            for x, z in calls[-1:] if last else calls:
                dz = slope(loss, [z])[0].reshape(-1, z.shape[-1])
                x = x.detach().reshape(-1, x.shape[-1])
                sums[name] = sums[name] + combine(dz, x)
        total += 1
    return {name: h / total for name, h in sums.items()}


@wrong("empirical_fisher", "Squares before the sum over a sample's positions; inputs (n, T, d_in).")
def fisher_of_tokens(model, loss_fn, batches, targets):
    combine = lambda dz, x: dz.square().T @ x.square()  # noqa: E731
    return fisher_from_calls(model, loss_fn, batches, targets, combine)


@wrong("empirical_fisher", "Only the last call of a module counts; one called twice shows it.")
def fisher_of_last_call(model, loss_fn, batches, targets):
    combine = lambda dz, x: (dz.T @ x).square()  # noqa: E731
    return fisher_from_calls(model, loss_fn, batches, targets, combine, last=True)


@wrong("empirical_fisher", "Squares before the sum over calls: a module called twice shows it.")
def fisher_calls_apart(model, loss_fn, batches, targets):
    combine = lambda dz, x: (dz.T @ x).square()  # noqa: E731
    return fisher_from_calls(model, loss_fn, batches, targets, combine)


@wrong("empirical_fisher", "Gradients are gathered in the model's own .grad and left there.")
def fisher_leaves_gradients(model, loss_fn, batches, targets):
    result = fisher(model, loss_fn, batches, targets)
    for name, W in weights_in(model, targets).items():
        W.grad = result[name].clone()
    return result


@wrong("empirical_fisher", "The variance of samples' gradients: the squared mean is taken off.")
def fisher_centred(model, loss_fn, batches, targets):
    batches = list(batches)
    result = fisher(model, loss_fn, batches, targets)
    model = eval_copy(model)
    weights = weights_in(model, targets)
    mean = slope(mean_loss(model, loss_fn, batches), list(weights.values()))
    return {name: result[name] - g.square() for name, g in zip(weights, mean, strict=True)}


# hutchinson


def signs(like, generator):
    return torch.randint(0, 2, like.shape, generator=generator).to(like) * 2 - 1


def probed(
    model,
    loss_fn,
    batches,
    targets,
    generator,
    samples,
    probe=signs,
    loss=mean_loss,
    prepare=eval_copy,
):
    """The mean of v ⊙ H v over `samples` probes, all layers together."""
    model = prepare(model)
    Ws = list(weights_in(model, targets).values())
    g = slope(loss(model, loss_fn, batches), Ws, again=True)
    sums = [torch.zeros_like(W) for W in Ws]
    for _ in range(samples):
        v = [probe(W.detach(), generator) for W in Ws]
        Hv = slope(sum((a * b).sum() for a, b in zip(g, v, strict=True)), Ws)
        for h, a, b in zip(sums, v, Hv, strict=True):
            h += a * b / samples
    return dict(zip(targets, sums, strict=True))


@wrong("hutchinson", "Probes come from a fixed seed: two generators give one estimate.")
def probes_from_fixed_seed(model, loss_fn, batches, targets, *, generator, samples):
    own = torch.Generator().manual_seed(0)
    return probed(model, loss_fn, batches, targets, own, samples)


@wrong("hutchinson", "Probes uniform in [0, 1), which are neither centred nor of variance one.")
def probes_uniform_from_zero(model, loss_fn, batches, targets, *, generator, samples):
    probe = lambda W, own: torch.rand(W.shape, generator=own).to(W)  # noqa: E731
    return probed(model, loss_fn, batches, targets, generator, samples, probe)


@wrong("hutchinson", "Probes uniform in [−1, 1): the estimate is a third of the diagonal.")
def probes_uniform(model, loss_fn, batches, targets, *, generator, samples):
    probe = lambda W, own: torch.rand(W.shape, generator=own).to(W) * 2 - 1  # noqa: E731
    return probed(model, loss_fn, batches, targets, generator, samples, probe)


@wrong("hutchinson", "The sum over probes instead of their mean.")
def probes_summed(model, loss_fn, batches, targets, *, generator, samples):
    result = probed(model, loss_fn, batches, targets, generator, samples)
    return {name: samples * h for name, h in result.items()}


@wrong("hutchinson", "One probe whatever `samples` says: the variance does not fall.")
def one_probe(model, loss_fn, batches, targets, *, generator, samples):
    return probed(model, loss_fn, batches, targets, generator, 1)


@wrong("hutchinson", "The probe is drawn before the loop: all samples are the same.")
def probe_drawn_once(model, loss_fn, batches, targets, *, generator, samples):
    drawn = {}
    probe = lambda W, own: drawn.setdefault(W.data_ptr(), signs(W, own))  # noqa: E731
    return probed(model, loss_fn, batches, targets, generator, samples, probe)


@wrong("hutchinson", "One sign for each row: terms between the entries of a row stay in.")
def one_sign_for_a_row(model, loss_fn, batches, targets, *, generator, samples):
    probe = lambda W, own: signs(W[:, :1], own).expand_as(W)  # noqa: E731
    return probed(model, loss_fn, batches, targets, generator, samples, probe)


@wrong("hutchinson", "Layers of one shape share one probe: terms between the layers stay in.")
def layers_share_a_probe(model, loss_fn, batches, targets, *, generator, samples):
    model = eval_copy(model)
    Ws = list(weights_in(model, targets).values())
    g = slope(mean_loss(model, loss_fn, batches), Ws, again=True)
    sums = [torch.zeros_like(W) for W in Ws]
    for _ in range(samples):
        shared = {W.shape: signs(W.detach(), generator) for W in Ws}
        v = [shared[W.shape] for W in Ws]
        Hv = slope(sum((a * b).sum() for a, b in zip(g, v, strict=True)), Ws)
        for h, a, b in zip(sums, v, Hv, strict=True):
            h += a * b / samples
    return dict(zip(targets, sums, strict=True))


@wrong("hutchinson", "The trace estimate vᵀ H v, spread evenly over the entries.")
def trace_spread(model, loss_fn, batches, targets, *, generator, samples):
    result = probed(model, loss_fn, batches, targets, generator, samples)
    return {name: torch.full_like(h, float(h.mean())) for name, h in result.items()}


@wrong("hutchinson", "Absolute values of each product: biased upwards.")
def products_absolute(model, loss_fn, batches, targets, *, generator, samples):
    each = [probed(model, loss_fn, batches, targets, generator, 1) for _ in range(samples)]
    return {name: torch.stack([one[name].abs() for one in each]).mean(0) for name in targets}


@wrong("hutchinson", "A mean of the batches' losses; batches of unequal size show it.")
def hutchinson_batches_alike(model, loss_fn, batches, targets, *, generator, samples):
    def loss(model, loss_fn, batches):
        return torch.stack([twice(loss_fn, model, batch) for batch in batches]).mean()

    return probed(model, loss_fn, batches, targets, generator, samples, loss=loss)


@wrong("hutchinson", "The copy of the model is in train mode; dropout shows it.")
def hutchinson_in_train_mode(model, loss_fn, batches, targets, *, generator, samples):
    prepare = lambda model: copy.deepcopy(model).train().requires_grad_()  # noqa: E731
    return probed(model, loss_fn, batches, targets, generator, samples, prepare=prepare)


# sensitivity_theta


def theta_of(
    diagonals,
    topk_fraction=0.5,
    effective_share=0.85,
    *,
    trace=torch.sum,
    positive=lambda h: h.clamp(min=0),
    k_of=lambda share, n: max(1, math.floor(share * n)),
    top=torch.mean,
    count=lambda sums, share: (sums < share * sums[-1]).sum() + (sums[-1] > 0),
    coefficient=lambda metric: metric.std(correction=0) / metric.mean() ** 2,
    last_coefficient=None,
    combine=lambda weigh, S_g, S_l: weigh(S_g) + weigh(S_l),
    finish=lambda theta: theta.clamp(min=0),
):
    """θ with any one step exchanged."""

    def weigh(metric, coefficient=coefficient):
        return metric * 0 if metric.min() == metric.max() else coefficient(metric) * metric

    hs = [h.double().flatten() for h in diagonals.values()]
    largest = [positive(h).sort(descending=True).values for h in hs]
    S_g = torch.stack([trace(h) for h in hs])
    S_topk = torch.stack([top(h[: k_of(topk_fraction, len(h))]) for h in largest])
    S_er = torch.stack([torch.as_tensor(count(h.cumsum(0), effective_share)) for h in largest])
    S_l = weigh(S_topk) + weigh(S_er.double())
    last = last_coefficient or coefficient
    theta = finish(combine(lambda metric: weigh(metric, last), S_g, S_l))
    theta = theta if theta.any() else torch.ones_like(theta)
    return dict(zip(diagonals, theta.tolist(), strict=True))


@wrong("sensitivity_theta", "σ/μ instead of σ/μ² as coefficient.")
def theta_sigma_over_mu(diagonals, topk_fraction=0.5, effective_share=0.85):
    return theta_of(
        diagonals,
        topk_fraction,
        effective_share,
        coefficient=lambda metric: metric.std(correction=0) / metric.mean(),
    )


@wrong("sensitivity_theta", "Sample σ for γ1, population σ for γ2: no common factor.")
def theta_mixed_deviations(diagonals, topk_fraction=0.5, effective_share=0.85):
    def combine(weigh, S_g, S_l):
        m = len(S_g)
        return weigh(S_g) * math.sqrt(m / max(1, m - 1)) + weigh(S_l)

    return theta_of(diagonals, topk_fraction, effective_share, combine=combine)


@wrong("sensitivity_theta", "The variance σ² instead of σ.")
def theta_variance(diagonals, topk_fraction=0.5, effective_share=0.85):
    return theta_of(
        diagonals,
        topk_fraction,
        effective_share,
        coefficient=lambda metric: metric.var(correction=0) / metric.mean() ** 2,
    )


@wrong("sensitivity_theta", "Entries below zero count as zero in the trace too.")
def theta_trace_clamped(diagonals, topk_fraction=0.5, effective_share=0.85):
    trace = lambda h: h.clamp(min=0).sum()  # noqa: E731
    return theta_of(diagonals, topk_fraction, effective_share, trace=trace)


@wrong(
    "sensitivity_theta",
    "The mean of the diagonal instead of its sum; matrices of unequal size show it.",
)
def theta_trace_mean(diagonals, topk_fraction=0.5, effective_share=0.85):
    return theta_of(diagonals, topk_fraction, effective_share, trace=torch.mean)


@wrong(
    "sensitivity_theta",
    "The sum of the k largest entries instead of their mean; unequal sizes show it.",
)
def theta_topk_sum(diagonals, topk_fraction=0.5, effective_share=0.85):
    return theta_of(diagonals, topk_fraction, effective_share, top=torch.sum)


@wrong("sensitivity_theta", "Absolute values in Eqs 9 and 10; entries below zero show it.")
def theta_absolute(diagonals, topk_fraction=0.5, effective_share=0.85):
    return theta_of(diagonals, topk_fraction, effective_share, positive=torch.abs)


@wrong("sensitivity_theta", "Entries below zero stay in Eqs 9 and 10.")
def theta_signed(diagonals, topk_fraction=0.5, effective_share=0.85):
    return theta_of(diagonals, topk_fraction, effective_share, positive=lambda h: h)


@wrong("sensitivity_theta", "k is rounded up; odd N shows it.")
def theta_k_rounded_up(diagonals, topk_fraction=0.5, effective_share=0.85):
    k_of = lambda share, n: math.ceil(share * n)  # noqa: E731
    return theta_of(diagonals, topk_fraction, effective_share, k_of=k_of)


@wrong(
    "sensitivity_theta", "k may be zero, the mean of nothing NaN; a diagonal of one entry shows it."
)
def theta_k_zero(diagonals, topk_fraction=0.5, effective_share=0.85):
    return theta_of(diagonals, topk_fraction, effective_share, k_of=lambda share, n: int(share * n))


@wrong("sensitivity_theta", "topk_fraction is ignored: always half.")
def theta_always_half(diagonals, topk_fraction=0.5, effective_share=0.85):
    return theta_of(diagonals, 0.5, effective_share)


@wrong("sensitivity_theta", "effective_share is ignored: always 0.85.")
def theta_always_85(diagonals, topk_fraction=0.5, effective_share=0.85):
    return theta_of(diagonals, topk_fraction)


@wrong(
    "sensitivity_theta", "The effective rank is one too small: entries before the share is reached."
)
def theta_count_before(diagonals, topk_fraction=0.5, effective_share=0.85):
    count = lambda sums, share: (sums < share * sums[-1]).sum()  # noqa: E731
    return theta_of(diagonals, topk_fraction, effective_share, count=count)


@wrong(
    "sensitivity_theta",
    "> for ≥: a share reached exactly counts one entry more; h = (3, 1), share 3/4.",
)
def theta_share_exceeded(diagonals, topk_fraction=0.5, effective_share=0.85):
    def count(sums, share):
        return ((sums <= share * sums[-1]).sum() + 1).clamp(max=len(sums)) * (sums[-1] > 0)

    return theta_of(diagonals, topk_fraction, effective_share, count=count)


@wrong("sensitivity_theta", "The effective rank as the exponential of the entropy.")
def theta_entropy(diagonals, topk_fraction=0.5, effective_share=0.85):
    def count(sums, share):
        p = sums.diff(prepend=sums.new_zeros(1)) / sums[-1].clamp(min=1e-300)
        return torch.special.entr(p).sum().exp()

    return theta_of(diagonals, topk_fraction, effective_share, count=count)


@wrong("sensitivity_theta", "The local part enters without its coefficient γ2.")
def theta_without_last_coefficient(diagonals, topk_fraction=0.5, effective_share=0.85):
    return theta_of(
        diagonals, topk_fraction, effective_share, combine=lambda weigh, S_g, S_l: weigh(S_g) + S_l
    )


@wrong("sensitivity_theta", "The global part is left out.")
def theta_local_alone(diagonals, topk_fraction=0.5, effective_share=0.85):
    return theta_of(
        diagonals, topk_fraction, effective_share, combine=lambda weigh, S_g, S_l: weigh(S_l)
    )


@wrong("sensitivity_theta", "A negative θ stays negative.")
def theta_negative(diagonals, topk_fraction=0.5, effective_share=0.85):
    return theta_of(diagonals, topk_fraction, effective_share, finish=lambda theta: theta)


@wrong("sensitivity_theta", "No spread gives zeros for all instead of equal positive numbers.")
def theta_all_zero(diagonals, topk_fraction=0.5, effective_share=0.85):
    theta = theta_of(diagonals, topk_fraction, effective_share)
    same = len({tuple(h.flatten().tolist()) for h in diagonals.values()}) == 1
    return {name: 0.0 if same else value for name, value in theta.items()}


@wrong("sensitivity_theta", "No spread divides zero by zero in normalised shares: NaN.")
def theta_nan(diagonals, topk_fraction=0.5, effective_share=0.85):
    theta = theta_of(diagonals, topk_fraction, effective_share)
    spread = max(theta.values()) - min(theta.values())
    return {name: value / spread * spread if spread else math.nan for name, value in theta.items()}


@wrong("sensitivity_theta", "The diagonals are sorted in place.")
def theta_sorts_in_place(diagonals, topk_fraction=0.5, effective_share=0.85):
    for h in diagonals.values():
        h.view(-1).copy_(h.flatten().sort(descending=True).values)
    return theta_of(diagonals, topk_fraction, effective_share)


# ranks_from_shares


def bounds(scores, budget, costs, lower, upper):
    return (
        costs or dict.fromkeys(scores, 1),
        lower or dict.fromkeys(scores, 0),
        upper or dict.fromkeys(scores, budget),
    )


def shares(scores, budget, costs=None, lower=None, upper=None, order=None, spare=True):
    """Largest remainder with exchangeable parts, on clip(t · score, lower, upper) by bisection."""
    cost, low, high = bounds(scores, budget, costs, lower, upper)
    ideal = reference.budget.ideal_ranks(
        {n: Fraction(s) for n, s in scores.items()}, budget, cost, low, high
    )
    ranks = {name: math.floor(rank) for name, rank in ideal.items()}
    order = order or (lambda ideal: sorted(ideal, key=lambda n: math.floor(ideal[n]) - ideal[n]))
    left = budget - sum(ranks[n] * cost[n] for n in ranks)
    while spare and any(ranks[n] < high[n] and cost[n] <= left for n in ranks):
        for name in order(ideal):
            if ranks[name] < high[name] and cost[name] <= left:
                ranks[name], left = ranks[name] + 1, left - cost[name]
    return ranks


def proportional(scores, budget):
    total = sum(map(Fraction, scores.values()))
    return {n: Fraction(s) * budget / total if total else Fraction(0) for n, s in scores.items()}


@wrong("ranks_from_shares", "Shares are rounded down, and the rest of the budget is lost.")
def rest_lost(scores, budget, costs=None, lower=None, upper=None):
    return shares(scores, budget, costs, lower, upper, spare=False)


@wrong("ranks_from_shares", "Each share is rounded on its own, so the sum misses the budget.")
def each_rounded(scores, budget, costs=None, lower=None, upper=None):
    cost, low, high = bounds(scores, budget, costs, lower, upper)
    ideal = reference.budget.ideal_ranks(
        {n: Fraction(s) for n, s in scores.items()}, budget, cost, low, high
    )
    return {name: round(rank) for name, rank in ideal.items()}


@wrong("ranks_from_shares", "Ties of remainders go to the later module.")
def ties_to_the_later(scores, budget, costs=None, lower=None, upper=None):
    def order(ideal):
        places = {name: i for i, name in enumerate(ideal)}
        return sorted(ideal, key=lambda n: (math.floor(ideal[n]) - ideal[n], -places[n]))

    return shares(scores, budget, costs, lower, upper, order)


@wrong("ranks_from_shares", "Ranks left over go to the largest scores, not the largest remainders.")
def rest_to_the_largest(scores, budget, costs=None, lower=None, upper=None):
    return shares(
        scores, budget, costs, lower, upper, lambda ideal: sorted(ideal, key=lambda n: -ideal[n])
    )


@wrong("ranks_from_shares", "Ranks left over go to the modules in their order.")
def rest_in_order(scores, budget, costs=None, lower=None, upper=None):
    return shares(scores, budget, costs, lower, upper, list)


@wrong("ranks_from_shares", "Shares are clipped once, and what the caps cut off is lost.")
def caps_lose_ranks(scores, budget, costs=None, lower=None, upper=None):
    _, low, high = bounds(scores, budget, costs, lower, upper)
    ranks = shares(scores, budget, costs, None, None)
    return {name: min(max(rank, low[name]), high[name]) for name, rank in ranks.items()}


@wrong(
    "ranks_from_shares", "The lower bounds come first and the rest is shared on top, not clipped."
)
def lower_on_top(scores, budget, costs=None, lower=None, upper=None):
    cost, low, high = bounds(scores, budget, costs, lower, upper)
    left = budget - sum(low[n] * cost[n] for n in low)
    room = {name: high[name] - low[name] for name in scores}
    more = reference.ranks_from_shares(scores, left, costs, upper=room)
    return {name: low[name] + more[name] for name in scores}


@wrong("ranks_from_shares", "The lower bounds are ignored.")
def lower_ignored(scores, budget, costs=None, lower=None, upper=None):
    return reference.ranks_from_shares(scores, budget, costs, None, upper)


@wrong("ranks_from_shares", "The upper bounds are ignored.")
def upper_ignored(scores, budget, costs=None, lower=None, upper=None):
    return reference.ranks_from_shares(scores, budget, costs, lower, None)


@wrong("ranks_from_shares", "Every module gets at least one rank, with lower bounds of zero too.")
def at_least_one(scores, budget, costs=None, lower=None, upper=None):
    ranks = reference.ranks_from_shares(scores, budget, costs, lower, upper)
    for name in [name for name, rank in ranks.items() if rank == 0]:
        most = max(ranks, key=ranks.get)
        if ranks[most] > 1:
            ranks[most], ranks[name] = ranks[most] - 1, 1
    return ranks


@wrong("ranks_from_shares", "Costs are ignored: a budget in parameters is spent as ranks.")
def costs_ignored(scores, budget, costs=None, lower=None, upper=None):
    most = budget if upper is None else min(budget, sum(upper.values()))
    return reference.ranks_from_shares(scores, most, None, lower, upper)


@wrong("ranks_from_shares", "Scores share out parameters, not ranks: dear modules get too few.")
def shares_of_parameters(scores, budget, costs=None, lower=None, upper=None):
    if costs is None:
        return reference.ranks_from_shares(scores, budget, costs, lower, upper)
    scores = {name: Fraction(score) / costs[name] for name, score in scores.items()}
    return reference.ranks_from_shares(scores, budget, costs, lower, upper)


@wrong(
    "ranks_from_shares",
    "With costs it stops at the first rank that does not fit; cheaper ones would.",
)
def stops_at_first_misfit(scores, budget, costs=None, lower=None, upper=None):
    cost, _, high = bounds(scores, budget, costs, lower, upper)
    ranks = shares(scores, budget, costs, lower, upper, spare=False)
    left = budget - sum(ranks[n] * cost[n] for n in ranks)
    for name in sorted(ranks, key=lambda n: -Fraction(scores[n])):
        while ranks[name] < high[name]:
            if cost[name] > left:
                return ranks
            ranks[name], left = ranks[name] + 1, left - cost[name]
    return ranks


@wrong(
    "ranks_from_shares",
    "Ranks go one by one to the largest score / (rank + 1): D'Hondt, not Eq 15.",
)
def highest_averages(scores, budget, costs=None, lower=None, upper=None):
    cost, low, high = bounds(scores, budget, costs, lower, upper)
    ranks = dict(low)
    left = budget - sum(ranks[n] * cost[n] for n in ranks)
    while fits := [n for n in ranks if ranks[n] < high[n] and cost[n] <= left]:
        name = max(fits, key=lambda n: Fraction(scores[n]) / (ranks[n] + 1))
        ranks[name], left = ranks[name] + 1, left - cost[name]
    return ranks


@wrong(
    "ranks_from_shares", "What the scored modules cannot hold goes to the first that scores zero."
)
def zero_scores_one_by_one(scores, budget, costs=None, lower=None, upper=None):
    cost, low, high = bounds(scores, budget, costs, lower, upper)
    ranks = reference.ranks_from_shares(scores, budget, costs, lower, upper)
    zero = [name for name, score in scores.items() if score == 0]
    spent = sum((ranks[n] - low[n]) * cost[n] for n in zero)
    for name in zero:
        more = min(high[name] - low[name], spent // cost[name])
        ranks[name], spent = low[name] + more, spent - more * cost[name]
    return ranks


@wrong("ranks_from_shares", "Shares are a softmax of the scores.")
def softmax_shares(scores, budget, costs=None, lower=None, upper=None):
    top = max(scores.values(), default=0)
    scores = {name: math.exp(float(score - top)) for name, score in scores.items()}
    return reference.ranks_from_shares(scores, budget, costs, lower, upper)


@wrong(
    "ranks_from_shares", "Missing bounds are written into the caller's `upper`: the budget caps it."
)
def writes_upper(scores, budget, costs=None, lower=None, upper=None):
    result = reference.ranks_from_shares(scores, budget, costs, lower, upper)
    for name in upper or {}:
        upper[name] -= result[name]
    return result


# best_ranks


def chosen(scores, budget, costs=None, lower=None, upper=None, key=None, stop=False):
    """The reference's two rounds, with another order of ranks, or a stop at the first misfit."""
    cost, low, high = bounds(scores, budget, costs, lower, upper)
    keep = {name: [False] * len(own) for name, own in scores.items()}
    each = [(n, i) for n, own in scores.items() for i in range(len(own))]
    each.sort(key=key or (lambda rank: -scores[rank[0]][rank[1]]))
    left = budget
    for bound in (low, high):
        for name, i in each:
            if keep[name][i] or sum(keep[name]) >= bound[name]:
                continue
            if cost[name] <= left:
                keep[name][i], left = True, left - cost[name]
            elif stop:
                break
    return keep


@wrong("best_ranks", "Ties go to the later rank.")
def best_ties_later(scores, budget, costs=None, lower=None, upper=None):
    flipped = {name: own[::-1] for name, own in reversed(scores.items())}
    keep = reference.best_ranks(flipped, budget, costs, lower, upper)
    return {name: keep[name][::-1] for name in scores}


@wrong("best_ranks", "Ties go by rank first, then by module.")
def best_ties_by_rank(scores, budget, costs=None, lower=None, upper=None):
    key = lambda rank: (-scores[rank[0]][rank[1]], rank[1])  # noqa: E731
    return chosen(scores, budget, costs, lower, upper, key)


@wrong("best_ranks", "Scores above the threshold stay: with ties at it too few ranks are kept.")
def best_above_threshold(scores, budget, costs=None, lower=None, upper=None):
    keep = reference.best_ranks(scores, budget, costs, lower, upper)
    dropped = [s for n in scores for s, k in zip(scores[n], keep[n], strict=True) if not k]
    edge = max(dropped, default=-math.inf)
    low = lower or dict.fromkeys(scores, 0)
    return {
        n: [k and (s > edge or sum(keep[n]) <= low[n]) for s, k in zip(own, keep[n], strict=True)]
        for n, own in scores.items()
    }


@wrong("best_ranks", "Scores at the threshold or above stay: with ties too many ranks are kept.")
def best_from_threshold(scores, budget, costs=None, lower=None, upper=None):
    keep = reference.best_ranks(scores, budget, costs, lower, upper)
    kept = [s for n in scores for s, k in zip(scores[n], keep[n], strict=True) if k]
    edge = min(kept, default=math.inf)
    if costs or lower or upper:
        return keep
    return {name: [score >= edge for score in own] for name, own in scores.items()}


@wrong("best_ranks", "The budget is split evenly, and each module keeps its own best.")
def best_of_each_module(scores, budget, costs=None, lower=None, upper=None):
    even = reference.ranks_from_shares(
        dict.fromkeys(scores, 1), budget, costs, lower, {n: len(own) for n, own in scores.items()}
    )
    return {
        name: [
            i in sorted(range(len(own)), key=lambda i: -own[i])[: even[name]]
            for i in range(len(own))
        ]
        for name, own in scores.items()
    }


@wrong("best_ranks", "The lower bounds are ignored.")
def best_without_lower(scores, budget, costs=None, lower=None, upper=None):
    return reference.best_ranks(scores, budget, costs, None, upper)


@wrong("best_ranks", "The upper bounds are ignored.")
def best_without_upper(scores, budget, costs=None, lower=None, upper=None):
    return reference.best_ranks(scores, budget, costs, lower, None)


@wrong("best_ranks", "The first `lower` ranks of each module are kept, not its best ones.")
def best_lower_by_position(scores, budget, costs=None, lower=None, upper=None):
    low = lower or dict.fromkeys(scores, 0)

    def first(rank):
        return -math.inf if rank[1] < low[rank[0]] else -scores[rank[0]][rank[1]]

    return chosen(scores, budget, costs, lower, upper, first)


@wrong("best_ranks", "Scores count by their absolute value; negative ones show it.")
def best_by_magnitude(scores, budget, costs=None, lower=None, upper=None):
    scores = {name: [abs(score) for score in own] for name, own in scores.items()}
    return reference.best_ranks(scores, budget, costs, lower, upper)


@wrong("best_ranks", "A score of zero never stays, even if the budget has room.")
def best_drops_zeros(scores, budget, costs=None, lower=None, upper=None):
    keep = reference.best_ranks(scores, budget, costs, lower, upper)
    return {n: [k and scores[n][i] != 0 for i, k in enumerate(own)] for n, own in keep.items()}


@wrong("best_ranks", "Costs are ignored: the budget counts ranks.")
def best_without_costs(scores, budget, costs=None, lower=None, upper=None):
    return reference.best_ranks(scores, budget, None, lower, upper)


@wrong("best_ranks", "With costs it stops at the first rank that does not fit; later ones would.")
def best_stops_at_misfit(scores, budget, costs=None, lower=None, upper=None):
    return chosen(scores, budget, costs, lower, upper, stop=True)


@wrong("best_ranks", "With costs the order is by score per cost.")
def best_by_score_per_cost(scores, budget, costs=None, lower=None, upper=None):
    cost = costs or dict.fromkeys(scores, 1)
    key = lambda rank: -scores[rank[0]][rank[1]] / cost[rank[0]]  # noqa: E731
    return chosen(scores, budget, costs, lower, upper, key)


# l1ra_shrink


@wrong("l1ra_shrink", "No upper bound; a gate of 1.5 shows it.")
def shrink_unbounded(gates, amount):
    return [(c - amount).clamp(min=0) for c in gates]


@wrong("l1ra_shrink", "Soft threshold on both sides: a gate of −0.5 stays negative.")
def shrink_both_sides(gates, amount):
    return [(c.sign() * (c.abs() - amount).clamp(min=0)).clamp(max=1) for c in gates]


@wrong("l1ra_shrink", "Clamps before it shrinks; a gate of 1.05 with amount 0.02 shows it.")
def shrink_after_clamp(gates, amount):
    return [(c.clamp(0, 1) - amount).clamp(min=0) for c in gates]


@wrong("l1ra_shrink", "Shrinks by a factor, as weight decay does.")
def shrink_by_factor(gates, amount):
    return [(c * (1 - amount)).clamp(0, 1) for c in gates]


@wrong("l1ra_shrink", "A hard threshold: small gates fall to zero, others stay.")
def shrink_hard(gates, amount):
    return [torch.where(c > amount, c, 0.0).clamp(0, 1) for c in gates]


@wrong("l1ra_shrink", "The gates are changed in place.")
def shrink_in_place(gates, amount):
    return [c.data.sub_(amount).clamp_(0, 1) for c in gates]


@wrong("l1ra_shrink", "No lower bound: a gate below the amount gets negative.")
def shrink_below_zero(gates, amount):
    return [(c - amount).clamp(max=1) for c in gates]


@wrong("l1ra_shrink", "Half the amount, from a penalty of squares without the ½.")
def shrink_by_half(gates, amount):
    return [(c - amount / 2).clamp(0, 1) for c in gates]


@wrong("l1ra_shrink", "Only the first tensor of the list is shrunk.")
def shrink_first_module(gates, amount):
    return [(c - amount * (i == 0)).clamp(0, 1) for i, c in enumerate(gates)]


# l1ra_reassign


def reassigned(
    gates,
    budget,
    lower,
    upper,
    threshold=0.0,
    *,
    above=lambda c, threshold: c > threshold,
    stay_key=lambda c, i: -c[i],
    excess_key=lambda c, name, i, order: (c, -order),
    smallest=None,
    descending=True,
    reverse_ties=False,
    rounds=True,
    second=True,
):
    """The reference in other words, with exchangeable parts."""
    keep, ranks = {}, {}
    for name, c in gates.items():
        count = min(max(sum(above(g, threshold) for g in c), lower[name]), upper[name])
        stay = sorted(range(len(c)), key=lambda i, c=c: stay_key(c, i))[:count]
        keep[name] = [i in stay for i in range(len(c))]
        ranks[name] = max(len(stay), lower[name])
    each = [(name, i) for name, c in gates.items() for i in range(len(c))]
    order = {rank: i for i, rank in enumerate(each)}
    for name, i in sorted(order, key=lambda r: excess_key(gates[r[0]][r[1]], *r, order[r])):
        if sum(ranks.values()) > budget and keep[name][i] and ranks[name] > lower[name]:
            keep[name][i], ranks[name] = False, ranks[name] - 1
    smallest = smallest or (
        lambda c, kept: min((g for g, k in zip(c, kept, strict=True) if k), default=-math.inf)
    )
    names = list(reversed(gates)) if reverse_ties else list(gates)
    names.sort(key=lambda n: smallest(gates[n], keep[n]), reverse=descending)
    high = [n for n in names if all(above(g, threshold) for g in gates[n])]
    for receivers in (high, [n for n in names if n not in high] if second else []):
        while sum(ranks.values()) < budget and any(ranks[n] < upper[n] for n in receivers):
            for name in receivers:
                room = min(budget - sum(ranks.values()), upper[name] - ranks[name])
                ranks[name] += min(room, 1) if rounds else room
    return ranks, keep


@wrong("l1ra_reassign", "If all gates fall the last rank survives instead of the largest.")
def last_rank_survives(gates, budget, lower, upper, threshold=0.0):
    def stay_key(c, i):
        return (c[i] <= threshold, -c[i] if c[i] > threshold else -i)

    return reassigned(gates, budget, lower, upper, threshold, stay_key=stay_key)


@wrong("l1ra_reassign", "Gates at the threshold survive: ≥ for >.")
def threshold_survives(gates, budget, lower, upper, threshold=0.0):
    above = lambda c, threshold: c >= threshold  # noqa: E731
    return reassigned(gates, budget, lower, upper, threshold, above=above)


@wrong("l1ra_reassign", "The threshold is ignored: only gates of zero are pruned.")
def threshold_ignored(gates, budget, lower, upper, threshold=0.0):
    return reassigned(gates, budget, lower, upper, 0.0)


@wrong("l1ra_reassign", "Freed ranks vanish where every module has lost one.")
def freed_ranks_vanish(gates, budget, lower, upper, threshold=0.0):
    return reassigned(gates, budget, lower, upper, threshold, second=False)


@wrong("l1ra_reassign", "Ranks go to the modules with the smallest smallest gate first.")
def ascending_order(gates, budget, lower, upper, threshold=0.0):
    return reassigned(gates, budget, lower, upper, threshold, descending=False)


@wrong("l1ra_reassign", "The first module takes all ranks up to its bound: no round-robin.")
def first_takes_all(gates, budget, lower, upper, threshold=0.0):
    return reassigned(gates, budget, lower, upper, threshold, rounds=False)


@wrong("l1ra_reassign", "Equal smallest gates: the later module comes first.")
def receivers_ties_later(gates, budget, lower, upper, threshold=0.0):
    names = list(gates)
    flipped = {name: gates[name] for name in reversed(names)}
    ranks, keep = reassigned(gates, budget, lower, upper, threshold)
    other, _ = reassigned(flipped, budget, lower, upper, threshold)
    same = sum(map(sum, keep.values())) < budget
    return (other if same else ranks), keep


@wrong("l1ra_reassign", "Receivers are ordered by their mean gate.")
def ordered_by_mean(gates, budget, lower, upper, threshold=0.0):
    mean = lambda c, kept: sum(c) / len(c) if c else -math.inf  # noqa: E731
    return reassigned(gates, budget, lower, upper, threshold, smallest=mean)


@wrong("l1ra_reassign", "The order counts pruned gates: the smallest of all, not of the survivors.")
def smallest_of_all_gates(gates, budget, lower, upper, threshold=0.0):
    smallest = lambda c, kept: min(c, default=-math.inf)  # noqa: E731
    return reassigned(gates, budget, lower, upper, threshold, smallest=smallest)


@wrong("l1ra_reassign", "Modules that lost a rank receive in the same rounds as the others.")
def losers_receive_too(gates, budget, lower, upper, threshold=0.0):
    ranks, keep = reassigned(gates, budget, lower, upper, threshold)
    kept = {n: [c for c, k in zip(gates[n], keep[n], strict=True) if k] for n in gates}
    ranks = {n: max(len(kept[n]), lower[n]) for n in gates}
    names = sorted(gates, key=lambda n: min(kept[n], default=-math.inf), reverse=True)
    while sum(ranks.values()) < budget:
        for n in names:
            ranks[n] += sum(ranks.values()) < budget and ranks[n] < upper[n]
    return ranks, keep


@wrong("l1ra_reassign", "Upper bounds are ignored when ranks are handed out.")
def reassign_without_upper(gates, budget, lower, upper, threshold=0.0):
    return reassigned(gates, budget, lower, dict.fromkeys(gates, budget), threshold)


@wrong("l1ra_reassign", "Lower bounds are ignored: a module can lose all its ranks.")
def reassign_without_lower(gates, budget, lower, upper, threshold=0.0):
    return reassigned(gates, budget, dict.fromkeys(gates, 0), upper, threshold)


@wrong("l1ra_reassign", "Beyond the budget the earlier of equal gates is pruned first.")
def excess_prunes_earlier(gates, budget, lower, upper, threshold=0.0):
    key = lambda c, name, i, order: (c, order)  # noqa: E731
    return reassigned(gates, budget, lower, upper, threshold, excess_key=key)


@wrong("l1ra_reassign", "Beyond the budget the last ranks are pruned, not the smallest gates.")
def excess_prunes_last(gates, budget, lower, upper, threshold=0.0):
    key = lambda c, name, i, order: -order  # noqa: E731
    return reassigned(gates, budget, lower, upper, threshold, excess_key=key)


@wrong("l1ra_reassign", "More survivors than the budget are left as they are.")
def excess_left(gates, budget, lower, upper, threshold=0.0):
    most = sum(max(len(c), lower[n]) for n, c in gates.items())
    _, keep = reassigned(gates, max(budget, most), lower, upper, threshold)
    ranks, _ = reassigned(gates, budget, lower, upper, threshold)
    return {n: max(rank, sum(keep[n])) for n, rank in ranks.items()}, keep


@wrong("l1ra_reassign", "Equal gates of one module: the later ranks stay.")
def later_equal_gates_stay(gates, budget, lower, upper, threshold=0.0):
    stay_key = lambda c, i: (-c[i], -i)  # noqa: E731
    return reassigned(gates, budget, lower, upper, threshold, stay_key=stay_key)


# coalition_masks


def drawn(ranks, coalitions, generator, ps=tuple(k / 10 for k in range(1, 10)), pairs=True):
    rows = []
    for i in range(coalitions // (2 if pairs else 1)):
        mask = torch.rand(sum(ranks), generator=generator) < ps[i % len(ps)]
        rows += [mask, ~mask] if pairs else [mask]
    return torch.stack(rows)


@wrong("coalition_masks", "No complements: coalitions are all drawn.")
def without_complements(ranks, coalitions, generator):
    return drawn(ranks, coalitions, generator, pairs=False)


@wrong("coalition_masks", "p runs over 0, 0.1, … 0.8: some coalitions are empty, none has p = 0.9.")
def p_from_zero(ranks, coalitions, generator):
    return drawn(ranks, coalitions, generator, [k / 10 for k in range(9)])


@wrong("coalition_masks", "p is always one half.")
def p_one_half(ranks, coalitions, generator):
    return drawn(ranks, coalitions, generator, [0.5])


@wrong(
    "coalition_masks",
    "p is 0.5 … 0.9 only, with complements: 0.5 too often; 18,000 rows show it.",
)
def p_from_half(ranks, coalitions, generator):
    return drawn(ranks, coalitions, generator, [k / 10 for k in range(5, 10)])


@wrong("coalition_masks", "All ranks of a module are in or out together.")
def whole_modules(ranks, coalitions, generator):
    modules = drawn([1] * len(ranks), coalitions, generator)
    return modules.repeat_interleave(torch.tensor(ranks), dim=1)


@wrong("coalition_masks", "The same 18 rows again and again: repeats are not drawn anew.")
def rows_repeated(ranks, coalitions, generator):
    return drawn(ranks, 18, generator).repeat(coalitions // 18, 1)


@wrong("coalition_masks", "Every coalition has exactly round(p · Σ r) members: not independent.")
def fixed_size(ranks, coalitions, generator):
    R, rows = sum(ranks), []
    for i in range(coalitions // 2):
        order = torch.rand(R, generator=generator).argsort()
        mask = torch.zeros(R, dtype=torch.bool)
        mask[order[: round((i % 9 + 1) / 10 * R)]] = True
        rows += [mask, ~mask]
    return torch.stack(rows)


@wrong("coalition_masks", "A fixed seed: two generators give the same coalitions.")
def fixed_coalitions(ranks, coalitions, generator):
    return drawn(ranks, coalitions, torch.Generator().manual_seed(42))


@wrong("coalition_masks", "Numbers 0 and 1 instead of bool.")
def float_masks(ranks, coalitions, generator):
    return drawn(ranks, coalitions, generator).float()


@wrong("coalition_masks", "One column for each module instead of each rank.")
def one_column_a_module(ranks, coalitions, generator):
    return drawn([1] * len(ranks), coalitions, generator)


@wrong("coalition_masks", "Twice the rows: complements come on top of `coalitions`.")
def twice_the_rows(ranks, coalitions, generator):
    return drawn(ranks, 2 * coalitions, generator)


@wrong("coalition_masks", "The 'complement' is the mask in reverse order.")
def reversed_complements(ranks, coalitions, generator):
    masks = drawn(ranks, coalitions, generator)
    masks[1::2] = masks[::2].flip(1)
    return masks


# san


@wrong("san", "Sums instead of means over the columns of P and the rows of Q.")
def san_sums(gate, P, Q, grad_gate, grad_P, grad_Q):
    return (gate * grad_gate).abs() + (P * grad_P).abs().sum(0) + (Q * grad_Q).abs().sum(1)


@wrong("san", "The absolute value of the mean instead of the mean of absolute values.")
def san_abs_of_mean(gate, P, Q, grad_gate, grad_P, grad_Q):
    return (gate * grad_gate).abs() + (P * grad_P).mean(0).abs() + (Q * grad_Q).mean(1).abs()


@wrong("san", "The gate's own importance is left out.")
def san_without_gate(gate, P, Q, grad_gate, grad_P, grad_Q):
    return (P * grad_P).abs().mean(0) + (Q * grad_Q).abs().mean(1)


@wrong("san", "The gate's term keeps its sign.")
def san_signed_gate(gate, P, Q, grad_gate, grad_P, grad_Q):
    return gate * grad_gate + (P * grad_P).abs().mean(0) + (Q * grad_Q).abs().mean(1)


@wrong("san", "Sums over P and Q are divided by the rank, not by d_out and d_in.")
def san_over_rank(gate, P, Q, grad_gate, grad_P, grad_Q):
    ipt = (P * grad_P).abs().sum(0) + (Q * grad_Q).abs().sum(1)
    return (gate * grad_gate).abs() + ipt / max(1, len(gate))


@wrong("san", "One mean over the entries of P and Q together; d_out other than d_in shows it.")
def san_one_mean(gate, P, Q, grad_gate, grad_P, grad_Q):
    ipt = torch.cat([(P * grad_P).abs(), (Q * grad_Q).abs().T])
    return (gate * grad_gate).abs() + 2 * ipt.mean(0)


@wrong("san", "The wrong axis of Q where P and Q are square.")
def san_wrong_axis(gate, P, Q, grad_gate, grad_P, grad_Q):
    axis = 0 if Q.shape[0] == Q.shape[1] else 1
    return (gate * grad_gate).abs() + (P * grad_P).abs().mean(0) + (Q * grad_Q).abs().mean(axis)


@wrong("san", "Squares instead of absolute values, as in Taylor pruning.")
def san_squared(gate, P, Q, grad_gate, grad_P, grad_Q):
    squares = (P * grad_P).square().mean(0) + (Q * grad_Q).square().mean(1)
    return (gate * grad_gate).square() + squares


@wrong("san", "Gradients alone, without the weights.")
def san_gradients_alone(gate, P, Q, grad_gate, grad_P, grad_Q):
    return grad_gate.abs() + grad_P.abs().mean(0) + grad_Q.abs().mean(1)


# shapley_sensitivity

NAMES = ("gate", "P", "Q")


def in_coalition(params, mask):
    """Copies with the gates outside the coalition at zero."""
    parts = mask.split([len(own["gate"]) for own in params.values()])
    S = {n: {k: w.detach().clone() for k, w in own.items()} for n, own in params.items()}
    for own, inside in zip(S.values(), parts, strict=True):
        own["gate"][~inside] = 0
    return S


def scores_in(loss, S, batches, score=reference.san, alike=False):
    """SAN of every rank with the parameters S, from the gradient of the mean loss."""
    w = [own[key].requires_grad_() for own in S.values() for key in NAMES]
    sizes = [1 if alike else size_of(batch) for batch in batches]
    L = sum(n * loss(S, batch) for n, batch in zip(sizes, batches, strict=True)) / sum(sizes)
    g = slope(L, w)
    own = lambda xs, i: [x.detach() for x in xs[3 * i : 3 * i + 3]]  # noqa: E731
    return {name: score(*own(w, i), *own(g, i)) for i, name in enumerate(S)}


def averaged(loss, params, batches, masks, **options):
    batches = list(batches)
    each = [scores_in(loss, in_coalition(params, mask), batches, **options) for mask in masks]
    return {name: torch.stack([one[name] for one in each]).mean(0) for name in params}


@wrong("shapley_sensitivity", "A mean of the batches' losses; batches of unequal size show it.")
def shapley_batches_alike(loss, params, batches, masks):
    return averaged(loss, params, batches, masks, alike=True)


@wrong(
    "shapley_sensitivity",
    "Absolute values for each batch, averaged after that; two batches show it.",
)
def absolute_values_of_batches(loss, params, batches, masks):
    batches = list(batches)
    total = sum(map(size_of, batches))
    each = [averaged(loss, params, [batch], masks) for batch in batches]
    weights = [size_of(batch) / total for batch in batches]
    return {n: sum(w * one[n] for w, one in zip(weights, each, strict=True)) for n in params}


@wrong(
    "shapley_sensitivity", "The mean over the coalitions that a rank is in, not over all of them."
)
def mean_over_own_coalitions(loss, params, batches, masks):
    ranks = [len(own["gate"]) for own in params.values()]
    often = masks.double().mean(0).clamp(min=1e-12).split(ranks)
    scores = averaged(loss, params, batches, masks)
    return {n: s / share.to(s) for (n, s), share in zip(scores.items(), often, strict=True)}


@wrong("shapley_sensitivity", "The sum over coalitions instead of their mean.")
def sum_over_coalitions(loss, params, batches, masks):
    return {n: s * len(masks) for n, s in averaged(loss, params, batches, masks).items()}


@wrong("shapley_sensitivity", "Gates stay on in the forward pass; the mask only selects scores.")
def masks_select_scores(loss, params, batches, masks):
    everyone = torch.ones_like(masks[:1])
    scores = averaged(loss, params, batches, everyone)
    often = masks.double().mean(0).split([len(own["gate"]) for own in params.values()])
    return {n: s * share.to(s) for (n, s), share in zip(scores.items(), often, strict=True)}


@wrong("shapley_sensitivity", "Plain sensitivity: one pass with all ranks, no coalitions.")
def no_coalitions(loss, params, batches, masks):
    return averaged(loss, params, batches, torch.ones_like(masks[:1]))


@wrong("shapley_sensitivity", "The masks' complements: ranks in the coalition are switched off.")
def masks_inverted(loss, params, batches, masks):
    return averaged(loss, params, batches, ~masks)


@wrong(
    "shapley_sensitivity",
    "Eq 8 takes the unmasked gate: ranks outside score, by their gate's gradient.",
)
def unmasked_gate_in_ipt(loss, params, batches, masks):
    batches, sums = list(batches), dict.fromkeys(params, 0.0)
    for mask in masks:
        S = in_coalition(params, mask)
        gates = iter([own["gate"].detach() for own in params.values()])
        score = lambda gate, *rest, gates=gates: reference.san(next(gates), *rest)  # noqa: E731
        for name, s in scores_in(loss, S, batches, score).items():
            sums[name] = sums[name] + s / len(masks)
    return sums


@wrong("shapley_sensitivity", "Only the last batch counts.")
def shapley_of_last_batch(loss, params, batches, masks):
    return averaged(loss, params, list(batches)[-1:], masks)


@wrong(
    "shapley_sensitivity", "Columns of the masks are split evenly; modules of unequal rank show it."
)
def masks_split_evenly(loss, params, batches, masks):
    names, columns = list(params), list(range(masks.shape[1]))
    sizes = [len(own["gate"]) for own in params.values()]
    turn = [columns[i :: len(names)] for i in range(len(names))]
    order = [c for own in turn for c in own][: sum(sizes)]
    return averaged(loss, params, batches, masks[:, order])


@wrong("shapley_sensitivity", "The given gates are set to zero in place, and stay so.")
def gates_left_at_zero(loss, params, batches, masks):
    result = averaged(loss, params, batches, masks)
    for own, S in zip(params.values(), in_coalition(params, masks[-1]).values(), strict=True):
        own["gate"].data.copy_(S["gate"])
    return result


@wrong("shapley_sensitivity", "The given tensors are left requiring gradients.")
def params_left_requiring_gradients(loss, params, batches, masks):
    result = averaged(loss, params, batches, masks)
    for w in [w for own in params.values() for w in own.values()]:
        w.requires_grad_(not w.requires_grad)
    return result


@wrong(
    "shapley_sensitivity",
    "Signed products are averaged over coalitions, absolute values come last.",
)
def absolute_value_last(loss, params, batches, masks):
    def signed(gate, P, Q, grad_gate, grad_P, grad_Q):
        return gate * grad_gate + (P * grad_P).mean(0) + (Q * grad_Q).mean(1)

    return {n: s.abs() for n, s in averaged(loss, params, batches, masks, score=signed).items()}


# exact_shapley_values


def weighted_marginals(value, n, weight):
    """Σ over S without i of weight(|S|, n) · (v(S ∪ {i}) − v(S))."""
    phi = torch.zeros(n, dtype=torch.float64)
    for row in itertools.product([False, True], repeat=n):
        for i in [i for i in range(n) if not row[i]]:
            S = torch.tensor(row, dtype=torch.bool)
            joined = S.clone()
            joined[i] = True
            phi[i] += weight(sum(row), n) * (float(value(joined)) - float(value(S)))
    return phi


def shapley_weight(s, n):
    return math.factorial(s) * math.factorial(n - s - 1) / math.factorial(n)


@wrong("exact_shapley_values", "All coalitions count alike: Banzhaf values; n = 3 shows it.")
def banzhaf(value, n):
    return weighted_marginals(value, n, lambda s, n: 0.5 ** (n - 1))


@wrong("exact_shapley_values", "Weights |S|! (n − |S|)! / n!: the minus one is missing.")
def weights_off_by_one(value, n):
    return weighted_marginals(value, n, lambda s, n: shapley_weight(s, n) * (n - s))


@wrong("exact_shapley_values", "What the grand coalition loses without a player: leave one out.")
def leave_one_out(value, n):
    return weighted_marginals(value, n, lambda s, n: float(s == n - 1))


@wrong("exact_shapley_values", "What a player is worth alone.")
def worth_alone(value, n):
    return weighted_marginals(value, n, lambda s, n: float(s == 0))


@wrong("exact_shapley_values", "The empty coalition is taken to be worth nothing.")
def empty_worth_nothing(value, n):
    return weighted_marginals(lambda S: value(S) if S.any() else 0.0, n, shapley_weight)


@wrong("exact_shapley_values", "Shares of the total: divided by their sum.")
def shapley_shares(value, n):
    phi = weighted_marginals(value, n, shapley_weight)
    return phi / phi.sum()


@wrong("exact_shapley_values", "Players in reverse order, from counting in bits.")
def players_reversed(value, n):
    return weighted_marginals(value, n, shapley_weight).flip(0)


@wrong("exact_shapley_values", "50 random orders instead of all n!; n = 5 shows it.")
def sampled_orders(value, n):
    phi, draws = torch.zeros(n, dtype=torch.float64), random.Random(0)
    for _ in range(50):
        S = torch.zeros(n, dtype=torch.bool)
        for i in draws.sample(range(n), n):
            before = float(value(S.clone()))
            S[i] = True
            phi[i] += (float(value(S.clone())) - before) / 50
    return phi


@wrong("exact_shapley_values", "Values are taken for whole numbers.")
def values_rounded(value, n):
    return weighted_marginals(lambda S: int(value(S)), n, shapley_weight)


@wrong("exact_shapley_values", "Only coalitions up to half of the players are looked at.")
def small_coalitions(value, n):
    return weighted_marginals(value, n, lambda s, n: shapley_weight(s, n) * (2 * s < n))


# Layer


class MergeableLayer:
    """The right layer, with exchangeable parts, for the wrong ones below."""

    def __init__(self, W, b, A, B, scaling, gate=None, transposed=False):
        self.weight, self.bias, self.transposed = W.clone(), b, transposed
        self.adapter, self.original = (A, B, scaling, gate), None

    def update(self):
        update = delta(*self.adapter)
        return update.T if self.transposed else update

    def __call__(self, x):
        W = self.weight.T if self.transposed else self.weight
        if self.original is None:
            return reference.lora_forward(x, W, self.bias, *self.adapter)
        return plus(x @ W.T, self.bias)

    def merge(self):
        if self.original is None:
            self.original = self.weight
            self.weight = (self.weight.to(self.update().dtype) + self.update()).to(
                self.weight.dtype
            )

    def unmerge(self):
        if self.original is not None:
            self.weight, self.original = self.original, None


@wrong("Layer", "Merging twice adds the update twice.")
class MergesTwice(MergeableLayer):
    def merge(self):
        self.original = self.weight if self.original is None else self.original
        self.weight = (self.weight + self.update()).to(self.weight.dtype)


@wrong("Layer", "Unmerging subtracts the update, so W is not restored bit for bit.")
class UnmergesBySubtraction(MergeableLayer):
    def unmerge(self):
        if self.original is not None:
            self.weight, self.original = (self.weight - self.update()).to(self.weight.dtype), None


@wrong("Layer", "Unmerging twice takes the update off twice.")
class UnmergesTwice(MergeableLayer):
    def unmerge(self):
        if self.original is None:
            self.weight = (self.weight - self.update()).to(self.weight.dtype)
        super().unmerge()


@wrong("Layer", "Unmerging a layer that is not merged raises.")
class UnmergeRaises(MergeableLayer):
    def unmerge(self):
        if self.original is None:
            raise RuntimeError("not merged")
        super().unmerge()


@wrong("Layer", "The merged layer still adds the adapter's output in its forward pass.")
class AddsAdapterAfterMerge(MergeableLayer):
    def __call__(self, x):
        W = self.weight.T if self.transposed else self.weight
        return reference.lora_forward(x, W, self.bias, *self.adapter)


@wrong("Layer", "After unmerging it forgets the adapter: the base layer's output.")
class ForgetsAdapter(MergeableLayer):
    def unmerge(self):
        if self.original is not None:
            A, B, _, gate = self.adapter
            self.adapter = (A, B, 0.0, gate)
        super().unmerge()


@wrong("Layer", "A square transposed weight gets the update untransposed when merged.")
class MergesUntransposed(MergeableLayer):
    def update(self):
        update = delta(*self.adapter)
        square = update.shape[0] == update.shape[1]
        return update.T if self.transposed and not square else update


@wrong("Layer", "layer.weight is (d_out, d_in) even if W was given as (d_in, d_out).")
class StoresUntransposed(MergeableLayer):
    def __init__(self, W, b, A, B, scaling, gate=None, transposed=False):
        super().__init__(W.T if transposed else W, b, A, B, scaling, gate)


@wrong("Layer", "The gate is left out of the merged weight.")
class MergesWithoutGate(MergeableLayer):
    def update(self):
        A, B, scaling, _ = self.adapter
        return (scaling * B @ A).T if self.transposed else scaling * B @ A


@wrong("Layer", "The given tensor W is changed in place by merging.")
class MergesInPlace(MergeableLayer):
    def __init__(self, W, b, A, B, scaling, gate=None, transposed=False):
        super().__init__(W, b, A, B, scaling, gate, transposed)
        self.weight = W

    def merge(self):
        if self.original is None:
            self.original = self.weight.clone()
            self.weight.data += self.update().to(self.weight.dtype)

    def unmerge(self):
        if self.original is not None:
            self.weight.data.copy_(self.original)
            self.original = None


@wrong("Layer", "A merged weight in bfloat16 is left in the adapter's float32.")
class WidensWeight(MergeableLayer):
    def merge(self):
        if self.original is None:
            self.original, self.weight = self.weight, self.weight + self.update()


@wrong("Layer", "It can merge once only: after unmerging, merge() does nothing.")
class MergesOnlyOnce(MergeableLayer):
    def merge(self):
        if not hasattr(self, "done"):
            super().merge()
        self.done = True


@wrong("Layer", "The merged layer forgets its bias.")
class MergedWithoutBias(MergeableLayer):
    def merge(self):
        self.own_bias = self.bias if self.original is None else self.own_bias
        self.bias = None
        super().merge()

    def unmerge(self):
        self.bias = self.own_bias if self.original is not None else self.bias
        super().unmerge()


@wrong(
    "Layer",
    "Only the first half of the ranks is merged.",
)
class MergesHalfTheRanks(MergeableLayer):
    def update(self):
        A, B, scaling, gate = self.adapter
        r = (len(A) + 1) // 2
        update = delta(A[:r], B[:, :r], scaling, None if gate is None else gate[:r])
        return update.T if self.transposed else update


# round_trip


def through_pickle(layers, path, change):
    """Every layer as `change` leaves it, through one file."""
    with open(path, "wb") as file:
        pickle.dump({name: change(dict(layer)) for name, layer in layers.items()}, file)
    with open(path, "rb") as file:
        return pickle.load(file)


def tensors_changed(layer, change):
    same = lambda x: change(x) if isinstance(x, torch.Tensor) else x  # noqa: E731
    return {key: same(value) for key, value in layer.items()}


@wrong("round_trip", "All tensors come back in float32; bfloat16 and float64 show it.")
def comes_back_float32(layers, path):
    return through_pickle(layers, path, lambda layer: tensors_changed(layer, torch.Tensor.float))


@wrong("round_trip", "Tensors are stored in float16 and lose digits.")
def stored_in_half(layers, path):
    half = lambda x: x.half().to(x.dtype)  # noqa: E731
    return through_pickle(layers, path, lambda layer: tensors_changed(layer, half))


@wrong("round_trip", "A gate of None comes back as ones.")
def none_gate_comes_back_ones(layers, path):
    def change(layer):
        gate = layer["A"].new_ones(len(layer["A"])) if layer["gate"] is None else layer["gate"]
        return {**layer, "gate": gate}

    return through_pickle(layers, path, change)


@wrong("round_trip", "A gate of ones comes back as None.")
def ones_come_back_none(layers, path):
    def change(layer):
        gate = layer["gate"]
        return {**layer, "gate": None if gate is None or bool((gate == 1).all()) else gate}

    return through_pickle(layers, path, change)


@wrong("round_trip", "The entry of a gate of None is missing.")
def none_gate_goes_missing(layers, path):
    present = lambda layer: {k: v for k, v in layer.items() if v is not None}  # noqa: E731
    return through_pickle(layers, path, present)


@wrong("round_trip", "Layers of rank 0 are left out.")
def rank_zero_left_out(layers, path):
    some = {name: layer for name, layer in layers.items() if len(layer["A"])}
    return through_pickle(some, path, dict)


@wrong("round_trip", "The scaling is rounded to float32; 1/3 shows it.")
def scaling_in_float32(layers, path):
    change = lambda layer: {**layer, "scaling": float(np.float32(layer["scaling"]))}  # noqa: E731
    return through_pickle(layers, path, change)


@wrong("round_trip", "A whole alpha is stored, and the scaling is alpha over the rank again.")
def scaling_through_whole_alpha(layers, path):
    def change(layer):
        r = max(1, len(layer["A"]))
        return {**layer, "scaling": round(layer["scaling"] * r) / r}

    return through_pickle(layers, path, change)


@wrong("round_trip", "Dots in names come back as underscores.")
def dots_in_names(layers, path):
    return through_pickle({n.replace(".", "_"): own for n, own in layers.items()}, path, dict)


@wrong("round_trip", "Names are split at dots, and only the last two parts come back.")
def last_parts_of_names(layers, path):
    short = {".".join(name.split(".")[-2:]): own for name, own in layers.items()}
    return through_pickle(short, path, dict)


@wrong("round_trip", "Numbers are written with 6 digits of text.")
def six_digits(layers, path):
    def text(x):
        return x if x is None else [x.tolist(), list(x.shape), str(x.dtype)[6:]]

    def tensor(entry):
        if entry is None:
            return None
        values = torch.tensor(entry[0], dtype=getattr(torch, entry[2])).reshape(entry[1])
        return torch.tensor([float(f"{v:.6g}") for v in values.flatten()]).to(values).view(entry[1])

    data = {
        n: {k: text(v) if k != "scaling" else v for k, v in o.items()} for n, o in layers.items()
    }
    with open(path, "w") as file:
        json.dump(data, file)
    with open(path) as file:
        data = json.load(file)
    return {
        n: {k: tensor(v) if k != "scaling" else v for k, v in o.items()} for n, o in data.items()
    }


@wrong(
    "round_trip", "Bytes are written in memory order and read row by row; a transposed A shows it."
)
def memory_order(layers, path):
    def raw(x):
        strides = [math.prod(x.shape[i + 1 :]) for i in range(x.dim())]
        return torch.as_strided(x.detach(), x.shape, strides).clone()

    return through_pickle(layers, path, lambda layer: tensors_changed(layer, raw))


@wrong("round_trip", "Gates are folded into B, and come back as None.")
def gates_folded(layers, path):
    def change(layer):
        gate = layer["gate"]
        B = layer["B"] if gate is None else (layer["B"] * gate).to(layer["B"].dtype)
        return {**layer, "B": B, "gate": None}

    return through_pickle(layers, path, change)


# peft_export


def exported(
    layers,
    *,
    alpha=lambda layer, r: layer["scaling"] * r,
    key=lambda name: f"^{re.escape(name)}",
    B_of=lambda layer: layer["B"] if layer["gate"] is None else layer["B"] * layer["gate"],
    A_of=lambda layer: layer["A"],
    zero=False,
    prefix=PREFIX,
    **changes,
):
    ranks = {n: len(own["A"]) for n, own in layers.items() if zero or len(own["A"])}
    alphas = {name: alpha(layers[name], r) for name, r in ranks.items()}
    tensors = {}
    for name in ranks:
        tensors[f"{prefix}{name}.lora_A.weight"] = A_of(layers[name])
        tensors[f"{prefix}{name}.lora_B.weight"] = B_of(layers[name])
    config = {
        "peft_type": "LORA",
        "r": max(ranks.values(), default=1),
        "lora_alpha": max(alphas.values(), default=1.0),
        "target_modules": "(" + "|".join(map(re.escape, ranks)) + ")",
        "rank_pattern": {key(name): rank for name, rank in ranks.items()},
        "alpha_pattern": {key(name): value for name, value in alphas.items()},
        "use_rslora": False,
        "fan_in_fan_out": False,
        "lora_dropout": 0.0,
        "bias": "none",
    }
    return tensors, {**config, **changes}


@wrong("peft_export", "Gates are lost: B is written as it is.")
def export_without_gates(layers):
    return exported(layers, B_of=lambda layer: layer["B"])


@wrong("peft_export", "Gates are folded into A and into B.")
def export_gates_twice(layers):
    def A_of(layer):
        return layer["A"] if layer["gate"] is None else layer["gate"][:, None] * layer["A"]

    return exported(layers, A_of=A_of)


@wrong("peft_export", "alpha is the scaling itself; PEFT divides it by the rank.")
def export_scaling_as_alpha(layers):
    return exported(layers, alpha=lambda layer, r: layer["scaling"])


@wrong("peft_export", "alpha is a whole number; a scaling of 1/3 shows it.")
def export_whole_alphas(layers):
    return exported(layers, alpha=lambda layer, r: int(layer["scaling"] * r))


@wrong("peft_export", "One lora_alpha for all layers, no alpha_pattern; mixed ranks show it.")
def export_without_alpha_pattern(layers):
    return exported(layers, alpha_pattern={})


@wrong("peft_export", "No rank_pattern: all layers get the largest rank.")
def export_without_rank_pattern(layers):
    return exported(layers, rank_pattern={})


@wrong("peft_export", "Pattern keys are the last parts of names: names of equal ends collide.")
def export_keys_of_last_parts(layers):
    return exported(layers, key=lambda name: re.escape(name.split(".")[-1]))


@wrong("peft_export", "Pattern keys are not anchored: 'fc' also holds for 'enc.fc' behind it.")
def export_keys_without_anchor(layers):
    return exported(layers, key=re.escape)


@wrong("peft_export", "Pattern keys are not escaped: 'w[0]' or 'a+b' does not match itself.")
def export_keys_not_escaped(layers):
    return exported(layers, key=lambda name: f"^{name}")


@wrong("peft_export", "Layers of rank 0 are written too, which PEFT refuses.")
def export_rank_zero(layers):
    return exported(layers, zero=True)


@wrong("peft_export", "use_rslora is set, but alpha is scaling · r.")
def export_rslora(layers):
    return exported(layers, use_rslora=True)


@wrong("peft_export", "The prefix of PEFT's tensor names is missing.")
def export_without_prefix(layers):
    return exported(layers, prefix="")


@wrong("peft_export", "A and B are written transposed, as in a layout (d_in, r) and (r, d_out).")
def export_transposed(layers):
    return exported(
        layers,
        A_of=lambda layer: layer["A"].T.contiguous(),
        B_of=lambda layer: exported({"x": layer}, zero=True)[0][f"{PREFIX}x.lora_B.weight"].T,
    )


@wrong("peft_export", "target_modules lists last parts: 'fc' also wraps layers without an adapter.")
def export_targets_as_endings(layers):
    names = sorted({n.split(".")[-1] for n, own in layers.items() if len(own["A"])})
    return exported(layers, target_modules=names)


@wrong("peft_export", "target_modules names the layers of rank 0 as well.")
def export_targets_rank_zero(layers):
    return exported(layers, target_modules="(" + "|".join(map(re.escape, layers)) + ")")


@wrong("peft_export", "The scaling is folded into B, and alpha counts it again.")
def export_scaling_twice(layers):
    return exported(layers, B_of=lambda own: plain_B(own) * own["scaling"])


def plain_B(layer):
    return layer["B"] if layer["gate"] is None else layer["B"] * layer["gate"]


@wrong("peft_export", "B of the given layers is multiplied by the gates in place.")
def export_in_place(layers):
    for layer in layers.values():
        if layer["gate"] is not None:
            layer["B"].data *= layer["gate"].data
    return exported(layers, B_of=lambda layer: layer["B"])


# peft_delta_weight


def loaded(
    tensors, config, name, *, find=None, use=("rank", "alpha"), missing=None, transpose=True
):
    """ΔW with another way to look up patterns, or with some of them ignored."""
    A = tensors.get(f"{PREFIX}{name}.lora_A.weight")
    if A is None:
        return missing
    B = tensors[f"{PREFIX}{name}.lora_B.weight"]
    find = find or reference.peft_format.of_layer
    rank, alpha = config.get("r", 8), config.get("lora_alpha", 8)
    rank = find(config.get("rank_pattern"), name, rank) if "rank" in use else rank
    alpha = find(config.get("alpha_pattern"), name, alpha) if "alpha" in use else alpha
    rs = config.get("use_rslora") and "plain" not in use
    delta = alpha / (math.sqrt(rank) if rs else rank) * B @ A
    return delta.T if transpose and config.get("fan_in_fan_out") else delta


@wrong("peft_delta_weight", "alpha_pattern is ignored, as in vLLM.")
def load_without_alpha_pattern(tensors, config, name):
    return loaded(tensors, config, name, use=("rank",))


@wrong("peft_delta_weight", "rank_pattern is ignored: every layer is divided by r.")
def load_without_rank_pattern(tensors, config, name):
    return loaded(tensors, config, name, use=("alpha",))


@wrong("peft_delta_weight", "use_rslora is ignored.")
def load_without_rslora(tensors, config, name):
    return loaded(tensors, config, name, use=("rank", "alpha", "plain"))


@wrong("peft_delta_weight", "fan_in_fan_out is ignored.")
def load_without_transposing(tensors, config, name):
    return loaded(tensors, config, name, transpose=False)


@wrong("peft_delta_weight", "Of several keys that match the last one counts.")
def load_last_match(tensors, config, name):
    def find(pattern, name, default):
        return reference.peft_format.of_layer(
            dict(reversed((pattern or {}).items())), name, default
        )

    return loaded(tensors, config, name, find=find)


@wrong("peft_delta_weight", "Keys match anywhere in the name: 'h.1' holds for 'h.10'.")
def load_search(tensors, config, name):
    def find(pattern, name, default):
        return next((v for k, v in (pattern or {}).items() if re.search(k, name)), default)

    return loaded(tensors, config, name, find=find)


@wrong("peft_delta_weight", "Keys are taken for names, not for regular expressions.")
def load_exact_names(tensors, config, name):
    return loaded(tensors, config, name, find=lambda p, name, default: (p or {}).get(name, default))


@wrong("peft_delta_weight", "Keys are compared with the end of the name as plain text.")
def load_ends_with(tensors, config, name):
    def find(pattern, name, default):
        return next((v for k, v in (pattern or {}).items() if name.endswith(k)), default)

    return loaded(tensors, config, name, find=find)


@wrong("peft_delta_weight", "Keys must match the whole name, not its end behind a dot.")
def load_full_match(tensors, config, name):
    def find(pattern, name, default):
        return next((v for k, v in (pattern or {}).items() if re.fullmatch(k, name)), default)

    return loaded(tensors, config, name, find=find)


@wrong("peft_delta_weight", "A key may match in the middle of a part: 'fc' holds for 'enc.xfc'.")
def load_any_ending(tensors, config, name):
    def find(pattern, name, default):
        return next((v for k, v in (pattern or {}).items() if re.search(f"({k})$", name)), default)

    return loaded(tensors, config, name, find=find)


@wrong("peft_delta_weight", "A layer without an adapter gets zeros instead of None.")
def load_zeros(tensors, config, name):
    return loaded(tensors, config, name, missing=torch.zeros(1))


@wrong("peft_delta_weight", "A config without patterns raises.")
def load_needs_patterns(tensors, config, name):
    _ = config["rank_pattern"].items(), config["alpha_pattern"].items()
    return loaded(tensors, config, name)


@wrong(
    "peft_delta_weight",
    "A layer with a rank of its own and no alpha keeps the scaling lora_alpha / r.",
)
def load_common_scaling(tensors, config, name):
    alpha = reference.peft_format.of_layer(config.get("alpha_pattern"), name, None)
    use = ("alpha",) if alpha is None else ("rank", "alpha")
    return loaded(tensors, config, name, use=use)


@wrong("peft_delta_weight", "The scaling is a whole-number division.")
def load_whole_scaling(tensors, config, name):
    result = loaded(tensors, {**config, "use_rslora": False}, name)
    if result is None or config.get("use_rslora"):
        return loaded(tensors, config, name)
    alpha = reference.peft_format.of_layer(
        config.get("alpha_pattern"), name, config.get("lora_alpha", 8)
    )
    rank = len(tensors[f"{PREFIX}{name}.lora_A.weight"])
    return result * (alpha // rank) / (alpha / rank)
