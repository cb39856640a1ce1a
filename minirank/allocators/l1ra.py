"""L1RA: ranks that move during training (arXiv 2509.04884).

    ΔW = s · B diag(c) A,  c ∈ [0, 1]^r from 1,  with an L1 penalty λ‖c‖₁ that drives gates c to zero

    paper   code        meaning
    c       gate        one per rank of each module, trained with the rest
    λ       l1          weight of the penalty, 1e-3 (in the paper's experiments 5e-3)
    η_c     gate_lr     the gates' own constant learning rate, 2e-2, without weight decay
    T       interval    optimizer steps between updates: prune, reassign (reassign.py), resize (resize.py)

    wrap(model, ranks, gate=1.0)
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    l1ra = L1RA(model, optimizer, interval=50)      # before a learning-rate scheduler
    for batch in batches:
        ...
        optimizer.step()
        l1ra.step()

The penalty is decoupled, as the authors', and applied by its proximal operator: after the optimizer's step,
c ← clamp(c - η_c λ, 0, 1), the minimiser of ½(z - c)² + η_c λ |z| over z ∈ [0, 1]. It reaches zero exactly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..checks import as_generator, is_integer, require
from ..layers.resize import resize, separate_layers
from .allocation import Allocation, Allocator, Bound, Unit
from .gates import Shrinkage, check_gates, gates_into_own_group, shrink
from .history import History, Update
from .reassign import reassign

OPTIONS = (
    *("l1", "gate_lr", "interval", "start", "stop", "budget", "unit", "min_rank", "max_rank"),
    *("threshold", "shrinkage", "reset_optimizer"),
)


class L1RA(Allocator):
    """Moves ranks between the gated LoRA layers of `model` while `optimizer` trains them: `step()` after each
    `optimizer.step()`. `score()` gives the gates, `allocate(budget)` what an update would do with
    that budget and those bounds.

    The gates get a parameter group of their own, in place, with learning rate `gate_lr` and no weight decay (if they
    are in groups of their own already, these are checked). Just before every optimizer step that learning rate is set
    again, so no scheduler changes it. Make the scheduler after this object: it needs to know all the groups.

    Args:
        l1: λ, the penalty's weight; 0 shrinks nothing. gate_lr: η_c, the gates' own learning rate.
        interval: updates happen after every `interval` optimizer steps; 5-10 % of the training in the paper.
        start, stop: ... but only in optimizer steps from `start` to `stop` (None: to the end). Gates shrink from the
            first step to `stop`; then none can fall any more, and they only train. Where the learning rate of A and B
            decays, a `stop` before the end keeps the gates from shrinking when A and B can no longer make up for it.
        budget, unit: what to keep to: total rank, or with unit="parameters" Σ r · (d_out + d_in), as in `allocate`.
            None: what the model has now. Another one than now is reached by the first update.
        min_rank, max_rank: bounds of a module's rank, one for all or {name: bound}, as in `allocate`.
        threshold: gates at or below it fall. None: 0 for the proximal shrinkage, gate_lr · l1 for the subgradient.
        shrinkage: "proximal", or the authors' "subgradient": c ← c - η_c λ sign(c), not where |c| ≤ η_c λ. That dead
            zone ends above zero, so it needs the threshold.
        reset_optimizer: forget the state of all parameters at every update, as the authors' code does.
        generator: a torch.Generator or a seed, for fresh ranks.

    Optimizer steps are counted by a hook, so a step that a GradScaler skips or that gradient accumulation puts off
    shrinks nothing. Copies and pickles of (model, optimizer, l1ra) taken together go on as the originals would.

    Raises (nothing has changed then):
        ValueError: no gated layer, a gate that is not in the optimizer or not trained, or in a type too coarse to
            shrink in, layers that share a parameter, a number out of its range, a budget that the bounds make
            impossible, a scheduler made before.
        TypeError: the optimizer is LBFGS, which knows one parameter group only.
    """

    method = "L1RA"
    grows = True

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        l1: float = 1e-3,
        gate_lr: float = 2e-2,
        interval: int,
        start: int = 0,
        stop: int | None = None,
        budget: int | None = None,
        unit: Unit = "rank",
        min_rank: Bound = 1,
        max_rank: Bound = None,
        threshold: float | None = None,
        shrinkage: Shrinkage = "proximal",
        reset_optimizer: bool = False,
        generator: torch.Generator | int = 0,
    ) -> None:
        super().__init__(model)
        self.optimizer = optimizer
        self._layers = {
            name: layer for name, layer in separate_layers(model).items() if layer.gate is not None
        }
        self.l1, self.gate_lr, self.interval, self.start, self.stop = (
            l1,
            gate_lr,
            interval,
            start,
            stop,
        )
        self.unit: Unit = unit
        self.min_rank, self.max_rank = min_rank, max_rank
        self.threshold = threshold
        self.shrinkage: Shrinkage = shrinkage
        self.reset_optimizer = reset_optimizer
        self._check_options()
        check_gates(self._layers, l1 * gate_lr)
        costs = {
            n: x.in_features + x.out_features if unit == "parameters" else 1
            for n, x in self._layers.items()
        }
        self.budget = (
            sum(rank * costs[name] for name, rank in self.ranks.items())
            if budget is None
            else budget
        )
        self._allocate_scored()  # a budget that cannot be met is refused here, not in the middle of training
        self._scores = None

        self._gate_groups = gates_into_own_group(optimizer, self.gates, gate_lr)
        self.generator = as_generator(generator)
        self.history = History(self.ranks)
        self.steps = 0  # optimizer steps that `step` has seen
        self._pending = 0  # those that it has not yet
        self._watch_optimizer()

    # ---- scores and allocations -----------------------------------------------------------------

    @property
    def gates(self) -> dict[str, nn.Parameter]:
        return {name: layer.gate for name, layer in self._layers.items() if layer.gate is not None}

    @property
    def ranks(self) -> dict[str, int]:
        return {name: layer.rank for name, layer in self._layers.items()}

    def _measure(self) -> dict[str, Tensor]:
        """The gates: (r,) per module."""
        return {name: gate.detach().clone() for name, gate in self.gates.items()}

    def _allocate_scored(self) -> Allocation:
        self.score()
        return self.allocate(
            self.budget, unit=self.unit, min_rank=self.min_rank, max_rank=self.max_rank
        )

    def _judge(
        self,
        scores: Mapping[str, list[float]],
        budget: int,
        costs: Mapping[str, int] | None,
        lower: Mapping[str, int],
        upper: Mapping[str, int],
    ) -> tuple[dict[str, int], dict[str, list[bool]]]:
        threshold = self.threshold
        if threshold is None:
            threshold = self.gate_lr * self.l1 if self.shrinkage == "subgradient" else 0.0
        return reassign(scores, budget, costs=costs, lower=lower, upper=upper, threshold=threshold)

    # ---- training -------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self) -> Update | None:
        """Call after `optimizer.step()`: shrinks every gate that trains, once for each optimizer step since the last
        call (if there was none, nothing happens), and at every interval moves ranks. Returns what an update did (see
        `history`)."""
        taken, self._pending = self._pending, 0
        if taken == 0:
            return None
        shrinking = taken if self.stop is None else max(0, min(taken, self.stop - self.steps))
        trained: list[Tensor] = [gate for gate in self.gates.values() if gate.requires_grad]
        if trained:  # the user may freeze layers for a time
            shrink(trained, shrinking * self.gate_lr * self.l1, self.shrinkage)
        latest_due = (self.steps + taken) // self.interval * self.interval
        due = (
            latest_due > self.steps
            and self.start <= latest_due
            and (self.stop is None or latest_due <= self.stop)
        )
        self.steps += taken
        return self._update() if due else None

    def _update(self) -> Update:
        """Prune → reassign → resize."""
        before = self.ranks
        allocation = self._allocate_scored()
        done = resize(self.model, allocation, self.optimizer, generator=self.generator)
        if self.reset_optimizer:
            self.optimizer.state.clear()
        survivors = {name: int(change.keep.sum()) for name, change in done.items()}
        update = Update(
            step=self.steps,
            ranks=allocation.ranks,
            pruned={n: before[n] - kept for n, kept in survivors.items() if before[n] > kept},
            given={
                n: allocation.ranks[n] - kept
                for n, kept in survivors.items()
                if allocation.ranks[n] > kept
            },
            parameters=allocation.parameters,
            state_reset=tuple(
                f"{name}.{entry}" for name, change in done.items() for entry in change.state_reset
            ),
        )
        self.history.updates.append(update)
        return update

    def _watch_optimizer(self) -> None:
        self.optimizer.register_step_pre_hook(self._hold_gate_lr)
        self.optimizer.register_step_post_hook(self._count_step)

    def _hold_gate_lr(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        for i in self._gate_groups:
            optimizer.param_groups[i]["lr"] = self.gate_lr

    def _count_step(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        # A GradScaler calls fused optimizers even for a step that they are to skip, with this attribute set.
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is None or not found_inf.item():
            self._pending += 1

    # ---- saving ---------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything of this object but the model and the optimizer, which have state_dicts of their own. To go on:

        wrap(model, ...) as at the beginning; resize(model, state["ranks"]); model.load_state_dict; make the optimizer,
        L1RA and the scheduler as at the beginning, then load their states.
        """
        return {
            "ranks": self.ranks,
            "steps": self.steps,
            "pending": self._pending,
            "generator": self.generator.get_state(),
            "history": self.history.state_dict(),
            "options": {name: getattr(self, name) for name in OPTIONS},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a `state_dict()`, its options too. Raises ValueError, having changed nothing, if it is not one or
        if the model has other ranks than it: resize(model, state["ranks"]) first."""
        expected = {"ranks", "steps", "pending", "generator", "history", "options"}
        if state.keys() != expected or state["options"].keys() != set(OPTIONS):
            raise ValueError(
                f"expected the state_dict() of an L1RA, with {sorted(expected)}; got {sorted(state)}"
            )
        if state["ranks"] != self.ranks:
            wrong = [
                n
                for n in {**self.ranks, **state["ranks"]}
                if self.ranks.get(n) != state["ranks"].get(n)
            ]
            raise ValueError(
                f"the state was saved at other ranks than the model's (at {wrong[:3]}, for example): "
                'resize(model, state["ranks"]), then load the states of model, optimizer and L1RA'
            )
        self.generator.set_state(
            state["generator"].cpu()
        )  # where torch.load(map_location="cuda") did not leave it
        self.history = History.from_state_dict(state["history"])
        self.steps, self._pending = state["steps"], state["pending"]
        for name in OPTIONS:
            setattr(self, name, state["options"][name])

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._watch_optimizer()  # an optimizer's copy has no hooks

    def _check_options(self) -> None:
        require(0 <= self.l1 < math.inf, "l1", self.l1, "a number of at least 0")
        require(0 < self.gate_lr < math.inf, "gate_lr", self.gate_lr, "a positive number")
        require(
            is_integer(self.interval, 1),
            "interval",
            self.interval,
            "an integer number of steps, at least 1",
        )
        require(
            is_integer(self.start, 0), "start", self.start, "an integer number of steps, at least 0"
        )
        window = self.stop is None or is_integer(self.stop, self.start)
        require(
            window,
            "stop",
            self.stop,
            f"None or an integer number of steps, at least start = {self.start}",
        )
        known = get_args(Shrinkage)
        require(self.shrinkage in known, "shrinkage", self.shrinkage, f"one of {known}")
        sensible = self.threshold is None or 0 <= self.threshold < 1
        require(
            sensible,
            "threshold",
            self.threshold,
            "None or at least 0 and below 1, where gates start",
        )
