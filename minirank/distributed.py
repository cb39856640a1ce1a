"""Several processes: what minirank's methods need of torch.distributed, explicit and exact.

Nothing here starts processes, shards a model or keeps a state. The engine is torch.distributed as
the user runs it: torchrun, DDP, FSDP2, accelerate. Every function is a collective of `group` (None:
the default group): all its processes call it. Nothing else in minirank communicates, unless it gets
a `group` or a `pooled` curvature.

    every process scores a shard of the data   SensitivityLoRA(…, curvature=pooled(gauss_newton))
    the processes share out the coalitions     ShapLoRA(…, group=dist.group.WORLD)
    training without DDP                       loss.backward(); sync_gradients(model)
    training with DDP                          if l1ra.step(): refresh(ddp)
    does every process have the same model?    check_same(model); L1RA(…, group=dist.group.WORLD)
    one allocation for all                     from_first(allocation)

Recipes. DDP: make it after `wrap`, without find_unused_parameters, and with init_sync=False if all
processes have loaded the same base. A DDP that does not know a layer's present parameters is
refused at the next forward pass. FSDP2: fully_shard(model, …) first, then wrap(model, …), so that
whole adapters lie beside a sharded base; then `sync_gradients`, and `group=` for save_adapter and
load_adapter. Loaders repeat samples to give all processes as many, which a mean counts twice:
drop_last=True for DistributedSampler, even_batches=False for accelerate.

A LoRA model hardly needs DDP: its base is frozen, and `sync_gradients` sends what DDP would send.
L1RA needs no communication of its own, since equal gradients give equal gates, equal ranks and
equal fresh rows.

An error on one process is raised on all of them, at the next collective. A process that has died,
or that waits elsewhere, is noticed when the group's timeout ends.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from types import FunctionType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .curvature.estimate import Estimate
from .curvature.unreached import IdleLayerWarning, warn_of_idle_layers
from .layers.targets import Targets
from .measure import LossFn
from .placement import is_distributed, is_sharded
from .tensor_bytes import checksum

Value = TypeVar("Value")
DISPATCHER = "DataLoaderDispatcher"  # of accelerate: process 0 reads, all get a part
TESTED_DDP = ("2.13.",)  # `refresh` uses DDP's insides: the versions of torch that tests ran on


# ---- agreement ----------------------------------------------------------------------------------


def gathered(value: Value, group: dist.ProcessGroup | None = None) -> list[Value]:
    """The `value` of every process, in the order of the group."""
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def on_all(work: Callable[[], Value], group: dist.ProcessGroup | None = None) -> Value:
    """work(), done by every process. If it raises on one process, all of them raise.

    Raises:
        Exception: what the process's own work raised; RuntimeError where only others failed.
    """
    error: Exception | None = None
    try:
        result = work()
    except Exception as raised:  # of any kind: the other processes wait for an answer
        error = raised
    messages = gathered(None if error is None else f"{type(error).__name__}: {error}", group)
    if error is not None:
        raise error
    for process, message in enumerate(messages):
        if message is not None:
            raise RuntimeError(f"process {process} of {len(messages)} raised {message}")
    return result


def require_same(
    what: str, value: object, advice: str, group: dist.ProcessGroup | None = None
) -> None:
    """Raise RuntimeError on all processes unless all have the same `value`."""
    values = gathered(value, group)
    for process, other in enumerate(values):
        if other != values[0]:
            raise RuntimeError(
                f"{what} differs between processes: {values[0]!r:.300} on process 0, "
                f"{other!r:.300} on process {process}. {advice}"
            )


def from_first(value: Value, group: dist.ProcessGroup | None = None) -> Value:
    """The `value` of the group's first process, on every process.

    Processors of different kinds can round equal scores to different ranks. Then let all processes
    take one Allocation: `allocation = from_first(allocator.allocate(budget))`.
    """
    values = [value]
    source = 0 if group is None else dist.get_global_rank(group, 0)
    dist.broadcast_object_list(values, src=source, group=group)
    return values[0]


# ---- scores -------------------------------------------------------------------------------------


def pooled(
    curvature: Callable[..., Mapping[str, Tensor]], group: dist.ProcessGroup | None = None
) -> Pooled:
    """A curvature for `SensitivityLoRA` that every process measures on batches of its own.

    Each process measures its shard of the data, and the weighted means of all shards are taken: one
    all-reduce per layer, in the order of their names. So the scores and the ranks are those of one
    process with all batches, and equal on all processes. With `groups=`, group i is measured by all
    processes together; each must have the same number of batches.

    Matrix diagonals are as large as the model's matrices, on every process. If that is too much,
    take `input_second_moment`, or score slices of the targets one after the other and keep the
    three metrics of Eqs 8–10: `matrix_metrics(diagonals.values())` of each slice, joined by
    torch.cat(…, 1), and `sensitivity_metrics` of all (minirank.allocators.sensitivity).

    Args:
        curvature: an estimator of `minirank.curvature`, with functools.partial for its options, or
            your own. Estimators with random vectors need a generator of another seed on every
            process.

    Raises, on all processes:
        RuntimeError: another process raised an error, or has other targets, shapes or types; two
            processes draw from generators in the same state; with `groups=` or a sharded model,
            unequal numbers of batches.
        ValueError: `tolerance=` with a sharded model.

    >>> from minirank import SensitivityLoRA
    >>> from minirank.curvature import gauss_newton
    >>> SensitivityLoRA(model, loss_fn, shard, curvature=pooled(gauss_newton))  # doctest: +SKIP
    """
    return Pooled(curvature, group)


def number_of_shards(batches: object) -> int:
    """Over how many processes a loader spreads its data; 1 for anything else.

    Known are torch's DistributedSampler, and what accelerate makes of loaders.
    """
    batch_sampler = getattr(batches, "batch_sampler", None)
    samplers = (
        *(getattr(batches, name, None) for name in ("sampler", "dataset")),
        *(batch_sampler, getattr(batch_sampler, "sampler", None)),
        getattr(batches, "state", None) if type(batches).__name__ == DISPATCHER else None,
    )
    counts = [
        getattr(sampler, attribute, 1)
        for sampler in samplers
        for attribute in ("num_replicas", "num_processes")
    ]
    return max(count if isinstance(count, int) else 1 for count in counts)


class Pooled:
    """What `pooled` returns."""

    def __init__(
        self, curvature: Callable[..., Mapping[str, Tensor]], group: dist.ProcessGroup | None
    ) -> None:
        self.curvature = curvature
        self.group = group

    def __call__(
        self, model: nn.Module, loss_fn: LossFn, batches: Iterable[Any], targets: Targets = None
    ) -> Estimate:
        self._require_unlike_generators()
        own = on_all(lambda: self._measured(model, loss_fn, batches, targets), self.group)
        # In the model's order, in which equal scores are rounded.
        layers = [(name, tuple(h.shape), str(h.dtype)) for name, h in own.items()]
        require_same("what was measured", (own.over, layers), "Give all one model.", self.group)
        shares = gathered(_without_diagonals(own), self.group)
        weights = {name: sum(share.weights[name] for share in shares) for name in own}
        diagonals = {name: self._mean(own, name, weights[name]) for name in sorted(own)}
        return Estimate(
            {name: diagonals[name] for name in own},
            samples=(sum if own.over == "batches" else min)(share.samples for share in shares),
            over=own.over,
            standard_errors={name: _standard_error(name, shares) for name in own},
            weights=weights,
            idle=self._idle_on_all(shares),
        )

    def next_batches(self, stream: Iterator[Any], count: int) -> list[Any]:
        """Up to `count` batches of this process. Raises unless all processes have as many."""
        batches = on_all(lambda: list(islice(stream, count)), self.group)
        advice = "With groups=, every process needs the same number of batches."
        require_same("the number of batches left", len(batches), advice, self.group)
        return batches

    def _measured(
        self, model: nn.Module, loss_fn: LossFn, batches: Iterable[Any], targets: Targets
    ) -> Estimate:
        """The curvature of this process's batches. What is no Estimate weighs as many batches."""
        in_step = is_distributed(model)
        if in_step and "tolerance" in getattr(self.curvature, "keywords", {}):
            raise ValueError(
                "the model is sharded over processes, which have to take as many batches, and with "
                "tolerance= each of them would stop by itself: leave it out"
            )
        counted = _Counted(batches, self._require_another if in_step else None)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", IdleLayerWarning)  # _idle_on_all() asks all processes
            diagonals = self.curvature(model, loss_fn, counted, targets)
        if isinstance(diagonals, Estimate):
            return diagonals
        return Estimate(
            diagonals,
            samples=counted.count,
            over="batches",
            standard_errors=dict.fromkeys(diagonals, math.inf),
            weights=dict.fromkeys(diagonals, float(counted.count)),
        )

    def _require_another(self, another: bool) -> None:
        """The passes of a sharded model wait for each other."""
        advice = "The model is sharded, so that every process needs the same number of batches."
        require_same("whether there is another batch", another, advice, self.group)

    def _mean(self, own: Estimate, name: str, weight: float) -> Tensor:
        """Σ over processes of weight · diagonal, over the sum of their weights."""
        share = own.weights[name] / weight if weight else 0.0
        # all_reduce adds memory to memory, and layouts may differ between processes.
        mean = (own[name].detach() * share).contiguous()
        dist.all_reduce(mean, group=self.group)
        return mean

    def _idle_on_all(self, shares: list[Estimate]) -> tuple[str, ...]:
        """The layers that no batch of any process reached, with a warning."""
        idle = [name for name in shares[0].idle if all(name in share.idle for share in shares)]
        warn_of_idle_layers(idle)
        return tuple(idle)

    def _require_unlike_generators(self) -> None:
        """Equal random vectors on all processes would make the standard errors too small by the
        square root of their number."""
        states = [checksum({"": generator.get_state()}) for generator in generators(self.curvature)]
        every_state = gathered(states, self.group)
        for process, other in enumerate(every_state):
            for earlier in range(process):
                if set(other) & set(every_state[earlier]):
                    raise RuntimeError(
                        f"processes {earlier} and {process} draw their random vectors from "
                        "generators in the same state: seed with seed + dist.get_rank()"
                    )


class _Counted:
    """Batches that count how many were taken. `ask` is told before each whether there is one."""

    def __init__(self, batches: Iterable[Any], ask: Callable[[bool], None] | None) -> None:
        self.batches = batches
        self.ask = ask or (lambda another: None)
        self.count = 0

    def __iter__(self) -> Iterator[Any]:
        self.count = 0
        for batch in self.batches:
            self.ask(True)
            self.count += 1
            yield batch
        self.ask(False)


def generators(value: object, depth: int = 3) -> list[torch.Generator]:
    """The random generators that a function holds: as an argument of functools.partial, as a
    variable or a default, or as an attribute of its object.

    >>> generator = torch.Generator()
    >>> generators(lambda: generator) == [generator]
    True
    """
    if isinstance(value, torch.Generator):
        return [value]
    if depth == 0 or not callable(value) or isinstance(value, (type, nn.Module)):
        return []
    held = [getattr(value, "__self__", None), *getattr(value, "__dict__", {}).values()]
    if isinstance(value, functools.partial):
        held += [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, FunctionType):
        held += [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
        with contextlib.suppress(ValueError):  # a variable that has no value yet
            variables = inspect.getclosurevars(value)
            held += [*variables.nonlocals.values(), *variables.globals.values()]
    found = [generator for one in held for generator in generators(one, depth - 1)]
    return list({id(generator): generator for generator in found}.values())


def _without_diagonals(estimate: Estimate) -> Estimate:
    """Everything of an estimate but the diagonals, which are large."""
    return Estimate(
        {},
        samples=estimate.samples,
        over=estimate.over,
        standard_errors=estimate.standard_errors,
        weights=estimate.weights,
        traces=estimate.traces,
        idle=estimate.idle,
    )


def _standard_error(name: str, shares: list[Estimate]) -> float:
    """Of the weighted mean of one layer's traces."""
    traces = [share.traces[name] for share in shares if share.traces is not None]
    if len(traces) == len(shares) and shares[0].over == "batches":
        return functools.reduce(lambda a, b: a.joined(b), traces).standard_error
    total = sum(share.weights[name] for share in shares)
    parts = [
        share.weights[name] / total * share.standard_errors[name]
        for share in shares
        if share.weights[name]
    ]
    return math.hypot(*parts)  # the shares are independent


# ---- training -----------------------------------------------------------------------------------


@torch.no_grad()
def sync_gradients(model: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """Average the gradients of the trained parameters over the processes, in place.

    Call it after the last backward pass of a step, and before clipping. It takes the place of DDP:
    one all-reduce for each dtype. A parameter that has a gradient on some processes only counts as
    zero on the others; one that has none anywhere keeps none. DTensors are left alone, since FSDP2
    averages them. Parameters belong together by their names, in whatever order a model has them.

    Raises, on all processes:
        RuntimeError: the processes train different parameters, or parameters of unequal shapes; or
            a gradient is sparse.
    """
    named = sorted(
        (name, p) for name, p in model.named_parameters() if p.requires_grad and not is_sharded(p)
    )
    trained = [p for _, p in named]
    if not trained:
        return
    device = trained[0].device
    _require_same_shapes(named, device, group)
    kinds_here = [0 if p.grad is None else 2 if p.grad.is_sparse else 1 for p in trained]
    has_gradient = torch.tensor(kinds_here, device=device)
    dist.all_reduce(has_gradient, dist.ReduceOp.MAX, group=group)
    if has_gradient.max() == 2:
        name = named[int(has_gradient.argmax())][0]
        raise RuntimeError(f"the gradient of {name!r} is sparse: make its embedding sparse=False")
    kinds: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = {}
    for parameter, has in zip(trained, has_gradient.tolist(), strict=True):
        if has:
            kinds.setdefault((parameter.dtype, parameter.device), []).append(parameter)
    for parameters in kinds.values():
        _average_gradients(parameters, group)


def _require_same_shapes(
    trained: list[tuple[str, nn.Parameter]], device: torch.device, group: dist.ProcessGroup | None
) -> None:
    """Raise RuntimeError on all processes unless all train the same parameters, by their number
    and a digest of names and shapes: two numbers, which cost next to nothing at every step."""
    shapes = str([(name, tuple(p.shape), p.dtype) for name, p in trained]).encode()
    digest = int.from_bytes(hashlib.sha256(shapes).digest()[:7], "big")
    own = torch.tensor([len(trained), digest], device=device)
    every = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, own, group=group)
    for process, other in enumerate(every):
        if not torch.equal(other, every[0]):
            raise RuntimeError(
                f"process {process} trains {int(other[0])} parameters, and process 0 "
                f"{int(every[0][0])}, or their names, shapes or types differ: the processes have "
                "drifted apart (check_same(model) names where)"
            )


def _average_gradients(parameters: list[nn.Parameter], group: dist.ProcessGroup | None) -> None:
    """The gradients of parameters of one dtype on one device, averaged in one all-reduce."""
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    flat /= dist.get_world_size(group)
    dist.all_reduce(flat, group=group)
    sizes = [gradient.numel() for gradient in gradients]
    for parameter, gradient, mean in zip(
        parameters, gradients, flat.split_with_sizes(sizes), strict=True
    ):
        gradient.copy_(mean.view_as(gradient))
        parameter.grad = gradient


def check_same(model: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """Raise RuntimeError on all processes unless their trained parameters are equal bit for bit.

    It sends a checksum for every parameter. DTensors are left out: each process has another shard.
    `L1RA(…, group=…)` calls it before every update.

    Raises, on all processes:
        RuntimeError: names the first parameter that differs, and the usual reasons.
    """
    own = {
        name: (tuple(p.shape), str(p.dtype), checksum({"": p}))
        for name, p in model.named_parameters()
        if p.requires_grad and not is_sharded(p)
    }
    every = gathered(own, group)
    for process, other in enumerate(every):
        if other == every[0]:
            continue
        names = [*every[0], *other]
        name = next(n for n in names if every[0].get(n) != other.get(n))
        raise RuntimeError(
            f"{name!r} is not the same on process 0 ({_described(every[0], name)}) and process "
            f"{process} ({_described(other, name)}). The processes have drifted apart: average the "
            "gradients (sync_gradients, or DDP: made after wrap, and refresh(ddp) after every "
            "update that moves ranks), and start all from one seed"
        )


def _described(parameters: Mapping[str, tuple[Any, ...]], name: str) -> str:
    if name not in parameters:
        return "not trained there"
    shape, dtype, digest = parameters[name]
    return f"shape {shape}, {dtype}, checksum {digest[:8]}"


def refresh(ddp: DistributedDataParallel) -> None:
    """Let a DistributedDataParallel take up the parameters that its module has now.

    Call it on every process after an update that moved ranks, or after `wrap` or `resize`. The same
    object goes on, so that accelerate and Trainer keep it. The base is not broadcast, as making
    DDP anew would: all processes have resized alike, and `check_same` tells whether they have.

    DDP waits for a gradient of every parameter, and a layer of rank 0 gives none: keep min_rank at
    1, the default of L1RA.

    Raises:
        TypeError: `ddp` is no DistributedDataParallel.
        RuntimeError: a version of torch that no test of this function ran on, or a DDP with a
            communication hook, a static graph or mixed precision: make DDP anew, with
            init_sync=False.
    """
    if not isinstance(ddp, DistributedDataParallel):
        raise TypeError(
            f"expected a DistributedDataParallel, got {type(ddp).__name__}: give the object that "
            "DDP(model), accelerator.prepare(model) or trainer.model_wrapped is"
        )
    reasons = {
        f"torch {torch.__version__}, which it was not tested with": not str(
            torch.__version__
        ).startswith(TESTED_DDP),
        "a communication hook": bool(getattr(ddp, "_comm_hooks", ())),
        "a static graph": ddp.static_graph,
        "mixed precision": ddp.mixed_precision is not None,
    }
    for reason, holds in reasons.items():
        if holds:
            raise RuntimeError(
                f"refresh() cannot renew a DDP with {reason}: make it anew, "
                "DistributedDataParallel(model, init_sync=False)"
            )
    ddp._module_parameters = [
        parameter
        for name, parameter in ddp.module.named_parameters()
        if name not in ddp.parameters_to_ignore
    ]
    insides: Any = ddp  # torch gives these methods no types
    parameters, expect_sparse = insides._build_params_for_reducer()
    names = insides._build_debug_param_to_name_mapping(parameters)
    insides._ddp_init_helper(parameters, expect_sparse, names, ddp.static_graph)
    ddp._has_rebuilt_buckets = False
