"""Pairs of images with sentences about what differs: the files of four benchmarks, as they were published.

Nothing is downloaded: a reader is given the folder into which the data was unpacked. Paths that a file names are joined
to that folder and must stay inside it.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from deltahub.errors import UsageError

__all__ = ["READERS", "Pair", "birds_to_words", "clevr_change", "image_editing_request", "read", "spot_the_diff"]


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two images and what is said of their difference.

    Attributes:
        name: of the pair, within its benchmark.
        before: path of the first image.
        after: path of the second.
        sentences: references; at least one.
        change: its type, where the benchmark tells it.
    """

    name: str
    before: Path
    after: Path
    sentences: tuple[str, ...]
    change: str = ""


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError("E_USAGE_DATA", f"this file cannot be read: {error}", where=str(path)) from error


def _inside(folder: Path, name: object, where: Path) -> Path:
    path = folder / str(name)
    if not isinstance(name, str) or not path.resolve().is_relative_to(folder.resolve()):
        raise UsageError("E_USAGE_DATA", "an image outside the folder of the data", where=str(where), found=name)
    return path


def _field(row: Any, name: str, kind: type, where: Path) -> Any:
    value = row.get(name) if isinstance(row, Mapping) else None
    if not isinstance(value, kind):
        raise UsageError(
            "E_USAGE_DATA",
            f"a row without {name!r}",
            where=str(where),
            expected=kind.__name__,
            found=type(value).__name__,
        )
    return value


def _sentences(values: Any, where: Path) -> tuple[str, ...]:
    if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
        raise UsageError("E_USAGE_DATA", "sentences must be a list of texts", where=str(where), found=repr(values)[:80])
    return tuple(" ".join(v.split()) for v in values if v.strip())


def _kept(pair: Pair) -> bool:
    return bool(pair.sentences) and pair.before.is_file() and pair.after.is_file()


def spot_the_diff(folder: Path, split: str) -> Iterator[Pair]:
    """Spot-the-Diff (arXiv:1808.10584): ``annotations/{split}.json``, images in ``resized_images``.

    Pairs whose images are not there are left out, as some of the original images cannot be had any more.

    Args:
        folder: ``data`` of the published repository, with the images unpacked in it.
        split: ``train``, ``val`` or ``test``.

    Raises:
        UsageError: ``E_USAGE_DATA`` where a file is missing or not as published.
    """
    where = folder / "annotations" / f"{split}.json"
    images = folder / "resized_images"
    for row in _json(where):
        name = str(_field(row, "img_id", str, where))
        pair = Pair(
            name=name,
            before=_inside(images, f"{name}.png", where),
            after=_inside(images, f"{name}_2.png", where),
            sentences=_sentences(_field(row, "sentences", list, where), where),
        )
        if _kept(pair):
            yield pair


def image_editing_request(folder: Path, split: str) -> Iterator[Pair]:
    """Image-Editing-Request (arXiv:1906.07689): ``{split}.json``, images in ``images``.

    Args:
        folder: with the three files.
        split: ``train``, ``valid`` or ``test``.

    Raises:
        UsageError: ``E_USAGE_DATA`` where a file is missing or not as published.
    """
    where = folder / f"{split}.json"
    images = folder / "images"
    for row in _json(where):
        pair = Pair(
            name=str(_field(row, "uid", str, where)),
            before=_inside(images, _field(row, "img0", str, where), where),
            after=_inside(images, _field(row, "img1", str, where), where),
            sentences=_sentences(_field(row, "sents", list, where), where),
        )
        if _kept(pair):
            yield pair


def _photo(url: str) -> str:
    """The file that an iNaturalist photo is commonly kept as: number and extension, without the query."""
    parts = url.partition("?")[0].rstrip("/").split("/")
    return f"{parts[-2]}.{parts[-1].rpartition('.')[2]}".lower() if len(parts) > 1 else ""


def birds_to_words(folder: Path, split: str) -> Iterator[Pair]:
    """Birds-to-Words (arXiv:1909.04101): ``birds-to-words-v1.0.tsv``, images in ``images``.

    The table gives the URL of a photo, ``…/photos/647514/large.jpg``; the image is looked up as ``images/647514.jpg``.
    Descriptions of one pair by several writers are its references.

    Args:
        folder: with the table.
        split: ``train``, ``val`` or ``test``.

    Raises:
        UsageError: ``E_USAGE_DATA`` where the table is missing or not as published.
    """
    where = folder / "birds-to-words-v1.0.tsv"
    images = folder / "images"
    found: dict[tuple[str, str], list[str]] = {}
    try:
        with where.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE):
                first, second = (_field(row, name, str, where) for name in ("img1ImgURL", "img2ImgURL"))
                if _field(row, "split", str, where) == split:
                    found.setdefault((first, second), []).append(_field(row, "description", str, where))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError("E_USAGE_DATA", f"this file cannot be read: {error}", where=str(where)) from error
    for (first, second), texts in found.items():
        before, after = _photo(first), _photo(second)
        pair = Pair(
            name=f"{before}/{after}",
            before=_inside(images, before, where),
            after=_inside(images, after, where),
            sentences=_sentences(texts, where),
        )
        if _kept(pair):
            yield pair


def clevr_change(folder: Path, split: str) -> Iterator[Pair]:
    """CLEVR-Change (arXiv:1901.02527): captions, splits, and the images of scenes, changes and distractors.

    Each scene gives two pairs: with its change, and with a distractor where nothing but the view and the light changed.

    Args:
        folder: with ``change_captions.json``, ``no_change_captions.json``, ``splits.json`` and the folders of images.
        split: ``train``, ``val`` or ``test``.

    Raises:
        UsageError: ``E_USAGE_DATA`` where a file is missing or not as published.
    """
    changed, same, splits = (
        _json(folder / f"{name}.json") for name in ("change_captions", "no_change_captions", "splits")
    )
    types = _json(folder / "type_mapping.json") if (folder / "type_mapping.json").is_file() else {}
    by_name = {name: kind for kind, names in types.items() for name in names}
    for number in _field(splits, split, list, folder / "splits.json"):
        name = f"CLEVR_default_{int(number):06d}.png"
        before = folder / "images" / name
        for captions, place, kind in ((changed, "sc_images", "semantic"), (same, "nsc_images", "nonsemantic")):
            where = folder / ("change_captions.json" if kind == "semantic" else "no_change_captions.json")
            pair = Pair(
                name=f"{int(number):06d}/{kind}",
                before=before,
                after=folder / place / name.replace("default", kind),
                sentences=_sentences(captions.get(name, []), where),
                change=by_name.get(name, "change") if kind == "semantic" else "nothing",
            )
            if _kept(pair):
                yield pair


READERS: Mapping[str, Callable[[Path, str], Iterator[Pair]]] = MappingProxyType(
    {
        "spot-the-diff": spot_the_diff,
        "image-editing-request": image_editing_request,
        "birds-to-words": birds_to_words,
        "clevr-change": clevr_change,
    }
)
"""The benchmarks by name."""


def read(name: str, folder: Path, split: str) -> Iterator[Pair]:
    """Pairs of a benchmark.

    Args:
        name: one of :data:`READERS`.
        folder: into which its data was unpacked.
        split: as the benchmark calls it.

    Raises:
        UsageError: ``E_USAGE_DATA`` where the name is unknown, a file is missing or not as published.
    """
    if name not in READERS:
        raise UsageError("E_USAGE_DATA", "no such benchmark", found=name, expected=", ".join(READERS))
    return READERS[name](folder, split)
