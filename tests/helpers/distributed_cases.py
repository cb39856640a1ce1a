"""What the tests of several processes run on every process, and on one process to compare with."""

from __future__ import annotations

import functools
import warnings

import torch
import torch.distributed as dist
from helpers.packed import Int8Linear
from torch import nn
from torch.distributed import fsdp
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from minirank import (
    L1RA,
    SensitivityLoRA,
    ShapLoRA,
    export_peft,
    linear_targets,
    load_adapter,
    lora_layers,
    merge,
    resize,
    save_adapter,
    wrap,
)
from minirank.allocators.sensitivity import matrix_metrics, sensitivity_metrics
from minirank.curvature import (
    empirical_fisher,
    exact_hessian_diagonal,
    gauss_newton,
    hutchinson_outputs,
    hutchinson_weights,
    input_second_moment,
)
from minirank.distributed import check_same, from_first, pooled, refresh, sync_gradients

DETERMINISTIC = {
    "input_second_moment": input_second_moment,
    "exact_hessian_diagonal": exact_hessian_diagonal,
    "gauss_newton": gauss_newton,
    "empirical_fisher": empirical_fisher,
}
SAMPLED = {
    "hutchinson_outputs": functools.partial(hutchinson_outputs, samples=40),
    "hutchinson_weights": functools.partial(hutchinson_weights, samples=40),
    "gauss_newton by signs": functools.partial(gauss_newton, samples=40),
}


def rank_and_count():
    return dist.get_rank(), dist.get_world_size()


def small_model():
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 3)
    ).double()
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.double) / 2
    return model


def batches_of(sizes):
    """One batch of each size, with inputs of unlike scale, so that the shards differ."""
    generator = torch.Generator().manual_seed(1)
    batches = []
    for i, size in enumerate(sizes):
        x = torch.randn(size, 6, generator=generator, dtype=torch.double) * (1 + i)
        batches.append((x, torch.randint(0, 3, (size,), generator=generator)))
    return batches


def cross_entropy(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def shard(batches):
    rank, count = rank_and_count()
    return batches[rank::count]


# ---- scores -------------------------------------------------------------------------------------


def estimate(name, batches):
    """A deterministic curvature, with all that it knows of itself."""
    return _described(DETERMINISTIC[name](small_model(), cross_entropy, batches))


def pooled_estimate(name, batches):
    curvature = pooled(DETERMINISTIC[name])
    return _described(curvature(small_model(), cross_entropy, shard(batches)))


def pooled_sample(name, batches):
    generator = torch.Generator().manual_seed(10 + dist.get_rank())
    curvature = pooled(functools.partial(SAMPLED[name], generator=generator))
    return _described(curvature(small_model(), cross_entropy, shard(batches)))


def _described(result):
    errors, weights = dict(result.standard_errors), dict(result.weights)
    return dict(result), errors, weights, result.samples


BUDGET = 12


def stability(batches):
    """With groups, on one process."""
    return _sure_ranks(SensitivityLoRA(small_model(), cross_entropy, batches, groups=4))


def pooled_stability(batches):
    curvature = pooled(input_second_moment)
    model = small_model()
    return _sure_ranks(
        SensitivityLoRA(model, cross_entropy, shard(batches), curvature=curvature, groups=4)
    )


def _sure_ranks(allocator):
    theta = allocator.score()
    stability, ranks = allocator.stability(BUDGET), allocator.allocate(BUDGET).ranks
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the ranks are not settled")
        settled = allocator.settle(BUDGET, max_moved=4)
    return (
        theta,
        ranks,
        (stability.max_moved, dict(stability.intervals), stability.same, stability.groups),
        (settled.max_moved, settled.batches, dict(settled.allocation.ranks)),
    )


def theta_by_slices(batches):
    """One layer's diagonal at a time: only its three metrics are kept."""
    curvature, metrics = pooled(empirical_fisher), []
    for name in linear_targets(model := small_model()):
        diagonal = curvature(model, cross_entropy, shard(batches), [name])
        metrics.append(matrix_metrics(diagonal.values()))
    return sensitivity_metrics(torch.cat(metrics, 1)).theta


def pooled_of_other_layout():
    """A curvature of the user's own, whose memory on process 0 is in another order."""

    def rising(model, loss_fn, batches, targets):
        assert list(batches)
        h = torch.arange(6.0).view(2, 3)
        return {"only": h if dist.get_rank() else h.t().contiguous().t()}

    return pooled(rising)(small_model(), cross_entropy, batches_of([2]))["only"]


class InOrder(nn.Module):
    """Layers of one shape, which the process's model has in the order of their names or not."""

    def __init__(self, names):
        super().__init__()
        for name in names:
            setattr(self, name, nn.Linear(2, 2, bias=False))

    def forward(self, x):
        return self.a(x) + self.b(x)


def in_other_order():
    return InOrder("ba" if dist.get_rank() else "ab")


def score_in_other_order():
    return pooled(input_second_moment)(
        in_other_order(), lambda m, x: m(x).sum(), [torch.ones(1, 2)]
    )


def gradients_in_other_order():
    model = in_other_order()
    model.a.weight.grad, model.b.weight.grad = torch.ones(2, 2), torch.zeros(2, 2)
    sync_gradients(model)
    return model.a.weight.grad, model.b.weight.grad


def ddp_with_buffers():
    torch.manual_seed(0)
    return DistributedDataParallel(nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)))


def score_on_one_process(batches):
    """With a DDP, which sends its buffers at every pass."""
    ddp = ddp_with_buffers()
    scores = None
    if dist.get_rank() == 0:
        batches = [(x.float(), y) for x, y in batches]
        scores = SensitivityLoRA(ddp, cross_entropy, batches, progress=False).score()
    dist.barrier()
    ddp(torch.ones(2, 6)).sum().backward()  # the DDP works as before
    return from_first(scores)


# ---- ShapLoRA -----------------------------------------------------------------------------------


def trained_trial():
    """Gated layers with all parameters away from their start."""
    model = small_model()
    wrap(model, {"0": 3, "2": 2, "4": 2}, gate=0.0)
    generator = torch.Generator().manual_seed(2)
    for layer in lora_layers(model).values():
        for parameter in layer.parameters(recurse=False):
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.double)
    return model


def shapley_scores(batches, coalitions, group=None):
    model = trained_trial()
    shaplora = ShapLoRA(
        model, cross_entropy, batches, coalitions=coalitions, group=group, progress=False
    )
    return shaplora.score(), shaplora.standard_errors


def shared_shapley_scores(batches, coalitions):
    return shapley_scores(batches, coalitions, dist.group.WORLD)


def settled_shapley_scores(batches, max_moved, group=None):
    shaplora = ShapLoRA(
        trained_trial(), cross_entropy, batches, coalitions=36, group=group, progress=False
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the ranks are not settled")
        result = shaplora.settle(4, max_moved=max_moved)
    return shaplora._scores, shaplora.standard_errors, (result.coalitions, result.max_moved)


def shared_settled_shapley_scores(batches, max_moved):
    return settled_shapley_scores(batches, max_moved, dist.group.WORLD)


def sharded_shapley_scores(batches):
    return shapley_scores(shard(batches), 18, dist.group.WORLD)


def unlike_shapley_scores():
    """As many batches of the same sizes on every process, and other numbers in them."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    x = torch.randn(4, 6, generator=generator, dtype=torch.double)
    return shapley_scores([(x, torch.tensor([0, 1, 2, 0]))], 18, dist.group.WORLD)


def shapley_scores_of_own_coalitions():
    model = trained_trial()
    batches = batches_of([4])
    seed, group = dist.get_rank(), dist.group.WORLD
    ShapLoRA(
        model, cross_entropy, batches, coalitions=18, generator=seed, group=group, progress=False
    ).score()


# ---- training -----------------------------------------------------------------------------------

STEPS = 24
OPTIONS = {"interval": 6, "l1": 1.5, "gate_lr": 0.05}


def gated_model():
    model = small_model()
    wrap(model, {"0": 3, "2": 3, "4": 2}, gate=1.0)
    return model


def trained_parameters(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def training_batches():
    """Pairs of batches of one size, so that the mean of two means is the mean."""
    generator = torch.Generator().manual_seed(3)
    batches = []
    for _ in range(STEPS):
        x = torch.randn(8, 6, generator=generator, dtype=torch.double)
        batches.append((x, (x[:, :3] * torch.tensor([1.0, 3.0, 0.1])).argmax(1)))
    return batches


def own_part(batch):
    rank, count = rank_and_count()
    return tuple(tensor.chunk(count)[rank] for tensor in batch)


def result_of(model, l1ra):
    parameters = {
        name.removeprefix("module."): parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    return l1ra.ranks, parameters, [sorted(update.given) for update in l1ra.history.updates]


def train_alone():
    """L1RA on one process, with whole batches."""
    model = gated_model()
    optimizer = torch.optim.AdamW(trained_parameters(model), lr=1e-2)
    l1ra = L1RA(model, optimizer, **OPTIONS)
    for batch in training_batches():
        cross_entropy(model, batch).backward()
        optimizer.step()
        l1ra.step()
        optimizer.zero_grad()
    return result_of(model, l1ra)


def train_on_own_parts(model, optimizer, l1ra, average=sync_gradients):
    for batch in training_batches():
        cross_entropy(model, own_part(batch)).backward()
        average(model)
        optimizer.step()
        l1ra.step()
        optimizer.zero_grad()


def train_with_sync_gradients():
    model = gated_model()
    optimizer = torch.optim.AdamW(trained_parameters(model), lr=1e-2)
    l1ra = L1RA(model, optimizer, **OPTIONS, group=dist.group.WORLD)
    train_on_own_parts(model, optimizer, l1ra)
    return result_of(model, l1ra)


def train_with_ddp(renew=True, find_unused=False, group=True):
    """`renew`: refresh the DDP after every update, as one must."""
    model = gated_model()
    optimizer = torch.optim.AdamW(trained_parameters(model), lr=1e-2)
    l1ra = L1RA(model, optimizer, **OPTIONS, group=dist.group.WORLD if group else None)
    ddp = DistributedDataParallel(model, find_unused_parameters=find_unused)
    for batch in training_batches():
        cross_entropy(ddp, own_part(batch)).backward()
        optimizer.step()
        if l1ra.step() and renew:
            refresh(ddp)
        optimizer.zero_grad()
    return result_of(model, l1ra)


def wrap_inside_ddp():
    ddp = DistributedDataParallel(small_model())
    wrap(ddp.module, {"0": 2})
    ddp(training_batches()[0][0])


def frozen_layers_in_a_ddp_that_was_kept():
    """A layer that trains, one that was frozen, and a frozen teacher that is not the DDP's own."""
    teacher = gated_model().requires_grad_(False)

    class Student(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = gated_model()

        def forward(self, x):
            return self.model(x) - teacher(x)

    ddp = DistributedDataParallel(Student())
    x = training_batches()[0][0]
    ddp(x)
    resize(ddp.module.model, {"0": 2, "2": 3, "4": 2})
    ddp.module.model[0].requires_grad_(False)
    ddp(x)
    ddp.module.model[0].lora_B.requires_grad_(True)  # as where A is frozen for good
    ddp(x)


def train_on_own_rows():
    """A generator of another seed on each process, for the A of fresh ranks."""
    model = gated_model()
    optimizer = torch.optim.AdamW(trained_parameters(model), lr=1e-2)
    l1ra = L1RA(model, optimizer, **OPTIONS, group=dist.group.WORLD, generator=dist.get_rank())
    train_on_own_parts(model, optimizer, l1ra)


def train_without_averages():
    model = gated_model()
    optimizer = torch.optim.AdamW(trained_parameters(model), lr=1e-2)
    l1ra = L1RA(model, optimizer, **OPTIONS, group=dist.group.WORLD)
    train_on_own_parts(model, optimizer, l1ra, average=lambda model: None)


def gradients_on_some():
    """A parameter with a gradient on process 0 alone, and one without any: (its mean, None)."""
    rank, count = rank_and_count()
    model = nn.ModuleDict({"some": nn.Linear(2, 1), "none": nn.Linear(2, 1)})
    if rank == 0:
        model["some"].weight.grad = torch.tensor([[count * 3.0, 0.0]])
    sync_gradients(model)
    return model["some"].weight.grad, model["some"].bias.grad, model["none"].weight.grad


def sparse_gradients():
    rank, _ = rank_and_count()
    model = nn.Embedding(4, 2, sparse=True)
    if rank == 0:
        model(torch.tensor([1])).sum().backward()
    sync_gradients(model)


def unequal_ranks():
    model = small_model()
    wrap(model, {"0": 1 + dist.get_rank()})
    cross_entropy(model, training_batches()[0]).backward()
    sync_gradients(model)


# ---- faults of one process ----------------------------------------------------------------------


def score_with_a_fault(fault, batches):
    """Pooled scores, where the last process does something else than the others."""
    rank, count = rank_and_count()
    last = rank == count - 1
    own, targets, loss_fn, groups = shard(batches), None, cross_entropy, None
    curvature = empirical_fisher
    if fault == "exception" and last:

        def loss_fn(model, batch):
            raise KeyError("no such key")

    if fault == "no batch" and last:
        own = []
    if fault == "other targets" and last:
        targets = ["0", "2"]
    if fault == "unequal groups":
        groups = 4
    if fault == "equal seeds":
        generator = torch.Generator().manual_seed(0)
        curvature = functools.partial(hutchinson_outputs, samples=10, generator=generator)
    if fault == "equal seeds in a closure":
        generator = torch.Generator().manual_seed(0)

        def curvature(*args):
            return hutchinson_outputs(*args, samples=10, generator=generator)

    if fault == "broken loader" and last:
        groups, own = 4, broken_after_two(own)
    elif fault == "broken loader":
        groups = 4
    allocator = SensitivityLoRA(
        small_model(), loss_fn, own, targets=targets, curvature=pooled(curvature), groups=groups
    )
    allocator.score()


def broken_after_two(batches):
    yield from batches[:2]
    raise OSError("the disk is gone")


# ---- FSDP2: a sharded base, whole adapters ------------------------------------------------------


def sharded_model():
    model = small_model()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in (model[0], model[2], model[4]):
        fsdp.fully_shard(layer, mesh=mesh)
    fsdp.fully_shard(model, mesh=mesh)
    return model


def sharded_estimate(name, batches):
    return _described(pooled(DETERMINISTIC[name])(sharded_model(), cross_entropy, shard(batches)))


def packed_model():
    """Two int8 layers around a plain one. Their biases stay plain."""
    model = small_model()
    model[0], model[4] = Int8Linear(model[0]), Int8Linear(model[4])
    return model


def packed_moments(batches):
    return dict(input_second_moment(packed_model(), cross_entropy, batches))


def sharded_packed_moments(batches):
    model = packed_model()
    model.requires_grad_(False)  # integers have no gradient, and FSDP2 averages none then
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in (model[0], model[2], model[4]):
        fsdp.fully_shard(layer, mesh=mesh)
    assert type(model[0].weight).__name__ == "DTensor"
    return dict(pooled(input_second_moment)(model, cross_entropy, shard(batches)))


def sharded_estimate_of_unequal_numbers(batches):
    pooled(input_second_moment)(sharded_model(), cross_entropy, shard(batches))


def sharded_estimate_within_tolerance(batches):
    curvature = functools.partial(input_second_moment, tolerance=0.1)
    pooled(curvature)(sharded_model(), cross_entropy, shard(batches))


def merge_what_is_whole_for_now():
    """The root of FSDP2 keeps its parameters whole after a forward pass, until the backward."""
    model = small_model()
    fsdp.fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    wrap(model, {"0": 2})
    model(training_batches()[0][0])
    merge(model)


def save_what_is_not_finite(folder):
    """On the last process."""
    model = gated_model()
    if dist.get_rank():
        model[0].lora_A.data[0, 0] = torch.nan
    save_adapter(model, f"{folder}/adapter.safetensors", group=dist.group.WORLD)


def load_beside_another_base(folder):
    """On the last process."""
    path = f"{folder}/adapter.safetensors"
    save_adapter(gated_model(), path, group=dist.group.WORLD)
    model = small_model()
    if dist.get_rank():
        model[0].weight.data.add_(1.0)
    load_adapter(model, path, group=dist.group.WORLD)


def train_with_fsdp2(folder):
    """Train with L1RA, then save, load and export: (result, the loaded result, what raised)."""
    model = sharded_model()
    wrap(model, {"0": 3, "2": 3, "4": 2}, gate=1.0)
    optimizer = torch.optim.AdamW(trained_parameters(model), lr=1e-2)
    l1ra = L1RA(model, optimizer, **OPTIONS, group=dist.group.WORLD)
    train_on_own_parts(model, optimizer, l1ra)
    path = f"{folder}/adapter.safetensors"
    save_adapter(model, path, group=dist.group.WORLD)
    again = sharded_model()
    load_adapter(again, path, group=dist.group.WORLD)
    check_same(again)
    export_peft(model, f"{folder}/peft{dist.get_rank()}")
    x = training_batches()[0][0]
    outputs = model(x).detach(), again(x).detach()
    return result_of(model, l1ra), outputs, refusals(model, sharded_model(), path)


def refusals(model, plain, path):
    """What cannot work with a sharded base, and says so."""
    calls = {
        "merge": lambda: merge(model),
        "exact": lambda: exact_hessian_diagonal(plain, cross_entropy, training_batches()[:1]),
        "load without group": lambda: load_adapter(plain, path),
    }
    messages = {}
    for name, call in calls.items():
        try:
            call()
        except ValueError as error:
            messages[name] = str(error)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        save_adapter(model, f"{path}.{dist.get_rank()}")
    messages["save without group"] = str(caught[0].message)
    load_adapter(plain, f"{path}.{dist.get_rank()}")  # it knows no base
    return messages


def another_base(folder):
    """load_adapter with group= into a sharded model with other weights."""
    model = sharded_model()
    wrap(model, {"0": 2})
    path = f"{folder}/other.safetensors"
    save_adapter(model, path, group=dist.group.WORLD)
    other = small_model()
    other[0].weight.data.add_(1.0)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fsdp.fully_shard(other[0], mesh=mesh)
    load_adapter(other, path, group=dist.group.WORLD)


def sharded_shapley(batches):
    """ShapLoRA with a sharded base, against the same on this process alone."""
    model = sharded_model()
    whole = trained_trial()
    wrap(model, {"0": 3, "2": 2, "4": 2}, gate=0.0)
    with torch.no_grad():
        for name, layer in lora_layers(model).items():
            for key, parameter in layer.named_parameters(recurse=False):
                parameter.copy_(lora_layers(whole)[name].get_parameter(key))
    shaplora = ShapLoRA(
        model, cross_entropy, batches, coalitions=18, group=dist.group.WORLD, progress=False
    )
    return shaplora.score()
