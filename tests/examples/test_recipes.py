"""The recipes run as they stand, without warnings, and print what they promise."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
# What the stacks import and call by themselves.
of_the_stacks = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
    r"ignore:The dirpath has changed:UserWarning",
)


@pytest.fixture
def printed(capsys, monkeypatch, tmp_path):
    """printed(name): what the recipe writes to standard output, run in an empty folder."""

    def run(name):
        monkeypatch.chdir(tmp_path)
        with torch.random.fork_rng(devices=[]):  # recipes seed the global generator
            runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        assert not list(tmp_path.iterdir())  # nothing is left behind
        return capsys.readouterr().out

    return run


def numbers(pattern, text):
    """The groups of the pattern's only match, as numbers."""
    (match,) = re.finditer(pattern, text)
    return [float(group) for group in match.groups()]


def test_quick_start(printed):
    text = printed("quick_start")
    assert "24 ranks, 2,232 parameters (budget 24 ranks)" in text
    first, last = numbers(r"epoch 1: loss (\S+)\nepoch 10: loss (\S+)", text)
    assert last < 0.1 * first


def test_l1ra_own_loop(printed):
    text = printed("l1ra_own_loop")
    assert "same weights, bit for bit: True; same history of moves: True" in text
    moves = [int(step) for step in re.findall(r"(\d+) .*  little → much", text)]
    (saved,) = numbers(r"resumed after (\d+) steps", text)
    assert moves[0] < saved < moves[-1]  # there are moves to remember, and moves to come
    (loss,) = numbers(r"uninterrupted: loss (\S+)", text)
    assert loss < 0.01


def test_shaplora_two_stages(printed):
    text = printed("shaplora_two_stages")
    scores = re.findall(r"(\d+\.\d+) ± (\d+\.\d+)", text)
    assert len(scores) == 12  # one per rank
    assert "ShapLoRA: 6 ranks" in text
    before, uniform, found = numbers(
        r"before training (\S+), uniform ranks (\S+), ShapLoRA (\S+)", text
    )
    assert max(uniform, found) < 0.1 * before


def test_two_trainings(printed):
    text = printed("two_trainings")
    uniform, roomy = numbers(r"uniform ranks of 2: (\S+), of 6: (\S+)", text)
    (found,) = numbers(r"trained anew with these ranks: (\S+)", text)
    assert roomy < 0.1 * uniform
    assert found < 0.1 * uniform
    rows = dict(re.findall(r"^(\d) +(\d+|·)", text, re.MULTILINE))
    assert rows == {"0": "1", "2": "6", "4": "·", "6": "1"}  # as planted


def test_surgery(printed):
    text = printed("surgery")
    (parameters,) = numbers(r"(\d+) parameters \(budget 600 parameters\)", text)
    assert 600 - 80 < parameters <= 600  # no further rank fits
    trained = ["up.lora_A", "up.lora_B", "down.lora_A", "down.lora_B", "head.weight", "head.bias"]
    assert f"trained: {', '.join(trained)}\n" in text
    assert "wrapped: largest difference 0.0e+00 from the plain model" in text
    assert "resized: {'up': 2, 'down': 5}" in text
    (error,) = numbers(r"merged \['up', 'down'\]: largest difference (\S+), at", text)
    assert error < 1e-4
    assert "bit for bit: True; largest difference 0.0e+00" in text
    assert "a plain Linear again, its weight unchanged: True" in text


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # bitsandbytes
def test_quantised(printed):
    """With bitsandbytes where it is, and the recipe's own layer elsewhere."""
    text = printed("quantised")
    assert "Sensitivity-LoRA: 28 ranks" in text
    adapters, ranks = numbers(r"PEFT made (\d+) adapters with (\d+) ranks", text)
    assert ranks == 28
    first, last = numbers(r"epoch 1: loss (\S+)\nepoch 5: loss (\S+)", text)
    assert last < first - 0.1
    assert "loaded from its file: 0.0e+00 from the trained model" in text
    assert "merge: the weight of 'model.layers.0.self_attn.q_proj' is packed" in text
    assert f"merged into the plain model: {adapters:.0f} layers" in text


def test_sure_ranks(printed):
    text = printed("sure_ranks")
    given = [
        sum(int(rank) for rank in re.findall(r": (\d+)", ranks))
        for ranks in re.findall(r"\{.*\}", text)
    ]
    assert given == [24] * 5  # three curvatures, and two allocations that settled
    assert "with 95% confidence" in text
    few, many = (int(n) for n in re.findall(r"read (\d+) of 400 batches", text))
    assert 10 <= few < many < 400
    rough, fine = (int(n) for n in re.findall(r"estimate to \d+%: (\d+) probes", text))
    assert 10 <= rough < fine < 1000


@pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)  # PEFT reads it
def test_to_peft(printed):
    pytest.importorskip("peft")
    pytest.importorskip("transformers")
    text = printed("to_peft")
    assert "adapters with 24 ranks in all" in text
    assert "trains beside them: 2 parameters (classifier.weight, classifier.bias)" in text
    assert "loaded from it: 0.0e+00 from the trained model" in text
    differences = numbers(
        r"PEFT's output: (\S+) from ours\nimported from PEFT: (\S+) from PEFT's output", text
    )
    assert max(differences) < 1e-5


@of_the_stacks
def test_trainer(printed):
    pytest.importorskip("accelerate")
    pytest.importorskip("transformers")
    text = printed("trainer")
    before, after = numbers(r"(\S+) before, (\S+) after the training", text)
    assert after < 0.7 * before
    assert f"after merging: {after:.2f}, BertForTokenClassification" in text


def test_check_mine(printed):
    right, wrong = printed("check_mine").split("---- batches_weighted_alike")
    assert "21 of 23 cases passed" in right
    assert "FAILED" not in right
    assert "equals the sensitivity with batches weighted alike" in wrong
    assert "FAILED" in wrong
    module = runpy.run_path(str(EXAMPLES / "check_mine.py"))
    module["test_all_coalitions_at_once"]()


# ---- training stacks ---------------------------------------------------------------------------


def assert_ranks_moved_before_and_after(saved, text):
    moves = [int(step) for step in re.findall(r"^ +(\d+) .* → (?!none)", text, re.MULTILINE)]
    assert moves[0] < saved < moves[-1]


@of_the_stacks
def test_lightning_l1ra(printed):
    pytest.importorskip("lightning")
    text = printed("lightning_l1ra")
    assert "resumed after 4 epochs, same weights, bit for bit: True" in text
    assert "same history of moves: True" in text
    assert_ranks_moved_before_and_after(4 * 50, text)
    (loss,) = numbers(r"^loss (\S+)", text)
    assert loss < 0.01


@of_the_stacks
def test_accelerate_l1ra(printed):
    pytest.importorskip("accelerate")
    text = printed("accelerate_l1ra")
    (saved,) = numbers(r"resumed after (\d+) steps, same weights, bit for bit: True", text)
    assert "same history of moves: True" in text
    assert_ranks_moved_before_and_after(saved, text)


@of_the_stacks
def test_compiled_loop(printed):
    config = torch._dynamo.config
    with config.patch(force_parameter_static_shapes=config.force_parameter_static_shapes):
        text = printed("compiled_loop")
    moved, plain = numbers(r"as it is: (\d+) updates moved ranks, (\d+) graphs", text)
    _, with_resets = numbers(r"reset\(\) after each: (\d+) updates moved ranks, (\d+) graphs", text)
    _, as_variables = numbers(r"ranks as variables: (\d+) updates moved ranks, (\d+) graphs", text)
    assert moved > 8
    assert plain == config.recompile_limit == 8  # and no more: torch gives up
    assert with_resets in (moved, moved + 1)  # one for each set of ranks that was trained
    assert as_variables < plain
    assert "the three trainings end at the same weights" in text
