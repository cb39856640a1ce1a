"""Layers whose weight lies packed: toys in plain torch, and those of libraries that are there."""

from __future__ import annotations

import copy
import logging
import warnings

import pytest
import torch
from torch import nn

from minirank.packed import dequantized_weight, packed_shape


class Int8Linear(nn.Module):
    """An int8 weight with a scale for each row. Like bitsandbytes' layer it casts its bias to the
    type of its input, in place, and notes the type of its first input. It does not say how to
    dequantise."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        W = linear.weight.detach()
        scale = W.abs().amax(1) / 127
        codes = (W / scale[:, None]).round().to(torch.int8)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.register_buffer("scale", scale)
        self.bias = copy.deepcopy(linear.bias)
        self.first_type = None

    def forward(self, x):
        if self.first_type is None:
            self.first_type = x.dtype
        if self.bias is not None and self.bias.dtype != x.dtype:
            self.bias.data = self.bias.data.to(x.dtype)
        W = self.weight.to(x.dtype) * self.scale.to(x.dtype)[:, None]
        return nn.functional.linear(x, W, self.bias)


class FourBitLinear(nn.Module):
    """Two weights in each byte, like HQQ: no attribute `weight`, a bias that is no parameter, and
    a dequantize(). It computes in one type alone."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        W = linear.weight.detach()
        self.compute_dtype = W.dtype
        self.step = float(W.abs().max()) / 7
        codes = ((W / self.step).round() + 8).to(torch.uint8).flatten()
        self.W_q = nn.Parameter(codes[::2] * 16 + codes[1::2], requires_grad=False)
        self.bias = None if linear.bias is None else linear.bias.detach().clone()

    def dequantize(self):
        codes = torch.stack([self.W_q // 16, self.W_q % 16], 1).to(self.compute_dtype) - 8
        return codes.view(self.out_features, self.in_features) * self.step

    def forward(self, x):
        return nn.functional.linear(x, self.dequantize(), self.bias)


class RepackingLinear(FourBitLinear):
    """Like bitsandbytes' 4-bit layer on the CPU: an evaluation without gradients rounds the weight
    for good, and no gradient passes afterwards."""

    def __init__(self, linear):
        super().__init__(linear)
        self.weight, self.W_q = self.W_q, None
        self.weight.quant_state = QuantState()
        self.support_avx512bf16_for_cpu = True

    def dequantize(self):
        self.W_q = self.weight
        try:
            return super().dequantize()
        finally:
            self.W_q = None

    def forward(self, x):
        state = self.weight.quant_state
        if self.support_avx512bf16_for_cpu and not self.training and not x.requires_grad:
            self.weight.data = self.weight.data & 0xEE
            state.packing_format_for_cpu = True
        if state.packing_format_for_cpu:
            x = x.detach()
        return super().forward(x)


class QuantState:
    packing_format_for_cpu = False


# ---- of libraries -------------------------------------------------------------------------------


def imported(name):
    """An optional library, or the test is skipped."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name, exc_type=ImportError)


def bitsandbytes_8bit(linear):
    bnb = imported("bitsandbytes")
    bias = linear.bias is not None
    layer = bnb.nn.Linear8bitLt(
        linear.in_features, linear.out_features, bias=bias, has_fp16_weights=False
    )
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")  # this quantises


def bitsandbytes_4bit(linear):
    bnb = imported("bitsandbytes")
    bias = linear.bias is not None
    layer = bnb.nn.Linear4bit(linear.in_features, linear.out_features, bias=bias, quant_type="nf4")
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")


def torchao_int8(linear):
    quantization = imported("torchao.quantization")
    parent = nn.Sequential(copy.deepcopy(linear))
    quantization.quantize_(parent, quantization.Int8WeightOnlyConfig())
    return parent[0]


def torchao_int4(linear):
    quantization = imported("torchao.quantization")
    parent = nn.Sequential(copy.deepcopy(linear))
    group = imported("torchao.quantization.granularity").PerGroup(32)
    quantization.quantize_(parent, quantization.IntxWeightOnlyConfig(torch.int4, group))
    return parent[0]


def quanto_int8(linear):
    quanto = imported("optimum.quanto")
    parent = nn.Sequential(copy.deepcopy(linear))
    quanto.quantize(parent, weights=quanto.qint8)
    quanto.freeze(parent)
    return parent[0]


def hqq_4bit(linear):
    hqq = imported("hqq.core.quantize")
    config = hqq.BaseQuantizeConfig(nbits=4, group_size=64)
    return hqq.HQQLinear(
        copy.deepcopy(linear), config, compute_dtype=linear.weight.dtype, device="cpu"
    )


TOYS = {"int8": Int8Linear, "4 bits": FourBitLinear}
LIBRARIES = {
    "bitsandbytes 8 bits": bitsandbytes_8bit,
    "bitsandbytes 4 bits": bitsandbytes_4bit,
    "torchao int8": torchao_int8,
    "torchao int4": torchao_int4,
    "quanto int8": quanto_int8,
    "hqq 4 bits": hqq_4bit,
}
EVERY = TOYS | LIBRARIES


# ---- models -------------------------------------------------------------------------------------


def packed_model(pack, dtype=torch.float32, seed=0, width=64):
    """Packed layers "0" and "2", a plain head "4"; not the same layers for another seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        up, down, head = nn.Linear(width, 64), nn.Linear(64, 64, bias=False), nn.Linear(64, 4)
        layers = [layer.to(dtype) for layer in (up, down, head)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the library that quantises
        packed = [pack(layer) for layer in layers[:2]]
    return nn.Sequential(packed[0], nn.Tanh(), packed[1], nn.Tanh(), layers[2])


def dequantized(model):
    """The same model with nn.Linear in place of packed layers."""
    modules = []
    for module in model:
        shape = packed_shape(module)
        if shape is not None:
            W, bias = dequantized_weight(module, shape), module.bias
            plain = nn.Linear(shape[1], shape[0], bias=bias is not None, dtype=W.dtype)
            plain.weight = nn.Parameter(W.clone())
            if bias is not None:
                plain.bias = nn.Parameter(bias.detach().clone().to(W.dtype))
            module = plain
        modules.append(copy.deepcopy(module))
    return nn.Sequential(*modules)


def data(dtype=torch.float32, width=64):
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(8, width, generator=generator, dtype=torch.float64).to(dtype),
            torch.randint(4, (8,), generator=generator),
        )
        for _ in range(2)
    ]


def loss_fn(model, batch):
    return nn.functional.cross_entropy(
        model(batch[0]).to(torch.promote_types(batch[0].dtype, torch.float32)), batch[1]
    )


def bits(model):
    """{name: (type, bytes)} of every tensor that the model's state holds, and of plain attributes:
    equal if and only if nothing has changed."""
    found = {}

    def add(name, value):
        if isinstance(value, torch.Tensor):
            if hasattr(value, "__tensor_flatten__"):
                for key in value.__tensor_flatten__()[0]:
                    add(f"{name}.{key}", getattr(value, key))
            else:
                entries = value.detach().contiguous().flatten().view(torch.uint8)
                found[name] = value.dtype, tuple(value.shape), entries.tolist()
        elif isinstance(value, (str, bool, int, float, torch.dtype, type(None))):
            found[name] = value

    for name, module in model.named_modules():
        for key, value in {**vars(module), **module._parameters, **module._buffers}.items():
            add(f"{name}.{key}", value)
            for inner, part in getattr(value, "__dict__", {}).items():
                if "Tensor" not in type(value).__name__ and key not in ("state", "weight"):
                    add(f"{name}.{key}.{inner}", part)
    for key, value in model.state_dict().items():
        add(f"state {key}", value)
    return found
