"""Ranks and trained adapters go to PEFT and back; an adapter and its head go into one file.

    pip install 'minirank[examples]'      # brings PEFT and transformers
    python examples/to_peft.py

The model is a small BERT with random weights, so that nothing is downloaded. Yours comes from
from_pretrained.
"""

import copy
import tempfile
from functools import partial
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import BertConfig, BertForTokenClassification

from minirank import (
    SensitivityLoRA,
    curvature,
    export_peft,
    import_peft,
    load_adapter,
    read_adapter,
    save_adapter,
    wrap,
)

torch.manual_seed(0)
config = BertConfig(
    vocab_size=100,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=64,
    num_labels=5,
)
plain = BertForTokenClassification(config).eval()
words = torch.randint(100, (8, 16, 12))  # 8 batches of 16 sentences of 12 words
batches = [
    {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids % 5} for ids in words
]


def loss_fn(model, batch):
    return model(**batch).loss


def largest_difference(one, other):
    inputs = {name: batches[0][name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        return (one.eval()(**inputs)[0] - other.eval()(**inputs)[0]).abs().max().item()


# Decide the ranks. SensitivityLoRA's default curvature needs no options. Those of another one are
# bound by functools.partial. Where the model computes the loss itself, gauss_newton needs to know
# from which module's output, and of how many words a batch's loss is the mean.
estimate = partial(
    curvature.gauss_newton,
    output="classifier",
    batch_weight=lambda batch: (batch["labels"] != -100).sum().item(),
)
allocator = SensitivityLoRA(plain, loss_fn, batches, targets="bert.encoder.*", curvature=estimate)
allocator.score()
allocation = allocator.allocate(24)
print(allocation)

# PEFT (0.15 or newer) can train these ranks. It scales a layer by alpha / r, which would differ
# from layer to layer: alpha_pattern gives all layers the same scale.
lora_config = LoraConfig(
    target_modules=allocation.target_modules,
    rank_pattern=allocation.rank_pattern,
    alpha_pattern=allocation.alpha_pattern(2.0),
)
by_peft = get_peft_model(copy.deepcopy(plain), lora_config)
matrices = [p for name, p in by_peft.named_parameters() if "lora_A" in name]
print(f"\nPEFT made {len(matrices)} adapters with {sum(map(len, matrices))} ranks in all")

# Or they are trained here, with the head.
model = copy.deepcopy(plain)
wrap(model, allocation, scaling=2.0, trainable=["classifier"])
optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
for batch in batches:
    loss_fn(model, batch).backward()
    optimizer.step()
    optimizer.zero_grad()

with tempfile.TemporaryDirectory() as folder:
    # minirank's own file also holds what trained beside the adapters: here the head.
    path = Path(folder, "adapter.safetensors")
    save_adapter(model, path, allocation=allocation)
    print(f"\nIn the file: {read_adapter(path)}")
    loaded = copy.deepcopy(plain)
    load_adapter(loaded, path)
    print(f"\nloaded from it: {largest_difference(model, loaded):.1e} from the trained model")

    # PEFT's folder holds the adapters alone, so the encoder is exported without the head. PEFT has
    # no gates: those of L1RA and ShapLoRA are multiplied into B.
    export_peft(model.bert, Path(folder, "peft"))
    theirs = PeftModel.from_pretrained(copy.deepcopy(plain.bert), Path(folder, "peft"))
    print(f"PEFT's output: {largest_difference(model.bert, theirs):.1e} from ours")

    # What PEFT saved can be trained, resized and merged here, if it is plain LoRA.
    theirs.save_pretrained(Path(folder, "from_peft"))
    ours = copy.deepcopy(plain.bert)
    import_peft(ours, Path(folder, "from_peft"))
    print(f"imported from PEFT: {largest_difference(ours, theirs):.1e} from PEFT's output")
