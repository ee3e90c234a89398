"""Packages outside a Hub: object stores and plain folders on the web, with the same checks.

A mirror is a folder with a package's files in it. It has no revisions: what ``delta.json`` says now is what is
pulled, and a lock file is how to hold it still. ``https`` is fetched with the standard library; every other scheme
(``s3://``, ``gs://``, ``az://``, ``file://``, ``memory://`` …) through fsspec, which names the package to install.
"""

from __future__ import annotations

__all__ = ["pull_mirror"]

import contextlib
import hashlib
import io
import os
import secrets
import shutil
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO
from urllib.parse import quote, urlsplit

from deltahub import limits
from deltahub.errors import HubError, TensorFileError
from deltahub.hub.pulling import (
    MANIFEST,
    SIGNATURE,
    SIGNATURE_BYTES,
    PulledPackage,
    check_file,
    check_files,
    expected_files,
    not_a_package,
    read_manifest,
)
from deltahub.hub.sources import Source, check_endpoint
from deltahub.identity.stamps import cache_folder
from deltahub.manifest import Manifest
from deltahub.tensors import copy_stream
from deltahub.tensors.files import replacing

if TYPE_CHECKING:
    from deltahub.sign import Policy

Opener = Callable[[str], contextlib.AbstractContextManager[BinaryIO]]
_SECONDS = 30.0
_LATEST = "latest"


def pull_mirror(
    source: Source, *, cache_dir: str | os.PathLike[str] | None, local_files_only: bool, policy: Policy | None
) -> PulledPackage:
    """Bring a package from a mirror; see :func:`deltahub.hub.pull`.

    Raises:
        HubError: ``E_HUB_MIRROR`` where the URL cannot be opened, and what :func:`deltahub.hub.pull` raises.
    """
    home = _home(cache_dir) / hashlib.sha256(source.url.encode()).hexdigest()[:32]
    if local_files_only:
        return _cached(source, home, policy, offline=True)
    opener = _opener(source.url)
    data = _bytes(opener, MANIFEST, limits.DEFAULT.manifest_bytes, source.url)
    if data is None:
        raise not_a_package(source.url)
    manifest = Manifest.parse(data, where=f"{source.url}/{MANIFEST}")
    sha256 = hashlib.sha256(data).hexdigest()
    signed = None
    if policy is not None and policy.wants_signature(""):
        signed = _bytes(opener, SIGNATURE, SIGNATURE_BYTES, source.url)
    if policy is not None:
        policy.check(signed, manifest=manifest, sha256=sha256, namespace="", where=source.url)
    folder = home / sha256
    if not _whole(folder, manifest):
        _fill(folder, opener, manifest, source.url, {MANIFEST: data, SIGNATURE: signed})
    with replacing(home / _LATEST) as file:
        file.write(sha256.encode())
    return _cached(source, home, policy)


def _home(cache_dir: str | os.PathLike[str] | None) -> Path:
    folder = Path(cache_dir) if cache_dir is not None else cache_folder() / "mirrors"
    return folder.expanduser().resolve()


def _cached(source: Source, home: Path, policy: Policy | None, *, offline: bool = False) -> PulledPackage:
    """The package as it lies in the cache, checked."""
    try:
        folder = home / (home / _LATEST).read_text("ascii")
        manifest, sha256 = read_manifest(folder / MANIFEST)
    except (OSError, TensorFileError) as error:
        raise HubError(
            "E_HUB_OFFLINE", "this is not in the cache, and requests are switched off", where=source.url, found=error
        ) from None
    signature = None
    if policy is not None:
        path = folder / SIGNATURE
        raw = path.read_bytes() if path.is_file() else None
        signature = policy.check(raw, manifest=manifest, sha256=sha256, namespace="", where=source.url, offline=offline)
    check_files(folder, folder, manifest, evict=True)
    return PulledPackage(path=folder, root=folder, source=source, manifest=manifest, sha256=sha256, signature=signature)


def _whole(folder: Path, manifest: Manifest) -> bool:
    if not (folder / MANIFEST).is_file():
        return False
    try:
        check_files(folder, folder, manifest)
    except HubError:
        return False
    return True


def _fill(folder: Path, opener: Opener, manifest: Manifest, url: str, small: dict[str, bytes | None]) -> None:
    """Fetch into a folder beside the final one; it takes its place when everything has been checked."""
    beside = folder.with_name(f".{folder.name[:16]}.{secrets.token_hex(8)}.part")
    beside.mkdir(parents=True)
    try:
        for name, data in small.items():
            if data is not None:
                (beside / name).write_bytes(data)
        for name, (size, sha256) in expected_files(manifest).items():
            target = beside / name
            target.parent.mkdir(parents=True, exist_ok=True)
            _copy(opener, name, target, size, url)
            check_file(target, beside, size, sha256)
        if folder.exists():  # broken, or another process was quicker; either way ours is whole
            folder.rename(beside.with_suffix(".old"))
        beside.rename(folder)
        shutil.rmtree(beside.with_suffix(".old"), ignore_errors=True)
    except FileNotFoundError as error:
        raise HubError("E_HUB_FILE_NOT_FOUND", "a file of the package is not in the mirror", where=error) from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _copy(opener: Opener, name: str, target: Path, size: int, url: str) -> None:
    try:
        with opener(name) as stream, target.open("xb") as file:
            copy_stream(stream, file, limit=size)
    except TensorFileError as error:
        raise HubError(
            "E_HUB_TOO_LARGE", "the mirror sends more than this file may have", where=f"{url}/{name}", found=error.found
        ) from None


def _bytes(opener: Opener, name: str, limit: int, url: str) -> bytes | None:
    """A small file; ``None`` if it is not there."""
    buffer = io.BytesIO()
    try:
        with opener(name) as stream:
            copy_stream(stream, buffer, limit=limit)
    except FileNotFoundError:
        return None
    except TensorFileError:
        raise HubError(
            "E_HUB_TOO_LARGE", "the mirror sends more than this file may have", where=f"{url}/{name}"
        ) from None
    return buffer.getvalue()


# ---- ways to open


def _opener(url: str) -> Opener:
    if urlsplit(url).scheme in {"http", "https"}:
        check_endpoint(url)
        return lambda name: _over_http(f"{url}/{quote(name)}")
    return _by_fsspec(url)


class _NoWayDown(urllib.request.HTTPRedirectHandler):
    """Redirects are followed only to where the first address could have pointed."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        try:
            check_endpoint(newurl)
        except HubError:
            fp.close()
            raise
        return super().redirect_request(req, fp, code, msg, headers, newurl)


@contextlib.contextmanager
def _over_http(url: str) -> Iterator[BinaryIO]:
    opener = urllib.request.build_opener(_NoWayDown)
    try:
        with opener.open(url, timeout=_SECONDS) as answer:
            yield answer
    except urllib.error.HTTPError as error:
        error.close()
        if error.code in {404, 410}:
            raise FileNotFoundError(url) from None
        raise HubError("E_HUB_MIRROR", "the mirror refuses this request", where=url, found=error) from None
    except TimeoutError as error:
        raise HubError("E_HUB_TIMEOUT", "the mirror did not answer in time", where=url, found=error) from None
    except (urllib.error.URLError, ConnectionError) as error:
        raise HubError("E_HUB_CONNECTION", "the mirror cannot be reached", where=url, found=error) from None


def _by_fsspec(url: str) -> Opener:
    try:
        from fsspec.core import url_to_fs

        system, root = url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise HubError("E_HUB_MIRROR", "no library here opens this kind of address", where=url, found=error) from None

    @contextlib.contextmanager
    def opener(name: str) -> Iterator[BinaryIO]:
        try:
            with system.open(f"{root.rstrip('/')}/{name}", "rb") as stream:
                yield stream
        except (FileNotFoundError, HubError, TensorFileError):
            raise
        except OSError as error:
            raise HubError("E_HUB_MIRROR", "the mirror cannot be read", where=f"{url}/{name}", found=error) from None

    return opener
