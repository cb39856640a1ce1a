"""What the tests of several contracts assert."""

from __future__ import annotations

import torch

from minirank import testing


def told(mine, like, *hints, **options):
    """The report of a wrong implementation, in which each hint stands."""
    report = testing.check(mine, like=like, on_fail=None, **options)
    assert report.failed
    for hint in hints:
        assert hint in " ".join(str(report).split()), report
    return report


def assert_the_reference_passes(contract, dtype):
    like = contract.reference
    assert not testing.check(like, like=like, dtype=dtype).with_status("noted")


def assert_the_twin_is_named(contract, twin):
    """It fails, and the hints name it and no other twin."""
    mine = contract.wrong_twins[twin]
    report = testing.check(mine, like=contract.reference, dtype=torch.float64, on_fail=None)
    hints = [result.hint for result in report.failed]
    assert any(hint.startswith(f"equals {twin}") for hint in hints), report
    assert not [hint for hint in hints if "equals" in hint and f"equals {twin}" not in hint]
