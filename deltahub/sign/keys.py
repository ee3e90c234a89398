"""The keys that sign packages: elliptic curves P-256, P-384 and P-521, in PEM, through ``cryptography``."""

from __future__ import annotations

__all__ = ["fingerprint", "fingerprint_of", "hash_of", "need_cryptography", "private_key", "public_key"]

import hashlib
from typing import TYPE_CHECKING, Any

from deltahub.errors import SignatureError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey


def need_cryptography() -> None:
    """Say how to get the library where it is missing."""
    from importlib.util import find_spec

    if find_spec("cryptography") is None:
        raise SignatureError("E_SIGN_LIBRARY", "signatures need `cryptography`", hint='pip install "deltahub[sign]"')


def private_key(pem: bytes, password: bytes | None) -> EllipticCurvePrivateKey:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        key = load_pem_private_key(pem, password)
    except (ValueError, TypeError) as error:
        raise SignatureError("E_SIGN_KEY", "the private key cannot be read", found=error) from None
    if not isinstance(key, EllipticCurvePrivateKey):
        raise _not_a_curve(key)
    hash_of(key.curve.name)
    return key


def public_key(pem: bytes) -> EllipticCurvePublicKey:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        key = load_pem_public_key(pem)
    except (ValueError, TypeError) as error:
        raise SignatureError("E_SIGN_KEY", "the public key cannot be read", found=error) from None
    if not isinstance(key, EllipticCurvePublicKey):
        raise _not_a_curve(key)
    hash_of(key.curve.name)
    return key


def _not_a_curve(key: object) -> SignatureError:
    expected = "an elliptic-curve key on P-256, P-384 or P-521"
    return SignatureError("E_SIGN_KEY", "this key cannot sign packages", expected=expected, found=type(key).__name__)


def hash_of(curve: str) -> Any:
    """The hash that belongs to a curve; the key decides it, never the file."""
    from cryptography.hazmat.primitives import hashes

    found = {"secp256r1": hashes.SHA256(), "secp384r1": hashes.SHA384(), "secp521r1": hashes.SHA512()}.get(curve)
    if found is None:
        raise _not_a_curve(curve)
    return found


def fingerprint(pem: bytes) -> str:
    """SHA-256 over the PEM text of a public key, as bundles hint at it."""
    return fingerprint_of(public_key(pem))


def fingerprint_of(key: EllipticCurvePublicKey) -> str:
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return hashlib.sha256(key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)).hexdigest()
