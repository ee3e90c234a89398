"""Backbones at an address that fsspec opens (``s3://…``, ``memory://…``), on this machine for as long as needed."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

from deltahub.errors import ConverterError

__all__ = ["at_hand"]


@contextmanager
def at_hand(backbone: str | os.PathLike[str] | None, *, near: Path) -> Iterator[str | None]:
    """The backbone as :func:`deltahub.backbones.resolve` takes it; an address as a folder that goes with the block.

    Args:
        backbone: a folder, a repository, an address, or ``None``.
        near: a folder on the disk that has room: where the copy is kept.

    Raises:
        ConverterError: ``E_MERGE_SOURCE`` where nothing can be had from the address.
    """
    text = None if backbone is None else os.fspath(backbone)
    if text is None or "://" not in text:
        yield text
        return
    with tempfile.TemporaryDirectory(prefix=".deltahub-", dir=near) as folder:
        _fetch(text, Path(folder))
        yield folder


def _fetch(url: str, folder: Path) -> None:
    """Copy what a backbone consists of, file by file: no library's code, no pickles."""
    try:
        from fsspec.core import url_to_fs

        system, root = url_to_fs(url)
        wanted = {name: path for path in system.find(root) if _wanted(name := _relative(path, root))}
        for name, path in sorted(wanted.items()):
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            system.get_file(path, str(target))
    except (OSError, ValueError, ImportError) as error:
        raise ConverterError("E_MERGE_SOURCE", f"the backbone cannot be fetched: {error}", where=url) from error
    if not wanted:
        raise ConverterError("E_MERGE_SOURCE", "there is no backbone at this address", where=url)


def _relative(path: Any, root: str) -> str:
    return str(PurePosixPath(str(path)).relative_to(root)) if root else str(path).lstrip("/")


def _wanted(name: str) -> bool:
    from deltahub.backbones.libraries import LIBRARIES

    parts = PurePosixPath(name).parts
    plain = bool(parts) and not any(part in {"", ".", ".."} or "\\" in part or ":" in part for part in parts)
    patterns = {pattern for library in LIBRARIES.values() for pattern in library.files}
    patterns |= {"*.safetensors", "*.safetensors.index.json", "LICENSE*", "NOTICE*"}
    return plain and any(fnmatchcase(name, pattern) for pattern in patterns)
