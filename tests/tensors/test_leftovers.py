"""What killed writers leave: removed by the next one, unless somebody is still at it."""

from __future__ import annotations

from pathlib import Path

import pytest

from deltahub.tensors import leftovers
from deltahub.tensors.leftovers import held, sweep

HEX = "0123456789abcdef"


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leftovers, "_SETTLED", -1.0)


def test_dead_parts_go_and_live_ones_stay(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    target = tmp_path / "package"
    dead, alive, file = (tmp_path / f".package.{HEX[i:]}{HEX[:i]}.part" for i in range(3))
    dead.mkdir()
    (dead / "delta.safetensors").write_bytes(b"half")
    alive.mkdir()
    file.write_bytes(b"half")
    strangers = [tmp_path / ".package.part", tmp_path / f".other.{HEX}.part", tmp_path / f".package.{HEX}.parts"]
    for path in strangers:
        path.mkdir()
    with held(alive):
        sweep(target)
        assert sorted(tmp_path.iterdir()) == sorted([alive, *strangers])
    sweep(target)
    assert sorted(tmp_path.iterdir()) == sorted(strangers)


@pytest.mark.parametrize("ending", ["part.old", "old"])
def test_an_old_folder_comes_back_where_nothing_took_its_place(tmp_path: Path, ending: str) -> None:
    pytest.importorskip("fcntl")
    target, old = tmp_path / "package", tmp_path / f".package.{HEX}.{ending}"
    for exists in (False, True):
        old.mkdir()
        (old / "delta.json").write_text(str(exists))
        sweep(target)
        assert [p.name for p in tmp_path.iterdir()] == ["package"]
        assert (target / "delta.json").read_text() == "False"


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / f".package.{HEX}.part").symlink_to(tmp_path / "mine")
    sweep(tmp_path / "package")
    assert (tmp_path / "mine").is_dir()
    sweep(tmp_path / "none" / "package")


def test_what_was_just_made_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leftovers, "_SETTLED", 60.0)
    part = tmp_path / f".package.{HEX}.part"
    part.mkdir()
    sweep(tmp_path / "package")
    assert part.is_dir()
