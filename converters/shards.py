"""Checkpoint files written in pieces: copied ranges where nothing changes, computed blocks where something does.

A file is laid out before any of its bytes exist, so each piece goes to its final place at once and what is held is
one block. Where a new file keeps the layout of an old one, everything between two changed tensors is copied by the
kernel (``copy_file_range``), which shares the blocks on file systems that can.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import shutil
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from deltahub.errors import ConverterError
from deltahub.tensors import DTYPES, TensorInfo
from deltahub.tensors.leftovers import held, sweep

if TYPE_CHECKING:
    import torch

__all__ = ["Layout", "Source", "copy_range", "layout", "new_folder", "put", "put_blocks", "write_shard"]

_PIECE = 8 << 20


class Source(Protocol):
    """Where the bytes of a new tensor come from."""

    def blocks(self) -> Iterator[torch.Tensor]:
        """The tensor in pieces of whole rows, in order, in the dtype in which it is stored."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """A safetensors file before it is written: its header's bytes, and where each tensor goes."""

    header: bytes
    tensors: Mapping[str, TensorInfo]
    size: int


def layout(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str], *, keep_order: bool = False
) -> Layout:
    """Lay out a file: by descending size of dtype and then by name, as every writer does, or in the order given.

    Args:
        tensors: dtype name and shape by name.
        metadata: strings to strings, sorted when written.
        keep_order: lay the tensors out in the order of the mapping.
    """
    names = list(tensors)
    if not keep_order:
        names.sort(key=lambda name: (-DTYPES[tensors[name][0]], name.encode("utf-8")))
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    at, places = 0, {}
    for name in names:
        dtype, shape = tensors[name]
        size = math.prod(shape) * DTYPES[dtype] // 8
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        places[name] = (at, at + size)
        at += size
    raw = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    raw += b" " * (-len(raw) % 8)
    whole = struct.pack("<Q", len(raw)) + raw
    shift = len(whole)
    infos = {
        name: TensorInfo(dtype=tensors[name][0], shape=tensors[name][1], begin=begin + shift, end=end + shift)
        for name, (begin, end) in places.items()
    }
    return Layout(header=whole, tensors=infos, size=at + shift)


def _copy_slowly(source: int, target: int, begin: int, at: int, size: int) -> None:
    done = 0
    while done < size:
        piece = os.pread(source, min(_PIECE, size - done), begin + done)
        if not piece:
            raise OSError("the source was cut while it was copied")
        put(target, piece, at + done)
        done += len(piece)


def copy_range(source: int, target: int, begin: int, at: int, size: int) -> None:
    """Copy bytes from one descriptor to another, inside the kernel where the system has a way."""
    done = 0
    if hasattr(os, "copy_file_range"):
        while done < size:
            try:
                moved = os.copy_file_range(source, target, size - done, begin + done, at + done)
            except OSError:  # another file system, or one that does not know the call
                break
            if moved == 0:
                break
            done += moved
    if done < size:
        _copy_slowly(source, target, begin + done, at + done, size - done)


def put(target: int, data: bytes | memoryview, at: int) -> None:
    """Write all of it at a place."""
    view, done = memoryview(data), 0
    while done < view.nbytes:
        done += os.pwrite(target, view[done : done + _PIECE], at + done)


def put_blocks(target: int, name: str, info: TensorInfo, blocks: Iterable[torch.Tensor]) -> None:
    """Write a tensor's blocks one after another; they must fill its place exactly."""
    from deltahub.tensors import dtype_name, value_bytes

    at = info.begin
    for block in blocks:
        assert dtype_name(block.dtype) == info.dtype, name
        data = value_bytes(name, block)
        put(target, data, at)
        at += data.nbytes
    assert at == info.end, name


def write_shard(
    path: Path,
    plan: Layout,
    computed: Mapping[str, Source],
    copied: Sequence[tuple[int, int, int, int]],
) -> None:
    """Write one file: copied ranges ``(descriptor, begin, at, size)``, and computed tensors in order of their place.

    It has its name only once it is whole and on the disk.

    Raises:
        OSError: no space, no permission; the caller removes what was begun.
    """
    begun = path.with_name(f"{path.name}.begun")
    target = os.open(begun, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        put(target, plan.header, 0)
        for descriptor, begin, at, size in copied:
            copy_range(descriptor, target, begin, at, size)
        _compute(target, plan, computed)
        if os.fstat(target).st_size < plan.size:
            os.ftruncate(target, plan.size)  # only empty tensors can lie at the end unwritten
        os.fsync(target)
    finally:
        os.close(target)
    begun.rename(path)


def _compute(target: int, plan: Layout, computed: Mapping[str, Source]) -> None:
    """Compute tensors side by side, each of them by one thread: blocks are too small to be worth sharing."""
    import torch

    names = sorted(computed, key=lambda one: plan.tensors[one].begin)
    if not names:
        return
    before = torch.get_num_threads()
    workers = min(4, before, len(names))
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
    try:
        jobs = [pool.submit(put_blocks, target, name, plan.tensors[name], computed[name].blocks()) for name in names]
        for job in jobs:
            job.result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)


@contextmanager
def new_folder(path: str | os.PathLike[str], *, overwrite: bool = False, resume: str | None = None) -> Iterator[Path]:
    """A folder that appears whole or not at all: written beside its place and renamed when the block ends well.

    Args:
        path: its place.
        overwrite: replace a folder that is there.
        resume: a hexadecimal digest of all that goes into it. What a killed process, or an interrupted one, left of the
            same work is then yielded again; otherwise it is removed. Where an error is raised nothing is left.

    Raises:
        ConverterError: ``E_MERGE_OUTPUT`` where something is in the way, or the disk does not take it.
    """
    target = Path(path)
    beside = target.with_name(f".{target.name[:64]}.{resume[:12] if resume else secrets.token_hex(6)}.part")
    sweep(target, keep=beside.name)
    if target.exists() and (not overwrite or not target.is_dir()):
        raise ConverterError(
            "E_MERGE_OUTPUT",
            "there is something here already",
            where=target,
            hint="choose another folder, or overwrite",
        )
    try:
        beside.mkdir(parents=True, exist_ok=resume is not None)
        with held(beside) as ours:
            if not ours and resume is not None and any(beside.iterdir()):  # another process is at it, or no locks
                beside = target.with_name(f".{target.name[:64]}.{secrets.token_hex(6)}.part")
                beside.mkdir()
            yield beside
            _put_in_place(beside, target)
    except OSError as error:
        _remove(beside)
        raise ConverterError(
            "E_MERGE_OUTPUT", f"the folder cannot be written: {error}", where=target, hint="nothing was left behind"
        ) from error
    except BaseException as error:
        if resume is None or not isinstance(error, KeyboardInterrupt):
            _remove(beside)
        raise


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def _put_in_place(beside: Path, target: Path) -> None:
    if not target.exists():
        beside.rename(target)
        return
    old = target.with_name(f".{target.name[:64]}.{secrets.token_hex(6)}.old")
    target.rename(old)
    beside.rename(target)
    _remove(old)
