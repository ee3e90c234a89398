"""Writing: bytes that repeat, a file that is whole or absent, and what cannot be written."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deltahub import tensors as T
from deltahub.errors import TensorFileError
from tests.tensors.cases import BIDI
from tests.tensors.values import every_dtype


def test_arrays_are_written_as_tensors_are(tmp_path: Path) -> None:
    import ml_dtypes

    values = {"a": np.arange(6.0).reshape(2, 3), "b": np.array(True), "h": np.ones(3, ml_dtypes.bfloat16)}
    one_way = T.write(tmp_path / "a", values)
    other = T.write(
        tmp_path / "b",
        {
            "h": torch.ones(3).bfloat16(),
            "b": torch.tensor(True),
            "a": torch.arange(6.0, dtype=torch.float64).view(2, 3),
        },
    )
    assert one_way.sha256 == other.sha256
    swapped = T.write(tmp_path / "c", {**values, "a": values["a"].astype(">f8")})
    assert swapped.sha256 == one_way.sha256
    assert T.write(tmp_path / "d", {**values, "a": np.asfortranarray(values["a"])}).sha256 == one_way.sha256


def test_bytes_repeat_whatever_the_order(tmp_path: Path) -> None:
    values = every_dtype()
    metadata = {f"k{i}": str(i) for i in range(9)}
    once = T.write(tmp_path / "x", values, metadata=metadata)
    again = T.write(tmp_path / "x", dict(reversed(values.items())), metadata=dict(reversed(metadata.items())))
    assert once == again
    code = (
        "import sys, numpy as np; from deltahub import tensors as T;"
        "print(T.write(sys.argv[1], {n: np.arange(5.) for n in 'ébca'}, metadata={n: n for n in 'cba'}).sha256)"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "y")],
            env={**os.environ, "PYTHONHASHSEED": seed},
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(digests) == 1
    with T.TensorFile.open(tmp_path / "x") as found:
        assert all(info.begin % (T.DTYPES[info.dtype] // 8 or 1) == 0 for info in found.values())


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"before")
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, old[1]))
    try:
        with pytest.raises(TensorFileError) as caught:
            T.write(path, {"a": torch.zeros(10_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert caught.value.code == "E_TENSORS_WRITE"
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(TensorFileError, match="E_TENSORS_WRITE"):
        T.write(tmp_path / "none" / "x", {"a": torch.zeros(1)})


def test_an_interrupt_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from deltahub.tensors import writing

    def stop(*_: object) -> memoryview:
        raise KeyboardInterrupt

    monkeypatch.setattr(writing, "value_bytes", stop)
    with pytest.raises(KeyboardInterrupt):
        T.write(tmp_path / "x", {"a": torch.zeros(1)})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("values", "metadata", "code"),
    [
        ({"": torch.zeros(1)}, None, "E_TENSORS_NAME"),
        ({"__metadata__": torch.zeros(1)}, None, "E_TENSORS_NAME"),
        ({BIDI: torch.zeros(1)}, None, "E_TENSORS_NAME"),
        ({"a": torch.zeros(1, device="meta")}, None, "E_TENSORS_VALUE"),
        ({"a": torch.zeros(2, 2).to_sparse()}, None, "E_TENSORS_VALUE"),
        ({"a": [1.0]}, None, "E_TENSORS_VALUE"),
        ({"a": torch.zeros([1] * 17)}, None, "E_TENSORS_SHAPE"),
        ({"a": torch.zeros(1, dtype=torch.complex128)}, None, "E_TENSORS_DTYPE"),
        ({"a": np.array(["x"])}, None, "E_TENSORS_DTYPE"),
        ({"a": np.array([object()])}, None, "E_TENSORS_DTYPE"),
        ({}, {"a": 1}, "E_TENSORS_METADATA"),
        ({}, {"a": "\ud800"}, "E_TENSORS_METADATA"),
        ({}, {"a": "x" * (17 << 20)}, "E_TENSORS_HEADER_LENGTH"),
    ],
)
def test_what_cannot_be_written_is_refused(tmp_path: Path, values: Any, metadata: Any, code: str) -> None:
    with pytest.raises(TensorFileError) as caught:
        T.write(tmp_path / "x", values, metadata=metadata)
    assert caught.value.code == code
    assert not list(tmp_path.iterdir())


def test_a_fake_tensor_has_no_bytes(tmp_path: Path) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        fake = torch.zeros(3)
    with pytest.raises(TensorFileError, match="E_TENSORS_VALUE"):
        T.write(tmp_path / "x", {"a": fake})
    assert not list(tmp_path.iterdir())
