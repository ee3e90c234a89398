"""The tree of an equation: what the reader makes, and what the compiler and the reference interpreter walk."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from operator import add, floordiv, mul, pow, sub, truediv  # noqa: A004

from deltahub.errors import KindError

__all__ = [
    "MAX_INTEGER", "Binary", "Call", "Dots", "Index", "Items", "Loop", "Name", "Negative", "Node", "Number", "Place",
    "Program", "Slice", "Text", "arithmetic", "bounded", "references", "walk",
]  # fmt: skip

MAX_INTEGER = 2**53
"""Whole numbers beyond this are refused: no size needs them, and a float could not hold them."""


@dataclass(frozen=True, slots=True)
class Place:
    """A point in a document, for messages."""

    where: str
    text: str
    line: int = 1
    column: int = 0

    def error(self, code: str, what: str, *, hint: str | None = None) -> KindError:
        """An error that shows the line and points at the column."""
        lines = self.text.split("\n")
        line = lines[self.line - 1] if 0 < self.line <= len(lines) else ""
        start = max(0, self.column - 50)
        shown, caret = line[start : start + 80].rstrip(), " " * (self.column - start)
        return KindError(
            code,
            f"{what}\n    {shown}\n    {caret}^",
            where=f"{self.where}, line {self.line}, column {self.column + 1}",
            hint=hint,
        )


@dataclass(frozen=True, slots=True)
class Node:
    """One node of the tree, and where it stands."""

    place: Place


@dataclass(frozen=True, slots=True)
class Number(Node):
    """A number of the text."""

    value: int | float


@dataclass(frozen=True, slots=True)
class Text(Node):
    """A string, as an argument of an operation."""

    value: str


@dataclass(frozen=True, slots=True)
class Name(Node):
    """A tensor, a config value, a fact of the host, a loop variable, or something assigned before."""

    name: str


@dataclass(frozen=True, slots=True)
class Items(Node):
    """A tuple."""

    items: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Negative(Node):
    """Unary minus."""

    value: Node


@dataclass(frozen=True, slots=True)
class Binary(Node):
    """``left operator right``."""

    operator: str
    left: Node
    right: Node


@dataclass(frozen=True, slots=True)
class Call(Node):
    """An operation with its arguments as written."""

    op: str
    args: tuple[Node, ...]
    kwargs: tuple[tuple[str, Node], ...]


@dataclass(frozen=True, slots=True)
class Loop(Node):
    """``how(body for variable in range(start, stop), axis=axis)``."""

    how: str
    body: Node
    variable: str
    start: Node
    stop: Node
    axis: Node | None


@dataclass(frozen=True, slots=True)
class Slice(Node):
    """``start:stop:step`` in a subscript."""

    start: Node | None
    stop: Node | None
    step: Node | None


@dataclass(frozen=True, slots=True)
class Dots(Node):
    """``...`` in a subscript."""


@dataclass(frozen=True, slots=True)
class Index(Node):
    """A constant subscript of a tensor."""

    value: Node
    items: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Program:
    """A whole equation: assignments in order, then the expression that is its value."""

    place: Place
    steps: tuple[tuple[str, Node], ...]
    result: Node

    @property
    def nodes(self) -> tuple[Node, ...]:
        """The assigned expressions and the last one."""
        return (*(node for _, node in self.steps), self.result)


def bounded(value: float, place: Place) -> float:
    """The number itself, if it is finite and, where it is whole, no larger than 2**53."""
    if isinstance(value, int):
        if abs(value) > MAX_INTEGER:
            raise place.error("E_KIND_NUMBER", f"the whole number is larger than 2**53 = {MAX_INTEGER}")
    elif not math.isfinite(value):
        raise place.error("E_KIND_NUMBER", "the number is not finite")
    return value


_COMPUTE: dict[str, Callable[[float, float], object]] = {
    "+": add,
    "-": sub,
    "*": mul,
    "/": truediv,
    "//": floordiv,
    "**": pow,
}


def arithmetic(operator: str, left: float, right: float, place: Place) -> float:
    """``left operator right`` on plain numbers, bounded before it is computed.

    Raises:
        KindError: ``E_KIND_NUMBER`` if the result is not a finite real number, or a whole number beyond 2**53.
    """
    if operator == "@":
        raise place.error("E_KIND_NUMBER", "@ multiplies tensors, not numbers")
    whole = isinstance(left, int) and isinstance(right, int) and abs(left) > 1
    if operator == "**" and whole and right * math.log2(abs(left)) > 54:
        raise place.error("E_KIND_NUMBER", f"the whole number is larger than 2**53 = {MAX_INTEGER}")
    try:
        value: object = _COMPUTE[operator](left, right)
    except ZeroDivisionError:
        raise place.error("E_KIND_NUMBER", "division by zero") from None
    except OverflowError:
        raise place.error("E_KIND_NUMBER", "the number is not finite") from None
    if not isinstance(value, int | float):
        raise place.error("E_KIND_NUMBER", "the root of a negative number is not real")
    return bounded(value, place)


def references(program: Program) -> tuple[frozenset[str], frozenset[str]]:
    """Names that an equation mentions (its own among them), and operations that it calls."""
    names: set[str] = set()
    ops: set[str] = set()
    for node in walk(*program.nodes):
        if isinstance(node, Name):
            names.add(node.name)
        elif isinstance(node, Call):
            ops.add(node.op)
    return frozenset(names), frozenset(ops)


def walk(*roots: Node) -> Iterator[Node]:
    """All nodes of some trees."""
    queue: list[object] = list(roots)
    while queue:
        item = queue.pop()
        if isinstance(item, tuple):
            queue.extend(item)
        elif isinstance(item, Node):
            yield item
            queue.extend(getattr(item, f.name) for f in fields(item) if f.name != "place")
