"""Named tensors whose leaves can be asked for, wherever they are: in files or in memory."""

from __future__ import annotations

__all__ = ["Checkpoint", "FileCheckpoint", "Leaves", "ValueCheckpoint", "open_checkpoint", "place", "shared"]

import math
import os
from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeAlias

from deltahub.errors import IdentityError, TensorFileError
from deltahub.identity import stamps
from deltahub.identity.locate import Located, Source, weight_files
from deltahub.identity.memory import recall, remember
from deltahub.identity.stamps import Spec, Stamp
from deltahub.identity.tree import leaf_pair
from deltahub.progress import step
from deltahub.tensors import DTYPES, TensorFile, value_bytes, value_layout

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

_FEW = 1 << 20  # bytes below which threads cost more than they save
_WORKERS = min(8, os.cpu_count() or 1)

Leaves: TypeAlias = dict[str, tuple[bytes, bytes]]
"""Name to (exact leaf, BF16 leaf); the second is empty where it was not asked for and differs from the first."""


class Checkpoint(ABC):
    """Tensors by the names they have in checkpoint files.

    Attributes:
        where: what errors call it.
        specs: dtype and shape of every tensor.
        ties: aliases that the source itself stores as one tensor, each with the name that is kept; not among ``specs``.
    """

    def __init__(self, where: object, specs: dict[str, Spec], ties: Mapping[str, str] | None = None) -> None:
        self.where = where
        self.specs = specs
        self.ties = dict(ties or {})

    @abstractmethod
    def leaves(self, names: Iterable[str], *, bf16: bool = False) -> Leaves:
        """Leaves of some of the tensors; hashed in threads, and at most once."""


def _hash(jobs: list[tuple[str, Spec, Callable[[], memoryview]]], *, bf16: bool) -> Leaves:
    # The largest first, so that no thread is left alone with one at the end.
    sizes = {name: math.prod(spec.shape) * DTYPES[spec.dtype] // 8 for name, spec, _ in jobs}
    jobs = sorted(jobs, key=lambda job: -sizes[job[0]])
    with step("checking the backbone", sum(sizes.values())) as advance:

        def one(job: tuple[str, Spec, Callable[[], memoryview]]) -> tuple[bytes, bytes]:
            name, spec, data = job
            pair = leaf_pair(spec.dtype, spec.shape, data(), bf16=bf16)
            advance(sizes[name])
            return pair

        if _WORKERS == 1 or len(jobs) < 2 or sum(sizes.values()) < _FEW:
            return {job[0]: one(job) for job in jobs}
        with ThreadPoolExecutor(_WORKERS) as pool:
            return dict(zip((job[0] for job in jobs), pool.map(one, jobs), strict=True))


class _Part:
    """One safetensors file: its stamp where one holds, the file itself once it is needed."""

    def __init__(self, path: Path, *, cache: bool) -> None:
        self.path = path
        self.cache = cache
        self._file: TensorFile | None = None
        try:
            self.key = stamps.stat_key(path)
        except (OSError, ValueError, RuntimeError):
            self.key = []  # it will be refused, with its reason, when it is opened
        known = stamps.load(self.key) if cache and self.key else None
        self.stamp = known or Stamp({name: Spec(info.dtype, info.shape) for name, info in self.file().items()})

    def file(self) -> TensorFile:
        if self._file is None:
            self._file = TensorFile.open(self.path)
        return self._file

    def data(self, name: str) -> memoryview:
        return self.file().data(name)

    def keep(self, found: Leaves) -> None:
        self.stamp.leaves.update(found)
        if self.cache and self.key:
            stamps.store(self.key, self.stamp)


class FileCheckpoint(Checkpoint):
    """Tensors of one or more safetensors files; leaves are kept in stamps."""

    def __init__(self, located: Located, *, cache: bool = True) -> None:
        parts = [_Part(path, cache=cache) for path in located.files]
        self._parts: dict[str, _Part] = {}
        for part in parts:
            for name in part.stamp.tensors:
                if name in self._parts:
                    raise IdentityError(
                        "E_IDENTITY_DUPLICATE", "two files hold the same tensor", where=part.path, found=name
                    )
                self._parts[name] = part
        for name, place in located.index.items():
            if name not in self._parts or self._parts[name].path.name != place:
                raise IdentityError(
                    "E_IDENTITY_INDEX",
                    "the weight_map names a tensor that is not where it says",
                    where=place,
                    found=name,
                )
        where = located.files[0] if len(located.files) == 1 else located.files[0].parent if located.files else ""
        super().__init__(where, {name: part.stamp.tensors[name] for name, part in self._parts.items()})

    def leaves(self, names: Iterable[str], *, bf16: bool = False) -> Leaves:
        wanted = list(names)
        found: Leaves = {}
        jobs: list[tuple[str, Spec, Callable[[], memoryview]]] = []
        for name in wanted:
            part = self._parts[name]
            pair = part.stamp.leaves.get(name)
            if pair is not None and (pair[1] or not bf16):
                found[name] = pair
                continue
            spec = self.specs[name]
            info = part.file().get(name)
            if info is None or (info.dtype, info.shape) != spec:
                raise IdentityError("E_IDENTITY_CHANGED", "the file changed while it was checked", where=part.path)
            jobs.append((name, spec, lambda part=part, name=name: part.data(name)))  # type: ignore[misc]
        if jobs:
            fresh = _hash(jobs, bf16=bf16)
            found.update(fresh)
            touched = {self._parts[name] for name in fresh}
            for part in touched:
                part.keep({name: pair for name, pair in fresh.items() if self._parts[name] is part})
        return {name: found[name] for name in wanted}


class ValueCheckpoint(Checkpoint):
    """Tensors in memory, such as a module has or a pickle gave."""

    def __init__(self, where: object, values: Mapping[str, Any], ties: Mapping[str, str] | None = None) -> None:
        self.values = dict(values)
        self._found: Leaves = {}
        try:
            specs = {name: Spec(*value_layout(name, value, where)) for name, value in self.values.items()}
        except TensorFileError as error:
            raise IdentityError(
                "E_IDENTITY_VALUES",
                f"a tensor cannot be identified: {error.what}",
                where=where,
                hint="check the backbone by its files instead",
            ) from error
        super().__init__(where, specs, ties)

    def leaves(self, names: Iterable[str], *, bf16: bool = False) -> Leaves:
        wanted = list(names)
        for name in wanted:
            if name not in self._found and (pair := recall(self.values[name])) is not None:
                self._found[name] = pair
        missing = [n for n in wanted if n not in self._found or (bf16 and not self._found[n][1])]
        jobs: list[tuple[str, Spec, Callable[[], memoryview]]] = [
            (name, self.specs[name], lambda name=name: value_bytes(name, self.values[name], self.where))  # type: ignore[misc]
            for name in missing
        ]
        fresh = _hash(jobs, bf16=bf16)
        for name, pair in fresh.items():
            remember(self.values[name], pair)
        self._found.update(fresh)
        return {name: self._found[name] for name in wanted}


def place(tensor: Any) -> tuple[object, ...] | None:
    """Where a torch tensor lies in memory and how it is seen there; ``None`` if it is empty or lies nowhere."""
    import torch

    if not tensor.numel() or tensor.layout != torch.strided:
        return None
    try:
        address = tensor.data_ptr()
    except RuntimeError:
        address = 0
    if not address:  # a wrapper around tensors of its own; whether it can be identified is decided later
        return None
    return (str(tensor.device), address, tuple(tensor.shape), tensor.stride(), tensor.dtype)


def shared(values: Mapping[str, Any]) -> list[list[str]]:
    """Groups of names, two or more and in the order given, whose torch tensors are the very same memory, seen alike."""
    groups: dict[tuple[object, ...], list[str]] = {}
    for name, tensor in values.items():
        key = place(tensor)
        if key is not None:
            groups.setdefault(key, []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def _pickled(path: Path) -> dict[str, Any]:
    """The state dictionary of a ``.bin``, without running what it asks to run, and mapped rather than read."""
    import torch

    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < (2, 10):
        raise IdentityError(
            "E_IDENTITY_PICKLE",
            "this torch cannot open pickles safely",
            where=path,
            expected="torch 2.10",
            found=torch.__version__,
        )
    try:
        values = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise IdentityError("E_IDENTITY_PICKLE", f"the pickle cannot be read: {error}", where=path) from None
    if not isinstance(values, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in values.items()
    ):
        raise IdentityError("E_IDENTITY_PICKLE", "the pickle is not a plain dictionary of tensors", where=path)
    return dict(values)


def open_checkpoint(source: Source, *, allow_pickle: bool = False, cache: bool = True) -> Checkpoint:
    """The tensors of a folder, a file, or several files.

    Names in a pickle that share their memory are one tensor; the first name is kept, which is where models
    have their embeddings, and where safetensors copies of them have it too.

    Raises:
        IdentityError: the weights cannot be found, are ambiguous, pickled, or contradict their index.
        TensorFileError: a file is not a strict safetensors file.
    """
    located = weight_files(source, allow_pickle=allow_pickle)
    if all(path.name.endswith(".safetensors") for path in located.files) or not allow_pickle:
        return FileCheckpoint(located, cache=cache)
    from deltahub.tensors import open_regular

    values: dict[str, Any] = {}
    ties: dict[str, str] = {}
    for path in located.files:
        open_regular(path).close()
        found = _pickled(path)
        if values.keys() & found.keys():
            raise IdentityError("E_IDENTITY_DUPLICATE", "two files hold the same tensor", where=path)
        for kept, *aliases in shared(found):
            ties.update(dict.fromkeys(aliases, kept))
        values.update(found)
    return ValueCheckpoint(located.files[0], {n: v for n, v in values.items() if n not in ties}, ties)
