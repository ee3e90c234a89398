"""The loader that users call: packages, folders of them for one pipeline, packed ones, and adapters of PEFT.

An adapter becomes a package on the way. It says the name of its backbone and nothing that would identify it. What can
be checked is checked (every tensor lands on a module of the right shape, every target is hit, the scale is told), and
what cannot be is said: in a warning and in the report.
"""

from __future__ import annotations

import functools
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, cast

from deltahub import limits, loading
from deltahub.errors import ConverterError, HubError, PackageError
from deltahub.hub import parse_source
from deltahub.hub.foreign import fetch_files
from deltahub.tensors import open_regular

if TYPE_CHECKING:
    from torch import nn

__all__ = ["load", "verify"]

logger = logging.getLogger("deltahub")

P = ParamSpec("P")
T = TypeVar("T")

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
_CONFIG_BYTES, _WEIGHT_BYTES = 4 << 20, 64 << 30
_NO_PACKAGE = frozenset({"E_HUB_NOT_A_PACKAGE", "E_HUB_OFFLINE"})  # offline, a missing manifest reads like the second
_NO_FILE = frozenset({"E_HUB_FILE_NOT_FOUND", "E_PACKAGE_MISSING"})  # there is a manifest
_CLIENT = ("cache_dir", "token", "endpoint", "local_files_only")


@dataclass(frozen=True, kw_only=True)
class _Found:
    """An adapter that became a package: where both are, on what, and what is to be said of it."""

    folder: Path
    package: Path
    backbone: Any
    commit: str
    notes: tuple[str, ...]


def _opening(run: Callable[P, T]) -> Callable[P, T]:
    """The same for sources that are no packages and hold an adapter."""

    @functools.wraps(run)
    def either(*args: P.args, **options: P.kwargs) -> T:
        source = cast("str | os.PathLike[str]", args[0] if args else options["source"])
        if isinstance(source, str) and Path(source, CONFIG).is_file():
            source = Path(source)
        parts = _parts(source)
        if parts and run is loading.load:
            result = run(parts[0], **options)  # type: ignore[arg-type]
            for part in parts[1:]:
                result = run(part, **{**options, "backbone": result})  # type: ignore[arg-type]
            return result
        try:
            return run(*((source, *args[1:]) if args else ()), **options)  # type: ignore[arg-type]
        except (HubError, PackageError) as error:
            if error.code not in _NO_PACKAGE | _NO_FILE or options.get("policy") or options.get("lock"):
                raise  # an adapter has no signature, and no manifest that a lock could name
            with (_packed if error.code in _NO_FILE else _adapter)(source, dict(options)) as found:
                if found is None:
                    raise
                return _run(run, found, source, dict(options))

    return either


def _parts(source: str | os.PathLike[str]) -> list[Path]:
    """The packages of a folder that holds one for each part of a pipeline, the denoiser's first; none for any other."""
    from deltahub.backbones import DENOISERS

    folder = Path(source)
    if not folder.is_dir() or (folder / "delta.json").exists() or (folder / CONFIG).exists():
        return []
    found = [place.parent for place in sorted(folder.glob("*/delta.json"))]
    known = [place for place in found if place.name in DENOISERS or place.name.startswith("text_encoder")]
    return sorted(known, key=lambda place: place.name not in DENOISERS) if len(known) == len(found) else []


def _run(run: Callable[..., T], found: _Found, source: object, options: dict[str, Any]) -> T:
    for note in found.notes:
        logger.warning("%s: %s", source, note)
    given = {key: value for key, value in options.items() if key not in {"source", "revision"}}
    result = run(found.package, **{**given, "backbone": found.backbone})

    def told(report: loading.LoadReport) -> loading.LoadReport:
        notes = (*report.notes, *found.notes)
        return replace(report, source=str(source), path=found.folder, commit=found.commit, sha256="", notes=notes)

    if isinstance(result, loading.VerifyReport):
        return cast("T", replace(result, load=told(result.load)))
    from deltahub.composition import deltas

    delta = deltas(cast("nn.Module", result)).get(given.get("name") or found.package.name)
    if delta is not None and isinstance(delta.report, loading.LoadReport):
        delta.report = told(delta.report)
    return result


@contextmanager
def _adapter(source: str | os.PathLike[str], options: dict[str, Any]) -> Iterator[_Found | None]:
    """An adapter as a package in a folder that is gone when the block ends; ``None`` where there is no adapter."""
    client = {key: options[key] for key in _CLIENT if options.get(key) is not None}
    wanted = {CONFIG: _CONFIG_BYTES}
    files, commit = fetch_files(source, wanted, revision=options.get("revision"), **client)
    if CONFIG not in files:
        yield None
        return
    revision = commit or options.get("revision")
    wanted = {WEIGHTS: _WEIGHT_BYTES} | ({PICKLE: _WEIGHT_BYTES} if options.get("allow_pickle") else {})
    pinned = _pinned(source, commit)
    fetch_files(pinned, wanted, revision=None if commit else revision, **client)
    with tempfile.TemporaryDirectory(prefix="deltahub-") as temporary:
        yield _converted(files[CONFIG].parent, Path(temporary) / _name(source), commit, options, client)


@contextmanager
def _packed(source: str | os.PathLike[str], options: dict[str, Any]) -> Iterator[_Found | None]:
    """A packed package, unpacked into a folder that is gone when the block ends; ``None`` where it is none."""
    from deltahub.backbones import denoiser_of, resolve
    from deltahub.converters.packing import PACKED
    from deltahub.converters.unpacking import unpack
    from deltahub.manifest import Manifest

    client = {key: options[key] for key in _CLIENT if options.get(key) is not None}
    wanted = {PACKED: _WEIGHT_BYTES, "delta.json": limits.DEFAULT.manifest_bytes}
    files, commit = fetch_files(source, wanted, revision=options.get("revision"), **client)
    if files.keys() != wanted.keys():
        yield None
        return
    with open_regular(files["delta.json"]) as file:
        manifest = Manifest.parse(file.read(limits.DEFAULT.manifest_bytes + 1) or b"", where=str(files["delta.json"]))
    if manifest.probe is not None:
        fetch_files(_pinned(source, commit), {manifest.probe.file: _WEIGHT_BYTES}, **client)
    given = options.get("backbone")
    backbone = given if (inner := denoiser_of(given)) is None else inner[1]
    if backbone is None:
        section = manifest.backbone.source
        backbone = resolve({} if section is None else section.model_dump(by_alias=True), **client).folder
    with tempfile.TemporaryDirectory(prefix="deltahub-") as temporary:
        out = Path(temporary) / _name(source)
        unpack(files["delta.json"].parent, out, backbone=backbone).close()
        yield _Found(folder=files["delta.json"].parent, package=out, backbone=given, commit=commit, notes=())


def _pinned(source: str | os.PathLike[str], commit: str) -> str | os.PathLike[str]:
    """The same source at a commit."""
    if not commit:
        return source
    parsed = parse_source(os.fspath(source).partition("@")[0] if "://" not in os.fspath(source) else source)
    inner = f"/{parsed.subfolder}" if parsed.subfolder else ""
    return f"hf://{parsed.repo_id}@{commit}{inner}"


def _name(source: str | os.PathLike[str]) -> str:
    """A delta's name from where it came from."""
    import re

    last = os.fspath(source).partition("@")[0].rstrip("/").replace("\\", "/").rpartition("/")[2]
    return re.sub(r"[^A-Za-z0-9_-]+", "-", last).strip("-_").lstrip("0123456789-_")[:64] or "delta"


def _converted(folder: Path, out: Path, commit: str, options: dict[str, Any], client: dict[str, Any]) -> _Found:
    from deltahub.backbones import resolve
    from deltahub.converters import peft
    from deltahub.converters.entries import read_json

    config = read_json(folder / CONFIG)
    named, revision = config.get("base_model_name_or_path"), config.get("revision")
    backbone, notes = options.get("backbone"), []
    if backbone is None:
        name = peft.named(config)
        if commit and (name.startswith((".", "/", "~", "\\")) or Path(name).is_dir()):
            raise ConverterError(
                "E_CONVERT_BACKBONE",
                "the adapter names a folder of whoever trained it as its backbone",
                where=CONFIG,
                found=name,
                hint="pass the backbone",
            )
        backbone = resolve({}, override=name, **client).folder
        notes.append(f"it was trained on {name}, as it says; that these are the same weights is not known")
        if not isinstance(revision, str):
            notes.append("it does not say which revision of its backbone it was trained on; the newest was taken")
    else:
        said = f"{named}" if isinstance(named, str) and named else "no model at all"
        notes.append(f"it names {said} as its backbone and was put on the one that was given; nothing compares the two")
    notes.append("it is an adapter of PEFT, without digests or a probe: only names, shapes and scales were checked")
    peft.import_(folder, out, backbone=backbone, allow_pickle=bool(options.get("allow_pickle")))
    return _Found(folder=folder, package=out, backbone=backbone, commit=commit, notes=tuple(notes))


load = _opening(loading.load)
verify = _opening(loading.verify)
