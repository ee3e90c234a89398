"""Ways in which a Hub can misbehave, on demand: the client's defences are tested against these.

A :class:`Fault` names requests by method and path and says what happens to them. The server applies the first
fault that matches and still has ``times`` left.
"""

from __future__ import annotations

import asyncio
import fnmatch
import json
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

__all__ = ["Fault", "Hangup", "error_headers"]

Message = MutableMapping[str, Any]
Send = Callable[[Message], Any]


def error_headers(message: str, *, code: str | None = None, commit: str | None = None) -> dict[str, str]:
    """The headers by which the Hub explains a refusal."""
    headers = {"X-Error-Message": quote(message, safe=" .:'/,()[]{}=")} if message else {}
    if code:
        headers["X-Error-Code"] = code
    if commit:
        headers["X-Repo-Commit"] = commit
    return headers


class Hangup(Exception):  # noqa: N818 - leaves the response unfinished, so that the server closes the connection
    """The answer stops here, in the middle of its body."""


@dataclass(kw_only=True)
class Fault:
    """One kind of misbehaviour.

    Args:
        path: pattern of the decoded request path, as of :mod:`fnmatch`.
        method: HTTP method, or ``*``.
        times: how many requests are hit; ``None`` for all.
        skip: how many matching requests pass first.
        status: answer with this status and nothing else happens.
        message: with ``status``, the Hub's error message.
        code: with ``status``, the Hub's error code.
        headers: set on the answer, whatever made it; an empty value removes the header.
        flip: position of a byte of the body of which the lowest bit is inverted.
        cut: how many bytes at the end of the body are never sent, though ``Content-Length`` promises them.
        shorten: how many bytes at the end of the body are left out, with a ``Content-Length`` that agrees.
        pad: how many bytes are sent after the end of the body, without any ``Content-Length``.
        delay: seconds to wait before the answer.
        then: called before the request is handled, e.g. to move a branch.
    """

    path: str
    method: str = "*"
    times: int | None = None
    skip: int = 0
    status: int | None = None
    message: str = ""
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    flip: int | None = None
    cut: int = 0
    shorten: int = 0
    pad: int = 0
    delay: float = 0.0
    then: Callable[[], object] | None = None
    hits: int = 0

    def takes(self, method: str, path: str) -> bool:
        """Whether this request is hit; counts it if so."""
        if self.method not in {"*", method} or not fnmatch.fnmatchcase(path, self.path) or self.times == 0:
            return False
        if self.skip > 0:
            self.skip -= 1
            return False
        if self.times is not None:
            self.times -= 1
        self.hits += 1
        return True

    async def before(self) -> None:
        if self.then is not None:
            await asyncio.to_thread(self.then)
        if self.delay:
            await asyncio.sleep(self.delay)

    async def refuse(self, send: Send) -> None:
        """Answer with ``status``."""
        body = json.dumps({"error": self.message}).encode()
        headers = {"Content-Type": "application/json", "Content-Length": str(len(body))}
        headers |= {**error_headers(self.message, code=self.code), **self.headers}
        raw = [(name.lower().encode(), value.encode("latin-1")) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": self.status, "headers": raw})
        await send({"type": "http.response.body", "body": body})

    def wrap(self, send: Send, *, head: bool) -> Send:
        """A ``send`` that alters what passes through it; of an answer to HEAD only the headers."""
        return _Altered(self, send, head=head)


class _Altered:
    """Alters the headers, then the body, of one answer."""

    def __init__(self, fault: Fault, send: Send, *, head: bool) -> None:
        self.fault = fault
        self.send = send
        self.cut = 0 if head else fault.cut
        self.pad = 0 if head else fault.pad
        self.position = 0
        self.end: int | None = None

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            await self.send({**message, "headers": self._headers(message["headers"])})
        elif message["type"] == "http.response.body":
            await self._body(message)
        else:
            await self.send(message)

    def _headers(self, raw: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
        headers = {name.lower(): value for name, value in raw}
        length = headers.get(b"content-length")
        if length is not None:
            self.end = int(length) - self.cut - self.fault.shorten
            if self.fault.shorten:
                headers[b"content-length"] = str(self.end).encode()
        if self.pad:
            headers.pop(b"content-length", None)
        for name, value in self.fault.headers.items():
            headers[name.lower().encode()] = value.encode("latin-1")
        return [(name, value) for name, value in headers.items() if value]

    async def _body(self, message: Message) -> None:
        body = bytearray(message.get("body", b""))
        more = bool(message.get("more_body", False))
        at = self.fault.flip
        if at is not None and self.position <= at < self.position + len(body):
            body[at - self.position] ^= 1
        if self.end is not None and not self.pad:
            body = body[: max(self.end - self.position, 0)]
        self.position += len(body)
        if self.pad and not more:
            body += bytes(self.pad)
        await self.send({**message, "body": bytes(body), "more_body": more or self.cut > 0})
        if self.cut and not more:
            raise Hangup
