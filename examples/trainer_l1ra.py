"""Hugging Face's Trainer with L1RA: ranks move, and a checkpoint goes on bit for bit.

    pip install 'minirank[examples]'      # brings transformers and accelerate
    python examples/trainer_l1ra.py

Copy `L1RATrainer` and `MoveRanks`. The model is a small BERT with random weights, so that nothing is
downloaded; yours comes from from_pretrained. It learns to tag each word by its number modulo 5.
The first training runs to its end. The second one starts from a checkpoint of the first in new
objects, as a new process would, and ends at the same weights.
"""

import copy
import tempfile
import warnings
from pathlib import Path

import torch
import transformers
from transformers import (
    BertConfig,
    BertForTokenClassification,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from minirank import L1RA, lora_layers, merge, unwrap, wrap


class MoveRanks(TrainerCallback):
    """Calls L1RA after each optimizer step, and keeps its state in each checkpoint's folder."""

    l1ra = None  # `create_optimizer` below makes it

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step:  # a training that goes on: everything else has been loaded by now
            self.l1ra.load_state_dict(torch.load(self.path(args, state)))

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.l1ra.step()  # shrinks the gates; at every interval it also moves ranks

    def on_save(self, args, state, control, **kwargs):
        torch.save(self.l1ra.state_dict(), self.path(args, state))

    def path(self, args, state):
        return Path(args.output_dir, f"checkpoint-{state.global_step}", "l1ra.pt")


class L1RATrainer(Trainer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.move_ranks = MoveRanks()
        self.add_callback(self.move_ranks)

    def create_optimizer(self, *args, **kwargs):
        # Here and no later: L1RA gives the gates a parameter group of their own, and the scheduler,
        # which comes next, must know all groups. A checkpoint's model has been loaded before.
        optimizer = super().create_optimizer(*args, **kwargs)
        self.move_ranks.l1ra = L1RA(self.model, optimizer, l1=0.4, interval=20, stop=120)
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
ranks = {name: 2 for name, _ in plain.bert.encoder.named_modules(prefix="bert.encoder")}
ranks = {name: 2 for name in ranks if name.endswith(("query", "value", "dense"))}

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
        num_train_epochs=5,  # 160 optimizer steps
        learning_rate=1e-2,
        weight_decay=0.5,
        bf16=True,
        eval_strategy="steps",
        eval_steps=50,
        save_steps=50,
        load_best_model_at_end=True,  # ranks may have moved since the best checkpoint
        use_cpu=True,
        report_to=[],
        logging_strategy="no",
        disable_tqdm=True,
        seed=0,
    )
    trainer = L1RATrainer(model, arguments, train_dataset=dataset[:448], eval_dataset=dataset[448:])
    trainer.remove_callback(PrinterCallback)
    return trainer


def ranks_now(model):
    return {name: layer.rank for name, layer in lora_layers(model).items()}


with tempfile.TemporaryDirectory() as folder:
    trainer = trainer_of(wrapped(), folder)
    trainer.train()
    history = trainer.move_ranks.l1ra.history
    print(history)
