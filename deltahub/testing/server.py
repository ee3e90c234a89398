"""The loopback Hub itself: two sockets, one application, and a handle to look into it.

The real ``huggingface_hub`` client works against it unchanged: repositories, uploads (plain, multipart, Xet),
trees, downloads by way of a second origin, pull requests, tags, search. It is for tests and demonstrations: it
listens on the loopback interface only, keeps its metadata in memory and forgets them when it stops.
"""

from __future__ import annotations

import contextlib
import re
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import uvicorn
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from deltahub.testing.admin import Admin
from deltahub.testing.discussing import Discussing
from deltahub.testing.faults import Fault, Hangup, error_headers
from deltahub.testing.reading import Reading
from deltahub.testing.repos import LFS_SUFFIXES, Account, Refusal, Repository, Store
from deltahub.testing.state import Call, State
from deltahub.testing.writing import Writing
from deltahub.testing.xet import Xet

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, MutableMapping

    Scope = MutableMapping[str, Any]
    Message = MutableMapping[str, Any]
    Receive = Callable[[], Awaitable[Message]]
    Send = Callable[[Message], Awaitable[None]]

__all__ = ["LoopbackHub", "serve_hub"]

_START_SECONDS = 30.0


class LoopbackHub:
    """A running Hub.

    Attributes:
        url: the endpoint for clients.
        cdn_url: the other origin, from which large files come.
        token: the administrator's token.
        log: every request, oldest first, status 0 for one that got no answer; tests clear and count it.
    """

    def __init__(self, root: Path, *, token: str, user: str, part_size: int | None, xet: bool) -> None:
        self.token = token
        self.user = user
        self.state = State(store=Store(root), accounts={token: Account(name=user, admin=True)}, part_size=part_size)
        self.log = self.state.log
        discussing = Discussing(self.state)
        self._routes = [*Admin(self.state).routes(), *discussing.routes(), *Reading(self.state).routes()]
        self._routes += Writing(self.state, discussing).routes()
        if xet:
            self._routes += Xet(self.state).routes()

    @property
    def url(self) -> str:
        return self.state.url

    @property
    def cdn_url(self) -> str:
        return self.state.cdn_url

    def environment(self) -> dict[str, str]:
        """What a client in another process needs in its environment."""
        return {"HF_ENDPOINT": self.url, "HF_TOKEN": self.token, "HF_HUB_DISABLE_TELEMETRY": "1"}

    # ---- a look inside, without HTTP

    def add_account(self, token: str, name: str, *orgs: str) -> None:
        """Let somebody else in, who owns the namespaces ``name`` and ``orgs`` and nothing more."""
        self.state.accounts[token] = Account(name=name, orgs=orgs)

    def repository(self, repo_id: str, kind: str = "model") -> Repository:
        return self.state.store.repositories[kind, repo_id]

    def create(
        self, repo_id: str, files: Mapping[str, bytes] | None = None, *, private: bool = False, gated: bool = False
    ) -> Repository:
        """Make a repository with these files in its first commit but one."""
        repository = self.state.store.create("model", repo_id, private=private, gated=gated)
        if files:
            self.commit(repo_id, files)
        return repository

    def commit(self, repo_id: str, files: Mapping[str, bytes | None], revision: str = "main") -> str:
        """Commit files behind every client's back; ``None`` deletes one. Returns the commit's id."""
        repository = self.repository(repo_id)
        tree = dict(repository.tree(revision))
        for path, data in files.items():
            if data is None:
                del tree[path]
            else:
                tree[path] = self.state.store.put(data, large=path.endswith(LFS_SUFFIXES))
        return repository.commit(revision, tree, "commit on the server")

    def read(self, repo_id: str, path: str, revision: str = "main") -> bytes:
        """A file's bytes as stored."""
        return self.state.store.blob(self.repository(repo_id).tree(revision)[path]).read_bytes()

    def delete(self, repo_id: str) -> None:
        del self.state.store.repositories["model", repo_id]

    @contextlib.contextmanager
    def fault(self, path: str, **options: Any) -> Iterator[Fault]:
        """Misbehave as a :class:`~deltahub.testing.faults.Fault` says, for as long as the context lasts."""
        fault = Fault(path=path, **options)
        self.state.faults.append(fault)
        try:
            yield fault
        finally:
            self.state.faults.remove(fault)

    # ---- the application

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request (ASGI)."""
        if scope["type"] != "http":
            return
        path = _decoded(scope)
        scope = {**scope, "path": path}
        cdn = self.state.cdn_url.endswith(f":{scope['server'][1]}")
        answered = False

        async def record(message: Message) -> None:
            nonlocal answered
            if message["type"] == "http.response.start":  # before the client can see it, so that counts are exact
                answered = True
                self._record(scope, message["status"], cdn=cdn)
            await send(message)

        fault = next((fault for fault in list(self.state.faults) if fault.takes(scope["method"], path)), None)
        out: Send = record
        try:
            if fault is not None:
                await fault.before()
                if fault.status is not None:
                    await fault.refuse(record)
                    return
                out = fault.wrap(record, head=scope["method"] == "HEAD")
            response = await self._answer(scope, receive, cdn=cdn)
            await response(scope, receive, out)
        except Hangup:
            return
        finally:
            if not answered:
                self._record(scope, 0, cdn=cdn)

    async def _answer(self, scope: Scope, receive: Receive, *, cdn: bool) -> Response:
        for entry in self._routes:
            match = entry.pattern.fullmatch(scope["path"])
            if match is None or scope["method"] not in entry.methods or entry.cdn != cdn:
                continue
            scope["path_params"] = match.groupdict()
            try:
                answer = await entry.handler(Request(scope, receive))
            except Refusal as refusal:
                headers = error_headers(refusal.message, code=refusal.code, commit=refusal.commit)
                return JSONResponse({"error": refusal.message}, refusal.status, headers=headers)
            return answer if isinstance(answer, Response) else JSONResponse(answer)
        return JSONResponse({"error": f"no route {scope['method']} {scope['path']}"}, 404)

    def _record(self, scope: Scope, status: int, *, cdn: bool) -> None:
        header = dict(scope["headers"]).get(b"authorization", b"").decode("latin-1")
        account = self.state.accounts.get(header.removeprefix("Bearer "))
        call = Call(
            method=scope["method"],
            path=scope["path"],
            query=scope["query_string"].decode("latin-1"),
            status=status,
            account=account.name if account else None,
            origin="cdn" if cdn else "hub",
        )
        self.state.log.append(call)


def _decoded(scope: Scope) -> str:
    """The path with its escapes undone but for ``%2F``, which is part of a name such as ``refs%2Fpr%2F1``."""
    raw = scope["raw_path"].decode("latin-1").partition("?")[0]
    return unquote(re.sub(r"%2[fF]", "%252F", raw))


@contextlib.contextmanager
def serve_hub(
    root: str | Path,
    *,
    token: str = "hf_test",  # noqa: S107 - opens nothing but a server that lives in this process
    user: str = "tester",
    part_size: int | None = None,
    xet: bool = False,
    port: int = 0,
) -> Iterator[LoopbackHub]:
    """Run a Hub on the loopback interface for as long as the context lasts.

    Args:
        root: folder for the bytes of uploaded files; made if it is not there.
        token: the administrator's token; any namespace is open to it.
        user: the administrator's name.
        part_size: offer multipart uploads with parts of this many bytes for larger files.
        xet: store large files as chunks where the client asks for that (needs ``lz4``); without it, clients that
            have ``hf_xet`` must run with ``HF_HUB_DISABLE_XET=1`` to upload.
        port: 0 for an unused one.

    Yields:
        The running Hub.
    """
    hub = LoopbackHub(Path(root), token=token, user=user, part_size=part_size, xet=xet)
    with socket.create_server(("127.0.0.1", port)) as front, socket.create_server(("127.0.0.1", 0)) as back:
        hub.state.url = f"http://127.0.0.1:{front.getsockname()[1]}"
        # Another host too, not only another port: older clients compare hosts alone.
        hub.state.cdn_url = f"http://localhost:{back.getsockname()[1]}"
        config = uvicorn.Config(
            hub, log_level="critical", log_config=None, lifespan="off", http="h11", timeout_graceful_shutdown=1
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [front, back]}, daemon=True)
        thread.start()
        deadline = time.monotonic() + _START_SECONDS
        while not server.started:
            if not thread.is_alive() or time.monotonic() > deadline:
                raise RuntimeError("the loopback Hub did not start")
            time.sleep(0.005)
        try:
            yield hub
        finally:
            server.should_exit = True
            thread.join()
