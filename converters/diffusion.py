"""LoRA files of diffusion models: one safetensors file for all parts of a pipeline.

Two spellings are read. kohya's and LyCORIS' have underscores for dots and a prefix for the part of the pipeline
(``lora_unet_down_blocks_0_….lora_up.weight``); diffusers' have dots (``unet.down_blocks.0.….lora_A.weight``), in
the form that PEFT gave them and in the older one of attention processors. Each module's tensors become a
site by lycoris.py; each part of the pipeline becomes a package, because a package belongs to one backbone.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltahub.converters.base import Base
from deltahub.converters.components import Components
from deltahub.converters.entries import Entry, read_tensors, write_entries
from deltahub.converters.lycoris import PARAMETERS, read, split
from deltahub.converters.lycoris_writing import write as write_part
from deltahub.converters.naming import Names, Place, tables
from deltahub.converters.shards import new_folder
from deltahub.converters.verbatim import Verbatim
from deltahub.errors import ConverterError

if TYPE_CHECKING:
    from torch import Tensor

    from deltahub.package import Package

__all__ = ["FileNames", "Part", "find_file", "import_file", "parse"]

logger = logging.getLogger("deltahub")

# Endings of dotted keys and the tensor that each is; the longest that fits is meant.
_ENDINGS = {
    ".lora_A.weight": "lora_down.weight",
    ".lora_B.weight": "lora_up.weight",
    ".lora_B.bias": "lora_up.bias",
    ".lora_A.default.weight": "lora_down.weight",
    ".lora_B.default.weight": "lora_up.weight",
    ".lora.down.weight": "lora_down.weight",
    ".lora.up.weight": "lora_up.weight",
    ".lora.alpha": "alpha",
    ".lora_linear_layer.down.weight": "lora_down.weight",
    ".lora_linear_layer.up.weight": "lora_up.weight",
    ".lora_linear_layer.alpha": "alpha",
    ".lora_magnitude_vector.weight": "dora_scale",
    ".lora_magnitude_vector": "dora_scale",
    ".down.weight": "lora_down.weight",
    ".up.weight": "lora_up.weight",
    **{f".{name}": name for name in PARAMETERS},
}
_SCALED = frozenset({"lora_down.weight", "hada_w1_b", "lokr_w1_a", "lokr_w2_a", "a2.weight"})
_FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")


@dataclass(frozen=True, kw_only=True)
class Part:
    """What a file says of one module.

    Attributes:
        prefix: the part of the pipeline, as the file calls it; empty where it says nothing.
        name: the module, as the file calls it.
        flat: whether underscores stand for dots in that name.
        tensors: by LyCORIS' names.
        keys: of the file, by the same names.
    """

    prefix: str
    name: str
    flat: bool
    tensors: dict[str, Tensor] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The beginning that its keys have in common, for messages."""
        return f"{self.prefix}{'_' if self.flat else '.'}{self.name}" if self.prefix else self.name


@dataclass(frozen=True, kw_only=True)
class FileNames:
    """How keys are taken apart in one of the two spellings."""

    flat: bool

    def split(self, key: str) -> tuple[str, str, str] | None:
        """Prefix, module and tensor of a key; ``None`` where it is no key of this spelling."""
        prefixes = sorted((*tables()["components"], "lycoris"), key=len, reverse=True)
        if self.flat:
            first, _, rest = key.partition(".")
            prefix = next((one for one in prefixes if first.startswith(f"{one}_")), None)
            if prefix is None or rest not in PARAMETERS:
                return None
            return prefix, first.removeprefix(f"{prefix}_"), rest
        ending = max((end for end in _ENDINGS if key.endswith(end)), key=len, default=None)
        if ending is None:
            return None
        name = key.removesuffix(ending)
        prefix = next((one for one in prefixes if name.startswith(f"{one}.")), "")
        name = name.removeprefix(f"{prefix}.") if prefix else name
        for old, new in tables()["attention"].items():
            if name.endswith(old):
                name = name.removesuffix(old) + new
        return prefix, re.sub(r"\.processor$", "", name), _ENDINGS[ending]


def parse(tensors: Mapping[str, Tensor], file: object, *, flat: bool) -> list[Part]:
    """All modules of a file, in its order.

    Raises:
        ConverterError: ``E_CONVERT_KEY`` for a key that is not of this spelling, or two that are one tensor.
    """
    names = FileNames(flat=flat)
    found: dict[tuple[str, str], Part] = {}
    wrong = [key for key in tensors if names.split(key) is None]
    if wrong:
        raise ConverterError(
            "E_CONVERT_KEY", "a key does not have the form of such a file", where=file, found=wrong[0], also=wrong[1:]
        )
    for key, value in tensors.items():
        taken = names.split(key)
        assert taken is not None
        prefix, name, parameter = taken
        part = found.setdefault((prefix, name), Part(prefix=prefix, name=name, flat=flat))
        if parameter in part.tensors:
            raise ConverterError("E_CONVERT_KEY", "two keys are one tensor", where=file, found=key)
        part.tensors[parameter] = value
        part.keys[parameter] = key
    return list(found.values())


def find_file(path: str | os.PathLike[str]) -> Path:
    """The file itself, or the one that a folder is about.

    Raises:
        ConverterError: ``E_CONVERT_FORMAT`` where a folder holds none, or several.
    """
    place = Path(path)
    if not place.is_dir():
        return place
    named = [place / name for name in _FILES if (place / name).is_file()]
    found = named[:1] or sorted(place.glob("*.safetensors"))
    if len(found) != 1:
        raise ConverterError(
            "E_CONVERT_FORMAT",
            "the folder does not hold one file of LoRA weights",
            where=place,
            found=", ".join(one.name for one in found) or None,
            hint="name the file",
        )
    return found[0]


def import_file(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    backbone: object,
    flat: bool,
    extension: str,
    alpha: float | None,
    overwrite: bool,
) -> Package:
    """Make a package of each part of a pipeline that a file is about; see the two formats for the arguments.

    Raises:
        ConverterError: as the formats say; nothing is written then.
    """
    from deltahub.package import Package

    file = find_file(path)
    tensors, metadata = read_tensors(file)
    parts = parse(tensors, file, flat=flat)
    if not parts:
        raise ConverterError("E_CONVERT_EMPTY", "there is nothing in it that would change a model", where=file)
    noted = _alphas(parts, metadata, alpha, file)
    verbatim = Verbatim.of_file(file, flat=flat)
    with Components(backbone, {part.prefix for part in parts}) as components:
        groups: dict[str, list[Part]] = {}
        for part in parts:
            groups.setdefault(components.of(part.prefix), []).append(part)
        entries = {name: _entries(group, components.base(name), verbatim) for name, group in groups.items()}
        kept = {} if alpha is not None and noted else verbatim.kept()  # the file says nothing of that alpha
        several = len(groups) > 1
        extensions = {
            name: {extension: {"component": name, **noted, **(kept if i == 0 else {})}} for i, name in enumerate(groups)
        }
        if not several:
            (name,) = groups
            base = components.base(name)
            return write_entries(out, entries[name], base, extensions=extensions[name], overwrite=overwrite)
        with new_folder(out, overwrite=overwrite) as folder:
            for name in groups:
                write_entries(folder / name, entries[name], components.base(name), extensions=extensions[name])
        return Package.open(Path(out) / next(iter(groups)))


def _alphas(parts: list[Part], metadata: Mapping[str, str], alpha: float | None, file: Path) -> dict[str, Any]:
    """Give every module its alpha: the file's own, the configuration's in its metadata, the caller's, or none at all.

    Returns:
        What a package says of it, where the file said nothing.
    """
    import torch

    scaled = [part for part in parts if _SCALED & part.tensors.keys()]
    without = [part for part in scaled if "alpha" not in part.tensors]
    if not without:
        return {}
    configs = _configurations(metadata, file)
    if configs and len(without) == len(scaled):
        from deltahub.converters.peft_config import Scales

        scales = {prefix: Scales(config) for prefix, config in configs.items()}
        for part in without:
            if part.prefix not in scales:
                raise _missing("its metadata configures other parts of the pipeline only", part, file)
            rank = int(part.tensors["lora_down.weight"].shape[0])
            value = scales[part.prefix].of(part.name, rank) * rank
            part.tensors["alpha"] = torch.tensor(value, dtype=torch.float64)
        return {"alpha": "in the file's metadata"}
    if alpha is not None:
        for part in without:
            part.tensors["alpha"] = torch.tensor(alpha, dtype=torch.float64)
        return {"alpha": f"{alpha}, as whoever converted it said"}
    if len(without) < len(scaled):
        raise _missing("some modules have an alpha and some have none", without[0], file)
    logger.warning("%s has no alpha: its scale is taken to be 1, as every reader of such files does", file)
    return {"alpha": "none in the file: a scale of 1"}


def _missing(what: str, part: Part, file: Path) -> ConverterError:
    return ConverterError(
        "E_CONVERT_MISSING", what, where=file, found=f"{part.label}.alpha", hint="say alpha=… if you know it"
    )


def _configurations(metadata: Mapping[str, str], file: Path) -> dict[str, dict[str, Any]]:
    """PEFT's configurations that newer diffusers keep in a file's header, by part of the pipeline."""
    import json

    text = metadata.get("lora_adapter_metadata")
    if text is None:
        return {}
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):
        raise ConverterError("E_CONVERT_CONFIG", "its metadata is no configuration", where=file)
    found: dict[str, dict[str, Any]] = {}
    for key, value in document.items():
        prefix, _, name = str(key).partition(".")
        found.setdefault(prefix, {})[name] = value
    return {prefix: config for prefix, config in found.items() if {"r", "lora_alpha"} <= config.keys()}


def _entries(parts: list[Part], base: Base, verbatim: Verbatim) -> list[Entry]:
    names = Names(base.arch.model)
    found: list[Entry] = []
    for part in parts:
        place = names.find(part.name, flat=part.flat, where=part.label)
        sites = _sites(part, place, base)
        verbatim.add(part.keys, sites, place, part.tensors, write_part)
        found += sites
    return found


def _sites(part: Part, place: Place, base: Base) -> list[Entry]:
    hosts = [base.arch.host(path) for path in place.paths]
    if len(hosts) == 1 and not place.swap:
        return [read(part.tensors, place.paths[0], hosts[0].shape, part.label)]
    sizes = [host.shape.d_out or 0 for host in hosts]
    pieces = split(part.tensors, sizes, swap=place.swap, where=part.label)
    return [read(piece, host.path, host.shape, part.label) for piece, host in zip(pieces, hosts, strict=True)]
