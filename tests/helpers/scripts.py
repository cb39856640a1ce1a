"""The scripts in examples/, run as a user runs them."""

from __future__ import annotations

import io
import os
import runpy
import subprocess
import sys
import warnings
from contextlib import redirect_stdout
from pathlib import Path
from unittest import mock

import torch

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


def run(script, *arguments, cwd):
    """What the script prints. It must end without an error.

    It runs in this process, since another one would first import torch and transformers again.
    """
    command = [str(EXAMPLES / script), *map(str, arguments)]
    output, folder, dtype = io.StringIO(), Path.cwd(), torch.get_default_dtype()
    os.chdir(cwd)
    try:
        with (
            mock.patch.object(sys, "argv", command),
            mock.patch.object(sys, "path", [str(EXAMPLES), *sys.path]),
            torch.random.fork_rng(),
            warnings.catch_warnings(),
            redirect_stdout(output),
        ):
            warnings.simplefilter("ignore")  # not errors, as for a user
            runpy.run_path(command[0], run_name="__main__")
    finally:
        os.chdir(folder)
        torch.set_default_dtype(dtype)
    return output.getvalue()


def run_apart(*command, cwd):
    """What a command of Python prints in a process of its own, which may start more of them."""
    # One thread each: test workers that share the processor would slow each other down.
    environment = {**os.environ, "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, command)]
    result = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout
