"""How much of a model the targets reach, family by family, and what is left out.

    python examples/coverage.py > examples/results/coverage.txt

The models are small ones from their configurations, without weights and without a network. Shares
of a large model of the family differ, since its parts grow at different rates; what is left out is
the same. Needs transformers; diffusers' UNet is skipped where diffusers is not installed.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from minirank import linear_targets, unpack_attention
from minirank.curvature.unreached import read_without_call
from minirank.layers.coverage import STACK, Coverage, LeftOut, coverage, percent
from minirank.layers.linear import CONVOLUTIONS

Options = dict[str, Any]

WIDTH, HEADS, LAYERS = 64, 4, 2
WORDS: Options = {"vocab_size": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES: Options = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": 4 * WIDTH,
}
IMAGES: Options = {"image_size": 32, "patch_size": 8}
EXPERTS: Options = {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}


def bert() -> nn.Module:
    import transformers as hf

    return hf.BertForSequenceClassification(hf.BertConfig(**WORDS, **SIZES))


def llama() -> nn.Module:
    import transformers as hf

    return hf.LlamaForCausalLM(hf.LlamaConfig(**WORDS, **SIZES))


def gpt2() -> nn.Module:
    import transformers as hf

    sizes: Options = {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS}
    return hf.GPT2LMHeadModel(hf.GPT2Config(**WORDS, **sizes))


def t5() -> nn.Module:
    import transformers as hf

    sizes: Options = {
        "d_model": WIDTH,
        "d_kv": 16,
        "d_ff": 4 * WIDTH,
        "num_layers": LAYERS,
        "num_heads": 4,
    }
    sizes |= {"decoder_start_token_id": 0}
    return hf.T5ForConditionalGeneration(hf.T5Config(**WORDS, **sizes))


def vit() -> nn.Module:
    import transformers as hf

    return hf.ViTForImageClassification(hf.ViTConfig(**SIZES, **IMAGES))


def swin() -> nn.Module:
    import transformers as hf

    sizes: Options = {"image_size": 32, "patch_size": 2, "embed_dim": 32, "window_size": 4}
    config = hf.SwinConfig(**sizes, depths=[2, 2], num_heads=[2, 4])
    return hf.SwinForImageClassification(config)


def convnext() -> nn.Module:
    import transformers as hf

    config = hf.ConvNextConfig(hidden_sizes=[16, 32, 64, 128], depths=[2, 2, 2, 2])
    return hf.ConvNextForImageClassification(config)


def resnet() -> nn.Module:
    import transformers as hf

    config = hf.ResNetConfig(embedding_size=16, hidden_sizes=[32, 64], depths=[2, 2])
    return hf.ResNetForImageClassification(config)


def mobilenet() -> nn.Module:
    import transformers as hf

    config = hf.MobileNetV2Config(depth_multiplier=0.25, image_size=32)
    return hf.MobileNetV2ForImageClassification(config)


def mamba() -> nn.Module:
    import transformers as hf

    config = hf.MambaConfig(**WORDS, hidden_size=WIDTH, num_hidden_layers=LAYERS, state_size=8)
    return hf.MambaForCausalLM(config)


def mixtral() -> nn.Module:
    import transformers as hf

    return hf.MixtralForCausalLM(hf.MixtralConfig(**WORDS, **SIZES, **EXPERTS))


def qwen2_moe() -> nn.Module:
    import transformers as hf

    sizes: Options = {"num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2}
    sizes |= {"moe_intermediate_size": 2 * WIDTH, "shared_expert_intermediate_size": 2 * WIDTH}
    return hf.Qwen2MoeForCausalLM(hf.Qwen2MoeConfig(**WORDS, **SIZES, **sizes))


def gpt_oss() -> nn.Module:
    import transformers as hf

    config = hf.GptOssConfig(**WORDS, **SIZES, **EXPERTS, head_dim=16)
    return hf.GptOssForCausalLM(config)


def whisper() -> nn.Module:
    import transformers as hf

    sizes: Options = {"d_model": WIDTH, "encoder_layers": LAYERS, "decoder_layers": LAYERS}
    sizes |= {"encoder_attention_heads": HEADS, "decoder_attention_heads": HEADS}
    sizes |= {"encoder_ffn_dim": 4 * WIDTH, "decoder_ffn_dim": 4 * WIDTH}
    config = hf.WhisperConfig(**WORDS, **sizes, decoder_start_token_id=1)
    return hf.WhisperForConditionalGeneration(config)


def unet() -> nn.Module:
    diffusers: Any = importlib.import_module("diffusers")
    model: nn.Module = diffusers.UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64),
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        attention_head_dim=8,
        norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    return model


def torch_encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, batch_first=True)
    encoder = nn.TransformerEncoder(layer, LAYERS)
    return nn.ModuleDict({"encoder": encoder, "head": nn.Linear(WIDTH, 5)})


class TorchViT(nn.Module):
    """A vision transformer built like torchvision's, with nn.MultiheadAttention."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_proj = nn.Conv2d(3, WIDTH, 8, stride=8)
        self.pos_embedding = nn.Parameter(torch.zeros(1, 16, WIDTH))
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "ln_1": nn.LayerNorm(WIDTH),
                    "self_attention": nn.MultiheadAttention(WIDTH, HEADS, batch_first=True),
                    "ln_2": nn.LayerNorm(WIDTH),
                    "mlp": nn.Sequential(
                        nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
                    ),
                }
            )
            for _ in range(LAYERS)
        )
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.conv_proj(images).flatten(2).transpose(1, 2) + self.pos_embedding
        for block in self.blocks:
            parts: Any = block
            normed = parts["ln_1"](x)
            x = x + parts["self_attention"](normed, normed, normed, need_weights=False)[0]
            x = x + parts["mlp"](parts["ln_2"](x))
        logits: torch.Tensor = self.head(x.mean(1))
        return logits


def lstm() -> nn.Module:
    layers = {"words": nn.Embedding(512, WIDTH), "lstm": nn.LSTM(WIDTH, WIDTH, LAYERS)}
    return nn.ModuleDict({**layers, "head": nn.Linear(WIDTH, 5)})


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "BERT": bert,
    "Llama": llama,
    "GPT-2": gpt2,
    "T5": t5,
    "Whisper": whisper,
    "Mamba": mamba,
    "ViT": vit,
    "Swin": swin,
    "ConvNeXt": convnext,
    "ResNet": resnet,
    "MobileNetV2": mobilenet,
    "Mixtral": mixtral,
    "Qwen2-MoE": qwen2_moe,
    "GPT-OSS": gpt_oss,
    "nn.TransformerEncoder": torch_encoder,
    "torchvision-like ViT": TorchViT,
    "nn.LSTM and a head": lstm,
    "diffusers UNet": unet,
}


class Reach(NamedTuple):
    """What targets reach of one model."""

    linear: Coverage  # the default targets without convolutions
    by_default: Coverage
    unpacked: Coverage | None  # after unpack_attention; None: no attention is packed
    with_experts: Coverage | None  # with stacks of experts that are named; None: it has none
    warned: bool  # linear_targets says that the default targets are little
    unscored: tuple[str, ...]  # layers whose weight is read and never called, so far as is known

    @property
    def left_out(self) -> tuple[LeftOut, ...]:
        """Of the last of these."""
        return (self.with_experts or self.unpacked or self.by_default).left_out


def reach(model: nn.Module) -> Reach:
    """What the default targets reach of a model, which is unpacked for it, and what can be added.

    Stacks of experts are asked for by the names of their parameters.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = linear_targets(model)
    linear = [name for name, module in found.items() if not isinstance(module, CONVOLUTIONS)]
    of_linear, part = coverage(model, linear), coverage(model, found)
    unscored = weights_read(model, found)
    by_default, unpacked, with_experts = part, None, None
    if any(isinstance(module, nn.MultiheadAttention) for module in model.modules()):
        unpack_attention(model)
        part = unpacked = coverage(model, linear_targets(model))
    stacked = [name for name, parameter in model.named_parameters() if parameter.ndim == 3]
    if any(group.kind == STACK for group in part.left_out):
        names = [*linear_targets(model), *(name for name in stacked if is_target(model, name))]
        with_experts = coverage(model, names)
    return Reach(of_linear, by_default, unpacked, with_experts, bool(caught), unscored)


def weights_read(model: Any, layers: Mapping[str, nn.Module]) -> tuple[str, ...]:
    """The layers that get adapters but no scores; known of transformers' models with one input."""
    inputs = {
        "input_ids": torch.arange(3, 19).view(2, 8),
        "pixel_values": torch.randn(2, 3, 32, 32),
    }
    name = getattr(model, "main_input_name", None)
    if name not in inputs or model.config.is_encoder_decoder:
        return ()

    def loss_fn(model: nn.Module, batch: Options) -> torch.Tensor:
        loss: torch.Tensor = model(**batch).logits.square().mean()
        return loss

    return tuple(read_without_call(model, loss_fn, {name: inputs[name]}, layers))


def is_target(model: nn.Module, name: str) -> bool:
    """Whether something of this name can get ranks."""
    try:
        return bool(linear_targets(model, name))
    except ValueError:
        return False


def lines(names: Collection[str]) -> list[str]:
    """The table, a line for each family, and below it why each kind of weight is left out."""
    result = [
        f"{'model':<22}{'linear':>7}{'default':>8}{'unpacked':>10}{'experts':>9}   left out then"
    ]
    reasons: dict[str, str] = {}
    for name in names:
        torch.manual_seed(0)
        try:
            model = FAMILIES[name]()
        except ModuleNotFoundError as missing:
            result.append(f"{name:<22}skipped: {missing.name} is not installed")
            continue
        row = reach(model)
        total = row.by_default.total
        left_out = ", ".join(f"{percent(g.entries, total)} {g.kind}" for g in row.left_out)
        reasons |= {group.kind: group.reason for group in row.left_out}
        marks = ("*" if row.warned else "") + ("†" if row.unscored else "")
        default = f"{share(row.by_default)}{marks:<1}"
        columns = f"{share(row.linear):>7}{default:>9}{share(row.unpacked):>9}"
        result.append(f"{name:<22}{columns}{share(row.with_experts):>9}   {left_out}".rstrip())
    legend = [f"{kind}: {reason}" for kind, reason in reasons.items()]
    return [
        *result,
        *legend,
        "* linear_targets warns that this is little",
        "† of these, some get adapters but no scores: their weight is read, they are never called",
    ]


def share(part: Coverage | None) -> str:
    """A column's entry: nothing where the column does not concern the model."""
    return "" if part is None else percent(part.reached, part.total)


def main() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of other libraries, about these small sizes
        print("What the targets reach, in shares of the entries of all matrices that multiply")
        print(
            "activations (no embeddings, biases or norms): linear layers alone; the default, with"
        )
        print("convolutions that are linear layers over channels; after unpack_attention, where a")
        print("model has packed attention; and with stacked experts that are named\n")
        print("\n".join(lines(FAMILIES)))


if __name__ == "__main__":
    main()
