"""Pull and push with the real client against the loopback Hub; every failure of a Hub has its own code."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from deltahub.errors import DeltaHubError, HubError
from deltahub.hub import Lock, lock_of, parse_source, pull, push
from deltahub.hub.explain import explain, explained
from deltahub.testing import LoopbackHub

REPO = "acme/delta"
Maker = Callable[..., Path]


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


class Remote:
    """A Hub with one package on it, and the arguments that reach it."""

    def __init__(self, hub: LoopbackHub, cache: Path, folder: Path) -> None:
        self.hub, self.cache, self.folder = hub, cache, folder
        self.first = hub.create(REPO, contents(folder)).branches["main"]
        self.options: dict[str, Any] = {"endpoint": hub.url, "token": hub.token, "cache_dir": cache}

    def pull(self, source: str = REPO, **more: Any) -> Any:
        return pull(source, **{**self.options, **more})

    def requests(self) -> list[str]:
        calls = [f"{call.method} {call.path}" for call in self.hub.log]
        self.hub.log.clear()
        return calls


@pytest.fixture
def remote(hub: LoopbackHub, cache: Path, make_package: Maker) -> Remote:
    return Remote(hub, cache, make_package())


def fails(code: str, call: Callable[[], object], kind: type[DeltaHubError] = HubError) -> DeltaHubError:
    with pytest.raises(kind) as caught:
        call()
    assert caught.value.code == code, caught.value
    return caught.value


# ---- sources


@pytest.mark.parametrize(
    ("text", "repo", "revision", "subfolder"),
    [
        ("acme/delta", "acme/delta", None, ""),
        ("acme/delta@v1.2", "acme/delta", "v1.2", ""),
        ("acme/delta@refs/pr/3", "acme/delta", "refs/pr/3", ""),
        ("hf://acme/delta", "acme/delta", None, ""),
        ("hf://models/acme/delta@v1", "acme/delta", "v1", ""),
        ("hf://acme/delta/sub/folder", "acme/delta", None, "sub/folder"),
        ("hf://acme/delta@v1/sub/folder", "acme/delta", "v1", "sub/folder"),
        ("hf://acme/delta@refs/pr/3/sub", "acme/delta", "refs/pr/3", "sub"),
        ("hf://acme/delta@release%2F1/sub", "acme/delta", "release/1", "sub"),
        ("https://huggingface.co/acme/delta", "acme/delta", None, ""),
        ("https://huggingface.co/acme/delta/tree/v1/sub", "acme/delta", "v1", "sub"),
        ("https://huggingface.co/acme/delta/blob/main/delta.json", "acme/delta", "main", ""),
    ],
)
def test_sources_on_a_hub(text: str, repo: str, revision: str | None, subfolder: str) -> None:
    source = parse_source(text)
    assert (source.kind, source.repo_id, source.revision, source.subfolder) == ("hub", repo, revision, subfolder)
    assert parse_source(str(source)) == source or "%2F" in text


@pytest.mark.parametrize(
    "text",
    [
        "delta",
        "a/b/c",
        "acme/..",
        "acme/de--lta",
        "acme/delta.git",
        "acme/delta@",
        "acme/delta@../../x",
        "acme/delta@a..b",
        "acme/delta@-x",
        "acme/delta@x.lock",
        "hf://acme/delta/../../etc",
        "hf://acme/delta/a\\b",
        "hf://acme/delta/a//b",
        "hf://acme",
        "acme/delta\x00",
        "https://huggingface.co/datasets/acme/delta/tree/main/x/y",
        "",
    ],
)
def test_what_is_no_source(text: str) -> None:
    fails("E_HUB_SOURCE", lambda: parse_source(text))


def test_other_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse_source(tmp_path).path == tmp_path
    assert parse_source("./x").kind == parse_source("~/x").kind == "local"
    assert parse_source("s3://bucket/x/").url == "s3://bucket/x"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "acme" / "delta").mkdir(parents=True)
    assert parse_source("acme/delta").kind == "hub"
    (tmp_path / "acme" / "delta" / "delta.json").touch()
    assert parse_source("acme/delta").kind == "local"
    fails("E_HUB_SOURCE", lambda: parse_source("acme/delta", revision="v1"))
    fails("E_HUB_SOURCE", lambda: parse_source("s3://x/y", revision="v1"))
    fails("E_HUB_SOURCE", lambda: parse_source("u/n@v1", revision="v2"))
    assert parse_source("u/n@v1", revision="v1").revision == "v1"


@pytest.mark.parametrize("endpoint", ["http://hub.example.org", "ftp://127.0.0.1", "http://127.0.0.1.example.org", "x"])
def test_an_endpoint_without_tls_is_refused(endpoint: str, cache: Path) -> None:
    fails("E_HUB_ENDPOINT", lambda: pull(REPO, endpoint=endpoint, cache_dir=cache))
    assert not cache.exists()


# ---- pull


def test_pull_fetches_what_is_listed_and_nothing_else(remote: Remote) -> None:
    remote.hub.commit(REPO, {"pytorch_model.bin": b"\x80pickle", "code.py": b"evil", "README.md": b"# hello"})
    remote.hub.log.clear()
    found = remote.pull()
    head = remote.hub.repository(REPO).branches["main"]
    sha = json.loads((remote.folder / "delta.json").read_text())["files"][0]["sha256"]
    assert remote.requests() == [
        f"GET /api/models/{REPO}/revision/main" if "/revision" in found.endpoint else f"GET /api/models/{REPO}",
        f"HEAD /{REPO}/resolve/{head}/delta.json",
        f"GET /{REPO}/resolve/{head}/delta.json",
        f"HEAD /{REPO}/resolve/{head}/delta.safetensors",
        f"GET /cdn/{sha}",
    ]
    assert found.commit == head
    assert (found.repo_id, found.root) == (REPO, remote.cache.resolve())
    assert contents(found.path) == contents(remote.folder)

    assert remote.pull() == found  # the branch is asked for again, nothing else
    assert remote.requests() == [f"GET /api/models/{REPO}"]
    assert remote.pull(revision=head).path == found.path  # pinned and cached: nothing at all
    assert remote.requests() == []
    assert remote.pull(local_files_only=True).commit == head
    assert remote.requests() == []


def test_pull_by_tag_pull_request_and_commit(remote: Remote, make_package: Maker) -> None:
    second = make_package("second", seed=1)
    repository = remote.hub.repository(REPO)
    repository.tags["v1"] = remote.first
    repository.branches["refs/pr/1"] = repository.branches["main"]
    remote.hub.commit(REPO, contents(second), "refs/pr/1")
    assert contents(remote.pull(f"{REPO}@v1").path) == contents(remote.folder)
    assert contents(remote.pull(f"hf://{REPO}@refs/pr/1").path) == contents(second)
    assert contents(remote.pull(revision=remote.first).path) == contents(remote.folder)


def test_pull_a_subfolder(hub: LoopbackHub, cache: Path, make_package: Maker) -> None:
    folder = make_package(shards=2)
    hub.create(REPO, {f"deltas/one/{name}": data for name, data in contents(folder).items()})
    options: dict[str, Any] = {"endpoint": hub.url, "token": hub.token, "cache_dir": cache}
    found = pull(f"hf://{REPO}@main/deltas/one", **options)
    assert contents(found.path) == contents(folder)
    fails("E_HUB_NOT_A_PACKAGE", lambda: pull(REPO, **options))


def test_pull_a_local_folder(make_package: Maker) -> None:
    folder = make_package()
    found = pull(folder)
    assert (found.path, found.root, found.commit) == (folder, folder, "")
    (folder / "delta.safetensors").write_bytes(b"x")
    fails("E_HUB_DIGEST", lambda: pull(folder))
    assert (folder / "delta.safetensors").exists()  # only caches are cleaned
    (folder / "delta.safetensors").unlink()
    (folder / "delta.safetensors").symlink_to("/etc/passwd")
    fails("E_HUB_PATH", lambda: pull(folder))
    (folder / "delta.json").unlink()
    fails("E_HUB_NOT_A_PACKAGE", lambda: pull(folder))


def test_the_revision_is_pinned_before_the_first_file(remote: Remote, make_package: Maker) -> None:
    """The branch moves between two requests; what comes is one commit, whole."""
    second = contents(make_package("second", seed=1))
    with remote.hub.fault("*/resolve/*/delta.json", then=lambda: remote.hub.commit(REPO, second), times=1):
        assert contents(remote.pull().path) == contents(remote.folder)
    assert contents(remote.pull().path) == second


def test_a_flipped_byte_is_refused_and_forgotten(remote: Remote) -> None:
    with remote.hub.fault("/cdn/*", flip=200, times=1):
        error = fails("E_HUB_DIGEST", remote.pull)
    assert "removed from the cache" in str(error)
    assert contents(remote.pull().path) == contents(remote.folder)


def test_rot_in_the_cache_is_found(remote: Remote) -> None:
    found = remote.pull()
    blob = (found.path / "delta.safetensors").resolve()
    blob.chmod(0o644)
    blob.write_bytes(blob.read_bytes()[:-1] + b"\xff")
    fails("E_HUB_DIGEST", lambda: remote.pull(revision=found.commit))
    remote.hub.log.clear()
    assert contents(remote.pull(revision=found.commit).path) == contents(remote.folder)
    assert len(remote.hub.log) == 2


def test_the_manifest_itself_is_bounded(remote: Remote) -> None:
    remote.hub.commit(REPO, {"delta.json": b" " * (1 << 20) + b"{}"})
    fails("E_HUB_TOO_LARGE", remote.pull)
    remote.hub.commit(REPO, {"delta.json": (remote.folder / "delta.json").read_bytes()})
    with remote.hub.fault("*/delta.json", pad=2 << 20):  # an answer that does not end where it says
        fails("E_HUB_TOO_LARGE", remote.pull)
    with remote.hub.fault("*/delta.json", method="GET", headers={"Content-Encoding": "gzip"}):
        fails("E_HUB_RESPONSE", remote.pull)
    assert not [p for p in remote.cache.rglob("*") if p.is_file() and p.stat().st_size > 1 << 20]


def test_another_size_than_listed_is_refused_before_a_byte_comes(remote: Remote) -> None:
    remote.hub.commit(REPO, {"delta.safetensors": b"short"})
    remote.hub.log.clear()
    fails("E_HUB_SIZE", remote.pull)
    assert not [call for call in remote.hub.log if call.origin == "cdn"]


@pytest.mark.parametrize(
    "headers",
    [
        {"ETag": '"../../../../escaped"'},
        {"X-Linked-Etag": '"../../../../escaped"'},
        {"ETag": '"a/b"'},
        {"X-Repo-Commit": "../../../escaped"},
        {"X-Repo-Commit": "a" * 39},
    ],
)
@pytest.mark.parametrize("name", ["delta.json", "delta.safetensors"])
def test_hostile_headers(remote: Remote, tmp_path: Path, name: str, headers: dict[str, str]) -> None:
    with remote.hub.fault(f"*/resolve/*/{name}", headers=headers):
        fails("E_HUB_RESPONSE", remote.pull)
    assert not [p for p in tmp_path.rglob("*") if "escaped" in p.name]


def test_hostile_headers_on_a_missing_file(hub: LoopbackHub, cache: Path, tmp_path: Path) -> None:
    """The client notes down what does not exist in a folder that the server names."""
    hub.create(REPO)
    with hub.fault("*/resolve/*", headers={"X-Repo-Commit": "../../../../escaped"}):
        fails("E_HUB_RESPONSE", lambda: pull(REPO, endpoint=hub.url, cache_dir=cache))
    assert not [p for p in tmp_path.rglob("*") if "escaped" in p.name]


def test_an_answer_for_another_commit(remote: Remote) -> None:
    with remote.hub.fault("*/resolve/*/delta.json", headers={"X-Repo-Commit": "b" * 40}):
        fails("E_HUB_RESPONSE", remote.pull)


def test_a_commit_that_is_none(remote: Remote) -> None:
    repository = remote.hub.repository(REPO)
    repository.branches["main"] = repository.tags["../../x"] = "../../x"
    repository.commits["../../x"] = repository.commits[remote.first]
    fails("E_HUB_RESPONSE", remote.pull)


# ---- what a Hub says no to


def test_missing_and_private_and_gated(remote: Remote) -> None:
    fails("E_HUB_REPO_NOT_FOUND", lambda: remote.pull("acme/nothing"))
    fails("E_HUB_REVISION_NOT_FOUND", lambda: remote.pull(f"{REPO}@v9"))
    fails("E_HUB_COMMIT_GONE", lambda: remote.pull(revision="a" * 40))
    remote.hub.create("acme/empty")
    fails("E_HUB_NOT_A_PACKAGE", lambda: remote.pull("acme/empty"))
    remote.hub.commit(REPO, {"delta.safetensors": None})
    fails("E_HUB_FILE_NOT_FOUND", remote.pull)
    assert "Invalid credentials" in str(fails("E_HUB_UNAUTHORIZED", lambda: remote.pull(token="hf_wrong")))
    remote.hub.repository(REPO).private = True
    fails("E_HUB_REPO_NOT_FOUND", lambda: remote.pull(token=False))
    remote.hub.repository(REPO).private, remote.hub.repository(REPO).gated = False, True
    for token in ("hf_guest", False):
        remote.hub.add_account("hf_guest", "guest")
        error = fails("E_HUB_GATED", lambda token=token: remote.pull(token=token))
        assert "Access to model acme/delta is restricted" in str(error)  # the Hub's own words


def test_a_repository_that_was_deleted_and_made_again(remote: Remote) -> None:
    found = remote.pull()
    shutil.rmtree(remote.cache)
    remote.hub.delete(REPO)
    remote.hub.create(REPO, contents(remote.folder))
    error = fails("E_HUB_COMMIT_GONE", lambda: remote.pull(revision=found.commit))
    assert "made again" in str(error)


def test_too_many_requests(remote: Remote) -> None:
    with remote.hub.fault("/api/*", status=429, headers={"Retry-After": "17"}):
        assert "17 seconds" in str(fails("E_HUB_RATE_LIMITED", remote.pull))


def test_a_hub_with_a_fault(remote: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    with remote.hub.fault("/api/*", status=500):
        fails("E_HUB_SERVER", remote.pull)
    with remote.hub.fault("*/resolve/*", status=503):
        fails("E_HUB_SERVER", remote.pull)
    with remote.hub.fault("/cdn/*", status=500):
        fails("E_HUB_SERVER", remote.pull)


def test_a_hub_that_falls_silent(remote: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deltahub.hub.guard._SECONDS", 0.2)
    with remote.hub.fault("/api/*", delay=1.0, times=1):
        fails("E_HUB_TIMEOUT", remote.pull)


def test_a_transfer_that_breaks_off(remote: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    with remote.hub.fault("/cdn/*", shorten=1):
        fails("E_HUB_TRANSFER", remote.pull)
    with remote.hub.fault("/cdn/*", cut=100, times=1):
        assert contents(remote.pull().path) == contents(remote.folder)


def test_nobody_there(cache: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    endpoint = f"http://127.0.0.1:{port}"
    fails("E_HUB_CONNECTION", lambda: pull(REPO, endpoint=endpoint, cache_dir=cache, token=False))
    fails("E_HUB_OFFLINE", lambda: pull(REPO, endpoint=endpoint, cache_dir=cache, local_files_only=True))


def test_offline(remote: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = remote.pull().commit
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    remote.hub.log.clear()
    assert remote.pull(revision=commit).commit == remote.pull().commit == commit
    blob = next(remote.cache.glob("*/snapshots/*/delta.safetensors"))
    blob.unlink()
    fails("E_HUB_CACHE_INCOMPLETE", lambda: remote.pull(revision=commit))
    fails("E_HUB_OFFLINE", lambda: remote.pull("acme/other"))
    assert remote.hub.log == []


# ---- push


@pytest.fixture
def sending(hub: LoopbackHub) -> dict[str, Any]:
    return {"endpoint": hub.url, "token": hub.token}


def test_push_and_pull_and_push_again(
    hub: LoopbackHub, cache: Path, sending: dict[str, Any], make_package: Maker
) -> None:
    folder = make_package(shards=3)
    (folder / "notes.txt").write_text("mine")
    one = push(folder, REPO, private=True, message="first", **sending)
    assert hub.repository(REPO).private
    assert set(one.changed) == {*contents(folder), "README.md", "delta.svg"} - {"notes.txt"}
    assert one.ignored == ("notes.txt",)
    history = hub.repository(REPO).commits
    assert (one.commit in history, len(history), history[one.commit].title) == (True, 2, "first")
    found = pull(REPO, cache_dir=cache, **sending)
    assert found.commit == one.commit
    assert contents(found.path).items() <= contents(folder).items()

    hub.log.clear()
    again = push(folder, REPO, **sending)
    assert (again.commit, again.changed, len(history)) == (one.commit, (), 2)
    assert not [call for call in hub.log if "commit" in call.path or "preupload" in call.path]

    smaller = make_package("smaller", seed=1)  # three shards become one file: the old ones go
    two = push(smaller, REPO, **sending)
    assert len(history) == 3
    assert {p for p in hub.repository(REPO).tree("main") if p.endswith(".safetensors")} == {"delta.safetensors"}
    assert history[two.commit].parent == one.commit


def test_push_to_branches_and_pull_requests(
    hub: LoopbackHub, cache: Path, sending: dict[str, Any], make_package: Maker
) -> None:
    first, second = make_package(), make_package("second", seed=1)
    main = push(first, REPO, **sending).commit
    branch = push(second, REPO, revision="v2", **sending)
    assert hub.repository(REPO).branches["v2"] == branch.commit
    assert hub.repository(REPO).branches["main"] == main
    hub.add_account("hf_guest", "guest")
    guest = {**sending, "token": "hf_guest"}
    fails("E_HUB_FORBIDDEN", lambda: push(second, REPO, **guest))
    proposal = push(second, REPO, create_pr=True, message="better", **guest)
    assert proposal.pr == "refs/pr/1"
    assert contents(pull(REPO, revision=proposal.pr, cache_dir=cache, **sending).path) == contents(second)
    assert hub.repository(REPO).branches["main"] == main
    fails("E_HUB_REPO_NOT_FOUND", lambda: push(second, "acme/none", create_pr=True, **guest))


def test_somebody_was_quicker(hub: LoopbackHub, sending: dict[str, Any], make_package: Maker) -> None:
    push(make_package(), REPO, **sending)
    with hub.fault("*/preupload/*", then=lambda: hub.commit(REPO, {"x": b"1"}), times=1):
        fails("E_HUB_CONFLICT", lambda: push(make_package("second", seed=1), REPO, **sending))
    assert len(hub.repository(REPO).commits) == 3


def test_a_broken_package_is_not_pushed(hub: LoopbackHub, sending: dict[str, Any], make_package: Maker) -> None:
    folder = make_package()
    data = bytearray((folder / "delta.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "delta.safetensors").write_bytes(data)
    with pytest.raises(DeltaHubError):
        push(folder, REPO, **sending)
    assert hub.log == []


def test_what_is_no_repository_to_push_to(sending: dict[str, Any], make_package: Maker) -> None:
    for name in ("delta", "hf://a/b/sub", "./x/y", "s3://a/b"):
        fails("E_HUB_SOURCE", lambda name=name: push(make_package(name[:1] + str(len(name))), name, **sending))


# ---- the lock file


def test_lock(remote: Remote, tmp_path: Path, make_package: Maker) -> None:
    path = tmp_path / "deltahub.lock"
    lock_of(remote.pull()).write(path)
    before = path.read_bytes()
    remote.hub.commit(REPO, contents(make_package("second", seed=1)))
    lock = Lock.read(path)
    remote.hub.log.clear()
    found = remote.pull(lock=lock)
    assert (found.commit, remote.hub.log) == (remote.first, [])
    lock_of(found).write(path)
    assert path.read_bytes() == before
    fails("E_HUB_LOCK_MISMATCH", lambda: remote.pull(lock=lock, revision="b" * 40))
    fails("E_HUB_LOCK_MISMATCH", lambda: remote.pull("acme/other", lock=lock))
    forged = lock.model_copy(update={"packages": (lock.packages[0].model_copy(update={"manifest": "0" * 64}),)})
    fails("E_HUB_LOCK_MISMATCH", lambda: remote.pull(lock=forged))
    for bad in (b"", b"{}x", b'{"lock_version": 2}', b'{"lock_version": 1, "more": 1}', b"[" * 100_000):
        path.write_bytes(bad)
        fails("E_HUB_LOCK", lambda: Lock.read(path))
    fails("E_HUB_LOCK", lambda: Lock.read(tmp_path / "none"))


# ---- what the client raises


def test_what_the_client_raises_is_explained() -> None:
    from huggingface_hub import errors

    def chained(outer: Exception, cause: Exception | None) -> Exception:
        outer.__cause__ = cause
        return outer

    lost = errors.LocalEntryNotFoundError
    cases: list[tuple[Exception, str | None]] = [
        (ConnectionError("hf_xet: no token"), "E_HUB_CONNECTION"),  # a Hub without Xet under a client with it
        (errors.XetDownloadError("cut"), "E_HUB_TRANSFER"),
        (chained(RuntimeError("Error while uploading"), ConnectionError("gone")), "E_HUB_CONNECTION"),
        (RuntimeError("Task error"), "E_HUB_TRANSFER"),
        (chained(lost("no"), errors.FileMetadataError("not a Hub")), "E_HUB_RESPONSE"),
        (chained(lost("no"), errors.OfflineModeIsEnabled("off")), "E_HUB_OFFLINE"),
        (lost("no"), "E_HUB_OFFLINE"),
        (errors.RevisionResolutionError("no"), "E_HUB_OFFLINE"),
        (OSError("Consistency check failed: 1 of 2"), "E_HUB_TRANSFER"),
        (ValueError("Invalid metadata in README.md.\n- x"), "E_HUB_CARD"),
        (OSError("disk full"), None),
        (KeyError("a fault of ours"), None),
    ]
    for error, code in cases:
        found = explain(error, "here")
        assert (found.code if found else None) == code, error
    with pytest.raises(KeyError), explained("here"):
        raise KeyError
