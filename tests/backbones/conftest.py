"""Tiny backbones on disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel


@dataclass(frozen=True)
class Change:
    """A setting as a manifest holds it."""

    path: str
    was: Any
    value: Any
    on: str = "config"


CONFIG: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 16,
}


@pytest.fixture(scope="session")
def bert_master(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("bert")
    BertModel(BertConfig(**CONFIG)).save_pretrained(folder)
    return folder


@pytest.fixture
def bert(bert_master: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    import shutil

    return Path(shutil.copytree(bert_master, tmp_path / "bert"))


@pytest.fixture(scope="session")
def change() -> type[Change]:
    return Change
