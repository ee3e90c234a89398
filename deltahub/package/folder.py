"""The folder of a package: which file of it a name means, and what else lies in it."""

from __future__ import annotations

__all__ = ["locate", "read_manifest", "unlisted"]

import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from deltahub.errors import ManifestError, PackageError
from deltahub.manifest import FILE_NAME
from deltahub.tensors import open_regular

if TYPE_CHECKING:
    from collections.abc import Collection

    from deltahub.limits import Limits


def locate(folder: Path, name: str, *, root: Path | None) -> Path:
    """Find the regular file that a name of a package means, without opening it.

    Args:
        folder: the package.
        name: a relative path with ``/`` between names, already known to be harmless as text.
        root: a folder that the caller trusts links to lead into; by default no link may leave ``folder``.

    Raises:
        PackageError: ``E_PACKAGE_MISSING``, ``E_PACKAGE_FILE`` for what is no regular file, ``E_PACKAGE_OUTSIDE``.
    """
    path = folder.joinpath(*name.split("/"))
    try:
        found = path.resolve(strict=True)
        status = found.stat()
        own = folder.resolve(strict=True)
        home = own if root is None else root.resolve(strict=True)
    except FileNotFoundError:
        raise PackageError(
            "E_PACKAGE_MISSING",
            f"the package lacks the file {name!r}",
            where=folder,
            hint="fetch it again; a package is all of its files",
        ) from None
    except (OSError, RuntimeError, ValueError) as error:
        raise PackageError("E_PACKAGE_FILE", f"{name!r} cannot be looked at: {error}", where=path) from None
    if not found.is_relative_to(home):
        raise PackageError(
            "E_PACKAGE_OUTSIDE",
            f"{name!r} is a link out of the package",
            where=path,
            expected=f"a file in {home}",
            found=found,
            hint="copy the file into the package",
        )
    if not stat.S_ISREG(status.st_mode):
        raise PackageError("E_PACKAGE_FILE", f"{name!r} is no regular file", where=path)
    if status.st_nlink > 1 and home == own:
        raise PackageError(
            "E_PACKAGE_OUTSIDE",
            f"{name!r} is a hard link: the same file has another name",
            where=path,
            expected="a file that belongs to the package alone",
            hint="copy the file, or name the folder that holds its store as root=",
        )
    return found


def read_manifest(folder: Path, *, root: Path | None, limits: Limits) -> bytes:
    """Read the manifest's bytes, no more of them than there may be.

    Raises:
        ManifestError: ``E_MANIFEST_SIZE``.
        PackageError: as :func:`locate`; ``E_PACKAGE_FILE`` if it cannot be read.
    """
    path = locate(folder, FILE_NAME, root=root)
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            data = file.read(limits.manifest_bytes + 1) if size <= limits.manifest_bytes else b""
    except OSError as error:
        raise PackageError("E_PACKAGE_FILE", f"the manifest cannot be read: {error}", where=path) from None
    size = max(size, len(data))
    if size > limits.manifest_bytes:
        raise ManifestError(
            "E_MANIFEST_SIZE",
            "the manifest is too large",
            where=path,
            expected=f"at most {limits.manifest_bytes} bytes",
            found=size,
        )
    return data


def unlisted(folder: Path, listed: Collection[str], *, limits: Limits) -> tuple[str, ...]:
    """Name what lies in a package without belonging to it. Nothing is opened and no link is followed.

    Folders are walked, except those whose name begins with a dot, which are named as a whole. The list ends, with an
    ellipsis, where it would be longer than the limit.
    """
    found: list[str] = []
    waiting = [""]
    while waiting:
        prefix = waiting.pop()
        try:
            with os.scandir(folder / prefix) as found_here:
                entries = sorted(found_here, key=lambda entry: entry.name)
        except OSError:
            found.append(prefix)
            continue
        for entry in entries:
            name = prefix + entry.name
            if len(found) >= limits.package_entries:
                return (*found, "…")
            if entry.is_dir(follow_symlinks=False):
                if entry.name.startswith("."):
                    found.append(f"{name}/")
                else:
                    waiting.append(f"{name}/")
            elif name not in listed:
                found.append(name)
    return tuple(sorted(found))
