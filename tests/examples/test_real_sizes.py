"""The stages of real_sizes.py run on a tiny Llama, and the formulas are those of the work."""

from __future__ import annotations

import json
import re
import sys

import pytest
from helpers.scripts import EXAMPLES, run

pytest.importorskip("transformers")
pytest.importorskip("peft")
imports_of_peft = pytest.mark.filterwarnings("ignore")  # of its optional backends


@pytest.fixture
def formulas(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import size_formulas

    return size_formulas


@imports_of_peft
def test_every_stage_runs_and_a_second_call_measures_only_what_is_asked(tmp_path):
    out = tmp_path / "sizes.json"
    arguments = ("real_sizes.py", "--quick", "--out", out, "--work", tmp_path / "work")
    text = run(*arguments, cwd=tmp_path)
    first = json.loads(out.read_text())["stages"]
    assert len(first) == 27
    for name, (figures,) in first.items():
        assert figures["peak_bytes"] >= figures["before_bytes"] > 0, name
        assert figures["wall_seconds"] > 0, name
        assert re.search(rf"^{re.escape(name)} ", text, re.MULTILINE), name
    trained = ("train: uniform", "train: allocated", "train: PEFT", "train: L1RA")
    assert len({first[name][0]["first_loss"] for name in trained}) == 1  # B = 0 at the start
    parameters = {first[f"wrap: {arm}"][0]["parameters"] for arm in ("uniform", "PEFT")}
    assert parameters == {1024}
    assert first["train: L1RA"][0]["updates"] == 2

    run(*arguments, "--stages", "merge*", cwd=tmp_path)
    second = json.loads(out.read_text())["stages"]
    anew = {name for name in first if first[name] != second[name]}
    assert anew == {"merge", "merge: PEFT"}
    shown = run(*arguments, "--show", cwd=tmp_path)
    assert json.loads(out.read_text())["stages"] == second
    assert "Llama-3-70B" in shown
    with pytest.raises(SystemExit, match="--stages names none"):
        run(*arguments, "--stages", "mrge", cwd=tmp_path)


def test_flops_that_torch_counts_are_those_of_the_formulas(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import real_sizes

    for name, (counted, formula) in real_sizes.counted_flops().items():
        assert counted == formula, name


def test_shapes_are_those_of_the_models_on_the_meta_device(formulas):
    import torch
    import transformers

    from minirank import UniformRanks, linear_targets
    from minirank.layers.linear import linear_shape

    for name, llama in formulas.LLAMAS.items():
        config = transformers.LlamaConfig(
            vocab_size=llama.vocab,
            hidden_size=llama.hidden,
            intermediate_size=llama.mlp,
            num_hidden_layers=2,
            num_attention_heads=llama.heads,
            num_key_value_heads=llama.kv_heads,
            tie_word_embeddings=llama.tied,
        )
        shallow = llama._replace(layers=2)
        with torch.device("meta"):
            model = transformers.LlamaForCausalLM(config)
        assert sum(p.numel() for p in model.parameters()) == formulas.weights(shallow), name
        targets = linear_targets(model, "model.layers.*")
        assert [linear_shape(module) for module in targets.values()] == shallow.linears
        uniform = UniformRanks(model, list(targets))
        uniform.score()
        allocation = uniform.allocate(8 * len(targets))
        assert allocation.parameters == formulas.adapter_parameters(shallow, 8)


def test_published_sizes_of_the_models(formulas):
    """The numbers of parameters that the model cards state."""
    counts = {name: formulas.weights(llama) for name, llama in formulas.LLAMAS.items()}
    assert counts["SmolLM2-135M"] == 134_515_008
    assert counts["Llama-3.2-1B"] == 1_235_814_400
    assert counts["Llama-2-7B"] == 6_738_415_616
    assert counts["Llama-3-8B"] == 8_030_261_248
    assert counts["Llama-3-70B"] == 70_553_706_496


def test_growth_of_the_exact_diagonal(tmp_path):
    out = tmp_path / "hessian.json"
    text = run("benchmark_hessian.py", "--quick", "--repeats", 1, "--out", out, cwd=tmp_path)
    figures = json.loads(out.read_text())
    for title in ("width", "depth", "batch", "positions"):
        assert f"growth with {title}" in text
        assert len(figures[title]["median_seconds"]) == 2
    assert figures["batch"]["flop_slope"] == pytest.approx(1, abs=0.1)
    for steps in figures["profile"].values():
        assert steps["products with the Hessian"] > 0
        parts = sum(seconds for name, seconds in steps.items() if name != "all")
        assert parts == pytest.approx(steps["all"])


def test_slope_of_a_power(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import benchmark_hessian

    assert benchmark_hessian.slope([2, 4, 8], [12.0, 96.0, 768.0]) == pytest.approx(3)


def test_a_stage_that_fails_apart_ends_the_run(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import argparse

    import real_sizes

    monkeypatch.setattr(sys, "executable", "/bin/false")
    options = argparse.Namespace(work=tmp_path, text=None)
    with pytest.raises(SystemExit, match="'merge' ended with 1"):
        real_sizes.run_apart("merge", options)
