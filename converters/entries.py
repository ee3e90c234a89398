"""Between foreign formats and packages: a list of sites, each a kind with a config and tensors at one path."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltahub.converters.base import Base
from deltahub.errors import ConverterError, DeltaHubError

if TYPE_CHECKING:
    from torch import Tensor

    from deltahub.converters.architecture import HostModule
    from deltahub.kinds import Kind
    from deltahub.kinds.host_shape import HostShape
    from deltahub.package import Package

__all__ = ["Entry", "Keys", "entries_of", "grouped", "need_kind", "read_json", "read_tensors", "write_entries"]

_JSON_BYTES = 4 << 20


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One site: what a package's module holds for one of its targets.

    Attributes:
        path: of the module in the backbone.
        kind: a built-in kind.
        config: what its document asks for.
        tensors: by the names of the document.
        group: prefix of the module's name in the manifest.
        document: of a kind that is not built in and travels with the package.
        source: path of the module whose input it reads, where that is another one.
    """

    path: str
    kind: str
    config: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    group: str = ""
    document: Mapping[str, Any] | None = None
    source: str | None = None

    def resolved(self) -> Kind:
        """The kind itself."""
        from deltahub import kinds

        return kinds.get(self.kind, documents=() if self.document is None else (self.document,))


def need_kind(name: str, why: str) -> None:
    """Refuse where the kind that a foreign method needs is not there.

    Raises:
        ConverterError: ``E_CONVERT_KIND``.
    """
    from deltahub import kinds

    if name not in kinds.names():
        raise ConverterError("E_CONVERT_KIND", f"no kind of delta here computes this: {why}", expected=name)


def _name(text: str) -> str:
    """A word as the name of a module of a manifest."""
    clean = re.sub(r"[^A-Za-z0-9_-]+", "-", text).strip("-")
    return (clean if clean[:1].isalpha() else f"m-{clean}")[:48]


def write_entries(
    out: str | os.PathLike[str],
    entries: Sequence[Entry],
    base: Base,
    *,
    extensions: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Package:
    """Write sites as a package: those of one kind and config become one module, in the order of the first of each.

    Raises:
        ConverterError: ``E_CONVERT_EMPTY`` for none; ``E_CONVERT_TARGET`` for a path that the backbone lacks;
            ``E_CONVERT_SITE`` where a kind does not fit its module, with the module's path.
        PackageError: NaN or infinity, or the folder cannot be written.
    """
    from deltahub.package import write

    if not entries:
        raise ConverterError("E_CONVERT_EMPTY", "there is nothing in it that would change a model", where=out)
    for entry in entries:
        _check(entry, base)
    members, tensors = grouped(entries)
    manifest: dict[str, Any] = {"backbone": base.section(base.touched(entry.path for entry in entries)), **members}
    if base.settings:
        manifest["settings"] = base.settings
    if extensions:
        manifest["extensions"] = dict(extensions)
    return write(Path(out), manifest, tensors, overwrite=overwrite)


def grouped(entries: Sequence[Entry]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Sites as ``modules`` and ``kinds`` of a manifest, and their tensors by full name.

    Raises:
        ConverterError: ``E_CONVERT_SITE`` for two of one kind and config at one place.
    """
    groups: dict[tuple[str, str, str], list[Entry]] = {}
    for entry in entries:
        config = json.dumps([dict(entry.config), entry.source is None], sort_keys=True)
        key = (entry.group or entry.kind, entry.kind, config)
        groups.setdefault(key, []).append(entry)
    modules, tensors = [], {}
    taken: set[str] = set()
    for (group, kind, _), members in groups.items():
        name, number = _name(group), 1
        while name in taken:
            number += 1
            name = f"{_name(group)}-{number}"
        taken.add(name)
        paths = [entry.path for entry in members]
        if len(set(paths)) != len(paths):
            raise ConverterError("E_CONVERT_SITE", "two parts of one kind at the same place", where=paths[0])
        modules.append(
            {
                "name": name,
                "kind": kind,
                "version": members[0].resolved().version,
                "config": dict(members[0].config),
                **_where(members),
            }
        )
        for entry in members:
            tensors.update({f"{name}/{entry.path}/{key}": value for key, value in entry.tensors.items()})
    documents = {entry.kind: dict(entry.document) for entry in entries if entry.document is not None}
    return {"modules": modules} | ({"kinds": list(documents.values())} if documents else {}), tensors


def _where(members: Sequence[Entry]) -> dict[str, list[str]]:
    """Targets, and where they read another module's input that too, in one order."""
    from deltahub.targets import abbreviate, expand_all

    found = {"targets": [entry.path for entry in members]}
    if members[0].source is not None:
        found["inputs"] = [str(entry.source) for entry in members]
    short = {name: abbreviate(paths) for name, paths in found.items()}
    kept = len(found) == 1 or all(expand_all(short[name]) == paths for name, paths in found.items())
    return short if kept else found


def _shape(entry: Entry, host: HostModule, families: frozenset[str], base: Base) -> HostShape:
    """A host's facts as a kind sees them: a module, an attention, a transformer, or a span between two modules."""
    from deltahub import attending, prompting, spanning

    module = base.arch.model.get_submodule(entry.path)
    if entry.source is not None:
        source = base.arch.host(entry.source).path
        return spanning.shape_of(base.arch.model.get_submodule(source), module, (source, entry.path))
    shape = attending.shape_of(module, type(module), families, host.shape)
    return prompting.shape_of(module, type(module), families, shape)


def _check(entry: Entry, base: Base) -> None:
    host = base.arch.host(entry.path)
    kind = entry.resolved()
    try:
        config = kind.check_config(entry.config)
        shape = _shape(entry, host, kind.hosts, base)
        kind.fits(shape, config)
        shapes = {name: tuple(tensor.shape) for name, tensor in entry.tensors.items()}
        wanted = kind.tensors(config, shape, known=shapes)
    except DeltaHubError as error:
        raise ConverterError(
            "E_CONVERT_SITE",
            f"this does not fit the module: {error.what}",
            where=f"{entry.path} ({host.type_name})",
            expected=error.expected,
            found=error.found,
        ) from error
    missing = sorted(wanted.keys() - entry.tensors.keys())
    if missing:
        raise ConverterError("E_CONVERT_MISSING", "tensors are missing", where=entry.path, found=", ".join(missing))


def entries_of(package: Package) -> list[Entry]:
    """The sites of a package, in order.

    Raises:
        ConverterError: ``E_CONVERT_EXPORT`` where one is on a part of a host, which no foreign format can say.
    """
    found = []
    for module in package.manifest.modules:
        if module.rows is not None or module.stack is not None:
            raise ConverterError(
                "E_CONVERT_EXPORT",
                "a module of the package is on some outputs of a fused layer, or on a stack of experts",
                where=module.name,
                hint="merge it, or load it with DeltaHub",
            )
        config = dict(package.config(module.name))
        kind = package.kind(module.name)
        own = dict(kind.document.source) if kind.name in {one.name for one in package.registry.own} else None
        for path, tensors in package.tensors(module.name).items():
            found.append(
                Entry(path=path, kind=module.kind, config=config, tensors=tensors, group=module.name, document=own)
            )
    return found


class Keys:
    """The tensors of a foreign file, each of which has to be taken once."""

    def __init__(self, tensors: Mapping[str, Tensor], where: object) -> None:
        self._left = dict(tensors)
        self.where = where

    def __iter__(self) -> Iterator[str]:
        return iter(tuple(self._left))

    def __contains__(self, name: str) -> bool:
        return name in self._left

    def take(self, name: str) -> Tensor:
        """A tensor that must be there.

        Raises:
            ConverterError: ``E_CONVERT_MISSING``.
        """
        try:
            return self._left.pop(name)
        except KeyError:
            raise ConverterError("E_CONVERT_MISSING", "a tensor is missing", where=self.where, found=name) from None

    def finish(self) -> None:
        """Refuse what nobody took.

        Raises:
            ConverterError: ``E_CONVERT_SURPLUS``, naming all of it.
        """
        if self._left:
            names = sorted(self._left)
            raise ConverterError(
                "E_CONVERT_SURPLUS",
                f"{len(names)} tensor(s) belong to nothing that is known",
                where=self.where,
                found=names[0],
                hint="a partial import would load and do something else, so there is none",
                also=names[1:],
            )


def read_json(path: Path) -> dict[str, Any]:
    """A foreign configuration: one JSON object of bounded size, no key twice.

    Raises:
        ConverterError: ``E_CONVERT_CONFIG``.
    """
    from deltahub.tensors import open_regular

    with open_regular(path) as file:
        data = file.read(_JSON_BYTES + 1) or b""
    what = f"more than {_JSON_BYTES} bytes"
    if len(data) <= _JSON_BYTES:
        try:
            document = json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_constant)
        except (ValueError, RecursionError) as error:
            what = str(error)
        else:
            if isinstance(document, dict):
                return document
            what = "not an object"
    raise ConverterError("E_CONVERT_CONFIG", f"this is not a configuration: {what}", where=path)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) != len(pairs):
        raise ValueError("a key appears twice")
    return dict(pairs)


def _constant(text: str) -> float:
    raise ValueError(f"{text} is not a number")


def read_tensors(path: Path, *, allow_pickle: bool = False) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and metadata of a foreign file; a pickle only where the caller allows it, and without its code.

    Raises:
        ConverterError: ``E_CONVERT_PICKLE``, ``E_CONVERT_VALUES`` for NaN or infinity.
        TensorFileError: not a strict safetensors file.
    """
    from deltahub.tensors import TensorFile

    if path.suffix in {".bin", ".pt", ".pth", ".ckpt"}:
        return _unpickled(path, allow=allow_pickle), {}
    file = TensorFile.read(path)
    wrong = [name for name in file if not file.finite(name)]
    if wrong:
        raise ConverterError(
            "E_CONVERT_VALUES", "a tensor holds NaN or infinity", where=path, found=wrong[0], also=wrong[1:]
        )
    return file.tensors(), dict(file.metadata)


def _unpickled(path: Path, *, allow: bool) -> dict[str, Tensor]:
    import torch

    if not allow:
        raise ConverterError(
            "E_CONVERT_PICKLE",
            "these weights are a pickle",
            where=path,
            hint="pass allow_pickle=True if you trust who made it; its code is not run in any case",
        )
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ConverterError("E_CONVERT_PICKLE", f"the pickle cannot be read: {error}", where=path) from None
    if not isinstance(found, dict) or not all(isinstance(v, torch.Tensor) for v in found.values()):
        raise ConverterError("E_CONVERT_PICKLE", "the pickle is not a dictionary of tensors", where=path)
    wrong = [name for name, value in found.items() if value.is_floating_point() and not bool(value.isfinite().all())]
    if wrong:
        raise ConverterError("E_CONVERT_VALUES", "a tensor holds NaN or infinity", where=path, found=wrong[0])
    return {str(name): value.contiguous() for name, value in found.items()}
