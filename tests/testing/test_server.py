"""The loopback Hub under the real client, in each of its modes."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub as hf
import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, errors

from deltahub.testing import LoopbackHub, serve_hub

REPO = "acme/delta"
WEIGHTS = bytes(range(256)) * 4096  # 1 MiB


def add(path: str, data: bytes) -> CommitOperationAdd:
    return CommitOperationAdd(path, data)


@pytest.fixture(params=["plain", "multipart"])
def any_hub(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[LoopbackHub]:
    with serve_hub(tmp_path / "hub", part_size=300_000 if request.param == "multipart" else None) as running:
        yield running


def client(hub: LoopbackHub, token: str | bool | None = None) -> HfApi:
    return HfApi(endpoint=hub.url, token=hub.token if token is None else token)


def test_a_repositorys_life(any_hub: LoopbackHub, cache: Path) -> None:
    api = client(any_hub)
    assert api.whoami()["name"] == "tester"
    assert api.create_repo(REPO).repo_id == REPO
    assert api.create_repo(REPO, exist_ok=True).repo_id == REPO
    with pytest.raises(errors.HfHubHTTPError, match="409"):
        api.create_repo(REPO)

    files = {"README.md": b"---\ntags: [x]\n---\nHello", "w/delta.safetensors": WEIGHTS, "delta.json": b"{}"}
    first = api.create_commit(REPO, [add(*item) for item in files.items()], commit_message="one")
    info = api.model_info(REPO, files_metadata=True)
    assert info.sha == first.oid
    assert info.tags == ["x"]
    sizes = {s.rfilename: s.size for s in info.siblings or []}
    assert sizes.items() >= {path: len(data) for path, data in files.items()}.items()

    for path, data in files.items():
        local = hf.hf_hub_download(REPO, path, endpoint=any_hub.url, token=any_hub.token, cache_dir=cache)
        assert Path(local).read_bytes() == data
    tree = {e.path: e for e in api.list_repo_tree(REPO, recursive=True)}
    assert tree["w/delta.safetensors"].lfs.sha256 == hashlib.sha256(WEIGHTS).hexdigest()
    assert isinstance(tree["w"], hf.hf_api.RepoFolder)
    assert [e.path for e in api.get_paths_info(REPO, ["delta.json", "nothing", "w"])] == ["delta.json", "w"]

    # An unchanged commit makes none; a stale parent is refused; a deletion is one.
    assert api.create_commit(REPO, [add("delta.json", b"{}")], commit_message="same").oid == first.oid
    second = api.create_commit(REPO, [CommitOperationDelete("w/")], commit_message="two", parent_commit=first.oid)
    with pytest.raises(errors.HfHubHTTPError, match="412"):
        api.create_commit(REPO, [add("a", b"a")], commit_message="late", parent_commit=first.oid)
    assert [c.commit_id for c in api.list_repo_commits(REPO)][:2] == [second.oid, first.oid]
    assert not api.file_exists(REPO, "w/delta.safetensors")

    api.create_tag(REPO, tag="v1", revision=first.oid)
    api.create_branch(REPO, branch="side")
    refs = api.list_repo_refs(REPO)
    assert [(t.name, t.target_commit) for t in refs.tags] == [("v1", first.oid)]
    assert {b.name for b in refs.branches} == {"main", "side"}
    assert api.file_exists(REPO, "w/delta.safetensors", revision="v1")
    api.delete_tag(REPO, tag="v1")
    api.delete_branch(REPO, branch="side")
    api.move_repo(REPO, "acme/moved")
    api.delete_repo("acme/moved")
    assert not api.repo_exists("acme/moved")


def test_pull_requests(hub: LoopbackHub) -> None:
    api = client(hub)
    hub.create(REPO, {"a": b"1", "b": b"1"})
    hub.add_account("hf_guest", "guest")
    guest = client(hub, "hf_guest")
    with pytest.raises(errors.HfHubHTTPError, match="403"):
        guest.create_commit(REPO, [add("a", b"2")], commit_message="mine")
    pr = guest.create_commit(REPO, [add("a", b"2")], commit_message="mine", create_pr=True)
    assert (pr.pr_num, pr.pr_revision) == (1, "refs/pr/1")
    assert hub.read(REPO, "a", "refs/pr/1") == b"2"
    api.create_commit(REPO, [add("c", b"3")], commit_message="more", revision="refs/pr/1")
    api.create_commit(REPO, [add("b", b"2")], commit_message="meanwhile")
    assert [d.title for d in api.get_repo_discussions(REPO)] == ["mine"]
    assert api.get_discussion_details(REPO, 1).author == "guest"
    guest.comment_discussion(REPO, 1, comment="please")
    api.rename_discussion(REPO, 1, new_title="ours")
    api.merge_pull_request(REPO, 1)
    assert [hub.read(REPO, name) for name in "abc"] == [b"2", b"2", b"3"]
    assert api.get_discussion_details(REPO, 1).status == "merged"
    assert api.create_discussion(REPO, title="talk").num == 2
    api.change_discussion_status(REPO, 2, new_status="closed")


def test_private_and_gated(hub: LoopbackHub, cache: Path) -> None:
    hub.create("acme/secret", {"f": b"1"}, private=True)
    hub.create("acme/gated", {"f": b"1"}, gated=True)
    hub.add_account("hf_guest", "guest")
    for token in ("hf_guest", False):
        with pytest.raises(errors.RepositoryNotFoundError):
            client(hub, token).model_info("acme/secret")
        with pytest.raises(errors.GatedRepoError):
            hf.hf_hub_download("acme/gated", "f", endpoint=hub.url, token=token, cache_dir=cache)
        with pytest.raises(errors.GatedRepoError):
            client(hub, token).auth_check("acme/gated")
    with pytest.raises(errors.HfHubHTTPError, match="Invalid credentials"):
        client(hub, "hf_nobody").model_info("acme/gated")
    hub.repository("acme/gated").granted.add("guest")
    assert hf.hf_hub_download("acme/gated", "f", endpoint=hub.url, token="hf_guest", cache_dir=cache)
    client(hub).update_repo_settings("acme/secret", visibility="public")
    assert client(hub, False).model_info("acme/secret").private is False


def test_search_by_tag_author_and_text(hub: LoopbackHub) -> None:
    for n, tag in enumerate(["red", "blue", "red"]):
        card = f"---\ntags: [{tag}]\nbase_model: org/base\nbase_model_relation: adapter\n---\n".encode()
        hub.create(f"acme/d{n}", {"README.md": card})
    hub.create("other/x", {"README.md": b"no card"})
    api = client(hub)
    assert {m.id for m in api.list_models(filter="red")} == {"acme/d0", "acme/d2"}
    assert {m.id for m in api.list_models(filter=["red", "base_model:adapter:org/base"], search="d2")} == {"acme/d2"}
    assert {m.id for m in api.list_models(author="other")} == {"other/x"}
    assert len(list(api.list_models(limit=2))) == 2


def test_long_listings_come_in_pages(hub: LoopbackHub) -> None:
    hub.create(REPO, {f"f{n}": b"" for n in range(120)})
    api = client(hub)
    assert len(list(api.list_repo_tree(REPO, expand=True))) == 121
    assert sum("cursor=" in call.query for call in hub.log) == 2


def test_cards_are_validated(hub: LoopbackHub) -> None:
    api = client(hub)
    api.create_repo(REPO)
    for bad in (b"---\ntags: {a\n---\n", b"---\ntags: x\n---\n", b"---\nbase_model_relation: friend\n---\n"):
        with pytest.raises(ValueError, match="Invalid metadata"):
            api.create_commit(REPO, [add("README.md", bad)], commit_message="bad")
    assert hub.repository(REPO).commits.keys() == {hub.repository(REPO).branches["main"]}


def test_the_token_stays_at_its_origin(hub: LoopbackHub, cache: Path) -> None:
    hub.create(REPO, {"delta.safetensors": WEIGHTS}, private=True)
    hf.hf_hub_download(REPO, "delta.safetensors", endpoint=hub.url, token=hub.token, cache_dir=cache)
    assert [(c.method, c.origin, c.account, c.status) for c in hub.log] == [
        ("HEAD", "hub", "tester", 302),
        ("GET", "cdn", None, 200),
    ]
    path = hub.log[-1].path
    request = urllib.request.Request(hub.cdn_url + path, headers={"Authorization": f"Bearer {hub.token}"})
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(request)
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(hub.url + path)


def test_ranges(hub: LoopbackHub) -> None:
    hub.create(REPO, {"w.bin": WEIGHTS})
    for spec, want in {"bytes=3-9": WEIGHTS[3:10], "bytes=1048570-": WEIGHTS[-6:], "bytes=-4": WEIGHTS[-4:]}.items():
        request = urllib.request.Request(f"{hub.url}/{REPO}/resolve/main/w.bin", headers={"Range": spec})
        with urllib.request.urlopen(request) as answer:
            assert (answer.status, answer.read()) == (206, want)


# ---- misbehaviour


def download(hub: LoopbackHub, cache: Path, name: str = "w.bin") -> bytes:
    return Path(hf.hf_hub_download(REPO, name, endpoint=hub.url, token=hub.token, cache_dir=cache)).read_bytes()


def test_a_flipped_byte_is_not_noticed_by_the_client(hub: LoopbackHub, cache: Path) -> None:
    """The reason why DeltaHub hashes everything itself."""
    hub.create(REPO, {"w.bin": WEIGHTS})
    with hub.fault("/cdn/*", flip=70_000) as fault:
        got = download(hub, cache)
    assert fault.hits == 1
    assert [n for n in range(len(got)) if got[n] != WEIGHTS[n]] == [70_000]


def test_a_cut_answer_is_resumed(hub: LoopbackHub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    weights = WEIGHTS * 12  # the client keeps what it got in steps of 10 MB
    hub.create(REPO, {"w.bin": weights})
    with hub.fault("/cdn/*", cut=500_000, times=1):
        assert download(hub, cache) == weights
    assert [c.status for c in hub.log if c.origin == "cdn"] == [200, 206]


def test_a_shortened_file_is_refused_by_the_client(hub: LoopbackHub, cache: Path) -> None:
    hub.create(REPO, {"w.bin": WEIGHTS})
    with hub.fault("/cdn/*", shorten=1), pytest.raises(OSError, match="Consistency check failed"):
        download(hub, cache)


def test_endless_and_slow_answers(hub: LoopbackHub) -> None:
    hub.create(REPO, {"a.txt": b"abc"})
    url = f"{hub.url}/{REPO}/resolve/main/a.txt"
    with hub.fault("*/a.txt", pad=1000), urllib.request.urlopen(url) as answer:
        assert answer.headers["Content-Length"] is None
        assert answer.read() == b"abc" + bytes(1000)
    with hub.fault("*/a.txt", delay=5), pytest.raises(TimeoutError):
        urllib.request.urlopen(url, timeout=0.2)


def test_refusals_and_altered_headers(hub: LoopbackHub) -> None:
    repository = hub.create(REPO, {"a.txt": b"1"})
    api = client(hub)
    with hub.fault("/api/models/*", status=429, headers={"Retry-After": "7"}, times=1, skip=1, message="slow down"):
        assert api.model_info(REPO).sha == repository.branches["main"]
        with pytest.raises(errors.HfHubHTTPError, match="slow down") as caught:
            api.model_info(REPO)
        assert caught.value.response.headers["Retry-After"] == "7"
        assert api.model_info(REPO).sha == repository.branches["main"]
    with hub.fault("*/resolve/*", method="HEAD", headers={"ETag": '"../x"', "X-Repo-Commit": ""}):
        metadata = hf.get_hf_file_metadata(f"{hub.url}/{REPO}/resolve/main/a.txt")
    assert (metadata.etag, metadata.commit_hash) == ("../x", None)


def test_a_branch_that_moves_between_two_requests(hub: LoopbackHub) -> None:
    repository = hub.create(REPO, {"a.txt": b"1"})
    before = repository.branches["main"]
    with hub.fault("*/resolve/*", then=lambda: hub.commit(REPO, {"a.txt": b"2"}), times=1):
        metadata = hf.get_hf_file_metadata(f"{hub.url}/{REPO}/resolve/main/a.txt")
    assert metadata.commit_hash == repository.branches["main"] != before


# ---- Xet

_ROUND_TRIP = """
import sys, hashlib, pathlib, time, random
import huggingface_hub as hf
api, folder = hf.HfApi(), pathlib.Path(sys.argv[1])
r = random.Random(0)
files = {"random.safetensors": r.randbytes(3_000_000), "same.safetensors": bytes(2_000_000),
         "floats.safetensors": b"".join(r.randbytes(2) + b"\\x80\\x3f" for _ in range(300_000)), "delta.json": b"{}"}
for name, data in files.items():
    (folder / name).write_bytes(data)
api.create_repo("acme/xet")
ops = [hf.CommitOperationAdd(n, folder / n) for n in files]
api.create_commit("acme/xet", ops, commit_message="chunks")
got = hf.snapshot_download("acme/xet", cache_dir=folder / "cache")
for name, data in files.items():
    assert (pathlib.Path(got) / name).read_bytes() == data, name
"""


def test_xet_both_ways(tmp_path: Path) -> None:
    """In a process of its own: the Rust client keeps threads and a log."""
    pytest.importorskip("hf_xet")
    with serve_hub(tmp_path / "hub", xet=True) as hub:
        env = {**hub.environment(), "HF_HOME": str(tmp_path / "home"), "PATH": ""}
        subprocess.run([sys.executable, "-c", _ROUND_TRIP, str(tmp_path)], env=env, check=True, timeout=60)
        paths = [c.path for c in hub.log]
        tree = hub.repository("acme/xet").tree("main")
    assert sum(p.startswith("/xorb/") for p in paths) >= 3
    assert not any(p.startswith(("/cdn/", "/_lfs/")) for p in paths)
    assert all(tree[f"{name}.safetensors"].xet for name in ("random", "same", "floats"))
    assert tree["delta.json"].sha256 is None


def test_starts_quickly_and_stops(tmp_path: Path) -> None:
    start = time.monotonic()
    with serve_hub(tmp_path) as hub:
        assert json.load(urllib.request.urlopen(f"{hub.url}/api/models")) == []
    assert time.monotonic() - start < 3
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(hub.url, timeout=1)
