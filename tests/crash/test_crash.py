"""Killed at random moments, out of room, without permission: a target is absent or whole, and the error says why."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import deltahub
from deltahub.errors import ConverterError, PackageError
from deltahub.testing import serve_hub
from tests.crash.driver import Crashes

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="signals and mounts are Linux's")


@pytest.mark.slow
def test_twenty_kills(tmp_path: Path) -> None:
    with serve_hub(tmp_path / "hub") as hub:
        crashes = Crashes(tmp_path, hub)
        try:
            for _ in range(20):
                crashes.kill()
            assert crashes.leftovers() == []
        finally:
            crashes.close()


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 KiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    if os.geteuid():
        pytest.skip("mounting a small disk needs root")
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], check=False).returncode:
        pytest.skip("this machine does not let us mount")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def large() -> deltahub.Delta:
    torch.manual_seed(0)
    return deltahub.attach(nn.Sequential(nn.Linear(256, 256)), "lora", "0", rank=64)


def test_a_full_disk(small: Path) -> None:
    with pytest.raises(PackageError, match="space") as caught:
        large().save(small / "package")
    assert caught.value.code == "E_PACKAGE_WRITE"
    assert list(small.iterdir()) == []


def test_a_full_disk_under_a_merge_and_a_diff(small: Path, tmp_path: Path) -> None:
    """One clear error, and nothing of the new folder."""
    from deltahub.converters import diff, merge
    from tests.models import llama

    llama().save_pretrained(tmp_path / "base")
    llama(seed=1).save_pretrained(tmp_path / "tuned")
    model = llama()
    deltahub.attach(model, "lora", ["q_proj"], rank=2).save(tmp_path / "package", backbone=tmp_path / "base")
    with pytest.raises(ConverterError, match="space") as merged:
        merge(tmp_path / "package", small / "merged", backbone=tmp_path / "base")
    assert merged.value.code == "E_MERGE_OUTPUT"
    with pytest.raises(PackageError, match="space") as found:
        diff(tmp_path / "base", tmp_path / "tuned", small / "diff")
    assert found.value.code == "E_PACKAGE_WRITE"
    assert list(small.iterdir()) == []


def test_a_full_disk_keeps_the_old_package(small: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    deltahub.attach(model, "lora", "0", rank=2).save(small / "package")
    before = (small / "package" / "delta.json").read_bytes()
    with pytest.raises(PackageError):
        large().save(small / "package", overwrite=True)
    assert [p.name for p in small.iterdir()] == ["package"]
    assert (small / "package" / "delta.json").read_bytes() == before


def test_a_disk_that_is_read_only(small: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small)], check=True)
    with pytest.raises(PackageError, match=r"[Rr]ead-only") as caught:
        large().save(small / "package")
    assert caught.value.code == "E_PACKAGE_WRITE"


def test_a_folder_without_permission(tmp_path: Path) -> None:
    if not os.geteuid():
        pytest.skip("root may write everywhere")
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(PackageError) as caught:
        large().save(tmp_path / "closed" / "package")
    assert caught.value.code == "E_PACKAGE_WRITE"
