"""Kinds by name: those of the specification, and those that a package brings along as data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from types import MappingProxyType
from typing import Any

from deltahub.errors import KindError
from deltahub.kinds.document import Document
from deltahub.kinds.kind import Kind
from deltahub.kinds.naming import known_as
from deltahub.kinds.ops import nearest

__all__ = ["Registry", "get", "names"]


class Registry:
    """Kinds by name and version: the built-in ones, and those of one package.

    Args:
        documents: the package's own documents, as its manifest holds them.

    Attributes:
        own: the kinds of those documents.

    Raises:
        KindError: ``E_KIND_DOCUMENT`` and others for a document that is wrong, ``E_KIND_NAME`` for a name that is not a
            reverse domain name or is given twice.
    """

    def __init__(self, documents: Iterable[Mapping[str, Any]] = ()) -> None:
        self._own: dict[str, dict[int, Kind]] = {}
        for data in documents:
            kind = Kind(Document.parse(data))
            if "." not in kind.name:
                raise KindError(
                    "E_KIND_NAME",
                    f"a package's own kind must have a reverse domain name, not {kind.name!r}",
                    expected="such as com.example.gate",
                    found=kind.name,
                )
            versions = self._own.setdefault(kind.name, {})
            if kind.version in versions:
                raise KindError("E_KIND_NAME", f"kind {kind.name!r}, version {kind.version}, is given twice")
            versions[kind.version] = kind
        self.own = tuple(kind for versions in self._own.values() for kind in versions.values())

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted({*_files(), *self._own})

    def get(self, name: str, version: int | None = None) -> Kind:
        """A kind by name: one version of it, or the newest.

        Raises:
            KindError: ``E_KIND_UNKNOWN`` if there is no such kind or version.
        """
        versions = self._own.get(name) or (_built_in(name) if name in _files() else None)
        if versions is None:
            called = known_as(name)
            hint = f"others call {' or '.join(called)} so" if called else None
            near = nearest(name, self.names())
            raise KindError("E_KIND_UNKNOWN", f"unknown kind {name!r}{near}", found=name, hint=hint)
        if version is None:
            return versions[max(versions)]
        if version not in versions:
            raise KindError(
                "E_KIND_UNKNOWN",
                f"kind {name!r} has no version {version!r} here",
                expected=sorted(versions),
                found=version,
                hint="a newer DeltaHub may know it",
            )
        return versions[version]


@cache
def _files() -> Mapping[str, tuple[Traversable, ...]]:
    """Built-in documents by kind: ``lora.toml``, and ``lora@2.toml`` for a further version. Read when asked for."""
    found: dict[str, tuple[Traversable, ...]] = {}
    for entry in sorted(files("deltahub.spec").joinpath("kinds").iterdir(), key=lambda e: e.name):
        if entry.name.endswith(".toml"):
            name = entry.name.removesuffix(".toml").partition("@")[0]
            found[name] = (*found.get(name, ()), entry)
    return MappingProxyType(found)


@cache
def _built_in(name: str) -> Mapping[int, Kind]:
    kinds = [Kind(Document.from_toml(e.read_text(encoding="utf-8"), where=e.name)) for e in _files()[name]]
    return MappingProxyType({kind.version: kind for kind in kinds})


def names() -> list[str]:
    """Names of the built-in kinds, sorted."""
    return Registry().names()


def get(name: str, version: int | None = None, documents: Iterable[Mapping[str, Any]] = ()) -> Kind:
    """A kind by name, among the built-in ones and the given documents.

    Raises:
        KindError: as :class:`Registry` and :meth:`Registry.get`.
    """
    return Registry(documents).get(name, version)
