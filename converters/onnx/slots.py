"""Slots: the places in one backbone graph where deltas are put per run.

A slot is a tensor of a kind at a host, made an input of the graph with a neutral default: usually of size 0, so that a
graph without a delta computes as good as nothing more. Sizes such as a rank stay open. A number in the kind's config
that multiplies is folded into the tensors when a delta is put in, so that one graph serves them all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from deltahub.converters.onnx.graphs import Graph, Input
from deltahub.errors import ConverterError

if TYPE_CHECKING:
    from deltahub.sites import Site

__all__ = ["RULES", "Rule", "Slot", "filled", "neutral", "slot_name", "with_slots"]


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
            config={"rank": 3, "scale": 1.0}, open="rank", scaled=("up", "bias"), fixed={"biased": False},
            joined={"down": 0, "up": 1},
        ),
        "adapter": Rule(
            config={"bottleneck": 3, "scale": 1.0}, open="bottleneck", scaled=("up", "up_bias"),
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
        least: the size of open axes without a delta: 0, or 1 where a convolution must have a channel.
        used: whether a graph has it; one of several models of a host, such as a VAE's encoder, may be in none.
    """

    name: str
    kind: str
    config: Mapping[str, Any]
    path: str
    tensor: str
    shape: tuple[int | None, ...]
    least: int = 0
    used: bool = True


def slot_name(kind: str, path: str, tensor: str) -> str:
    return f"{kind}/{path}/{tensor}"


def neutral(slot: Slot) -> Tensor:
    """The value with which a slot does nothing."""
    return torch.zeros([slot.least if n is None else n for n in slot.shape])


def slots_of(site: Site) -> list[Slot]:
    """The slots that a site of the trace becomes.

    Raises:
        ConverterError: ``E_ONNX_SLOT`` for a kind that no rule knows.
    """
    kind = site.bound.kind
    rule = rule_of(kind.name)
    wider = {**site.bound.config, rule.open: 5} if rule.open else dict(site.bound.config)
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
            least=int(site.bound.shape.family == "conv"),
        )
        for name, spec in narrow.items()
    ]


def with_slots(graph: Graph, sites: Sequence[Site], slots: Mapping[str, Slot]) -> Graph:
    """A graph that also takes the tensors of sites, at any size where they are open."""
    places = {
        slot_name(site.bound.kind.name, site.path, name): (site, name) for site in sites for name in site.names
    }  # fmt: skip
    inputs, sizes = [], {}
    for name, (site, tensor) in places.items():
        shape = dict(zip(site.names, site.tensors(), strict=True))[tensor].shape
        dims = [size if want is None else want for size, want in zip(shape, slots[name].shape, strict=True)]
        axes = [f"{name}.{i}" if want is None else want for i, want in enumerate(slots[name].shape)]
        sizes.update({axis: size for axis, size in zip(axes, dims, strict=True) if isinstance(axis, str)})
        inputs.append(Input(name=name, dims=tuple(axes)))

    def call(model: nn.Module, given: dict[str, Tensor]) -> Sequence[Tensor]:
        with _held({places[name]: given[name] for name in places}):
            return graph.call(model, {name: value for name, value in given.items() if name not in places})

    return replace(graph, call=call, inputs=(*graph.inputs, *inputs), sizes=({**graph.sizes[0], **sizes},))


@contextmanager
def _held(values: Mapping[tuple[Site, str], Tensor]) -> Iterator[None]:
    """Sites compute with these tensors, whatever their shapes, while the block runs."""
    before = []
    for (site, name), value in values.items():
        store: dict[str, Any] = site._parameters if name in site._parameters else site._buffers
        before.append((store, name, store[name]))
        store[name] = value
    try:
        yield
    finally:
        for store, name, value in before:
            store[name] = value


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
        if not slot.used:
            continue
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
