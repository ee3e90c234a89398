"""A safetensors file as a mapping: mapped from the disk, or read whole and hashed."""

from __future__ import annotations

__all__ = ["MAX_BYTES", "TensorFile"]

import hashlib
import mmap
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from deltahub.errors import TensorFileError
from deltahub.tensors.dtypes import f8_table, nonfinite_pattern, numpy_dtype, torch_dtype
from deltahub.tensors.files import CHUNK, FileDigest, open_regular
from deltahub.tensors.header import MAX_HEADER, MAX_TENSORS, Header, TensorInfo, header_bytes, parse

if TYPE_CHECKING:
    from io import FileIO

    from torch import Tensor
    from torch import device as Device

MAX_BYTES = 64 << 30
_ALIGN = 64
_NORESERVE = 0x4000  # Linux's MAP_NORESERVE, which mmap names only from Python 3.13 on


class TensorFile(Mapping[str, TensorInfo]):
    """A safetensors file, checked whole before anything is handed out; a mapping from names to :class:`TensorInfo`.

    Attributes:
        path: where it was read from.
        size: bytes of the whole file.
        metadata: the header's ``__metadata__``.
        digest: size and SHA-256 of the very bytes in memory, after :meth:`read`; ``None`` after :meth:`open`.
    """

    __slots__ = ("_buffer", "_checked", "_entries", "_shift", "digest", "metadata", "path", "size")

    def __init__(
        self,
        *,
        path: Path,
        size: int,
        header: Header,
        buffer: memoryview,
        shift: int,
        digest: FileDigest | None,
    ) -> None:
        self.path = path
        self.size = size
        self._entries, self.metadata = header.entries, header.metadata
        self._buffer: memoryview | None = buffer
        self._shift = shift
        self._checked: set[str] = set()
        self.digest = digest

    @classmethod
    def open(
        cls, path: str | os.PathLike[str], *, max_header: int = MAX_HEADER, max_tensors: int = MAX_TENSORS
    ) -> Self:
        """Check the header and map the file; nothing else of it is read until a tensor is used.

        The mapping is private: writing to a tensor does not reach the file. Who truncates a mapped
        file kills its readers, so what is not trusted to stay still belongs in :meth:`read`.

        Raises:
            TensorFileError: the file is not a strict safetensors file, or cannot be mapped.
        """
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            raw = header_bytes(file, size, path, max_header)
            header = parse(raw[8:], size - len(raw), len(raw), path, max_tensors)
            try:
                mapped = _map(file.fileno())
            except (OSError, MemoryError, OverflowError) as error:
                raise TensorFileError("E_TENSORS_MEMORY", f"the file cannot be mapped: {error}", where=path) from None
        return cls(path=Path(path), size=size, header=header, buffer=memoryview(mapped), shift=0, digest=None)

    @classmethod
    def read(
        cls,
        path: str | os.PathLike[str],
        *,
        size: int | None = None,
        sha256: str | None = None,
        max_header: int = MAX_HEADER,
        max_tensors: int = MAX_TENSORS,
        max_bytes: int = MAX_BYTES,
        stamp: Sequence[object] | None = None,
    ) -> Self:
        """Read the file into memory once, hash it, check it.

        Args:
            path: the file.
            size: bytes it must have; checked before anything is read.
            sha256: lower-case hex that its bytes must hash to.
            max_header: bytes of header at most.
            max_tensors: tensors at most.
            max_bytes: bytes of file at most.
            stamp: device, inode, size, modification and change time (in ns) of the file when it was last hashed and
                was the one that ``sha256`` says; while they are the same, before and after reading, it is not hashed.

        Raises:
            TensorFileError: as :meth:`open`, and ``E_TENSORS_SIZE``, ``E_TENSORS_TOO_LARGE``, ``E_TENSORS_SHA256``,
                ``E_TENSORS_CHANGED``.
        """
        with open_regular(path) as file:
            actual = os.fstat(file.fileno()).st_size
            stamped = sha256 is not None and stamp is not None and _stamp(file) == (*stamp,)
            if size is not None and actual != size:
                raise TensorFileError(
                    "E_TENSORS_SIZE", "the file has not the declared size", where=path, expected=size, found=actual
                )
            if actual > max_bytes:
                raise TensorFileError(
                    "E_TENSORS_TOO_LARGE",
                    "too large to read",
                    where=path,
                    expected=f"at most {max_bytes}",
                    found=actual,
                )
            raw = header_bytes(file, actual, path, max_header)
            # With a digest to hold it against, an altered header is best reported as that, so parsing waits.
            header = None if sha256 else parse(raw[8:], actual - len(raw), len(raw), path, max_tensors)
            body, found = _body(file, actual - len(raw), None if stamped else hashlib.sha256(raw), path)
            if stamped and stamp is not None and _stamp(file) != (*stamp,):
                raise TensorFileError("E_TENSORS_CHANGED", "the file changed while it was read", where=path)
            found = sha256 or "" if stamped else found
        if sha256 is not None and found != sha256:
            raise TensorFileError(
                "E_TENSORS_SHA256",
                "the file is not the declared one",
                where=path,
                expected=sha256,
                found=found,
                hint="download it again; if it stays so, do not use it",
            )
        header = header or parse(raw[8:], actual - len(raw), len(raw), path, max_tensors)
        digest = FileDigest(path=Path(path), size=actual, sha256=found)
        return cls(path=Path(path), size=actual, header=header, buffer=body, shift=len(raw), digest=digest)

    def __getitem__(self, name: str) -> TensorInfo:
        dtype, shape, begin, end = self._entries[name]
        return TensorInfo(dtype=dtype, shape=shape, begin=begin, end=end)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the bytes; tensors and arrays that were handed out keep theirs."""
        self._buffer = None

    def data(self, name: str) -> memoryview:
        """The bytes of a tensor, little-endian and in C order, not copied.

        Raises:
            TensorFileError: ``E_TENSORS_UNKNOWN``, ``E_TENSORS_CLOSED``, ``E_TENSORS_BOOL`` (a byte not 0 or 1).
        """
        entry = self._entries.get(name)
        if entry is None:
            raise TensorFileError("E_TENSORS_UNKNOWN", "the file has no such tensor", where=self.path, found=name)
        if self._buffer is None:
            raise TensorFileError("E_TENSORS_CLOSED", "the file was closed", where=self.path)
        view = self._buffer[entry[2] - self._shift : entry[3] - self._shift]
        if entry[0] == "BOOL" and name not in self._checked:
            if view.nbytes and int(np.frombuffer(view, "u1").max()) > 1:
                raise TensorFileError("E_TENSORS_BOOL", f"{name}: a boolean that is neither 0 nor 1", where=self.path)
            self._checked.add(name)
        return view

    def numpy(self, name: str) -> np.ndarray[Any, Any]:
        """A tensor as an array: not copied where NumPy has the dtype, else (BF16, F8) widened to float32.

        Raises:
            TensorFileError: as :meth:`data`; ``E_TENSORS_DTYPE`` for F4 and F6.
        """
        view = self.data(name)
        dtype, shape, _, _ = self._entries[name]
        own = numpy_dtype(dtype)
        if own is not None:
            array: np.ndarray[Any, Any] = np.frombuffer(view, own)
            return array.reshape(shape)
        if dtype == "BF16":
            wide: np.ndarray[Any, Any] = (np.frombuffer(view, "<u2").astype("<u4") << 16).view("<f4")
            return wide.reshape(shape)
        table = f8_table(dtype)
        if table is not None:
            looked_up: np.ndarray[Any, Any] = table[np.frombuffer(view, "u1")]
            return looked_up.reshape(shape)
        raise TensorFileError("E_TENSORS_DTYPE", f"{name}: NumPy has no such dtype", where=self.path, found=dtype)

    def torch(self, name: str, device: Device | str | None = None) -> Tensor:
        """A tensor as torch's, over the bytes of this file where they are aligned; writable, with a storage of its own.

        ``F4`` comes as ``float4_e2m1fn_x2`` with the last dimension halved.

        Raises:
            TensorFileError: as :meth:`data`; ``E_TENSORS_DTYPE`` where torch has no such dtype.
        """
        import torch

        view = self.data(name)
        dtype, shape, begin, _ = self._entries[name]
        kind = torch_dtype(dtype)
        if dtype == "F4":
            if not shape or shape[-1] % 2:
                raise TensorFileError("E_TENSORS_DTYPE", f"{name}: torch has F4 in pairs", where=self.path, found=shape)
            shape = (*shape[:-1], shape[-1] // 2)
        if not view.nbytes:
            tensor = torch.empty(shape, dtype=kind)
        else:
            if (begin - self._shift) % kind.itemsize:
                view = memoryview(bytearray(view))
            tensor = torch.frombuffer(view, dtype=kind).view(shape)
        return tensor if device is None else tensor.to(device)

    def tensors(self, device: Device | str | None = None) -> dict[str, Tensor]:
        """All tensors of the file, as :meth:`torch` gives them."""
        return {name: self.torch(name, device) for name in self._entries}

    def finite(self, name: str) -> bool:
        """Whether a tensor is free of NaN and infinities; what is not a float is."""
        view = self.data(name)
        dtype = self._entries[name][0]
        pattern = nonfinite_pattern(dtype)
        if pattern is None:
            return True
        if dtype in {"F32", "F64"}:
            # A finite sum says so at the speed of memory; one that is not may be a mere overflow, and is looked into.
            with np.errstate(all="ignore"):
                if np.isfinite(np.add.reduce(np.frombuffer(view, numpy_dtype(dtype)))):
                    return True
        unsigned, mask, bits = pattern
        # In pieces, for a mask over the whole of a large tensor would double the memory it takes.
        return not any(
            bool(((np.frombuffer(view[at : at + CHUNK], unsigned) & mask) == bits).any())
            for at in range(0, view.nbytes, CHUNK)
        )


def _stamp(file: FileIO) -> tuple[object, ...]:
    found = os.fstat(file.fileno())
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _map(descriptor: int) -> mmap.mmap:
    """A private, writable map: tensors over it do not warn, and what is written to them stays in this process.

    Without a reservation of memory, for else a map of more than the machine has is refused though nothing is touched.
    """
    if hasattr(mmap, "MAP_PRIVATE"):
        flags = mmap.MAP_PRIVATE | (_NORESERVE if sys.platform == "linux" else 0)
        return mmap.mmap(descriptor, 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    return mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY)


def _body(
    file: FileIO, size: int, digest: hashlib._Hash | None, path: str | os.PathLike[str]
) -> tuple[memoryview, str]:
    """Read ``size`` bytes, to the very end of the file, into memory aligned for every dtype; hash them too."""
    try:
        # np.empty, for a bytearray is filled with zeros first.
        slab = np.empty(size + _ALIGN, dtype=np.uint8)
    except (MemoryError, ValueError) as error:
        raise TensorFileError("E_TENSORS_MEMORY", f"no memory for the file: {error}", where=path) from None
    skip = -slab.ctypes.data % _ALIGN
    body = memoryview(slab.data)[skip : skip + size]
    at = 0
    try:
        # Read and hashed in pieces, so that each is still in the processor's cache when it is hashed.
        while got := file.readinto(body[at : at + CHUNK]) if at < size else 0:
            if digest is not None:
                digest.update(body[at : at + got])
            at += got
        more = file.read(1)
    except OSError as error:
        raise TensorFileError("E_TENSORS_UNREADABLE", f"the file cannot be read: {error}", where=path) from None
    if at != size or more:
        raise TensorFileError("E_TENSORS_CHANGED", "the file changed its size while it was read", where=path)
    return body, "" if digest is None else digest.hexdigest()
