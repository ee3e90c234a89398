"""Vectors of parts of hosts (section 5.9): rows of a linear host, stacks of linear maps. Used by composition.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from expressions import Array, document, numbers, tensor
from hosts import CONFIGS, HOSTS, bias_port, output_port, sample, tensors_of, weight_port

__all__ = ["parts"]

Rows = tuple[int, int, int]


def chosen(rows: Rows, out: int) -> Array:
    """Which outputs a triple of start, stop and period means."""
    start, stop, period = rows
    return np.array([r for r in range(out) if start <= r % period < stop])


def named(rows: Rows) -> dict[str, int]:
    return dict(zip(("start", "stop", "period"), rows, strict=True))


def written(module: Mapping[str, Any]) -> dict[str, Any]:
    return {**module, "tensors": {name: tensor(value) for name, value in module["tensors"].items()}}


def changed(kind: str, tensors: Mapping[str, Array], w: Array, b: Array | None) -> tuple[Array, Array | None]:
    """Weight and bias of a host with one delta in them."""
    config = CONFIGS[kind]
    new_w, new_b = weight_port(kind, config, tensors, w), bias_port(kind, config, tensors, b)
    return w if new_w is None else new_w, b if new_b is None else new_b


def parts() -> list[dict[str, Any]]:
    """Sites on some outputs of a host, and on all maps of a stack."""
    host = {"family": "linear", "in": 3, "out": 12, "bias": True}
    x, w, b = sample(host)
    assert w is not None
    assert b is not None
    base = {"host": host, "W": tensor(w), "b": tensor(b), "x": tensor(x)}
    cases: list[dict[str, Any]] = []

    def add(description: str, clause: str, modules: Sequence[Mapping[str, Any]], y: Array, *, merged: bool) -> None:
        delta = {"modules": [written(m) for m in modules], **({"merged": True} if merged else {})}
        how = ", merged" if merged else ""
        cases.append({"description": description + how, "clause": clause, **base, "deltas": [delta], "valid": True,
                      "expect": {"y": tensor(y)}, "tolerance": 1e-5})  # fmt: skip

    for rows, name in (((4, 8, 12), "in one piece"), ((1, 2, 3), "one in three"), ((0, 2, 6), "two in six")):
        at = chosen(rows, 12)
        part = {**host, "out": len(at)}
        for kind in ("lora", "diff", "assign", "bias"):
            tensors = tensors_of(kind, part, 80)
            new_w, new_b = w.copy(), b.copy()
            own_w, own_b = changed(kind, tensors, w[at], b[at])
            new_w[at], new_b[at] = own_w, own_b
            module = {"kind": kind, "version": 1, "config": CONFIGS[kind], "tensors": tensors, "rows": named(rows)}
            for merged in (False, True):
                add(f"{kind} on rows {name}", "DH-5.9-1", [module], x @ new_w.T + new_b, merged=merged)
    at = chosen((0, 4, 12), 12)
    tensors = tensors_of("adapter", {**host, "out": 4}, 81)
    y = x @ w.T + b
    wrapped = output_port("adapter", CONFIGS["adapter"], tensors, {**host, "out": 4}, x, y[..., at])
    assert wrapped is not None
    y[..., at] = wrapped
    module = {"kind": "adapter", "version": 1, "config": CONFIGS["adapter"], "tensors": tensors}
    add("adapter on rows: the others stay", "DH-5.9-1", [{**module, "rows": named((0, 4, 12))}], y, merged=False)

    def refused(description: str, clause: str, modules: Sequence[Mapping[str, Any]], code: str) -> None:
        cases.append({"description": description, "clause": [clause, "DH-11-2"], **base, "valid": False,
                      "deltas": [{"modules": [written(m) for m in modules]}], "error_code": code,
                      "expect": {"unchanged": True}})  # fmt: skip

    lora = {
        "kind": "lora",
        "version": 1,
        "config": CONFIGS["lora"],
        "tensors": tensors_of("lora", {**host, "out": 4}, 82),
    }
    refused("rows that do not divide the outputs", "DH-5.9-2", [{**lora, "rows": named((0, 4, 8))}], "E_HOST_ROWS")
    half = tensors_of("assign", {**host, "out": 4}, 83)
    assign = {"kind": "assign", "version": 1, "config": CONFIGS["assign"], "tensors": half}
    refused(
        "two that set one output",
        "DH-12.4-1",
        [{**assign, "rows": named((0, 4, 12))}, {**assign, "rows": named((1, 2, 3))}],
        "E_INJECTION_CONFLICT",
    )
    doc = document(None, {"g": numbers(3, seed=84)}, hosts=["linear"])
    gate = {
        "document": {**doc, "equations": {"input": "x * channel(g)"}},
        "config": {},
        "tensors": {"g": numbers(3, seed=84)},
    }
    refused("an input equation alone", "DH-5.9-3", [{**gate, "rows": named((0, 4, 12))}], "E_KIND_HOST")
    refused("a stack on a host that is none", "DH-5.9-4", [{**lora, "stack": 2}], "E_HOST_STACK")
    return [*cases, *stacks(written)]


def stacks(written: Callable[[Mapping[str, Any]], dict[str, Any]]) -> list[dict[str, Any]]:
    """A host that is two linear maps, each with an input of its own."""
    count, single = 2, HOSTS["linear"]
    host = {**single, "stack": count}
    w, b, x = numbers(count, 4, 3, seed=90), numbers(count, 4, seed=91), numbers(count, 2, 3, seed=92)
    cases: list[dict[str, Any]] = []
    for kind in ("lora", "diff", "assign"):
        each = [tensors_of(kind, single, 93 + i) for i in range(count)]
        tensors = {name: np.stack([one[name] for one in each]) for name in each[0]}
        made = [changed(kind, each[i], w[i], b[i]) for i in range(count)]
        y = np.stack([x[i] @ new_w.T + new_b for i, (new_w, new_b) in enumerate(made)])
        module = {"kind": kind, "version": 1, "config": CONFIGS[kind], "tensors": tensors, "stack": count}
        cases += [
            {
                "description": f"{kind} on a stack{', merged' if merged else ''}",
                "clause": ["DH-5.9-4", "DH-5.9-5"],
                "host": host,
                "W": tensor(w),
                "b": tensor(b),
                "x": tensor(x),
                "deltas": [{"modules": [written(module)], **merged}],
                "valid": True,
                "expect": {"y": tensor(y)},
                "tolerance": 1e-5,
            }
            for merged in ({}, {"merged": True})
        ]
    return cases
