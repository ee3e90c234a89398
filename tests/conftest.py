"""What every test stands on: a home of its own, no telemetry, one thread, and a Hub on loopback where asked for.

The environment is set when this file is read, before anything imports ``huggingface_hub`` or ``torch``.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from deltahub.testing import LoopbackHub

_HOME = tempfile.mkdtemp(prefix="deltahub-tests-")
atexit.register(shutil.rmtree, _HOME, ignore_errors=True)
for _name in [name for name in os.environ if name.startswith(("HF_", "HUGGING_FACE_"))]:
    del os.environ[_name]
os.environ.update(
    HF_HOME=_HOME,
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    HF_HUB_DISABLE_XET="1",
    HF_HUB_DISABLE_UPDATE_CHECK="1",
    HF_ENDPOINT="http://127.0.0.1:1",  # nothing listens there: a test that forgets endpoint= fails at once
    DELTAHUB_HOME=f"{_HOME}/deltahub",
    OMP_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[LoopbackHub]:
    """A Hub of this test's own; pass ``endpoint=hub.url, token=hub.token``."""
    from deltahub.testing import serve_hub

    with serve_hub(tmp_path / "hub") as running:
        yield running


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """An empty Hub cache."""
    return tmp_path / "cache"
