"""What the tests of the contracts share."""

from __future__ import annotations

import torch
from torch import nn

from minirank import testing
from minirank.testing.kit import contract_of


def failed(mine, like, hint=None, **options):
    """The failed results; with `hint`, at least one of them must name this fault."""
    report = testing.check(mine, like=like, on_fail=None, **options)
    assert report.failed, "the kit finds no fault"
    if hint is not None:
        assert any(hint in result.hint for result in report.failed), str(report)
    return report.failed


def assert_twins_are_named(like):
    """Some case fails for each wrong twin of the contract, and its hint may be that twin."""
    cases = testing.cases(like, dtype=torch.float64)
    for sentence, twin in contract_of(like).wrong_twins.items():
        assert any(sentence in case.run(twin).twins for case in cases), sentence


def tree(modules):
    """A module that holds `modules` under their dotted names."""
    root = nn.Module()
    for name, module in modules.items():
        parent = root
        *path, leaf = name.split(".")
        for key in path:
            if key not in parent._modules:
                parent.add_module(key, nn.Module())
            parent = parent._modules[key]
        parent.add_module(leaf, module)
    return root
