"""ShapLoRA in two stages: a copy with more ranks is trained and scored, then the model is trained.

    python examples/shaplora_two_stages.py

The task: the middle layer of a small network has to change by a matrix of rank 4, the other two by
matrices of rank 1. The budget is 6 ranks. For comparison, 2 ranks for each layer are trained too.
"""

import copy

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from minirank import ShapLoRA, wrap

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))
teacher = copy.deepcopy(model)
with torch.no_grad():
    for name, rank in {"0": 1, "2": 4, "4": 1}.items():
        U, V = (torch.linalg.qr(torch.randn(16, rank)).Q for _ in range(2))
        teacher.get_submodule(name).weight += U @ V.T
    x = torch.randn(600, 16)
    data = TensorDataset(x, teacher(x))
training, validation, test = random_split(data, [400, 100, 100])


def loss_fn(model, batch):
    inputs, wanted = batch
    return nn.functional.mse_loss(model(inputs), wanted)


def train(model):
    """Your own loop. Gates start from 0 in stage one, so they need a larger learning rate."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gates = [p for name, p in trained.items() if name.endswith("gate")]
    others = [p for name, p in trained.items() if not name.endswith("gate")]
    groups = [{"params": others, "lr": 1e-2}, {"params": gates, "lr": 0.1}]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0.0)
    for _ in range(60):
        for batch in DataLoader(training, batch_size=50, shuffle=True):
            optimizer.zero_grad()
            loss_fn(model, batch).backward()
            optimizer.step()


def test_loss(model):
    with torch.no_grad():
        return loss_fn(model, next(iter(DataLoader(test, batch_size=len(test))))).item()


# Stage one: a copy with twice the budget is trained, scored on validation data, and thrown away.
trial = copy.deepcopy(model)
wrap(trial, {"0": 4, "2": 4, "4": 4}, gate=0.0, scaling=2.0)
train(trial)
shaplora = ShapLoRA(trial, loss_fn, DataLoader(validation, batch_size=50), generator=0)
print("scores of the ranks, in thousandths, with their standard errors:")
for name, score in shaplora.score().items():
    pairs = zip(1000 * score, 1000 * shaplora.standard_errors[name], strict=True)
    print(f"  layer {name}:", "  ".join(f"{value:.3f} ± {error:.3f}" for value, error in pairs))
allocation = shaplora.allocate(6)  # the best 6 of the 12 ranks, all layers together
print(allocation)

# Stage two: the untouched model is trained with the ranks found.
# (To prune the trained copy instead: resize(trial, allocation).)
results = {"before training": test_loss(model)}
for title, ranks in {"uniform ranks": {"0": 2, "2": 2, "4": 2}, "ShapLoRA": allocation}.items():
    trained = copy.deepcopy(model)
    wrap(trained, ranks, scaling=2.0)
    train(trained)
    results[title] = test_loss(trained)
print("test loss:", ", ".join(f"{title} {loss:.4f}" for title, loss in results.items()))
