"""Vectors of programs that a reader refuses. Used by generate.py."""

from __future__ import annotations

import re
from typing import Any

from expressions import document, numbers

__all__ = ["refusals"]

SYNTAX, NAME, OP, LIMIT, NUMBER, SHAPE = (f"E_KIND_{n}" for n in ("SYNTAX", "NAME", "OP", "LIMIT", "NUMBER", "SHAPE"))
REFUSED: tuple[tuple[str, str | list[str], str], ...] = (
    ("DH-5.6-1", SYNTAX, "\n".join([
        "x.shape", "().__class__", "x.__class__.__base__", "lambda: x", "x if x else x", "x < 1", "x and x", "not x",
        "[x, x]", "{x}", "{'a': x}", "f'{x}'", "'x'", "sum(*x)", "sum(**x)", "x % 2", "x << 1", "x | x", "~x", "+x",
        "[x for i in range(3)]", "sum(x for i in range(3) if i)", "sum(x for i in x)", "sum(x for i in range(0, 4, 2))",
        "sum(x for i, j in range(3))", "max(x for i in range(3))", "(y := x)", "x; x", "x \\", "True", "None", "b'x'",
        "1j", "...", "x[", "x)", "", "import os", "del x", "return x", "exp(x)(x)", "x[0]()", "async", "h = x",
        "2x", "1if", "x = ", "é", "x\t+ 1", "x +\u2028 x", "1_000 * x", "0x10 * x", "0b1 * x", "x\u0000", "exp(x", "x y", "x ** ", "@x", "x += 1",
    ])),
    ("DH-5.6-1", SYNTAX, "x\nx|||h = g = x\nh|||h: int = x\nh|||h, g = x\nh|||h[0] = x\nh|||if x:\n  x"),
    ("DH-5.6-2", NAME, "z\ny\nW2\nsum(i for i in range(3)) + i\nopen\nprint\n__import__\n__builtins__\n_\nexp\nself\nmodule\nTrue1"),
    ("DH-5.6-2", NAME, "x = x\nx|||a = x\na|||h = x\nh = x\nh|||sum(x for x in range(3))|||sum(a for a in range(3))|||h = g\ng"),
    ("DH-5.6-3", OP, "\n".join([
        "eval(x)", "open(x)", "__import__(x)", "getattr(x, 'T')", "exec(x)", "print(x)", "expp(x)", "conv4d(x, a)",
        "x(x)", "exp()", "exp(x, x)", "exp(y=x)", "reshape(x)", "softmax(x, axis=0, dim=1)", "clip(x, 0)",
        "linear(x, a, None)", "rearrange(x)", "range(3)", "host(x)", "cat()",
    ])),
    ("DH-5.6-7", NUMBER, "x * 1e999\nx * (1 / 0)\nx * (1 // 0)\nx + 99999999999999999999\nx * 2 ** 2 ** 10\nx * (-1) ** 0.5\nx * 10.0 ** 400"),
)  # fmt: skip


def refusals() -> list[dict[str, Any]]:
    """Programs that a reader refuses when it reads the document."""
    cases: list[dict[str, Any]] = []

    def case(clause: str | list[str], code: str | list[str], text: str, description: str | None = None) -> None:
        body = {
            "document": document(text, {"a": numbers(3)} if re.search(r"\ba\b", text) else {}),
            "valid": False,
            "error_code": code,
        }
        if code == NUMBER:  # found when the equation is worked out for a host
            body = {"host": {"family": "block"}, **body}
        cases.append({"description": description or repr(text), "clause": clause, **body})

    for clause, code, texts in REFUSED:
        for text in texts.split("|||") if "|||" in texts else texts.split("\n"):
            codes = [code, NAME, OP] if clause == "DH-5.6-1" else [code, SYNTAX] if code != NUMBER else code
            case(["DH-5.6-1", "DH-11-4"] if "__" in text else clause, codes, text)
    case("DH-5.6-5", LIMIT, "x + " * 3000 + "x", "3000 additions")
    case(["DH-5.6-5", "DH-10-1"], LIMIT, "(" * 5000 + "x" + ")" * 5000, "5000 brackets")
    case(["DH-5.6-5", "DH-10-1"], [LIMIT, SYNTAX], "-" * 5000 + "x", "5000 signs")
    case("DH-5.6-5", LIMIT, "x" + " " * 9000 + "+ x", "a text of 9000 characters")
    case("DH-5.6-5", LIMIT, "rearrange(x, '" + "a " * 200 + "-> a')", "a pattern of 400 characters")
    return cases
