"""Safetensors files, read strictly and written deterministically, without torch.

The ``safetensors`` library lets files through that two parsers may read in two
ways: a name given twice, unknown fields, names that do not print. The reader here
refuses these and everything the library refuses, before any memory is taken that
the file itself asks for. What it accepts, the library accepts too, and finds the
same bytes in it.

Two ways in: :meth:`TensorFile.open` maps a file (backbones, gigabytes), and
:meth:`TensorFile.read` takes it into memory once, so that the bytes that were
hashed are the bytes that are used (deltas). One way out: :func:`write`, whose
bytes depend on nothing but what is written.
"""

from __future__ import annotations

__all__ = [
    "DTYPES",
    "MAX_BYTES",
    "MAX_HEADER",
    "MAX_NAME",
    "MAX_RANK",
    "MAX_TENSORS",
    "FileDigest",
    "Pending",
    "TensorFile",
    "TensorInfo",
    "copy_stream",
    "dtype_name",
    "open_regular",
    "sha256_file",
    "torch_dtype",
    "value_bytes",
    "value_layout",
    "write",
]

from deltahub.tensors.dtypes import DTYPES, dtype_name, torch_dtype
from deltahub.tensors.files import FileDigest, copy_stream, open_regular, sha256_file
from deltahub.tensors.header import MAX_HEADER, MAX_NAME, MAX_RANK, MAX_TENSORS, TensorInfo
from deltahub.tensors.reading import MAX_BYTES, TensorFile
from deltahub.tensors.values import Pending, value_bytes, value_layout
from deltahub.tensors.writing import write
