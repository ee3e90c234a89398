"""Operations in torch on maps ``[batch, channels, height, width]``: pyramids and depthwise windows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deltahub.errors import KindError

__all__ = ["MAP_FUNCTIONS"]


def _interpolate(x: Tensor, size: int | tuple[int, ...], mode: str) -> Tensor:
    if mode not in {"bilinear", "nearest"}:
        raise ValueError(f"mode {mode!r} is neither bilinear nor nearest")
    return F.interpolate(
        x, size if isinstance(size, tuple) else (size,), mode=mode, align_corners=False if mode == "bilinear" else None
    )


def _shrink2d(x: Tensor, by: int, how: str) -> Tensor:
    if how not in {"avg", "adaptive"}:
        raise ValueError(f"{how!r} is neither avg nor adaptive")
    if by == 1:
        return x
    if how == "avg":
        return F.avg_pool2d(x, by, by, 0, ceil_mode=True, count_include_pad=False)
    height, width = x.shape[-2], x.shape[-1]
    if torch.compiler.is_exporting() and {type(height), type(width)} != {int}:
        raise KindError(
            "E_KIND_EXPORT",
            "adaptive pooling cannot be exported with open sizes: what comes out is wrong on odd maps",
            hint="export with fixed sizes, or train with pool = 'avg'",
        )
    return F.adaptive_avg_pool2d(x, (max(1, height // by), max(1, width // by)))


def _grow2d(x: Tensor, by: int, size: tuple[int, int]) -> Tensor:
    return x if by == 1 else F.interpolate(x, size, mode="bilinear", align_corners=False)


_CHANNELS_LAST_FROM = 11
"""On x86, depthwise windows of this side and more are ten times faster on channels-last maps, smaller ones on plain."""


def _depthwise2d(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    side = weight.shape[-1]
    if side % 2 == 0 or weight.shape[-2] != side:
        raise ValueError(f"the window must be square and of an odd side, not {list(weight.shape[-2:])}")
    last = x.device.type == "cpu" and side >= _CHANNELS_LAST_FROM
    x = x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    return F.conv2d(x, weight, bias, padding=side // 2, groups=weight.shape[0])


def _gated(x: Tensor, how: str, axis: int) -> Tensor:
    if how not in {"product", "sigmoid"}:
        raise ValueError(f"{how!r} is neither product nor sigmoid")
    if x.shape[axis] % 2:
        raise ValueError(f"an axis of length {x.shape[axis]} has no halves")
    a, b = x.chunk(2, axis)
    return a * (torch.sigmoid(b) if how == "sigmoid" else b)


MAP_FUNCTIONS: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {
        "interpolate": _interpolate,
        "shrink2d": _shrink2d,
        "grow2d": _grow2d,
        "depthwise2d": _depthwise2d,
        "gated": _gated,
    }
)
