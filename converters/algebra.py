"""Delta algebra: packages for one backbone into another package, without the backbone.

    add              combine([a, b], out)
    subtract         combine([a, b], out, weights=[1, -1])
    scale            combine(a, out, weights=0.5)
    interpolate      combine([a, b], out, weights=[1 - t, t])
    recompress       combine([a, b], out, rank=16)
    change dtype     combine(a, out, dtype="bfloat16")
    split            combine(a, out, only=["*.attention.*"])
    rename targets   combine(a, out, rename={"bert.encoder": "roberta.encoder"}, backbone="other/")

Low-rank updates of one weight become one update whose rank is the sum of theirs, which is exact. What adds to a weight
in another form is kept beside it, part after part. What does not add (a weight that is set, an adapter, a normalised
update) cannot share its module with anything and takes no weight that its kind has no number for.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltahub.converters.entries import Entry, entries_of, grouped, write_entries
from deltahub.converters.packages import opened
from deltahub.errors import ConverterError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from deltahub.package import Package

__all__ = ["combine"]

_ADDITIVE = frozenset({"bias", "diff", "diff-int8", "diff-sign", "locon", "loha", "lokr", "lora", "sparse"})
"""Kinds whose effect on a weight does not depend on the weight, nor on what else was added to it."""


def combine(
    packages: Package | str | os.PathLike[str] | Sequence[Package | str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    weights: float | Sequence[float] = 1.0,
    rank: int | None = None,
    energy: float | None = None,
    dtype: torch.dtype | str | None = None,
    only: Sequence[str] = (),
    rename: Mapping[str, str] | None = None,
    backbone: nn.Module | str | os.PathLike[str] | None = None,
    overwrite: bool = False,
) -> Package:
    """Write one package out of one or several.

    Args:
        packages: packages for one backbone, or folders or Hub names of packages.
        out: the new package's folder.
        weights: a factor on each package's effect, or one for all.
        rank: of each low-rank update afterwards: the best one in the sense of least squares.
        energy: instead of a rank, the share of each update's sum of squares to keep, such as 0.99.
        dtype: of floating tensors.
        only: globs over targets, or names of modules of a manifest; the rest is left out.
        rename: parts of targets, from dot to dot, and what takes their place: of two that fit, the longer one.
        backbone: what renamed targets are for; needed with ``rename``, and only there.
        overwrite: replace a package that is there.

    Raises:
        ConverterError: ``E_COMBINE_BACKBONE`` for packages for different backbones, ``E_COMBINE_WEIGHTS``,
            ``E_COMBINE_KIND`` where something cannot be added or scaled, ``E_COMBINE_OPTIONS``, ``E_COMBINE_EMPTY``
            where nothing is left.
        PackageError: a value is too large for the dtype, or the folder cannot be written.
    """
    several = [packages] if isinstance(packages, (str, os.PathLike)) or not isinstance(packages, Sequence) else packages
    sources = [opened(one) for one in several]
    factors = _checked(sources, weights, rank, energy, rename, backbone)
    entries = [
        _scaled(entry, factor, where=f"{number}:{entry.group}")
        for number, (package, factor) in enumerate(zip(sources, factors, strict=True))
        for entry in entries_of(package)
        if not only or any(fnmatchcase(entry.path, one) or entry.group == one for one in only)
    ]
    entries = [entry for place in _by_path(entries).values() for entry in _joined(place)]
    if rank is not None or energy is not None:
        entries = [_recompressed(entry, rank, energy) for entry in entries]
    if dtype is not None:
        entries = [_cast(entry, dtype) for entry in entries]
    if not entries:
        raise ConverterError("E_COMBINE_EMPTY", "nothing is left", where=out, found=", ".join(only) or None)
    if rename:
        return _renamed(out, entries, rename, backbone, overwrite=overwrite)
    return _written(out, entries, sources, overwrite=overwrite)


def _checked(
    sources: Sequence[Package],
    weights: float | Sequence[float],
    rank: int | None,
    energy: float | None,
    rename: Mapping[str, str] | None,
    backbone: object,
) -> list[float]:
    factors = [float(weights)] * len(sources) if isinstance(weights, int | float) else [float(w) for w in weights]
    if len(factors) != len(sources) or not all(map(math.isfinite, factors)):
        raise ConverterError("E_COMBINE_WEIGHTS", "each package needs one finite weight", found=factors)
    wrong = None
    if rank is not None and (rank < 1 or energy is not None):
        wrong = "low-rank updates get a rank of 1 at least, or keep a share of their energy"
    elif energy is not None and not 0 < energy < 1:
        wrong = "an energy lies between 0 and 1"
    elif (rename is not None) != (backbone is not None):
        wrong = "targets are renamed for another backbone: both are given, or neither"
    if wrong is not None:
        raise ConverterError("E_COMBINE_OPTIONS", wrong, found=f"rank={rank}, energy={energy}, rename={rename}")
    first = sources[0].manifest.backbone.identity
    for package in sources[1:]:
        own = package.manifest.backbone.identity
        if own.exact != first.exact and own.bf16 != first.bf16:
            raise ConverterError(
                "E_COMBINE_BACKBONE",
                "the packages are for different backbones",
                where=package.path,
                expected=first.exact,
                found=own.exact,
            )
    return factors


def _scaled(entry: Entry, factor: float, *, where: str) -> Entry:
    if factor == 1.0:
        return entry
    strength = entry.resolved().document.strength
    if strength is None:
        raise ConverterError(
            "E_COMBINE_KIND", f"{entry.kind} has no number that a weight could multiply", where=f"{where}/{entry.path}"
        )
    return replace(entry, config={**entry.config, strength: float(entry.config[strength]) * factor})


def _by_path(entries: Sequence[Entry]) -> dict[str, list[Entry]]:
    found: dict[str, list[Entry]] = {}
    for entry in entries:
        found.setdefault(entry.path, []).append(entry)
    return found


def _joined(place: Sequence[Entry]) -> list[Entry]:
    """The parts on one module, low-rank updates as one."""
    fixed = [entry for entry in place if entry.kind not in _ADDITIVE]
    if fixed and len(place) > 1:
        raise ConverterError(
            "E_COMBINE_KIND",
            f"{fixed[0].kind} does not add to what else acts on this module",
            where=fixed[0].path,
            found=", ".join(entry.kind for entry in place),
        )
    low = [entry for entry in place if entry.kind == "lora"]
    rest = _distinct([entry for entry in place if entry.kind != "lora"])
    return [*(low if len(low) < 2 else [_concatenated(low)]), *rest]


def _distinct(entries: Sequence[Entry]) -> list[Entry]:
    """Parts on one module, each in a module of the manifest of its own."""
    if len(entries) < 2:
        return list(entries)
    return [replace(entry, group=f"{entry.kind}-{number}") for number, entry in enumerate(entries)]


def _concatenated(low: Sequence[Entry]) -> Entry:
    """Low-rank updates side by side: exact, but for the rounding of scales where they differ."""
    import torch

    scales = [float(entry.config["scale"]) for entry in low]
    common, own = (scales[0], [1.0] * len(low)) if len(set(scales)) == 1 else (1.0, scales)
    wide = _widest(tensor for entry in low for tensor in entry.tensors.values())
    ups = [entry.tensors["up"].to(wide) * factor for entry, factor in zip(low, own, strict=True)]
    tensors = {"down": torch.cat([entry.tensors["down"].to(wide) for entry in low]), "up": torch.cat(ups, dim=1)}
    biased = any(entry.config.get("biased") for entry in low)
    if biased:
        pairs = zip(low, own, strict=True)
        biases = [e.tensors["bias"].to(wide) * factor for e, factor in pairs if e.config.get("biased")]
        tensors["bias"] = torch.stack(biases).sum(0)
    config = {"rank": tensors["down"].shape[0], "scale": common, "biased": biased}
    return replace(low[0], config=config, tensors=tensors, group="lora")


def _widest(tensors: Iterable[Tensor]) -> torch.dtype:
    import torch

    found, *rest = (tensor.dtype for tensor in tensors)
    for one in rest:
        found = torch.promote_types(found, one)
    return found


def _recompressed(entry: Entry, rank: int | None, energy: float | None) -> Entry:
    """The best update of a smaller rank, from the factors alone: the full matrix is never made."""
    import torch

    if entry.kind != "lora":
        return entry
    down, up = entry.tensors["down"], entry.tensors["up"]
    flat = down.double().flatten(1)
    left, upper = torch.linalg.qr(up.double())
    right, lower = torch.linalg.qr(flat.T)
    u, s, vh = torch.linalg.svd(upper @ lower.T)
    kept = s.square().cumsum(0) / max(float(s.square().sum()), 1e-300)
    count = min(rank, len(s)) if rank is not None else min(int((kept < (energy or 1.0)).sum()) + 1, len(s))
    root = s[:count].sqrt()
    tensors = dict(entry.tensors)
    tensors["up"] = (left @ u[:, :count] * root).to(up.dtype).contiguous()
    tensors["down"] = (root[:, None] * (vh[:count] @ right.T)).view(count, *down.shape[1:]).to(down.dtype).contiguous()
    return replace(entry, config={**entry.config, "rank": count}, tensors=tensors)


def _cast(entry: Entry, dtype: torch.dtype | str) -> Entry:
    import torch

    wanted = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(wanted, torch.dtype) or not wanted.is_floating_point:
        raise ConverterError("E_COMBINE_OPTIONS", "this is not a floating dtype", found=dtype)

    def cast(value: Tensor) -> Tensor:
        return value.to(wanted) if value.is_floating_point() else value

    return replace(entry, tensors={name: cast(value) for name, value in entry.tensors.items()})


def _written(
    out: str | os.PathLike[str], entries: Sequence[Entry], sources: Sequence[Package], *, overwrite: bool
) -> Package:
    """With what the packages say of the backbone, and the first one's settings where all have the same."""
    from deltahub.package import write

    sections = [package.manifest.model_dump(by_alias=True, exclude_unset=True) for package in sources]
    backbone = dict(sections[0]["backbone"])
    for name in ("leaves", "leaves_bf16"):
        leaves = {key: leaf for section in sections for key, leaf in (section["backbone"].get(name) or {}).items()}
        backbone |= {name: leaves} if leaves else {}
    settings = {(one["on"], one["path"]): one for section in sections for one in section.get("settings") or ()}
    if any(one not in settings.values() for section in sections for one in section.get("settings") or ()):
        raise ConverterError("E_COMBINE_BACKBONE", "the packages set one field to different values", where=out)
    members, tensors = grouped(entries)
    manifest = {"backbone": backbone, **members} | ({"settings": list(settings.values())} if settings else {})
    return write(Path(out), manifest, tensors, overwrite=overwrite)


def _renamed(
    out: str | os.PathLike[str],
    entries: Sequence[Entry],
    rename: Mapping[str, str],
    backbone: Any,
    *,
    overwrite: bool,
) -> Package:
    from deltahub.converters.base import Base

    base = Base.of(backbone)
    try:
        moved = [replace(entry, path=_new_path(entry.path, rename)) for entry in entries]
        return write_entries(out, moved, base, overwrite=overwrite)
    finally:
        base.close()


def _new_path(path: str, rename: Mapping[str, str]) -> str:
    """Replace the longest part that fits, from dot to dot; once."""
    for old in sorted(rename, key=len, reverse=True):
        at = f".{path}.".find(f".{old}.")
        if at >= 0:
            parts = (path[: max(0, at - 1)], rename[old], path[at + len(old) + 1 :])
            return ".".join(part for part in parts if part)
    return path
