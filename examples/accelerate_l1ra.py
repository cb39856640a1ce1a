"""accelerate with L1RA: ranks move, and a saved state goes on bit for bit.

    pip install 'minirank[examples]'      # brings accelerate
    python examples/accelerate_l1ra.py

Two layers start with three ranks each. One has to change by a matrix of rank 5, the other by one of
rank 1, so L1RA should move two ranks from the second to the first. The second training starts from
a saved state of the first in new objects, as a new process would, and ends at the same weights.
"""

import copy
import tempfile

import torch
from accelerate import Accelerator
from torch import nn

from minirank import L1RA, resize, wrap

STEPS, SAVED_AFTER = 600, 230
torch.manual_seed(0)
plain = nn.ModuleDict({"much": nn.Linear(16, 16), "little": nn.Linear(16, 16)})
goal = copy.deepcopy(plain)
with torch.no_grad():
    for name, rank in {"much": 5, "little": 1}.items():  # what each layer has to learn
        U, V = (torch.linalg.qr(torch.randn(16, rank)).Q for _ in range(2))
        goal[name].weight += U @ V.T
inputs = torch.randn(2 * STEPS, 16, 16)  # two small batches for each optimizer step


def training_objects():
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = copy.deepcopy(plain)
    wrap(model, {"much": 3, "little": 3}, gate=1.0)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.5)
    # L1RA gives the gates a parameter group of their own, so it comes before the scheduler. (Made
    # after `prepare`, with the optimizer that `prepare` returns, it does the same.)
    l1ra = L1RA(model, optimizer, l1=0.6, gate_lr=0.03, interval=25, stop=450)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    accelerator.register_for_checkpointing(l1ra)  # custom_checkpoint_0.pkl of each saved state
    return accelerator, model, optimizer, scheduler, l1ra


def train(accelerator, model, optimizer, scheduler, l1ra, steps):
    for x in inputs[2 * steps.start : 2 * steps.stop]:
        with accelerator.accumulate(model):
            loss = sum(
                nn.functional.mse_loss(layer(x), goal[name](x).detach())
                for name, layer in model.items()
            )
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            # Does nothing while gradients accumulate. On several processes `model` is a DDP, and
            # this line reads: if l1ra.step(): minirank.distributed.refresh(model)
            l1ra.step()
            scheduler.step()
            optimizer.zero_grad()


with tempfile.TemporaryDirectory() as folder:
    whole = training_objects()
    train(*whole, range(SAVED_AFTER))
    whole[0].save_state(folder)
    train(*whole, range(SAVED_AFTER, STEPS))

    resumed = accelerator, model, optimizer, scheduler, l1ra = training_objects()
    # The optimizer exists before the model's state is loaded. So the model and the optimizer get
    # the ranks of that state first; load_state() then finds everything in its size.
    saved = torch.load(f"{folder}/custom_checkpoint_0.pkl")
    resize(model, saved["ranks"], optimizer)
    accelerator.load_state(folder)
    train(*resumed, range(SAVED_AFTER, STEPS))

print(f"{whole[-1].history}\n")
expected, found = whole[1].state_dict(), model.state_dict()
alike = all(expected[key].equal(found[key]) for key in expected.keys() | found.keys())
print(f"resumed after {SAVED_AFTER} steps, same weights, bit for bit: {alike}")
print(f"same history of moves: {whole[-1].history == l1ra.history}")
