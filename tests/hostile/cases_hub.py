"""48 to 54: a Hub that refuses, fails, lies, or changes under way."""

from __future__ import annotations

import shutil
from typing import Any

import numpy as np

import deltahub
from tests.hostile.corpus import ACCEPTED, Room, case, cases, replaced

REFUSALS: dict[str, tuple[object, str]] = {
    "401": ({"status": 401, "message": "Invalid credentials"}, "E_HUB_UNAUTHORIZED"),
    "403": ({"status": 403, "message": "Forbidden"}, "E_HUB_FORBIDDEN"),
    "403, gated": ({"status": 403, "code": "GatedRepo", "message": "ask"}, "E_HUB_GATED"),
    "404, repository": ({"status": 404, "code": "RepoNotFound"}, "E_HUB_REPO_NOT_FOUND"),
    "404, revision": ({"status": 404, "code": "RevisionNotFound"}, "E_HUB_REVISION_NOT_FOUND"),
    "412": ({"status": 412}, "E_HUB_CONFLICT"),
    "418": ({"status": 418}, "E_HUB_REFUSED"),
    "429": ({"status": 429, "headers": {"Retry-After": "17"}}, "E_HUB_RATE_LIMITED"),
    "500": ({"status": 500}, "E_HUB_SERVER"),
    "503": ({"status": 503}, "E_HUB_SERVER"),
}


def _no_waiting(room: Room) -> None:
    """The client waits between its attempts; here it only counts them."""
    import huggingface_hub.file_download
    import huggingface_hub.utils._http

    for module in (huggingface_hub.file_download, huggingface_hub.utils._http):
        room.enter(replaced(module.time, "sleep", lambda seconds: None))


@cases(48, {f"the Hub says {name}": given for name, given in REFUSALS.items()})
def _(room: Room, fault: dict[str, Any]) -> Any:
    hub = room.hub()
    _no_waiting(room)
    room.enter(hub.fault("/api/*", **fault))
    return room.from_hub(hub)


@case(48, "a file of the package is gone", "E_HUB_FILE_NOT_FOUND")
def _(room: Room) -> Any:
    hub = room.hub()
    hub.commit("acme/delta", {"delta.safetensors": None})
    return room.from_hub(hub)


@case(48, "no package in the repository", "E_HUB_NOT_A_PACKAGE")
def _(room: Room) -> Any:
    hub = room.hub()
    hub.commit("acme/delta", {"delta.json": None})
    return room.from_hub(hub)


@case(48, "somebody committed in between", "E_HUB_CONFLICT")
def _(room: Room) -> Any:
    hub = room.hub()
    room.config(scale=3.0)
    room.enter(hub.fault("*/preupload/*", then=lambda: hub.commit("acme/delta", {"x": b"1"})))
    return lambda: deltahub.push(room.package, "acme/delta", endpoint=hub.url, token=hub.token)


@case(48, "no answer", "E_HUB_TIMEOUT")
def _(room: Room) -> Any:
    import deltahub.hub.guard

    hub = room.hub()
    room.enter(replaced(deltahub.hub.guard, "_SECONDS", 0.2))
    room.enter(hub.fault("/api/*", delay=0.6))
    return room.from_hub(hub)[0]


@case(48, "half a body", "E_HUB_TRANSFER")
def _(room: Room) -> Any:
    hub = room.hub()
    _no_waiting(room)
    room.enter(hub.fault("/cdn/*", shorten=100))
    return room.from_hub(hub)


@case(48, "a body without an end", "E_HUB_TOO_LARGE")
def _(room: Room) -> Any:
    hub = room.hub()
    room.enter(hub.fault("*/delta.json", pad=3 << 20))
    return room.from_hub(hub)


@case(48, "nobody there", "E_HUB_CONNECTION")
def _(room: Room) -> Any:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    return lambda: deltahub.pull("acme/delta", endpoint=url, cache_dir=room.cache, token=False)


@case(49, "flipped byte over HTTP", "E_HUB_DIGEST")
def _(room: Room) -> Any:
    hub = room.hub()
    room.enter(hub.fault("/cdn/*", flip=len(room.weights.read_bytes()) - 1))
    return room.from_hub(hub)


@case(49, "flipped byte in the manifest over HTTP", "E_MANIFEST_FIELD")
def _(room: Room) -> Any:
    hub = room.hub()
    at = room.text().index('"kind"') + 1
    room.enter(hub.fault("*/resolve/*/delta.json", method="GET", flip=at))
    return room.from_hub(hub)


@case(49, "flipped byte over Xet", "E_HUB_DIGEST")
def _(room: Room) -> Any:
    """A chunk that does not compress is not hashed by the client."""
    from huggingface_hub import constants

    from deltahub.tensors import TensorFile, write

    room.pooled = True  # by hf_xet
    rank = 2048
    random = np.random.default_rng(0)
    with TensorFile.read(room.weights) as file:
        shapes = {name: file[name].shape for name in file}
    wide = {n: tuple(rank if size == 2 else size for size in shape) for n, shape in shapes.items()}
    room.weights.unlink()
    write(room.weights, {n: random.standard_normal(shape, np.float32) for n, shape in wide.items()})
    room.config(rank=rank)
    hub = room.hub(xet=True)
    room.enter(replaced(constants, "HF_HUB_DISABLE_XET", False))
    deltahub.push(room.package, "acme/chunked", endpoint=hub.url, token=hub.token)
    assert any("/xorbs/" in call.path for call in hub.log)
    room.enter(hub.fault("/xorb/*", flip=100_000))
    return lambda: deltahub.pull("acme/chunked", endpoint=hub.url, token=hub.token, cache_dir=room.cache)


HEADERS = {
    "ETag that climbs": {"ETag": '"../../../../escaped"'},
    "linked ETag that climbs": {"X-Linked-Etag": '"../../../../escaped"'},
    "ETag with a slash": {"ETag": '"a/b"'},
    "ETag that is absolute": {"ETag": '"/tmp/escaped"'},
    "ETag of 10 kB": {"ETag": '"' + "a" * 10_000 + '"'},
    "commit that climbs": {"X-Repo-Commit": "../../../escaped"},
    "commit that is short": {"X-Repo-Commit": "a" * 39},
    "another commit": {"X-Repo-Commit": "b" * 40},
}


@cases(50, {name: (headers, "E_HUB_RESPONSE") for name, headers in HEADERS.items()})
def _(room: Room, headers: dict[str, str]) -> Any:
    hub = room.hub()
    room.enter(hub.fault("*/resolve/*", headers=headers))
    return room.from_hub(hub)


@case(50, "commit of a branch that climbs", "E_HUB_RESPONSE")
def _(room: Room) -> Any:
    hub = room.hub()
    repository = hub.repository("acme/delta")
    repository.commits["../../x"] = repository.commits[repository.branches["main"]]
    repository.branches["main"] = repository.tags["../../x"] = "../../x"
    return room.from_hub(hub)


@case(51, "redirect to another origin", ACCEPTED)
def _(room: Room) -> Any:
    """The file comes from there, the token does not go there."""
    hub = room.hub()

    def act() -> None:
        room.pull(hub)
        there = [call for call in hub.log if call.origin == "cdn"]
        here = [call for call in hub.log if call.origin == "hub"]
        assert there, hub.log
        assert all(call.account is None for call in there)
        assert any(call.account == "tester" for call in here)

    return act


@cases(
    51,
    {
        f"endpoint {url}": (url, "E_HUB_ENDPOINT")
        for url in ("http://hub.example.org", "http://127.0.0.1.example.org", "ftp://127.0.0.1", "file:///etc", "x")
    },
)
def _(room: Room, url: str) -> Any:
    return lambda: deltahub.pull("acme/delta", endpoint=url, cache_dir=room.cache, token="hf_secret")


@case(52, "branch that moves between two downloads", ACCEPTED)
def _(room: Room) -> Any:
    hub = room.hub()
    first = room.contents(room.package)
    room.config(scale=3.0)
    second = room.contents(room.package)
    room.enter(hub.fault("*/resolve/*/delta.json", then=lambda: hub.commit("acme/delta", second), times=1))

    def act() -> None:
        assert room.contents(room.pull(hub).path) == first
        assert room.contents(room.pull(hub).path) == second

    return act


@case(53, "offline with a partial cache", "E_HUB_CACHE_INCOMPLETE")
def _(room: Room) -> Any:
    hub = room.hub()
    found = room.pull(hub)
    (found.path / "delta.safetensors").unlink()
    return room.from_hub(hub, local_files_only=True)


@case(53, "offline with an empty cache", "E_HUB_OFFLINE")
def _(room: Room) -> Any:
    return room.from_hub(room.hub(), local_files_only=True)


@case(53, "offline with a cache that rotted", "E_HUB_DIGEST")
def _(room: Room) -> Any:
    hub = room.hub()
    blob = (room.pull(hub).path / "delta.safetensors").resolve()
    blob.chmod(0o644)
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes(data)
    return room.from_hub(hub, local_files_only=True)[0]


@case(53, "switched off by the environment", "E_HUB_OFFLINE")
def _(room: Room) -> Any:
    from huggingface_hub import constants

    hub = room.hub()
    room.enter(replaced(constants, "HF_HUB_OFFLINE", True))
    return room.from_hub(hub)


def _recreated(room: Room) -> Any:
    """A repository under the old name with another history; gives the old commit and a lock of it."""
    hub = room.hub()
    found = room.pull(hub)
    shutil.rmtree(room.cache)
    hub.delete("acme/delta")
    room.config(scale=3.0)
    hub.create("acme/delta", room.contents(room.package))
    return hub, found


@case(54, "made again under the same name, pinned", "E_HUB_COMMIT_GONE")
def _(room: Room) -> Any:
    hub, found = _recreated(room)
    return room.from_hub(hub, revision=found.commit)


@case(54, "made again under the same name, locked", "E_HUB_COMMIT_GONE")
def _(room: Room) -> Any:
    from deltahub.hub import lock_of

    hub, found = _recreated(room)
    return room.from_hub(hub, lock=lock_of(found))


@case(54, "another package at the locked commit", "E_HUB_LOCK_MISMATCH")
def _(room: Room) -> Any:
    from deltahub.hub import lock_of

    hub = room.hub()
    lock = lock_of(room.pull(hub))
    entry = lock.packages[0].model_copy(update={"manifest": "0" * 64})
    forged = lock.model_copy(update={"packages": (entry,)})
    return room.from_hub(hub, lock=forged)


SOURCES = (
    "delta", "a/b/c", "acme/..", "acme/delta@../../x", "hf://acme/delta/../../etc", "acme/delta\0", "", "acme/de--lta",
    "hf://acme/delta@main/a\\b",
)  # fmt: skip


@cases(50, {f"source {source!a}": (source, "E_HUB_SOURCE") for source in SOURCES})
def _(room: Room, source: str) -> Any:
    return [lambda: deltahub.pull(source, cache_dir=room.cache), lambda: room.load(source=source)]
