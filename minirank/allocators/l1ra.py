"""L1RA: ranks that move during training (arXiv 2509.04884).

    ΔW = s · B diag(c) A,  c ∈ [0, 1]^r from 1,  with an L1 penalty λ‖c‖₁ that drives gates to zero

    paper   code        meaning
    c       gate        (r,), one per rank of each module, trained with A and B
    λ       l1          weight of the penalty, 1e-3 (5e-3 in the paper's experiments)
    η_c     gate_lr     the gates' own constant learning rate, 2e-2, without weight decay
    T       interval    optimizer steps between updates
    R       budget      total rank, which stays the same

The penalty is decoupled, like weight decay: the optimizer's step comes first, then the shrinkage

    c ← clamp(c − η_c λ, 0, 1),  the minimiser of ½(z − c)² + η_c λ |z| over z ∈ [0, 1]

It reaches zero exactly (gates.py). Every T steps an update prunes the ranks whose gates are at
zero, gives their number to other modules (reassign.py), and resizes the layers (resize.py).

    wrap(model, ranks, gate=1.0)
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    l1ra = L1RA(model, optimizer, interval=50)      # before a learning-rate scheduler
    for batch in batches:
        ...
        optimizer.step()
        l1ra.step()

Departures from the paper and its authors' code:

- The shrinkage is the proximal step above. `shrinkage="subgradient"` is the authors' own,
  c ← c − η_c λ sign(c), which leaves gates within η_c λ of zero alone. That dead zone ends above
  zero, so such gates are pruned at a threshold of η_c λ.
- Gates shrink until `stop`. After it no rank moves any more, and gates only train.
- Freed ranks that no module with high gates can take go to the next best module, in the end to
  their own module, as fresh ranks: the sum never changes. The authors' code drops such ranks. If
  all gates of a module are at the threshold, the largest one stays; the authors' code keeps the
  last one.
- A budget in parameters is possible: an equal rank budget is not an equal parameter budget, and the
  authors' runs end with 8 to 19 % more parameters. A freed rank goes where the next rank still
  fits, and what is left over goes to other modules until no further rank fits.
- The optimizer's state of surviving ranks is carried over. The authors' code forgets all of it at
  every update: `reset_optimizer=True`. Of Adafactor's factored moments, the one that is averaged
  over ranks stays as it is.
- Updates count optimizer steps that really happened. A step that a GradScaler skips shrinks
  nothing. With several optimizers (one for matrices, one for the rest), those that hold gates
  count: a gate shrinks once for each step of its own optimizer, and `steps` are those of the
  optimizer that has taken most. So optimizers that step side by side count once together.
- A schedule-free optimizer's two iterates of a gate are both shrunk (gates.py).
- `scaling` is fixed when a layer is made, and stays when its rank changes.

How to choose λ (measured in examples/planted_teacher_l1ra.py): two speeds decide, and a start.

- By the penalty alone a gate takes 1 / (η_c λ) steps from 1 to 0: 10,000 to 50,000 with the
  paper's values. In trainings of some hundred steps these moved no rank.
- Adam moves a gate by about η_c times −m̂/√v̂ of its gradient. This pull lies between −1 and 1,
  whatever the scale of the loss, and gates stop falling where it is λ. So λ is of use between 0 and
  1.
- Of every rank, c ∂L/∂c = ⟨b, ∂L/∂b⟩: as a gate shrinks, its B grows, and where B is trained
  nothing holds the gate. Weight decay on A and B keeps B from making up for its gate.
- Ranks that start at the budget are all in use. Where one module has too few, the others learn what
  they can in its place, and their gates are pulled as strongly: in the study needed and unneeded
  layers both settled at a pull of λ, and no gate came to zero. With room (more ranks at the start
  than the budget), the gates of unneeded layers fell to 0.001, those of needed ones stayed above
  0.38.

So start with room, and let the first update prune down to the budget (`start`, `budget`):

    wrap(model, dict.fromkeys(names, 4 * rank), gate=1.0, scaling=2.0)
    optimizer = torch.optim.AdamW(adapters, lr=lr, weight_decay=0.1)
    l1ra = L1RA(model, optimizer, budget=rank * len(names), min_rank=0, interval=steps // 20,
                start=steps // 2, stop=steps // 2, l1=0.1, gate_lr=20 / steps)

The penalty alone then takes half of the training, and the ranks that are left train in the other
half. It closed 0.92 ± 0.04 of the gap between uniform and planted ranks, on teachers that the
search had not seen. Without a penalty (l1=0) the same closed 0.86 ± 0.06, and the best setting from
the budget 0.15 ± 0.10. All of it is from one task, in trainings of 600 steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from ..checks import as_generator, is_integer, quoted_names, require, warn_caller
from ..distributed import check_same, require_same
from ..layers.lora import LoRALinear
from ..layers.optimizers import Optimizers, Slot, as_optimizers, parameter_slots, set_learning_rate
from ..layers.resize import Resized, resize, separate_layers
from ..tensor_bytes import checksum
from .allocation import Allocation, Unit
from .allocator import KeepMasks, Ranks, RankScoreAllocator, mask_tensors
from .constraints import Bound, Constraints, check_unit
from .gates import Shrinkage, check_gates, gates_into_own_groups, shrink_in_optimizer
from .history import History, Update
from .reassign import reassign

# When to warn that l1 is too small: so many updates pruned nothing, all gates are above this value,
# and the penalty alone would take more intervals than this from a gate of 1 to 0. An interval is 5
# to 10 % of a training.
IDLE_UPDATES, IDLE_GATE, MOST_INTERVALS = 3, 0.9, 20

OPTIONS = (  # the attributes that `state_dict` saves
    *("l1", "gate_lr", "interval", "start", "stop", "budget", "unit", "min_rank", "max_rank"),
    *("threshold", "shrinkage", "reset_optimizer"),
)
STATE = ("ranks", "steps", "pending", "generator", "history", "options")


class L1RA(RankScoreAllocator):
    """Moves ranks between the gated LoRA layers of a model while an optimizer trains them.

    Call `step()` after every `optimizer.step()`. The gates get a parameter group of their own, in
    place, with learning rate `gate_lr` and no weight decay. (If they are in groups of their own
    already, these are checked.) That learning rate is set again before every optimizer step, so
    that no scheduler changes it. Make the scheduler after this object: it must know all groups.

    Args:
        model: with LoRA layers whose gates start from 1: wrap(model, ranks, gate=1.0).
        optimizer: the one that holds the gates; or a list of all that train the adapters, if the
            gates lie in several. Steps are counted by a hook, so a step that a GradScaler skips or
            that gradient accumulation puts off shrinks nothing. A wrapper that has the optimizer as
            its `optimizer`, such as accelerate's, will do too.
        l1: λ, the weight of the penalty. The default is the paper's value, which moves no rank in
            trainings of some hundred steps: see "How to choose λ" above. 0 shrinks nothing.
        gate_lr: η_c, the gates' own learning rate.
        interval: T, optimizer steps between updates; 5 to 10 % of the training in the paper.
        start: the first optimizer step that can be followed by an update.
        stop: the last one. Gates shrink until then, from the first step on. None: no end. Where the
            learning rate of A and B decays, a `stop` before the end keeps gates from shrinking
            while A and B can no longer make up for it.
        budget: what updates keep to, in `unit`. None: what the model has now. Another budget than
            now is reached by the first update.
        unit: "ranks", or "parameters" for Σ r · (d_out + d_in), as in `allocate`.
        min_rank, max_rank: bounds of a module's rank, one for all or {module: bound}.
        threshold: gates at or below it are pruned. None: 0 for the proximal shrinkage,
            gate_lr · l1 for the subgradient.
        shrinkage: "proximal", or "subgradient" for the authors' own.
        reset_optimizer: forget the state of all parameters at every update, as the authors' code.
        generator: a torch.Generator or a seed, for the A of fresh ranks. On several processes, the
            same seed on all.
        group: the processes that train this model together. Before every update they check that
            their trained parameters and generators are equal, bit for bit (see
            `minirank.distributed.check_same`). None: no communication. (A group cannot be copied or
            pickled: set `l1ra.group = None` before that.)

    Copies and pickles of (model, optimizer, l1ra) taken together go on as the originals would.

    Warns:
        UserWarning: `l1` is too small. Three updates in a row have pruned no rank, every gate is
            still above 0.9, and the penalty alone would take more than 20 intervals from a gate of
            1 to 0. This is said once, and not if `l1` is 0.
        UserWarning: a layer had been trained, with its gates, when this object was made, and no
            state has been loaded into it before the first `step()`. It counts steps from 0.

    Raises (model and optimizer are left unchanged):
        TypeError: `optimizer` is no torch.optim.Optimizer and no list of them; or one is LBFGS,
            which has one parameter group only, or keeps averaged parameters in an unknown way.
        ValueError: there is no gated layer; a gate is in no optimizer or in two, is frozen, or has
            a dtype too coarse to shrink in; layers share a parameter; a number is out of its range;
            the bounds make the budget impossible; a scheduler was made before.

    Source: L1RA (arXiv 2509.04884).

    >>> from minirank import wrap
    >>> model = nn.ModuleDict({"query": nn.Linear(4, 4), "value": nn.Linear(4, 4)})
    >>> layers = wrap(model, {"query": 2, "value": 2}, gate=1.0)
    >>> optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    >>> l1ra = L1RA(model, optimizer, interval=1, l1=1.0, gate_lr=0.25)
    >>> layers["query"].gate.data[0] = 0.125  # as if trained
    >>> optimizer.step()
    >>> l1ra.step().ranks  # 0.125 shrinks to 0, and that rank goes to "value"
    {'query': 1, 'value': 3}
    >>> l1ra.score()
    {'query': tensor([0.7500]), 'value': tensor([0.7500, 0.7500, 1.0000])}
    >>> l1ra.allocate(2).keep  # what an update would keep with a smaller budget
    {'query': tensor([True]), 'value': tensor([False, False,  True])}
    """

    method = "L1RA"
    grows = True

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizers,
        *,
        l1: float = 1e-3,
        gate_lr: float = 2e-2,
        interval: int,
        start: int = 0,
        stop: int | None = None,
        budget: int | None = None,
        unit: Unit = "ranks",
        min_rank: Bound = 1,
        max_rank: Bound = None,
        threshold: float | None = None,
        shrinkage: Shrinkage = "proximal",
        reset_optimizer: bool = False,
        generator: torch.Generator | int = 0,
        group: ProcessGroup | None = None,
    ) -> None:
        super().__init__(model)
        self._optimizers = as_optimizers(optimizer)
        self.optimizer = self._optimizers[0] if len(self._optimizers) == 1 else self._optimizers
        self.group = group
        self._layers = {
            name: layer for name, layer in separate_layers(model).items() if layer.gate is not None
        }
        self.l1 = l1
        self.gate_lr = gate_lr
        self.interval = interval
        self.start = start
        self.stop = stop
        self.unit: Unit = unit
        self.min_rank = min_rank
        self.max_rank = max_rank
        self.threshold = threshold
        self.shrinkage: Shrinkage = shrinkage
        self.reset_optimizer = reset_optimizer
        self._check_options()
        check_gates(self._layers, l1 * gate_lr)
        self.budget = self._budget_in_use() if budget is None else budget
        self._next_allocation()  # refuses an impossible budget now, not in the middle of training

        self._gate_groups = list(
            gates_into_own_groups(self._optimizers, self.gates, gate_lr).items()
        )
        self.generator = as_generator(generator)
        self.history = History(self.ranks)
        # Of each optimizer that holds gates: the steps that `step` has seen, and has not seen yet.
        self._seen = [0] * len(self._gate_groups)
        self._pending = [0] * len(self._gate_groups)
        self._warned_of_small_l1 = False
        self._trained_before = _first_trained(self._layers)
        self._watch_optimizers()

    # ---- scores and allocations -----------------------------------------------------------------

    @property
    def gates(self) -> dict[str, nn.Parameter]:
        """{module: gates, (r,)}: the parameters themselves."""
        return {name: layer.gate for name, layer in self._layers.items() if layer.gate is not None}

    @property
    def steps(self) -> int:
        """Optimizer steps that `step` has seen; of several optimizers with gates, the most."""
        return max(self._seen)

    @property
    def ranks(self) -> dict[str, int]:
        """{module: present rank}"""
        return {name: layer.rank for name, layer in self._layers.items()}

    def score(self) -> dict[str, Tensor]:
        """The gates: {module: (r,)}. Updates read the gates themselves, whatever is scored."""
        return self.store_scores(self.gates)

    def allocate(
        self, budget: int, *, unit: Unit = "ranks", min_rank: Bound = 1, max_rank: Bound = None
    ) -> Allocation:
        """What an update would do with the scored gates and this budget. See `Allocator.allocate`;
        `min_rank` is 1 by default, as for updates."""
        return super().allocate(budget, unit=unit, min_rank=min_rank, max_rank=max_rank)

    def ranks_from_scores(
        self, scores: Mapping[str, Tensor], constraints: Constraints
    ) -> tuple[Ranks, KeepMasks]:
        ranks, keep = reassign(
            {name: score.tolist() for name, score in scores.items()},
            constraints.budget,
            constraints.lower,
            constraints.upper,
            costs=constraints.budget_costs,
            threshold=self._pruning_threshold(),
        )
        return ranks, mask_tensors(keep)

    def _pruning_threshold(self) -> float:
        if self.threshold is not None:
            return self.threshold
        return self.gate_lr * self.l1 if self.shrinkage == "subgradient" else 0.0

    def _next_allocation(self) -> Allocation:
        """What an update would do now."""
        constraints = self._constraints(
            self.gates, self.budget, self.unit, self.min_rank, self.max_rank
        )
        return self._divide(self.gates, constraints)

    def _budget_in_use(self) -> int:
        """What the present ranks take, in `unit`."""
        if self.unit == "ranks":
            return sum(self.ranks.values())
        return sum(layer.rank * layer.rank_cost for layer in self._layers.values())

    # ---- training -------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self) -> Update | None:
        """Call after `optimizer.step()`: shrinks the gates, and moves ranks at every interval.

        Every gate that trains is shrunk once for each step of its optimizer since the last call.
        If there was no optimizer step, nothing happens.

        Returns:
            What an update did, if there was one. `history` records it too.

        Raises (before anything changes):
            RuntimeError: the optimizer does not hold a parameter of a layer, since
                `load_state_dict` or `resize` has replaced it.
        """
        if not any(self._pending):
            return None
        slots = self._checked_slots()
        if self._trained_before is not None:
            _warn_of_unknown_steps(self._trained_before)
            self._trained_before = None
        before = self.steps
        for i, (optimizer, _) in enumerate(self._gate_groups):
            taken, self._pending[i] = self._pending[i], 0
            left = taken if self.stop is None else max(0, min(taken, self.stop - self._seen[i]))
            self._seen[i] += taken
            self._shrink(slots, optimizer, left)
        return self._update() if self._has_update_between(before, self.steps) else None

    def _checked_slots(self) -> dict[int, Slot]:
        """The places of all parameters in the optimizers.

        Raises RuntimeError if a parameter that trains has none.
        """
        slots = parameter_slots(self._optimizers)
        for name, layer in self._layers.items():
            for key, parameter in layer._parameters.items():
                if parameter is not None and id(parameter) not in slots and parameter.requires_grad:
                    raise RuntimeError(
                        f"the optimizer does not hold {name}.{key}, so this does not train: "
                        "after load_state_dict() with other ranks, or resize() without the "
                        "optimizer, make the optimizer, L1RA and the scheduler anew. Or call "
                        "resize(model, ranks, optimizer) before load_state_dict()"
                    )
        return slots

    def _shrink(self, slots: Mapping[int, Slot], optimizer: Optimizer, times: int) -> None:
        """Shrink the gates that this optimizer trains."""
        if times == 0:
            return
        trained = {  # the user may freeze layers for a time
            gate: slots[id(gate)]
            for gate in self.gates.values()
            if gate.requires_grad and slots[id(gate)].optimizer is optimizer
        }
        shrink_in_optimizer(trained, times * self.gate_lr * self.l1, self.shrinkage)

    def _has_update_between(self, before: int, now: int) -> bool:
        """Whether an update is due after one of the optimizer steps before + 1 … now."""
        latest = now // self.interval * self.interval
        in_window = self.start <= latest and (self.stop is None or latest <= self.stop)
        return latest > before and in_window

    def _update(self) -> Update:
        """Prune, reassign, resize and record."""
        if self.group is not None:
            check_same(self.model, self.group)
            advice = "Give L1RA one seed on all processes."
            state = checksum({"": self.generator.get_state()})
            require_same("the state of L1RA's generator", state, advice, self.group)
        before = self.ranks
        allocation = self._next_allocation()
        resized = resize(self.model, allocation, self.optimizer, generator=self.generator)
        if self.reset_optimizer:
            for optimizer in self._optimizers:
                optimizer.state.clear()
        update = _record(self.steps, before, allocation, resized)
        self.history.updates.append(update)
        if self._l1_is_too_small() and not self._warned_of_small_l1:
            self._warned_of_small_l1 = True
            steps = round(1 / (self.gate_lr * self.l1))
            warn_caller(
                f"{IDLE_UPDATES} updates in a row pruned no rank, and every gate is still above "
                f"{IDLE_GATE}. With l1={self.l1:g} and gate_lr={self.gate_lr:g}, the penalty alone "
                f"takes {steps:,} steps from a gate of 1 to 0: take a larger l1 (start with 0.3) "
                "or gate_lr, or l1=0 if no rank is to move",
            )
        return update

    def _l1_is_too_small(self) -> bool:
        """Whether the last updates pruned nothing, and no gate will soon be at the threshold."""
        last = self.history.updates[-IDLE_UPDATES:]
        if self.l1 == 0 or len(last) < IDLE_UPDATES or any(update.pruned for update in last):
            return False
        if MOST_INTERVALS * self.interval * self.gate_lr * self.l1 >= 1:
            return False
        shrinking = [gate for gate in self.gates.values() if gate.requires_grad]
        return bool(shrinking) and all(bool((gate > IDLE_GATE).all()) for gate in shrinking)

    def _watch_optimizers(self) -> None:
        for i, (optimizer, groups) in enumerate(self._gate_groups):
            optimizer.register_step_pre_hook(partial(self._hold_gate_lr, groups))
            optimizer.register_step_post_hook(partial(self._count_step, i))

    def _hold_gate_lr(
        self, groups: list[int], optimizer: Optimizer, args: object, kwargs: object
    ) -> None:
        for group in groups:
            set_learning_rate(optimizer.param_groups[group], self.gate_lr)

    def _count_step(self, i: int, optimizer: Optimizer, args: object, kwargs: object) -> None:
        # A GradScaler calls fused optimizers even for a step that they are to skip, and tells them
        # by this attribute.
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is None or not found_inf.item():
            self._pending[i] += 1

    # ---- saving ---------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything of this object but the model and the optimizer, which have their own.

        "steps" and "pending" are numbers; with several optimizers that hold gates, lists of them.

        To go on: wrap(model, …) as at the beginning; model.load_state_dict(…), which brings the
        ranks of then; make the optimizer, L1RA and the scheduler as at the beginning; then load
        their states. Where these objects exist before the model's state is loaded, begin with
        resize(model, state["ranks"], optimizer).
        """
        return {
            "ranks": self.ranks,
            "steps": self.steps if len(self._seen) == 1 else list(self._seen),
            "pending": self._pending[0] if len(self._seen) == 1 else list(self._pending),
            "generator": self.generator.get_state(),
            "history": self.history.state_dict(),
            "options": {name: getattr(self, name) for name in OPTIONS},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a `state_dict()`, its options too.

        Raises (this object is left unchanged):
            ValueError: `state` is not the state of an L1RA, or was saved at other ranks than the
                model has: load the model's state first.
            RuntimeError: the optimizer does not hold a parameter of a layer.
        """
        self._check_state(state)
        self._checked_slots()
        history = History.from_state_dict(state["history"])
        # Generators take their state from the CPU, and torch.load(map_location="cuda") moves it.
        self.generator.set_state(state["generator"].cpu())
        self.history = history
        self._trained_before = None  # what was done before is known now
        self._seen, self._pending = _listed(state["steps"]), _listed(state["pending"])
        for name in OPTIONS:
            setattr(self, name, state["options"][name])
        if state["options"]["unit"] == "rank":  # what version 0.1 called it
            self.unit = "ranks"

    def _check_state(self, state: Mapping[str, Any]) -> None:
        if state.keys() != set(STATE) or state["options"].keys() != set(OPTIONS):
            raise ValueError(
                f"expected the state_dict() of an L1RA, with {sorted(STATE)}; got {sorted(state)}"
            )
        optimizers = len(_listed(state["steps"]))
        if optimizers != len(self._seen):
            raise ValueError(
                f"the state was saved with {optimizers} optimizers that held gates, but now it is "
                f"{len(self._seen)}: make the optimizers as in the training that was saved"
            )
        ranks, saved = self.ranks, state["ranks"]
        different = [name for name in {**ranks, **saved} if ranks.get(name) != saved.get(name)]
        if different:
            raise ValueError(
                "the state was saved at other ranks than the model's (at "
                f"{quoted_names(different)}): load the model's state first, and make the optimizer "
                'and L1RA after it. Or resize(model, state["ranks"], optimizer), then load the '
                "states of model, optimizer and L1RA"
            )

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._watch_optimizers()  # an optimizer's copy has no hooks

    def _check_options(self) -> None:
        require(0 <= self.l1 < math.inf, "l1", self.l1, "a finite number of at least 0")
        require(0 < self.gate_lr < math.inf, "gate_lr", self.gate_lr, "a finite positive number")
        steps = "an integer number of steps, at least"
        require(is_integer(self.interval, 1), "interval", self.interval, f"{steps} 1")
        require(is_integer(self.start, 0), "start", self.start, f"{steps} 0")
        require(
            self.stop is None or is_integer(self.stop, self.start),
            "stop",
            self.stop,
            f"None or {steps} start = {self.start}",
        )
        require(
            self.shrinkage in get_args(Shrinkage),
            "shrinkage",
            self.shrinkage,
            f"one of {get_args(Shrinkage)}",
        )
        require(
            self.threshold is None or 0 <= self.threshold < 1,
            "threshold",
            self.threshold,
            "None, or at least 0 and below 1, where gates start",
        )
        check_unit(self.unit)


def _listed(counts: int | list[int]) -> list[int]:
    """Steps by optimizer, from a state that gives one number if there is one optimizer."""
    return [counts] if isinstance(counts, int) else list(counts)


def _first_trained(layers: Mapping[str, LoRALinear]) -> str | None:
    """The first module that has steps behind it: its gate and its B have left their start, at which
    B is 0. (A user who gives single gates another start leaves B at 0.)"""
    for name, layer in layers.items():
        if layer.gate is None or layer.initial_gate is None or layer.rank == 0:
            continue
        start = torch.full_like(layer.gate, layer.initial_gate)
        if not torch.equal(layer.gate, start) and bool(layer.lora_B.any()):
            return name
    return None


def _warn_of_unknown_steps(name: str) -> None:
    warn_caller(
        f"{name!r} had been trained, with its gates, when this L1RA was made, and no state has "
        "been loaded into it. So it counts its steps from 0, and moves ranks at other times than "
        "the training before would have. To go on with that training, load the state that was "
        "saved: l1ra.load_state_dict(state), before the first step. If this is a new start, "
        "nothing is wrong"
    )


def _record(
    step: int, before: Mapping[str, int], allocation: Allocation, resized: Mapping[str, Resized]
) -> Update:
    """What an update from the ranks `before` to `allocation` did, for the history."""
    kept = {name: int(change.keep.sum()) for name, change in resized.items()}
    after = allocation.ranks
    return Update(
        step=step,
        ranks=after,
        pruned={name: before[name] - n for name, n in kept.items() if before[name] > n},
        given={name: after[name] - n for name, n in kept.items() if after[name] > n},
        parameters=allocation.parameters,
        state_reset=tuple(
            f"{name}.{entry}" for name, change in resized.items() for entry in change.state_reset
        ),
    )
