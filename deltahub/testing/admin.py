"""Accounts and the administration of repositories: ``/api/whoami-v2``, ``/api/repos/…``, settings, cards."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import yaml
from starlette.responses import JSONResponse

from deltahub.testing.repos import Account, Refusal, Repository
from deltahub.testing.state import Route, State, body_of, route

if TYPE_CHECKING:
    from starlette.requests import Request

__all__ = ["Admin", "card_metadata", "public_metadata"]

_NOBODY = "0" * 24


class Admin:
    """Handlers that make, move and delete repositories."""

    def __init__(self, state: State) -> None:
        self.state = state

    def routes(self) -> list[Route]:
        return [
            route("GET", "/api/whoami-v2", self.whoami),
            route("POST", "/api/repos/create", self.create),
            route("DELETE", "/api/repos/delete", self.delete),
            route("POST", "/api/repos/move", self.move),
            route("POST", "/api/validate-yaml", self.validate_yaml),
            route("PUT", "/api/{kind}/{repo}/settings", self.settings),
            route("GET", "/api/{kind}/{repo}/auth-check", self.auth_check),
            route("GET", "/api/{kind}/{repo}/auth-check/write", self.auth_check_write),
        ]

    async def whoami(self, request: Request) -> dict[str, Any]:
        account = self._account(request)
        token = {"displayName": "loopback", "role": "write", "createdAt": "2026-01-01T00:00:00.000Z"}
        return {
            "type": "user",
            "id": _NOBODY,
            "name": account.name,
            "fullname": account.name,
            "email": f"{account.name}@example.invalid",
            "emailVerified": True,
            "isPro": False,
            "orgs": [{"type": "org", "id": _NOBODY, "name": org, "fullname": org} for org in account.orgs],
            "auth": {"type": "access_token", "accessToken": token},
        }

    async def create(self, request: Request) -> object:
        account = self._account(request)
        body = await body_of(request)
        kind, repo_id = self._named(body, account)
        url = f"{self.state.url}/{'' if kind == 'model' else kind + 's/'}{repo_id}"
        if not re.fullmatch(r"[\w.-]{1,96}/[\w.-]{1,96}", repo_id):
            raise Refusal(400, f"Invalid repo name: {repo_id}")
        with self.state.lock:
            if (kind, repo_id) in self.state.store.repositories:
                return JSONResponse({"error": f"You already created this {kind} repo", "url": url}, 409)
            private = bool(body.get("private")) or body.get("visibility") == "private"
            self.state.store.create(kind, repo_id, private=private)
        return {"url": url, "name": repo_id, "id": _NOBODY}

    async def delete(self, request: Request) -> object:
        account = self._account(request)
        kind, repo_id = self._named(await body_of(request), account)
        if self.state.store.repositories.pop((kind, repo_id), None) is None:
            raise Refusal(404, "Repository not found", code="RepoNotFound")
        return {}

    async def move(self, request: Request) -> object:
        account = self._account(request)
        body = await body_of(request)
        source, target = (str(body["type"]), str(body["fromRepo"])), str(body["toRepo"])
        repositories = self.state.store.repositories
        if source not in repositories:
            raise Refusal(404, "Repository not found", code="RepoNotFound")
        if not (account.owns(source[1]) and account.owns(target)):
            raise Refusal(403, "Forbidden: both namespaces must be yours.")
        with self.state.lock:
            repository = repositories.pop(source)
            repository.id = target
            repositories[source[0], target] = repository
        return {}

    async def settings(self, request: Request) -> object:
        repository = self.state.repository(request, write=True)
        body = await body_of(request)
        repository.private = bool(body.get("private", body.get("visibility", "public") == "private"))
        repository.gated = body.get("gated", repository.gated)
        return {"private": repository.private, "gated": repository.gated}

    async def auth_check(self, request: Request) -> object:
        self.state.repository(request, files=True)
        return {}

    async def auth_check_write(self, request: Request) -> object:
        self.state.repository(request, write=True)
        return {}

    async def validate_yaml(self, request: Request) -> object:
        body = await body_of(request)
        try:
            metadata = card_metadata(str(body["content"]))
        except ValueError as error:
            return JSONResponse({"errors": [{"message": str(error)}], "warnings": []}, 400)
        problems = _card_problems(metadata)
        warnings = [] if metadata else [{"message": "empty or missing yaml metadata in repo card"}]
        answer = {"errors": [{"message": text} for text in problems], "warnings": warnings}
        return JSONResponse(answer, 400 if problems else 200)

    def _account(self, request: Request) -> Account:
        account = self.state.account(request, required=True)
        assert account is not None
        return account

    def _named(self, body: dict[str, Any], account: Account) -> tuple[str, str]:
        repo_id = f"{body.get('organization') or account.name}/{body['name']}"
        if not account.owns(repo_id):
            raise Refusal(403, f"You don't have the rights to create or delete a repository under {repo_id}")
        return str(body.get("type") or "model"), repo_id


_MOST_BRACKETS, _LONGEST_FRONT = 500, 1 << 17


def card_metadata(content: str) -> dict[str, Any]:
    """The YAML at the head of a README.

    Raises:
        ValueError: it is not YAML, or not a mapping.
    """
    match = re.match(r"\A---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|\Z)", content, re.DOTALL)
    try:
        front = match[1] if match else ""
        if front.count("[") + front.count("{") > _MOST_BRACKETS or len(front) > _LONGEST_FRONT:
            raise ValueError("metadata must not be so long or so deep")
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(front)):
            raise ValueError("metadata must not use aliases")
        metadata = yaml.safe_load(front) or {}
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(str(error)) from None
    if not isinstance(metadata, dict):
        raise ValueError("metadata must be a map")  # noqa: TRY004 - the answer is the same as for bad YAML
    return metadata


def _card_problems(metadata: dict[str, Any]) -> list[str]:
    """What the Hub's own validator says about the fields that a delta's card uses."""
    strings = ("library_name", "pipeline_tag", "base_model_relation", "license_name")
    problems = [f'"{key}" must be a string' for key in strings if not isinstance(metadata.get(key, ""), str)]
    if metadata.get("base_model_relation", "adapter") not in {"adapter", "merge", "quantized", "finetune"}:
        problems.append('"base_model_relation" must be one of [adapter, merge, quantized, finetune]')
    for key in ("tags", "base_model", "language", "datasets", "metrics"):
        value = metadata.get(key, [])
        values = [value] if isinstance(value, str) and key != "tags" else value
        if not isinstance(values, list) or not all(isinstance(item, str) for item in values):
            problems.append(f'"{key}" must be an array of strings')
    return problems


def public_metadata(state: State, repository: Repository, tree_revision: str) -> dict[str, Any]:
    """The card's metadata at a revision, empty when there is none or it cannot be read."""
    entry = repository.tree(tree_revision).get("README.md")
    if entry is None or entry.sha256:
        return {}
    try:
        return card_metadata(state.store.blob(entry).read_text("utf-8", errors="replace"))
    except ValueError:
        return {}
