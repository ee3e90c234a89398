"""What every test stands on: a home of its own, no telemetry, one thread, and a Hub on loopback where asked for.

The environment is set when this file is read, before anything imports ``huggingface_hub`` or ``torch``.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
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
    DELTAHUB_CACHE=f"{_HOME}/deltahub",
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


@pytest.fixture
def make_package(tmp_path: Path) -> Callable[..., Path]:
    """Write a small valid package: ``make_package("name", seed=1, rank=4)`` gives its folder."""
    import hashlib
    import json

    import numpy as np

    from deltahub.tensors import write

    def make(name: str = "package", *, seed: int = 0, rank: int = 4, shards: int = 1, size: int = 8) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        random = np.random.default_rng(seed)
        sites = [f"layer.{n}.query" for n in range(2)]
        tensors = {f"attention/{site}/down": random.standard_normal((rank, size), np.float32) for site in sites}
        tensors |= {f"attention/{site}/up": random.standard_normal((size, rank), np.float32) for site in sites}
        names = sorted(tensors)
        files = []
        for n in range(shards):
            path = "delta.safetensors" if shards == 1 else f"delta-{n + 1:05d}-of-{shards:05d}.safetensors"
            digest = write(folder / path, {key: tensors[key] for key in names[n::shards]})
            files.append({"path": path, "size": digest.size, "sha256": digest.sha256})
        root = {key: hashlib.sha256(key.encode()).hexdigest() for key in ("exact", "bf16", "structure")}
        manifest = {
            "spec_version": "1.0",
            "backbone": {
                "source": {"hub": "org/base", "commit": "0" * 40, "class": "transformers.BertModel"},
                "identity": {"algorithm": "sha256-tree-1", **root, "tensors": 3},
            },
            "modules": [
                {
                    "name": "attention",
                    "kind": "lora",
                    "version": 1,
                    "config": {"rank": rank, "scale": 2.0},
                    "targets": ["layer.{0..1}.query"],
                }
            ],
            "files": files,
        }
        (folder / "delta.json").write_text(json.dumps(manifest, indent=2))
        return folder

    return make
