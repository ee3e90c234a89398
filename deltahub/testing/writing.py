"""What is written: large-file uploads (single and multipart), branches, tags and commits."""

from __future__ import annotations

import base64
import binascii
import fnmatch
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starlette.responses import JSONResponse, Response

from deltahub.testing.repos import LFS_SUFFIXES, REGULAR_LIMIT, Entry, Refusal, Repository, check_path
from deltahub.testing.state import Route, State, body_of, flag, route, text

if TYPE_CHECKING:
    from starlette.requests import Request

    from deltahub.testing.discussing import Discussing

__all__ = ["Writing"]


class Writing:
    """Handlers that change a repository."""

    def __init__(self, state: State, discussing: Discussing) -> None:
        self.state = state
        self.discussing = discussing
        self.parts: dict[tuple[str, int, str], Path] = {}

    def routes(self) -> list[Route]:
        base = "/api/{kind}/{repo}"
        return [
            route("POST", base + "/preupload/{rest}", self.preupload),
            route("POST", base + "/commit/{rest}", self.commit),
            route("POST DELETE", base + "/branch/{rest}", self.branch),
            route("POST DELETE", base + "/tag/{rest}", self.tag),
            route("POST", r"/{prefix}{repo}\.git/info/lfs/objects/batch", self.batch),
            route("PUT", "/_lfs/{sha}", self.put_whole),
            route("PUT", "/_lfs/{sha}/part/{part}", self.put_part),
            route("POST", "/_lfs/{sha}/complete", self.complete),
            route("POST", "/_lfs/{sha}/verify", self.verify),
        ]

    # ---- uploads

    async def preupload(self, request: Request) -> object:
        """Which files go as large ones, which inside the commit."""
        proposal = flag(request.query_params.get("create_pr"))
        repository = self.state.repository(request, write=not proposal)
        tree = repository.tree(text(request, "rest"))
        body = await body_of(request)
        ignored = [line for line in str(body.get("gitIgnore") or "").splitlines() if line and line[0] != "#"]
        answers = []
        for file in body["files"]:
            path, size, sample = str(file["path"]), int(file["size"]), base64.b64decode(file["sample"])
            large = path.endswith(LFS_SUFFIXES) or size > REGULAR_LIMIT or b"\0" in sample
            answer: dict[str, Any] = {"path": path, "uploadMode": "lfs" if large else "regular"}
            answer["shouldIgnore"] = any(fnmatch.fnmatch(path, pattern) for pattern in ignored)
            if path in tree:
                answer["oid"] = tree[path].sha256 or tree[path].oid
            answers.append(answer)
        return {"files": answers}

    async def batch(self, request: Request) -> object:
        """The large-file protocol: where each object goes, unless it is there already."""
        self.state.account(request, required=True)
        body = await body_of(request)
        multipart = self.state.part_size if "multipart" in body.get("transfers", []) else None
        objects = [self._upload(item, multipart) for item in body["objects"]]
        used = "multipart" if multipart else "basic"
        answer = {"transfer": used, "objects": objects, "hash_algo": "sha256"}
        return JSONResponse(answer, media_type="application/vnd.git-lfs+json")

    def _upload(self, item: dict[str, Any], part_size: int | None) -> dict[str, Any]:
        oid, size = str(item["oid"]), int(item["size"])
        path = self.state.store.root / "lfs" / oid
        answer: dict[str, Any] = {"oid": oid, "size": size}
        if path.exists() and path.stat().st_size == size:
            return answer
        url = f"{self.state.url}/_lfs/{oid}"
        upload: dict[str, Any] = {"href": url}
        if part_size and size > part_size:
            urls = {f"{n + 1:05d}": f"{url}/part/{n + 1}" for n in range(-(-size // part_size))}
            upload = {"href": f"{url}/complete", "header": {"chunk_size": str(part_size), **urls}}
        return {**answer, "actions": {"upload": upload, "verify": {"href": f"{url}/verify"}}}

    async def put_whole(self, request: Request) -> object:
        temporary, sha256 = await self._receive(request)
        if sha256 != text(request, "sha"):
            temporary.unlink()
            raise Refusal(422, "the content does not have the announced sha256")
        temporary.replace(self.state.store.root / "lfs" / sha256)
        return Response(status_code=200, headers={"ETag": f'"{sha256}"'})

    async def put_part(self, request: Request) -> object:
        temporary, sha256 = await self._receive(request)
        tag = sha256[:32]
        self.parts[text(request, "sha"), int(text(request, "part")), tag] = temporary
        return Response(status_code=200, headers={"ETag": f'"{tag}"'})

    async def complete(self, request: Request) -> object:
        """Join the parts of a multipart upload."""
        oid = text(request, "sha")
        parts = sorted((await body_of(request))["parts"], key=lambda part: int(part["partNumber"]))
        digest, temporary = hashlib.sha256(), self.state.store.temporary()
        with temporary.open("wb") as file:
            for part in parts:
                piece = self.parts.pop((oid, int(part["partNumber"]), str(part["etag"]).strip('"')), None)
                if piece is None:
                    raise Refusal(400, f"part {part['partNumber']} was never received")
                data = piece.read_bytes()
                piece.unlink()
                digest.update(data)
                file.write(data)
        if digest.hexdigest() != oid:
            raise Refusal(422, "the content does not have the announced sha256")
        temporary.replace(self.state.store.root / "lfs" / oid)
        return {"success": True}

    async def verify(self, request: Request) -> object:
        self.state.account(request, required=True)
        body = await body_of(request)
        path = self.state.store.root / "lfs" / text(request, "sha")
        if not path.exists() or path.stat().st_size != body["size"]:
            raise Refusal(404, "object missing")
        return {}

    async def _receive(self, request: Request) -> tuple[Path, str]:
        digest, temporary = hashlib.sha256(), self.state.store.temporary()
        with temporary.open("wb") as file:
            async for chunk in request.stream():
                digest.update(chunk)
                file.write(chunk)
        return temporary, digest.hexdigest()

    # ---- branches and tags

    async def branch(self, request: Request) -> object:
        repository = self.state.repository(request, write=True)
        name = text(request, "rest")
        if request.method == "DELETE":
            if repository.branches.pop(name, None) is None:
                raise Refusal(404, f"Invalid rev id: {name}", code="RevisionNotFound")
            return {}
        body = await body_of(request)
        if name in repository.branches:
            raise Refusal(409, "Reference already exists")
        repository.branches[name] = repository.resolve(str(body.get("startingPoint") or "main"))
        return {}

    async def tag(self, request: Request) -> object:
        repository = self.state.repository(request, write=True)
        name = text(request, "rest")
        if request.method == "DELETE":
            if repository.tags.pop(name, None) is None:
                raise Refusal(404, f"Invalid rev id: {name}", code="RevisionNotFound")
            return {}
        body = await body_of(request)
        if body["tag"] in repository.tags:
            raise Refusal(409, "Tag reference exists already")
        repository.tags[str(body["tag"])] = repository.resolve(name)
        return {}

    # ---- commits

    async def commit(self, request: Request) -> object:
        """Apply a commit, sent as one JSON object per line, wholly or not at all."""
        proposal = flag(request.query_params.get("create_pr"))
        repository = self.state.repository(request, write=not proposal)
        account = self.state.account(request, required=True)
        assert account is not None
        branch = text(request, "rest")
        lines = [json.loads(line) for line in (await request.body()).splitlines() if line.strip()]
        header = lines[0]["value"]
        with self.state.lock:
            parent = repository.resolve(branch)
            if header.get("parentCommit") and not parent.startswith(header["parentCommit"]):
                raise Refusal(412, "A commit has happened since. Please refresh and try again.")
            if not proposal and branch not in repository.branches:
                raise Refusal(404, f"Invalid rev id: {branch}", code="RevisionNotFound")
            tree = self._changed(repository.commits[parent].tree, lines[1:])
            title, message = str(header["summary"]), str(header.get("description") or "")
            url = None
            if proposal:
                opened = self.discussing.open(repository, account.name, title, message, base=parent, branch=branch)
                branch, url = f"refs/pr/{opened}", f"{self.state.url}/{repository.id}/discussions/{opened}"
            oid = repository.commit(branch, tree, title, message)
        return self._committed(repository, oid, url)

    def _committed(self, repository: Repository, oid: str, url: str | None) -> dict[str, Any]:
        where = f"{self.state.url}/{repository.id}/commit/{oid}"
        return {"success": True, "commitOid": oid, "commitUrl": where, "hookOutput": "", "pullRequestUrl": url}

    def _changed(self, tree: dict[str, Entry], operations: list[dict[str, Any]]) -> dict[str, Entry]:
        tree = dict(tree)
        for operation in operations:
            key, value = operation["key"], operation["value"]
            path = check_path(str(value["path"]))
            if key == "file":
                tree[path] = self.state.store.put(_content(value))
            elif key == "lfsFile":
                sha256 = str(value["oid"])
                tree[path] = self.state.store.large(sha256, xet=self.state.xet_names.get(sha256))
            elif key == "deletedFile":
                if tree.pop(path, None) is None:
                    raise Refusal(404, f"{path} does not exist", code="EntryNotFound")
            elif key == "deletedFolder":
                tree = {name: entry for name, entry in tree.items() if not name.startswith(path.rstrip("/") + "/")}
            else:
                raise Refusal(400, f"unknown operation {key}")
        return tree


def _content(value: dict[str, Any]) -> bytes:
    if value.get("encoding") != "base64":
        return str(value["content"]).encode()
    try:
        return base64.b64decode(value["content"], validate=True)
    except binascii.Error:
        raise Refusal(400, "bad base64") from None
