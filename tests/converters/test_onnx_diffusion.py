"""A pipeline of diffusers with its UNet in ONNX Runtime gives the same image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deltahub.converters.onnx import OnnxUNet, Session, export_onnx
from deltahub.errors import ConverterError
from tests.converters.onnx_models import attached, make

pytest.importorskip("onnxruntime")
pytest.importorskip("diffusers")


def pipeline(unet: Any) -> Any:
    from diffusers import DDIMScheduler, StableDiffusionPipeline
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    text = CLIPTextConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=99,
        bos_token_id=0, eos_token_id=98, pad_token_id=0,
    )  # fmt: skip
    made = StableDiffusionPipeline(
        vae=make("vae"), text_encoder=CLIPTextModel(text).eval(), tokenizer=None, unet=unet,
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    made.set_progress_bar_config(disable=True)
    return made


def image(made: Any) -> Any:
    generator = torch.Generator().manual_seed(2)
    prompt, nothing = torch.randn(2, 1, 7, 16, generator=generator)
    out = made(
        prompt_embeds=prompt, negative_prompt_embeds=nothing, height=16, width=16, num_inference_steps=4,
        generator=torch.Generator().manual_seed(3), output_type="np",
    )  # fmt: skip
    return out.images[0]


@pytest.mark.slow
def test_the_same_image(tmp_path: Path) -> None:
    unet = make("unet-levels")
    delta = attached(unet, "lora", ["to_q", "conv1"], rank=2)
    made = pipeline(unet)
    expected = image(made)
    delta.disable()
    assert np.abs(image(made) - expected).max() > 2 / 255, "the delta shows in the image"
    delta.enable()
    export_onnx(unet, tmp_path / "out")
    made.unet = OnnxUNet(Session(tmp_path / "out", provider="cpu"), unet.config)
    assert np.abs(image(made) - expected).max() <= 2 / 255
    with pytest.raises(ConverterError) as caught:
        made.unet(torch.zeros(1, 4, 4, 4), 1, torch.zeros(1, 2, 16), class_labels=torch.zeros(1))
    assert caught.value.code == "E_ONNX_INPUT"
