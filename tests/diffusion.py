"""Tiny denoisers with every part built from config, and inputs for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["dit", "dit_inputs", "flux", "inputs_of", "pixart", "pixart_inputs", "sample", "sd3", "unet", "unet_inputs"]


def unet(*, seed: int = 0, layers: int = 1, **changes: Any) -> Any:
    """Two levels, 32 and 64 channels, self-attention at both and in the middle."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(seed)
    config = {
        "sample_size": 16,
        "block_out_channels": (32, 64),
        "layers_per_block": layers,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 32,
        "attention_head_dim": 4,
        "norm_num_groups": 8,
    }
    return UNet2DConditionModel(**{**config, **changes}).eval()


def unet_inputs(height: int = 16, width: int = 16, *, batch: int = 2, seed: int = 1) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        "sample": torch.randn(batch, 4, height, width, generator=g),
        "timestep": torch.tensor(7),
        "encoder_hidden_states": torch.randn(batch, 5, 32, generator=g),
    }


def pixart(*, seed: int = 0, layers: int = 2) -> Any:
    from diffusers import PixArtTransformer2DModel

    torch.manual_seed(seed)
    return PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=layers,
        cross_attention_dim=32,
        sample_size=16,
        patch_size=2,
        caption_channels=24,
        use_additional_conditions=False,
    ).eval()


def pixart_inputs(height: int = 16, width: int = 16, *, batch: int = 2, seed: int = 1) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(batch, 4, height, width, generator=g),
        "timestep": torch.full((batch,), 7),
        "encoder_hidden_states": torch.randn(batch, 5, 24, generator=g),
    }


def dit(*, seed: int = 0) -> Any:
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(seed)
    return DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=16,
        patch_size=2,
        num_embeds_ada_norm=10,
        norm_num_groups=4,
    ).eval()


def dit_inputs(height: int = 16, width: int = 16, *, batch: int = 2, seed: int = 1) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(batch, 4, height, width, generator=g),
        "timestep": torch.full((batch,), 7),
        "class_labels": torch.arange(batch),
    }


def sd3() -> Any:
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        out_channels=4,
        pos_embed_max_size=16,
    )


def flux() -> Any:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
    )


def inputs_of(model: nn.Module, height: int = 16, width: int = 16, **more: Any) -> dict[str, Tensor]:
    """Inputs for one of the models above."""
    makers = {"UNet2DConditionModel": unet_inputs, "PixArtTransformer2DModel": pixart_inputs}
    return makers.get(type(model).__name__, dit_inputs)(height, width, **more)


def sample(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The model's prediction."""
    with torch.no_grad():
        found: Tensor = model(**inputs).sample
    return found
