"""Vectors of the kinds that take the place of attention over a token map; values in plain NumPy. Used by generate.py."""

from __future__ import annotations

from typing import Any

import numpy as np
from expressions import Array, numbers, tensor

__all__ = ["attentions"]

HOST: dict[str, Any] = {"family": "block", "in": 8, "out": 8, "bias": False}
LINEAR: dict[str, Any] = {"family": "linear", "in": 8, "out": 8, "bias": True}
GRID = (3, 4)


def sigmoid(x: Array) -> Array:
    return np.asarray(1 / (1 + np.exp(-x)))


def shrunk(m: Array, by: int, how: str) -> Array:
    """Windows of ``by``, ragged at the far edge; or equal shares of ``side // by`` windows."""

    def spans(side: int) -> list[slice]:
        if how == "avg":
            return [slice(i, min(i + by, side)) for i in range(0, side, by)]
        n = max(1, side // by)
        return [slice(i * side // n, -(-(i + 1) * side // n)) for i in range(n)]

    return np.stack(
        [np.stack([m[:, :, a, b].mean((2, 3)) for b in spans(m.shape[3])], -1) for a in spans(m.shape[2])], -2
    )


def grown(m: Array, size: tuple[int, int]) -> Array:
    """Bilinear, corners not aligned."""
    for axis, to in ((2, size[0]), (3, size[1])):
        full = m.shape[axis]
        at = np.clip((np.arange(to) + 0.5) * full / to - 0.5, 0, full - 1)
        low = np.floor(at).astype(int)
        share = (at - low).reshape((-1, 1) if axis == 2 else (-1,))
        m = m.take(low, axis) * (1 - share) + m.take(np.minimum(low + 1, full - 1), axis) * share
    return m


def windowed(m: Array, w: Array, b: Array | None) -> Array:
    """Each channel by its own window."""
    k = w.shape[-1]
    p = np.pad(m, [(0, 0), (0, 0), (k // 2, k // 2), (k // 2, k // 2)])
    y = sum(
        (
            w[None, :, 0, i, j, None, None] * p[:, :, i : i + m.shape[2], j : j + m.shape[3]]
            for i in range(k)
            for j in range(k)
        ),
        np.zeros_like(m),
    )
    return y if b is None else y + b[None, :, None, None]


def delta_conv(c: dict[str, Any], t: dict[str, Array], x: Array) -> Array:
    inner = 8 // c["reduction"]
    m = x @ t["inner"].T + t.get("inner_bias", 0.0)
    m = m.reshape(len(x), *GRID, inner).transpose(0, 3, 1, 2)
    factor = {"mul_sqrt": (inner // 2) ** 0.5, "div_sqrt": 8**-0.5, "sigmoid": 1.0}[c["gate"]]
    stages = []
    for i in range(c["stages"]):
        by = c[f"divisor_{i + 1}"]
        u = m if by == 1 else shrunk(m, by, c["pool"])
        u = windowed(u, t["depthwise"][i], t["depthwise_bias"][i] if "depthwise_bias" in t else None)
        a, b = np.split(u, 2, 1)
        u = factor * a * (sigmoid(b) if c["gate"] == "sigmoid" else b)
        stages.append(u if by == 1 else grown(u, GRID))
    s = np.concatenate(stages, 1) if c["merge"] == "concat" else sum(stages[1:], stages[0])
    y = s.reshape(len(x), s.shape[1], -1).transpose(0, 2, 1) @ t.get("mix", t.get("mix_sum")).T + t.get("mix_bias", 0.0)  # type: ignore[union-attr]
    return np.asarray(y + x.mean(1, keepdims=True) @ t["average"].T + t.get("average_bias", 0.0))


def linear_attention(c: dict[str, Any], t: dict[str, Array], x: Array) -> Array:
    def fed(name: str) -> Array:
        if not c["projected"]:
            return x
        h = x @ t[f"{name}_down"].T + t[f"{name}_down_bias"]
        h = (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + 1e-5)
        h = h * t[f"{name}_norm"] + t[f"{name}_norm_bias"]
        h = np.where(h > 0, h, 0.01 * h)
        return np.asarray(x + h @ t[f"{name}_up"].T + t[f"{name}_up_bias"])

    def split(name: str, s: Array) -> Array:
        y = s @ t[name].T + t.get(f"{name}_bias", 0.0)
        return np.asarray(y.reshape(*x.shape[:2], c["heads"], -1).transpose(0, 2, 1, 3))

    def positive(s: Array) -> Array:
        return np.asarray(np.where(s > 0, s, np.expm1(np.minimum(s, 0))) + 1)

    q, k, v = positive(split("query", fed("query"))), positive(split("key", fed("key"))), split("value", x)
    z = q @ k.mean(-2, keepdims=True).swapaxes(-1, -2) + 1e-4
    y = q @ (k.swapaxes(-1, -2) @ v / x.shape[1]) / z
    return np.asarray(y.transpose(0, 2, 1, 3).reshape(x.shape) @ t["result"].T + t["result_bias"])


DELTA_CONV: dict[str, Any] = {
    "kernel": 3, "stages": 2, "divisor_1": 1, "divisor_2": 2, "divisor_3": 3, "divisor_4": 6, "reduction": 2, "merge": "concat",
    "gate": "mul_sqrt", "pool": "avg", "bias_in": True, "bias_depthwise": False, "bias_out": True, "bias_average": True,
}  # fmt: skip
LINEAR_ATTENTION: dict[str, Any] = {"heads": 2, "projected": True, "middle": 3, "biased": False}


def delta_conv_tensors(c: dict[str, Any]) -> dict[str, Array]:
    inner, k = 8 // c["reduction"], c["kernel"]
    joined = c["stages"] * (inner // 2) if c["merge"] == "concat" else inner // 2
    shapes: dict[str, tuple[int, ...]] = {"inner": (inner, 8)}
    shapes |= {"inner_bias": (inner,)} if c["bias_in"] else {}
    shapes |= {"depthwise": (c["stages"], inner, 1, k, k)}
    shapes |= {"depthwise_bias": (c["stages"], inner)} if c["bias_depthwise"] else {}
    shapes |= {"mix" if c["merge"] == "concat" else "mix_sum": (8, joined)}
    shapes |= {"mix_bias": (8,)} if c["bias_out"] else {}
    shapes |= {"average": (8, 8)} | ({"average_bias": (8,)} if c["bias_average"] else {})
    return {n: numbers(*s, seed=90 + i) / 4 for i, (n, s) in enumerate(shapes.items())}


def linear_attention_tensors(c: dict[str, Any]) -> dict[str, Array]:
    shapes: dict[str, tuple[int, ...]] = {}
    m = c["middle"]
    for name in ("query", "key") if c["projected"] else ():
        shapes |= {f"{name}_down": (m, 8), f"{name}_down_bias": (m,), f"{name}_norm": (m,), f"{name}_norm_bias": (m,)}
        shapes |= {f"{name}_up": (8, m), f"{name}_up_bias": (8,)}
    for name in ("query", "key", "value"):
        shapes |= {name: (8, 8)} | ({f"{name}_bias": (8,)} if c["biased"] else {})
    shapes |= {"result": (8, 8), "result_bias": (8,)}
    return {n: numbers(*s, seed=110 + i) / 4 for i, (n, s) in enumerate(shapes.items())}


def attentions() -> list[dict[str, Any]]:
    """Every variant of the two kinds, on a map whose sides no divisor divides."""
    cases: list[dict[str, Any]] = []
    x = numbers(2, GRID[0] * GRID[1], 8, seed=88)

    def case(kind: str, what: str, config: dict[str, Any], t: dict[str, Array], value: Array) -> None:
        head = {"description": f"{kind}, {what}", "clause": ["DH-5.8-1", "DH-5.4-2"], "kind": kind, "version": 1}
        grid = {"context": {"grid": list(GRID)}} if kind == "delta-conv" else {}
        cases.append({
            **head, "config": config, "host": HOST, **grid, "port": "replace", "x": tensor(x),
            "tensors": {n: tensor(a) for n, a in t.items()}, "valid": True, "expect": {"value": tensor(value)}, "tolerance": 1e-4,
        })  # fmt: skip

    for what, changes in (
        ("as released", {"pool": "adaptive"}),
        ("ragged windows", {}),
        ("four stages", {"stages": 4, "gate": "div_sqrt", "bias_in": False}),
        (
            "summed stages and a sigmoid",
            {"merge": "sum", "gate": "sigmoid", "bias_depthwise": True, "bias_average": False},
        ),
        ("joined stages and a sigmoid", {"gate": "sigmoid", "kernel": 5}),
        ("summed products", {"merge": "sum", "divisor_1": 2, "divisor_2": 3, "pool": "adaptive", "bias_out": False}),
        ("summed products over the root of the width", {"merge": "sum", "gate": "div_sqrt", "stages": 1, "kernel": 1}),
    ):
        config = {**DELTA_CONV, **changes}
        t = delta_conv_tensors(config)
        case("delta-conv", what, config, t, delta_conv(config, t, x))
    for what, changes in (
        ("as released", {}),
        ("with biases", {"biased": True, "heads": 4}),
        ("bare", {"projected": False}),
    ):
        config = {**LINEAR_ATTENTION, **changes}
        t = linear_attention_tensors(config)
        case("linear-attention", what, config, t, linear_attention(config, t, x))
    for kind, config in (("delta-conv", DELTA_CONV), ("linear-attention", LINEAR_ATTENTION)):
        cases.append({
            "description": f"{kind} does not fit: linear", "clause": "DH-5.5-1", "op": "kind", "kind": kind, "version": 1,
            "config": config, "host": LINEAR, "valid": False, "error_code": "E_KIND_HOST",
        })  # fmt: skip
    return cases
