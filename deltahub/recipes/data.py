"""Batches for distillation: a noised sample, when it was noised, what the model is told; and the noise."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltahub.errors import UsageError

__all__ = ["Batch", "inputs_for", "noised", "random_batches"]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One batch.

    Attributes:
        inputs: keyword arguments of the model.
        noise: what was added to the sample, ``[batch, channels, height, width]``.
        snr: ratio of signal to noise of each row, ``[batch]``.
    """

    inputs: Mapping[str, Any]
    noise: Tensor
    snr: Tensor

    def to(self, device: torch.device | str) -> Batch:
        """The same on a device."""
        inputs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in self.inputs.items()}
        return Batch(inputs=inputs, noise=self.noise.to(device), snr=self.snr.to(device))


def inputs_for(model: nn.Module, generator: torch.Generator) -> Callable[[Tensor, Tensor], dict[str, Any]]:
    """How a denoiser of diffusers is called, with random conditioning of the right shape.

    Raises:
        UsageError: ``E_USAGE_RECIPE`` for a model that is none of the known denoisers.
    """
    name = next((c.__name__ for c in type(model).__mro__ if c.__name__ in _CALLS), None)
    if name is None:
        raise UsageError(
            "E_USAGE_RECIPE",
            "it is not known how this model is called",
            found=type(model).__name__,
            expected=", ".join(_CALLS),
            hint="pass batches of your own",
        )
    config: Any = model.config

    def call(sample: Tensor, timestep: Tensor) -> dict[str, Any]:
        return _CALLS[name](config, sample, timestep, generator)

    return call


def _text(width: int, sample: Tensor, generator: torch.Generator, tokens: int = 16) -> Tensor:
    return torch.randn(len(sample), tokens, width, generator=generator)


def _unet(config: Any, sample: Tensor, timestep: Tensor, generator: torch.Generator) -> dict[str, Any]:
    found: dict[str, Any] = {
        "sample": sample,
        "timestep": timestep,
        "encoder_hidden_states": _text(config.cross_attention_dim, sample, generator),
    }
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        added = {"text_embeds": torch.randn(len(sample), pooled, generator=generator)}
        added["time_ids"] = torch.tensor([[1024.0, 1024, 0, 0, 1024, 1024]]).expand(len(sample), -1)
        found["added_cond_kwargs"] = added
    return found


def _pixart(config: Any, sample: Tensor, timestep: Tensor, generator: torch.Generator) -> dict[str, Any]:
    return {
        "hidden_states": sample,
        "timestep": timestep,
        "encoder_hidden_states": _text(config.caption_channels, sample, generator),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def _dit(config: Any, sample: Tensor, timestep: Tensor, generator: torch.Generator) -> dict[str, Any]:
    labels = torch.randint(config.num_embeds_ada_norm, (len(sample),), generator=generator)
    return {"hidden_states": sample, "timestep": timestep, "class_labels": labels}


_CALLS: Mapping[str, Callable[..., dict[str, Any]]] = {
    "UNet2DConditionModel": _unet,
    "PixArtTransformer2DModel": _pixart,
    "DiTTransformer2DModel": _dit,
}


def noised(latents: Tensor, generator: torch.Generator, *, steps: int = 1000) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Noise samples at random times of the usual scaled-linear schedule.

    Returns:
        the noised samples, the noise, the times (int64) and the ratios of signal to noise.
    """
    kept = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, steps, dtype=torch.float64) ** 2, 0).float()
    times = torch.randint(steps, (len(latents),), generator=generator)
    noise = torch.randn(latents.shape, generator=generator)
    share = kept[times].view(-1, 1, 1, 1)
    return share.sqrt() * latents + (1 - share).sqrt() * noise, noise, times, (share / (1 - share)).flatten()


def random_batches(
    model: nn.Module, *, batch: int = 2, sizes: Sequence[tuple[int, int]] = ((16, 16),), seed: int = 0
) -> Iterator[Batch]:
    """Endless batches of smooth random maps: enough to try a recipe, no substitute for images.

    Args:
        model: a denoiser of diffusers.
        batch: rows.
        sizes: heights and widths of the maps, in turns.
        seed: of everything that is random.
    """
    generator = torch.Generator().manual_seed(seed)
    call = inputs_for(model, generator)
    channels = int(model.config.in_channels)  # type: ignore[union-attr, arg-type]
    while True:
        for height, width in sizes:
            coarse = torch.randn(batch, channels, max(2, height // 4), max(2, width // 4), generator=generator)
            latents = F.interpolate(coarse, (height, width), mode="bilinear", align_corners=False)
            sample, noise, times, snr = noised(latents, generator)
            yield Batch(inputs=call(sample, times), noise=noise, snr=snr)
