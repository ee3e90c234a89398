"""Everything that must be refused, quickly and by name."""

from __future__ import annotations

import io
import os
import pickle
import socket
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.torch

from deltahub import tensors as T
from deltahub.errors import TensorFileError
from tests.tensors.cases import EMPTY, ENTRY, HOSTILE, LENIENT, file_bytes


def refused(path: Path, **options: Any) -> str:
    """Both ways in refuse, with one code."""
    codes = []
    for way in (T.TensorFile.open, T.TensorFile.read):
        with pytest.raises(TensorFileError) as caught:
            way(path, **options)
        assert str(path) in str(caught.value)
        assert str(caught.value).isprintable() or "\n" in str(caught.value)
        codes.append(caught.value.code)
    assert codes[0] == codes[1]
    return codes[0]


@pytest.mark.parametrize(("data", "code"), [case[1:] for case in HOSTILE], ids=[case[0] for case in HOSTILE])
def test_hostile_files_are_refused(tmp_path: Path, data: bytes, code: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    start = time.perf_counter()
    assert refused(path) == code
    assert time.perf_counter() - start < 5
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("data", [case[1] for case in HOSTILE[:LENIENT]], ids=[case[0] for case in HOSTILE[:LENIENT]])
def test_the_first_half_of_the_corpus_is_refused_by_the_library_too(data: bytes) -> None:
    """But for files that are only over our own, lower caps."""
    try:
        safetensors.deserialize(data)
    except Exception:
        return
    assert len(data) > 16 << 20


def test_a_million_tensors(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(file_bytes("{" + ",".join(f'"{i}":{EMPTY}' for i in range(250_000)) + "}"))
    start = time.perf_counter()
    assert refused(path) == "E_TENSORS_COUNT"
    assert time.perf_counter() - start < 1
    tight = '{"a":' + EMPTY + ',"b":' + EMPTY + "}"
    path.write_bytes(file_bytes(tight))
    assert refused(path, max_tensors=1) == "E_TENSORS_COUNT"
    path.write_bytes(file_bytes(tight.replace('"dtype"', '"\\u0064type"')))
    assert refused(path, max_tensors=1) == "E_TENSORS_COUNT"
    assert len(T.TensorFile.open(path, max_tensors=2)) == 2


def archive() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as bundle:
        bundle.writestr("archive/data.pkl", b"x")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "says"),
    [
        *((pickle.dumps({"a": list(range(100))}, protocol=p), "pickle") for p in (2, 3, 4, 5)),
        (archive(), "zip"),
        (b"GGUF" + bytes(100), "GGUF"),
        (b"\x89HDF\r\n\x1a\n" + bytes(100), "HDF5"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "LFS"),
        (b"<!DOCTYPE html><html>", "HTML"),
    ],
)
def test_other_formats_are_named_and_never_opened(tmp_path: Path, data: bytes, says: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    assert refused(path) == "E_TENSORS_NOT_SAFETENSORS"
    with pytest.raises(TensorFileError, match=says):
        T.TensorFile.open(path)


def test_a_zip_behind_a_file_is_trailing_bytes(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(file_bytes({"a": ENTRY}, b"12" + archive()))
    assert refused(path) == "E_TENSORS_LAYOUT"


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as server:
        short = Path(os.path.relpath(tmp_path / "socket"))
        try:
            server.bind(str(short))
            made = ["folder", "fifo", "socket"]
        except OSError:  # the path is too long for a socket here
            made = ["folder", "fifo"]
        for name in made:
            (tmp_path / f"to-{name}").symlink_to(tmp_path / name)
            assert refused(tmp_path / name) == "E_TENSORS_NOT_REGULAR"
            assert refused(tmp_path / f"to-{name}") == "E_TENSORS_NOT_REGULAR"
    assert refused(Path("/dev/zero")) == "E_TENSORS_NOT_REGULAR"
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert refused(tmp_path / "loop") == "E_TENSORS_UNREADABLE"
    assert refused(tmp_path / "none") == "E_TENSORS_MISSING"
    with pytest.raises(TensorFileError) as caught:
        T.TensorFile.open("a\0b")
    assert caught.value.code == "E_TENSORS_UNREADABLE"
    T.write(tmp_path / "real", {"a": np.zeros(2)})
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert list(T.TensorFile.open(tmp_path / "link")) == ["a"]


def test_a_sparse_terabyte(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    size = 1 << 40
    start = time.perf_counter()
    path.write_bytes(file_bytes({"a": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}))
    os.truncate(path, path.stat().st_size + size)
    if sys.platform == "linux":
        with T.TensorFile.open(path) as found:
            assert found["a"].shape == (size,)
            assert found.torch("a")[-1] == 0
    with pytest.raises(TensorFileError) as caught:
        T.TensorFile.read(path)
    assert caught.value.code == "E_TENSORS_TOO_LARGE"
    with pytest.raises(TensorFileError) as caught:
        T.TensorFile.read(path, max_bytes=1 << 62)
    assert caught.value.code in {"E_TENSORS_MEMORY", "E_TENSORS_CHANGED"}
    path.write_bytes(file_bytes({"a": ENTRY}))
    os.truncate(path, size)
    with pytest.raises(TensorFileError) as caught:
        T.TensorFile.open(path)
    assert caught.value.code == "E_TENSORS_LAYOUT"
    assert time.perf_counter() - start < 5
