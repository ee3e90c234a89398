"""The card's picture: a cell for every place, the same bytes each time, text that stays text."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deltahub.hub import push, write_card
from deltahub.hub.plan import PICTURE, plan
from deltahub.manifest import Manifest
from deltahub.testing import LoopbackHub

Maker = Callable[..., Path]
SVG = "{http://www.w3.org/2000/svg}"


def manifest_of(folder: Path, modules: list[dict[str, Any]]) -> Manifest:
    document = json.loads((folder / "delta.json").read_text())
    shared = document["modules"][0]
    return Manifest.parse(json.dumps({**document, "modules": [{**shared, **module} for module in modules]}).encode())


def drawn(text: str) -> tuple[list[ET.Element], list[ET.Element], list[str]]:
    """Cells with something in them, empty ones, and all texts."""
    root = ET.fromstring(text)
    cells = root.findall(f"{SVG}rect")
    texts = [element.text or "" for element in root.iter(f"{SVG}text")]
    return [c for c in cells if c.get("class") == "at"], [c for c in cells if c.get("class") == "cell"], texts


def test_a_cell_for_every_place(make_package: Maker) -> None:
    manifest = manifest_of(
        make_package(),
        [
            {"name": "attention", "targets": ["encoder.layer.{0..11}.attention.{query,value}"]},
            {"name": "top", "kind": "bias", "config": {}, "targets": ["encoder.layer.{8..11}.attention.query"]},
            {"name": "head", "kind": "assign", "config": {}, "targets": ["classifier"]},
        ],
    )
    text = plan(manifest, {"attention": 1234, "head": 5})
    acting, empty, texts = drawn(text)
    assert len(acting) == 24 + 4 + 1 + 3  # the legend's own
    assert len(empty) == 0
    assert "encoder.layer: 12 layers" in texts
    assert {"attention.query", "attention.value", "classifier", "0", "11"} <= set(texts)
    assert "attention: lora at 24 places, 1,234 numbers" in texts
    assert "head: assign at 1 place, 5 numbers" in texts
    assert "<title>lora, bias, assign at 29 places of the backbone</title>" in text
    assert plan(manifest, {"attention": 1234, "head": 5}) == text
    assert len({cell.get("fill") for cell in acting}) == 3
    upper = manifest_of(make_package("upper"), [{"targets": ["h.{6..7}.attn"]}])
    assert len(drawn(plan(upper))[1]) == 6  # layers without anything are seen to be empty


@pytest.mark.parametrize(
    ("targets", "cells"),
    [
        (["layer.{0..199}.x"], 200),
        ([f"down.{n}.attentions.{k}.to_q" for n in range(3) for k in range(30)], 48 * 3 - 3 * 18),
        (["model.layers.99999.x"], 1),
        (["0.weight"], 1),
        (["x"], 1),
    ],
)
def test_it_stays_small(make_package: Maker, targets: list[str], cells: int) -> None:
    text = plan(manifest_of(make_package(), [{"targets": targets}]))
    acting, _, _ = drawn(text)
    assert len(acting) <= max(cells, 90) + 1
    size = re.search(r'width="(\d+)" height="(\d+)"', text)
    assert size
    assert all(int(side) < 1400 for side in size.groups())
    assert len(text) < 200_000


def test_names_are_text(make_package: Maker) -> None:
    hostile = "a<script>&x"
    text = plan(manifest_of(make_package(), [{"name": "m", "targets": [hostile]}]))
    assert "<script" not in text
    assert any("<script>&x" in t for t in drawn(text)[2])
    assert not re.search(r"(?:href|src|on\w+)=|url\(|@import", text)


def test_it_is_pushed_with_the_card(hub: LoopbackHub, make_package: Maker) -> None:
    where: dict[str, Any] = {"endpoint": hub.url, "token": hub.token}
    folder = make_package()
    push(folder, "acme/delta", **where)
    picture = hub.read("acme/delta", PICTURE).decode()
    assert "attention: lora at 2 places, 128 numbers" in picture
    assert f"]({PICTURE})" in hub.read("acme/delta", "README.md").decode()
    write_card(folder, "acme/delta")
    assert (folder / PICTURE).read_text() == picture
    assert push(folder, "acme/delta", **where).changed == ()
    assert push(make_package("plain", seed=2), "acme/plain", card=False, **where).changed == (
        "delta.json",
        "delta.safetensors",
    )
