"""Presets: published configs of a kind for the sites of a known architecture, as authoring data."""

from __future__ import annotations

import difflib
import functools
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from deltahub import kinds
from deltahub.attaching import attach_parts
from deltahub.choosing import Modules, by_default, choose, split
from deltahub.delta import Delta
from deltahub.errors import UsageError
from deltahub.sites import Part
from deltahub.targets import backbone_modules

__all__ = ["Preset", "PresetPart", "attach_preset", "get", "names"]


@dataclass(frozen=True, kw_only=True)
class PresetPart:
    """One kind with one config.

    Attributes:
        name: of the part.
        kind: the kind's name.
        targets: where it goes; none for the kind's own.
        config: the whole config.
    """

    name: str
    kind: str
    targets: tuple[str, ...]
    config: Mapping[str, object]


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Kinds with configs for the sites of a known architecture, or of any that has the roles.

    Attributes:
        name: as in ``spec/presets.toml``.
        title: one line for people.
        parts: what it consists of.
    """

    name: str
    title: str
    parts: tuple[PresetPart, ...]


@functools.cache
def _all() -> Mapping[str, Preset]:
    data = tomllib.loads(files("deltahub.spec").joinpath("presets.toml").read_text(encoding="utf-8"))
    return MappingProxyType({name: _preset(name, entry) for name, entry in data.items()})


def _preset(name: str, entry: Mapping[str, Any]) -> Preset:
    shared = entry.get("config", {})
    parts = tuple(
        PresetPart(
            name=part["name"],
            kind=part.get("kind") or entry["kind"],
            targets=tuple(part.get("targets", ())),
            config={**shared, **part["config"]},
        )
        for part in entry["parts"]
    )
    return Preset(name=name, title=entry["title"], parts=parts)


def names() -> list[str]:
    """Names of all presets, sorted."""
    return sorted(_all())


def get(name: str) -> Preset:
    """A preset by name.

    Raises:
        UsageError: ``E_USAGE_PRESET`` for an unknown one.
    """
    try:
        return _all()[name]
    except KeyError:
        near = difflib.get_close_matches(name, names(), 1)
        raise UsageError(
            "E_USAGE_PRESET",
            f"there is no preset {name!r}",
            expected=", ".join(names()),
            hint=f"did you mean {near[0]!r}?" if near else None,
        ) from None


def attach_preset(
    model: nn.Module,
    preset: str,
    *,
    name: str | None = None,
    targets: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] = (),
    frozen: bool = True,
    dtype: torch.dtype | None = None,
    seed: int | None = None,
    **changes: object,
) -> Delta:
    """Attach a fresh delta as a preset says, one part for each of its configs.

    Args:
        model: a model of the architecture that the preset is for.
        preset: its name.
        name: the delta's name; the kind's by default, or the preset's where there are several.
        targets: other targets, for a preset of a single part.
        exclude: what to leave out, as for :func:`deltahub.attach`.
        frozen: as for :func:`deltahub.attach`.
        dtype: as for :func:`deltahub.attach`.
        seed: as for :func:`deltahub.attach`.
        changes: config values that differ from the preset's, in all parts whose kinds have them.

    Raises:
        UsageError: ``E_USAGE_PRESET``.
        DeltaHubError: as :func:`deltahub.attach`.
    """
    chosen = get(preset)
    if targets is not None and len(chosen.parts) != 1:
        raise UsageError("E_USAGE_PRESET", f"preset {preset!r} has parts with targets of their own", found=targets)
    known = {key for part in chosen.parts for key in kinds.get(part.kind).document.config}
    if strange := sorted(set(changes) - known):
        raise UsageError("E_USAGE_PRESET", f"no part of preset {preset!r} has such config values", found=strange)
    modules = backbone_modules(model)
    parts = [one for part in chosen.parts for one in _parts(modules, part, targets, exclude, changes)]
    used = {part.kind for part in chosen.parts}
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    name = name or (used.pop() if len(used) == 1 else preset)
    return attach_parts(model, name, parts, frozen=frozen, dtype=dtype, generator=generator, modules=modules)


def _parts(
    modules: Modules,
    part: PresetPart,
    targets: str | Sequence[str] | None,
    exclude: str | Sequence[str],
    changes: Mapping[str, object],
) -> list[Part]:
    kind = kinds.get(part.kind)
    own = {key: value for key, value in changes.items() if key in kind.document.config}
    config = kind.check_config({**part.config, **own})
    wanted = part.targets if targets is None else targets
    chosen = choose(modules, wanted, exclude) if wanted else by_default(modules, kind, exclude)
    inputs = kind.document.inputs if not wanted else ()
    return split(modules, part.name, kind, config, chosen, choose(modules, inputs, exclude) if inputs else ())
