"""Files of a repository that holds no package: named one by one, at a pinned commit."""

from __future__ import annotations

__all__ = ["fetch_files"]

import os
from collections.abc import Mapping
from pathlib import Path

from deltahub.errors import HubError
from deltahub.hub.pulling import Client, cache_of, fetch, resolve
from deltahub.hub.sources import check_endpoint, parse_source


def fetch_files(
    source: str | os.PathLike[str],
    names: Mapping[str, int],
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    endpoint: str | None = None,
    local_files_only: bool = False,
) -> tuple[dict[str, Path], str]:
    """Find files in a folder or fetch them from the Hub; those that are not there are left out.

    Args:
        source: as for :func:`deltahub.hub.pull`, but for mirrors, of which nothing is found.
        names: of the files, and how many bytes each may have at most.
        revision: branch, tag or commit, unless ``source`` has it.
        cache_dir: the Hub's cache by default.
        token: for the Hub.
        endpoint: another Hub than the client's own.
        local_files_only: make no requests.

    Returns:
        Where each is, and the commit; no commit for a folder.

    Raises:
        HubError: the source makes no sense, or the Hub cannot be asked.
    """
    parsed = parse_source(source, revision=revision, endpoint=endpoint)
    if parsed.kind == "local":
        assert parsed.path is not None
        return {name: parsed.path / name for name in names if (parsed.path / name).is_file()}, ""
    if parsed.kind == "mirror":
        return {}, ""
    client = Client(endpoint=check_endpoint(endpoint), token=token, cache=cache_of(cache_dir), offline=local_files_only)
    commit = resolve(client, parsed)
    found = {}
    for name, limit in names.items():
        try:
            found[name] = fetch(client, parsed, commit, name, limit=limit)
        except HubError as error:
            if error.code not in {"E_HUB_FILE_NOT_FOUND", "E_HUB_OFFLINE"}:
                raise
    return found, commit
