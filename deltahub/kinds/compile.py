"""Equations to :class:`torch.fx.Graph`: a tree is walked once, its text is never evaluated, its calls are registered.

Numbers, loops and the host's layout are settled here, so what is left to run is a flat list of tensor operations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx

from deltahub.kinds.document import CONTEXT
from deltahub.kinds.host_shape import HostShape
from deltahub.kinds.language import MAX_UNROLLED
from deltahub.kinds.ops import ACTIVATIONS, OPS, Parameter, nearest
from deltahub.kinds.torch_ops import ACTIVATION_FUNCTIONS, FUNCTIONS, SETTLED
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
    Place,
    Program,
    Slice,
    Text,
    arithmetic,
)

__all__ = ["Built", "build"]

_OPERATORS = {"+": "add", "-": "sub", "*": "mul", "/": "div", "//": "floordiv", "**": "pow", "@": "matmul"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Built:
    """A compiled equation: its function, and what it asks for besides the kind's tensors."""

    fn: Callable[..., Any]
    graph: fx.Graph
    uses: frozenset[str]


def build(
    program: Program,
    *,
    inputs: tuple[str, ...],
    tensors: tuple[str, ...],
    absent: frozenset[str],
    values: Mapping[str, object],
    shape: HostShape,
    live: bool,
) -> Built:
    """Compile one equation.

    Args:
        program: the equation.
        inputs: what it is given before the kind's tensors, in order; ``host`` first.
        tensors: names of the kind's tensors that are there, in order.
        absent: names of those that are not.
        values: config values by name.
        shape: facts of the host.
        live: whether it runs on activations, where W and b are asked of the host.

    Raises:
        KindError: ``E_KIND_OP``, ``E_KIND_NUMBER``, ``E_KIND_LIMIT``, ``E_KIND_HOST``.
    """
    builder = _Builder(inputs, tensors, absent, values, shape, live=live)
    for name, node in program.steps:
        builder.names[name] = builder.evaluate(node)
    result = builder.evaluate(program.result)
    if not isinstance(result, fx.Node):
        raise program.result.place.error("E_KIND_OP", "an equation's value must be a tensor")
    graph = builder.graph
    graph.output(result)
    graph.eliminate_dead_code()
    module = fx.GraphModule(torch.nn.Module(), graph)
    return Built(fn=module.forward, graph=graph, uses=frozenset(builder.uses))


class _Builder:
    """Walks a tree once. Values are numbers, strings and tuples of them, graph nodes, or None for an absent tensor."""

    def __init__(
        self,
        inputs: tuple[str, ...],
        tensors: tuple[str, ...],
        absent: frozenset[str],
        values: Mapping[str, object],
        shape: HostShape,
        *,
        live: bool,
    ) -> None:
        self.graph = fx.Graph()
        self.shape, self.live = shape, live
        self.given = {name: self.graph.placeholder(name) for name in inputs}
        # A prefix keeps a tensor's name from being a word of Python or of fx in the generated code.
        self.names: dict[str, object] = {name: self.graph.placeholder(f"t_{name}") for name in tensors}
        self.names |= dict.fromkeys(absent)
        self.names |= values
        self.uses: set[str] = set()
        self.count = 0

    def emit(self, place: Place, name: str, *args: object, **kwargs: object) -> fx.Node:
        """Add a call of a settled function."""
        return self.call(place, SETTLED[name], args, kwargs)

    def call(
        self, place: Place, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None
    ) -> fx.Node:
        node = self.graph.call_function(function, args, dict(kwargs or {}))
        node.meta["place"] = place
        return node

    def evaluate(self, node: Node) -> object:
        self.count += 1
        if self.count > MAX_UNROLLED:
            raise node.place.error("E_KIND_LIMIT", f"unrolled, the equation has more than {MAX_UNROLLED} nodes")
        return _EVALUATE[type(node)](self, node)

    def number(self, node: Number) -> object:
        return node.value

    def text(self, node: Text) -> object:
        return node.value

    def items(self, node: Items) -> object:
        return tuple(self.evaluate(item) for item in node.items)

    def name(self, node: Name) -> object:
        name = node.name
        if name in self.names:
            return self.names[name]
        if name in {"d_in", "d_out", "spatial"}:
            size: int | None = getattr(self.shape, name)
            if size is None:
                raise node.place.error("E_KIND_HOST", f"the host does not know its {name}", hint="give its width")
            return size
        self.uses.add(name)
        if name in {"W", "b"} and (self.live or name == "b"):
            self.names[name] = self.parameter(name, node.place)
        elif name in CONTEXT:
            self.uses.add("host")
            self.names[name] = self.emit(node.place, "host_context", self.given["host"], name)
        else:
            self.names[name] = self.given[name]
        return self.names[name]

    def parameter(self, name: str, place: Place) -> fx.Node:
        """W or b, of the host or as given; a bias that the host lacks is zeros of the weight's dtype."""
        if self.shape.weight_rank is None:
            raise place.error("E_KIND_HOST", f"a block has no {name} of its own")
        if name == "b" and not self.shape.bias:
            return self.emit(place, "no_bias", self.evaluate(Name(place, "W")))
        if not self.live:
            return self.given[name]
        self.uses.add("host")
        return self.emit(place, "host_weight" if name == "W" else "host_bias", self.given["host"])

    def negative(self, node: Negative) -> object:
        value = self.operand(node.value)
        return self.emit(node.place, "neg", value) if isinstance(value, fx.Node) else -cast(float, value)

    def operand(self, node: Node) -> object:
        """A tensor or a number; nothing else can be calculated with."""
        value = self.evaluate(node)
        if isinstance(value, fx.Node | int | float):
            return value
        if value is None:
            raise node.place.error("E_KIND_OP", "this tensor is absent under this config")
        raise node.place.error("E_KIND_OP", "only tensors and numbers can be calculated with")

    def binary(self, node: Binary) -> object:
        right = node.right
        if node.operator in {"+", "-"} and isinstance(right, Binary) and right.operator == "*":
            return self.sum_of_product(node, right)
        if node.operator == "+" and isinstance(right, Binary) and right.operator == "@":
            return self.sum_of_matmul(node, right)
        return self.combine(node, self.operand(node.left), self.operand(node.right))

    def combine(self, node: Binary, left: object, right: object) -> object:
        if isinstance(left, fx.Node) or isinstance(right, fx.Node):
            if node.operator == "@" and not (isinstance(left, fx.Node) and isinstance(right, fx.Node)):
                raise node.place.error("E_KIND_NUMBER", "@ multiplies tensors, not numbers")
            return self.emit(node.place, _OPERATORS[node.operator], left, right)
        return arithmetic(node.operator, cast(float, left), cast(float, right), node.place)

    def sum_of_product(self, node: Binary, product: Binary) -> object:
        """``a ± number * b`` in one operation: the factor costs neither a pass over memory nor a rounding."""
        left = self.operand(node.left)
        factor, tensor = self.operand(product.left), self.operand(product.right)
        if isinstance(left, fx.Node) and isinstance(tensor, fx.Node) and isinstance(factor, int | float):
            name = _OPERATORS[node.operator]
            if factor == 1:
                return self.emit(node.place, name, left, tensor)
            return self.emit(node.place, f"{name}_scaled", left, tensor, alpha=factor)
        return self.combine(node, left, self.combine(product, factor, tensor))

    def sum_of_matmul(self, node: Binary, product: Binary) -> object:
        """``a + number * b @ c`` in one operation."""
        left, inner = self.operand(node.left), product.left
        if not (isinstance(inner, Binary) and inner.operator == "*"):
            inner = Binary(inner.place, "*", Number(inner.place, 1), inner)
        factor, b, c = self.operand(inner.left), self.operand(inner.right), self.operand(product.right)
        tensors = isinstance(left, fx.Node) and isinstance(b, fx.Node) and isinstance(c, fx.Node)
        if tensors and isinstance(factor, int | float):
            return self.emit(node.place, "add_matmul", left, b, c, factor)
        first = b if factor == 1 else self.combine(inner, factor, b)
        return self.combine(node, left, self.combine(product, first, c))

    def index(self, node: Index) -> object:
        value = self.evaluate(node.value)
        items = tuple(self.subscript(item) for item in node.items)
        if isinstance(value, tuple) and len(items) == 1 and isinstance(items[0], int):
            if not -len(value) <= items[0] < len(value):
                raise node.place.error("E_KIND_NUMBER", f"the tuple has {len(value)} entries")
            return cast(object, value[items[0]])
        if value is None:
            return None  # a part of an absent tensor is absent
        if not isinstance(value, fx.Node):
            raise node.place.error("E_KIND_OP", "only tensors have subscripts")
        return self.emit(node.place, "index", value, items[0] if len(items) == 1 else items)

    def subscript(self, node: Node) -> object:
        if isinstance(node, Dots):
            return ...
        if isinstance(node, Slice):
            return slice(*(None if p is None else self.whole(p) for p in (node.start, node.stop, node.step)))
        return self.whole(node)

    def whole(self, node: Node) -> int:
        value = self.evaluate(node)
        if not isinstance(value, int):
            raise node.place.error("E_KIND_NUMBER", "a constant whole number is needed here")
        return value

    def loop(self, node: Loop) -> object:
        start, stop = self.whole(node.start), self.whole(node.stop)
        if stop <= start:
            raise node.place.error("E_KIND_NUMBER", f"the loop runs from {start} to {stop}: not once")
        if stop - start > MAX_UNROLLED:
            raise node.place.error("E_KIND_LIMIT", f"the loop runs {stop - start} times; at most {MAX_UNROLLED}")
        parts = []
        for i in range(start, stop):
            self.names[node.variable] = i
            parts.append(self.operand(node.body))
        del self.names[node.variable]
        if node.how in {"cat", "stack"}:
            axis = (-1 if node.how == "cat" else 0) if node.axis is None else self.whole(node.axis)
            if not all(isinstance(part, fx.Node) for part in parts):
                raise node.place.error("E_KIND_OP", f"{node.how} joins tensors")
            return self.call(node.place, FUNCTIONS[node.how], (tuple(parts), axis))
        total = parts[0]
        operator = "+" if node.how == "sum" else "@"
        for part in parts[1:]:
            total = self.combine(Binary(node.place, operator, node.body, node.body), total, part)
        return total

    def operation(self, node: Call) -> object:
        op = OPS[node.op]
        bound, lengths = op.bind(node.args, dict(node.kwargs))
        values: list[Any] = []
        for parameter, argument in zip(op.parameters, bound, strict=True):
            if parameter.variadic:
                items = cast("tuple[Node, ...]", argument)
                values.append(tuple(self.checked(parameter, self.evaluate(item), item, node.op) for item in items))
            elif isinstance(argument, Node):
                values.append(self.checked(parameter, self.evaluate(argument), argument, node.op))
            else:
                values.append(bool(argument) if parameter.type == "flag" else argument)
        settled = _SETTLE.get(node.op)
        if settled is not None:
            return settled(self, node.place, *values)
        named = {key: self.checked(_LENGTH, self.evaluate(value), value, node.op) for key, value in lengths.items()}
        return self.call(node.place, FUNCTIONS[node.op], tuple(values), named)

    def checked(self, parameter: Parameter, value: object, node: Node, op: str) -> object:
        """An argument of the type that its parameter has; graph nodes stand for tensors and for lengths."""
        kind = parameter.type
        if kind == "flag" and value in {0, 1}:
            return bool(value)
        right = {
            "tensor": isinstance(value, fx.Node) or (value is None and not parameter.required),
            "int": isinstance(value, int | fx.Node),
            "ints": isinstance(value, int | fx.Node)
            or (isinstance(value, tuple) and all(isinstance(v, int | fx.Node) for v in value)),
            "number": isinstance(value, int | float | fx.Node),
            "text": isinstance(value, str),
            "flag": False,
        }[kind]
        if right:
            return value
        words = {"tensor": "a tensor", "int": "a whole number", "ints": "whole numbers", "number": "a number"}
        expected = words.get(kind, "a string" if kind == "text" else "0 or 1")
        absent = "; it is absent under this config" if value is None else ""
        raise node.place.error("E_KIND_OP", f"{parameter.name} of {op} must be {expected}{absent}")

    # Operations that the host settles.

    def host(self, place: Place, x: fx.Node, w: fx.Node) -> fx.Node:
        if self.shape.plain and self.shape.family == "linear":
            return self.emit(place, "linear_last", x, w)
        if self.shape.plain and self.shape.family == "embedding":
            return self.emit(place, "embedding_apply", x, w)
        self.uses.add("host")
        return self.emit(place, "host_apply", self.given["host"], x, w)

    def base(self, place: Place, x: fx.Node) -> fx.Node:
        self.uses |= {"host", "base"}
        return self.emit(place, "host_base", self.given["host"], x)

    def by_channel(self, name: str) -> Callable[..., fx.Node]:
        def emit(place: Place, *args: object) -> fx.Node:
            if not self.shape.channels_first:
                args = args[:2] if name == "linear" and args[2] is None else args
                return self.emit(place, f"{name}_last", *args)
            if not self.shape.spatial:
                raise place.error("E_KIND_HOST", "this host does not say which axis of its activations holds channels")
            return self.emit(place, f"{name}_first", *args, self.shape.spatial)

        return emit

    def channel(self, place: Place, v: fx.Node) -> fx.Node:
        return self.by_channel("channel")(place, v) if self.shape.channels_first else v

    def along(self, place: Place, v: fx.Node, axis: int) -> fx.Node:
        rank = self.shape.weight_rank
        if rank is None or axis >= rank:
            raise place.error("E_KIND_HOST", f"the weight of a {self.shape.family} has no such axis")
        return v if axis == rank - 1 else self.emit(place, "along", v, rank - 1 - axis)

    def activation(self, place: Place, x: fx.Node, name: str) -> fx.Node:
        if name not in ACTIVATION_FUNCTIONS:
            raise place.error("E_KIND_OP", f"unknown activation {name!r}{nearest(name, ACTIVATIONS)}")
        return x if name == "identity" else self.call(place, ACTIVATION_FUNCTIONS[name], (x,))


_LENGTH = Parameter(name="an axis length", type="int")

_EVALUATE: Mapping[type[Node], Callable[[_Builder, Any], object]] = {
    Number: _Builder.number,
    Text: _Builder.text,
    Items: _Builder.items,
    Name: _Builder.name,
    Negative: _Builder.negative,
    Binary: _Builder.binary,
    Index: _Builder.index,
    Loop: _Builder.loop,
    Call: _Builder.operation,
}

_SETTLE: Mapping[str, Callable[..., fx.Node]] = {
    "host": _Builder.host,
    "base": _Builder.base,
    "linear": lambda self, place, *args: self.by_channel("linear")(place, *args),
    "layer_norm": lambda self, place, *args: self.by_channel("layer_norm")(place, *args),
    "rms_norm": lambda self, place, *args: self.by_channel("rms_norm")(place, *args),
    "channel": _Builder.channel,
    "rows": lambda self, place, v: self.along(place, v, 0),
    "columns": lambda self, place, v: self.along(place, v, 1),
    "activation": _Builder.activation,
}
