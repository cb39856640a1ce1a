"""Ranks by what a roomy first training has changed: the recommended way, where a task needs it.

    python examples/two_trainings.py

The task: one of four layers has to change by a matrix of rank 6, the others by rank 0 or 1. The
budget is 2 ranks a layer. First come the two trainings that say whether it is worth the time:
uniform ranks at the budget, and uniform ranks with room. If more ranks everywhere do not lower the
loss, no division of the budget can; stop there.
"""

import copy

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from minirank import SingularValues, UniformRanks, wrap

torch.manual_seed(0)
WIDTH, ROOM, BUDGET = 16, 6, 8
planted = {"0": 1, "2": 6, "4": 0, "6": 1}  # what the task needs
model = nn.Sequential()
for _ in planted:
    model.extend([nn.Linear(WIDTH, WIDTH), nn.GELU()])
    nn.init.orthogonal_(model[-2].weight, gain=1.5)
teacher = copy.deepcopy(model)
with torch.no_grad():
    for name, rank in planted.items():
        U, V = (torch.linalg.qr(torch.randn(WIDTH, rank)).Q for _ in range(2))
        teacher.get_submodule(name).weight += U @ V.T
    x = torch.randn(4000, WIDTH)
    data = TensorDataset(x, teacher(x))
training, validation, test = random_split(data, [3000, 500, 500])


def loss_fn(model, batch):
    inputs, wanted = batch
    return nn.functional.mse_loss(model(inputs), wanted)


def trained(ranks):
    """A copy of the model after your own training loop, and its loss on the test data."""
    student = copy.deepcopy(model)
    wrap(student, ranks, scaling=2.0, generator=0)
    parameters = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, total_iters=10)
    order = torch.Generator().manual_seed(0)
    for _ in range(10):
        for batch in DataLoader(training, batch_size=32, shuffle=True, generator=order):
            loss = loss_fn(student, batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    with torch.no_grad():
        return student, loss_fn(student, test[:]).item()


uniform = UniformRanks(model)
uniform.score()
_, uniform_loss = trained(uniform.allocate(BUDGET))
roomy, roomy_loss = trained(uniform.allocate(ROOM * len(planted)))
print(f"uniform ranks of {BUDGET // len(planted)}: {uniform_loss:.5f}, of {ROOM}: {roomy_loss:.5f}")

allocator = SingularValues(roomy, loss_fn, DataLoader(validation, batch_size=100))
allocator.score()
allocation = allocator.allocate(BUDGET, max_rank=ROOM)
print(allocation)
_, loss = trained(allocation)
print(f"trained anew with these ranks: {loss:.5f}")
