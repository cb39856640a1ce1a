"""hints.py: what is said of a name that matches nothing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from minirank import UniformRanks, linear_targets, resize, wrap
from minirank.layers.hints import did_you_mean


def model():
    blocks = nn.ModuleList(
        nn.ModuleDict({"query": nn.Linear(4, 4), "value": nn.Linear(4, 4)}) for _ in range(6)
    )
    return nn.ModuleDict({"encoder": blocks, "head": nn.Linear(4, 2)})


@pytest.mark.parametrize(
    ("targets", "hint"),
    [
        ("query", "did you mean '*.query'?"),
        ("0.query", "did you mean '*.0.query'?"),
        ("*.qery", "did you mean '*.query'?"),
        ("*qery", "did you mean '*query'?"),
        ("encoder.*.quer", "did you mean 'encoder.*.query'?"),
        ("encodr.*", "did you mean 'encoder.*'?"),
        ("valeu", "did you mean '*.value'?"),
        ("heed", "did you mean 'head'?"),
        ("*.banana", "names end in 'query', 'value', 'head'"),
    ],
)
def test_a_target_that_matches_nothing_is_told_what_it_may_mean(targets, hint):
    for given_targets in (targets, ["head", targets]):
        with pytest.raises(ValueError, match="matches no linear layer") as error:
            linear_targets(model(), given_targets)
        assert str(error.value).endswith(hint)
    if "did you mean" in hint:
        assert linear_targets(model(), hint.split("'")[1])


@pytest.mark.parametrize("name", ["query", "*.qery", "qery"])
def test_where_full_names_are_expected_full_names_are_suggested(name):
    hint = (
        r"did you mean 'encoder\.0\.query', 'encoder\.1\.query', 'encoder\.2\.query', "
        r"'encoder\.3\.query' \(6 names in all\)\?"
    )
    with pytest.raises(ValueError, match=hint):
        wrap(model(), {name: 1})
    wrapped = model()
    wrap(wrapped, dict.fromkeys(linear_targets(wrapped), 1))
    with pytest.raises(ValueError, match=hint):
        resize(wrapped, {name: 1})
    allocator = UniformRanks(model())
    allocator.score()
    for bound in ("min_rank", "max_rank"):
        with pytest.raises(ValueError, match=hint):
            allocator.allocate(4, **{bound: {name: 1}})


def test_a_glob_among_full_names_is_told_how_to_list_them():
    with pytest.raises(ValueError, match=r"linear_targets\(model, '\*\.query'\) lists them"):
        wrap(model(), {"*.query": 1})
    with pytest.raises(ValueError, match=r"linear_targets\(model, 'encoder\.\*'\)"):
        wrap(model(), {"encoder": 1})


@pytest.mark.parametrize("pattern", ["query", "*.qery"])
def test_trainable_gets_the_same_hints(pattern):
    with pytest.raises(ValueError, match=r"matches no module: did you mean '\*\.query'\?"):
        wrap(model(), {"head": 1}, trainable=pattern)


@given(st.text(max_size=12), st.lists(st.text(min_size=1, max_size=12), max_size=5), st.booleans())
def test_any_name_gets_some_hint(name, known, globs):
    assert did_you_mean(name, known, globs=globs)
