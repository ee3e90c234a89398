"""Backbones to be identified, and the ways they are stored."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers

from deltahub import identity as I
from deltahub import tensors as T
from deltahub.errors import IdentityError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SMALL = {"vocab_size": 40, "bos_token_id": 0, "eos_token_id": 1}
LLAMA = {**SMALL, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
MODELS: dict[str, Callable[[], Any]] = {
    "bert": lambda: transformers.BertModel(transformers.BertConfig(**LLAMA)),
    "bert head": lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**LLAMA)),
    "bert tied": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**LLAMA)),
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)),
    "llama tied": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA, tie_word_embeddings=True)),
    "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**SMALL, n_embd=16, n_layer=2, n_head=2)),
    "t5": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    ),
    "mixtral, renamed and split": lambda: transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**LLAMA, num_key_value_heads=2, num_local_experts=3)
    ),
}


def values(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    make = torch.Generator().manual_seed(0)
    found = {f"layer.{i}.weight": torch.randn(6, 5, generator=make).to(dtype) for i in range(4)}
    return {**found, "step": torch.arange(3), "norm.bias": torch.ones(5).to(dtype)}


def saved(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    T.write(folder / "model.safetensors", tensors)
    return folder


def sharded(folder: Path, tensors: dict[str, torch.Tensor], count: int = 3, **changes: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    places = {name: f"model-{i % count + 1:05}-of-{count:05}.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(places.values()):
        T.write(folder / file, {name: tensors[name] for name, at in places.items() if at == file})
    index = {"metadata": {"total_size": 1}, "weight_map": {**places, **changes}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


TOUCHED = ("layer.0.weight", "layer.2.weight")


def section(folder: Path, touched: tuple[str, ...] = TOUCHED, **more: Any) -> dict[str, Any]:
    found = I.describe(folder, touched=touched, **more)
    return {"source": {"hub": "org/name", "commit": "1" * 40}, **found}


def refused(code: str, *args: Any, **options: Any) -> str:
    with pytest.raises(IdentityError) as caught:
        I.check(*args, **options)
    assert caught.value.code == code
    return str(caught.value)


def old(*paths: Path) -> None:
    """Stamps are not kept of files that changed a moment ago; let them be older."""
    time.sleep(0.06)
    for path in paths:
        assert path.exists()
