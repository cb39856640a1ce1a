"""Models whose names are hard for PEFT's patterns, and PEFT itself, away from the global RNG."""

from __future__ import annotations

import copy
import json

import peft
import torch
from helpers.models import randomize
from safetensors.torch import load_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from minirank import wrap

SUFFIXES = ("fc", "enc.fc", "xfc", "enc.xfc", "fc2")  # each the end of another
REGEX = ("a+b", "w[0]", "x(1)", "q|v", "c*", "$h", "^t", "back\\slash", "n{2}", "u?")


class Chain(nn.Module):
    """Linear layers under any dotted names, one after the other; the last is 6 → 4."""

    def __init__(self, names=SUFFIXES, transposed=(), bias=True):
        super().__init__()
        self.names = names
        for name in names:
            parent = self
            *path, leaf = name.split(".")
            for key in path:
                if key not in parent._modules:
                    parent.add_module(key, nn.Module())
                parent = parent._modules[key]
            d_out = 4 if name == names[-1] else 6
            parent.add_module(
                leaf, Conv1D(d_out, 6) if name in transposed else nn.Linear(6, d_out, bias=bias)
            )

    def forward(self, x):
        for name in self.names:
            x = self.get_submodule(name)(torch.tanh(x))
        return x


def made(kind, *args, dtype=torch.float64, **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind(*args, **options).to(dtype).eval()


def chain(*args, **options):
    return made(Chain, *args, **options)


def gpt2(dtype=torch.float64):
    """Two blocks of GPT-2. Its linear layers are Conv1D, but for the head, which is tied."""
    sizes = {"n_layer": 2, "n_embd": 8, "n_head": 2, "vocab_size": 11, "n_positions": 8}
    return made(GPT2LMHeadModel, GPT2Config(**sizes, bos_token_id=0, eos_token_id=0), dtype=dtype)


def trained(model, calls):
    """`model` wrapped in several calls of `wrap`, the adapters as if trained."""
    for ranks, options in calls:
        randomize(wrap(model, ranks, **options))
    return model


def in_peft(plain, folder, **options):
    """A copy of `plain` with the folder's adapter in PEFT."""
    with torch.random.fork_rng():
        return peft.PeftModel.from_pretrained(copy.deepcopy(plain), folder, **options).eval()


def peft_trained(plain, config, x, folder=None, steps=3):
    """A copy of `plain` that PEFT adapted and trained; saved, if there is a folder."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = peft.get_peft_model(copy.deepcopy(plain), config)
        optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=0.05)
        for _ in range(steps):
            optimizer.zero_grad()
            y = model(x)
            (y if isinstance(y, torch.Tensor) else y.logits).square().mean().backward()
            optimizer.step()
        if folder is not None:
            model.save_pretrained(folder)
    return model.eval()


def scalings(model):
    """{name in the plain model: scaling} of PEFT's layers."""
    return {
        name.removeprefix("base_model.model."): module.scaling["default"]
        for name, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }


def tensors_of(folder):
    return load_file(folder / "adapter_model.safetensors")


def config_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def rewrite(folder, **changes):
    """The folder's configuration with other values; None takes one out."""
    config = {
        key: value for key, value in {**config_of(folder), **changes}.items() if value is not None
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
