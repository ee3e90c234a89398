"""Fetching a package: the revision is pinned first, then the manifest, then the files it lists and nothing else."""

from __future__ import annotations

__all__ = ["PulledPackage", "pull"]

import contextlib
import hashlib
import os
import re
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from deltahub import limits
from deltahub.errors import HubError
from deltahub.hub.explain import explained
from deltahub.hub.guard import guarded
from deltahub.hub.sources import Source, check_endpoint, near, parse_source
from deltahub.hub.telling import told
from deltahub.manifest import Manifest
from deltahub.tensors import open_regular, sha256_file
from deltahub.tensors.reading import MAX_BYTES

if TYPE_CHECKING:
    from huggingface_hub import HfApi

    from deltahub.hub.locking import Lock
    from deltahub.sign import Policy, Signature

MANIFEST = "delta.json"
SIGNATURE = "model.sig"
SIGNATURE_BYTES = 1 << 20
_WORKERS = 4
_COMMIT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True, slots=True)
class PulledPackage:
    """A package on this machine, every listed file of it hashed.

    Attributes:
        path: the folder that holds ``delta.json``. In the Hub's cache its files are symbolic links.
        root: the folder that none of them leads out of: the cache, or ``path`` itself.
        source: what was asked for.
        manifest: parsed from the very bytes whose digest is ``sha256``.
        sha256: of ``delta.json``.
        repo_id: ``user/name``; empty for a folder or a mirror.
        commit: 40 hexadecimal digits; empty for a folder or a mirror.
        endpoint: the Hub that it came from; empty for a folder or a mirror.
        signature: who signed it, if that was asked for.
    """

    path: Path
    root: Path
    source: Source
    manifest: Manifest
    sha256: str
    repo_id: str = ""
    commit: str = ""
    endpoint: str = ""
    signature: Signature | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Client:
    """How the Hub is spoken to: what every call of one pull has in common."""

    endpoint: str
    token: str | bool | None
    cache: Path
    offline: bool

    def api(self) -> HfApi:
        """The client's own object for everything that is not a download."""
        from huggingface_hub import HfApi

        return HfApi(endpoint=self.endpoint, token=self.token, **agent())


def agent() -> Any:
    """What the client says of itself, as keyword arguments."""
    from deltahub import __version__

    return {"library_name": "deltahub", "library_version": __version__}


def pull(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    endpoint: str | None = None,
    local_files_only: bool = False,
    lock: Lock | None = None,
    policy: Policy | None = None,
    hash_local: bool = True,
) -> PulledPackage:
    """Bring a package to this machine and check every byte of it against its manifest.

    The revision is resolved to a commit once; ``delta.json`` is fetched (at most 1 MiB) and parsed strictly; then
    exactly the files that it lists, each hashed by us. A file that does not match is removed from the cache. With a
    commit as revision and everything in the cache, no request is made.

    Args:
        source: ``user/name``, ``user/name@revision``, ``hf://user/name@revision/sub/folder``, a local folder, or
            the URL of a mirror (``s3://…``, ``gs://…``, ``https://…``, anything that fsspec opens).
        revision: branch, tag, pull request or commit, unless ``source`` has it.
        cache_dir: the Hub's cache by default.
        token: as for ``huggingface_hub``: a token, ``False`` for none, ``None`` for the one that is logged in.
        endpoint: another Hub than the client's own; https, or on this machine.
        local_files_only: make no requests.
        lock: refuse what is not exactly this; a source without a revision is taken at the commit it names.
        policy: who must have signed what; ``None`` for no demands.
        hash_local: hash the files of a local folder too. Who opens the package next may leave it out, for
            opening hashes the very bytes that are then used.

    Raises:
        HubError: the source, the Hub or what it sent is wrong; the codes are in ``spec/errors/hub.toml``.
        ManifestError: the manifest is not valid.
    """
    from deltahub.hub.locking import matching

    parsed = parse_source(source, revision=revision, endpoint=endpoint)
    entry = matching(lock, parsed) if lock is not None else None
    if parsed.kind == "mirror":
        from deltahub.hub.mirrors import pull_mirror

        found = pull_mirror(parsed, cache_dir=cache_dir, local_files_only=local_files_only, policy=policy)
    elif parsed.kind == "local":
        found = _pull_local(parsed, policy, hashing=hash_local, offline=local_files_only)
    else:
        client = Client(
            endpoint=check_endpoint(endpoint), token=token, cache=cache_of(cache_dir), offline=local_files_only
        )
        asked = entry.commit if entry is not None else parsed.revision or ""
        with _commits_told_apart(asked):
            commit = entry.commit if entry is not None else resolve(client, parsed)
            found = _pull_hub(client, parsed, commit, policy)
    if entry is not None:
        entry.check(found)
    return found


def cache_of(cache_dir: str | os.PathLike[str] | None) -> Path:
    from huggingface_hub import constants

    return Path(cache_dir if cache_dir is not None else constants.HF_HUB_CACHE).expanduser().resolve()


# ---- local folders


def _pull_local(source: Source, policy: Policy | None, *, hashing: bool, offline: bool) -> PulledPackage:
    assert source.path is not None
    path = source.path.resolve()
    if not (path / MANIFEST).is_file():
        raise not_a_package(str(source.path), near(str(source.path)))
    manifest, sha256 = read_manifest(path / MANIFEST)
    signature = None
    if policy is not None:
        raw = _read(path / SIGNATURE, SIGNATURE_BYTES) if (path / SIGNATURE).exists() else None
        signature = policy.check(raw, manifest=manifest, sha256=sha256, namespace="", where=str(path), offline=offline)
    if hashing:
        check_files(path, path, manifest)
    return PulledPackage(path=path, root=path, source=source, manifest=manifest, sha256=sha256, signature=signature)


def not_a_package(where: str, hint: str | None = None) -> HubError:
    return HubError(
        "E_HUB_NOT_A_PACKAGE",
        "there is no delta.json here",
        where=where,
        hint=hint
        or "another tool's adapter is converted with `deltahub convert`; a package in a subfolder is named with hf://",
    )


def _head(path: Path, limit: int) -> bytes:
    """A file's bytes, and one more than the limit at most."""
    with open_regular(path) as file:
        return file.read(limit + 1)


def _read(path: Path, limit: int) -> bytes:
    data = _head(path, limit)
    if len(data) > limit:
        raise HubError("E_HUB_TOO_LARGE", "the file is larger than it may be", where=path, expected=f"{limit} bytes")
    return data


def read_manifest(path: Path) -> tuple[Manifest, str]:
    """Read, hash and parse a manifest from one set of bytes."""
    data = _head(path, limits.DEFAULT.manifest_bytes)
    return Manifest.parse(data, where=str(path)), hashlib.sha256(data).hexdigest()


def expected_files(manifest: Manifest) -> dict[str, tuple[int, str]]:
    """The files that a manifest lists: path to size and SHA-256."""
    return {file.path: (file.size, file.sha256) for file in manifest.files}


def check_files(folder: Path, root: Path, manifest: Manifest, *, evict: bool = False) -> None:
    """Hash every listed file.

    Raises:
        HubError: ``E_HUB_PATH`` for a link that leads out of ``root``, ``E_HUB_FILE_NOT_FOUND``, ``E_HUB_DIGEST``;
            with ``evict`` the file is then removed, so that the next pull fetches it again.
    """
    for path, (size, sha256) in expected_files(manifest).items():
        check_file(folder / path, root, size, sha256, evict=evict)


def check_file(path: Path, root: Path, size: int, sha256: str, *, evict: bool = False) -> None:
    """Hash one file, unless its size alone says that it is another or too large to be hashed for nothing."""
    try:
        real = path.resolve(strict=True)
        status = real.stat()
    except FileNotFoundError:
        raise HubError("E_HUB_FILE_NOT_FOUND", "a file that the manifest lists is not there", where=path) from None
    except (OSError, RuntimeError) as error:
        raise HubError("E_HUB_PATH", "a file of the package cannot be looked at", where=path, found=error) from None
    if not real.is_relative_to(root):
        raise HubError("E_HUB_PATH", "a file of the package lies outside it", where=path, found=real)
    if size > MAX_BYTES:
        raise HubError(
            "E_HUB_TOO_LARGE",
            "the file is larger than it may be",
            where=path,
            expected=f"at most {MAX_BYTES} bytes",
            found=size,
        )
    other = stat.S_ISREG(status.st_mode) and status.st_size != size
    found = (status.st_size, "not computed") if other else sha256_file(real)
    if found == (size, sha256):
        return
    if evict:
        _evict(path, root)
    raise HubError(
        "E_HUB_DIGEST",
        "the file is not the one that the manifest describes",
        where=path,
        expected=f"{size} bytes, sha256 {sha256}",
        found=f"{found[0]} bytes, sha256 {found[1]}",
        hint="the copy has been removed from the cache; pull again" if evict else "get the package again",
    )


def _evict(path: Path, root: Path) -> None:
    """Remove a file of the cache and everything that its links lead through, inside ``root``."""
    chain = [path]
    while chain[-1].is_symlink() and len(chain) < 8:
        chain.append(Path(os.path.normpath(chain[-1].parent / chain[-1].readlink())))
    for link in chain:
        if link.is_relative_to(root):
            with contextlib.suppress(OSError):
                link.unlink()


# ---- the Hub


def resolve(client: Client, source: Source) -> str:
    """The commit that a source means now; from the cache where the Hub cannot be asked."""
    where = str(source)
    with explained(where), guarded(where):
        commit = (
            client.api()
            .resolve_revision(
                source.repo_id, revision=source.revision, cache_dir=client.cache, local_files_only=client.offline
            )
            .resolved
        )
    if not _COMMIT.fullmatch(commit):
        raise HubError("E_HUB_RESPONSE", "the server's commit is not one", where=where, found=commit)
    return commit


@contextlib.contextmanager
def _commits_told_apart(asked: str) -> Iterator[None]:
    """A branch that is missing may be a misspelling; a commit that is missing was there once."""
    try:
        yield
    except HubError as error:
        if error.code != "E_HUB_REVISION_NOT_FOUND" or not _COMMIT.fullmatch(asked):
            raise
        raise HubError(
            "E_HUB_COMMIT_GONE",
            "the repository does not have this commit any more",
            where=error.where,
            expected=asked,
            found=error.found,
            hint="history was rewritten, or the repository deleted and made again by anybody; ask its owner first",
        ) from error


def _pull_hub(client: Client, source: Source, commit: str, policy: Policy | None) -> PulledPackage:
    try:
        path = fetch(client, source, commit, MANIFEST, limit=limits.DEFAULT.manifest_bytes)
    except HubError as error:
        if error.code == "E_HUB_FILE_NOT_FOUND":
            raise not_a_package(f"{source} at {commit}") from error
        raise
    manifest, sha256 = read_manifest(path)
    where = f"{source} at {commit}"
    signature = None
    if policy is not None:
        raw = _signature(client, source, commit) if policy.wants_signature(source.repo_id) else None
        signature = policy.check(
            raw,
            manifest=manifest,
            sha256=sha256,
            namespace=source.repo_id,
            where=where,
            offline=client.offline,
        )
    files = expected_files(manifest)

    def one(item: tuple[str, tuple[int, str]]) -> None:
        name, (size, digest) = item
        try:
            local = fetch(client, source, commit, name, limit=size, size=size)
        except HubError as error:
            if error.code != "E_HUB_OFFLINE":
                raise
            raise HubError(
                "E_HUB_CACHE_INCOMPLETE",
                "the cache holds a part of this package only, and requests are switched off",
                where=where,
                expected=name,
                hint="pull once while online, with the same cache",
            ) from error
        check_file(local, client.cache, size, digest, evict=True)

    with ThreadPoolExecutor(min(_WORKERS, len(files) or 1)) as pool:
        for _ in pool.map(one, files.items()):
            pass
    return PulledPackage(
        path=path.parent,
        root=client.cache,
        source=source,
        manifest=manifest,
        sha256=sha256,
        repo_id=source.repo_id,
        commit=commit,
        endpoint=client.endpoint,
        signature=signature,
    )


def _signature(client: Client, source: Source, commit: str) -> bytes | None:
    try:
        return _read(fetch(client, source, commit, SIGNATURE, limit=SIGNATURE_BYTES), SIGNATURE_BYTES)
    except HubError as error:
        if error.code in {"E_HUB_FILE_NOT_FOUND", "E_HUB_OFFLINE"}:
            return None
        raise


def fetch(client: Client, source: Source, commit: str, name: str, *, limit: int, size: int | None = None) -> Path:
    """One file of a repository at a commit, from the cache if it is there.

    Returns:
        Its path in the cache; the file behind it lies inside the cache and has at most ``limit`` bytes.
    """
    import huggingface_hub

    remote = str(PurePosixPath(source.subfolder, name))
    where = f"{source.repo_id}@{commit[:12]}/{remote}"
    options: dict[str, Any] = {"cache_dir": client.cache, "local_files_only": client.offline, **agent()}
    with explained(where), guarded(where, limit=limit, size=size), told(f"fetching {name}", size) as bar:
        local = huggingface_hub.hf_hub_download(
            source.repo_id, remote, revision=commit, endpoint=client.endpoint, token=client.token, **options, **bar
        )
    path = Path(local)
    if not path.resolve().is_relative_to(client.cache):
        raise HubError("E_HUB_PATH", "the downloaded file lies outside the cache", where=where, found=path.resolve())
    if not path.as_posix().endswith(f"/snapshots/{commit}/{remote}"):
        raise HubError(
            "E_HUB_RESPONSE", "the server answered for another commit", where=where, expected=commit, found=path
        )
    return path
