"""Exponent-grouped integer differences: half-precision tensors against the ones they were tuned from, without loss.

Floats of one sign are ordered as their bit patterns are, so a tuned weight is a few steps away from the old one, and
how many follows from the old one's exponent. The steps are taken modulo 2**16, which makes the code exact on every
bit pattern, NaN and minus zero too; they are folded to small numbers, brought into the order of the old exponents
(which the reader has as well), split into a low and a high byte, and left to zstd.

    o(u) = ~u if the sign bit is set, else u | 0x8000          monotone and one to one on all 65 536 patterns
    d    = o(new) − o(old)  mod 2**16                            as a signed number
    z    = (d << 1) ^ (d >> 15)                                  0, −1, 1, −2 … become 0, 1, 2, 3 …
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from deltahub.errors import ConverterError

__all__ = ["MANTISSA", "decode", "decode_planes", "encode", "encode_planes", "entropy"]

Words = np.ndarray[Any, np.dtype[np.uint16]]
Bytes = np.ndarray[Any, np.dtype[np.uint8]]

MANTISSA = {"BF16": 7, "F16": 10}
"""Mantissa bits of the dtypes that are coded; the exponent lies above them."""

LEVEL = 3


def _compress(data: Bytes) -> bytes:
    return bytes(_zstd().ZstdCompressor(level=LEVEL).compress(data.tobytes()))


def _decompress(data: bytes | memoryview, size: int) -> Bytes:
    """Exactly ``size`` bytes; what would give more is cut off before memory is taken for it."""
    zstd = _zstd()
    try:
        declared = zstd.frame_content_size(bytes(data[:18]))
        found = zstd.ZstdDecompressor().decompress(bytes(data), max_output_size=size) if declared == size else b""
    except zstd.ZstdError as error:
        raise ConverterError("E_PACK_STREAM", f"a compressed stream is damaged: {error}") from None
    if len(found) != size:
        raise ConverterError(
            "E_PACK_STREAM", "a compressed stream has another length than its tensor", expected=size, found=declared
        )
    return np.frombuffer(found, np.uint8)


def _zstd() -> Any:
    try:
        import zstandard
    except ImportError:
        raise ConverterError(
            "E_PACK_LIBRARY", "packing needs the zstandard library", hint="pip install 'deltahub[diff]'"
        ) from None
    return zstandard


def _order(u: Words) -> Words:
    return np.where(u & 0x8000, ~u, u | 0x8000).astype(np.uint16)


def _unorder(o: Words) -> Words:
    return np.where(o & 0x8000, o ^ 0x8000, ~o).astype(np.uint16)


def _steps(old: Words, new: Words) -> Words:
    difference = (_order(new) - _order(old)).view(np.int16)
    return ((difference << 1) ^ (difference >> 15)).view(np.uint16)


def _grouping(old: Words, mantissa: int) -> np.ndarray[Any, Any]:
    exponent = (old >> mantissa) & ((1 << (15 - mantissa)) - 1)
    return np.argsort(exponent.astype(np.uint8), kind="stable")


def encode(old: Words, new: Words, mantissa: int) -> tuple[bytes, bytes]:
    """Low and high bytes of the steps, compressed.

    Args:
        old: ``[n]`` bit patterns that the reader will have.
        new: ``[n]`` bit patterns to be stored.
        mantissa: of :data:`MANTISSA`.
    """
    steps = _steps(old, new)[_grouping(old, mantissa)]
    return _compress((steps & 0xFF).astype(np.uint8)), _compress((steps >> 8).astype(np.uint8))


def decode(old: Words, low: bytes | memoryview, high: bytes | memoryview, mantissa: int) -> Words:
    """The bit patterns that :func:`encode` was given.

    Raises:
        ConverterError: ``E_PACK_STREAM`` for a stream that is damaged or of another length.
    """
    sorted_steps = _decompress(low, old.size).astype(np.uint16)
    sorted_steps |= _decompress(high, old.size).astype(np.uint16) << 8
    steps = np.empty(old.size, np.uint16)
    steps[_grouping(old, mantissa)] = sorted_steps
    difference = (steps >> 1) ^ (~(steps & 1) + 1).astype(np.uint16)
    return _unorder((_order(old) + difference).astype(np.uint16))


def encode_planes(data: Bytes, width: int) -> list[bytes]:
    """Bytes of elements of ``width`` bytes, one plane for each, compressed: for what has no old tensor."""
    return [_compress(np.ascontiguousarray(data[at::width])) for at in range(width)]


def decode_planes(planes: Sequence[bytes | memoryview], size: int) -> Bytes:
    """The inverse of :func:`encode_planes` for ``size`` bytes."""
    width = len(planes)
    found = np.empty(size, np.uint8)
    for at, plane in enumerate(planes):
        found[at::width] = _decompress(plane, size // width)
    return found


def entropy(old: Words, new: Words, mantissa: int) -> float:
    """Bits per element that no code of the steps given the old exponents can go below: H(step | exponent)."""
    if old.size == 0:
        return 0.0
    exponent = ((old >> mantissa) & ((1 << (15 - mantissa)) - 1)).astype(np.uint32)
    joint = np.unique((exponent << 16) | _steps(old, new), return_counts=True)[1]
    single = np.unique(exponent, return_counts=True)[1]
    return _bits(joint) - _bits(single)


def _bits(counts: np.ndarray[Any, Any]) -> float:
    share = counts / counts.sum()
    return float(-(share * np.log2(share)).sum())
