"""The README's first example: decide how many LoRA ranks each layer gets, wrap, and train.

python examples/quick_start.py
"""

import torch
from torch import nn

from minirank import SensitivityLoRA, wrap

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 4))
x = torch.randn(256, 16)
y = x[:, :4].argmax(1)  # what the model is to learn
batches = list(zip(x.split(32), y.split(32), strict=True))


def loss_fn(model, batch):
    inputs, labels = batch
    return nn.functional.cross_entropy(model(inputs), labels)


allocator = SensitivityLoRA(model, loss_fn, batches)
allocator.score()  # forward passes only; the model is left unchanged
allocation = allocator.allocate(24)  # 24 ranks in all, exactly
print(allocation)

wrap(model, allocation, scaling=2.0)  # LoRA layers in place; everything else is frozen
trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
optimizer = torch.optim.AdamW(trained, lr=1e-2)
for epoch in range(10):  # your own training loop
    for batch in batches:
        loss = loss_fn(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if epoch in (0, 9):
        print(f"epoch {epoch + 1}: loss {loss.item():.2f}")
