"""Attention masks in tuples are noticed; labels, token types and masks of the loss are not taken
for one."""

from __future__ import annotations

import warnings
from functools import partial

import pytest
import torch
from torch import nn

from minirank import SensitivityLoRA
from minirank.curvature import input_second_moment
from minirank.curvature.padding import unnamed_mask

IDS = torch.tensor([[5, 9, 7, 8], [6, 4, 0, 0], [3, 2, 9, 0]])
MASK = (IDS != 0).long()
LABELS = torch.tensor([1, 0, 1])


def tagged(ids, generator):
    """0 or 1 for each token, as a tagger's labels are."""
    return torch.randint(0, 2, ids.shape, generator=generator)


@pytest.mark.parametrize(
    ("batch", "entry"),
    [
        ((IDS, MASK, LABELS), 1),
        ([IDS, MASK], 1),
        ((IDS, LABELS, MASK.bool()), 2),
        ((MASK.int(), IDS.int(), LABELS.float()), 0),
        ((IDS.flip(1), MASK.flip(1)), 1),  # padded on the left
        ((IDS, torch.zeros_like(IDS), MASK), 2),
        (("text", {"meta": 1}, IDS, MASK), 3),
    ],
)
def test_a_mask_with_padding_is_found(batch, entry):
    assert unnamed_mask(batch) == entry


@pytest.mark.parametrize(
    "batch",
    [
        {"input_ids": IDS, "attention_mask": MASK},  # the default mask is applied
        IDS,
        (IDS, LABELS),
        (IDS, torch.ones_like(IDS), LABELS),  # no padding
        (IDS, MASK.float()),
        (torch.randn(3, 4), LABELS),
        (torch.randn(3, 4), MASK),
        (IDS, torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1], [0, 0, 0, 1]])),  # the prompt has no loss
        (IDS, torch.tensor([[0, 0, 1, 1], [0, 1, 0, 0], [0, 0, 1, 0]])),  # token types, padded
        (IDS, torch.tensor([[1, 0, 1, 1], [0, 1, 0, 0], [0, 0, 1, 0]])),  # labels of the tokens
        (torch.tensor([[5, 0, 7, 0]]), torch.tensor([[1, 0, 1, 0]])),  # … that follow the token
        (IDS, torch.tensor([[0, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]])),  # several labels a sample
        (torch.tensor([[3, 0], [0, 5], [4, 0]]), torch.tensor([[1, 0], [0, 1], [1, 0]])),  # one-hot
        (MASK, MASK),
        (IDS, IDS),
        (torch.zeros(2, 0).long(), torch.zeros(2, 0).long()),
        (torch.zeros(0, 4).long(), torch.zeros(0, 4).long()),
        (),
        "text",
        None,
    ],
)
def test_what_is_no_mask_is_not_taken_for_one(batch):
    assert None is unnamed_mask(batch)


def test_random_labels_raise_no_alarm():
    generator = torch.Generator().manual_seed(0)
    for length in (2, 3, 8, 32):
        for _ in range(300):
            ids = torch.randint(0, 1000, (8, length), generator=generator)
            assert None is unnamed_mask((ids, tagged(ids, generator)))
            labels = torch.randint(0, 2, (8,), generator=generator)
            assert None is unnamed_mask((ids, labels))
            assert None is unnamed_mask((ids, nn.functional.one_hot(labels, 2)))


def model_and_loss():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 3))
    return model, lambda model, batch: model(batch[0]).square().mean()


def test_padding_in_a_tuple_is_said_once_and_a_mask_drops_it():
    model, loss_fn = model_and_loss()
    full = (IDS[:1], MASK[:1], LABELS[:1])
    batches = [full, (IDS, MASK, LABELS), (IDS, MASK, LABELS)]
    with pytest.warns(UserWarning, match=r"padding tokens are counted .*batch\[1\]") as seen:
        counted = input_second_moment(model, loss_fn, batches)
    assert [warning.filename for warning in seen] == [__file__]
    allocator = SensitivityLoRA(model, loss_fn, batches, progress=False)
    with pytest.warns(UserWarning, match="padding tokens are counted") as seen:
        allocator.score()
    assert [warning.filename for warning in seen] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        named = input_second_moment(model, loss_fn, batches, mask=lambda batch: batch[1])
        everything = input_second_moment(model, loss_fn, batches, mask=None)
        SensitivityLoRA(
            model,
            loss_fn,
            batches,
            curvature=partial(input_second_moment, mask=lambda batch: batch[1]),
            progress=False,
        ).score()
        input_second_moment(model, loss_fn, [full])
    assert counted.weights["1"] == 28
    assert named.weights["1"] == 22
    assert torch.equal(counted["1"], everything["1"])
