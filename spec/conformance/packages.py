"""Vectors of whole packages: file maps, sound and hostile. Used by generate.py."""

from __future__ import annotations

import base64
import hashlib
import json
from copy import deepcopy
from typing import Any

import numpy as np

__all__ = ["packages"]

DIGEST = "ab9a3cdd808b2280b6ef2a9a9f94bb67e94ea515796a18f49bbcb74244263c61"
Tensors = dict[str, tuple[str, tuple[int, ...], bytes]]


def f32(*shape: int, value: float = 0.5) -> tuple[str, tuple[int, ...], bytes]:
    return "F32", shape, np.full(shape, value, "<f4").tobytes()


def st(tensors: Tensors) -> bytes:
    header: dict[str, Any] = {}
    body = b""
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    raw = json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + body


def raw(data: bytes) -> dict[str, str]:
    return {"base64": base64.b64encode(data).decode()}


def listed(path: str, data: bytes) -> dict[str, Any]:
    return {"path": path, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


LORA: Tensors = {f"m/l.{i}.q/{n}": f32(*s) for i in (0, 1) for n, s in (("down", (2, 6)), ("up", (4, 2)))}
MODULE = {"name": "m", "kind": "lora", "version": 1, "config": {"rank": 2, "scale": 2.0}, "targets": ["l.{0..1}.q"]}


def manifest(*files: dict[str, Any], **changes: Any) -> dict[str, Any]:
    identity = {"algorithm": "sha256-tree-1", "exact": DIGEST, "bf16": DIGEST, "structure": DIGEST, "tensors": 3}
    return {
        "spec_version": "1.0",
        "backbone": {"identity": identity},
        "modules": [deepcopy(MODULE)],
        "files": list(files),
        **changes,
    }


def packed(tensors: Tensors = LORA, **changes: Any) -> dict[str, Any]:
    """A package of one tensor file."""
    data = st(tensors)
    return {
        "delta.json": {"json": manifest(listed("delta.safetensors", data), **changes)},
        "delta.safetensors": raw(data),
    }


def bias_of(dtype: str, data: bytes, shape: tuple[int, ...] = (4,)) -> dict[str, Any]:
    module = {"name": "b", "kind": "bias", "version": 1, "config": {}, "targets": ["l.0.q"]}
    return packed({"b/l.0.q/value": (dtype, shape, data)}, modules=[module])


def packages() -> list[dict[str, Any]]:
    """Every clause about a package that can be checked without its backbone."""
    cases: list[dict[str, Any]] = []
    sound = packed()
    data = st(LORA)
    entry = listed("delta.safetensors", data)

    def good(description: str, clause: Any, files: dict[str, Any], expect: Any = None, **more: Any) -> None:
        body = {"description": description, "clause": clause, "files": files, **more, "valid": True}
        cases.append({**body, "expect": expect} if expect else body)

    def bad(description: str, clause: Any, code: Any, files: dict[str, Any], **more: Any) -> None:
        body = {"description": description, "clause": clause, "files": files, **more}
        cases.append({**body, "valid": False, "error_code": code})

    good("the least", ["DH-3.1-1", "DH-7.2-1"], sound, {"tensors": sorted(LORA), "ignored": []})
    half = [dict(list(LORA.items())[:1]), dict(list(LORA.items())[1:])]
    shards = {f"delta-0000{i + 1}-of-00002.safetensors": st(t) for i, t in enumerate(half)}
    good("two tensor files", "DH-7.2-1",
         {"delta.json": {"json": manifest(*(listed(n, d) for n, d in shards.items()))}, **{n: raw(d) for n, d in shards.items()}},
         {"tensors": sorted(LORA)})  # fmt: skip
    for name, content in {
        "README.md": "# A delta\n", "model.bin": raw(b"\x80\x04."), "setup.py": "raise SystemExit\n", "delta.zip": raw(b"PK\x03\x04"),
        "notes/a.txt": "a", "pipe": {"fifo": True}, "loop": {"symlink": "loop"}, "away": {"symlink": "{outside}/secret"},
        "huge.safetensors": {"sparse": 1 << 40}, "folder.safetensors": {"directory": True},
    }.items():  # fmt: skip
        good(
            f"a file that nobody listed: {name}",
            "DH-3.1-3",
            {**sound, name: content},
            {"tensors": sorted(LORA)},
            outside={"secret": "x"},
        )
    good("a file in a folder", "DH-3.1-4",
         {"delta.json": {"json": manifest(listed("parts/delta.safetensors", data))}, "parts/delta.safetensors": raw(data)})  # fmt: skip
    bad_probe = "E_PACKAGE_PROBE"
    for what, tensors in (
        ("without outputs", {"inputs/x": f32(1)}),
        ("without inputs", {"outputs/y": f32(1)}),
        ("with something else", {"inputs/x": f32(1), "outputs/y": f32(1), "secret": f32(1)}),
        ("without names", {"inputs/": f32(1), "outputs/": f32(1)}),
    ):
        probed = st(tensors)
        about = {"file": "probe.safetensors", "tolerance": {"float32": 1e-5}}
        document = manifest(entry, listed("probe.safetensors", probed), probe=about)
        bad(
            f"a probe {what}",
            "DH-4.7-3",
            bad_probe,
            {**sound, "delta.json": {"json": document}, "probe.safetensors": raw(probed)},
        )
    good(
        "a link within the package",
        "DH-3.1-5",
        {**sound, "delta.safetensors": {"symlink": "real.safetensors"}, "real.safetensors": raw(data)},
    )
    probe = st({"inputs/x": f32(1, 6), "outputs/y": f32(1, 4)})
    good("a probe's tensors are no part of the delta", ["DH-4.7-1", "DH-4.7-3", "DH-7.2-1"],
         {**packed(), "delta.json": {"json": manifest(entry, listed("probe.safetensors", probe),
          probe={"file": "probe.safetensors", "tolerance": {"float32": 1e-5}})}, "probe.safetensors": raw(probe)},
         {"tensors": sorted(LORA)})  # fmt: skip
    for dtype, width in (("F64", 8), ("F32", 4), ("F16", 2), ("BF16", 2)):
        good(f"{dtype} for a float", "DH-7.2-3", bias_of(dtype, b"\0" * 4 * width))
    good("a sound package with a class that nobody should import", "DH-4.3-4",
         packed() | {"delta.json": {"json": {**manifest(entry), "backbone": {
             **manifest()["backbone"], "source": {"hub": "org/name", "class": "antigravity.Model"}}}}})  # fmt: skip
    own = {"kind": "com.example.gate", "version": 1, "hosts": ["linear"], "tensors": {"gate": {"shape": ["out"]}},
           "equations": {"output": "y * channel(gate)"}}  # fmt: skip
    gate = {"name": "g", "kind": "com.example.gate", "version": 1, "config": {}, "targets": ["l.0.q"]}
    good(
        "a kind that travels with the package",
        ["DH-4.4-3", "DH-9-7"],
        packed({"g/l.0.q/gate": f32(4)}, modules=[gate], kinds=[own]),
    )

    size, sha = "E_TENSORS_SIZE", "E_TENSORS_SHA256"
    gone = ["E_PACKAGE_MISSING", "E_TENSORS_MISSING"]
    odd = ["E_PACKAGE_FILE", "E_TENSORS_NOT_REGULAR", "E_TENSORS_UNREADABLE", "E_PACKAGE_MISSING", "E_TENSORS_MISSING"]
    bad("an empty folder", "DH-3.1-1", gone, {"README.md": "nothing"})
    bad("a folder called delta.json", "DH-3.1-1", odd, {**sound, "delta.json": {"directory": True}})
    bad("a pipe called delta.json", ["DH-3.1-1", "DH-3.1-4"], odd, {**sound, "delta.json": {"fifo": True}})
    bad("a manifest of 1 TB", ["DH-3.1-2", "DH-10-1"], "E_MANIFEST_SIZE", {**sound, "delta.json": {"sparse": 1 << 40}})
    bad("a listed file is missing", "DH-3.1-4", gone, {"delta.json": sound["delta.json"]})
    for what, content in (
        ("a folder", {"directory": True}),
        ("a pipe", {"fifo": True}),
        ("a loop of links", {"symlink": "delta.safetensors"}),
    ):
        bad(f"a listed file is {what}", "DH-3.1-4", odd, {**sound, "delta.safetensors": content})
    for where in ("{outside}/delta.safetensors", "../outside/delta.safetensors"):
        bad(f"a link out of the package: {where}", "DH-3.1-5", ["E_PACKAGE_OUTSIDE", *odd],
            {**sound, "delta.safetensors": {"symlink": where}}, outside={"delta.safetensors": raw(data)})  # fmt: skip
    bad(
        "a hard link out of the package",
        "DH-3.1-5",
        ["E_PACKAGE_OUTSIDE", *odd],
        {**sound, "delta.safetensors": {"hardlink": "{outside}/delta.safetensors"}},
        outside={"delta.safetensors": raw(data)},
    )
    bad(
        "a link to a device",
        ["DH-3.1-4", "DH-3.1-5"],
        ["E_PACKAGE_OUTSIDE", *odd],
        {**sound, "delta.safetensors": {"symlink": "/dev/zero"}},
    )
    bad("a byte less than listed", "DH-3.1-6", size, {**sound, "delta.safetensors": raw(data[:-1])})
    bad("a byte more than listed", "DH-3.1-6", size, {**sound, "delta.safetensors": raw(data + b"\0")})
    bad(
        "one bit changed",
        ["DH-3.1-6", "DH-3.1-7"],
        sha,
        {**sound, "delta.safetensors": raw(data[:-1] + bytes([data[-1] ^ 1]))},
    )
    bad(
        "one bit of the header changed",
        "DH-3.1-6",
        sha,
        {**sound, "delta.safetensors": raw(data.replace(b"F32", b"F16", 1))},
    )
    bad("a terabyte of nothing", ["DH-3.1-6", "DH-10-1"], size, {**sound, "delta.safetensors": {"sparse": 1 << 40}})
    pickled = b"\x80\x04\x95\x1a\0\0\0\0\0\0\0\x8c\x05posix\x8c\x06system\x93."
    bad("a pickle called .safetensors", "DH-7.1-1", ["E_TENSORS_NOT_SAFETENSORS", "E_TENSORS_HEADER_LENGTH"],
        {"delta.json": {"json": manifest(listed("delta.safetensors", pickled))}, "delta.safetensors": raw(pickled)})  # fmt: skip
    broken = deepcopy(sound["delta.json"]["json"])
    broken["modules"][0]["kind"] = "no-such-kind"
    for what, content in (("missing", None), ("a pipe", {"fifo": True}), ("altered", raw(b"x"))):
        files = {"delta.json": {"json": broken}, **({} if content is None else {"delta.safetensors": content})}
        bad(
            f"the manifest comes first: unknown kind, and its tensor file is {what}", "DH-11-1", "E_KIND_UNKNOWN", files
        )
    nan = packed({**LORA, "m/l.0.q/up": f32(4, 2, value=float("nan"))})
    bad("digests come before contents", "DH-11-1", sha,
        {**nan, "delta.safetensors": raw(base64.b64decode(nan["delta.safetensors"]["base64"])[:-1] + b"\1")})  # fmt: skip
    unknown = ["E_PACKAGE_TENSORS", "E_KIND_TENSOR"]
    less = {n: t for n, t in LORA.items() if n != "m/l.1.q/up"}
    bad("a tensor is missing", "DH-7.2-1", unknown, packed(less))
    bad(
        "all tensors of a target are missing",
        "DH-7.2-1",
        unknown,
        packed({n: t for n, t in LORA.items() if "l.1" not in n}),
    )
    for name in (
        "m/l.0.q/extra",
        "m/l.2.q/up",
        "n/l.0.q/up",
        "up",
        "m/l.0.q",
        "m//up",
        "m/l.0.q/up/up",
        "base_model.model.l.0.q.lora_A.weight",
    ):
        bad(f"a tensor that nothing uses: {name}", "DH-7.2-1", unknown, packed({**LORA, name: f32(1)}))
    twice = {"a.safetensors": st(LORA), "b.safetensors": st({"m/l.0.q/up": f32(4, 2)})}
    bad("a tensor in two files", "DH-7.2-1", unknown,
        {"delta.json": {"json": manifest(*(listed(n, d) for n, d in twice.items()))}, **{n: raw(d) for n, d in twice.items()}})  # fmt: skip
    wrong = ["E_KIND_SHAPE", "E_KIND_TENSOR", "E_PACKAGE_TENSORS"]
    for name, shape in (
        ("down", (3, 6)),
        ("down", (12,)),
        ("up", (2, 4)),
        ("up", (4, 2, 1)),
        ("up", ()),
        ("down", (1, 6)),
    ):
        bad(f"{name} of the shape {list(shape)}", "DH-7.2-2", wrong, packed({**LORA, f"m/l.0.q/{name}": f32(*shape)}))
    million = [{**MODULE, "config": {"rank": 1_000_000}}]
    bad("a rank beyond the kind's bounds", "DH-7.2-4", "E_KIND_CONFIG", packed(modules=million))
    bad(
        "a rank of 65536 with a file of a kilobyte",
        ["DH-7.2-4", "DH-10-1"],
        wrong,
        packed(modules=[{**MODULE, "config": {"rank": 65536}}]),
    )
    for dtype, width in (("I64", 8), ("I8", 1), ("U8", 1), ("BOOL", 1), ("C64", 8), ("F8_E4M3", 1)):
        bad(f"{dtype} for a float", "DH-7.2-3", wrong, bias_of(dtype, b"\0" * 4 * width))
    for dtype, bits in (
        ("F32", b"\0\0\xc0\x7f"),
        ("F32", b"\0\0\x80\x7f"),
        ("F32", b"\0\0\x80\xff"),
        ("BF16", b"\xc0\x7f"),
        ("F16", b"\0\x7c"),
        ("F64", b"\0\0\0\0\0\0\xf0\x7f"),
    ):
        bad(
            f"a value that is not finite: {dtype} {bits[::-1].hex()}",
            "DH-7.2-5",
            "E_PACKAGE_VALUES",
            bias_of(dtype, bits * 4),
        )
    return cases
