"""Slots: the places in one backbone graph where deltas are put per run.

A slot is a tensor of a kind at a host, made an input of the graph with a neutral default: usually of size 0, so that a
graph without a delta computes as good as nothing more. Sizes such as a rank stay open. A number in the kind's config
that multiplies is folded into the tensors when a delta is put in, so that one graph serves them all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from deltahub.errors import ConverterError

if TYPE_CHECKING:
    from deltahub.sites import Site

__all__ = ["RULES", "Rule", "Slot", "filled", "neutral", "slot_name"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """How a kind's tensors go into slots.

    Attributes:
        config: the config with which slots of the kind are made.
        open: the config number that sizes may differ in, which no equation mentions.
        scaled: tensors that the strength is multiplied into.
        fixed: config values that a delta must have.
        joined: tensors that several deltas are laid side by side in, with the axis; the others are added up.
    """

    config: Mapping[str, Any]
    scaled: tuple[str, ...]
    open: str | None = None
    fixed: Mapping[str, Any] = field(default_factory=dict)
    joined: Mapping[str, int] = field(default_factory=dict)


RULES: Mapping[str, Rule] = MappingProxyType(
    {
        "lora": Rule(
            config={"rank": 1, "scale": 1.0}, open="rank", scaled=("up", "bias"), fixed={"biased": False},
            joined={"down": 0, "up": 1},
        ),
        "adapter": Rule(
            config={"bottleneck": 1, "scale": 1.0}, open="bottleneck", scaled=("up", "up_bias"),
            fixed={"residual": True, "layer_norm": False}, joined={"down": 0, "down_bias": 0, "up": 1},
        ),
        "bias": Rule(config={"scale": 1.0}, scaled=("value",)),
    }
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Slot:
    """One tensor of a kind at a host.

    Attributes:
        name: the graph's input.
        kind: the kind.
        config: config values that a delta in it must have.
        path: the host.
        tensor: the kind's tensor.
        shape: its shape; ``None`` where it is open.
    """

    name: str
    kind: str
    config: Mapping[str, Any]
    path: str
    tensor: str
    shape: tuple[int | None, ...]


def slot_name(kind: str, path: str, tensor: str) -> str:
    return f"{kind}/{path}/{tensor}"


def neutral(slot: Slot, *, empty: bool) -> Tensor:
    """The value with which a slot does nothing: open axes are 0, or 1 where a convolution must have a channel."""
    return torch.zeros([(0 if empty else 1) if n is None else n for n in slot.shape])


def slots_of(site: Site) -> list[Slot]:
    """The slots that a site of the trace becomes.

    Raises:
        ConverterError: ``E_ONNX_SLOT`` for a kind that no rule knows.
    """
    kind = site.bound.kind
    rule = rule_of(kind.name)
    wider = {**site.bound.config, rule.open: 2} if rule.open else dict(site.bound.config)
    narrow = kind.tensors(site.bound.config, site.bound.shape)
    wide = kind.tensors(wider, site.bound.shape)
    scale = kind.document.strength or "scale"
    said = {k: v for k, v in site.bound.config.items() if k not in {rule.open, scale}}
    return [
        Slot(
            name=slot_name(kind.name, site.path, name),
            kind=kind.name,
            config=said,
            path=site.path,
            tensor=name,
            shape=tuple(a if a == b else None for a, b in zip(spec.shape, wide[name].shape, strict=True)),
        )
        for name, spec in narrow.items()
    ]


def rule_of(kind: str) -> Rule:
    rule = RULES.get(kind)
    if rule is None:
        raise ConverterError("E_ONNX_SLOT", f"there are no slots for the kind {kind!r}", expected=", ".join(RULES),
                             found=kind, hint='export this delta by itself: form="merged" or form="live"')  # fmt: skip
    return rule


def filled(
    slots: Mapping[str, Slot], kind: str, config: Mapping[str, Any], path: str, tensors: Mapping[str, Tensor], *,
    strength: float = 1.0, scale: str = "scale",
) -> dict[str, Tensor]:  # fmt: skip
    """A delta's tensors at one host as values of slots, its scale folded in.

    Raises:
        ConverterError: ``E_ONNX_SLOT`` where the graph has no such slot, or one of another shape or config.
    """
    rule = rule_of(kind)
    factor = float(config.get(scale, 1.0)) * strength
    found: dict[str, Tensor] = {}
    for name, value in tensors.items():
        slot = slots.get(slot_name(kind, path, name))
        if slot is None:
            raise ConverterError("E_ONNX_SLOT", "the graph has no slot for this tensor", where=path,
                                 found=f"{kind}, {name}", hint="export again with this target")  # fmt: skip
        wrong = {k: config.get(k) for k, v in slot.config.items() if config.get(k) != v}
        if wrong:
            raise ConverterError("E_ONNX_SLOT", "the slot is for another config", where=slot.name,
                                 expected=dict(slot.config), found=wrong)  # fmt: skip
        _check_shape(slot, tuple(value.shape))
        found[slot.name] = value.float() * factor if name in rule.scaled else value.float()
    return found


def _check_shape(slot: Slot, shape: tuple[int, ...]) -> None:
    fits = len(shape) == len(slot.shape) and all(b in {None, a} for a, b in zip(shape, slot.shape, strict=True))
    if not fits:
        raise ConverterError("E_ONNX_SLOT", "the tensor does not fit its slot", where=slot.name,
                             expected=["any" if n is None else n for n in slot.shape], found=list(shape))  # fmt: skip


def together(slots: Mapping[str, Slot], values: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Several deltas at once: laid side by side along their open axis, which is the exact sum; or added up."""
    import numpy as np

    found: dict[str, list[Any]] = {}
    for one in values:
        for name, value in one.items():
            found.setdefault(name, []).append(value)
    made = {}
    for name, parts in found.items():
        slot = slots[name]
        along = RULES[slot.kind].joined.get(slot.tensor)
        if len(parts) == 1:
            made[name] = parts[0]
        elif along is not None:
            made[name] = np.ascontiguousarray(np.concatenate(parts, along))
        else:
            made[name] = np.sum(parts, axis=0, dtype=parts[0].dtype)
    return made
