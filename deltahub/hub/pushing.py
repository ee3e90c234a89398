"""Publishing a package: one commit, guarded by its parent, of exactly what changed."""

from __future__ import annotations

__all__ = ["PushResult", "push", "write_card"]

import hashlib
import math
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltahub.errors import DeltaHubError, HubError
from deltahub.hub.card import CardDetails, render_card
from deltahub.hub.explain import explained
from deltahub.hub.guard import guarded
from deltahub.hub.plan import PICTURE, plan
from deltahub.hub.pulling import MANIFEST, SIGNATURE, Client, expected_files, fetch, read_manifest
from deltahub.hub.sources import Source, check_endpoint, parse_source
from deltahub.tensors import open_regular, sha256_file
from deltahub.tensors.files import replacing

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, HfApi

    from deltahub.manifest import Manifest
    from deltahub.package import Package

CARD = "README.md"
_CARD_BYTES = 4 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class PushResult:
    """What a push did.

    Attributes:
        repo_id: ``user/name``.
        commit: the commit that holds the package now; load it by this to get these very bytes.
        url: the page of that commit.
        changed: paths written or deleted; empty when the repository held all of it and no commit was made.
        pr: the pull request's revision (``refs/pr/1``), where one was opened.
        pr_url: its page.
        ignored: names in the folder that are not part of the package and stayed behind.
    """

    repo_id: str
    commit: str
    url: str
    changed: tuple[str, ...] = ()
    pr: str | None = None
    pr_url: str | None = None
    ignored: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class _Remote:
    """The repository before the push: its head, and the digest of every file (git's or SHA-256)."""

    commit: str
    files: Mapping[str, str]


def push(
    folder: str | os.PathLike[str] | Package,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    message: str | None = None,
    token: str | bool | None = None,
    endpoint: str | None = None,
    card: CardDetails | bool = True,
) -> PushResult:
    """Publish a package on a Hub.

    The package is verified first. The repository is made if it is not there; then there is one commit, which only
    goes through if nobody else has committed in the meantime, or none if nothing changed. Files that an earlier
    version of the package listed and this one does not are deleted in the same commit; nothing else is touched.

    Args:
        folder: the package.
        repo_id: ``user/name``.
        private: whether a repository that is made here is private; ``None`` for the account's own default.
        revision: the branch; made from the default branch if it is not there.
        create_pr: open a pull request instead of committing to the branch.
        message: the commit's title.
        token: as for ``huggingface_hub``.
        endpoint: another Hub than the client's own.
        card: details for the model card, or ``False`` to leave ``README.md`` as it is. A signed package's card is
            left as it is too, since the signature covers it.

    Raises:
        PackageError: the folder is not a valid package.
        HubError: ``E_HUB_CONFLICT`` where somebody was quicker, and all that can go wrong with a Hub.
    """
    from deltahub.package import Package

    package = folder if isinstance(folder, Package) else Package.open(folder)
    package.verify()
    target = parse_source(repo_id, revision=revision, endpoint=endpoint) if "/" in str(repo_id) else None
    if target is None or target.kind != "hub" or target.subfolder:
        raise HubError("E_HUB_SOURCE", "this is not the name of a repository", found=repo_id, expected="user/name")
    client = Client(endpoint=check_endpoint(endpoint), token=token, cache=Path(), offline=False)
    api = client.api()
    remote = _remote(api, target, private=private, create=not create_pr)
    signed = (package.path / SIGNATURE).is_file()
    with tempfile.TemporaryDirectory(prefix="deltahub-push-") as scratch:
        files = _local_files(package)
        if card is not False and not signed:
            details = card if isinstance(card, CardDetails) else None
            files[CARD] = _card(client, package, target, remote, details, Path(scratch))
            files[PICTURE] = plan(package.manifest, _parameters(package)).encode()
        writes = {path: content for path, content in files.items() if not _same(path, content, remote)}
        stale = _stale(client, target, remote, set(files), Path(scratch))
        ignored = tuple(name for name in package.ignored if name not in {CARD, PICTURE, SIGNATURE})
        if not writes and not stale:
            url = f"{client.endpoint}/{target.repo_id}/commit/{remote.commit}"
            return PushResult(repo_id=target.repo_id, commit=remote.commit, url=url, ignored=ignored)
        title = message or _title(package.manifest)
        info = _commit(api, target, package.manifest, writes, stale, title, remote.commit, create_pr=create_pr)
    return PushResult(
        repo_id=target.repo_id,
        commit=info.oid,
        url=info.commit_url,
        changed=(*writes, *stale),
        pr=info.pr_revision,
        pr_url=info.pr_url,
        ignored=ignored,
    )


def _remote(api: HfApi, target: Source, *, private: bool | None, create: bool) -> _Remote:
    """The repository's head and files; the repository or its branch is made where that is asked for."""
    where = str(target)

    def look() -> _Remote:
        with explained(where), guarded(where):
            info = api.model_info(target.repo_id, revision=target.revision, files_metadata=True)
        files = {s.rfilename: (s.lfs.sha256 if s.lfs else s.blob_id) or "" for s in info.siblings or []}
        return _Remote(commit=str(info.sha), files=files)

    try:
        return look()
    except HubError as error:
        if error.code != "E_HUB_REPO_NOT_FOUND" or not create:
            if error.code == "E_HUB_REVISION_NOT_FOUND" and create and target.revision:
                return _branched(api, target, look)
            raise
    with explained(where):
        api.create_repo(target.repo_id, private=private, exist_ok=True)
    return _branched(api, target, look) if target.revision else look()


def _branched(api: HfApi, target: Source, look: Callable[[], _Remote]) -> _Remote:
    with explained(str(target)):
        api.create_branch(target.repo_id, branch=str(target.revision), exist_ok=True)
    return look()


def _local_files(package: Package) -> dict[str, Path | bytes]:
    """What is published: the manifest, what it lists, the signature, a card of the user's own and its picture."""
    from deltahub.package.folder import locate

    names = [MANIFEST, *expected_files(package.manifest)]
    names += [name for name in (SIGNATURE, CARD, PICTURE) if (package.path / name).is_file()]
    for name in names:  # what a link leads to elsewhere on this machine is nobody's to publish
        locate(package.path, name, root=package.root)
    return {name: package.path / name for name in names}


def _text(path: Path) -> str:
    """A card's text.

    Raises:
        HubError: ``E_HUB_CARD`` where it is too long or not UTF-8.
    """
    with open_regular(path) as file:
        data = file.read(_CARD_BYTES + 1)
    if len(data) > _CARD_BYTES:
        raise HubError("E_HUB_CARD", "the model card is too long", where=path, expected=f"{_CARD_BYTES} bytes")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise HubError("E_HUB_CARD", "the model card is not UTF-8", where=path, found=error) from None


def write_card(folder: str | os.PathLike[str], repo_id: str, *, details: CardDetails | None = None) -> Path:
    """Write the model card and its picture into a package's folder, to be read, edited and signed before the push.

    Args:
        folder: the package; text and metadata of a card that is there are kept.
        repo_id: where it will be published.
        details: what the manifest does not know.

    Returns:
        The path of ``README.md``.

    Raises:
        PackageError: the folder is not a valid package.
        HubError: ``E_HUB_CARD`` where the card that is there cannot be read.
    """
    from deltahub.package import Package
    from deltahub.package.folder import locate

    with Package.open(folder) as package:
        path = package.path / CARD
        existing = _text(locate(package.path, CARD, root=package.root)) if path.is_file() else None
        count = _parameters(package)
        card = render_card(package.manifest, repo_id=repo_id, existing=existing, details=details, parameters=count)
        picture = plan(package.manifest, count)
    for target, text in ((path.with_name(PICTURE), picture), (path, card)):
        with replacing(target) as file:
            file.write(text.encode())
    return path


def _card(
    client: Client, package: Package, target: Source, remote: _Remote, details: CardDetails | None, scratch: Path
) -> bytes:
    local = package.path / CARD
    existing = None
    if local.is_file():
        existing = _text(local)
    elif CARD in remote.files:
        existing = _text(_remote_file(client, target, remote, CARD, scratch, limit=_CARD_BYTES))
    card = render_card(
        package.manifest, repo_id=target.repo_id, existing=existing, details=details, parameters=_parameters(package)
    )
    return card.encode()


def _parameters(package: Package) -> dict[str, int]:
    """How many numbers each module holds, from the headers."""
    counts = {module.name: 0 for module in package.manifest.modules}
    for name in package.names:
        counts[name.partition("/")[0]] += math.prod(package.info(name).shape)
    return counts


def _remote_file(client: Client, target: Source, remote: _Remote, name: str, scratch: Path, *, limit: int) -> Path:
    """A file of the repository, in a cache that is thrown away."""
    throwaway = Client(endpoint=client.endpoint, token=client.token, cache=scratch.resolve(), offline=False)
    return fetch(throwaway, target, remote.commit, name, limit=limit)


def _same(path: str, content: Path | bytes, remote: _Remote) -> bool:
    """Whether the repository holds this already. The length tells which of git's two digests it gave."""
    known = remote.files.get(path)
    if not known:
        return False
    if len(known) == 64:
        found = sha256_file(content)[1] if isinstance(content, Path) else hashlib.sha256(content).hexdigest()
        return found == known
    data = content.read_bytes() if isinstance(content, Path) else content
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest() == known


def _stale(client: Client, target: Source, remote: _Remote, new: set[str], scratch: Path) -> list[str]:
    """Files of the package that the repository holds now, which the new one no longer has."""
    if MANIFEST not in remote.files:
        return []
    try:
        path = _remote_file(client, target, remote, MANIFEST, scratch, limit=_CARD_BYTES)
        old = {SIGNATURE, *expected_files(read_manifest(path)[0])}
    except DeltaHubError:  # what cannot be read lists nothing
        old = {SIGNATURE}
    return sorted((old & set(remote.files)) - new)


def _title(manifest: Manifest) -> str:
    kinds = ", ".join(dict.fromkeys(module.kind for module in manifest.modules))
    return f"Upload delta ({kinds})"[:100]


def _commit(
    api: HfApi,
    target: Source,
    manifest: Manifest,
    writes: Mapping[str, Path | bytes],
    stale: list[str],
    title: str,
    parent: str,
    *,
    create_pr: bool,
) -> CommitInfo:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    listed = expected_files(manifest)
    operations: list[Any] = [CommitOperationDelete(path) for path in stale]
    for path, content in writes.items():
        operation = CommitOperationAdd(path, content)
        if path in listed and operation.upload_info.sha256.hex() != listed[path][1]:
            raise HubError("E_HUB_DIGEST", "the file changed while it was being pushed", where=path)
        operations.append(operation)
    with explained(str(target)):
        return api.create_commit(
            target.repo_id,
            operations,
            commit_message=title,
            revision=target.revision,
            create_pr=create_pr,
            parent_commit=parent,
        )
