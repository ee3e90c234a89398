"""Opening a package: everything that can be checked without its backbone, in order, before anything is handed out."""

from __future__ import annotations

__all__ = ["Package"]

import hashlib
from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Self

from deltahub.errors import PackageError, TensorFileError
from deltahub.identity import stamps
from deltahub.limits import DEFAULT, Limits
from deltahub.manifest import FILE_NAME, FileEntry, Manifest
from deltahub.package import probe as probes
from deltahub.package.checking import Site, check_kinds, check_tensors
from deltahub.package.folder import locate, read_manifest, unlisted
from deltahub.tensors import TensorFile, TensorInfo, sha256_file

if TYPE_CHECKING:
    import os

    from torch import Tensor
    from torch import device as Device

    from deltahub.kinds import Kind, Registry


class Package:
    """A package that was checked whole. Its tensors lie in memory, the very bytes that were hashed.

    Attributes:
        path: the folder.
        root: the folder that its links may lead into, if the caller named one.
        manifest: the parsed ``delta.json``.
        registry: the built-in kinds and the package's own.
        ignored: what lies in the folder without belonging to the package; none of it was opened.
    """

    __slots__ = ("_files", "_index", "_origin", "_probe", "_sites", "ignored", "manifest", "path", "registry", "root")

    def __init__(
        self,
        *,
        path: Path,
        root: Path | None,
        manifest: Manifest,
        registry: Registry,
        sites: Mapping[str, Site],
        files: Mapping[str, TensorFile],
        ignored: tuple[str, ...],
        finite: Collection[str],
    ) -> None:
        self.path, self.root = path, root
        self.manifest, self.registry, self.ignored = manifest, registry, ignored
        self._sites = sites
        self._probe = None if manifest.probe is None else files[manifest.probe.file]
        self._files = tuple(files[entry.path] for entry in manifest.tensor_files)
        self._origin = self._located()
        header = {name: (file[name].dtype, file[name].shape) for name, file in self._origin.items()}
        self._index = check_tensors(sites, header, where=path)
        if self._probe is not None:
            probes.check(self._probe)
        self._check_finite(finite)

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        root: str | os.PathLike[str] | None = None,
        limits: Limits = DEFAULT,
        allow_nonfinite: bool = False,
        parsed: tuple[Manifest, str] | None = None,
        remember: bool = False,
    ) -> Self:
        """Read and check a package.

        Args:
            path: its folder.
            root: a folder of the caller's that links in the package may lead into, such as the Hub's cache; by
                default they may not leave the package.
            limits: what to accept at most.
            allow_nonfinite: accept NaN and infinities among the tensors' values.
            parsed: a manifest and the SHA-256 of the bytes that it was parsed from; while the folder holds the same
                bytes, it is not parsed again.
            remember: keep what was found about a large file (for exactly its path, device, inode, size and times), and
                do not hash it a second time. What is remembered lies in the user's own cache folder.

        Raises:
            ManifestError, TargetError: as :meth:`deltahub.manifest.Manifest.parse`.
            KindError: a kind is unknown or its document wrong, a config is out of bounds, shapes do not fit.
            PackageError: ``E_PACKAGE_MISSING``, ``E_PACKAGE_FILE``, ``E_PACKAGE_OUTSIDE``, ``E_PACKAGE_TENSORS``,
                ``E_PACKAGE_VALUES``, ``E_PACKAGE_PROBE``.
            TensorFileError: a file has another size or digest than the manifest says, or is no strict tensor file.
        """
        folder = Path(path)
        home = None if root is None else Path(root)
        if not folder.is_dir():
            raise PackageError("E_PACKAGE_MISSING", "there is no such folder", where=folder)
        where = str(folder / FILE_NAME)
        raw = read_manifest(folder, root=home, limits=limits)
        if parsed is not None and hashlib.sha256(raw).hexdigest() == parsed[1]:
            manifest = parsed[0]
        else:
            manifest = Manifest.parse(raw, where=where, limits=limits)
        registry, sites = check_kinds(manifest, where=where)
        found = {entry.path: locate(folder, entry.path, root=home) for entry in manifest.files}
        for entry in manifest.files:  # all sizes before the first byte is read
            _check_size(found[entry.path], entry.size)
        memories = {e.path: _Memory(found[e.path], e) for e in manifest.files if remember and e.size >= _LARGE}
        files = {
            entry.path: TensorFile.read(
                found[entry.path],
                size=entry.size,
                sha256=entry.sha256,
                max_header=limits.tensors_header_bytes,
                max_tensors=limits.tensors_count,
                stamp=memories[entry.path].stamp if entry.path in memories else None,
            )
            for entry in manifest.files
        }
        package = cls(
            path=folder,
            root=home,
            manifest=manifest,
            registry=registry,
            sites=sites,
            files=files,
            ignored=unlisted(folder, {FILE_NAME, *found}, limits=limits),
            finite=files if allow_nonfinite else [path for path, memory in memories.items() if memory.finite],
        )
        for memory in memories.values():
            memory.keep(finite=not allow_nonfinite)
        return package

    def __repr__(self) -> str:
        kinds = ", ".join(f"{m.name}: {m.kind}@{m.version} × {len(m.paths)}" for m in self.manifest.modules)
        return f"<Package {str(self.path)!r} ({kinds})>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- what it holds
    @property
    def names(self) -> tuple[str, ...]:
        """All tensors by their full names, ``<module>/<target>/<tensor>``, sorted."""
        return tuple(sorted(self._origin))

    @property
    def size(self) -> int:
        """Bytes of all listed files."""
        return sum(entry.size for entry in self.manifest.files)

    def kind(self, module: str) -> Kind:
        """The kind of a module of the manifest; ``KeyError`` if there is no such module."""
        return self._sites[module].kind

    def config(self, module: str) -> Mapping[str, object]:
        """A module's config, checked and with defaults filled in."""
        return self._sites[module].config

    def info(self, name: str) -> TensorInfo:
        """Dtype, shape and place of a tensor by its full name."""
        return self._origin[name][name]

    def tensor(self, name: str, device: Device | str | None = None) -> Tensor:
        """A tensor by its full name, over the package's own memory unless it moves to another device."""
        return self._origin[name].torch(name, device)

    def tensors(self, module: str, device: Device | str | None = None) -> dict[str, dict[str, Tensor]]:
        """A module's tensors: by path, in the manifest's order, and by name, in the kind's order.

        They lie over the package's memory where they are aligned: what is written to one is seen by the next call.
        """
        return {
            path: {name: self.tensor(full, device) for name, full in names.items()}
            for path, names in self._index[module].items()
        }

    def shapes(self, module: str) -> dict[str, dict[str, tuple[int, ...]]]:
        """As :meth:`tensors`, for the shapes alone."""
        return {
            path: {name: self.info(full).shape for name, full in names.items()}
            for path, names in self._index[module].items()
        }

    def probe(self) -> probes.Probe | None:
        """The publisher's inputs and outputs, if the package has them."""
        if self._probe is None or self.manifest.probe is None:
            return None
        tolerance = {str(dtype): value for dtype, value in self.manifest.probe.tolerance.items()}
        return probes.Probe.read(self._probe, tolerance)

    def verify(self) -> Mapping[str, str]:
        """Check that the folder still holds what was opened; gives each file's digest.

        Raises:
            PackageError: ``E_PACKAGE_CHANGED``, or as :meth:`open`.
        """
        found: dict[str, str] = {}
        if Manifest.parse(read_manifest(self.path, root=self.root, limits=DEFAULT)) != self.manifest:
            raise PackageError("E_PACKAGE_CHANGED", "the manifest was changed", where=self.path / FILE_NAME)
        for entry in self.manifest.files:
            path = locate(self.path, entry.path, root=self.root)
            size, digest = sha256_file(path)
            if (size, digest) != (entry.size, entry.sha256):
                raise PackageError(
                    "E_PACKAGE_CHANGED", "a file was changed", where=path, expected=entry.sha256, found=digest
                )
            found[entry.path] = digest
        return MappingProxyType(found)

    def close(self) -> None:
        """Let go of the memory; tensors that were handed out keep theirs."""
        for file in (*self._files, *((self._probe,) if self._probe is not None else ())):
            file.close()

    # --- checks
    def _located(self) -> dict[str, TensorFile]:
        found: dict[str, TensorFile] = {}
        for file in self._files:
            for name in file:
                if name in found:
                    raise PackageError(
                        "E_PACKAGE_TENSORS",
                        f"two files hold the tensor {name!r}",
                        where=self.path,
                        found=[found[name].path.name, file.path.name],
                    )
                found[name] = file
        return found

    def _check_finite(self, known: Collection[str]) -> None:
        """Look at every value, but for those of the files that are known to be finite or need not be."""
        files = [f for entry, f in zip(self.manifest.tensor_files, self._files, strict=True) if entry.path not in known]
        wrong = [name for file in files for name in file if not file.finite(name)]
        if wrong:
            raise PackageError(
                "E_PACKAGE_VALUES",
                f"the tensor {wrong[0]!r} holds NaN or infinity",
                where=self.path,
                hint="train it again, or accept it knowingly with allow_nonfinite=True",
                also=[f"so does {name!r}" for name in wrong[1:]],
            )


_LARGE = 1 << 20
"""Bytes of a file below which hashing it again costs less than looking up that it was hashed."""


class _Memory:
    """What is remembered of one file of a package."""

    def __init__(self, path: Path, entry: FileEntry) -> None:
        try:
            self.key = stamps.stat_key(path)
        except OSError:  # it will be refused, with its reason, when it is opened
            self.key = []
        known = stamps.known_digest(self.key) if self.key else None
        self.sha256 = entry.sha256
        self.hashed = known is not None and known[0] == entry.sha256
        self.finite = self.hashed and known is not None and known[1]

    @property
    def stamp(self) -> list[object] | None:
        return self.key[1:] if self.hashed else None

    def keep(self, *, finite: bool) -> None:
        if self.key and (not self.hashed or (finite and not self.finite)):
            stamps.keep_digest(self.key, self.sha256, finite=finite)


def _check_size(path: Path, size: int) -> None:
    found = path.stat().st_size
    if found != size:
        raise TensorFileError(
            "E_TENSORS_SIZE", "the file has not the declared size", where=path, expected=size, found=found
        )
