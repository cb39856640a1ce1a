"""L1RA in your own training loop: ranks move, and a saved run goes on bit for bit.

    python examples/l1ra_own_loop.py

Two layers start with three ranks each. One has to change by a matrix of rank 5, the other by one of
rank 1, so L1RA should move two ranks from the second to the first. A second run is saved early on,
continued from its files by new objects, and compared with the run that was never interrupted.
"""

import copy
import tempfile
from pathlib import Path

import torch
from torch import nn

from minirank import L1RA, load_adapter, save_adapter, wrap

STEPS, SAVED_AFTER = 1000, 330
torch.manual_seed(0)
plain = nn.ModuleDict({"much": nn.Linear(16, 16), "little": nn.Linear(16, 16)})
goal = copy.deepcopy(plain)
with torch.no_grad():
    for name, rank in {"much": 5, "little": 1}.items():  # what each layer has to learn
        U, V = (torch.linalg.qr(torch.randn(16, rank)).Q for _ in range(2))
        goal[name].weight += U @ V.T
inputs = torch.randn(STEPS, 32, 16)


def training_objects(model):
    """What has a state beside the model. A continued run makes the same objects as a new one."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.5)
    # L1RA gives the gates a parameter group of their own. The scheduler must know all groups.
    l1ra = L1RA(model, optimizer, l1=0.4, interval=100, stop=700)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    return {"optimizer": optimizer, "l1ra": l1ra, "scheduler": scheduler}


def train(model, objects, steps):
    for step in steps:
        x = inputs[step]
        loss = sum(
            nn.functional.mse_loss(layer(x), goal[name](x).detach())
            for name, layer in model.items()
        )
        objects["optimizer"].zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # the current ones: updates replace some
        objects["optimizer"].step()
        objects["l1ra"].step()  # shrinks the gates; at every interval it also moves ranks
        objects["scheduler"].step()
    return loss.item()


model = copy.deepcopy(plain)
wrap(model, {"much": 3, "little": 3}, gate=1.0)
objects = training_objects(model)
loss = train(model, objects, range(STEPS))
print(f"uninterrupted: loss {loss:.4f}\n{objects['l1ra'].history}\n")

with tempfile.TemporaryDirectory() as folder:
    adapter, states = Path(folder, "adapter.safetensors"), Path(folder, "states.pt")

    early = copy.deepcopy(plain)
    wrap(early, {"much": 3, "little": 3}, gate=1.0)
    saved = training_objects(early)
    train(early, saved, range(SAVED_AFTER))
    save_adapter(early, adapter)
    torch.save({name: each.state_dict() for name, each in saved.items()}, states)

    resumed = copy.deepcopy(plain)  # as if in a new process: only the two files are used
    load_adapter(resumed, adapter)
    continued = training_objects(resumed)
    for name, state in torch.load(states).items():
        continued[name].load_state_dict(state)
    # With dropout or a shuffling loader, the states of the random generators belong here too.
    resumed_loss = train(resumed, continued, range(SAVED_AFTER, STEPS))

expected, found = model.state_dict(), resumed.state_dict()
alike = all(expected[key].equal(found[key]) for key in expected.keys() | found.keys())
moves_alike = objects["l1ra"].history == continued["l1ra"].history
print(f"resumed after {SAVED_AFTER} steps: loss {resumed_loss:.4f}")
print(f"same weights, bit for bit: {alike}; same history of moves: {moves_alike}")
