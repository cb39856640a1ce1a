"""Does an allocator follow the rules of score() and allocate(budget)?"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..allocators.allocation import Allocation, Unit
from ..allocators.allocator import Allocator
from ..allocators.constraints import Bound
from ..allocators.dominance import PATTERN as DOMINANT
from ..layers.targets import layer_shape, modules_and_stacks, rank_cost
from .model_state import unchanged
from .report import ConformanceError, Report, Result

SHARES = (0.0, 0.31, 0.77, 1.0)  # of the way from the smallest possible budget to the largest
UNITS: tuple[Unit, ...] = ("ranks", "parameters")

BEFORE, SCORES = "before score()", "scores"
SCORE_LEAVES, ALLOCATE_LEAVES = "score() leaves the model", "allocate() leaves the model"
SCORE_RULES = {  # {name: the rule}
    BEFORE: "allocate() before score() raises RuntimeError",
    SCORES: "score() = {linear layer: finite tensor of shape () or (r,)}",
    SCORE_LEAVES: "score() changes neither the model nor the global CPU generator",
}
UNIT_RULES: dict[Unit, dict[str, str]] = {
    "ranks": {"budget": "Σ r = budget"},
    "parameters": {
        "budget": "Σ r · (d_out + d_in) ≤ budget",
        "room": "no further rank fits into what is left of the budget",
    },
}
SHARED_RULES = {
    "outcome": "allocate(budget) returns an Allocation of all scored modules",
    "min_rank": "min_rank ≤ r",
    "max_rank": "r ≤ max_rank, and r ≤ min(d_out, d_in)",
    "masks": "a keep mask has one entry per present rank, and keeps r of them",
    "refusal": "a budget that cannot be met raises ValueError",
    "ties": "equal scores meet the same budgets and bounds",
}


def check_allocator(allocator: Allocator, *, units: Sequence[Unit] = UNITS) -> Report:
    """Check an allocator of your own against the rules that every method of this library follows.

    - allocate() before score() raises RuntimeError.
    - score() returns finite tensors of shape () or (r,) for linear layers.
    - allocate(budget) meets a budget of ranks exactly.
    - allocate(budget, unit="parameters") does not exceed the budget, and leaves no room for
      another rank.
    - Both keep to min_rank and max_rank, for all modules or by name.
    - Both do so for equal scores, too.
    - Masks, if there are any, fit the present ranks and the new ones.
    - score() and allocate() leave the model and the global CPU random generator unchanged.
    - A budget that cannot be met raises ValueError, in both units.

    Args:
        allocator: fresh, that is, before its first score(). Its model may be on any device.
        units: the units of its budgets. With ("ranks",) it is called without `unit`.

    Returns: a Report with one result for each rule. A rule that cannot be judged because an earlier
        one is broken is skipped.

    Raises:
        ConformanceError: after all rules have been tried, if some are broken. It is an
            AssertionError, and its text is the report.
        ValueError: `units` is empty or names another unit.

    >>> from torch import nn
    >>> from minirank import UniformRanks
    >>> from minirank.testing import check_allocator
    >>> report = check_allocator(UniformRanks(nn.Sequential(nn.Linear(5, 9), nn.Linear(9, 4))))
    >>> report.failed
    []
    """
    if not units or isinstance(units, str) or not set(units) <= set(UNITS):
        raise ValueError(f"expected units among {UNITS}, at least one, got {units!r}")
    findings = _Findings()
    _try_before_scores(allocator, findings)
    modules = _scored_modules(allocator, findings)
    if modules is not None:
        with (
            findings.about(ALLOCATE_LEAVES),
            _leaving(allocator, "allocate()"),
            warnings.catch_warnings(),
        ):
            warnings.filterwarnings("ignore", DOMINANT)  # no rule forbids a dominant module
            for unit in units:
                _try_allocations(allocator, modules, unit, units, findings)
    report = Report(
        "check_allocator", "the rules of score() and allocate(budget)", findings.results(units)
    )
    if report.failed:
        raise ConformanceError(report)
    return report


# ---- what is found ------------------------------------------------------------------------------


class _Broken(Exception):
    """A rule is broken: where, what it asks for, and what came."""

    def __init__(self, entry: str, expected: str, got: str) -> None:
        super().__init__(f"{entry}: expected {expected}, got {got}")
        self.entry, self.expected, self.got = entry, expected, got


class _Findings:
    """Which rules were judged, how each was broken at first, and why some were not judged."""

    def __init__(self) -> None:
        self.judged: set[str] = set()
        self.broken: dict[str, _Broken] = {}
        self.reasons: dict[str, str] = {}

    @contextmanager
    def about(self, rule: str) -> Iterator[None]:
        """A block that judges this rule, and raises _Broken where it is broken."""
        self.judged.add(rule)
        try:
            yield
        except _Broken as broken:
            self.broken.setdefault(rule, broken)

    def results(self, units: Sequence[Unit]) -> tuple[Result, ...]:
        """One result for each rule, in order."""
        rules = dict(SCORE_RULES)
        for unit in units:
            by_name = {**SHARED_RULES, **UNIT_RULES[unit]}
            rules |= {f"{name}, {unit}": rule for name, rule in by_name.items()}
        rules[ALLOCATE_LEAVES] = SCORE_RULES[SCORE_LEAVES].replace("score()", "allocate()")
        return tuple(self._result(name, rule) for name, rule in rules.items())

    def _result(self, name: str, rule: str) -> Result:
        if name in self.broken:
            broken = self.broken[name]
            return Result(name, rule, "failed", broken.entry, broken.expected, broken.got)
        if name in self.judged:
            return Result(name, rule, "passed")
        early = "the scores are not what they must be"
        reason = early if SCORES in self.broken else "no call of allocate() came to this rule"
        return Result(name, rule, "skipped", hint=self.reasons.get(name, reason))


@contextmanager
def _leaving(allocator: Allocator, call: str) -> Iterator[None]:
    """A block that must leave the model as it was."""
    block = unchanged(allocator.model)
    block.__enter__()
    yield
    try:
        block.__exit__(None, None, None)
    except AssertionError as change:
        raise _Broken(call, "the same state as before", str(change)) from change


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _without_error(call: str, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """What the function returns. _Broken if it raises."""
    try:
        return function(*args, **options)
    except Exception as error:  # user code, of any kind
        raise _Broken(call, "no exception", _named(error)) from error


def _require_error(
    call: str, wanted: type[Exception], function: Callable[..., Any], *args: Any, **options: Any
) -> None:
    """_Broken if the function does not raise `wanted`."""
    try:
        function(*args, **options)
    except wanted:
        return
    except Exception as error:  # user code, of any kind
        raise _Broken(call, wanted.__name__, _named(error)) from error
    raise _Broken(call, wanted.__name__, "no exception")


# ---- scores -------------------------------------------------------------------------------------


class _Module(NamedTuple):
    """What the rules need to know of a scored module."""

    cost: int  # trainable parameters of one rank: d_out + d_in
    limit: int  # the largest rank that it can get
    present: int | None  # how many present ranks were scored; None: it has one share


def _try_before_scores(allocator: Allocator, findings: _Findings) -> None:
    with findings.about(BEFORE):
        _require_error("allocate() before score()", RuntimeError, allocator.allocate, 1)


def _scored_modules(allocator: Allocator, findings: _Findings) -> dict[str, _Module] | None:
    """The scored modules. None if the scores are not what they must be."""
    scores: Any = None
    with findings.about(SCORE_LEAVES), _leaving(allocator, "score()"), findings.about(SCORES):
        scores = _without_error("score()", allocator.score)
    modules = None
    if SCORES not in findings.broken:
        with findings.about(SCORES):
            modules = _checked_modules(allocator, scores)
    return modules


def _checked_modules(allocator: Allocator, scores: Any) -> dict[str, _Module]:
    if not isinstance(scores, Mapping):
        raise _Broken("score()", "{module: score}", repr(scores))
    if not scores:
        raise _Broken("score()", "{module: score}", "no module")
    known = modules_and_stacks(allocator.model)
    modules = {}
    for name, score in scores.items():
        entry = f"score of {name!r}"
        shape = layer_shape(known[name]) if name in known else None
        if shape is None:
            raise _Broken("score()", "linear layers of the model", f"{name!r}, which is none")
        if not isinstance(score, Tensor):
            raise _Broken(entry, "a tensor", repr(score))
        if score.ndim > 1:
            raise _Broken(entry, "shape () or (r,)", str(tuple(score.shape)))
        if not torch.isfinite(score).all():
            raise _Broken(entry, "finite numbers", str(score.tolist()))
        present = len(score) if score.ndim else None
        limit = min(shape) if present is None or allocator.grows else present
        modules[name] = _Module(rank_cost(known[name]), limit, present)
    return modules


# ---- allocations --------------------------------------------------------------------------------


class _Rule(NamedTuple):
    """What an allocation must keep to."""

    modules: Mapping[str, _Module]
    unit: Unit
    lower: Mapping[str, int]
    upper: Mapping[str, int]
    grows: bool
    names_unit: bool  # whether allocate() is told the unit

    def spent(self, ranks: Mapping[str, int]) -> int:
        """What these ranks take from the budget."""
        if self.unit == "ranks":
            return sum(ranks.values())
        return sum(rank * self.modules[name].cost for name, rank in ranks.items())

    @property
    def smallest(self) -> int:
        """The smallest possible budget."""
        return self.spent(self.lower)

    @property
    def largest(self) -> int:
        """The largest possible budget."""
        return self.spent(self.upper)

    @property
    def options(self) -> dict[str, Any]:
        """The options of allocate()."""
        return {
            **({"unit": self.unit} if self.names_unit else {}),
            "min_rank": _as_bound(self.lower),
            "max_rank": _as_bound(self.upper),
        }

    def call(self, budget: int) -> str:
        """The call of allocate(), as text."""
        options = ", ".join(f"{key}={value!r}" for key, value in self.options.items())
        return f"allocate({budget}, {options})"


def _as_bound(by_name: Mapping[str, int]) -> Bound:
    """The bound for min_rank or max_rank: one number if it is the same for all modules."""
    different = set(by_name.values())
    return different.pop() if len(different) == 1 else by_name


def _try_allocations(
    allocator: Allocator,
    modules: Mapping[str, _Module],
    unit: Unit,
    units: Sequence[Unit],
    findings: _Findings,
) -> None:
    """Every rule of one unit, for many budgets and bounds; then again with equal scores."""
    rules = [
        _Rule(modules, unit, lower, upper, allocator.grows, tuple(units) != ("ranks",))
        for lower, upper in _bounds_to_try(modules)
    ]
    for rule in rules:
        for budget in _budgets_to_try(rule):
            _try_allocation(allocator, budget, rule, findings)
        with findings.about(f"refusal, {unit}"):
            for budget in (rule.smallest - 1, rule.largest + 1):
                allocate = allocator.allocate
                _require_error(rule.call(budget), ValueError, allocate, budget, **rule.options)
    _try_ties(allocator, rules, findings)


def _bounds_to_try(
    modules: Mapping[str, _Module],
) -> list[tuple[dict[str, int], dict[str, int]]]:
    """Pairs (lower, upper): none; bounds of all modules; bounds of one, the first or the last.

    One of the two catches an allocator that ignores bounds, whichever module its scores prefer.
    """
    limits = {name: module.limit for name, module in modules.items()}
    none = dict.fromkeys(limits, 0)
    ones = {name: min(1, limit) for name, limit in limits.items()}
    halves = {name: -(-limit // 2) for name, limit in limits.items()}
    first, last = next(iter(limits)), next(reversed(limits))
    return [
        (none, limits),
        (ones, limits),
        (none, halves),
        (halves, limits),
        ({**none, first: halves[first]}, limits),
        ({**none, last: halves[last]}, limits),
        (none, {**limits, first: 0}),
        (none, {**limits, last: 0}),
    ]


def _budgets_to_try(rule: _Rule) -> list[int]:
    width = rule.largest - rule.smallest
    budgets = {rule.smallest + int(share * width) for share in SHARES}
    budgets |= {rule.smallest + extra for extra in (1, len(rule.modules)) if extra <= width}
    return sorted(budgets)


def _try_allocation(allocator: Allocator, budget: int, rule: _Rule, findings: _Findings) -> None:
    call, unit = rule.call(budget), rule.unit
    allocation = None
    with findings.about(f"outcome, {unit}"):
        found = _without_error(call, allocator.allocate, budget, **rule.options)
        _check_outcome(call, found, rule)
        allocation = found
    if allocation is None:  # the other rules have nothing to judge
        return
    ranks = allocation.ranks
    with findings.about(f"budget, {unit}"):
        _check_budget(call, ranks, budget, rule)
    if unit == "parameters":
        with findings.about(f"room, {unit}"):
            _check_room(call, ranks, budget, rule)
    with findings.about(f"min_rank, {unit}"):
        if low := {name: r for name, r in ranks.items() if r < rule.lower[name]}:
            raise _Broken(call, f"at least min_rank for {list(low)}", f"{ranks}")
    with findings.about(f"max_rank, {unit}"):
        if high := {name: r for name, r in ranks.items() if r > rule.upper[name]}:
            raise _Broken(call, f"at most max_rank for {list(high)}", f"{ranks}")
    if allocation.keep is not None:
        with findings.about(f"masks, {unit}"):
            _check_masks(call, allocation.keep, ranks, rule)
    else:
        findings.reasons.setdefault(f"masks, {unit}", "there are no keep masks")


def _try_ties(allocator: Allocator, rules: Sequence[_Rule], findings: _Findings) -> None:
    """The same rules with equal scores, which are stored in place of the measured ones."""
    unit = rules[0].unit
    device = next((p.device for p in allocator.model.parameters()), torch.device("cpu"))
    equal = {
        name: torch.ones(() if module.present is None else (module.present,), device=device)
        for name, module in rules[0].modules.items()
    }
    measured = allocator._scores
    if measured is None:
        findings.reasons[f"ties, {unit}"] = "no scores were stored with store_scores()"
        return
    tied = _Findings()
    try:
        allocator.store_scores(equal)
    except Exception as error:  # user code, of any kind
        findings.reasons[f"ties, {unit}"] = f"store_scores() refuses equal scores: {_named(error)}"
        return
    try:
        for rule in rules:
            for budget in _budgets_to_try(rule):
                _try_allocation(allocator, budget, rule, tied)
    finally:
        allocator.store_scores(measured)
    # What is broken without ties is told already.
    only_tied = [broken for name, broken in tied.broken.items() if name not in findings.broken]
    if tied.broken and not only_tied:
        findings.reasons[f"ties, {unit}"] = "the same rules are broken without ties"
        return
    with findings.about(f"ties, {unit}"):
        if only_tied:
            raise only_tied[0]


def _check_outcome(call: str, allocation: Any, rule: _Rule) -> None:
    if not isinstance(allocation, Allocation):
        raise _Broken(call, "an Allocation", repr(allocation))
    if list(allocation.ranks) != list(rule.modules):
        raise _Broken(call, f"ranks for {list(rule.modules)}", f"{list(allocation.ranks)}")


def _check_budget(call: str, ranks: Mapping[str, int], budget: int, rule: _Rule) -> None:
    """Ranks are met exactly, parameters are not exceeded."""
    spent = rule.spent(ranks)
    if rule.unit == "ranks" and spent != budget:
        raise _Broken(call, f"ranks that sum to {budget}", f"{spent} from {ranks}")
    if spent > budget:
        raise _Broken(call, f"at most {budget} parameters", f"{spent} from {ranks}")


def _check_room(call: str, ranks: Mapping[str, int], budget: int, rule: _Rule) -> None:
    """Parameters leave no room for another rank."""
    left = budget - rule.spent(ranks)
    room = [
        name
        for name, module in rule.modules.items()
        if ranks[name] < rule.upper[name] and module.cost <= left
    ]
    if room:
        got = f"{left} parameters left, into which another rank of {room} fits"
        raise _Broken(call, "no room for another rank", got)


def _check_masks(
    call: str, masks: Mapping[str, Tensor], ranks: Mapping[str, int], rule: _Rule
) -> None:
    """The masks say of every present rank whether it survives, and fit the ranks."""
    if masks.keys() != ranks.keys():
        raise _Broken(call, f"keep masks for {list(ranks)}", f"{list(masks)}")
    for name, mask in masks.items():
        present, kept, rank = rule.modules[name].present, int(mask.sum()), ranks[name]
        entry = f"the keep mask of {name!r} from {call}"
        if present is not None and mask.shape != (present,):
            raise _Broken(entry, f"shape ({present},)", f"{tuple(mask.shape)}")
        if kept > rank or (kept < rank and not rule.grows):
            raise _Broken(entry, f"{rank} kept, its rank", f"{kept}")
