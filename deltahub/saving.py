"""From a model with deltas to a package: what the manifest says of the backbone, the modules and the settings."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from deltahub import identity
from deltahub.backbones import BackboneFiles, changed_settings, describe, origin, pipeline_of, resolve
from deltahub.errors import InjectionError, UsageError
from deltahub.injection import slot_of
from deltahub.manifest import Backbone, Setting
from deltahub.package import Package, Probe, write
from deltahub.prompting import embedding_of
from deltahub.sharing import shared, whole
from deltahub.sites import Part, Site
from deltahub.targets import abbreviate, expand_all

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["backbone_section", "make_probe", "write_package"]


def write_package(
    directory: str | os.PathLike[str],
    *,
    model: nn.Module,
    parts: Sequence[tuple[str, Part]],
    known: Backbone | None = None,
    backbone: str | os.PathLike[str] | None = None,
    probe: Mapping[str, Tensor] | Callable[[nn.Module], Mapping[str, Tensor]] | None = None,
    tolerance: Mapping[str, float] | None = None,
    settings: Iterable[Setting] = (),
    readme: str | None = None,
    extensions: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Package:
    """Write parts of deltas that sit on a model as one package.

    Where several processes share the model's tensors all of them call this, on a folder that all of them see; the
    first one writes.

    Args:
        directory: where to; absent or whole afterwards.
        model: the backbone with its deltas.
        parts: the parts, each with the name of its delta, in the order in which they apply.
        known: the backbone section of the manifest that the model was loaded by; computed anew where ``None``.
        backbone: a folder or Hub id that holds the backbone's files, where the model does not tell.
        probe: keyword inputs of the model's forward pass; its first output is recorded with the deltas active.
        tolerance: greatest absolute difference per dtype for whoever replays the probe.
        settings: fields of the configuration that must change with the delta, besides those that are found.
        readme: text of the model card.
        extensions: further data under reverse domain names.
        overwrite: replace an existing package.

    Raises:
        InjectionError: ``E_INJECTION_MERGED`` where the backbone's weights are changed by a merge.
        PackageError: the folder exists, or cannot be written.
        IdentityError: the backbone's tensors have no values.
    """
    _check_unmerged(parts)
    section, found = (known, []) if known is not None else backbone_section(model, parts, backbone)
    modules, tensors, kinds = _modules(parts)
    recorded = None
    if probe is not None:
        recorded = make_probe(model, probe(model) if callable(probe) else probe, tolerance)
    manifest: dict[str, Any] = {
        "backbone": section.model_dump(by_alias=True, exclude_unset=True),
        "modules": modules,
    }
    changed = [*found, *(setting.model_dump() for setting in settings)]
    rest = {"kinds": kinds, "settings": changed, "extensions": dict(extensions or {})}
    manifest |= {name: value for name, value in rest.items() if value}

    def written() -> Package:
        return write(Path(directory), manifest, tensors, readme=readme, probe=recorded, overwrite=overwrite)

    return _by_one(directory, written) if any(shared(p) for p in model.parameters()) else written()


def _by_one(directory: str | os.PathLike[str], written: Callable[[], Package]) -> Package:
    """Let one of the processes that share a model write, and the others wait for it and open what it wrote."""
    import torch.distributed as dist

    if dist.get_rank() != 0:
        dist.barrier()
        return Package.open(Path(directory))
    try:
        return written()
    finally:
        dist.barrier()


def _check_unmerged(parts: Sequence[tuple[str, Part]]) -> None:
    merged = sorted({name for name, part in parts for _, site in part.sites if site.merged})
    if merged:
        raise InjectionError(
            "E_INJECTION_MERGED",
            "a package is not written while its delta is merged into the backbone",
            found=", ".join(merged),
            hint="unmerge it first",
        )


def _modules(parts: Sequence[tuple[str, Part]]) -> tuple[list[dict[str, Any]], dict[str, Tensor], list[dict[str, Any]]]:
    """The manifest's modules, all tensors by their package names, and the documents of kinds that are not built in."""
    from deltahub.kinds import names as builtin

    known = set(builtin())
    counts: dict[str, int] = {}
    for _, part in parts:
        counts[part.name] = counts.get(part.name, 0) + 1
    modules: list[dict[str, Any]] = []
    tensors: dict[str, Tensor] = {}
    documents: dict[tuple[str, int], dict[str, Any]] = {}
    for delta, part in parts:
        name = part.name if counts[part.name] == 1 else f"{delta}-{part.name}"
        entry = {
            "name": name,
            "kind": part.kind.name,
            "version": part.kind.version,
            "config": {**part.config, **part.kind.document.fold},
            "targets": abbreviate([site.path for _, site in part.sites]),
        }
        rows = {} if part.rows is None else {"rows": dataclasses.asdict(part.rows)}
        stack = {"stack": part.stack} if part.stack else {}
        if part.inputs:
            entry |= _spans(part)
        modules.append(entry | rows | stack | ({"removes": list(part.removes)} if part.removes else {}))
        for _, site in part.sites:
            for tensor, value in _stored(part, site).items():
                tensors[f"{name}/{site.path}/{tensor}"] = whole(value.detach())
        if part.kind.name not in known:
            documents[part.kind.name, part.kind.version] = dict(part.kind.document.source)
    return modules, tensors, list(documents.values())


def _spans(part: Part) -> dict[str, list[str]]:
    """Inputs and targets in one order, abbreviated where that keeps it."""
    found = {"inputs": list(part.inputs), "targets": [site.path for _, site in part.sites]}
    short = {name: abbreviate(paths) for name, paths in found.items()}
    return short if all(expand_all(short[name]) == paths for name, paths in found.items()) else found


def _stored(part: Part, site: Site) -> Mapping[str, Tensor]:
    """A site's tensors as a package holds them: those of a reparametrised kind are what they stand for."""
    own = dict(zip(site.names, site.tensors(), strict=True))
    folded = {**part.config, **part.kind.document.fold}
    if folded == dict(part.config):
        return own
    port = next(p for p in ("kv", "past", "prompt") if p in site.bound.ports)
    with torch.no_grad():
        value = site.bound.ports[port].fn(None, *((None,) if port != "prompt" else ()), *site.tensors())
    names = part.kind.tensors(folded, site.bound.shape)
    return dict(zip(names, (value,) if port == "prompt" else value.unbind(), strict=True))


def backbone_section(
    model: nn.Module, parts: Sequence[tuple[str, Part]], override: str | os.PathLike[str] | None = None
) -> tuple[Backbone, list[dict[str, Any]]]:
    """What a manifest says of a live model's backbone, and the settings in which the model differs from its files.

    The files that the model was loaded from are identified where they can be found; the live tensors otherwise.
    """
    source = {**describe(model), **pipeline_of(model)}
    files = _files_of(model, source, override)
    if files is None:
        names = identity.checkpoint_names(model)
        touched = [names[n] for n in _touched(parts) if n in names]
        section: dict[str, Any] = identity.describe(model, touched=touched)
        found: list[dict[str, Any]] = []
    else:
        checkpoint = identity.open_checkpoint(list(files.files))
        section = identity.describe(list(files.files), touched=_in_files(model, parts, checkpoint.specs))
        found = changed_settings(model, files.folder)
        if files.hub is not None:
            source = {**source, "hub": files.hub, **({"commit": files.commit} if files.commit else {})}
    return Backbone.model_validate({"source": source, **section}, strict=False), found


def _files_of(
    model: nn.Module, source: Mapping[str, str], override: str | os.PathLike[str] | None
) -> BackboneFiles | None:
    if override is not None:
        return resolve(dict(source), override=Path(override) if os.path.isdir(override) else str(override))  # noqa: PTH112
    where = origin(model)
    if where and Path(where).is_dir():
        found = resolve(dict(source), override=Path(where))
        hub, commit = source.get("hub"), source.get("commit")
        return BackboneFiles(folder=found.folder, files=found.files, hub=hub, commit=commit)
    if "hub" in source and "commit" in source:
        return resolve(dict(source), local_files_only=True)
    return None


def _touched(parts: Sequence[tuple[str, Part]]) -> list[str]:
    """Parameters of the modules that a delta sits on: the part of the backbone that it was trained against."""
    found: dict[str, None] = {}
    for _, part in parts:
        for module, site in part.sites:
            assert slot_of(module) is not None
            owner, own = site.path, [name for name, value in module._parameters.items() if value is not None]
            if site.view is not None:
                owner, own = site.path.rpartition(".")[0], list(site.parameters_there)
            if site.bound.shape.family == "transformer":  # a prompt is one more token
                embedding = embedding_of(module)
                inner = next(name for name, found in module.named_modules() if found is embedding)
                own = [f"{inner}.{name}" for name in embedding._parameters]
            found |= dict.fromkeys(f"{owner}.{name}" if owner else name for name in own)
        found |= dict.fromkeys(part.removes)
    return list(found)


def _in_files(model: nn.Module, parts: Sequence[tuple[str, Part]], specs: Mapping[str, object]) -> list[str]:
    """The same by their names in files; a head that the files lack is left out."""
    names = identity.checkpoint_names(model)
    prefix = f"{getattr(model, 'base_model_prefix', '') or ''}."
    found = []
    for live in _touched(parts):
        name = names.get(live, live)
        tries = (name, name.removeprefix(prefix), prefix + name)
        match = next((n for n in tries if n in specs), None)
        if match is not None:
            found.append(match)
    return list(dict.fromkeys(found))


def make_probe(model: nn.Module, inputs: Mapping[str, Tensor], tolerance: Mapping[str, float] | None) -> Probe:
    """Record a forward pass: its inputs, and every tensor among its outputs that has a name or a place.

    Raises:
        UsageError: ``E_USAGE_PROBE`` where the model gives no tensor.
    """
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            out = model(**inputs)
    finally:
        model.train(training)
    outputs = {"output": out} if isinstance(out, Tensor) else _named(out)
    if not outputs:
        raise UsageError("E_USAGE_PROBE", "the model's output holds no tensor to record", found=type(out).__name__)
    return Probe(
        inputs={k: v.detach().cpu() for k, v in inputs.items()},
        outputs={k: v.detach().cpu() for k, v in outputs.items()},
        **({} if tolerance is None else {"tolerance": dict(tolerance)}),
    )


def _named(out: Any) -> dict[str, Tensor]:
    pairs = out.items() if isinstance(out, Mapping) or hasattr(out, "items") else enumerate(out)
    return {str(k): v for k, v in pairs if isinstance(v, Tensor)}
