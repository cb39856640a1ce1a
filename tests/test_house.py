"""The house: folders import one way, reference files stand alone, there are three dependencies."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import minirank

PACKAGE = Path(minirank.__file__).parent

# A file imports from its own folder and from those before it; "" are the files beside the folders.
FLOORS = ["", "layers", "curvature", "allocators", "files", "testing"]
BESIDE = {"checks", "budget", "shapley", "measure", "packed", "placement", "tensor_bytes"}
# This one lies above curvature/ and below allocators/, which use it.
BETWEEN = {"distributed": "curvature"}


def modules():
    """{dotted name inside the package: path}, faces (__init__.py) under their folder's name."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(part for part in parts if part != "__init__")] = path
    return found


MODULES = modules()


def imports(name):
    """(modules of the package, top-level names of others) that a module imports anywhere."""
    path = MODULES[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    inside, outside = set(), set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            outside |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            outside.add(node.module.split(".")[0])
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".") if package else []
            assert node.level - 1 <= len(parts), f"{name} imports from outside the package"
            base = parts[: len(parts) - node.level + 1] + (node.module or "").split(".")
            base = ".".join(part for part in base if part)
            for alias in node.names:
                full = f"{base}.{alias.name}" if base else alias.name
                inside.add(full if full in MODULES else base)
    return inside, outside


def floor(name):
    folder = BETWEEN.get(name) or name.partition(".")[0]
    return FLOORS.index(folder if folder in FLOORS else "")


def test_every_folder_has_its_place():
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert folders == {*FLOORS, "reference"} - {""}
    assert {path.stem for path in PACKAGE.glob("*.py")} == {*BESIDE, *BETWEEN, "__init__"}


def test_a_folder_imports_only_from_folders_before_it():
    for name in MODULES:
        if name and not name.startswith("reference"):
            for other in imports(name)[0]:
                if other.startswith("reference"):
                    assert name.startswith("testing"), f"{name} imports {other}"
                    continue
                assert floor(other) <= floor(name), f"{name} imports {other}, a later folder"


def test_no_files_import_each_other_in_a_circle():
    done, active = set(), []

    def visit(name):
        assert name not in active, f"a circle: {' → '.join([*active, name])}"
        if name not in done:
            active.append(name)
            for other in sorted(imports(name)[0]):
                visit(other)
            active.pop()
            done.add(name)

    for name in MODULES:
        visit(name)


def test_only_relative_imports_so_that_a_copied_folder_works_under_any_name():
    assert not [name for name in MODULES if "minirank" in imports(name)[1]]


def test_reference_files_import_torch_and_the_standard_library_alone():
    for name in MODULES:
        if name.startswith("reference."):
            inside, outside = imports(name)
            assert not inside, name
            assert outside <= {"torch", *sys.stdlib_module_names}, name


def test_runtime_dependencies_are_torch_safetensors_tqdm():
    allowed = {*sys.stdlib_module_names, "torch", "safetensors", "tqdm"}
    optional = {"allocators.plot": {"matplotlib"}, "testing.kit": {"pytest"}}
    for name in MODULES:
        assert imports(name)[1] <= allowed | optional.get(name, set()), name


def test_budget_needs_no_torch():
    assert "torch" not in imports("budget")[1]


def test_lines_have_at_most_100_columns():
    for folder in (PACKAGE, PACKAGE.parent / "tests", PACKAGE.parent / "examples"):
        for path in folder.rglob("*.py"):
            lines = path.read_text(encoding="utf-8").splitlines()
            assert max(map(len, lines), default=0) <= 100, path


def test_the_tests_mirror_the_folders():
    folders = {path.name for path in (PACKAGE.parent / "tests").iterdir() if path.is_dir()}
    assert {name for name in FLOORS if name} | {"reference"} <= folders
