"""Plain files: opened only when they are plain, hashed and copied in one pass."""

from __future__ import annotations

__all__ = ["CHUNK", "FileDigest", "copy_stream", "open_regular", "replacing", "sha256_file"]

import hashlib
import os
import secrets
import stat
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from deltahub.errors import TensorFileError
from deltahub.progress import heard, step
from deltahub.tensors.leftovers import held, sweep

if TYPE_CHECKING:
    from collections.abc import Iterator

CHUNK = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class FileDigest:
    """A file as it was read or written: its size in bytes and its SHA-256 in lower-case hex."""

    path: Path
    size: int
    sha256: str


def open_regular(path: str | os.PathLike[str]) -> FileIO:
    """Open a regular file for reading, unbuffered; anything else is refused without blocking.

    A symlink is followed (the Hub's cache is made of them) and must end at a regular file.

    Raises:
        TensorFileError: ``E_TENSORS_MISSING``, ``E_TENSORS_NOT_REGULAR`` (FIFO, device, socket, directory),
            ``E_TENSORS_UNREADABLE``.
    """
    try:
        # stat comes first because opening a device may already do something; fstat repeats it on what was opened.
        found = os.stat(path)  # noqa: PTH116
        if stat.S_ISREG(found.st_mode):
            file = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
            if stat.S_ISREG(os.fstat(file).st_mode):
                return FileIO(file, "rb")
            os.close(file)
    except FileNotFoundError:
        raise TensorFileError("E_TENSORS_MISSING", "there is no such file", where=path) from None
    except (OSError, ValueError) as error:
        raise TensorFileError("E_TENSORS_UNREADABLE", f"the file cannot be opened: {error}", where=path) from None
    raise TensorFileError("E_TENSORS_NOT_REGULAR", "this is not a regular file", where=path)


def sha256_file(path: str | os.PathLike[str]) -> tuple[int, str]:
    """Size in bytes and SHA-256 (lower-case hex) of a regular file; errors as :func:`open_regular`."""
    with open_regular(path) as file:
        try:
            if not heard():
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                return file.tell(), digest
            with step(f"checking {Path(path).name}", os.fstat(file.fileno()).st_size) as advance:
                running, size = hashlib.sha256(), 0
                while chunk := file.read(CHUNK):
                    running.update(chunk)
                    size += len(chunk)
                    advance(len(chunk))
                return size, running.hexdigest()
        except OSError as error:
            raise TensorFileError("E_TENSORS_UNREADABLE", f"the file cannot be read: {error}", where=path) from None


def copy_stream(source: BinaryIO, target: BinaryIO, *, limit: int | None = None) -> tuple[int, str]:
    """Copy until the source ends; give the size and the SHA-256 (lower-case hex) of what was copied.

    Raises:
        TensorFileError: ``E_TENSORS_TOO_LARGE`` as soon as more than ``limit`` bytes have come.
    """
    digest, size = hashlib.sha256(), 0
    while chunk := source.read(CHUNK):
        size += len(chunk)
        if limit is not None and size > limit:
            raise TensorFileError("E_TENSORS_TOO_LARGE", "more bytes than allowed", expected=f"at most {limit}")
        digest.update(chunk)
        target.write(chunk)
    return size, digest.hexdigest()


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[FileIO]:
    """A new file that takes the place of ``path`` when the block ends well, and is gone when it does not.

    It is written next to ``path``, flushed to the disk, and renamed: a reader sees the old file or the
    new one, whole. Errors of the system pass through as ``OSError``.
    """
    target = Path(path)
    beside = target.with_name(f".{target.name[:64]}.{secrets.token_hex(8)}.part")
    sweep(target)
    with FileIO(beside, "x") as file, held(beside):
        try:
            yield file
            os.fsync(file.fileno())
            beside.replace(target)
        except BaseException:
            with suppress(OSError):
                beside.unlink()
            raise
    if os.name == "posix":  # the rename itself is on the disk only once its folder is
        with suppress(OSError):
            folder = os.open(target.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
