"""Tiny random backbones of real classes, and packages made from deltas that act on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from deltahub import identity
from deltahub.delta import Delta
from deltahub.package import Package, write

CLASSES = {
    "bert": "BertForSequenceClassification",
    "bert-base": "BertModel",
    "llama": "LlamaForCausalLM",
    "gpt2": "GPT2LMHeadModel",
}


def config_of(name: str) -> Any:
    import transformers

    small = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    if name.startswith("bert"):
        return transformers.BertConfig(**small, intermediate_size=64, max_position_embeddings=64, num_labels=3)
    if name == "llama":
        return transformers.LlamaConfig(**small, intermediate_size=64, num_key_value_heads=2, pad_token_id=0)
    return transformers.GPT2Config(
        vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0
    )


def make_model(name: str, seed: int = 0) -> nn.Module:
    import transformers

    torch.manual_seed(seed)
    model: nn.Module = getattr(transformers, CLASSES[name])(config_of(name))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


def load_model(name: str, folder: Path, **options: Any) -> nn.Module:
    import transformers

    model: nn.Module = getattr(transformers, CLASSES[name]).from_pretrained(folder, **options)
    return model.eval()


def randomise(delta: Delta, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in delta.parameters():
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def package_of(
    folder: Path, model: nn.Module, deltas: list[Delta], base: Path, *, settings: Any = None, name: str = ""
) -> Package:
    """What ``Delta.save`` writes, without its ways of finding the backbone."""
    parts = [part for delta in deltas for part in delta.parts]
    several = len(deltas) > 1
    members: dict[str, Any] = {
        "backbone": {
            "source": {"class": f"transformers.{type(model).__name__}"},
            **identity.describe(base, touched=()),
        },
        "modules": [
            {
                "name": f"{part.name}-{i}" if several else part.name,
                "kind": part.kind.name,
                "version": part.kind.version,
                "config": dict(part.config),
                "targets": list(part.paths),
            }
            for i, part in enumerate(parts)
        ],
    }
    if settings is not None:
        members["settings"] = settings
    tensors = {}
    for module, part in zip(members["modules"], parts, strict=True):
        for _, site in part.sites:
            for tensor, value in zip(site.names, site.tensors(), strict=True):
                tensors[f"{module['name']}/{site.path}/{tensor}"] = value.detach()
    return write(folder, members, tensors)
