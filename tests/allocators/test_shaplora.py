"""shaplora.py: Eqs 6–10 against the reference, the facts that follow from them, and the ranks that
they give."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from helpers.models import randomize
from helpers.shaplora_cases import (
    PLAYERS,
    RANKS,
    data,
    flat,
    loss_fn,
    sample_of_sans,
    scored,
    trained,
)
from torch import nn

from minirank import ShapLoRA, lora_layers, resize, wrap
from minirank.allocators.masked_gates import mean_gradient
from minirank.allocators.shaplora import ipt, san
from minirank.shapley import coalition_masks, exact_shapley_values

# ---- the equations ------------------------------------------------------------------------------


@pytest.mark.parametrize("coalitions", [18, 90])
def test_scores_and_standard_errors_equal_the_reference(coalitions):
    model = trained()
    scores, allocator = scored(model, coalitions=coalitions, generator=5)
    sample = sample_of_sans(model, data(), coalition_masks(PLAYERS, coalitions, generator=5))
    assert {name: score.shape for name, score in scores.items()} == {
        name: (r,) for name, r in RANKS.items()
    }
    assert all(score.dtype == torch.float64 for score in scores.values())
    torch.testing.assert_close(flat(scores), sample.mean(0), rtol=1e-12, atol=0)
    pairs = torch.stack([(sample[k] + sample[k + 1]) / 2 for k in range(0, coalitions, 2)])
    expected = ((pairs - pairs.mean(0)) ** 2).sum(0).div(len(pairs) - 1).sqrt() / math.sqrt(
        len(pairs)
    )
    torch.testing.assert_close(flat(allocator.standard_errors), expected, rtol=1e-10, atol=0)
    assert (expected > 0).all()


def test_no_coalitions_is_the_plain_sensitivity():
    model = trained()
    scores, allocator = scored(model, coalitions=0)
    expected = sample_of_sans(model, data(), torch.ones(1, PLAYERS, dtype=torch.bool))[0]
    torch.testing.assert_close(flat(scores), expected, rtol=1e-12, atol=0)
    assert allocator.standard_errors == {}


def test_magnitude_needs_no_data():
    model = trained()
    scores, allocator = scored(model, batches=[], importance="magnitude")
    for name, score in scores.items():
        layer = getattr(model, name)
        for i in range(layer.rank):
            column, row = layer.lora_B[:, i].tolist(), layer.lora_A[i].tolist()
            by_hand = abs(layer.gate[i].item())
            by_hand += sum(map(abs, column)) / len(column) + sum(map(abs, row)) / len(row)
            assert score[i].item() == pytest.approx(by_hand, rel=1e-13)
    assert allocator.standard_errors == {}


def test_the_pieces_by_hand():
    assert ipt(torch.tensor([2.0, -3.0]), torch.tensor([-1.0, 4.0])).tolist() == [2.0, 12.0]  # Eq 8
    P = torch.tensor([[1.0, 2.0], [3.0, 6.0], [5.0, 1.0]])  # (d_out, r) = (3, 2)
    Q = torch.tensor([[1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 0.0, 8.0]])  # (r, d_in) = (2, 4)
    assert san(torch.tensor([10.0, 20.0]), P, Q).tolist() == [10 + 3 + 2.5, 20 + 3 + 2]  # Eq 7


def coalition_of(model, mask):
    """The model with the gates of the ranks outside set to zero by hand."""
    result = copy.deepcopy(model)
    position = 0
    with torch.no_grad():
        for layer in lora_layers(result).values():
            layer.gate *= mask[position : position + layer.rank]
            position += layer.rank
    return result.eval()


@pytest.mark.parametrize("seed", range(3))
def test_a_rank_outside_has_gradients_times_weights_of_exactly_zero(seed):
    mask = torch.rand(PLAYERS, generator=torch.Generator().manual_seed(seed)) < 0.5
    model = coalition_of(trained(), mask)
    assert mask.any()
    assert not mask.all()
    position = 0
    for layer in lora_layers(model).values():
        parameters = [layer.gate, layer.lora_B, layer.lora_A]
        of_gate, of_P, of_Q = mean_gradient(
            model, loss_fn, [(b, len(b[0])) for b in data()], parameters
        )
        outside = ~mask[position : position + layer.rank]
        assert (layer.gate * of_gate)[outside].tolist() == [0.0] * int(outside.sum())
        assert not of_P[:, outside].any()
        assert not of_Q[outside].any()
        assert (of_gate != 0).all()  # only the product with the gate is zero
        assert of_P[:, ~outside].all()
        position += layer.rank


def test_the_three_signed_sums_agree():
    model = coalition_of(trained(), torch.tensor([1, 0, 1, 1, 1, 0, 1]))
    for layer in lora_layers(model).values():
        parameters = [layer.gate, layer.lora_B, layer.lora_A]
        of_gate, of_P, of_Q = mean_gradient(
            model, loss_fn, [(b, len(b[0])) for b in data()], parameters
        )
        expected = layer.gate * of_gate
        torch.testing.assert_close((layer.lora_B * of_P).sum(0), expected, rtol=1e-11, atol=1e-16)
        torch.testing.assert_close((layer.lora_A * of_Q).sum(1), expected, rtol=1e-11, atol=1e-16)
        assert expected.any()


# ---- what the scores do and do not depend on ---------------------------------------------------


@pytest.mark.parametrize("sizes", [(1,) * 11, (11,), (2, 9), (10, 1), (3, 3, 3, 2)])
def test_the_batch_size_does_not_matter(sizes):
    one, _ = scored(batches=data((4, 6, 1)), coalitions=18)
    other, _ = scored(batches=data(sizes), coalitions=18)
    torch.testing.assert_close(flat(other), flat(one), rtol=1e-12, atol=0)


def test_a_mean_over_words_takes_their_number_as_weight():
    """Three samples of 1, 2 and 3 words: the loss is a mean over words, so samples alone are the
    wrong weight."""

    def loss(model, batch):
        x, y, words = batch
        return ((model(x) - y).square().mean(1) * words).sum() / words.sum()

    x, y = data((3,))[0]
    words = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    whole = [(x, y, words)]
    parts = [(x[:1], y[:1], words[:1]), (x[1:], y[1:], words[1:])]
    options = {"loss": loss, "coalitions": 18, "batch_weight": lambda batch: batch[2].sum()}
    one, _ = scored(batches=whole, **options)
    two, _ = scored(batches=parts, **options)
    torch.testing.assert_close(flat(two), flat(one), rtol=1e-12, atol=0)
    wrong, _ = scored(batches=parts, loss=loss, coalitions=18)
    assert not torch.allclose(flat(wrong), flat(one), rtol=1e-3)


@pytest.mark.parametrize("place", [0, 1])
def test_a_batch_of_weight_zero_counts_for_nothing(place):
    """Not even where its mean loss, over no words at all, is NaN."""

    def loss(model, batch):
        x, y, words = batch
        return ((model(x) - y).square().mean(1) * words).sum() / words.sum()

    batches = [(x, y, torch.ones(len(x), dtype=torch.float64)) for x, y in data()]
    options = {"loss": loss, "coalitions": 18, "batch_weight": lambda batch: batch[2].sum()}
    expected, _ = scored(batches=batches, **options)
    x, y, words = batches[0]
    batches.insert(place, (x, y, 0 * words))
    assert loss(trained(), batches[place]).isnan()
    assert torch.equal(flat(scored(batches=batches, **options)[0]), flat(expected))


def test_identical_generators_give_identical_scores_and_another_does_not():
    one, _ = scored(coalitions=18, generator=1)
    two, _ = scored(coalitions=18, generator=1)
    other, _ = scored(coalitions=18, generator=2)
    assert torch.equal(flat(one), flat(two))
    assert not torch.equal(flat(one), flat(other))
    generators = [torch.Generator().manual_seed(7) for _ in range(2)]
    three, four = (scored(coalitions=18, generator=g)[0] for g in generators)
    assert torch.equal(flat(three), flat(four))
    further, _ = scored(coalitions=18, generator=generators[0])  # it has moved on
    assert not torch.equal(flat(three), flat(further))


@pytest.mark.parametrize(
    "generator", [3, torch.Generator().manual_seed(3)], ids=["seed", "generator"]
)
def test_scoring_again_takes_the_same_coalitions(generator):
    first, allocator = scored(coalitions=18, generator=generator)
    errors = allocator.standard_errors
    assert torch.equal(flat(first), flat(allocator.score()))
    assert torch.equal(flat(errors), flat(allocator.standard_errors))


def test_dropout_is_off_and_batch_statistics_are_not_taken():
    training, evaluation = trained().train(), trained().eval()
    assert torch.equal(
        flat(scored(training, coalitions=18)[0]), flat(scored(evaluation, coalitions=18)[0])
    )


def test_a_loader_that_shuffles_is_read_once():
    reads = []

    class Shuffling:
        def __iter__(self):
            reads.append(1)
            order = torch.randperm(3)
            return iter([data()[i] for i in order])

    one, _ = scored(batches=Shuffling(), coalitions=18)
    assert reads == [1]
    torch.testing.assert_close(flat(one), flat(scored(coalitions=18)[0]), rtol=1e-12, atol=0)


def test_every_coalition_costs_one_forward_pass_per_batch():
    calls = []

    def counting(model, batch):
        calls.append(1)
        return loss_fn(model, batch)

    scored(loss=counting, coalitions=18)
    assert len(calls) == 18 * 3 + 2  # the first batch twice, to see that the loss repeats
    scored(loss=counting, coalitions=0)
    assert len(calls) == 19 * 3 + 4


def test_a_loss_that_is_not_deterministic_is_refused():
    def noisy(model, batch):
        return (
            (nn.functional.dropout(model(batch[0]), 0.5) - batch[1]).square().mean()
        )  # never the same mask twice

    with pytest.raises(ValueError, match="the loss is not deterministic"):
        scored(loss=noisy, coalitions=18)


def test_a_layer_and_a_batch_that_are_not_reached_count_as_nothing():
    model = trained()
    model.unused = nn.Linear(5, 5).double()
    randomize(wrap(model, {"unused": 2}, gate=0.0))
    far = torch.ones((), dtype=torch.float64)

    def loss(model, batch):
        return loss_fn(model, batch) if len(batch[0]) > 1 else far

    scores, _ = scored(model, loss=loss, coalitions=18)
    assert scores.pop("unused").tolist() == [0.0, 0.0]
    assert all(score.all() for score in scores.values())
    assert ShapLoRA(model, loss, data(), coalitions=0, progress=False).score()[
        "unused"
    ].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision(dtype):
    scores, _ = scored(trained(dtype), data(dtype=dtype), coalitions=18)
    exact, _ = scored(coalitions=18)
    assert flat(scores).dtype == torch.float64
    torch.testing.assert_close(
        flat(scores), flat(exact), rtol=1e-4 if dtype == torch.float32 else 0.3, atol=0
    )


def test_gradients_of_half_precision_add_up_in_float32():
    """A thousand batches with a gradient of 1 and one of 0.5 each: bfloat16 would stop adding at
    256."""
    model = nn.Linear(1, 1)
    w = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    (gradient,) = mean_gradient(
        model, lambda _, factor: (w * factor).sum(), [(1.0, 1), (0.5, 1)] * 1000, [w]
    )
    assert gradient.dtype == torch.float32
    assert gradient.item() == 0.75


# ---- from scores to ranks ----------------------------------------------------------------------


def test_allocate_keeps_the_best_ranks_of_all_modules():
    scores, allocator = scored(coalitions=18)
    for budget in range(PLAYERS + 1):
        allocation = allocator.allocate(budget)
        best = (
            flat(scores) >= flat(scores).sort(descending=True).values[budget - 1]
            if budget
            else flat(scores) < 0
        )
        assert torch.equal(flat(allocation.keep), best)
        assert allocation.total_rank == budget
        assert allocation.method == "ShapLoRA"


def test_allocations_compare_by_ranks_and_survivors():
    _, allocator = scored(coalitions=18)
    one = allocator.allocate(4)
    assert one == allocator.allocate(4)
    assert one != allocator.allocate(3)
    assert one != "an allocation"
    others = {name: mask.flip(0) for name, mask in one.keep.items()}
    assert one.keep["up"].sum() == 1  # of three
    assert one != replace(one, keep=others)
    assert one != replace(one, keep=None)


def test_bounds_and_parameters():
    _, allocator = scored(coalitions=18)
    assert min(allocator.allocate(3, min_rank=1).ranks.values()) == 1
    assert max(allocator.allocate(3, max_rank=1).ranks.values()) == 1
    allocation = allocator.allocate(40, unit="parameters")
    assert 40 - 13 < allocation.parameters <= 40  # the dearest rank costs 13


def test_a_model_can_be_pruned_in_place_too():
    model = trained()
    _, allocator = scored(model, coalitions=18)
    kept = {
        name: getattr(model, name).gate.detach()[mask]
        for name, mask in allocator.allocate(4).keep.items()
    }
    resize(model, allocator.allocate(4))
    for name, gate in kept.items():
        assert torch.equal(getattr(model, name).gate, gate)
    with pytest.raises(RuntimeError, match="stale"):
        allocator.allocate(3)
    again = allocator.score()  # layers of rank 0 stay, and count none
    assert [len(score) for score in again.values()] == [len(gate) for gate in kept.values()]
    assert sum(len(score) for score in again.values()) == 4
    assert allocator.allocate(2).total_rank == 2


def test_ranks_that_learned_nothing_go_first():
    """Three layers with four ranks each regress onto changes of rank 1, 4 and 0: the third layer's
    ranks, which had nothing to learn, all fall before any other."""
    layers = nn.ModuleList(nn.Linear(10, 10, bias=False).requires_grad_(False) for _ in range(3))
    generator = torch.Generator().manual_seed(0)
    targets = []
    for layer, rank in zip(layers, (1, 4, 0), strict=True):
        U, V = (torch.linalg.qr(torch.randn(10, rank, generator=generator)).Q for _ in range(2))
        layer.weight.normal_(generator=generator)
        targets.append(layer.weight.detach() + U @ V.T)

    def loss(model, x):
        errors = [
            (layer(x) - x @ target.T).square().mean()
            for layer, target in zip(model, targets, strict=True)
        ]
        return torch.stack(errors).sum()

    wrap(layers, {str(i): 4 for i in range(3)}, gate=0.0, alpha=4)
    optimizer = torch.optim.Adam([p for p in layers.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(300):
        optimizer.zero_grad()
        loss(layers, torch.randn(64, 10, generator=generator)).backward()
        optimizer.step()
    _, allocator = scored(layers, [torch.randn(64, 10, generator=generator)], loss)
    assert allocator.allocate(8).ranks == {"0": 4, "1": 4, "2": 0}


def test_what_the_sensitivity_sees_and_what_it_does_not():
    """Two ranks of layer 0 share one direction, half of it each; those of layer 1 have one of their
    own. All are at the minimum of L = Σ ‖ΔW - T‖². The Shapley values of -L are 1/2 for the first
    two and 1 for the others. But a rank with
    a direction of its own meets no gradient there, whoever else is on: sensitivity 0. A shared one
        does as soon as
    the other is off: |λ ∂L/∂λ| = 1/2, and as a mean over two entries 1/4 each for P and Q, hence
        1."""
    layers = nn.ModuleList(nn.Linear(2, 2, bias=False).double() for _ in range(2))
    eye = torch.eye(2, dtype=torch.float64)
    targets = [torch.diag(eye[0]), eye]
    for layer in layers:
        nn.init.zeros_(layer.weight)
    for adapter in wrap(layers, {"0": 2, "1": 2}, gate=0.0, alpha=1, reference_rank=1).values():
        adapter.lora_A.data.copy_(eye)
        adapter.lora_B.data.copy_(eye)
        adapter.gate.data.fill_(1.0)
    for matrix in (layers[0].lora_A, layers[0].lora_B):
        matrix.data.zero_()
    layers[0].lora_A.data[:, 0] = 1
    layers[0].lora_B.data[0, :] = 1
    layers[0].gate.data.fill_(0.5)

    def loss(model, x):
        return sum(
            (layer(x) - x @ target.T).square().sum()
            for layer, target in zip(model, targets, strict=True)
        )

    scores, _ = scored(layers, [eye], loss, generator=4)
    masks = coalition_masks(4, 90, generator=4)
    alone = [
        (masks[:, 0] & ~masks[:, 1]).double().mean(),
        (masks[:, 1] & ~masks[:, 0]).double().mean(),
    ]
    torch.testing.assert_close(scores["0"], torch.stack(alone), rtol=1e-14, atol=0)
    assert scores["1"].tolist() == [0.0, 0.0]
    values = exact_shapley_values(lambda mask: -loss(coalition_of(layers, mask), eye).item(), 4)
    torch.testing.assert_close(
        values, torch.tensor([0.5, 0.5, 1, 1], dtype=torch.float64), rtol=1e-14, atol=0
    )
