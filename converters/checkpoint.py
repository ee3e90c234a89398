"""A checkpoint folder as one mapping of tensors, read in pieces and never mapped into memory whole.

Bytes are fetched with positioned reads, so what a merge holds is the block it works on, not the pages it has passed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import numpy as np

from deltahub.errors import ConverterError
from deltahub.tensors import TensorFile, TensorInfo, open_regular, torch_dtype

if TYPE_CHECKING:
    from io import FileIO

    import torch

__all__ = ["Checkpoint", "Stored"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Stored:
    """A tensor of a checkpoint: which of its files it lies in, and where there."""

    file: int
    info: TensorInfo

    @property
    def nbytes(self) -> int:
        return self.info.end - self.info.begin


class Checkpoint(Mapping[str, Stored]):
    """The tensors of one or several safetensors files, by name.

    Attributes:
        paths: the files, in the order given.
        metadata: the metadata of each.
        headers: the tensors of each, in the order of its header.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = tuple(paths)
        self.metadata: list[dict[str, str]] = []
        self.headers: list[dict[str, TensorInfo]] = []
        self._tensors: dict[str, Stored] = {}
        self._open: list[FileIO] = []
        self._starts: list[int] = []
        try:
            for number, path in enumerate(self.paths):
                self._add(number, path)
        except BaseException:
            self.close()
            raise

    def _add(self, number: int, path: Path) -> None:
        with TensorFile.open(path) as file:
            header = dict(file)
            self.metadata.append(dict(file.metadata))
            size = file.size
        self.headers.append(header)
        self._starts.append(min((info.begin for info in header.values()), default=size))
        for name, info in header.items():
            if name in self._tensors:
                raise ConverterError(
                    "E_MERGE_CHECKPOINT",
                    "two files of the checkpoint hold a tensor of the same name",
                    where=path,
                    found=name,
                )
            self._tensors[name] = Stored(file=number, info=info)
        self._open.append(open_regular(path))

    def __getitem__(self, name: str) -> Stored:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        while self._open:
            self._open.pop().close()

    def descriptor(self, file: int) -> int:
        """The open descriptor of a file, for copying ranges of it."""
        return self._open[file].fileno()

    def header_length(self, file: int) -> int:
        """Bytes of a file before its first tensor."""
        return self._starts[file]

    def read(self, file: int, begin: int, size: int) -> memoryview:
        """Some bytes of a file, in memory of their own.

        Raises:
            ConverterError: ``E_MERGE_CHECKPOINT`` if the file is shorter than it was when it was opened.
        """
        # np.empty and preadv, for a bytearray is filled with zeros first, and pread gives a copy of its own.
        view, at, descriptor = memoryview(np.empty(size, np.uint8).data), 0, self.descriptor(file)
        while at < size:
            piece = view[at : at + (1 << 24)]
            if hasattr(os, "preadv"):
                count = os.preadv(descriptor, [piece], begin + at)
            else:
                found = os.pread(descriptor, len(piece), begin + at)
                count = len(found)
                piece[:count] = found
            if not count:
                raise ConverterError("E_MERGE_CHECKPOINT", "the file was cut while it was read", where=self.paths[file])
            at += count
        return view

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows of a tensor as stored, in memory of its own; all of it by default. A scalar has no rows."""
        import torch

        stored = self._tensors[name]
        info = stored.info
        dtype = torch_dtype(info.dtype)
        if not info.shape:
            return torch.frombuffer(self.read(stored.file, info.begin, stored.nbytes), dtype=dtype).view(())
        stop = info.shape[0] if stop is None else stop
        shape = (stop - start, *info.shape[1:])
        if stored.nbytes == 0 or stop <= start:
            return torch.empty(shape, dtype=dtype)
        each = stored.nbytes // info.shape[0]
        data = self.read(stored.file, info.begin + start * each, (stop - start) * each)
        return torch.frombuffer(data, dtype=dtype).view(shape)
