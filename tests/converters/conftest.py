"""Tiny backbones on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.converters.tiny import make_model


@pytest.fixture
def backbone(tmp_path: Path) -> Callable[..., Path]:
    """A folder with a tiny backbone: ``backbone("llama")``."""

    def make(name: str, *, dtype: torch.dtype = torch.float32, shard: str = "5GB", seed: int = 0) -> Path:
        folder = tmp_path / f"backbone-{name}-{seed}"
        make_model(name, seed).to(dtype).save_pretrained(folder, max_shard_size=shard)
        return folder

    return make
