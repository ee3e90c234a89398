"""The same repository in other hands: storage modes of the real client, its command line, other processes, npm."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from deltahub.hub import pull, push
from deltahub.testing import LoopbackHub, serve_hub

Maker = Callable[..., Path]
REPO = "acme/delta"
NPM_PACKAGE = "@huggingface/hub@2.17.5"


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def environment(hub: LoopbackHub, home: Path, **more: str) -> dict[str, str]:
    base = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    return {**base, **hub.environment(), "HF_HOME": str(home), "HF_HUB_DISABLE_PROGRESS_BARS": "1", **more}


@pytest.fixture
def big(make_package: Maker) -> Path:
    """Two shards of 1 MB each."""
    return make_package("big", rank=64, size=2048, shards=2)


def test_multipart(tmp_path: Path, cache: Path, big: Path) -> None:
    with serve_hub(tmp_path / "hub", part_size=300_000) as hub:
        where: dict[str, Any] = {"endpoint": hub.url, "token": hub.token}
        push(big, REPO, **where)
        assert sum("/part/" in call.path for call in hub.log) == 8
        assert contents(pull(REPO, cache_dir=cache, **where).path) == contents(big)


_XET = """
import sys
from deltahub.errors import HubError
from deltahub.hub import pull, push
push(sys.argv[1], "acme/delta")
for attempt in range(2):
    try:
        print(pull("acme/delta", cache_dir=sys.argv[2]).path)
    except HubError as error:
        print(error.code)
"""


def test_xet(tmp_path: Path, big: Path) -> None:
    """With the chunked storage switched on; in another process, since the client reads that once."""
    pytest.importorskip("hf_xet")
    with serve_hub(tmp_path / "hub", xet=True) as hub, hub.fault("/xorb/*", flip=100_000, times=1):
        env = environment(hub, tmp_path / "home")
        command = [sys.executable, "-c", _XET, str(big), str(tmp_path / "cache")]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == 0, done.stderr[-2000:]
        paths = [call.path for call in hub.log]
    assert any(path.startswith("/_cas/v1/xorbs/") for path in paths)
    assert not any(path.startswith(("/_lfs/", "/cdn/")) for path in paths)
    # A flipped byte inside a chunk that does not compress is taken by the client, and not by us.
    first, second = done.stdout.split()
    assert first == "E_HUB_DIGEST"
    assert contents(Path(second)) == contents(big)


_PULL = """
import sys
from deltahub.hub import pull
found = pull("acme/delta", cache_dir=sys.argv[1])
print(found.path)
"""


@pytest.mark.slow
def test_several_processes_at_once(hub: LoopbackHub, tmp_path: Path, cache: Path, big: Path) -> None:
    push(big, REPO, endpoint=hub.url, token=hub.token)
    env = environment(hub, tmp_path / "home", HF_HUB_DISABLE_XET="1")

    def one(_: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", _PULL, str(cache)]
        return subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=120)

    with ThreadPoolExecutor(3) as pool:
        done = list(pool.map(one, range(3)))
    assert {run.returncode for run in done} == {0}, [run.stderr[-500:] for run in done]
    (path,) = {run.stdout.strip() for run in done}
    assert contents(Path(path)) == contents(big)
    assert not list(cache.rglob("*.incomplete"))


def test_several_threads_at_once(hub: LoopbackHub, cache: Path, big: Path) -> None:
    where: dict[str, Any] = {"endpoint": hub.url, "token": hub.token}
    push(big, REPO, **where)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: pull(REPO, cache_dir=cache, **where).path, range(8)))
    assert len(set(found)) == 1
    assert contents(found[0]) == contents(big)


@pytest.mark.slow
def test_the_hf_command_line(hub: LoopbackHub, tmp_path: Path, make_package: Maker) -> None:
    tool = Path(sys.executable).with_name("hf")
    if not tool.exists():
        pytest.skip("the hf command is not installed")
    folder = make_package()
    push(folder, REPO, endpoint=hub.url, token=hub.token)
    env = environment(hub, tmp_path / "home", HF_HUB_DISABLE_XET="1", NO_COLOR="1")

    def hf(*args: str, fails: bool = False) -> str:
        done = subprocess.run([tool, *args], env=env, capture_output=True, text=True, check=False, timeout=120)
        assert (done.returncode != 0) == fails, done.stdout + done.stderr
        return done.stdout

    assert REPO in hf("models", "ls", "--filter", "deltahub-kind-lora", "--quiet")
    target = tmp_path / "out"
    hf("download", REPO, "--local-dir", str(target))
    got = contents(target)
    assert contents(folder).items() <= got.items()
    assert contents(pull(target).path).items() >= contents(folder).items()  # a folder that hf made is a package
    hf("cache", "verify", REPO, "--local-dir", str(target))
    upload = tmp_path / "second"
    shutil.copytree(make_package("source", seed=3), upload)
    hf("upload", REPO, str(upload), ".", "--revision", "main")
    found = pull(REPO, endpoint=hub.url, token=hub.token, cache_dir=tmp_path / "cache")
    assert contents(found.path) == contents(upload)


# ---- the other official client

_NODE = """
import { createRepo, uploadFiles, listFiles, downloadFile, modelInfo } from "@huggingface/hub";
import { readFileSync, readdirSync } from "node:fs";
const [hubUrl, accessToken, read, write, folder] = process.argv.slice(2);
const common = { hubUrl, accessToken };
const files = {};
for await (const file of listFiles({ ...common, repo: read, recursive: true })) {
  if (file.type !== "file") continue;
  const blob = await downloadFile({ ...common, repo: read, path: file.path, xet: false });
  files[file.path] = Buffer.from(await blob.arrayBuffer()).toString("base64");
}
const info = await modelInfo({ ...common, name: read, additionalFields: ["tags", "library_name"] });
await createRepo({ ...common, repo: write });
await uploadFiles({ ...common, repo: write, useXet: false, files: readdirSync(folder).map((name) => (
  { path: name, content: new Blob([readFileSync(`${folder}/${name}`)]) })) });
console.log(JSON.stringify({ files, tags: info.tags, library: info.library_name }));
"""


@pytest.fixture(scope="session")
def node_project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        pytest.skip("node is not installed")
    folder = tmp_path_factory.mktemp("node")
    (folder / "package.json").write_text('{"type": "module"}')
    command = [npm, "install", "--no-audit", "--no-fund", "--silent", NPM_PACKAGE]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=120)
    except subprocess.TimeoutExpired:
        pytest.skip("npm does not answer")
    if done.returncode != 0:
        pytest.skip(f"{NPM_PACKAGE} cannot be installed: {done.stderr[-200:]}")
    (folder / "both_ways.mjs").write_text(_NODE)
    return folder


@pytest.mark.slow
def test_npm_reads_ours_and_we_read_what_it_writes(
    hub: LoopbackHub, node_project: Path, make_package: Maker, cache: Path
) -> None:
    import base64

    ours, theirs = make_package("ours"), make_package("theirs", seed=9)
    push(ours, REPO, endpoint=hub.url, token=hub.token)
    command = ["node", "both_ways.mjs", hub.url, hub.token, REPO, "tester/from-npm", str(theirs)]
    done = subprocess.run(command, cwd=node_project, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout)
    read = {path: base64.b64decode(data) for path, data in told["files"].items()}
    assert contents(ours).items() <= read.items()
    assert (told["library"], "deltahub-kind-lora" in told["tags"]) == ("deltahub", True)
    found = pull("tester/from-npm", endpoint=hub.url, token=hub.token, cache_dir=cache)
    assert contents(found.path) == contents(theirs)
