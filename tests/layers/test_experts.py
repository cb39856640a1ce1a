"""Stacks of experts, 3-D parameters in both layouts, beside the same experts as nn.Linear."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from minirank import (
    L1RA,
    SensitivityLoRA,
    ShapLoRA,
    SingularValues,
    UniformRanks,
    curvature,
    disabled,
    linear_targets,
    load_adapter,
    lora_layers,
    merge,
    resize,
    save_adapter,
    unmerge,
    unwrap,
    wrap,
)
from minirank.layers.coverage import coverage
from minirank.layers.experts import ExpertStack, LoRAExperts

EXPERTS, D_IN, D_OUT = 3, 5, 4
NAME = "mlp.experts.up"
LAYOUTS = pytest.mark.parametrize("transposed", [False, True], ids=["out_in", "in_out"])


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Stacked(nn.Module):
    """Experts in one parameter, read once for each expert as in transformers' eager forward."""

    def __init__(self, transposed):
        super().__init__()
        shape = (D_IN, D_OUT) if transposed else (D_OUT, D_IN)
        self.up = nn.Parameter(torch.randn(EXPERTS, *shape))
        self.bias = nn.Parameter(torch.randn(EXPERTS, D_OUT))
        self.is_transposed = transposed

    def forward(self, x, chosen):
        parts = []
        for e in range(EXPERTS):
            W = self.up[e].T if self.is_transposed else self.up[e]
            parts.append((chosen == e)[:, None] * F.linear(x, W, self.bias[e]))
        return sum(parts)


class Single(nn.Module):
    """The same experts, each an nn.Linear."""

    def __init__(self, stacked):
        super().__init__()
        self.up = nn.ModuleList(nn.Linear(D_IN, D_OUT) for _ in range(EXPERTS))
        for e, linear in enumerate(self.up):
            W = stacked.up[e].T if stacked.is_transposed else stacked.up[e]
            linear.weight.data, linear.bias.data = W.detach().clone(), stacked.bias[e].detach()

    def forward(self, x, chosen):
        return sum((chosen == e)[:, None] * linear(x) for e, linear in enumerate(self.up))


class Model(nn.Module):
    def __init__(self, transposed=False):
        super().__init__()
        self.inner = nn.Linear(D_IN, D_IN)
        self.mlp = nn.ModuleDict({"experts": Stacked(transposed)})
        self.head = nn.Linear(D_OUT, 2)

    def forward(self, x):
        chosen = torch.arange(len(x)) % EXPERTS
        return self.head(torch.tanh(self.mlp["experts"](torch.tanh(self.inner(x)), chosen)))


def made(transposed=False):
    torch.manual_seed(0)
    return Model(transposed)


def trained(transposed=False, ranks=None, **options):
    """A wrapped model with random adapters, its layer, and the untouched model."""
    model = made(transposed)
    plain = copy.deepcopy(model)
    layers = wrap(model, {NAME: 2} if ranks is None else ranks, scaling=1.5, **options)
    for layer in layers.values():
        for parameter in layer.parameters(recurse=False):
            nn.init.normal_(parameter)
    return model, layers[NAME], plain


def inputs(n=7):
    return torch.randn(n, D_IN, generator=torch.Generator().manual_seed(1))


def loss_fn(model, batch):
    x, y = batch
    return F.cross_entropy(model(x), y)


def batches():
    x = inputs(12)
    return list(zip(x.split(6), (x[:, 0] > 0).long().split(6), strict=True))


def by_hand(plain, layer):
    """The plain model, with W + s · B diag(gate) A in each expert."""
    model = copy.deepcopy(plain)
    stack = model.mlp["experts"]
    for e in range(EXPERTS):
        gate = torch.ones(layer.rank) if layer.gate is None else layer.gate
        delta = 1.5 * layer.lora_B[e] @ torch.diag(gate) @ layer.lora_A[e]
        stack.up.data[e] += (delta.T if stack.is_transposed else delta).detach()
    return model


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


# ---- the function -------------------------------------------------------------------------------


@LAYOUTS
@pytest.mark.parametrize("gate", [None, 1.0, 0.0])
def test_the_function_is_that_of_each_expert_by_hand(transposed, gate):
    model = made(transposed)
    plain, x = copy.deepcopy(model), inputs()
    layer = wrap(model, {NAME: 2}, scaling=1.5, gate=gate)[NAME]
    assert isinstance(layer, LoRAExperts)
    assert torch.equal(model(x), plain(x))  # a new adapter changes nothing
    for parameter in layer.parameters(recurse=False):
        nn.init.normal_(parameter)
    close(model(x), by_hand(plain, layer)(x))
    assert layer.lora_A.shape == (EXPERTS, 2, D_IN)
    assert layer.lora_B.shape == (EXPERTS, D_OUT, 2)
    with disabled(model):
        assert torch.equal(model(x), plain(x))


@LAYOUTS
@pytest.mark.parametrize("gate", [None, 1.0])
def test_training_equals_that_of_the_experts_as_linear_layers(transposed, gate):
    model, layer, plain = trained(transposed, gate=gate)
    twin = copy.deepcopy(plain)
    twin.mlp["experts"] = Single(plain.mlp["experts"])
    names = [f"mlp.experts.up.{e}" for e in range(EXPERTS)]
    single = wrap(twin, dict.fromkeys(names, 2), scaling=1.5, gate=gate)
    for e, name in enumerate(names):
        single[name].lora_A.data = layer.lora_A[e].detach().clone()
        single[name].lora_B.data = layer.lora_B[e].detach().clone()
        if gate is not None:  # one gate for all experts of a stack
            single[name].gate = single[names[0]].gate
            single[name].gate.data = layer.gate.detach().clone()
    optimizers = []
    for one in (model, twin):
        parameters = [p for p in one.parameters() if p.requires_grad]
        optimizers.append(torch.optim.Adam(parameters, lr=0.1))
    for batch in batches() * 3:
        for one, optimizer in zip((model, twin), optimizers, strict=True):
            optimizer.zero_grad()
            loss_fn(one, batch).backward()
            optimizer.step()
    close(layer.lora_A, torch.stack([single[name].lora_A for name in names]))
    close(layer.lora_B, torch.stack([single[name].lora_B for name in names]))
    close(model(inputs()), twin(inputs()))
    if gate is not None:
        close(layer.gate, single[names[0]].gate)
    assert torch.equal(layer.base.weight, plain.mlp["experts"].up)


def test_a_forward_pass_computes_the_sum_once():
    model, layer, _ = trained()
    calls = []
    layer.register_forward_hook(lambda *_: calls.append(1))
    model(inputs())
    assert len(calls) == 1
    assert torch.equal(model.mlp["experts"].up, model.mlp["experts"].up)
    assert len(calls) == 3  # outside of a forward pass nothing is kept


def test_what_is_read_without_gradients_first_does_not_cut_them_off():
    class Looks(Stacked):
        def forward(self, x, chosen):
            with torch.no_grad():
                self.up.norm()
            return super().forward(x, chosen)

    model = made()
    model.mlp["experts"].__class__ = Looks
    layer = wrap(model, {NAME: 1})[NAME]
    model(inputs()).sum().backward()
    assert layer.lora_B.grad.any()


@LAYOUTS
def test_half_precision_rounds_once_and_autocast_does_not_round_at_all(transposed):
    model, layer, plain = trained(transposed)
    expected = by_hand(plain, layer).mlp["experts"].up
    single = copy.deepcopy(model).float()
    up = single.mlp["experts"].up
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(single.mlp["experts"].up, up)
    half = copy.deepcopy(model).to(torch.bfloat16)
    up = half.mlp["experts"].up
    assert up.dtype == torch.bfloat16
    assert half(inputs().bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(up.double(), expected, rtol=0.05, atol=0.1)
    merge(half)
    assert torch.equal(half.mlp["experts"].up, up)


def test_rank_0_leaves_the_parameter_and_a_layer_of_rank_0_reads_it_as_it_is():
    model = made()
    wrap(model, {NAME: 0, "head": 1})
    assert isinstance(model.mlp["experts"].up, nn.Parameter)
    layer = wrap(model, {NAME: 2})[NAME]
    resize(model, {NAME: 0})
    assert model.mlp["experts"].up is layer.base.weight


# ---- in and out ---------------------------------------------------------------------------------


@LAYOUTS
def test_unwrap_gives_the_parameter_back(transposed):
    model = made(transposed)
    kind, parameter = type(model.mlp["experts"]), model.mlp["experts"].up
    names = [name for name, _ in model.named_parameters()]
    wrap(model, {NAME: 2, "head": 1})
    assert not parameter.requires_grad
    assert f"{NAME}.lora_A" in dict(model.named_parameters())
    assert sorted(unwrap(model)) == ["head", NAME]
    assert model.mlp["experts"].up is parameter
    assert parameter.requires_grad
    assert [name for name, _ in model.named_parameters()] == names
    assert type(model.mlp["experts"]) is kind


@LAYOUTS
def test_merge_and_unmerge(transposed):
    model, layer, plain = trained(transposed, gate=1.0)
    y, W = model(inputs()), layer.base.weight
    assert merge(model) == [NAME]
    assert torch.equal(model(inputs()), y)  # the same sum
    close(model(inputs()), by_hand(plain, layer)(inputs()))
    assert unmerge(model) == [NAME]
    assert layer.base.weight is W
    assert torch.equal(W, plain.mlp["experts"].up)
    merge(model)
    unwrap(model)
    assert torch.equal(model(inputs()), y)
    assert isinstance(model.mlp["experts"].up, nn.Parameter)


@LAYOUTS
def test_copies_and_pickles(transposed):
    model, _, plain = trained(transposed)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(inputs()), model(inputs()))
        assert lora_layers(twin)[NAME] is not lora_layers(model)[NAME]
        unwrap(twin)
        assert torch.equal(twin(inputs()), plain(inputs()))
    assert lora_layers(model).keys() == {NAME}


def test_a_state_dict_brings_its_ranks():
    model, _, plain = trained(gate=1.0)
    wrap(plain, {NAME: 4}, scaling=1.5, gate=1.0)
    plain.load_state_dict(model.state_dict())
    assert torch.equal(plain(inputs()), model(inputs()))


@LAYOUTS
def test_files(transposed, tmp_path):
    model, _, plain = trained(transposed, {NAME: 2, "head": 1}, gate=1.0)
    save_adapter(model, tmp_path / "adapter")
    twin = copy.deepcopy(plain)
    load_adapter(twin, tmp_path / "adapter")
    assert torch.equal(twin(inputs()), model(inputs()))
    plain.mlp["experts"].up.data[1, 0, 0] += 1
    with pytest.raises(ValueError, match=r"'mlp.experts.up': not the base weights"):
        load_adapter(plain, tmp_path / "adapter")
    fewer = made(transposed)
    fewer.mlp["experts"].up = nn.Parameter(fewer.mlp["experts"].up.detach()[:2])
    with pytest.raises(
        ValueError, match=r"\(experts, d_out, d_in\) = \(3, 4, 5\), the model has \(2"
    ):
        load_adapter(fewer, tmp_path / "adapter", other_base=True)
    assert not lora_layers(plain)
    assert not lora_layers(fewer)


def test_a_square_stack_the_other_way_round_is_another_base(tmp_path):
    model = made()
    model.mlp["experts"].up = nn.Parameter(torch.randn(EXPERTS, 4, 4))
    plain = copy.deepcopy(model)
    wrap(model, {NAME: 1})
    save_adapter(model, tmp_path / "adapter")
    other = copy.deepcopy(plain)
    other.mlp["experts"].is_transposed = True
    with pytest.raises(ValueError, match=r"not the base weights"):
        load_adapter(other, tmp_path / "adapter")
    load_adapter(plain, tmp_path / "adapter")


def test_the_model_itself_may_hold_the_stack():
    torch.manual_seed(0)
    model = Stacked(False)
    layer = wrap(model, {"up": 2})["up"]
    assert lora_layers(model) == {"up": layer}
    unwrap(model)
    assert type(model) is Stacked


def test_a_module_in_two_places_has_one_adapter():
    model = made()
    model.again = model.mlp["experts"]
    layers = wrap(model, {"again.up": 2})
    assert list(layers) == [NAME]
    assert unwrap(model) == [NAME]


# ---- names and errors ---------------------------------------------------------------------------


def test_targets_are_found_by_names_that_match_no_linear_layer():
    model = made()
    assert list(linear_targets(model)) == ["inner", "head"]
    assert list(linear_targets(model, "*")) == ["inner", "head"]
    assert list(linear_targets(model, lambda name, module: True)) == ["inner", "head"]
    assert list(linear_targets(model, "*.experts.*")) == [NAME]
    found = linear_targets(model, ["head", NAME, "inner"])
    assert list(found) == ["inner", NAME, "head"]
    assert isinstance(found[NAME], ExpertStack)
    allocator = UniformRanks(model, ["*", NAME])
    allocator.score()
    allocation = allocator.allocate(6)
    assert allocation.ranks == {"inner": 2, NAME: 2, "head": 2}
    assert allocation.costs[NAME] == EXPERTS * (D_IN + D_OUT)
    assert allocation.target_parameters == [NAME]
    assert NAME.replace(".", r"\.") not in allocation.target_modules
    layers = wrap(model, allocation)
    entries = sum(p.numel() for layer in layers.values() for p in layer.parameters(recurse=False))
    assert entries == allocation.parameters


def test_the_coverage_names_the_parameter_and_counts_all_experts():
    model = made()
    part = coverage(model, linear_targets(model))
    assert "1 × stack of experts (a 3-D parameter; adapted if named): mlp.experts.up" in str(part)
    assert coverage(model, ["inner", "head", NAME]).share == 1
    wrap(model, {NAME: 1})
    whole = coverage(model, ["inner", "head", NAME])
    assert (whole.share, whole.total) == (1, part.total)


def test_what_has_no_layout_is_refused_until_it_has_one():
    model = made()
    del model.mlp["experts"].is_transposed
    state = copy.deepcopy(model.state_dict())
    for call in (
        lambda: wrap(model, {"head": 1, NAME: 1}),
        lambda: linear_targets(model, NAME),
        lambda: UniformRanks(model, "*.experts.*"),
    ):
        with pytest.raises(ValueError, match=r"get_submodule\('mlp.experts'\).is_transposed = Fa"):
            call()
    assert not lora_layers(model)
    assert state.keys() == model.state_dict().keys()
    assert all(p.requires_grad for p in model.parameters())
    model.get_submodule("mlp.experts").is_transposed = False
    wrap(model, {NAME: 1})


def test_refusals_leave_the_model_as_it_was():
    model = made()
    with pytest.raises(ValueError, match=r"dropout=0.1 needs the inputs.*'mlp.experts.up'"):
        wrap(model, {"head": 1, NAME: 1}, dropout=0.1)
    with pytest.raises(ValueError, match=r"rank of 'mlp.experts.up': expected an integer from 0"):
        wrap(model, {NAME: 5})
    with pytest.raises(ValueError, match=r"inside it have names: 'mlp.experts.up'"):
        wrap(model, {"mlp.experts": 1})
    with pytest.raises(ValueError, match=r"did you mean 'mlp.experts.up'"):
        linear_targets(model, "mlp.experts.upp")
    assert not lora_layers(model)
    assert isinstance(model.mlp["experts"].up, nn.Parameter)
    assert all(p.requires_grad for p in model.parameters())
    wrap(model, {NAME: 1})
    with pytest.raises(ValueError, match=r"'mlp.experts.up' already has an adapter"):
        wrap(model, {NAME: 1})


@pytest.mark.parametrize(
    "call",
    [
        lambda model: SensitivityLoRA(model, loss_fn, batches(), targets=[NAME]).score(),
        lambda model: curvature.input_second_moment(model, loss_fn, batches(), NAME),
        lambda model: curvature.empirical_fisher(model, loss_fn, batches(), ["*", NAME]),
    ],
)
def test_what_needs_inputs_says_that_a_stack_has_none(call):
    with pytest.raises(ValueError, match=r"'mlp.experts.up': a stack of experts.*UniformRanks"):
        call(made())


def test_sensitivity_scores_the_linear_layers_by_default():
    model = made()
    allocator = SensitivityLoRA(model, loss_fn, batches())
    assert list(allocator.score()) == ["inner", "head"]
    assert "stack of experts" in str(allocator.allocate(2))


# ---- methods ------------------------------------------------------------------------------------


@LAYOUTS
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.Adafactor])
def test_resize_keeps_the_function_and_the_moments(transposed, kind):
    model, layer, _ = trained(transposed, gate=1.0)
    optimizer = kind([p for p in model.parameters() if p.requires_grad], lr=0.01)
    loss_fn(model, batches()[0]).backward()
    optimizer.step()
    y = model(inputs())
    before = {name: copy.copy(optimizer.state[p]) for name, p in layer.named_parameters()}
    change = resize(model, {NAME: 4}, optimizer)[NAME]
    assert (change.old_rank, change.new_rank, change.state_reset) == (2, 4, ())
    close(model(inputs()), y)
    contributions = layer.contributions()
    for i in range(4):
        one = layer.delta_weight() - 1.5 * layer.lora_B[..., :0] @ layer.lora_A[:, :0]
        part = 1.5 * layer.gate[i] * layer.lora_B[..., i : i + 1] @ layer.lora_A[:, i : i + 1]
        assert one.shape == part.shape
        close(contributions[i], part.norm())
    if kind is torch.optim.Adam:
        moments = optimizer.state[layer.lora_B]["exp_avg"]
        assert torch.equal(moments[..., :2], before["lora_B"]["exp_avg"])
        assert not moments[..., 2:].any()
    keep = contributions[:2].argmax()
    A = layer.lora_A[:, keep].clone()
    resize(model, {NAME: 1}, optimizer)
    assert torch.equal(layer.lora_A[:, 0], A)
    loss_fn(model, batches()[0]).backward()
    optimizer.step()


def test_l1ra_moves_ranks_between_stacks_and_layers():
    model = made()
    wrap(model, {NAME: 2, "inner": 2}, gate=1.0)
    lora_layers(model)["inner"].gate.data = torch.tensor([1.0, 0.1])
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    l1ra = L1RA(model, optimizer, interval=1, l1=1.0, gate_lr=0.2)
    loss_fn(model, batches()[0]).backward()
    optimizer.step()
    assert l1ra.step().ranks == {"inner": 1, NAME: 3}
    loss_fn(model, batches()[0]).backward()
    optimizer.step()
    in_parameters = L1RA(model, optimizer, interval=1, unit="parameters", gate_lr=0.2)
    assert in_parameters.budget == 3 * EXPERTS * (D_IN + D_OUT) + D_IN + D_IN


def test_shaplora_means_over_the_entries_of_all_experts():
    model, layer, _ = trained(gate=0.0)
    allocator = ShapLoRA(model, loss_fn, batches(), coalitions=0, progress=False)
    score = allocator.score()[NAME]
    loss = sum(loss_fn(model, batch) for batch in batches()) / 2
    loss.backward()
    importance = {k: (p * p.grad).abs() for k, p in layer.named_parameters(recurse=False)}
    for i in range(2):
        expected = importance["gate"][i] + importance["lora_B"][..., i].mean()
        close(score[i], expected + importance["lora_A"][:, i].mean())
    assert allocator.allocate(1).ranks == {NAME: 1}
    assert ShapLoRA(model, loss_fn, batches(), coalitions=18, progress=False).score()[NAME].any()


def test_singular_values_of_a_stack_are_roots_of_sums_of_squares():
    model, layer, _ = trained()
    by_expert = torch.linalg.svdvals(layer.delta_weight())[:, :2]
    close(SingularValues(model).score()[NAME], by_expert.square().sum(0).sqrt())
    with pytest.raises(ValueError, match=r"'mlp.experts.up': a stack.*give no loss_fn"):
        SingularValues(model, loss_fn, batches())
