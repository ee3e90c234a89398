"""The executable specification: equations run on NumPy arrays as they are read, without torch and without compiling.

It shares the reader with the compiler and nothing else, so that agreement of the two says something.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltahub.errors import KindError
from deltahub.kinds.document import PORTS, Document
from deltahub.kinds.fields import MISSING, pick
from deltahub.kinds.host_shape import HostShape
from deltahub.kinds.language import MAX_UNROLLED
from deltahub.kinds.layout import conditions
from deltahub.kinds.numpy_ops import ACTIVATION_TWINS, TWINS, matmul
from deltahub.kinds.ops import OPS
from deltahub.kinds.tree import (
    Binary,
    Call,
    Dots,
    Index,
    Items,
    Loop,
    Name,
    Negative,
    Node,
    Number,
    Slice,
    Text,
    arithmetic,
)

__all__ = ["Host", "run"]

Array = NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Host:
    """A host in NumPy.

    Attributes:
        shape: its facts.
        apply: ``apply(x, w)``, the module applied with weight w ([out, in, *kernel]) and no bias.
        base: the module itself, for ``replace``.
        context: what the surroundings offer, by name.
    """

    shape: HostShape
    apply: Callable[[Array, Array], Array] | None = None
    base: Callable[[Array], Array] | None = None
    context: Mapping[str, Any] = field(default_factory=dict)


def run(
    document: Document,
    config: Mapping[str, object],
    port: str,
    host: Host,
    tensors: Mapping[str, Array],
    *,
    x: Array | None = None,
    y: Array | None = None,
    W: Array | None = None,
    b: Array | None = None,
    scores: Array | None = None,
) -> Array:
    """The value of a port's equation.

    Args:
        document: the kind.
        config: its config; defaults are filled in.
        port: one of :data:`deltahub.kinds.document.PORTS`.
        host: the host.
        tensors: the kind's tensors by name.
        x: the module's input (embeddings: ids).
        y: the module's output.
        W: the host's canonical weight.
        b: the host's bias; one that it lacks counts as zeros.
        scores: what the host adds to its attention scores.

    Raises:
        KindError: ``E_KIND_HOST`` if the port has no equation under this config on this host.
    """
    values = {name: config.get(name, entry.default) for name, entry in document.config.items()}
    program = pick(document.equations.get(port, ()), conditions(values, host.shape))
    if program is None or MISSING in values.values():
        raise KindError("E_KIND_HOST", f"kind {document.name!r} has no equation for {port!r} under this config here")
    names: dict[str, Any] = dict.fromkeys(document.tensors)
    names |= {**tensors, **values, **host.context}
    names |= {"d_in": host.shape.d_in, "d_out": host.shape.d_out, "spatial": host.shape.spatial}
    if b is None and W is not None:
        b = np.zeros(W.shape[0], W.dtype)
    given = {"x": x, "y": y, "W": W, "b": b, "scores": scores}
    names |= {name: given[name] for name in (*PORTS[port], "W", "b")}
    walk = _Walk(names, host)
    for name, node in program.steps:
        names[name] = walk.value(node)
    return np.asarray(walk.value(program.result))


class _Walk:
    """Evaluates a tree from the leaves up."""

    def __init__(self, names: dict[str, Any], host: Host) -> None:
        self.names = names
        self.host = host
        self.count = 0

    def value(self, node: Node) -> Any:
        self.count += 1
        if self.count > MAX_UNROLLED:
            raise node.place.error("E_KIND_LIMIT", f"unrolled, the equation has more than {MAX_UNROLLED} nodes")
        match node:
            case Number(value=value) | Text(value=value):
                return value
            case Name(name=name):
                return self.names[name]
            case Items(items=items):
                return tuple(self.value(item) for item in items)
            case Negative(value=inner):
                return -self.value(inner)
            case Binary():
                return self.combine(node, self.value(node.left), self.value(node.right))
            case Index(value=inner, items=items):
                where = tuple(self.subscript(item) for item in items)
                base = self.value(inner)
                return None if base is None else base[where[0] if len(where) == 1 else where]
            case Loop():
                return self.loop(node)
            case Call():
                return self.call(node)
        raise node.place.error("E_KIND_SYNTAX", "this cannot stand here")

    def combine(self, node: Binary, left: Any, right: Any) -> Any:
        if isinstance(left, int | float) and isinstance(right, int | float):
            return arithmetic(node.operator, left, right, node.place)
        match node.operator:
            case "+":
                return left + right
            case "-":
                return left - right
            case "*":
                return left * right
            case "/":
                return left / right
            case "//":
                return left // right
            case "**":
                return left**right
        return matmul(left, right)

    def subscript(self, node: Node) -> Any:
        if isinstance(node, Dots):
            return ...
        if isinstance(node, Slice):
            return slice(*(None if part is None else self.value(part) for part in (node.start, node.stop, node.step)))
        return self.value(node)

    def loop(self, node: Loop) -> Any:
        parts = []
        for i in range(self.value(node.start), self.value(node.stop)):
            self.names[node.variable] = i
            parts.append(self.value(node.body))
        del self.names[node.variable]
        if node.how in {"cat", "stack"}:
            axis = (-1 if node.how == "cat" else 0) if node.axis is None else self.value(node.axis)
            return TWINS[node.how](parts, axis)
        total = parts[0]
        for part in parts[1:]:
            total = total + part if node.how == "sum" else matmul(total, part)
        return total

    def call(self, node: Call) -> Any:
        op = OPS[node.op]
        bound, lengths = op.bind(node.args, dict(node.kwargs))
        values: list[Any] = []
        for parameter, argument in zip(op.parameters, bound, strict=True):
            if isinstance(argument, tuple):
                values.append(tuple(self.value(item) for item in argument))
            else:
                value = self.value(argument) if isinstance(argument, Node) else argument
                values.append(bool(value) if parameter.type == "flag" else value)
        special = getattr(self, f"op_{node.op}", None)
        if special is not None:
            return special(*values)
        return TWINS[node.op](*values, **{name: self.value(length) for name, length in lengths.items()})

    # Operations that depend on the host.

    def op_host(self, x: Array, w: Array) -> Array:
        assert self.host.apply is not None
        return self.host.apply(x, w)

    def op_base(self, x: Array) -> Array:
        assert self.host.base is not None
        return self.host.base(x)

    def op_activation(self, x: Array, name: str) -> Array:
        value: Array = ACTIVATION_TWINS[name](x)
        return value

    def channels_last(self, x: Array) -> Array:
        return np.moveaxis(x, -1 - self.host.shape.spatial, -1) if self.host.shape.channels_first else x

    def channels_back(self, x: Array) -> Array:
        return np.moveaxis(x, -1, -1 - self.host.shape.spatial) if self.host.shape.channels_first else x

    def op_linear(self, h: Array, w: Array, bias: Array | None) -> Array:
        y = self.channels_last(h) @ w.T
        return self.channels_back(y if bias is None else y + bias)

    def op_channel(self, v: Array) -> Array:
        return v.reshape(v.shape + (1,) * self.host.shape.spatial) if self.host.shape.channels_first else v

    def op_layer_norm(self, x: Array, weight: Array | None, bias: Array | None, eps: float) -> Array:
        x = self.channels_last(x)
        y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + np.asarray(eps, x.dtype))
        y = y if weight is None else y * weight
        return self.channels_back(y if bias is None else y + bias)

    def op_rms_norm(self, x: Array, weight: Array | None, eps: float) -> Array:
        x = self.channels_last(x)
        y = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + np.asarray(eps, x.dtype))
        return self.channels_back(y if weight is None else y * weight)

    def op_rows(self, v: Array) -> Array:
        rank = self.host.shape.weight_rank or 1
        return v.reshape(v.shape + (1,) * (rank - 1))

    def op_columns(self, v: Array) -> Array:
        rank = self.host.shape.weight_rank or 2
        return v.reshape(v.shape + (1,) * (rank - 2))
