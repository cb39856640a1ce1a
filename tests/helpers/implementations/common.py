"""What several implementations share: copies of models, sizes of batches, derivatives."""

from __future__ import annotations

import copy

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


def eval_copy(model):
    return copy.deepcopy(model).eval().requires_grad_()


def weights_in(model, targets):
    return {name: model.get_submodule(name).weight for name in targets}


def first_of(batch):
    while not isinstance(batch, torch.Tensor):
        batch = next(iter(batch.values())) if isinstance(batch, dict) else batch[0]
    return batch


def size_of(batch):
    return len(first_of(batch))


def part_of(batch, rows):
    """The samples `rows` (a slice) of a batch."""
    if isinstance(batch, dict):
        return {key: value[rows] for key, value in batch.items()}
    return batch[rows] if isinstance(batch, torch.Tensor) else tuple(x[rows] for x in batch)


def samples_of(batch):
    return [part_of(batch, slice(i, i + 1)) for i in range(size_of(batch))]


def twice(loss_fn, model, batch):
    """A loss whose gradient can be differentiated, attention included."""
    with sdpa_kernel(SDPBackend.MATH):
        return loss_fn(model, batch)


def slope(value, inputs, again=False):
    """∂value / ∂inputs, zeros where nothing depends on them."""
    if not value.requires_grad:
        return [torch.zeros_like(x) for x in inputs]
    return torch.autograd.grad(
        value, inputs, retain_graph=True, create_graph=again, materialize_grads=True
    )


def jacobian(values, x):
    return torch.stack([slope(v, [x])[0].flatten() for v in values.flatten()])


def diagonal_of(loss, W):
    g = slope(loss, [W], again=True)[0].flatten()
    return torch.stack([slope(v, [W])[0].flatten()[k] for k, v in enumerate(g)]).view_as(W)


def diagonals_of(loss, weights):
    return {name: diagonal_of(loss, W) for name, W in weights.items()}


def mean_loss(model, loss_fn, batches):
    pairs = [(size_of(batch), twice(loss_fn, model, batch)) for batch in batches]
    return sum(n * loss for n, loss in pairs) / sum(n for n, _ in pairs)


def calls_of(model, name, loss_fn, batch):
    """The loss, and [(x, z)]: what each call of one module got and gave."""
    calls = []
    handle = model.get_submodule(name).register_forward_hook(
        lambda module, inputs, z: calls.append((inputs[0], z))
    )
    loss = twice(loss_fn, model, batch)
    handle.remove()
    return loss, calls


def output_of(model, loss_fn, batch):
    """y, the model's output, and the loss as a function of a tensor in its place."""
    seen = []
    handle = model.register_forward_hook(lambda module, inputs, y: seen.append(y))
    loss_fn(model, batch)
    handle.remove()
    return seen[0], lambda y: loss_fn(lambda *inputs, **options: y, batch)


MOMENTS = ("exp_avg", "exp_avg_sq")


@torch.no_grad()
def regrown(own, keep, add, A=None, B=None, gate=None):
    """A, B and gate of a dict after pruning and adding; zeros unless the new entries are given."""
    A = own["A"].new_zeros(add, own["A"].shape[1]) if A is None else A
    B = own["B"].new_zeros(own["B"].shape[0], add) if B is None else B
    gate = own["gate"].new_zeros(add) if gate is None else gate
    return {
        "A": torch.cat([own["A"][keep], A]),
        "B": torch.cat([own["B"][:, keep], B], dim=1),
        "gate": torch.cat([own["gate"][keep], gate]),
    }


@torch.no_grad()
def fresh(layer, add):
    """New rows of A, columns of B and gates, as the contract wants them."""
    A, B = layer["A"], layer["B"]
    return (
        torch.randn(add, A.shape[1]).to(A) / A.shape[1] ** 0.5,
        B.new_zeros(len(B), add),
        layer["gate"].new_ones(add),
    )
