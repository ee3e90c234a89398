"""What a package holds, in one look: its manifest and the headers of its tensor files; no tensor is read."""

from __future__ import annotations

__all__ = ["Inspection", "ModuleSummary", "inspect"]

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import os


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


@dataclass(frozen=True, kw_only=True, slots=True)
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


def inspect(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    endpoint: str | None = None,
    local_files_only: bool = False,
) -> Inspection:
    """Fetch a package and say what it holds, without a backbone and without reading a tensor.

    Args:
        source: a folder, or a repository, as for :func:`deltahub.pull`.
        revision: branch, tag or commit of a repository.
        cache_dir: where downloads are kept.
        token: for the Hub.
        endpoint: another Hub than the default one.
        local_files_only: ask no Hub.

    Raises:
        DeltaHubError: as :func:`deltahub.pull`; ``E_TENSORS_*`` for a malformed tensor file.
    """
    from deltahub.hub import pull
    from deltahub.tensors import DTYPES, TensorFile

    pulled = pull(
        source,
        revision=revision,
        cache_dir=cache_dir,
        token=token,
        endpoint=endpoint,
        local_files_only=local_files_only,
    )
    manifest = pulled.manifest
    numbers: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for entry in manifest.files:
        if entry.path.endswith(".safetensors") and not (manifest.probe and entry.path == manifest.probe.file):
            with TensorFile.open(pulled.path / entry.path) as file:
                for name, info in file.items():
                    module = name.split("/", 1)[0]
                    numbers[module] += math.prod(info.shape)
                    sizes[module] += math.prod(info.shape) * DTYPES[info.dtype] // 8
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
        )
        for module in manifest.modules
    )
    return Inspection(
        source=str(source),
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
    )
