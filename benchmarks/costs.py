"""What attention and its replacements cost, by formula; one multiply-accumulate is two operations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

__all__ = ["MODELS", "PAPER", "TABLE1", "Sites", "delta_conv", "linear_attention", "self_attention", "table1"]

TABLE1 = {"512×512": (512, 512), "1024×1024": (1024, 1024), "4K": (4096, 2160), "16K": (15360, 8640)}
"""The images of the paper's Table 1; its 4K and 16K are not squares."""

PAPER = {
    "512×512": (49.67, 2.82),
    "1024×1024": (714.08, 12.56),
    "4K": (49149.21, 105.94),
    "16K": (11010934.11, 1589.10),
}
"""What the paper prints: GFLOP of self-attention and of the convolutional block."""

BATCH = 2
"""Classifier-free guidance: each image is computed with and without its prompt."""


def self_attention(tokens: int, width: int, *, biases: bool = False) -> float:
    """Four projections, and every token with every other; softmax is not counted."""
    return 8 * tokens * width**2 + 4 * tokens**2 * width + (4 * tokens * width if biases else 0)


def linear_attention(tokens: int, width: int, heads: int, middle: int | None = None) -> float:
    """LinFusion's form, from its authors' code: four projections, two networks, products of keys and values."""
    middle = middle or width
    return tokens * (8 * width**2 + 8 * width * middle + 4 * width * (width // heads) + 2 * width)


def delta_conv(
    tokens: float, width: int, kernel: int, divisors: Iterable[int] = (1, 2), *, reduction: int = 2, whole: bool = False
) -> float:
    """The convolutional block, joined stages.

    Args:
        tokens: of the map.
        width: of the block.
        kernel: side of the windows.
        divisors: by how much each stage shrinks the map.
        reduction: the inner width is the block's divided by this.
        whole: count what the paper counts (biases, the added branch, gates and their scale, per token) instead of what
            a counter of matrix products and convolutions sees (with the projection of the mean).
    """
    divisors = tuple(divisors)
    inner = width // reduction
    shares = sum(1 / d**2 for d in divisors)
    joined = len(divisors) * (inner // 2)
    each = 2 * width * inner + 2 * inner * kernel**2 * shares + 2 * joined * width
    if whole:
        return tokens * (each + 2 * width + inner * shares)
    return tokens * each + 2 * width**2


def table1() -> dict[str, tuple[float, float, float]]:
    """GFLOP of one 320-channel layer at an eighth of the side, batch 2: self-attention, the block, the ratio."""
    found = {}
    for name, (width, height) in TABLE1.items():
        tokens = (width // 8) * (height // 8)
        kernel = 9 if name == "512×512" else 13
        attention = BATCH * self_attention(tokens, 320, biases=True) / 1e9
        block = BATCH * delta_conv(tokens, 320, kernel, (1, 2, 3, 6), whole=True) / 1e9
        found[name] = attention, block, attention / block
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class Sites:
    """Self-attentions of one width at one level of a model."""

    part: str
    width: int
    shrink: int
    count: int
    heads: int = 8

    def tokens(self, height: int, width: int) -> int:
        return -(-height // self.shrink) * -(-width // self.shrink)


MODELS: Mapping[str, tuple[Sites, ...]] = {
    "sd15-released": (
        Sites(part="down-0", width=320, shrink=8, count=2),
        Sites(part="down-1", width=640, shrink=16, count=2),
        Sites(part="down-2", width=1280, shrink=32, count=2),
        Sites(part="middle", width=1280, shrink=64, count=1),
        Sites(part="up-1", width=1280, shrink=32, count=3),
        Sites(part="up-2", width=640, shrink=16, count=3),
        Sites(part="up-3", width=320, shrink=8, count=3),
    ),
    "sdxl-released": (
        Sites(part="down-1", width=640, shrink=16, count=4, heads=10),
        Sites(part="down-2", width=1280, shrink=32, count=20, heads=20),
        Sites(part="middle", width=1280, shrink=32, count=10, heads=20),
        Sites(part="up-0", width=1280, shrink=32, count=30, heads=20),
        Sites(part="up-1", width=640, shrink=16, count=6, heads=10),
    ),
    "pixart-released": (Sites(part="blocks", width=1152, shrink=16, count=28, heads=16),),
}
"""Where the models of the presets attend to themselves."""


def whole_model(preset: str, kernels: Mapping[str, int], height: int, width: int) -> tuple[float, float, float]:
    """Operations of all self-attentions of a model, and of what replaces them; per image, no guidance.

    Args:
        preset: a key of :data:`MODELS`.
        kernels: side of the windows by part.
        height: of the image.
        width: of the image.
    """
    attention = linear = block = 0.0
    for sites in MODELS[preset]:
        tokens = sites.tokens(height, width)
        attention += sites.count * self_attention(tokens, sites.width)
        linear += sites.count * linear_attention(tokens, sites.width, sites.heads)
        block += sites.count * delta_conv(tokens, sites.width, kernels[sites.part])
    return attention, linear, block
