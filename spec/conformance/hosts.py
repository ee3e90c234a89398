"""Vectors of the built-in kinds on every family of hosts; values in plain NumPy. Used by generate.py."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from expressions import Array, conv, document, gelu, layer_norm, numbers, tensor

__all__ = [
    "CONFIGS",
    "HOSTS",
    "applied",
    "bias_port",
    "forward",
    "kinds",
    "output_port",
    "sample",
    "scaled",
    "tensors_of",
    "weight_port",
]

HOSTS: dict[str, dict[str, Any]] = {
    "linear": {"family": "linear", "in": 3, "out": 4, "bias": True},
    "linear without bias": {"family": "linear", "in": 3, "out": 4, "bias": False},
    "conv 2d": {"family": "conv", "in": 2, "out": 4, "kernel": [3, 3], "stride": 1, "padding": 1, "groups": 1, "bias": True},
    "conv 1d with a stride": {"family": "conv", "in": 2, "out": 4, "kernel": [3], "stride": 2, "padding": 1, "groups": 1, "bias": False},
    "grouped conv 2d": {"family": "conv", "in": 2, "out": 4, "kernel": [1, 1], "stride": 1, "padding": 0, "groups": 2, "bias": True},
    "embedding": {"family": "embedding", "in": 5, "out": 4, "bias": False},
    "norm": {"family": "norm", "in": 4, "out": 4, "bias": True},
    "block": {"family": "block", "in": 4, "out": 4, "bias": False},
}  # fmt: skip


def weight_shape(host: Mapping[str, Any]) -> tuple[int, ...] | None:
    family = host["family"]
    if family == "block":
        return None
    return (host["out"],) if family == "norm" else (host["out"], host["in"], *host.get("kernel", ()))


def sample(host: Mapping[str, Any]) -> tuple[Array, Array | None, Array | None]:
    """An input, a weight and a bias for a host."""
    family, shape = host["family"], weight_shape(host)
    weight = None if shape is None else numbers(*shape, seed=20)
    bias = numbers(host["out"], seed=21) if host["bias"] else None
    if family == "embedding":
        return np.array([[0, 4, 2], [1, 1, 3]]), weight, bias
    if family == "conv":
        channels = host["in"] * host["groups"]
        return numbers(2, channels, *([4] * len(host["kernel"])), seed=22), weight, bias
    return numbers(2, 2, host["in"], seed=22), weight, bias


def on_channels(host: Mapping[str, Any], v: Array) -> Array:
    return v.reshape(-1, *[1] * len(host["kernel"])) if host["family"] == "conv" else v


def applied(host: Mapping[str, Any], x: Array, w: Array) -> Array:
    """``host(x, w)``: section 5.5."""
    if host["family"] == "conv":
        return conv(x, w, stride=host["stride"], padding=host["padding"], groups=host["groups"])
    if host["family"] == "embedding":
        return np.asarray(w.T[x])
    if host["family"] == "norm":
        return layer_norm(x) * w
    return np.asarray(x @ w.T)


def forward(host: Mapping[str, Any], x: Array, w: Array | None, b: Array | None) -> Array:
    if host["family"] == "block":
        return x
    assert w is not None
    y = applied(host, x, w)
    return y if b is None else y + on_channels(host, b)


def mixed(host: Mapping[str, Any], h: Array, w: Array, bias: Array | None = None) -> Array:
    """``linear(h, w, bias)`` on the channel axis."""
    axis = 1 if host["family"] == "conv" else -1
    y = np.moveaxis(np.tensordot(h, w, (axis, 1)), -1, axis)
    return y if bias is None else y + on_channels(host, bias)


def tensors_of(kind: str, host: Mapping[str, Any], seed: int = 30) -> dict[str, Array]:
    out, shape = host["out"], weight_shape(host)
    wanted: dict[str, tuple[int, ...] | None] = {
        "lora": {"down": (2, host["in"], *host.get("kernel", ())), "up": (out, 2)},
        "bias": {"value": (out,)},
        "assign": {"weight": shape} | ({"bias": (out,)} if host["bias"] else {}),
        "diff": {"weight": shape} | ({"bias": (out,)} if host["bias"] else {}),
        "adapter": {"down": (3, out), "down_bias": (3,), "up": (out, 3), "up_bias": (out,)},
    }[kind]  # type: ignore[assignment]
    return {n: numbers(*s, seed=seed + i) for i, (n, s) in enumerate(wanted.items()) if s is not None}


CONFIGS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 2, "scale": 0.5},
    "bias": {"scale": 2.0},
    "assign": {},
    "diff": {"scale": 0.25},
    "adapter": {"bottleneck": 3, "activation": "gelu", "scale": 0.5},
}
FITS = {
    "lora": {"linear", "conv", "embedding"},
    "bias": {"linear", "conv", "embedding", "norm", "block"},
    "assign": {"linear", "conv", "embedding", "norm"},
    "diff": {"linear", "conv", "embedding", "norm"},
    "adapter": {"linear", "conv", "embedding", "norm", "block"},
}


def scaled(kind: str, config: dict[str, Any], s: float) -> dict[str, Any]:
    """Section 12.3: a user's strength multiplies ``scale`` where there is one."""
    return {**config, "scale": config.get("scale", 1.0) * s} if kind != "assign" else config


def weight_port(kind: str, config: Mapping[str, Any], t: dict[str, Array], w: Array) -> Array | None:
    scale = config.get("scale", 1.0)
    if kind == "lora":
        return w + scale * np.tensordot(t["up"], t["down"], (1, 0))
    return {"assign": lambda: t["weight"], "diff": lambda: w + scale * t["weight"]}.get(kind, lambda: None)()


def bias_port(kind: str, config: Mapping[str, Any], t: dict[str, Array], b: Array | None) -> Array | None:
    """``b`` is zeros for a host without bias."""
    own = 0.0 if b is None else b
    if kind == "bias":
        return np.asarray(own + config.get("scale", 1.0) * t["value"])
    if kind in {"assign", "diff"} and "bias" in t:
        return t["bias"] if kind == "assign" else np.asarray(own + config.get("scale", 1.0) * t["bias"])
    return None


def output_port(
    kind: str, config: Mapping[str, Any], t: dict[str, Array], host: Mapping[str, Any], x: Array, y: Array
) -> Array | None:
    scale = config.get("scale", 1.0)
    if kind == "lora":
        return y + scale * mixed(host, applied(host, x, t["down"]), t["up"])
    if kind == "bias":
        return y + scale * on_channels(host, t["value"])
    if kind == "adapter":
        return y + scale * mixed(host, gelu(mixed(host, y, t["down"], t["down_bias"])), t["up"], t["up_bias"])
    return None


def kinds() -> list[dict[str, Any]]:
    """Every port of every built-in kind, on every family it fits."""
    cases: list[dict[str, Any]] = []
    for kind, config in CONFIGS.items():
        for name, host in HOSTS.items():
            head = {"kind": kind, "version": 1, "config": config, "host": host}
            if host["family"] not in FITS[kind]:
                what = {"description": f"{kind} does not fit: {name}", "clause": "DH-5.5-1", "op": "kind"}
                cases.append({**what, **head, "valid": False, "error_code": "E_KIND_HOST"})
                continue
            x, w, b = sample(host)
            t, y = tensors_of(kind, host), forward(host, x, w, b)
            given = {"x": x, "y": y, "W": w, "b": b}
            none = {"weight": None, "bias": None}
            ports = {
                "output": output_port(kind, config, t, host, x, y),
                **(
                    none
                    if w is None
                    else {"weight": weight_port(kind, config, t, w), "bias": bias_port(kind, config, t, b)}
                ),
            }
            if kind == "lora" and host.get("groups", 1) > 1:
                ports["output"] = None  # see compositions: there the weight form is used live
            for port, value in ports.items():
                if value is None:
                    continue
                clauses = ["DH-5.8-1", "DH-5.5-2"]
                sees = ("x", "y", "W", "b") if port == "output" else ("W", "b")
                body = {n: tensor(given[n]) for n in sees if given[n] is not None}
                cases.append({
                    "description": f"{kind}, {name}: {port}", "clause": [*clauses, *(["DH-7.3-1"] if host["family"] == "embedding" else [])], **head, "port": port, **body,
                    "tensors": {n: tensor(a) for n, a in t.items()},
                    "valid": True, "expect": {"value": tensor(value)}, "tolerance": 1e-5,
                })  # fmt: skip
    return [*cases, *on_axes(), *prefixes(), *prompts()]


def prefixes() -> list[dict[str, Any]]:
    """Keys and values before those of an attention, plain and by their small network; the bias of positions."""
    host = {"family": "attention", "in": 6, "out": 4, "bias": False}
    plain = {"key": numbers(2, 4, seed=90), "value": numbers(2, 4, seed=91)}
    small = {
        "embedding": numbers(2, 3, seed=92), "down": numbers(3, 3, seed=93), "down_bias": numbers(3, seed=94),
        "key_up": numbers(4, 3, seed=95), "key_bias": numbers(4, seed=96),
        "value_up": numbers(4, 3, seed=97), "value_bias": numbers(4, seed=98),
    }  # fmt: skip
    h = np.tanh(small["embedding"] @ small["down"].T + small["down_bias"])
    both = [h @ small[f"{n}_up"].T + small[f"{n}_bias"] for n in ("key", "value")]
    scores = numbers(1, 2, 3, 3, seed=99)
    cases = []
    for port, config, t, value in (
        ("kv", {}, plain, np.stack([plain["key"], plain["value"]])),
        ("past", {"relative_bias": "all"}, plain, np.stack([plain["key"], plain["value"]])),
        ("kv", {"reparametrised": True, "hidden": 3}, small, np.stack(both)),
        ("scores", {"relative_bias": "none"}, plain, np.zeros_like(scores)),
    ):
        given = {"scores": tensor(scores)} if port == "scores" else {}
        cases.append({
            "description": f"prefix, {', '.join(map(str, config.values())) or 'plain'}: {port}",
            "clause": ["DH-5.8-1", "DH-5.4-3", "DH-5.4-4"], "kind": "prefix", "version": 1, "config": {"length": 2, **config},
            "host": host, "port": port, **given, "tensors": {n: tensor(a) for n, a in t.items()},
            "valid": True, "expect": {"value": tensor(value)}, "tolerance": 1e-5,
        })  # fmt: skip
    x = numbers(2, 3, 6, seed=76)
    gate = {"gate": numbers(6, seed=77), "gate_bias": numbers(1, seed=78)}
    opened = (1 / (1 + np.exp(-((x * gate["gate"]).sum(-1) + gate["gate_bias"])))).mean(-1).reshape(2, 1, 1)
    cases.append({
        "description": "gated-prefix: keys and values of each row", "clause": ["DH-5.8-1", "DH-5.4-2", "DH-5.4-4"],
        "kind": "gated-prefix", "version": 1, "config": {"length": 2}, "host": host, "port": "kv", "x": tensor(x),
        "tensors": {n: tensor(a) for n, a in (plain | gate).items()},
        "valid": True, "expect": {"value": tensor(np.stack([opened * plain["key"], opened * plain["value"]]))}, "tolerance": 1e-5,
    })  # fmt: skip
    refused = [
        {
            "description": f"prefix does not fit: {name}", "clause": "DH-5.5-1", "op": "kind", "kind": "prefix", "version": 1,
            "config": {"length": 2}, "host": HOSTS[name], "valid": False, "error_code": "E_KIND_HOST",
        }
        for name in ("linear", "block")
    ]  # fmt: skip
    return [*cases, *refused]


def prompts() -> list[dict[str, Any]]:
    """Embeddings before those of the tokens: plain, by their small network, and of a task."""
    host = {"family": "transformer", "in": 5, "out": 4, "bias": False}
    plain = numbers(2, 4, seed=80)
    small = {
        "seed": plain, "first": numbers(3, 4, seed=81), "first_bias": numbers(3, seed=82),
        "second": numbers(3, 3, seed=83), "second_bias": numbers(3, seed=84),
        "third": numbers(4, 3, seed=85), "third_bias": numbers(4, seed=86),
    }  # fmt: skip
    h = np.maximum(plain @ small["first"].T + small["first_bias"], 0)
    h = np.maximum(h @ small["second"].T + small["second_bias"], 0)
    tasks = {"embedding": plain, "left": numbers(3, 2, 2, seed=87), "right": numbers(3, 2, 4, seed=88)}
    cases: list[dict[str, Any]] = []
    for kind, config, t, value in (
        ("prompt", {}, {"embedding": plain}, plain),
        ("prompt", {"network": "mlp", "hidden": 3}, small, h @ small["third"].T + small["third_bias"]),
        ("multitask-prompt", {"tasks": 3, "rank": 2, "task": 1}, tasks, plain * (tasks["left"][1] @ tasks["right"][1])),
    ):
        cases.append({
            "description": f"{kind}, {', '.join(map(str, config.values())) or 'plain'}",
            "clause": ["DH-5.8-1", "DH-5.4-3", "DH-5.4-5"], "kind": kind, "version": 1, "config": {"length": 2, **config},
            "host": host, "port": "prompt", "tensors": {n: tensor(a) for n, a in t.items()},
            "valid": True, "expect": {"value": tensor(value)}, "tolerance": 1e-5,
        })  # fmt: skip
        cases += [
            {
                "description": f"{kind}, {len(t)} tensors, does not fit: {name}", "clause": "DH-5.5-1", "op": "kind",
                "kind": kind, "version": 1, "config": {"length": 2, **config}, "host": HOSTS[name],
                "valid": False, "error_code": "E_KIND_HOST",
            }
            for name in ("embedding", "block")
        ]  # fmt: skip
    return cases


def on_axes() -> list[dict[str, Any]]:
    """Ops that take an axis from the host."""
    cases = []
    for name in ("linear", "conv 2d"):
        host = HOSTS[name]
        x, w, b = sample(host)
        assert w is not None
        y, axis = forward(host, x, w, b), 1 if host["family"] == "conv" else -1
        t = {"g": numbers(4, seed=80), "h": numbers(host["in"], seed=81), "m": numbers(4, 4, seed=82)}
        flat = [1] * (w.ndim - 2)
        last = np.moveaxis(y, axis, -1)
        normed = np.moveaxis(layer_norm(last) * t["g"], -1, axis)
        rms = np.moveaxis(last / np.sqrt((last * last).mean(-1, keepdims=True) + 1e-6), -1, axis)
        for port, text, value in (
            ("weight", "W * rows(g)", w * t["g"].reshape(-1, 1, *flat)),
            ("weight", "W * columns(h)", w * t["h"].reshape(1, -1, *flat)),
            ("bias", "b * g", b * t["g"]),
            ("output", "y * channel(g)", y * on_channels(host, t["g"])),
            ("output", "linear(y, m, g)", mixed(host, y, t["m"], t["g"])),
            ("output", "layer_norm(y, g)", normed),
            ("output", "rms_norm(y)", rms),
            ("replace", "base(x) + linear(host(x, W), m)", y + mixed(host, applied(host, x, w), t["m"])),
        ):
            given = {"x": x, "y": y} if port == "output" else {"x": x} if port == "replace" else {}
            used = {n: a for n, a in t.items() if re.search(rf"\b{n}\b", text)}
            doc = document(text, used, port, hosts=["linear", "conv"])
            cases.append({
                "description": f"{text}, {name}: {port}", "clause": ["DH-5.5-2", "DH-5.7-1"], "document": doc, "config": {}, "host": host,
                "port": port, **{n: tensor(a) for n, a in given.items()}, "W": tensor(w), "b": tensor(b),
                "tensors": {n: tensor(a) for n, a in used.items()},
                "valid": True, "expect": {"value": tensor(value)}, "tolerance": 1e-5,
            })  # fmt: skip
    return cases
