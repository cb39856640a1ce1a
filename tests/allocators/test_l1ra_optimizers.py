"""L1RA beside uncommon optimizers: several at once, tensor learning rates, schedule-free ones."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from minirank import L1RA, wrap


def gated(ranks=None):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    return model, wrap(model, ranks or {"0": 3, "2": 2}, gate=1.0)


def matrices_and_gates(layers):
    matrices = [p for layer in layers.values() for p in (layer.lora_A, layer.lora_B)]
    return matrices, [layer.gate for layer in layers.values()]


def backward(model, optimizers, factor=1.0):
    for optimizer in optimizers:
        optimizer.zero_grad()
    x = torch.linspace(-1, 1, 24, dtype=torch.float64).view(4, 6)
    (factor * model(x).square().sum()).backward()


def two_optimizers(split_gates):
    """SGD for matrices beside SGD for gates; or each layer's parameters in an optimizer of its
    own."""
    model, layers = gated()
    if split_gates:
        parts = [list(layer.parameters(recurse=False)) for layer in layers.values()]
    else:
        parts = matrices_and_gates(layers)
    optimizers = [torch.optim.SGD(part, lr=0.25) for part in parts]
    return model, layers, optimizers


@pytest.mark.parametrize("split_gates", [False, True])
def test_a_training_step_of_two_optimizers_counts_once(split_gates):
    model, layers, optimizers = two_optimizers(split_gates)
    l1ra = L1RA(model, optimizers, interval=3, l1=0.5, gate_lr=0.25)
    for _ in range(4):
        backward(model, optimizers, 0.0)
        for optimizer in optimizers:
            optimizer.step()
        l1ra.step()
    assert l1ra.steps == 4
    assert [update.step for update in l1ra.history.updates] == [3]
    for layer in layers.values():
        assert torch.equal(layer.gate.detach(), torch.full_like(layer.gate, 0.5))  # 1 − 4 / 8


def test_step_may_come_after_each_optimizer():
    model, layers, optimizers = two_optimizers(split_gates=True)
    l1ra = L1RA(model, optimizers, interval=3, l1=0.5, gate_lr=0.25, stop=3)
    for _ in range(4):
        backward(model, optimizers, 0.0)
        for optimizer in optimizers:
            optimizer.step()
            l1ra.step()
    assert l1ra.steps == 4
    assert [update.step for update in l1ra.history.updates] == [3]
    for layer in layers.values():  # until `stop`
        assert torch.equal(layer.gate.detach(), torch.full_like(layer.gate, 0.625))


def test_a_gate_shrinks_with_its_own_optimizer_alone():
    model, layers, optimizers = two_optimizers(split_gates=True)
    l1ra = L1RA(model, optimizers, interval=100, l1=0.5, gate_lr=0.25)
    backward(model, optimizers, 0.0)
    optimizers[0].step()
    l1ra.step()
    assert torch.equal(layers["0"].gate.detach(), torch.full_like(layers["0"].gate, 0.875))
    assert torch.equal(layers["2"].gate.detach(), torch.ones_like(layers["2"].gate))
    assert l1ra.steps == 1


def test_an_optimizer_without_gates_counts_nothing():
    model, _, optimizers = two_optimizers(split_gates=False)
    l1ra = L1RA(model, optimizers, interval=1, l1=0.5, gate_lr=0.25)
    backward(model, optimizers, 0.0)
    optimizers[0].step()
    assert (l1ra.step(), l1ra.steps) == (None, 0)


def test_ranks_move_in_both_optimizers_and_go_on_training():
    model, layers, optimizers = two_optimizers(split_gates=False)
    l1ra = L1RA(model, optimizers, interval=1, l1=0.5, gate_lr=0.25)
    with torch.no_grad():
        layers["0"].gate[0] = 0.125
    backward(model, optimizers, 0.0)
    for optimizer in optimizers:
        optimizer.step()
    assert l1ra.step().ranks == {"0": 2, "2": 3}
    held = {id(p) for o in optimizers for group in o.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}


def test_a_saved_training_of_two_optimizers_goes_on_and_does_not_fit_another_number():
    model, _, optimizers = two_optimizers(split_gates=True)
    l1ra = L1RA(model, optimizers, interval=2, l1=0.5, gate_lr=0.25)
    for which in (0, 0, 1):
        backward(model, optimizers, 0.0)
        optimizers[which].step()
    l1ra.step()
    optimizers[1].step()
    state = copy.deepcopy(l1ra.state_dict())
    assert (state["steps"], state["pending"]) == ([2, 1], [0, 1])

    other, _, other_optimizers = two_optimizers(split_gates=True)
    again = L1RA(other, other_optimizers, interval=5)
    again.load_state_dict(state)
    assert (again.steps, again.state_dict()["pending"]) == (2, [0, 1])

    model, _ = gated()
    one = L1RA(
        model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad]), interval=5
    )
    with pytest.raises(ValueError, match="with 2 optimizers that held gates, but now it is 1"):
        one.load_state_dict(state)
    assert one.steps == 0


def test_nothing_changes_if_one_of_the_optimizers_does_not_fit():
    model, layers = gated()
    parts = [list(layer.parameters(recurse=False)) for layer in layers.values()]
    optimizers = [torch.optim.SGD(parts[0]), torch.optim.SGD(parts[1])]
    optimizers[1].param_groups[0]["initial_lr"] = 0.1  # as a scheduler leaves it
    groups = copy.deepcopy([o.state_dict()["param_groups"] for o in optimizers])
    with pytest.raises(ValueError, match="scheduler was made"):
        L1RA(model, optimizers, interval=5)
    assert [o.state_dict()["param_groups"] for o in optimizers] == groups
    with pytest.raises(ValueError, match="the optimizers do not hold the gate of '2'"):
        L1RA(model, [optimizers[0], torch.optim.SGD([layers["2"].lora_A])], interval=5)
    with pytest.raises(TypeError, match="LBFGS"):
        L1RA(model, [optimizers[0], torch.optim.LBFGS(parts[1])], interval=5)
    assert [o.state_dict()["param_groups"] for o in optimizers] == groups


# ---- learning rates that are tensors ------------------------------------------------------------


@pytest.mark.parametrize("own_group", [False, True])
def test_a_tensor_learning_rate_is_set_in_place(own_group):
    model, layers = gated()
    matrices, gates = matrices_and_gates(layers)
    groups = [{"params": matrices}, {"params": gates, "lr": torch.tensor(0.02), "weight_decay": 0}]
    given = groups if own_group else [*matrices, *gates]
    optimizer = torch.optim.AdamW(given, lr=torch.tensor(0.1))
    l1ra = L1RA(model, optimizer, interval=1, l1=0.5, gate_lr=0.02)
    rate = optimizer.param_groups[-1]["lr"]
    rate.fill_(7.0)  # as a scheduler does
    backward(model, [optimizer])
    optimizer.step()
    l1ra.step()
    assert optimizer.param_groups[-1]["lr"] is rate
    assert float(rate) == pytest.approx(0.02)
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.1)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchao_takes_the_gates_learning_rate():
    optim = pytest.importorskip("torchao.optim")
    model, layers = gated()
    model.float()
    optimizer = optim.AdamW8bit([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    l1ra = L1RA(model, optimizer, interval=2, l1=0.5, gate_lr=0.25)
    with torch.compiler.set_stance("force_eager"):
        for _ in range(3):
            for p in model.parameters():
                p.grad = torch.zeros_like(p) if p.requires_grad else None
            optimizer.step()
            l1ra.step()
    assert torch.equal(layers["0"].gate.detach(), torch.full_like(layers["0"].gate, 0.625))


# ---- schedule-free ------------------------------------------------------------------------------


def explicit_iterates(start, gradient, lr, beta, amount, steps):
    """Schedule-free SGD with z and x written out, both shrunk after every step: y at the end."""
    z, x = start.clone(), start.clone()
    for k in range(1, steps + 1):
        z = z - lr * gradient
        x = x + (z - x) / k
        z, x = (z - amount).clamp(0, 1), (x - amount).clamp(0, 1)
    return z, x, (1 - beta) * z + beta * x


@pytest.mark.parametrize("evaluating", [False, True])
def test_both_iterates_of_a_gate_shrink(evaluating):
    schedulefree = pytest.importorskip("schedulefree")
    model, layers = gated()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = schedulefree.SGDScheduleFree(trained, lr=0.25, momentum=0.75)
    optimizer.train()
    l1ra = L1RA(model, optimizer, interval=100, l1=0.125, gate_lr=0.25)
    gate = layers["0"].gate
    gradient = torch.tensor([0.0, 0.25, -0.25], dtype=torch.float64)
    for _ in range(7):
        for p in trained:
            p.grad = torch.zeros_like(p)
        gate.grad.copy_(gradient)
        optimizer.step()
        if evaluating:
            optimizer.eval()
        l1ra.step()
        optimizer.train()
    z, x, y = explicit_iterates(torch.ones(3).double(), gradient, 0.25, 0.75, 0.25 * 0.125, 7)
    torch.testing.assert_close(gate.detach(), y)
    torch.testing.assert_close(optimizer.state[gate]["z"], z)
    optimizer.eval()
    torch.testing.assert_close(gate.detach(), x)
    # Without a gradient the penalty takes what it takes with any other optimizer.
    assert float(gate[0].detach()) == pytest.approx(1 - 7 * 0.25 * 0.125)


@pytest.mark.parametrize("kind", ["AdamWScheduleFree", "SGDScheduleFree"])
def test_a_gate_reaches_zero_and_its_rank_moves(kind):
    schedulefree = pytest.importorskip("schedulefree")
    model, layers = gated()
    optimizer = getattr(schedulefree, kind)([p for p in model.parameters() if p.requires_grad])
    optimizer.train()
    l1ra = L1RA(model, optimizer, interval=20, l1=0.3, gate_lr=0.25)
    for _ in range(20):
        backward(model, [optimizer], 0.0)
        gate = layers["0"].gate
        gate.grad[0] = 1.0
        for other in (gate.grad[1:], layers["2"].gate.grad):
            other.fill_(-10.0)
        optimizer.step()
        update = l1ra.step()
    assert update.pruned == {"0": 1}
    assert update.state_reset == ()
    backward(model, [optimizer])
    optimizer.step()
    optimizer.eval()
    assert all(bool(p.isfinite().all()) for p in model.parameters())
