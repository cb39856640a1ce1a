"""Files are written whole or not at all, in the safetensors format, without numpy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from helpers.models import same_bits

from minirank.files.safetensors_file import (
    DTYPES,
    read_safetensors,
    safetensors_bytes,
    write_files,
)
from minirank.tensor_bytes import checksum


def tensors_of_every_type():
    generator = torch.Generator().manual_seed(0)
    odd = {f"odd {dtype}": torch.randn(3, generator=generator).mul(9).to(dtype) for dtype in DTYPES}
    views = {"transposed": torch.arange(6.0).reshape(2, 3).t(), "part": torch.arange(9)[2::3]}
    return (
        odd
        | views
        | {"scalar": torch.tensor(2.0), "empty": torch.zeros(0, 4), 'a "name"\n': torch.ones(2)}
    )


def test_the_format_is_what_safetensors_reads(tmp_path):
    tensors = tensors_of_every_type()
    content = safetensors_bytes(tensors, {"key": "välue"})
    theirs = safetensors.torch.load(content)
    (tmp_path / "file").write_bytes(content)
    ours, metadata = read_safetensors(tmp_path / "file")
    assert metadata == {"key": "välue"}
    for read in (theirs, ours):
        assert read.keys() == tensors.keys()
        assert all(same_bits(read[name], tensor) for name, tensor in tensors.items())


def test_every_tensor_is_aligned_in_the_file():
    tensors = tensors_of_every_type()
    content = safetensors_bytes(tensors, {})
    start = 8 + int.from_bytes(content[:8], "little")
    assert start % 8 == 0
    for name, entry in json.loads(content[8:start]).items():
        if name != "__metadata__":
            assert entry["data_offsets"][0] % tensors[name].element_size() == 0


def test_what_was_read_does_not_follow_the_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(safetensors_bytes({"a": torch.ones(1000)}, {}))
    tensors, _ = read_safetensors(path)
    with open(path, "r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert torch.equal(tensors["a"], torch.ones(1000))


@pytest.mark.parametrize(
    "tensor", [torch.ones(2, dtype=torch.complex64), torch.ones(2, device="meta")]
)
def test_a_tensor_that_cannot_be_saved_is_named(tensor):
    with pytest.raises(ValueError, match=r"'x' is (torch.complex64|on the meta device)"):
        safetensors_bytes({"x": tensor}, {})


def test_the_checksum_sees_entries_names_types_shapes_and_text_but_not_order():
    a, b = torch.arange(4.0), torch.ones(2)
    known = checksum({"a": a, "b": b}, "text")
    assert checksum({"b": b, "a": a}, "text") == known
    flipped = a.clone()
    flipped.view(torch.uint8)[5] ^= 1
    assert checksum({"a": a, "b": b}, "texd") != known
    for other in ({"a": flipped}, {"a": a.view(torch.int32)}, {"a": a.view(2, 2)}):
        assert checksum({**other, "b": b}, "text") != known
    assert checksum({"aa": a, "b": b}, "text") != known


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "folder").mkdir()
    target = tmp_path / "folder" / "file"
    target.write_bytes(b"old")
    (tmp_path / "link").symlink_to(target)
    write_files({tmp_path / "link": b"new"})
    assert (tmp_path / "link").is_symlink()
    assert target.read_bytes() == b"new"
    assert os.listdir(tmp_path / "folder") == ["file"]


def test_a_write_that_fails_leaves_all_old_files_and_nothing_else(tmp_path):
    """The limit on a file's size acts as a full disk: the second file is cut off in the middle."""
    resource = pytest.importorskip("resource")
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    files = {tmp_path / "a": b"1" * 10, tmp_path / "b": b"2" * 10_000}
    for path in files:
        path.write_bytes(b"old")
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, old[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            write_files(files)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
        "a": b"old",
        "b": b"old",
    }


def test_a_process_killed_in_the_middle_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    code = f"""
import os, signal
from pathlib import Path
from minirank.files import safetensors_file as files
files.os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
files.write_files({{Path({str(path)!r}): b"new"}})
"""
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=False).returncode < 0
    assert path.read_bytes() == b"old"


def test_a_wrong_place_is_named(tmp_path):
    with pytest.raises(IsADirectoryError, match="is a folder: expected the name of a file"):
        write_files({tmp_path: b""})
    with pytest.raises(FileNotFoundError, match=r"there is no folder '.*none' to write 'x' in"):
        write_files({tmp_path / "none" / "x": b""})
    with pytest.raises(FileNotFoundError, match=r"there is no file '.*x'"):
        read_safetensors(tmp_path / "x")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read_safetensors(tmp_path)


def test_no_numpy_is_needed(tmp_path):
    code = """
import sys
sys.modules["numpy"] = None
import torch
from torch import nn
import minirank
for folder in ("p", "q"):
    model = nn.Sequential(nn.Linear(4, 3))
    if folder == "p":
        state = model.state_dict()
        minirank.wrap(model, {"0": 2}, gate=0.0)
        y = model(torch.ones(1, 4))
        minirank.save_adapter(model, "a")
        minirank.export_peft(model, "p")
    else:
        model.load_state_dict(state)
        minirank.load_adapter(model, "a", trainable=[])
        assert torch.equal(model(torch.ones(1, 4)), y)
        minirank.unwrap(model)
        minirank.import_peft(model, "p", trainable=[])
"""
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-W", "ignore", "-c", code]
    subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, check=True)
