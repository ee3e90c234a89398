"""The readers of four benchmarks, each on a small folder laid out as it was published."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from deltahub.errors import UsageError
from deltahub.recipes.pairs import READERS, read


def image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\x89PNG")


def spot(folder: Path) -> None:
    rows = [
        {"img_id": "7", "sentences": ["a car  left ", "", "two people came"]},
        {"img_id": "8", "sentences": ["its images are not there"]},
        {"img_id": "9", "sentences": [""]},
    ]
    (folder / "annotations").mkdir()
    (folder / "annotations" / "train.json").write_text(json.dumps(rows))
    for name in ("7.png", "7_2.png", "9.png", "9_2.png"):
        image(folder / "resized_images" / name)


def editing(folder: Path) -> None:
    rows = [{"uid": "u1", "img0": "a.jpg", "img1": "b.jpg", "sents": ["brighten the sky"]}]
    (folder / "train.json").write_text(json.dumps(rows))
    image(folder / "images" / "a.jpg")
    image(folder / "images" / "b.jpg")


def birds(folder: Path) -> None:
    head = "img1ObservationURL img1ImgURL img1Species img1Selection img2ObservationURL img2ImgURL img2Species "
    head += "img2Selection split annN description"
    first, second = (f"https://static.inaturalist.org/photos/{n}/large.JPG?1444" for n in (647514, 5595152))
    rows = [
        ["o", first, "s", "base", "o", second, "s", "visual", split, str(n), f'animal1 is "brown" {n}']
        for split, n in (("train", 1), ("train", 2), ("test", 1))
    ]
    table = "\n".join("\t".join(row) for row in [head.split(), *rows])
    (folder / "birds-to-words-v1.0.tsv").write_text(table)
    image(folder / "images" / "647514.jpg")
    image(folder / "images" / "5595152.jpg")


def clevr(folder: Path) -> None:
    name = "CLEVR_default_000012.png"
    (folder / "change_captions.json").write_text(json.dumps({name: ["the cube moved", "the block moved"]}))
    (folder / "no_change_captions.json").write_text(json.dumps({name: ["the scene is the same"]}))
    (folder / "splits.json").write_text(json.dumps({"train": [12], "test": []}))
    (folder / "type_mapping.json").write_text(json.dumps({"move": [name]}))
    image(folder / "images" / name)
    image(folder / "sc_images" / "CLEVR_semantic_000012.png")
    image(folder / "nsc_images" / "CLEVR_nonsemantic_000012.png")


MAKERS: dict[str, Callable[[Path], None]] = {
    "spot-the-diff": spot,
    "image-editing-request": editing,
    "birds-to-words": birds,
    "clevr-change": clevr,
}
EXPECTED = {
    "spot-the-diff": [("7", ("a car left", "two people came"), "")],
    "image-editing-request": [("u1", ("brighten the sky",), "")],
    "birds-to-words": [("647514.jpg/5595152.jpg", ('animal1 is "brown" 1', 'animal1 is "brown" 2'), "")],
    "clevr-change": [
        ("000012/semantic", ("the cube moved", "the block moved"), "move"),
        ("000012/nonsemantic", ("the scene is the same",), "nothing"),
    ],
}


@pytest.mark.parametrize("name", READERS)
def test_as_published(name: str, tmp_path: Path) -> None:
    MAKERS[name](tmp_path)
    found = list(read(name, tmp_path, "train"))
    assert [(pair.name, pair.sentences, pair.change) for pair in found] == EXPECTED[name]
    assert all(pair.before.is_file() and pair.after.is_file() and pair.before != pair.after for pair in found)


@pytest.mark.parametrize("name", READERS)
def test_an_empty_folder(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        list(read(name, tmp_path, "train"))
    assert caught.value.code == "E_USAGE_DATA"
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    "row",
    [
        {"uid": "u", "img0": "../../secret.jpg", "img1": "b.jpg", "sents": ["x"]},
        {"uid": "u", "img0": "/etc/passwd", "img1": "b.jpg", "sents": ["x"]},
        {"uid": "u", "img1": "b.jpg", "sents": ["x"]},
        {"uid": "u", "img0": "a.jpg", "img1": "b.jpg", "sents": "x"},
        {"uid": "u", "img0": "a.jpg", "img1": "b.jpg", "sents": [1]},
        "no row",
    ],
)
def test_rows_that_are_not_as_published(row: object, tmp_path: Path) -> None:
    (tmp_path / "train.json").write_text(json.dumps([row]))
    with pytest.raises(UsageError) as caught:
        list(read("image-editing-request", tmp_path, "train"))
    assert caught.value.code == "E_USAGE_DATA"


def test_an_unknown_benchmark(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="spot-the-diff"):
        read("spot", tmp_path, "train")
