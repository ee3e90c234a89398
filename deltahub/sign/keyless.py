"""Signatures without a key to keep: Sigstore's, where the package ``model-signing`` is installed.

Whoever signs shows an OpenID Connect token. Sigstore certifies a throw-away key for the identity in it and writes
the signature into a public log; a reader needs the identity, who vouched for it, and Sigstore's own roots. Bundles
are checked in memory, with no request but the one that looks whether the roots are still these, and none at all
offline or with roots of the reader's own.
"""

from __future__ import annotations

__all__ = ["has_certificate", "open_keyless", "sign_keyless"]

import base64
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from deltahub.errors import DeltaHubError, SignatureError
from deltahub.sign.bundles import (
    BUNDLE_BYTES,
    IGNORED,
    SIGNATURE_FILE,
    Signature,
    digests_of,
    read_limited,
    refuse_other,
    resources_of,
)
from deltahub.tensors.files import replacing

if TYPE_CHECKING:
    from collections.abc import Iterable

    from deltahub.sign.policy import Signer

_HINT = 'pip install "deltahub[keyless]"'
_ISSUER = "1.3.6.1.4.1.57264.1.1"  # Fulcio's extension that names who vouched for the identity


def sign_keyless(
    folder: str | os.PathLike[str],
    *,
    identity_token: str | None = None,
    trust_config: str | os.PathLike[str] | None = None,
) -> Signature:
    """Sign everything in a package's folder with an identity instead of a key, and write ``model.sig`` into it.

    Args:
        folder: the package; the model card in it is signed too, so it should be final.
        identity_token: an OpenID Connect token for Sigstore. Without one, the token of the machine that this runs on
            is taken (GitHub Actions, Google Cloud and the like), else a browser is opened to log in.
        trust_config: a Sigstore of one's own, as a client trust configuration in JSON; the public one by default.

    Raises:
        SignatureError: ``E_SIGN_FOLDER``; ``E_SIGN_LIBRARY`` where ``model-signing`` is not installed;
            ``E_SIGN_IDENTITY`` where Sigstore or the identity's issuer refuses or cannot be reached.
    """
    _need_library()
    root = Path(folder).resolve()
    files = digests_of(root)
    refuse_other(root, files)
    with _refused("E_SIGN_IDENTITY", "nothing was signed", str(root)), tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, SIGNATURE_FILE)
        _official(identity_token, trust_config, root).sign(root, path)
        raw = read_limited(path)
    certificate, body = _peek(raw)
    signed = resources_of(*body, str(root))
    if signed != files:
        raise SignatureError("E_SIGN_FOLDER", "the folder changed while it was being signed", where=root)
    with replacing(root / SIGNATURE_FILE) as file:
        file.write(raw)
    return Signature(signer=_names(certificate)[0], fingerprint=_fingerprint(certificate), files=files)


def _official(token: str | None, trust_config: str | os.PathLike[str] | None, root: Path) -> Any:
    """The official package, told to sign as it does itself, but for files that are none of the package's."""
    from model_signing import hashing, signing

    ignored = [root / name for name in (*IGNORED, SIGNATURE_FILE)]
    hashed, signed = (cast("Any", room).Config() for room in (hashing, signing))  # neither is typed
    how = hashed.use_file_serialization(hashing_algorithm="sha256")
    how.set_ignored_paths(paths=ignored, ignore_git_paths=True)
    return signed.set_hashing_config(how).use_sigstore_signer(
        identity_token=token,
        use_ambient_credentials=True,
        trust_config=None if trust_config is None else Path(trust_config),
    )


def has_certificate(raw: bytes) -> bool:
    """Whether a bundle was made with an identity; ``False`` for one that was made with a key, and for junk."""
    try:
        material = json.loads(raw[:BUNDLE_BYTES])["verificationMaterial"]
        return isinstance(material, dict) and "publicKey" not in material and "certificate" in material
    except (ValueError, KeyError, TypeError, RecursionError):
        return False


def open_keyless(raw: bytes, signers: Iterable[Signer], where: str, *, offline: bool = False) -> Signature:
    """Check a bundle against identities and return what it signs.

    Args:
        raw: the bytes of ``model.sig``.
        signers: whose identities count; those with a key are passed over.
        where: what to call it in errors.
        offline: take Sigstore's roots as they were last seen instead of asking for newer ones.

    Raises:
        SignatureError: ``E_SIGN_LIBRARY``, ``E_SIGN_BUNDLE``, ``E_SIGN_UNTRUSTED``, and ``E_SIGN_ROOTS`` where
            Sigstore's roots cannot be had.
    """
    _need_library()
    from sigstore.models import Bundle
    from sigstore.verify import policy

    with _refused("E_SIGN_BUNDLE", "this is not a signature over a package", where):
        bundle = Bundle.from_json(raw)
    known = [signer for signer in signers if signer.identity]
    last: Exception | None = None
    for signer in known:
        verifier = _verifier(signer.trust_root, where, offline=offline)
        try:
            kind, body = verifier.verify_dsse(bundle, policy.Identity(identity=signer.identity, issuer=signer.issuer))
        except Exception as error:  # sigstore raises what its own libraries do, too
            last = error
            continue
        key = _fingerprint(bundle.signing_certificate)
        return Signature(signer=signer.name, fingerprint=key, files=resources_of(kind, body, where))
    raise SignatureError(
        "E_SIGN_UNTRUSTED",
        "no trusted identity made this signature",
        where=where,
        expected=", ".join(sorted(f"{signer.identity} by {signer.issuer}" for signer in known)) or "none",
        found=f"{' by '.join(_names(bundle.signing_certificate))}" + (f": {last}" if last else ""),
    )


def _verifier(trust_root: bytes | None, where: str, *, offline: bool) -> Any:
    from sigstore.models import ClientTrustConfig, TrustedRoot
    from sigstore.verify import Verifier

    if trust_root is None:
        hint = "check the network, or take the roots as they were last seen: --offline, local_files_only=True"
        with _refused("E_SIGN_ROOTS", "Sigstore's roots cannot be had", where, hint):
            return Verifier.production(offline=offline or _requests_are_off())
    with (
        _refused("E_SIGN_ROOTS", "the roots that the policy names cannot be read", where),
        tempfile.TemporaryDirectory() as scratch,
    ):
        if b"clienttrustconfig" in trust_root:
            return Verifier(trusted_root=ClientTrustConfig.from_json(trust_root.decode()).trusted_root)
        path = Path(scratch, "trusted_root.json")
        path.write_bytes(trust_root)
        return Verifier(trusted_root=TrustedRoot.from_file(str(path)))


def _requests_are_off() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _peek(raw: bytes) -> tuple[Any, tuple[str, bytes]]:
    """The certificate and the payload of a bundle that was made a moment ago."""
    from sigstore.models import Bundle

    envelope = json.loads(raw)["dsseEnvelope"]
    return Bundle.from_json(raw).signing_certificate, (envelope["payloadType"], base64.b64decode(envelope["payload"]))


def _names(certificate: Any) -> tuple[str, str]:
    """Whose the certificate is, and who vouched for that."""
    from cryptography import x509

    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        issuer = certificate.extensions.get_extension_for_oid(x509.ObjectIdentifier(_ISSUER)).value.value
    except (x509.ExtensionNotFound, ValueError):
        return "nobody", "nobody"
    forms = (x509.RFC822Name, x509.UniformResourceIdentifier)
    every = [str(name) for form in forms for name in names.get_values_for_type(form)]
    return ", ".join(every), issuer.decode("utf-8", "replace")


def _fingerprint(certificate: Any) -> str:
    from deltahub.sign.keys import fingerprint_of

    return fingerprint_of(certificate.public_key())


def _need_library() -> None:
    missing = [name for name in ("model_signing", "OpenSSL") if find_spec(name) is None]
    if missing:
        raise SignatureError(
            "E_SIGN_LIBRARY", "keyless signatures need `model-signing`", found=f"{missing[0]} is missing", hint=_HINT
        )


@contextmanager
def _refused(code: str, what: str, where: str, hint: str | None = None) -> Iterator[None]:
    """What the libraries underneath raise, as one error of ours: they share no class, and pass on those of others."""
    try:
        yield
    except DeltaHubError:
        raise
    except Exception as error:
        said = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        cause = error.__cause__
        found = said + (f" ({type(cause).__name__}: {cause})" if cause is not None else "")
        raise SignatureError(code, what, where=where, found=found, hint=hint) from error
