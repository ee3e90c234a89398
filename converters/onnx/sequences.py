"""Graphs of models that write text: decoders with and without a cache of keys and values, encoder-decoders."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from deltahub.converters.onnx.graphs import Graph, Input, Output

__all__ = ["cache_names", "read_cache", "seq2seq", "states_of", "text_generation"]

_BATCH, _LENGTH, _PAST = "batch_size", "sequence_length", "past_sequence_length"
_TOTAL = f"{_PAST} + {_LENGTH}"
_SOURCE = "encoder_sequence_length"


def cache_names(layers: int, prefix: str, middle: str = "") -> list[str]:
    """Names of a cache's tensors: ``past_key_values.0.key``, and so on for every layer."""
    return [f"{prefix}.{i}{middle}.{which}" for i in range(layers) for which in ("key", "value")]


def _heads(config: Any, *, decoder: bool = False) -> tuple[int, int, int]:
    """Layers, heads of keys and values, and their width."""
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    layers = getattr(text, "num_decoder_layers" if decoder else "num_hidden_layers", None) or text.decoder_layers
    heads = text.num_attention_heads
    width = getattr(text, "d_kv", None) or getattr(text, "head_dim", None) or text.hidden_size // heads
    kept = heads if decoder else getattr(text, "num_key_value_heads", None) or heads
    return int(layers), int(kept), int(width)


def _words(config: Any) -> int:
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    return int(text.vocab_size)


def text_generation(model: Any, *, past: bool) -> list[Graph]:
    """A decoder: one graph serves the prompt (a past of length 0) and every further token."""
    layers, heads, width = _heads(model.config)
    total = _TOTAL if past else _LENGTH
    inputs = [
        Input(name="input_ids", dims=(_BATCH, _LENGTH), values="ids", limit=_words(model.config)),
        Input(name="attention_mask", dims=(_BATCH, total), values="mask"),
    ]
    if "position_ids" in inspect.signature(model.forward).parameters:
        inputs.append(Input(name="position_ids", dims=(_BATCH, _LENGTH), values="positions"))
    outputs = [Output(name="logits", dims=(_BATCH, _LENGTH, "?"), tokens=1)]
    if past:
        kept = cache_names(layers, "past_key_values")
        inputs += [Input(name=name, dims=(_BATCH, heads, _PAST, width)) for name in kept]
        made = cache_names(layers, "present")
        outputs += [Output(name=name, dims=(_BATCH, heads, _TOTAL, width), tokens=2) for name in made]
    sizes: list[Mapping[str, int]] = [
        {_BATCH: 2, _LENGTH: 5, _PAST: 4},
        {_BATCH: 1, _LENGTH: 7, _PAST: 0},
        {_BATCH: 3, _LENGTH: 1, _PAST: 10},
        {_BATCH: 2, _LENGTH: 9, _PAST: 0},
        {_BATCH: 1, _LENGTH: 1, _PAST: 1},
    ]
    return [
        Graph(
            file="model.onnx",
            call=partial(_call_decoder, layers if past else 0),
            inputs=tuple(inputs),
            outputs=tuple(outputs),
            sizes=tuple(sizes if past else ({k: v for k, v in s.items() if k != _PAST} for s in sizes)),
            left=True,
        )
    ]


def _call_decoder(layers: int, model: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    given = {name: value for name, value in inputs.items() if not name.startswith("past_key_values.")}
    if not layers:
        return [model(**given, use_cache=False).logits]
    cache = read_cache(inputs, layers, "past_key_values")
    out = model(**given, past_key_values=cache, use_cache=True)
    return [out.logits, *states_of(out.past_key_values)]


def read_cache(inputs: Mapping[str, Tensor], layers: int, prefix: str, middle: str = "") -> Any:
    from transformers import DynamicCache

    names = cache_names(layers, prefix, middle)
    values = [inputs[name] for name in names]
    return DynamicCache(list(zip(values[::2], values[1::2], strict=True)))


def states_of(cache: Any) -> list[Tensor]:
    return [state for layer in cache.layers for state in (layer.keys, layer.values)]


def seq2seq(model: Any) -> list[Graph]:
    """An encoder-decoder: the encoder, the first step of the decoder, and every further one, over one data file."""
    layers, heads, width = _heads(model.config, decoder=True)
    hidden = model.config.hidden_size
    encoder = (
        Input(name="input_ids", dims=(_BATCH, _SOURCE), values="ids", limit=model.config.vocab_size),
        Input(name="attention_mask", dims=(_BATCH, _SOURCE), values="mask"),
    )
    mask = Input(name="encoder_attention_mask", dims=(_BATCH, _SOURCE), values="mask")
    ids = Input(name="input_ids", dims=(_BATCH, _LENGTH), values="ids", limit=model.config.vocab_size)
    states = Input(name="encoder_hidden_states", dims=(_BATCH, _SOURCE, hidden))
    own, cross = (_BATCH, heads, _PAST, width), (_BATCH, heads, _SOURCE, width)
    past = [
        Input(name=f"past_key_values.{i}.{which}.{what}", dims=dims)
        for i in range(layers)
        for which, dims in (("decoder", own), ("encoder", cross))
        for what in ("key", "value")
    ]
    logits = Output(name="logits", dims=(_BATCH, _LENGTH, "?"))
    sizes = ({_BATCH: 2, _SOURCE: 7, _LENGTH: 5, _PAST: 3}, {_BATCH: 1, _SOURCE: 3, _LENGTH: 1, _PAST: 1},
             {_BATCH: 3, _SOURCE: 11, _LENGTH: 4, _PAST: 6}, {_BATCH: 4, _SOURCE: 2, _LENGTH: 1, _PAST: 9})  # fmt: skip

    def present(middle: str, dims: tuple[str | int, ...]) -> list[Output]:
        return [Output(name=name, dims=dims) for name in cache_names(layers, "present", middle)]

    first = [*present(".decoder", (_BATCH, heads, _LENGTH, width)), *present(".encoder", cross)]
    return [
        Graph(
            file="encoder_model.onnx",
            call=_call_encoder,
            inputs=encoder,
            outputs=(Output(name="last_hidden_state", dims=(_BATCH, _SOURCE, hidden)),),
            sizes=_only(sizes, _BATCH, _SOURCE),
        ),
        Graph(
            file="decoder_model.onnx",
            call=partial(_call_first, layers),
            inputs=(mask, ids, states),
            outputs=(logits, *first),
            sizes=_only(sizes, _BATCH, _SOURCE, _LENGTH),
        ),
        Graph(
            file="decoder_with_past_model.onnx",
            call=partial(_call_next, layers),
            inputs=(mask, ids, *past),
            outputs=(logits, *present(".decoder", (_BATCH, heads, _TOTAL, width))),
            sizes=sizes,
        ),
    ]


def _only(sizes: Sequence[Mapping[str, int]], *names: str) -> tuple[Mapping[str, int], ...]:
    return tuple({name: size[name] for name in names} for size in sizes)


def _call_encoder(model: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
    return [model.get_encoder()(**inputs).last_hidden_state]


def _call_first(layers: int, model: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
    from transformers import DynamicCache, EncoderDecoderCache

    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    out = model(
        attention_mask=inputs["encoder_attention_mask"],
        decoder_input_ids=inputs["input_ids"],
        encoder_outputs=(inputs["encoder_hidden_states"],),
        past_key_values=cache,
        use_cache=True,
    )
    made = out.past_key_values
    return [out.logits, *states_of(made.self_attention_cache), *states_of(made.cross_attention_cache)]


def _call_next(layers: int, model: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
    from transformers import EncoderDecoderCache

    own = read_cache(inputs, layers, "past_key_values", ".decoder")
    cross = read_cache(inputs, layers, "past_key_values", ".encoder")
    # What the encoder said is in the cache; the decoder asks only how long it was.
    length = inputs["encoder_attention_mask"]
    states = length.new_zeros((*length.shape, model.config.hidden_size), dtype=own.layers[0].keys.dtype)
    out = model(
        attention_mask=length,
        decoder_input_ids=inputs["input_ids"],
        encoder_outputs=(states,),
        past_key_values=EncoderDecoderCache(own, cross),
        use_cache=True,
    )
    return [out.logits, *states_of(out.past_key_values.self_attention_cache)]
