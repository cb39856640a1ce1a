"""coverage.py, the example: what it printed, and that it prints it of a few models."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
PRINTED = (EXAMPLES / "results/coverage.txt").read_text(encoding="utf-8").splitlines()
FEW = ["GPT-2", "Mamba", "ResNet", "Mixtral", "nn.TransformerEncoder", "nn.LSTM and a head"]


@pytest.fixture(scope="module")
def example():
    pytest.importorskip("transformers", minversion="5")  # earlier ones have experts of nn.Linear
    spec = importlib.util.spec_from_file_location("coverage_example", EXAMPLES / "coverage.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_few_models_are_as_printed(example):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lines = example.lines(FEW)
    assert len(lines) == len(FEW) + 7
    for line in lines:
        assert line in PRINTED
        assert len(line) <= 100


def test_the_printed_table_has_every_family(example):
    names = {line[:22].strip() for line in PRINTED[6:-6]} - {""}
    assert set(example.FAMILIES) == names
