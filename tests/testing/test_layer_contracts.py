"""The contracts of the layer: right implementations pass, wrong ones are named."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.kit_cases import assert_twins_are_named, failed, tree
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import minirank
from minirank import LoRALinear, reference, testing

REFERENCES = [
    *(reference.lora_forward, reference.merged_weight, reference.resize, reference.Layer),
    testing.round_trip,
]
NUMPY = (np.asarray, torch.as_tensor)


# ---- the reference, and minirank's own functions -------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("function", REFERENCES, ids=lambda function: function.__name__)
def test_the_reference_keeps_its_contract(function, dtype):
    report = testing.check(function, like=function, dtype=dtype)
    assert {result.status for result in report} == {"passed"}


@pytest.mark.parametrize("function", REFERENCES, ids=lambda function: function.__name__)
def test_every_wrong_twin_is_caught_and_named(function):
    assert_twins_are_named(function)


def lora_linear(W, b, A, B, scaling, gate=None, transposed=False):
    d_in, d_out = W.shape if transposed else W.shape[::-1]
    base = Conv1D(d_out, d_in) if transposed else nn.Linear(d_in, d_out, bias=b is not None)
    base.weight = nn.Parameter(W.clone(), requires_grad=False)
    base.bias = None if b is None else nn.Parameter(b, requires_grad=False)
    layer = LoRALinear(base, 0, gate=None if gate is None else 1.0)
    layer.scaling = scaling
    layer.lora_A, layer.lora_B = nn.Parameter(A.detach()), nn.Parameter(B.detach())
    if gate is not None:
        layer.gate = nn.Parameter(gate.detach())
    return layer


def our_forward(x, W, b, A, B, scaling, gate=None):
    layer = lora_linear(W, b, A, B, scaling, gate)
    parameters = {"lora_A": A, "lora_B": B} | ({} if gate is None else {"gate": gate})
    return torch.func.functional_call(layer, parameters, (x,))


def our_merged_weight(W, A, B, scaling, gate=None):
    layer = lora_linear(W, None, A, B, scaling, gate)
    minirank.merge(layer)
    return layer.base.weight


class OurLayer:
    def __init__(self, *matrices, **options):
        self.layer = lora_linear(*matrices, **options)
        self.merge = lambda: minirank.merge(self.layer)
        self.unmerge = lambda: minirank.unmerge(self.layer)

    def __call__(self, x):
        if self.layer.bias is None and not isinstance(self.layer.base, nn.Linear):
            raise AssertionError("Conv1D always has a bias")
        return self.layer(x)

    @property
    def weight(self):
        return self.layer.base.weight


def our_resize(old, keep, add):
    d_out, d_in = old["B"].shape[0], old["A"].shape[1]
    W = torch.zeros(d_out, d_in, dtype=old["A"].dtype)
    layer = lora_linear(W, None, old["A"], old["B"], old["scaling"], old["gate"])
    model = nn.Sequential(layer)
    names = {"A": "lora_A", "B": "lora_B", "gate": "gate"}
    optimizer = torch.optim.Adam([layer.get_parameter(name) for name in names.values()])
    for key, name in names.items():
        moments = {moment: old[moment][key].clone() for moment in ("exp_avg", "exp_avg_sq")}
        state = {"step": torch.tensor(float(old["step"])), **moments}
        optimizer.state[layer.get_parameter(name)] = state
    allocation = SimpleNamespace(ranks={"0": int(keep.sum()) + add}, keep={"0": keep})
    minirank.resize(model, allocation, optimizer, generator=torch.default_generator)
    new = {key: layer.get_parameter(name) for key, name in names.items()}
    states = {key: optimizer.state[parameter] for key, parameter in new.items()}
    moments = {
        moment: {key: state[moment] for key, state in states.items()}
        for moment in ("exp_avg", "exp_avg_sq")
    }
    return {**new, **moments, "scaling": layer.scaling, "step": states["A"]["step"]}


def our_round_trip(layers, path):
    plain = {}
    for name, layer in layers.items():
        A, B = layer["A"], layer["B"]
        plain[name] = nn.Linear(A.shape[1], B.shape[0], dtype=A.dtype).requires_grad_(False)
    adapted = {
        name: lora_linear(base.weight.detach(), base.bias, *layer_parts(layers[name]))
        for name, base in plain.items()
    }
    minirank.save_adapter(tree(adapted), path)
    loaded = minirank.load_adapter(tree(plain), path)
    return {
        name: {"A": new.lora_A, "B": new.lora_B, "gate": new.gate, "scaling": new.scaling}
        for name, new in loaded.items()
    }


def layer_parts(layer):
    return layer["A"], layer["B"], layer["scaling"], layer["gate"]


OURS = {
    "lora_forward": (our_forward, reference.lora_forward),
    "merged_weight": (our_merged_weight, reference.merged_weight),
    "Layer": (OurLayer, reference.Layer),
    "resize": (our_resize, reference.resize),
    "round_trip": (our_round_trip, testing.round_trip),
}


@pytest.mark.parametrize("name", OURS)
def test_our_own_function_keeps_the_contract(name):
    ours, like = OURS[name]
    report = testing.check(ours, like=like)
    assert {result.status for result in report} == {"passed"}


# ---- lora_forward --------------------------------------------------------------------------------


def by_the_merged_weight(x, W, b, A, B, scaling, gate=None):
    wide = torch.promote_types(x.dtype, A.dtype)
    update = scaling * (B if gate is None else B * gate) @ A
    return F.linear(x.to(wide), W.to(wide) + update, None if b is None else b.to(wide)).to(x.dtype)


def rank_by_rank(x, W, b, A, B, scaling, gate=None):
    y = torch.zeros(*x.shape[:-1], len(W), dtype=torch.promote_types(x.dtype, A.dtype))
    for i in reversed(range(len(A))):
        c = 1.0 if gate is None else gate[i]
        y = y + scaling * (x.to(A.dtype) @ A[i])[..., None] * c * B[:, i]
    y = F.linear(x, W, b) + y.to(x.dtype)
    return y


def in_chunks(x, W, b, A, B, scaling, gate=None):
    rows = x.reshape(-1, x.shape[-1])
    chunks = [reference.lora_forward(chunk, W, b, A, B, scaling, gate) for chunk in rows.split(2)]
    return torch.cat(chunks).reshape(*x.shape[:-1], len(W))


def in_float64(x, W, b, A, B, scaling, gate=None):
    wide = [t if t is None else t.double() for t in (x, W, b, A, B)]
    c = None if gate is None else gate.double()
    return reference.lora_forward(*wide, scaling, c).to(x.dtype)


class Kernel(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, W, b, A, B, scaling, gate):
        ctx.save_for_backward(x, W, A, B, gate)
        ctx.scaling = scaling
        return reference.lora_forward(x, W, b, A, B, scaling, gate)

    @staticmethod
    def backward(ctx, grad_y):
        x, W, A, B, gate = ctx.saved_tensors
        found = by_hand(x, W, None, A, B, ctx.scaling, gate, grad_y)
        return found["x"], None, None, found["A"], found["B"], None, found.get("gate")


def by_hand(x, W, b, A, B, scaling, gate, grad_y):
    dtype = A.dtype
    rows, g = x.reshape(-1, x.shape[-1]).to(dtype), grad_y.reshape(-1, len(W)).to(dtype)
    c = torch.ones(len(A), dtype=dtype) if gate is None else gate
    h, grad_h = rows @ A.T, scaling * g @ B
    found = {
        "x": (g @ W.to(dtype) + (grad_h * c) @ A).reshape(x.shape).to(x.dtype),
        "A": (grad_h * c).T @ rows,
        "B": scaling * g.T @ (h * c),
    }
    return found if gate is None else found | {"gate": (grad_h * h).sum(0)}


def kernel(x, W, b, A, B, scaling, gate=None):
    return Kernel.apply(x, W, b, A, B, scaling, gate)


@pytest.mark.parametrize(
    "mine", [by_the_merged_weight, rank_by_rank, in_chunks, in_float64, kernel]
)
def test_harmless_forwards_pass(mine):
    report = testing.check(mine, like=reference.lora_forward, on_fail=None)
    assert not report.failed, str(report)


def test_a_numpy_port_passes_with_and_without_gradients_of_its_own():
    def forward(x, W, b, A, B, scaling, gate=None):
        h = x @ A.T if gate is None else x @ A.T * gate
        y = x @ W.T + x.dtype.type(scaling) * (h @ B.T)
        return y if b is None else y + b

    def backward(x, W, b, A, B, scaling, gate, grad_y):
        given = [t if t is None else torch.tensor(t) for t in (x, W, b, A, B)]
        c = None if gate is None else torch.tensor(gate)
        found = by_hand(*given, float(scaling), c, torch.tensor(grad_y))
        return {key: value.numpy() for key, value in found.items()}

    options = {"like": reference.lora_forward, "convert": NUMPY}
    report = testing.check(forward, gradients=False, **options)
    assert [result.case for result in report.with_status("skipped")] == [
        "bfloat16 base, float32 adapter"
    ]
    report = testing.check(forward, backward=backward, **options)
    assert len(report.with_status("skipped")) == 2
    wrong = testing.check(
        forward, backward=lambda *args: backward(*args[:5], 1.0, *args[6:]), on_fail=None, **options
    )
    assert {"gradients" in result.case for result in wrong.failed} == {True}
    assert "without the scaling in the gradients" in wrong.failed[0].hint


def other_dtype(*args, **options):
    return reference.lora_forward(*args, **options).float()


def flattened(x, *rest, **options):
    return reference.lora_forward(x.reshape(-1, x.shape[-1]), *rest, **options)


def contiguous_only(x, *rest, **options):
    rows = torch.as_strided(x, x.shape, torch.empty(x.shape).stride(), x.storage_offset())
    return reference.lora_forward(rows, *rest, **options)


def matrices_contiguous_only(x, W, b, A, B, scaling, gate=None):
    A, B = (torch.as_strided(m, m.shape, (m.shape[1], 1), m.storage_offset()) for m in (A, B))
    return reference.lora_forward(x, W, b, A, B, scaling, gate)


def scales_x_in_place(x, W, b, A, B, scaling, gate=None):
    y = reference.lora_forward(x, W, b, A, B, scaling, gate)
    with torch.no_grad():
        x.mul_(scaling)
    return y


def tiled(x, W, b, A, B, scaling, gate=None):
    """Rows beyond the last whole tile of 64 are left out."""
    y = reference.lora_forward(x, W, b, A, B, scaling, gate)
    whole = len(y) - len(y) % 64 if y.ndim > 1 and len(y) > 64 else len(y)
    mask = (torch.arange(len(y)) < whole).to(y) if y.ndim > 1 else torch.ones_like(y)
    return y * (mask.reshape(-1, *[1] * (y.ndim - 1)) if y.ndim > 1 else mask)


def tf32(x, W, b, A, B, scaling, gate=None):
    def cut(t):
        return t + (t.detach().to(torch.float16).to(t.dtype) - t.detach())

    c = None if gate is None else cut(gate)
    return reference.lora_forward(cut(x), cut(W), b, cut(A), cut(B), scaling, c)


def reuses_its_output(buffers):
    def mine(x, W, b, A, B, scaling, gate=None):
        y = reference.lora_forward(x, W, b, A, B, scaling, gate)
        if y.requires_grad:
            return y
        key = (y.shape, y.dtype)
        return buffers.setdefault(key, torch.empty_like(y)).copy_(y)

    return mine


def keeps_the_first_update(cache):
    def mine(x, W, b, A, B, scaling, gate=None):
        key = (id(A), A.shape)
        update = cache.setdefault(key, (A, scaling * (B if gate is None else B * gate) @ A))[1]
        return x @ W.T + x @ update.T if b is None else x @ W.T + x @ update.T + b

    return mine


class BackwardOfContiguous(Kernel):
    @staticmethod
    def backward(ctx, grad_y):
        dense = torch.as_strided(grad_y, grad_y.shape, torch.empty(grad_y.shape).stride())
        return Kernel.backward(ctx, dense)


class BackwardOnce(Kernel):
    @staticmethod
    def backward(ctx, grad_y):
        found = Kernel.backward(ctx, grad_y)
        ctx.scaling = 1.0
        return found


class LastRowsGradient(Kernel):
    """The gradients of A and B are those of the last sample, not the sum over samples."""

    @staticmethod
    def backward(ctx, grad_y):
        x, W, A, B, gate = ctx.saved_tensors
        found = by_hand(x, W, None, A, B, ctx.scaling, gate, grad_y)
        part = by_hand(x[-1:], W, None, A, B, ctx.scaling, gate, grad_y[-1:])
        return found["x"], None, None, part["A"], part["B"], None, found.get("gate")


def of(function):
    return lambda x, W, b, A, B, s, gate=None: function.apply(x, W, b, A, B, s, gate)


def no_autograd(*args, **options):
    with torch.no_grad():
        return reference.lora_forward(*args, **options)


WRONG_FORWARDS = {
    "another dtype": other_dtype,
    "another shape": flattened,
    "strides of x": contiguous_only,
    "strides of A and B": matrices_contiguous_only,
    "x changed": scales_x_in_place,
    "rows beside tiles": tiled,
    "half the digits": tf32,
    "one output buffer": reuses_its_output({}),
    "a stale update": keeps_the_first_update({}),
    "strides of the gradient": of(BackwardOfContiguous),
    "backward changes what it saved": of(BackwardOnce),
    "gradients of one sample": of(LastRowsGradient),
    "no autograd": no_autograd,
}


@pytest.mark.parametrize("name", WRONG_FORWARDS)
def test_wrong_forwards_are_caught(name):
    failed(WRONG_FORWARDS[name], reference.lora_forward)


def test_a_forward_without_autograd_is_told_so():
    texts = [result.got for result in failed(no_autograd, reference.lora_forward)]
    assert all("Pass backward=" in text for text in texts)
    testing.check(no_autograd, like=reference.lora_forward, gradients=False)


# ---- merged_weight -------------------------------------------------------------------------------


def test_harmless_merges_pass():
    def in_float64(W, A, B, scaling, gate=None):
        c = 1.0 if gate is None else gate.double()
        return (W.double() + scaling * (B.double() * c) @ A.double()).to(W.dtype)

    def rank_by_rank(W, A, B, scaling, gate=None):
        wide = torch.promote_types(torch.promote_types(W.dtype, A.dtype), torch.float32)
        result = W.to(wide)
        for i in range(len(A)):
            c = 1.0 if gate is None else gate[i].to(wide)
            result = result + scaling * c * torch.outer(B[:, i].to(wide), A[i].to(wide))
        return result.to(W.dtype)

    def gate_on_A(W, A, B, scaling, gate=None):
        A = A.float() if A.dtype == torch.bfloat16 else A
        gated = A if gate is None else gate[:, None].to(A.dtype) * A
        return reference.merged_weight(W, scaling * gated, B, 1.0)

    for mine in (in_float64, rank_by_rank, gate_on_A):
        testing.check(mine, like=reference.merged_weight)


def test_wrong_merges_are_caught():
    like = reference.merged_weight

    def into_W(W, A, B, scaling, gate=None):
        return W.copy_(reference.merged_weight(W, A, B, scaling, gate))

    def product_in_the_adapters_dtype(W, A, B, scaling, gate=None):
        update = scaling * (B if gate is None else B * gate) @ A
        return (W.to(torch.promote_types(W.dtype, torch.float32)) + update).to(W.dtype)

    def truncated(W, A, B, scaling, gate=None):
        exact = reference.merged_weight(W.double(), A.double(), B.double(), scaling, gate)
        rounded = exact.to(W.dtype)
        up = torch.nextafter(rounded, torch.full_like(rounded, -torch.inf))
        return torch.where(rounded.double() > exact, up, rounded)

    assert "changed in place" in failed(into_W, like)[0].got
    names = {result.case for result in failed(product_in_the_adapters_dtype, like)}
    assert names == {"W bfloat16, adapter bfloat16", "W float32, adapter bfloat16"}
    assert any("rounded once" in result.expected for result in failed(truncated, like))


# ---- resize --------------------------------------------------------------------------------------


def rearranged(order):
    """The reference's outcome with its ranks in another order."""

    def mine(layer, keep, add):
        new = reference.resize(layer, keep, add)
        places = order(len(new["A"]))

        def moved(part):
            return {"A": part["A"][places], "B": part["B"][:, places], "gate": part["gate"][places]}

        return {
            **new,
            **moved(new),
            **{moment: moved(new[moment]) for moment in ("exp_avg", "exp_avg_sq")},
        }

    return mine


def test_harmless_resizes_pass():
    def normal_start(layer, keep, add):
        new = reference.resize(layer, keep, add)
        if add:
            new["A"][-add:] = torch.randn(add, new["A"].shape[1])
        return new

    def tensors_for_numbers(layer, keep, add):
        new = reference.resize(layer, keep, add)
        return {**new, "step": torch.as_tensor(new["step"]), "scaling": np.float64(new["scaling"])}

    backwards = rearranged(lambda rank: list(range(rank))[::-1])
    rotated = rearranged(lambda rank: [*range(1, rank), 0][:rank])
    for mine in (normal_start, tensors_for_numbers, backwards, rotated):
        testing.check(mine, like=reference.resize)


def changed_resize(change):
    def mine(layer, keep, add):
        new = reference.resize(layer, keep, add)
        change(new, layer, keep, add)
        return new

    return mine


def one_row_for_all(new, layer, keep, add):
    if add:
        new["A"][-add:] = torch.rand(1, new["A"].shape[1], dtype=new["A"].dtype)


def negative_zeros_lost(new, layer, keep, add):
    new["B"] = new["B"] + 0.0


def moments_of_another_order(new, layer, keep, add):
    new["exp_avg"] = {**new["exp_avg"], "B": new["exp_avg"]["B"].flip(1)}


def in_place(new, layer, keep, add):
    layer["gate"] = new["gate"]


def small_B(new, layer, keep, add):
    if add:
        new["B"][:, -add:] = 1e-12


def own_seed(new, layer, keep, add):
    generator = torch.Generator().manual_seed(0)
    shape = (add, new["A"].shape[1])
    if add:
        new["A"][-add:] = torch.rand(shape, generator=generator, dtype=new["A"].dtype)


@pytest.mark.parametrize(
    "change",
    [one_row_for_all, negative_zeros_lost, moments_of_another_order, in_place, small_B, own_seed],
)
def test_wrong_resizes_are_caught(change):
    failed(changed_resize(change), reference.resize)


# ---- Layer ---------------------------------------------------------------------------------------


class Copying(reference.Layer):
    """Merges into a weight of its own, in place."""

    def __init__(self, W, *args, **options):
        super().__init__(W.clone(), *args, **options)

    def merge(self):
        if self.original is None:
            saved, own = self.weight.clone(), self.weight
            super().merge()
            self.weight, self.original = own.copy_(self.weight), saved

    def unmerge(self):
        if self.original is not None:
            self.weight.copy_(self.original)
            self.original = None


class AsModule(nn.Module):
    def __init__(self, *args, **options):
        super().__init__()
        self.inner = reference.Layer(*args, **options)
        self.weight = nn.Parameter(self.inner.weight, requires_grad=False)

    def forward(self, x):
        return self.inner(x)

    def merge(self):
        self.inner.merge()
        self.weight = nn.Parameter(self.inner.weight, requires_grad=False)

    def unmerge(self):
        self.inner.unmerge()
        self.weight = nn.Parameter(self.inner.weight, requires_grad=False)


class Tracked(reference.Layer):
    """Keeps ΔW, and W beside it."""

    def __init__(self, W, b, A, B, scaling, gate=None, transposed=False):
        super().__init__(W, b, A, B, scaling, gate, transposed)
        self.kept = copy.deepcopy(W)

    def unmerge(self):
        super().unmerge()
        self.weight = self.kept


class InNumpy:
    def __init__(self, W, b, A, B, scaling, gate=None, transposed=False):
        update = scaling * (B if gate is None else B * gate) @ A
        self.original, self.update = W, (update.T if transposed else update).astype(W.dtype)
        self.bias, self.transposed, self.weight = b, transposed, W

    def merge(self):
        self.weight = self.original + self.update

    def unmerge(self):
        self.weight = self.original

    def __call__(self, x):
        W = self.original + self.update
        y = x @ (W if self.transposed else W.T)
        return y if self.bias is None else y + self.bias


def test_harmless_layers_pass():
    for mine in (Copying, AsModule, Tracked):
        testing.check(mine, like=reference.Layer)
    testing.check(InNumpy, like=reference.Layer, convert=NUMPY)


class OneForAll(reference.Layer):
    """The weight set aside is the class's, not the layer's."""

    saved = None

    @property
    def original(self):
        return OneForAll.saved

    @original.setter
    def original(self, value):
        OneForAll.saved = value


class IntoTheGivenW(reference.Layer):
    def merge(self):
        if self.original is None:
            saved, own = self.weight.clone(), self.weight
            super().merge()
            self.weight, self.original = own.copy_(self.weight), saved


class UnmergesByAddingZero(reference.Layer):
    def unmerge(self):
        if self.original is not None:
            self.weight, self.original = self.original + 0.0, None


class MergesToFloat32(reference.Layer):
    def merge(self):
        super().merge()
        self.weight = self.weight.float()

    def __call__(self, x):
        W = self.weight.to(x.dtype)
        saved, self.weight = self.weight, W
        y = super().__call__(x)
        self.weight = saved
        return y


class RaisesWhenUnmergedTwice(reference.Layer):
    def unmerge(self):
        if self.original is None:
            raise RuntimeError("not merged")
        super().unmerge()


class WithoutBiasWhenMerged(reference.Layer):
    def __call__(self, x):
        if self.original is None:
            return super().__call__(x)
        return x @ (self.weight if self.transposed else self.weight.T)


@pytest.mark.parametrize(
    "mine",
    [
        *(OneForAll, IntoTheGivenW, UnmergesByAddingZero, MergesToFloat32),
        *(RaisesWhenUnmergedTwice, WithoutBiasWhenMerged),
    ],
)
def test_wrong_layers_are_caught(mine):
    failed(mine, reference.Layer)


# ---- round_trip ----------------------------------------------------------------------------------


def pickled(layers, path):
    torch.save(layers, path)
    return torch.load(path, weights_only=False)


def memory_mapped(layers, path):
    flat = {}
    for name, layer in layers.items():
        for key in ("A", "B", "gate"):
            if layer[key] is not None:
                flat[f"{name}.{key}"] = layer[key].contiguous().clone()
        flat[f"{name}.scaling"] = torch.tensor(layer["scaling"], dtype=torch.float64)
    save_file(flat, path)
    found = load_file(path)
    read = {}
    for name in sorted(layers, reverse=True):
        read[name] = {key: found.get(f"{name}.{key}") for key in ("A", "B", "gate")}
        read[name]["scaling"] = found[f"{name}.scaling"]
    return read


def numpy_archive(layers, path):
    arrays = {}
    for i, layer in enumerate(layers.values()):
        arrays |= {f"{i}.{key}": np.array(value) for key, value in layer.items() if key != "gate"}
        if layer["gate"] is not None:
            arrays[f"{i}.gate"] = layer["gate"]
    np.savez(path, **arrays)
    with np.load(f"{path}.npz") as found:
        return {
            name: {key: found.get(f"{i}.{key}") for key in ("A", "B", "gate", "scaling")}
            for i, name in enumerate(layers)
        }


def test_harmless_round_trips_pass():
    testing.check(pickled, like=testing.round_trip)
    testing.check(memory_mapped, like=testing.round_trip)
    testing.check(numpy_archive, like=testing.round_trip, convert=NUMPY)


def test_wrong_round_trips_are_caught():
    def writes_nothing(layers, path):
        return copy.deepcopy(layers)

    def returns_what_it_was_given(layers, path):
        testing.round_trip(layers, path)
        return layers

    def appends(layers, path):
        with open(path, "ab") as file:
            torch.save(layers, file)
        return torch.load(path, weights_only=False)

    def two_files(layers, path):
        found = testing.round_trip(layers, path)
        with open(f"{path}.json", "w") as file:
            file.write("{}")
        return found

    def short_names(layers, path):
        found = testing.round_trip(layers, path)
        return {name: found[[n for n in found if n.startswith(name[:3])][-1]] for name in found}

    def as_decimal_text(layers, path):
        found = testing.round_trip(layers, path)
        for layer in found.values():
            rows = [[float(f"{v:.8g}") for v in row] for row in layer["A"].tolist()]
            layer["A"] = torch.tensor(rows, dtype=layer["A"].dtype).reshape(layer["A"].shape)
        return found

    for mine in (
        *(writes_nothing, returns_what_it_was_given, appends, two_files, short_names),
        as_decimal_text,
    ):
        failed(mine, testing.round_trip, dtype=torch.float64)


# ---- check_lora_layer ----------------------------------------------------------------------------


def test_the_layer_check_reports_like_the_kit():
    x, W, A, B = torch.ones(2, 4), torch.ones(3, 4), torch.ones(2, 4), torch.ones(3, 2)
    matrices = {"weight": W, "bias": None, "A": A, "B": B, "scaling": 3.0}
    wrong = lora_linear(W, None, A, B, 1.5)
    with pytest.raises(testing.ConformanceError) as caught:
        testing.check_lora_layer(wrong, x, **matrices)
    (result,) = caught.value.report
    assert (result.status, result.entry) == ("failed", "y[0, 0]")
    assert (result.expected, result.got, result.error) == ("28", "16", 12.0)
    assert result.allowed == pytest.approx(6 * torch.finfo(torch.float32).eps * 28)
    assert "scaling divided by the rank" in str(caught.value)
    with pytest.raises(testing.ConformanceError, match=r"shape \(2, 3\), got shape \(3,\)"):
        testing.check_lora_layer(lambda x: torch.ones(3), x, **matrices)
