"""Packages as one LoRA file of a diffusion pipeline: the reverse of diffusion.py.

A package that came out of such a file, and still holds what the file held, gives the same bytes again. Any other is
written afresh: kohya's names are what sd-scripts calls the modules (its own for SDXL and Flux, with fused modules
joined), diffusers' are the modules' own; diffusers' form has no alpha, so the scale goes into the second factor.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltahub.converters.components import Components
from deltahub.converters.entries import Entry, entries_of
from deltahub.converters.lycoris import join
from deltahub.converters.lycoris_writing import write as write_part
from deltahub.converters.naming import Names
from deltahub.converters.packages import opened
from deltahub.converters.shards import new_folder
from deltahub.converters.verbatim import Verbatim
from deltahub.errors import ConverterError, TensorFileError

if TYPE_CHECKING:
    from torch import Tensor

    from deltahub.package import Package

__all__ = ["export_file"]

_DEFAULT = "pytorch_lora_weights.safetensors"


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """A package and the part of the pipeline that it is for."""

    component: str
    package: Package
    entries: Mapping[str, Entry]


def export_file(
    package: Package | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    backbone: object,
    flat: bool,
    extension: str,
) -> Path:
    """Write one file; see the two formats for the arguments.

    Returns:
        ``out``: the file where its name ends in ``.safetensors``, else a folder that holds it.
    """
    from deltahub.tensors import write
    from deltahub.tensors.files import replacing

    pieces = _pieces(package)
    target = Path(out)
    data = _again(pieces, extension)
    tensors = None if data is not None else _fresh(pieces, backbone, flat=flat)

    def put(path: Path) -> None:
        if data is None:
            assert tensors is not None
            write(path, tensors, metadata={"format": "pt"})
            return
        try:
            with replacing(path) as file:
                file.write(data)
        except OSError as error:
            raise TensorFileError("E_TENSORS_WRITE", f"the file cannot be written: {error}", where=path) from None

    if target.suffix == ".safetensors":
        if target.exists():
            raise ConverterError("E_MERGE_OUTPUT", "there is something here already", where=target)
        put(target)
    else:
        with new_folder(target) as folder:
            put(folder / _DEFAULT)
    return target


def _pieces(source: Package | str | os.PathLike[str]) -> list[_Piece]:
    """One package, or one for each part of a pipeline in folders of its own."""
    found = []
    if isinstance(source, (str, os.PathLike)) and Path(source).is_dir() and not (Path(source) / "delta.json").exists():
        found = [opened(path.parent) for path in sorted(Path(source).glob("*/delta.json"))]
    pieces = []
    for package in found or [opened(source)]:
        section = package.manifest.backbone.source
        name = (section.subfolder if section is not None else None) or _guess(section.class_ if section else None)
        entries: dict[str, Entry] = {}
        for entry in entries_of(package):
            if entry.path in entries:
                raise _cannot([f"two deltas at {entry.path}"])
            entries[entry.path] = entry
        pieces.append(_Piece(component=name, package=package, entries=entries))
    return pieces


def _guess(class_name: str | None) -> str:
    name = (class_name or "").rpartition(".")[2]
    return "unet" if name.startswith("UNet") else "text_encoder" if "Text" in name else "transformer"


def _cannot(reasons: list[str]) -> ConverterError:
    return ConverterError(
        "E_CONVERT_EXPORT",
        "such a file cannot say what this package computes",
        found=reasons[0],
        hint="merge it, or load it with DeltaHub",
        also=tuple(reasons[1:]),
    )


def _again(pieces: list[_Piece], extension: str) -> bytes | None:
    """The file that the packages came out of, where they came out of one and hold the same."""
    sections = [(piece.package.manifest.extensions or {}).get(extension) for piece in pieces]
    kept = next((one for one in sections if isinstance(one, dict) and "file" in one), None)
    verbatim = None if kept is None or not all(isinstance(one, dict) for one in sections) else Verbatim.of_kept(kept)
    if verbatim is None:
        return None
    entries = {path: entry for piece in pieces for path, entry in piece.entries.items()}
    if len(entries) != sum(len(piece.entries) for piece in pieces):
        return None
    values = verbatim.values(entries, write_part)
    return None if values is None else verbatim.bytes_of(values)


def _fresh(pieces: list[_Piece], backbone: object, *, flat: bool) -> dict[str, Tensor]:
    if backbone is None:
        raise ConverterError(
            "E_CONVERT_BACKBONE",
            "modules are called otherwise in such a file, so the backbone is needed to name them",
            hint="pass the backbone: the pipeline, or the part that the package is for",
        )
    found: dict[str, Tensor] = {}
    prefixes = _prefixes(pieces, backbone) if flat else {piece.component: piece.component for piece in pieces}
    with Components(backbone, prefixes.values()) as components:
        for piece in pieces:
            prefix = prefixes[piece.component]
            names = Names(components.base(components.of(prefix)).arch.model)
            model = components.base(components.of(prefix)).arch.model
            found |= _flat(piece, names, prefix, model) if flat else _dotted(piece, prefix)
    return found


def _prefixes(pieces: list[_Piece], backbone: object) -> dict[str, str]:
    """Names that kohya gives the parts: text encoders are numbered where a pipeline has several."""
    present = {piece.component for piece in pieces}
    sources = [piece.package.manifest.backbone.source for piece in pieces]
    named = [one.model_dump(by_alias=True).get("pipeline") for one in sources if one is not None]
    pipeline = next((str(one) for one in named if one), type(backbone).__name__)
    several = "text_encoder_2" in present or any(word in pipeline for word in ("XL", "Flux", "Diffusion3"))
    table = {"unet": "lora_unet", "transformer": "lora_unet", "text_encoder": "lora_te1" if several else "lora_te"}
    table |= {"text_encoder_2": "lora_te3" if "Flux" in pipeline else "lora_te2", "text_encoder_3": "lora_te3"}
    return {name: table[name] for name in present}


def _parts(entries: Mapping[str, Entry]) -> dict[str, dict[str, Tensor]]:
    made, wrong = {}, []
    for path, entry in entries.items():
        part = write_part(entry)
        if part is None:
            wrong.append(f"{entry.kind} at {path}")
        else:
            made[path] = part
    if wrong:
        raise _cannot(wrong)
    return made


def _flat(piece: _Piece, names: Names, prefix: str, model: Any) -> dict[str, Tensor]:
    parts = _parts(piece.entries)
    found: dict[str, Tensor] = {}
    config = getattr(model, "config", None)
    renamed = type(model).__name__ != "UNet2DConditionModel" or getattr(config, "addition_embed_type", None) is not None
    groups: list[tuple[str, ...]] = [(path,) for path in parts]
    for group in names.fused():
        there = [path for path in group if path in parts]
        if len(there) == len(group):
            groups = [one for one in groups if one[0] not in group] + [group]
        elif there:
            missing = ", ".join(path for path in group if path not in parts)
            raise _cannot([f"{there[0]} is fused with {missing} in such a file, and the package has nothing for those"])
    for group in groups:
        theirs = names.theirs(group) if renamed else None
        part = _fused(piece, parts, group, swap=names.find(theirs, flat=False, where=theirs).swap if theirs else False)
        label = f"{prefix}_{names.flatten(theirs or group[0])}"
        for name, value in part.items():
            # sd-scripts keeps alpha beside the weights, in a type that holds it exactly
            found[f"{label}.{name}"] = value.float() if name == "alpha" and value.is_floating_point() else value
    return found


def _fused(
    piece: _Piece, parts: Mapping[str, dict[str, Tensor]], group: tuple[str, ...], *, swap: bool
) -> dict[str, Tensor]:
    if len(group) == 1 and not swap:
        return parts[group[0]]
    shared = join([parts[path] for path in group], swap=swap)
    if shared is not None:
        return shared
    import torch

    entries = [piece.entries[path] for path in group]
    if any(entry.kind != "lora" or entry.tensors["down"].ndim != 2 or "bias" in entry.tensors for entry in entries):
        raise _cannot([f"{entries[0].kind} at {entries[0].path}: it is one module with others in such a file"])
    # Their factors one below the other, each with outputs of its own: exact, at the sum of the ranks.
    rank = sum(entry.config["rank"] for entry in entries)
    ups = [_scaled(entry) for entry in entries]
    up = torch.zeros(sum(one.shape[0] for one in ups), rank, dtype=ups[0].dtype)
    row = column = 0
    for one in ups:
        up[row : row + one.shape[0], column : column + one.shape[1]] = one
        row, column = row + one.shape[0], column + one.shape[1]
    down = torch.cat([entry.tensors["down"] for entry in entries])
    up = torch.cat(up.chunk(2)[::-1]) if swap else up
    return {
        "lora_up.weight": up.to(down.dtype),
        "lora_down.weight": down,
        "alpha": torch.tensor(float(rank), dtype=torch.float64),
    }


def _scaled(entry: Entry) -> Tensor:
    up = entry.tensors["up"]
    return up if entry.config["scale"] == 1.0 else (up.double() * entry.config["scale"]).to(up.dtype)


def _dotted(piece: _Piece, prefix: str) -> dict[str, Tensor]:
    """The form that PEFT gave diffusers: low-rank pairs, with magnitudes perhaps, and no alpha."""
    wrong = [f"{e.kind} at {e.path}" for e in piece.entries.values() if e.kind not in {"lora", "dora"}]
    wrong += [f"{e.kind} by inputs at {e.path}" for e in piece.entries.values() if e.config.get("axis") == "in"]
    if wrong:
        raise _cannot(wrong)
    found: dict[str, Tensor] = {}
    for path, entry in piece.entries.items():
        scale = entry.config["scale"]
        tensors = {**entry.tensors, "up": _scaled(entry)}
        if "bias" in tensors and scale != 1.0:
            tensors["bias"] = (tensors["bias"].double() * scale).to(tensors["bias"].dtype)
        part = write_part(replace(entry, config={**entry.config, "scale": 1.0}, tensors=tensors))
        assert part is not None
        found[f"{prefix}.{path}.lora_A.weight"] = part["lora_down.weight"]
        found[f"{prefix}.{path}.lora_B.weight"] = part["lora_up.weight"]
        if "lora_up.bias" in part:
            found[f"{prefix}.{path}.lora_B.bias"] = part["lora_up.bias"]
        if "magnitude" in tensors:
            found[f"{prefix}.{path}.lora_magnitude_vector"] = tensors["magnitude"]
    return found
