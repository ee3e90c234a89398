"""A plot of curves on two logarithmic axes as a PNG, drawn with Pillow alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["loglog"]

_COLOURS = ("#c0392b", "#2471a3", "#1e8449", "#b9770e", "#6c3483", "#566573")
_LEFT, _RIGHT, _TOP, _BOTTOM = 110, 40, 60, 80


def loglog(
    path: Path,
    curves: Mapping[str, Sequence[tuple[float, float]]],
    *,
    title: str,
    x: str,
    y: str,
    size: tuple[int, int] = (1000, 640),
) -> Path:
    """Draw named curves of points (x, y), all positive."""
    from PIL import Image, ImageDraw, ImageFont

    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    font, large = ImageFont.load_default(15), ImageFont.load_default(19)
    xs = [p[0] for points in curves.values() for p in points]
    ys = [p[1] for points in curves.values() for p in points]
    low = (math.log10(min(xs)) - 0.05, math.floor(math.log10(min(ys))))
    high = (math.log10(max(xs)) + 0.05, math.ceil(math.log10(max(ys))))
    width, height = size[0] - _LEFT - _RIGHT, size[1] - _TOP - _BOTTOM

    def at(px: float, py: float) -> tuple[float, float]:
        u = (math.log10(px) - low[0]) / (high[0] - low[0])
        v = (math.log10(py) - low[1]) / (high[1] - low[1])
        return _LEFT + u * width, _TOP + (1 - v) * height

    for power in range(low[1], high[1] + 1):
        _, v = at(xs[0], 10.0**power)
        draw.line([(_LEFT, v), (_LEFT + width, v)], fill="#dddddd")
        draw.text((_LEFT - 12, v), f"1e{power}", fill="black", font=font, anchor="rm")
    for value in _marks(xs):
        u, _ = at(value, 10.0 ** low[1])
        draw.line([(u, _TOP), (u, _TOP + height)], fill="#eeeeee")
        draw.text((u, _TOP + height + 10), f"{value:g}", fill="black", font=font, anchor="ma")
    draw.rectangle([_LEFT, _TOP, _LEFT + width, _TOP + height], outline="black")
    _curves(draw, curves, at, font)
    draw.text((size[0] / 2, 24), title, fill="black", font=large, anchor="mm")
    draw.text((_LEFT + width / 2, size[1] - 24), x, fill="black", font=font, anchor="mm")
    draw.text((_LEFT, _TOP - 12), y, fill="black", font=font, anchor="ls")
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return path


def _curves(draw: Any, curves: Mapping[str, Sequence[tuple[float, float]]], at: Any, font: Any) -> None:
    for i, (name, points) in enumerate(curves.items()):
        colour = _COLOURS[i % len(_COLOURS)]
        places = [at(*p) for p in points]
        draw.line(places, fill=colour, width=3)
        for u, v in places:
            draw.ellipse([u - 4, v - 4, u + 4, v + 4], fill=colour)
        draw.text((_LEFT + 20, _TOP + 18 + 22 * i), name, fill=colour, font=font, anchor="lm")


def _marks(xs: Sequence[float]) -> list[float]:
    """Places for labels: the values themselves where they are few, else powers of ten."""
    values = sorted(set(xs))
    if len(values) <= 12:
        return values
    low, high = math.ceil(math.log10(values[0])), math.floor(math.log10(values[-1]))
    return [10.0**power for power in range(low, high + 1)]
