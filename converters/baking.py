"""Baked checkpoints: what can be merged is in the weights, and what cannot lies beside them as a package.

The folder is both: a checkpoint that the backbone's own library loads, without the live part; and a package whose
backbone is that very checkpoint. The package names no repository, so :func:`deltahub.load` finds the backbone beside
it, in the folder or in the repository and commit that it was fetched from, and checks it as any other.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltahub.converters.architecture import Architecture
from deltahub.converters.carrying import parent
from deltahub.converters.combining import Method
from deltahub.converters.jobs import Live
from deltahub.errors import ConverterError

if TYPE_CHECKING:
    from torch import Tensor

    from deltahub.package import Package, Probe

__all__ = ["bake"]

EXTENSION = "io.deltahub.merge"


def bake(
    folder: Path,
    packages: Sequence[Package],
    live: Sequence[Live],
    method: Method,
    arch: Architecture,
    *,
    source: Mapping[str, Any],
    weights: Sequence[Path],
    probe: Probe | None,
) -> None:
    """Write the package of what stays live into a folder that holds the checkpoint.

    Args:
        folder: where to.
        packages: all that were merged.
        live: the sites that stay.
        method: how the deltas were combined; only a sum says what a live delta with a weight does.
        arch: the backbone's.
        source: of the manifest: a class, perhaps a pipeline and the folder of its denoiser; no repository.
        weights: the new checkpoint's files.
        probe: what the first package must give, if that is still so.

    Raises:
        ConverterError: ``E_MERGE_BAKE`` where a live delta has a weight that its kind cannot take.
    """
    from deltahub import identity
    from deltahub.package import write

    modules, tensors, kinds = _modules(packages, live, method)
    touched = _touched(packages, live, arch)
    settings = [
        setting.model_dump(by_alias=True, exclude_unset=True)
        for package in packages
        for setting in package.manifest.settings or ()
        if setting.on != "config"  # those of the configuration are in the checkpoint's
    ]
    merged = {"deltas": [parent(one, weight) for one, weight in zip(packages, method.weights, strict=True)]}
    manifest: dict[str, Any] = {
        "backbone": {"source": dict(source), **identity.describe(list(weights), touched=touched)},
        "modules": modules,
        "extensions": {EXTENSION: {**method.document(), **merged}},
    }
    manifest |= {key: value for key, value in (("kinds", kinds), ("settings", settings)) if value}
    inner = folder / ".package"
    write(inner, manifest, tensors, probe=probe).close()
    for path in sorted(inner.iterdir()):
        path.rename(folder / path.name)
    shutil.rmtree(inner)


def _modules(
    packages: Sequence[Package], live: Sequence[Live], method: Method
) -> tuple[list[dict[str, Any]], dict[str, Tensor], list[dict[str, Any]]]:
    """The manifest's modules with the paths that stay, their tensors, and the documents of their own kinds."""
    from deltahub.targets import abbreviate

    modules: list[dict[str, Any]] = []
    tensors: dict[str, Tensor] = {}
    kinds: dict[tuple[str, int], dict[str, Any]] = {}
    paths: dict[tuple[int, str], list[str]] = {}
    for one in live:
        paths.setdefault((one.number, one.module), []).append(one.path)
    for number, package in enumerate(packages):
        for module in package.manifest.modules:
            left = set(paths.get((number, module.name), ()))
            kept = [path for path in module.paths if path in left]
            if not kept:
                continue
            name = module.name if len(packages) == 1 else f"d{number}-{module.name}"[:64]
            entry = module.model_dump(by_alias=True, exclude_unset=True)
            modules.append(
                entry
                | {"name": name, "targets": abbreviate(kept), "config": _weighed(package, module.name, number, method)}
            )
            for path, own in package.tensors(module.name).items():
                if path in left:
                    tensors.update({f"{name}/{path}/{tensor}": value for tensor, value in own.items()})
            kind = package.kind(module.name)
            if (kind.name, kind.version) in {(own.name, own.version) for own in package.registry.own}:
                kinds[kind.name, kind.version] = dict(kind.document.source)
    return modules, tensors, list(kinds.values())


def _weighed(package: Package, module: str, number: int, method: Method) -> dict[str, Any]:
    """A module's config with the package's weight in its strength."""
    config = dict(next(one.config for one in package.manifest.modules if one.name == module))
    weight = method.weights[number]
    if weight == 1.0 and method.name in {"sum", "task_arithmetic"} and method.scale == 1.0:
        return config
    strength = package.kind(module).document.strength
    if strength is None or method.name not in {"sum", "task_arithmetic"}:
        raise ConverterError(
            "E_MERGE_BAKE",
            "a part that stays live cannot take this weight, or be combined like this",
            where=f"{number}:{module}",
            found=f"{method.name}, weight {weight:g}",
            hint="bake it with weight 1, by their sum",
        )
    return config | {strength: float(package.config(module)[strength]) * weight * method.scale}  # type: ignore[arg-type]


def _touched(packages: Sequence[Package], live: Sequence[Live], arch: Architecture) -> list[str]:
    """Names in files of what the live sites sit on or remove."""
    names: list[str] = []
    for path in dict.fromkeys(one.path for one in live):
        own = arch.model.get_submodule(path).named_parameters(recurse=False)
        names += [f"{path}.{name}" for name, _ in own]
    modules = {(one.number, one.module) for one in live}
    for number, package in enumerate(packages):
        for module in package.manifest.modules:
            if (number, module.name) in modules:
                names += list(module.removes or ())
    return list(dict.fromkeys(arch.stored[name] for name in names if name in arch.stored))
