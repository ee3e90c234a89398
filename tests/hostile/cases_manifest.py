"""12 to 19: the manifest's JSON and what it says."""

from __future__ import annotations

from typing import Any

from deltahub.manifest import Manifest
from tests.hostile.corpus import Room, case, cases

DEEP = 100_000


@cases(
    12,
    {
        "a member twice": (('"spec_version"', '"spec_version": "1.0", "spec_version"'), "E_MANIFEST_DUPLICATE_KEY"),
        "twice, once escaped": (('"rank"', '"r\\u0061nk": 1, "rank"'), "E_MANIFEST_DUPLICATE_KEY"),
        "twice, far inside": (('"sha256"', '"sha256": "0", "sha256"'), "E_MANIFEST_DUPLICATE_KEY"),
    },
)
def _(room: Room, change: tuple[str, str]) -> Any:
    return _replaced(room, change)


def _replaced(room: Room, change: tuple[str, str]) -> Any:
    text = room.text()
    assert change[0] in text, change[0]
    return _written(room, text.replace(*change, 1).encode())


def _written(room: Room, data: bytes) -> Any:
    (room.package / "delta.json").write_bytes(data)
    return [*room.refuse(), lambda: Manifest.parse(data)]


@cases(
    13,
    {
        name: (('"rank": 2', f'"rank": {number}'), "E_MANIFEST_NUMBER")
        for name, number in {
            "NaN": "NaN",
            "Infinity": "Infinity",
            "minus Infinity": "-Infinity",
            "1e999": "1e999",
            "5,000 digits": "9" * 5000,
            "beyond 2^53": str(2**53),
        }.items()
    },
)
def _(room: Room, change: tuple[str, str]) -> Any:
    return _replaced(room, change)


@cases(
    14,
    {
        "arrays": (("[" * DEEP + "]" * DEEP).encode(), "E_MANIFEST_DEPTH"),
        "objects": (('{"a":' * DEEP).encode(), "E_MANIFEST_DEPTH"),
        "arrays that never close": (b"[" * DEEP, "E_MANIFEST_DEPTH"),
    },
)
def _(room: Room, data: bytes) -> Any:
    return _written(room, data)


@case(14, "deep inside a valid one", "E_MANIFEST_DEPTH")
def _(room: Room) -> Any:
    deep = "[" * DEEP + "]" * DEEP
    return _replaced(room, ('"spec_version"', f'"extensions": {{"com.example.x": {deep}}}, "spec_version"'))


@cases(
    15,
    {
        "byte order mark": (lambda data: b"\xef\xbb\xbf" + data, "E_MANIFEST_ENCODING"),
        "UTF-16": (lambda data: data.decode().encode("utf-16"), "E_MANIFEST_ENCODING"),
        "overlong": (lambda data: data.replace(b"lora", b"lor\xc1\xa1"), "E_MANIFEST_ENCODING"),
        "surrogate as bytes": (lambda data: data.replace(b"lora", b"lor\xed\xa0\x80"), "E_MANIFEST_ENCODING"),
        "lone surrogate": (lambda data: data.replace(b"lora", b"\\ud800"), "E_MANIFEST_ENCODING"),
    },
)
def _(room: Room, change: Any) -> Any:
    return _written(room, change((room.package / "delta.json").read_bytes()))


@cases(
    16,
    {
        "bool for an integer": (('"version": 1', '"version": true'), "E_MANIFEST_FIELD"),
        "string for an integer": (('"version": 1', '"version": "1"'), "E_MANIFEST_FIELD"),
        "float for an integer": (('"version": 1', '"version": 1.0'), "E_MANIFEST_FIELD"),
        "null": (('"version": 1', '"version": null'), "E_MANIFEST_FIELD"),
        "a list for a string": (('"kind": "lora"', '"kind": ["lora"]'), "E_MANIFEST_FIELD"),
        "bool in a config": (('"rank": 2', '"rank": true'), "E_KIND_CONFIG"),
        "string in a config": (('"rank": 2', '"rank": "2"'), "E_KIND_CONFIG"),
        "float in a config": (('"rank": 2', '"rank": 2.0'), "E_KIND_CONFIG"),
        "null in a config": (('"rank": 2', '"rank": null'), "E_KIND_CONFIG"),
        "unknown in a config": (('"rank": 2', '"rank": 2, "alpha": 4'), "E_KIND_CONFIG"),
    },
)
def _(room: Room, change: tuple[str, str]) -> Any:
    acts = _replaced(room, change)
    return acts[:2] if "rank" in change[0] else acts


@cases(16, {f"root is {t}": (t.encode(), "E_MANIFEST_JSON") for t in ("[]", "null", "1", '"x"', "", "{} {}")})
def _(room: Room, data: bytes) -> Any:
    return _written(room, data)


@cases(
    17,
    {
        "unknown major": (lambda d: d.update(spec_version="2.0"), "E_MANIFEST_VERSION"),
        "major of 10^9 digits' sort": (lambda d: d.update(spec_version="9" * 4000 + ".0"), "E_MANIFEST_VERSION"),
        "no version": (lambda d: d.pop("spec_version"), "E_MANIFEST_FIELD"),
        "unknown requirement": (lambda d: d.update(requires=["com.example.quantum"]), "E_MANIFEST_REQUIRES"),
        "unknown kind": (lambda d: d["modules"][0].update(kind="com.example.none"), "E_KIND_UNKNOWN"),
        "unknown version of a kind": (lambda d: d["modules"][0].update(version=99), "E_KIND_UNKNOWN"),
        "kind that shadows": (
            lambda d: d.update(kinds=[_document("lora", "y + linear(linear(x, down), up)")]),
            "E_KIND_NAME",
        ),
        "kind that is code": (
            lambda d: _own(d, "().__class__.__bases__[0].__subclasses__()"),
            "E_KIND_SYNTAX",
        ),
        "kind that imports": (lambda d: _own(d, "__import__('os').system('id')"), "E_KIND_SYNTAX"),
        "kind with an unknown op": (lambda d: _own(d, "y + system(x)"), "E_KIND_OP"),
        "kind that unrolls": (
            lambda d: _own(d, "sum(sum(sum(y for i in range(1000)) for j in range(1000)) for k in range(1000))"),
            "E_KIND_LIMIT",
        ),
        "kind nested deeply": (lambda d: _own(d, "(" * 5000 + "y" + ")" * 5000), "E_KIND_LIMIT"),
        "kind with a huge power": (lambda d: _own(d, "y * 9 ** 9 ** 9 ** 9"), "E_KIND_NUMBER"),
        "kind with 10^6 characters": (lambda d: _own(d, "y" + " + y" * 200_000), "E_KIND_DOCUMENT"),
    },
)
def _(room: Room, change: Any) -> Any:
    room.edit(change)
    return room.refuse()


def _document(name: str, equation: str) -> dict[str, Any]:
    return {
        "kind": name,
        "version": 1,
        "title": "x",
        "hosts": ["linear"],
        "tensors": {"down": {"shape": [2, "in"], "init": "zeros"}, "up": {"shape": ["out", 2], "init": "zeros"}},
        "equations": {"output": equation},
    }


def _own(document: dict[str, Any], equation: str) -> None:
    """Let the package bring a kind with this equation, and use it."""
    document["kinds"] = [_document("com.example.evil", f"y + linear(linear(x, down), up) + ({equation})")]
    document["modules"][0].update(kind="com.example.evil", config={})


@cases(
    18,
    {
        "bidi in a module": (lambda d: d["modules"][0].update(name="lo\u202era"), "E_MANIFEST_FIELD"),
        "escape in a module": (lambda d: d["modules"][0].update(name="\x1b[2Jlora"), "E_MANIFEST_FIELD"),
        "newline in a kind": (lambda d: d["modules"][0].update(kind="lora\nOK"), "E_MANIFEST_FIELD"),
        "bidi in a target": (lambda d: d["modules"][0].update(targets=["a\u202eb"]), "E_TARGET_SYNTAX"),
        "control in a target": (lambda d: d["modules"][0].update(targets=["a\x07b"]), "E_TARGET_SYNTAX"),
        "bidi in an unknown kind's name": (
            lambda d: d.update(kinds=[{"kind": "com.example.\u202ex", "version": 1}]),
            "E_KIND_DOCUMENT",
        ),
        "escape in an extension": (lambda d: d.update(extensions={"com.\x1b[2J": 1}), "E_MANIFEST_EXTENSION"),
        "escape in an unknown requirement": (lambda d: d.update(requires=["\x1b]0;x\x07"]), "E_MANIFEST_REQUIRES"),
    },
)
def _(room: Room, change: Any) -> Any:
    room.edit(change)
    return room.refuse()


NAMES = (
    "__class__",
    "__init__.__globals__",
    "model.__class__.__init__.__globals__",
    "forward.__func__.__globals__",
    "model.layers.0.self_attn.q_proj.weight",
    "model.config",
    "_modules.model",
)


def _code(name: str, plain: str) -> str:
    return "E_TARGET_SYNTAX" if "__" in name else plain


@cases(19, {f"target {name}": (name, _code(name, "E_TARGET_MISSING")) for name in NAMES})
def _(room: Room, name: str) -> Any:
    """The name is looked up among the modules' and never followed."""
    from deltahub.tensors import TensorFile, write

    room.module(targets=[name])
    with TensorFile.read(room.weights) as file:
        held = {n: file.torch(n).clone() for n in file if "layers.0.self_attn.q_proj" in n}
    room.weights.unlink()
    write(room.weights, {f"lora/{name}/{n.rpartition('/')[2]}": t for n, t in held.items()})
    room.edit(lambda d: d["backbone"].pop("leaves", None))
    return [lambda: room.load(verify=None)]


@cases(19, {f"authored target {name}": (name, _code(name, "E_TARGET_NOTHING")) for name in NAMES})
def _(room: Room, name: str) -> Any:
    import deltahub

    return lambda: deltahub.attach(room.model, "lora", name, rank=2)


@case(19, "setting that names what is no field", "E_BACKBONE_SETTING")
def _(room: Room) -> Any:
    setting = {"on": "config", "path": "auto_map.AutoModel", "was": None, "value": "evil.Evil"}
    room.edit(lambda d: d.update(settings=[setting]))
    return room.refuse()
