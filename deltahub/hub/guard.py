"""What the Hub's client does not protect against, protected against.

``huggingface_hub`` makes file names of a server's ``ETag`` and ``X-Repo-Commit`` headers without looking at them,
follows a body to wherever it ends, and asks for some answers without a time limit. Inside :func:`guarded` every
request of the client passes through two hooks that refuse such answers before a byte of them is written.

The client checks sizes but hashes nothing that comes over plain HTTP; that is done in :mod:`deltahub.hub.pulling`.
"""

from __future__ import annotations

__all__ = ["guarded"]

import contextlib
import re
import sys
import threading
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from deltahub.errors import HubError

_COMMIT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_ETAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.=+-]{0,127}")
_API_LIMIT = 64 << 20
_SECONDS = 30.0


@dataclass(frozen=True, kw_only=True, slots=True)
class _Rule:
    where: str
    limit: int
    size: int | None


_rule: ContextVar[_Rule | None] = ContextVar("deltahub_hub_rule", default=None)
_installing = threading.Lock()


@contextlib.contextmanager
def guarded(where: str, *, limit: int = _API_LIMIT, size: int | None = None) -> Iterator[None]:
    """Watch the requests that the Hub's client makes in this context (and this thread).

    Args:
        where: what is being fetched, for the error.
        limit: no body may be longer than this.
        size: what the server must announce for a file; ``None`` where that is not known.

    Raises:
        HubError: ``E_HUB_RESPONSE`` for a header that is not what it says, ``E_HUB_TOO_LARGE`` for a body beyond
            ``limit``, ``E_HUB_SIZE`` for a file of another size than expected.
    """
    _install()
    token = _rule.set(_Rule(where=where, limit=limit, size=size))
    try:
        yield
    finally:
        _rule.reset(token)


def _install() -> None:
    """Put the hooks on the client's current session, once; without a rule in the context they do nothing."""
    from huggingface_hub import get_session

    with _installing:
        hooks = get_session().event_hooks
        if _on_response not in hooks["response"]:
            hooks["request"].append(_on_request)
            hooks["response"].append(_on_response)


def _on_request(request: Any) -> None:
    if _rule.get() is None:
        return
    request.headers["Accept-Encoding"] = "identity"  # the limits below count bytes as they come
    given = request.extensions.get("timeout") or {}
    timeout = {key: given.get(key) or _SECONDS for key in ("connect", "read", "write", "pool")}
    request.extensions = {**request.extensions, "timeout": timeout}


def _on_response(response: Any) -> None:
    rule = _rule.get()
    if rule is None or response.request.method not in {"GET", "HEAD"}:
        return
    headers = response.headers
    _check(rule, "X-Repo-Commit", headers.get("X-Repo-Commit"), _COMMIT)
    if response.request.method == "HEAD":
        for name in ("X-Linked-Etag", "ETag"):
            value = headers.get(name)
            _check(rule, name, value and value.removeprefix("W/").strip('"'), _ETAG)
        announced = headers.get("X-Linked-Size")
        if announced is None and response.is_success:
            announced = headers.get("Content-Length")
        if response.status_code < 400:
            _check_size(rule, announced)
        return
    if headers.get("Content-Encoding", "identity") not in {"", "identity"}:
        raise HubError(
            "E_HUB_RESPONSE", "a compressed answer, though none was asked for", where=rule.where, found=str(headers)
        )
    if int(headers.get("Content-Length") or 0) > rule.limit:
        raise _too_large(rule, headers["Content-Length"])
    response.stream = _capped(response.stream, rule)


def _check(rule: _Rule, name: str, value: str | None, pattern: re.Pattern[str]) -> None:
    if value and not pattern.fullmatch(value):
        raise HubError(
            "E_HUB_RESPONSE",
            f"the server's {name} header is not what a Hub sends",
            where=rule.where,
            expected=pattern.pattern,
            found=value,
            hint="this endpoint is not a Hub, or something on the way rewrites its answers",
        )


def _check_size(rule: _Rule, announced: str | None) -> None:
    if announced is None or not announced.isdigit():
        return
    if rule.size is not None and int(announced) != rule.size:
        raise HubError(
            "E_HUB_SIZE",
            "the file on the server does not have the size that the manifest states",
            where=rule.where,
            expected=f"{rule.size} bytes",
            found=f"{announced} bytes",
            hint="the repository holds an incomplete or altered package; tell its owner",
        )
    if int(announced) > rule.limit:
        raise _too_large(rule, announced)


def _too_large(rule: _Rule, found: object) -> HubError:
    return HubError(
        "E_HUB_TOO_LARGE",
        "the server sends more than this file may have",
        where=rule.where,
        expected=f"at most {rule.limit} bytes",
        found=f"{found} bytes",
    )


def _capped(stream: Any, rule: _Rule) -> Any:
    """The same stream, which ends in an error when it is longer than it may be."""
    # The client's HTTP library changed its name between major versions; its own stream class is asked for.
    base: Any = sys.modules[type(stream).__module__.partition(".")[0]].SyncByteStream

    class Capped(base):  # type: ignore[misc] # the base is only known here
        def __iter__(self) -> Iterator[bytes]:
            left = rule.limit
            for chunk in stream:
                left -= len(chunk)
                if left < 0:
                    raise _too_large(rule, "more")
                yield chunk

        def close(self) -> None:
            stream.close()

    return Capped()
