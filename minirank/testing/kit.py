"""check(mine, like=reference.f): does an implementation keep to its contract, and if not, why?"""

from __future__ import annotations

import fnmatch
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..checks import quoted_names
from ..layers.hints import did_you_mean
from .case import Arguments, CaseSpec, Contract, Implementation, cast, fitting_twins, mapped
from .comparison import Bits, Difference, differences, kept
from .contracts import all_contracts
from .model_state import unchanged
from .report import ConformanceError, Report, Result

Convert = tuple[Callable[[Tensor], Any], Callable[[Any], Any]]
Reasons = Mapping[str, str]  # {name or glob of a case: why}

EXPLAINED = 12  # failures of one check that are held against wrong twins


@dataclass(frozen=True)
class Case:
    """One case of a contract in one dtype, to be run by any test framework.

    `run(mine)` gives a Result. `arguments()` makes fresh arguments, for an implementation that
    runs elsewhere.
    """

    name: str
    equation: str
    contract: Contract
    spec: CaseSpec
    dtype: torch.dtype
    device: torch.device | str = "cpu"
    tolerance: float | None = None
    convert: Convert | None = None

    def arguments(self) -> Arguments:
        """Fresh arguments in this case's dtype, on its device."""
        return cast(self.spec.arguments(), self.dtype, self.device)

    def run(self, mine: Implementation, explain: bool = True) -> Result:
        """Call `mine` and compare. A fault gives a failed Result, not an exception.

        With `explain`, a wrong result is held against those of wrong twins, which takes time.
        """
        implementation = mine if self.convert is None else converted(mine, self.convert)
        try:
            found = self._differences(implementation)
        except CannotConvert as refusal:
            return Result(self.name, self.equation, "skipped", hint=str(refusal))
        except BrokenRule as broken:
            return self._failed("a call without side effects", str(broken), "")
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            where = f"raised in {place.name}, line {place.lineno} of {place.filename}"
            return self._failed("an outcome", f"{type(error).__name__}: {error}", where)
        wrong = [difference for difference in found if difference.wrong]
        if wrong:
            worst = max(wrong, key=_severity)
            twins = self._twins(implementation) if explain else ()
            many = f"{len(wrong)} entries are wrong" if len(wrong) > 1 else ""
            reasons = [f"equals {twins[0]}" if twins else "", worst.note, many]
            hint = "; ".join(reason for reason in reasons if reason)
            return replace(self._result(worst), status="failed", hint=hint, twins=twins)
        worst = max(found, key=_severity, default=Difference("", "", "", 0.0, 0.0))
        notes = sorted({difference.note for difference in found if difference.note})
        status: Literal["noted", "passed"] = "noted" if notes else "passed"
        return replace(self._result(worst), status=status, hint="; ".join(notes))

    # ---- one case -------------------------------------------------------------------------------

    def _differences(self, implementation: Implementation) -> list[Difference]:
        """Every leaf of what came, also of a second equal call. Raises BrokenRule."""
        first = self._observed(implementation)
        if self.spec.judges_itself:
            exact = rounded = kept(first)
        else:
            exact, rounded = self._right_outcomes()
        found = self._judged(exact, rounded, first)
        if self.spec.repeatable and not any(difference.wrong for difference in found):
            before = mapped(first, torch.clone)
            self._disturb(implementation)
            if any(d.wrong for d in _same(before, first)):
                raise BrokenRule("a later call changed what an earlier call had returned")
            again = self._judged(exact, rounded, self._observed(implementation))
            if any(difference.wrong for difference in again):
                raise BrokenRule("a second call with equal arguments gave another outcome")
        return found

    def _observed(self, implementation: Implementation) -> Any:
        """What comes, with a check that the arguments are left unchanged."""
        arguments = self.arguments()
        tensors = _tensors(arguments)
        before = [tensor.detach().clone() for tensor in tensors]
        flags = [tensor.requires_grad for tensor in tensors]
        plain = mapped(arguments, lambda x: None)  # containers and numbers, copied
        with ModelsUnchanged(arguments):
            outcome = self.spec.observe(implementation, arguments)
        for tensor, old in zip(tensors, before, strict=True):
            if any(difference.wrong for difference in _same(Bits(old), Bits(tensor.detach()))):
                raise BrokenRule(f"an argument of shape {tuple(old.shape)} was changed in place")
        if [tensor.requires_grad for tensor in tensors] != flags:
            raise BrokenRule("the requires_grad of an argument was changed")
        if mapped(arguments, lambda x: None) != plain:
            raise BrokenRule("an argument was changed in place: a list or a mapping")
        return outcome

    def _disturb(self, implementation: Implementation) -> None:
        """A call with other numbers, whose outcome does not matter."""

        def other(value: Any) -> Any:
            plain = isinstance(value, Tensor) and value.is_floating_point()
            return value.detach().mul(0.5) if plain else value

        arguments = self.arguments()
        others = Arguments(mapped(arguments.positional, other), arguments.options)
        try:
            self.spec.observe(implementation, others)
        except Exception:  # these numbers may lie outside the contract
            return

    def _judged(self, exact: Any, rounded: Any, outcome: Any) -> list[Difference]:
        terms, tolerance = self.spec.terms, self.tolerance
        dtype = self.dtype if self.spec.floating else torch.float64
        found = differences(exact, rounded, outcome, dtype=dtype, terms=terms, tolerance=tolerance)
        return list(found)

    def _right_outcomes(self, twin: Implementation | None = None) -> tuple[Any, Any]:
        """The reference's, or a twin's: (in float64, in the case's dtype), of equal arguments.

        They are computed once, since a case has always the same arguments.
        """
        reference = self.contract.reference if twin is None else twin
        key = (self.spec, reference, self.dtype)
        if key not in _RIGHT_OUTCOMES:
            _RIGHT_OUTCOMES[key] = self._computed_outcomes(reference)
        return _RIGHT_OUTCOMES[key]

    def _computed_outcomes(self, reference: Implementation) -> tuple[Any, Any]:
        arguments = cast(self.spec.arguments(), self.dtype, "cpu")
        exact = self.spec.observe(reference, cast(arguments, torch.float64, "cpu"))
        if self.dtype == torch.float64:
            return exact, exact
        return exact, self.spec.observe(reference, cast(arguments, self.dtype, "cpu"))

    def _twins(self, implementation: Implementation) -> tuple[str, ...]:
        """Whose numbers came out: the sentences of all wrong twins with this outcome."""
        try:
            outcome = self.spec.observe(implementation, self.arguments())
        except Exception:
            return ()

        def fits(twin: Implementation) -> bool:
            exact, rounded = self._right_outcomes(twin)
            return not any(d.wrong for d in self._judged(exact, rounded, outcome))

        return fitting_twins(self.contract.wrong_twins, fits)

    def _failed(self, expected: str, got: str, hint: str) -> Result:
        result = self._result(Difference("result", expected, got, float("inf"), 0.0))
        return replace(result, status="failed", hint=hint)

    def _result(self, worst: Difference) -> Result:
        folder = "testing" if ".testing." in self.contract.reference.__module__ else "reference"
        options = [f", {self.name!r}"]
        if self.dtype not in (torch.float64, torch.float32):
            options.append(f", dtype={self.dtype}")
        if str(self.device) != "cpu":
            options.append(f", device={str(self.device)!r}")
        if self.tolerance is not None:
            options.append(f", tolerance={self.tolerance}")
        if self.convert is not None:
            options.append(", convert=convert")
        call = f"testing.cases({folder}.{self.contract.name}{''.join(options)})[0].run(mine)"
        return Result(
            case=self.name,
            equation=self.spec.equation,
            status="passed",
            entry=worst.entry,
            expected=worst.expected,
            got=worst.got,
            error=worst.error,
            allowed=worst.allowed,
            reproduce=call,
        )


_RIGHT_OUTCOMES: dict[tuple[CaseSpec, Implementation, torch.dtype], tuple[Any, Any]] = {}


class BrokenRule(Exception):
    """A rule beside the numbers is broken; the text says which."""


class CannotConvert(Exception):
    """The other framework has no such dtype."""


def cases(
    like: Implementation,
    only: str = "*",
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    tolerance: float | None = None,
    convert: Convert | None = None,
    gradients: bool = True,
) -> list[Case]:
    """The cases of the contract of `like`, smallest first, for any test framework.

    Args:
        like: a function of `minirank.reference`, or `testing.round_trip`.
        only: a name or glob of cases.
        dtype, device, tolerance, convert, gradients: as in `check`.

    Raises:
        ValueError: `like` has no contract.

    >>> from minirank import reference, testing
    >>> case = testing.cases(reference.l1ra_shrink)[0]
    >>> case.run(reference.l1ra_shrink).status
    'passed'
    """
    return [
        replace(case, device=device, tolerance=tolerance, convert=convert)
        for case in cases_of(contract_of(like), dtype)
        if _matches(case.name, only) and (gradients or not case.spec.needs_gradients)
    ]


def cases_of(contract: Contract, dtype: torch.dtype | None = None) -> list[Case]:
    """All cases of a contract, for one dtype, or for float64 and float32."""
    found = []
    for spec in contract.specs:
        dtypes = [dtype] if dtype is not None else [torch.float64, torch.float32]
        for each in dtypes if spec.floating else dtypes[:1]:
            suffix = f", {str(each).removeprefix('torch.')}" if spec.floating else ""
            found.append(Case(f"{spec.name}{suffix}", spec.equation, contract, spec, each))
    return found


def check(
    mine: Implementation,
    like: Implementation,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    tolerance: float | None = None,
    convert: Convert | None = None,
    gradients: bool = True,
    backward: Implementation | None = None,
    skip: Reasons = {},  # noqa: B006  # read only
    expected_failures: Reasons = {},  # noqa: B006
    on_fail: Literal["raise", "warn"] | None = "raise",
) -> Report:
    """Hold an implementation against its reference, on cases that the kit makes.

    Args:
        mine: a function (or class) with the signature of `like`.
        like: a function of `minirank.reference`, or `testing.round_trip`.
        dtype: of the floating-point arguments. None: float64, and float32.
        device: of all tensors that `mine` gets. The right outcome is computed on the CPU.
        tolerance: the largest error, relative to the largest entry. None: it follows from the dtype
            and the number of terms that are summed, or is twice what the reference itself loses.
        convert: (from a tensor to your array, and back), for another framework:
            (jnp.asarray, np.asarray). With it, give `backward`, or gradients=False.
        gradients: differentiate `mine`, where the contract is about gradients.
        backward: your gradients, for an implementation without autograd: called with the arguments
            of the forward call and the gradient of the outcome, it returns {argument: gradient}.
            For lora_forward: backward(x, W, b, A, B, scaling, gate, grad_y), where b and gate may
            be None, returns "x", "A" and "B", and "gate" if there is one.
        skip: {name or glob of a case: why it is not run}. A name ends with its dtype: "gate*"
            covers "gate, float64" and "gate, float32".
        expected_failures: {name or glob of a case: why it fails}. One that passes is an error.
        on_fail: "raise" a ConformanceError, "warn", or None: only return the report.

    Returns: a Report, the results of all cases.

    Raises:
        ConformanceError: after all cases have run, if some failed. Its text is the report.
        ValueError: `like` has no contract; a name in `skip` or `expected_failures` matches no case.

    >>> from minirank import reference, testing
    >>> def mine(gates, amount):
    ...     return [(gate - amount).clamp(min=0) for gate in gates]  # forgets the upper bound
    >>> report = testing.check(mine, like=reference.l1ra_shrink, on_fail=None)
    >>> len(report.failed) > 0
    True
    """
    differentiates = any(spec.needs_gradients for spec in contract_of(like).specs)
    if convert is not None and gradients and backward is None and differentiates:
        raise ValueError(
            "expected backward= or gradients=False together with convert=: converted arrays "
            "cannot be differentiated here"
        )
    if backward is not None:
        mine = WithBackward(mine, backward)
    options: dict[str, Any] = {"dtype": dtype, "device": device}
    options |= {"tolerance": tolerance, "convert": convert}
    found = cases(like, gradients=gradients, **options)
    names = [case.name for case in found]
    _require_matches(names, skip, "skip")
    _require_matches(names, expected_failures, "expected_failures")
    results: list[Result] = []
    for case in found:
        explain = sum(result.status == "failed" for result in results) < EXPLAINED
        results.append(_judged(case, mine, skip, expected_failures, explain))
    contract = contract_of(like)
    report = Report(contract.name, contract.source, tuple(_agreeing(results)))
    if report.failed and on_fail == "raise":
        raise ConformanceError(report)
    if report.failed and on_fail == "warn":
        warnings.warn(str(report), stacklevel=2)
    return report


def parametrize(
    mine: Implementation,
    like: Implementation,
    *,
    skip: Reasons = {},  # noqa: B006  # read only
    expected_failures: Reasons = {},  # noqa: B006
    **options: Any,
) -> Any:
    """A pytest decorator: one test for each case, which gets it as `check`.

    Args:
        mine, like, skip, expected_failures: as in `check`.
        options: dtype, device, tolerance, convert, gradients, as in `check`.

    Raises:
        ImportError: pytest is not installed. ValueError: as `check`.

        @testing.parametrize(my_shrink, like=reference.l1ra_shrink)
        def test_mine(check):
            check()
    """
    import pytest

    found = cases(like, **options)
    names = [case.name for case in found]
    _require_matches(names, skip, "skip")
    _require_matches(names, expected_failures, "expected_failures")
    parameters = []
    for case in found:
        marks = []
        if reason := _reason(case.name, skip):
            marks.append(pytest.mark.skip(reason=reason))
        if reason := _reason(case.name, expected_failures):
            marks.append(pytest.mark.xfail(strict=True, reason=reason, raises=ConformanceError))
        parameters.append(pytest.param(Check(case, mine), id=case.name, marks=marks))
    return pytest.mark.parametrize("check", parameters)


@dataclass(frozen=True, repr=False)
class Check:
    """Runs one case when it is called. Raises ConformanceError if it fails."""

    case: Case
    mine: Implementation

    def __repr__(self) -> str:
        return f"<check of {self.case.name!r}>"

    def __call__(self) -> Result:
        result = self.case.run(self.mine)
        if result.status == "failed":
            contract = self.case.contract
            raise ConformanceError(Report(contract.name, contract.source, (result,)))
        return result


@dataclass(frozen=True)
class WithBackward:
    """An implementation with gradients of its own, for contracts about gradients."""

    forward: Implementation
    backward: Implementation

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self.forward(*args, **options)


def contract_of(like: Implementation) -> Contract:
    """The contract whose reference is `like`. Raises ValueError if there is none."""
    for contract in all_contracts():
        if contract.reference is like:
            return contract
    raise ValueError(
        f"{getattr(like, '__name__', like)!r} has no contract: expected like=reference.NAME, with "
        f"one of {quoted_names([contract.name for contract in all_contracts()], 99)}"
    )


def converted(mine: Implementation, convert: Convert) -> Implementation:
    """`mine` behind conversions of its tensors, and of what it returns."""
    if isinstance(mine, WithBackward):
        return WithBackward(converted(mine.forward, convert), converted(mine.backward, convert))
    to_mine, from_mine = convert

    def to_array(value: Tensor | nn.Module) -> Any:
        if isinstance(value, nn.Module):
            return value
        try:
            return to_mine(value.detach())
        except TypeError as error:
            if value.dtype in (torch.bfloat16, torch.float16):  # NumPy has no bfloat16
                raise CannotConvert(f"`convert` does not take {value.dtype}: {error}") from error
            raise

    def of_array(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: of_array(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(of_array(item) for item in value)
        if isinstance(value, (bool, int, float, str, type(None), Tensor)):
            return value
        if callable(value):  # an object with methods, such as a layer
            return ConvertedObject(value, convert)
        return tensor_of(from_mine(value))

    def call(*args: Any, **options: Any) -> Any:
        theirs = mapped(Arguments(args, options), to_array)
        return of_array(mine(*theirs.positional, **theirs.options))

    return call


def tensor_of(array: Any) -> Tensor:
    """A tensor that shares the memory of an array, where torch can: not of a reversed view."""
    flags, strides = getattr(array, "flags", None), getattr(array, "strides", ())
    writable = flags is None or getattr(flags, "writeable", True)
    return torch.as_tensor(array if writable and min(strides, default=0) >= 0 else array.copy())


@dataclass(frozen=True)
class ConvertedObject:
    """An object of another framework, with its methods and attributes behind conversions."""

    wrapped: Any
    convert: Convert

    def __call__(self, *args: Any, **options: Any) -> Any:
        return converted(self.wrapped, self.convert)(*args, **options)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.wrapped, name)
        if callable(value):
            return converted(value, self.convert)
        return converted(lambda: value, self.convert)()


def _agreeing(results: list[Result]) -> list[Result]:
    """The results, with the hint that fits most failures where several wrong twins fit one."""
    counts = Counter(sentence for result in results for sentence in result.twins)
    agreeing = []
    for result in results:
        if result.status == "failed" and result.twins:
            likeliest = max(result.twins, key=counts.__getitem__)
            hint = result.hint.replace(f"equals {result.twins[0]}", f"equals {likeliest}", 1)
            result = replace(result, hint=hint)
        agreeing.append(result)
    return agreeing


def _judged(
    case: Case, mine: Implementation, skip: Reasons, expected: Reasons, explain: bool
) -> Result:
    if reason := _reason(case.name, skip):
        return Result(case.name, case.equation, "skipped", hint=reason)
    result = case.run(mine, explain)
    reason = _reason(case.name, expected)
    if not reason:
        return result
    if result.status == "failed":
        return replace(result, status="xfailed", hint=reason)
    message = f"passes, although it is among expected_failures ({reason}): take it out"
    return replace(result, status="failed", entry="result", hint=message)


def _matches(name: str, pattern: str) -> bool:
    """Whether a case has this name, or one that the glob covers."""
    return name == pattern or fnmatch.fnmatchcase(name, pattern)


def _reason(name: str, reasons: Reasons) -> str:
    for pattern, reason in reasons.items():
        if _matches(name, pattern):
            return reason or "no reason given"
    return ""


def _require_matches(names: Iterable[str], reasons: Reasons, argument: str) -> None:
    if not isinstance(reasons, Mapping):
        raise TypeError(f"{argument} must be {{name or glob of a case: reason}}, got {reasons!r}")
    for pattern in reasons:
        if not any(_reason(name, {pattern: "x"}) for name in names):
            raise ValueError(
                f"{argument} names {pattern!r}, which matches none of the cases (a name ends with "
                f"its dtype; a glob such as '{pattern}*' leaves it out): "
                f"{did_you_mean(pattern, list(names))}"
            )


def _severity(difference: Difference) -> float:
    """Errors as shares of what is allowed."""
    if difference.wrong and not difference.allowed:
        return float("inf")
    return difference.error / difference.allowed if difference.allowed else 0.0


def _same(expected: Any, got: Any) -> list[Difference]:
    wide = torch.float64
    return list(differences(expected, expected, got, dtype=wide, terms=0.0, tolerance=0.0))


def _tensors(arguments: Arguments) -> list[Tensor]:
    found: list[Tensor] = []
    mapped(arguments, lambda x: found.append(x) if isinstance(x, Tensor) else None)
    return found


class ModelsUnchanged:
    """A block that must leave every module among the arguments as it was."""

    def __init__(self, arguments: Arguments) -> None:
        found: list[nn.Module] = []
        mapped(arguments, lambda x: found.append(x) if isinstance(x, nn.Module) else None)
        self.blocks = [unchanged(model) for model in found]

    def __enter__(self) -> None:
        for block in self.blocks:
            block.__enter__()

    def __exit__(self, *error: Any) -> None:
        for block in self.blocks:
            try:
                block.__exit__(*error)
            except AssertionError as change:
                raise BrokenRule(f"the model was changed: {change}") from change
