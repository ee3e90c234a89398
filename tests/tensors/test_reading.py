"""Reading: every dtype, both ways in, and what is checked as the bytes are used."""

from __future__ import annotations

import hashlib
import io
import os
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch

from deltahub import tensors as T
from deltahub.errors import TensorFileError
from deltahub.tensors.dtypes import f8_table
from tests.tensors.cases import file_bytes, one
from tests.tensors.values import every_dtype, same


def test_every_dtype_goes_out_and_comes_back(tmp_path: Path) -> None:
    values = every_dtype()
    digest = T.write(tmp_path / "x.safetensors", values, metadata={"k": "v"})
    assert (digest.size, digest.sha256) == T.sha256_file(tmp_path / "x.safetensors")
    theirs = safetensors.torch.load_file(tmp_path / "x.safetensors")
    for found in (
        T.TensorFile.open(digest.path),
        T.TensorFile.read(digest.path, size=digest.size, sha256=digest.sha256),
    ):
        assert found.metadata == {"k": "v"}
        assert found.keys() == values.keys() == theirs.keys()
        for name, tensor in found.tensors().items():
            assert same(tensor, values[name]), name
            assert same(theirs[name], values[name]), name
    assert found.digest == digest
    assert T.TensorFile.open(digest.path).digest is None


def test_numpy_agrees_with_torch(tmp_path: Path) -> None:
    values = every_dtype()
    T.write(tmp_path / "x.safetensors", values)
    with T.TensorFile.read(tmp_path / "x.safetensors") as found:
        for name, tensor in values.items():
            if name == "F4":
                with pytest.raises(TensorFileError, match="E_TENSORS_DTYPE"):
                    found.numpy(name)
                continue
            wide = tensor.float() if found[name].dtype == "BF16" or found[name].dtype.startswith("F8") else tensor
            np.testing.assert_array_equal(found.numpy(name), wide.resolve_conj().numpy())


@pytest.mark.parametrize("dtype", ["F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"])
def test_the_tables_of_eight_bit_floats_are_torchs(dtype: str) -> None:
    table = f8_table(dtype)
    assert table is not None
    np.testing.assert_array_equal(
        table, torch.arange(256, dtype=torch.uint8).view(T.torch_dtype(dtype)).float().numpy()
    )


def test_misaligned_tensors_are_read(tmp_path: Path) -> None:
    header = {
        "a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "b": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]},
    }
    (tmp_path / "x").write_bytes(file_bytes(header, b"\7" + struct.pack("<2f", 1, 2)))
    for found in (T.TensorFile.open(tmp_path / "x"), T.TensorFile.read(tmp_path / "x")):
        assert found.torch("b").tolist() == found.numpy("b").tolist() == [1, 2]
        assert found.torch("b").data_ptr() % 4 == 0


def test_tensors_share_the_files_bytes_and_do_not_warn(tmp_path: Path) -> None:
    T.write(tmp_path / "x", {"a": torch.zeros(8), "b": torch.ones(8)})
    for way in (T.TensorFile.open, T.TensorFile.read):
        with way(tmp_path / "x") as found:
            a, b = found.torch("a"), found.torch("a")
            a[0] = 5
            assert b[0] == 5
            assert a.untyped_storage().nbytes() == 32
        with pytest.raises(TensorFileError, match="E_TENSORS_CLOSED"):
            found.data("a")
        assert a[0] == 5
    assert T.TensorFile.open(tmp_path / "x").torch("a")[0] == 0
    assert a.to("cpu") is a
    assert found["b"] == T.TensorInfo(dtype="F32", shape=(8,), begin=found["b"].begin, end=found["b"].begin + 32)


def test_unknown_names(tmp_path: Path) -> None:
    T.write(tmp_path / "x", {"a": torch.zeros(8)})
    with T.TensorFile.open(tmp_path / "x") as found:
        assert "b" not in found
        with pytest.raises(KeyError):
            found["b"]
        for way in (found.data, found.numpy, found.torch, found.finite):
            with pytest.raises(TensorFileError, match="E_TENSORS_UNKNOWN"):
                way("b")


@pytest.mark.parametrize("value", [2, 255])
def test_booleans_are_0_or_1(tmp_path: Path, value: int) -> None:
    (tmp_path / "x").write_bytes(
        file_bytes({"a": {"dtype": "BOOL", "shape": [2], "data_offsets": [0, 2]}}, bytes([1, value]))
    )
    found = T.TensorFile.open(tmp_path / "x")
    for way in (found.data, found.numpy, found.torch):
        with pytest.raises(TensorFileError, match="E_TENSORS_BOOL"):
            way("a")


def test_finite(tmp_path: Path) -> None:
    floats = [name for name in T.DTYPES if name.startswith(("F8", "F16", "F32", "F64", "BF", "C"))]
    for dtype in floats:
        codes = torch.arange(256, dtype=torch.uint8) if dtype.startswith("F8") else None
        kind = T.torch_dtype(dtype)
        values = (
            {str(i): codes[i : i + 1].view(kind) for i in range(256)}
            if codes is not None
            else {
                str(v): torch.tensor([0.0, v, 1.0]).to(kind)
                for v in (1.0, -3e4, float("nan"), float("inf"), -float("inf"))
            }
        )
        T.write(tmp_path / "x", values)
        with T.TensorFile.open(tmp_path / "x") as found:
            for name, value in values.items():
                wide = value if dtype.startswith("C") else value.float()
                assert found.finite(name) == bool(torch.isfinite(wide).all()), (dtype, name)
    T.write(
        tmp_path / "x",
        {"i": torch.tensor([-1]), "big": torch.cat([torch.zeros(1 << 19), torch.tensor([float("nan")])])},
    )
    with T.TensorFile.open(tmp_path / "x") as found:
        assert found.finite("i")
        assert not found.finite("big")


def test_declared_size_and_digest_are_held(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    digest = T.write(path, {"a": torch.arange(8.0)})
    T.TensorFile.read(path, size=digest.size, sha256=digest.sha256)
    with pytest.raises(TensorFileError, match="E_TENSORS_SIZE"):
        T.TensorFile.read(path, size=digest.size + 1)
    data = bytearray(path.read_bytes())
    for at in (20, len(data) - 1):  # a bit of the header, a bit of a tensor
        altered = bytearray(data)
        altered[at] ^= 1
        path.write_bytes(altered)
        with pytest.raises(TensorFileError, match="E_TENSORS_SHA256"):
            T.TensorFile.read(path, size=digest.size, sha256=digest.sha256)
    path.write_bytes(data)
    with pytest.raises(TensorFileError, match="E_TENSORS_TOO_LARGE"):
        T.TensorFile.read(path, max_bytes=digest.size - 1)


def test_a_file_that_changes_its_size_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x"
    T.write(path, {"a": torch.zeros(8)})
    real = os.fstat

    class Longer:
        def __init__(self, found: os.stat_result, by: int) -> None:
            self.st_mode, self.st_size = found.st_mode, found.st_size + by

    data = file_bytes({"a": {"dtype": "U8", "shape": [9], "data_offsets": [0, 9]}}, bytes(9))
    for cut, by in ((-4, 4), (None, -1)):
        path.write_bytes(data[:cut])
        monkeypatch.setattr(os, "fstat", lambda fd, by=by: Longer(real(fd), by))
        with pytest.raises(TensorFileError) as caught:
            T.TensorFile.read(path)
        assert caught.value.code in {"E_TENSORS_CHANGED", "E_TENSORS_LAYOUT"}
        monkeypatch.undo()


def test_dtypes_that_torch_lacks(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(one("F6_E2M3", [4], 3))
    with T.TensorFile.open(tmp_path / "x") as found:
        assert len(found.data("a")) == 3
        for way in (found.torch, found.numpy):
            with pytest.raises(TensorFileError, match="E_TENSORS_DTYPE"):
                way("a")
    (tmp_path / "x").write_bytes(one("F4", [2, 3], 3))
    with T.TensorFile.open(tmp_path / "x") as found, pytest.raises(TensorFileError, match="pairs"):
        found.torch("a")


def test_streams(tmp_path: Path) -> None:
    data = os.urandom(3_000_000)
    target = io.BytesIO()
    assert T.copy_stream(io.BytesIO(data), target) == (len(data), hashlib.sha256(data).hexdigest())
    assert target.getvalue() == data
    with pytest.raises(TensorFileError, match="E_TENSORS_TOO_LARGE"):
        T.copy_stream(io.BytesIO(data), io.BytesIO(), limit=len(data) - 1)
    (tmp_path / "x").write_bytes(data)
    assert T.sha256_file(tmp_path / "x") == (len(data), hashlib.sha256(data).hexdigest())
    with pytest.raises(TensorFileError, match="E_TENSORS_NOT_REGULAR"):
        T.sha256_file(tmp_path)


def test_thousands_of_tensors_are_read_quickly(tmp_path: Path) -> None:
    """Generous on purpose: a busy machine must pass, a reader that is slow per tensor must not."""
    values = {f"block.{i}/lora/{side}": np.zeros((8, 8), np.float32) for i in range(1500) for side in ("down", "up")}
    T.write(tmp_path / "x", values)
    best = float("inf")
    for _ in range(5):
        start = time.process_time()
        T.TensorFile.open(tmp_path / "x")
        best = min(best, time.process_time() - start)
    assert best < 0.06


def test_no_torch_is_loaded() -> None:
    code = (
        "import sys, numpy as np, tempfile; from deltahub import tensors as T; p = tempfile.mktemp();"
        "T.write(p, {'a': np.zeros(3)}); assert T.TensorFile.read(p).numpy('a').sum() == 0;"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=True)
