"""What a package holds, in one look: its manifest and the headers of its tensor files; no tensor is read."""

from __future__ import annotations

__all__ = ["Inspection", "ModuleSummary", "inspect_package", "sites_of"]

import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltahub.inspecting.structure import Node, SiteSummary, nested

if TYPE_CHECKING:
    from collections.abc import Mapping

    from deltahub.hub import PulledPackage
    from deltahub.manifest import Manifest
    from deltahub.tensors import TensorInfo


@dataclass(frozen=True, kw_only=True, slots=True)
class ModuleSummary:
    """One module of a package.

    Attributes:
        name: its name.
        kind: name of its kind.
        version: version of its kind.
        brought: whether the package brings the kind's document along.
        config: as in the manifest.
        targets: as in the manifest, abbreviated.
        sites: how many paths these stand for.
        parameters: how many numbers its tensors hold.
        size: bytes of its tensors.
        part: which part of its hosts it is on: their ``rows``, the ``stack`` that they are.
    """

    name: str
    kind: str
    version: int
    brought: bool
    config: dict[str, Any]
    targets: tuple[str, ...]
    sites: int
    parameters: int
    size: int
    part: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class Inspection:
    """A package at a glance.

    Attributes:
        source: as it was asked for.
        path: the folder on this machine.
        commit: of a Hub; empty for a folder.
        spec_version: of the format.
        requires: features that a reader must know.
        backbone: the manifest's ``backbone`` without its files and leaves.
        modules: in the order in which they apply.
        kinds: kinds whose documents the package brings along, as ``name@version``.
        settings: fields of the backbone's configuration that change with the delta.
        files: path → bytes.
        parameters: over all modules.
        probe: whether known inputs and outputs travel along.
        share: of the backbone's bytes; ``None`` where the manifest does not list its files.
        root: where its modules sit: a tree of names, or of the backbone where that was asked for.
    """

    source: str
    path: Path
    commit: str
    spec_version: str
    requires: tuple[str, ...]
    backbone: dict[str, Any]
    modules: tuple[ModuleSummary, ...]
    kinds: tuple[str, ...]
    settings: tuple[dict[str, Any], ...]
    files: dict[str, int]
    parameters: int
    probe: bool
    share: float | None
    root: Node

    def __str__(self) -> str:
        from deltahub.inspecting.drawing import as_text

        return as_text(self)

    __repr__ = __str__

    def __rich__(self) -> Any:
        from deltahub.inspecting.drawing import drawn

        return drawn(self)


def inspect_package(pulled: PulledPackage, *, source: str, root: Node | None = None) -> Inspection:
    """Say what a package holds, without reading a tensor.

    Args:
        pulled: the package.
        source: what was asked for.
        root: the backbone's tree with the package's sites in it, where that is known.

    Raises:
        DeltaHubError: ``E_TENSORS_*`` for a malformed tensor file.
    """
    manifest = pulled.manifest
    tensors = headers_of(pulled)
    numbers: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for name, info in tensors.items():
        module = name.partition("/")[0]
        numbers[module] += math.prod(info.shape)
        sizes[module] += info.end - info.begin
    brought = {(document.get("kind"), document.get("version")) for document in manifest.kinds or ()}
    modules = tuple(
        ModuleSummary(
            name=module.name,
            kind=module.kind,
            version=module.version,
            brought=(module.kind, module.version) in brought,
            config=dict(module.config),
            targets=tuple(module.targets),
            sites=len(module.paths),
            parameters=numbers[module.name],
            size=sizes[module.name],
            part=module.model_dump(include={"rows", "stack"}),
        )
        for module in manifest.modules
    )
    backbone = sum(entry.size for entry in manifest.backbone.files or ())
    return Inspection(
        source=source,
        path=pulled.path,
        commit=pulled.commit,
        spec_version=manifest.spec_version,
        requires=tuple(manifest.requires or ()),
        backbone=manifest.backbone.model_dump(
            by_alias=True, mode="json", exclude={"files", "leaves", "leaves_bf16", "compatible"}
        ),
        modules=modules,
        kinds=tuple(f"{name}@{version}" for name, version in sorted(brought, key=str)),
        settings=tuple(setting.model_dump(by_alias=True, mode="json") for setting in manifest.settings or ()),
        files={entry.path: entry.size for entry in manifest.files},
        parameters=sum(numbers[module.name] for module in modules),
        probe=manifest.probe is not None,
        share=sum(sizes.values()) / backbone if backbone else None,
        root=root or nested(sites_of(manifest, tensors)),
    )


def headers_of(pulled: PulledPackage) -> dict[str, TensorInfo]:
    """Name to header entry, of every tensor of a package."""
    from deltahub.tensors import TensorFile

    manifest = pulled.manifest
    found: dict[str, TensorInfo] = {}
    for entry in manifest.files:
        if entry.path.endswith(".safetensors") and not (manifest.probe and entry.path == manifest.probe.file):
            with TensorFile.open(pulled.path / entry.path) as file:
                found.update(file)
    return found


def sites_of(manifest: Manifest, tensors: Mapping[str, TensorInfo]) -> dict[str, list[SiteSummary]]:
    """Path to what the package puts there."""
    at: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, info in tensors.items():
        place, _, tensor = name.rpartition("/")
        at.setdefault(place, {})[tensor] = info.shape
    found: dict[str, list[SiteSummary]] = {}
    for module in manifest.modules:
        for path in module.paths:
            shapes = at.get(f"{module.name}/{path}", {})
            count = sum(math.prod(shape) for shape in shapes.values())
            found.setdefault(path, []).append(
                SiteSummary(
                    delta="",
                    module=module.name,
                    kind=f"{module.kind}@{module.version}",
                    config=dict(module.config),
                    ports=(),
                    tensors=shapes,
                    parameters=count,
                    trainable=count,
                )
            )
    return found
