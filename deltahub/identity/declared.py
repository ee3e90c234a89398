"""What a manifest says of its backbone, taken apart strictly before anything is compared with it."""

from __future__ import annotations

__all__ = ["ALGORITHM", "Declared", "digest_bytes"]

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from deltahub.errors import IdentityError

ALGORITHM = "sha256-tree-1"
_HEX = frozenset("0123456789abcdef")


def digest_bytes(value: object, where: str) -> bytes:
    """The bytes of a digest in a manifest: 64 lower-case hexadecimal digits and nothing else.

    Raises:
        IdentityError: ``E_IDENTITY_DIGEST``, which says whether the type, the length, the case or a digit is wrong.
    """
    if not isinstance(value, str):
        what = "a digest is a string"
    elif len(value) != 64:
        what = f"a SHA-256 digest has 64 digits, not {len(value)}"
    elif _HEX.issuperset(value):
        return bytes.fromhex(value)
    else:
        what = "a digest is written in lower case" if _HEX.issuperset(value.lower()) else "a digest is hexadecimal"
    raise IdentityError("E_IDENTITY_DIGEST", what, where=where, found=value)


def _plain(section: object) -> Mapping[str, Any]:
    dump = getattr(section, "model_dump", None)
    found = dump(exclude_none=True, by_alias=True) if callable(dump) else section
    if not isinstance(found, Mapping):
        raise IdentityError(
            "E_IDENTITY_SECTION", "the manifest's backbone is not an object", found=type(found).__name__
        )
    return found


def _table(value: object, where: str) -> Mapping[str, Any]:
    value = {} if value is None else value
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise IdentityError("E_IDENTITY_SECTION", "an object with names is needed here", where=where)
    return value


@dataclass(frozen=True, kw_only=True, slots=True)
class Declared:
    """The backbone section of a manifest.

    Attributes:
        exact: root over the tensors as stored.
        bf16: root with F64, F32 and F16 rounded to BF16.
        structure: digest over names, dtypes and shapes, in hex.
        tensors: how many there are.
        tied: alias to the name that is kept.
        excluded: names left out.
        leaves: of the tensors that the delta touches, as stored.
        leaves_bf16: the same rounded, for those that are stored wider than BF16.
        compatible: roots the producer vouches for, each with its relation.
        hub: repository, if it is declared.
        commit: its commit.
        files: path to (size, SHA-256) of the files that the producer saw.
    """

    exact: bytes
    bf16: bytes
    structure: str
    tensors: int
    tied: Mapping[str, str]
    excluded: frozenset[str]
    leaves: Mapping[str, bytes]
    leaves_bf16: Mapping[str, bytes]
    compatible: Mapping[bytes, str]
    hub: str | None
    commit: str | None
    files: Mapping[str, tuple[int, str]]

    @classmethod
    def parse(cls, section: object) -> Declared:
        """Take a manifest's ``backbone`` apart: a mapping, or a pydantic model of one.

        Raises:
            IdentityError: ``E_IDENTITY_ALGORITHM``, ``E_IDENTITY_DIGEST``, ``E_IDENTITY_SECTION``.
        """
        top = _plain(section)
        identity = _table(top.get("identity"), "backbone.identity")
        if identity.get("algorithm") != ALGORITHM:
            raise IdentityError(
                "E_IDENTITY_ALGORITHM",
                "this identity was made by an algorithm that is not known here",
                where="backbone.identity.algorithm",
                expected=ALGORITHM,
                found=identity.get("algorithm"),
            )
        count = identity.get("tensors")
        if type(count) is not int or count < 0:
            raise IdentityError(
                "E_IDENTITY_SECTION", "tensors is a count", where="backbone.identity.tensors", found=count
            )
        tied = _table(identity.get("tied"), "backbone.identity.tied")
        if not all(isinstance(kept, str) and kept not in tied for kept in tied.values()):
            raise IdentityError(
                "E_IDENTITY_SECTION", "an alias is tied to no kept name", where="backbone.identity.tied"
            )
        leaves = {
            field: {
                name: digest_bytes(value, f"backbone.{field}.{name}")
                for name, value in _table(top.get(field), f"backbone.{field}").items()
            }
            for field in ("leaves", "leaves_bf16")
        }
        compatible = {
            digest_bytes(one.get("root"), f"backbone.compatible[{i}].root"): str(one.get("relation", "compatible"))
            for i, one in enumerate(top.get("compatible") or ())
        }
        source = _table(top.get("source"), "backbone.source")
        return cls(
            exact=digest_bytes(identity.get("exact"), "backbone.identity.exact"),
            bf16=digest_bytes(identity.get("bf16"), "backbone.identity.bf16"),
            structure=digest_bytes(identity.get("structure"), "backbone.identity.structure").hex(),
            tensors=count,
            tied=dict(tied),
            excluded=frozenset(identity.get("excluded") or ()),
            leaves=leaves["leaves"],
            leaves_bf16=leaves["leaves_bf16"],
            compatible=compatible,
            hub=source.get("hub"),
            commit=source.get("commit"),
            files={one["path"]: (one["size"], one["sha256"]) for one in top.get("files") or ()},
        )
