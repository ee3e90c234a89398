"""Files right and wrong."""

from __future__ import annotations

import json
import struct

ENTRY = {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}
EMPTY = '{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'


def file_bytes(header: object, body: bytes = b"", *, length: int | None = None) -> bytes:
    raw = (
        header
        if isinstance(header, bytes)
        else header.encode()
        if isinstance(header, str)
        else json.dumps(header).encode()
    )
    return struct.pack("<Q", len(raw) if length is None else length) + raw + body


def one(dtype: object, shape: object, size: int, **more: object) -> bytes:
    return file_bytes({"a": {"dtype": dtype, "shape": shape, "data_offsets": [0, size], **more}}, bytes(size))


BIDI = "a\u202eb"
HOSTILE: list[tuple[str, bytes, str]] = [
    # what safetensors refuses as well
    ("empty file", b"", "E_TENSORS_HEADER_LENGTH"),
    ("seven bytes", b"1234567", "E_TENSORS_HEADER_LENGTH"),
    ("length 0", file_bytes("{}", length=0), "E_TENSORS_HEADER_LENGTH"),
    ("length 1", file_bytes("{"), "E_TENSORS_HEADER_LENGTH"),
    ("length u64 max", file_bytes("{}", length=2**64 - 1), "E_TENSORS_HEADER_LENGTH"),
    ("length beyond the end", file_bytes("{}", length=3), "E_TENSORS_HEADER_LENGTH"),
    ("length over the cap", file_bytes("{}" + " " * (17 << 20)), "E_TENSORS_HEADER_LENGTH"),
    ("byte order mark", file_bytes(b"\xef\xbb\xbf{}"), "E_TENSORS_HEADER_SYNTAX"),
    ("array root", file_bytes("[]"), "E_TENSORS_HEADER_SYNTAX"),
    ("string root", file_bytes('"a"'), "E_TENSORS_HEADER_SYNTAX"),
    ("bad UTF-8", file_bytes(b'{"\xff":' + EMPTY.encode() + b"}"), "E_TENSORS_HEADER_SYNTAX"),
    ("lone surrogate in a name", file_bytes('{"\\ud800":' + EMPTY + "}"), "E_TENSORS_NAME"),
    ("lone surrogate in metadata", file_bytes('{"__metadata__":{"a":"\\ud800"}}'), "E_TENSORS_METADATA"),
    ("NaN literal", file_bytes('{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,0]}}'), "E_TENSORS_HEADER_SYNTAX"),
    ("Infinity", file_bytes('{"a":{"dtype":"U8","shape":[Infinity],"data_offsets":[0,0]}}'), "E_TENSORS_HEADER_SYNTAX"),
    ("1e999", file_bytes('{"a":{"dtype":"U8","shape":[1e999],"data_offsets":[0,0]}}'), "E_TENSORS_HEADER_SYNTAX"),
    ("5,000 digits", file_bytes('{"a":{"dtype":"U8","shape":[' + "9" * 5000 + "]}}"), "E_TENSORS_HEADER_SYNTAX"),
    ("minus zero", file_bytes('{"a":{"dtype":"U8","shape":[-0],"data_offsets":[0,0]}}'), "E_TENSORS_HEADER_SYNTAX"),
    ("trailing JSON", file_bytes('{"a":' + EMPTY + "}{}"), "E_TENSORS_HEADER_SYNTAX"),
    ("NUL padding", file_bytes(b'{"a":' + EMPTY.encode() + b"}\0\0"), "E_TENSORS_HEADER_SYNTAX"),
    ("nesting", file_bytes('{"a":' + "[" * 100_000 + "]" * 100_000 + "}"), "E_TENSORS_HEADER_SYNTAX"),
    ("cut JSON", file_bytes('{"a":'), "E_TENSORS_HEADER_SYNTAX"),
    (
        "duplicate dtype",
        file_bytes('{"a":{"dtype":"U8","dtype":"U8","shape":[0],"data_offsets":[0,0]}}'),
        "E_TENSORS_DUPLICATE",
    ),
    ("duplicate metadata", file_bytes('{"__metadata__":{},"__metadata__":{}}'), "E_TENSORS_DUPLICATE"),
    ("metadata of numbers", file_bytes({"__metadata__": {"a": 1}}), "E_TENSORS_METADATA"),
    ("metadata is a list", file_bytes({"__metadata__": []}), "E_TENSORS_METADATA"),
    ("overlap", file_bytes({"a": ENTRY, "b": {**ENTRY, "data_offsets": [1, 3]}}, b"123"), "E_TENSORS_LAYOUT"),
    ("same bytes twice", file_bytes({"a": ENTRY, "b": ENTRY}, b"12"), "E_TENSORS_LAYOUT"),
    ("leading hole", file_bytes({"a": {**ENTRY, "data_offsets": [1, 3]}}, b"123"), "E_TENSORS_LAYOUT"),
    ("inner hole", file_bytes({"a": ENTRY, "b": {**ENTRY, "data_offsets": [3, 5]}}, b"12345"), "E_TENSORS_LAYOUT"),
    ("trailing bytes", file_bytes({"a": ENTRY}, b"123"), "E_TENSORS_LAYOUT"),
    ("no tensors, yet bytes", file_bytes("{}", b"1"), "E_TENSORS_LAYOUT"),
    ("truncated", file_bytes({"a": ENTRY}, b"1"), "E_TENSORS_LAYOUT"),
    ("reversed offsets", file_bytes({"a": {**ENTRY, "data_offsets": [2, 0]}}, b"12"), "E_TENSORS_LAYOUT"),
    ("offsets of another size", one("F32", [2], 4), "E_TENSORS_LAYOUT"),
    ("negative offsets", file_bytes({"a": {**ENTRY, "data_offsets": [-2, 0]}}), "E_TENSORS_HEADER_SYNTAX"),
    ("three offsets", file_bytes({"a": {**ENTRY, "data_offsets": [0, 2, 2]}}, b"12"), "E_TENSORS_ENTRY"),
    ("one offset", file_bytes({"a": {**ENTRY, "data_offsets": [2]}}, b"12"), "E_TENSORS_ENTRY"),
    (
        "offsets as bools",
        file_bytes({"a": {"dtype": "U8", "shape": [1], "data_offsets": [False, True]}}, b"1"),
        "E_TENSORS_ENTRY",
    ),
    ("float dimension", one("U8", [2.0], 2), "E_TENSORS_HEADER_SYNTAX"),
    ("bool dimension", one("U8", [True], 1), "E_TENSORS_SHAPE"),
    ("string dimension", one("U8", ["1"], 1), "E_TENSORS_SHAPE"),
    ("shape is a number", one("U8", 2, 2), "E_TENSORS_SHAPE"),
    ("unknown dtype", one("F128", [1], 16), "E_TENSORS_DTYPE"),
    ("lower-case dtype", one("f32", [1], 4), "E_TENSORS_DTYPE"),
    ("dtype is a list", one(["U8"], [1], 1), "E_TENSORS_DTYPE"),
    ("missing field", file_bytes({"a": {"dtype": "U8", "shape": [0]}}), "E_TENSORS_ENTRY"),
    ("entry is null", file_bytes({"a": None}), "E_TENSORS_ENTRY"),
    ("odd count of F4", one("F4", [3], 1), "E_TENSORS_LAYOUT"),
    ("shape overflow", one("U8", [2**62, 2**62], 0), "E_TENSORS_SHAPE"),
    ("shape overflow, then 0", one("U8", [2**62, 2**62, 0], 0), "E_TENSORS_SHAPE"),
    ("dimension over u64", one("U8", [2**70, 0], 0), "E_TENSORS_SHAPE"),
    # what safetensors 0.8 lets through
    ("duplicate name", file_bytes('{"a":' + EMPTY + ',"a":' + EMPTY + "}"), "E_TENSORS_DUPLICATE"),
    ("duplicate name, escaped", file_bytes('{"a":' + EMPTY + ',"\\u0061":' + EMPTY + "}"), "E_TENSORS_DUPLICATE"),
    ("duplicate inside metadata", file_bytes('{"__metadata__":{"a":"1","a":"2"}}'), "E_TENSORS_DUPLICATE"),
    ("unknown field", one("U8", [1], 1, extra=1), "E_TENSORS_ENTRY"),
    ("metadata null", file_bytes({"__metadata__": None}), "E_TENSORS_METADATA"),
    ("leading space", file_bytes(' {"a":' + EMPTY + "}"), "E_TENSORS_HEADER_SYNTAX"),
    ("trailing tab", file_bytes('{"a":' + EMPTY + "}\t"), "E_TENSORS_HEADER_SYNTAX"),
    ("empty name", file_bytes({"": ENTRY}, b"12"), "E_TENSORS_NAME"),
    ("NUL in a name", file_bytes({"a\0": ENTRY}, b"12"), "E_TENSORS_NAME"),
    ("escape in a name", file_bytes({"\x1b[2J": ENTRY}, b"12"), "E_TENSORS_NAME"),
    ("bidi in a name", file_bytes({BIDI: ENTRY}, b"12"), "E_TENSORS_NAME"),
    ("1 MB name", file_bytes({"a" * 1_000_000: ENTRY}, b"12"), "E_TENSORS_NAME"),
    ("rank 100,001", one("U8", [1] * 100_001, 1), "E_TENSORS_SHAPE"),
    ("rank 17", one("U8", [1] * 17, 1), "E_TENSORS_SHAPE"),
    ("0 and 2^62", one("U8", [0, 2**62], 0), "E_TENSORS_SHAPE"),
    ("lists that eat memory", file_bytes('{"a":[' + "[]," * 1_000_000 + "[]]}"), "E_TENSORS_COUNT"),
]
LENIENT = [name for name, _, _ in HOSTILE].index("duplicate name")
