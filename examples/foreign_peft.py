"""What the conformance kit says of PEFT: its LoRA layer, and its loader of adapters.

    python examples/foreign_peft.py > examples/results/foreign_peft.txt

PEFT's own code does all the work. Here are only the few lines that offer each contract's signature.
What PEFT refuses is skipped with the reason: gates, ranks of 0, patterns that are null. Most cases
have gates, so that each contract of the layer is tried a second time, with B diag(gate) in place of
B. Every report is printed as it comes out; the failures that it only names follow in full.
"""

from __future__ import annotations

import fnmatch
import inspect
import json
import re
import tempfile
import warnings
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import Linear
from reports import printed
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from minirank import reference, testing
from minirank.reference.peft_format import PREFIX

NO_GATE = "PEFT has no gates"
NO_RANK_0 = "PEFT refuses a rank of 0"
Reasons = dict[str, str]
CANNOT_LOAD: Reasons = {
    "patterns are null*": "PEFT raises AttributeError on a pattern that is null"
}


# ---- the layer -----------------------------------------------------------------------------------


def peft_layer(
    W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, scaling: float, transposed: bool = False
) -> Linear:
    """PEFT's layer around nn.Linear (or GPT-2's Conv1D), with these tensors as its own.

    They are not copied, so that gradients reach them.
    """
    d_in, d_out = W.shape if transposed else W.T.shape
    base = base_layer(d_in, d_out, transposed)
    set_tensor(base, "weight", W)
    set_tensor(base, "bias", b)
    rank = len(A)
    config = LoraConfig(
        r=rank, lora_alpha=1, fan_in_fan_out=transposed, target_modules=[], init_lora_weights=False
    )
    layer = Linear(base, "default", config, r=rank, is_target_conv_1d_layer=transposed)
    set_tensor(layer.lora_A["default"], "weight", A)
    set_tensor(layer.lora_B["default"], "weight", B)
    layer.scaling["default"] = scaling  # lora_alpha / r would round it
    return layer


def base_layer(d_in: int, d_out: int, transposed: bool) -> nn.Module:
    layer: Callable[..., nn.Module] = Conv1D
    return layer(d_out, d_in) if transposed else nn.Linear(d_in, d_out)


def weight_of(layer: Linear) -> Tensor:
    """The weight of the layer that PEFT's layer is wrapped around."""
    weight = layer.get_base_layer().weight
    assert isinstance(weight, Tensor)
    return weight


def set_tensor(module: nn.Module, name: str, tensor: Tensor | None) -> None:
    """In place of a parameter, this tensor itself, also one that is no leaf."""
    del module._parameters[name]
    setattr(module, name, tensor)


def lora_forward(
    x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, scaling: float, gate: None = None
) -> Tensor:
    """PEFT's forward pass. Its adapter casts x; its base layer takes it as it is."""
    y: Tensor = peft_layer(W, b, A, B, scaling)(x)
    return y


def merged_weight(W: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """What merge() makes of the weight. It adds in place, to a copy here."""
    layer = peft_layer(W.clone(), None, A, B, scaling)
    layer.merge()
    return weight_of(layer)


class Layer:
    """merge() and unmerge() of PEFT's layer, around a copy of W, which PEFT changes in place."""

    def __init__(
        self,
        W: Tensor,
        b: Tensor | None,
        A: Tensor,
        B: Tensor,
        scaling: float,
        transposed: bool = False,
    ) -> None:
        self.layer = peft_layer(W.clone(), b, A, B, scaling, transposed)

    @property
    def weight(self) -> Tensor:
        return weight_of(self.layer)

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y

    def merge(self) -> None:
        self.layer.merge()

    def unmerge(self) -> None:
        self.layer.unmerge()


# ---- the loader ----------------------------------------------------------------------------------


class Block(nn.Module):
    """Linear layers under names with dots, as the adapter's files name them."""

    def add(self, name: str, layer: nn.Module) -> None:
        *parents, last = name.split(".")
        module: nn.Module = self
        for parent in parents:
            if parent not in module._modules:
                module.add_module(parent, nn.Module())
            module = module.get_submodule(parent)
        module.add_module(last, layer)


def peft_delta_weight(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], name: str
) -> Tensor | None:
    """The files in a temporary folder, PeftModel.from_pretrained, and get_delta_weight().

    The configuration names no modules, so that target_modules are made the layers with tensors.
    """
    shapes: dict[str, list[int]] = {}
    for key, tensor in tensors.items():
        layer, _, kind = key.removeprefix(PREFIX).rpartition(".lora_")
        sizes = shapes.setdefault(layer, [0, 0])
        sizes[kind.startswith("A")] = tensor.shape[kind.startswith("A")]
    model = Block()
    for layer, (d_out, d_in) in {**{name: (3, 3)}, **shapes}.items():
        model.add(layer, base_layer(d_in, d_out, bool(config.get("fan_in_fan_out"))))
    dtype = next(iter(tensors.values())).dtype
    with tempfile.TemporaryDirectory() as folder:
        written = {**config, "target_modules": "|".join(map(re.escape, shapes))}
        Path(folder, "adapter_config.json").write_text(json.dumps(written))
        contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
        save_file(contiguous, Path(folder, "adapter_model.safetensors"))
        loaded = PeftModel.from_pretrained(model.to(dtype), folder, autocast_adapter_dtype=False)
    layer_of_peft = loaded.get_base_model().get_submodule(name)
    if not isinstance(layer_of_peft, Linear):
        return None
    delta: Tensor = layer_of_peft.get_delta_weight("default").detach()
    return delta


# ---- reports -------------------------------------------------------------------------------------


def folded(mine: Callable[..., Any]) -> Callable[..., Any]:
    """With B diag(gate) in place of B, which is how a gate can reach PEFT."""

    def call(*args: Any, gate: Tensor | None = None, **options: Any) -> Any:
        given = inspect.signature(mine).bind(*args, **options)
        if gate is not None:
            B = given.arguments["B"]
            given.arguments["B"] = B * gate.to(B.dtype)
        return mine(*given.args, **given.kwargs)

    return call


def refused(like: Any, gates: bool) -> Reasons:
    """The cases that PEFT cannot be asked, with the reason."""
    reasons = {}
    for case in testing.cases(like):
        if "rank 0" in case.name:
            reasons[case.name] = NO_RANK_0
        elif not gates and "gate" in case.arguments().options:
            reasons[case.name] = NO_GATE
    return reasons


def show(title: str, mine: Callable[..., Any], like: Any, skip: Reasons) -> None:
    print(f"\n==== {title} (peft {version('peft')}, torch {torch.__version__})")
    for dtype in (torch.float64, torch.float32):
        names = [case.name for case in testing.cases(like, dtype=dtype)]
        reasons = {glob: why for glob, why in skip.items() if fnmatch.filter(names, glob)}
        report = testing.check(mine, like=like, dtype=dtype, skip=reasons, on_fail=None)
        if dtype == torch.float64:
            print(printed(report))
            more = [f"also    {printed(result)[8:]}\n" for result in report.failed[6:]]
            print("".join(more), end="")
        else:
            print(f"in float32: {printed(report).splitlines()[0]}")
        print(f"not put to PEFT: {len(report.with_status('skipped'))}")


def main() -> None:
    warnings.simplefilter("ignore")
    contracts: list[tuple[str, Callable[..., Any], Any]] = [
        ("lora.Linear, forward and gradients", lora_forward, reference.lora_forward),
        ("lora.Linear.merge()", merged_weight, reference.merged_weight),
        ("lora.Linear, merge() and unmerge()", Layer, reference.Layer),
    ]
    for title, mine, like in contracts:
        show(title, mine, like, refused(like, gates=False))
        show(f"{title}, gates in B", folded(mine), like, refused(like, gates=True))
    loader = reference.peft_delta_weight
    show("PeftModel.from_pretrained", peft_delta_weight, loader, CANNOT_LOAD)


if __name__ == "__main__":
    main()
