"""Every reference file stands alone: it imports torch and the standard library, and shows its
work."""

from __future__ import annotations

import ast
import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest

import minirank
from minirank import reference

FOLDER = Path(reference.__file__).parent
FILES = sorted(path for path in FOLDER.glob("*.py") if path.name != "__init__.py")

PRINTS = {  # what each demonstration must say
    "best_ranks": r"in 2,500 parameters: \{'query': \[True, True, True\], 'up': \[False, ",
    "budget": r"10 ranks, at most 4 each: \{'query': 2, 'value': 4, 'up': 4\}",
    "fisher": r"labels drawn from the model: trace 2\.4\d+, of the Hessian 2\.4\d+",
    "gauss_newton": r"step 300: loss 0\.0\d+, traces",
    "hessian": r"step   0: .* [1-9]\d* negative entries.*\n(.*\n)*step 800: .* 0 negative entries",
    "hutchinson": r"exact: \[13\.36.*\n(.*\n)*1000 vectors: \[13\.\d",
    "l1ra": r"ranks \{'needs 1': 1, 'needs 2': 2, 'needs 6': 6\}",
    "lora": r"W is back bit for bit: True\ntwo ranks added, scaling kept at 8 / 2: .* by 0\n",
    "peft_format": r"h\.10\.fc +the loaded ΔW differs by: 0e\+00",
    "resize": r"0 ranks pruned, 2 added: loss (\S+) → \1, after 200 steps \S+ \(Adam's step 600\)",
    "sensitivity": r"of 24 ranks\n0 .*\n2 ",
    "shaplora": r"of the best 3 ranks: \{'idle': 0, 'needs 3': 3\}",
    "shapley": r"right glove  0\.6667\nsum 1\.0000",
}


def imported(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} imports a neighbour"
            yield node.module.split(".")[0]


def test_every_file_is_shown_here():
    assert {path.stem for path in FILES} == PRINTS.keys()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_copied_file_runs_alone_and_shows_its_method(path, tmp_path, capsys):
    assert set(imported(path)) <= {"torch", *sys.stdlib_module_names}
    runpy.run_path(shutil.copy(path, tmp_path), run_name="__main__")
    printed = capsys.readouterr().out
    assert re.search(PRINTS[path.stem], printed), printed


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_can_be_read_in_one_sitting(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 100
    assert max(map(len, lines)) <= 100


def test_the_names_are_those_of_the_contracts_and_public():
    assert set(reference.__all__) == {
        *("lora_forward", "merged_weight", "resize", "Layer"),
        *("input_second_moment", "sensitivity_theta", "ranks_from_shares", "best_ranks"),
        *("hessian_diagonal", "gauss_newton_diagonal", "empirical_fisher", "hutchinson"),
        *("l1ra_shrink", "l1ra_reassign", "coalition_masks", "san", "shapley_sensitivity"),
        *("exact_shapley_values", "peft_export", "peft_delta_weight"),
    }
    assert minirank.reference is reference
    described = reference.__doc__.partition("hardened twin")[2]  # the map to the library
    assert not [name for name in reference.__all__ if not re.search(rf"\b{name}\b", described)]
    assert all(getattr(reference, name).__doc__ for name in reference.__all__)
