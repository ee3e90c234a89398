"""The files of a backbone: fetched at their commit and no more than needed; hostile names go nowhere."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from deltahub.backbones import BackboneFiles, build, describe, files_section, resolve
from deltahub.errors import BackboneError, TensorFileError
from deltahub.testing import LoopbackHub

REPO = "acme/tiny-bert"
BERT = {"class": "transformers.BertModel"}


@pytest.fixture
def published(hub: LoopbackHub, bert: Path) -> str:
    """A repository with a backbone among many other files; gives its commit."""
    files: dict[str, bytes | None] = {path.name: path.read_bytes() for path in bert.iterdir()}
    files |= dict.fromkeys(
        ["pytorch_model.bin", "onnx/model.onnx", "modeling_evil.py", "model.fp16.safetensors", "sub/model.safetensors"],
        b"x" * 100,
    )
    hub.create(REPO)
    return hub.commit(REPO, files)


def client(hub: LoopbackHub, cache: Path) -> dict[str, Any]:
    return {"endpoint": hub.url, "token": hub.token, "cache_dir": cache}


def code_of(source: dict[str, Any] | None, **options: Any) -> str:
    with pytest.raises(BackboneError) as caught:
        resolve(source, **options)
    return caught.value.code


def test_fetch(hub: LoopbackHub, published: str, bert: Path, cache: Path) -> None:
    source = {"hub": REPO, "commit": published, **BERT}
    files = resolve(source, **client(hub, cache))
    assert (files.hub, files.commit) == (REPO, published)
    assert [p.name for p in files.files] == ["model.safetensors"]
    assert {p.name for p in files.folder.rglob("*")} == {"config.json", "model.safetensors"}
    model = build(source, files).model
    assert describe(model) == source
    theirs = build(BERT, resolve(BERT, override=bert)).model
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), theirs.parameters(), strict=True))
    # A second time, nobody is asked.
    assert resolve(source, endpoint="http://127.0.0.1:1", cache_dir=cache, local_files_only=True) == files


def test_override_by_repository(hub: LoopbackHub, published: str, cache: Path) -> None:
    for override in (REPO, f"{REPO}@main", f"{REPO}@{published}"):
        assert resolve(BERT, override=override, **client(hub, cache)).commit == published


def test_subfolder(hub: LoopbackHub, bert: Path, cache: Path) -> None:
    hub.create("acme/pipe")
    commit = hub.commit("acme/pipe", {f"text/{p.name}": p.read_bytes() for p in bert.iterdir()})
    source = {"hub": "acme/pipe", "commit": commit, "subfolder": "text", **BERT}
    files = resolve(source, **client(hub, cache))
    assert files.folder.name == "text"
    assert describe(build(source, files).model) == source


def test_the_hub_says_no(hub: LoopbackHub, published: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = client(hub, cache)
    assert code_of({"hub": "acme/none", "commit": published}, **options) == "E_BACKBONE_NOT_FOUND"
    assert code_of({"hub": REPO, "commit": "0" * 40}, **options) == "E_BACKBONE_NOT_FOUND"
    with hub.fault("*", status=403):
        assert code_of({"hub": REPO, "commit": published}, **options) == "E_BACKBONE_FETCH"
    assert code_of({"hub": REPO, "commit": published}, local_files_only=True, **options) == "E_BACKBONE_OFFLINE"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert code_of({"hub": REPO, "commit": published}, **options) == "E_BACKBONE_OFFLINE"


def test_gated(hub: LoopbackHub, cache: Path) -> None:
    commit = hub.create("acme/gated", {"config.json": b"{}"}, gated=True).branches["main"]
    options = {**client(hub, cache), "token": False}
    assert code_of({"hub": "acme/gated", "commit": commit, **BERT}, **options) == "E_BACKBONE_GATED"


def test_no_weights_on_the_hub(hub: LoopbackHub, cache: Path) -> None:
    hub.create("acme/empty")
    commit = hub.commit("acme/empty", {"config.json": b"{}"})
    assert code_of({"hub": "acme/empty", "commit": commit, **BERT}, **client(hub, cache)) == "E_BACKBONE_WEIGHTS"


@pytest.mark.parametrize(
    "name",
    [
        "/etc", "../x", "./x", "~/x", "a/b/c", "https://example.com/x", "C:\\x", "x\0y", "org/na me", "", "org/..",
        "org/a--b", "org/x.git", "a" * 97, 7, None,
    ],
)  # fmt: skip
def test_a_manifest_s_repository_is_a_repository(name: object) -> None:
    assert code_of({"hub": name, "commit": "0" * 40, **BERT}) == "E_BACKBONE_SOURCE"


def test_a_manifest_s_repository_is_never_a_path(
    bert: Path, monkeypatch: pytest.MonkeyPatch, cache: Path, hub: LoopbackHub
) -> None:
    """Even where a folder of that name is at hand."""
    (bert.parent / "org").mkdir()
    bert.rename(bert.parent / "org" / "name")
    monkeypatch.chdir(bert.parent)
    source = {"hub": "org/name", "commit": "0" * 40, **BERT}
    assert code_of(source, **client(hub, cache)) == "E_BACKBONE_NOT_FOUND"
    assert resolve(BERT, override="org/name").folder == Path("org/name")  # the caller's own word is another matter


@pytest.mark.parametrize("commit", [None, "main", "0" * 39, "0" * 41, "A" * 40, "refs/pr/1", 5])
def test_a_commit_is_a_commit(commit: object) -> None:
    assert code_of({"hub": REPO, "commit": commit}) == "E_BACKBONE_SOURCE"


@pytest.mark.parametrize("subfolder", ["..", "/x", "a/../b", "a//b", "a\\b", ".hidden", "x.", 3, "a/"])
def test_a_subfolder_is_plain(bert: Path, subfolder: object) -> None:
    assert code_of({"subfolder": subfolder}, override=bert) == "E_BACKBONE_SOURCE"


def test_no_source_at_all() -> None:
    assert code_of(None) == "E_BACKBONE_SOURCE"
    assert code_of({}) == "E_BACKBONE_SOURCE"


def test_missing_folder(tmp_path: Path) -> None:
    assert code_of(BERT, override=tmp_path / "none") == "E_BACKBONE_NOT_FOUND"
    assert code_of(BERT, override="./none") == "E_BACKBONE_NOT_FOUND"


def test_files_section(bert: Path) -> None:
    data = (bert / "model.safetensors").read_bytes()
    expected = [{"path": "model.safetensors", "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}]
    assert files_section(resolve(BERT, override=bert)) == expected


@pytest.mark.parametrize(
    "names", [["../x.safetensors"], ["/etc/passwd"], ["a/b.safetensors"], ["x.bin"], [3], [], ["..safetensors"]]
)
def test_an_index_names_files_beside_it(bert: Path, names: list[object]) -> None:
    (bert / "model.safetensors").unlink()
    index = {"weight_map": {f"t{i}": name for i, name in enumerate(names)}}
    (bert / "model.safetensors.index.json").write_text(json.dumps(index))
    assert code_of(BERT, override=bert) == "E_BACKBONE_INDEX"


def test_an_index_that_names_a_missing_file(bert: Path) -> None:
    (bert / "model.safetensors").unlink()
    (bert / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')
    with pytest.raises(TensorFileError) as caught:
        resolve(BERT, override=bert)
    assert caught.value.code == "E_TENSORS_MISSING"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
def test_a_fifo_does_not_hang(bert: Path) -> None:
    (bert / "model.safetensors").unlink()
    os.mkfifo(bert / "model.safetensors")
    with pytest.raises(TensorFileError) as caught:
        resolve(BERT, override=bert)
    assert caught.value.code == "E_TENSORS_NOT_REGULAR"


def test_a_snapshot_s_links_stay_in_the_cache(hub: LoopbackHub, published: str, bert: Path, cache: Path) -> None:
    source = {"hub": REPO, "commit": published, **BERT}
    files = resolve(source, **client(hub, cache))
    files.files[0].unlink()
    files.files[0].symlink_to(bert / "model.safetensors")
    assert code_of(source, local_files_only=True, **client(hub, cache)) == "E_BACKBONE_FILE"


def test_sentence_transformers_layouts(bert: Path, tmp_path: Path) -> None:
    """The transformer of an old layout lies in a folder of its own; modules.json says which."""
    outer = tmp_path / "sentences"
    outer.mkdir()
    bert.rename(outer / "0_Transformer")
    (outer / "modules.json").write_text('[{"idx": 0, "path": "0_Transformer", "type": "x"}]')
    files = resolve(BERT, override=outer)
    assert files.folder == outer / "0_Transformer"
    (outer / "modules.json").write_text('[{"idx": 0, "path": "../bert", "type": "x"}]')
    assert code_of(BERT, override=outer) == "E_BACKBONE_SOURCE"


def test_a_backbone_files_is_plain_data(bert: Path) -> None:
    files = resolve(BERT, override=bert)
    assert files == BackboneFiles(folder=bert, files=(bert / "model.safetensors",))
