"""Looking at things: a package, a backbone that is nowhere loaded, a live model; as data, as a tree, as a page.

Only headers and configurations are read: no tensor of a package, and no weights of a backbone, which is built on the
meta device by the libraries of the allow-list.
"""

from __future__ import annotations

__all__ = [
    "DeltaSummary",
    "Group",
    "Inspection",
    "ModuleSummary",
    "Node",
    "Parameter",
    "SiteSummary",
    "Structure",
    "fold",
    "inspect",
    "to_png",
    "to_svg",
    "to_text",
]

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard, cast

from deltahub.errors import BackboneError, DeltaHubError, HubError
from deltahub.inspecting.drawing import as_png as to_png
from deltahub.inspecting.drawing import as_svg as to_svg
from deltahub.inspecting.drawing import as_text as to_text
from deltahub.inspecting.packages import Inspection, ModuleSummary, headers_of, inspect_package, sites_of
from deltahub.inspecting.structure import DeltaSummary, Group, Node, Parameter, SiteSummary, Structure, fold, totals

if TYPE_CHECKING:
    from torch import nn

    from deltahub.hub import Lock, PulledPackage
    from deltahub.sign import Policy


def inspect(
    source: str | os.PathLike[str] | nn.Module,
    *,
    backbone: str | os.PathLike[str] | bool = False,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    endpoint: str | None = None,
    local_files_only: bool = False,
    lock: Lock | None = None,
    policy: Policy | None = None,
) -> Inspection | Structure:
    """Say what a package, a backbone or a live model is made of, and where deltas sit in it.

    No tensor is read, and no weights of a backbone are fetched.

    Args:
        source: a package or a backbone, in a folder or on a Hub, as for :func:`deltahub.pull`; or a live module.
        backbone: show a package inside its backbone: ``True`` for the one that its manifest names, or a folder or a
            repository.
        revision: branch, tag or commit of a repository.
        cache_dir: where downloads are kept.
        token: for the Hub.
        endpoint: another Hub than the default one.
        local_files_only: ask no Hub.
        lock: refuse what is not exactly what the lock names.
        policy: who must have signed what.

    Returns:
        An :class:`Inspection` of a package, a :class:`Structure` of anything else. Both print as a tree.

    Raises:
        DeltaHubError: as :func:`deltahub.pull`; ``E_TENSORS_*`` for a malformed tensor file; ``E_BACKBONE_*`` for a
            backbone that cannot be found.
    """
    if _is_module(source):
        from deltahub.inspecting.models import structure_of

        return structure_of(source)
    where: dict[str, Any] = {
        "cache_dir": cache_dir,
        "token": token,
        "endpoint": endpoint,
        "local_files_only": local_files_only,
    }
    text = os.fspath(cast("str | os.PathLike[str]", source))
    if (pulled := _package(text, revision, where, lock=lock, policy=policy)) is None:
        return _backbone(f"{text}@{revision}" if revision else text, where)
    if backbone is False:
        return inspect_package(pulled, source=text)
    return inspect_package(
        pulled, source=text, root=_inside(pulled, where, None if backbone is True else os.fspath(backbone))
    )


def _is_module(source: object) -> TypeGuard[nn.Module]:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(source, torch.nn.Module)


def _package(text: str, revision: str | None, where: dict[str, Any], **demands: Any) -> PulledPackage | None:
    """The package, or nothing where there is none but a backbone may be."""
    from deltahub.hub import pull

    folder = Path(text).expanduser()
    if folder.is_dir() and not (folder / "delta.json").exists() and _has_config(folder):
        return None
    try:
        return pull(text, revision=revision, **demands, **where)
    except HubError as error:
        # A name without an owner ("gpt2") is a backbone's only; no package is called so.
        plain = error.code == "E_HUB_SOURCE" and "/" not in text and not folder.exists() and "." not in text
        remote = not text.startswith((".", "/", "~")) and not folder.is_dir()
        other = error.code == "E_HUB_NOT_A_PACKAGE" or (error.code == "E_HUB_OFFLINE" and _cached(text, where))
        if plain or (remote and other):
            return None
        raise


def _cached(text: str, where: dict[str, Any]) -> bool:
    """Whether the cache holds a backbone's configuration of this name."""
    from huggingface_hub import try_to_load_from_cache

    name, _, revision = text.partition("@")
    cache = where["cache_dir"]
    return isinstance(try_to_load_from_cache(name, "config.json", cache, revision or None), str)


def _has_config(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("config.json", "modules.json"))


def _backbone(text: str, where: dict[str, Any]) -> Structure:
    """A backbone's structure: its architecture where that can be built, and what its headers say."""
    from deltahub.backbones.outline import configuration, headers

    folder, hub, commit = configuration(text, **where)
    asking = {"endpoint": where["endpoint"], "token": where["token"], "revision": commit or None}
    notes: list[str] = []
    try:
        found = headers(hub or folder, **asking) if not (hub and where["local_files_only"]) else None
    except DeltaHubError as error:
        found = None
        notes.append(f"no headers: {error.what}")
    stored = {name: _TORCH.get(dtype, dtype.lower()) for name, (dtype, _) in found.tensors.items()} if found else {}
    try:
        return _built(text, folder, commit, stored, notes)
    except BackboneError as error:
        if found is None:
            raise
        notes.append(f"the architecture is not known, only the names in its files: {error.what}")
    root = _from_names({name: (stored[name], shape) for name, (_, shape) in found.tensors.items()})
    return Structure(
        source=text, what="backbone", class_name="", commit=commit, root=root, notes=tuple(notes), **totals(root)
    )


_TORCH = {
    **{f"F{bits}": f"float{bits}" for bits in (16, 32, 64)},
    **{f"{sign}{bits}": f"{name}{bits}" for bits in (8, 16, 32, 64) for sign, name in (("I", "int"), ("U", "uint"))},
    "BF16": "bfloat16",
    "BOOL": "bool",
}


def _built(text: str, folder: Path, commit: str, stored: dict[str, str], notes: list[str]) -> Structure:
    from deltahub.backbones.outline import outline
    from deltahub.inspecting.models import structure_of

    found = outline(folder)
    prefix = f"{getattr(found.model, 'base_model_prefix', '')}."
    names = {name.removeprefix(prefix): name for name, _ in found.model.named_parameters(remove_duplicate=False)}
    for name, dtype in list(stored.items()):  # a head's checkpoint has the prefix of the base model; a base's has not
        stored.setdefault(names.get(name.removeprefix(prefix), name), dtype)
    return structure_of(
        found.model,
        source=text,
        what="backbone",
        stored=stored,
        class_name=found.class_name,
        commit=commit,
        notes=(*found.notes, *notes),
    )


def _from_names(tensors: dict[str, tuple[str, tuple[int, ...]]], name: str = "") -> Node:
    """A tree from the names of parameters alone."""
    own, below = [], dict[str, dict[str, tuple[str, tuple[int, ...]]]]()
    for full, entry in tensors.items():
        first, dot, rest = full.partition(".")
        if dot:
            below.setdefault(first, {})[rest] = entry
        else:
            own.append(Parameter(name=first, shape=entry[1], dtype=entry[0]))
    weight = next((p.shape for p in own if p.name == "weight" and len(p.shape) > 1), ())
    children = tuple(_from_names(inside, first) for first, inside in below.items())
    return Node(name=name, shape=weight, parameters=tuple(own), children=children)


def _inside(pulled: PulledPackage, where: dict[str, Any], asked: str | None) -> Node:
    """The tree of a backbone, the package's own by default, with the package's sites in it."""
    from deltahub.backbones.outline import configuration, outline
    from deltahub.inspecting.models import structure_of

    source = pulled.manifest.backbone.source
    if asked is None:
        if source is None or source.hub is None:
            raise BackboneError(
                "E_BACKBONE_SOURCE",
                "the package does not say where its backbone is",
                hint="give a folder or a repository: backbone=… or --backbone",
            )
        asked = f"{source.hub}@{source.commit}" if source.commit else source.hub
    folder, _, _ = configuration(asked, **where)
    model = outline(folder, source.class_ if source else None).model
    sites = sites_of(pulled.manifest, headers_of(pulled))
    return structure_of(model, what="backbone", sites=sites).root
