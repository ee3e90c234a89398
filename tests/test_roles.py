"""Every architecture in the table has modules for its roles; nothing is loaded, all models are on the meta device."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import deltahub
from deltahub.errors import TargetError
from deltahub.roles import architecture_of, targets_of
from tests.models import bert_classifier, llama

MODELS = [
    "bert",
    "roberta",
    "xlm-roberta",
    "electra",
    "deberta-v2",
    "distilbert",
    "albert",
    "modernbert",
    "gpt2",
    "gpt_neo",
    "gptj",
    "gpt_neox",
    "bloom",
    "falcon",
    "mpt",
    "opt",
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "phi",
    "phi3",
    "mixtral",
    "qwen2_moe",
    "t5",
    "mt5",
    "bart",
    "mbart",
    "whisper",
    "blenderbot",
    "vit",
    "swin",
    "beit",
    "clip",
    "siglip",
    "llava",
]
CORE = ("attention", "attention.output", "mlp.down", "embeddings")


def build(name: str) -> nn.Module:
    import transformers

    config = transformers.AutoConfig.for_model(name)
    for auto in ("ForCausalLM", "ForSeq2SeqLM", "ForMaskedLM", "ForImageClassification", "ForImageTextToText", ""):
        cls = getattr(transformers, f"AutoModel{auto}")
        if name in {"t5", "mt5", "bart", "mbart", "whisper", "blenderbot"} and auto == "ForCausalLM":
            continue
        if type(config) in cls._model_mapping:
            with torch.device("meta"):
                return cls.from_config(config)
    with torch.device("meta"):
        return transformers.WhisperForConditionalGeneration(config)


def paths_of(model: nn.Module, role: str, known: dict[str, nn.Module]) -> list[str]:
    return [target.path for target in targets_of(model, role, known)]


def modules(model: nn.Module) -> dict[str, nn.Module]:
    return {n: m for n, m in model.named_modules() if n}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODELS)
def test_an_architecture_has_its_roles(name: str) -> None:
    model = build(name)
    assert architecture_of(model) == name
    for role in CORE:
        # Mixtral's projections are 3-D parameters of its experts, not modules.
        role = "mlp.experts" if (name, role) == ("mixtral", "mlp.down") else role
        assert paths_of(model, role, modules(model)), role
    query = "attention.query"
    try:
        found = paths_of(model, query, modules(model))
    except TargetError:
        query = "attention.qkv"
        found = paths_of(model, query, modules(model))
    layers = getattr(getattr(model.config, "text_config", model.config), "num_hidden_layers", 1)
    assert len(found) >= (1 if name in {"albert", "swin"} else layers), found


@pytest.mark.filterwarnings("ignore")
def test_diffusion_models_have_their_roles() -> None:
    import diffusers

    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel()
        dit = diffusers.PixArtTransformer2DModel(num_layers=2)
        flux = diffusers.FluxTransformer2DModel(num_layers=1, num_single_layers=1)
    for model, count in ((unet, 16), (dit, 2), (flux, 2)):
        assert len(paths_of(model, "attention.query", modules(model))) == count


def test_wrapped_models_at_any_depth() -> None:
    outer = nn.ModuleDict({"a": nn.ModuleDict({"b": bert_classifier()}), "c": llama()})
    found = paths_of(outer, "attention.query", modules(outer))
    assert found[0] == "a.b.bert.encoder.layer.0.attention.self.query"
    assert found[-1] == "c.model.layers.1.self_attn.q_proj"
    delta = deltahub.attach(outer, "lora", "role:attention.query", rank=2)
    assert len(delta.sites) == 4


def test_what_nothing_plays_is_an_error_with_the_nearest_name() -> None:
    model = bert_classifier()
    with pytest.raises(TargetError) as caught:
        deltahub.attach(model, "lora", "role:attention.querry", rank=2)
    assert caught.value.code == "E_TARGET_ROLE"
    assert "attention.query" in str(caught.value)
    with pytest.raises(TargetError) as caught:
        deltahub.attach(nn.Sequential(nn.Linear(2, 2)), "lora", "role:attention.query", rank=2)
    assert caught.value.code == "E_TARGET_ARCHITECTURE"
