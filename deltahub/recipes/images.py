"""Batches out of a folder of images with captions, by a pipeline's own autoencoder and text encoder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltahub.backbones import denoiser_of
from deltahub.errors import UsageError
from deltahub.recipes.data import Batch, noised

__all__ = ["image_batches"]

_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp"})


def image_batches(
    pipeline: Any,
    folder: Path,
    *,
    batch: int = 4,
    size: tuple[int, int] = (512, 512),
    drop: float = 0.15,
    seed: int = 0,
) -> Iterator[Batch]:
    """Endless batches of noised images; the caption of ``cat.png`` is the text of ``cat.txt``.

    Args:
        pipeline: a pipeline of diffusers with ``vae`` and ``encode_prompt``.
        folder: of the images.
        batch: rows.
        size: height and width to which images are scaled and cropped, in pixels.
        drop: share of captions that are left empty, for guidance.
        seed: of the order, the times and the noise.

    Raises:
        UsageError: ``E_USAGE_RECIPE`` where the folder holds no images, or the pipeline no denoiser.
    """
    found = denoiser_of(pipeline)
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() in _SUFFIXES)
    if not files or found is None:
        what = "there are no images here" if found else "this is no pipeline with a denoiser"
        raise UsageError("E_USAGE_RECIPE", what, where=str(folder))
    _, model = found
    generator = torch.Generator().manual_seed(seed)
    while True:
        picked = [files[int(i)] for i in torch.randint(len(files), (batch,), generator=generator)]
        texts = [_caption(p) if float(torch.rand((), generator=generator)) >= drop else "" for p in picked]
        with torch.no_grad():
            pixels = torch.stack([_pixels(p, size) for p in picked]).to(pipeline.vae.device, pipeline.vae.dtype)
            latents = pipeline.vae.encode(pixels).latent_dist.mode() * pipeline.vae.config.scaling_factor
            told = _told(pipeline, model, texts, size)
        sample, noise, times, snr = noised(latents.float().cpu(), generator)
        dtype = next(model.parameters()).dtype
        name = "sample" if "encoder_hidden_states" in told and hasattr(model, "conv_in") else "hidden_states"
        yield Batch(inputs={name: sample.to(dtype), "timestep": times, **told}, noise=noise, snr=snr)


def _caption(image: Path) -> str:
    text = image.with_suffix(".txt")
    return text.read_text(encoding="utf-8").strip() if text.is_file() else ""


def _pixels(path: Path, size: tuple[int, int]) -> Tensor:
    """An image scaled and cropped, float32 ``[3, height, width]`` between -1 and 1."""
    import numpy as np
    from PIL import Image, ImageOps

    with Image.open(path) as image:
        fitted = ImageOps.fit(image.convert("RGB"), (size[1], size[0]))
    return torch.from_numpy(np.asarray(fitted, dtype=np.float32) / 127.5 - 1.0).permute(2, 0, 1)


def _told(pipeline: Any, model: Any, texts: Sequence[str], size: tuple[int, int]) -> dict[str, Any]:
    """What the model is told of the texts, as its family takes it."""
    device = pipeline.vae.device
    if type(model).__name__ == "PixArtTransformer2DModel" or hasattr(model, "caption_projection"):
        states, mask, *_ = pipeline.encode_prompt(list(texts), do_classifier_free_guidance=False, device=device)
        added = {"resolution": None, "aspect_ratio": None}
        return {"encoder_hidden_states": states, "encoder_attention_mask": mask, "added_cond_kwargs": added}
    encoded = pipeline.encode_prompt(
        list(texts), device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    told: dict[str, Any] = {"encoder_hidden_states": encoded[0]}
    if model.config.addition_embed_type == "text_time":
        ids = torch.tensor([[*size, 0, 0, *size]], dtype=encoded[2].dtype, device=device).expand(len(texts), -1)
        told["added_cond_kwargs"] = {"text_embeds": encoded[2], "time_ids": ids}
    return told
