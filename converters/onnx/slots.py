"""Slots: the places in one backbone graph where deltas are put per run.

A slot is a tensor of a kind at a host, made an input of the graph with a neutral default: usually of size 0, so that a
graph without a delta computes as good as nothing more. Sizes such as a rank stay open. A number in the kind's config
that multiplies is folded into the tensors when a delta is put in, so that one graph serves them all. What is open and
what multiplies is found out from the kind's document and the host itself: :mod:`deltahub.converters.onnx.rules`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from deltahub.converters.onnx.graphs import Graph, Input
from deltahub.errors import ConverterError

if TYPE_CHECKING:
    from deltahub.sites import Site

__all__ = ["STRENGTH", "Slot", "check_delta", "check_order", "filled", "slot_name", "together", "with_slots"]

STRENGTH = "*"
"""In :attr:`Slot.scales`, the strength of a whole delta."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Slot:
    """One tensor of a kind at a host.

    Attributes:
        name: the graph's input.
        kind: the kind.
        config: config values that a delta in it must have.
        path: the host.
        tensor: the kind's tensor.
        dtype: of its elements, as safetensors calls it.
        shape: its shape; where it is open, what says the size: ``rank``, ``rank/2``; a ``?`` ends what is not checked.
        scales: config numbers that are multiplied into this tensor.
        adds: whether two deltas in it are one delta: their sum.
        along: the open axis on which two are laid side by side for that; ``None`` where the tensors are added.
        order: slots of one host act in this order.
        used: whether a graph has it; a part of a model, such as a VAE's encoder, may be in none.
    """

    name: str
    kind: str
    config: Mapping[str, Any]
    path: str
    tensor: str
    dtype: str = "F32"
    shape: tuple[int | str, ...] = ()
    scales: tuple[str, ...] = ()
    adds: bool = False
    along: int | None = None
    order: int = 0
    used: bool = True

    def fits(self, shape: Sequence[int], dtype: str) -> bool:
        return (
            dtype == self.dtype
            and len(shape) == len(self.shape)
            and all(isinstance(want, str) or want == got for want, got in zip(self.shape, shape, strict=True))
        )


def slot_name(kind: str, path: str, tensor: str) -> str:
    return f"{kind}/{path}/{tensor}"


def with_slots(graph: Graph, sites: Sequence[Site], slots: Mapping[str, Slot]) -> Graph:
    """A graph that also takes the tensors of sites, at any size where they are open."""
    places = {slot_name(site.bound.kind.name, site.path, name): (site, name) for site in sites for name in site.names}
    inputs: list[Input] = []
    sizes: dict[str, int] = {}
    for name, (site, tensor) in places.items():
        value = dict(zip(site.names, site.tensors(), strict=True))[tensor]
        dims: list[int | str] = []
        for i, (size, want) in enumerate(zip(value.shape, slots[name].shape, strict=True)):
            dims.append(f"{name}.{i}" if isinstance(want, str) else want)
            sizes[f"{name}.{i}"] = size
        inputs.append(Input(name=name, dims=tuple(dims), like=value))

    def call(model: nn.Module, given: dict[str, Tensor]) -> Sequence[Tensor]:
        with held({places[name]: given[name] for name in places}):
            return graph.call(model, {name: value for name, value in given.items() if name not in places})

    return replace(graph, call=call, inputs=(*graph.inputs, *inputs), sizes=({**graph.sizes[0], **sizes},))


@contextmanager
def held(values: Mapping[tuple[Site, str], Tensor]) -> Iterator[None]:
    """Sites compute with these tensors, whatever their shapes, while the block runs."""
    before: list[tuple[dict[str, Any], str, Any]] = []
    for (site, name), value in values.items():
        store: dict[str, Any] = site._parameters if name in site._parameters else site._buffers
        before.append((store, name, store[name]))
        store[name] = value
    try:
        yield
    finally:
        for store, name, value in before:
            store[name] = value


def filled(
    slots: Mapping[str, Slot], kind: str, config: Mapping[str, Any], path: str, tensors: Mapping[str, Tensor], *,
    strength: float = 1.0,
) -> dict[str, Tensor]:  # fmt: skip
    """A delta's tensors at one host as values of slots, its scale folded in.

    Raises:
        ConverterError: ``E_ONNX_SLOT`` where the graph has no such slot, or one of another shape or config.
    """
    from deltahub.tensors import dtype_name

    numbers = {**config, STRENGTH: strength}
    found: dict[str, Tensor] = {}
    for name, value in tensors.items():
        slot = slots.get(slot_name(kind, path, name))
        if slot is None:
            raise ConverterError("E_ONNX_SLOT", "the graph has no slot for this tensor", where=path,
                                 found=f"{kind}, {name}", hint="export again with this target")  # fmt: skip
        if not slot.used:
            continue
        wrong = {k: numbers.get(k) for k, v in slot.config.items() if numbers.get(k) != v}
        if wrong:
            raise ConverterError("E_ONNX_SLOT", "the slot is for another config", where=slot.name,
                                 expected={k: slot.config[k] for k in wrong}, found=wrong,
                                 hint="export again with this delta")  # fmt: skip
        value = value.float() if value.is_floating_point() else value
        for number in slot.scales:
            value = value * float(numbers[number])
        if not slot.fits(value.shape, dtype_name(value.dtype)):
            raise ConverterError("E_ONNX_SLOT", "the tensor does not fit its slot", where=slot.name,
                                 expected=[slot.dtype, *slot.shape],
                                 found=[dtype_name(value.dtype), *value.shape])  # fmt: skip
        found[slot.name] = value
    return found


def check_delta(slots: Mapping[str, Slot], shapes: Mapping[str, Sequence[int]], where: Any) -> None:
    """Sizes that are open must agree at one host, and its tensors must all be there.

    Raises:
        ConverterError: ``E_ONNX_SLOT``.
    """
    wanted: dict[tuple[str, str], set[str]] = {}
    for slot in slots.values():
        wanted.setdefault((slot.kind, slot.path), set()).add(slot.tensor)
    for kind, path in {(slots[name].kind, slots[name].path) for name in shapes}:
        names = {name for name in shapes if (slots[name].kind, slots[name].path) == (kind, path)}
        sizes: dict[str, set[Fraction]] = {}
        for name in names:
            for want, got in zip(slots[name].shape, shapes[name], strict=True):
                if isinstance(want, str) and not want.endswith("?"):
                    number, ratio = _read_axis(want)
                    sizes.setdefault(number, set()).add(got / ratio)
        tensors = {slots[name].tensor for name in names}
        if tensors != wanted[kind, path] or any(len(one) > 1 for one in sizes.values()):
            said = {number: sorted(map(float, found)) for number, found in sizes.items()}
            raise ConverterError("E_ONNX_SLOT", "the tensors of one host do not go together", where=where,
                                 found=f"{kind} at {path}: {sorted(tensors)}, {said}")  # fmt: skip


def _read_axis(text: str) -> tuple[str, Fraction]:
    """``rank``, ``rank/2`` or ``3*rank/2``: the number, and what it is multiplied with."""
    body, _, below = text.partition("/")
    factor, _, number = body.rpartition("*")
    return number, Fraction(int(factor or 1), int(below or 1))


def together(slots: Mapping[str, Slot], values: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Several deltas at once: laid side by side along their open axis, which is the exact sum; or added up."""
    import numpy as np

    found: dict[str, list[Any]] = {}
    for one in values:
        for name, value in one.items():
            found.setdefault(name, []).append(value)
    made = {}
    for name, parts in found.items():
        along = slots[name].along
        if len(parts) == 1:
            made[name] = parts[0]
        elif along is not None:
            made[name] = np.ascontiguousarray(np.concatenate(parts, along))
        else:
            made[name] = np.sum(parts, axis=0, dtype=parts[0].dtype)
    return made


def check_order(slots: Mapping[str, Slot], chosen: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
    """Whether deltas together in their slots are what they are one after the other.

    Sums need no order. What is no sum acts after what the graph has before it, and no two of a kind are in one slot.

    Raises:
        ConverterError: ``E_ONNX_SLOT``.
    """
    hosts: dict[str, list[tuple[int, str, bool]]] = {}
    for one in chosen:
        for path, order, kind, adds in {(slots[n].path, slots[n].order, slots[n].kind, slots[n].adds) for n in one}:
            hosts.setdefault(path, []).append((order, kind, adds))
    for path, acting in hosts.items():
        if all(adds for _, _, adds in acting):
            continue
        orders = [order for order, _, _ in acting]
        if len(set(orders)) < len(orders):
            kinds = sorted({kind for order, kind, _ in acting if orders.count(order) > 1})
            raise ConverterError("E_ONNX_SLOT", "two deltas of this kind at one place act one after the other: no sum",
                                 where=path, found=f"{', '.join(kinds)}: {', '.join(names)}")  # fmt: skip
        if orders != sorted(orders):
            raise ConverterError("E_ONNX_SLOT", "at this place the graph has these kinds in another order", where=path,
                                 expected=", ".join(kind for _, kind, _ in sorted(acting)),
                                 found=", ".join(kind for _, kind, _ in acting))  # fmt: skip
