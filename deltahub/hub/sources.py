"""Where a package comes from: the spellings of a source, taken apart and checked before anything is fetched.

user/delta                        the default branch
user/delta@v1.2                   a tag, branch, pull request (refs/pr/1) or commit
hf://user/delta@v1.2/sub/folder   a package in a subfolder
https://huggingface.co/user/delta the page of a repository, as copied from a browser
./folder                          a folder on this machine
s3://bucket/folder …              a mirror
"""

from __future__ import annotations

__all__ = ["Source", "check_endpoint", "near", "parse_source"]

import difflib
import ipaddress
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import unquote, urlsplit

from deltahub.errors import HubError

_REPO = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9_][\w.-]{0,95}", re.ASCII)
_REVISION = re.compile(r"[A-Za-z0-9_][\w.+-]*(?:/[A-Za-z0-9_][\w.+-]*)*", re.ASCII)
_PART = re.compile(r"[^\x00-\x1f\x7f\\:*?\"<>|/]{1,255}")
_PULL_REQUEST = re.compile(r"(refs/pr/[0-9]+)(?:/(.*))?")
_FORMS = "user/name, user/name@revision, hf://user/name@revision/sub/folder, a folder, or a mirror's URL"


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A source, taken apart.

    Attributes:
        kind: ``local``, ``hub`` or ``mirror``.
        path: the folder, of a local one.
        repo_id: ``user/name``, of one on a Hub.
        revision: what was asked for, ``None`` for the default branch.
        subfolder: where in the repository the package is; empty for its root.
        url: the address, of a mirror.
    """

    kind: Literal["local", "hub", "mirror"]
    path: Path | None = None
    repo_id: str = ""
    revision: str | None = None
    subfolder: str = ""
    url: str = ""

    def __str__(self) -> str:
        if self.kind == "hub":
            revision = f"@{self.revision}" if self.revision else ""
            short = f"{self.repo_id}{revision}"
            return f"hf://{short}/{self.subfolder}" if self.subfolder else short
        return self.url or str(self.path)


def parse_source(source: str | os.PathLike[str], *, revision: str | None = None, endpoint: str | None = None) -> Source:
    """Take a source apart.

    Args:
        source: any of the forms above. A string that names an existing folder with a ``delta.json`` in it, or that
            begins with ``.``, ``/`` or ``~``, is a local folder.
        revision: as in ``user/name@revision``; one of the two.
        endpoint: the Hub whose web addresses are understood; the client's own by default.

    Raises:
        HubError: ``E_HUB_SOURCE``.
    """
    text = os.fspath(source)
    if not isinstance(source, str) or text.startswith((".", "/", "~")) or Path(text, "delta.json").is_file():
        if revision is not None:
            raise _wrong(text, "a local folder has no revisions")
        return Source(kind="local", path=Path(text).expanduser())
    if text.startswith("hf://"):
        body = text.removeprefix("hf://")
    elif "://" in text:
        page = _page(text, endpoint)
        if page is None:
            if revision is not None:
                raise _wrong(text, "a mirror has no revisions")
            return Source(kind="mirror", url=text.rstrip("/"))
        body = page
    else:
        body = text
        if text.count("/") != 1 and "@" not in text:
            raise _wrong(text, "it is not the name of a repository, and no folder of this name exists here", near(text))
    return _hub(text, body, revision)


def _hub(text: str, body: str, revision: str | None) -> Source:
    if "@" in body:
        repo_id, _, rest = body.partition("@")
        pull_request = _PULL_REQUEST.fullmatch(rest)
        if pull_request:
            given, subfolder = pull_request[1], pull_request[2] or ""
        else:
            given, _, subfolder = rest.partition("/")
        if revision is not None and revision != unquote(given):
            raise _wrong(text, f"two revisions, {unquote(given)!r} and {revision!r}")
        revision = unquote(given)
    else:
        owner, _, rest = body.removeprefix("models/").partition("/")
        name, _, subfolder = rest.partition("/")
        repo_id = f"{owner}/{name}"
    repo_id = repo_id.removeprefix("models/")
    subfolder = subfolder.strip("/")
    if not _REPO.fullmatch(repo_id) or ".." in repo_id or "--" in repo_id or repo_id.endswith(".git"):
        raise _wrong(text, f"{repo_id!r} is not the name of a repository")
    check_revision(text, revision)
    if subfolder and any(not _PART.fullmatch(part) or part in {".", ".."} for part in subfolder.split("/")):
        raise _wrong(text, f"{subfolder!r} is not a folder inside a repository")
    return Source(kind="hub", repo_id=repo_id, revision=revision, subfolder=subfolder)


def check_revision(text: str, revision: str | None) -> None:
    """Refuse what is no git reference; the client makes file names of them.

    Raises:
        HubError: ``E_HUB_SOURCE``.
    """
    if revision is None:
        return
    if (
        not _REVISION.fullmatch(revision)
        or ".." in revision
        or revision.endswith((".lock", "."))
        or len(revision) > 200
    ):
        raise _wrong(text, f"{revision!r} is not a branch, tag or commit")


def _page(url: str, endpoint: str | None) -> str | None:
    """The part of a Hub's web address after the host, in the form that follows ``hf://``; else ``None``."""
    split = urlsplit(url)
    hosts = {"huggingface.co", "hf.co", urlsplit(_endpoint(endpoint)).netloc}
    if split.scheme not in {"http", "https"} or split.netloc not in hosts:
        return None
    match = re.fullmatch(r"/([^/]+/[^/]+)(?:/(?:tree|blob|resolve)/([^/]+)(/.*)?)?/?", split.path)
    if match is None:
        raise _wrong(url, "this address is not the page of a model repository")
    return match[1] + (f"@{match[2]}" if match[2] else "") + (match[3] or "").removesuffix("/delta.json")


def near(text: str) -> str | None:
    """A hint that names packages here whose folders are called almost like this one."""
    wanted = Path(text).expanduser()
    try:
        beside = [path.name for path in wanted.parent.iterdir() if (path / "delta.json").is_file()]
    except OSError:
        return None
    found = [str(wanted.parent / name) for name in difflib.get_close_matches(wanted.name, beside, 3)]
    return f"did you mean {' or '.join(found)}?" if found else None


def _wrong(text: str, why: str, hint: str | None = None) -> HubError:
    return HubError("E_HUB_SOURCE", f"this is not a source of a package: {why}", found=text, expected=_FORMS, hint=hint)


def _endpoint(endpoint: str | None) -> str:
    if endpoint is not None:
        return endpoint
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


def check_endpoint(endpoint: str | None) -> str:
    """The endpoint to use, refused if it is neither https nor on this machine.

    Without TLS anybody on the way could read the token and exchange the manifest, which everything else is
    checked against.

    Raises:
        HubError: ``E_HUB_ENDPOINT``.
    """
    found = _endpoint(endpoint).rstrip("/")
    split = urlsplit(found)
    if split.hostname and (split.scheme == "https" or (split.scheme == "http" and _loopback(split.hostname))):
        return found
    raise HubError(
        "E_HUB_ENDPOINT",
        "the Hub must be reached by https unless it is on this machine",
        found=found,
        hint="check HF_ENDPOINT or endpoint=",
    )


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
