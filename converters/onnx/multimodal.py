"""Graphs of models that see and write: what looks at an image, what embeds tokens, and the decoder over both.

One graph cannot be: where image features go among the tokens depends on the tokens. The caller puts them there, as
runtimes for such exports do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from deltahub.converters.onnx.graphs import Graph, Input, Output
from deltahub.converters.onnx.sequences import read_cache, states_of, text_generation

__all__ = ["image_text"]

_BATCH, _LENGTH, _IMAGES = "batch_size", "sequence_length", "num_images"


def image_text(model: Any) -> list[Graph]:
    """A LLaVA-like model: ``vision_encoder``, ``embed_tokens`` and ``decoder_model_merged``."""
    text, vision = model.config.text_config, model.config.vision_config
    side, width = vision.image_size, text.hidden_size
    decoder = text_generation(model, past=True)[0]
    embeds = Input(name="inputs_embeds", dims=(_BATCH, _LENGTH, width))
    positions = Input(name="position_ids", dims=(_BATCH, _LENGTH), values="positions")
    kept = [one for one in decoder.inputs if one.name not in {"input_ids", "position_ids"}]
    mask, caches = kept[0], kept[1:]
    return [
        Graph(
            file="vision_encoder.onnx",
            call=_call_vision,
            inputs=(Input(name="pixel_values", dims=(_IMAGES, vision.num_channels, side, side)),),
            outputs=(Output(name="image_features", dims=(_IMAGES, "?", width)),),
            sizes=({_IMAGES: 2}, {_IMAGES: 1}, {_IMAGES: 3}, {_IMAGES: 5}),
        ),
        Graph(
            file="embed_tokens.onnx",
            call=_call_embed,
            inputs=(Input(name="input_ids", dims=(_BATCH, _LENGTH), values="ids", limit=text.vocab_size),),
            outputs=(Output(name="inputs_embeds", dims=(_BATCH, _LENGTH, width)),),
            sizes=tuple({_BATCH: b, _LENGTH: n} for b, n in ((2, 7), (1, 1), (3, 5), (1, 16))),
        ),
        replace(
            decoder,
            file="decoder_model_merged.onnx",
            call=partial(_call_decoder, len(caches) // 2),
            inputs=(mask, positions, embeds, *caches),
        ),
    ]


def _call_vision(model: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
    inner, config = model.model, model.config
    seen = inner.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states
    layers = config.vision_feature_layer
    chosen = [seen[i] for i in ([layers] if isinstance(layers, int) else layers)]
    if config.vision_feature_select_strategy == "default":
        chosen = [one[:, 1:] for one in chosen]  # without the class token
    return [inner.multi_modal_projector(torch.cat(chosen, -1))]


def _call_embed(model: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
    return [model.get_input_embeddings()(inputs["input_ids"])]


def _call_decoder(layers: int, model: nn.Module, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    given = {name: value for name, value in inputs.items() if not name.startswith("past_key_values.")}
    cache = read_cache(inputs, layers, "past_key_values")
    inner: Any = model
    out = inner.model.language_model(**given, past_key_values=cache, use_cache=True)
    return [inner.lm_head(out.last_hidden_state), *states_of(out.past_key_values)]
