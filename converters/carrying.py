"""The rest of a new checkpoint: its tensors spread over files, its index, configuration, tokenizer, and record."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltahub.converters.checkpoint import Checkpoint
from deltahub.converters.combining import Method
from deltahub.converters.computing import FLOATS, Computed
from deltahub.converters.shards import Layout, Source, layout, write_shard
from deltahub.errors import ConverterError
from deltahub.tensors import TensorInfo

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from deltahub.backbones import BackboneFiles, Setting
    from deltahub.identity import IdentityReport
    from deltahub.package import Package

__all__ = ["RECORD", "File", "Plan", "carry", "clear", "parent", "record"]

RECORD = "merge.json"
"""What a merged checkpoint was made of."""

_CAST_ROWS = 1 << 20


@dataclass(frozen=True, kw_only=True)
class File:
    """One file to be written: where each of its tensors comes from."""

    name: str
    layout: Layout
    computed: Mapping[str, Source]
    copied: Sequence[tuple[int, int, int, int]]
    """File of the backbone, begin there, place here, size."""


class _Cast:
    """A tensor that is copied but for its dtype."""

    def __init__(self, checkpoint: Checkpoint, name: str, dtype: torch.dtype) -> None:
        self.checkpoint, self.name, self.dtype = checkpoint, name, dtype

    def blocks(self) -> Iterator[Tensor]:
        shape = self.checkpoint[self.name].info.shape
        if not shape:
            yield self._cast(self.checkpoint.rows(self.name))
            return
        stored = self.checkpoint[self.name]
        step = max(1, _CAST_ROWS * shape[0] // max(1, stored.nbytes))
        for start in range(0, shape[0], step):
            yield self._cast(self.checkpoint.rows(self.name, start, min(shape[0], start + step)))

    def _cast(self, rows: Tensor) -> Tensor:
        new = rows.to(self.dtype)
        if bool((rows.isfinite() & ~new.isfinite()).any()):
            raise ConverterError(
                "E_MERGE_NONFINITE",
                "a value of the backbone is too large for this dtype",
                where=self.name,
                found=str(self.dtype).removeprefix("torch."),
                hint="choose bfloat16 or float32",
            )
        return new


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All files of the new checkpoint.

    Attributes:
        files: in order.
        index: name of the index file, if there are several files.
        added: names of tensors that the backbone did not have.
    """

    files: tuple[File, ...]
    index: str | None
    added: frozenset[str]

    @property
    def copied(self) -> int:
        return sum(size for file in self.files for *_, size in file.copied)

    @property
    def written(self) -> int:
        return sum(file.layout.size for file in self.files)

    @classmethod
    def make(
        cls,
        checkpoint: Checkpoint,
        computed: Mapping[str, Computed],
        *,
        dtype: torch.dtype | None,
        max_shard_bytes: int | None,
    ) -> Plan:
        """Lay the new files out: as the backbone's are, or spread anew.

        Raises:
            ConverterError: ``E_MERGE_SHARD`` for a limit below one byte.
        """
        from deltahub.tensors import dtype_name

        specs: dict[str, tuple[str, tuple[int, ...]]] = {}
        sources: dict[str, Source] = {name: one.source for name, one in computed.items()}
        for name, stored in checkpoint.items():
            info = stored.info
            kind = info.dtype
            if name not in computed and dtype is not None and kind in FLOATS and kind != dtype_name(dtype):
                sources[name] = _Cast(checkpoint, name, dtype)
                kind = dtype_name(dtype)
            specs[name] = (kind, info.shape)
        specs.update((name, (dtype_name(one.dtype), one.shape)) for name, one in computed.items())
        added = frozenset(specs.keys() - checkpoint.keys())
        groups = _spread(checkpoint, specs, added, max_shard_bytes)
        files = tuple(_file(checkpoint, name, names, specs, sources) for name, names in groups.items())
        stem = _stem(checkpoint)
        return cls(files=files, index=f"{stem}.safetensors.index.json" if len(files) > 1 else None, added=added)

    def write(self, folder: Path, checkpoint: Checkpoint, progress: Callable[[str, int, int], None] | None) -> int:
        """Write all files and the index into a folder; gives how many files were there already, and whole."""
        done = 0
        for number, file in enumerate(self.files):
            if (folder / file.name).is_file() and (folder / file.name).stat().st_size == file.layout.size:
                done += 1  # it has its name only since it is whole
                continue
            if progress is not None:
                progress(file.name, number, len(self.files))
            ranges = [(checkpoint.descriptor(one), begin, at, size) for one, begin, at, size in file.copied]
            write_shard(folder / file.name, file.layout, file.computed, ranges)
        if self.index is not None:
            places = {name: file.name for file in self.files for name in file.layout.tensors}
            total = sum(info.end - info.begin for file in self.files for info in file.layout.tensors.values())
            document = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
            _write_json(folder / self.index, document)
        return done


def clear(folder: Path, keep: Iterable[str]) -> None:
    """Remove what an earlier, interrupted run of the same work left, except for what it had finished."""
    names = set(keep)
    for path in folder.iterdir():
        if path.name in names:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _stem(checkpoint: Checkpoint) -> str:
    """``model`` of ``model.safetensors`` and of ``model-00001-of-00002.safetensors``."""
    import re

    name = checkpoint.paths[0].name.removesuffix(".safetensors")
    return re.sub(r"-\d{5}-of-\d{5}$", "", name)


def _by_place(header: Mapping[str, TensorInfo]) -> list[str]:
    return sorted(header, key=lambda name: (header[name].begin, header[name].end))


def _spread(
    checkpoint: Checkpoint,
    specs: Mapping[str, tuple[str, tuple[int, ...]]],
    added: frozenset[str],
    limit: int | None,
) -> dict[str, list[str]]:
    """Which tensors go into which file: new ones at the end."""
    if limit is None:
        groups = {
            path.name: _by_place(header) for path, header in zip(checkpoint.paths, checkpoint.headers, strict=True)
        }
        groups[checkpoint.paths[-1].name] += sorted(added)
        return groups
    if limit < 1:
        raise ConverterError("E_MERGE_SHARD", "a file holds at least one byte", found=limit)
    order = [name for header in checkpoint.headers for name in _by_place(header)] + sorted(added)
    shards: list[list[str]] = []
    room = 0
    for name in order:
        size = _size(specs[name])
        if not shards or size > room:
            shards.append([])
            room = limit
        shards[-1].append(name)
        room -= size
    stem = _stem(checkpoint)
    if len(shards) == 1:
        return {f"{stem}.safetensors": shards[0]}
    return {f"{stem}-{i + 1:05}-of-{len(shards):05}.safetensors": names for i, names in enumerate(shards)}


def _size(spec: tuple[str, tuple[int, ...]]) -> int:
    import math

    from deltahub.tensors import DTYPES

    return math.prod(spec[1]) * DTYPES[spec[0]] // 8


def _file(
    checkpoint: Checkpoint,
    name: str,
    names: Sequence[str],
    specs: Mapping[str, tuple[str, tuple[int, ...]]],
    sources: Mapping[str, Source],
) -> File:
    """One file; its header is the old one's bytes where nothing in it changes."""
    numbers = {checkpoint[one].file for one in names if one in checkpoint}
    number = numbers.pop() if len(numbers) == 1 else None
    header = {} if number is None else checkpoint.headers[number]
    if number is not None and {k: (v.dtype, v.shape) for k, v in header.items()} == {k: specs[k] for k in names}:
        raw = bytes(checkpoint.read(number, 0, checkpoint.header_length(number)))
        size = max((info.end for info in header.values()), default=len(raw))
        plan = Layout(header=raw, tensors=header, size=size)
    else:
        metadata = checkpoint.metadata[0 if number is None else number] or {"format": "pt"}
        plan = layout({one: specs[one] for one in names}, metadata, keep_order=True)
    return File(
        name=name,
        layout=plan,
        computed={one: sources[one] for one in names if one in sources},
        copied=_ranges(checkpoint, [one for one in names if one not in sources], plan),
    )


def _ranges(checkpoint: Checkpoint, names: Sequence[str], plan: Layout) -> list[tuple[int, int, int, int]]:
    """What is copied, neighbours joined."""
    found: list[tuple[int, int, int, int]] = []
    for name in sorted(names, key=lambda one: plan.tensors[one].begin):
        stored, at = checkpoint[name], plan.tensors[name].begin
        if stored.nbytes == 0:
            continue
        if found:
            file, begin, place, size = found[-1]
            if file == stored.file and begin + size == stored.info.begin and place + size == at:
                found[-1] = (file, begin, place, size + stored.nbytes)
                continue
        found.append((stored.file, stored.info.begin, at, stored.nbytes))
    return found


def carry(
    files: BackboneFiles,
    folder: Path,
    *,
    source: Mapping[str, Any],
    settings: Sequence[Setting],
    dtype: torch.dtype | None,
    retitle: bool,
) -> None:
    """Copy configuration, tokenizer and the like; a changed dtype, class or setting is written into the configuration.

    Raises:
        BackboneError: ``E_BACKBONE_SETTING``, ``E_BACKBONE_SETTING_WAS``.
    """
    from deltahub.backbones.libraries import LIBRARIES

    patterns = {pattern for library in LIBRARIES.values() for pattern in library.files} | {"LICENSE*", "NOTICE*"}
    for pattern in sorted(patterns):
        for path in sorted(files.folder.glob(pattern)):
            target = folder / path.relative_to(files.folder)
            if path.is_file() and path not in files.files and not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
    config = folder / "config.json"
    if config.is_file():
        before = json.loads(config.read_text(encoding="utf-8"))
        after = _configured(before, source, settings, dtype, retitle=retitle)
        if after != before:
            _write_json(config, after)


def _configured(
    config: dict[str, Any],
    source: Mapping[str, Any],
    settings: Sequence[Setting],
    dtype: torch.dtype | None,
    *,
    retitle: bool,
) -> dict[str, Any]:
    config = json.loads(json.dumps(config))
    library, _, name = str(source.get("class") or "").partition(".")
    if library == "transformers" and (retitle or settings):
        config["architectures"] = [name]
    if dtype is not None:
        key = "torch_dtype" if "torch_dtype" in config else "dtype"
        config[key] = str(dtype).removeprefix("torch.")
    for setting in settings:
        if setting.on != "config":
            continue
        *outer, last = setting.path.split(".")
        holder = config
        for part in outer:
            holder = holder.setdefault(part, {})
        if last in holder and holder[last] != setting.was and holder[last] != setting.value:
            raise ConverterError(
                "E_MERGE_SETTING",
                "this field of the backbone does not have the value that the package says it replaces",
                where=f"config.{setting.path}",
                expected=json.dumps(setting.was),
                found=json.dumps(holder[last]),
            )
        holder[last] = setting.value
    return config


def record(
    folder: Path,
    packages: Sequence[Package],
    method: Method,
    plan: Plan,
    identity: IdentityReport | None,
    live: Sequence[str],
) -> None:
    """Write down what the checkpoint was made of: digests and kinds, no local paths, no dates."""
    from deltahub import __version__

    parents = [parent(package, weight) for package, weight in zip(packages, method.weights, strict=True)]
    backbone = packages[0].manifest.backbone.model_dump(mode="json", by_alias=True, exclude_unset=True)
    document = {
        "made_by": f"deltahub {__version__}",
        **method.document(),
        "backbone": {key: backbone[key] for key in ("source", "identity") if key in backbone},
        "checked": [level.name for level in identity.levels] if identity is not None else [],
        "deltas": parents,
        "changed": sum(len(file.computed) for file in plan.files),
        "added": sorted(plan.added),
        **({"live": list(live)} if live else {}),
    }
    _write_json(folder / RECORD, document)


def parent(package: Package, weight: float) -> dict[str, Any]:
    """A package as a record names it."""
    import hashlib

    manifest = package.manifest
    return {
        "manifest_sha256": hashlib.sha256(manifest.to_bytes()).hexdigest(),
        "files": {file.path: file.sha256 for file in manifest.tensor_files},
        "kinds": sorted({f"{module.kind}@{module.version}" for module in manifest.modules}),
        "weight": weight,
    }


def _write_json(path: Path, document: object) -> None:
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
