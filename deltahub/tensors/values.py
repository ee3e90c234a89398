"""Tensors in memory, torch's or NumPy's, as safetensors sees them: a dtype, a shape, and bytes."""

from __future__ import annotations

__all__ = ["Pending", "value_bytes", "value_layout"]

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from deltahub.errors import TensorFileError
from deltahub.tensors.dtypes import dtype_name
from deltahub.tensors.header import MAX_RANK, name_fault


@dataclass(frozen=True, kw_only=True)
class Pending:
    """A tensor that is made when it is written, and let go then: what is large need not be held.

    Attributes:
        dtype: torch's or NumPy's.
        shape: what ``make`` gives.
        make: gives the values, as a tensor or an array; the same ones each time.
    """

    dtype: Any
    shape: tuple[int, ...]
    make: Callable[[], Any]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * int(self.dtype.itemsize)


def _is_torch(value: object) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def value_layout(name: str, value: Any, where: object = None) -> tuple[str, tuple[int, ...]]:
    """Dtype name and shape of a value as a file would give them; its bytes are not touched.

    Raises:
        TensorFileError: ``E_TENSORS_NAME``, ``E_TENSORS_VALUE``, ``E_TENSORS_DTYPE``, ``E_TENSORS_SHAPE``.
    """
    fault = "taken by the format" if name == "__metadata__" else name_fault(name)
    if fault:
        raise TensorFileError("E_TENSORS_NAME", f"a tensor's name is {fault}", where=where, found=name)
    if _is_torch(value):
        import torch

        plain = value.layout == torch.strided and not value.is_quantized and not value.is_nested
        if value.device.type == "meta" or not plain:
            raise TensorFileError("E_TENSORS_VALUE", f"{name}: this is not a dense tensor with values", where=where)
    elif not isinstance(value, np.ndarray | Pending):
        raise TensorFileError("E_TENSORS_VALUE", f"{name}: not a tensor", where=where, found=type(value).__name__)
    dtype, shape = dtype_name(value.dtype), tuple(int(dim) for dim in value.shape)
    if dtype == "F4":
        if not shape:
            raise TensorFileError("E_TENSORS_VALUE", f"{name}: F4 needs a dimension that counts pairs", where=where)
        shape = (*shape[:-1], shape[-1] * 2)
    if len(shape) > MAX_RANK:
        raise TensorFileError("E_TENSORS_SHAPE", f"{name}: too many dimensions", where=where, found=len(shape))
    return dtype, shape


def value_bytes(name: str, value: Any, where: object = None) -> memoryview:
    """The bytes of a value, little-endian and in C order; copied only where they are not so already.

    Raises:
        TensorFileError: ``E_TENSORS_VALUE``: a fake tensor, one spread over machines, or the like; or what was made is
            not what was announced.
    """
    if isinstance(value, Pending):
        made = value.make()
        if value_layout(name, made, where) != value_layout(name, value, where):
            raise TensorFileError(
                "E_TENSORS_VALUE",
                f"{name}: another tensor was made than was announced",
                where=where,
                expected=value_layout(name, value, where),
                found=value_layout(name, made, where),
            )
        return value_bytes(name, made, where)
    if _is_torch(value):
        import torch

        try:
            tensor = value.detach().cpu().resolve_conj().resolve_neg().contiguous()
            array = tensor.view(-1).view(torch.uint8).numpy() if tensor.numel() else np.empty(0, np.uint8)
        except (RuntimeError, TypeError) as error:
            raise TensorFileError("E_TENSORS_VALUE", f"{name}: it has no bytes: {error}", where=where) from None
        if sys.byteorder == "big":
            array = array.view(f"u{tensor.element_size()}").byteswap().view(np.uint8)
    else:
        array = np.ascontiguousarray(value)
        if array.dtype.byteorder == ">" or (array.dtype.byteorder == "=" and sys.byteorder == "big"):
            array = array.byteswap()
        array = array.reshape(-1).view(np.uint8)
    return memoryview(array.data)
