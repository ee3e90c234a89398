"""The dtypes of safetensors: their sizes, and what torch and NumPy call them."""

from __future__ import annotations

__all__ = ["DTYPES", "dtype_name", "f8_table", "nonfinite_pattern", "numpy_dtype", "torch_dtype"]

from functools import cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from deltahub.errors import TensorFileError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

# name -> (bits, torch's name, NumPy's own dtype or None where it has none)
_TYPES: dict[str, tuple[int, str | None, str | None]] = {
    "BOOL": (8, "bool", "?"),
    "F4": (4, "float4_e2m1fn_x2", None),
    "F6_E2M3": (6, None, None),
    "F6_E3M2": (6, None, None),
    "U8": (8, "uint8", "u1"),
    "I8": (8, "int8", "i1"),
    "F8_E5M2": (8, "float8_e5m2", None),
    "F8_E4M3": (8, "float8_e4m3fn", None),
    "F8_E8M0": (8, "float8_e8m0fnu", None),
    "F8_E4M3FNUZ": (8, "float8_e4m3fnuz", None),
    "F8_E5M2FNUZ": (8, "float8_e5m2fnuz", None),
    "I16": (16, "int16", "<i2"),
    "U16": (16, "uint16", "<u2"),
    "F16": (16, "float16", "<f2"),
    "BF16": (16, "bfloat16", None),
    "I32": (32, "int32", "<i4"),
    "U32": (32, "uint32", "<u4"),
    "F32": (32, "float32", "<f4"),
    "C64": (64, "complex64", "<c8"),
    "F64": (64, "float64", "<f8"),
    "I64": (64, "int64", "<i8"),
    "U64": (64, "uint64", "<u8"),
}
DTYPES: Mapping[str, int] = MappingProxyType({name: bits for name, (bits, _, _) in _TYPES.items()})
_BY_NAME = {other: name for name, (_, other, _) in _TYPES.items() if other}

# Values that are not finite: (unsigned view, mask, pattern), where masked bits that equal the pattern are such.
_NONFINITE = {
    "F64": ("<u8", 0x7FF0000000000000, 0x7FF0000000000000),
    "F32": ("<u4", 0x7F800000, 0x7F800000),
    "C64": ("<u4", 0x7F800000, 0x7F800000),
    "F16": ("<u2", 0x7C00, 0x7C00),
    "BF16": ("<u2", 0x7F80, 0x7F80),
    "F8_E5M2": ("u1", 0x7C, 0x7C),
    "F8_E4M3": ("u1", 0x7F, 0x7F),
    "F8_E8M0": ("u1", 0xFF, 0xFF),
    "F8_E4M3FNUZ": ("u1", 0xFF, 0x80),
    "F8_E5M2FNUZ": ("u1", 0xFF, 0x80),
}
# F8 widened to float32 by table: (exponent bits, mantissa bits, bias, "ieee" | "fn" | "fnuz" | "scale")
_F8 = {
    "F8_E5M2": (5, 2, 15, "ieee"),
    "F8_E4M3": (4, 3, 7, "fn"),
    "F8_E8M0": (8, 0, 127, "scale"),
    "F8_E4M3FNUZ": (4, 3, 8, "fnuz"),
    "F8_E5M2FNUZ": (5, 2, 16, "fnuz"),
}


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a safetensors dtype name; ``E_TENSORS_DTYPE`` where torch has none."""
    import torch

    other = _TYPES.get(name, (0, None, None))[1]
    found = getattr(torch, other, None) if other else None
    if not isinstance(found, torch.dtype):
        raise TensorFileError("E_TENSORS_DTYPE", "torch has no such dtype", found=name)
    return found


def dtype_name(dtype: torch.dtype | np.dtype[Any]) -> str:
    """The safetensors name of a torch or NumPy dtype; ``E_TENSORS_DTYPE`` where it has none."""
    text = str(dtype).removeprefix("torch.") if not isinstance(dtype, np.dtype) else dtype.newbyteorder("=").name
    if text not in _BY_NAME:
        raise TensorFileError("E_TENSORS_DTYPE", "safetensors has no such dtype", found=dtype)
    return _BY_NAME[text]


def numpy_dtype(name: str) -> str | None:
    """NumPy's little-endian dtype string of a safetensors dtype, or ``None`` where NumPy has none of its own."""
    return _TYPES[name][2]


def nonfinite_pattern(name: str) -> tuple[str, int, int] | None:
    """How a NaN or an infinity of this dtype looks: (unsigned dtype, mask, pattern); ``None``: there is none."""
    return _NONFINITE.get(name)


@cache
def f8_table(name: str) -> np.ndarray[Any, np.dtype[np.float32]] | None:
    """The 256 values of an eight-bit float as float32 ``[256]``, or ``None`` for another dtype.

    "OCP 8-bit Floating Point Specification" 1.0 for E5M2 and E4M3, its MX companion for E8M0,
    arXiv:2206.02915 for the FNUZ pair.
    """
    if name not in _F8:
        return None
    exponent_bits, mantissa_bits, bias, style = _F8[name]
    codes = np.arange(256, dtype=np.int64)
    if style == "scale":
        values = np.exp2((codes - bias).astype(np.float64))
        values[255] = np.nan
        return values.astype(np.float32)
    exponent = codes >> mantissa_bits & (1 << exponent_bits) - 1
    mantissa = codes & (1 << mantissa_bits) - 1
    significand = mantissa + np.where(exponent > 0, 1 << mantissa_bits, 0)
    values = np.ldexp(significand.astype(np.float64), np.maximum(exponent, 1) - bias - mantissa_bits)
    values = np.where(codes >= 128, -values, values)
    if style == "ieee":
        top = exponent == (1 << exponent_bits) - 1
        values = np.where(top, np.where(mantissa == 0, np.copysign(np.inf, values), np.nan), values)
    elif style == "fn":
        values[[0x7F, 0xFF]] = np.nan
    else:
        values[0x80] = np.nan
    return values.astype(np.float32)
