"""Idle experts score zero with a warning; weights that are read and never called are an error."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers.estimators import LOSS_BASED
from torch import nn

from minirank import SensitivityLoRA, testing, wrap
from minirank.curvature import IdleLayerWarning, empirical_fisher, input_second_moment
from minirank.curvature.unreached import read_without_call

ESTIMATORS = {**LOSS_BASED, "proxy": input_second_moment}
every_estimator = pytest.mark.parametrize("name", ESTIMATORS)


class Experts(nn.Module):
    """A sequence (n, T, 4) goes to one expert as a whole, chosen by the sign of its first entry."""

    def __init__(self, experts=3, call_empty=False):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(experts))
        self.head = nn.Linear(4, 2)
        self.call_empty = call_empty

    def forward(self, x):
        chosen = int(x[0, 0, 0] > 0)
        y = self.experts[chosen](x)
        if self.call_empty:
            for expert in self.experts:
                y = y + expert(x[:0]).sum()
        return self.head(y.tanh())


class Reader(nn.Module):
    """Like Swin's attention: it multiplies by the weight of a child that it never calls."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(4, 4)
        self.idle = nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        assert self.idle.weight.dtype == x.dtype  # reads no number of it
        return self.head(F.linear(x, self.qkv.weight, self.qkv.bias).tanh())


def made(module, *args, **kwargs):
    torch.manual_seed(0)
    return module(*args, **kwargs).double()


def loss_fn(model, x):
    return model(x).square().mean()


def batches(signs=(1, -1, 1), n=3):
    generator = torch.Generator().manual_seed(1)
    made_batches = []
    for sign in signs:
        x = torch.randn(n, 2, 4, dtype=torch.float64, generator=generator)
        x[:, 0, 0] = sign * x[:, 0, 0].abs()
        made_batches.append(x)
    return made_batches


@pytest.mark.parametrize("call_empty", [False, True])
@every_estimator
def test_an_idle_expert_scores_zero_and_is_named(name, call_empty):
    model = made(Experts, call_empty=call_empty)
    with (
        testing.unchanged(model),
        pytest.warns(IdleLayerWarning, match=r"no token of any batch reached 'experts\.2'") as seen,
    ):
        estimate = ESTIMATORS[name](model, loss_fn, batches())
    assert ["tests" in Path(warning.filename).parts for warning in seen] == [True]
    assert estimate.idle == ("experts.2",)
    assert not estimate["experts.2"].any()
    if name != "Hutchinson, weights":  # which draws signs for the idle one too
        without = ESTIMATORS[name](model, loss_fn, batches(), ["experts.0", "experts.1", "head"])
        for other, diagonal in without.items():
            torch.testing.assert_close(estimate[other], diagonal)
    assert estimate["experts.2"].shape == estimate["experts.1"].shape
    assert estimate["experts.2"].dtype == estimate["experts.1"].dtype


@every_estimator
def test_if_no_target_is_reached_it_stays_an_error(name):
    model = made(Experts)
    with pytest.raises(ValueError, match=r"no (batch|token) reached 'experts\.2'"):
        ESTIMATORS[name](model, loss_fn, batches(), ["experts.2"])


@every_estimator
def test_a_weight_that_is_read_and_never_called_has_its_own_message(name):
    model = made(Reader)
    with (
        testing.unchanged(model),
        pytest.raises(
            ValueError, match=r"'qkv': the weight is used, .*not name\.endswith\('qkv'\)"
        ),
    ):
        ESTIMATORS[name](model, loss_fn, batches())
    with pytest.raises(ValueError, match="the module is never called"):
        ESTIMATORS[name](model, loss_fn, batches(), "qkv")
    with pytest.warns(IdleLayerWarning, match="reached 'idle'"):
        ESTIMATORS[name](model, loss_fn, batches(), lambda name, module: not name.endswith("qkv"))


def test_the_advice_names_no_ending_that_measured_layers_share():
    model = nn.ModuleDict({"reader": made(Reader), "other": nn.ModuleDict()})
    model["other"]["qkv"] = nn.Linear(4, 4).double()

    def loss(model, x):
        return (model["reader"](x).sum() + model["other"]["qkv"](x).sum()).square()

    with pytest.raises(ValueError, match=r"name not in \{…\}, with all their names"):
        input_second_moment(model, loss, batches())


def test_evidence_comes_from_the_weight_and_changes_nothing():
    class Counting(Reader):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(2))

        def forward(self, x):
            y = super().forward(x)
            self.mean += y.detach().mean((0, 1))
            return y

    model = made(Counting)
    layers = {"qkv": model.qkv, "idle": model.idle}
    with testing.unchanged(model):
        assert read_without_call(model, loss_fn, batches()[0], layers) == ["qkv"]

    # A model that does not stand NaN depends on the weight as well.
    def strict(model, x):
        y = model(x)
        if not y.isfinite().all():
            raise FloatingPointError
        return y.mean()

    assert read_without_call(model, strict, batches()[0], layers) == ["qkv"]


def test_an_expert_is_idle_under_a_random_loss_too():
    generator = torch.Generator().manual_seed(0)

    def noisy(model, x):  # as in training a diffusion model
        return loss_fn(model, x + 0.01 * torch.randn(x.shape, generator=generator, dtype=x.dtype))

    model, x = made(Experts), torch.ones(2, 3, 4).double()
    with pytest.warns(IdleLayerWarning, match=r"'experts\.0', 'experts\.2'"):
        estimate = input_second_moment(model, noisy, [x])
    assert not estimate["experts.0"].any()
    assert estimate["experts.1"].any()
    reader = made(Reader)
    layers = {"qkv": reader.qkv, "idle": reader.idle}
    assert read_without_call(reader, noisy, x, layers) == ["qkv"]


def test_random_routing_to_an_expert_is_no_reading():
    class Lottery(Experts):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return self.head(self.experts[self.calls % 3](x).tanh())

    model = made(Lottery)
    layers = {f"experts.{i}": expert for i, expert in enumerate(model.experts)}
    assert read_without_call(model, loss_fn, torch.ones(2, 3, 4).double(), layers) == []


def test_a_loss_that_is_not_finite_is_no_evidence():
    model = made(Reader)
    layers = {"qkv": model.qkv}
    broken = batches()[0] * torch.nan
    assert read_without_call(model, loss_fn, broken, layers) == []


def test_half_precision_models_and_models_of_inference_mode_are_judged_too():
    for dtype in (torch.bfloat16, torch.float16):
        model = made(Reader).to(dtype)
        inputs = [x.to(dtype) for x in batches()]
        with pytest.raises(ValueError, match="'qkv': the weight is used"):
            input_second_moment(model, loss_fn, inputs)
    with torch.inference_mode():
        model = made(Reader)
    with pytest.raises(ValueError, match="'qkv': the weight is used"):
        input_second_moment(model, loss_fn, batches())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_mamba_reads_weights_which_can_be_adapted_but_not_measured():
    transformers = pytest.importorskip("transformers")
    config = transformers.MambaConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, state_size=4
    )
    torch.manual_seed(0)
    model = transformers.MambaForCausalLM(config)
    ids = [torch.randint(0, 50, (2, 8)) for _ in range(2)]

    def loss(model, ids):
        return model(input_ids=ids, labels=ids).loss

    with pytest.raises(ValueError, match=r"not name\.endswith\('dt_proj'\)"):
        input_second_moment(model, loss, ids)
    measured = input_second_moment(model, loss, ids, lambda name, _: not name.endswith("dt_proj"))
    assert measured.idle == ()
    name = "backbone.layers.1.mixer.dt_proj"
    layer = wrap(model, {name: 1})[name]
    with torch.no_grad():
        layer.lora_B.fill_(0.5)
    loss(model, ids[0]).backward()
    assert layer.lora_A.grad.abs().sum() > 0


def test_the_fisher_still_refuses_routed_tokens_by_name():
    class Routed(Experts):
        def forward(self, x):
            flat = x.flatten(0, 1)
            positive = flat[:, 0] > 0
            y = torch.zeros_like(flat)
            y[positive], y[~positive] = (
                self.experts[0](flat[positive]),
                self.experts[1](flat[~positive]),
            )
            return self.head(y.tanh())

    with pytest.raises(ValueError, match="samples of a batch interact"):
        empirical_fisher(made(Routed), loss_fn, batches())


@every_estimator
def test_one_mapping_is_not_an_iterable_of_batches(name):
    model = made(Experts)
    with pytest.raises(TypeError, match=r"got one dict: put a single batch in a list, \[batch\]"):
        ESTIMATORS[name](model, loss_fn, {"x": batches()[0]})


# ---- in Sensitivity-LoRA ------------------------------------------------------------------------


@pytest.mark.parametrize("curvature", [input_second_moment, empirical_fisher])
@pytest.mark.parametrize("groups", [None, 4])
def test_sensitivity_gives_an_idle_expert_no_rank(curvature, groups):
    model = made(Experts)
    allocator = SensitivityLoRA(
        model, loss_fn, batches((1, -1) * 5), curvature=curvature, groups=groups, progress=False
    )
    with pytest.warns(IdleLayerWarning, match=r"'experts\.2'") as seen:
        scores = allocator.score()
    assert len(seen) == 1
    assert float(scores["experts.2"]) == 0
    ranks = allocator.allocate(6).ranks
    assert ranks["experts.2"] == 0
    assert sum(ranks.values()) == 6
    if groups:
        stability = allocator.stability(6)
        assert stability.max_moved <= 6


@pytest.mark.parametrize("curvature", [input_second_moment, empirical_fisher])
@pytest.mark.parametrize("signs", [(1,) * 4 + (-1,) * 4, (1,) * 7 + (-1,)])
def test_an_expert_that_some_groups_miss_is_not_idle(curvature, signs):
    model = made(Experts, experts=2)
    scores = {}
    for groups in (None, 5):
        allocator = SensitivityLoRA(
            model, loss_fn, batches(signs), curvature=curvature, groups=groups, progress=False
        )
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            scores[groups] = allocator.score()
    assert all(float(score) > 0 for score in scores[5].values())
    for name in scores[None]:
        torch.testing.assert_close(scores[5][name], scores[None][name])
    assert 0 <= allocator.stability(4).same <= 1


def test_a_tolerance_is_not_met_by_a_layer_of_which_nothing_is_known():
    model = made(Experts)
    many = batches((1, -1) * 10)
    with pytest.warns(IdleLayerWarning):
        estimate = input_second_moment(model, loss_fn, many, tolerance=1e6)
    assert estimate.samples == 20  # all batches
    assert (
        input_second_moment(
            model, loss_fn, many, ["experts.0", "experts.1", "head"], tolerance=1e6
        ).samples
        < 20
    )
