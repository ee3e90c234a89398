"""``deltahub.lock``: what exactly was loaded, so that it can be loaded again or refused.

The file is JSON: one entry per package with its commit, the digest of its manifest (which lists the digests of all
its files) and the roots of its backbone. It holds no paths of this machine and no secrets, and belongs in version
control.
"""

from __future__ import annotations

__all__ = ["Lock", "LockEntry", "lock_of", "matching"]

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from deltahub.errors import HubError
from deltahub.tensors.files import replacing

if TYPE_CHECKING:
    from deltahub.hub.pulling import PulledPackage
    from deltahub.hub.sources import Source

_Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_LOCK_BYTES = 4 << 20


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class LockedBackbone(_Model):
    """The backbone that the package was made for."""

    hub: str | None = None
    commit: str | None = None
    exact: _Digest
    structure: _Digest


class LockEntry(_Model):
    """One package.

    Attributes:
        source: as it was asked for, without the revision.
        commit: of the repository; empty for a mirror.
        manifest: SHA-256 of ``delta.json``.
        backbone: what it was made for.
    """

    source: str
    endpoint: str = ""
    commit: Annotated[str, Field(pattern=r"^([0-9a-f]{40}|[0-9a-f]{64})?$")] = ""
    manifest: _Digest
    backbone: LockedBackbone

    def check(self, found: PulledPackage) -> None:
        """Refuse a package that is not this one.

        Raises:
            HubError: ``E_HUB_LOCK_MISMATCH``.
        """
        if found.sha256 != self.manifest:
            raise HubError(
                "E_HUB_LOCK_MISMATCH",
                "this is not the package that the lock file names",
                where=found.source,
                expected=f"delta.json with sha256 {self.manifest}",
                found=found.sha256,
                hint="if the change is wanted, make the lock file again",
            )


class Lock(_Model):
    """A lock file."""

    lock_version: Literal[1] = 1
    packages: tuple[LockEntry, ...] = ()

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Lock:
        """Read a lock file strictly.

        Raises:
            HubError: ``E_HUB_LOCK`` for a file that is missing, too large or not a lock file.
        """
        try:
            with Path(path).open("rb") as file:
                data = file.read(_LOCK_BYTES)  # a cut document does not parse
            return cls.model_validate_json(data)
        except (OSError, ValidationError) as error:
            raise HubError("E_HUB_LOCK", "the lock file cannot be read", where=path, found=error) from None

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write it in one step; the same packages give the same bytes."""
        text = json.dumps(self.model_dump(mode="json"), indent=2, ensure_ascii=False)
        with replacing(path) as file:
            file.write(text.encode() + b"\n")

    def entry(self, source: Source) -> LockEntry | None:
        """The entry of a source, whatever its revision."""
        wanted = _without_revision(source)
        return next((entry for entry in self.packages if entry.source == wanted), None)


def _without_revision(source: Source) -> str:
    if source.kind == "hub":
        return f"hf://{source.repo_id}/{source.subfolder}".rstrip("/")
    return str(source)


def lock_of(packages: PulledPackage | Iterable[PulledPackage]) -> Lock:
    """The lock of what was pulled."""
    from deltahub.hub.pulling import PulledPackage

    several = [packages] if isinstance(packages, PulledPackage) else list(packages)
    return Lock(packages=tuple(_entry(package) for package in several))


def _entry(package: PulledPackage) -> LockEntry:
    backbone = package.manifest.backbone
    source = backbone.source
    return LockEntry(
        source=_without_revision(package.source),
        endpoint=package.endpoint,
        commit=package.commit,
        manifest=package.sha256,
        backbone=LockedBackbone(
            hub=source.hub if source else None,
            commit=source.commit if source else None,
            exact=backbone.identity.exact,
            structure=backbone.identity.structure,
        ),
    )


def matching(lock: Lock, source: Source) -> LockEntry:
    """The entry for a source.

    Raises:
        HubError: ``E_HUB_LOCK_MISMATCH`` where there is none, or where the source asks for another commit.
    """
    entry = lock.entry(source)
    if entry is None:
        raise HubError(
            "E_HUB_LOCK_MISMATCH",
            "the lock file does not name this package",
            where=source,
            expected=", ".join(entry.source for entry in lock.packages) or "nothing",
        )
    asked = source.revision or ""
    if len(asked) == 40 and not set(asked) - set("0123456789abcdef") and asked != entry.commit:
        raise HubError(
            "E_HUB_LOCK_MISMATCH",
            "the lock file names another commit",
            where=source,
            expected=entry.commit,
            found=asked,
        )
    return entry
