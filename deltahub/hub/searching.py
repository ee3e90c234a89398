"""Finding deltas: by backbone (its roots, not its name), kind, author and words."""

from __future__ import annotations

__all__ = ["SearchHit", "roots_of", "search"]

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from deltahub.errors import HubError
from deltahub.hub.card import kind_tag, root_tags
from deltahub.hub.explain import explained
from deltahub.hub.guard import guarded
from deltahub.hub.pulling import Client
from deltahub.hub.sources import check_endpoint, parse_source

if TYPE_CHECKING:
    from torch import nn

Match = Literal["exact", "bf16", "structure", "name"]
_BEST_FIRST: tuple[Match, ...] = ("exact", "bf16", "structure", "name")


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchHit:
    """A repository that says it holds a delta.

    Tags are what its owner wrote; only loading proves that the delta fits the backbone.

    Attributes:
        repo_id: ``user/name``.
        commit: the head of its default branch.
        kinds: of its modules.
        base_model: the backbone's name, if it has one.
        match: the strongest way in which its backbone is the one searched for; ``None`` when none was given.
        downloads: in the last 30 days.
        likes: of all time.
        updated: the day of its last commit, ISO 8601.
        private: whether it is.
    """

    repo_id: str
    commit: str
    kinds: tuple[str, ...]
    base_model: str | None
    match: Match | None
    downloads: int
    likes: int
    updated: str
    private: bool


def search(
    *,
    backbone: str | os.PathLike[str] | nn.Module | Mapping[str, str] | None = None,
    kind: str | None = None,
    author: str | None = None,
    text: str | None = None,
    limit: int = 50,
    token: str | bool | None = None,
    endpoint: str | None = None,
) -> list[SearchHit]:
    """Find deltas on a Hub.

    Args:
        backbone: a local folder, a live module, or roots (``{"exact": …, "bf16": …, "structure": …}``): deltas for
            this very backbone, by its roots. A Hub id: by its structure, which its headers give without the
            weights, and by its name; by its roots where its files are in the cache.
        kind: only deltas that have a module of this kind.
        author: only this user's or organisation's.
        text: words of the repository's name.
        limit: at most so many.
        token: as for ``huggingface_hub``.
        endpoint: another Hub than the client's own.

    Returns:
        The best match first: the same bytes, then the same up to bfloat16, then the same shapes, then the same name;
        among equals the most downloaded.

    Raises:
        HubError: the Hub cannot be reached or refuses.
        IdentityError: the backbone's roots cannot be computed.
    """
    api = Client(endpoint=check_endpoint(endpoint), token=token, cache=Path(), offline=False).api()
    filters = ["deltahub", *([kind_tag(kind)] if kind else [])]
    if backbone is None:
        questions: list[tuple[Match | None, str | None]] = [(None, None)]
    else:
        questions = [*_questions(backbone, api)]
        if not questions:
            raise HubError("E_HUB_SEARCH", "nothing is known about this backbone", found=backbone)
    hits: dict[str, SearchHit] = {}
    for match, tag in questions:
        found = _ask(api, [*filters, *([tag] if tag else [])], author=author, text=text, limit=limit)
        for info in found:
            hits.setdefault(info.id, _hit(info, match))
    ordered = sorted(hits.values(), key=lambda hit: (_rank(hit.match), -hit.downloads, hit.repo_id))
    return ordered[:limit]


def _rank(match: Match | None) -> int:
    return _BEST_FIRST.index(match) if match is not None else 0


def _questions(backbone: Any, api: Any) -> list[tuple[Match | None, str | None]]:
    """What to ask the Hub, the strongest question first."""
    roots, name = roots_of(backbone, api)
    asked: list[tuple[Match | None, str | None]] = [
        (kind, root_tags({kind: roots[kind]})[0]) for kind in _BEST_FIRST if roots.get(kind)
    ]
    if name:
        asked.append(("name", f"base_model:adapter:{name}"))
    return asked


def roots_of(backbone: Any, api: Any) -> tuple[dict[str, str], str | None]:
    """The roots that can be had of a backbone without fetching its weights, and its Hub id if it has one."""
    if isinstance(backbone, Mapping):
        return {str(name): str(root) for name, root in backbone.items()}, None
    if not isinstance(backbone, (str, os.PathLike)):
        from deltahub.identity import from_module

        return _roots(from_module(backbone)), None
    if Path(backbone).exists():
        from deltahub.identity import from_files

        return _roots(from_files(backbone)), None
    source = parse_source(str(backbone), endpoint=api.endpoint)
    return _structure_on_hub(source.repo_id, source.revision, api), source.repo_id


def _roots(identity: Any) -> dict[str, str]:
    roots = {"exact": identity.exact, "bf16": identity.bf16, "structure": identity.structure}
    return {name: root for name, root in roots.items() if root}


def _structure_on_hub(repo_id: str, revision: str | None, api: Any) -> dict[str, str]:
    """The structure root from the headers of the files on the Hub; empty where there are none to read."""
    from huggingface_hub import errors

    from deltahub.identity import structure

    try:
        with explained(repo_id), guarded(repo_id):
            metadata = api.get_safetensors_metadata(repo_id, revision=revision)
    except errors.NotASafetensorsRepoError:
        return {}
    except HubError as error:
        if error.code in {"E_HUB_REPO_NOT_FOUND", "E_HUB_FILE_NOT_FOUND"}:
            return {}
        raise
    layout = {
        name: (tensor.dtype, tuple(tensor.shape))
        for file in metadata.files_metadata.values()
        for name, tensor in file.tensors.items()
    }
    return {"structure": structure(layout)}


def _ask(api: Any, tags: list[str], *, author: str | None, text: str | None, limit: int) -> list[Any]:
    with explained("search"), guarded("search"):
        return list(api.list_models(filter=tags, author=author, search=text, limit=limit, full=True))


def _hit(info: Any, match: Match | None) -> SearchHit:
    tags = [tag for tag in info.tags or [] if isinstance(tag, str)]
    prefix = kind_tag("")
    base = next(
        (tag.removeprefix("base_model:adapter:") for tag in tags if tag.startswith("base_model:adapter:")), None
    )
    return SearchHit(
        repo_id=str(info.id),
        commit=str(info.sha or ""),
        kinds=tuple(tag.removeprefix(prefix) for tag in tags if tag.startswith(prefix)),
        base_model=base,
        match=match,
        downloads=int(info.downloads or 0),
        likes=int(info.likes or 0),
        updated=info.last_modified.date().isoformat() if info.last_modified else "",
        private=bool(info.private),
    )
