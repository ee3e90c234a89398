"""Writing a package: whole or not at all, and nothing that a reader would refuse."""

from __future__ import annotations

__all__ = ["write"]

import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from deltahub.errors import DeltaHubError, PackageError, TensorFileError
from deltahub.limits import DEFAULT, Limits
from deltahub.manifest import FILE_NAME, SPEC_VERSION, Manifest
from deltahub.manifest.fields import problems_of
from deltahub.manifest.strict_json import fail
from deltahub.package.folder import read_manifest
from deltahub.package.probe import FILE_NAME as PROBE_NAME
from deltahub.package.probe import Probe
from deltahub.package.reading import Package
from deltahub.tensors import FileDigest, Pending
from deltahub.tensors import write as write_tensors
from deltahub.tensors.leftovers import held, sweep

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

CARD = "README.md"
_OURS = frozenset({FILE_NAME, CARD, "delta.svg", "model.sig"})


def write(
    path: str | os.PathLike[str],
    manifest: Manifest | Mapping[str, Any],
    tensors: Mapping[str, Tensor | np.ndarray[Any, Any] | Pending],
    *,
    readme: str | None = None,
    probe: Probe | None = None,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    limits: Limits = DEFAULT,
) -> Package:
    """Write a package and open it.

    It is written beside its place, read back and checked as any reader would, and only then put there: the folder is
    absent or whole, and an old one stays until the new one is. The same content gives the same bytes.

    Args:
        path: the folder; it must not exist, or be empty, unless ``overwrite``.
        manifest: a manifest, or its members as a mapping; ``files`` and ``probe`` are filled in here, and so is
            ``spec_version`` where it is missing.
        tensors: by full name, ``<module>/<target>/<tensor>``; a :class:`deltahub.tensors.Pending` one is made when it
            is written and not held.
        readme: the model card; when overwriting, the old one stays by default.
        probe: inputs and the outputs that they must give.
        overwrite: replace a package that is there. A folder that holds anything but a package is never replaced.
        allow_nonfinite: write NaN and infinities.
        limits: ``package_shard_bytes`` of tensors go into one file at most, unless a single one is larger.

    Raises:
        PackageError: ``E_PACKAGE_EXISTS``, ``E_PACKAGE_WRITE`` (no space, no permission), and what
            :meth:`Package.open` raises, as it does.
        TensorFileError: a value cannot be stored.
    """
    target = Path(os.path.abspath(path))  # noqa: PTH100  (a link at the end is to be seen, not followed)
    sweep(target)
    card = _check_place(target, overwrite=overwrite)
    members = (
        manifest.model_dump(by_alias=True, exclude_unset=True) if isinstance(manifest, Manifest) else dict(manifest)
    )
    with _beside(target) as folder:
        files = _write_files(folder, tensors, probe, limits.package_shard_bytes)
        members["files"] = [{"path": f.path.name, "size": f.size, "sha256": f.sha256} for f in files]
        members.pop("probe", None)
        if probe is not None:
            members["probe"] = {"file": PROBE_NAME, "tolerance": dict(probe.tolerance)}
        _put(folder / FILE_NAME, _complete(members).to_bytes())
        if readme is not None or card is not None:
            _put(folder / CARD, readme.encode("utf-8") if readme is not None else card or b"")
        _sync(folder)
        package = Package.open(folder, limits=limits, allow_nonfinite=allow_nonfinite)
        _swap(folder, target)
    package.path = target
    return package


def _complete(members: dict[str, Any]) -> Manifest:
    try:
        return Manifest.model_validate({"spec_version": SPEC_VERSION, **members})
    except ValidationError as error:
        raise fail(problems_of(error), FILE_NAME) from None


def _check_place(target: Path, *, overwrite: bool) -> bytes | None:
    """Refuse to write where something else would be lost; give the model card that is there."""
    try:
        if not os.path.lexists(target):
            return None
        if target.is_symlink() or not target.is_dir():
            raise PackageError("E_PACKAGE_EXISTS", "this is not a folder", where=target)
        held = set(os.listdir(target))  # noqa: PTH208
        if not held:
            return None
        if not overwrite:
            raise PackageError(
                "E_PACKAGE_EXISTS", "the folder is not empty", where=target, hint="overwrite=True replaces a package"
            )
        try:
            old = Manifest.parse(read_manifest(target, root=None, limits=DEFAULT))
            strangers = sorted(held - _OURS - {entry.path for entry in old.files})
        except (DeltaHubError, OSError):
            strangers = sorted(held)
        if strangers:
            raise PackageError(
                "E_PACKAGE_EXISTS",
                "the folder holds what is no part of a package and would be lost",
                where=target,
                found=strangers[:10],
                hint="choose another folder",
            )
        return (target / CARD).read_bytes() if CARD in held else None
    except OSError as error:
        raise _unwritable(target, error) from None


def _write_files(
    folder: Path, tensors: Mapping[str, Tensor | np.ndarray[Any, Any] | Pending], probe: Probe | None, shard_bytes: int
) -> list[FileDigest]:
    shards: list[dict[str, Tensor | np.ndarray[Any, Any] | Pending]] = []
    room = 0
    for name, tensor in tensors.items():
        size = int(tensor.nbytes)
        if not shards or size > room:
            shards.append({})
            room = shard_bytes
        shards[-1][name] = tensor
        room -= size
    width = f"{len(shards):05d}"
    names = (
        ["delta.safetensors"]
        if len(shards) == 1
        else [f"delta-{i:05d}-of-{width}.safetensors" for i in range(1, len(shards) + 1)]
    )
    try:
        written = [write_tensors(folder / name, shard) for name, shard in zip(names, shards, strict=True)]
        if probe is not None:
            written.append(write_tensors(folder / PROBE_NAME, probe.tensors()))
    except TensorFileError as error:
        if error.code == "E_TENSORS_WRITE":
            raise PackageError("E_PACKAGE_WRITE", error.what, where=folder.parent, hint=error.hint) from None
        raise
    return written


def _put(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """A new folder next to the target, gone at the end unless it took the target's place."""
    made: list[Path] = []
    folder = target.with_name(f".{target.name[:64]}.{secrets.token_hex(8)}.part")
    try:
        for parent in reversed([p for p in target.parents if not p.exists()]):
            parent.mkdir()
            made.append(parent)
        folder.mkdir()
        with held(folder):
            yield folder
    except DeltaHubError as error:
        if error.where is not None:
            error.where = str(error.where).replace(str(folder), str(target))
        raise
    except OSError as error:
        raise _unwritable(target, error) from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if not target.exists():
            with suppress(OSError):
                for parent in reversed(made):
                    parent.rmdir()


def _swap(folder: Path, target: Path) -> None:
    """Put the new folder in the old one's place; at no moment is there half of either."""
    old: Path | None = None
    if target.exists():
        if os.listdir(target):  # noqa: PTH208
            old = target.with_name(f"{folder.name}.old")
            target.rename(old)
        else:
            target.rmdir()
    try:
        folder.rename(target)
    except OSError:
        if old is not None:
            old.rename(target)
        raise
    _sync(target.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def _sync(folder: Path) -> None:
    if os.name == "posix":
        with suppress(OSError):
            handle = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


def _unwritable(target: Path, error: OSError) -> PackageError:
    return PackageError(
        "E_PACKAGE_WRITE",
        f"the package cannot be written: {error.strerror or error}",
        where=target,
        hint="nothing was left behind; make room or choose another folder",
    )
