"""The kit judged by implementations that were written before its cases, wrong and right."""

from __future__ import annotations

import pytest
from helpers.implementations.right import RIGHT
from helpers.implementations.wrong import WRONG

from minirank import reference, testing

NAMES = [*reference.__all__, "round_trip"]

# Wrong ones that no case shows, with the reason.
MISSED: dict[str, str] = {}


def like(name):
    return testing.round_trip if name == "round_trip" else getattr(reference, name)


def named(implementations):
    return [pytest.param(one, id=f"{one.contract}-{one.name}") for one in implementations]


def test_every_contract_has_wrong_and_right_ones():
    assert {one.contract for one in WRONG} == set(NAMES)
    assert {one.contract for one in RIGHT} == set(NAMES)


@pytest.mark.filterwarnings("ignore")  # theirs
@pytest.mark.parametrize("wrong", named(WRONG))
def test_a_wrong_one_fails(wrong):
    found = testing.cases(like(wrong.contract))
    failed = any(case.run(wrong.function).status == "failed" for case in found)
    assert failed != (f"{wrong.contract}-{wrong.name}" in MISSED), wrong.note


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("right", named(RIGHT))
def test_a_right_one_passes(right):
    testing.check(right.function, like=like(right.contract))
