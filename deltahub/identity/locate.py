"""Which files of a folder are the backbone's weights."""

from __future__ import annotations

__all__ = ["Located", "Source", "weight_files"]

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deltahub.errors import IdentityError, printable
from deltahub.tensors import open_regular

_INDEX_BYTES = 64 << 20
_STEMS = ("model", "diffusion_pytorch_model", "open_clip_model", "open_clip_pytorch_model")
_PICKLES = ("pytorch_model", "diffusion_pytorch_model", "open_clip_pytorch_model")

Source = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Located:
    """The files, and what their index says lies where (tensor name to file name; empty without an index)."""

    files: tuple[Path, ...]
    index: Mapping[str, str] = field(default_factory=dict)


def weight_files(source: Source, *, allow_pickle: bool = False) -> Located:
    """The weight files of a folder, or the file or files that were given.

    A folder's index is followed; without one, the usual names are looked for, then a single
    safetensors file of any name. Pickles are only considered where nothing else is there.

    Raises:
        IdentityError: ``E_IDENTITY_NO_WEIGHTS``, ``E_IDENTITY_AMBIGUOUS``, ``E_IDENTITY_INDEX``, ``E_IDENTITY_PICKLE``.
    """
    if not isinstance(source, str | os.PathLike):
        return Located(files=tuple(_permitted(Path(path), allow_pickle=allow_pickle) for path in source))
    path = Path(source)
    if path.is_dir():
        path = path / _choose(path)
    if path.name.endswith(".index.json"):
        return _indexed(path, allow_pickle=allow_pickle)
    return Located(files=(_permitted(path, allow_pickle=allow_pickle),))


def _choose(folder: Path) -> str:
    try:
        names = {entry.name for entry in folder.iterdir()}
    except OSError as error:
        raise IdentityError("E_IDENTITY_NO_WEIGHTS", f"the folder cannot be read: {error}", where=folder) from None
    usual = [f"{stem}.safetensors{end}" for stem in _STEMS for end in (".index.json", "")]
    for name in usual:
        if name in names:
            return name
    for suffix in (".safetensors.index.json", ".safetensors"):
        found = sorted(name for name in names if name.endswith(suffix))
        if len(found) == 1:
            return found[0]
        if found:
            raise IdentityError(
                "E_IDENTITY_AMBIGUOUS",
                "the folder has several weight files and nothing says which belong together",
                where=folder,
                found=", ".join(found[:10]),
                hint="name the files",
            )
    for stem in _PICKLES:
        for name in (f"{stem}.bin.index.json", f"{stem}.bin"):
            if name in names:
                return name
    raise IdentityError("E_IDENTITY_NO_WEIGHTS", "there are no weights in this folder", where=folder)


def _permitted(path: Path, *, allow_pickle: bool) -> Path:
    if path.suffix in {".bin", ".pt", ".pth", ".ckpt"} and not allow_pickle:
        raise IdentityError(
            "E_IDENTITY_PICKLE",
            "these weights are a pickle",
            where=path,
            hint="use a copy in safetensors, or pass allow_pickle=True if you trust who made it",
        )
    return path


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key appears twice")
    return found


def _indexed(path: Path, *, allow_pickle: bool) -> Located:
    """The files of an index: plain names beside it, each of which must be there."""

    def fault(what: str, found: object = None) -> IdentityError:
        return IdentityError("E_IDENTITY_INDEX", what, where=path, found=None if found is None else printable(found))

    with open_regular(path) as file:
        raw = file.read(_INDEX_BYTES + 1) or b""
    if len(raw) > _INDEX_BYTES:
        raise fault(f"the index has more than {_INDEX_BYTES} bytes")
    try:
        index = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise fault(f"the index is not strict JSON: {error}") from None
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict) or not places:
        raise fault("the index has no weight_map")
    for name in places.values():
        if not isinstance(name, str) or Path(name).name != name or not name.isprintable() or set(name) & set("/\\:"):
            raise fault("the weight_map names something that is not a file beside it", name)
    files = tuple(_permitted(path.parent / name, allow_pickle=allow_pickle) for name in sorted(set(places.values())))
    for one in files:
        if not one.is_file():
            raise fault("the weight_map names a file that is not there", one.name)
    return Located(files=files, index=places)
