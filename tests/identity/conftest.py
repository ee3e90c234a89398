"""Stamps of a test stay in its own folder."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DELTAHUB_CACHE", str(tmp_path / "stamps-of-this-test"))
    return tmp_path / "stamps-of-this-test" / "stamps"
