"""Tasks: which graphs a model becomes, with the names that Optimum gives to inputs and outputs.

A task is found from the model's class and asks the model's own configuration; there is no table of architectures.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from deltahub.converters.onnx.graphs import Graph, Input, Output
from deltahub.converters.onnx.multimodal import image_text
from deltahub.converters.onnx.sequences import seq2seq, text_generation
from deltahub.errors import ConverterError

__all__ = ["TASKS", "graphs_of", "task_of"]

_BATCH, _LENGTH = "batch_size", "sequence_length"
_TEXT_SIZES: tuple[Mapping[str, int], ...] = (
    {_BATCH: 2, _LENGTH: 9},
    {_BATCH: 1, _LENGTH: 1},
    {_BATCH: 3, _LENGTH: 7},
    {_BATCH: 1, _LENGTH: 16},
    {_BATCH: 5, _LENGTH: 13},
)


def _accepts(model: Any, name: str) -> bool:
    return name in inspect.signature(model.forward).parameters


def _text_inputs(model: Any) -> tuple[Input, ...]:
    config = model.config
    both = (_BATCH, _LENGTH)
    inputs = [
        Input(name="input_ids", dims=both, values="ids", limit=config.vocab_size),
        Input(name="attention_mask", dims=both, values="mask"),
    ]
    types = getattr(config, "type_vocab_size", 0) or 0
    if types > 1 and _accepts(model, "token_type_ids"):
        inputs.append(Input(name="token_type_ids", dims=both, values="types", limit=types))
    return tuple(inputs)


def _call_named(names: tuple[str, ...], model: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    out = model(**inputs)
    return [out[name] for name in names]


def _text(model: Any, outputs: Mapping[str, tuple[str | int, ...]]) -> list[Graph]:
    return [
        Graph(
            file="model.onnx",
            call=partial(_call_named, tuple(outputs)),
            inputs=_text_inputs(model),
            outputs=tuple(
                Output(name=name, dims=dims, tokens=1 if _LENGTH in dims else None) for name, dims in outputs.items()
            ),
            sizes=_TEXT_SIZES,
        )
    ]


def _sentence(model: Any) -> list[Graph]:
    """Sentence embeddings: the encoder with everything that follows it, pooling and normalisation included."""
    inner = model[0].auto_model
    return [
        Graph(
            file="model.onnx",
            call=_call_sentence,
            inputs=_text_inputs(inner),
            outputs=(
                Output(name="token_embeddings", dims=(_BATCH, _LENGTH, "?"), tokens=1),
                Output(name="sentence_embedding", dims=(_BATCH, "?")),
            ),
            sizes=_TEXT_SIZES,
        )
    ]


def _call_sentence(model: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    features: Any = dict(inputs)
    stages = list(model.children())
    transformer: Any = stages[0]
    features["token_embeddings"] = transformer.auto_model(**inputs).last_hidden_state
    for stage in stages[1:]:
        features = stage(features)
    return [features["token_embeddings"], features["sentence_embedding"]]


def _image_size(config: Any) -> tuple[int, int]:
    size = config.image_size
    return (size, size) if isinstance(size, int) else tuple(size)


def _image(model: Any, outputs: Mapping[str, tuple[str | int, ...]]) -> list[Graph]:
    channels = getattr(model.config, "num_channels", 3)
    return [
        Graph(
            file="model.onnx",
            call=partial(_call_named, tuple(outputs)),
            inputs=(Input(name="pixel_values", dims=(_BATCH, channels, *_image_size(model.config))),),
            outputs=tuple(Output(name=name, dims=dims) for name, dims in outputs.items()),
            sizes=({_BATCH: 2}, {_BATCH: 1}, {_BATCH: 3}, {_BATCH: 5}),
        )
    ]


def _clip(model: Any) -> list[Graph]:
    text, image = "text_batch_size", "image_batch_size"
    vision = model.config.vision_config
    both = (text, _LENGTH)
    names = ("logits_per_image", "logits_per_text", "text_embeds", "image_embeds")
    dims: tuple[tuple[str | int, ...], ...] = ((image, text), (text, image), (text, "?"), (image, "?"))
    return [
        Graph(
            file="model.onnx",
            call=partial(_call_named, names),
            inputs=(
                Input(name="input_ids", dims=both, values="ids", limit=model.config.text_config.vocab_size),
                Input(name="pixel_values", dims=(image, vision.num_channels, *_image_size(vision))),
                Input(name="attention_mask", dims=both, values="mask"),
            ),
            outputs=tuple(Output(name=n, dims=d) for n, d in zip(names, dims, strict=True)),
            sizes=(
                {text: 2, image: 3, _LENGTH: 7},
                {text: 1, image: 1, _LENGTH: 5},
                {text: 4, image: 2, _LENGTH: 3},
                {text: 3, image: 5, _LENGTH: 8},
            ),
        )
    ]


def _unet(model: Any) -> list[Graph]:
    config = model.config
    grid = ("height", "width")
    step = 2 ** (len(config.block_out_channels) - 1)
    return [
        Graph(
            file="model.onnx",
            call=_call_unet,
            inputs=(
                Input(name="sample", dims=(_BATCH, config.in_channels, *grid)),
                Input(name="timestep", dims=(_BATCH,), values="steps", limit=1000),
                Input(name="encoder_hidden_states", dims=(_BATCH, _LENGTH, _width(config.cross_attention_dim))),
            ),
            outputs=(Output(name="out_sample", dims=(_BATCH, config.out_channels, *grid)),),
            sizes=tuple(
                {_BATCH: b, "height": h * step, "width": w * step, _LENGTH: n}
                for b, h, w, n in ((2, 3, 5, 7), (1, 2, 2, 1), (3, 4, 2, 9), (1, 5, 3, 13))
            ),
            limits={_BATCH: 63},  # an upsampling of 64 rows and more takes another path
        )
    ]


def _width(value: Any) -> int:
    return int(value[0] if isinstance(value, (list, tuple)) else value)


def _call_unet(model: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    return [model(inputs["sample"], inputs["timestep"], inputs["encoder_hidden_states"], return_dict=False)[0]]


def _pixart(model: Any) -> list[Graph]:
    config = model.config
    side = config.sample_size
    return [
        Graph(
            file="model.onnx",
            call=_call_pixart,
            inputs=(
                # Positions are computed for the size that the model was made for: another size is another graph.
                Input(name="hidden_states", dims=(_BATCH, config.in_channels, side, side)),
                Input(name="encoder_hidden_states", dims=(_BATCH, _LENGTH, config.caption_channels)),
                Input(name="timestep", dims=(_BATCH,), values="steps", limit=1000),
                Input(name="encoder_attention_mask", dims=(_BATCH, _LENGTH), values="mask"),
            ),
            outputs=(Output(name="out_hidden_states", dims=(_BATCH, config.out_channels, side, side)),),
            sizes=tuple({_BATCH: b, _LENGTH: n} for b, n in ((2, 7), (1, 1), (3, 5), (5, 11))),
            opset=20,  # ONNX Runtime's `Attention` of later ones does not broadcast this model's mask
        )
    ]


def _call_pixart(model: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    out = model(
        inputs["hidden_states"],
        encoder_hidden_states=inputs["encoder_hidden_states"],
        timestep=inputs["timestep"],
        encoder_attention_mask=inputs["encoder_attention_mask"],
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        return_dict=False,
    )
    return [out[0]]


def _vae_decoder(model: Any) -> list[Graph]:
    return [
        Graph(
            file="model.onnx",
            call=lambda vae, inputs: [vae.decode(inputs["latent_sample"], return_dict=False)[0]],  # type: ignore[operator]
            inputs=(Input(name="latent_sample", dims=(_BATCH, model.config.latent_channels, "height", "width")),),
            outputs=(Output(name="sample", dims=(_BATCH, model.config.out_channels, "sample_height", "sample_width")),),
            sizes=tuple(
                {_BATCH: b, "height": h, "width": w} for b, h, w in ((2, 6, 4), (1, 3, 5), (3, 2, 7), (1, 8, 8))
            ),
        )
    ]


def _vae_encoder(model: Any) -> list[Graph]:
    config = model.config
    step = 2 ** (len(config.block_out_channels) - 1)
    grid: tuple[str | int, ...] = ("latent_height", "latent_width")
    return [
        Graph(
            file="model.onnx",
            call=lambda vae, inputs: [vae.encode(inputs["sample"]).latent_dist.parameters],  # type: ignore[operator]
            inputs=(Input(name="sample", dims=(_BATCH, config.in_channels, "height", "width")),),
            outputs=(Output(name="latent_parameters", dims=(_BATCH, 2 * config.latent_channels, *grid)),),
            sizes=tuple(
                {_BATCH: b, "height": h * step, "width": w * step, "latent_height": h, "latent_width": w}
                for b, h, w in ((2, 6, 4), (1, 3, 5), (3, 2, 7), (1, 8, 8))
            ),
        )
    ]


_LOGITS_PER_TEXT = {"logits": (_BATCH, "?")}
_LOGITS_PER_TOKEN = {"logits": (_BATCH, _LENGTH, "?")}

TASKS: Mapping[str, Callable[[Any], list[Graph]]] = {
    "feature-extraction": lambda m: _text(m, {"last_hidden_state": (_BATCH, _LENGTH, "?")}),
    "text-classification": lambda m: _text(m, _LOGITS_PER_TEXT),
    "token-classification": lambda m: _text(m, _LOGITS_PER_TOKEN),
    "question-answering": lambda m: _text(m, {"start_logits": (_BATCH, _LENGTH), "end_logits": (_BATCH, _LENGTH)}),
    "fill-mask": lambda m: _text(m, _LOGITS_PER_TOKEN),
    "sentence-similarity": _sentence,
    "text-generation": partial(text_generation, past=False),
    "text-generation-with-past": partial(text_generation, past=True),
    "text2text-generation-with-past": seq2seq,
    "image-classification": lambda m: _image(m, {"logits": (_BATCH, "?")}),
    "image-feature-extraction": lambda m: _image(m, {"last_hidden_state": (_BATCH, "?", "?")}),
    "zero-shot-image-classification": _clip,
    "unet": _unet,
    "pixart-transformer": _pixart,
    "vae-decoder": _vae_decoder,
    "vae-encoder": _vae_encoder,
    "image-text-to-text": image_text,
}

_BY_SUFFIX = {
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForMaskedLM": "fill-mask",
    "ForCausalLM": "text-generation-with-past",
    "LMHeadModel": "text-generation-with-past",
    "ForImageClassification": "image-classification",
}
_BY_NAME = {
    "SentenceTransformer": "sentence-similarity",
    "CLIPModel": "zero-shot-image-classification",
    "UNet2DConditionModel": "unet",
    "PixArtTransformer2DModel": "pixart-transformer",
    "AutoencoderKL": "vae-decoder",
    "LlavaForConditionalGeneration": "image-text-to-text",
}


def task_of(model: nn.Module) -> str:
    """The task of a model, by its class.

    Raises:
        ConverterError: ``E_ONNX_TASK``.
    """
    config = getattr(model, "config", None)
    for cls in type(model).__mro__:
        if cls.__name__ in _BY_NAME:
            return _BY_NAME[cls.__name__]
        for suffix, task in _BY_SUFFIX.items():
            if cls.__name__.endswith(suffix):
                return task
        if cls.__name__.endswith("ForConditionalGeneration") and getattr(config, "is_encoder_decoder", False):
            return "text2text-generation-with-past"
    if _accepts(model, "pixel_values") and hasattr(config, "image_size"):
        return "image-feature-extraction"
    if _accepts(model, "input_ids") and hasattr(config, "vocab_size"):
        return "feature-extraction"
    raise ConverterError(
        "E_ONNX_TASK",
        "it is not known what this model is for",
        where=type(model).__name__,
        expected=", ".join(TASKS),
        hint="name the task, or describe the graphs yourself (graphs=)",
    )


def graphs_of(model: nn.Module, task: str) -> list[Graph]:
    """The graphs that a model becomes for a task.

    Raises:
        ConverterError: ``E_ONNX_TASK`` for an unknown task, or one that the model's configuration cannot serve.
    """
    make = TASKS.get(task)
    if make is None:
        raise ConverterError("E_ONNX_TASK", "there is no such task", expected=", ".join(TASKS), found=task)
    try:
        return make(model)
    except AttributeError as error:
        raise ConverterError(
            "E_ONNX_TASK", f"this model does not fit the task: {error}", where=type(model).__name__, found=task
        ) from error
