"""Tiny transformers models, built from their configurations: no weights, no network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers as hf
from torch import nn

VOCABULARY = 29
WORDS = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
}
SIZES["initializer_range"] = 0.2  # ten times the default, so that small models are far from linear
GROUPED = WORDS | SIZES | {"num_key_value_heads": 2}


class Family(NamedTuple):
    """A kind of model, with what a user would say about it."""

    make: Callable[..., nn.Module]  # options of the configuration -> model
    targets: list[str]
    names: list[str]  # by hand: what the targets select, in module order
    head: str  # its output enters the loss

    def __call__(self, seed: int = 0, **options: Any) -> nn.Module:
        """The same weights for the same seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.make(**options).eval()


def bert(**options: Any) -> nn.Module:
    """An encoder that tags tokens. nn.Linear with biases."""
    return hf.BertForTokenClassification(
        hf.BertConfig(vocab_size=VOCABULARY, **SIZES, num_labels=5, **options)
    )


def gpt2(**options: Any) -> nn.Module:
    """A decoder. Conv1D, which stores the transpose, and lm_head.weight tied to the embedding."""
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16}
    return hf.GPT2LMHeadModel(hf.GPT2Config(**WORDS, **sizes, initializer_range=0.2, **options))


def llama(**options: Any) -> nn.Module:
    """A decoder with grouped queries: two query heads share one key and one value head."""
    return hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED, **options))


IN_BERT = [
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
]
IN_GPT2 = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
IN_LLAMA = [f"self_attn.{name}_proj" for name in "qkvo"] + [
    f"mlp.{name}_proj" for name in ("gate", "up", "down")
]

FAMILIES = {
    "bert": Family(
        bert,
        ["bert.encoder.*"],
        [
            f"bert.encoder.layer.{i}.{n}"
            for i in (0, 1)
            for n in [*IN_BERT, "intermediate.dense", "output.dense"]
        ],
        "classifier",
    ),
    "gpt2": Family(
        gpt2,
        ["transformer.h.*"],
        [f"transformer.h.{i}.{name}" for i in (0, 1) for name in IN_GPT2],
        "lm_head",
    ),
    "llama": Family(
        llama,
        ["model.layers.*"],
        [f"model.layers.{i}.{name}" for i in (0, 1) for name in IN_LLAMA],
        "lm_head",
    ),
}


T5_SIZES = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "d_kv": 4,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 4,
}
DISTILBERT_SIZES = {
    "vocab_size": VOCABULARY,
    "dim": 16,
    "hidden_dim": 24,
    "n_layers": 2,
    "n_heads": 2,
    "initializer_range": 0.2,
}

OTHER_FAMILIES = {  # what to adapt, and the model
    "DistilBERT, of sentences": (
        "distilbert.*",
        lambda: hf.DistilBertForSequenceClassification(
            hf.DistilBertConfig(**DISTILBERT_SIZES, num_labels=3)
        ),
    ),
    "ALBERT, one block thrice": (
        "albert.encoder.*",
        lambda: hf.AlbertForTokenClassification(
            hf.AlbertConfig(
                vocab_size=VOCABULARY,
                **SIZES | {"num_hidden_layers": 3},
                embedding_size=8,
                num_labels=5,
            )
        ),
    ),
    "ViT": (
        "vit.*",
        lambda: hf.ViTForImageClassification(hf.ViTConfig(**SIZES, image_size=8, patch_size=4)),
    ),
    "T5, encoder and decoder": (
        ["encoder.*", "decoder.*"],
        lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5_SIZES, decoder_start_token_id=0)),
    ),
    "Qwen2, biases in q, k, v only": (
        "model.layers.*",
        lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**GROUPED)),
    ),
    "OPT, rows of all sentences in one": (
        "model.decoder.layers.*",
        lambda: hf.OPTForCausalLM(
            hf.OPTConfig(**WORDS, **SIZES, ffn_dim=24, word_embed_proj_dim=16, init_std=0.2)
        ),
    ),
    "GPT-NeoX, q, k and v in one": (
        "gpt_neox.layers.*",
        lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**WORDS, **SIZES)),
    ),
    "Mixtral, its attention": (
        "model.layers.*.self_attn.*",
        lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**GROUPED, num_local_experts=3)),
    ),
}


def other_family(kind: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return OTHER_FAMILIES[kind][1]().eval()


def batches(model: nn.Module, count: int = 2) -> list[dict[str, torch.Tensor]]:
    """Padded sentences; the padding is masked and has no label. For ViT: pictures."""
    generator = torch.Generator().manual_seed(3)
    if model.main_input_name == "pixel_values":
        pictures = torch.randn(count, 4, 3, 8, 8, generator=generator)
        return [{"pixel_values": x, "labels": torch.tensor([0, 1, 1, 0])} for x in pictures]
    classes = model.classifier.out_features if hasattr(model, "classifier") else None
    result = []
    for _ in range(count):
        tokens = torch.randint(3, VOCABULARY, (4, 7), generator=generator)
        mask = torch.arange(7) < torch.tensor([7, 5, 6, 3])[:, None]
        labels = tokens % classes if classes else tokens
        # One label per sentence for DistilBERT, one per token for the others.
        labels = labels[:, 0] if hasattr(model, "pre_classifier") else labels.where(mask, -100)
        result.append(
            {"input_ids": tokens.where(mask, 0), "attention_mask": mask.long(), "labels": labels}
        )
    return result


def loss_fn(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**batch).loss


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**batches(model, 1)[0]).logits


def train(
    model: nn.Module,
    steps: int = 3,
    optimizer: torch.optim.Optimizer | None = None,
    each=lambda: None,
) -> None:
    """Without weight decay: what moves got a gradient. `each` is called after every step."""
    optimizer = optimizer or torch.optim.Adam(
        (p for p in model.parameters() if p.requires_grad), lr=1e-2
    )
    data = batches(model)
    model.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)  # for dropout
        for step in range(steps):
            loss = loss_fn(model, data[step % len(data)])
            assert torch.isfinite(loss)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            each()
    model.eval()
