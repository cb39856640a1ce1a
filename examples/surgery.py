"""Change a model and change it back: choose layers, bound their ranks, wrap, resize, merge, unwrap.

python examples/surgery.py
"""

from collections import OrderedDict

import torch
from torch import nn

from minirank import UniformRanks, lora_layers, merge, resize, unmerge, unwrap, wrap

torch.manual_seed(0)
layers = {
    "embedding": nn.Embedding(50, 16),
    "up": nn.Linear(16, 64),
    "activation": nn.GELU(),
    "down": nn.Linear(64, 16),
    "head": nn.Linear(16, 5),
}
model = nn.Sequential(OrderedDict(layers))
tokens, labels = torch.randint(50, (32,)), torch.randint(5, (32,))
plain_weight, plain_output = model.up.weight.detach().clone(), model(tokens)


def difference(reference):
    return f"largest difference {float((model(tokens) - reference).detach().abs().max()):.1e}"


# The budget counts trainable parameters here. Targets are exact names, globs, a type or a
# function; a pattern that matches no linear layer is an error. Bounds hold for all layers, or for
# some by name.
allocator = UniformRanks(model, targets=["up", "d*"])
allocator.score()
allocation = allocator.allocate(600, unit="parameters", min_rank=1, max_rank={"down": 2})
print(allocation)

# The adapters and the head train. All other parameters are frozen.
wrap(model, allocation, scaling=2.0, dropout=0.1, trainable=["head"])
trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
print("\ntrained:", ", ".join(trained))
print(f"wrapped: {difference(plain_output)} from the plain model: an adapter starts at zero")
optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)


def train(steps):
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(tokens), labels).backward()
        optimizer.step()


# Ranks can change in the middle of training. Ranks that stay keep their state in the optimizer.
train(20)
resize(model, {"up": 2, "down": 5}, optimizer)
print("resized:", {name: layer.rank for name, layer in lora_layers(model).items()})
train(20)

model.eval()  # no dropout from here on
adapted = model(tokens)
print(f"merged {merge(model)}: {difference(adapted)}, at the speed of the plain model")
unmerge(model)
restored = model.up.base.weight.equal(plain_weight)
print(f"unmerged: the original weights, bit for bit: {restored}; {difference(adapted)}")

# The model has its plain modules and parameter names again, without the adapters. (Merge before
# `unwrap` to keep what they learnt in the plain weights.)
unwrap(model)
unchanged = model.up.weight.equal(plain_weight)
print(f"unwrapped: a plain {type(model.up).__name__} again, its weight unchanged: {unchanged}")
