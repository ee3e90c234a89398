"""The expression language: what it takes, what it refuses, and that refusing is quick and says where."""

from __future__ import annotations

import time

import pytest

from deltahub.errors import KindError
from deltahub.kinds.language import parse
from deltahub.kinds.layout import number
from deltahub.kinds.tree import Binary, Call, Loop, Name, Place, arithmetic, references, walk

NAMES = frozenset({"x", "y", "W", "b", "down", "up", "scale", "rank", "n", "act"})


def read(text: str) -> object:
    return parse(text, where="demo.toml, equations.output", names=NAMES)


GOOD = [
    "x",
    "y + scale * linear(host(x, down), up)",
    "-x ** 2 / 3.5e-3 // 2 @ W",
    "h = relu(x)\nh + x",
    "h = relu(\n    x\n)\n# a remark\nh + x",
    "activation(x, act)",
    'activation(x, "gelu")',
    "x[0, 1:n, ..., -1]",
    "x[::2]",
    "sum(x[i] @ W for i in range(n))",
    "sum(x, axis=(0, 1))",
    "cat((x[:, i:i + 1] for i in range(1, n)), axis=1)",
    "stack(cat(x * i * j for j in range(2)) for i in range(n))",
    "chain(x[i] for i in range(n))",
    "einsum(x, y, 'b i, b j -> i j')",
    "rearrange(x, 'b (h w) c -> b c h w', h=rank)",
    "(((x)))",
    "reshape(x, (2, -1))",
    "x" + " + x" * 60,
]

HOSTILE = {
    "().__class__": "E_KIND_SYNTAX",
    "x.__class__": "E_KIND_SYNTAX",
    "(1).__class__.__mro__": "E_KIND_SYNTAX",
    "__import__('os').system('true')": "E_KIND_SYNTAX",
    "__import__('os')": "E_KIND_OP",
    "eval('1')": "E_KIND_OP",
    "open('/etc/passwd')": "E_KIND_OP",
    "getattr(x, 'data')": "E_KIND_OP",
    "__builtins__": "E_KIND_NAME",
    "_x = 1\nx": "E_KIND_SYNTAX",
    "lambda: x": "E_KIND_SYNTAX",
    "(lambda: x)()": "E_KIND_SYNTAX",
    "[i for i in x]": "E_KIND_SYNTAX",
    "{i for i in x}": "E_KIND_SYNTAX",
    "{i: i for i in x}": "E_KIND_SYNTAX",
    "(i for i in x)": "E_KIND_SYNTAX",
    "relu(x for i in range(n))": "E_KIND_SYNTAX",
    "f'{x}'": "E_KIND_SYNTAX",
    "f'{().__class__}'": "E_KIND_SYNTAX",
    "(h := x)": "E_KIND_SYNTAX",
    "cat(*x)": "E_KIND_SYNTAX",
    "linear(**x)": "E_KIND_SYNTAX",
    "x if y else W": "E_KIND_SYNTAX",
    "x == y": "E_KIND_SYNTAX",
    "x < y": "E_KIND_SYNTAX",
    "x and y": "E_KIND_SYNTAX",
    "not x": "E_KIND_SYNTAX",
    "+x": "E_KIND_SYNTAX",
    "~x": "E_KIND_SYNTAX",
    "x % y": "E_KIND_SYNTAX",
    "x | y": "E_KIND_SYNTAX",
    "x << 2": "E_KIND_SYNTAX",
    "[x, y]": "E_KIND_SYNTAX",
    "{x}": "E_KIND_SYNTAX",
    "{}": "E_KIND_SYNTAX",
    "x[None]": "E_KIND_SYNTAX",
    "True": "E_KIND_SYNTAX",
    "None": "E_KIND_SYNTAX",
    "...": "E_KIND_SYNTAX",
    "1j": "E_KIND_SYNTAX",
    "b'x'": "E_KIND_SYNTAX",
    "'x'": "E_KIND_SYNTAX",
    "x + 'x'": "E_KIND_SYNTAX",
    "relu(('x', x))": "E_KIND_SYNTAX",
    "import os": "E_KIND_SYNTAX",
    "import os\nx": "E_KIND_SYNTAX",
    "from os import path\nx": "E_KIND_SYNTAX",
    "def f(): pass\nx": "E_KIND_SYNTAX",
    "class C: pass\nx": "E_KIND_SYNTAX",
    "for i in x: pass\nx": "E_KIND_SYNTAX",
    "while 1: pass\nx": "E_KIND_SYNTAX",
    "del x\nx": "E_KIND_SYNTAX",
    "global x\nx": "E_KIND_SYNTAX",
    "assert x\nx": "E_KIND_SYNTAX",
    "h += x\nh": "E_KIND_SYNTAX",
    "h: x = y\nh": "E_KIND_SYNTAX",
    "h, g = x, y\nh": "E_KIND_SYNTAX",
    "h = g = x\nh": "E_KIND_SYNTAX",
    "x[0] = y\nx": "E_KIND_SYNTAX",
    "h = x": "E_KIND_SYNTAX",
    "x\ny": "E_KIND_SYNTAX",
    "h = x; h": "E_KIND_SYNTAX",
    "await x": "E_KIND_SYNTAX",
    "yield x": "E_KIND_SYNTAX",
    "relu(x)(y)": "E_KIND_SYNTAX",
    "x(y)": "E_KIND_OP",
    "sum(x for i in range(n) if i)": "E_KIND_SYNTAX",
    "sum(x for i in range(n) for j in range(n))": "E_KIND_SYNTAX",
    "sum(x for i in y)": "E_KIND_SYNTAX",
    "sum(x for i in range(1, 9, 2))": "E_KIND_SYNTAX",
    "sum(x for i in range(*y))": "E_KIND_SYNTAX",
    "sum(x for i, j in range(n))": "E_KIND_SYNTAX",
    "sum((x for i in range(n)), axis=0)": "E_KIND_SYNTAX",
    "cat((x for i in range(n)), y)": "E_KIND_SYNTAX",
    "sum(x async for i in range(n))": "E_KIND_SYNTAX",
    "sum(x for y in range(n))": "E_KIND_NAME",
    "y = 1\ny": "E_KIND_NAME",
    "h = 1\nh = 2\nh": "E_KIND_NAME",
    "h": "E_KIND_NAME",
    "range(n)": "E_KIND_OP",
    "linaer(x, up)": "E_KIND_OP",
    "linear(x)": "E_KIND_OP",
    "linear(x, up, b, y)": "E_KIND_OP",
    "linear(x, up, w=up)": "E_KIND_OP",
    "linear(x, up, bios=b)": "E_KIND_OP",
    "relu()": "E_KIND_OP",
    "einsum('a -> a')": "E_KIND_OP",
    "": "E_KIND_SYNTAX",
    "# nothing": "E_KIND_SYNTAX",
    "x +": "E_KIND_SYNTAX",
    "x)": "E_KIND_SYNTAX",
    "  x": "E_KIND_SYNTAX",
    "x\\\n+ y": "E_KIND_SYNTAX",
    "x\t+ y": "E_KIND_SYNTAX",
    "x\x00": "E_KIND_SYNTAX",
    "х": "E_KIND_SYNTAX",
    "ｘ": "E_KIND_SYNTAX",
    "x + \u202e y": "E_KIND_SYNTAX",
    "0x10": "E_KIND_SYNTAX",
    "1_000": "E_KIND_SYNTAX",
    "1for": "E_KIND_SYNTAX",
    "2x": "E_KIND_SYNTAX",
    "1e999": "E_KIND_NUMBER",
    "9" * 400: "E_KIND_NUMBER",
    "9" * 6000: "E_KIND_SYNTAX",
    "x" * 9000: "E_KIND_LIMIT",
    "(" * 3000 + "x" + ")" * 3000: "E_KIND_LIMIT",
    "[" * 100: "E_KIND_LIMIT",
    "-" * 8000 + "x": "E_KIND_LIMIT",
    "x" + "+x" * 4000: "E_KIND_LIMIT",
    "x" + "+x" * 100: "E_KIND_LIMIT",
    "x" + "[0]" * 2000: "E_KIND_LIMIT",
    "not " * 1900 + "x": "E_KIND_SYNTAX",
    "cat(" + "x," * 3000 + ")": "E_KIND_LIMIT",
    "relu(" * 64 + "x" + ")" * 64: "E_KIND_LIMIT",
    "rearrange(x, '" + "a " * 200 + "-> a')": "E_KIND_LIMIT",
}


@pytest.mark.parametrize("text", GOOD)
def test_what_belongs_is_read(text: str) -> None:
    read(text)


@pytest.mark.parametrize(("text", "code"), HOSTILE.items(), ids=lambda v: v[:40] if isinstance(v, str) else v)
def test_what_does_not_belong_is_refused(text: str, code: str) -> None:
    start = time.process_time()
    with pytest.raises(KindError) as caught:
        read(text)
    assert caught.value.code == code, str(caught.value)
    assert time.process_time() - start < 1
    assert str(caught.value.where).startswith("demo.toml, equations.output, line ")
    assert "^" in str(caught.value)


def test_a_message_points_at_the_place() -> None:
    with pytest.raises(KindError) as caught:
        read("h = relu(x)\nh + scale * linaer(h, up)")
    assert str(caught.value) == (
        "[E_KIND_OP] unknown operation 'linaer'; did you mean linear or inverse or like?\n"
        "    h + scale * linaer(h, up)\n"
        "                ^\n"
        "  where:    demo.toml, equations.output, line 2, column 13"
    )


def test_a_long_line_is_shown_around_the_place() -> None:
    with pytest.raises(KindError) as caught:
        read("x + " * 20 + "z" + " + x" * 20)
    line, caret = str(caught.value).split("\n")[1:3]
    assert len(line) <= 84
    assert line[caret.index("^")] == "z"


def test_a_wrong_call_shows_the_signature() -> None:
    with pytest.raises(KindError) as caught:
        read("linear(x)")
    assert caught.value.what.startswith("linear needs w")
    assert caught.value.hint == "its signature is linear(h: tensor, w: tensor, bias: tensor = None)"


def test_unknown_names_come_with_the_nearest() -> None:
    with pytest.raises(KindError, match="unknown name 'dwon'; did you mean down"):
        read("linear(x, dwon)")


def test_the_tree() -> None:
    program = parse("h = x @ W\nsum(relu(h[i]) for i in range(n))", where="d", names=NAMES)
    assert [name for name, _ in program.steps] == ["h"]
    assert isinstance(program.steps[0][1], Binary)
    assert isinstance(program.result, Loop)
    assert references(program) == ({"x", "W", "h", "i", "n"}, {"relu"})
    assert {type(node) for node in walk(program.result)} >= {Loop, Call, Name}


@pytest.mark.parametrize(
    ("operator", "left", "right", "value"),
    [("+", 1, 2, 3), ("-", 1, 2.5, -1.5), ("*", 3, 4, 12), ("/", 1, 2, 0.5), ("//", 7, 2, 3), ("**", 2, 10, 1024),
     ("**", 2, -1, 0.5), ("**", 1, 10**15, 1), ("**", -1, 3, -1), ("**", 4, 0.5, 2.0), ("**", 0, 5, 0)],
)  # fmt: skip
def test_arithmetic(operator: str, left: float, right: float, value: float) -> None:
    result = arithmetic(operator, left, right, Place("d", "x"))
    assert result == value
    assert type(result) is type(value)


@pytest.mark.parametrize(
    ("operator", "left", "right"),
    [("**", 9, 9**9), ("**", 9, 10**15), ("**", -3, 10**15), ("*", 2**40, 2**40), ("+", 2**53, 1), ("/", 1, 0),
     ("//", 1, 0), ("**", 0, -1), ("**", 1e200, 2), ("*", 1e200, 1e200), ("**", -2, 0.5), ("@", 1, 1)],
)  # fmt: skip
def test_numbers_are_bounded_before_they_are_computed(operator: str, left: float, right: float) -> None:
    start = time.process_time()
    with pytest.raises(KindError) as caught:
        arithmetic(operator, left, right, Place("d", "x"))
    assert caught.value.code == "E_KIND_NUMBER"
    assert time.process_time() - start < 1


def test_a_tower_of_powers_is_not_computed() -> None:
    program = parse("9**9**9", where="d", names=frozenset())
    with pytest.raises(KindError, match="E_KIND_NUMBER"):
        number(program.result, {})


def test_numbers_only_where_numbers_are_meant() -> None:
    assert number(parse("-rank * 2", where="d", names=NAMES).result, {"rank": 3}) == -6
    for text, code in (("relu(x)", "E_KIND_NUMBER"), ("(1, 2)", "E_KIND_NUMBER"), ("rank", "E_KIND_HOST")):
        with pytest.raises(KindError) as caught:
            number(parse(text, where="d", names=NAMES).result, {})
        assert caught.value.code == code
