"""Writing safetensors: the same tensors give the same bytes, on every run and every machine."""

from __future__ import annotations

__all__ = ["write"]

import hashlib
import json
import math
import struct
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from deltahub.errors import TensorFileError
from deltahub.tensors.dtypes import DTYPES, dtype_name
from deltahub.tensors.files import CHUNK, FileDigest, replacing
from deltahub.tensors.header import MAX_HEADER, MAX_RANK, name_fault

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping
    from io import FileIO

    import torch


class _Planned(NamedTuple):
    """A tensor that will be written: enough to lay the file out before any of its bytes are fetched."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    size: int
    value: Any


def write(
    path: str | os.PathLike[str],
    tensors: Mapping[str, torch.Tensor | np.ndarray[Any, Any]],
    *,
    metadata: Mapping[str, str] | None = None,
) -> FileDigest:
    """Write a safetensors file whose bytes depend on the names, values and metadata alone.

    Tensors lie by descending size of their dtype, then by the UTF-8 bytes of their names, so that each
    is aligned; metadata is sorted; the header is filled up to 8 bytes with spaces. One tensor at a time
    is brought to the CPU and made contiguous, and not copied where it already is.

    Args:
        path: the file; its folder must exist. It appears whole or stays as it was.
        tensors: torch tensors of any device and layout in memory, or arrays. Values on ``meta``, sparse
            and quantised ones are refused.
        metadata: strings to strings.

    Returns:
        Where, how many bytes, and their SHA-256.

    Raises:
        TensorFileError: ``E_TENSORS_NAME``, ``E_TENSORS_DTYPE``, ``E_TENSORS_VALUE``, ``E_TENSORS_METADATA``,
            ``E_TENSORS_HEADER_LENGTH``, ``E_TENSORS_WRITE`` (no space, no permission, no folder).
    """
    plan = [_planned(name, value, path) for name, value in tensors.items()]
    plan.sort(key=lambda one: (-DTYPES[one.dtype], one.name.encode("utf-8")))
    header = _header(plan, metadata or {}, path)
    digest, size = hashlib.sha256(header), len(header)
    try:
        with replacing(path) as file:
            file.write(header)
            for one in plan:
                data = _bytes(one, path)
                size += data.nbytes
                at = 0
                while at < data.nbytes:  # in pieces: hashed while in the cache, and no system writes 2 GiB at once
                    at += _put(file, data[at : at + CHUNK], digest)
    except OSError as error:
        raise TensorFileError(
            "E_TENSORS_WRITE",
            f"the file cannot be written: {error}",
            where=path,
            hint="nothing was left behind; make room or choose another folder",
        ) from None
    return FileDigest(path=Path(path), size=size, sha256=digest.hexdigest())


def _put(file: FileIO, piece: memoryview, digest: hashlib._Hash) -> int:
    done = file.write(piece)
    digest.update(piece[:done])
    return done


def _is_torch(value: object) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def _planned(name: str, value: Any, path: str | os.PathLike[str]) -> _Planned:
    fault = "taken by the format" if name == "__metadata__" else name_fault(name)
    if fault:
        raise TensorFileError("E_TENSORS_NAME", f"a tensor's name is {fault}", where=path, found=name)
    if _is_torch(value):
        import torch

        plain = value.layout == torch.strided and not value.is_quantized and not value.is_nested
        if value.device.type == "meta" or not plain:
            raise TensorFileError(
                "E_TENSORS_VALUE", f"{name}: only dense tensors with values can be written", where=path
            )
    elif not isinstance(value, np.ndarray):
        raise TensorFileError("E_TENSORS_VALUE", f"{name}: not a tensor", where=path, found=type(value).__name__)
    dtype, shape = dtype_name(value.dtype), tuple(int(dim) for dim in value.shape)
    if dtype == "F4":
        if not shape:
            raise TensorFileError("E_TENSORS_VALUE", f"{name}: F4 needs a dimension that counts pairs", where=path)
        shape = (*shape[:-1], shape[-1] * 2)
    if len(shape) > MAX_RANK:
        raise TensorFileError("E_TENSORS_SHAPE", f"{name}: too many dimensions", where=path, found=len(shape))
    return _Planned(name, dtype, shape, math.prod(shape) * DTYPES[dtype] // 8, value)


def _header(plan: list[_Planned], metadata: Mapping[str, str], path: str | os.PathLike[str]) -> bytes:
    """Length, JSON, spaces: everything that comes before the buffer."""
    header: dict[str, object] = {}
    if metadata:
        if not all(isinstance(text, str) for pair in metadata.items() for text in pair):
            raise TensorFileError("E_TENSORS_METADATA", "metadata maps strings to strings", where=path)
        header["__metadata__"] = dict(sorted(metadata.items()))
    at = 0
    for one in plan:
        header[one.name] = {"dtype": one.dtype, "shape": one.shape, "data_offsets": [at, at + one.size]}
        at += one.size
    try:
        raw = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    except UnicodeEncodeError:
        raise TensorFileError("E_TENSORS_METADATA", "metadata holds half of a surrogate pair", where=path) from None
    raw += b" " * (-len(raw) % 8)
    if len(raw) > MAX_HEADER:
        raise TensorFileError(
            "E_TENSORS_HEADER_LENGTH",
            "too many tensors for one file",
            where=path,
            expected=f"at most {MAX_HEADER} bytes",
        )
    return struct.pack("<Q", len(raw)) + raw


def _bytes(one: _Planned, path: str | os.PathLike[str]) -> memoryview:
    """The bytes of one value, little-endian and in C order."""
    if _is_torch(one.value):
        import torch

        try:
            tensor = one.value.detach().cpu().resolve_conj().resolve_neg().contiguous()
            array = tensor.view(-1).view(torch.uint8).numpy() if tensor.numel() else np.empty(0, np.uint8)
        except (RuntimeError, TypeError) as error:  # a fake tensor, one spread over machines, …
            raise TensorFileError("E_TENSORS_VALUE", f"{one.name}: it has no bytes: {error}", where=path) from None
        if sys.byteorder == "big":
            array = array.view(f"u{tensor.element_size()}").byteswap().view(np.uint8)
    else:
        array = np.ascontiguousarray(one.value)
        if array.dtype.byteorder == ">" or (array.dtype.byteorder == "=" and sys.byteorder == "big"):
            array = array.byteswap()
        array = array.reshape(-1).view(np.uint8)
    return memoryview(array.data)
