"""The README's code runs and prints what the README shows; the commands on the pages exist."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = (ROOT / "examples" / "results" / "README.md").read_text(encoding="utf-8")
QUICK_START = ROOT / "examples" / "quick_start.py"
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def test_there_are_blocks():
    assert BLOCKS


def first_block(language):
    pattern = rf"^```{language}\n(.*?)^```"
    return re.search(pattern, README, flags=re.MULTILINE | re.DOTALL)[1]


def test_the_first_block_is_the_quick_start():
    """The first ```python block is examples/quick_start.py without its docstring."""
    _, _, code = QUICK_START.read_text(encoding="utf-8").split('"""', 2)
    assert first_block("python").strip() == code.strip()


def test_the_first_output_is_the_quick_start_s(capsys):
    """The first ```text block is what examples/quick_start.py prints."""
    expected = first_block("text")
    with torch.random.fork_rng(devices=[]):
        runpy.run_path(str(QUICK_START), run_name="__main__")
    assert capsys.readouterr().out.strip() == expected.strip()


@pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)  # PEFT reads it
@pytest.mark.parametrize("block", BLOCKS, ids=[f"block {i + 1}" for i in range(len(BLOCKS))])
def test_block_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})


def test_every_script_and_file_that_the_pages_name_exists():
    names = set(
        re.findall(
            r"\b(?:examples|tests|minirank)/[\w/]+\.(?:py|txt|json|png|md)", README + RESULTS
        )
    )
    assert names
    assert not [name for name in names if not (ROOT / name).exists()]
    links = re.findall(r"\]\(([^)#:]+)\)", RESULTS)
    assert links
    assert not [link for link in links if not (ROOT / "examples" / "results" / link).exists()]


def test_every_option_of_the_comparison_that_the_pages_name_exists():
    source = (ROOT / "examples" / "compare.py").read_text(encoding="utf-8")
    options = {
        o
        for line in re.findall(r"compare\.py(.*)", README + RESULTS)
        for o in re.findall(r"--[a-z0-9-]+", line)
    }
    assert options
    assert not [option for option in options if f'"{option}"' not in source]
