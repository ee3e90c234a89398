"""Adapters in torchtune's own names: ``adapter_N.pt`` or ``adapter_model.pt`` beside ``adapter_config.json``.

torchtune writes PEFT's layout too where it can, which peft.py reads. Its own files are pickles, with queries and keys
whose rotary halves are interleaved.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltahub.converters.base import Base
from deltahub.converters.entries import Keys, read_json, read_tensors, write_entries
from deltahub.converters.heads import halves, heads_of
from deltahub.converters.naming import tables
from deltahub.converters.peft import named, read_lora
from deltahub.converters.peft_config import check_config
from deltahub.errors import ConverterError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from deltahub.package import Package

__all__ = ["import_", "sniff"]

EXTENSION = "org.pytorch.torchtune"
CONFIG = "adapter_config.json"
_KEY = re.compile(r"(?P<path>.+)\.(?P<what>lora_a\.weight|lora_b\.weight|magnitude)")
_WHAT = {"lora_a.weight": "lora_A.weight", "lora_b.weight": "lora_B.weight", "magnitude": "lora_magnitude_vector"}


def sniff(path: Path) -> bool:
    """Whether a folder holds such an adapter and none in PEFT's layout."""
    if not (path / CONFIG).is_file() or any((path / f"adapter_model.{end}").exists() for end in ("safetensors", "bin")):
        return False
    return any(path.glob("adapter_*.pt"))


def import_(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    backbone: nn.Module | str | os.PathLike[str] | None = None,
    class_name: str | None = None,
    allow_pickle: bool = False,
    overwrite: bool = False,
) -> Package:
    """Make a package out of an adapter in torchtune's own names.

    Args:
        path: its folder, or the file itself.
        out: the package's folder.
        backbone: the model that it was trained on, as transformers has it; by default what the configuration names.
        class_name: the backbone's class; that of its configuration by default.
        allow_pickle: needed, for torchtune writes nothing but pickles in its own names; no code of them is run.
        overwrite: replace a package that is there.

    Raises:
        ConverterError: ``E_CONVERT_UNSUPPORTED`` for a model whose layout in torchtune is not known here; and as
            :func:`deltahub.converters.peft.import_`.
    """
    file = _file(Path(path))
    config = read_json(file.parent / CONFIG)
    check_config(config, file.parent / CONFIG)
    tensors, _ = read_tensors(file, allow_pickle=allow_pickle)
    base = Base.of(named(config) if backbone is None else backbone, class_name=class_name)
    try:
        live = _live(tensors, base, file)
        entries = read_lora({**config, "target_modules": _targets(config)}, Keys(live, file), base)
        return write_entries(out, entries, base, extensions={EXTENSION: {"config": config}}, overwrite=overwrite)
    finally:
        base.close()


def _file(path: Path) -> Path:
    if not path.is_dir():
        return path
    found = sorted(path.glob("adapter_*.pt"))
    if len(found) != 1:
        raise ConverterError(
            "E_CONVERT_FORMAT", "the folder does not hold one adapter", where=path,
            found=", ".join(one.name for one in found) or None, hint="name the file",
        )  # fmt: skip
    return found[0]


def _targets(config: Mapping[str, Any]) -> object:
    """What the configuration targets, whichever of the two libraries' names it has."""
    last = {row["theirs"].rpartition(".")[2]: row["ours"].rpartition(".")[2] for row in tables()["torchtune"]["rows"]}
    named_ = config.get("target_modules")
    return [last.get(str(one), one) for one in named_] if isinstance(named_, list) else None


def _live(tensors: Mapping[str, Tensor], base: Base, file: Path) -> dict[str, Tensor]:
    """PEFT's keys, without its prefix, and queries and keys in halves."""
    table: Mapping[str, Any] = tables()["torchtune"]
    config: Any = getattr(base.arch.model, "config", None)
    kind = str(getattr(config, "model_type", None))
    if kind not in {*table["permuted"], *table["plain"]}:
        raise ConverterError(
            "E_CONVERT_UNSUPPORTED", "how torchtune lays this model out is not known here", where="backbone",
            expected=", ".join([*table["permuted"], *table["plain"]]), found=kind,
            hint="let torchtune write PEFT's layout",
        )  # fmt: skip
    rows = {re.escape(row["theirs"]).replace(r"\{i\}", r"(?P<i>\d+)"): row["ours"] for row in table["rows"]}
    found: dict[str, Tensor] = {}
    for key, value in tensors.items():
        match = _KEY.fullmatch(key.replace("_fsdp_wrapped_module.", "").replace("_orig_mod.", ""))
        path = None
        for pattern, ours in rows.items() if match is not None else ():
            if (known := re.fullmatch(pattern, match["path"] if match else "")) is not None:
                path = ours.format(**known.groupdict())
        if match is None or path is None:
            raise ConverterError("E_CONVERT_KEY", "this is no key of torchtune's", where=file, found=key)
        heads = heads_of(base.arch.model, path) if kind in table["permuted"] else 0
        turned = halves(value, heads).contiguous() if heads and match["what"] != "lora_a.weight" else value
        found[f"{path}.{_WHAT[match['what']]}"] = turned
    return found
