"""L1RA under Hugging Face's Trainer and under accelerate, on one process or on several."""

from __future__ import annotations

import tempfile

import torch
from accelerate import Accelerator
from helpers.distributed_cases import result_of, trained_parameters
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from minirank import L1RA, wrap
from minirank.distributed import refresh

OPTIONS = {"interval": 4, "l1": 1.0, "gate_lr": 0.08}
EXAMPLES, GLOBAL_BATCH = 96, 6


def gated_bert():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=3,
    )
    model = BertForSequenceClassification(config)
    ranks = {f"bert.encoder.layer.{i}.attention.self.{x}": 2 for i in range(2) for x in KINDS}
    wrap(model, ranks, gate=1.0, trainable=["classifier"])
    return model


KINDS = ("query", "key", "value")


def examples():
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 40, (EXAMPLES, 8), generator=generator)
    return [{"input_ids": row, "labels": int(row[0]) % 3} for row in ids]


class L1RATrainer(Trainer):
    """L1RA is made with the optimizer, before the scheduler, and steps after the optimizer."""

    def create_optimizer(self, *args, **kwargs):
        optimizer = super().create_optimizer(*args, **kwargs)
        self.l1ra = L1RA(self.model, optimizer, **OPTIONS)
        return optimizer

    def training_step(self, *args, **kwargs):
        # Before the forward pass of the next step, whatever Trainer does after the last one.
        self.move_ranks()
        return super().training_step(*args, **kwargs)

    def move_ranks(self):
        if self.l1ra.step() and isinstance(self.model_wrapped, DistributedDataParallel):
            refresh(self.model_wrapped)


def train_with_trainer(processes):
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=GLOBAL_BATCH // processes,
            learning_rate=1e-2,
            num_train_epochs=1,
            weight_decay=0.0,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            ddp_find_unused_parameters=False,
            average_tokens_across_devices=False,  # else the loss counts twice on two processes
            dataloader_pin_memory=False,
        )
        trainer = L1RATrainer(gated_bert(), arguments, train_dataset=examples())
        trainer.train()
        trainer.move_ranks()
    return result_of(trainer.model, trainer.l1ra)


def train_with_accelerate(processes):
    accelerator = Accelerator(cpu=True)
    model = gated_bert()
    optimizer = torch.optim.AdamW(trained_parameters(model), lr=1e-2, weight_decay=0.0)
    l1ra = L1RA(model, optimizer, **OPTIONS)
    data = torch.stack([example["input_ids"] for example in examples()])
    labels = torch.tensor([example["labels"] for example in examples()])
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(data, labels), batch_size=GLOBAL_BATCH // processes
    )
    prepared, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for ids, targets in loader:
        loss = nn.functional.cross_entropy(prepared(input_ids=ids).logits, targets)
        accelerator.backward(loss)
        optimizer.step()
        if l1ra.step() and isinstance(prepared, DistributedDataParallel):
            refresh(prepared)
        optimizer.zero_grad()
    return result_of(model, l1ra)
