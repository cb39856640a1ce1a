"""optimizer_state.py: entries of other shapes are cut where their shape says where the ranks are."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from minirank import resize, wrap


def carried_entries(old_rank, new_rank, **entries):
    """State entries of A after a resize of a 5 → 4 layer; and what the report says was reset."""
    model = nn.Sequential(nn.Linear(5, 4))
    layer = wrap(model, {"0": old_rank})["0"]
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    optimizer.state[layer.lora_A].update(entries)
    report = resize(model, {"0": new_rank}, optimizer)["0"]
    return optimizer.state.get(layer.lora_A, {}), report.state_reset


def test_entries_of_other_shapes_are_cut_where_their_shape_says_where_the_ranks_are():
    per_rank, per_input = torch.arange(1.0, 4.0), torch.arange(1.0, 6.0)
    entries = {
        "full": per_rank[:, None] * per_input,
        "row": per_rank,
        "row_kept": per_rank[:, None],
        "column": per_input,
        "column_kept": per_input[None],
        "scalar": torch.tensor(7.0),
        "number": 3,
        "nothing": None,
    }
    state, reset = carried_entries(3, 4, **entries)
    assert reset == ()
    grown = torch.tensor([1.0, 2.0, 3.0, 0.0])
    expected = {
        **entries,
        "full": grown[:, None] * per_input,
        "row": grown,
        "row_kept": grown[:, None],
    }
    assert state.keys() == expected.keys()
    for key, value in expected.items():
        assert (
            torch.equal(state[key], value)
            if isinstance(value, torch.Tensor)
            else state[key] is value
        )
    state, reset = carried_entries(3, 2, **entries)
    assert reset == ()
    assert torch.equal(state["row"], per_rank[:2])
    assert state["full"].shape == (2, 5)


@pytest.mark.parametrize(
    ("old_rank", "entry"),
    [
        (4, torch.ones(7)),  # neither the ranks nor the inputs
        (4, torch.ones(2, 5)),
        (4, torch.ones(1, 4, 5)),
        (1, torch.ones(1, 1)),  # one rank, or an average over ranks?
        (4, [torch.ones(4, 5)]),
    ],
)
def test_an_entry_whose_shape_does_not_say_resets_its_parameter_and_is_named(old_rank, entry):
    state, reset = carried_entries(old_rank, 2, odd=entry, moment=torch.ones(old_rank, 5))
    assert state == {}
    assert reset == ("lora_A.odd",)


def test_a_vector_that_could_belong_to_either_axis_is_not_guessed():
    model = nn.Sequential(nn.Linear(3, 4))
    layer = wrap(model, {"0": 3})["0"]
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    optimizer.state[layer.lora_A]["either"] = torch.ones(3)
    assert resize(model, {"0": 2}, optimizer)["0"].state_reset == ("lora_A.either",)
