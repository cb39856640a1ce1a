"""Hugging Face's Trainer with L1RA: ranks move, and a checkpoint goes on bit for bit.

    pip install 'minirank[examples]'      # brings transformers and accelerate
    python examples/trainer_l1ra.py

Copy `L1RATrainer` and `MoveRanks`. The model is a small BERT with random weights, so nothing is
downloaded; yours comes from from_pretrained. It learns to tag each word by its number modulo 5.
The first training runs to its end. The second one starts from a checkpoint of the first in new
objects, as a new process would, and ends at the same weights. `load_best_model_at_end=True` works
too: loading a checkpoint brings its ranks. On several processes, give TrainingArguments
`ddp_find_unused_parameters=False` too.
"""

import copy
import tempfile
import warnings
from pathlib import Path

import torch
import transformers
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    BertConfig,
    BertForTokenClassification,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from minirank import L1RA, merge, unwrap, wrap
from minirank.distributed import refresh


class MoveRanks(TrainerCallback):
    """Calls L1RA after each optimizer step, and keeps its state in each checkpoint's folder."""

    l1ra = None  # `create_optimizer` below makes it

    def __init__(self, trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step:  # a training that goes on: everything else has been loaded by now
            self.l1ra.load_state_dict(torch.load(self.path(args, state)))

    def on_optimizer_step(self, args, state, control, **kwargs):
        update = self.l1ra.step()  # shrinks the gates; at every interval it also moves ranks
        # Under torchrun, Trainer trains a DistributedDataParallel, which has to hear of new ranks.
        if update and isinstance(self.trainer.model_wrapped, DistributedDataParallel):
            refresh(self.trainer.model_wrapped)

    def on_save(self, args, state, control, **kwargs):
        torch.save(self.l1ra.state_dict(), self.path(args, state))

    def path(self, args, state):
        return Path(args.output_dir, f"checkpoint-{state.global_step}", "l1ra.pt")


class L1RATrainer(Trainer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.move_ranks = MoveRanks(self)
        self.add_callback(self.move_ranks)

    def create_optimizer(self, *args, **kwargs):
        # Here and no later: L1RA gives the gates a parameter group of their own, and the scheduler,
        # which comes next, must know all groups. A checkpoint's model has been loaded before.
        optimizer = super().create_optimizer(*args, **kwargs)
        self.move_ranks.l1ra = L1RA(self.model, optimizer, l1=0.8, gate_lr=0.05, interval=10)
        return optimizer


transformers.logging.set_verbosity_error()
torch.manual_seed(0)
plain = BertForTokenClassification(
    BertConfig(
        vocab_size=100,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        num_labels=5,
    )
)
words = torch.randint(100, (512, 12))  # 512 sentences of 12 words
dataset = [
    {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids % 5} for ids in words
]
linears = ("query", "key", "value", "dense")
ranks = {name: 2 for name, _ in plain.named_modules() if name.endswith(linears)}

# Every checkpoint of a wrapped model calls save_pretrained, which says that from_pretrained cannot
# read what it writes. Trainer can, and at the end of this file the model is merged.
warnings.filterwarnings("ignore", message="save_pretrained writes")


def wrapped():
    model = copy.deepcopy(plain)
    wrap(model, ranks, scaling=2.0, gate=1.0, trainable=["classifier"])
    return model


def trainer_of(model, folder):
    arguments = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        max_grad_norm=1.0,
        max_steps=80,
        learning_rate=1e-2,
        weight_decay=0.5,
        bf16=True,
        save_steps=40,
        use_cpu=True,
        report_to=[],
        logging_strategy="no",
        disable_tqdm=True,
        seed=0,
    )
    trainer = L1RATrainer(model, arguments, train_dataset=dataset[:448], eval_dataset=dataset[448:])
    trainer.remove_callback(PrinterCallback)
    return trainer


with tempfile.TemporaryDirectory() as folder:
    whole = trainer_of(wrapped(), folder)
    before = whole.evaluate()["eval_loss"]
    whole.train()

    resumed = trainer_of(wrapped(), folder)
    resumed.train(resume_from_checkpoint=f"{folder}/checkpoint-40")
    after = resumed.evaluate()["eval_loss"]

history = whole.move_ranks.l1ra.history
print(
    f"{history}\n\nloss on held-out sentences: {before:.2f} before, {after:.2f} after the training"
)
expected, found = whole.model.state_dict(), resumed.model.state_dict()
alike = all(expected[key].equal(found[key]) for key in expected.keys() | found.keys())
moves_alike = history == resumed.move_ranks.l1ra.history
print(f"resumed after 40 steps: same weights, bit for bit: {alike}; same moves: {moves_alike}")

# Merged and unwrapped, it is a plain BERT under its own parameter names, ready for save_pretrained.
merge(resumed.model)
unwrap(resumed.model)
