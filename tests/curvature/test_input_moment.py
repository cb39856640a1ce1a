"""input_moment.py: the input second moment against plain formulas; masks, errors, and that the
model is left unchanged."""

from __future__ import annotations

import contextlib

import pytest
import torch
from helpers.curvature_cases import assert_equals
from torch import nn

from minirank import reference, testing
from minirank.curvature import IdleLayerWarning, input_second_moment


class Encoder(nn.Module):
    """Embedding, a shared projection called twice, attention, dropout and BatchNorm, a pooled
    head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.project = nn.Linear(6, 6)
        self.drop = nn.Dropout(0.5)
        self.norm = nn.BatchNorm1d(6)
        self.pool = nn.Linear(6, 3)

    def forward(self, input_ids, **_):
        x = self.project(self.drop(self.embed(input_ids)))
        x = self.project(x.tanh())
        return self.pool(self.norm(x[:, 0]))


def loss_fn(model, batch):
    return model(**batch).square().mean()


def mlp_loss(model, batch):
    return model(batch).square().mean()


def token_batches():
    generator = torch.Generator().manual_seed(1)
    batches = []
    for n, length, real in ((2, 5, (5, 3)), (3, 7, (7, 2, 4))):
        mask = (torch.arange(length) < torch.tensor(real)[:, None]).long()
        batches.append(
            {
                "input_ids": torch.randint(0, 11, (n, length), generator=generator),
                "attention_mask": mask,
            }
        )
    return batches


def test_tolerance_stops_before_the_end_of_the_batches():
    model = nn.Sequential(nn.Linear(4, 3))
    batches = [torch.randn(16, 4, generator=torch.Generator().manual_seed(i)) for i in range(200)]

    def loss_fn(model, batch):
        return model(batch).mean()

    whole = input_second_moment(model, loss_fn, batches)
    part = input_second_moment(model, loss_fn, batches, tolerance=0.04)
    assert (whole.samples, whole.over, whole.weights) == (200, "batches", {"0": 3200.0})
    assert 10 <= part.samples < 200
    assert part.standard_errors["0"] <= 0.04 * float(part["0"].sum())
    with pytest.raises(ValueError, match="tolerance must be above 0"):
        input_second_moment(model, loss_fn, batches, tolerance=0.0)


def test_equals_the_mean_square_over_all_rows_of_unequal_batches():
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)).double()
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(n, 4, dtype=torch.float64, generator=generator) for n in (1, 9, 30)]
    h = input_second_moment(model, mlp_loss, batches)
    x = torch.cat(batches)
    assert torch.allclose(h["0"], x.square().mean(0), rtol=1e-14)
    assert torch.allclose(h["2"], model[0](x).relu().square().mean(0), rtol=1e-14)


def test_equals_the_reference_with_padding_and_without():
    model, batches = Encoder().double(), token_batches()
    unmasked = [{"input_ids": batch["input_ids"]} for batch in batches]
    for data in (batches, unmasked):
        found = input_second_moment(model, loss_fn, data)
        expected = reference.input_second_moment(model, loss_fn, data, list(found))
        assert_equals(found, expected, rtol=1e-13, atol=0)


def test_is_the_hessian_diagonal_of_a_linear_layer_under_squared_error():
    """½‖W x‖² per sample has the Hessian x xᵀ over every row of W: the proxy is exact there."""
    model = nn.Sequential(nn.Linear(4, 3, bias=False)).double()
    x = torch.randn(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    hessian = torch.autograd.functional.hessian(
        lambda W: 0.5 * (x @ W.t()).square().sum() / len(x), model[0].weight.detach()
    )
    diagonal = hessian.reshape(12, 12).diagonal().reshape(3, 4)
    h = input_second_moment(model, mlp_loss, [x])["0"]
    assert torch.allclose(diagonal, h.expand(3, 4), rtol=1e-13)


def test_padding_is_left_out_and_a_module_called_twice_counts_both():
    model, batches = Encoder().double(), token_batches()
    h = input_second_moment(model, loss_fn, batches)
    model.eval()
    rows, pooled = [], []
    for batch in batches:
        first = model.embed(batch["input_ids"])
        second = model.project(first).tanh()
        rows += [first[batch["attention_mask"] == 1], second[batch["attention_mask"] == 1]]
        pooled.append(model.norm(model.project(second)[:, 0]))
    assert torch.allclose(h["project"], torch.cat(rows).square().mean(0), rtol=1e-13)
    assert torch.allclose(
        h["pool"], torch.cat(pooled).square().mean(0), rtol=1e-13
    )  # one row per sample: all count


def test_masks_by_function_by_key_and_none():
    model, batches = Encoder().double(), token_batches()
    renamed = [{"input_ids": b["input_ids"], "real": b["attention_mask"].bool()} for b in batches]
    by_default = input_second_moment(model, loss_fn, batches)["project"]
    assert torch.equal(
        input_second_moment(model, loss_fn, renamed, mask="real")["project"], by_default
    )
    assert torch.equal(
        input_second_moment(model, loss_fn, renamed, mask=lambda b: b["real"])["project"],
        by_default,
    )
    everything = input_second_moment(model, loss_fn, batches, mask=None)["project"]
    assert not torch.allclose(everything, by_default)


def test_an_input_that_two_layers_share_is_seen_by_each_as_it_was():
    """Query and value get one tensor; the second layer here gets it after a change in place."""

    class Shares(nn.Module):
        def __init__(self, changed):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 2), nn.Linear(3, 2), nn.Linear(3, 2)
            self.changed = changed

        def forward(self, x):
            x = x.clone()
            y = self.a(x) + self.b(x)
            return y + self.c(x.mul_(2) if self.changed else x)

    for changed in (False, True):
        h = input_second_moment(Shares(changed), mlp_loss, [torch.ones(4, 3), 3 * torch.ones(4, 3)])
        assert h["a"].tolist() == h["b"].tolist() == [5, 5, 5]
        assert h["c"].tolist() == ([20, 20, 20] if changed else [5, 5, 5])


def test_one_tensor_under_two_masks_is_measured_twice():
    model, x = nn.Sequential(nn.Linear(1, 1)), torch.tensor([[[1.0], [3.0]]])
    batches = [{"x": x, "attention_mask": torch.tensor([mask])} for mask in ([1, 0], [0, 1])]
    assert input_second_moment(model, lambda m, b: m(b["x"]).sum(), batches)["0"].tolist() == [5]


def test_a_loss_under_inference_mode_measures_the_same():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    x = torch.arange(8.0).reshape(2, 4)
    plain = input_second_moment(model, mlp_loss, [x])
    inferring = input_second_moment(model, torch.inference_mode()(mlp_loss), [x])
    assert all(torch.equal(plain[name], inferring[name]) for name in plain)


def test_a_key_that_was_named_must_be_in_every_batch():
    with pytest.raises(
        ValueError, match=r"mask='padding' is not in a batch of type dict, with keys \['input_ids'"
    ):
        input_second_moment(Encoder().double(), loss_fn, token_batches(), mask="padding")


def test_padding_may_hold_nan():
    class Passes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(2, 2)

        def forward(self, x):
            return self.fc(x)

    x = torch.tensor([[[1.0, 2.0], [float("nan")] * 2]])
    h = input_second_moment(
        Passes(),
        lambda m, b: m(b["x"])[0, 0].sum(),
        [{"x": x, "attention_mask": torch.tensor([[1, 0]])}],
    )
    assert h["fc"].tolist() == [1, 4]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_accumulated_in_float32(dtype):
    model = nn.Sequential(nn.Linear(4, 3)).to(dtype)
    x = (300 + torch.rand(50, 4, generator=torch.Generator().manual_seed(0))).to(
        dtype
    )  # 300² overflows float16
    h = input_second_moment(model, lambda m, b: m(b * 0.01).float().mean(), [x * 100])
    assert h["0"].dtype == torch.float32
    h = input_second_moment(model, lambda m, b: m(b).float().mean(), [x])
    assert torch.allclose(h["0"], x.float().square().mean(0), rtol=1e-6)


def test_any_kind_of_batch_and_keyword_inputs():
    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, x):
            return self.fc(input=x)

    x = torch.ones(4, 3)
    for batch, unpack in (
        (x, lambda b: b),
        ((x, 1), lambda b: b[0]),
        ({"x": x}, lambda b: b["x"]),
        ([x], lambda b: b[0]),
    ):
        h = input_second_moment(Keyword(), lambda m, b, unpack=unpack: m(unpack(b)).sum(), [batch])
        assert h["fc"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_and_the_rng_are_as_before_also_after_an_exception(fails):
    model = Encoder()
    model.train()
    model.pool.eval()  # a mixed state
    model.embed.weight.requires_grad_(False)
    loss_fn(model, token_batches()[0]).backward()

    def noisy(model, batch):
        torch.rand(3)  # user code may draw
        if fails and batch["input_ids"].shape[0] == 3:
            raise KeyError("in the middle")
        return loss_fn(model, batch)

    with testing.unchanged(model), pytest.raises(KeyError) if fails else contextlib.nullcontext():
        input_second_moment(model, noisy, token_batches())


def test_dropout_is_off():
    model, batches = Encoder().train(), token_batches()
    one, two = (input_second_moment(model, loss_fn, batches) for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_the_transformer_fast_path_does_not_hide_the_layers():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    h = input_second_moment(layer, mlp_loss, [x])
    assert set(h) == {"linear1", "linear2"}
    layer.eval()
    first = layer.norm1(x + layer.self_attn(x, x, x, need_weights=False)[0])
    assert torch.backends.mha.get_fastpath_enabled()  # as before
    assert torch.allclose(h["linear1"], first.flatten(0, 1).square().mean(0), rtol=1e-4)


@pytest.mark.parametrize(
    ("batches", "options", "match"),
    [
        ([], {}, "batches is empty"),
        (iter([]), {}, "batches is empty"),
        ([torch.full((2, 4), float("inf"))], {}, "curvature of '0' is not finite"),
        ([torch.ones(2, 4)], {"targets": "nope"}, "'nope' matches no linear layer"),
        (
            [torch.ones(2, 4)],
            {"mask": "pad"},
            "mask='pad' is not in a batch of type Tensor, which has no keys",
        ),
        (
            [torch.ones(2, 4)],
            {"mask": lambda b: torch.ones(5)},
            r"mask of shape \(5,\) does not fit the input of '0'",
        ),
        ([torch.ones(2, 4)], {"mask": lambda b: None}, "mask must give a tensor"),
        ([torch.ones(2, 4)], {"mask": lambda b: torch.zeros(2)}, "no token reached '0'"),
    ],
)
def test_bad_input_is_named(batches, options, match):
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    with testing.unchanged(model), pytest.raises(ValueError, match=match):
        input_second_moment(model, mlp_loss, batches, **options)


@pytest.mark.parametrize("loss", [torch.ones(2), torch.tensor(1), 1.0, None])
def test_a_loss_that_is_not_a_scalar_tensor_is_an_error(loss):
    with pytest.raises(ValueError, match="scalar floating-point tensor"):
        input_second_moment(nn.Sequential(nn.Linear(4, 3)), lambda m, b: loss, [torch.ones(2, 4)])


def test_a_layer_that_no_batch_reaches_is_named():
    model = Encoder()
    model.unused = nn.Linear(3, 3)
    with pytest.raises(ValueError, match=r"no token reached 'unused' in 2 batches"):
        input_second_moment(model, loss_fn, token_batches(), ["unused"])
    with pytest.warns(IdleLayerWarning, match="no token of any batch reached 'unused'"):
        assert not input_second_moment(model, loss_fn, token_batches())["unused"].any()


def test_a_model_without_linear_layers_and_one_on_the_meta_device():
    with pytest.raises(ValueError, match="has 0 linear layers"):
        input_second_moment(nn.Sequential(nn.ReLU()), mlp_loss, [torch.ones(2, 4)])
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 3))
    with pytest.raises(ValueError, match="meta device"):
        input_second_moment(model, mlp_loss, [torch.ones(2, 4)])


def test_tokens_above_the_outlier_factor_are_left_out():
    """Token means of x²: 1, 4, 9, 1e4 and 100; their median is 9."""
    model = nn.Sequential(nn.Linear(2, 2)).double()
    sizes = torch.tensor([1.0, 2.0, 3.0, 100.0, 10.0], dtype=torch.float64)
    x = sizes[:, None] * torch.tensor([1.0, -1.0], dtype=torch.float64)

    def moment(**options):
        return input_second_moment(model, mlp_loss, [x], **options)

    assert moment()["0"].tolist() == pytest.approx(2 * [10114 / 5], rel=1e-14)
    assert moment(outlier_factor=1e4)["0"].tolist() == moment()["0"].tolist()
    cut = moment(outlier_factor=12)
    assert cut["0"].tolist() == pytest.approx(2 * [114 / 4], rel=1e-14)
    assert cut.weights == {"0": 4.0}
    assert moment(outlier_factor=10)["0"].tolist() == pytest.approx(2 * [14 / 3], rel=1e-14)


def test_the_median_is_that_of_the_real_tokens_of_each_batch():
    model = nn.Sequential(nn.Linear(1, 1)).double()

    def batch(values, mask):
        x = torch.tensor(values, dtype=torch.float64)[None, :, None]
        return {"x": x, "attention_mask": torch.tensor([mask])}

    padded = batch([1.0, 1.0, 20.0, 20.0, 20.0, 20.0], [1, 1, 1, 0, 0, 0])
    larger = batch([20.0, 20.0, 20.0, 200.0], [1, 1, 1, 1])
    h = input_second_moment(model, lambda m, b: m(b["x"]).sum(), [padded, larger], outlier_factor=9)
    assert h["0"].tolist() == pytest.approx([(1 + 1 + 3 * 400) / 5])
    assert h.weights == {"0": 5.0}


def test_a_median_of_zero_leaves_no_token_out_and_nan_is_still_reported():
    model = nn.Sequential(nn.Linear(2, 2))
    sparse = torch.zeros(5, 2)
    sparse[0] = 3.0
    h = input_second_moment(model, mlp_loss, [sparse], outlier_factor=2)
    assert h["0"].tolist() == pytest.approx([9 / 5, 9 / 5])
    for value in (float("nan"), float("inf")):
        broken = torch.ones(5, 2)
        broken[2, 1] = value
        with pytest.raises(ValueError, match="not finite"):
            input_second_moment(
                model, lambda m, x: m(x).nan_to_num().mean(), [broken], outlier_factor=2
            )


def test_an_outlier_factor_is_above_one():
    with pytest.raises(ValueError, match=r"outlier_factor must be above 1 .*got 0\.5"):
        input_second_moment(
            nn.Sequential(nn.Linear(2, 2)), mlp_loss, [torch.ones(2, 2)], outlier_factor=0.5
        )
