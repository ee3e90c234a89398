"""Discussions and pull requests."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from deltahub.testing.repos import Refusal, Repository, timestamp
from deltahub.testing.state import Route, State, body_of, route, text

if TYPE_CHECKING:
    from starlette.requests import Request

__all__ = ["Discussing"]


class Discussing:
    """Handlers of discussions; a pull request is a discussion with a branch ``refs/pr/N``."""

    def __init__(self, state: State) -> None:
        self.state = state

    def routes(self) -> list[Route]:
        base = "/api/{kind}/{repo}/discussions"
        return [
            route("GET", base, self.listing),
            route("POST", base, self.create),
            route("GET", base + "/{num}", self.details),
            route("POST", base + "/{num}/{op}", self.act),
        ]

    def open(self, repository: Repository, author: str, title: str, text_: str, *, base: str, branch: str) -> int:
        """Open a pull request on commit ``base`` of ``branch`` and return its number."""
        number = self._start(repository, author, title, text_, pull_request=True)
        repository.discussions[number - 1]["changes"] = {"base": f"refs/heads/{branch}"}
        repository.discussions[number - 1]["status"] = "open"
        repository.branches[f"refs/pr/{number}"] = base
        return number

    def _start(self, repository: Repository, author: str, title: str, text_: str, *, pull_request: bool) -> int:
        discussion = {
            "num": len(repository.discussions) + 1,
            "title": title,
            "author": {"name": author},
            "createdAt": timestamp(),
            "status": "draft" if pull_request else "open",
            "repo": {"name": repository.id, "type": repository.kind},
            "isPullRequest": pull_request,
            "events": [],
            "filesWithConflicts": [],
            "diff": "",
            "changes": {"base": "refs/heads/main"},
        }
        repository.discussions.append(discussion)
        _event(discussion, "comment", author, {"edited": False, "hidden": False, "latest": {"raw": text_}})
        return len(repository.discussions)

    async def listing(self, request: Request) -> object:
        found = self.state.repository(request).discussions
        return {"discussions": found, "count": len(found), "start": 0}

    async def create(self, request: Request) -> object:
        repository = self.state.repository(request)
        account = self.state.account(request, required=True)
        assert account is not None
        body = await body_of(request)
        proposal = bool(body.get("pullRequest"))
        title, words = str(body["title"]), str(body.get("description") or "")
        number = self._start(repository, account.name, title, words, pull_request=proposal)
        if proposal:
            repository.branches[f"refs/pr/{number}"] = repository.branches["main"]
        return {"num": number}

    async def details(self, request: Request) -> object:
        return self._found(self.state.repository(request), request)

    async def act(self, request: Request) -> object:
        operation = text(request, "op")
        repository = self.state.repository(request, write=operation != "comment")
        account = self.state.account(request, required=True)
        assert account is not None
        discussion = self._found(repository, request)
        body = await body_of(request)
        if operation == "comment":
            data = {"edited": False, "hidden": False, "latest": {"raw": body["comment"]}}
            _event(discussion, "comment", account.name, data)
        elif operation == "status":
            discussion["status"] = body["status"]
            _event(discussion, "status-change", account.name, {"status": body["status"]})
        elif operation == "title":
            _event(discussion, "title-change", account.name, {"from": discussion["title"], "to": body["title"]})
            discussion["title"] = body["title"]
        elif operation == "merge":
            self._merge(repository, discussion)
            _event(discussion, "status-change", account.name, {"status": "merged"})
        else:
            raise Refusal(404, f"unknown operation {operation}")
        return dict.fromkeys(("newStatus", "newMessage", "newTitle"), discussion["events"][-1])

    def _merge(self, repository: Repository, discussion: dict[str, Any]) -> None:
        """Three-way by whole files: what the pull request changed wins over what the branch has."""
        number = discussion["num"]
        target = str(discussion["changes"]["base"]).removeprefix("refs/heads/")
        with self.state.lock:
            head, tip = repository.branches[target], repository.branches[f"refs/pr/{number}"]
            history = _history(repository, head)
            common = next(oid for oid in _history(repository, tip) if oid in history)
            ours, proposed, base = (repository.commits[oid].tree for oid in (head, tip, common))
            tree = {**ours, **{path: entry for path, entry in proposed.items() if base.get(path) != entry}}
            for path in set(base) - set(proposed):
                tree.pop(path, None)
            oid = repository.commit(target, tree, f"{discussion['title']} (#{number})")
        discussion["changes"]["mergeCommitId"] = oid
        discussion["status"] = "merged"

    def _found(self, repository: Repository, request: Request) -> dict[str, Any]:
        number = int(text(request, "num"))
        if not 0 < number <= len(repository.discussions):
            raise Refusal(404, "no such discussion")
        found: dict[str, Any] = repository.discussions[number - 1]
        return found


def _history(repository: Repository, oid: str | None) -> list[str]:
    found = []
    while oid:
        found.append(oid)
        oid = repository.commits[oid].parent
    return found


def _event(discussion: dict[str, Any], kind: str, author: str, data: dict[str, Any]) -> None:
    events = discussion["events"]
    about = {"id": f"{len(events):024d}", "type": kind, "createdAt": timestamp(), "author": {"name": author}}
    events.append({**about, "data": data})
