"""Tiny random backbones of every task, and deltas with values on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import deltahub
from deltahub.delta import Delta

__all__ = ["FURTHER", "MODELS", "PREFIXED", "TARGETS", "attached", "make"]

_SMALL: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 99,
    "max_position_embeddings": 64,
}  # fmt: skip
_VISION: dict[str, Any] = {k: _SMALL[k] for k in list(_SMALL)[:4]} | {"image_size": 8, "patch_size": 4}
_SPECIAL = {"bos_token_id": 0, "eos_token_id": 98, "pad_token_id": 0}


def _transformers(name: str, config: str, **fields: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        return getattr(transformers, name)(getattr(transformers, config)(**fields))

    return build


def _clip() -> nn.Module:
    import transformers

    text = {**_SMALL, **_SPECIAL}
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=_VISION, projection_dim=24))


def _llava() -> nn.Module:
    import transformers

    vision = transformers.CLIPVisionConfig(**_VISION, projection_dim=32)
    text = transformers.LlamaConfig(**_LLAMA)
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=97)
    return transformers.LlavaForConditionalGeneration(config)


def _unet(levels: int = 1) -> nn.Module:
    from diffusers import UNet2DConditionModel

    downs, ups = ("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(16, 32)[:levels],
        down_block_types=downs[:levels], up_block_types=ups[-levels:], cross_attention_dim=16, attention_head_dim=4,
        norm_num_groups=8, mid_block_type=None,
    )  # fmt: skip


def _pixart() -> nn.Module:
    from diffusers import PixArtTransformer2DModel

    return PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=1, sample_size=8,
        cross_attention_dim=16, patch_size=2, caption_channels=12, use_additional_conditions=False,
    )  # fmt: skip


def _vae() -> nn.Module:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(16, 16), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=8, sample_size=16,
    )  # fmt: skip


def _sentence() -> nn.Module:
    import tempfile
    from pathlib import Path

    import transformers
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Normalize, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    with tempfile.TemporaryDirectory() as place:
        transformers.BertModel(transformers.BertConfig(**_SMALL)).save_pretrained(place)
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]
        (Path(place) / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
        transformers.BertTokenizerFast(str(Path(place) / "vocab.txt")).save_pretrained(place)
        return SentenceTransformer(modules=[Transformer(place), Pooling(32), Normalize()], device="cpu")


_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 4, "vocab_size": 99}
_GPT2 = {"n_embd": 32, "n_layer": 1, "n_head": 4, "vocab_size": 99, "n_positions": 128, **_SPECIAL}
_LLAMA = {**_SMALL, **_SPECIAL, "num_key_value_heads": 2, "max_position_embeddings": 128}

MODELS: dict[str, Callable[[], nn.Module]] = {
    "bert-classifier": _transformers("BertForSequenceClassification", "BertConfig", **_SMALL, num_labels=3),
    "llama": _transformers("LlamaForCausalLM", "LlamaConfig", **{**_LLAMA, "num_hidden_layers": 2}),
    "t5": _transformers("T5ForConditionalGeneration", "T5Config", **_T5),
    "vit": _transformers("ViTForImageClassification", "ViTConfig", **_VISION, num_labels=3),
    "clip": _clip,
    "llava": _llava,
    "sentence": _sentence,
    "text-encoder": _transformers("CLIPTextModel", "CLIPTextConfig", **_SMALL, **_SPECIAL),
    "unet": _unet,
    "pixart": _pixart,
    "vae": _vae,
}
"""By name: the architectures of the matrix, one layer each, and two where a cache has to keep them apart."""

FURTHER: dict[str, Callable[[], nn.Module]] = {
    "unet-levels": lambda: _unet(2),
    "bert": _transformers("BertModel", "BertConfig", **_SMALL),
    "gpt2": _transformers("GPT2LMHeadModel", "GPT2Config", **_GPT2),
    "roberta-tokens": _transformers("RobertaForTokenClassification", "RobertaConfig", **_SMALL, type_vocab_size=1),
    "distilbert-answers": _transformers(
        "DistilBertForQuestionAnswering", "DistilBertConfig", dim=32, n_layers=1, n_heads=4, hidden_dim=48,
        vocab_size=99,
    ),
}  # fmt: skip
"""Models of further tasks."""

TARGETS: dict[str, Any] = {
    "bert-classifier": ["query"], "llama": ["layers.0.self_attn.q_proj", "layers.1.mlp.down_proj"],
    "t5": ["encoder.block.0.layer.0.SelfAttention.q", "decoder.block.0.layer.2.DenseReluDense.wo"],
    "vit": lambda path, module: isinstance(module, nn.Linear) and path.endswith("q_proj"), "clip": ["q_proj"],
    "llava": ["language_model.layers.0.self_attn.q_proj"], "sentence": ["query"], "text-encoder": ["q_proj"],
    "unet": ["down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", "down_blocks.0.resnets.0.conv1"],
    "unet-levels": ["to_q", "conv1"], "pixart": ["attn1.to_q", "linear_1"],
    "vae": ["decoder.mid_block.resnets.0.conv1"],
    "gpt2": ["c_attn"], "roberta-tokens": ["query"], "distilbert-answers": ["q_lin"], "bert": ["query"],
}  # fmt: skip
"""Few hosts each: more of the same cost time and show nothing further."""

PREFIXED = ("bert-classifier", "llama", "t5", "llava", "sentence")
"""Those whose attention takes further keys and values."""


def make(name: str, seed: int = 0) -> nn.Module:
    """A model with weights large enough that its layers matter."""
    torch.manual_seed(seed)
    model = {**MODELS, **FURTHER}[name]()
    for parameter, values in model.named_parameters():
        if "norm" not in parameter.lower():
            nn.init.normal_(values, std=0.1)
    return model.eval()


def attached(model: nn.Module, kind: str, targets: Any, *, name: str = "one", seed: int = 1, **config: Any) -> Delta:
    """A delta that does something."""
    delta = deltahub.attach(model, kind, targets, name=name, **config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in delta.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.2)
    return delta
