"""sensitivity.py: the equations by hand and against the reference, then the allocator."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from helpers.terminal import Terminal
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from minirank import LoRALinear, SensitivityLoRA, curvature, reference, unwrap, wrap
from minirank.allocators.sensitivity import (
    effective_rank,
    matrix_metrics,
    topk_mean,
    trace,
    weighted,
)
from minirank.allocators.sensitivity import (
    sensitivity_metrics as of_matrices,
)


def sensitivity_metrics(diagonals, topk_fraction=0.5, effective_share=0.85):
    return of_matrices(matrix_metrics(diagonals, topk_fraction, effective_share))


# ---- the equations -----------------------------------------------------------------------------


def test_metrics_of_a_diagonal_worked_by_hand():
    h = torch.tensor([1.0, 8.0, 2.0, 5.0], dtype=torch.float64)
    assert trace(h) == 16  # Eq 8
    assert topk_mean(h) == 6.5  # Eq 9, k = 2: (8 + 5) / 2
    assert topk_mean(h, 1 / 3) == 8  # k = 1
    assert effective_rank(h) == 3  # Eq 10: 13 < 13.6 ≤ 15
    assert effective_rank(h, 0.8) == 2  # 13 ≥ 12.8
    assert weighted(torch.tensor([1.0, 3.0])).tolist() == [0.25, 0.75]  # Eq 11: σ = 1, μ = 2


def test_theta_worked_by_hand():
    """S_g = 4, 12 has σ/μ² = 4/8²; S_topk = 4, 8 has 2/6²; S_er = 1, 2 has (1/2)/(3/2)². So S_l =
    4/9, 8/9, of which σ/μ² is 1/2."""
    diagonals = {"a": torch.tensor([4.0, 0.0]), "b": torch.tensor([8.0, 4.0])}
    metrics = sensitivity_metrics(diagonals.values())
    assert metrics.local.tolist() == pytest.approx([4 / 9, 8 / 9], rel=1e-14)
    assert metrics.theta.tolist() == pytest.approx([17 / 36, 43 / 36], rel=1e-14)
    theta = reference.sensitivity_theta(diagonals)
    assert theta["b"] / theta["a"] == pytest.approx(43 / 17, rel=1e-14)


@pytest.mark.parametrize(("topk", "share"), [(0.5, 0.85), (1 / 3, 0.8), (1.0, 1.0)])
@pytest.mark.parametrize("seed", range(5))
def test_theta_equals_the_reference(seed, topk, share):
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 200, (7,), generator=generator).tolist()
    scales = 10.0 ** torch.randint(-3, 3, (7,), generator=generator)
    diagonals = {
        str(i): -scale * torch.rand(n, generator=generator, dtype=torch.float64).log()
        for i, (n, scale) in enumerate(zip(sizes, scales, strict=True))
    }
    ours = sensitivity_metrics(diagonals.values(), topk_fraction=topk, effective_share=share)
    expected = reference.sensitivity_theta(diagonals, topk, share)
    assert ours.theta.tolist() == pytest.approx(list(expected.values()), rel=1e-12)


def test_the_shape_of_a_diagonal_does_not_matter():
    h = [torch.rand(6, 4, dtype=torch.float64) for _ in range(3)]
    flat = sensitivity_metrics([x.flatten().flip(0) for x in h])
    assert torch.allclose(sensitivity_metrics(h).theta, flat.theta, rtol=1e-14)


def test_constant_factors_cancel_in_the_shares():
    h = [torch.rand(9, dtype=torch.float64) for _ in range(4)]
    theta, scaled = sensitivity_metrics(h).theta, sensitivity_metrics([1e-6 * x for x in h]).theta
    assert torch.allclose(theta / theta.sum(), scaled / scaled.sum(), rtol=1e-12)


def test_equal_metrics_everywhere_are_uniform_not_nan():
    assert sensitivity_metrics([torch.ones(5)] * 3).theta.tolist() == [1, 1, 1]
    assert sensitivity_metrics([torch.rand(5)]).theta.tolist() == [1]


def test_negative_entries_are_clamped_in_local_metrics_and_signed_in_the_trace():
    h = torch.tensor([4.0, -3.0, 2.0, -1.0])
    assert trace(h) == 2
    assert topk_mean(h, 0.75) == 2  # (4 + 2 + 0) / 3
    assert effective_rank(h) == 2  # 4 < 5.1 ≤ 6
    assert effective_rank(-h.abs()) == 0


def test_a_negative_theta_counts_as_zero():
    metrics = sensitivity_metrics(
        [torch.tensor([9.0, 1.0]), torch.tensor([-3.0, -2.0]), torch.tensor([5.0, 5.0])]
    )
    assert metrics.trace.tolist() == [10, -5, 10]
    assert metrics.theta[1] == 0
    assert (metrics.theta[[0, 2]] > 0).all()


@pytest.mark.parametrize("h", [torch.zeros(4), -torch.ones(4), torch.tensor([1.0, -2.0])])
def test_a_mean_trace_that_is_not_positive_is_an_error(h):
    with pytest.raises(ValueError, match=r"mean Hessian trace .* Eq 7 needs a minimum"):
        sensitivity_metrics([h, h])


@settings(max_examples=300, deadline=None)
@example([[5e-324, 0, 0, 0], [1e-323, 0, 0, 0]])  # the mean of S_topk underflows to zero
@given(st.lists(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=9), min_size=1, max_size=6))
def test_theta_is_never_nan_or_negative(diagonals):
    h = [torch.tensor(d, dtype=torch.float64) for d in diagonals]
    if torch.stack([x.sum() for x in h]).mean() <= 0:
        with pytest.raises(ValueError, match="mean Hessian trace"):
            sensitivity_metrics(h)
    else:
        theta = sensitivity_metrics(h).theta
        assert torch.isfinite(theta).all()
        assert (theta >= 0).all()
        assert theta.any()


# ---- the allocator -----------------------------------------------------------------------------


def model_and_batches():
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)).double()
    batches = [torch.randn(n, 6, dtype=torch.float64, generator=generator) for n in (3, 7)]
    return model, batches


def loss_fn(model, batch):
    return model(batch).square().mean()


def test_score_is_theta_of_the_input_second_moment():
    model, batches = model_and_batches()
    allocator = SensitivityLoRA(model, loss_fn, batches, progress=False)
    scores = allocator.score()
    x = torch.cat(batches)
    moments = {"0": x.square().mean(0), "2": model[1](model[0](x)).detach().square().mean(0)}
    expected = reference.sensitivity_theta(moments)
    assert list(scores) == ["0", "2"]
    assert all(score.shape == () for score in scores.values())
    assert {n: float(s) for n, s in scores.items()} == pytest.approx(expected, rel=1e-12)
    assert set(allocator.metrics["0"]) == {"trace", "topk_mean", "effective_rank", "local", "theta"}
    assert allocator.metrics["2"]["theta"] == float(scores["2"])
    assert torch.allclose(allocator.curvatures["0"], x.square().mean(0), rtol=1e-14)


def test_ranks_are_the_shares_of_theta():
    model, batches = model_and_batches()
    weight = {
        "0": torch.full((8, 6), 3.0),
        "2": torch.full((5, 8), 1.0),
    }  # per Eqs 8–14, unequal by hand
    allocator = SensitivityLoRA(
        model, loss_fn, batches, curvature=lambda *_: weight, progress=False
    )
    theta = allocator.score()
    share = float(theta["0"] / (theta["0"] + theta["2"]))
    assert allocator.allocate(7).ranks == {"0": round(7 * share), "2": 7 - round(7 * share)}


def test_the_curvature_gets_model_loss_batches_and_exact_names():
    model, batches = model_and_batches()
    seen = {}

    def spy(model, loss_fn, batches, targets):
        seen.update(model=model, loss_fn=loss_fn, batches=list(batches), targets=targets)
        return curvature.input_second_moment(model, loss_fn, seen["batches"], targets)

    SensitivityLoRA(model, loss_fn, batches, targets="2", curvature=spy, progress=False).score()
    assert seen["model"] is model
    assert seen["loss_fn"] is loss_fn
    assert seen["targets"] == ["2"]
    assert all(a is b for a, b in zip(seen["batches"], batches, strict=True))


def test_the_exact_hessian_diagonal_is_a_curvature():
    model, batches = model_and_batches()
    allocator = SensitivityLoRA(
        model, loss_fn, batches, curvature=curvature.exact_hessian_diagonal, progress=False
    )
    scores = allocator.score()
    diagonals = curvature.hessian_diagonal_reference(model, loss_fn, batches)
    expected = sensitivity_metrics(list(diagonals.values())).theta
    torch.testing.assert_close(torch.stack(list(scores.values())), expected, rtol=1e-10, atol=0)
    assert expected.unique().numel() == 2
    assert allocator.allocate(5).total_rank == 5


@pytest.mark.parametrize(
    ("result", "match"),
    [
        ({"0": torch.ones(6)}, "returned nothing for '2'"),
        (
            {"0": torch.ones(6), "2": torch.ones(5)},
            r"has shape \(5,\): expected \(d_out, d_in\) = \(5, 8\)",
        ),
        ({"0": torch.ones(6), "2": torch.full((8,), math.nan)}, "'2' is not finite"),
    ],
)
def test_a_curvature_that_returns_nonsense_is_told_so(result, match):
    model, batches = model_and_batches()
    with pytest.raises(ValueError, match=match):
        SensitivityLoRA(
            model, loss_fn, batches, curvature=lambda *_: result, progress=False
        ).score()


@pytest.mark.parametrize(
    "option", [{"topk_fraction": 0.0}, {"topk_fraction": 1.5}, {"effective_share": math.nan}]
)
def test_options_out_of_range_are_errors(option):
    model, batches = model_and_batches()
    with pytest.raises(ValueError, match=next(iter(option))):
        SensitivityLoRA(model, loss_fn, batches, **option)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"loss_fn": "mse"}, "loss_fn must be a function, got str"),
        ({"curvature": {"0": torch.ones(6)}}, "curvature must be a function, got dict"),
        ({"batches": 3}, "batches must be an iterable of what loss_fn takes, got one int"),
        ({"batches": {"x": 3}}, r"what loss_fn takes, got one dict: put a single batch in a list"),
    ],
)
def test_arguments_of_the_wrong_kind_are_told_at_once(change, match):
    model, batches = model_and_batches()
    with pytest.raises(TypeError, match=match):
        SensitivityLoRA(model, **{"loss_fn": loss_fn, "batches": batches, **change})


def test_layers_that_have_an_adapter_already_are_named():
    model, batches = model_and_batches()
    wrap(model, {"0": 2})
    with pytest.warns(UserWarning, match=r"'0' will get no rank here.*unwrap\(model\) first"):
        allocator = SensitivityLoRA(model, loss_fn, batches, progress=False)
    assert allocator.score().keys() == {"2"}
    # filterwarnings = error: where the other layers were named, nobody is warned.
    assert SensitivityLoRA(model, loss_fn, batches, targets="2").targets.keys() == {"2"}
    assert SensitivityLoRA(model, loss_fn, batches, targets=nn.Linear).targets.keys() == {"2"}
    assert isinstance(model[0], LoRALinear)
    wrap(model, {"2": 1})
    with pytest.raises(ValueError, match=r"every linear layer has an adapter \('0', '2'\)"):
        SensitivityLoRA(model, loss_fn, batches)
    unwrap(model)
    assert SensitivityLoRA(model, loss_fn, batches).targets.keys() == {"0", "2"}


def test_progress_shows_a_bar_in_a_terminal_alone_and_can_be_switched_off(monkeypatch, capsys):
    model, batches = model_and_batches()
    SensitivityLoRA(model, loss_fn, batches).score()
    assert capsys.readouterr().err == ""  # no terminal
    monkeypatch.setattr("sys.stderr", Terminal())
    SensitivityLoRA(model, loss_fn, batches, progress=False).score()
    assert sys.stderr.getvalue() == ""
    SensitivityLoRA(model, loss_fn, batches).score()
    assert "calibration" in sys.stderr.getvalue()


def test_a_tuple_of_tensors_that_may_be_one_batch():
    model, x, y = nn.Sequential(nn.Linear(3, 2)), torch.ones(4, 3), torch.ones(4, 2)

    def loss_of_pairs(model, batch):
        inputs, labels = batch
        return (model(inputs) - labels).square().mean()

    with pytest.raises(ValueError, match=r"tuple of 2 tensors.* pass \[batches\]") as raised:
        SensitivityLoRA(model, loss_of_pairs, (x, y), progress=False).score()
    assert "too many values to unpack" in str(raised.value.__cause__)
    for batches in ([(x, y)], ((x, y),)):
        SensitivityLoRA(model, loss_of_pairs, batches, progress=False).score()
    two_batches = SensitivityLoRA(model, loss_fn, (x, x), progress=False)
    assert two_batches.score().keys() == {"0"}
    with pytest.raises(ValueError, match="too many values to unpack"):  # as it came
        SensitivityLoRA(model, loss_of_pairs, [x, y], progress=False).score()
