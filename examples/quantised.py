"""QLoRA: ranks for a quantised model, adapters beside it, files, and the ranks in PEFT.

    pip install 'minirank[examples,quantised]'
    python examples/quantised.py

The model is a small Llama with random weights, so that nothing is downloaded, quantised to 8 bits
by bitsandbytes. Without bitsandbytes the script uses a packed layer of its own, which shows all
that such a layer needs: in_features, out_features, packed data, and a forward with gradients.
"""

import importlib.util
import logging
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from minirank import SensitivityLoRA, load_adapter, merge, save_adapter, wrap


class PackedLinear(nn.Linear):  # PEFT adapts only what is an nn.Linear, or what it knows by name
    """An int8 weight with a scale for each row."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, bias=False)
        W = linear.weight.detach()
        self.register_buffer("scale", W.abs().amax(1, keepdim=True) / 127)
        self.weight = nn.Parameter((W / self.scale).round().to(torch.int8), requires_grad=False)

    def dequantize(self):  # not needed to train; for `layer.weight`
        return self.weight * self.scale

    def forward(self, x):
        return nn.functional.linear(x, self.dequantize().to(x.dtype))


def quantised(folder):
    """The model of the folder with all its linear layers quantised but the head."""
    if importlib.util.find_spec("bitsandbytes") is not None:
        in_8_bits = BitsAndBytesConfig(load_in_8bit=True)
        return LlamaForCausalLM.from_pretrained(
            folder, quantization_config=in_8_bits, device_map="cpu"
        )
    model = LlamaForCausalLM.from_pretrained(folder)
    for layer in model.model.layers:
        for block in (layer.self_attn, layer.mlp):
            for name, child in list(block.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(block, name, PackedLinear(child))
    return model


def loss_fn(model, batch):
    return model(input_ids=batch, labels=batch).loss


def largest_difference(one, other):
    with torch.no_grad():
        return (one.eval()(batches[0]).logits - other.eval()(batches[0]).logits).abs().max().item()


logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells of every cast to float16
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
batches = list(torch.randint(64, (8, 4, 16)))  # 8 batches of 4 sentences of 16 words

with tempfile.TemporaryDirectory() as folder:
    LlamaForCausalLM(config).save_pretrained(folder)
    model = quantised(folder)

    # Scoring needs no weight, only what goes in and comes out of each layer.
    allocator = SensitivityLoRA(model, loss_fn, batches, targets="model.layers.*")
    allocator.score()
    allocation = allocator.allocate(28)
    print(allocation)

    # Either train these ranks in PEFT …
    lora_config = LoraConfig(
        target_modules=allocation.target_modules,
        rank_pattern=allocation.rank_pattern,
        alpha_pattern=allocation.alpha_pattern(2.0),
    )
    by_peft = get_peft_model(quantised(folder), lora_config)
    matrices = [p for name, p in by_peft.named_parameters() if "lora_A" in name]
    print(f"\nPEFT made {len(matrices)} adapters with {sum(map(len, matrices))} ranks in all")

    # … or here. Adapters beside a quantised weight are float32.
    layers = wrap(model, allocation, scaling=2.0)
    model.train()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    for epoch in range(5):
        for batch in batches:
            loss = loss_fn(model, batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if epoch in (0, 4):
            print(f"epoch {epoch + 1}: loss {loss.item():.2f}")

    # The file remembers the quantised base, and refuses another one.
    path = Path(folder, "adapter.safetensors")
    save_adapter(model, path, allocation=allocation)
    again = quantised(folder)
    load_adapter(again, path)
    print(f"loaded from its file: {largest_difference(model, again):.1e} from the trained model")

    # A quantised weight cannot take W + ΔW. The model that is not quantised can.
    try:
        merge(model)
    except ValueError as error:
        print(f"merge: {str(error).split(':')[0]}")
    plain = LlamaForCausalLM.from_pretrained(folder)
    load_adapter(plain, path, other_base=True)
    print(f"merged into the plain model: {len(merge(plain))} layers")
