"""What all parts of the loopback Hub share: who asks, for which repository, and how an answer is made."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from starlette.responses import FileResponse, Response

from deltahub.testing.repos import Account, Refusal, Repository, Store

if TYPE_CHECKING:
    from starlette.requests import Request

    from deltahub.testing.faults import Fault

__all__ = ["Call", "Handler", "Route", "State", "body_of", "file_response", "flag", "route", "text"]

Handler = Callable[["Request"], Awaitable[object]]

_PIECES = {
    "{kind}": "(?P<kind>models|datasets|spaces)",
    "{prefix}": "(?P<prefix>(?:datasets/|spaces/)?)",
    "{repo}": "(?P<repo>[^/]+/[^/]+)",
    "{rev}": "(?P<rev>[^/]+)",
    "{rest}": "(?P<rest>.+)",
    "{path}": "(?P<path>.*)",
    "{num}": "(?P<num>[0-9]+)",
    "{op}": "(?P<op>[a-z]+)",
    "{sha}": "(?P<sha>[0-9a-f]{64})",
    "{part}": "(?P<part>[0-9]+)",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """One request that was answered."""

    method: str
    path: str
    query: str
    status: int
    account: str | None
    origin: str

    def __str__(self) -> str:
        return f"{self.method} {self.path}{'?' if self.query else ''}{self.query} -> {self.status}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Route:
    methods: frozenset[str]
    pattern: re.Pattern[str]
    handler: Handler
    cdn: bool = False


def route(methods: str, pattern: str, handler: Handler, *, cdn: bool = False) -> Route:
    """A route; ``{kind}``, ``{repo}``, ``{rev}`` … in the pattern stand for their own expressions.

    A revision keeps its ``%2F``, so that ``refs%2Fpr%2F1`` is one segment.
    """
    expression = re.sub(r"\{[a-z]+\}", lambda match: _PIECES[match[0]], pattern)
    return Route(methods=frozenset(methods.split()), pattern=re.compile(expression), handler=handler, cdn=cdn)


def text(request: Request, name: str) -> str:
    """A path parameter, decoded to the end."""
    return unquote(str(request.path_params.get(name) or ""))


def flag(value: object) -> bool:
    return str(value).lower() in {"1", "true"}


def file_response(path: Path, headers: dict[str, str]) -> Response:
    """A stored file, whole or by ranges."""
    return FileResponse(path, headers=headers, media_type="application/octet-stream")


@dataclass(kw_only=True)
class State:
    """Everything that outlives one request."""

    store: Store
    accounts: dict[str, Account]
    part_size: int | None
    lock: threading.RLock = field(default_factory=threading.RLock)
    log: list[Call] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    url: str = ""
    cdn_url: str = ""
    xet_names: dict[str, str] = field(default_factory=dict)
    """Xet's name of a large file, by its SHA-256; empty when Xet is off."""

    def account(self, request: Request, *, required: bool = False) -> Account | None:
        """Who asks.

        Raises:
            Refusal: 401 for a token that nobody has, or for none where one is ``required``.
        """
        header = request.headers.get("authorization")
        if header is None:
            if required:
                raise Refusal(401, "Invalid username or password.")
            return None
        account = self.accounts.get(header.removeprefix("Bearer "))
        if account is None:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return account

    def repository(self, request: Request, *, write: bool = False, files: bool = False) -> Repository:
        """The repository that a request names, if whoever asks may read (or ``write``) it.

        Raises:
            Refusal: 401 or 404 where it is not there or private, as the Hub does, so that nobody learns which;
                403 where it may not be written; 401 or 403 where its ``files`` are gated.
        """
        account = self.account(request, required=write)
        kind = request.path_params.get("kind") or request.path_params.get("prefix", "").rstrip("/") or "models"
        found = self.store.repositories.get((str(kind).removesuffix("s"), str(request.path_params["repo"])))
        owner = found is not None and account is not None and account.owns(found.id)
        if found is None or (found.private and not owner):
            raise Refusal(404 if account else 401, "Repository not found", code="RepoNotFound")
        if write and not owner:
            raise Refusal(403, "Forbidden: you must have write access to this repository.")
        if files and found.gated and not owner and (account is None or account.name not in found.granted):
            why = "ask for access on its page." if account else "you must be authenticated to access it."
            raise Refusal(403 if account else 401, f"Access to model {found.id} is restricted: {why}", code="GatedRepo")
        return found


async def body_of(request: Request) -> dict[str, Any]:
    """The JSON object in a request; an empty body is an empty object."""
    raw = await request.body()
    value = json.loads(raw) if raw.strip() else {}
    if not isinstance(value, dict):
        raise Refusal(400, "the body must be a JSON object")
    return value
