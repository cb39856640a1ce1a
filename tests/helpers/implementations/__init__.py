"""Implementations of the contracts by other hands: wrong ones to catch, right ones to let pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


class Implementation(NamedTuple):
    contract: str  # the reference's name, or "round_trip"
    name: str
    function: Callable[..., Any]
    note: str  # what is wrong with it and where it shows, or in what it differs harmlessly


def recorder(records: list[Implementation]) -> Callable[..., Any]:
    """A decorator `@record(contract, note)` that appends its function to `records`."""

    def record(contract: str, note: str) -> Callable[..., Any]:
        def add(function: Callable[..., Any]) -> Callable[..., Any]:
            records.append(Implementation(contract, function.__name__, function, note))
            return function

        return add

    return record
