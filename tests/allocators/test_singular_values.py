"""singular_values.py: the singular values of ΔW, and the ranks that the largest of them give."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from helpers.models import randomize
from torch import nn

from minirank import SingularValues, export_peft, lora_layers, merge, resize, wrap
from minirank.allocators.singular_values import singular_values

SIZES = {"0": (5, 7), "1": (7, 4), "2": (4, 6)}  # {name: (d_in, d_out)}
RANKS = {"0": 4, "1": 2, "2": 3}


def loss_fn(model, x):
    return model(x).square().mean()


def trained(gate=None, dtype=torch.float64):
    model = nn.Sequential(*(nn.Linear(d_in, d_out, dtype=dtype) for d_in, d_out in SIZES.values()))
    wrap(model, RANKS, gate=gate, scaling=1.5)
    randomize(lora_layers(model), seed=3)
    return model


@pytest.mark.parametrize("gate", [None, 0.0, 1.0])
def test_scores_are_the_singular_values_of_the_change(gate):
    model = trained(gate)
    scores = SingularValues(model).score()
    assert {name: score.shape for name, score in scores.items()} == {
        name: (r,) for name, r in RANKS.items()
    }
    for name, layer in lora_layers(model).items():
        W = layer.base.weight.detach().clone()
        expected = torch.linalg.svdvals(layer.merged_weight().detach() - W)[: layer.rank]
        torch.testing.assert_close(scores[name], expected, rtol=1e-12, atol=1e-13)


def test_the_values_do_not_depend_on_how_the_ranks_are_mixed():
    model = trained()
    before = SingularValues(model).score()
    for layer in lora_layers(model).values():
        mix = torch.randn(layer.rank, layer.rank, dtype=torch.float64)
        layer.lora_B.data = layer.lora_B.data @ mix
        layer.lora_A.data = torch.linalg.solve(mix, layer.lora_A.data)
    after = SingularValues(model).score()
    for name in RANKS:
        torch.testing.assert_close(after[name], before[name], rtol=1e-9, atol=1e-12)


def test_the_kept_values_are_the_best_of_all_divisions():
    model = trained()
    allocator = SingularValues(model)
    squares = {name: score.square() for name, score in allocator.score().items()}

    def kept(ranks):
        return sum(float(squares[n][:r].sum()) for n, r in zip(RANKS, ranks, strict=True))

    ranks = allocator.allocate(5).ranks
    every = itertools.product(*(range(r + 1) for r in RANKS.values()))
    assert kept(ranks.values()) == max(kept(r) for r in every if sum(r) == 5)
    # Eckart and Young: what is lost is the distance to the nearest matrix of that rank.
    for name, layer in lora_layers(model).items():
        U, S, V = torch.linalg.svd(layer.delta_weight().detach(), full_matrices=False)
        r = ranks[name]
        nearest = (U[:, :r] * S[:r]) @ V[:r]
        lost = (layer.delta_weight().detach() - nearest).norm().square()
        assert float(lost) == pytest.approx(float(squares[name][r:].sum()), abs=1e-12)


def test_planted_ranks_that_every_rank_shares_are_found():
    """Changes of rank 3, 1 and 0, each spread over all ranks of its layer."""
    model = trained()
    for layer, rank in zip(lora_layers(model).values(), (3, 1, 0), strict=True):
        directions = torch.linalg.qr(torch.randn(layer.rank, layer.rank, dtype=torch.float64)).Q
        U = torch.linalg.qr(torch.randn(layer.out_features, rank, dtype=torch.float64)).Q
        V = torch.linalg.qr(torch.randn(layer.in_features, rank, dtype=torch.float64)).Q
        layer.lora_B.data = U @ directions[:rank]
        layer.lora_A.data = directions[:rank].T @ V.T
        assert rank == 0 or bool((layer.contributions() > 1e-3).all())  # no rank is idle
    allocator = SingularValues(model)
    allocator.score()
    assert allocator.allocate(4).ranks == {"0": 3, "1": 1, "2": 0}


def test_a_rank_beyond_both_sides_of_the_matrix_scores_zero():
    model = nn.Sequential(nn.Linear(2, 9, dtype=torch.float64))
    layer = wrap(model, {"0": 2})["0"]
    layer.lora_A.data = torch.tensor([[1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    layer.lora_B.data = torch.ones(9, 2, dtype=torch.float64)
    values = singular_values(layer)
    assert values[0].item() == pytest.approx(2 * 3 * layer.scaling)
    assert values[1].item() == pytest.approx(0, abs=1e-12)


def test_layers_without_ranks_stay_without():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    wrap(model, {"0": 1, "1": 2})
    resize(model, {"0": 0, "1": 2})
    randomize(lora_layers(model), seed=0)
    allocator = SingularValues(model)
    assert allocator.score()["0"].shape == (0,)
    assert allocator.allocate(1).ranks == {"0": 0, "1": 1}


def test_the_model_and_the_random_state_are_left_unchanged():
    model = trained(gate=1.0)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    allocator = SingularValues(model)
    allocator.score()
    allocator.allocate(4)
    assert torch.equal(torch.get_rng_state(), state)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_adapters_are_read_exactly(dtype):
    narrow = trained(dtype=dtype)
    exact = copy.deepcopy(narrow).double()
    expected = SingularValues(exact).score()
    for name, values in SingularValues(narrow).score().items():
        torch.testing.assert_close(values, expected[name], rtol=1e-12, atol=1e-14)


def test_it_scores_a_merged_model_and_one_in_inference_mode():
    model = trained()
    expected = SingularValues(model).score()
    merge(model)
    with torch.inference_mode():
        values = SingularValues(model).score()
    for name in RANKS:
        assert torch.equal(values[name], expected[name])


def test_it_does_not_judge_the_present_ranks():
    model = trained()
    allocator = SingularValues(model)
    allocator.score()
    allocation = allocator.allocate(4)
    assert allocation.keep is None
    fresh = nn.Sequential(*(nn.Linear(d_in, d_out) for d_in, d_out in SIZES.values()))
    wrap(fresh, allocation)
    assert {n: x.rank for n, x in lora_layers(fresh).items()} == allocation.ranks
    resize(model, allocation)
    with pytest.raises(RuntimeError, match="stale"):
        allocator.allocate(4)


def test_the_table_says_which_modules_keep_all_that_they_had():
    model = trained()
    layers = list(lora_layers(model).values())
    layers[1].lora_B.data *= 100  # both ranks of "1" are kept
    allocator = SingularValues(model)
    allocator.score()
    allocation = allocator.allocate(4)
    assert allocation.full == ("1",)
    assert "1 of 3 modules keeps every rank of the first training" in str(allocation)
    # Who sets the bound, wants no more; and where nothing is pruned, there is nothing to say.
    assert allocator.allocate(4, max_rank=2).full == ()
    assert allocator.allocate(9).full == ()
    assert "first training" not in str(allocator.allocate(9))


def test_untrained_and_broken_models_are_refused():
    with pytest.raises(ValueError, match="no LoRA layer"):
        SingularValues(nn.Sequential(nn.Linear(3, 3)))
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    wrap(model, {"0": 1, "1": 1})
    allocator = SingularValues(model)
    with pytest.raises(ValueError, match=r"every ΔW is zero.*train the model first"):
        allocator.score()
    randomize(lora_layers(model), seed=0)
    lora_layers(model)["1"].lora_A.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"adapter of '1' is not finite"):
        allocator.score()
    with pytest.raises(RuntimeError, match="call score"):
        allocator.allocate(1)


def test_adapters_that_peft_trained_can_be_scored(tmp_path):
    pytest.importorskip("peft", reason="PEFT reads and writes the folder")
    from minirank import import_peft

    model = trained()
    expected = SingularValues(model).score()
    export_peft(model, tmp_path)
    plain = nn.Sequential(
        *(nn.Linear(d_in, d_out, dtype=torch.float64) for d_in, d_out in SIZES.values())
    )
    import_peft(plain, tmp_path)
    for name, values in SingularValues(plain).score().items():
        torch.testing.assert_close(values, expected[name], rtol=1e-6, atol=1e-8)


def test_with_data_the_inputs_of_the_trained_model_are_weighed():
    model = trained()
    x = torch.randn(64, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    scores = SingularValues(model, loss_fn, [x[:40], x[40:]]).score()
    merged = copy.deepcopy(model)
    merge(merged)
    inputs = {"0": x, "1": merged[0](x), "2": merged[1](merged[0](x))}
    for name, layer in lora_layers(model).items():
        root = inputs[name].detach().square().mean(0).sqrt()
        expected = torch.linalg.svdvals(layer.delta_weight().detach() @ root.diag())[: layer.rank]
        torch.testing.assert_close(scores[name], expected, rtol=1e-10, atol=1e-12)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(layer._forward_pre_hooks for layer in lora_layers(model).values())


def test_with_independent_inputs_they_sum_to_the_change_of_the_output():
    model = trained()
    scale = torch.tensor([1.0, 0.1, 3.0, 2.0, 0.0], dtype=torch.float64)
    x = torch.randn(100_000, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scores = SingularValues(model, loss_fn, [x * scale]).score()
    change = (x * scale) @ lora_layers(model)["0"].delta_weight().detach().T
    total = float(scores["0"].square().sum())
    assert float(change.square().sum(1).mean()) == pytest.approx(total, rel=0.02)


def test_padding_does_not_count():
    model = nn.Sequential(nn.Linear(3, 3, dtype=torch.float64))
    wrap(model, {"0": 2})
    randomize(lora_layers(model), seed=0)
    x = torch.randn(2, 4, 3, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])

    def loss_of(model, batch):
        return model(batch["x"]).square().mean()

    garbage = torch.where(mask.bool()[..., None], x, 1e6)
    real = SingularValues(model, lambda model, x: model(x).mean(), [x[mask.bool()]]).score()
    masked = SingularValues(model, loss_of, [{"x": garbage, "attention_mask": mask}]).score()
    torch.testing.assert_close(masked["0"], real["0"])
    own = SingularValues(model, loss_of, [{"x": garbage, "real": mask}], mask="real").score()
    torch.testing.assert_close(own["0"], real["0"])


def test_a_loss_and_data_go_together():
    model = trained()
    with pytest.raises(ValueError, match="loss_fn and batches together"):
        SingularValues(model, loss_fn)
    with pytest.raises(ValueError, match="loss_fn and batches together"):
        SingularValues(model, batches=[torch.ones(1, 5)])
    with pytest.raises(TypeError, match="loss_fn"):
        SingularValues(model, 3, [torch.ones(1, 5)])
    with pytest.raises(TypeError, match="batches"):
        SingularValues(model, loss_fn, {"x": torch.ones(1, 5)})
    with pytest.raises(ValueError, match="batches is empty"):
        SingularValues(model, loss_fn, []).score()
