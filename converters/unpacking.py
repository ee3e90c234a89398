"""Unpacking: a packed package becomes the package that it was made of, byte for byte, or an error."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deltahub.converters import egd
from deltahub.converters.base import Base
from deltahub.converters.packing import PACKED, Counterparts, Piece, base_of, carry_rest, gather_old
from deltahub.converters.shards import new_folder
from deltahub.errors import ConverterError
from deltahub.tensors import DTYPES, TensorFile

if TYPE_CHECKING:
    from torch import Tensor, nn

    from deltahub.manifest import Manifest
    from deltahub.package import Package

__all__ = ["unpack"]


def unpack(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    backbone: nn.Module | str | os.PathLike[str],
    overwrite: bool = False,
) -> Package:
    """Restore the package, byte for byte.

    Args:
        path: a packed package.
        out: the new folder.
        backbone: what it was made for.
        overwrite: replace ``out``.

    Raises:
        ConverterError: ``E_PACK_FORMAT``, ``E_PACK_STREAM``; ``E_PACK_BACKBONE`` where the digests do not come out.
    """
    from deltahub.limits import DEFAULT
    from deltahub.manifest import Manifest
    from deltahub.package import Package
    from deltahub.package.folder import read_manifest

    place = Path(path)
    # The caller named the folder, so its links may lead where they like; how much is read is bounded all the same.
    manifest = Manifest.parse(read_manifest(place, root=Path("/"), limits=DEFAULT), where=str(place / "delta.json"))
    base = base_of(manifest, backbone)
    try:
        with TensorFile.open(place / PACKED) as file, new_folder(out, overwrite=overwrite) as folder:
            note = _note(file)
            _restore(folder, note["files"], _Decoder(file, note, manifest, base), manifest)
            carry_rest(place, folder, manifest)
            Package.open(folder).close()
    finally:
        base.close()
    return Package.open(out)


def _note(file: TensorFile) -> dict[str, Any]:
    try:
        note = json.loads(file.metadata["packed"])
        fits = note["version"] == 1 and isinstance(note["streams"], list) and isinstance(note["files"], dict)
        parts = [(str(n), int(a), int(b)) for s in note["streams"] for n, a, b in s["parts"]]
        fits = fits and all(0 <= a < b for _, a, b in parts)
    except (KeyError, ValueError, TypeError, RecursionError):
        fits = False
    if not fits:
        raise ConverterError("E_PACK_FORMAT", "this is no packed package, or one of a later version", where=file.path)
    found: dict[str, Any] = note
    return found


class _Decoder:
    """The tensors of a packed file, each when it is asked for.

    How large each is follows from the kinds and the backbone, not from the file.
    """

    def __init__(self, file: TensorFile, note: Mapping[str, Any], manifest: Manifest, base: Base) -> None:
        self.file, self.streams = file, note["streams"]
        self.infos = _expected(manifest, base, note)
        self.old = Counterparts(manifest, base)
        self.places: dict[str, list[tuple[int, int, int, int]]] = {}
        """By name: number of the stream, byte there, first and last byte of the tensor."""
        for number, stream in enumerate(self.streams):
            at, width = 0, DTYPES.get(stream["dtype"], 0) // 8
            against = stream["codec"] in {"egd", "xor"} and stream["dtype"] in egd.MANTISSA
            if not against and stream["codec"] != "planes":
                raise ConverterError("E_PACK_FORMAT", "a stream has a code that is not known", where=file.path)
            for name, start, stop in stream["parts"]:
                if name not in self.infos or not width or self.infos[name][0] != stream["dtype"]:
                    raise ConverterError("E_PACK_FORMAT", "a stream is of no tensor of the package", where=file.path)
                if stop > math.prod(self.infos[name][1]):
                    raise ConverterError("E_PACK_FORMAT", "a stream is longer than its tensor", where=name)
                self.places.setdefault(name, []).append((number, at, start * width, stop * width))
                at += (stop - start) * width
        self._last: tuple[int, Any] = (-1, None)

    def tensor(self, name: str) -> Tensor:
        import torch

        from deltahub.tensors import torch_dtype

        dtype, shape = self.infos[name]
        whole = np.zeros(math.prod(shape) * DTYPES[dtype] // 8, np.uint8)
        for number, at, start, stop in self.places.get(name, ()):
            whole[start:stop] = self._stream(number)[at : at + stop - start]
        return torch.from_numpy(whole).view(torch_dtype(dtype)).view(shape)

    def _stream(self, number: int) -> Any:
        """A stream's bytes; the last one is kept, for small tensors share one."""
        if self._last[0] != number:
            stream = self.streams[number]
            pieces = [Piece(name=n, start=a, stop=b) for n, a, b in stream["parts"]]
            count = sum(piece.stop - piece.start for piece in pieces)
            width = DTYPES[stream["dtype"]] // 8
            planes = [self.file.data(f"{number}/{i}") for i in range(width)]
            if stream["codec"] == "egd":
                words = gather_old(self.old, pieces, self.infos)
                data = egd.decode(words, planes[0], planes[1], egd.MANTISSA[stream["dtype"]]).view(np.uint8)
            else:
                data = egd.decode_planes(planes, count * width)
                if stream["codec"] == "xor":
                    data = (data.view(np.uint16) ^ gather_old(self.old, pieces, self.infos)).view(np.uint8)
            self._last = (number, data)
        return self._last[1]


def _expected(manifest: Manifest, base: Base, note: Mapping[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape of every tensor: dtypes are those of the streams, shapes those of kind, config and host."""
    from deltahub.kinds import Registry
    from deltahub.places import Rows, fitted

    registry = Registry(manifest.kinds or ())
    dtypes = {name: stream["dtype"] for stream in note["streams"] for name, *_ in stream["parts"]}
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for module in manifest.modules:
        kind = registry.get(module.kind, module.version)
        rows = None if module.rows is None else Rows.of(module.rows.numbers)
        for path in module.paths:
            host = base.arch.host(path)
            stack = (host.stack,) if host.stack else ()
            shape = fitted(host.shape, rows, module.stack or 0, host.stack, path)
            for tensor, spec in kind.tensors(module.config, shape).items():
                name = f"{module.name}/{path}/{tensor}"
                if name in dtypes:
                    found[name] = (dtypes[name], (*stack, *spec.shape))
    return found


def _restore(folder: Path, files: Mapping[str, Any], decoder: _Decoder, manifest: Manifest) -> None:
    """Write the listed files, and compare each with its digest."""
    from deltahub.tensors import Pending, torch_dtype, write

    digests = {entry.path: entry.sha256 for entry in manifest.tensor_files}
    if set(files) != set(digests):
        raise ConverterError("E_PACK_FORMAT", "the packed files are not those of the manifest", found=list(files))
    for path, names in files.items():
        lost = [name for name in names if name not in decoder.infos]
        if lost:
            raise ConverterError("E_PACK_FORMAT", "a tensor is in no stream", where=lost[0])
        tensors = {
            name: Pending(
                dtype=torch_dtype(decoder.infos[name][0]),
                shape=decoder.infos[name][1],
                make=partial(decoder.tensor, name),
            )
            for name in names
        }
        found = write(folder / path, tensors)
        if found.sha256 != digests[path]:
            raise ConverterError(
                "E_PACK_BACKBONE",
                "what comes out is not what was packed",
                where=path,
                expected=digests[path],
                found=found.sha256,
                hint="this is not the backbone that it was packed against, or the file is damaged",
            )
