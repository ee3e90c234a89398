"""What a valid signature is worth: which keys and identities may sign for which namespaces, and where one must."""

from __future__ import annotations

__all__ = ["Policy", "Signer"]

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltahub.errors import SignatureError
from deltahub.sign.bundles import Signature, compare, open_bundle, unsigned
from deltahub.sign.keyless import has_certificate, open_keyless

if TYPE_CHECKING:
    from deltahub.manifest import Manifest


@dataclass(frozen=True, kw_only=True, slots=True)
class Signer:
    """Somebody whose signature counts: by a key, or by an identity that Sigstore certified.

    Attributes:
        name: what to call them.
        key: public key, PEM; empty for an identity.
        identity: an e-mail address or a URI, exactly as in the certificate; needs ``issuer``.
        issuer: URL of who vouched for the identity, e.g. ``https://token.actions.githubusercontent.com``.
        trust_root: another Sigstore than the public one: its trusted root or client trust configuration, JSON.
        namespaces: owners (``acme``) and repositories (``acme/delta``) for which they may sign; ``*`` for all.
    """

    name: str
    key: bytes = b""
    identity: str = ""
    issuer: str = ""
    trust_root: bytes | None = None
    namespaces: tuple[str, ...] = ("*",)

    def __post_init__(self) -> None:
        if bool(self.key) == bool(self.identity) or bool(self.identity) != bool(self.issuer):
            raise SignatureError(
                "E_SIGN_POLICY", "a signer has either a key, or an identity and its issuer", where=self.name
            )

    def covers(self, namespace: str) -> bool:
        return _covers(self.namespaces, namespace)


def _covers(patterns: tuple[str, ...], namespace: str) -> bool:
    return any(pattern in {"*", namespace, namespace.partition("/")[0]} for pattern in patterns)


@dataclass(frozen=True, kw_only=True, slots=True)
class Policy:
    """Whose signature is demanded where.

    Attributes:
        signers: who may sign what.
        require: namespaces whose packages must be signed; ``*`` for all, folders and mirrors included.
    """

    signers: tuple[Signer, ...] = ()
    require: tuple[str, ...] = ()

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Policy:
        """Read a policy file.

        It is TOML::

            require = ["acme"]

            [[signers]]
            name = "Acme releases"
            key = "acme.pub"            # a file next to this one, or the PEM text itself
            namespaces = ["acme"]

            [[signers]]                 # without a key: what Sigstore certified
            name = "Acme's release workflow"
            identity = "https://github.com/acme/models/.github/workflows/release.yml@refs/heads/main"
            issuer = "https://token.actions.githubusercontent.com"
            trust_root = "sigstore.json"  # only for another Sigstore than the public one

        Raises:
            SignatureError: ``E_SIGN_POLICY``.
        """
        try:
            document = tomllib.loads(Path(path).read_text("utf-8"))
            _only(document, {"require", "signers"})
            signers = tuple(_signer(entry, Path(path).parent) for entry in document.get("signers", []))
            return cls(signers=signers, require=_strings(document.get("require", [])))
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise SignatureError("E_SIGN_POLICY", "the policy cannot be read", where=path, found=error) from None

    def demands(self, namespace: str) -> bool:
        return _covers(self.require, namespace)

    def wants_signature(self, namespace: str) -> bool:
        """Whether it is worth asking for a signature at all."""
        return self.demands(namespace) or any(signer.covers(namespace) for signer in self.signers)

    def check(
        self, raw: bytes | None, *, manifest: Manifest, sha256: str, namespace: str, where: str, offline: bool = False
    ) -> Signature | None:
        """Check a package's signature before its files are fetched.

        Args:
            raw: the bytes of ``model.sig``, ``None`` where there is none.
            manifest: the package's manifest; with it every listed file's digest is known.
            sha256: of ``delta.json``.
            namespace: ``user/name``; empty for a folder or a mirror.
            where: what to call the package in errors.
            offline: make no request for Sigstore's roots; those that were last seen, or came with it, count.

        Returns:
            The signature; ``None`` for an unsigned package where none is demanded.

        Raises:
            SignatureError: ``E_SIGN_MISSING`` where one is demanded; a signature that is there must always hold
                once the policy knows a signer for this namespace.
        """
        known = [signer for signer in self.signers if signer.covers(namespace)]
        if raw is None:
            if self.demands(namespace):
                raise unsigned(where)
            return None
        if not known and not self.demands(namespace):
            return None
        if has_certificate(raw) and any(signer.identity for signer in known):
            signature = open_keyless(raw, known, where, offline=offline)
        else:
            signature = open_bundle(raw, {signer.name: signer.key for signer in known if signer.key}, where)
        wanted = {"delta.json": sha256, **{file.path: file.sha256 for file in manifest.files}}
        # A pull does not fetch the card and what else the repository holds; what is used must be signed.
        compare({path: signature.files[path] for path in wanted if path in signature.files}, wanted, where)
        return signature


def _signer(entry: Mapping[str, Any], folder: Path) -> Signer:
    _only(entry, {"name", "key", "identity", "issuer", "trust_root", "namespaces"})
    key, root = str(entry.get("key", "")), entry.get("trust_root")
    pem = key.encode() if "-----BEGIN" in key or not key else (folder / key).read_bytes()
    return Signer(
        name=str(entry["name"]),
        key=pem,
        identity=str(entry.get("identity", "")),
        issuer=str(entry.get("issuer", "")),
        trust_root=None if root is None else (folder / str(root)).read_bytes(),
        namespaces=_strings(entry.get("namespaces", ["*"])),
    )


def _only(table: Mapping[str, Any], known: set[str]) -> None:
    unknown = sorted(table.keys() - known)
    if unknown:
        raise ValueError(f"unknown fields: {', '.join(unknown)}")


def _strings(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ValueError("a list of strings is expected")
    return tuple(value)
