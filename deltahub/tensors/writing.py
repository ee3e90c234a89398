"""Writing safetensors: the same tensors give the same bytes, on every run and every machine."""

from __future__ import annotations

__all__ = ["write"]

import hashlib
import json
import math
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from deltahub.errors import TensorFileError
from deltahub.tensors.dtypes import DTYPES
from deltahub.tensors.files import CHUNK, FileDigest, replacing
from deltahub.tensors.header import MAX_HEADER
from deltahub.tensors.values import Pending, value_bytes, value_layout

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping
    from io import FileIO

    import numpy as np
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
    tensors: Mapping[str, torch.Tensor | np.ndarray[Any, Any] | Pending],
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
            and quantised ones are refused. A :class:`Pending` one is made when its turn has come.
        metadata: strings to strings.

    Returns:
        Where, how many bytes, and their SHA-256.

    Raises:
        TensorFileError: ``E_TENSORS_NAME``, ``E_TENSORS_DTYPE``, ``E_TENSORS_VALUE``, ``E_TENSORS_METADATA``,
            ``E_TENSORS_HEADER_LENGTH``, ``E_TENSORS_WRITE`` (no space, no permission, no folder).
    """
    plan = []
    for name, value in tensors.items():
        dtype, shape = value_layout(name, value, path)
        plan.append(_Planned(name, dtype, shape, math.prod(shape) * DTYPES[dtype] // 8, value))
    plan.sort(key=lambda one: (-DTYPES[one.dtype], one.name.encode("utf-8")))
    header = _header(plan, metadata or {}, path)
    digest, size = hashlib.sha256(), 0
    try:
        with replacing(path) as file:
            size += _put(file, memoryview(header), digest)
            for one in plan:
                size += _put(file, value_bytes(one.name, one.value, path), digest)
    except OSError as error:
        raise TensorFileError(
            "E_TENSORS_WRITE",
            f"the file cannot be written: {error}",
            where=path,
            hint="nothing was left behind; make room or choose another folder",
        ) from None
    return FileDigest(path=Path(path), size=size, sha256=digest.hexdigest())


def _put(file: FileIO, data: memoryview, digest: hashlib._Hash) -> int:
    """Write all of it, in pieces: each is hashed while in the cache, and no system writes 2 GiB at once."""
    at = 0
    while at < data.nbytes:
        done = file.write(data[at : at + CHUNK])
        digest.update(data[at : at + done])
        at += done
    return at


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
