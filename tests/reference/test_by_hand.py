"""The reference functions against numbers worked out by hand: no code is checked by code alone."""

from __future__ import annotations

import math
from collections import UserDict

import pytest
import torch
from torch import nn

from minirank import reference


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


# ---- lora.py, resize.py --------------------------------------------------------------------------

W, A, B = tensor([[1, 2], [3, 4]]), tensor([[1, -1]]), tensor([[2], [0]])


def test_the_layer():
    x = tensor([5, 7])
    # W x = (19, 43), A x = -2, B A x = (-4, 0)
    assert reference.lora_forward(x, W, None, A, B, 3.0).tolist() == [19 - 12, 43]
    with_gate = reference.lora_forward(x, W, tensor([1, 1]), A, B, 3.0, tensor([0.5]))
    assert with_gate.tolist() == [19 - 6 + 1, 44]
    assert reference.merged_weight(W, A, B, 3.0, tensor([0.5])).tolist() == [[4, -1], [3, 4]]


def test_bfloat16_weights_are_summed_in_float32_and_rounded_once():
    wide = reference.merged_weight(tensor([[256.0]]).float(), tensor([[1.0]]), tensor([[1.0]]), 1.5)
    assert (wide.dtype, wide.item()) == (torch.float32, 257.5)
    half = tensor([[256.0]]).bfloat16()  # bfloat16 has 256, 258, 260: 257.5 rounds to 258
    merged = reference.merged_weight(half, tensor([[1.0]]).float(), tensor([[1.0]]).float(), 1.5)
    assert (merged.dtype, merged.item()) == (torch.bfloat16, 258)


def test_a_wider_adapter_beside_a_bfloat16_weight():
    x = torch.ones(3, 2, dtype=torch.bfloat16)
    y = reference.lora_forward(x, W.bfloat16(), None, A.float(), B.float(), 1.0)
    assert (y.dtype, y.tolist()) == (torch.bfloat16, [[3, 7]] * 3)


@pytest.mark.parametrize("transposed", [False, True])
def test_merging_twice_and_unmerging_twice(transposed):
    weight = W.T if transposed else W
    layer = reference.Layer(weight, None, A, B, 3.0, transposed=transposed)
    assert layer(tensor([5, 7])).tolist() == [7, 43]
    for _ in range(2):
        layer.merge()
        merged = tensor([[7, -4], [3, 4]])
        assert torch.equal(layer.weight, merged.T if transposed else merged)
        assert layer(tensor([5, 7])).tolist() == [7, 43]
    for _ in range(2):
        layer.unmerge()
        assert layer.weight is weight


def test_resizing():
    state = {"A": tensor([[1, 2], [3, 4]]), "B": tensor([[5, 6]]), "gate": tensor([7, 8])}
    moments = {key: value * 10 for key, value in state.items()}
    layer = {**state, "scaling": 2.0, "step": 9, "exp_avg": moments, "exp_avg_sq": moments}
    new = reference.resize(layer, torch.tensor([False, True]), add=2)
    assert new["A"][0].tolist() == [3, 4]
    assert new["A"].shape == (3, 2)
    assert bool(new["A"][1:].abs().max() > 0)
    assert new["B"].tolist() == [[6, 0, 0]]
    assert new["gate"].tolist() == [8, 1, 1]
    assert new["exp_avg"]["A"].tolist() == [[30, 40], [0, 0], [0, 0]]
    assert new["exp_avg_sq"]["B"].tolist() == [[60, 0, 0]]
    assert (new["scaling"], new["step"]) == (2.0, 9)
    assert layer["A"].tolist() == [[1, 2], [3, 4]]


# ---- sensitivity.py ------------------------------------------------------------------------------


def test_the_input_second_moment_leaves_padding_out():
    model = nn.Sequential(nn.Linear(2, 1), nn.Dropout(0.5))
    x = torch.tensor([[[1.0, 2.0], [math.nan, math.inf]], [[3.0, 0.0], [5.0, 2.0]]])
    batch = {"x": x, "attention_mask": torch.tensor([[1, 0], [1, 1]])}
    h = reference.input_second_moment(model, lambda model, b: model(b["x"]).mean(), [batch], ["0"])
    assert h["0"].tolist() == pytest.approx(
        [35 / 3, 8 / 3], rel=1e-15
    )  # (1 + 9 + 25, 4 + 0 + 4) / 3
    assert model.training
    assert not model[0]._forward_pre_hooks


def test_theta():
    h = {"a": tensor([1, 8, 2, 5]), "b": tensor([4, 4, 4, 4])}
    S_g, S_topk, S_er = (16, 16), (6.5, 4), (3, 4)  # Eqs 8-10: 13 < 13.6 ≤ 15; 12 < 13.6 ≤ 16
    assert (sum(h["a"]), sum(h["b"])) == S_g
    beta1, beta2 = 1.25 / 5.25**2, 0.5 / 3.5**2  # σ/μ², Eq 11
    S_l = [beta1 * S_topk[i] + beta2 * S_er[i] for i in (0, 1)]  # Eq 12
    mean, deviation = sum(S_l) / 2, abs(S_l[0] - S_l[1]) / 2
    expected = {name: deviation / mean**2 * S for name, S in zip("ab", S_l, strict=True)}
    assert reference.sensitivity_theta(h) == pytest.approx(expected, rel=1e-12)  # γ1 = 0, Eq 14


def test_theta_of_negative_entries():
    h = {"a": tensor([9, 1]), "b": tensor([-3, -2]), "c": tensor([5, 5])}
    theta = reference.sensitivity_theta(h)
    assert theta["b"] == 0
    assert theta["a"] > 0 < theta["c"]
    assert reference.sensitivity_theta({"a": tensor([1.0]), "b": tensor([1.0])}) == {"a": 1, "b": 1}


# ---- budgets -------------------------------------------------------------------------------------


def test_ranks_from_shares():
    f = reference.ranks_from_shares
    assert f({"a": 1, "b": 1, "c": 1}, 4) == {"a": 2, "b": 1, "c": 1}  # a tie goes to the first
    assert f({"a": 0.5, "b": 2.6, "c": 6.9}, 10) == {"a": 0, "b": 3, "c": 7}  # remainders .5 .6 .9
    assert f({"a": 1, "b": 9}, 10, upper={"a": 8, "b": 4}) == {"a": 6, "b": 4}
    assert f({"a": 0, "b": 0, "c": 5}, 7, upper={"a": 4, "b": 4, "c": 2}) == {
        "a": 3,
        "b": 2,
        "c": 2,
    }
    assert f({"a": 1, "b": 1}, 10, costs={"a": 2, "b": 3}) == {"a": 2, "b": 2}
    assert f({"a": 1, "b": 1}, 99, costs={"a": 2, "b": 3}, upper={"a": 1, "b": 2}) == {
        "a": 1,
        "b": 2,
    }


def test_best_ranks():
    scores = {"a": [0.5, 0.5, 0.1], "b": [0.5, -1.0]}
    assert reference.best_ranks(scores, 2) == {"a": [True, True, False], "b": [False, False]}
    lower = {"a": 0, "b": 2}
    assert reference.best_ranks(scores, 3, lower=lower) == {
        "a": [True, False, False],
        "b": [True] * 2,
    }
    costs = {"a": 3, "b": 2}
    assert reference.best_ranks(scores, 5, costs) == {"a": [True, False, False], "b": [True, False]}


# ---- l1ra.py -------------------------------------------------------------------------------------


def test_shrinking():
    (shrunk,) = reference.l1ra_shrink([tensor([-0.5, 0.05, 0.2, 0.9, 1.4])], 0.1)
    torch.testing.assert_close(shrunk, tensor([0, 0, 0.1, 0.8, 1.0]), rtol=0, atol=1e-15)


def test_reassigning():
    gates = {"loses": [0.9, 0.0, 0.8, 0.0], "second": [0.7, 0.6], "first": [0.8, 0.65]}
    one, many = dict.fromkeys(gates, 1), dict.fromkeys(gates, 9)
    ranks, keep = reference.l1ra_reassign(gates, 8, one, many)
    assert ranks == {"loses": 2, "second": 3, "first": 3}
    assert keep == {"loses": [True, False, True, False], "second": [True] * 2, "first": [True] * 2}
    ranks, keep = reference.l1ra_reassign(gates, 4, one, many)  # 0.6 and 0.65 are pruned too
    assert ranks == {"loses": 2, "second": 1, "first": 1}
    all_zero = {"a": [0.0, 0.0], "b": [1.0]}
    ranks, keep = reference.l1ra_reassign(all_zero, 3, {"a": 1, "b": 1}, {"a": 9, "b": 9})
    assert (ranks, keep["a"]) == ({"a": 1, "b": 2}, [True, False])


# ---- Shapley -------------------------------------------------------------------------------------


def test_shapley_values_of_the_glove_game():
    phi = reference.exact_shapley_values(lambda S: float(min(S[0] + S[1], S[2])), 3)
    assert phi.tolist() == pytest.approx([1 / 6, 1 / 6, 4 / 6], rel=1e-15)
    squares = reference.exact_shapley_values(lambda S: float(S.sum()) ** 2, 4)
    assert squares.tolist() == pytest.approx([4] * 4)  # four equal players, 4² in all


def test_coalitions_come_in_pairs():
    masks = reference.coalition_masks([2, 0, 3], 36, torch.Generator().manual_seed(0))
    assert masks.shape == (36, 5)
    assert masks.sum(0).tolist() == [18] * 5
    assert torch.equal(masks[0::2], ~masks[1::2])


def test_the_sensitivity_of_one_rank():
    # L = (λ P Q − 4)² with λ = 1, P = 2, Q = 3: ∂L/∂(λPQ) = 4, so every |w · ∂L/∂w| is 24.
    params = {"m": {"gate": tensor([1]), "P": tensor([[2]]), "Q": tensor([[3]])}}

    def loss(adapters, batch):
        own = adapters["m"]
        return ((own["P"] * own["gate"]) @ own["Q"] - batch).square().mean()

    batches = [tensor([[4]]), tensor([[4], [4]])]
    masks = torch.tensor([[True], [False]])
    assert reference.shapley_sensitivity(loss, params, batches, masks)["m"].tolist() == [36]
    assert reference.san(
        *(tensor(v) for v in ([1], [[2], [4]], [[3]], [5], [[1], [2]], [[-2]]))
    ).tolist() == [5 + (2 + 8) / 2 + 6]


# ---- curvature -----------------------------------------------------------------------------------


def test_curvature_of_one_weight():
    """y = w x, and L is the mean of (y − t)²: h is the mean of 2 x², a gradient 2 (y − t) x."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False)).double()
    model[0].weight.data.fill_(3.0)
    batches = [(tensor([[1], [2]]), tensor([[0], [4]])), (tensor([[4]]), tensor([[11]]))]

    def loss_fn(model, batch):
        return (model(batch[0]) - batch[1]).square().mean()

    arguments = (model, loss_fn, batches, ["0"])
    assert reference.hessian_diagonal(*arguments)["0"].item() == pytest.approx(2 * 21 / 3)
    assert reference.gauss_newton_diagonal(*arguments)["0"].item() == pytest.approx(2 * 21 / 3)
    # errors 3, 2, 1; gradients 2·3·1, 2·2·2, 2·1·4
    assert reference.empirical_fisher(*arguments)["0"].item() == pytest.approx((36 + 64 + 64) / 3)
    seed = torch.Generator().manual_seed(0)
    assert reference.hutchinson(*arguments, generator=seed, samples=1)["0"].item() == pytest.approx(
        14
    )


def test_batches_that_are_mappings_but_no_dicts_count_by_their_samples():
    """As transformers' BatchEncoding: two batches, of 2 samples and of 1."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False)).double()
    batches = [UserDict(x=tensor([[1], [2]])), UserDict(x=tensor([[4]]))]

    def loss_fn(model, batch):
        return model(batch["x"]).square().mean()

    arguments = (model, loss_fn, batches, ["0"])
    assert reference.hessian_diagonal(*arguments)["0"].item() == pytest.approx(2 * 21 / 3)
    assert reference.gauss_newton_diagonal(*arguments)["0"].item() == pytest.approx(2 * 21 / 3)
    w = model[0].weight.item()  # gradients 2 w x²
    fisher = reference.empirical_fisher(*arguments)["0"].item()
    assert fisher == pytest.approx(4 * w**2 * (1 + 16 + 256) / 3)

    def loss(adapters, batch):
        return (batch["x"] * adapters["m"]["gate"]).square().mean()

    params = {"m": {"gate": tensor([1]), "P": tensor([[0]]), "Q": tensor([[0]])}}
    scores = reference.shapley_sensitivity(loss, params, batches, torch.ones(1, 1).bool())
    assert scores["m"].item() == pytest.approx(2 * 21 / 3)


def test_the_models_own_curvature_is_left_out_of_gauss_newton():
    """y = w² x, L = (y − t)²: ∂²L/∂w² = 2 (2wx)² + 2 (y − t) 2x; Gauss-Newton: the first term."""

    class Square(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(1, 1, bias=False).double()
            self.inner.weight.data.fill_(3.0)

        def forward(self, x):
            return self.inner(x.sqrt()).square()

    def loss_fn(model, x):
        return (model(x) - 20).square().mean()

    arguments = (Square(), loss_fn, [tensor([[2]])], ["inner"])
    assert reference.hessian_diagonal(*arguments)["inner"].item() == pytest.approx(288 - 16)
    assert reference.gauss_newton_diagonal(*arguments)["inner"].item() == pytest.approx(288)


# ---- peft_format.py ------------------------------------------------------------------------------


def test_the_peft_format():
    layers = {
        "h.1": {
            "A": tensor([[1, 2]]),
            "B": tensor([[3], [4]]),
            "gate": tensor([0.5]),
            "scaling": 2.0,
        },
        "h.10": {"A": torch.ones(2, 2), "B": torch.ones(2, 2), "gate": None, "scaling": 2.0},
        "empty": {"A": torch.ones(0, 2), "B": torch.ones(2, 0), "gate": None, "scaling": 2.0},
    }
    tensors, config = reference.peft_export(layers)
    assert sorted(tensors) == [
        f"base_model.model.{name}.lora_{X}.weight" for name in ("h.1", "h.10") for X in "AB"
    ]
    assert tensors["base_model.model.h.1.lora_B.weight"].tolist() == [[1.5], [2]]
    assert config["rank_pattern"] == {r"^h\.1": 1, r"^h\.10": 2}
    assert config["alpha_pattern"] == {r"^h\.1": 2.0, r"^h\.10": 4.0}
    assert reference.peft_delta_weight(tensors, config, "h.1").tolist() == [[3, 6], [4, 8]]
    assert reference.peft_delta_weight(tensors, config, "h.10").tolist() == [[4, 4], [4, 4]]
    assert reference.peft_delta_weight(tensors, config, "empty") is None


def test_how_peft_scales():
    tensors = {"base_model.model.w[0].lora_A.weight": torch.ones(4, 2),
               "base_model.model.w[0].lora_B.weight": torch.ones(3, 4)}  # fmt: skip
    config = {"r": 4, "lora_alpha": 6.0, "use_rslora": True, "fan_in_fan_out": True}
    delta = reference.peft_delta_weight(tensors, config, "w[0]")
    assert delta.shape == (2, 3)
    assert delta.unique().tolist() == [4 * 6 / 2]
    patterns = {"alpha_pattern": {"other": 1.0, "w[0]": 10.0}, "use_rslora": False}
    assert reference.peft_delta_weight(tensors, config | patterns, "w[0]").unique().tolist() == [10]


# ---- inputs that implementations meet ------------------------------------------------------------


def quadratic(model, batch):
    inputs, t = batch
    return (model(inputs["x"]) - t).square().mean()


@pytest.mark.parametrize("block", [torch.no_grad, torch.inference_mode])
def test_gradients_are_on_whatever_the_caller_does(block):
    model = nn.Sequential(nn.Linear(1, 1, bias=False)).double()
    batches = [
        ({"x": tensor([[1], [2]])}, tensor([[0], [4]])),
        ({"x": tensor([[4]])}, tensor([[11]])),
    ]
    arguments = (model, quadratic, batches, ["0"])
    with block():
        assert reference.hessian_diagonal(*arguments)["0"].item() == pytest.approx(14)
        assert reference.gauss_newton_diagonal(*arguments)["0"].item() == pytest.approx(14)
        seed = torch.Generator().manual_seed(0)
        h = reference.hutchinson(*arguments, generator=seed, samples=1)
        assert h["0"].item() == pytest.approx(14)
        plain = [(x["x"], t) for x, t in batches]
        fisher = reference.empirical_fisher(
            model, lambda m, b: (m(b[0]) - b[1]).square().mean(), plain, ["0"]
        )
        assert fisher["0"].item() > 0
        params = {"m": {"gate": tensor([1]), "P": tensor([[2]]), "Q": tensor([[3]])}}
        scores = reference.shapley_sensitivity(
            lambda a, b: (a["m"]["P"] * a["m"]["gate"] @ a["m"]["Q"] - b).square().mean(),
            params,
            [tensor([[4]])],
            torch.tensor([[True]]),
        )
        assert scores["m"].tolist() == [72]


def test_a_target_called_by_keyword_beside_whole_numbers_in_the_model():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(2, 1, bias=False)
            self.count = nn.Parameter(torch.arange(3), requires_grad=False)

        def forward(self, x):
            return self.inner(input=x)

    arguments = (
        Model(),
        lambda m, x: m(x).square().mean(),
        [tensor([[1, 2], [3, 4]]).float()],
        ["inner"],
    )
    assert reference.input_second_moment(*arguments)["inner"].tolist() == [5, 10]
    assert reference.hessian_diagonal(*arguments)["inner"].tolist() == [[10, 20]]


def test_resizing_shares_nothing_and_keeps_dtypes():
    step = torch.tensor(3.0)
    layer = {"A": torch.ones(1, 2), "B": torch.ones(2, 1), "gate": torch.ones(1), "scaling": 1.0}
    half = {key: layer[key].bfloat16() for key in ("A", "B", "gate")}
    layer |= {"step": step, "exp_avg": half, "exp_avg_sq": half}
    new = reference.resize(layer, torch.tensor([True]), add=1)
    new["step"] += 1
    assert step.item() == 3
    assert {value.dtype for value in new["exp_avg"].values()} == {torch.bfloat16}
