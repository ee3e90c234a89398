"""A backbone without its weights: its architecture on the meta device, and what its files' headers say."""

from __future__ import annotations

__all__ = ["Headers", "Outline", "headers", "outline"]

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltahub.backbones.building import _quiet
from deltahub.backbones.files import _clean, _first_module, _looks_local, _reference, architecture, read_json
from deltahub.backbones.libraries import Library, find_class, imported, library_of
from deltahub.errors import BackboneError, DeltaHubError

if TYPE_CHECKING:
    from torch import nn

_CONFIGS = ("config.json", "modules.json")


@dataclass(frozen=True, kw_only=True)
class Outline:
    """An architecture.

    Attributes:
        model: on the meta device: shapes, and no values.
        class_name: ``library.Class``.
        notes: fields of the configuration that were left out.
    """

    model: nn.Module
    class_name: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Headers:
    """What a checkpoint's headers say.

    Attributes:
        tensors: name to dtype (as safetensors calls it) and shape.
        commit: of the Hub; empty for a folder.
        hub: the repository; empty for a folder.
    """

    tensors: Mapping[str, tuple[str, tuple[int, ...]]]
    hub: str = ""
    commit: str = ""


def configuration(
    source: str | Path,
    *,
    endpoint: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> tuple[Path, str, str]:
    """The folder with a backbone's configuration, and the repository and commit it is from; no weights are fetched.

    Args:
        source: a folder, or a repository as ``org/name`` or ``org/name@revision``.
        endpoint: the Hub's address.
        token: passed to the Hub's client.
        cache_dir: where files are kept.
        local_files_only: take what is in the cache.

    Raises:
        BackboneError: ``E_BACKBONE_NOT_FOUND``, ``E_BACKBONE_SOURCE``, ``E_BACKBONE_FETCH``.
    """
    if isinstance(source, Path) or Path(source).is_dir() or _looks_local(source):
        folder = Path(source).expanduser()
        if not folder.is_dir():
            raise BackboneError("E_BACKBONE_NOT_FOUND", "there is no such folder", where=folder)
        if not (folder / "config.json").is_file() and (folder / "modules.json").is_file():
            folder = folder / _first_module(folder)
        return folder, "", ""
    from deltahub.backbones.files import fetch_some

    hub, revision = _reference({}, source)
    options: dict[str, Any] = {
        "endpoint": endpoint,
        "token": token,
        "cache_dir": cache_dir,
        "local_files_only": local_files_only,
    }
    found = fetch_some(hub, revision, list(_CONFIGS), **options)
    if not (found / "config.json").is_file() and (found / "modules.json").is_file():
        inner = _first_module(found)
        fetch_some(hub, found.name, [f"{inner}/config.json"], **options)
        return found / inner, hub, found.name
    return found, hub, found.name


def outline(folder: Path, class_name: str | None = None) -> Outline:
    """Build an architecture on the meta device: shapes without values, in a moment and without memory.

    Args:
        folder: has a ``config.json``.
        class_name: ``library.Class``; the configuration's own architecture by default.

    Raises:
        BackboneError: ``E_BACKBONE_CONFIG``, ``E_BACKBONE_LIBRARY``, ``E_BACKBONE_LIBRARY_MISSING``,
            ``E_BACKBONE_CLASS``, ``E_BACKBONE_BUILD``.
    """
    import torch

    wanted = class_name or architecture(folder)
    library, name = library_of(wanted)
    imported(library)  # before `_quiet`: a library sets up its logger when it is imported
    dropped: set[str] = set()
    config = _clean(read_json(folder / "config.json"), dropped)
    try:
        with _quiet(), torch.device("meta"):
            model = _build(library, name, config)
    except DeltaHubError:
        raise
    except Exception as error:
        raise BackboneError(
            "E_BACKBONE_BUILD",
            f"{library.name} cannot build {name} from this configuration: {type(error).__name__}: {error}",
            where=folder,
        ) from error
    notes = tuple(f"ignored a field of the backbone's configuration: {field}" for field in sorted(dropped))
    return Outline(model=model.eval(), class_name=wanted, notes=notes)


def _build(library: Library, name: str, config: Mapping[str, Any]) -> Any:
    if library.name == "timm":
        arguments = dict(config.get("model_args") or {})
        arguments |= {key: config[key] for key in ("num_classes", "global_pool") if key in config}
        return imported(library).create_model(name, pretrained=False, **arguments)
    cls = find_class(library, name)
    if library.name == "diffusers":
        return cls.from_config(dict(config))
    with tempfile.TemporaryDirectory(prefix="deltahub-") as stage:  # nothing of the repository but this is seen
        Path(stage, "config.json").write_text(json.dumps(config), encoding="utf-8")
        return cls._from_config(cls.config_class.from_pretrained(stage, local_files_only=True))


def headers(
    source: str | Path, *, endpoint: str | None = None, token: str | bool | None = None, revision: str | None = None
) -> Headers:
    """Names, dtypes and shapes of a checkpoint's tensors, from the heads of its safetensors files alone.

    Args:
        source: a folder, or a repository.
        endpoint: the Hub's address.
        token: passed to the Hub's client.
        revision: of the repository.

    Raises:
        IdentityError: a folder's weights cannot be found or contradict each other.
        BackboneError: ``E_BACKBONE_FETCH``; ``E_BACKBONE_WEIGHTS`` where a repository has no safetensors files.
    """
    if isinstance(source, Path):
        from deltahub.identity.locate import weight_files
        from deltahub.tensors import TensorFile

        tensors = {}
        for path in weight_files(source).files:
            with TensorFile.open(path) as file:
                tensors.update({name: (info.dtype, info.shape) for name, info in file.items()})
        return Headers(tensors=tensors)
    from huggingface_hub import HfApi, errors

    try:
        found = HfApi(endpoint=endpoint, token=token).get_safetensors_metadata(source, revision=revision)
    except errors.NotASafetensorsRepoError:
        raise BackboneError("E_BACKBONE_WEIGHTS", "there are no safetensors files here", where=source) from None
    except (errors.HfHubHTTPError, errors.SafetensorsParsingError, OSError, ValueError) as error:
        raise BackboneError("E_BACKBONE_FETCH", f"the headers cannot be fetched: {error}", where=source) from error
    return Headers(
        tensors={
            name: (tensor.dtype, tuple(tensor.shape))
            for file in found.files_metadata.values()
            for name, tensor in file.tensors.items()
        },
        hub=source,
        commit=revision or "",
    )
