"""20 to 27: the tensor files."""

from __future__ import annotations

import os
from typing import Any

import deltahub
from deltahub.tensors import TensorFile
from tests.hostile.corpus import Room, case, cases
from tests.tensors.cases import EMPTY, HOSTILE, file_bytes

NUMBERS = {
    20: ("empty file", "seven bytes", "length 0", "length u64 max", "length beyond the end", "length over the cap"),
    21: (
        "overlap", "same bytes twice", "leading hole", "inner hole", "trailing bytes", "no tensors, yet bytes",
        "truncated", "reversed offsets", "offsets of another size",
    ),
    22: ("duplicate name", "duplicate name, escaped", "duplicate dtype", "duplicate metadata"),
    23: (
        "shape overflow", "shape overflow, then 0", "dimension over u64", "0 and 2^62", "rank 100,001", "rank 17",
        "bool dimension", "float dimension",
    ),
    24: ("lists that eat memory",),
    25: ("unknown dtype", "lower-case dtype", "dtype is a list"),
}  # fmt: skip
_BY_NAME = {name: (data, code) for name, data, code in HOSTILE}


def _header(room: Room, data: bytes) -> Any:
    room.bytes(data)
    path = room.weights
    return [*room.refuse(), lambda: TensorFile.open(path), lambda: TensorFile.read(path)]


for _number, _names in NUMBERS.items():
    cases(_number, {_name: _BY_NAME[_name] for _name in _names})(_header)
# What else a header can be stays with the number that it is closest to: its syntax.
_taken = {name for names in NUMBERS.values() for name in names}
cases(20, {f"header, {name}": given for name, given in _BY_NAME.items() if name not in _taken})(_header)


@case(24, "a million tensors", "E_TENSORS_COUNT")
def _(room: Room) -> Any:
    header = "{" + ",".join(f'"{i}":{EMPTY}' for i in range(1_000_000)) + "}"
    return _header(room, file_bytes(header[: 15 << 20].rpartition(",")[0] + "}"))


@case(24, "a million tensors, beyond the header's cap", "E_TENSORS_HEADER_LENGTH")
def _(room: Room) -> Any:
    return _header(room, file_bytes("{" + ",".join(f'"{i}":{EMPTY}' for i in range(1_000_000)) + "}"))


@cases(25, {f"{d} for a factor": (d, "E_PACKAGE_TENSORS") for d in ("F4", "F8_E4M3", "C64", "BOOL", "I8", "I64", "U8")})
def _(room: Room, dtype: str) -> Any:
    from deltahub.tensors import DTYPES

    with TensorFile.read(room.weights) as file:
        shapes = {name: info.shape for name, info in file.items()}
    header, at = {}, 0
    for name, shape in shapes.items():
        size = shape[0] * shape[1] * DTYPES[dtype] // 8
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    room.bytes(file_bytes(header, bytes(at)))
    return room.refuse()


def _declared(room: Room) -> None:
    os.truncate(room.weights, 1 << 40)
    room.edit(lambda d: d["files"][0].update(size=1 << 40, sha256="0" * 64), rehash=False)


@case(26, "a terabyte that is declared", "E_TENSORS_TOO_LARGE")
def _(room: Room) -> Any:
    _declared(room)
    return room.refuse()


@case(26, "a terabyte that is declared, pulled", "E_HUB_TOO_LARGE")
def _(room: Room) -> Any:
    _declared(room)
    return lambda: deltahub.pull(room.package)


@case(26, "a terabyte that is not declared, pulled", "E_HUB_DIGEST")
def _(room: Room) -> Any:
    os.truncate(room.weights, 1 << 40)
    return lambda: deltahub.pull(room.package)


@case(26, "a terabyte that is not declared", "E_TENSORS_SIZE")
def _(room: Room) -> Any:
    os.truncate(room.weights, 1 << 40)
    return room.refuse()


@case(26, "a terabyte by itself", "E_TENSORS_LAYOUT")
def _(room: Room) -> Any:
    os.truncate(room.weights, 1 << 40)
    return lambda: TensorFile.open(room.weights)


@case(26, "a terabyte as the backbone", "E_TENSORS_LAYOUT")
def _(room: Room) -> Any:
    os.truncate(room.backbone / "model.safetensors", 1 << 40)
    backbone = room.backbone
    return lambda: room.load(backbone=backbone)


def _more(held: dict[str, Any]) -> None:
    name = next(iter(held))
    held["lora/model.layers.0.self_attn.k_proj/up"] = held[name].clone()


CHANGES: dict[str, tuple[object, str]] = {
    "not named in the manifest": (_more, "E_PACKAGE_TENSORS"),
    "missing": (lambda held: held.pop(min(held)), "E_PACKAGE_TENSORS"),
    "all of them missing": (lambda held: held.clear(), "E_PACKAGE_TENSORS"),
    "under another module": (
        lambda held: held.update({f"other{n[4:]}": held.pop(n) for n in list(held)}),
        "E_PACKAGE_TENSORS",
    ),
    "under another name": (
        lambda held: held.update({n.replace("/down", "/lora_A"): held.pop(n) for n in list(held)}),
        "E_PACKAGE_TENSORS",
    ),
}


@cases(27, {f"tensors, {name}": given for name, given in CHANGES.items()})
def _(room: Room, change: Any) -> Any:
    room.tensors(change)
    return room.refuse()
