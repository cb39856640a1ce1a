"""The golden vectors: the files in tests/vectors, and the judging of results that come back."""

from __future__ import annotations

import json
import math
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from minirank import import_peft, reference
from minirank.testing.__main__ import main
from minirank.testing.adapters import ADAPTERS, RECIPES, load_and_run
from minirank.testing.case import Arguments, CaseSpec, Contract, call
from minirank.testing.kit import cases_of
from minirank.testing.plain_data import (
    Tensors,
    decoded,
    encoded,
    shaped_like,
    with_allowed,
)
from minirank.testing.tabulated import MLP, TABULATED, tabulated
from minirank.testing.vectors import (
    LARGEST_CASE,
    adapter_cases,
    check_results,
    plain_contracts,
    vectors,
    write_function,
)
from minirank.testing.vectors_schema import SCHEMA

FOLDER = Path(__file__).parents[1] / "vectors"
JSON_FILES = sorted(FOLDER.rglob("*.json"))
OURS = [path for path in JSON_FILES if path.name not in ("schema.json", "adapter_config.json")]


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


# ---- the files ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vectors") / "new"
    assert main(["vectors", str(folder)]) == 0
    return folder


def names(folder):
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} - {"README.md"}


def test_the_folder_is_up_to_date(written):
    """If this fails: python -m minirank.testing vectors tests/vectors, and look at the changes."""
    assert names(written) == names(FOLDER)
    for name in sorted(names(FOLDER)):
        new, old = written / name, FOLDER / name
        if name.endswith(".json"):
            assert_same_json(read(new), read(old), name)
        else:
            assert_same_tensors(load_file(new), load_file(old), name)


def assert_same_json(new, old, where):
    """Equal, but for the last digits of computed numbers."""
    if isinstance(new, dict):
        assert list(new) == list(old), where  # the order counts
        for key in new:
            assert_same_json(new[key], old[key], f"{where}: {key}")
    elif isinstance(new, list):
        assert len(new) == len(old), where
        for i, pair in enumerate(zip(new, old, strict=True)):
            assert_same_json(*pair, f"{where}: {i}")
    elif isinstance(new, float):
        # What a machine loses in float32, and so what it allows, is its own matter.
        within = 0.75 if where.endswith("allowed") else 1e-9
        assert new == pytest.approx(old, rel=within), where
    else:
        assert new == old, where


def assert_same_tensors(new, old, where):
    assert set(new) == set(old), where
    for key in new:
        a, b = new[key], old[key]
        assert (a.dtype, a.shape) == (b.dtype, b.shape), f"{where}: {key}"
        torch.testing.assert_close(a, b, equal_nan=True, msg=f"{where}: {key}")


def test_the_folder_is_small():
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) < 1_000_000


def test_the_folder_covers_every_contract_with_plain_arguments():
    index = read(FOLDER / "index.json")
    assert index["functions"] == {p.stem: len(read(p)["cases"]) for p in functions()}
    assert all(count >= 2 for count in index["functions"].values())
    assert index["adapters"] == list(RECIPES)
    for contract in plain_contracts():  # each is there, or it is told why it is not
        assert contract.name in {*index["functions"], *index["left_out"]}


def functions():
    return sorted((FOLDER / "functions").glob("*.json"))


def test_every_case_cites_paper_and_equation():
    for path in functions():
        content = read(path)
        assert re.search(r"\d{4}|PEFT|PyTorch", content["source"]), path
        assert all(case["equation"] for case in content["cases"]), path
        if "float32" in str(content["cases"]):
            dtypes = {case["dtype"] for case in content["cases"]}
            assert {"float64", "float32"} <= dtypes, path


def test_every_tensor_is_there_and_used():
    for path in functions():
        content = read(path)
        tensors = load_file(path.with_name(content["tensors"]))
        used = re.findall(r'"\$tensor":"(\d+)"', path.read_text(encoding="utf-8"))
        assert set(used) == set(tensors), path


# ---- the schema, by a validator for the part of JSON Schema that it uses ------------------------

TYPES = {
    "null": lambda v: v is None,
    "boolean": lambda v: isinstance(v, bool),
    "number": lambda v: isinstance(v, (int, float)) and not isinstance(v, bool),
    "integer": lambda v: isinstance(v, int) and not isinstance(v, bool),
    "string": lambda v: isinstance(v, str),
    "array": lambda v: isinstance(v, list),
    "object": lambda v: isinstance(v, dict),
}
READ = {"type", "const", "enum", "minimum", "pattern", "items", "minItems", "maxItems", "anyOf"}
READ |= {"$ref", "required", "properties", "additionalProperties"}
SAID = {"description", "title", "$schema", "$defs"}


def valid(value, schema):
    """Whether a value keeps to a schema."""
    assert not set(schema) - READ - SAID, "the validator does not know this"
    if "$ref" in schema:
        return valid(value, SCHEMA["$defs"][schema["$ref"].rpartition("/")[2]])
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    right = [
        not kinds or any(TYPES[kind](value) for kind in kinds),
        "const" not in schema or value == schema["const"],
        "enum" not in schema or value in schema["enum"],
        "anyOf" not in schema or any(valid(value, option) for option in schema["anyOf"]),
    ]
    if TYPES["number"](value):
        right.append(value >= schema.get("minimum", value))
    if isinstance(value, str):
        right.append(re.search(schema.get("pattern", ""), value))
    if isinstance(value, list):
        right += [valid(item, schema.get("items", {})) for item in value]
        right.append(schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)))
    if isinstance(value, dict):
        known, rest = schema.get("properties", {}), schema.get("additionalProperties", {})
        right += [key in value for key in schema.get("required", [])]
        for key, item in value.items():
            right.append(valid(item, known[key]) if key in known else rest is not False)
            if key not in known and isinstance(rest, dict):
                right.append(valid(item, rest))
    return all(right)


def test_the_schema_file_is_the_one_of_the_package():
    assert read(FOLDER / "schema.json") == SCHEMA


@pytest.mark.parametrize("path", OURS, ids=lambda path: str(path.relative_to(FOLDER)))
def test_every_file_keeps_to_the_schema(path):
    kind = {"golden.json": "golden", "index.json": "index"}.get(path.name, "function")
    assert valid(read(path), SCHEMA["$defs"][kind])
    assert valid(read(path), SCHEMA)


def without(content, key):
    return {k: v for k, v in content.items() if k != key}


def test_the_validator_sees_what_is_wrong():
    content = read(FOLDER / "functions" / "lora_forward.json")
    case = content["cases"][0]
    for change in (
        without(case, "equation"),
        {**case, "more": 1},
        {**case, "dtype": "float8"},
        {**case, "wanted": 3},
        {**case, "arguments": {"x": {"tensor": "x"}}},
        {**case, "result": {"$tensor": "x", "allowed": -1.0}},
        {**case, "result": {"$number": "1,5"}},
        {**case, "result": {"$map": [["a"]]}},
    ):
        assert not valid({**content, "cases": [change]}, SCHEMA["$defs"]["function"]), change
    assert not valid({**content, "cases": []}, SCHEMA["$defs"]["function"])
    assert not valid(without(content, "source"), SCHEMA)


# ---- values as plain data -----------------------------------------------------------------------


def test_values_come_back():
    given = {
        "b": [1, 2.5, None, True, "text", (3,)],
        "a": {"z": math.inf, "y": torch.eye(2), "x": {"deep": torch.tensor([], dtype=torch.bool)}},
    }
    tensors = Tensors()
    text = json.dumps(encoded(given, "k", tensors), allow_nan=False)
    back = decoded(json.loads(text), tensors.by_name)
    assert list(back) == ["b", "a"]
    assert list(back["a"]) == ["z", "y", "x"]
    assert back["b"] == [1, 2.5, None, True, "text", [3]]
    assert back["a"]["z"] == math.inf
    assert torch.equal(back["a"]["y"], torch.eye(2))
    assert set(tensors.by_name) == {"0", "1"}
    assert valid(json.loads(text), SCHEMA["$defs"]["value"])


def test_equal_tensors_are_kept_once():
    tensors = Tensors()
    x = torch.tensor([0.0, 1.0, math.nan])
    assert tensors.put(x) == tensors.put(x.clone()) == "0"
    others = (x.double(), x[None], torch.tensor([-0.0, 1.0, math.nan]), torch.tensor([0, 1, 2]))
    assert [tensors.put(other) for other in others] == ["1", "2", "3", "4"]
    assert tensors.by_name["2"].shape == (1, 3)


def test_lists_become_the_tensors_that_are_expected():
    right = {
        "a": torch.zeros(2, 0),
        "b": [torch.zeros(0, 3)],
        "c": torch.zeros(2).float(),
        "d": 1.0,
    }
    came = shaped_like(right, {"a": [[], []], "b": [[]], "c": [0.1, 2], "d": 3})
    assert came["a"].shape == (2, 0)
    assert came["b"][0].shape == (0, 3)
    assert torch.equal(came["c"], torch.tensor([0.1, 2.0]))
    assert type(came["d"]) is float
    assert shaped_like(right, {"c": "text", "e": [1]}) == {"c": "text", "e": [1]}
    assert shaped_like(torch.zeros(2), [[1.0], [1.0, 2.0]]) == [[1.0], [1.0, 2.0]]


def test_allowed_covers_the_rounding_of_what_is_stored():
    exact = {"y": torch.tensor([1 / 3, 1.0], dtype=torch.float64), "n": 3, "t": 0.1}
    rounded = {"y": exact["y"].float(), "n": 3, "t": 0.1}
    found = with_allowed(exact, rounded, 1, torch.float32)
    assert found["n"] == 3
    assert found["y"].value.dtype == torch.float32
    eps = torch.finfo(torch.float32).eps
    rounding = float((found["y"].value.double() - exact["y"]).abs().max())
    assert eps + rounding <= found["y"].allowed < 1.02 * (eps + rounding)
    assert found["t"].value == 0.1
    assert 0.1 * eps <= found["t"].allowed < 0.11 * eps


def test_numbers_of_one_mapping_are_compared_by_the_largest():
    theta = {"a": 0.0, "b": 2.0}
    for dtype in (torch.float64, torch.float32):
        eps = torch.finfo(dtype).eps
        for each in with_allowed(theta, theta, 3, dtype).values():
            assert 6 * eps <= each.allowed < 6.1 * eps


# ---- which cases are kept -----------------------------------------------------------------------


def one_case(*arguments, observe=call, name="sum", **more):
    spec = CaseSpec(name, "Σ x", lambda: Arguments(arguments), observe, **more)
    return spec


def total(x, other=None):
    return x.sum()


def test_what_is_no_plain_data_is_left_out_with_a_reason():
    x = torch.ones(3, dtype=torch.float64)
    specs = (
        one_case(x, name="plain"),
        one_case(x, name="no call", observe=lambda f, a: 0),
        one_case(x.expand(2, 3)[0], name="view"),
        one_case(torch.ones(LARGEST_CASE), name="large"),
        one_case(x, len, name="callable"),
        one_case(x, nn.Linear(1, 1), name="model"),
    )
    contract = Contract("total", "2026", total, specs)
    found, left_out = vectors(contract)
    assert [each.case.name for each in found] == ["plain, float64", "plain, float32"]
    assert "same numbers" in left_out["view, float64"]
    assert "bytes" in left_out["large, float32"]
    assert "other is a builtin_function_or_method" in left_out["callable, float64"]
    assert "other is a Linear" in left_out["model, float64"]
    assert "no call" in left_out["no call, float64"]


def twofold(implementation, arguments):
    (x,) = arguments.positional
    return {"once": implementation(x), "twice": implementation(2 * x)}


def test_a_case_of_two_calls_has_two_entries(tmp_path, monkeypatch):
    specs = (one_case(torch.ones(3, dtype=torch.float64), observe=twofold),)
    contract = Contract("total", "2026", total, specs)
    (wide, narrow), _ = vectors(contract)
    assert wide.names == ["sum, float64 (1 of 2)", "sum, float64 (2 of 2)"]
    assert [each.result for each in narrow.rounded] == [3.0, 6.0]
    assert write_function(tmp_path, contract, [wide, narrow]) == 4
    cases = read(tmp_path / "total.json")["cases"]
    assert [case["name"] for case in cases] == [*wide.names, *narrow.names]
    monkeypatch.setattr("minirank.testing.vectors.all_contracts", lambda: (contract,))
    (tmp_path / "total.json").unlink()
    for second, status in ((6.0, "passed"), (3.0, "failed"), ({"$skipped": "why"}, "skipped")):
        results = dict(zip([*wide.names, *narrow.names], [3.0, second, 3.0, 6.0], strict=True))
        write_results(tmp_path, "total", results)
        (report,) = check_results(tmp_path)
        assert [result.status for result in report] == [status, "passed"]
    write_results(tmp_path, "total", without(results, wide.names[1]))
    (report,) = check_results(tmp_path)
    assert report[0].entry == wide.names[1]


def test_random_calls_that_are_compared_with_each_other_are_left_out():
    contract = Contract("resize", "2026", total, (one_case(torch.ones(3), observe=twofold),))
    assert "draw random" in vectors(contract)[1]["sum, float64"]


# ---- models and callables as tables -------------------------------------------------------------


class Twice(nn.Module):
    """A layer that is called at two places, and one over positions."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, 3)
        self.b = nn.Linear(3, 2)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return self.b(self.drop(self.a(torch.tanh(self.a(x)))))


def twice():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Twice().double()


def randn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def on_labels(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def on_tokens(model, batch):
    y = model(batch["x"])
    return (y.square().sum(-1) * batch["attention_mask"]).mean()


def padded(*mask, seed=2):
    mask = torch.tensor(mask)
    x = randn(*mask.shape, 3)
    x[mask == 0] = math.nan
    return {"x": x, "attention_mask": mask}


def labelled():
    x, t = randn(4, 3), torch.tensor([0, 1, 1, 0])
    return Arguments((twice(), on_labels, [(x[:1], t[:1]), (x[1:], t[1:])], ["a", "b"]))


def tokens():
    batches = [padded([1, 1, 0], [1, 0, 0]), padded([1, 1], [1, 1])]
    return Arguments((twice(), on_tokens, batches, ["a", "b"]))


def shaplora():
    params = {
        name: {"gate": randn(r), "P": randn(2, r), "Q": randn(r, 2)}
        for name, r in (("one", 2), ("two", 1))
    }

    def loss(params, x):
        y = x @ sum((own["P"] * own["gate"]) @ own["Q"] for own in params.values()).T
        return (y - 1).square().mean()

    masks = torch.tensor([[1, 0, 1], [0, 1, 0], [1, 1, 1]]).bool()
    return Arguments((loss, params, [randn(1, 2), randn(3, 2) + 1], masks))


def gloves():
    return Arguments((lambda S: float(min(S[0] + S[1], S[2])) + 0.25 * float(S[0] & ~S[1]), 3))


ORIGINALS = [
    (reference.exact_shapley_values, gloves),
    (reference.shapley_sensitivity, shaplora),
    (reference.input_second_moment, tokens),
    (reference.input_second_moment, labelled),
    (reference.gauss_newton_diagonal, labelled),
    (reference.empirical_fisher, labelled),
]


@pytest.mark.parametrize(("original", "arguments"), ORIGINALS)
def test_a_table_gives_what_the_model_gives(original, arguments):
    spec = CaseSpec("case", "equation", arguments, terms=64)
    contract = tabulated(Contract(original.__name__, "2026", original, (spec,)))
    found, left_out = vectors(contract)
    assert not left_out
    assert [each.case.name for each in found] == ["case, float64", "case, float32"]
    expected = call(original, arguments())
    for each in found:
        came = each.exact[0].result
        if isinstance(expected, dict):
            assert list(came) == list(expected)
            came, expected_tensors = list(came.values()), list(expected.values())
        else:
            came, expected_tensors = [came], [expected]
        close = {"rtol": 1e-5, "atol": 1e-6} if "float32" in each.case.name else {}
        for a, b in zip(came, expected_tensors, strict=True):
            torch.testing.assert_close(a, b.detach().to(a.dtype), **close)


def test_every_table_is_tested():
    assert set(TABULATED) == {original for original, _ in ORIGINALS}


def test_the_mlp_against_its_full_hessian():
    case = cases_of(MLP, torch.float64)[1]
    weights, biases, inputs, labels, probes = case.arguments().positional

    def loss(first, last):
        y = (inputs[0] @ first.T + biases[0]).tanh() @ last.T + biases[1]
        return nn.functional.cross_entropy(y, labels[0])

    found = call(MLP.reference, case.arguments())
    H = torch.autograd.functional.hessian(loss, tuple(weights))
    for i in (0, 1):
        W = weights[i]
        diagonal = H[i][i].reshape(W.numel(), -1).diagonal().view_as(W)
        torch.testing.assert_close(found["hessian_diagonal"][str(i)], diagonal)
        products = [
            v[i] * sum(torch.tensordot(H[i][j], v[j]) for j in (0, 1)) / len(probes) for v in probes
        ]
        torch.testing.assert_close(found["hutchinson"][str(i)], sum(products))


# ---- results that come back ---------------------------------------------------------------------


def right_results(path):
    """The vectors' own results, as JSON without tensors."""
    tensors = load_file(path.with_suffix(".safetensors"))
    return {c["name"]: as_json(decoded(c["result"], tensors)) for c in read(path)["cases"]}


def as_json(value):
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {key: as_json(item) for key, item in value.items()}
    return [as_json(item) for item in value] if isinstance(value, list) else value


def write_results(folder, name, results, tensors=None):
    (folder / f"{name}.json").write_text(json.dumps({"results": results}), encoding="utf-8")
    if tensors is not None:
        save_file(tensors, folder / f"{name}.safetensors")


@pytest.mark.parametrize("path", functions(), ids=lambda path: path.stem)
def test_the_right_results_pass(path, tmp_path):
    results = right_results(path)
    write_results(tmp_path, path.stem, results)
    (report,) = check_results(tmp_path)
    cases = dict.fromkeys(re.sub(r" \(\d+ of \d+\)$", "", name) for name in results)
    assert [result.case for result in report] == list(cases)
    assert not report.failed, str(report)
    assert valid({"results": results}, SCHEMA["$defs"]["results"])


def test_results_in_a_safetensors_file_pass(tmp_path):
    path = FOLDER / "functions" / "lora_forward.json"
    results = {case["name"]: without_allowed(case["result"]) for case in read(path)["cases"]}
    tensors = load_file(path.with_suffix(".safetensors"))
    write_results(tmp_path, path.stem, results, tensors)
    assert main(["check", str(tmp_path)]) == 0
    del tensors[results["gate, float64"]["$tensor"]]
    write_results(tmp_path, path.stem, results, tensors)
    assert main(["check", str(tmp_path)]) == 2


def without_allowed(value):
    if isinstance(value, dict):
        return {key: without_allowed(item) for key, item in value.items() if key != "allowed"}
    return [without_allowed(item) for item in value] if isinstance(value, list) else value


def test_a_port_in_numpy_by_the_numbers_in_the_files_alone():
    """What the page tells the author of a port to do, without minirank."""
    content = read(FOLDER / "functions" / "lora_forward.json")
    tensors = safe_open(FOLDER / "functions" / content["tensors"], "numpy")
    for case in content["cases"]:
        if case["wanted"] == "value" and case["dtype"]:  # without: bfloat16, which NumPy has not
            given = {
                name: tensors.get_tensor(value["$tensor"]) if isinstance(value, dict) else value
                for name, value in case["arguments"].items()
            }
            gate = given.get("gate")
            h = given["x"] @ given["A"].T * (1 if gate is None else gate)
            y = given["x"] @ given["W"].T + given["scaling"] * h @ given["B"].T
            y = y if given["b"] is None else y + given["b"]
            right = tensors.get_tensor(case["result"]["$tensor"])
            assert (np.abs(y - right) <= case["result"]["allowed"]).all(), case["name"]
            assert not y.any() or (np.abs(1.001 * y - right) > case["result"]["allowed"]).any()


def ways_to_be_wrong():
    path = FOLDER / "functions" / "lora_forward.json"
    results = right_results(path)
    y = results["gate, float64"]
    name, gradients = next(
        (name, value) for name, value in results.items() if "gate" in value and "A" in value
    )
    yield "a larger number", {**results, "gate, float64": [[1.001 * v for v in row] for row in y]}
    yield "another shape", {**results, "gate, float64": y[:1]}
    yield "text", {**results, "gate, float64": "0.5"}
    yield "null", {**results, "gate, float64": None}
    yield "not a number", {**results, "gate, float64": [[math.nan for v in row] for row in y]}
    zero = [0.0] * len(gradients["gate"])
    yield "a gradient", {**results, name: {**gradients, "gate": zero}}
    yield "no gradient", {**results, name: without(gradients, "gate")}
    yield "no result", without(results, "gate, float64")


@pytest.mark.parametrize(("how", "results"), [*ways_to_be_wrong()], ids=lambda v: str(v)[:16])
def test_a_wrong_result_fails(how, results, tmp_path, capsys):
    write_results(tmp_path, "lora_forward", results)
    assert main(["check", str(tmp_path)]) == 1
    report = capsys.readouterr().out
    passed, count = re.search(r"(\d+) of (\d+) cases passed", report).groups()
    assert int(passed) == int(count) - 1
    assert re.search(r"again: case '(gate|gradients.*), float.*' of lora_forward.json", report)


def test_a_wrong_result_is_told_what_it_is(tmp_path, capsys):
    """The hints are those of `check`."""
    results = {}
    path = FOLDER / "functions" / "lora_forward.json"
    tensors = load_file(path.with_suffix(".safetensors"))
    for case in read(path)["cases"]:
        given = {name: decoded(value, tensors) for name, value in case["arguments"].items()}
        if case["wanted"] == "value":
            gate = given.pop("gate", None)
            y = reference.lora_forward(**given, gate=None if gate is None else gate * gate)
            results[case["name"]] = y.tolist()
        else:
            results[case["name"]] = {"$skipped": "no gradients in this port"}
    write_results(tmp_path, "lora_forward", results)
    assert main(["check", str(tmp_path)]) == 1
    report = capsys.readouterr().out
    assert "equals the layer with the gate applied twice" in report
    assert "no gradients in this port" in report


def test_files_that_are_no_results(tmp_path, capsys):
    def refused(words):
        assert main(["check", str(tmp_path)]) == 2
        assert re.search(words, capsys.readouterr().err)

    refused("no results: expected NAME.json .*lora_forward")
    write_results(tmp_path, "lora_fward", {})
    refused("called after no function.*lora_forward")
    (tmp_path / "lora_fward.json").unlink()
    write_results(tmp_path, "lora_forward", {"rank 1": [1.0]})
    refused("results for 'rank 1'.*rank 1, float64")
    for text, words in (("{", "not JSON"), ("[]", "no results"), ('{"results": 3}', "no results")):
        (tmp_path / "lora_forward.json").write_text(text)
        refused(words)


@pytest.mark.parametrize(
    ("original", "arguments", "sentence"),
    [
        (original, arguments, sentence)
        for original, arguments in ORIGINALS
        for sentence in TABULATED[original].wrong_twins
    ],
)
def test_a_wrong_table_is_told_what_it_is(original, arguments, sentence, tmp_path, monkeypatch):
    spec = CaseSpec("uneven", "equation", arguments, terms=64)
    contract = Contract(original.__name__, "2026", original, (spec,))
    monkeypatch.setattr("minirank.testing.vectors.all_contracts", lambda: (contract,))
    plain = tabulated(contract)
    results = {
        case.name: as_json(call(plain.wrong_twins[sentence], case.arguments()))
        for case in cases_of(plain)
    }
    write_results(tmp_path, plain.name, results)
    (report,) = check_results(tmp_path)
    assert [f"equals {sentence}" in result.hint for result in report.failed] == [True, True]


# ---- adapters -----------------------------------------------------------------------------------


def model_of(folder):
    """The model of an adapter: its layers under their names."""
    golden, weights = read(folder / "golden.json"), load_file(folder / "model.safetensors")
    root = nn.Module()
    for name, layer in golden["layers"].items():
        parent = root
        *path, leaf = name.split(".")
        for key in path:
            if key not in parent._modules:
                parent.add_module(key, nn.Module())
            parent = parent._modules[key]
        W, b = weights[f"{name}.weight"], weights.get(f"{name}.bias")
        parent.add_module(leaf, layer_of(layer["type"], W, b))
    return root


def layer_of(kind, W, b):
    if kind == "Conv1D":
        from transformers.pytorch_utils import Conv1D

        layer = Conv1D(W.shape[1], W.shape[0])
        b = torch.zeros(W.shape[1]) if b is None else b
    else:
        layer = nn.Linear(W.shape[1], W.shape[0], bias=b is not None)
    with torch.no_grad():
        layer.weight.copy_(W)
        if b is not None:
            layer.bias.copy_(b)
    return layer


ADAPTER_FOLDERS = [FOLDER / "adapters" / name for name in RECIPES]


def assert_golden(folder, model):
    golden, numbers = read(folder / "golden.json"), load_file(folder / "golden.safetensors")
    for name, layer in golden["layers"].items():
        with torch.no_grad():
            y = model.get_submodule(name)(numbers[f"{name}.input"])
        error = float((y - numbers[f"{name}.output"]).abs().max())
        assert error <= layer["allowed"], f"{name}: {error}, allowed {layer['allowed']}"


@pytest.mark.parametrize("folder", ADAPTER_FOLDERS, ids=lambda folder: folder.name)
def test_peft_gives_the_golden_outputs(folder):
    """Real PEFT: ranks and scalings by layer, outputs, and the same once it is merged."""
    peft = pytest.importorskip("peft")
    with torch.random.fork_rng(), warnings.catch_warnings():
        # PEFT says that it ignores such a key, and then looks the layer's whole name up among them.
        warnings.filterwarnings("ignore", r"The following alpha_pattern keys.*\['w\[1\]'\]")
        model = peft.PeftModel.from_pretrained(model_of(folder), folder).eval()
    for name, layer in read(folder / "golden.json")["layers"].items():
        adapted = model.base_model.model.get_submodule(name)
        assert hasattr(adapted, "lora_A") == (layer["rank"] > 0), name
        if layer["rank"]:
            assert adapted.r == {"default": layer["rank"]}
            assert adapted.scaling["default"] == pytest.approx(layer["scaling"])
    assert_golden(folder, model.base_model.model)
    assert_golden(folder, model.merge_and_unload())


@pytest.mark.parametrize("folder", ADAPTER_FOLDERS, ids=lambda folder: folder.name)
def test_import_peft_gives_the_golden_outputs(folder):
    model = model_of(folder)
    import_peft(model, folder)
    assert_golden(folder, model.eval())


def adapter_results(loader):
    return {case.name: loader(case.arguments().positional[0]) for case in adapter_cases()}


def judged(results, tmp_path):
    write_results(tmp_path, "adapters", as_json(results))
    (report,) = check_results(tmp_path)
    return report


def test_right_outputs_pass(tmp_path):
    report = judged(adapter_results(load_and_run), tmp_path)
    assert not report.failed
    assert [result.case for result in report] == list(RECIPES)


@pytest.mark.parametrize("sentence", ADAPTERS.wrong_twins)
def test_a_wrong_loader_fails_and_is_told_why(sentence, tmp_path):
    results = {}
    for case in adapter_cases():
        try:
            results[case.name] = ADAPTERS.wrong_twins[sentence](case.arguments().positional[0])
        except RuntimeError as error:  # shapes that do not fit
            results[case.name] = {"$skipped": str(error)}
    report = judged(results, tmp_path)
    assert report.failed
    assert any(f"equals {sentence}" in result.hint for result in report.failed), str(report)


def test_portable_adapters_pass_without_patterns(tmp_path):
    portable = next(case for case in adapter_cases() if case.name == "portable")
    no_patterns = ADAPTERS.wrong_twins["the output without any scaling"]
    assert portable.run(no_patterns).status == "passed"


def test_an_adapter_for_every_trap():
    """Each wrong loader fails on an adapter that the others' traps do not cover."""
    failed = {}
    for sentence, twin in ADAPTERS.wrong_twins.items():
        failed[sentence] = {c.name for c in adapter_cases() if c.run(twin).status == "failed"}
    assert failed["the output without use_rslora"] == {"rslora"}
    assert failed["the output with ΔW not transposed"] == {"transposed", "transposed-square"}
    assert failed["the output without alpha_pattern"] >= {"alphas-by-layer", "ranks-and-alphas"}
    assert "common-suffixes" in failed["the output with the patterns read as parts of names"]
    assert failed["the output without any adapter"] == set(RECIPES)
