"""What a check found: results, their report as text, and the error that carries it."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, overload

SHOWN = 6  # failures that a report shows in full
Status = Literal["passed", "noted", "failed", "skipped", "xfailed"]


@dataclass(frozen=True)
class Result:
    """What came of one case.

    Args:
        case: the name of the case, its dtype included.
        equation: which equation or rule it is about.
        status: "passed"; "noted", passed with something odd; "failed"; "skipped", not run;
            "xfailed", failed as expected.
        entry: where the largest error is, such as "['up'][0, 3]".
        expected, got: what stands there, as text.
        error: the largest difference.
        allowed: the largest difference that passes. 0 for whole numbers and bits.
        hint: what the numbers that came are; what is odd; or the reason of a skip.
        reproduce: a line of code that runs this case alone.
        twins: the sentences of all wrong twins whose numbers came out.
    """

    case: str
    equation: str
    status: Status
    entry: str = ""
    expected: str = ""
    got: str = ""
    error: float = 0.0
    allowed: float = 0.0
    hint: str = ""
    reproduce: str = ""
    twins: tuple[str, ...] = ()

    def __str__(self) -> str:
        status = "PASSED, with a note: " if self.status == "noted" else f"{self.status.upper():8}"
        lines = [f"{status}{self.case}  ({self.equation})"]
        if self.status == "failed":
            lines += _wrapped(f"at {self.entry}: ", f"expected {self.expected}, got {self.got}")
            if self.allowed:
                lines += _wrapped("", f"largest error {self.error:.2g}, allowed {self.allowed:.2g}")
        if self.hint:
            lines += _wrapped("", self.hint)
        if self.status == "failed" and self.reproduce:
            lines.append(f"        again: {self.reproduce}")
            arguments = self.reproduce.replace(".run(mine)", ".arguments()")
            lines.append(f"        its arguments: {arguments}")
        return "\n".join(lines)


def _wrapped(head: str, text: str) -> list[str]:
    indent = " " * 8
    return textwrap.wrap(  # paths and names stay in one piece
        head + text,
        100,
        initial_indent=indent,
        subsequent_indent=indent,
        break_on_hyphens=False,
        break_long_words=False,
    )


@dataclass(frozen=True)
class Report(Sequence[Result]):
    """The results of all cases of one contract. It prints as text; a failed one comes first."""

    contract: str
    source: str
    results: tuple[Result, ...]

    @overload
    def __getitem__(self, index: int) -> Result: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Result]: ...
    def __getitem__(self, index: int | slice) -> Result | Sequence[Result]:
        return self.results[index]

    def __len__(self) -> int:
        return len(self.results)

    def __iter__(self) -> Iterator[Result]:
        return iter(self.results)

    def with_status(self, *statuses: Status) -> list[Result]:
        """The results of these statuses, in order."""
        return [result for result in self.results if result.status in statuses]

    @property
    def failed(self) -> list[Result]:
        """The results that failed."""
        return self.with_status("failed")

    def _distinct_failures(self) -> list[Result]:
        """The failures, one for a case that failed in float64 and in float32."""
        first: dict[str, Result] = {}
        for result in self.failed:
            name, _, dtype = result.case.rpartition(", ")
            first.setdefault(name if dtype in ("float64", "float32") else result.case, result)
        return list(first.values())

    def __str__(self) -> str:
        passed = self.with_status("passed", "noted")
        head = f"{self.contract} ({self.source}): {len(passed)} of {len(self)} cases passed"
        shares = [result.error / result.allowed for result in passed if result.allowed]
        if shares:
            head += f"; largest error: {100 * max(shares):.2g} % of what is allowed"
        shown = self._distinct_failures()[:SHOWN]
        told = list(map(str, shown))
        if len(self.failed) > len(shown):
            more = "; ".join(result.case for result in self.failed if result not in shown)
            told += textwrap.wrap(f"and {len(self.failed) - len(shown)} more: {more}", 100)
        told += map(str, self.with_status("noted", "skipped", "xfailed"))
        return "\n".join([head, *told])


class ConformanceError(AssertionError):
    """An implementation differs from its reference. `report` holds the results."""

    def __init__(self, report: Report) -> None:
        super().__init__(f"\n{report}")
        self.report = report
