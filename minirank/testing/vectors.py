"""Golden vectors: cases and adapters as files for other languages, and judging what comes back.

    FOLDER/index.json           what there is, and which cases are left out, and why
    FOLDER/schema.json          what each JSON file holds
    FOLDER/functions/           NAME.json and NAME.safetensors: arguments, results, allowed errors
    FOLDER/adapters/NAME/       a PEFT adapter, its model, inputs and the outputs of every layer

`write_vectors(folder)` writes them from the contracts: every case whose arguments are plain data.
`check_results(folder)` reads results, one NAME.json for each function, and judges them by the same
contracts. The page tests/vectors/README.md tells how to use both.
"""

from __future__ import annotations

import inspect
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checks import quoted_names
from ..files.peft_folder import CONFIG_FILE, TENSORS_FILE
from ..files.safetensors_file import read_safetensors, safetensors_bytes
from .adapters import ADAPTERS, Adapter, details
from .case import Contract, Implementation, call, cast
from .contracts import all_contracts
from .kit import Case, WithBackward, cases_of
from .plain_data import NotPlainData, Tensors, decoded, encoded, shaped_like, with_allowed
from .report import Report, Result
from .tabulated import MLP, TABULATED, tabulated
from .vectors_schema import SCHEMA

FORMAT = 1
# Bytes of a case's arguments. A larger case is left out.
LARGEST_TEXT = 4_000
LARGEST_CASE = 4_000
LARGEST_TABLE = 1_500
NOT_FOR_OTHERS = {
    "round_trip": "it is about a file that one library writes and reads",
    "Layer": "it is an object with a state; its numbers are in lora_forward and merged_weight",
    "hessian_diagonal": "it is about models; see curvature_of_mlp",
    "hutchinson": "its numbers are random; for given signs see curvature_of_mlp",
    "coalition_masks": "its masks are random",
}
RANDOM = {"resize"}
COMPACT: dict[str, Any] = {
    "ensure_ascii": False,
    "allow_nan": False,
    "separators": (",", ":"),
}

# What an outcome may differ in, beside rounding, and be right. `check` knows it.
FREE = {
    "sensitivity_theta": "one positive factor common to all results",
    "ranks_from_shares": "a tie of remainders that rounding breaks; with costs, who gets the last "
    "ranks, where Σ rank · cost ≤ budget, no further rank fits, and nobody is below "
    "⌊clip(t · score, lower, upper)⌋",
    "resize": "the order of the ranks, the same in all tensors; the entries of new rows of A. "
    "The ranks that stay come back bit for bit",
    "peft_export": "any tensors and configuration that PEFT reads as the same function",
}


# ---- a case as plain data -----------------------------------------------------------------------


@dataclass
class Call:
    """One call of an implementation: what it was given, and what came."""

    kind: str  # "value" or "gradients"
    arguments: dict[str, Any]
    result: Any


@dataclass(frozen=True)
class Vector:
    """A case as calls with plain data: in float64, and in the dtype of the case."""

    case: Case
    exact: list[Call]
    rounded: list[Call]

    @property
    def names(self) -> list[str]:
        """Of the calls: the case's own name, or "two calls, float64 (1 of 2)"."""
        name, count = self.case.name, len(self.rounded)
        return [f"{name} ({i + 1} of {count})" for i in range(count)] if count > 1 else [name]


def vector(case: Case) -> Vector:
    """The calls that a case makes.

    Raises NotPlainData if an argument or a result is nothing that files can hold.
    """
    exact = recorded(case, torch.float64)
    rounded = exact if case.dtype == torch.float64 else recorded(case, case.dtype)
    for each in rounded:
        encoded(each.result, "result", Tensors())
    return Vector(case, exact, rounded)


def recorded(case: Case, dtype: torch.dtype) -> list[Call]:
    """The calls of the reference, with arguments in the case's dtype and then in `dtype`."""
    reference = case.contract.reference
    parameters = inspect.signature(reference)
    calls: list[Call] = []

    def record(kind: str, arguments: dict[str, Any], result: Any) -> Any:
        kept = result if isinstance(result, Looked) else detached(result)
        calls.append(Call(kind, detached(arguments), kept))
        return result

    def forward(*args: Any, **options: Any) -> Any:
        named = dict(parameters.bind(*args, **options).arguments)
        encoded(named, "arguments", Tensors())  # before the reference runs, for whatever time
        return record("value", named, reference(*args, **options))

    def backward(*args: Any) -> Any:
        named = dict(parameters.bind(*args[:-1]).arguments)
        result = Looked(reference_gradients(reference, named, args[-1]))
        return record("gradients", {**named, "gradient of the result": args[-1]}, result)

    differentiates = case.spec.needs_gradients
    recorder: Implementation = WithBackward(forward, backward) if differentiates else forward
    torch.manual_seed(0)  # for a reference that draws random numbers
    arguments = cast(cast(case.spec.arguments(), case.dtype, "cpu"), dtype, "cpu")
    case.spec.observe(recorder, arguments)
    if not calls:
        raise NotPlainData("the case makes no call")
    if len(calls) > 1 and case.contract.name in RANDOM:
        raise NotPlainData("calls that are compared with each other, and draw random numbers")
    for each in calls:
        if isinstance(each.result, Looked):  # of the gradients, those that the contract is about
            each.result = {name: each.result[name] for name in sorted(each.result.names)}
    return calls


class Looked(dict[str, Any]):
    """A dictionary that remembers which of its entries were looked at."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        super().__init__(content)
        self.names: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.names.add(name)
        return super().__getitem__(name)


def reference_gradients(
    reference: Implementation, arguments: Mapping[str, Any], cotangent: Tensor
) -> dict[str, Tensor]:
    """{argument: the gradient of Σ cotangent · result} for every tensor of floating point."""
    leaves = {
        name: value.detach().clone().requires_grad_()
        for name, value in arguments.items()
        if isinstance(value, Tensor) and value.is_floating_point()
    }
    result = reference(**{**arguments, **leaves})
    found = torch.autograd.grad(result, list(leaves.values()), cotangent, materialize_grads=True)
    return dict(zip(leaves, found, strict=True))


def detached(value: Any) -> Any:
    """A copy that later changes in place do not reach."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping):
        return {key: detached(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return type(value)(map(detached, value))
    return value


# ---- which contracts, which cases ---------------------------------------------------------------


def plain_contracts() -> Iterator[Contract]:
    """Every contract, in a form whose arguments may be plain data."""
    for contract in all_contracts():
        yield tabulated(contract) or contract
    yield MLP


def vectors(contract: Contract) -> tuple[list[Vector], dict[str, str]]:
    """(the cases as plain data, {case that is left out: why})."""
    if reason := NOT_FOR_OTHERS.get(contract.name):
        return [], {"*": reason}
    kept: list[Vector] = []
    left_out: dict[str, str] = {}
    known: dict[str, str] = {}
    is_table = any(contract.reference is table.function for table in TABULATED.values())
    largest = LARGEST_TABLE if is_table else LARGEST_CASE
    for case in cases_of(contract):
        try:
            found = vector(case)
        except NotPlainData as reason:
            left_out[case.name] = str(reason)
            continue
        tensors = Tensors()
        content = [
            [each.kind, encoded(each.arguments, "arguments", tensors)] for each in found.rounded
        ]
        size = sum(tensor.nbytes for tensor in tensors.by_name.values())
        text = json.dumps(content)
        text += str(safetensors_bytes(tensors.by_name, {}))
        if text in known:
            left_out[case.name] = f"the same numbers as in {known[text]!r}"
        elif size > largest:
            left_out[case.name] = f"more than {largest:,} bytes of tensors"
        elif len(json.dumps(content)) > LARGEST_TEXT:
            left_out[case.name] = f"more than {LARGEST_TEXT:,} bytes of JSON"
        else:
            known[text] = case.name
            kept.append(found)
    return kept, left_out


def adapter_cases() -> list[Case]:
    """The adapters, under the names of their folders, in float32."""
    return [replace(case, name=case.spec.name) for case in cases_of(ADAPTERS, torch.float32)]


# ---- writing ------------------------------------------------------------------------------------


def write_vectors(folder: Path) -> dict[str, int]:
    """Write all vectors and adapters. Returns {function: number of calls}.

    Other files in the folder are left alone.
    """
    counts: dict[str, int] = {}
    left_out: dict[str, dict[str, list[str]]] = {}
    (folder / "functions").mkdir(parents=True, exist_ok=True)
    for contract in plain_contracts():
        found, reasons = vectors(contract)
        for name, reason in reasons.items():
            left_out.setdefault(contract.name, {}).setdefault(reason, []).append(name)
        if found:
            counts[contract.name] = write_function(folder / "functions", contract, found)
    for case in adapter_cases():
        write_adapter(folder / "adapters" / case.name, case)
    index = {
        "format": FORMAT,
        "functions": counts,
        "adapters": [case.name for case in adapter_cases()],
        "left_out": left_out,
    }
    write_json(folder / "index.json", json.dumps(index, indent=1, ensure_ascii=False))
    write_json(folder / "schema.json", json.dumps(SCHEMA, indent=1, ensure_ascii=False))
    return counts


def write_function(folder: Path, contract: Contract, found: Iterable[Vector]) -> int:
    """NAME.json, one line for each call, and NAME.safetensors. Returns the number of calls."""
    tensors = Tensors()
    lines: list[str] = []
    for each in found:
        for name, exact, rounded in zip(each.names, each.exact, each.rounded, strict=True):
            arguments = {
                argument: encoded(value, argument, tensors)
                for argument, value in rounded.arguments.items()
            }
            result = with_allowed(
                exact.result, rounded.result, each.case.spec.terms, each.case.dtype
            )
            dtype = str(each.case.dtype).removeprefix("torch.")
            content = {
                "name": name,
                "equation": each.case.equation,
                "dtype": dtype if each.case.spec.floating else None,
                "wanted": rounded.kind,
                "arguments": arguments,
                "result": encoded(result, "result", tensors),
            }
            lines.append(json.dumps(content, **COMPACT))
    head = {
        "format": FORMAT,
        "function": contract.name,
        "source": contract.source,
        "signature": signature(contract.reference),
        "about": inspect.getdoc(contract.reference) or "",
        "free": FREE.get(contract.name),
        "tensors": f"{contract.name}.safetensors",
    }
    text = json.dumps(head, indent=1, ensure_ascii=False).removesuffix("\n}")
    text += ',\n "cases": [\n' + ",\n".join(lines) + "\n ]\n}"
    write_json(folder / f"{contract.name}.json", text)
    (folder / f"{contract.name}.safetensors").write_bytes(safetensors_bytes(tensors.by_name, {}))
    return len(lines)


def signature(function: Implementation) -> str:
    """The arguments of a function without their types, as in "(x, W, b, gate=None)"."""
    parameters = inspect.signature(function).parameters.values()
    empty = inspect.Parameter.empty
    plain = [parameter.replace(annotation=empty) for parameter in parameters]
    return str(inspect.Signature(plain))


def write_adapter(folder: Path, case: Case) -> None:
    """The adapter as PEFT reads it, the model's layers, inputs and outputs."""
    folder.mkdir(parents=True, exist_ok=True)
    adapter: Adapter = case.arguments().positional[0]
    exact = case.contract.reference(cast(case.arguments(), torch.float64, "cpu").positional[0])
    right = with_allowed(exact, case.contract.reference(adapter), case.spec.terms, case.dtype)
    model: dict[str, Tensor] = {}
    golden: dict[str, Tensor] = {}
    layers = {}
    for name, layer in adapter.layers.items():
        model[f"{name}.weight"] = layer.weight
        if layer.bias is not None:
            model[f"{name}.bias"] = layer.bias
        golden[f"{name}.input"] = layer.x
        golden[f"{name}.output"] = right[name].value
        layers[name] = {
            "type": layer.kind,
            **details(adapter, name),
            "allowed": right[name].allowed,
        }
    about = {
        "format": FORMAT,
        "adapter": case.name,
        "source": case.contract.source,
        "equation": case.equation,
        "layers": layers,
    }
    config = json.dumps(adapter.config, indent=2, ensure_ascii=False)
    write_json(folder / "golden.json", json.dumps(about, indent=1, ensure_ascii=False))
    write_json(folder / CONFIG_FILE, config)
    (folder / TENSORS_FILE).write_bytes(safetensors_bytes(adapter.tensors, {"format": "pt"}))
    (folder / "model.safetensors").write_bytes(safetensors_bytes(model, {"format": "pt"}))
    (folder / "golden.safetensors").write_bytes(safetensors_bytes(golden, {}))


def write_json(path: Path, text: str) -> None:
    path.write_text(text + "\n", encoding="utf-8", newline="\n")


# ---- judging what came back ---------------------------------------------------------------------


def check_results(folder: Path) -> list[Report]:
    """A report for each file of results in the folder.

    A file is called after a function of the vectors, or "adapters.json":

        {"results": {"rank 1, float64": [[0.3, 1.2]], "no bias, float64": {"$skipped": "why"}}}

    A case without a result fails. A result is what the vectors' "result" is; a tensor may be a list
    of numbers, or {"$tensor": key} in a safetensors file of the same name.

    Raises:
        ValueError: there is no file of results, or one that no function is called after, or that
            does not hold what is said above.
    """
    contracts = {contract.name: contract for contract in plain_contracts()}
    files = sorted(folder.glob("*.json"))
    if not files:
        raise ValueError(
            f"{str(folder)!r} holds no results: expected NAME.json for at least one of "
            f"{quoted_names([*contracts, ADAPTERS.name], 99)}"
        )
    reports = []
    for path in files:
        if path.stem == ADAPTERS.name:
            found = [adapter_vector(case) for case in adapter_cases()]
            reports.append(report(ADAPTERS, found, path))
        elif path.stem in contracts:
            contract = contracts[path.stem]
            reports.append(report(contract, vectors(contract)[0], path))
        else:
            raise ValueError(
                f"{str(path)!r} is called after no function: expected one of "
                f"{quoted_names([*contracts, ADAPTERS.name], 99)}"
            )
    return reports


def adapter_vector(case: Case) -> Vector:
    """The adapter's outputs in float64 and float32."""
    arguments = case.arguments()
    wide = cast(arguments, torch.float64, "cpu")
    exact, rounded = (call(case.contract.reference, each) for each in (wide, arguments))
    return Vector(case, [Call("value", {}, exact)], [Call("value", {}, rounded)])


def report(contract: Contract, found: list[Vector], path: Path) -> Report:
    """Judge the results in one file."""
    results, tensors = read_results(path)
    names = [name for each in found for name in each.names]
    strangers = [name for name in results if name not in names]
    if strangers:
        raise ValueError(
            f"{str(path)!r} has results for {quoted_names(strangers)}: expected names of cases, "
            f"which are {quoted_names(names, 99)}"
        )
    judged = [judge(each, results, tensors, path.name) for each in found]
    return Report(contract.name, contract.source, tuple(judged))


def read_results(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """({case: result as JSON}, the tensors beside it)."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is not JSON: {error}") from error
    results = content.get("results") if isinstance(content, dict) else None
    if not isinstance(results, dict):
        raise ValueError(
            f'{str(path)!r} has no results: expected {{"results": {{name of a case: result}}}}'
        )
    tensors = path.with_suffix(".safetensors")
    return results, read_safetensors(tensors)[0] if tensors.exists() else {}


def judge(
    each: Vector, results: Mapping[str, Any], tensors: Mapping[str, Tensor], file: str
) -> Result:
    """Judge one result by the case's own comparison, as if it were called just now."""
    case = each.case
    again = f"case {case.name!r} of {file}"
    returned = []
    for name, call_made in zip(each.names, each.rounded, strict=True):
        given = results.get(name, ABSENT)
        if given is ABSENT:
            return absent(case, name, again)
        if isinstance(given, dict) and "$skipped" in given:
            return Result(case.name, case.equation, "skipped", hint=str(given["$skipped"]))
        returned.append(shaped_like(call_made.result, decoded(given, tensors)))
    turn = itertools.cycle(returned)  # a case makes the same calls each time

    def replay(*args: Any, **options: Any) -> Any:
        return next(turn)

    once = replace(case, spec=replace(case.spec, repeatable=False))
    return replace(once.run(WithBackward(replay, replay)), reproduce=again)


ABSENT = object()


def absent(case: Case, name: str, again: str) -> Result:
    """A failure, since a port that stopped half-way must not pass."""
    return Result(
        case.name,
        case.equation,
        status="failed",
        entry=name,
        expected="a result",
        got="nothing",
        error=float("inf"),
        hint='{"$skipped": why} in its place says that there is none on purpose',
        reproduce=again,
    )
