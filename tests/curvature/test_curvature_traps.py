"""What every curvature that differentiates the loss must bear: models that must be left alone, odd
batches and precisions, losses that cannot be used; for the exact ones, samples that interact
too."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers.curvature_cases import CASES, Attention, assert_equals, build, classify, mlp, pairs
from helpers.estimators import LOSS_BASED
from torch import nn

from minirank import reference, testing
from minirank.curvature import (
    empirical_fisher,
    exact_hessian_diagonal,
    gauss_newton,
    hessian_diagonal_reference,
)
from minirank.measure import batch_length


def one_pair_interacts(model, batch):
    z = model(batch[0])
    return z.square().mean() + (z[0] * z[2]).sum()


def contrastive(model, batch):
    z = F.normalize(model(batch[0]), dim=1)
    return -torch.logsumexp(z @ z.t(), 1).mean()


class SequenceFirst(nn.Module):
    """Positions before samples, which attention mixes: the first dimension does not count
    samples."""

    def __init__(self):
        super().__init__()
        self.inner, self.layer = nn.Linear(4, 4), nn.TransformerEncoderLayer(4, 2, 6)

    def forward(self, x):
        return self.layer(self.inner(x.transpose(0, 1)))[0]


class Flattened(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.inner(x.flatten(0, 1)).tanh().view(x.shape).mean(1))


@pytest.mark.parametrize(
    ("make", "loss_fn", "shape"),
    [
        (mlp, contrastive, (5,)),
        (mlp, one_pair_interacts, (5,)),
        (SequenceFirst, classify, (3, 4)),
        (Flattened, classify, (3, 4)),
    ],
)
def test_samples_that_interact_are_detected_and_done_without_the_assumption(make, loss_fn, shape):
    model, batches = build(make), pairs(shape, (3, 4))
    with (
        testing.unchanged(model),
        pytest.raises(ValueError, match=r"samples of a batch interact .* independent=False"),
    ):
        exact_hessian_diagonal(model, loss_fn, batches)
    found = exact_hessian_diagonal(model, loss_fn, batches, independent=False)
    expected = reference.hessian_diagonal(model, loss_fn, batches, list(found))
    assert_equals(found, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("estimate", LOSS_BASED.values(), ids=LOSS_BASED.keys())
def test_the_model_is_left_as_it_was_frozen_or_training(estimate):
    model = build(Attention)
    model.train()
    model.qkv.requires_grad_(False)
    batches = CASES["attention"][1]
    classify(model, batches[0]).backward()
    with testing.unchanged(model):
        first = estimate(model, classify, batches)

    def fails(model, batch):
        raise KeyError("in the loss")

    with testing.unchanged(model), pytest.raises(KeyError):
        estimate(model, fails, batches)
    model.requires_grad_(False)
    frozen = estimate(model, classify, batches)
    for name, h in first.items():
        torch.testing.assert_close(frozen[name], h, rtol=1e-12, atol=1e-16)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("estimate", LOSS_BASED.values(), ids=LOSS_BASED.keys())
def test_gradients_switched_off_outside_do_not_matter(estimate, context):
    model, batches = build(mlp), pairs((5,), (2,))
    expected = estimate(model, classify, batches)
    with context():
        got = estimate(model, classify, batches)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_batches_weigh_by_samples_or_as_told():
    model, batches = build(mlp), pairs((5,), (2, 6))
    one, two = (exact_hessian_diagonal(model, classify, [batch])["0"] for batch in batches)
    both = exact_hessian_diagonal(model, classify, batches)["0"]
    torch.testing.assert_close(both, (2 * one + 6 * two) / 8, rtol=1e-14, atol=1e-18)
    equal = exact_hessian_diagonal(model, classify, batches, batch_weight=lambda batch: 1)["0"]
    torch.testing.assert_close(equal, (one + two) / 2, rtol=1e-14, atol=1e-18)


def test_targets_that_the_loss_ignores_add_nothing():
    model, ((x, y),) = build(mlp), pairs((5,), (4,))
    y = torch.where(torch.arange(4) < 2, y, -100)

    def summed(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1], reduction="sum") / 2

    h = exact_hessian_diagonal(model, summed, [(x, y)])
    rest = exact_hessian_diagonal(model, summed, [(x[:2], y[:2])])
    assert all(torch.allclose(h[name], rest[name], rtol=1e-13, atol=0) for name in h)


def test_batch_length_finds_the_first_tensor_with_a_leading_dimension():
    x = torch.zeros(3, 2)
    for batch in (x, (x, 1), {"k": "text", "x": x}, [{"x": [x]}], (torch.tensor(1.0), [1], x)):
        assert batch_length(batch) == 3
    with pytest.raises(ValueError, match="batch_weight="):
        batch_length(["text"])


@pytest.mark.parametrize("estimate", LOSS_BASED.values(), ids=LOSS_BASED.keys())
def test_bad_input_is_named(estimate):
    model = build(mlp)
    with pytest.raises(ValueError, match="batches is empty"):
        estimate(model, classify, [])
    with pytest.raises(ValueError, match="scalar floating-point"):
        estimate(model, lambda m, b: m(b[0]), pairs((5,), (2,)))
    model.append(nn.Identity())
    model[5].unused = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"no batch reached '5\.unused'"):
        estimate(model, classify, pairs((5,), (2,)), ["5.unused"])


def test_samples_that_meet_between_two_calls_of_a_layer_are_detected():
    class Flip(nn.Module):
        def __init__(self):
            super().__init__()
            self.twice = nn.Linear(4, 4)

        def forward(self, x):
            return self.twice(self.twice(x).flip(0))

    model, weights = build(Flip), torch.arange(1.0, 6.0, dtype=torch.float64)
    x = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def loss_fn(model, batch):
        return (model(batch).sum(1) * weights).mean()

    for estimate in (exact_hessian_diagonal, LOSS_BASED["Hutchinson, outputs"]):
        with pytest.raises(ValueError, match="samples of a batch interact"):
            estimate(model, loss_fn, [x])
    exact = exact_hessian_diagonal(model, loss_fn, [x], independent=False)["twice"]
    torch.testing.assert_close(
        exact, hessian_diagonal_reference(model, loss_fn, [x])["twice"], rtol=1e-12, atol=1e-15
    )


def test_interaction_in_a_layer_of_small_curvature_is_detected():
    class Faint(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            h = self.a(x) * 1e-4
            return self.b(torch.tanh(h - h.roll(1, 0) / 2) + 1)

    with pytest.raises(ValueError, match="samples of a batch interact"):
        exact_hessian_diagonal(
            build(Faint).float(), classify, [(b[0].float(), b[1]) for b in pairs((4,), (6,))]
        )


def test_an_input_changed_in_place_after_the_layer_counts_as_the_layer_saw_it():
    class Residual(nn.Module):
        def __init__(self, in_place):
            super().__init__()
            self.first, self.step, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
            self.in_place = in_place

        def forward(self, x):
            h = self.first(x)
            for _ in range(2):
                step = torch.tanh(self.step(h))
                h = h.add_(step) if self.in_place else h + step
            return self.last(h)

    batches = pairs((4,), (3,))
    plain = build(lambda: Residual(False))
    expected = reference.hessian_diagonal(plain, classify, batches, ["step"])
    frozen = build(lambda: Residual(True)).requires_grad_(False)  # autograd would not train it
    found = exact_hessian_diagonal(frozen, classify, batches, "step")
    assert_equals(found, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("estimate", [exact_hessian_diagonal, hessian_diagonal_reference])
def test_hooks_of_the_user_that_change_an_output_are_part_of_the_function(estimate):
    model, batches = build(mlp), pairs((5,), (4,))
    for layer in (model[0], model[2]):
        layer.register_forward_hook(lambda module, args, output: output.square())
    found = estimate(model, classify, batches)
    expected = reference.hessian_diagonal(model, classify, batches, list(found))
    assert_equals(found, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("estimate", LOSS_BASED.values(), ids=LOSS_BASED.keys())
def test_a_layer_that_scales_or_masks_its_weight_is_refused(estimate):
    class Scaled(nn.Linear):
        def forward(self, x):
            return 3 * super().forward(x)

    with pytest.raises(ValueError, match="'0' is a Scaled that does not compute W x"):
        estimate(nn.Sequential(Scaled(4, 3)).double(), classify, pairs((4,), (2,)))


@pytest.mark.parametrize("estimate", LOSS_BASED.values(), ids=LOSS_BASED.keys())
def test_autocast_is_off_inside(estimate):
    model, batches = build(mlp).float(), [(x.float(), y) for x, y in pairs((5,), (4,))]
    expected = estimate(model, classify, batches)
    with torch.autocast("cpu", torch.bfloat16):
        got = estimate(model, classify, batches)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    "estimate", [exact_hessian_diagonal, hessian_diagonal_reference, gauss_newton, empirical_fisher]
)
def test_a_batch_that_does_not_reach_a_layer_counts_as_flat_there(estimate):
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(4, 3) for _ in range(2))

        def forward(self, x):
            return self.experts[0 if x.shape[0] == 2 else 1](x)

    model, batches = build(Experts), pairs((4,), (2, 6))
    h = estimate(model, classify, batches)
    for i in range(2):
        alone = estimate(model, classify, batches[i : i + 1], f"experts.{i}")[f"experts.{i}"]
        torch.testing.assert_close(h[f"experts.{i}"], alone * (2, 6)[i] / 8, rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"batch_weight": lambda batch: 0}, "weigh nothing"),
        (
            {"batch_weight": lambda batch: float("nan")},
            "batch_weight must give a number of at least 0, got nan",
        ),
    ],
)
@pytest.mark.parametrize("estimate", LOSS_BASED.values(), ids=LOSS_BASED.keys())
def test_options_out_of_range_are_errors(estimate, options, match):
    with pytest.raises(ValueError, match=match):
        estimate(build(mlp), classify, pairs((5,), (2,)), **options)


@pytest.mark.parametrize("estimate", LOSS_BASED.values(), ids=LOSS_BASED.keys())
def test_nan_in_the_data_is_called_so(estimate):
    ((x, y),) = pairs((5,), (3,))
    with pytest.raises(ValueError, match="the loss of a batch is nan"):
        estimate(build(mlp), classify, [(x * float("nan"), y)])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("estimate", LOSS_BASED.values(), ids=LOSS_BASED.keys())
def test_half_precision_is_computed_in_float32_and_comes_back_bit_for_bit(estimate, dtype):
    """Features come in half precision too; a mixed model's other parts stay as they are."""

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = mlp().to(dtype)
            self.norm = nn.BatchNorm1d(3).to(dtype)
            self.head = nn.Linear(3, 3)

        def forward(self, *, x):
            return self.head(self.norm(self.body(x)).float())

    def classify_by_keyword(model, batch):
        return F.cross_entropy(model(x=batch[0]), batch[1])

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Mixed()
    model.norm.running_var.fill_(0.3)
    batches = [(x.to(dtype), y) for x, y in pairs((5,), (4, 2))]
    addresses = [t.data_ptr() for t in (*model.parameters(), *model.buffers())]
    twin = copy.deepcopy(model).float()
    with testing.unchanged(model):
        found = estimate(model, classify_by_keyword, batches)
    assert [t.data_ptr() for t in (*model.parameters(), *model.buffers())] == addresses
    assert {t.dtype for t in model.body.parameters()} == {dtype}
    assert model(x=batches[0][0]).dtype == torch.float32
    expected = estimate(twin, classify_by_keyword, [(x.float(), y) for x, y in batches])
    for name, h in found.items():
        assert h.dtype == torch.float32
        assert torch.equal(h, expected[name])

    def fails(model, batch):
        raise KeyError("in the loss")

    with testing.unchanged(model), pytest.raises(KeyError):
        estimate(model, fails, batches)
    assert {t.dtype for t in model.body.parameters()} == {dtype}


@pytest.mark.parametrize("estimate", LOSS_BASED.values(), ids=LOSS_BASED.keys())
def test_a_loss_that_is_not_deterministic_is_refused(estimate):
    def noisy(model, batch):
        return F.cross_entropy(
            F.dropout(model(batch[0]), 0.3), batch[1]
        )  # training=True is its default

    model = build(mlp)
    state = torch.get_rng_state()
    with (
        testing.unchanged(model),
        pytest.raises(ValueError, match=r"not deterministic: one batch gave .* and then"),
    ):
        estimate(model, noisy, pairs((5,), (4,)))
    assert torch.equal(torch.get_rng_state(), state)

    def seeded_noise(model, batch):
        noise = torch.rand(3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        return classify(lambda x: model(x) * noise, batch)

    if "gauss" not in str(estimate):
        estimate(model, seeded_noise, pairs((5,), (4,)))


@pytest.mark.parametrize("estimate", LOSS_BASED.values(), ids=LOSS_BASED.keys())
def test_a_loss_that_took_its_gradient_or_lost_its_graph_is_refused(estimate):
    def backward_inside(model, batch):
        loss = classify(model, batch)
        loss.backward(retain_graph=True)
        return loss

    model, batches = build(mlp), pairs((5,), (4,))
    classify(model, batches[0]).backward()
    with testing.unchanged(model), pytest.raises(ValueError, match=r"loss_fn called backward\(\)"):
        estimate(model, backward_inside, batches)
    with pytest.raises(ValueError, match=r"not connected to any target: .*no detach\(\)"):
        estimate(model, lambda m, b: classify(m, b).detach(), batches)
    other = build(mlp).requires_grad_(False)
    with pytest.raises(
        ValueError, match=r"call the model that it is given|no batch reached '0'|came 0 times"
    ):
        estimate(model, lambda m, b: classify(other, b), batches)


@pytest.mark.parametrize("estimate", LOSS_BASED.values(), ids=LOSS_BASED.keys())
def test_a_batch_that_reaches_no_target_counts_as_flat(estimate):
    """No first dimension to look at, no shift to differentiate by."""

    class Routed(nn.Module):
        def __init__(self):
            super().__init__()
            self.target, self.other = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x):
            return (self.target if len(x) == 2 else self.other)(x)

    model, batches = build(Routed), pairs((4,), (2, 6))
    found = estimate(model, classify, batches, ["target"])
    alone = estimate(model, classify, batches[:1], ["target"])
    torch.testing.assert_close(found["target"], alone["target"] * 2 / 8, rtol=1e-14, atol=0)


@pytest.mark.parametrize("estimate", LOSS_BASED.values(), ids=LOSS_BASED.keys())
def test_a_target_that_the_loss_ignores_has_zeros(estimate):
    class TwoHeads(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.used, self.ignored = nn.Linear(5, 4), nn.Linear(4, 3), nn.Linear(4, 2)

        def forward(self, x):
            h = torch.tanh(self.body(x))
            self.ignored(h)
            return self.used(h)

    found = estimate(build(TwoHeads).requires_grad_(False), classify, pairs((5,), (4,)))
    assert torch.equal(found["ignored"], torch.zeros(2, 4, dtype=torch.float64))
    assert float(found["used"].abs().max()) > 0


@pytest.mark.parametrize("estimate", LOSS_BASED.values(), ids=LOSS_BASED.keys())
def test_batches_of_any_type(estimate):
    model, ((x, y),) = build(mlp), pairs((5,), (4,))
    expected = estimate(model, classify, [(x, y)])
    inputs = {
        "tuple": ([x, y], classify),
        "dict": ({"x": x, "y": y}, lambda m, b: classify(m, (b["x"], b["y"]))),
    }
    inputs["tensor"] = (x, lambda m, b: classify(m, (b, y)))
    for batch, loss_fn in inputs.values():
        found = estimate(model, loss_fn, [batch])
        assert all(torch.equal(found[name], h) for name, h in expected.items())


@pytest.mark.parametrize("estimate", LOSS_BASED.values(), ids=LOSS_BASED.keys())
def test_the_default_device_changes_nothing(estimate):
    model, batches = build(mlp), pairs((5,), (4,))
    expected = estimate(model, classify, batches)
    with torch.device("meta"):
        found = estimate(model, classify, batches)
    assert all(torch.equal(found[name], h) for name, h in expected.items())


@pytest.mark.parametrize("estimate", LOSS_BASED.values(), ids=LOSS_BASED.keys())
def test_a_sample_without_a_batch_dimension_is_a_batch_of_one(estimate):
    model, ((x, y),) = build(mlp), pairs((5,), (1,))
    expected = estimate(model, classify, [(x, y)])
    found = estimate(
        model, lambda m, b: classify(m, (b[0], b[1][0])), [(x[0], y)], batch_weight=lambda b: 1
    )
    for name, h in expected.items():
        torch.testing.assert_close(found[name], h, rtol=1e-12, atol=1e-16)


@pytest.mark.parametrize("estimate", LOSS_BASED.values(), ids=LOSS_BASED.keys())
def test_no_more_products_at_once_than_the_chunk_size(estimate, monkeypatch):
    """Memory grows with the products taken together."""
    if estimate is empirical_fisher:
        pytest.skip("takes one backward pass per batch")
    counts = []
    grad = torch.autograd.grad

    def counted(outputs, inputs, grad_outputs=None, **options):
        if options.get("is_grads_batched"):
            counts.append(len(grad_outputs[0]))
        return grad(outputs, inputs, grad_outputs, **options)

    monkeypatch.setattr(torch.autograd, "grad", counted)
    with pytest.raises(ValueError, match="chunk_size must be at least 1, got 0"):
        estimate(build(mlp), classify, pairs((5,), (4,)), chunk_size=0)
    samples = (
        {}
        if estimate in (exact_hessian_diagonal, hessian_diagonal_reference, gauss_newton)
        else {"samples": 9}
    )
    model = build(mlp)
    model[4] = nn.Linear(4, 7).double()
    estimate(model, classify, pairs((5,), (4,)), chunk_size=4, **samples)
    assert max(counts) == 4
