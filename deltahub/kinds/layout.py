"""Symbolic shapes made numbers: which tensors a kind has under a config on a host, how large, and how they start."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod
from typing import Any

from deltahub.errors import KindError
from deltahub.kinds.document import Document
from deltahub.kinds.fields import Dim, Initial, TensorField, holds, pick
from deltahub.kinds.host_shape import HostShape
from deltahub.kinds.ops import nearest
from deltahub.kinds.tree import Binary, Items, Name, Negative, Node, Number, Program, arithmetic

__all__ = ["Frozen", "TensorSpec", "bind", "conditions", "freeze", "layout", "match", "number"]

MAX_LENGTH = 2**31 - 1
MAX_ELEMENTS = 2**36
"""Elements of one tensor of a delta."""

Frozen = tuple[tuple[str, type, Any], ...]
"""A config as a hashable value, in which 1, 1.0 and true differ."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSpec:
    """One tensor of a kind, resolved.

    Attributes:
        shape: its lengths.
        init: an initialiser's name, or ``expression``.
        arguments: the initialiser's arguments.
        dtype: ``float``, or the fixed dtype it has.
        trainable: whether training changes it.
        expression: what it starts as, as a function of W and b, where ``init`` is ``expression``.
        values: the config as that expression needs it.
    """

    shape: tuple[int, ...]
    init: str
    arguments: tuple[float, ...] = ()
    dtype: str = "float"
    trainable: bool = True
    expression: Program | None = None
    values: tuple[tuple[str, object], ...] = ()


def freeze(config: Mapping[str, object]) -> Frozen:
    """A config as a key of a cache.

    Raises:
        KindError: ``E_KIND_CONFIG`` for a value that is no number, string or boolean.
    """
    for name, value in config.items():
        if not isinstance(value, int | float | str):
            what = f"config value {name!r} must be a number, a string, true or false"
            raise KindError("E_KIND_CONFIG", what, found=type(value).__name__)
    return tuple((name, type(value), value) for name, value in sorted(config.items()))


def conditions(config: Mapping[str, object], shape: HostShape) -> dict[str, object]:
    """What a ``when`` is judged by: the config and the facts of the host."""
    facts = {"family": shape.family, "grouped": shape.grouped, "channels_first": shape.channels_first}
    return {**config, **facts, "bias": shape.bias}


def number(node: Node, values: Mapping[str, object]) -> float:
    """A number from a tree that holds numbers, names of numbers and arithmetic only.

    Raises:
        KindError: ``E_KIND_NUMBER`` if it holds anything else; ``E_KIND_HOST`` if the host does not know a size.
    """
    if isinstance(node, Number):
        return node.value
    if isinstance(node, Negative):
        return -number(node.value, values)
    if isinstance(node, Binary):
        return arithmetic(node.operator, number(node.left, values), number(node.right, values), node.place)
    if isinstance(node, Name):
        value = values.get(node.name)
        if value is None:
            raise node.place.error("E_KIND_HOST", "the host does not know this size", hint="give its width")
        if isinstance(value, int | float):
            return value
    raise node.place.error("E_KIND_NUMBER", "only numbers and arithmetic can stand here")


def _sizes(config: Mapping[str, object], shape: HostShape) -> dict[str, object]:
    return {**config, "iN": shape.d_in, "out": shape.d_out}


def _spread(dim: Dim, shape: HostShape, where: str) -> tuple[int, ...]:
    if dim.spread == "kernel":
        return shape.kernel
    weight = shape.weight_shape
    if weight is None:
        raise KindError("E_KIND_HOST", f"a {shape.family} has no weight for *weight to stand for", where=where)
    return weight


def _length(dim: Dim, values: Mapping[str, object]) -> int:
    assert dim.program is not None
    node = dim.program.result
    value = number(node, values)
    if value != int(value):
        raise node.place.error("E_KIND_SHAPE", f"the length {value} is not a whole number")
    if not 1 <= value <= MAX_LENGTH:
        raise node.place.error("E_KIND_SHAPE", f"the length {int(value)} is not between 1 and {MAX_LENGTH}")
    return int(value)


def _shape(field: TensorField, values: Mapping[str, object], shape: HostShape, where: str) -> tuple[int, ...]:
    lengths: list[int] = []
    for dim in field.dims:
        lengths += _spread(dim, shape, where) if dim.spread else [_length(dim, values)]
    if prod(lengths) > MAX_ELEMENTS:
        raise KindError(
            "E_KIND_LIMIT",
            f"tensor {field.name!r} would have {prod(lengths)} elements",
            where=where,
            expected=f"at most {MAX_ELEMENTS}",
            found=lengths,
        )
    return tuple(lengths)


def _initial(field: TensorField, values: Mapping[str, object], facts: Mapping[str, object]) -> dict[str, Any]:
    chosen: Initial | None = pick(field.init, facts)
    if chosen is None:
        return {"init": "zeros"}
    if chosen.name is None:
        plain = tuple((n, v) for n, v in values.items() if n not in {"iN", "out"})
        return {"init": "expression", "expression": chosen.program, "values": plain}
    arguments: tuple[float, ...] = ()
    if chosen.program is not None:
        assert isinstance(chosen.program.result, Items)
        arguments = tuple(number(item, values) for item in chosen.program.result.items)
    return {"init": chosen.name, "arguments": arguments}


@lru_cache(maxsize=4096)
def layout(document: Document, config: Frozen, shape: HostShape) -> Mapping[str, TensorSpec]:
    """The tensors that a kind has under a config on a host, in the document's order.

    Raises:
        KindError: ``E_KIND_SHAPE``, ``E_KIND_NUMBER`` or ``E_KIND_LIMIT`` for lengths that cannot be,
            ``E_KIND_HOST`` if the host does not know a size that is needed.
    """
    plain = {name: value for name, _, value in config}
    facts, values = conditions(plain, shape), _sizes(plain, shape)
    where = f"kind {document.name}"
    return {
        name: TensorSpec(
            shape=_shape(field, values, shape, where),
            dtype=field.dtype,
            trainable=field.trainable,
            **_initial(field, values, facts),
        )
        for name, field in document.tensors.items()
        if holds(field.when, facts)
    }


def bind(
    document: Document, config: Mapping[str, object], shape: HostShape, known: Mapping[str, tuple[int, ...]]
) -> HostShape:
    """The host's facts with sizes that it does not know read off the shapes of given tensors.

    Only a length that is just ``in`` or ``out`` tells; contradictions are found when shapes are compared.
    """
    if shape.d_in is not None and shape.d_out is not None:
        return shape
    found: dict[str, int] = {}
    facts = conditions(config, shape)
    for name, field in document.tensors.items():
        lengths = known.get(name)
        if lengths is None or not holds(field.when, facts) or any(d.spread for d in field.dims):
            continue
        for dim, length in zip(field.dims, lengths, strict=False):
            node = None if dim.program is None else dim.program.result
            if isinstance(node, Name) and node.name in {"iN", "out"}:
                found.setdefault(node.name, length)
    if not found:
        return shape
    d_in = found.get("iN") if shape.d_in is None else shape.d_in
    return replace(shape, d_in=d_in, d_out=found.get("out") if shape.d_out is None else shape.d_out)


def match(document: Document, specs: Mapping[str, TensorSpec], known: Mapping[str, tuple[int, ...]]) -> None:
    """Compare given shapes with the resolved ones: equal, never merely broadcastable.

    Raises:
        KindError: ``E_KIND_SHAPE`` for another shape, ``E_KIND_TENSOR`` for a name that the kind does not have.
    """
    where = f"kind {document.name}"
    for name, lengths in known.items():
        if name not in specs:
            what = f"the kind has no tensor {name!r} under this config{nearest(name, list(specs))}"
            raise KindError("E_KIND_TENSOR", what, where=where, expected=list(specs), found=name)
        if tuple(lengths) != specs[name].shape:
            raise KindError(
                "E_KIND_SHAPE",
                f"tensor {name!r} does not have the shape that its kind, config and host give it",
                where=where,
                expected=list(specs[name].shape),
                found=list(lengths),
            )
