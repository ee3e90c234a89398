"""Packages outside a Hub: file://, memory:// and a plain folder served over HTTP, with the same checks."""

from __future__ import annotations

import functools
import http.server
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from deltahub.errors import DeltaHubError, HubError
from deltahub.hub import Lock, lock_of, pull
from deltahub.sign import Policy

Maker = Callable[..., Path]
SCHEMES = ["file", "memory", "http"]


class Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self.server.log.append(self.path)  # type: ignore[attr-defined]
        if self.path.startswith("/moved/"):
            self.send_response(302)
            self.send_header("Location", self.server.elsewhere + self.path[7:])  # type: ignore[attr-defined]
            self.end_headers()
        else:
            super().do_GET()


@pytest.fixture
def web(tmp_path: Path) -> Iterator[Any]:
    root = tmp_path / "web"
    root.mkdir()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=root))
    server.daemon_threads = False  # closing waits for them
    server.url, server.root, server.log = f"http://127.0.0.1:{server.server_port}", root, []  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(params=SCHEMES)
def mirror(request: pytest.FixtureRequest, tmp_path: Path, web: Any) -> Iterator[tuple[str, Callable[..., None]]]:
    """A mirror's URL, and what puts a package's files there."""
    root = tmp_path / "store"

    def put(files: dict[str, bytes | None]) -> None:
        for name, data in files.items():
            if request.param == "memory":
                system = fsspec.filesystem("memory")
                system.rm(f"/bucket/{name}") if data is None else system.pipe(f"/bucket/{name}", data)
                continue
            path = (web.root if request.param == "http" else root) / "bucket" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink() if data is None else path.write_bytes(data)

    url = {"memory": "memory://bucket", "http": f"{web.url}/bucket", "file": f"file://{root}/bucket"}[request.param]
    yield url, put
    if request.param == "memory":
        fsspec.filesystem("memory").store.clear()


def contents(folder: Path) -> dict[str, bytes | None]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def code(call: Callable[[], object]) -> str:
    with pytest.raises(DeltaHubError) as caught:
        call()
    return caught.value.code


def test_a_mirror(mirror: tuple[str, Callable[..., None]], make_package: Maker, cache: Path, tmp_path: Path) -> None:
    url, put = mirror
    again = functools.partial(pull, url, cache_dir=cache)
    assert code(lambda: again(local_files_only=True)) == "E_HUB_OFFLINE"
    assert code(again) == "E_HUB_NOT_A_PACKAGE"
    folder = make_package(shards=2)
    put({**contents(folder), "other.bin": b"never fetched"})
    found = again()
    assert contents(found.path) == contents(folder)
    assert (found.root, found.commit, str(found.source)) == (found.path, "", url)
    assert again(local_files_only=True) == again() == found

    # Held still by a lock file; a newer package is another folder.
    path = tmp_path / "deltahub.lock"
    lock_of(found).write(path)
    second = make_package("second", seed=1)
    put(contents(second))
    assert code(lambda: again(lock=Lock.read(path))) == "E_HUB_LOCK_MISMATCH"
    assert contents(again().path) == contents(second)
    assert contents(found.path) == contents(folder)
    assert code(lambda: again(policy=Policy(require=("*",)))) == "E_SIGN_MISSING"

    # Altered, cut, missing; each leaves the cache as it was.
    name = "delta.safetensors"
    good = (second / name).read_bytes()
    third = contents(make_package("third", seed=2))
    for bad, expected in (
        (good, "E_HUB_DIGEST"),
        (good[:-1], "E_HUB_DIGEST"),
        (good + b"x", "E_HUB_TOO_LARGE"),
        (None, "E_HUB_FILE_NOT_FOUND"),
    ):
        put({**third, name: bad} if bad is not None else {"delta.json": third["delta.json"], name: None})
        assert code(again) == expected
    assert again(local_files_only=True).sha256 != found.sha256
    assert len(list(cache.glob("*/*/delta.json"))) == 2
    assert not list(cache.glob("*/.*"))


def test_rot_is_mended(mirror: tuple[str, Callable[..., None]], make_package: Maker, cache: Path) -> None:
    url, put = mirror
    put(contents(make_package()))
    found = pull(url, cache_dir=cache)
    (found.path / "delta.safetensors").write_bytes(b"rot")
    assert pull(url, cache_dir=cache).path == found.path
    (found.path / "delta.safetensors").write_bytes(b"rot")
    assert code(lambda: pull(url, cache_dir=cache, local_files_only=True)) == "E_HUB_DIGEST"


def test_a_manifest_that_does_not_end(mirror: tuple[str, Callable[..., None]], cache: Path) -> None:
    url, put = mirror
    put({"delta.json": b" " * (1 << 20) + b"{}"})
    assert code(lambda: pull(url, cache_dir=cache)) == "E_HUB_TOO_LARGE"


def test_on_the_web(web: Any, make_package: Maker, cache: Path) -> None:
    folder = make_package()
    (web.root / "a b").mkdir()
    for name, data in contents(folder).items():
        (web.root / "a b" / name).write_bytes(data or b"")
    web.elsewhere = f"{web.url}/a%20b/"
    pull(f"{web.url}/moved", cache_dir=cache)
    assert web.log == ["/moved/delta.json", "/a%20b/delta.json", "/moved/delta.safetensors", "/a%20b/delta.safetensors"]
    web.elsewhere = "http://example.org/"
    assert code(lambda: pull(f"{web.url}/moved", cache_dir=cache)) == "E_HUB_ENDPOINT"
    assert code(lambda: pull("http://example.org/x", cache_dir=cache)) == "E_HUB_ENDPOINT"
    assert code(lambda: pull("nosuch://x/y", cache_dir=cache)) == "E_HUB_MIRROR"
    web.shutdown()
    web.server_close()
    assert code(lambda: pull(f"{web.url}/a", cache_dir=cache)) == "E_HUB_CONNECTION"


def test_paths_that_lead_out_never_reach_a_mirror(
    mirror: tuple[str, Callable[..., None]], make_package: Maker, cache: Path, tmp_path: Path
) -> None:
    url, put = mirror
    manifest = json.loads((make_package() / "delta.json").read_text())
    manifest["files"][0]["path"] = "../../escaped"
    put({"delta.json": json.dumps(manifest).encode()})
    assert code(lambda: pull(url, cache_dir=cache)) == "E_MANIFEST_PATH"
    assert not list(tmp_path.rglob("escaped"))


def test_errors_are_the_hubs(cache: Path) -> None:
    with pytest.raises(HubError, match=r"where: +file:///nowhere/at/all"):
        pull("file:///nowhere/at/all", cache_dir=cache)
