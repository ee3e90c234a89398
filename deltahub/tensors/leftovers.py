"""What a killed writer leaves beside its target: recognised by name and by a lock that died with it, and removed.

Everything here is written beside its place as ``.<name>.<hex>.part`` and renamed. Who is killed in between leaves the
part; and, in the instant between two renames, the old folder as ``….old`` and nothing in its place. The next writer
of the same target puts that right.
"""

from __future__ import annotations

__all__ = ["held", "sweep"]

import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_ENDING = re.compile(r"[0-9a-f]{12,16}\.(?:part|part\.old|old)")
_SETTLED = 2.0
"""Seconds: a part is made, and then locked; and a folder is put aside, and then replaced."""


@contextmanager
def held(path: Path) -> Iterator[bool]:
    """Mark a part as being written, until the block ends or the process does; nothing where a system has no locks.

    Yields:
        Whether it is marked: not where somebody else writes it, nor without locks.
    """
    handle = _locked(path)
    try:
        yield handle is not None
    finally:
        if handle is not None:
            os.close(handle)


def _locked(path: Path) -> int | None:
    """A descriptor with the lock on a file or folder; ``None`` where somebody else has it, or nobody can."""
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    with suppress(OSError):
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(handle)
            raise
        return handle
    return None


def sweep(target: Path, *, keep: str = "") -> None:
    """Remove what dead writers of ``target`` left, save one name; put the old folder back where it is all there is."""
    stem = f".{target.name[:64]}."
    with suppress(OSError):
        for path in sorted(target.parent.iterdir()):
            if path.name != keep and path.name.startswith(stem) and _ENDING.fullmatch(path.name.removeprefix(stem)):
                with suppress(OSError):
                    _settle(path, target)


def _settle(path: Path, target: Path) -> None:
    status = path.lstat()
    if time.time() - max(status.st_mtime, status.st_ctime) < _SETTLED:
        return
    handle = _locked(path)
    if handle is None:
        return
    try:
        if path.name.endswith(".old") and not os.path.lexists(target):
            path.rename(target)
        elif path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()
    finally:
        os.close(handle)
