"""Lightning with L1RA: ranks move, and a checkpoint goes on bit for bit.

    pip install 'minirank[lightning]'
    python examples/lightning_l1ra.py

Two layers start with three ranks each. One has to change by a matrix of rank 5, the other by one of
rank 1, so L1RA should move two ranks from the second to the first. The second training starts from
a checkpoint of the first in new objects, as a new process would, and ends at the same weights.
"""

import copy
import logging
import tempfile
from pathlib import Path

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from minirank import L1RA, wrap

EPOCHS, STEPS_PER_EPOCH, SAVED_AFTER = 12, 50, 4  # epochs


class Adapted(lightning.LightningModule):
    """What L1RA needs are the four methods from `configure_optimizers` on."""

    def __init__(self, model, goal):
        super().__init__()
        self.model, self.goal = model, goal
        self.saved_l1ra = None

    def training_step(self, x):
        return sum(
            nn.functional.mse_loss(layer(x), self.goal[name](x).detach())
            for name, layer in self.model.items()
        )

    def configure_optimizers(self):
        # A checkpoint's model has been loaded by now, its ranks too; the optimizer's state comes
        # later. The scheduler must know L1RA's parameter group.
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.5)
        self.l1ra = L1RA(self.model, optimizer, l1=0.6, gate_lr=0.03, interval=25, stop=450)
        if self.saved_l1ra is not None:
            self.l1ra.load_state_dict(self.saved_l1ra)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * STEPS_PER_EPOCH)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    def optimizer_step(self, *args, **kwargs):
        # Not in on_train_batch_end: a checkpoint may be saved before that.
        super().optimizer_step(*args, **kwargs)
        self.l1ra.step()  # shrinks the gates; at every interval it also moves ranks

    def on_save_checkpoint(self, checkpoint):
        checkpoint["l1ra"] = self.l1ra.state_dict()

    def on_load_checkpoint(self, checkpoint):
        self.saved_l1ra = checkpoint["l1ra"]


lightning.seed_everything(0, verbose=False)
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
plain = nn.ModuleDict({"much": nn.Linear(16, 16), "little": nn.Linear(16, 16)})
goal = copy.deepcopy(plain).requires_grad_(False)
with torch.no_grad():
    for name, rank in {"much": 5, "little": 1}.items():  # what each layer has to learn
        U, V = (torch.linalg.qr(torch.randn(16, rank)).Q for _ in range(2))
        goal[name].weight += U @ V.T
batches = torch.utils.data.DataLoader(torch.randn(STEPS_PER_EPOCH * 32, 16), batch_size=32)


def adapted():
    model = copy.deepcopy(plain)
    wrap(model, {"much": 3, "little": 3}, gate=1.0)
    return Adapted(model, goal)


def trainer_of(folder):
    return lightning.Trainer(
        accelerator="cpu",
        max_epochs=EPOCHS,
        gradient_clip_val=1.0,
        callbacks=[ModelCheckpoint(folder, every_n_epochs=SAVED_AFTER, save_top_k=-1)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


with tempfile.TemporaryDirectory() as folder:
    whole, resumed = adapted(), adapted()
    trainer_of(folder).fit(whole, batches)
    (checkpoint,) = Path(folder).glob(f"epoch={SAVED_AFTER - 1}-*.ckpt")
    trainer_of(f"{folder}/resumed").fit(resumed, batches, ckpt_path=checkpoint)

print(f"loss {resumed.training_step(batches.dataset).item():.4f}\n{whole.l1ra.history}\n")
expected, found = whole.state_dict(), resumed.state_dict()
alike = all(expected[key].equal(found[key]) for key in expected.keys() | found.keys())
moves_alike = whole.l1ra.history == resumed.l1ra.history
print(f"resumed after {SAVED_AFTER} epochs, same weights, bit for bit: {alike}")
print(f"same history of moves: {moves_alike}")
