"""OpenDelta checkpoints: a folder of ``config.json`` and a pickled ``pytorch_model.bin``.

Where a delta sits is read off the keys, never out of ``modified_modules``: that list was resolved by a table of renames
that changed between versions. ``backbone_hash`` is an MD5 over a model's printed form with the delta in it, which
nobody can compute from the backbone; it is kept and not used.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltahub.converters.base import Base
from deltahub.converters.entries import Entry, Keys, read_json, read_tensors, write_entries
from deltahub.converters.opendelta_kinds import READERS, added_bias, prefixes
from deltahub.converters.parameters import bias_entry
from deltahub.errors import ConverterError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from deltahub.package import Package

__all__ = ["import_", "sniff"]

EXTENSION = "org.thunlp.opendelta"
CONFIG, WEIGHTS = "config.json", "pytorch_model.bin"
# A delta's name in a key, with the number that a second one of the same name has.
_PART = re.compile(rf"(?:(?P<path>.+)\.)?(?P<type>{'|'.join(READERS)})(?P<number>_\d+)?\.(?P<name>.+)")
_OLD_LORA = re.compile(r"(?P<path>.+)\.(?P<name>lora_[AB])")
_NETWORK = re.compile(r"(?P<path>.+)\.reparams\.(?P<name>.+)")


def sniff(path: Path) -> bool:
    """Whether a folder is an OpenDelta checkpoint: by the keys that its configuration always has."""
    if not (path / CONFIG).is_file():
        return False
    try:
        return {"delta_type", "opendelta_version"} <= read_json(path / CONFIG).keys()
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
    """Make a package out of an OpenDelta checkpoint.

    Args:
        path: the checkpoint's folder.
        out: the package's folder.
        backbone: the model that it was trained on.
        class_name: its class; by default the one that the checkpoint names.
        allow_pickle: needed, for OpenDelta writes nothing but pickles; they are read without running code.
        overwrite: replace a package that is there.

    Raises:
        ConverterError: with what is unknown, missing, surplus, or cannot be said in a package.
    """
    folder = Path(path)
    config = read_json(folder / CONFIG)
    tensors, _ = read_tensors(folder / WEIGHTS, allow_pickle=allow_pickle)
    named = config.get("backbone_class")
    if class_name is None and isinstance(named, str) and named:
        class_name = f"transformers.{named}"
    base = Base.of(backbone, class_name=class_name)
    try:
        entries = _entries(config, Keys(tensors, folder / WEIGHTS), base)
        kept = {EXTENSION: {"config": config}}
        return write_entries(out, entries, base, extensions=kept, overwrite=overwrite)
    finally:
        base.close()


def _entries(config: Mapping[str, Any], keys: Keys, base: Base) -> list[Entry]:
    parts: dict[tuple[str, str, str], dict[str, Tensor]] = {}
    networks: dict[str, dict[str, Tensor]] = {}
    plain: list[str] = []
    for key in keys:
        if network := _NETWORK.fullmatch(key):
            networks.setdefault(network["path"], {})[network["name"]] = keys.take(key)
            continue
        found = _PART.fullmatch(key) or _OLD_LORA.fullmatch(key)
        if found is None:
            plain.append(key)
            continue
        groups = found.groupdict()
        place = (groups["path"] or "", groups.get("type") or "lora", groups.get("number") or "")
        parts.setdefault(place, {})[groups["name"]] = keys.take(key)
    entries = _own(plain, keys, base)
    for (path, kind, number), tensors in parts.items():
        entries.append(READERS[kind](path, tensors, config, base, f"{kind}{number}"))
        _used_up(tensors, f"{path}.{kind}")
    for path, tensors in networks.items():
        entries += prefixes(path, tensors, config, base)
        _used_up(tensors, f"{path}.reparams")
    keys.finish()
    return entries


def _used_up(tensors: Mapping[str, Tensor], where: str) -> None:
    if tensors:
        names = ", ".join(sorted(tensors))
        raise ConverterError("E_CONVERT_SURPLUS", "tensors of no known use", where=where, found=names)


def _own(names: Sequence[str], keys: Keys, base: Base) -> list[Entry]:
    """Parameters of the backbone: trained ones, and in a checkpoint that was saved before freezing all of them."""
    model = base.arch.model
    buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)}
    changed: dict[str, dict[str, Tensor]] = {}
    for key in names:
        path, _, name = key.rpartition(".")
        if name not in {"weight", "bias"} or not path:
            if key in buffers:
                keys.take(key)
            continue
        host = base.arch.host(path)  # refuses a path that the backbone lacks
        value = keys.take(key)
        if not _equal(base.value(key), value):
            changed.setdefault(host.path, {})[name] = value
    entries: list[Entry] = []
    for path, part in changed.items():
        entries += _override(path, part, base)
    return entries


def _override(path: str, part: Mapping[str, Tensor], base: Base) -> list[Entry]:
    host = base.arch.host(path)
    if part.keys() == {"bias"}:
        return bias_entry(path, part["bias"], base) if host.shape.bias else [added_bias(path, part["bias"])]
    weight = host.view.canonical(part["weight"]).contiguous()
    extra = [added_bias(path, part["bias"])] if "bias" in part and not host.shape.bias else []
    tensors = {"weight": weight}
    if host.shape.bias:
        bias = part.get("bias", base.value(f"{path}.bias"))
        assert bias is not None
        tensors["bias"] = bias
    return [Entry(path=path, kind="assign", tensors=tensors, group="saved"), *extra]


def _equal(own: Tensor | None, value: Tensor) -> bool:
    import torch

    return own is not None and own.shape == value.shape and torch.equal(own.to(value.dtype), value)
