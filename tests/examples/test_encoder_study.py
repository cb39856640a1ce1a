"""encoder_study.py: it runs, and its arms divide the budget over unpacked attention."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.scripts import EXAMPLES, run
from torch import nn

from minirank import linear_targets

pytest.importorskip("tokenizers", reason="the studies share code with tagging.py")
pytest.importorskip("sklearn", reason="the digits are scikit-learn's")

PARTS = ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.out", "linear1", "linear2")


@pytest.fixture
def study(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import encoder_study

    return encoder_study


def test_the_model_is_unpacked_and_computes_the_same(study):
    task = study.MirroredDigits(reader_steps=1)
    plain = study.new_model(0)
    plain.load_state_dict(task.reader(0).state)
    model = task.model(0)
    images = task.mirrored(0)[0][:5]
    torch.testing.assert_close(model(images), plain(images), rtol=1e-4, atol=1e-5)
    assert not any(isinstance(module, nn.MultiheadAttention) for module in model.modules())
    assert task.names(model) == [f"encoder.layers.{i}.{part}" for i in range(3) for part in PARTS]
    assert {name for names in task.kinds(0).values() for name in names} == set(task.names(model))
    found = [name for name in linear_targets(plain) if name.startswith("encoder")]
    assert found == task.kinds(0)["feed-forward"]  # without unpack_attention
    assert torch.equal(task.reader(0).upright[:5].flip(2), images)
    splits = [task.mirrored(0, *ends)[1] for ends in ((0, 1000), (1000, 1300), (1300, None))]
    assert torch.equal(torch.cat(splits), task.reader(0).labels)


def test_the_study_runs(tmp_path):
    out = tmp_path / "figures.json"
    arms = ("feed-forward only", "fisher", "l1ra, from room", "singular values")
    text = run("encoder_study.py", "--quick", "--arms", *arms, "--out", out, cwd=tmp_path)
    figures = json.loads(out.read_text())
    assert {r["arm"] for r in figures["runs"]} == {"uniform", *arms}
    for record in figures["ranks"]:
        assert 0.95 * record["budget"] < record["parameters"] <= record["budget"]
        assert max(record["ranks"].values()) <= 8
    assert "meets them mirrored: 4 steps" in text
