"""Pipelines of diffusers around a denoiser: found, checked, and built with the denoiser that carries the delta.

A manifest that names a ``pipeline`` in its backbone's source means a whole pipeline's repository, of which the
``subfolder`` is the denoiser that the delta was trained against.
"""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltahub.backbones.files import read_json
from deltahub.backbones.libraries import LIBRARIES, imported, origin, snapshot_of
from deltahub.errors import BackboneError

if TYPE_CHECKING:
    from torch import nn

__all__ = ["DENOISERS", "assemble", "denoiser_of", "pipeline_of", "surroundings"]

DENOISERS = ("transformer", "unet")
"""Names under which pipelines hold what a delta sits on."""

_LIBRARIES = ("diffusers", "transformers")
_FILES = ("*/*.json", "*/*.txt", "*/*.model", "*/*.safetensors")


def denoiser_of(value: object, part: str | None = None) -> tuple[str, nn.Module] | None:
    """The denoiser of a live pipeline, or the part that is named, and its name there; ``None`` for anything else."""
    if any(cls.__name__ == "DiffusionPipeline" for cls in type(value).__mro__):
        for name in (*((part,) if part is not None and part.isidentifier() else ()), *DENOISERS):
            if (found := getattr(value, name, None)) is not None:
                return name, found
    return None


def pipeline_of(model: nn.Module) -> dict[str, str]:
    """Say which pipeline a denoiser was loaded out of: ``pipeline`` and ``subfolder`` of a manifest's source."""
    found = origin(model)
    folder = Path(found) if found else None
    if folder is None or folder.name not in DENOISERS or not (folder.parent / "model_index.json").is_file():
        return {}
    name = _index(folder.parent).get("_class_name")
    return {"pipeline": name, "subfolder": folder.name} if isinstance(name, str) and name.isidentifier() else {}


def _index(folder: Path) -> dict[str, Any]:
    index = read_json(folder / "model_index.json")
    if not isinstance(index, dict):
        raise BackboneError("E_BACKBONE_CONFIG", "this is not a JSON object", where=folder / "model_index.json")
    return index


def assemble(source: Mapping[str, Any], model: nn.Module, **client: Any) -> Any:
    """Build the pipeline around a denoiser.

    Args:
        source: a manifest's ``backbone.source`` with ``pipeline`` and ``subfolder``.
        model: the denoiser, built from that source or from a folder of the caller's.
        client: ``endpoint``, ``token``, ``cache_dir`` and ``local_files_only`` for the Hub.

    Returns:
        The pipeline, with the very module in it.

    Raises:
        BackboneError: the files are not there, or name a class of no allowed library.
    """
    folder = _whole(Path(origin(model) or "").parent, source, **client)
    index = _index(folder)
    cls = _pipeline_class(source, index, folder)
    name = str(source["subfolder"])
    try:
        found = cls.from_pretrained(str(folder), **{name: model}, local_files_only=True, use_safetensors=True)
    except Exception as error:
        raise BackboneError(
            "E_BACKBONE_BUILD",
            f"diffusers cannot build {cls.__name__} from these files: {type(error).__name__}: {error}",
            where=folder,
        ) from error
    return found


def _whole(folder: Path, source: Mapping[str, Any], **client: Any) -> Path:
    """The folder of the pipeline that a denoiser was found in; fetched where only the denoiser is there."""
    source = {**snapshot_of(str(folder)), **source}
    if not (folder / "model_index.json").is_file() or _is_snapshot(folder, source):
        return _fetched(source, **client)
    return folder


def surroundings(source: Mapping[str, Any], denoiser: Path, target: Path) -> None:
    """Copy a pipeline into a folder, all but the weights of its denoiser.

    Args:
        source: a manifest's ``backbone.source`` with ``pipeline`` and ``subfolder``.
        denoiser: the folder where the denoiser's files were found.
        target: where to.

    Raises:
        BackboneError: as :func:`assemble`.
        OSError: the folder cannot be written.
    """
    folder = _whole(denoiser.parent, source)
    own = f"{source['subfolder']}/"
    for pattern in ("model_index.json", *_FILES):
        for path in sorted(folder.glob(pattern)):
            name = path.relative_to(folder)
            if (
                path.is_file()
                and not name.as_posix().startswith(own)
                and not {".fp16", ".non_ema"} & set(path.suffixes)
            ):
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target / name)


def _is_snapshot(folder: Path, source: Mapping[str, Any]) -> bool:
    """Whether a folder is the cache's own, which so far holds no more than the denoiser."""
    return folder.name == source.get("commit") and folder.parent.name == "snapshots"


def _fetched(source: Mapping[str, Any], **client: Any) -> Path:
    from huggingface_hub import errors, snapshot_download

    hub, commit, subfolder = source.get("hub"), source.get("commit"), source.get("subfolder")
    if not isinstance(hub, str) or not isinstance(commit, str):
        raise BackboneError(
            "E_BACKBONE_SOURCE",
            "the package does not say where its pipeline is",
            where="backbone.source.hub",
            hint="pass backbone=<pipeline, folder or repository>",
        )
    options = {k: v for k, v in client.items() if v is not None}
    try:
        # The denoiser is there already; nothing but data is fetched of the rest.
        return Path(
            snapshot_download(
                hub,
                revision=commit,
                allow_patterns=["model_index.json", *_FILES],
                ignore_patterns=[f"{subfolder}/*.safetensors", "*.fp16.*", "*.non_ema.*"],
                **options,
            )
        )
    except (errors.HfHubHTTPError, OSError, ValueError) as error:
        raise BackboneError(
            "E_BACKBONE_FETCH", f"the pipeline cannot be fetched: {error}", where=f"{hub}@{commit}"
        ) from error


def _pipeline_class(source: Mapping[str, Any], index: Mapping[str, Any], folder: Path) -> Any:
    """The pipeline's class, once everything that its index names is of an allowed library."""
    where = folder / "model_index.json"
    for part, entry in index.items():
        if part.startswith("_") or not isinstance(entry, list):
            continue
        if len(entry) != 2 or entry[0] not in {*_LIBRARIES, None}:
            raise BackboneError(
                "E_BACKBONE_CODE",
                f"the pipeline's {part} is built by a library that is not allowed",
                where=where,
                expected=" or ".join(_LIBRARIES),
                found=str(entry[0]),
                hint="code from a repository is never run; build the pipeline yourself and pass it",
            )
    name = source.get("pipeline")
    module = imported(LIBRARIES["diffusers"])
    cls = getattr(module, str(name), None) if index.get("_class_name") == name and name in dir(module) else None
    if not inspect.isclass(cls) or not issubclass(cls, module.DiffusionPipeline):
        raise BackboneError(
            "E_BACKBONE_CLASS",
            "diffusers has no pipeline of this name, or the repository holds another",
            where=where,
            expected=name,
            found=index.get("_class_name"),
        )
    return cls
