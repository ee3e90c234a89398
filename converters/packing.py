"""Packed packages: the transport form of a large exact delta.

A package that sets whole parameters (kind ``assign``) is exact and simple, and as large as what it sets. Most of that
follows from the backbone, which whoever uses the package has. A *packed* package is the same package with its tensor
files coded against the backbone:

    delta.json            the manifest of the package, byte for byte: its digests are those of the unpacked files
    packed.safetensors    U8 streams ``<number>/<plane>``, and one metadata entry ``packed`` that says what they are
    README.md, model.sig  as they are

Unpacking writes the listed files with the deterministic writer and compares their SHA-256 with the manifest, so a
packed package unpacks to exactly the signed bytes or not at all; on another backbone the digests differ. What comes
out is an ordinary package. Nothing in it, and no reader of packages, has to know that it ever was packed.

Tensors of two bytes with a counterpart of the same dtype and size in the backbone are coded by :mod:`.egd`, or as an
exclusive or where that is smaller; small ones together, since a stream has a price. All others, and those that would
grow, are split into byte planes.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deltahub.converters import egd
from deltahub.converters.base import Base
from deltahub.converters.packages import opened
from deltahub.converters.shards import new_folder
from deltahub.errors import ConverterError
from deltahub.tensors import DTYPES, TensorFile

if TYPE_CHECKING:
    from torch import nn

    from deltahub.manifest import Manifest
    from deltahub.package import Package

__all__ = ["PACKED", "Counterparts", "PackReport", "Piece", "base_of", "carry_rest", "gather_old", "pack", "packed"]

PACKED = "packed.safetensors"
_SMALL = 1 << 16
_BLOCK = 1 << 22
"""Elements of one stream: what coding holds at once is some ten times two bytes for each."""


@dataclass(frozen=True, kw_only=True)
class PackReport:
    """How far a package was packed.

    Attributes:
        folder: the packed package.
        before: bytes of its tensor files.
        after: bytes of ``packed.safetensors``.
        coded: elements that were coded against the backbone.
        bits: of the streams that hold them, per element.
        bound: bits per element that no code of this sort can go below, where it was asked for.
    """

    folder: Path
    before: int
    after: int
    coded: int
    bits: float
    bound: float | None


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Some elements of one tensor, flattened."""

    name: str
    start: int
    stop: int


def packed(path: str | os.PathLike[str]) -> bool:
    """Whether a folder is a packed package."""
    return (Path(path) / PACKED).is_file() and (Path(path) / "delta.json").is_file()


def _streams(sizes: Mapping[str, int]) -> Iterator[list[Piece]]:
    """What goes into one stream: small tensors together, large ones in blocks."""
    small: list[Piece] = []
    room = _BLOCK
    for name, size in sizes.items():
        if size >= _SMALL:
            for start in range(0, size, _BLOCK):
                yield [Piece(name=name, start=start, stop=min(size, start + _BLOCK))]
        elif size:
            if size > room:
                yield small
                small, room = [], _BLOCK
            small.append(Piece(name=name, start=0, stop=size))
            room -= size
    if small:
        yield small


class Counterparts:
    """The backbone's counterparts of a package's tensors, as flat bit patterns in canonical orientation."""

    def __init__(self, manifest: Manifest, base: Base) -> None:
        self.base = base
        self.paths = {f"{m.name}/{path}/": path for m in manifest.modules for path in m.paths}
        self._last: tuple[str, np.ndarray[Any, np.dtype[np.uint16]] | None] = ("", None)

    def words(self, name: str, dtype: str, shape: Sequence[int]) -> np.ndarray[Any, np.dtype[np.uint16]] | None:
        """``[n]`` words, or ``None`` where the backbone has nothing of this dtype and shape there."""
        if self._last[0] != name:
            self._last = (name, self._find(name, dtype, tuple(shape)))
        return self._last[1]

    def _find(self, name: str, dtype: str, shape: tuple[int, ...]) -> np.ndarray[Any, np.dtype[np.uint16]] | None:
        import torch

        from deltahub.tensors import dtype_name

        prefix, _, tensor = name.rpartition("/")
        path = self.paths.get(f"{prefix}/")
        if path is None or dtype not in egd.MANTISSA or tensor not in {"weight", "bias"}:
            return None
        old = self.base.weight(path) if tensor == "weight" else self.base.value(f"{path}.bias")
        if old is None or dtype_name(old.dtype) != dtype or tuple(old.shape) != shape:
            return None
        found: np.ndarray[Any, np.dtype[np.uint16]]
        found = old.contiguous().view(-1).view(torch.int16).numpy().view(np.uint16)
        return found


def pack(
    package: Package | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    backbone: nn.Module | str | os.PathLike[str],
    bound: bool = False,
    overwrite: bool = False,
) -> PackReport:
    """Write a package in its packed form.

    Args:
        package: an ordinary package.
        out: the new folder.
        backbone: what it was made for; read, never changed.
        bound: also work out how few bits per element could be reached at best, which takes as long as packing.
        overwrite: replace ``out``.

    Raises:
        ConverterError: ``E_PACK_LIBRARY``; ``E_MERGE_OUTPUT``.
    """
    from deltahub.tensors import write

    source = opened(package)
    base = base_of(source.manifest, backbone)
    names = [name for name in source.names if name not in _probe_names(source)]
    infos = {name: (source.info(name).dtype, source.info(name).shape) for name in names}
    old = Counterparts(source.manifest, base)
    table: list[dict[str, Any]] = []
    streams: dict[str, np.ndarray[Any, Any]] = {}
    coded, coded_bytes, least = 0, 0, 0.0
    try:
        by_dtype: dict[str, dict[str, int]] = {}
        for name, (dtype, shape) in infos.items():
            against = old.words(name, dtype, shape) is not None
            by_dtype.setdefault(dtype if against else f"{dtype} alone", {})[name] = math.prod(shape)
        for key, sizes in by_dtype.items():
            dtype = key.split()[0]
            for pieces in _streams(sizes):
                data = _gather(source, pieces, dtype)
                words = None if key != dtype else gather_old(old, pieces, infos)
                planes, codec = _encode(data, words, dtype)
                number = len(table)
                table.append({"codec": codec, "dtype": dtype, "parts": [[p.name, p.start, p.stop] for p in pieces]})
                for i, plane in enumerate(planes):
                    streams[f"{number}/{i}"] = np.frombuffer(plane, np.uint8)
                if codec != "planes" and words is not None:
                    coded += words.size
                    coded_bytes += sum(map(len, planes))
                    if bound:
                        least += words.size * egd.entropy(words, data.view(np.uint16), egd.MANTISSA[dtype])
    finally:
        base.close()
    files: dict[str, list[str]] = {}
    for entry in source.manifest.tensor_files:
        with TensorFile.open(source.path / entry.path) as file:
            files[entry.path] = list(file)
    note = json.dumps({"version": 1, "streams": table, "files": files}, sort_keys=True, separators=(",", ":"))
    with new_folder(out, overwrite=overwrite) as folder:
        digest = write(folder / PACKED, streams, metadata={"packed": note})
        carry_rest(source.path, folder, source.manifest)
    before = sum(entry.size for entry in source.manifest.tensor_files)
    return PackReport(
        folder=Path(out),
        before=before,
        after=digest.size,
        coded=coded,
        bits=coded_bytes * 8 / coded if coded else 0.0,
        bound=least / coded if bound and coded else None,
    )


def base_of(manifest: Manifest, backbone: nn.Module | str | os.PathLike[str]) -> Base:
    """The backbone, as the class and with the settings that a manifest names."""
    section = manifest.backbone.source
    settings = [one.model_dump() for one in manifest.settings or () if one.on == "config"]
    return Base.of(backbone, class_name=None if section is None else section.class_, settings=settings)


def _probe_names(source: Package) -> frozenset[str]:
    return frozenset(name for name in source.names if name.startswith(("inputs/", "outputs/")))


def _gather(source: Package, pieces: Sequence[Piece], dtype: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
    import torch

    width = DTYPES[dtype] // 8
    parts = []
    for piece in pieces:
        flat = source.tensor(piece.name).contiguous().view(-1).view(torch.uint8).numpy()
        parts.append(flat[piece.start * width : piece.stop * width])
    return parts[0].copy() if len(parts) == 1 else np.concatenate(parts)


def gather_old(
    old: Counterparts, pieces: Sequence[Piece], infos: Mapping[str, tuple[str, tuple[int, ...]]]
) -> np.ndarray[Any, np.dtype[np.uint16]]:
    """The backbone's counterparts of a stream's pieces, one after another.

    Raises:
        ConverterError: ``E_PACK_BACKBONE`` where it has none.
    """
    parts = []
    for piece in pieces:
        words = old.words(piece.name, *infos[piece.name])
        if words is None:
            raise ConverterError(
                "E_PACK_BACKBONE", "the backbone has no such tensor of this dtype and shape", where=piece.name
            )
        parts.append(words[piece.start : piece.stop])
    return np.concatenate(parts)


def _encode(
    data: np.ndarray[Any, np.dtype[np.uint8]], words: np.ndarray[Any, np.dtype[np.uint16]] | None, dtype: str
) -> tuple[list[bytes], str]:
    """The smallest of the codes.

    Sorting by the old exponent gains most where everything moved a little; where whole rows stayed as they were, their
    place says more, which an exclusive or keeps.
    """
    if words is None:
        return egd.encode_planes(data, max(1, DTYPES[dtype] // 8)), "planes"
    found = [(list(egd.encode(words, data.view(np.uint16), egd.MANTISSA[dtype])), "egd")]
    found.append((egd.encode_planes((data.view(np.uint16) ^ words).view(np.uint8), 2), "xor"))
    if min(sum(map(len, planes)) for planes, _ in found) > data.size * 0.72:  # the plain bytes are never below this
        found.append((egd.encode_planes(data, 2), "planes"))
    return min(found, key=lambda one: sum(map(len, one[0])))


def carry_rest(source: Path, folder: Path, manifest: Manifest) -> None:
    """The manifest, the probe, the card, the signature: as they are."""
    left_out = {entry.path for entry in manifest.tensor_files}
    listed = [entry.path for entry in manifest.files]
    for name in ["delta.json", "README.md", "model.sig", *(path for path in listed if path not in left_out)]:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
