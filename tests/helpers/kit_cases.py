"""What the tests of the contracts share."""

from __future__ import annotations

from torch import nn

from minirank import testing


def failed(mine, like, hint=None):
    """The failed results; with `hint`, at least one of them must name this fault."""
    report = testing.check(mine, like=like, on_fail=None)
    assert report.failed, "the kit finds no fault"
    if hint is not None:
        assert any(hint in result.hint for result in report.failed), str(report)
    return report.failed


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
