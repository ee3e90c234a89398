"""The backbones that are measured: a user's own, or Llama-shaped ones with random weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["LINEARS", "SHAPES", "Shape", "build", "model_of"]

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""All linear layers of a Llama's blocks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """A Llama-shaped model with random weights; on ``meta`` it has none."""

    title: str
    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    vocab: int = 32000
    dtype: str = "float32"
    meta: bool = False


SHAPES: dict[str, Shape] = {
    "12": Shape(title="12 layers, 110 M, fp32", layers=12, hidden=768, inner=2048, heads=12, kv_heads=12),
    "22": Shape(
        title="22 layers, 1.1 B (TinyLlama), bf16",
        layers=22, hidden=2048, inner=5632, heads=32, kv_heads=4, dtype="bfloat16",
    ),
    "22-narrow": Shape(
        title="22 layers, quarter width, 73 M, fp32", layers=22, hidden=512, inner=1408, heads=8, kv_heads=1
    ),
    "80-meta": Shape(
        title="80 layers, 70 B, without values",
        layers=80, hidden=8192, inner=28672, heads=64, kv_heads=8, dtype="bfloat16", meta=True,
    ),
    "tiny": Shape(title="2 layers, tiny", layers=2, hidden=32, inner=64, heads=2, kv_heads=2, vocab=64),
}  # fmt: skip
"""By name; ``layers:N`` is any other number of layers of quarter width."""


def model_of(name: str) -> Any:
    """A backbone: ``shape:12``, ``layers:40``, or a folder or repository as ``deltahub.load`` takes it."""
    kind, _, rest = name.partition(":")
    if kind == "shape":
        return build(SHAPES[rest])
    if kind == "layers":
        narrow = SHAPES["22-narrow"]
        return build(
            Shape(
                title=f"{rest} layers", layers=int(rest), hidden=64, inner=128, heads=2, kv_heads=2, vocab=narrow.vocab
            )
        )
    from deltahub.backbones import build as built
    from deltahub.backbones import resolve

    return built({}, resolve({}, override=name)).model.eval()


def build(shape: Shape, seed: int = 0) -> Any:
    """The model with random weights, filled in place: the library's own initialisation would take longer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, initialization

    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocab,
        max_position_embeddings=2048,
    )
    dtype = getattr(torch, shape.dtype)
    with initialization.no_init_weights(), torch.device("meta" if shape.meta else "cpu"):
        model: Any = LlamaForCausalLM(config).to(dtype).eval()
    if shape.meta:
        return model
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p.fill_(1.0)
            else:
                p.uniform_(-0.03, 0.03, generator=generator)
    return model
