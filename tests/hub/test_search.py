"""Deltas are found for the very backbone, by its roots."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deltahub.errors import DeltaHubError, HubError
from deltahub.hub import push, search
from deltahub.identity import from_files
from deltahub.tensors import write
from deltahub.testing import LoopbackHub

Maker = Callable[..., Path]


@pytest.fixture
def backbone(tmp_path: Path) -> Path:
    folder = tmp_path / "backbone"
    folder.mkdir()
    write(folder / "model.safetensors", {"a.weight": np.eye(8, dtype=np.float32), "b": np.ones(3, np.float32)})
    return folder


def with_backbone(folder: Path, roots: dict[str, str], name: str = "org/base") -> Path:
    """The same package for another backbone."""
    import json

    manifest = json.loads((folder / "delta.json").read_text())
    manifest["backbone"]["identity"].update(roots)
    manifest["backbone"]["source"]["hub"] = name
    (folder / "delta.json").write_text(json.dumps(manifest))
    return folder


def test_search(hub: LoopbackHub, make_package: Maker, backbone: Path) -> None:
    where: dict[str, Any] = {"endpoint": hub.url, "token": hub.token}
    identity = from_files(backbone)
    roots = {"exact": identity.exact, "bf16": identity.bf16, "structure": identity.structure}
    other = dict.fromkeys(roots, "0" * 64)
    push(with_backbone(make_package("a"), roots), "acme/same", **where)
    push(with_backbone(make_package("b"), {**roots, "exact": "1" * 64}), "acme/cast", **where)
    push(with_backbone(make_package("c"), {**other, "structure": identity.structure}), "acme/sibling", **where)
    push(with_backbone(make_package("d"), other, "org/other"), "beta/other", **where)
    hub.create("acme/stranger", {"README.md": b"---\ntags: [lora]\n---\n"})

    def found(**asked: Any) -> list[tuple[str, str | None]]:
        return [(hit.repo_id, hit.match) for hit in search(**asked, **where)]

    best_first = [("acme/same", "exact"), ("acme/cast", "bf16"), ("acme/sibling", "structure")]
    assert found(backbone=backbone) == best_first
    assert found(backbone=roots) == best_first
    assert found(backbone={"exact": identity.exact}) == best_first[:1]
    assert {name for name, _ in found()} == {"acme/same", "acme/cast", "acme/sibling", "beta/other"}
    assert found(author="beta") == [("beta/other", None)]
    assert found(text="cas") == [("acme/cast", None)]
    assert found(kind="lora", author="beta") == [("beta/other", None)]
    assert found(kind="adapter") == []
    assert len(found(limit=2)) == 2

    # A Hub id: by the headers of its files, without the weights, and by its name.
    hub.create("org/base", {"model.safetensors": (backbone / "model.safetensors").read_bytes()})
    hub.log.clear()
    assert found(backbone="org/base") == [
        ("acme/cast", "structure"),
        ("acme/same", "structure"),
        ("acme/sibling", "structure"),
    ]
    assert found(backbone="org/other") == [("beta/other", "name")]
    assert found(backbone="org/unheard-of") == []

    hit = search(backbone=roots, **where)[0]
    assert (hit.kinds, hit.base_model, hit.private) == (("lora",), "org/base", False)
    assert hit.commit == hub.repository("acme/same").branches["main"]


def test_search_by_a_live_module(hub: LoopbackHub, make_package: Maker) -> None:
    import torch

    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    from deltahub.identity import from_module

    identity = from_module(module)
    where: dict[str, Any] = {"endpoint": hub.url, "token": hub.token}
    push(with_backbone(make_package(), {"exact": identity.exact}), "acme/live", **where)
    assert [(hit.repo_id, hit.match) for hit in search(backbone=module, **where)] == [("acme/live", "exact")]


def test_search_that_fails(hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    where: dict[str, Any] = {"endpoint": hub.url, "token": hub.token}
    with pytest.raises(HubError, match="E_HUB_SEARCH"):
        search(backbone={}, **where)
    with pytest.raises(DeltaHubError):
        search(backbone=tmp_path, **where)  # an empty folder
    with hub.fault("/api/models", status=500), pytest.raises(HubError, match="E_HUB_SERVER"):
        search(**where)
    with pytest.raises(HubError, match="E_HUB_ENDPOINT"):
        search(endpoint="http://example.org")
