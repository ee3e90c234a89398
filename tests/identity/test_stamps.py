"""What is remembered of files, and when it is not believed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from deltahub import identity as I
from deltahub import tensors as T
from deltahub.errors import IdentityError
from deltahub.identity import stamps
from tests.identity.cases import old, refused, saved, section, values


def test_the_second_check_is_free(tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {f"layer.{i}.weight": torch.randn(64, 64) for i in range(200)}
    folder = saved(tmp_path / "a", tensors)
    declared = section(folder, tuple(tensors)[:150], cache=False)
    old(folder)
    assert not own_cache.exists()
    first = I.check(declared, files=folder)
    assert len(list(own_cache.iterdir())) == 1

    def never(*_: object, **__: object) -> None:
        raise AssertionError("the file was opened")

    with monkeypatch.context() as patch:
        patch.setattr(T.TensorFile, "open", never)
        best = float("inf")
        for _ in range(5):
            start = time.process_time()
            assert I.check(declared, files=folder) == first
            best = min(best, time.process_time() - start)
        assert best < 0.03  # 2 ms on a quiet machine
    assert I.check(declared, files=folder, level=I.Level.L4).level is I.Level.L4
    with monkeypatch.context() as patch:
        patch.setattr(T.TensorFile, "open", never)
        I.check(declared, files=folder, level=I.Level.L4)


def test_a_stamp_does_not_outlive_its_file(tmp_path: Path) -> None:
    folder = saved(tmp_path / "a", values())
    declared = section(folder, cache=False)
    old(folder)
    I.check(declared, files=folder)
    path = folder / "model.safetensors"
    times = path.stat()
    data = bytearray(path.read_bytes())
    view = T.TensorFile.open(path)["layer.0.weight"]
    data[view.begin] ^= 1
    with path.open("r+b") as file:
        file.write(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # a forged time: the inode's own change time shows it
    refused("E_BACKBONE_MISMATCH", declared, files=folder)


def test_a_broken_stamp_is_no_stamp(tmp_path: Path, own_cache: Path) -> None:
    folder = saved(tmp_path / "a", values())
    declared = section(folder, cache=False)
    old(folder)
    I.check(declared, files=folder)
    (stamp,) = own_cache.iterdir()
    good = stamp.read_text(encoding="utf-8")
    for text in (
        "",
        "{",
        "[]",
        '{"version":1}',
        good[:-9],
        good.replace('"version":1', '"version":0'),
        good.replace("F32", "F3"),
    ):
        stamp.write_text(text, encoding="utf-8")
        if 'F3"' in text:
            with pytest.raises(IdentityError):
                I.check(declared, files=folder)
            continue
        assert I.check(declared, files=folder).root == "exact"


def test_a_fresh_file_is_not_stamped_and_a_full_cache_does_not_matter(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(tmp_path / "a", values())
    path = folder / "model.safetensors"
    key = stamps.stat_key(path)
    monkeypatch.setattr(stamps.time, "time", lambda: path.stat().st_ctime_ns / 1e9 + 0.001)
    stamps.store(key, stamps.Stamp({}))
    assert not own_cache.exists()
    monkeypatch.undo()
    monkeypatch.setenv("DELTAHUB_CACHE", str(path))  # a file: nothing can be kept below it
    old(folder)
    assert I.check(section(folder), files=folder).root == "exact"


def test_processes_share_stamps_without_spoiling_them(tmp_path: Path, own_cache: Path) -> None:
    tensors = {f"t{i}": torch.full((8,), float(i)) for i in range(40)}
    folder = saved(tmp_path / "a", tensors)
    old(folder)
    code = (
        "import sys; from deltahub import identity as I\n"
        "for i in range(int(sys.argv[2]), 40, 2): I.leaves(sys.argv[1], [f't{i}'])"
    )
    running = [
        subprocess.Popen([sys.executable, "-c", code, str(folder), start], cwd=Path(__file__).parents[2])
        for start in ("0", "1")
    ]
    assert [one.wait() for one in running] == [0, 0]
    (stamp,) = own_cache.iterdir()
    found = stamps.load(stamps.stat_key(folder / "model.safetensors"))
    assert found is not None
    assert len(found.leaves) >= 20
    assert I.leaves(folder, tensors) == I.leaves(folder, tensors, cache=False)
    assert stamp.suffix == ".json"


def test_no_torch_is_loaded(tmp_path: Path) -> None:
    saved(tmp_path, values())
    code = (
        "import sys; from deltahub import identity as I; d = I.describe(sys.argv[1], touched=['step']);"
        "I.check(d, files=sys.argv[1], level=I.Level.L4); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=Path(__file__).parents[2], check=True)
