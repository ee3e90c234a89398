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
from deltahub.choosing import choose, split
from deltahub.delta import Delta
from deltahub.errors import UsageError

__all__ = ["Preset", "attach_preset", "get", "names"]


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A kind with configs for the sites of a known architecture.

    Attributes:
        name: as in ``spec/presets.toml``.
        kind: the kind's name.
        title: one line for people.
        parts: name, targets and whole config of each part.
    """

    name: str
    kind: str
    title: str
    parts: tuple[tuple[str, tuple[str, ...], Mapping[str, object]], ...]


@functools.cache
def _all() -> Mapping[str, Preset]:
    data = tomllib.loads(files("deltahub.spec").joinpath("presets.toml").read_text(encoding="utf-8"))
    return MappingProxyType({name: _preset(name, entry) for name, entry in data.items()})


def _preset(name: str, entry: Mapping[str, Any]) -> Preset:
    shared = entry.get("config", {})
    parts = tuple((p["name"], tuple(p["targets"]), {**shared, **p["config"]}) for p in entry["parts"])
    return Preset(name=name, kind=entry["kind"], title=entry["title"], parts=parts)


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
        name: the delta's name; the kind's by default.
        targets: other targets, for a preset of a single part.
        exclude: what to leave out, as for :func:`deltahub.attach`.
        frozen: as for :func:`deltahub.attach`.
        dtype: as for :func:`deltahub.attach`.
        seed: as for :func:`deltahub.attach`.
        changes: config values that differ from the preset's, in all parts.

    Raises:
        UsageError: ``E_USAGE_PRESET``.
        DeltaHubError: as :func:`deltahub.attach`.
    """
    chosen = get(preset)
    if targets is not None and len(chosen.parts) != 1:
        raise UsageError("E_USAGE_PRESET", f"preset {preset!r} has parts with targets of their own", found=targets)
    kind = kinds.get(chosen.kind)
    parts = [
        one
        for part, own, config in chosen.parts
        for one in split(
            model,
            part,
            kind,
            kind.check_config({**config, **changes}),
            choose(model, own if targets is None else targets, exclude),
        )
    ]
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return attach_parts(model, name or kind.name, parts, frozen=frozen, dtype=dtype, generator=generator)
