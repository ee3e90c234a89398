"""What the loopback Hub remembers: repositories as trees of entries per commit, and the bytes behind them.

Metadata lives in memory, bytes on disk under the server's root: ``blobs/<git sha1>`` for regular files and
``lfs/<sha256>`` for large ones, the same two names by which the Hub's API speaks of them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

__all__ = [
    "LFS_SUFFIXES",
    "REGULAR_LIMIT",
    "Account",
    "Commit",
    "Entry",
    "Refusal",
    "Repository",
    "Store",
    "check_path",
    "git_oid",
    "pointer",
    "timestamp",
]

LFS_SUFFIXES = tuple(
    ".safetensors .bin .pt .pth .onnx .gguf .h5 .npz .zip .gz .parquet .arrow .png .jpg .ttf".split()  # noqa: SIM905
)
REGULAR_LIMIT = 10 * 1024 * 1024
_GITATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()


class Refusal(Exception):  # noqa: N818 - it becomes an HTTP answer, it is not a failure of the server
    """An answer other than 2xx.

    Args:
        status: HTTP status.
        message: what the client shows to its user.
        code: the Hub's ``X-Error-Code``, by which the client chooses its exception class.
        commit: ``X-Repo-Commit``; with it a client remembers that a file does not exist.
    """

    def __init__(self, status: int, message: str, *, code: str | None = None, commit: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.commit = commit


def timestamp() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")


def git_oid(data: bytes) -> str:
    """Git's name for a blob."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def pointer(sha256: str, size: int) -> bytes:
    """The text that git stores in the place of a large file."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def check_path(path: str) -> str:
    """Refuse paths that git or the Hub would refuse."""
    parts = path.rstrip("/").split("/")
    if path.startswith("/") or any(part in {"", ".", "..", ".git"} for part in parts):
        raise Refusal(400, f"invalid path {path!r}")
    return path


@dataclass(frozen=True, kw_only=True, slots=True)
class Account:
    """Somebody with a token. The administrator may write everywhere, others in their own namespaces."""

    name: str
    orgs: tuple[str, ...] = ()
    admin: bool = False

    def owns(self, repo_id: str) -> bool:
        return self.admin or repo_id.partition("/")[0] in {self.name, *self.orgs}


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One file of a tree. ``sha256`` is set for large files, ``xet`` for those that came in as chunks."""

    size: int
    oid: str
    sha256: str | None = None
    xet: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Commit:
    tree: dict[str, Entry]
    parent: str | None
    title: str
    message: str
    date: str


@dataclass(kw_only=True)
class Repository:
    """A repository: commits by id, branches (pull requests are branches named ``refs/pr/N``) and tags."""

    kind: str
    id: str
    private: bool = False
    gated: str | bool = False
    granted: set[str] = field(default_factory=set)
    created: str = field(default_factory=timestamp)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)
    discussions: list[dict[str, Any]] = field(default_factory=list)
    downloads: int = 0
    likes: int = 0

    def commit(self, branch: str, tree: dict[str, Entry], title: str, message: str = "") -> str:
        """Put ``tree`` on top of ``branch`` (made if it is not there) and return the new commit's id."""
        parent = self.branches.get(branch)
        body = json.dumps([self.id, parent, sorted((p, e.oid) for p, e in tree.items()), title, time.time_ns()])
        oid = hashlib.sha1(body.encode(), usedforsecurity=False).hexdigest()
        self.commits[oid] = Commit(tree=tree, parent=parent, title=title, message=message, date=timestamp())
        self.branches[branch] = oid
        return oid

    def resolve(self, revision: str) -> str:
        """The commit of a branch, a tag, a pull request or an abbreviated commit id."""
        revision = "main" if revision == "HEAD" else revision
        for found in (self.branches.get(revision), self.tags.get(revision)):
            if found:
                return found
        if re.fullmatch(r"[0-9a-f]{7,40}", revision):
            hits = [oid for oid in self.commits if oid.startswith(revision)]
            if len(hits) == 1:
                return hits[0]
        raise Refusal(404, f"Invalid rev id: {revision}", code="RevisionNotFound")

    def tree(self, revision: str) -> dict[str, Entry]:
        return self.commits[self.resolve(revision)].tree


class Store:
    """Repositories by kind and id, and their bytes."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.repositories: dict[tuple[str, str], Repository] = {}
        for folder in ("blobs", "lfs", "tmp"):
            (root / folder).mkdir(parents=True, exist_ok=True)

    def create(self, kind: str, repo_id: str, *, private: bool = False, gated: str | bool = False) -> Repository:
        repository = Repository(kind=kind, id=repo_id, private=private, gated=gated)
        repository.commit("main", {".gitattributes": self.put(_GITATTRIBUTES)}, "initial commit")
        self.repositories[kind, repo_id] = repository
        return repository

    def put(self, data: bytes, *, large: bool = False) -> Entry:
        """Store bytes and return the entry that names them."""
        if large:
            sha256 = hashlib.sha256(data).hexdigest()
            self.write(self.root / "lfs" / sha256, data)
            return self.large(sha256)
        oid = git_oid(data)
        self.write(self.root / "blobs" / oid, data)
        return Entry(size=len(data), oid=oid)

    def write(self, path: Path, data: bytes) -> None:
        temporary = self.temporary()
        temporary.write_bytes(data)
        temporary.replace(path)

    def temporary(self) -> Path:
        return self.root / "tmp" / os.urandom(12).hex()

    def large(self, sha256: str, *, xet: str | None = None) -> Entry:
        """The entry of a large file that has been uploaded."""
        path = self.root / "lfs" / sha256
        if not re.fullmatch(r"[0-9a-f]{64}", sha256) or not path.exists():
            raise Refusal(400, f"LFS pointer pointed to a file that does not exist: {sha256}")
        size = path.stat().st_size
        return Entry(size=size, oid=git_oid(pointer(sha256, size)), sha256=sha256, xet=xet)

    def blob(self, entry: Entry) -> Path:
        return self.root / "lfs" / entry.sha256 if entry.sha256 else self.root / "blobs" / entry.oid
