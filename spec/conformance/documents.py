"""Vectors of kind documents: what each part may be. Used by generate.py."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

__all__ = ["documents"]

PLAIN: dict[str, Any] = {
    "kind": "com.example.gate",
    "version": 1,
    "hosts": ["linear"],
    "config": {"rank": {"type": "integer", "minimum": 1}, "scale": {"type": "number", "default": 1.0}},
    "tensors": {"down": {"shape": ["rank", "in"]}, "up": {"shape": ["out", "rank"], "init": "zeros"}},
    "equations": {"output": "y + scale * linear(host(x, down), up)"},
}
HOST = {"family": "linear", "in": 6, "out": 4, "bias": True}
DOCUMENT, NAME, OP, CONFIG, UNFIT = "E_KIND_DOCUMENT", "E_KIND_NAME", "E_KIND_OP", "E_KIND_CONFIG", "E_KIND_HOST"
SYNTAX, SHAPE, TENSOR, NUMBER, LIMIT = "E_KIND_SYNTAX", "E_KIND_SHAPE", "E_KIND_TENSOR", "E_KIND_NUMBER", "E_KIND_LIMIT"
MISSING: Any = object()


def changed(**changes: Any) -> dict[str, Any]:
    """The plain document with members set; dots (as ``__``) lead inside, MISSING removes."""
    document = deepcopy(PLAIN)
    for path, value in changes.items():
        *steps, last = path.split("__")
        place: Any = document
        for step in steps:
            place = place.setdefault(step, {})
        if value is MISSING:
            del place[last]
        else:
            place[last] = value
    return document


def alone(port: str, text: Any, **more: Any) -> dict[str, Any]:
    """A document with one equation and what it uses."""
    return {"kind": "com.example.gate", "version": 1, "hosts": ["linear"], **more, "equations": {port: text}}


USES = "y + scale * linear(host(x, down), up) + 0 * sum(add, -1)"
"""An equation that uses one tensor more."""
UP = {"up": {"shape": ["out", 2]}}


def documents() -> list[dict[str, Any]]:
    """Documents alone, and documents with a config on a host."""
    cases: list[dict[str, Any]] = []

    def good(description: str, clause: Any, document: Any, tensors: Any = None, **more: Any) -> None:
        expect = {} if tensors is None else {"expect": {"tensors": tensors}}
        body = {"description": description, "clause": clause, "document": document, **more, "valid": True, **expect}
        cases.append(body)

    def bad(description: str, clause: Any, code: Any, document: Any, **more: Any) -> None:
        body = {"description": description, "clause": clause, "document": document, **more}
        cases.append({**body, "valid": False, "error_code": code})

    on = {"config": {"rank": 2}, "host": HOST}
    good("a document", "DH-5.1-1", PLAIN)
    good("its tensors on a host", "DH-5.3-1", PLAIN, {"down": [2, 6], "up": [4, 2]}, **on)
    good("everything that a document may say", "DH-5.1-1", changed(
        title="t", reference="arXiv:0000.00000", description="d", identity=True, strength="scale", context=[],
        config__scale={"type": "number", "default": 1.0, "minimum": 0, "exclusiveMaximum": 8, "description": "d"},
        config__how={"type": "string", "enum": ["relu", "gelu"], "default": "gelu"},
        config__twice={"type": "boolean", "default": False},
        equations={"output": {"when": {"twice": False}, "expr": "y + scale * activation(linear(host(x, down), up), how)"}},
        tensors__up={"shape": ["out", "rank"], "init": "normal(0.5)", "dtype": "float", "trainable": True, "description": "d"},
    ))  # fmt: skip
    good("arithmetic in a shape", "DH-5.3-1", changed(tensors__up__shape=["out", "in // 2 * rank - rank * 2"]),
         {"up": [4, 2]}, **on)  # fmt: skip
    good(
        "*kernel is nothing on a linear host",
        "DH-5.3-1",
        changed(tensors__down__shape=["rank", "in", "*kernel"]),
        {"down": [2, 6]},
        **on,
    )
    good(
        "*weight",
        "DH-5.3-1",
        alone("weight", "W + whole", tensors={"whole": {"shape": ["*weight"]}}),
        {"whole": [4, 6]},
        config={},
        host=HOST,
    )
    good("a tensor whose condition does not hold is absent", "DH-5.3-2",
         changed(tensors__add={"shape": ["out"], "when": {"bias": False}}, equations__output="y + scale * linear(host(x, down), up, add)"),
         {"down": [2, 6], "up": [4, 2]}, **on)  # fmt: skip
    cases.append({**cases.pop(), "clause": ["DH-5.3-2", "DH-5.4-3"]})
    bad("nothing where a tensor is needed", "DH-5.3-2", [OP, SHAPE, NAME, TENSOR],
        alone("output", "y + add", tensors={"add": {"shape": ["out"], "when": {"bias": False}}}), config={}, host=HOST)  # fmt: skip
    for member in ("kind", "version", "hosts", "equations"):
        bad(f"no {member}", "DH-5.1-1", DOCUMENT, changed(**{member: MISSING}))
    for path, value in (
        ("kind", 1), ("version", "1"), ("version", 0), ("version", 1.0), ("version", True), ("title", 1), ("hosts", []), ("hosts", "linear"),
        ("hosts", ["network"]), ("hosts", ["linear", "linear"]), ("identity", "yes"), ("strength", "rank"), ("strength", "gain"),
        ("context", ["clock"]), ("author", "me"), ("code", "import os"), ("config", []), ("tensors", []), ("equations", []), ("equations", {}),
        ("config__rank__type", "tensor"), ("config__rank__step", 2), ("config__scale__type", MISSING), ("config__rank__minimum", "1"),
        ("tensors__up__shape", MISSING), ("tensors__up__shape", "out"), ("tensors__up__file", "a"), ("tensors__up__trainable", 1),
        ("tensors__up__init", "torch.zeros(3)"), ("tensors__up__init", "zeros(3)"), ("tensors__up__init", "normal"),
    ):  # fmt: skip
        shown = "absent" if value is MISSING else repr(value)
        bad(f"{path.replace('__', '.')} is {shown}", "DH-5.1-1", [DOCUMENT, SYNTAX, NAME, OP], changed(**{path: value}))
    for name in (
        "Gate",
        "1gate",
        "com.example.",
        ".gate",
        "com..gate",
        "com example",
        "gäte",
        "os/path",
        "-gate",
        "a" * 65,
    ):
        bad(f"a kind called {name[:20]!r}", "DH-5.1-3", [DOCUMENT, NAME], changed(kind=name))
    for name in (
        "X",
        "1a",
        "_a",
        "a-b",
        "x",
        "y",
        "host",
        "base",
        "out",
        "in",
        "d_in",
        "for",
        "lambda",
        "grid",
        "a" * 33,
        "é",
    ):
        bad(
            f"a tensor called {name!r}",
            "DH-5.2-2",
            NAME,
            {**PLAIN, "tensors": {**PLAIN["tensors"], name: {"shape": [1]}}},
        )
    for name in ("bias", "family", "grouped", "down", "x"):
        bad(
            f"a config value called {name!r}",
            "DH-5.2-2",
            NAME,
            {**PLAIN, "config": {**PLAIN["config"], name: {"type": "integer"}}},
        )
    for path, value in (
        ("config__scale__default", "1"), ("config__rank__default", 0), ("config__how", {"type": "string", "enum": ["a"], "default": "b"}),
        ("config__how", {"type": "integer", "minimum": 2, "enum": [1]}), ("tensors__up__when", {"rank": "two"}), ("tensors__up__when", {"rank": []}),
        ("tensors__up__when", {"depth": 1}), ("tensors__up__when", {"bias": 1}), ("tensors__up__when", {"family": "network"}),
    ):  # fmt: skip
        bad(f"{path.replace('__', '.')} is {value!r}", "DH-5.2-3", DOCUMENT, changed(**{path: value}))
    for config in ({}, {"rank": 0}, {"rank": 2.0}, {"rank": True}, {"rank": "2"}, {"rank": None}, {"rank": [2]}, {"rank": {}},
                   {"rank": 2**31}, {"rank": 2, "scale": "1"}, {"rank": 2, "scale": True}, {"rank": 2, "depth": 1}):  # fmt: skip
        bad(f"the config {config}", ["DH-5.2-1", "DH-4.4-4"], CONFIG, PLAIN, config=config, host=HOST)
    good("an integer for a number", "DH-5.2-1", PLAIN, {"down": [2, 6]}, config={"rank": 2, "scale": 3}, host=HOST)
    for shape in ([0], [-1], ["rank - 2"], ["rank / 3"], ["in - 6"]):
        bad(
            f"the shape {shape}",
            "DH-5.3-1",
            [SHAPE, DOCUMENT, NUMBER, TENSOR, LIMIT],
            changed(tensors__add={"shape": shape}, equations__output=USES),
            **on,
        )
    for shape in ([1.5], [None], [[1]], ["size"], ["len(in)"], ["in.shape"], [1] * 9, ["__import__"]):
        bad(
            f"the shape {shape}",
            "DH-5.3-1",
            [DOCUMENT, NAME, OP, SYNTAX],
            changed(tensors__add={"shape": shape}, equations__output=USES),
        )
    for dtype in ("F32", "double", "float64", "object", ""):
        bad(f"the dtype {dtype!r}", "DH-5.3-3", DOCUMENT, changed(tensors__up__dtype=dtype))
    bad(
        "integers that are trainable",
        "DH-5.3-3",
        DOCUMENT,
        changed(tensors__up={"shape": [1], "dtype": "int64", "trainable": True}),
    )
    for port in ("outputs", "forward", "kv2", "Output"):
        bad(f"an equation for {port}", "DH-5.4-1", DOCUMENT, {**PLAIN, "equations": {port: "x"}})
    bad("host in a weight equation", "DH-5.4-1", OP, alone("weight", "host(W, W)"))
    bad("base in an output equation", "DH-5.4-1", OP, alone("output", "base(x)"))
    for port, text in (
        ("output", "y[0]"),
        ("input", "cat(x, x)"),
        ("weight", "up"),
        ("bias", "W"),
        ("replace", "x"),
        ("output", "up"),
    ):
        bad(
            f"a value of the wrong shape: {port} = {text}",
            "DH-5.4-2",
            SHAPE,
            alone(port, text, **({"tensors": UP} if text == "up" else {})),
            config={},
            host=HOST,
        )
    when = [{"when": {"twice": True}, "expr": "y + y"}, {"when": {"rank": [2, 3]}, "expr": "y"}]
    choice = alone("output", when, config={"rank": {"type": "integer"}, "twice": {"type": "boolean", "default": False}})
    good("a case that holds", "DH-5.4-3", choice, **on)
    bad(
        "no case holds, and there is no other port",
        ["DH-5.4-3", "DH-5.5-1"],
        UNFIT,
        choice,
        config={"rank": 4},
        host=HOST,
    )
    for name in ("config", "tensors"):
        entry = {"type": "integer", "default": 1} if name == "config" else {"shape": ["out"]}
        bad(f"{name} that nothing uses", "DH-5.1-4", DOCUMENT, {**PLAIN, name: {**PLAIN[name], "idle": entry}})
    used = {**PLAIN["config"], "width": {"type": "integer", "default": 2}}
    good(
        "a config value that only a shape uses",
        "DH-5.1-4",
        changed(config=used, tensors__down__shape=["rank", "in * width // width"]),
    )
    bad(
        "a family that is not among the hosts",
        "DH-5.5-1",
        UNFIT,
        PLAIN,
        config={"rank": 2},
        host={"family": "norm", "in": 4, "out": 4, "bias": True},
    )
    bad("a result of a thousand million elements", ["DH-5.6-5", "DH-10-1"], [LIMIT, SHAPE],
        alone("output", "y + sum(zeros((1000, 1000, 1000), like=y), (0, 1, 2))"), config={}, host=HOST)  # fmt: skip
    bad(
        "a hundred thousand rounds",
        ["DH-5.6-5", "DH-10-1"],
        LIMIT,
        alone("output", "sum(y * i for i in range(100000))"),
        config={},
        host=HOST,
    )
    bad(
        "a loop over a tensor's values",
        "DH-5.6-4",
        [SYNTAX, NUMBER, NAME, OP, SHAPE],
        alone("output", "sum(y for i in range(up))", tensors=UP),
        config={},
        host=HOST,
    )
    bad(
        "an index that is a tensor",
        "DH-5.6-4",
        [SYNTAX, NUMBER, NAME, OP, SHAPE],
        alone("output", "y[up]", tensors=UP),
        config={},
        host=HOST,
    )
    return cases
