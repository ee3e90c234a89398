"""What is already known of files on this machine, so that gigabytes are hashed once.

A stamp belongs to a path and holds for exactly one device, inode, size, modification
and change time. It is a hint of this user to himself: it lies in his own cache folder,
losing it costs time and nothing else, and whatever is wrong with it means that there is none.
"""

from __future__ import annotations

__all__ = ["Spec", "Stamp", "cache_folder", "keep_digest", "known_digest", "load", "stat_key", "store"]

import hashlib
import json
import os
import secrets
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from deltahub.identity.tree import FLOATS

_VERSION = 1
_SETTLED = 0.05  # seconds: more than the coarsest step of a local file system's clock
_SETTLED_COARSE = 2.5


class Spec(NamedTuple):
    """Dtype name and shape of a tensor."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(slots=True)
class Stamp:
    """The tensors of one file, and those of their leaves (exact, bf16 or empty) that were ever computed."""

    tensors: dict[str, Spec]
    leaves: dict[str, tuple[bytes, bytes]] = field(default_factory=dict)


def cache_folder() -> Path:
    """``$DELTAHUB_CACHE``, else ``$XDG_CACHE_HOME/deltahub``, else ``~/.cache/deltahub``."""
    own = os.environ.get("DELTAHUB_CACHE")
    if own:
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deltahub"


def stat_key(path: Path) -> list[object]:
    """What must not have changed for a stamp to hold; symlinks are followed. May raise ``OSError``."""
    real = path.resolve()
    found = real.stat()
    return [str(real), found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def _settled(key: list[object]) -> bool:
    """Whether a later change would be sure to show in the file's times: not in the very tick of the last one."""
    newest = max(int(str(key[4])), int(str(key[5])))
    coarse = newest % 1_000_000 == 0
    return time.time() - newest / 1e9 > (_SETTLED_COARSE if coarse else _SETTLED)


def _place(key: list[object], room: str = "stamps") -> Path:
    return cache_folder() / room / f"{hashlib.sha256(str(key[0]).encode('utf-8', 'replace')).hexdigest()}.json"


def load(key: list[object]) -> Stamp | None:
    """The stamp that holds for this key, if there is one."""
    with suppress(OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        found = json.loads(_place(key).read_bytes())
        if found["version"] != _VERSION or found["key"] != key:
            return None
        stamp = Stamp({})
        for name, (dtype, shape, *digests) in found["tensors"].items():
            stamp.tensors[name] = Spec(dtype, tuple(shape))
            if digests:
                exact, bf16 = bytes.fromhex(digests[0]), bytes.fromhex("".join(digests[1:]))
                stamp.leaves[name] = (exact, bf16 if dtype in FLOATS else exact)
        return stamp
    return None


def store(key: list[object], stamp: Stamp) -> None:
    """Keep a stamp, together with the leaves that another process may have found meanwhile; never fails.

    ``key`` must have been taken before the file was read; a file that changed since, or only just
    before, is not stamped.
    """
    with suppress(OSError):
        if stat_key(Path(str(key[0]))) != key or not _settled(key):
            return
        other = load(key)
        leaves = dict(stamp.leaves)
        for name, pair in (other.leaves if other else {}).items():
            if not leaves.get(name, (b"", b""))[1]:
                leaves[name] = pair
        tensors: dict[str, list[object]] = {}
        for name, spec in stamp.tensors.items():
            digests = [one.hex() for one in dict.fromkeys(leaves.get(name, ())) if one]
            tensors[name] = [spec.dtype, spec.shape, *digests]
        _write(_place(key), {"version": _VERSION, "key": key, "tensors": tensors})


def _write(place: Path, data: object) -> None:
    place.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    beside = place.with_suffix(f".{secrets.token_hex(8)}.part")
    try:
        beside.write_text(json.dumps(data, separators=(",", ":")), encoding="utf-8")
        beside.replace(place)
    finally:
        beside.unlink(missing_ok=True)


def known_digest(key: list[object]) -> tuple[str, bool] | None:
    """The SHA-256 of a whole file, in hex, and whether its values are known to be finite, if a stamp holds for it."""
    with suppress(OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        found = json.loads(_place(key, "files").read_bytes())
        if found["version"] == _VERSION and found["key"] == key:
            return str(found["sha256"]), found["finite"] is True
    return None


def keep_digest(key: list[object], sha256: str, *, finite: bool) -> None:
    """Keep what :func:`known_digest` gives; never fails, and as :func:`store` stamps no file that may still change."""
    with suppress(OSError):
        if stat_key(Path(str(key[0]))) == key and _settled(key):
            _write(_place(key, "files"), {"version": _VERSION, "key": key, "sha256": sha256, "finite": finite})
