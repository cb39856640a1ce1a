"""The recipe of Trainer with L1RA: what it prints, and what its classes do beside that."""

from __future__ import annotations

import contextlib
import io
import re
import runpy
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from minirank import lora_layers

pytest.importorskip("accelerate")
pytest.importorskip("transformers")
RECIPE = Path(__file__).parent.parent.parent / "examples" / "trainer_l1ra.py"


@pytest.fixture(scope="module")
def recipe():
    """The names of the recipe after it has run, and `text`, what it printed."""
    printed = io.StringIO()
    with (
        warnings.catch_warnings(),
        torch.random.fork_rng(devices=[]),
        contextlib.redirect_stdout(printed),
    ):
        warnings.simplefilter("ignore")  # what transformers imports and calls by itself
        names = runpy.run_path(str(RECIPE), run_name="__main__")
    return SimpleNamespace(**names, text=printed.getvalue())


def ranks(model):
    return {name: layer.rank for name, layer in lora_layers(model).items()}


def numbers(value):
    """Every number and tensor in a state."""
    if isinstance(value, dict):
        for key in value:
            yield from numbers(value[key])
    elif isinstance(value, list | tuple):
        for item in value:
            yield from numbers(item)
    else:
        yield value


def test_it_goes_on_bit_for_bit(recipe):
    assert "same weights, bit for bit: True; same moves: True" in recipe.text
    (match,) = re.finditer(r"(\S+) before, (\S+) after the training", recipe.text)
    assert float(match[2]) < 0.9 * float(match[1])
    moved = [update.step for update in recipe.history.updates if update.pruned]
    assert moved[0] < 40 < moved[-1]  # there are moves to remember, and moves to come
    pairs = [
        (recipe.whole.optimizer.state_dict(), recipe.resumed.optimizer.state_dict()),
        (recipe.whole.lr_scheduler.state_dict(), recipe.resumed.lr_scheduler.state_dict()),
        (
            recipe.whole.move_ranks.l1ra.state_dict(),
            recipe.resumed.move_ranks.l1ra.state_dict(),
        ),
    ]
    for pair in pairs:
        for ours, theirs in zip(*map(numbers, pair), strict=True):
            if isinstance(ours, torch.Tensor):
                assert torch.equal(ours, theirs)
            elif isinstance(ours, int | float):
                assert ours == theirs


def small(recipe, folder, **options):
    """A trainer of 30 steps, with a checkpoint at every tenth."""
    trainer = recipe.trainer_of(recipe.wrapped(), str(folder))
    arguments = {"max_steps": 30, "save_steps": 10, "bf16": False, **options}
    for name, value in arguments.items():
        assert hasattr(trainer.args, name)
        setattr(trainer.args, name, value)
    return trainer


@pytest.mark.filterwarnings("ignore:save_pretrained writes")
def test_the_best_model_is_loaded_although_ranks_have_moved_since(recipe, tmp_path):
    trainer = small(
        recipe,
        tmp_path,
        eval_strategy="steps",
        eval_steps=10,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # so that the first of the checkpoints is the "best"
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-10")
    at_best, at_end = (trainer.move_ranks.l1ra.history.updates[i].ranks for i in (0, -1))
    assert at_best != at_end
    assert ranks(trainer.model) == at_best
    torch.testing.assert_close(trainer.evaluate()["eval_loss"], trainer.state.best_metric)
    with pytest.raises(ValueError, match="the optimizer does not hold the gate"):  # of the best
        trainer.train()


@pytest.mark.filterwarnings("ignore:save_pretrained writes")
def test_a_checkpoint_without_the_state_of_l1ra_is_not_gone_on_from(recipe, tmp_path):
    small(recipe, tmp_path, max_steps=20).train()
    (tmp_path / "checkpoint-20" / "l1ra.pt").unlink()
    with pytest.raises(FileNotFoundError, match=r"l1ra\.pt"):
        small(recipe, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-20"))
    # A callback that forgets it is told so by the library.
    trainer = small(recipe, tmp_path)
    trainer.move_ranks.on_train_begin = lambda *args, **kwargs: None
    with pytest.warns(UserWarning, match="had been trained, with its gates"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-20"))


def test_the_warning_of_checkpoints_comes_once(recipe, tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        small(recipe, tmp_path).train()
    assert len(list(tmp_path.glob("checkpoint-*"))) == 3
    ours = [w for w in caught if "from_pretrained cannot read it" in str(w.message)]
    assert len(ours) == 1
