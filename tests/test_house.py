"""Imports inside the package point one way, and runtime dependencies stay at three."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "minirank"

ORDER = [
    "linear",
    "lora",
    "targets",
    "wrap",
    "resize",
    "budget",
    "reassign",
    "table",
    "history",
    "allocation",
    "measure",
    "estimate",
    "outputs",
    "hessian",
    "probes",
    "hutchinson",
    "gauss_newton",
    "fisher",
    "curvature",
    "stability",
    "sensitivity",
    "gates",
    "l1ra",
    "shapley",
    "shaplora",
    "files",
    "fingerprint",
    "saved",
    "checkpoint",
    "peft_export",
    "peft_import",
    "testing",
]


def imports(path):
    """(modules of the package, top-level names of others) that a file imports anywhere."""
    inside, outside = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            inside |= {node.module} if node.module else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: imports from outside the package's folder"
            outside.add(node.module.split(".")[0])
        elif isinstance(node, ast.Import):
            outside |= {alias.name.split(".")[0] for alias in node.names}
    return inside, outside


def test_every_file_has_its_place_in_the_order():
    assert {path.stem for path in PACKAGE.glob("*.py")} == {*ORDER, "__init__"}


def test_a_file_imports_only_from_files_above_it():
    for position, name in enumerate(ORDER):
        inside, _ = imports(PACKAGE / f"{name}.py")
        assert inside <= set(ORDER[:position]), (
            f"{name}.py imports {inside - set(ORDER[:position])} from below"
        )


def test_only_relative_imports_so_that_a_copied_folder_works_under_any_name():
    for path in PACKAGE.glob("*.py"):
        assert "minirank" not in imports(path)[1], path.name


def test_runtime_dependencies_are_torch_safetensors_tqdm():
    allowed = {*sys.stdlib_module_names, "torch", "safetensors", "tqdm"}
    optional = {"table.py": {"matplotlib"}}
    for path in PACKAGE.glob("*.py"):
        assert imports(path)[1] <= allowed | optional.get(path.name, set()), path.name


def test_budget_needs_no_torch():
    assert "torch" not in imports(PACKAGE / "budget.py")[1]


def test_files_can_be_read_in_one_sitting():
    lengths = {path.name: len(path.read_text().splitlines()) for path in PACKAGE.glob("*.py")}
    assert all(length <= 280 for length in lengths.values()), lengths


def test_the_readme_lists_the_files_in_this_order():
    readme = (PACKAGE.parent / "README.md").read_text()
    listed = re.findall(r"^\| \[?`(\w+)\.py`", readme, flags=re.MULTILINE)
    assert listed == ORDER
