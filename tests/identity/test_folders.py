"""Which files of a folder are the weights, and what an index may name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from deltahub import identity as I
from deltahub import tensors as T
from deltahub.errors import IdentityError, TensorFileError
from tests.identity.cases import saved, sharded, values


def test_an_index_names_plain_files_beside_it(tmp_path: Path) -> None:
    tensors = values()
    saved(tmp_path, {"stolen": torch.zeros(1)})
    for i, bad in enumerate(
        (
            "../model.safetensors",
            "/etc/passwd",
            "a/b.safetensors",
            "..",
            ".",
            "",
            "a\\b",
            "C:x",
            "a\0b",
            "a\u202eb",
            7,
            None,
        )
    ):
        folder = sharded(tmp_path / str(i), tensors, step=bad)
        with pytest.raises(IdentityError) as caught:
            I.fingerprint(folder)
        assert caught.value.code == "E_IDENTITY_INDEX", bad
    for i, change in enumerate(({"step": "gone.safetensors"}, {"nothing": "model-00001-of-00003.safetensors"})):
        with pytest.raises(IdentityError, match="E_IDENTITY_INDEX"):
            I.fingerprint(sharded(tmp_path / f"m{i}", tensors, **change))
    folder = sharded(tmp_path / "json", tensors)
    index = folder / "model.safetensors.index.json"
    deep = "[" * 100_000
    for text in ("", "[]", "{}", '{"weight_map":[]}', '{"weight_map":{}}', '{"weight_map":{"a":"b","a":"b"}}', deep):
        index.write_text(text, encoding="utf-8")
        with pytest.raises(IdentityError, match="E_IDENTITY_INDEX"):
            I.fingerprint(folder)
    index.write_bytes(b"\xff")
    with pytest.raises(IdentityError, match="E_IDENTITY_INDEX"):
        I.fingerprint(folder)
    index.unlink()
    os.mkfifo(index)
    with pytest.raises(TensorFileError, match="E_TENSORS_NOT_REGULAR"):
        I.fingerprint(folder)


def test_a_pickle_named_by_an_index_needs_consent(tmp_path: Path) -> None:
    torch.save(values(), tmp_path / "a.bin")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map":{"step":"a.bin"}}', encoding="utf-8")
    with pytest.raises(IdentityError, match="E_IDENTITY_PICKLE"):
        I.fingerprint(tmp_path)


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (os.environ["DELTAHUB_CACHE"] + "-bomb",)


def test_a_pickle_that_runs_something_is_refused(tmp_path: Path) -> None:
    for content in (Bomb(), {"a": Bomb()}, [1], {"a": 1}, {1: torch.zeros(1)}):
        torch.save(content, tmp_path / "pytorch_model.bin")
        with pytest.raises(IdentityError, match="E_IDENTITY_PICKLE"):
            I.fingerprint(tmp_path, allow_pickle=True)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02junk")
    with pytest.raises(IdentityError, match="E_IDENTITY_PICKLE"):
        I.fingerprint(tmp_path, allow_pickle=True)
    assert not Path(os.environ["DELTAHUB_CACHE"] + "-bomb").exists()


def test_which_files_of_a_folder(tmp_path: Path) -> None:
    with pytest.raises(IdentityError, match="E_IDENTITY_NO_WEIGHTS"):
        I.fingerprint(tmp_path)
    T.write(tmp_path / "unusual.safetensors", values())
    one = I.fingerprint(tmp_path)
    T.write(tmp_path / "other.safetensors", values())
    with pytest.raises(IdentityError, match="E_IDENTITY_AMBIGUOUS"):
        I.fingerprint(tmp_path)
    T.write(tmp_path / "model.safetensors", {"a": torch.zeros(1)})
    assert I.fingerprint(tmp_path) != one
    with pytest.raises(IdentityError, match="E_IDENTITY_DUPLICATE"):
        I.from_files([tmp_path / "unusual.safetensors", tmp_path / "other.safetensors"])
