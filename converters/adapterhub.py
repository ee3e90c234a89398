"""AdapterHub checkpoints: a folder of ``adapter_config.json`` and ``adapter.safetensors`` or a pickle.

The adapter's name is in every key, and a model with a head puts its prefix before all of them. One adapter may be a
union of several methods; which one a tensor belongs to, its key says. A prefix is stored once for all layers, and
listed under each of them again.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltahub.converters.adapterhub_bottleneck import bottlenecks, invertible
from deltahub.converters.adapterhub_documents import PFEIFFER
from deltahub.converters.adapterhub_methods import heads, loras, prefixes, refts
from deltahub.converters.base import Base
from deltahub.converters.entries import Entry, Keys, read_json, read_tensors, write_entries
from deltahub.errors import ConverterError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from deltahub.package import Package

__all__ = ["PFEIFFER", "export_", "import_", "sniff"]

EXTENSION = "ml.adapterhub"
CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter.safetensors", "pytorch_adapter.bin"
HEAD_CONFIG, HEAD_WEIGHTS, HEAD_PICKLE = "head_config.json", "model_head.safetensors", "pytorch_model_head.bin"

_KEY = re.compile(
    r"(?:(?P<path>.+)\.)?(?P<type>loras|adapters|refts|prefix_tunings|prefix_gates|prompt_tunings|shared_parameters"
    r"|invertible_adapters)\.(?P<adapter>[^.]+)\.(?P<name>.+)"
)
_LEGACY = {
    "attention_text_task_adapters": "adapters",
    "attention_text_lang_adapters": "adapters",
    "layer_text_task_adapters": "adapters",
    "layer_text_lang_adapters": "adapters",
    "invertible_lang_adapters": "invertible_adapters",
}
_ARCHITECTURES = {
    None: "adapters",
    "lora": "loras",
    "mtl_lora": "loras",
    "prefix_tuning": "prefix_tunings",
    "reft": "refts",
}
_FAULTY_SCALE = (1, 1)
"""Before this version a LoRA was computed as if alpha were its rank."""


@dataclass(kw_only=True)
class _Found:
    """The tensors of a file, by what they belong to.

    Attributes:
        parts: by type of method and path.
        shared: those that all layers use.
        invertible: those of an adapter after the embeddings.
    """

    parts: dict[str, dict[str, dict[str, Tensor]]] = field(default_factory=dict)
    shared: dict[str, Tensor] = field(default_factory=dict)
    invertible: dict[str, Tensor] = field(default_factory=dict)


def sniff(path: Path) -> bool:
    """Whether a folder is an AdapterHub adapter: PEFT's configuration has the same name and other keys."""
    if not (path / CONFIG).is_file():
        return False
    try:
        return {"config", "model_type", "name"} <= read_json(path / CONFIG).keys()
    except ConverterError:
        return False


def import_(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    backbone: nn.Module | str | os.PathLike[str],
    class_name: str | None = None,
    allow_pickle: bool = False,
    overwrite: bool = False,
) -> Package:
    """Make a package out of an AdapterHub adapter.

    Args:
        path: the adapter's folder.
        out: the package's folder.
        backbone: the model that it was trained on.
        class_name: its class; by default that of its configuration. One with a head, where the adapter has one.
        allow_pickle: read a ``pytorch_adapter.bin`` where there is no ``adapter.safetensors``.
        overwrite: replace a package that is there.

    Raises:
        ConverterError: with what is unknown, missing, surplus, or cannot be said in a package.
    """
    folder = Path(path)
    document = read_json(folder / CONFIG)
    config = document.get("config")
    if not isinstance(config, dict):
        raise ConverterError("E_CONVERT_CONFIG", "this configuration has no method", where=folder / CONFIG)
    file = folder / WEIGHTS if (folder / WEIGHTS).exists() else folder / PICKLE
    base = Base.of(backbone, class_name=class_name)
    try:
        configs = _configs(document, folder / CONFIG)
        tensors, _ = read_tensors(file, allow_pickle=allow_pickle)
        entries = _entries(configs, _sorted(Keys(_renamed(tensors), file), base), base, file)
        kept: dict[str, Any] = {"config": document}
        entries += _head(folder, base, kept, allow_pickle=allow_pickle)
        return write_entries(out, entries, base, extensions={EXTENSION: kept}, overwrite=overwrite)
    finally:
        base.close()


def export_(package: Package | str | os.PathLike[str], out: str | os.PathLike[str], **options: Any) -> Path:
    """Make an adapter of AdapterHub out of a package; see :func:`deltahub.converters.adapterhub_writing.export_`."""
    from deltahub.converters.adapterhub_writing import export_ as write

    return write(package, out, **options)


def _configs(document: Mapping[str, Any], where: object) -> dict[str, list[dict[str, Any]]]:
    """The configurations by type of method; a union has several."""
    config = document["config"]
    every = config.get("configs") if config.get("architecture") == "union" else [config]
    found: dict[str, list[dict[str, Any]]] = {}
    for one in every or ():
        kind = _ARCHITECTURES.get(one.get("architecture")) if isinstance(one, dict) else None
        if kind is None or (kind == "adapters" and "reduction_factor" not in one):
            raise ConverterError(
                "E_CONVERT_KIND",
                "no kind of delta here computes this method of AdapterHub",
                where=where,
                expected=", ".join(str(name or "bottleneck") for name in _ARCHITECTURES),
                found=one.get("architecture") if isinstance(one, dict) else one,
            )
        if kind == "loras" and _version(document) < _FAULTY_SCALE:
            one = {**one, "alpha": one.get("r")}
        found.setdefault(kind, []).append(one)
    return found


def _version(document: Mapping[str, Any]) -> tuple[int, ...]:
    """The version of the library that wrote a configuration; the newest where it does not say."""
    found = re.fullmatch(r"adapters\.(\d+)\.(\d+)\..*", str(document.get("version", "")))
    return (int(found[1]), int(found[2])) if found else _FAULTY_SCALE


def _renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """With the names that older versions of the library had replaced."""
    found: dict[str, Tensor] = {}
    for key, value in tensors.items():
        for old, new in _LEGACY.items():
            key = key.replace(old, new)
        found[key] = value
    return found


def _sorted(keys: Keys, base: Base) -> _Found:
    """All tensors, each of which belongs to something; those of one adapter."""
    import torch

    found = _Found()
    names = {name for name, _ in base.arch.model.named_modules()}
    adapters: set[str] = set()
    for key in keys:
        match = _KEY.fullmatch(key)
        if match is None:
            continue
        adapters.add(match["adapter"])
        kind, name, value = match["type"], match["name"], keys.take(key)
        if kind in {"shared_parameters", "invertible_adapters"}:
            (found.shared if kind == "shared_parameters" else found.invertible)[name] = value
            continue
        if kind == "prefix_tunings":
            place, _, name = name.partition(".")
            part = found.parts.setdefault(kind, {}).setdefault(place, {})
            if name in part and not torch.equal(part[name], value):
                raise ConverterError(
                    "E_CONVERT_KEY", "two layers differ in what they share", where=keys.where, found=key
                )
        else:
            path = match["path"] or ""
            path = path if kind == "prompt_tunings" else _live(path, base, names, kind)
            part = found.parts.setdefault(kind, {}).setdefault(path, {})
        part[name] = value
    keys.finish()
    if len(adapters) > 1:
        raise ConverterError(
            "E_CONVERT_KEY", "the file holds several adapters", where=keys.where, found=", ".join(sorted(adapters))
        )
    return found


def _live(path: str, base: Base, names: set[str], kind: str) -> str:
    """A path with the prefix of the base model added or taken away, whichever is a module.

    Some models hold their adapters in a module of the library's own; its place is kept, and the layer has to be there.
    """
    root, _, last = path.rpartition(".")
    own = last if kind in {"refts", "prefix_gates"} or last.endswith("_adapters") else ""
    path = root if own else path
    prefix = str(getattr(base.arch.model, "base_model_prefix", "") or "")
    for one in (path, f"{prefix}.{path}", path.removeprefix(f"{prefix}.")):
        if one in names:
            return f"{one}.{own}" if own.endswith("_adapters") else one
    raise ConverterError("E_CONVERT_TARGET", "the backbone has no such module", where=path)


def _entries(configs: Mapping[str, list[dict[str, Any]]], found: _Found, base: Base, where: Path) -> list[Entry]:
    entries: list[Entry] = []
    for kind, parts in found.parts.items():
        own = configs.get("prefix_tunings" if kind == "prefix_gates" else kind)
        if own is None:
            raise ConverterError(
                "E_CONVERT_KIND",
                "the configuration has no such method",
                where=where,
                found=kind,
                expected=", ".join(configs),
            )
        if kind == "adapters":
            entries += bottlenecks(own, parts, found.shared, base)
        elif kind == "loras":
            entries += loras(own[0], parts, found.shared, base)
        elif kind == "refts":
            entries += refts(own[0], parts, where)
        elif kind == "prefix_tunings":
            entries += prefixes(own[0], parts, found.parts.get("prefix_gates", {}), base, where)
    if found.invertible:
        config = next((one for one in configs.get("adapters", ()) if one.get("inv_adapter")), {})
        entries += invertible(config, dict(found.invertible), base, where)
    _complete(configs, found, where)
    return entries


def _complete(configs: Mapping[str, list[dict[str, Any]]], found: _Found, where: Path) -> None:
    """Refuse a file that lacks a method of its configuration."""
    missing = sorted(configs.keys() - found.parts.keys())
    if any(one.get("inv_adapter") for one in configs.get("adapters", ())) and not found.invertible:
        missing.append("invertible_adapters")
    if missing:
        raise ConverterError(
            "E_CONVERT_MISSING", "tensors of a method are missing", where=where, found=", ".join(missing)
        )


def _head(folder: Path, base: Base, kept: dict[str, Any], *, allow_pickle: bool) -> list[Entry]:
    """The head that was saved beside an adapter."""
    if not (folder / HEAD_CONFIG).is_file():
        return []
    file = folder / HEAD_WEIGHTS if (folder / HEAD_WEIGHTS).exists() else folder / HEAD_PICKLE
    config = read_json(folder / HEAD_CONFIG)
    kept["head"] = config
    tensors, _ = read_tensors(file, allow_pickle=allow_pickle)
    return heads(tensors, config, base, file)
