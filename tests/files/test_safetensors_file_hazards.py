"""What can go wrong around files: other writers, odd places, odd names, foreign contents."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from helpers.models import wrapped
from torch import nn

from minirank import export_peft, read_adapter, save_adapter, wrap
from minirank.files import safetensors_file as files_module
from minirank.files.safetensors_file import (
    read_safetensors,
    safetensors_bytes,
    write_files,
)
from minirank.tensor_bytes import checksum, tensor_bytes


@pytest.fixture
def path(tmp_path):
    return tmp_path / "adapter.safetensors"


# ---- writing -----------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_pipes_and_devices_are_not_replaced_by_files(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(FileExistsError, match=r"'.*pipe' is no ordinary file"):
        write_files({pipe: b"new"})
    assert pipe.is_fifo()


def test_a_broken_link_is_named_by_where_it_points(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "none" / "file")
    with pytest.raises(FileNotFoundError, match=r"there is no folder '.*none' to write 'file' in"):
        write_files({tmp_path / "link": b"new"})


@pytest.mark.parametrize("fails", [1, 2])
def test_if_one_of_two_files_cannot_be_replaced_the_other_is_the_old_one(
    tmp_path, monkeypatch, fails
):
    files = {tmp_path / "a": b"new", tmp_path / "b": b"new"}
    for path in files:
        path.write_bytes(b"old")
    replace, calls = os.replace, []

    def busy(source, target):
        calls.append(target)
        if len(calls) == fails:
            raise OSError("busy")
        replace(source, target)

    monkeypatch.setattr(os, "replace", busy)
    with pytest.raises(OSError, match="busy"):
        write_files(files)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
        "a": b"old",
        "b": b"old",
    }


def test_if_the_second_file_cannot_be_replaced_a_first_one_that_is_new_goes_again(
    tmp_path, monkeypatch
):
    replace = os.replace

    def busy(source, target):
        if str(target).endswith("b"):
            raise OSError("busy")
        replace(source, target)

    monkeypatch.setattr(os, "replace", busy)
    with pytest.raises(OSError, match="busy"):
        write_files({tmp_path / "a": b"new", tmp_path / "b": b"new"})
    assert not list(tmp_path.iterdir())


def test_a_name_that_the_format_has_for_itself_is_refused(path):
    model = wrapped()[1]
    model.register_buffer("__metadata__", torch.ones(2))
    with pytest.raises(ValueError, match="'__metadata__' is what safetensors calls its metadata"):
        save_adapter(model, path, modules="*")
    assert not path.exists()


def test_a_header_that_safetensors_would_not_read_is_not_written(monkeypatch):
    monkeypatch.setattr(files_module, "LONGEST_HEADER", 1000)
    safetensors_bytes({}, {"key": "x" * 900})
    with pytest.raises(ValueError, match="bytes of names and metadata, a file holds 1,000"):
        safetensors_bytes({}, {"key": "x" * 1000})


def test_a_name_that_is_no_unicode_is_refused(tmp_path):
    model = nn.ModuleDict({"\ud800": nn.Linear(4, 4)})
    wrap(model, {"\ud800": 2})
    with pytest.raises(ValueError, match="surrogates not allowed"):
        export_peft(model, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_a_number_that_json_lacks_is_refused(tmp_path):
    _, model, layers = wrapped(ranks={"like": 2})
    layers["like"].scaling = 1e308
    with pytest.raises(ValueError, match="not JSON compliant"):
        export_peft(model, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_views_with_another_sign_are_written_as_they_read():
    negative = torch._neg_view(torch.arange(4.0))
    conjugate = torch.tensor([1 + 2j]).conj()
    assert tensor_bytes(negative) == tensor_bytes(negative.clone())
    assert tensor_bytes(conjugate) == tensor_bytes(conjugate.resolve_conj())


class Wrapper(torch.Tensor):
    """Like DTensor: the values are in other tensors, and its own memory holds something else."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __tensor_flatten__(self):
        return [], None

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return args[0]


@pytest.mark.parametrize(
    "tensor", [Wrapper(torch.ones(2)), torch.ones(2, device="meta"), torch.ones(2).to_sparse()]
)
def test_a_tensor_whose_values_are_elsewhere_is_refused(tensor):
    with pytest.raises(ValueError, match="where an ordinary tensor with values is expected"):
        tensor_bytes(tensor)


# ---- reading -----------------------------------------------------------------------------------


def test_a_reader_beside_a_writer_reads_one_file_or_the_other(tmp_path):
    path, sizes = tmp_path / "file", {"a": 5, "b": 9000}
    for key, size in sizes.items():
        write_files({tmp_path / key: safetensors_bytes({key: torch.full((size,), size)}, {})})
    os.link(tmp_path / "a", path)
    code = f"""
import os
os.chdir({str(tmp_path)!r})
while True:
    for key in "ba":
        os.link(key, "part")
        os.replace("part", "file")
"""
    with subprocess.Popen([sys.executable, "-c", code]) as writer:
        try:
            found = set()
            while len(found) < 2:  # until it has started
                assert writer.poll() is None
                found |= read_safetensors(path)[0].keys()
            for _ in range(2000):
                [(key, tensor)] = read_safetensors(path)[0].items()
                assert torch.equal(tensor, torch.full((sizes[key],), sizes[key]))
        finally:
            writer.kill()


def test_a_type_that_adapters_do_not_have_is_named(path):
    entry = {"dtype": "U64", "shape": [1], "data_offsets": [0, 8]}
    text = json.dumps({"x": entry}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(
        ValueError, match=r"'.*adapter.safetensors' holds 'x' as U64, expected one of F64, F32"
    ):
        read_safetensors(path)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"format": 1' + "0" * 9000 + "}"], ids=["deep", "long"]
)
def test_a_record_that_cannot_be_parsed_is_refused(path, text):
    path.write_bytes(safetensors_bytes({}, {"minirank": text, "checksum": checksum({}, text)}))
    with pytest.raises(ValueError, match="cannot be used"):
        read_adapter(path)
