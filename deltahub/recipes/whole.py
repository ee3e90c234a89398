"""Distillation from a pipeline's name to a package, as the command line runs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from deltahub.backbones import denoiser_of
from deltahub.errors import UsageError
from deltahub.presets import attach_preset
from deltahub.recipes.data import random_batches
from deltahub.recipes.distil import Options, Progress, Result, distil
from deltahub.recipes.images import image_batches
from deltahub.recipes.warm import warm_start

__all__ = ["distil_pipeline"]


def distil_pipeline(
    source: str | Path,
    folder: Path,
    *,
    preset: str,
    images: Path | None = None,
    options: Options | None = None,
    batch: int = 4,
    size: int = 512,
    pool: str = "avg",
    warm: bool = True,
    device: str | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Result:
    """Distil the self-attention of a pipeline's denoiser into what a preset says.

    Args:
        source: a folder or a repository of a diffusers pipeline.
        folder: where the package and the log go.
        preset: name of a preset for the denoiser's architecture.
        images: a folder of images with captions; random maps where there is none.
        options: how it runs.
        batch: rows of a batch.
        size: side of the images, in pixels.
        pool: of the preset's kind.
        warm: start from the teacher's own weights.
        device: where; a GPU where there is one.
        seed: of the fresh tensors and the batches.
        progress: told of every step.

    Raises:
        UsageError: ``E_USAGE_RECIPE`` where the pipeline has no denoiser.
    """
    from diffusers import DiffusionPipeline

    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    loader: Any = DiffusionPipeline
    pipeline = loader.from_pretrained(str(source), use_safetensors=True)
    found = denoiser_of(pipeline)
    if found is None:
        raise UsageError("E_USAGE_RECIPE", "this pipeline has no denoiser", found=type(pipeline).__name__)
    pipeline.to(where)
    model = found[1]
    delta = attach_preset(model, preset, seed=seed, dtype=torch.float32, pool=pool)
    if warm:
        warm_start(delta)
    side = size // int(getattr(pipeline, "vae_scale_factor", 8))
    if images is not None:
        batches = image_batches(pipeline, images, batch=batch, size=(size, size), seed=seed)
    else:
        batches = random_batches(model, batch=batch, sizes=((side, side), (side // 2, side)), seed=seed)
    example = next(random_batches(model, batch=1, sizes=((side // 2, side),), seed=1)).to(where)
    probe = {k: v for k, v in example.inputs.items() if isinstance(v, torch.Tensor)}
    whole = len(probe) == len(example.inputs)  # a probe holds tensors alone
    kept = probe if whole else None
    return distil(model, delta, batches, folder, options=options or Options(), probe=kept, progress=progress)
