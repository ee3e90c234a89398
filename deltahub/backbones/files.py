"""The files of a backbone: found in a folder or fetched from the Hub, and shown to a library one by one."""

from __future__ import annotations

__all__ = ["BackboneFiles", "architecture", "fetch_some", "files_section", "read_json", "resolve", "staged"]

import json
import re
import shutil
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from deltahub.backbones.libraries import IGNORED_FIELDS, LIBRARIES, REPO_ID, Library, library_of
from deltahub.errors import BackboneError
from deltahub.tensors import open_regular, sha256_file

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_JSON_BYTES = 16 << 20
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, kw_only=True, slots=True)
class BackboneFiles:
    """Where a backbone lies on disk.

    Attributes:
        folder: the folder that holds its configuration and its weights.
        files: the weight files that make up the checkpoint, all of them and no others.
        hub: the repository it was fetched from, if it was.
        commit: that repository's commit.
    """

    folder: Path
    files: tuple[Path, ...]
    hub: str | None = None
    commit: str | None = None


def resolve(
    source: Mapping[str, object] | None,
    *,
    override: str | Path | None = None,
    endpoint: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    allow_pickle: bool = False,
) -> BackboneFiles:
    """Find a backbone's files: fetch those of the manifest's source, or take the caller's.

    Args:
        source: a manifest's ``backbone.source``: ``hub``, ``commit``, ``class``, perhaps ``subfolder``.
        override: the caller's own choice: a folder, or a repository as ``org/name`` or ``org/name@revision``.
        endpoint: the Hub's address; ``None`` is the client's own default.
        token: passed to the Hub's client.
        cache_dir: where snapshots are kept; ``None`` is the client's own default.
        local_files_only: take what is in the cache, ask nobody.
        allow_pickle: accept a checkpoint that has no safetensors files.

    Raises:
        BackboneError: the source makes no sense, the repository cannot be had, or its files are not a checkpoint.
    """
    section = dict(source or {})
    library = library_of(section["class"])[0] if section.get("class") is not None else None
    subfolder = _plain_path(section.get("subfolder"))
    if override is not None and (isinstance(override, Path) or Path(override).is_dir() or _looks_local(override)):
        return _checkpoint(Path(override).expanduser(), library, subfolder, allow_pickle=allow_pickle)
    hub, revision = _reference(section, override)
    found = _snapshot(
        hub, revision, library, subfolder,
        endpoint=endpoint, token=token, cache_dir=cache_dir,
        local_files_only=local_files_only, allow_pickle=allow_pickle,
    )  # fmt: skip
    commit = found.name
    if _COMMIT.fullmatch(revision) and commit != revision:
        raise BackboneError(
            "E_BACKBONE_FETCH", "the Hub answered with another commit", where=hub, expected=revision, found=commit
        )
    here = _checkpoint(found, library, subfolder, allow_pickle=allow_pickle)
    _inside(here.files, found.parents[2])
    return BackboneFiles(folder=here.folder, files=here.files, hub=hub, commit=commit)


def _looks_local(text: str | Path) -> bool:
    text = str(text)
    return (
        text.startswith(("/", "./", "../", "~", "\\"))
        or text in {".", ".."}
        or re.match(r"[A-Za-z]:", text) is not None
    )


def _plain_path(value: object) -> str:
    """Check a subfolder from a manifest: relative, forward slashes, nothing that climbs."""
    if value is None or value == "":
        return ""
    text = str(value)
    parts = text.split("/")
    if not isinstance(value, str) or any(
        not re.fullmatch(r"[\w-][\w.-]*", part) or part.endswith(".") for part in parts
    ):
        raise BackboneError(
            "E_BACKBONE_SOURCE", "this is not a plain relative folder", where="backbone.source.subfolder", found=value
        )
    return text


def _reference(section: Mapping[str, object], override: str | Path | None) -> tuple[str, str]:
    """Repository and revision. A manifest's repository is never taken for a path or an address."""
    if override is not None:
        hub, _, revision = str(override).partition("@")
        revision = revision or "main"
        where = "backbone"
    else:
        where = "backbone.source"
        named, commit = section.get("hub"), section.get("commit")
        if not isinstance(named, str):
            raise BackboneError(
                "E_BACKBONE_SOURCE",
                "the package does not say where its backbone is",
                where=f"{where}.hub",
                hint="pass backbone=<module, folder or repository>",
            )
        if not isinstance(commit, str) or not _COMMIT.fullmatch(commit):
            raise BackboneError(
                "E_BACKBONE_SOURCE",
                "a backbone on the Hub is named with its commit",
                where=f"{where}.commit",
                expected="40 lower-case hexadecimal digits",
                found=commit,
            )
        hub, revision = named, commit
    if not REPO_ID.fullmatch(hub) or len(hub) > 96 or "--" in hub or ".." in hub or hub.endswith((".git", "-", ".")):
        raise BackboneError(
            "E_BACKBONE_SOURCE",
            "this is not the name of a Hub repository",
            where=where if override is not None else f"{where}.hub",
            expected="namespace/name",
            found=hub,
        )
    return hub, revision


def _patterns(library: Library | None, subfolder: str, *, allow_pickle: bool) -> list[str]:
    """What to fetch; of an unknown library, what any that its configuration may name would want."""
    names: list[str] = []
    for one in [library] if library else [entry for entry in LIBRARIES.values() if not entry.module_types]:
        names += one.files
        endings = [(stem, "safetensors") for stem in one.weights]
        endings += [(stem, "bin") for stem in one.pickle] if allow_pickle else []
        for stem, suffix in endings:
            names += [f"{stem}.{suffix}", f"{stem}-*.{suffix}", f"{stem}.{suffix}.index.json"]
    return [f"{subfolder}/{name}" if subfolder else name for name in names]


def _snapshot(
    hub: str, revision: str, library: Library | None, subfolder: str, *, allow_pickle: bool, **client: Any
) -> Path:
    """Fetch only what the library will be shown; give the snapshot's folder."""
    return fetch_some(hub, revision, _patterns(library, subfolder, allow_pickle=allow_pickle), **client)


def fetch_some(hub: str, revision: str, patterns: list[str], **client: Any) -> Path:
    """Fetch the files of a repository that have these names; give the snapshot's folder.

    Raises:
        BackboneError: ``E_BACKBONE_GATED``, ``E_BACKBONE_NOT_FOUND``, ``E_BACKBONE_OFFLINE``, ``E_BACKBONE_FETCH``.
    """
    from huggingface_hub import errors, snapshot_download

    from deltahub import __version__

    where = f"{hub}@{revision}"
    client |= {"library_name": "deltahub", "library_version": __version__}
    try:
        return Path(snapshot_download(hub, revision=revision, allow_patterns=patterns, **client))
    except errors.GatedRepoError as error:
        raise BackboneError(
            "E_BACKBONE_GATED",
            "access to the backbone must be asked for first",
            where=where,
            hint="request access on its page, then log in or pass a token",
        ) from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise BackboneError(
            "E_BACKBONE_NOT_FOUND",
            "the backbone's repository or commit does not exist, or is private",
            where=where,
            hint="pass backbone=<module, folder or repository> if you have it elsewhere",
        ) from error
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError) as error:
        if isinstance(error.__cause__, errors.HfHubHTTPError):  # the Hub was asked, and answered
            raise BackboneError("E_BACKBONE_FETCH", f"the Hub refuses: {error.__cause__}", where=where) from error
        raise BackboneError(
            "E_BACKBONE_OFFLINE",
            "the backbone is not in the cache and the Hub cannot be asked",
            where=where,
            hint="go online once, or pass backbone=<folder>",
        ) from error
    except (errors.HfHubHTTPError, OSError, ValueError) as error:
        raise BackboneError("E_BACKBONE_FETCH", f"the backbone cannot be fetched: {error}", where=where) from error


def _inside(files: tuple[Path, ...], cache: Path) -> None:
    """A snapshot is made of links; each must end in the cache it belongs to."""
    root = cache.resolve()
    for file in files:
        if not file.resolve().is_relative_to(root):
            raise BackboneError(
                "E_BACKBONE_FILE", "a link in the snapshot leaves the cache", where=file, found=file.resolve()
            )


def _checkpoint(folder: Path, library: Library | None, subfolder: str, *, allow_pickle: bool) -> BackboneFiles:
    """The folder that holds the configuration, and the weight files beside it."""
    if not folder.is_dir():
        raise BackboneError("E_BACKBONE_NOT_FOUND", "there is no such folder", where=folder)
    inner = folder / subfolder if subfolder and (folder / subfolder).is_dir() else folder
    if not (inner / "config.json").is_file() and (inner / "modules.json").is_file():
        inner = inner / _first_module(inner)
    library = library or library_of(architecture(inner))[0]
    found = _weights(inner, library, allow_pickle=allow_pickle)
    origin = re.search(r"snapshots[/\\]([0-9a-f]{40})(?:[/\\]|$)", str(folder))
    return BackboneFiles(
        folder=inner if library.name != "sentence_transformers" else folder,
        files=found,
        commit=origin[1] if origin else None,
    )


def _first_module(folder: Path) -> str:
    """The folder of the transformer in a sentence-transformers model: the path of its first module."""
    modules = read_json(folder / "modules.json")
    first = modules[0] if isinstance(modules, list) and modules else None
    return _plain_path(first.get("path") if isinstance(first, dict) else None)


def architecture(folder: Path) -> str:
    """Read the class from a configuration: of transformers, of diffusers, or of timm.

    Raises:
        BackboneError: ``E_BACKBONE_CONFIG``.
    """
    config = read_json(folder / "config.json")
    if isinstance(config, dict):
        if isinstance(config.get("_class_name"), str):
            return f"diffusers.{config['_class_name']}"
        if isinstance(config.get("architecture"), str):
            return f"timm.{config['architecture']}"
        architectures = config.get("architectures")
        if isinstance(architectures, list) and architectures:
            return f"transformers.{architectures[0]}"
    raise BackboneError(
        "E_BACKBONE_CONFIG", "the backbone's configuration does not name an architecture", where=folder / "config.json"
    )


def _weights(folder: Path, library: Library, *, allow_pickle: bool) -> tuple[Path, ...]:
    """The one checkpoint in a folder, in the order in which the libraries look for it."""
    choices = [(stem, "safetensors") for stem in library.weights]
    pickled = [(stem, "bin") for stem in library.pickle]
    for stem, suffix in choices + (pickled if allow_pickle else []):
        single, index = folder / f"{stem}.{suffix}", folder / f"{stem}.{suffix}.index.json"
        if single.exists():
            found: tuple[Path, ...] = (single,)
        elif index.exists():
            found = tuple(folder / name for name in _shards(index, suffix))
        else:
            continue
        for path in found:
            open_regular(path).close()
        return found
    has_pickle = any((folder / f"{stem}.bin{end}").exists() for stem, _ in pickled for end in ("", ".index.json"))
    raise BackboneError(
        "E_BACKBONE_WEIGHTS",
        "there are only pickled weights here" if has_pickle else "there are no weights here",
        where=folder,
        expected=" or ".join(f"{stem}.safetensors" for stem in library.weights),
        hint="a pickle can run code; allow_pickle=True if you trust it" if has_pickle else None,
    )


def _shards(index: Path, suffix: str) -> list[str]:
    """The files that an index names: plain names in the same folder, each of them once."""
    document = read_json(index)
    table = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(table, dict) or not table:
        raise BackboneError("E_BACKBONE_INDEX", "the index has no weight_map", where=index)
    names = sorted({name if isinstance(name, str) else repr(name) for name in table.values()})
    for name in names:
        if not re.fullmatch(rf"[\w-][\w.-]*\.{suffix}", name):
            raise BackboneError(
                "E_BACKBONE_INDEX",
                "the index names something else than a weight file beside it",
                where=index,
                expected=f"a plain file name that ends in .{suffix}",
                found=name,
            )
    return names


def read_json(path: Path) -> Any:
    """Read a JSON file of a backbone, of bounded size.

    Raises:
        BackboneError: ``E_BACKBONE_CONFIG``.
    """
    try:
        with open_regular(path) as file:
            data = file.read(_JSON_BYTES + 1)
        if len(data) > _JSON_BYTES:
            raise BackboneError("E_BACKBONE_CONFIG", f"this file is larger than {_JSON_BYTES} bytes", where=path)
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BackboneError("E_BACKBONE_CONFIG", f"this is not JSON: {error}", where=path) from error


def _clean(value: Any, dropped: set[str]) -> Any:
    """Leave out the fields that would bring code or other files into play, at any depth."""
    if isinstance(value, dict):
        dropped |= IGNORED_FIELDS & value.keys()
        return {k: _clean(v, dropped) for k, v in value.items() if k not in IGNORED_FIELDS}
    if isinstance(value, list):
        return [_clean(v, dropped) for v in value]
    return value


@contextmanager
def staged(files: BackboneFiles, library: Library) -> Iterator[tuple[Path, tuple[str, ...]]]:
    """Show a library a folder that holds nothing but what it may see.

    Libraries look around in a folder: for adapters, for code, for other weight files. They get a fresh one with
    links to the listed files and cleaned copies of the configurations. Yields it with a note per field left out.
    """
    with tempfile.TemporaryDirectory(prefix="deltahub-") as temporary:
        stage, dropped = Path(temporary), set[str]()
        for path in sorted(files.folder.rglob("*") if library.module_types else files.folder.iterdir()):
            name = path.relative_to(files.folder).as_posix()
            if not _listed(name, library) or not path.is_file() or path in files.files:
                continue
            _show(path, stage / name, dropped)
        for path in files.files:
            _show(path, stage / path.relative_to(files.folder), dropped)
        for index in files.files[0].parent.glob("*.index.json") if len(files.files) > 1 else ():
            if any(index.name.startswith(stem) for stem in (*library.weights, *library.pickle)):
                _show(index, stage / index.relative_to(files.folder), dropped)
        yield stage, tuple(f"ignored a field of the backbone's configuration: {name}" for name in sorted(dropped))


def _listed(name: str, library: Library) -> bool:
    depth = name.count("/")
    return any(fnmatchcase(name, pattern) and pattern.count("/") == depth for pattern in library.files)


def _show(path: Path, target: Path, dropped: set[str]) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.name.endswith("config.json") or target.name.startswith("config_"):
        target.write_text(json.dumps(_clean(read_json(path), dropped)), encoding="utf-8")
        return
    open_regular(path).close()
    try:
        target.symlink_to(path.resolve())
    except OSError:  # a file system or an account without links
        shutil.copyfile(path, target)


def files_section(files: BackboneFiles) -> list[dict[str, str | int]]:
    """The manifest's ``backbone.files``: path, size and SHA-256 of each weight file."""
    section: list[dict[str, str | int]] = []
    for path in files.files:
        size, sha256 = sha256_file(path)
        section.append(
            {"path": PurePosixPath(path.relative_to(files.folder)).as_posix(), "size": size, "sha256": sha256}
        )
    return section
