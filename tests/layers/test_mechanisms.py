"""lora.py in half precision, and under every mechanism of PyTorch that may carry a layer."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from helpers.models import formula, inputs, layer, randomize
from torch import nn
from torch.utils.checkpoint import checkpoint

from minirank import LoRALinear, merge, unmerge

EXACT = {"rtol": 1e-13, "atol": 1e-13}


# ---- precision ---------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", [None, 0.5])
@pytest.mark.parametrize("adapter", [None, torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(dtype, adapter, gate):
    base = layer(16, 12, rank=0, dtype=dtype).base
    lora = LoRALinear(base, 4, gate=gate, dtype=adapter)
    assert lora.lora_A.dtype == (adapter or dtype)
    randomize(lora)
    x = inputs(8, 16, dtype=dtype)
    y = lora(x)
    assert y.dtype == dtype
    # Each of at most five roundings (Ax, gate, BAx, times s, the sum) is half a unit in the last place of a value no
    # larger than |W||x| + |b| + |B||A||x|.
    size = (
        x.double().abs()
        @ (base.weight.double().abs() + lora.lora_B.double().abs() @ lora.lora_A.double().abs()).T
    )
    bound = 5 / 2 * torch.finfo(dtype).eps * (size + base.bias.double().abs())
    assert ((y.double() - formula(lora, x, 1)).abs() <= bound).all()
    y.float().square().sum().backward()
    assert all(
        p.grad.ne(0).any() and p.grad.dtype == p.dtype for p in lora.parameters() if p.requires_grad
    )


@pytest.mark.parametrize("gate", [None, 1.0])
@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16])
def test_autocast_gives_what_the_base_gives(adapter, gate):
    lora = layer(dtype=torch.float32, trained=False)
    lora = LoRALinear(lora.base, 3, gate=gate, dtype=adapter)
    randomize(lora)
    x = inputs(4, 5, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = lora(x)
        assert y.dtype == lora.base(x).dtype == torch.bfloat16
    exact = formula(lora, x, 1)
    assert (y.double() - exact).abs().max() < 8 * torch.finfo(
        torch.bfloat16
    ).eps * exact.abs().max()
    y.float().sum().backward()
    assert lora.lora_A.grad.dtype == adapter
    assert lora.lora_A.grad.ne(0).any()


# ---- the mechanisms of PyTorch -----------------------------------------------------------------


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_torch_compile_in_one_graph(backend):
    torch._dynamo.reset()
    lora, x = layer(gate=0.5), inputs(4, 5)
    compiled = torch.compile(lora, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(x), formula(lora, x, 2), **EXACT)
    compiled(x).square().sum().backward()
    gradients = [p.grad.clone() for p in lora.parameters() if p.requires_grad]
    lora.zero_grad()
    lora(x).square().sum().backward()
    for got, parameter in zip(
        gradients, (p for p in lora.parameters() if p.requires_grad), strict=True
    ):
        torch.testing.assert_close(got, parameter.grad, rtol=1e-12, atol=1e-12)
    lora.enabled = False
    assert torch.equal(compiled(x), lora.base(x))


@pytest.mark.filterwarnings(
    "ignore:`torch.cpu.amp.autocast:FutureWarning"
)  # checkpoint's own, in torch 2.4
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(reentrant):
    lora, x = layer(gate=1.0, dropout=0.3).train(), inputs(4, 5).requires_grad_()
    gradients = []
    for run in (lora, lambda x: checkpoint(lora, x, use_reentrant=reentrant)):
        lora.zero_grad()
        torch.manual_seed(0)
        run(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in lora.parameters() if p.requires_grad])
    for direct, checkpointed in zip(*gradients, strict=True):
        assert torch.equal(direct, checkpointed)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("merged", [False, True])
def test_copies_are_equal_and_independent(copied, merged):
    lora, x = layer(gate=0.5), inputs(4, 5)
    weight = lora.base.weight.detach().clone()
    if merged:
        merge(lora)
    twin = copied(lora)
    assert torch.equal(twin(x), lora(x))
    randomize(twin, seed=9)
    unmerge(lora)
    torch.testing.assert_close(lora(x), formula(lora, x, 2), **EXACT)
    unmerge(twin)
    assert torch.equal(twin.base.weight, weight)
    assert not torch.equal(twin(x), lora(x))


def test_state_dict_has_the_expected_keys_and_restores_the_function():
    for gate, keys in ((None, []), (1.0, ["gate"])):
        lora, other = layer(gate=gate), layer(gate=gate, generator=5, trained=False)
        state = lora.state_dict()
        assert sorted(state) == sorted(["base.bias", "base.weight", "lora_A", "lora_B", *keys])
        x, file = inputs(4, 5), io.BytesIO()
        assert not torch.equal(other(x), lora(x))
        torch.save(state, file)
        file.seek(0)
        other.load_state_dict(torch.load(file, weights_only=True))
        assert torch.equal(other(x), lora(x))


def test_the_state_of_a_merged_layer_is_neither_saved_nor_loaded():
    lora = layer()
    state = lora.state_dict()
    merge(lora)
    weight = lora.base.weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"unmerge\(\)"):
        lora.state_dict()
    with pytest.raises(RuntimeError, match=r"unmerge\(\)"):
        lora.load_state_dict(state)
    assert torch.equal(lora.base.weight, weight)


def test_hooks_on_the_base_survive_and_see_the_base():
    base, seen = nn.Linear(5, 7, dtype=torch.float64), []
    base.register_forward_hook(lambda module, args, y: seen.append((args[0], y)))
    lora, x = LoRALinear(base, 2), inputs(4, 5)
    randomize(lora)
    lora(x)
    assert len(seen) == 1
    assert torch.equal(seen[0][0], x)
    assert torch.equal(seen[0][1], F.linear(x, base.weight, base.bias))


def test_vmap_over_a_stack_of_adapters():
    lora, x = layer(gate=1.0), inputs(4, 5)
    names = ("lora_A", "lora_B", "gate")
    stack = {
        name: inputs(6, *lora.get_parameter(name).shape, seed=i) for i, name in enumerate(names)
    }
    outputs = torch.func.vmap(lambda p: torch.func.functional_call(lora, p, (x,)))(stack)
    for i in range(6):
        with torch.no_grad():
            for name in names:
                lora.get_parameter(name).copy_(stack[name][i])
        torch.testing.assert_close(outputs[i], formula(lora, x, 2), **EXACT)


def test_a_new_layer_takes_the_mode_of_its_base():
    base = nn.Linear(5, 7).eval()
    assert not LoRALinear(base, 2).training
    assert LoRALinear(base.train(), 2).training


def test_half_and_double_reach_the_weight_that_a_merge_put_aside():
    lora, x = layer(dtype=torch.float32), inputs(4, 5)
    weight = lora.base.weight.detach().clone()
    merge(lora)
    unmerge(lora.double())
    assert torch.equal(lora.base.weight, weight.double())
    torch.testing.assert_close(lora(x), formula(lora, x, 2), **EXACT)
