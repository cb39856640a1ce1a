"""Right implementations that differ harmlessly from the reference: none may raise an alarm.

The note says in what each differs.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import re
import zipfile
from fractions import Fraction

import numpy as np
import torch
from torch import nn
from torch.func import functional_call

from . import Implementation, recorder
from .common import (
    MOMENTS,
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

RIGHT: list[Implementation] = []
right = recorder(RIGHT)
PREFIX = "base_model.model."


# lora_forward


@right("lora_forward", "einsum over all leading dimensions, the gate folded into A.")
def forward_einsum(x, W, b, A, B, scaling, gate=None):
    down = A if gate is None else gate[:, None] * A
    y = torch.einsum("...i,oi->...o", x, W)
    h = torch.einsum("...i,ri->...r", x.to(A.dtype), down)
    y = y + torch.einsum("...r,or->...o", h, scaling * B).to(x.dtype)
    return y if b is None else y + b


@right("lora_forward", "Rows in chunks of 3, and an optional argument more.")
def forward_in_chunks(x, W, b, A, B, scaling, gate=None, *, chunk=3):
    up = scaling * (B if gate is None else B * gate)
    rows = x.reshape(-1, x.shape[-1])
    parts = [
        nn.functional.linear(part, W, b) + ((part.to(A.dtype) @ A.T) @ up.T).to(x.dtype)
        for part in rows.split(chunk)
    ]
    return torch.cat(parts).reshape(*x.shape[:-1], len(W))


@right("lora_forward", "The sum over ranks one rank at a time, added to the bias first.")
def forward_rank_by_rank(x, W, b, A, B, scaling, gate=None):
    y = nn.functional.linear(x, W, b)
    update = x.new_zeros(*x.shape[:-1], len(B), dtype=A.dtype)
    for i in range(len(A)):
        h = (x.to(A.dtype) * A[i]).sum(-1, keepdim=True)
        update = update + (h if gate is None else h * gate[i]) * B[:, i]
    return y + (scaling * update).to(x.dtype)


class Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, A, B, gate, scaling):
        h = x @ A.T
        ctx.save_for_backward(x, A, B, gate, h)
        ctx.scaling = scaling
        return scaling * ((h * gate) @ B.T)

    @staticmethod
    def backward(ctx, dy):
        x, A, B, gate, h = ctx.saved_tensors
        dh = ctx.scaling * (dy @ B)
        flat = lambda t: t.reshape(math.prod(t.shape[:-1]), t.shape[-1])  # noqa: E731
        dB = ctx.scaling * flat(dy).T @ flat(h * gate)
        return (dh * gate) @ A, flat(dh * gate).T @ flat(x), dB, flat(dh * h).sum(0), None


@right("lora_forward", "A backward pass by hand, in one autograd function.")
def forward_fused(x, W, b, A, B, scaling, gate=None):
    gate = A.new_ones(len(A)) if gate is None else gate
    y = x @ W.T + Fused.apply(x.to(A.dtype), A, B, gate.to(A.dtype), scaling).to(x.dtype)
    return y if b is None else y + b


# merged_weight


@right("merged_weight", "All in float64, ranks summed one by one from the last.")
def merge_outer_products(W, A, B, scaling, gate=None):
    total = W.double().clone()
    for i in reversed(range(len(A))):
        factor = scaling if gate is None else scaling * gate[i].double()
        total += factor * torch.outer(B[:, i].double(), A[i].double())
    return total.to(W.dtype)


@right("merged_weight", "baddbmm in the wider dtype, the gate folded into A.")
def merge_addmm(W, A, B, scaling, gate=None):
    wide = torch.float64 if torch.float64 in (W.dtype, A.dtype) else torch.float32
    down = A.to(wide) if gate is None else gate.to(wide)[:, None] * A.to(wide)
    return torch.addmm(W.to(wide), B.to(wide), down, alpha=scaling).to(W.dtype)


# resize


@right("resize", "New ranks stand before the survivors, in all tensors alike.")
def new_ranks_first(layer, keep, add):
    A, B, gate = fresh(layer, add)
    rolled = torch.arange(int(keep.sum()) + add).roll(add)

    def ordered(own):
        return {"A": own["A"][rolled], "B": own["B"][:, rolled], "gate": own["gate"][rolled]}

    moments = {key: ordered(regrown(layer[key], keep, add)) for key in MOMENTS}
    return {**layer, **ordered(regrown(layer, keep, add, A, B, gate)), **moments}


@right("resize", "Survivors in reverse order; keys of the result in another order.")
def survivors_reversed(layer, keep, add):
    kept = keep.nonzero().flatten().flip(0)
    A, B, gate = fresh(layer, add)
    new = {key: regrown(layer[key], kept, add) for key in MOMENTS}
    new |= {"step": layer["step"], "scaling": layer["scaling"]}
    return new | regrown(layer, kept, add, A, B, gate)


@right("resize", "New rows of A are normal numbers of another size.")
def new_A_normal(layer, keep, add):
    A, B, gate = fresh(layer, add)
    new = {**layer, **regrown(layer, keep, add, A / 7, B, gate)}
    return new | {key: regrown(layer[key], keep, add) for key in MOMENTS}


# input_second_moment


@right("input_second_moment", "A running mean in float32 or better, updated call by call.")
def moment_running(model, loss_fn, batches, targets):
    model, seen, mean = eval_copy(model), dict.fromkeys(targets, 0), {}
    mask = None

    def hook(name):
        def observe(module, inputs):
            x = inputs[0].detach()
            if mask is not None and x.shape[:-1] == mask.shape:
                x = x[mask.bool()]
            x = x.reshape(-1, x.shape[-1]).to(torch.promote_types(x.dtype, torch.float32))
            if len(x):
                seen[name] += len(x)
                old = mean.get(name, torch.zeros_like(x[0]))
                mean[name] = old + (x.square() - old).sum(0) / seen[name]

        return observe

    for name in targets:
        model.get_submodule(name).register_forward_pre_hook(hook(name))
    for batch in batches:
        mask = batch.get("attention_mask") if isinstance(batch, dict) else None
        loss_fn(model, batch)
    return {name: mean[name] for name in reversed(targets)}


@right("input_second_moment", "On the model itself: hooks removed, every module's mode restored.")
def moment_without_copy(model, loss_fn, batches, targets):
    modes, mask = [(m, m.training) for m in model.modules()], []
    sums, counts = dict.fromkeys(targets, 0.0), dict.fromkeys(targets, 0)

    def hook(name):
        def observe(module, inputs):
            x = inputs[0].double()
            masked = bool(mask) and x.shape[:-1] == mask[0].shape
            real = mask[0] != 0 if masked else torch.ones(x.shape[:-1], dtype=torch.bool)
            x = torch.where(real[..., None], x, 0.0).reshape(-1, x.shape[-1])
            sums[name] = sums[name] + torch.einsum("ti,ti->i", x, x)
            counts[name] += int(real.sum())

        return observe

    handles = [model.get_submodule(n).register_forward_pre_hook(hook(n)) for n in targets]
    model.eval()
    with torch.no_grad():
        for batch in batches:
            has = isinstance(batch, dict) and "attention_mask" in batch
            mask[:] = [batch["attention_mask"]] if has else []
            loss_fn(model, batch)
    for handle in handles:
        handle.remove()
    for module, mode in modes:
        module.training = mode
    return {name: sums[name] / counts[name] for name in targets}


# hessian_diagonal


class Loss(nn.Module):
    """The loss as a module, so that functional_call can exchange the model's weights."""

    def __init__(self, model, loss_fn):
        super().__init__()
        self.model, self.loss_fn = model, loss_fn

    def forward(self, batch):
        return twice(self.loss_fn, self.model, batch)


@right("hessian_diagonal", "torch.func's Hessian of each layer, and its diagonal.")
def hessian_functional(model, loss_fn, batches, targets):
    model, batches, result = eval_copy(model), list(batches), {}
    whole, n = Loss(model, loss_fn), sum(map(size_of, batches))
    for name, W in weights_in(model, targets).items():

        def loss(flat, key=f"model.{name}.weight", shape=W.shape):
            changed = {key: flat.view(shape)}
            each = [size_of(b) * functional_call(whole, changed, (b,)) for b in batches]
            return sum(each) / n

        H = torch.func.jacrev(torch.func.jacrev(loss))(W.detach().flatten())
        result[name] = H.diagonal().view_as(W)
    return result


@right("hessian_diagonal", "Hessian-vector products with unit vectors, batch by batch.")
def hessian_by_columns(model, loss_fn, batches, targets):
    model, n = eval_copy(model), 0
    sums = {name: torch.zeros_like(W) for name, W in weights_in(model, targets).items()}
    for batch in batches:
        loss = twice(loss_fn, model, batch)
        for name, W in weights_in(model, targets).items():
            (g,) = slope(loss, [W], again=True)
            for k in np.ndindex(*W.shape):
                unit = torch.zeros_like(W)
                unit[k] = 1
                sums[name][k] += size_of(batch) * slope((g * unit).sum(), [W])[0][k]
        n += size_of(batch)
    return {name: h / n for name, h in sums.items()}


@right("hessian_diagonal", "A sum over samples, each a batch of its own.")
def hessian_by_samples(model, loss_fn, batches, targets):
    model = eval_copy(model)
    samples = [sample for batch in batches for sample in samples_of(batch)]
    sums = dict.fromkeys(targets, 0.0)
    for sample in samples:
        loss = twice(loss_fn, model, sample)
        for name, W in weights_in(model, targets).items():
            (g,) = slope(loss, [W], again=True)
            sums[name] = sums[name] + jacobian(g, W).diagonal().view_as(W)
    return {name: h / len(samples) for name, h in sums.items()}


# gauss_newton_diagonal


@right("gauss_newton_diagonal", "Squares of J's product with a root of H_y from its eigenvectors.")
def gauss_newton_by_root(model, loss_fn, batches, targets):
    model, n = eval_copy(model), 0
    sums = dict.fromkeys(targets, 0.0)
    for batch in batches:
        y, loss_of = output_of(model, loss_fn, batch)
        alone = y.detach().requires_grad_()
        H = jacobian(slope(loss_of(alone), [alone], again=True)[0], alone)
        values, vectors = torch.linalg.eigh((H + H.T) / 2)
        roots = (vectors * values.clamp(min=0).sqrt()).T
        for name, W in weights_in(model, targets).items():
            for root in roots:
                (g,) = slope(y, [W]) if y.dim() == 0 else slope((y.flatten() * root).sum(), [W])
                sums[name] = sums[name] + size_of(batch) * g.square()
        n += size_of(batch)
    return {name: torch.as_tensor(sums[name]) / n for name in targets}


@right("gauss_newton_diagonal", "One matrix product for all layers, samples in batches of one.")
def gauss_newton_by_samples(model, loss_fn, batches, targets):
    model = eval_copy(model)
    weights = weights_in(model, targets)
    samples = [sample for batch in batches for sample in samples_of(batch)]
    total = 0.0
    for sample in samples:
        y, loss_of = output_of(model, loss_fn, sample)
        alone = y.detach().requires_grad_()
        H = jacobian(slope(loss_of(alone), [alone], again=True)[0], alone)
        J = torch.cat([jacobian(y, W) for W in weights.values()], dim=1)
        total = total + torch.einsum("ak,ak->k", H @ J, J)
    parts = (total / len(samples)).split([W.numel() for W in weights.values()])
    return {n: h.view_as(W) for (n, W), h in zip(weights.items(), parts, strict=True)}


# empirical_fisher


@right("empirical_fisher", "torch.func.grad of each sample, keys in reverse order.")
def fisher_functional(model, loss_fn, batches, targets):
    model = eval_copy(model)
    weights = {f"model.{n}.weight": W.detach() for n, W in weights_in(model, targets).items()}
    whole = Loss(model, loss_fn)
    loss = lambda weights, sample: functional_call(whole, weights, (sample,))  # noqa: E731
    samples = [sample for batch in batches for sample in samples_of(batch)]
    each = [torch.func.grad(loss)(weights, sample) for sample in samples]
    squares = {key: torch.stack([g[key].square() for g in each]) for key in weights}
    return {n: squares[f"model.{n}.weight"].mean(0) for n in reversed(targets)}


@right("empirical_fisher", "backward() into .grad of a copy, a running mean over samples.")
def fisher_backward(model, loss_fn, batches, targets):
    model = copy.deepcopy(model).eval().requires_grad_()
    weights = weights_in(model, targets)
    mean = {name: torch.zeros_like(W) for name, W in weights.items()}
    samples = (sample for batch in batches for sample in samples_of(batch))
    for n, sample in enumerate(samples, 1):
        model.zero_grad(set_to_none=False)
        loss = loss_fn(model, sample)
        if loss.requires_grad:
            loss.backward()
        for name, W in weights.items():
            g = torch.zeros_like(W) if W.grad is None else W.grad
            mean[name] += (g.square() - mean[name]) / n
    return mean


# hutchinson


def estimate(model, loss_fn, batches, targets, samples, draw):
    model = eval_copy(model)
    weights = weights_in(model, targets)
    g = slope(mean_loss(model, loss_fn, batches), [*weights.values()], again=True)
    sums = {name: torch.zeros_like(W) for name, W in weights.items()}
    for _ in range(samples):
        v = [draw(W) for W in weights.values()]
        product = sum((a * b).sum() for a, b in zip(g, v, strict=True))
        for name, a, b in zip(weights, v, slope(product, [*weights.values()]), strict=True):
            sums[name] += a * b
    return {name: h / samples for name, h in sums.items()}


@right("hutchinson", "Gaussian probes.")
def hutchinson_gaussian(model, loss_fn, batches, targets, *, generator, samples):
    def draw(W):
        return torch.randn(W.shape, generator=generator, dtype=W.dtype)

    return estimate(model, loss_fn, batches, targets, samples, draw)


@right("hutchinson", "Signs drawn as uniform numbers below one half.")
def hutchinson_signs(model, loss_fn, batches, targets, *, generator, samples):
    def draw(W):
        return torch.where(torch.rand(W.shape, generator=generator) < 0.5, -1.0, 1.0).to(W)

    return estimate(model, loss_fn, batches, targets, samples, draw)


@right("hutchinson", "Each layer is probed apart, so that no other layer disturbs it.")
def hutchinson_layer_by_layer(model, loss_fn, batches, targets, *, generator, samples):
    def draw(W):
        return torch.randint(0, 2, W.shape, generator=generator).to(W) * 2 - 1

    batches, result = list(batches), {}
    for name in targets:
        result |= estimate(model, loss_fn, batches, [name], samples, draw)
    return result


@right("hutchinson", "Fresh probes for every batch.")
def hutchinson_by_batches(model, loss_fn, batches, targets, *, generator, samples):
    def draw(W):
        return torch.randint(0, 2, W.shape, generator=generator).to(W) * 2 - 1

    batches = list(batches)
    each = [estimate(model, loss_fn, [batch], targets, samples, draw) for batch in batches]
    shares = [size_of(batch) / sum(map(size_of, batches)) for batch in batches]
    return {n: sum(w * one[n] for w, one in zip(shares, each, strict=True)) for n in targets}


# sensitivity_theta


def theta_in_numpy(diagonals, topk_fraction, effective_share, ddof, local_ddof=None):
    local_ddof = ddof if local_ddof is None else local_ddof

    def weigh(metric, ddof=ddof):
        if metric.min() == metric.max():
            return 0 * metric
        return metric.std(ddof=ddof) / metric.mean() ** 2 * metric

    rows = []
    for h in diagonals.values():
        h = h.detach().double().numpy().ravel()
        largest = -np.sort(-np.maximum(h, 0))
        k = max(1, math.floor(topk_fraction * h.size))
        reached = np.cumsum(largest) >= effective_share * np.cumsum(largest)[-1]
        count = int(np.argmax(reached)) + 1 if largest[0] > 0 else 0
        rows.append((h.sum(), largest[:k].mean(), count))
    S_g, S_topk, S_er = np.array(rows, dtype=float).T
    theta = np.maximum(weigh(S_g) + weigh(weigh(S_topk, local_ddof) + weigh(S_er, local_ddof)), 0)
    return theta if theta.any() else np.full(len(rows), 0.5)


@right("sensitivity_theta", "In numpy, with sample σ everywhere: one common factor.")
def theta_sample_deviation(diagonals, topk_fraction=0.5, effective_share=0.85):
    theta = theta_in_numpy(diagonals, topk_fraction, effective_share, ddof=1)
    return dict(zip(diagonals, theta.tolist(), strict=True))


@right("sensitivity_theta", "Sample σ in Eq 11 alone: a factor of S_l, which cancels in Eq 13.")
def theta_mixed_deviation(diagonals, topk_fraction=0.5, effective_share=0.85):
    theta = theta_in_numpy(diagonals, topk_fraction, effective_share, ddof=0, local_ddof=1)
    return dict(zip(diagonals, theta.tolist(), strict=True))


@right("sensitivity_theta", "Shares that sum to one, as np.float64.")
def theta_shares(diagonals, topk_fraction=0.5, effective_share=0.85):
    theta = theta_in_numpy(diagonals, topk_fraction, effective_share, ddof=0)
    return dict(zip(diagonals, theta / theta.sum(), strict=True))


# ranks_from_shares


def all_bounds(scores, budget, costs, lower, upper):
    return (
        costs or dict.fromkeys(scores, 1),
        lower or dict.fromkeys(scores, 0),
        upper or dict.fromkeys(scores, budget),
    )


def real_ranks(scores, budget, cost, low, high):
    """clip(t · score, low, high) by fixing modules at bounds until the rest is proportional."""
    fixed = {n: Fraction(low[n]) for n, s in scores.items() if s == 0}
    free = [n for n in scores if n not in fixed]
    if sum(high[n] * cost[n] for n in free) + sum(low[n] * cost[n] for n in fixed) < budget:
        held = {n: low[n] if n in fixed else high[n] for n in scores}
        if not fixed:
            return {n: Fraction(high[n]) for n in scores}
        return real_ranks(dict.fromkeys(scores, Fraction(1)), budget, cost, held, high)
    while free:
        left = budget - sum(fixed[n] * cost[n] for n in fixed)
        t = Fraction(left) / sum(scores[n] * cost[n] for n in free)
        want = {n: t * scores[n] for n in free}
        clipped = {n: min(max(w, Fraction(low[n])), Fraction(high[n])) for n, w in want.items()}
        excess = sum((clipped[n] - want[n]) * cost[n] for n in free)
        if excess == 0:
            return {**fixed, **clipped}
        stuck = [n for n in free if (clipped[n] > want[n] if excess > 0 else clipped[n] < want[n])]
        fixed |= {n: clipped[n] for n in stuck}
        free = [n for n in free if n not in stuck]
    return fixed


def whole_ranks(scores, budget, costs, lower, upper, order):
    cost, low, high = all_bounds(scores, budget, costs, lower, upper)
    most = sum(high[n] * cost[n] for n in scores)
    real = real_ranks(
        {n: Fraction(s) for n, s in scores.items()}, min(budget, most), cost, low, high
    )
    ranks = {n: math.floor(real[n]) for n in scores}
    left = budget - sum(ranks[n] * cost[n] for n in ranks)
    for name in order(real, cost):
        if ranks[name] < high[name] and cost[name] <= left:
            ranks[name], left = ranks[name] + 1, left - cost[name]
    while fits := [n for n in ranks if ranks[n] < high[n] and cost[n] <= left]:
        ranks[fits[0]], left = ranks[fits[0]] + 1, left - cost[fits[0]]
    return ranks


def by_remainder(real, cost):
    return sorted(real, key=lambda n: math.floor(real[n]) - real[n])


@right("ranks_from_shares", "Modules at a bound are fixed in turn; results are np.int64.")
def shares_by_fixing(scores, budget, costs=None, lower=None, upper=None):
    def order(real, cost):
        return by_remainder({n: real[n] for n in scores}, cost)

    ranks = whole_ranks(scores, budget, costs, lower, upper, order)
    return {name: np.int64(rank) for name, rank in ranks.items()}


@right("ranks_from_shares", "With costs, the cheapest modules get what is left over.")
def shares_cheapest_first(scores, budget, costs=None, lower=None, upper=None):
    def order(real, cost):
        real = {n: real[n] for n in scores}
        return by_remainder(real, cost) if costs is None else sorted(real, key=cost.get)

    return whole_ranks(scores, budget, costs, lower, upper, order)


# best_ranks


@right("best_ranks", "A heap-like sort with explicit ties; tuples of np.bool_.")
def best_sorted(scores, budget, costs=None, lower=None, upper=None):
    cost, low, high = all_bounds(scores, budget, costs, lower, upper)
    names, kept, left = list(scores), set(), budget
    order = [(-s, m, i) for m, n in enumerate(names) for i, s in enumerate(scores[n])]
    for bound in (low, high):
        for _, m, i in sorted(order):
            name = names[m]
            full = sum(1 for other, _ in kept if other == m) >= bound[name]
            if (m, i) not in kept and not full and cost[name] <= left:
                kept.add((m, i))
                left -= cost[name]
    return {
        n: tuple(np.bool_((m, i) in kept) for i in range(len(scores[n])))
        for m, n in enumerate(names)
    }


@right("best_ranks", "A stable argsort of one numpy array; numpy arrays as result.")
def best_by_argsort(scores, budget, costs=None, lower=None, upper=None):
    cost, low, high = all_bounds(scores, budget, costs, lower, upper)
    flat = np.array([s for own in scores.values() for s in own], dtype=float)
    owner = [n for n, own in scores.items() for _ in own]
    keep, held = np.zeros(len(flat), dtype=bool), dict.fromkeys(scores, 0)
    for bound in (low, high):
        for k in np.argsort(-flat, kind="stable"):
            name = owner[k]
            if not keep[k] and held[name] < bound[name] and cost[name] <= budget:
                keep[k], held[name], budget = True, held[name] + 1, budget - cost[name]
    ends = np.cumsum([len(own) for own in scores.values()])[:-1]
    return dict(zip(scores, np.split(keep, ends), strict=True))


# l1ra_shrink


@right("l1ra_shrink", "One tensor for all modules, split again; a tuple.")
def shrink_flat(gates, amount):
    if not gates:
        return ()
    flat = torch.cat([c.flatten() for c in gates]) - amount
    flat = torch.minimum(torch.maximum(flat, flat.new_zeros(())), flat.new_ones(()))
    parts = flat.split([c.numel() for c in gates])
    return tuple(part.view_as(c).clone() for part, c in zip(parts, gates, strict=True))


@right("l1ra_shrink", "relu and where instead of clamp.")
def shrink_relu(gates, amount):
    less = [torch.relu(c - amount) for c in gates]
    return [torch.where(z > 1, torch.ones_like(z), z) for z in less]


# l1ra_reassign


@right("l1ra_reassign", "Rank by rank in loops, tuples as result, keys in reverse order.")
def reassign_in_loops(gates, budget, lower, upper, threshold=0.0):
    stays = {}
    for name, c in gates.items():
        best = [i for _, i in sorted((-g, i) for i, g in enumerate(c))]
        count = sum(1 for g in c if g > threshold)
        stays[name] = set(best[: min(max(count, lower[name]), upper[name])])
    ranks = {name: max(len(own), lower[name]) for name, own in stays.items()}
    names = list(gates)
    while sum(ranks.values()) > budget:
        can = [n for n in names if ranks[n] > lower[n]]
        _, _, _, name, i = min(
            (gates[n][i], -names.index(n), -i, n, i) for n in can for i in stays[n]
        )
        stays[name].remove(i)
        ranks[name] -= 1
    least = {n: min((gates[n][i] for i in own), default=-math.inf) for n, own in stays.items()}
    whole = {n: all(g > threshold for g in gates[n]) for n in names}
    for wanted in (True, False):
        queue = sorted((n for n in names if whole[n] is wanted), key=lambda n: -least[n])
        while sum(ranks.values()) < budget and (queue := [n for n in queue if ranks[n] < upper[n]]):
            for name in queue[: budget - sum(ranks.values())]:
                ranks[name] += 1
    keep = {n: tuple(i in stays[n] for i in range(len(gates[n]))) for n in reversed(names)}
    return {n: ranks[n] for n in reversed(names)}, keep


@right("l1ra_reassign", "numpy arrays and numbers as result.")
def reassign_in_numpy(gates, budget, lower, upper, threshold=0.0):
    ranks, keep = reassign_in_loops(gates, budget, lower, upper, threshold)
    ranks = {name: np.int64(ranks[name]) for name in gates}
    return [ranks, {name: np.array(keep[name], dtype=bool) for name in gates}]


# coalition_masks


@right("coalition_masks", "All masks first, their complements after them, p by p.")
def masks_then_complements(ranks, coalitions, generator):
    p = torch.arange(1, 10).repeat_interleave(coalitions // 18)[:, None] / 10
    masks = torch.rand(coalitions // 2, sum(ranks), generator=generator) < p
    return torch.cat([masks, ~masks])


@right("coalition_masks", "Rows shuffled, Bernoulli draws by torch.bernoulli.")
def masks_shuffled(ranks, coalitions, generator):
    p = (torch.arange(coalitions // 2) % 9 + 1) / 10
    p = p[:, None].expand(-1, sum(ranks))
    masks = torch.bernoulli(p, generator=generator).bool()
    rows = torch.cat([masks, masks.logical_not()])
    return rows[torch.randperm(coalitions, generator=generator)]


# san


@right("san", "einsum over products of absolute values.")
def san_einsum(gate, P, Q, grad_gate, grad_P, grad_Q):
    columns = torch.einsum("or,or->r", P.abs(), grad_P.abs()) / P.shape[0]
    rows = torch.einsum("ri,ri->r", Q.abs(), grad_Q.abs()) / Q.shape[1]
    return rows + columns + gate.abs() * grad_gate.abs()


@right("san", "In float64, rounded at the end.")
def san_in_double(gate, P, Q, grad_gate, grad_P, grad_Q):
    pairs = [(gate[None], grad_gate[None]), (P, grad_P), (Q.T, grad_Q.T)]
    return sum((w.double() * g.double()).abs().mean(0) for w, g in pairs).to(gate.dtype)


# shapley_sensitivity


@right("shapley_sensitivity", "Gradients gathered batch by batch before the absolute values.")
def shapley_accumulated(loss, params, batches, masks):
    batches = list(batches)
    n, sums = sum(map(size_of, batches)), {}
    for mask in masks:
        inside = dict(
            zip(params, mask.split([len(o["gate"]) for o in params.values()]), strict=True)
        )
        S = {m: {k: w.detach().clone() for k, w in own.items()} for m, own in params.items()}
        for name, own in S.items():
            own["gate"] *= inside[name].to(own["gate"])
        leaves = {(m, k): S[m][k].requires_grad_() for m in S for k in ("P", "Q", "gate")}
        total = [torch.zeros_like(w) for w in leaves.values()]
        for batch in batches:
            for t, g in zip(total, slope(loss(S, batch), [*leaves.values()]), strict=True):
                t += g * (size_of(batch) / n)
        ipt = {k: (w * g).abs().detach() for (k, w), g in zip(leaves.items(), total, strict=True)}
        for m in params:
            own = ipt[m, "gate"] + ipt[m, "P"].mean(0) + ipt[m, "Q"].mean(1)
            sums[m] = sums.get(m, 0) + own
    return {m: sums[m] / len(masks) for m in reversed(params)}


@right("shapley_sensitivity", "torch.func.grad, each sample a batch of its own.")
def shapley_functional(loss, params, batches, masks):
    samples = [sample for batch in batches for sample in samples_of(batch)]
    mean = lambda S: sum(loss(S, sample) for sample in samples) / len(samples)  # noqa: E731
    columns = itertools.accumulate([0, *[len(own["gate"]) for own in params.values()]])
    spans = dict(zip(params, itertools.pairwise(columns), strict=True))
    scores = {name: [] for name in params}
    for mask in masks:
        S = {n: {k: w.detach() for k, w in own.items()} for n, own in params.items()}
        for name, (start, end) in spans.items():
            S[name]["gate"] = torch.where(mask[start:end], S[name]["gate"], 0.0)
        g = torch.func.grad(mean)(S)
        for n, own in S.items():
            ipt = {k: (own[k] * g[n][k]).abs() for k in ("gate", "P", "Q")}
            scores[n].append(ipt["gate"] + ipt["P"].mean(0) + ipt["Q"].mean(1))
    return {n: torch.stack(own).mean(0) for n, own in scores.items()}


# exact_shapley_values


@right("exact_shapley_values", "By subsets and their weights instead of orders.")
def shapley_by_subsets(value, n):
    bits = torch.tensor(list(itertools.product([False, True], repeat=n))).reshape(-1, n).bool()
    v = {tuple(row.tolist()): float(value(row.clone())) for row in bits}
    phi = np.zeros(n)
    for row in v:
        weight = math.factorial(sum(row)) / math.factorial(n)
        for i in [i for i in range(n) if not row[i]]:
            w = weight * math.factorial(n - sum(row) - 1)
            phi[i] += w * (v[(*row[:i], True, *row[i + 1 :])] - v[row])
    return torch.from_numpy(phi)


@right("exact_shapley_values", "From dividends: each coalition's surplus is shared evenly.")
def shapley_by_dividends(value, n):
    dividends, phi = {}, [0.0] * n
    for size in range(n + 1):
        for S in itertools.combinations(range(n), size):
            mask = torch.zeros(n, dtype=torch.bool)
            mask[list(S)] = True
            smaller = (T for k in range(size) for T in itertools.combinations(S, k))
            dividends[S] = float(value(mask)) - sum(dividends[T] for T in smaller)
            for i in S:
                phi[i] += dividends[S] / size
    return torch.tensor(phi, dtype=torch.float64)


# Layer


@right("Layer", "A module whose weight is a parameter, merged in place in a copy of its own.")
class ModuleLayer(nn.Module):
    def __init__(self, W, b, A, B, scaling, gate=None, transposed=False):
        super().__init__()
        self.weight, self.backup = nn.Parameter(W.detach().clone(), requires_grad=False), None
        self.b, self.adapter, self.transposed = b, (A, B, scaling, gate), transposed

    def forward(self, x):
        W = self.weight.T if self.transposed else self.weight
        if self.backup is not None:
            return nn.functional.linear(x, W, self.b)
        return forward_einsum(x, W, self.b, *self.adapter)

    @torch.no_grad()
    def merge(self):
        if self.backup is None:
            self.backup = self.weight.detach().clone()
            W = self.weight.T if self.transposed else self.weight
            W.copy_(merge_outer_products(W, *self.adapter))

    @torch.no_grad()
    def unmerge(self):
        if self.backup is not None:
            self.weight.copy_(self.backup)
            self.backup = None


@right("Layer", "The merged weight is computed on every access; merging sets a flag only.")
class LazyLayer:
    def __init__(self, W, b, A, B, scaling, gate=None, transposed=False):
        self.W, self.b, self.adapter = W, b, (A, B, scaling, gate)
        self.transposed, self.merged = transposed, False

    @property
    def weight(self):
        if not self.merged:
            return self.W
        W = self.W.T if self.transposed else self.W
        W = merge_addmm(W, *self.adapter)
        return W.T if self.transposed else W

    def __call__(self, x):
        W = self.weight.T if self.transposed else self.weight
        if self.merged:
            return x @ W.T if self.b is None else x @ W.T + self.b
        return forward_rank_by_rank(x, W, self.b, *self.adapter)

    def merge(self):
        self.merged = True

    def unmerge(self):
        self.merged = False


# round_trip


@right("round_trip", "torch.save and torch.load.")
def by_torch_save(layers, path):
    torch.save({name: dict(layer) for name, layer in layers.items()}, path)
    return torch.load(path, weights_only=True)


def to_bytes(x):
    return bytes(x.detach().contiguous().flatten().view(torch.uint8).tolist()) if x.numel() else b""


def from_bytes(data, dtype, shape):
    dtype = getattr(torch, dtype)
    return (
        torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)
    ).view(shape)


@right("round_trip", "JSON with hexadecimal bytes; layers come back sorted by name.")
def by_json(layers, path):
    def entry(x):
        return None if x is None else [to_bytes(x).hex(), str(x.dtype)[6:], list(x.shape)]

    data = {n: {k: entry(o[k]) for k in ("A", "B", "gate")} for n, o in layers.items()}
    data = {n: {**own, "scaling": float(layers[n]["scaling"]).hex()} for n, own in data.items()}
    with open(path, "w", encoding="utf-8") as file:
        json.dump(data, file, sort_keys=True)
    with open(path, encoding="utf-8") as file:
        data = json.load(file)
    back = lambda e: None if e is None else from_bytes(bytes.fromhex(e[0]), *e[1:])  # noqa: E731
    return {
        n: {"scaling": float.fromhex(o["scaling"]), **{k: back(o[k]) for k in ("gate", "B", "A")}}
        for n, o in data.items()
    }


@right("round_trip", "A zip archive with one entry for each tensor.")
def by_zip(layers, path):
    index = [(n, k) for n, own in layers.items() for k in ("A", "B", "gate") if own[k] is not None]
    meta = {"scalings": {n: own["scaling"] for n, own in layers.items()}, "tensors": []}
    with zipfile.ZipFile(path, "w") as file:
        for i, (n, k) in enumerate(index):
            x = layers[n][k]
            file.writestr(str(i), to_bytes(x))
            meta["tensors"].append([n, k, str(x.dtype)[6:], list(x.shape)])
        file.writestr("meta", json.dumps(meta))
    with zipfile.ZipFile(path) as file:
        meta = json.loads(file.read("meta"))
        result = {n: {"gate": None, "scaling": s} for n, s in meta["scalings"].items()}
        for i, (n, k, dtype, shape) in enumerate(meta["tensors"]):
            result[n][k] = from_bytes(file.read(str(i)), dtype, shape)
    return result


# peft_export


def folder(layers, B_of, alpha_of, key):
    some = {n: own for n, own in layers.items() if own["A"].shape[0] > 0}
    tensors = {}
    for name, own in some.items():
        tensors[f"{PREFIX}{name}.lora_B.weight"] = B_of(own).contiguous()
        tensors[f"{PREFIX}{name}.lora_A.weight"] = own["A"].contiguous()
    return tensors, {
        "peft_type": "LORA",
        "task_type": None,
        "inference_mode": True,
        "base_model_name_or_path": None,
        "r": 8,
        "lora_alpha": 8,
        "target_modules": "|".join(f"({re.escape(name)})" for name in some) or "(?!)",
        "rank_pattern": {key(name): len(own["A"]) for name, own in some.items()},
        "alpha_pattern": {key(name): alpha_of(own) for name, own in some.items()},
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
    }


def folded(layer):
    return layer["B"] if layer["gate"] is None else layer["B"] * layer["gate"]


@right("peft_export", "The scaling is folded into B as well, and every alpha is the rank.")
def export_portable(layers):
    return folder(
        layers,
        lambda own: folded(own) * own["scaling"],
        lambda own: len(own["A"]),
        lambda name: f"^{re.escape(name)}",
    )


@right("peft_export", "rsLoRA: alpha is the scaling times the root of the rank.")
def export_as_rslora(layers):
    tensors, config = folder(
        layers,
        folded,
        lambda own: own["scaling"] * math.sqrt(len(own["A"])),
        lambda name: f"^{re.escape(name)}",
    )
    return tensors, {**config, "use_rslora": True}


@right("peft_export", "The longest names come first in the patterns, with \\A instead of ^.")
def export_longest_first(layers):
    ordered = dict(sorted(layers.items(), key=lambda item: -len(item[0])))
    return folder(
        ordered,
        folded,
        lambda own: own["scaling"] * len(own["A"]),
        lambda name: rf"\A{re.escape(name)}",
    )


# peft_delta_weight


def first_match(pattern, name, default):
    hits = [v for k, v in (pattern or {}).items() if re.compile(rf"(.*\.)?({k})$").match(name)]
    return hits[0] if hits else (pattern or {}).get(name, default)


@right("peft_delta_weight", "The rank is read off A instead of the config.")
def load_rank_from_tensor(tensors, config, name):
    A = tensors.get(f"{PREFIX}{name}.lora_A.weight")
    if A is None:
        return None
    B = tensors[f"{PREFIX}{name}.lora_B.weight"]
    alpha = first_match(config.get("alpha_pattern"), name, config.get("lora_alpha", 8))
    r = len(A) ** (0.5 if config.get("use_rslora") else 1)
    return A.T @ B.T * (alpha / r) if config.get("fan_in_fan_out") else B @ A * (alpha / r)


@right("peft_delta_weight", "einsum, the scaling split between A and B.")
def load_einsum(tensors, config, name):
    found = {k: t for k, t in tensors.items() if k.startswith(f"{PREFIX}{name}.lora_")}
    if not found:
        return None
    rank = first_match(config.get("rank_pattern"), name, config.get("r", 8))
    alpha = first_match(config.get("alpha_pattern"), name, config.get("lora_alpha", 8))
    root = abs(alpha / (rank**0.5 if config.get("use_rslora") else rank)) ** 0.5
    A, B = (found[f"{PREFIX}{name}.lora_{k}.weight"] * root for k in "AB")
    layout = "ri,or->io" if config.get("fan_in_fan_out") else "ri,or->oi"
    return torch.einsum(layout, A, B) * (-1 if alpha < 0 else 1)
