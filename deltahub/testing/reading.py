"""What is read: information, listings, trees, history and the files themselves."""

from __future__ import annotations

import hashlib
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlencode

from starlette.responses import JSONResponse, RedirectResponse, Response

from deltahub.testing.admin import public_metadata
from deltahub.testing.repos import Entry, Refusal, Repository, pointer
from deltahub.testing.state import Route, State, body_of, file_response, flag, route, text

if TYPE_CHECKING:
    from starlette.requests import Request

__all__ = ["Reading"]

_BRIEF = ("private", "downloads", "likes", "tags", "library_name", "pipeline_tag", "createdAt")


class Reading:
    """Handlers that change nothing."""

    def __init__(self, state: State) -> None:
        self.state = state

    def routes(self) -> list[Route]:
        base = "/api/{kind}/{repo}"
        return [
            route("GET", base + "/revision/{rest}", self.info),
            route("GET", base + "/tree/{rev}(?:/{path})?", self.tree),
            route("POST", base + "/paths-info/{rest}", self.paths_info),
            route("GET", base + "/refs", self.refs),
            route("GET", base + "/commits/{rest}", self.commits),
            route("GET", base, self.info),
            route("GET", "/api/{kind}", self.listing),
            route("GET HEAD", "/{prefix}{repo}/resolve/{rev}/{path}", self.resolve),
            route("GET HEAD", "/cdn/{sha}", self.content, cdn=True),
        ]

    # ---- information

    async def info(self, request: Request) -> object:
        repository = self.state.repository(request)
        revision = text(request, "rest") or "main"
        description = self.describe(repository, revision, sizes=flag(request.query_params.get("blobs")))
        expand = request.query_params.getlist("expand")
        return _chosen(description, expand) if expand else description

    def describe(self, repository: Repository, revision: str, *, sizes: bool = False) -> dict[str, Any]:
        """What the Hub tells about a repository."""
        sha = repository.resolve(revision)
        commit = repository.commits[sha]
        card = public_metadata(self.state, repository, sha)
        return {
            "_id": "0" * 24,
            "id": repository.id,
            "modelId": repository.id,
            "author": repository.id.partition("/")[0],
            "sha": sha,
            "private": repository.private,
            "gated": repository.gated,
            "disabled": False,
            "downloads": repository.downloads,
            "likes": repository.likes,
            "createdAt": repository.created,
            "lastModified": commit.date,
            "cardData": card or None,
            "tags": _tags(card),
            "library_name": card.get("library_name"),
            "pipeline_tag": card.get("pipeline_tag"),
            "siblings": [_sibling(path, entry, sizes=sizes) for path, entry in sorted(commit.tree.items())],
            "spaces": [],
        }

    async def listing(self, request: Request) -> object:
        account = self.state.account(request)
        query = request.query_params
        kind = str(request.path_params["kind"]).removesuffix("s")
        wanted = {tag for value in query.getlist("filter") for tag in value.split(",") if tag}
        found = []
        for (its_kind, repo_id), repository in list(self.state.store.repositories.items()):
            if its_kind != kind or (repository.private and not (account and account.owns(repo_id))):
                continue
            if query.get("author") and not repo_id.startswith(query["author"] + "/"):
                continue
            description = self.describe(repository, "main")
            if query.get("search", "").lower() in repo_id.lower() and wanted <= set(description["tags"]):
                found.append(description)
        key = {"likes": "likes", "downloads": "downloads", "createdAt": "createdAt"}.get(query.get("sort", ""))
        found.sort(key=lambda item: item[key or "lastModified"], reverse=True)
        expand = query.getlist("expand") or ([] if flag(query.get("full")) else list(_BRIEF))
        listed = [_chosen(item, expand) if expand else item for item in found]
        return self._page(request, listed, limit=int(query.get("limit", 1000)))

    async def refs(self, request: Request) -> object:
        repository = self.state.repository(request)

        def ref(name: str, full: str, commit: str) -> dict[str, str]:
            return {"name": name, "ref": full, "targetCommit": commit}

        branches = repository.branches.items()
        return {
            "branches": [ref(n, f"refs/heads/{n}", c) for n, c in branches if not n.startswith("refs/")],
            "tags": [ref(n, f"refs/tags/{n}", c) for n, c in repository.tags.items()],
            "pullRequests": [ref(n.removeprefix("refs/pr/"), n, c) for n, c in branches if n.startswith("refs/pr/")],
            "converts": [],
        }

    async def commits(self, request: Request) -> object:
        repository = self.state.repository(request)
        at: str | None = repository.resolve(text(request, "rest"))
        history = []
        while at:
            commit = repository.commits[at]
            about = {"id": at, "title": commit.title, "message": commit.message, "date": commit.date}
            history.append({**about, "authors": [{"user": repository.id.partition("/")[0]}]})
            at = commit.parent
        return self._page(request, history, limit=int(request.query_params.get("limit", 1000)))

    # ---- trees

    async def tree(self, request: Request) -> object:
        repository = self.state.repository(request)
        entries = repository.tree(text(request, "rev"))
        base = text(request, "path").strip("/")
        prefix = base + "/" if base else ""
        recursive, expand = (flag(request.query_params.get(key)) for key in ("recursive", "expand"))
        files: list[dict[str, Any]] = []
        folders: dict[str, list[str]] = {}
        for path, entry in sorted(entries.items()):
            if not path.startswith(prefix):
                continue
            rest = path[len(prefix) :].split("/")
            for depth in range(1, len(rest) if recursive else min(len(rest), 2)):
                folders.setdefault(prefix + "/".join(rest[:depth]), []).append(entry.oid)
            if recursive or len(rest) == 1:
                files.append(_describe(path, entry, expand=expand))
        if base and not files and not folders:
            raise Refusal(404, f"{base} does not exist on {text(request, 'rev')}", code="EntryNotFound")
        listing = [_folder(path, oids) for path, oids in folders.items()] + files
        return self._page(request, listing, limit=int(request.query_params.get("limit", 50 if expand else 1000)))

    async def paths_info(self, request: Request) -> object:
        repository = self.state.repository(request)
        entries = repository.tree(text(request, "rest"))
        if "json" in request.headers.get("content-type", ""):
            body = await body_of(request)
            paths, expand = [str(path) for path in body["paths"]], flag(body.get("expand"))
        else:
            form = parse_qs((await request.body()).decode())
            paths, expand = form.get("paths", []), flag(form.get("expand", [""])[0])
        files = [_describe(path, entries[path], expand=expand) for path in paths if path in entries]
        folders = [path.rstrip("/") for path in paths if path not in entries]
        return files + [_folder(path, []) for path in folders if any(name.startswith(path + "/") for name in entries)]

    def _page(self, request: Request, items: list[dict[str, Any]], *, limit: int) -> Response:
        """One page, with the link to the next."""
        start = int(request.query_params.get("cursor", 0))
        headers = {}
        if start + limit < len(items):
            query = urlencode([*((k, v) for k, v in request.query_params.multi_items() if k != "cursor")])
            url = f"{self.state.url}{request.url.path}?{query}{'&' if query else ''}cursor={start + limit}"
            headers["Link"] = f'<{url}>; rel="next"'
        return JSONResponse(items[start : start + limit], headers=headers)

    # ---- files

    async def resolve(self, request: Request) -> object:
        """A file at a revision; a large one is on the content delivery origin, as on the Hub."""
        repository = self.state.repository(request, files=True)
        sha = repository.resolve(text(request, "rev"))
        path = text(request, "path")
        entry = repository.commits[sha].tree.get(path)
        if entry is None:
            raise Refusal(404, "Entry not found", code="EntryNotFound", commit=sha)
        if request.method == "GET" and path == "delta.json":
            repository.downloads += 1
        headers = {"X-Repo-Commit": sha, "Access-Control-Expose-Headers": "*", "Accept-Ranges": "bytes"}
        if entry.sha256 is None:
            headers["ETag"] = f'"{entry.oid}"'
            headers["Content-Disposition"] = f'inline; filename="{PurePosixPath(path).name}";'
            return file_response(self.state.store.blob(entry), headers)
        headers |= {"X-Linked-Size": str(entry.size), "X-Linked-Etag": f'"{entry.sha256}"'}
        if entry.xet:
            headers["X-Xet-Hash"] = entry.xet
            token = f"{self.state.url}/api/{repository.kind}s/{repository.id}/xet-read-token/{sha}"
            headers["Link"] = f'<{token}>; rel="xet-auth"'
        return RedirectResponse(f"{self.state.cdn_url}/cdn/{entry.sha256}", 302, headers=headers)

    async def content(self, request: Request) -> object:
        """The bytes of a large file. A token that comes here has left the Hub's origin, and that is an error."""
        if "authorization" in request.headers:
            raise Refusal(400, "authorization header leaked to the content delivery origin")
        path = self.state.store.root / "lfs" / text(request, "sha")
        if not path.exists():
            raise Refusal(404, "no such object")
        return file_response(path, {"ETag": f'"{path.name}"', "Accept-Ranges": "bytes"})


def _chosen(description: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """Only the fields that were asked for, and the names that are always there."""
    return {key: value for key, value in description.items() if key in {"_id", "id", "modelId", *names}}


def _tags(card: dict[str, Any]) -> list[str]:
    """The tags that the Hub derives from a card, besides the card's own."""
    tags = [tag for tag in card.get("tags") or [] if isinstance(tag, str)]
    tags += [str(card[key]) for key in ("library_name", "pipeline_tag") if card.get(key)]
    tags += [f"license:{card['license']}"] if card.get("license") else []
    models = card.get("base_model") or []
    relation = card.get("base_model_relation")
    for model in [models] if isinstance(models, str) else models:
        tags.append(f"base_model:{model}")
        tags += [f"base_model:{relation}:{model}"] if relation else []
    return list(dict.fromkeys(tags))


def _large(entry: Entry) -> dict[str, Any]:
    assert entry.sha256 is not None
    return {"size": entry.size, "pointerSize": len(pointer(entry.sha256, entry.size))}


def _sibling(path: str, entry: Entry, *, sizes: bool) -> dict[str, Any]:
    about: dict[str, Any] = {"rfilename": path}
    if sizes:
        about |= {"size": entry.size, "blobId": entry.oid}
        about |= {"lfs": {"sha256": entry.sha256, **_large(entry)}} if entry.sha256 else {}
    return about


def _describe(path: str, entry: Entry, *, expand: bool) -> dict[str, Any]:
    about: dict[str, Any] = {"type": "file", "oid": entry.oid, "size": entry.size, "path": path}
    about |= {"lfs": {"oid": entry.sha256, **_large(entry)}} if entry.sha256 else {}
    about |= {"xetHash": entry.xet} if entry.xet else {}
    about |= {"lastCommit": None, "securityFileStatus": None} if expand else {}
    return about


def _folder(path: str, oids: list[str]) -> dict[str, Any]:
    oid = hashlib.sha1("".join(oids).encode(), usedforsecurity=False).hexdigest()
    return {"type": "directory", "oid": oid, "size": 0, "path": path}
