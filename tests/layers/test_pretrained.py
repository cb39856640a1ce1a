"""`save_pretrained` of a wrapped model: what is written, and the warning."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

from minirank import merge, unwrap, wrap

WARNING = r"from_pretrained cannot read it.*save_adapter.*merge\(model\) and unwrap\(model\) first"


class Saved(nn.Module):
    """A model that saves itself as those of transformers and diffusers do."""

    def __init__(self, tied=False):
        super().__init__()
        self.emb, self.body, self.head = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 7)
        if tied:
            self.head.weight = self.emb.weight

    def save_pretrained(self):
        return self.state_dict()


def warned(function):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function()
    return caught


def test_it_warns_once_for_a_model_and_writes_everything():
    model = Saved()
    wrap(model, {"body": 2, "head": 1})
    with pytest.warns(UserWarning, match=WARNING) as caught:
        state = model.save_pretrained()
    assert [w.filename for w in caught] == [__file__]  # it names the line of the user
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in state.items())
    assert not warned(model.save_pretrained)
    assert not warned(copy.deepcopy(model).save_pretrained)
    other = Saved()
    wrap(other, {"body": 2})
    assert len(warned(other.save_pretrained)) == 1


def test_nothing_is_said_of_what_is_right():
    model = Saved()
    assert not warned(model.save_pretrained)
    wrap(model, {"body": 2})

    def save_pretrained():  # a function of the same name, without a model that it saves
        model.state_dict()

    assert not warned(save_pretrained)
    assert not warned(model.state_dict)
    merge(model)
    unwrap(model)
    assert not warned(model.save_pretrained)


def test_a_tied_weight_is_written_as_a_copy_and_stays_tied():
    model = Saved(tied=True)
    wrap(model, {"body": 2, "head": 1})
    with pytest.warns(UserWarning, match=WARNING):
        state = model.save_pretrained()
    assert torch.equal(state["head.base.weight"], state["emb.weight"])
    assert state["head.base.weight"].data_ptr() != state["emb.weight"].data_ptr()
    assert state["body.base.weight"].data_ptr() == model.body.base.weight.data_ptr()
    plain = model.state_dict()  # anywhere else a state holds what the model holds
    assert plain["head.base.weight"].data_ptr() == plain["emb.weight"].data_ptr()
    assert model.head.base.weight is model.emb.weight


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # what transformers imports on the way
def test_transformers_saves_an_adapted_head_that_is_tied(tmp_path):
    transformers = pytest.importorskip("transformers")
    safetensors = pytest.importorskip("safetensors.torch")
    config = transformers.GPT2Config(
        vocab_size=29, n_embd=16, n_layer=1, n_head=2, n_positions=16, tie_word_embeddings=True
    )
    model = transformers.GPT2LMHeadModel(config)
    wrap(model, {"lm_head": 2, "transformer.h.0.attn.c_attn": 2})
    with pytest.warns(UserWarning, match=WARNING):
        model.save_pretrained(tmp_path)
    written = safetensors.load_file(tmp_path / "model.safetensors")
    expected = model.state_dict()
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[key], expected[key]) for key in expected)
    model.save_pretrained(tmp_path)  # says it once
