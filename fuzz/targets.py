"""What is fuzzed: one function per parser. Each takes bytes and raises only where a promise is broken.

Refusing is always right, by a :class:`~deltahub.errors.DeltaHubError` and in bounded time; accepting is right where the
reference library reads the same.
"""

from __future__ import annotations

import base64
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import safetensors

from deltahub.errors import DeltaHubError
from deltahub.kinds.document import Document
from deltahub.kinds.language import parse as parse_equation
from deltahub.manifest import Manifest
from deltahub.sign import bundles
from deltahub.targets import abbreviate, expand
from deltahub.tensors import TensorFile

__all__ = ["SEEDS", "TARGETS"]

ROOT = Path(__file__).resolve().parents[1]
_NAMES = frozenset({"x", "y", "W", "b", "host", "down", "up", "scale", "rank"})
_SCRATCH = Path(tempfile.gettempdir(), f"deltahub-fuzz-{os.getpid()}.safetensors")


def manifest(data: bytes) -> None:
    """Accepted: Python's reader sees the same object, and what is written is read back equal."""
    found = Manifest.parse(data)
    assert found.model_dump(by_alias=True, exclude_unset=True, mode="json") == json.loads(data)
    assert Manifest.parse(found.to_bytes()) == found


def header(data: bytes) -> None:
    """Accepted: safetensors reads the same tensors with the same bytes."""
    _SCRATCH.write_bytes(data)
    try:
        with TensorFile.read(_SCRATCH) as file:
            theirs = dict(safetensors.deserialize(data))
            assert theirs.keys() == file.keys()
            for name, info in file.items():
                assert (theirs[name]["dtype"], tuple(theirs[name]["shape"])) == (info.dtype, info.shape)
                if info.dtype != "BOOL":
                    assert bytes(file.data(name)) == bytes(theirs[name]["data"])
    finally:
        _SCRATCH.unlink()


def targets(data: bytes) -> None:
    """Accepted: the paths are plain, and abbreviating them loses none."""
    found = expand(data.decode("utf-8", "replace"), limit=10_000)
    assert len(set(found)) == len(found)
    assert all(path and not set(path) & set("{},*?[]()|\\^$+") for path in found)
    assert {path for pattern in abbreviate(found) for path in expand(pattern)} == set(found)


def expression(data: bytes) -> None:
    """Accepted: reading it again gives the same program."""
    text = data.decode("utf-8", "replace")
    assert parse_equation(text, where="fuzz", names=_NAMES) == parse_equation(text, where="fuzz", names=_NAMES)


def kind(data: bytes) -> None:
    """Accepted: the document is what its own data give again."""
    found = Document.from_toml(data.decode("utf-8", "replace"), where="fuzz")
    assert Document.from_toml(data.decode("utf-8", "replace"), where="fuzz") == found


def bundle(data: bytes) -> None:
    """No key is known, so nothing may be accepted; what is inside is read as if one were."""
    try:
        bundles.open_bundle(data, {}, "fuzz")
    except DeltaHubError:
        bundles.resources_of("application/vnd.in-toto+json", data, "fuzz")
    else:
        raise AssertionError("a signature by nobody was accepted")


TARGETS: dict[str, Callable[[bytes], None]] = {
    "manifest": manifest,
    "header": header,
    "targets": targets,
    "expression": expression,
    "kind": kind,
    "bundle": bundle,
}


def _vectors(folder: str, member: str) -> list[bytes]:
    """Inputs of conformance vectors: every base of the manifests, every pattern of the targets."""
    found: list[bytes] = []
    for path in sorted((ROOT / "spec" / "conformance" / folder).glob("*.json")):
        document = json.loads(path.read_text("utf-8"))
        found += [json.dumps(base).encode() for base in document.get("bases", {}).values()]
        values = [case.get(member) for case in document["cases"]]
        found += [value.encode("utf-8", "replace") for value in values if isinstance(value, str)]
    return found


def _bundle() -> bytes:
    body = base64.b64encode(b'{"_type": "https://in-toto.io/Statement/v1"}').decode()
    envelope = {"payload": body, "payloadType": "application/vnd.in-toto+json", "signatures": [{"sig": "AAAA"}]}
    return json.dumps({"verificationMaterial": {"publicKey": {"hint": ""}}, "dsseEnvelope": envelope}).encode()


def _seeds() -> dict[str, list[bytes]]:
    kinds = [path.read_bytes() for path in sorted((ROOT / "spec" / "kinds").glob("*.toml"))]
    entry = {"a": {"dtype": "F32", "shape": [1, 2], "data_offsets": [0, 8]}, "__metadata__": {"k": "v"}}
    raw = json.dumps(entry).encode()
    statement = {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": "x", "digest": {"sha256": "0" * 64}}],
        "predicateType": "https://model_signing/signature/v1.0",
        "predicate": {"resources": [{"name": "delta.json", "algorithm": "sha256", "digest": "0" * 64}]},
    }
    return {
        "manifest": _vectors("manifest", "text"),
        "header": [len(raw).to_bytes(8, "little") + raw + bytes(8)],
        "targets": [b"a.{0..11}.{q,v}", b"model.layers.{0..3,7}.x", *_vectors("targets", "pattern")],
        "expression": [
            b"y + scale * linear(host(x, down), up)",
            b"h = x @ down\nh * sum(up[i] for i in range(rank))",
            *_vectors("expression", "program"),
        ],
        "kind": kinds,
        "bundle": [_bundle(), json.dumps(statement).encode()],
    }


SEEDS = _seeds()
