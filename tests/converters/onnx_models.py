"""Tiny random backbones of every task, and deltas with values on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import deltahub
from deltahub.delta import Delta

__all__ = ["MODELS", "TARGETS", "attached", "make"]

_SMALL: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 99,
    "max_position_embeddings": 64,
}  # fmt: skip
_VISION: dict[str, Any] = {k: _SMALL[k] for k in list(_SMALL)[:4]} | {"image_size": 16, "patch_size": 4}
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


def _unet() -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16, attention_head_dim=4, norm_num_groups=8,
    )  # fmt: skip


def _pixart() -> nn.Module:
    from diffusers import PixArtTransformer2DModel

    return PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
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


_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4, "vocab_size": 99}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 99, "n_positions": 128, **_SPECIAL}
_LLAMA = {**_SMALL, **_SPECIAL, "num_key_value_heads": 2, "max_position_embeddings": 128}

MODELS: dict[str, Callable[[], nn.Module]] = {
    "bert-classifier": _transformers("BertForSequenceClassification", "BertConfig", **_SMALL, num_labels=3),
    "bert": _transformers("BertModel", "BertConfig", **_SMALL),
    "roberta-tokens": _transformers("RobertaForTokenClassification", "RobertaConfig", **_SMALL, type_vocab_size=1),
    "distilbert-answers": _transformers(
        "DistilBertForQuestionAnswering",
        "DistilBertConfig",
        dim=32,
        n_layers=2,
        n_heads=4,
        hidden_dim=48,
        vocab_size=99,
    ),
    "llama": _transformers("LlamaForCausalLM", "LlamaConfig", **_LLAMA),
    "qwen2": _transformers("Qwen2ForCausalLM", "Qwen2Config", **_LLAMA),
    "gpt2": _transformers("GPT2LMHeadModel", "GPT2Config", **_GPT2),
    "t5": _transformers("T5ForConditionalGeneration", "T5Config", **_T5),
    "vit": _transformers("ViTForImageClassification", "ViTConfig", **_VISION, num_labels=3),
    "clip": _clip,
    "sentence": _sentence,
    "unet": _unet,
    "pixart": _pixart,
    "vae": _vae,
}
"""By name; two layers each."""

TARGETS: dict[str, Any] = {
    "bert-classifier": ["query", "value"], "bert": ["query", "value"], "roberta-tokens": ["query"],
    "distilbert-answers": ["q_lin"], "llama": ["q_proj", "down_proj"], "qwen2": ["v_proj"], "gpt2": ["c_attn"],
    "t5": ["q", "wo"], "vit": lambda path, module: isinstance(module, nn.Linear) and "layer" in path,
    "clip": ["q_proj"], "sentence": ["query"],
    "unet": ["to_q", "conv1"], "pixart": ["to_q", "linear_1"], "vae": ["conv1"],
}  # fmt: skip


def make(name: str, seed: int = 0) -> nn.Module:
    """A model with weights large enough that its layers matter."""
    torch.manual_seed(seed)
    model = MODELS[name]()
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
