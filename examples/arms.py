"""Who decides the ranks: the arms of every study of when allocating ranks helps.

An arm is one function: `Context` → ranks, or (`Context`, learning rate) → a trained model, if the
ranks are found in the training itself. `study.py` has the protocol.

    uniform, largest         the same rank everywhere: at the budget, and at the largest size
    random                   shares drawn anew for every seed, even over all divisions
    attention, feed-forward  one kind of layer alone
    proxy, fisher, …         Sensitivity-LoRA on each curvature, before any training
    … after warm-up          the same, on the model after a fifth of a uniform LoRA training
    shaplora, plain, …       ShapLoRA after a first training with twice the budget; "roomy": with
                             `max_rank` everywhere. "plain" leaves the coalitions out
    singular values          of what a roomy first training has changed; "of outputs": with each
                             input weighted by its mean square
    l1ra                     with the paper's settings; from the budget with compare.py's; and
                             from room, pruned to the budget at half of the training
    eva, adalora             PEFT's own: ranks that EVA finds, trained here; AdaLoRA's last ranks,
                             trained anew ("retrained"); and AdaLoRA as it is

First trainings run at `Task.first_rate`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from study import Arm, Context, Ranks, Trained, best_known, largest, uniform
from study_results import KNOWN, LARGEST, UNIFORM
from torch import nn

from minirank import (
    L1RA,
    SensitivityLoRA,
    ShapLoRA,
    SingularValues,
    curvature,
    merge,
    unwrap,
)

WARM_UP = 5  # one part in so many of a training comes before scoring "after warm-up"
PROBES = 8  # random vectors of an estimate

# ---- without a method ----------------------------------------------------------------------------


def random(context: Context) -> Ranks:
    """Shares from an exponential distribution: even over all divisions of one."""
    generator = torch.Generator().manual_seed(3_000_000 + context.seed)
    draws = torch.empty(len(context.names)).exponential_(generator=generator).tolist()
    return context.divide(dict(zip(context.names, draws, strict=True)))


def one_kind(kind: str, context: Context) -> Ranks | None:
    some = context.task.kinds(context.seed).get(kind)
    return context.divide(dict.fromkeys(context.names, 1.0), some) if some else None


# ---- Sensitivity-LoRA ----------------------------------------------------------------------------


def warmed_up(context: Context) -> nn.Module:
    """The plain model after a short training of uniform LoRA, merged into its weights."""
    task = context.task
    model = context.wrapped(uniform(context))
    optimizer = task.optimizer(model, task.first_rate)
    task.train(model, context.seed, optimizer, steps=max(1, task.steps // WARM_UP))
    merge(model)
    unwrap(model)
    return model


def sensitivity(
    context: Context, estimate: str, *, warm_up: bool = False, all_samples: bool = False
) -> Ranks:
    task, seed = context.task, context.seed
    model = context.shared("warmed up", lambda: warmed_up(context)) if warm_up else context.plain
    batches = task.calibration(seed) if all_samples else task.few_samples(seed)
    options: dict[str, Any] = {}
    if estimate != "input_second_moment":
        options["batch_weight"] = task.batch_weight
    if estimate in ("gauss_newton", "hutchinson_outputs"):
        options |= {"samples": PROBES, "generator": torch.Generator().manual_seed(seed)}
    allocator = SensitivityLoRA(
        model,
        task.loss_fn,
        batches,
        targets=context.names,
        curvature=partial(getattr(curvature, estimate), **options),
        progress=False,
    )
    allocator.score()
    return context.allocate(allocator)


# ---- after a first training ----------------------------------------------------------------------


def first_training(context: Context, size: str, gate: float | None) -> nn.Module:
    """LoRA at a larger size: "double" the budget, or "roomy", `max_rank` everywhere."""
    task = context.task
    ranks = dict(context.upper)
    if size == "double":
        ranks = context.divide(dict.fromkeys(context.names, 1.0), budget=2 * context.budget)
    model = context.wrapped(ranks, gate)
    gate_lr = None if gate is None else task.gate_factor * task.first_rate
    optimizer = task.optimizer(model, task.first_rate, gate_lr)
    task.train(model, context.seed, optimizer, steps=task.steps)
    return model


def shaplora(context: Context, size: str, **options: Any) -> Ranks:
    task = context.task
    model = context.shared(
        ("first", size, "gated"), lambda: first_training(context, size, gate=0.0)
    )
    allocator = ShapLoRA(
        model,
        task.loss_fn,
        task.validation(context.seed),
        batch_weight=task.batch_weight,
        generator=context.seed,
        progress=False,
        **options,
    )
    allocator.score()
    return context.allocate(allocator)


def by_singular_values(context: Context, size: str, *, of_outputs: bool = False) -> Ranks:
    task = context.task
    model = context.shared(
        ("first", size, "plain"), lambda: first_training(context, size, gate=None)
    )
    data = (task.loss_fn, task.calibration(context.seed)) if of_outputs else ()
    allocator = SingularValues(model, *data)
    allocator.score()
    return context.allocate(allocator)


# ---- L1RA ----------------------------------------------------------------------------------------


def l1ra(
    context: Context,
    lr: float,
    *,
    l1: float,
    gate_lr: float,
    weight_decay: float = 0.0,
    updates: int = 20,
    start: float = 0.0,
    stop: float = 1.0,
    roomy: bool = False,
    min_rank: int = 1,
    on_step: Callable[[L1RA], object] | None = None,
) -> Trained:
    """L1RA from uniform ranks.

    Args:
        weight_decay: of A and B.
        updates: in the whole training.
        start, stop: shares of the training, between which ranks move.
        roomy: begin with `max_rank` everywhere. The first update then prunes down to the budget.
        on_step: called with the allocator after each optimizer step, before the gates shrink.
    """
    task = context.task
    model = context.wrapped(dict(context.upper) if roomy else uniform(context), gate=1.0)
    optimizer = task.optimizer(model, lr)  # L1RA takes the gates out, into a group without decay
    for group in optimizer.param_groups:
        group["weight_decay"] = weight_decay
    allocator = L1RA(
        model,
        optimizer,
        l1=l1,
        gate_lr=gate_lr,
        interval=max(1, task.steps // updates),
        start=round(start * task.steps),
        stop=round(stop * task.steps),
        budget=context.budget,
        unit="parameters",
        min_rank=min_rank,
        max_rank=task.max_rank,
        generator=context.seed,
    )

    def after_step(_: int) -> None:
        if on_step is not None:
            on_step(allocator)
        allocator.step()

    task.train(model, context.seed, optimizer, steps=task.steps, on_step=after_step)
    return Trained(model, allocator.ranks)


def l1ra_from_room(context: Context, lr: float) -> Trained:
    """The best setting of planted_teacher_l1ra.py: the penalty alone takes half of the training."""
    l1 = 0.1
    return l1ra(
        context,
        lr,
        l1=l1,
        gate_lr=2 / (l1 * context.task.steps),
        weight_decay=0.1,
        start=0.5,
        stop=0.5,
        roomy=True,
        min_rank=0,
    )


# ---- PEFT's own ----------------------------------------------------------------------------------


def eva(context: Context) -> Ranks:
    from peft_ranks import eva_ranks

    task = context.task
    rank = context.average_rank
    ranks = eva_ranks(
        context.model(),
        context.names,
        task.calibration(context.seed),
        task.loss_fn,
        rank=rank,
        max_rank=max(task.max_rank, rank),
    )
    return context.divide(ranks)


def adalora_training(context: Context, lr: float) -> Trained:
    from peft_ranks import adalora

    task = context.task
    rank = context.average_rank

    def train(model: nn.Module, on_step: Callable[[int], object]) -> None:
        optimizer = task.optimizer(model, lr)
        task.train(model, context.seed, optimizer, steps=task.steps, on_step=on_step)

    model, ranks = adalora(
        context.model(),
        context.names,
        rank=rank,
        start_rank=min(task.max_rank, 2 * rank),
        steps=task.steps,
        scaling=task.scaling,
        train=train,
        trainable=task.trainable,
        seed=context.seed,
    )
    return Trained(model, ranks)


def adalora_retrained(context: Context) -> Ranks:
    first = context.shared("adalora", lambda: adalora_training(context, context.task.first_rate))
    return context.divide(first.ranks)


# ---- all of them ---------------------------------------------------------------------------------

ARMS: dict[str, Arm] = {
    UNIFORM: Arm(uniform),
    LARGEST: Arm(largest),
    KNOWN: Arm(best_known),
    "random": Arm(random),
    "attention only": Arm(partial(one_kind, "attention")),
    "feed-forward only": Arm(partial(one_kind, "feed-forward")),
    "proxy": Arm(partial(sensitivity, estimate="input_second_moment", all_samples=True)),
    "fisher": Arm(partial(sensitivity, estimate="empirical_fisher")),
    "gauss-newton": Arm(partial(sensitivity, estimate="gauss_newton")),
    "hutchinson": Arm(partial(sensitivity, estimate="hutchinson_outputs")),
    "proxy after warm-up": Arm(
        partial(sensitivity, estimate="input_second_moment", warm_up=True, all_samples=True)
    ),
    "fisher after warm-up": Arm(partial(sensitivity, estimate="empirical_fisher", warm_up=True)),
    "gauss-newton after warm-up": Arm(partial(sensitivity, estimate="gauss_newton", warm_up=True)),
    "eva": Arm(eva),
    "adalora retrained": Arm(adalora_retrained),
    "adalora": Arm(train=adalora_training),
    "l1ra, published": Arm(train=partial(l1ra, l1=5e-3, gate_lr=2e-2)),
    "l1ra, from the budget": Arm(train=partial(l1ra, l1=0.3, gate_lr=0.05, stop=0.5)),
    "l1ra, from room": Arm(train=l1ra_from_room),
    "shaplora": Arm(partial(shaplora, size="double")),
    "plain": Arm(partial(shaplora, size="double", coalitions=0)),
    "magnitude": Arm(partial(shaplora, size="double", importance="magnitude")),
    "shaplora, roomy": Arm(partial(shaplora, size="roomy")),
    "plain, roomy": Arm(partial(shaplora, size="roomy", coalitions=0)),
    "magnitude, roomy": Arm(partial(shaplora, size="roomy", importance="magnitude")),
    "singular values": Arm(partial(by_singular_values, size="roomy")),
    "singular values of outputs": Arm(partial(by_singular_values, size="roomy", of_outputs=True)),
    "singular values, double": Arm(partial(by_singular_values, size="double")),
}
