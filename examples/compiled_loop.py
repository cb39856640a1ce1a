"""torch.compile and L1RA: what an update costs, and how to keep that low.

    python examples/compiled_loop.py

An update that moves ranks gives some parameters other shapes, and torch compiles the model again.
It does so for 8 graphs of one function. Then it logs "hit config.recompile_limit" and leaves the
model uncompiled: slower, and right as ever. Two ways keep it compiled:

- torch._dynamo.config.force_parameter_static_shapes = False, before the first compilation. After
  a few graphs torch takes every rank for a variable, and compiles no more.
- torch._dynamo.reset() after an update that moved ranks. Every one compiles again, without limit.

The three trainings below count the graphs that torch compiles. Their backend is "eager", which
traces the graphs and runs them as they are, so that nothing needs a C++ compiler.
"""

import logging

import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from minirank import L1RA, wrap

UPDATES = 12
logging.getLogger("torch._dynamo").setLevel(logging.ERROR)  # without this, torch tells of its limit


def train(reset=False):
    """Print how many updates moved ranks, and how many graphs were compiled. Return the weights."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = nn.Sequential(*[nn.Linear(16, 16) for _ in range(4)])
    layers = wrap(model, dict.fromkeys("0123", 4), gate=1.0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    l1ra = L1RA(model, optimizer, l1=0.1, interval=2)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter)
    for _ in range(2 * UPDATES):
        loss = compiled(torch.randn(8, 16)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for layer in layers.values():  # so short a training moves nothing: let chance choose ranks
            layer.gate.data[torch.rand(layer.rank) < 0.2] = 0.0
        update = l1ra.step()
        if reset and update is not None and update.pruned:
            torch._dynamo.reset()
    moved = sum(bool(update.pruned) for update in l1ra.history.updates)
    print(f"{moved} updates moved ranks, {counter.frame_count} graphs")
    return model.state_dict()


print("as it is:", end=" ")
expected = train()
print("reset() after each:", end=" ")
with_resets = train(reset=True)
print("ranks as variables:", end=" ")
torch._dynamo.config.force_parameter_static_shapes = False
with_variables = train()
for found in (with_resets, with_variables):
    torch.testing.assert_close(found, expected)
print("the three trainings end at the same weights")
