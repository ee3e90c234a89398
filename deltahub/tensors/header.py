"""The header of a safetensors file: bounded, parsed, and held against the size of the file."""

from __future__ import annotations

__all__ = [
    "MAX_HEADER",
    "MAX_NAME",
    "MAX_RANK",
    "MAX_TENSORS",
    "Entry",
    "Header",
    "TensorInfo",
    "header_bytes",
    "name_fault",
    "parse",
]

import json
import struct
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, TypeAlias

from deltahub.errors import TensorFileError, printable
from deltahub.limits import DEFAULT
from deltahub.tensors.dtypes import DTYPES

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping
    from io import FileIO

MAX_HEADER = DEFAULT.tensors_header_bytes
MAX_TENSORS = DEFAULT.tensors_count
MAX_RANK = 16
MAX_NAME = DEFAULT.manifest_text_length
MAX_BITS = 1 << 63  # of one tensor, empty dimensions counted as 1

Entry: TypeAlias = tuple[str, tuple[int, ...], int, int]
"""dtype, shape, begin, end: a plain tuple, because a backbone has thousands and most are never looked at."""

_MAGIC = {
    b"PK\x03\x04": "a zip archive, such as torch.save writes",
    b"PK\x05\x06": "an empty zip archive",
    b"\x80\x02": "a pickle",
    b"\x80\x03": "a pickle",
    b"\x80\x04": "a pickle",
    b"\x80\x05": "a pickle",
    b"GGUF": "a GGUF file",
    b"\x89HDF": "an HDF5 file",
    b"version ": "a Git LFS pointer: the file itself was never downloaded",
    b"<!DOCTYP": "an HTML page",
    b"<html": "an HTML page",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorInfo:
    """One tensor of a file: its safetensors dtype name, its shape, and its absolute byte offsets in the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class Header(NamedTuple):
    """What a header says: the tensors in the order given, and the metadata."""

    entries: dict[str, Entry]
    metadata: dict[str, str]


def header_bytes(file: FileIO, size: int, path: str | os.PathLike[str], max_header: int) -> bytes:
    """The first bytes of a file up to the end of its header, length field included.

    Raises:
        TensorFileError: ``E_TENSORS_HEADER_LENGTH``, ``E_TENSORS_NOT_SAFETENSORS``.
    """
    start = file.read(8)
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
    if 2 <= length <= min(max_header, size - 8):
        raw = start + (file.read(length) or b"")
        if len(raw) == length + 8:
            return raw
    for magic, name in _MAGIC.items():
        if start.startswith(magic):
            raise TensorFileError("E_TENSORS_NOT_SAFETENSORS", "this is not a safetensors file", where=path, found=name)
    raise TensorFileError(
        "E_TENSORS_HEADER_LENGTH",
        "the header's length is impossible",
        where=path,
        expected=f"2 to {max_header} bytes within a file of {size}",
        found=f"{length} bytes" if length >= 0 else "no length: the file is shorter than 8 bytes",
    )


class _Bad(Exception):  # noqa: N818 - never leaves this module
    """A fault found inside a JSON hook, where the path is not known."""

    def __init__(self, code: str, what: str, found: object = None) -> None:
        super().__init__(what)
        self.code, self.what, self.found = code, what, found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise _Bad("E_TENSORS_DUPLICATE", "the header has a key twice", twice)
    return found


def _no_number(text: str) -> NoReturn:
    raise _Bad("E_TENSORS_HEADER_SYNTAX", "the header has a number that is not a plain non-negative integer", text)


def _integer(text: str) -> int:
    return _no_number(text) if text.startswith("-") else int(text)


def _load(raw: bytes, max_tensors: int) -> dict[str, Any]:
    """JSON as strictly as safetensors means it; bounded, whatever the bytes are."""
    if not raw.startswith(b"{") or not raw.rstrip(b" ").endswith(b"}"):
        raise _Bad("E_TENSORS_HEADER_SYNTAX", "the header does not begin with '{' or does not end with '}' and spaces")
    # Lists and objects cost far more in memory than in the file: count them before they are made.
    if raw.count(b"[") + raw.count(b"{") > 8 * max_tensors + 1024 or raw.count(b'"dtype"') > max_tensors:
        raise _Bad("E_TENSORS_COUNT", "the header has too many tensors", f"more than {max_tensors}")
    # Python reads -0 as 0 and safetensors does not; the slower hook is only paid for where a minus sign is seen.
    try:
        found = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_float=_no_number,
            parse_constant=_no_number,
            parse_int=_integer if b"-" in raw else None,
        )
    except RecursionError:
        raise _Bad("E_TENSORS_HEADER_SYNTAX", "the header is nested too deep") from None
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are of its kind
        raise _Bad("E_TENSORS_HEADER_SYNTAX", f"the header is not JSON in UTF-8: {error}") from None
    return dict(found)


def _metadata(value: object) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise _Bad("E_TENSORS_METADATA", "__metadata__ must map strings to strings", type(value).__name__)
    for text in (*value.keys(), *value.values()):
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise _Bad("E_TENSORS_METADATA", "__metadata__ holds half of a surrogate pair", text) from None
    return value


def name_fault(name: str) -> str | None:
    """What is wrong with a tensor's name: it is empty, too long, or does not print; ``None``: nothing."""
    if name and len(name) <= MAX_NAME and name.isprintable():
        return None
    return "empty" if not name else "too long" if len(name) > MAX_NAME else "not printable"


def _naturals(value: object, longest: int) -> bool:
    if type(value) is not list or len(value) > longest:
        return False
    return all(type(item) is int and 0 <= item < MAX_BITS for item in value)


def _entry(name: str, fields: object, total: int) -> tuple[str, list[int], int, int]:
    """One entry, offsets still relative to the buffer of ``total`` bytes."""
    fault = name_fault(name)
    if fault:
        raise _Bad("E_TENSORS_NAME", f"a tensor's name is {fault}", name[:MAX_NAME])
    if type(fields) is not dict or len(fields) != 3 or not fields.keys() >= {"dtype", "shape", "data_offsets"}:
        raise _Bad("E_TENSORS_ENTRY", f"{name}: the fields must be dtype, shape and data_offsets", fields)
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    bits = DTYPES.get(dtype) if type(dtype) is str else None
    if bits is None:
        raise _Bad("E_TENSORS_DTYPE", f"{name}: there is no such dtype", dtype)
    if not _naturals(shape, MAX_RANK):
        raise _Bad("E_TENSORS_SHAPE", f"{name}: a shape is a list of at most {MAX_RANK} non-negative integers", shape)
    if not _naturals(offsets, 2) or len(offsets) != 2:
        raise _Bad("E_TENSORS_ENTRY", f"{name}: data_offsets is a list of two non-negative integers", offsets)
    extent, empty = bits, False
    for dim in shape:
        if dim:
            extent *= dim
        else:
            empty = True
    if extent >= MAX_BITS:
        raise _Bad("E_TENSORS_SHAPE", f"{name}: the shape is too large", shape)
    size, odd = (0, 0) if empty else divmod(extent, 8)
    begin, end = offsets
    if odd or end - begin != size or end > total:
        raise _Bad("E_TENSORS_LAYOUT", f"{name}: data_offsets do not fit the dtype, the shape and the file", offsets)
    return dtype, shape, begin, end


def _entries(header: Mapping[str, object], total: int, base: int, max_tensors: int) -> dict[str, Entry]:
    if len(header) > max_tensors:
        raise _Bad("E_TENSORS_COUNT", "the header has too many tensors", f"{len(header)}, at most {max_tensors}")
    entries: dict[str, Entry] = {}
    spans = []
    for name, fields in header.items():
        dtype, shape, begin, end = _entry(name, fields, total)
        spans.append((begin, end, name))
        entries[name] = (dtype, tuple(shape), base + begin, base + end)
    spans.sort()
    at = 0
    for begin, end, name in spans:
        if begin != at:
            what = "overlaps the tensor before it" if begin < at else "leaves a hole before it"
            raise _Bad("E_TENSORS_LAYOUT", f"{name} {what}", f"byte {min(begin, at)} of the buffer")
        at = end
    if at != total:
        raise _Bad("E_TENSORS_LAYOUT", "there are bytes after the last tensor", f"{total - at} bytes")
    return entries


def parse(raw: bytes, total: int, base: int, path: str | os.PathLike[str], max_tensors: int) -> Header:
    """Check a header against the ``total`` bytes that follow it from offset ``base`` on.

    Raises:
        TensorFileError: the first thing that is not as a strict file has it.
    """
    try:
        header = _load(raw, max_tensors)
        metadata = _metadata(header.pop("__metadata__")) if "__metadata__" in header else {}
        return Header(_entries(header, total, base, max_tensors), metadata)
    except _Bad as bad:
        found = None if bad.found is None else printable(bad.found)
        raise TensorFileError(bad.code, bad.what, where=path, found=found) from None
