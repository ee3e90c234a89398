"""``model.sig``: a Sigstore bundle around a DSSE envelope around an in-toto statement over a package's files."""

from __future__ import annotations

__all__ = [
    "BUNDLE_BYTES",
    "IGNORED",
    "SIGNATURE_FILE",
    "Signature",
    "compare",
    "digests_of",
    "open_bundle",
    "read_limited",
    "refuse_other",
    "resources_of",
    "sign",
    "unsigned",
    "verify_signature",
]

import base64
import binascii
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltahub.errors import SignatureError
from deltahub.limits import DEFAULT
from deltahub.manifest import Manifest
from deltahub.sign.keys import fingerprint_of, hash_of, need_cryptography, private_key, public_key
from deltahub.tensors import sha256_file
from deltahub.tensors.files import replacing

SIGNATURE_FILE = "model.sig"
MANIFEST = "delta.json"
_PAYLOAD = "application/vnd.in-toto+json"
_BUNDLE = "application/vnd.dev.sigstore.bundle.v0.3+json"
_STATEMENT = "https://in-toto.io/Statement/v1"
_PREDICATE = "https://model_signing/signature/v1.0"
IGNORED = (".git", ".gitattributes", ".github", ".gitignore", ".cache")
BUNDLE_BYTES = 1 << 20
_HEX = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Signature:
    """A signature that was checked.

    Attributes:
        signer: the name that the policy gives the key or the identity; empty for a key without one.
        fingerprint: SHA-256 of the public key's PEM text.
        files: what was signed: name to SHA-256.
    """

    signer: str
    fingerprint: str
    files: Mapping[str, str]


def sign(folder: str | os.PathLike[str], key: str | os.PathLike[str], *, password: bytes | None = None) -> Signature:
    """Sign everything in a package's folder and write ``model.sig`` into it.

    Args:
        folder: the package; the model card in it is signed too, so it should be final.
        key: file with the private key, PEM, on P-256, P-384 or P-521.
        password: of the key file.

    Raises:
        SignatureError: ``E_SIGN_KEY``, ``E_SIGN_FOLDER``, ``E_SIGN_LIBRARY``.
    """
    need_cryptography()
    from cryptography.hazmat.primitives.asymmetric.ec import ECDSA

    private = private_key(read_limited(Path(key)), password)
    root = Path(folder).resolve()
    files = digests_of(root)
    refuse_other(root, files)
    body = json.dumps(_statement(root.name, files), sort_keys=True, separators=(",", ":")).encode()
    signed = private.sign(_pre_authentication(_PAYLOAD, body), ECDSA(hash_of(private.curve.name)))
    hint = fingerprint_of(private.public_key())
    bundle = {
        "mediaType": _BUNDLE,
        "verificationMaterial": {"publicKey": {"hint": hint}, "tlogEntries": []},
        "dsseEnvelope": {
            "payload": base64.b64encode(body).decode(),
            "payloadType": _PAYLOAD,
            "signatures": [{"sig": base64.b64encode(signed).decode(), "keyid": ""}],
        },
    }
    with replacing(root / SIGNATURE_FILE) as file:
        file.write(json.dumps(bundle, separators=(",", ":")).encode())
    return Signature(signer="", fingerprint=hint, files=files)


def refuse_other(root: Path, files: Mapping[str, str]) -> None:
    """Only what would load is signed.

    Raises:
        SignatureError: ``E_SIGN_FOLDER`` where a listed file is missing or another.
        ManifestError: the manifest is not valid.
    """
    if MANIFEST not in files:
        raise SignatureError("E_SIGN_FOLDER", "there is no delta.json here", where=root)
    manifest = Manifest.parse(read_limited(root / MANIFEST, DEFAULT.manifest_bytes), where=str(root / MANIFEST))
    for file in manifest.files:
        if files.get(file.path) != file.sha256:
            raise SignatureError("E_SIGN_FOLDER", "a listed file is missing or altered", where=root / file.path)


def _pre_authentication(kind: str, body: bytes) -> bytes:
    """DSSE's encoding of what is signed: the type is part of it, so that it cannot be exchanged."""
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind.encode(), len(body), body)


def _statement(name: str, files: Mapping[str, str]) -> dict[str, Any]:
    root = hashlib.sha256(b"".join(bytes.fromhex(digest) for digest in files.values())).hexdigest()
    resources = [{"name": path, "digest": digest, "algorithm": "sha256"} for path, digest in files.items()]
    serialization = {
        "method": "files",
        "hash_type": "sha256",
        "allow_symlinks": False,
        "ignore_paths": [*IGNORED, SIGNATURE_FILE],
    }
    return {
        "_type": _STATEMENT,
        "subject": [{"name": name, "digest": {"sha256": root}}],
        "predicateType": _PREDICATE,
        "predicate": {"resources": resources, "serialization": serialization},
    }


def digests_of(root: Path) -> dict[str, str]:
    """Every file of a folder that a signature covers, in the order that the format demands."""
    return {path: sha256_file(root / path)[1] for path in sorted(_walk(root))}


def _walk(root: Path) -> Iterator[str]:
    for folder, _, names in os.walk(root):
        for name in names:
            full = Path(folder, name)
            path = full.relative_to(root).as_posix()
            if path.split("/")[0] in IGNORED or path == SIGNATURE_FILE:
                continue
            if full.is_symlink() or not full.is_file():
                raise SignatureError(
                    "E_SIGN_FOLDER", "only a folder of regular files can be signed or checked as a whole", where=full
                )
            yield path


def read_limited(path: Path, limit: int = BUNDLE_BYTES) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise SignatureError("E_SIGN_KEY", "the file cannot be read", where=path, found=error) from None
    if len(data) > limit:
        raise SignatureError("E_SIGN_BUNDLE", "the file is too large", where=path)
    return data


def open_bundle(raw: bytes, keys: Mapping[str, bytes], where: str) -> Signature:
    """Check a bundle against keys and return what it signs.

    Args:
        raw: the bytes of ``model.sig``.
        keys: name to public key, PEM; one of them must have signed.
        where: what to call it in errors.

    Raises:
        SignatureError: ``E_SIGN_BUNDLE`` for what is not a bundle of the ``key`` method; ``E_SIGN_UNTRUSTED`` where no
            key fits, whatever the reason: another key, an altered payload, another payload type.
    """
    need_cryptography()
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ec import ECDSA

    kind, body, signature = _envelope(raw, where)
    for name, pem in keys.items():
        key = public_key(pem)
        try:
            key.verify(signature, _pre_authentication(kind, body), ECDSA(hash_of(key.curve.name)))
        except InvalidSignature:
            continue
        return Signature(signer=name, fingerprint=fingerprint_of(key), files=resources_of(kind, body, where))
    known = ", ".join(sorted(keys)) or "none"
    raise SignatureError("E_SIGN_UNTRUSTED", "no trusted key made this signature", where=where, expected=known)


def _envelope(raw: bytes, where: str) -> tuple[str, bytes, bytes]:
    """The payload's type, the payload, and the one signature over both."""
    try:
        _must(len(raw) <= BUNDLE_BYTES, "it is too large")
        bundle = json.loads(raw, object_pairs_hook=_unique)
        material = bundle["verificationMaterial"]
        with_key = isinstance(material, dict) and "publicKey" in material
        _must(with_key, "it was not made with a key, but with an identity; a trust policy names those")
        envelope = bundle["dsseEnvelope"]
        (signature,) = envelope["signatures"]
        body = base64.b64decode(envelope["payload"], validate=True)
        return str(envelope["payloadType"]), body, base64.b64decode(signature["sig"], validate=True)
    except (ValueError, KeyError, TypeError, RecursionError, binascii.Error) as error:
        raise _bad_bundle(where, error) from None


def resources_of(kind: str, body: bytes, where: str) -> dict[str, str]:
    """The files that a signed statement lists; only called once the signature over it holds."""
    try:
        statement = json.loads(body, object_pairs_hook=_unique)
        types = (kind, statement["_type"], statement["predicateType"])
        _must(types == (_PAYLOAD, _STATEMENT, _PREDICATE), "it is a statement about something else than a model")
        files: dict[str, str] = {}
        for resource in statement["predicate"]["resources"]:
            name, digest = resource["name"], resource["digest"]
            proper = resource["algorithm"] == "sha256" and _HEX.fullmatch(digest) and name not in files
            _must(proper, f"{name!r} is listed twice or without a SHA-256")
            files[name] = digest
        root = hashlib.sha256(b"".join(bytes.fromhex(digest) for digest in files.values())).hexdigest()
        _must(statement["subject"][0]["digest"]["sha256"] == root, "its subject is not the sum of its files")
    except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise _bad_bundle(where, error) from None
    return files


def _must(holds: object, why: str) -> None:
    if not holds:
        raise ValueError(why)


def _bad_bundle(where: str, error: Exception) -> SignatureError:
    why = f"{type(error).__name__}: {error}"
    return SignatureError("E_SIGN_BUNDLE", "this is not a signature over a package", where=where, found=why)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is given twice")
    return found


def verify_signature(folder: str | os.PathLike[str], keys: Mapping[str, bytes]) -> Signature:
    """Check ``model.sig`` against every file of a folder: nothing altered, nothing missing, nothing added.

    Args:
        folder: a package as a folder of regular files.
        keys: name to public key, PEM.

    Raises:
        SignatureError: ``E_SIGN_MISSING``, ``E_SIGN_BUNDLE``, ``E_SIGN_UNTRUSTED``, ``E_SIGN_MISMATCH``.
    """
    root = Path(folder)
    path = root / SIGNATURE_FILE
    if not path.is_file():
        raise unsigned(str(folder))
    signature = open_bundle(read_limited(path), keys, str(path))
    compare(signature.files, digests_of(root), str(folder))
    return signature


def unsigned(where: str) -> SignatureError:
    return SignatureError("E_SIGN_MISSING", "the package is not signed", where=where, expected=SIGNATURE_FILE)


def compare(signed: Mapping[str, str], found: Mapping[str, str], where: str) -> None:
    altered = [f"{path} altered" for path in found if path in signed and signed[path] != found[path]]
    differ = [
        *altered,
        *(f"{p} missing" for p in signed.keys() - found),
        *(f"{p} added" for p in found.keys() - signed),
    ]
    if differ:
        more = f" and {len(differ) - 5} more" if len(differ) > 5 else ""
        raise SignatureError(
            "E_SIGN_MISMATCH",
            "the signature is valid, but not for these files",
            where=where,
            found=", ".join(differ[:5]) + more,
        )
