"""Vectors of the built-in kinds on every family of hosts, and of composition; values in plain NumPy. Used by generate.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from expressions import Array, conv, document, gelu, layer_norm, numbers, tensor

__all__ = ["compositions", "kinds"]

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


def output_port(kind: str, config: Mapping[str, Any], t: dict[str, Array], host: Mapping[str, Any], x: Array, y: Array) -> Array | None:
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
                **(none if w is None else {"weight": weight_port(kind, config, t, w), "bias": bias_port(kind, config, t, b)}),
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
    return [*cases, *on_axes()]


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
            doc = document(text, t, port, hosts=["linear", "conv"])
            cases.append({
                "description": f"{text}, {name}: {port}", "clause": ["DH-5.5-2", "DH-5.7-1"], "document": doc, "config": {}, "host": host,
                "port": port, **{n: tensor(a) for n, a in given.items()}, "W": tensor(w), "b": tensor(b),
                "tensors": {n: tensor(a) for n, a in t.items()},
                "valid": True, "expect": {"value": tensor(value)}, "tolerance": 1e-5,
            })  # fmt: skip
    return cases


# ----------------------------------------------------------------------------------------- composition (section 12)

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
                {**{k: v for k, v in m.items() if k != "tensors"}, "tensors": {n: tensor(a) for n, a in m["tensors"].items()}}
                for m in d["modules"]
            ],
        }
        for d in deltas
    ]


def expected(host: Mapping[str, Any], x: Array, w: Array, b: Array | None, deltas: Sequence[Mapping[str, Any]]) -> Array:
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
        case(f"{kind} alone", ["DH-12.1-1", "DH-12.2-2" if kind in {"assign", "diff"} else "DH-12.2-1"], [{"modules": [m]}])
        for s in (0.0, 0.5, -1.0):
            case(f"{kind} with a strength of {s}", "DH-12.3-1", [{"modules": [m], "strength": s}])
        if kind != "adapter":
            case(f"{kind} merged", ["DH-12.1-3", "DH-12.2-1"], [{"modules": [m], "merged": True}])
            case(f"{kind} merged with a strength of 0.5", ["DH-12.1-3", "DH-12.3-1"], [{"modules": [m], "strength": 0.5, "merged": True}])
    grouped = HOSTS["grouped conv 2d"]
    gx, gw, gb = sample(grouped)
    assert gw is not None
    on_groups = [{"modules": [module("lora", grouped)]}]
    cases.append({
        "description": "lora on a grouped convolution: what its weight equation says", "clause": "DH-5.5-3", "host": grouped,
        "W": tensor(gw), "b": tensor(gb), "x": tensor(gx), "deltas": written(on_groups), "valid": True,
        "expect": {"y": tensor(expected(grouped, gx, gw, gb, on_groups))}, "tolerance": 1e-5,
    })  # fmt: skip
    case("assign and then lora: the update is on the new weight", ["DH-12.1-1", "DH-12.1-2"], [{"modules": [assign]}, {"modules": [lora]}])
    case("lora and then assign: the update is overwritten", ["DH-12.1-1", "DH-12.1-2"], [{"modules": [lora]}, {"modules": [assign]}])
    case("the same within one delta", "DH-12.1-1", [{"modules": [lora, assign]}])
    case("adapter before lora: lora is on the host's own parameters", "DH-12.1-2", [{"modules": [adapter]}, {"modules": [lora]}])
    case("lora before adapter: the same", "DH-12.1-2", [{"modules": [lora]}, {"modules": [adapter]}])
    case("adapter, lora merged: the same", ["DH-12.1-2", "DH-12.1-3"], [{"modules": [adapter]}, {"modules": [lora], "merged": True}])
    case("two adapters, the first one innermost", "DH-12.1-2", [{"modules": [adapter]}, {"modules": [second]}])
    case("two adapters, the other way round", "DH-12.1-2", [{"modules": [second]}, {"modules": [adapter]}])
    case("five of them", ["DH-12.1-1", "DH-12.1-2"], [{"modules": [adapter, diff]}, {"modules": [second, bias]}, {"modules": [lora]}])
    case("five of them, the mergeable ones merged", "DH-12.1-3",
         [{"modules": [diff, bias], "merged": True}, {"modules": [adapter, second]}, {"modules": [lora], "merged": True}])
    g, h = numbers(3, seed=60), numbers(3, seed=61)
    y0 = forward(host, x, w, b)
    gate, shift = own({"input": "x * channel(g)"}, {"g": g}), own({"input": "x + channel(g)"}, {"g": h})
    case("an input equation", "DH-12.1-2", [{"modules": [gate]}], forward(host, x * g, w, b))
    case("an input equation with a strength of 0.5 interpolates", "DH-12.3-1", [{"modules": [gate], "strength": 0.5}],
         forward(host, x + 0.5 * (x * g - x), w, b))
    case("two input equations: the first in the list is the innermost", "DH-12.1-2", [{"modules": [gate]}, {"modules": [shift]}],
         forward(host, (x + h) * g, w, b))
    case("an input equation before a merged lora", ["DH-12.1-2", "DH-12.1-3"], [{"modules": [gate]}, {"modules": [lora], "merged": True}],
         expected(host, x * g, w, b, [{"modules": [lora]}]))
    c = numbers(4, 3, seed=62)
    taken = own({"replace": "linear(x, c)"}, {"c": c})
    around = own({"replace": "base(x) + linear(x, c)"}, {"c": c})
    case("a replace", "DH-12.1-2", [{"modules": [taken]}], x @ c.T)
    case("a replace with a strength of 0.25 interpolates", "DH-12.3-1", [{"modules": [taken], "strength": 0.25}], y0 + 0.25 * (x @ c.T - y0))
    case("a replace that reaches the host as base", "DH-12.1-2", [{"modules": [around]}], y0 + x @ c.T)
    case("base is everything that the replace wraps", "DH-12.1-2", [{"modules": [lora, adapter]}, {"modules": [around]}],
         expected(host, x, w, b, [{"modules": [lora, adapter]}]) + x @ c.T)
    refused("two assigns set one weight", "DH-12.4-1", [{"modules": [assign]}, {"modules": [module("assign", host, 70)]}], "E_INJECTION_CONFLICT")
    refused("two assigns within one delta", "DH-12.4-1", [{"modules": [assign, module("assign", host, 70)]}], "E_INJECTION_CONFLICT")
    refused("two replaces on one module", "DH-12.4-1", [{"modules": [taken]}, {"modules": [around]}], "E_INJECTION_CONFLICT")
    refused("a module on what another one removes", "DH-12.4-2",
            [{"modules": [lora]}, {"modules": [{**taken, "removes": ["weight", "bias"]}]}], "E_INJECTION_CONFLICT")
    refused("the same, the other way round", "DH-12.4-2",
            [{"modules": [{**taken, "removes": ["weight", "bias"]}]}, {"modules": [lora]}], "E_INJECTION_CONFLICT")
    refused("merging after one that stays live and could be merged", "DH-12.1-3",
            [{"modules": [assign]}, {"modules": [lora], "merged": True}], "E_INJECTION_MERGE_ORDER")
    refused("merging what has no merged form", "DH-12.1-3", [{"modules": [adapter], "merged": True}], "E_INJECTION_NOT_MERGEABLE")
    return cases
