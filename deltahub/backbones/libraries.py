"""Which libraries may rebuild a backbone, and how a class is looked up in one of them."""

from __future__ import annotations

__all__ = [
    "IGNORED_FIELDS",
    "LIBRARIES",
    "Field",
    "Library",
    "class_name",
    "describe",
    "find_class",
    "library_of",
    "origin",
    "snapshot_of",
]

import importlib
import inspect
import re
import sys
import tomllib
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltahub.errors import BackboneError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

_SNAPSHOT = re.compile(r"models--(?P<repo>[^/\\]+)[/\\]snapshots[/\\](?P<commit>[0-9a-f]{40})(?:[/\\](?P<sub>.+))?$")
REPO_ID = re.compile(r"(?:[A-Za-z0-9_][\w.-]*/)?[A-Za-z0-9_][\w.-]*", re.ASCII)


@dataclass(frozen=True, kw_only=True, slots=True)
class Field:
    """A setting that a package may change: the JSON types it takes and when it takes effect."""

    types: tuple[str, ...]
    when: str
    minimum: float | None = None
    maximum: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Library:
    """One entry of ``spec/libraries.toml``.

    Attributes:
        module: the name that is imported; the only one.
        bases: public classes that a backbone's class must derive from. None: the library has factories by name.
        weights: stems of safetensors files, the preferred first.
        pickle: stems of pickle files.
        files: patterns of the other files that are fetched and shown to the library.
        nested: configurations inside a configuration.
        module_types: prefixes of the types that a ``modules.json`` may name.
        settings: place (``config``, ``processor``, ``scheduler``) → field → what it takes.
    """

    name: str
    module: str
    bases: tuple[str, ...]
    weights: tuple[str, ...]
    pickle: tuple[str, ...]
    files: tuple[str, ...]
    nested: frozenset[str]
    module_types: tuple[str, ...]
    settings: Mapping[str, Mapping[str, Field]]


def _field(entry: Mapping[str, Any]) -> Field:
    types = entry["type"] if isinstance(entry["type"], list) else [entry["type"]]
    return Field(types=tuple(types), when=entry["when"], minimum=entry.get("minimum"), maximum=entry.get("maximum"))


def _read() -> tuple[dict[str, Library], frozenset[str]]:
    document = tomllib.loads(files("deltahub.spec").joinpath("libraries.toml").read_text(encoding="utf-8"))
    ignored = frozenset(document.pop("ignored")["fields"])
    found = {}
    for name, entry in document.items():
        found[name] = Library(
            name=name,
            module=entry["module"],
            bases=tuple(entry["bases"]),
            weights=tuple(entry["weights"]),
            pickle=tuple(entry["pickle"]),
            files=tuple(entry["files"]),
            nested=frozenset(entry["nested"]),
            module_types=tuple(entry.get("module_types", ())),
            settings={
                on: {field: _field(spec) for field, spec in fields.items()} for on, fields in entry["settings"].items()
            },
        )
    return found, ignored


LIBRARIES, IGNORED_FIELDS = _read()


def library_of(class_name: object) -> tuple[Library, str]:
    """Split ``"<library>.<Class>"``; nothing is imported.

    Raises:
        BackboneError: ``E_BACKBONE_SOURCE`` when it is not of that form, ``E_BACKBONE_LIBRARY`` when the library
            is not on the list.
    """
    where = "backbone.source.class"
    if not isinstance(class_name, str) or class_name.count(".") != 1:
        raise BackboneError(
            "E_BACKBONE_SOURCE",
            "the class of a backbone is a library and a class name",
            where=where,
            expected="for example transformers.BertModel",
            found=class_name,
        )
    name, cls = class_name.split(".")
    if name not in LIBRARIES:
        raise BackboneError(
            "E_BACKBONE_LIBRARY",
            "this library is not on the list of libraries that may rebuild a backbone",
            where=where,
            expected="one of " + ", ".join(sorted(LIBRARIES)),
            found=class_name,
            hint="build the module yourself and pass it: deltahub.load(..., backbone=module)",
        )
    if not cls.isidentifier() or cls.startswith("_"):
        raise BackboneError("E_BACKBONE_SOURCE", "this is not the name of a public class", where=where, found=cls)
    return LIBRARIES[name], cls


def imported(library: Library) -> Any:
    """Import a library of the list.

    Raises:
        BackboneError: ``E_BACKBONE_LIBRARY_MISSING``.
    """
    try:
        return importlib.import_module(library.module)
    except ImportError as error:
        raise BackboneError(
            "E_BACKBONE_LIBRARY_MISSING",
            f"this backbone is built with {library.name}, which cannot be imported: {error}",
            hint=f"pip install {library.name.replace('_', '-')}",
        ) from error


def find_class(library: Library, name: str) -> Any:
    """Look a class up among a library's public names and check that it is a model.

    Raises:
        BackboneError: ``E_BACKBONE_CLASS``; ``E_BACKBONE_LIBRARY_MISSING``.
    """
    module = imported(library)
    # dir() of a library that imports lazily takes half a second; its list of names is the same and there already.
    found = getattr(module, name, None) if name in (getattr(module, "__all__", None) or dir(module)) else None
    bases = tuple(base for base in (getattr(module, b, None) for b in library.bases) if inspect.isclass(base))
    if not (inspect.isclass(found) and issubclass(found, bases) and hasattr(found, "from_pretrained")):
        # SentenceTransformer has no from_pretrained: its constructor takes the folder.
        if inspect.isclass(found) and found in bases:
            return found
        raise BackboneError(
            "E_BACKBONE_CLASS",
            f"{library.name} has no model class of this name",
            where="backbone.source.class",
            expected="a public class that derives from " + " or ".join(library.bases),
            found=f"{library.name}.{name}",
            hint=f"a newer {library.name} may have it; code from a repository is never run",
        )
    return found


def class_name(model: nn.Module) -> str | None:
    """Say which class of which library a module is an instance of: ``"transformers.BertModel"``; ``None`` if none.

    A subclass, for example one made by injection, is described by the nearest public class.
    """
    for cls in type(model).__mro__:
        library = LIBRARIES.get(cls.__module__.split(".")[0])
        module = sys.modules.get(library.module) if library else None
        if library is None or module is None:
            continue
        if not library.bases:
            config = getattr(model, "pretrained_cfg", None)
            name = config.get("architecture") if isinstance(config, dict) else None
            return f"{library.name}.{name}" if isinstance(name, str) and name.isidentifier() else None
        bases = tuple(getattr(module, base) for base in library.bases if hasattr(module, base))
        if issubclass(cls, bases) and _public(module, cls.__name__) is cls:
            return f"{library.name}.{cls.__name__}"
    return None


def _public(module: object, name: str) -> object:
    """What a library gives under a name, of its parts that are there; ``dir`` of one would look at all of them."""
    try:
        return getattr(module, name, None)
    except (ImportError, RuntimeError):
        return None


def origin(model: nn.Module) -> str | None:
    """Say where a library says that a model came from: a repository id, or a folder."""
    timm = getattr(model, "pretrained_cfg", None)
    if isinstance(timm, dict):
        return timm.get("hf_hub_id") or None
    inner: Any = model
    if not hasattr(model, "config") and list(model.children()):  # sentence-transformers: a sequence of modules
        inner = getattr(next(model.children()), "auto_model", model)
    config = getattr(inner, "config", None)
    # A dictionary is diffusers', which keeps a path as it was given.
    name = config.get("_name_or_path") if isinstance(config, dict) else getattr(config, "_name_or_path", None)
    return None if name is None else str(name)


def describe(model: nn.Module) -> dict[str, str]:
    """Say where a live model came from, as a manifest's ``backbone.source``; what is not known is left out.

    Keys: ``hub``, ``commit``, ``subfolder``, ``class``. The commit is known when the model was loaded from a
    snapshot folder, or by a repository name of which the local cache holds exactly one snapshot.
    """
    source: dict[str, str] = {}
    if found := origin(model):
        source.update(snapshot_of(found) or _from_name(found))
    if name := class_name(model):
        source["class"] = name
    return source


def snapshot_of(origin: str) -> dict[str, str]:
    """Repository, commit and perhaps subfolder of a folder in the Hub's cache; nothing of any other."""
    found = _SNAPSHOT.search(origin)
    if found is None:
        return {}
    source = {"hub": found["repo"].replace("--", "/"), "commit": found["commit"]}
    if found["sub"]:
        source["subfolder"] = Path(found["sub"]).as_posix()
    return source


def _from_name(origin: str) -> dict[str, str]:
    if not REPO_ID.fullmatch(origin) or Path(origin).exists():
        return {}
    from huggingface_hub import constants

    snapshots = Path(constants.HF_HUB_CACHE) / f"models--{origin.replace('/', '--')}" / "snapshots"
    commits = (
        [p.name for p in snapshots.iterdir() if re.fullmatch("[0-9a-f]{40}", p.name)] if snapshots.is_dir() else []
    )
    return {"hub": origin} | ({"commit": commits[0]} if len(commits) == 1 else {})
