"""Equations of kind documents as MathML, which browsers typeset by themselves."""

from __future__ import annotations

__all__ = ["as_mathml", "equation_rows"]

import ast
import json
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

_LEFT: Mapping[str, str] = {
    "input": "x′",
    "output": "y′",
    "replace": "y′",
    "weight": "W′",
    "bias": "b′",
}
_GREEK = ("alpha", "beta", "gamma", "delta", "lambda", "sigma", "theta", "omega")
_LETTERS = dict(zip(_GREEK, "αβγδλσθω", strict=True))
_OPEN, _CLOSE = '<mo stretchy="false">(</mo>', '<mo stretchy="false">)</mo>'
_TIGHT = {ast.Add: 1, ast.Sub: 1, ast.Mult: 2, ast.Div: 2, ast.FloorDiv: 2, ast.MatMult: 2, ast.Pow: 4}
_SIGNS = {ast.Add: "+", ast.Sub: "−", ast.Mult: "·", ast.MatMult: "", ast.FloorDiv: "÷"}


def equation_rows(equations: Mapping[str, Any], config: Mapping[str, Any] | None = None) -> list[dict[str, str]]:
    """Each equation of a document: its port, when it holds, as text and as MathML.

    Args:
        equations: as in the document.
        config: leave out what does not hold under it.
    """
    rows = []
    for port, value in equations.items():
        for when, text in _cases(value, config or {}):
            rows.append({"port": port, "when": when, "text": text, "math": as_mathml(text, left=_LEFT.get(port, port))})
    return rows


def _cases(value: Any, config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield "", value
        return
    for case in [value] if isinstance(value, Mapping) else value:
        when = case.get("when", {})
        if any(name in config and config[name] not in _several(wanted) for name, wanted in when.items()):
            continue
        said = ", ".join(f"{name} = {_plain(wanted)}" for name, wanted in when.items() if name not in config)
        yield said, str(case["expr"])


def _several(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _plain(value: Any) -> str:
    return " or ".join(map(_plain, value)) if isinstance(value, list | tuple) else json.dumps(value).strip('"')


def as_mathml(text: str, *, left: str) -> str:
    """A program of the expression language as MathML: a row per line, the last one with ``left =`` before it.

    What is no Python expression is shown as it stands.
    """
    try:
        lines = ast.parse(text.strip()).body
        rows = [_line(line, left) for line in lines]
    except (SyntaxError, ValueError, RecursionError):
        return f"<code>{escape(text)}</code>"
    table = "".join(f"<mtr><mtd>{row}</mtd></mtr>" for row in rows)
    return f'<math display="block"><mtable columnalign="left">{table}</mtable></math>'


def _line(line: ast.stmt, left: str) -> str:
    if isinstance(line, ast.Assign):
        return f"{_math(line.targets[0])}<mo>=</mo>{_math(line.value)}"
    if isinstance(line, ast.Expr):
        return f"<mi>{left}</mi><mo>=</mo>{_math(line.value)}"
    raise ValueError("not an expression")


def _math(node: ast.AST, tight: int = 0) -> str:
    """One expression; brackets where an operator around it binds more tightly."""
    if isinstance(node, ast.Name):
        return _name(node.id)
    if isinstance(node, ast.Constant):
        text = escape(str(node.value))
        return f"<mtext>{text}</mtext>" if isinstance(node.value, str) else f"<mn>{text}</mn>"
    if isinstance(node, ast.UnaryOp):
        return _bracketed(f"<mo>−</mo>{_math(node.operand, 3)}", tight > 1)
    if isinstance(node, ast.BinOp):
        return _binary(node, tight)
    if isinstance(node, ast.Call):
        arguments = [_math(argument) for argument in node.args]
        arguments += [f"<mtext>{escape(str(k.arg))}</mtext><mo>=</mo>{_math(k.value)}" for k in node.keywords]
        return f"{_math(node.func)}{_OPEN}{'<mo>,</mo>'.join(arguments)}{_CLOSE}"
    if isinstance(node, ast.Tuple | ast.List):
        return f"{_OPEN}{'<mo>,</mo>'.join(map(_math, node.elts))}{_CLOSE}"
    return f"<mtext>{escape(ast.unparse(node))}</mtext>"  # slices, loops: as they are written


def _binary(node: ast.BinOp, tight: int) -> str:
    kind = type(node.op)
    mine = _TIGHT.get(kind, 0)
    if kind is ast.Div:
        return f"<mfrac><mrow>{_math(node.left)}</mrow><mrow>{_math(node.right)}</mrow></mfrac>"
    if kind is ast.Pow:
        return f"<msup><mrow>{_math(node.left, 5)}</mrow><mrow>{_math(node.right)}</mrow></msup>"
    sign = _SIGNS.get(kind)
    if sign is None:
        return f"<mtext>{escape(ast.unparse(node))}</mtext>"
    between = f"<mo>{sign}</mo>" if sign else '<mspace width="0.35em"/>'  # a product of matrices
    inside = f"{_math(node.left, mine)}{between}{_math(node.right, mine + 1)}"
    return _bracketed(inside, tight > mine)


def _bracketed(text: str, needed: bool) -> str:  # noqa: FBT001
    return f"<mrow>{_OPEN}{text}{_CLOSE}</mrow>" if needed else f"<mrow>{text}</mrow>"


def _name(text: str) -> str:
    first, underscore, rest = text.partition("_")
    letter = f"<mi>{_LETTERS.get(first, escape(first))}</mi>"
    return f"<msub>{letter}<mtext>{escape(rest)}</mtext></msub>" if underscore and rest and first else letter
