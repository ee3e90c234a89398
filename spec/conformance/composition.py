"""Vectors of composition (section 12): several deltas on one host; values in plain NumPy. Used by generate.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from expressions import Array, document, numbers, tensor
from hosts import (
    CONFIGS,
    HOSTS,
    bias_port,
    forward,
    output_port,
    sample,
    scaled,
    tensors_of,
    weight_port,
)
from parts import parts

__all__ = ["compositions"]

Module = dict[str, Any]  # kind or document, config, arrays in "tensors"


def module(kind: str, host: Mapping[str, Any], seed: int = 30, **config: Any) -> Module:
    return {"kind": kind, "version": 1, "config": {**CONFIGS[kind], **config}, "tensors": tensors_of(kind, host, seed)}


def own(ports: dict[str, str], tensors: dict[str, Array], **more: Any) -> Module:
    """A module of a kind of its own; ``more`` goes into the document."""
    doc = document(None, tensors, **{"hosts": ["linear", "norm", "block"], **more})
    return {"document": {**doc, "equations": ports}, "config": {}, "tensors": tensors}


def written(deltas: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Deltas with their arrays as tensors; what only the values need is left out."""
    return [
        {
            **{k: v for k, v in d.items() if k != "modules"},
            "modules": [
                {
                    **{k: v for k, v in m.items() if k != "tensors"},
                    "tensors": {n: tensor(a) for n, a in m["tensors"].items()},
                }
                for m in d["modules"]
            ],
        }
        for d in deltas
    ]


def expected(
    host: Mapping[str, Any], x: Array, w: Array, b: Array | None, deltas: Sequence[Mapping[str, Any]]
) -> Array:
    """Built-in kinds alone: parameters first, in order, then what wraps (section 12.1)."""
    sites = [(m, d.get("strength", 1.0)) for d in deltas for m in d["modules"]]
    for m, s in sites:
        config = scaled(m["kind"], m["config"], s)
        new_w, new_b = weight_port(m["kind"], config, m["tensors"], w), bias_port(m["kind"], config, m["tensors"], b)
        if m["kind"] == "assign":  # interpolated
            new_w = None if new_w is None else w + s * (new_w - w)
            new_b = None if new_b is None or b is None else b + s * (new_b - b)
        w, b = w if new_w is None else new_w, b if new_b is None else new_b
    y = forward(host, x, w, b)
    for m, s in sites:
        if m["kind"] == "adapter":
            y = output_port("adapter", scaled("adapter", m["config"], s), m["tensors"], host, x, y)  # type: ignore[assignment]
    return y


def compositions() -> list[dict[str, Any]]:
    """Several deltas on one host: order, merging, strength, conflicts."""
    cases: list[dict[str, Any]] = []
    host = HOSTS["linear"]
    x, w, b = sample(host)
    assert w is not None
    base = {"host": host, "W": tensor(w), "b": tensor(b), "x": tensor(x)}

    def case(description: str, clause: Any, deltas: list[dict[str, Any]], y: Array | None = None) -> None:
        y = expected(host, x, w, b, deltas) if y is None else y
        cases.append({"description": description, "clause": clause, **base, "deltas": written(deltas),
                      "valid": True, "expect": {"y": tensor(y)}, "tolerance": 1e-5})  # fmt: skip

    def refused(description: str, clause: Any, deltas: list[dict[str, Any]], code: Any) -> None:
        clause = [clause, "DH-11-2"]
        cases.append({"description": description, "clause": clause, **base, "deltas": written(deltas),
                      "valid": False, "error_code": code, "expect": {"unchanged": True}})  # fmt: skip

    lora, diff, adapter, assign, bias = (module(k, host, 40) for k in ("lora", "diff", "adapter", "assign", "bias"))
    second = module("adapter", host, 50, scale=1.0)
    alone = {"lora": lora, "diff": diff, "adapter": adapter, "assign": assign, "bias": bias}
    for kind, m in alone.items():
        case(
            f"{kind} alone",
            ["DH-12.1-1", "DH-12.2-2" if kind in {"assign", "diff"} else "DH-12.2-1"],
            [{"modules": [m]}],
        )
        for s in (0.0, 0.5, -1.0):
            case(f"{kind} with a strength of {s}", "DH-12.3-1", [{"modules": [m], "strength": s}])
        if kind != "adapter":
            case(f"{kind} merged", ["DH-12.1-3", "DH-12.2-1"], [{"modules": [m], "merged": True}])
            case(
                f"{kind} merged with a strength of 0.5",
                ["DH-12.1-3", "DH-12.3-1"],
                [{"modules": [m], "strength": 0.5, "merged": True}],
            )
    grouped = HOSTS["grouped conv 2d"]
    gx, gw, gb = sample(grouped)
    assert gw is not None
    on_groups = [{"modules": [module("lora", grouped)]}]
    cases.append({
        "description": "lora on a grouped convolution: what its weight equation says", "clause": "DH-5.5-3", "host": grouped,
        "W": tensor(gw), "b": tensor(gb), "x": tensor(gx), "deltas": written(on_groups), "valid": True,
        "expect": {"y": tensor(expected(grouped, gx, gw, gb, on_groups))}, "tolerance": 1e-5,
    })  # fmt: skip
    case(
        "assign and then lora: the update is on the new weight",
        ["DH-12.1-1", "DH-12.1-2"],
        [{"modules": [assign]}, {"modules": [lora]}],
    )
    case(
        "lora and then assign: the update is overwritten",
        ["DH-12.1-1", "DH-12.1-2"],
        [{"modules": [lora]}, {"modules": [assign]}],
    )
    case("the same within one delta", "DH-12.1-1", [{"modules": [lora, assign]}])
    case(
        "adapter before lora: lora is on the host's own parameters",
        "DH-12.1-2",
        [{"modules": [adapter]}, {"modules": [lora]}],
    )
    case("lora before adapter: the same", "DH-12.1-2", [{"modules": [lora]}, {"modules": [adapter]}])
    case(
        "adapter, lora merged: the same",
        ["DH-12.1-2", "DH-12.1-3"],
        [{"modules": [adapter]}, {"modules": [lora], "merged": True}],
    )
    case("two adapters, the first one innermost", "DH-12.1-2", [{"modules": [adapter]}, {"modules": [second]}])
    case("two adapters, the other way round", "DH-12.1-2", [{"modules": [second]}, {"modules": [adapter]}])
    case(
        "five of them",
        ["DH-12.1-1", "DH-12.1-2"],
        [{"modules": [adapter, diff]}, {"modules": [second, bias]}, {"modules": [lora]}],
    )
    case(
        "five of them, the mergeable ones merged",
        "DH-12.1-3",
        [
            {"modules": [diff, bias], "merged": True},
            {"modules": [adapter, second]},
            {"modules": [lora], "merged": True},
        ],
    )
    g, h = numbers(3, seed=60), numbers(3, seed=61)
    y0 = forward(host, x, w, b)
    gate, shift = own({"input": "x * channel(g)"}, {"g": g}), own({"input": "x + channel(g)"}, {"g": h})
    case("an input equation", "DH-12.1-2", [{"modules": [gate]}], forward(host, x * g, w, b))
    case(
        "an input equation with a strength of 0.5 interpolates",
        "DH-12.3-1",
        [{"modules": [gate], "strength": 0.5}],
        forward(host, x + 0.5 * (x * g - x), w, b),
    )
    case(
        "two input equations: the first in the list is the innermost",
        "DH-12.1-2",
        [{"modules": [gate]}, {"modules": [shift]}],
        forward(host, (x + h) * g, w, b),
    )
    case(
        "an input equation before a merged lora",
        ["DH-12.1-2", "DH-12.1-3"],
        [{"modules": [gate]}, {"modules": [lora], "merged": True}],
        expected(host, x * g, w, b, [{"modules": [lora]}]),
    )
    c = numbers(4, 3, seed=62)
    taken = own({"replace": "linear(x, c)"}, {"c": c})
    around = own({"replace": "base(x) + linear(x, c)"}, {"c": c})
    case("a replace", "DH-12.1-2", [{"modules": [taken]}], x @ c.T)
    case(
        "a replace with a strength of 0.25 interpolates",
        "DH-12.3-1",
        [{"modules": [taken], "strength": 0.25}],
        y0 + 0.25 * (x @ c.T - y0),
    )
    case("a replace that reaches the host as base", "DH-12.1-2", [{"modules": [around]}], y0 + x @ c.T)
    case(
        "base is everything that the replace wraps",
        "DH-12.1-2",
        [{"modules": [lora, adapter]}, {"modules": [around]}],
        expected(host, x, w, b, [{"modules": [lora, adapter]}]) + x @ c.T,
    )
    refused(
        "two assigns set one weight",
        "DH-12.4-1",
        [{"modules": [assign]}, {"modules": [module("assign", host, 70)]}],
        "E_INJECTION_CONFLICT",
    )
    refused(
        "two assigns within one delta",
        "DH-12.4-1",
        [{"modules": [assign, module("assign", host, 70)]}],
        "E_INJECTION_CONFLICT",
    )
    refused(
        "two replaces on one module", "DH-12.4-1", [{"modules": [taken]}, {"modules": [around]}], "E_INJECTION_CONFLICT"
    )
    refused(
        "a module on what another one removes",
        "DH-12.4-2",
        [{"modules": [lora]}, {"modules": [{**taken, "removes": ["weight", "bias"]}]}],
        "E_INJECTION_CONFLICT",
    )
    refused(
        "the same, the other way round",
        "DH-12.4-2",
        [{"modules": [{**taken, "removes": ["weight", "bias"]}]}, {"modules": [lora]}],
        "E_INJECTION_CONFLICT",
    )
    refused(
        "merging after one that stays live and could be merged",
        "DH-12.1-3",
        [{"modules": [assign]}, {"modules": [lora], "merged": True}],
        "E_INJECTION_MERGE_ORDER",
    )
    refused(
        "merging what has no merged form",
        "DH-12.1-3",
        [{"modules": [adapter], "merged": True}],
        "E_INJECTION_NOT_MERGEABLE",
    )
    return [*cases, *spans(), *parts()]


def spans() -> list[dict[str, Any]]:
    """From the input of one module to the output of the one behind it (section 5.5)."""
    host = HOSTS["linear"]
    x, w, b = sample(host)
    assert w is not None
    w2, b2 = numbers(2, 4, seed=80), numbers(2, seed=81)
    t = {
        "down": numbers(3, 3, seed=82),
        "down_bias": numbers(3, seed=83),
        "up": numbers(2, 3, seed=84),
        "up_bias": numbers(2, seed=85),
    }
    config = {"bottleneck": 3, "activation": "relu", "scale": 0.5}
    beside: Module = {"kind": "parallel-adapter", "version": 1, "config": config, "tensors": t, "span": True}
    then = {"host": {"family": "linear", "in": 4, "out": 2, "bias": True}, "W": tensor(w2), "b": tensor(b2)}
    base = {"host": host, "W": tensor(w), "b": tensor(b), "x": tensor(x), "then": then}
    added = 0.5 * (np.maximum(x @ t["down"].T + t["down_bias"], 0) @ t["up"].T + t["up_bias"])
    first = module("lora", host)
    inside = forward(host, x, weight_port("lora", first["config"], first["tensors"], w), b)
    cases: list[dict[str, Any]] = [
        {"description": what, "clause": ["DH-5.5-4", "DH-12.3-1"], **base, "deltas": written(deltas), "valid": True,
         "expect": {"y": tensor(y)}, "tolerance": 1e-5}
        for what, deltas, y in (
            ("a parallel adapter beside two modules", [{"modules": [beside]}], forward(host, x, w, b) @ w2.T + b2 + added),
            ("the same with a strength of 0.5", [{"modules": [beside], "strength": 0.5}], forward(host, x, w, b) @ w2.T + b2 + 0.5 * added),
            ("the same over a lora on the first", [{"modules": [first]}, {"modules": [beside]}], inside @ w2.T + b2 + added),
        )
    ]  # fmt: skip
    g = numbers(2, seed=86)
    for what, bad, code in (
        ("a kind that does not fit a block", {**first, "span": True}, "E_KIND_HOST"),
        ("a kind that changes an input", {**own({"input": "x"} | {"output": "y + channel(g)"}, {"g": g}), "span": True}, "E_HOST_SPAN"),
    ):  # fmt: skip
        cases.append({
            "description": f"{what}, from one module to another", "clause": ["DH-5.5-4", "DH-11-2"], **base,
            "deltas": written([{"modules": [bad]}]), "valid": False, "error_code": code, "expect": {"unchanged": True},
        })  # fmt: skip
    return cases
