"""The expression language: text to a checked tree, with bounds on everything before any work is done.

The syntax is a small part of Python's, read by :mod:`ast` and never executed: names, numbers, tuples, unary minus,
``+ - * / // ** @``, calls of registered operations, assignments one per line, constant subscripts of tensors, and
``sum``, ``cat``, ``stack`` and ``chain`` over ``… for i in range(n)``. Strings are arguments of operations only.
Everything else is refused with the document, the line and the column.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Collection
from functools import lru_cache

from deltahub.errors import KindError
from deltahub.kinds.ops import OPS, BadCallError, nearest
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
    bounded,
)  # fmt: skip

__all__ = ["LOOPS", "MAX_UNROLLED", "parse"]

MAX_TEXT = 8192
MAX_NODES = 2048
MAX_DEPTH = 64
MAX_UNROLLED = 4096
"""Nodes that are evaluated to build one equation, loops unrolled."""
MAX_STRING = 256

LOOPS = frozenset({"sum", "cat", "stack", "chain"})
"""What may stand around ``… for i in range(n)``; ``chain`` is the matrix product from left to right."""

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}")
# Python accepts `1for` and warns; here a number ends where its digits do.
_GLUED = re.compile(r"(?<![\w.\"'])(?:\d[\d.]*+|\.\d++)(?:[eE][+-]?\d++)?+[A-Za-z_]")
_OPERATORS: dict[type[ast.operator], str] = {
    ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/", ast.FloorDiv: "//", ast.Pow: "**", ast.MatMult: "@",
}  # fmt: skip
_REFUSED = {
    "Attribute": "attributes", "Lambda": "lambdas", "ListComp": "comprehensions", "SetComp": "comprehensions",
    "DictComp": "comprehensions", "GeneratorExp": "loops outside sum, cat, stack and chain", "JoinedStr": "f-strings",
    "NamedExpr": "assignments inside expressions", "Starred": "starred arguments", "Compare": "comparisons",
    "BoolOp": "and, or", "IfExp": "conditions", "Dict": "braces", "Set": "braces", "List": "brackets",
    "Await": "await", "Yield": "yield", "AugAssign": "assignments with an operator", "AnnAssign": "annotations",
    "Import": "imports", "ImportFrom": "imports", "FunctionDef": "definitions", "ClassDef": "definitions",
    "For": "statements", "While": "statements", "If": "statements", "With": "statements", "Delete": "statements",
    "BitOr": "the operator |", "BitAnd": "the operator &", "BitXor": "the operator ^", "Mod": "the operator %",
    "LShift": "the operator <<", "RShift": "the operator >>", "Not": "not", "Invert": "the operator ~",
}  # fmt: skip


class _Reader:
    """Turns Python's tree into ours, refusing what is not of the language."""

    def __init__(self, where: str, shown: str) -> None:
        self.where, self.shown = where, shown
        self.count = 0

    def place(self, node: ast.AST) -> Place:
        return Place(self.where, self.shown, getattr(node, "lineno", 1), getattr(node, "col_offset", 0))

    def refuse(self, node: ast.AST, what: str) -> KindError:
        return self.place(node).error("E_KIND_SYNTAX", what)

    def program(self, body: list[ast.stmt], known: Collection[str]) -> Program:
        steps: list[tuple[str, Node]] = []
        lines: set[int] = set()
        names = set(known)
        for i, statement in enumerate(body):
            if statement.lineno in lines:
                raise self.refuse(statement, "one assignment or expression per line")
            lines.add(statement.end_lineno or statement.lineno)
            if i == len(body) - 1:
                if not isinstance(statement, ast.Expr):
                    raise self.refuse(statement, "the last line must be an expression: it is the equation's value")
                return Program(Place(self.where, self.shown), tuple(steps), self.node(statement.value, names, 1))
            if isinstance(statement, ast.Expr):
                raise self.refuse(statement, "only the last line may be a bare expression; assign this one to a name")
            if not isinstance(statement, ast.Assign) or len(statement.targets) != 1:
                raise self.refuse(statement, f"{_called(statement)} are not part of the language")
            target = statement.targets[0]
            if not isinstance(target, ast.Name):
                raise self.refuse(target, "only a plain name can be assigned to")
            node = self.node(statement.value, names, 1)
            steps.append((self.fresh(target, names), node))
            names.add(target.id)
        raise Place(self.where, self.shown).error("E_KIND_SYNTAX", "the equation is empty")

    def fresh(self, target: ast.Name, names: Collection[str]) -> str:
        if not _NAME.fullmatch(target.id):
            raise self.refuse(target, "names start with a letter and have at most 64 letters, digits and underscores")
        if target.id in names:
            raise self.place(target).error("E_KIND_NAME", f"{target.id!r} already has a meaning here")
        return target.id

    def node(self, node: ast.expr, names: Collection[str], depth: int) -> Node:
        self.count += 1
        if self.count > MAX_NODES or depth > MAX_DEPTH:
            limit = f"{MAX_NODES} nodes" if self.count > MAX_NODES else f"{MAX_DEPTH} levels"
            raise self.place(node).error("E_KIND_LIMIT", f"the expression has more than {limit}")
        read = getattr(self, f"_{type(node).__name__.lower()}", None)
        if read is None:
            raise self.refuse(node, f"{_called(node)} are not part of the language")
        result: Node = read(node, names, depth + 1)
        return result

    def _constant(self, node: ast.Constant, names: Collection[str], depth: int) -> Node:
        value = node.value
        if isinstance(value, str):
            raise self.refuse(node, "a string may only be an argument of an operation")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.refuse(node, f"{value!r} is not a number")
        return Number(self.place(node), bounded(value, self.place(node)))

    def _name(self, node: ast.Name, names: Collection[str], depth: int) -> Node:
        if node.id not in names:
            what = f"unknown name {node.id!r}{nearest(node.id, sorted(names))}"
            raise self.place(node).error("E_KIND_NAME", what)
        return Name(self.place(node), node.id)

    def _tuple(self, node: ast.Tuple, names: Collection[str], depth: int) -> Node:
        return Items(self.place(node), tuple(self.node(item, names, depth) for item in node.elts))

    def _unaryop(self, node: ast.UnaryOp, names: Collection[str], depth: int) -> Node:
        if not isinstance(node.op, ast.USub):
            raise self.refuse(node, f"{_called(node.op)} is not part of the language")
        return Negative(self.place(node), self.node(node.operand, names, depth))

    def _binop(self, node: ast.BinOp, names: Collection[str], depth: int) -> Node:
        operator = _OPERATORS.get(type(node.op))
        if operator is None:
            raise self.refuse(node, f"{_called(node.op)} is not part of the language")
        left, right = self.node(node.left, names, depth), self.node(node.right, names, depth)
        return Binary(self.place(node), operator, left, right)

    def _subscript(self, node: ast.Subscript, names: Collection[str], depth: int) -> Node:
        items = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        value = self.node(node.value, names, depth)
        return Index(self.place(node), value, tuple(self.subscript(item, names, depth) for item in items))

    def subscript(self, item: ast.expr, names: Collection[str], depth: int) -> Node:
        if isinstance(item, ast.Constant) and item.value is ...:
            return Dots(self.place(item))
        if isinstance(item, ast.Slice):
            parts = (item.lower, item.upper, item.step)
            return Slice(self.place(item), *(None if p is None else self.node(p, names, depth) for p in parts))
        return self.node(item, names, depth)

    def argument(self, node: ast.expr, names: Collection[str], depth: int) -> Node:
        if not (isinstance(node, ast.Constant) and isinstance(node.value, str)):
            return self.node(node, names, depth)
        if len(node.value) > MAX_STRING:
            raise self.place(node).error("E_KIND_LIMIT", f"the string has more than {MAX_STRING} characters")
        return Text(self.place(node), node.value)

    def _call(self, node: ast.Call, names: Collection[str], depth: int) -> Node:
        if not isinstance(node.func, ast.Name):
            raise self.refuse(node.func, "only an operation can be called, by its name")
        op = node.func.id
        if op in LOOPS and node.args and isinstance(node.args[0], ast.GeneratorExp):
            return self.loop(op, node, node.args[0], names, depth)
        if op not in OPS:
            what = f"unknown operation {op!r}{nearest(op, [*OPS, *LOOPS])}"
            raise self.place(node).error("E_KIND_OP", what)
        kwargs = []
        for keyword in node.keywords:
            if keyword.arg is None:
                raise self.refuse(keyword, "starred arguments are not part of the language")
            kwargs.append((keyword.arg, self.argument(keyword.value, names, depth)))
        args = tuple(self.argument(arg, names, depth) for arg in node.args)
        try:
            OPS[op].bind(args, dict(kwargs))
        except BadCallError as error:
            signature = f"its signature is {OPS[op].signature}"
            raise self.place(node).error("E_KIND_OP", str(error), hint=signature) from None
        return Call(self.place(node), op, args, tuple(kwargs))

    def loop(self, how: str, node: ast.Call, generator: ast.GeneratorExp, names: Collection[str], depth: int) -> Node:
        axes = [k for k in node.keywords if k.arg == "axis" and how in {"cat", "stack"}]
        clause = generator.generators[0]
        if len(node.args) > 1 or len(axes) != len(node.keywords) or len(axes) > 1:
            raise self.refuse(node, f"a loop in {how} takes nothing else" + (" but axis" if how in OPS else ""))
        if len(generator.generators) > 1 or clause.ifs or clause.is_async:
            raise self.refuse(generator, "a loop has one `for i in range(n)` and no condition; put one inside another")
        variable, source = clause.target, clause.iter
        if not isinstance(variable, ast.Name):
            raise self.refuse(variable, "a loop has one variable")
        called = source.func.id if isinstance(source, ast.Call) and isinstance(source.func, ast.Name) else None
        if not isinstance(source, ast.Call) or called != "range" or source.keywords or len(source.args) not in {1, 2}:
            raise self.refuse(source, "a loop runs over range(stop) or range(start, stop)")
        ends = [self.node(arg, names, depth) for arg in source.args]
        start = ends[0] if len(ends) == 2 else Number(ends[0].place, 0)
        self.fresh(variable, names)
        body = self.node(generator.elt, {*names, variable.id}, depth)
        axis = self.node(axes[0].value, names, depth) if axes else None
        return Loop(self.place(node), how, body, variable.id, start, ends[-1], axis)


def _called(node: ast.AST) -> str:
    kind = type(node).__name__
    return _REFUSED.get(kind, f"{kind} expressions" if isinstance(node, ast.expr) else f"{kind} statements")


@lru_cache(maxsize=1024)
def parse(text: str, *, where: str, names: frozenset[str], shown: str | None = None) -> Program:
    """Read and check one equation.

    Args:
        text: the equation; dedented and stripped by the caller.
        where: the document and the path into it, for messages.
        names: every name that has a meaning in it besides what it assigns.
        shown: the text as its author wrote it, where a word of it was replaced by one of equal length.

    Raises:
        KindError: ``E_KIND_SYNTAX`` for what is not of the language, ``E_KIND_NAME`` for unknown or taken names,
            ``E_KIND_OP`` for unknown operations and wrong arguments, ``E_KIND_LIMIT`` and ``E_KIND_NUMBER``.
    """
    shown = shown or text
    start = Place(where, shown)
    if len(text) > MAX_TEXT:
        raise Place(where, shown[:80]).error("E_KIND_LIMIT", f"the equation has more than {MAX_TEXT} characters")
    _check_characters(text, where, shown)
    try:
        tree = ast.parse(text)
    except (RecursionError, MemoryError):
        raise start.error("E_KIND_LIMIT", "the equation is nested too deeply") from None
    except SyntaxError as error:
        place = Place(where, shown, error.lineno or 1, max(0, (error.offset or 1) - 1))
        raise place.error("E_KIND_SYNTAX", error.msg.split(";")[0]) from None
    except ValueError as error:
        raise start.error("E_KIND_SYNTAX", str(error)) from None
    return _Reader(where, shown).program(tree.body, names)


def _check_characters(text: str, where: str, shown: str) -> None:
    depth, line, column = 0, 1, 0
    for character in text:
        if not (character.isascii() and character.isprintable()) and character != "\n":
            raise Place(where, shown, line, column).error("E_KIND_SYNTAX", f"character {character!r} is not allowed")
        if character in "\\;":
            raise Place(where, shown, line, column).error("E_KIND_SYNTAX", f"{character} is not part of the language")
        depth += (character in "([{") - (character in ")]}")
        if depth > MAX_DEPTH:
            raise Place(where, shown, line, column).error("E_KIND_LIMIT", f"more than {MAX_DEPTH} brackets are open")
        line, column = (line + 1, 0) if character == "\n" else (line, column + 1)
    glued = _GLUED.search(text)
    if glued:
        before = text[: glued.end() - 1].split("\n")
        place = Place(where, shown, len(before), len(before[-1]))
        raise place.error("E_KIND_SYNTAX", "a letter stands right behind a number")
