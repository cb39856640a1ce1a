"""Ways in which a curvature could be wrong without a word, or refuse what is sound: each found by
an attack once."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from helpers.curvature_cases import build, classify, mlp, pairs
from helpers.estimators import LOSS_BASED, seeded
from torch import nn
from torch.utils.checkpoint import checkpoint

from minirank import SensitivityLoRA, testing
from minirank.curvature import (
    empirical_fisher,
    exact_hessian_diagonal,
    gauss_newton,
    hessian_diagonal_reference,
    hutchinson_weights,
    input_second_moment,
)
from minirank.curvature.outer_products import outer_products

every = pytest.mark.parametrize("estimate", LOSS_BASED.values(), ids=LOSS_BASED.keys())


def confident(margin, dtype):
    """A linear softmax classifier whose every row prefers its label by about `margin`."""
    model = nn.Sequential(nn.Linear(3, 3, bias=False)).to(dtype)
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(3) * margin)
    labels = torch.arange(12) % 3
    noise = torch.randn(12, 3, generator=seeded(), dtype=torch.float64) / 50
    return model, [((F.one_hot(labels, 3) + noise).to(dtype), labels)]


@pytest.mark.parametrize("margin", [8, 10, 12, 15, 18, 25])
@pytest.mark.parametrize("estimate", [exact_hessian_diagonal, gauss_newton, empirical_fisher])
def test_float32_rounding_of_a_confident_model_is_no_interaction(estimate, margin):
    """Beyond a margin of 12, a cross-entropy's Hessian in float32 is rounding; Gauss-Newton knows
    its closed form."""
    exact = hessian_diagonal_reference(*loss_of(confident(margin, torch.float64)))["0"]
    if estimate is exact_hessian_diagonal and margin == 25:
        pytest.skip("float32 has p = 1 and a Hessian of zero")
    if estimate is exact_hessian_diagonal and margin > 12:
        with pytest.raises(ValueError, match=r"lost in rounding .* Use model\.double\(\)"):
            estimate(*loss_of(confident(margin, torch.float32)))
        return
    found = estimate(*loss_of(confident(margin, torch.float32)))["0"]
    if estimate is not empirical_fisher:
        torch.testing.assert_close(found.double(), exact, rtol=0.02, atol=0.02 * float(exact.max()))


def loss_of(model_and_batches):
    model, batches = model_and_batches
    return model, classify, batches


@pytest.mark.parametrize("margin", [2, 8, 12])
@pytest.mark.parametrize("estimate", [exact_hessian_diagonal, gauss_newton, empirical_fisher])
def test_a_small_interaction_beside_it_is_still_one(estimate, margin):
    model, batches = confident(margin, torch.float32)

    def loss_fn(model, batch):
        z = F.normalize(model(batch[0]), dim=1)
        return classify(model, batch) - 1e-2 * torch.logsumexp(z @ z.t(), 1).mean()

    with pytest.raises(ValueError, match=r"samples of a batch interact|mixes rows|came 2 times"):
        estimate(model, loss_fn, batches)


class Frozen(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.body, self.head, self.how = nn.Linear(5, 4), nn.Linear(4, 3), how

    def forward(self, x):
        if self.how == "no_grad":
            with torch.no_grad():
                return self.head(torch.tanh(self.body(x)))
        if self.how == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                return self.head(torch.tanh(self.body(x))).to(x.dtype)
        if self.how == "reentrant":
            return self.head(checkpoint(lambda x: torch.tanh(self.body(x)), x, use_reentrant=True))
        return self.head(torch.tanh(self.body(x)))


@every
@pytest.mark.parametrize("how", ["no_grad", "reentrant", "autocast"])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
def test_layers_that_cannot_be_differentiated_are_named_not_flat(estimate, how):
    model, batches = build(lambda: Frozen(how)), pairs((5,), (4,))
    if how == "autocast":
        model, batches = model.float(), [(x.float(), y) for x, y in batches]
    with (
        testing.unchanged(model),
        pytest.raises(ValueError, match="'body' is called under no_grad"),
    ):
        estimate(model, classify, batches)
    input_second_moment(model, classify, batches)


@every
@pytest.mark.filterwarnings("ignore:.torch.cpu.amp.autocast:FutureWarning")  # torch 2.4's own
def test_gradient_checkpointing_is_followed_or_refused(estimate):
    class Checkpointed(Frozen):
        def forward(self, x):
            return self.head(checkpoint(lambda x: torch.tanh(self.body(x)), x, use_reentrant=False))

    batches = pairs((5,), (4,))
    expected = estimate(build(lambda: Frozen("")), classify, batches)
    model = build(lambda: Checkpointed(""))
    if estimate in (hessian_diagonal_reference, LOSS_BASED["Hutchinson, weights"]):
        with (
            testing.unchanged(model),
            pytest.raises(ValueError, match=r"gradient checkpointing.* hutchinson_outputs"),
        ):
            estimate(model, classify, batches)
        return
    for name, h in estimate(model, classify, batches).items():
        torch.testing.assert_close(h, expected[name], rtol=1e-12, atol=1e-16)


@pytest.mark.skipif(
    not hasattr(torch.compiler, "set_stance"), reason="torch 2.6 brought the switch"
)
@every
def test_compiled_parts_run_as_written(estimate):
    """By torch.compile's plainest backend, which needs no C++ compiler: hooks inside are skipped
    all the same."""

    class Partly(Frozen):
        def __init__(self):
            super().__init__("")
            self.again = lambda x: self.body(torch.tanh(self.body(x)))
            self.compiled = torch.compile(self.again, backend="eager")

        def forward(self, x):
            return self.head((self.compiled if self.fast else self.again)(F.pad(x, (0, 0))))

    def make():
        model = Partly()
        model.body = nn.Linear(5, 5)
        model.head = nn.Linear(5, 3)
        return model

    model, batches = build(make), pairs((5,), (4,))
    model.fast = False
    expected = estimate(model, classify, batches)
    model.fast = True
    model(batches[0][0])  # compiled, without our hooks
    for name, h in estimate(model, classify, batches).items():
        assert torch.equal(h, expected[name])


def test_no_hook_is_left_where_a_scripted_part_takes_none():
    class Act(nn.Module):
        def forward(self, x):
            return torch.tanh(x)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted = torch.jit.script(Act())
    model = nn.Sequential(nn.Linear(5, 4), scripted, nn.Linear(4, 3)).bfloat16()
    batches = [(x.bfloat16(), y) for x, y in pairs((5,), (4,))]
    with testing.unchanged(model):
        exact_hessian_diagonal(model, classify, batches)
    assert model(batches[0][0]).dtype == torch.bfloat16


def test_modes_are_restored_where_eval_does_more():
    """loralib's layers merge in eval(): there is no way back from that by setting `training`."""

    class Merging(nn.Linear):
        merged = False

        def train(self, mode=True):
            self.merged = not mode
            return super().train(mode)

    model, batches = build(lambda: nn.Sequential(Merging(5, 3))), pairs((5,), (4,))
    exact_hessian_diagonal(model, classify, batches)
    assert (model[0].training, model[0].merged) == (True, False)


@pytest.mark.parametrize("options", [{}, {"samples": 3, "generator": seeded()}])
def test_gauss_newton_refuses_a_loss_that_passes_its_output_by(options):
    class Auxiliary(Frozen):
        def forward(self, x):
            z = torch.tanh(self.body(x))
            self.auxiliary = z.square().mean()
            return self.head(z)

    def loss_fn(model, batch):
        return classify(model, batch) + model.auxiliary

    model, batches = build(lambda: Auxiliary("")), pairs((5,), (4,))
    with pytest.raises(ValueError, match="depends on a layer by another way than the output"):
        gauss_newton(model, loss_fn, batches, **options)
    gauss_newton(model, classify, batches, **options)


def test_gauss_newton_wants_the_head_where_the_model_returns_its_loss():
    class LossModel(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = mlp()

        def forward(self, x, y):
            return F.cross_entropy(self.body(x), y)

    with pytest.raises(ValueError, match="output is a single number: name the head"):
        gauss_newton(build(LossModel), lambda m, b: m(*b), pairs((5,), (4,)))


def test_the_fisher_looks_for_interaction_where_there_are_several_samples():
    def contrastive(model, batch):
        z = F.normalize(model(batch[0]), dim=1)
        return -torch.logsumexp(z @ z.t(), 1).mean()

    with pytest.raises(ValueError, match="samples of a batch interact"):
        empirical_fisher(build(mlp), contrastive, pairs((5,), (1, 8)))


def test_weights_kept_as_buffers_count():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.in_features, self.out_features = 5, 3
            self.register_buffer("weight", torch.randn(3, 5))
            self.bias = None

        def forward(self, x):
            return F.linear(x, self.weight)

    model, batches = (
        build(lambda: nn.Sequential(Fixed(), nn.Tanh(), nn.Linear(3, 3))),
        pairs((5,), (4,)),
    )
    exact = exact_hessian_diagonal(model, classify, batches)
    reference = hessian_diagonal_reference(model, classify, batches)
    for name in exact:
        torch.testing.assert_close(reference[name], exact[name], rtol=1e-12, atol=1e-16)
    assert (
        hutchinson_weights(model, classify, batches, generator=seeded(), samples=2).keys()
        == exact.keys()
    )


def test_a_layer_that_casts_its_input():
    class Casting(nn.Linear):
        def forward(self, x):
            return super().forward(x.to(self.weight.dtype))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Casting(5, 3)

        def forward(self, x):
            return torch.tanh(self.inner(x))

    model, batches = Model(), pairs((5,), (4,))
    exact = exact_hessian_diagonal(model, classify, batches)["inner"]
    reference = hessian_diagonal_reference(model, classify, batches)["inner"]
    assert exact.dtype == reference.dtype == torch.float32
    torch.testing.assert_close(exact, reference, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("block", "large"), [(1, 43), (100, 43), (10**6, 43), (1, 42)])
def test_outer_products_in_blocks_of_samples(block, large, monkeypatch):
    """The weight has 42 numbers: from large=42 on, samples are taken one by one."""
    monkeypatch.setattr("minirank.curvature.outer_products.BLOCK", block)
    monkeypatch.setattr("minirank.curvature.outer_products.LARGE", large)
    generator = seeded()
    u, v = torch.randn(2, 4, 5, 3, 6, generator=generator, dtype=torch.float64)
    x = torch.randn(5, 3, 7, generator=generator, dtype=torch.float64)
    y = torch.randn(4, 5, 3, 7, generator=generator, dtype=torch.float64)
    for other, subscript in ((x, "nsj"), (y, "knsj")):
        each = torch.einsum(f"knti,ntj,knsi,{subscript}->kij", u, x, v, other)
        total, traces = outer_products(u, v, x, other)
        torch.testing.assert_close(total, each.sum(0), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(traces, each.sum((1, 2)), rtol=1e-12, atol=1e-12)
    each = torch.einsum("knti,ntj->knij", u, x).square().sum(1)
    total, traces = outer_products(u, u, x, x)
    torch.testing.assert_close(total, each.sum(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(traces, each.sum((1, 2)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.filterwarnings("ignore:the ranks are not settled")
def test_stability_answers_where_few_groups_tell_little(seed):
    """Draws within wide errors can have a negative mean trace, which no minimum has: they still
    give ranks."""
    model = build(
        lambda: nn.Sequential(
            nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)
        )
    )
    generator = seeded(seed)
    batches = [torch.randn(1, 6, generator=generator, dtype=torch.float64) for _ in range(5)]

    def loss_fn(model, batch):
        return model(batch).square().mean()

    allocator = SensitivityLoRA(model, loss_fn, batches, groups=4, progress=False)
    allocator.score()
    result = allocator.stability(9)
    assert result.intervals.keys() == result.allocation.ranks.keys()
    assert sum(result.allocation.ranks.values()) == 9
    assert allocator.settle(9).groups in (4, 5)


def test_a_failed_score_leaves_the_last_one_whole():
    model, batches = build(mlp), pairs((5,), [4] * 8)
    allocator = SensitivityLoRA(model, classify, iter(batches), groups=4, progress=False)
    allocator.score()
    before = allocator.stability(5)
    with pytest.raises(ValueError, match="batches is empty"):
        allocator.score()
    assert allocator.stability(5) == before
