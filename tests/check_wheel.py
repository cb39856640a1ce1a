"""Imports every module of an installed wheel, and runs the README's first block with it.

For an environment that has the wheel and its dependencies alone:

    python tests/check_wheel.py README.md       # in a folder that is not the repository's
"""

from __future__ import annotations

import importlib
import pkgutil
import re
import sys
from importlib.metadata import version
from pathlib import Path

import minirank

SOURCE = Path(sys.argv[1]).resolve().parent / "minirank"


def main() -> None:
    installed = Path(minirank.__file__).parent
    assert installed != SOURCE, "this is the source folder: run it with the wheel installed"
    names = [m.name for m in pkgutil.walk_packages(minirank.__path__, "minirank.")]
    for name in names:
        importlib.import_module(name)
    files = {path.relative_to(SOURCE) for path in SOURCE.rglob("*.py")} | {Path("py.typed")}
    missing = sorted(str(path) for path in files if not (installed / path).exists())
    assert not missing, f"the wheel lacks {missing}"
    assert version("minirank") == minirank.__version__
    block = re.search(r"^```python\n(.*?)^```", Path(sys.argv[1]).read_text("utf-8"), re.M | re.S)
    assert block is not None
    exec(compile(block[1], "README.md", "exec"), {"__name__": "__main__"})
    print(
        f"the wheel of {minirank.__version__}: {len(names)} modules imported, the README's block run"
    )


if __name__ == "__main__":
    main()
