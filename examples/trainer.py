"""Hugging Face's Trainer trains a model whose ranks were decided before.

    pip install 'minirank[examples]'      # brings transformers and accelerate
    python examples/trainer.py

The model is a small BERT with random weights, so that nothing is downloaded. Yours comes from
from_pretrained. It learns to tag each word by its number modulo 5.
"""

import tempfile

import torch
import transformers
from transformers import (
    BertConfig,
    BertForTokenClassification,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

from minirank import SensitivityLoRA, merge, unwrap, wrap

transformers.logging.set_verbosity_error()
torch.manual_seed(0)
config = BertConfig(
    vocab_size=100,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=64,
    num_labels=5,
)
model = BertForTokenClassification(config)
words = torch.randint(100, (512, 12))  # 512 sentences of 12 words
dataset = [
    {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids % 5} for ids in words
]
training, held_out = dataset[:448], dataset[448:]

# A few batches decide the ranks, before any training.
calibration = torch.utils.data.DataLoader(training[:64], batch_size=16)
allocator = SensitivityLoRA(
    model, lambda model, batch: model(**batch).loss, calibration, targets="bert.encoder.*"
)
allocator.score()
allocation = allocator.allocate(24)
print(allocation)

# The adapters and the head train. (PEFT can train these ranks instead: to_peft.py makes the
# LoraConfig; give get_peft_model(model, lora_config) to Trainer, and do without `wrap`.)
wrap(model, allocation, scaling=2.0, trainable=["classifier"])
with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=16,
        num_train_epochs=10,
        learning_rate=1e-2,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        seed=0,
    )
    trainer = Trainer(model, arguments, train_dataset=training, eval_dataset=held_out)
    trainer.remove_callback(PrinterCallback)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
print(f"\nloss on held-out sentences: {before:.2f} before, {after:.2f} after the training")

# Merged and unwrapped, it is a plain BERT under its own parameter names, ready for save_pretrained.
merge(model)
unwrap(model)
print(f"after merging: {trainer.evaluate()['eval_loss']:.2f}, {type(model).__name__}")
