"""Vectors of the built-in kinds beyond the plain ones of hosts.py; values in plain NumPy. Used by generate.py.

Each method is written from its paper as what it makes of the weight and the bias. What the output becomes follows: the
host applied with both.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from expressions import Array, gelu_new, numbers, sigmoid, skew, tensor
from hosts import forward, sample

__all__ = ["methods"]

KINDS = Path(__file__).resolve().parents[1] / "kinds"
LINEAR: dict[str, Any] = {"family": "linear", "in": 4, "out": 6, "bias": True}
BARE = {**LINEAR, "bias": False}
CONV: dict[str, Any] = {"family": "conv", "in": 2, "out": 4, "kernel": [3, 3], "stride": 1, "padding": 1, "groups": 1, "bias": True}  # fmt: skip
EMBEDDING: dict[str, Any] = {"family": "embedding", "in": 5, "out": 4, "bias": False}
BLOCK: dict[str, Any] = {"family": "block", "in": 4, "out": 4, "bias": False}

Tensors = Mapping[str, Array]
Changed = Callable[[Tensors, Array, Array], tuple[Array, Array]]
"""Tensors, weight and bias to the new weight and bias."""


def times(up: Array, down: Array) -> Array:
    return np.tensordot(up, down, 1)


def only(weight: Callable[[Tensors, Array], Array]) -> Changed:
    return lambda t, w, b: (weight(t, w), b)


def places(*values: int) -> Array:
    return np.array(values)


def rotation(v: Array) -> Array:
    """Cayley's transform of the skew matrix of a vector."""
    n = round((1 + math.sqrt(1 + 8 * len(v))) / 2)
    s = skew(v, n)
    return np.asarray(np.linalg.inv(np.eye(n) - s) @ (np.eye(n) + s))


def series(v: Array, terms: int) -> Array:
    """The same by a Neumann series."""
    n = round((1 + math.sqrt(1 + 8 * len(v))) / 2)
    s, power = skew(v, n), np.linalg.matrix_power
    return np.asarray(np.eye(n) + 2 * sum(power(s, i) for i in range(1, terms - 1)) + power(s, terms - 1))


def diagonal(blocks: list[Array]) -> Array:
    n = len(blocks[0])
    whole = np.zeros((n * len(blocks),) * 2)
    for i, block in enumerate(blocks):
        whole[i * n : i * n + n, i * n : i * n + n] = block
    return whole


def butterfly(blocks: Array, stage: int) -> Array:
    """A factor of BOFT with blocks of two: over pairs of channels at a distance of 2**stage."""
    n, far = 2 * len(blocks), 2**stage
    order = [g * 2 * far + s * far + h for g in range(n // (2 * far)) for h in range(far) for s in range(2)]
    whole = np.zeros((n, n))
    whole[np.ix_(order, order)] = diagonal([rotation(v) for v in blocks])
    return whole


def dora(t: Tensors, w: Array) -> Array:
    v = w + 0.5 * times(t["up"], t["down"])
    size = np.sqrt((v * v).reshape(len(v), -1).sum(1))
    return np.asarray(v * (t["magnitude"] / size).reshape(-1, *[1] * (v.ndim - 1)))


def tucker(core: Array, inner: Array) -> Array:
    return np.moveaxis(np.tensordot(core, inner, (1, 0)), -1, 1)


def delora(t: Tensors, w: Array) -> Array:
    total = np.zeros_like(w)
    for i in range(2):
        a, b = t["down"][i], t["up"][:, i]
        total += np.outer(b, a * t["gain"]) * t["strength"][0] / 2 / np.linalg.norm(a) / np.linalg.norm(b)
    return w + total


def reflections(t: Tensors, w: Array) -> Array:
    for u in t["vectors"].T:
        w = w @ (np.eye(len(u)) - 2 * np.outer(u, u) / (u @ u))
    return w


def spectrum(t: Tensors, w: Array) -> Array:
    dense = np.zeros(w.size)
    dense[t["places"]] = t["spectrum"]
    return np.asarray(w + 3 * np.fft.ifft2(dense.reshape(w.shape)).real)


def haar(t: Tensors, w: Array) -> Array:
    """One level: the first letter of a quarter is its row filter's; the horizontal quarter is high in its rows."""
    dense = np.zeros(w.size)
    dense[t["places"]] = t["spectrum"]
    dense = dense.reshape(w.shape)
    h, k = w.shape[0] // 2, w.shape[1] // 2
    update = np.zeros_like(w)
    for i, j in np.ndindex(*w.shape):
        for p in range(2):
            for q in range(2):
                value = dense[p * h + i // 2, q * k + j // 2]
                update[i, j] += value * t["filters"][q, i % 2] * t["filters"][p, j % 2]
    return w + 2 * update


def circulants(t: Tensors, w: Array) -> Array:
    new = w.copy()
    for m, n, i, j in np.ndindex(3, 2, 2, 2):
        new[2 * m + i, 2 * n + j] += t["kernel"][m, n, (j - i) % 2] / w.shape[1]
    return new


def tiles(t: Tensors, w: Array) -> Array:
    return w + np.array([[t["block"][i % 3, o] for i in range(w.shape[1])] for o in range(len(w))])


def affine(t: Tensors, w: Array) -> Array:
    new = w.copy()
    for o, i in np.ndindex(3, 2):
        part = w[2 * o : 2 * o + 2, 2 * i : 2 * i + 2]
        new[2 * o : 2 * o + 2, 2 * i : 2 * i + 2] += part @ t["square"][o] + t["square"][o]
    return new


def road(t: Tensors, w: Array, b: Array) -> tuple[Array, Array]:
    turn = np.zeros((6, 6))
    for pair, (first, second) in enumerate(((0, 1), (2, 3), (4, 5))):
        c, s = t["alpha"][pair] * np.cos(t["theta"][pair]), t["alpha"][pair] * np.sin(t["theta"][pair])
        turn[first, first], turn[first, second] = c, -s
        turn[second, first], turn[second, second] = s, c
    return turn @ w, turn @ b


def placed(t: Tensors, w: Array) -> Array:
    flat = w.flatten()
    flat[t["places"]] += 0.5 * t["values"]
    return flat.reshape(w.shape)


def tokens(t: Tensors, w: Array) -> Array:
    new = w.copy()
    new[:, t["places"]] = t["rows"].T
    return new


def grid(t: Tensors, w: Array) -> Array:
    new = w.copy()
    for m, n in np.ndindex(2, 2):
        new[3 * m : 3 * m + 3, 2 * n : 2 * n + 2] += 0.5 * t["up"][m, n].T @ t["down"][n, :, m].T
    return new


def signs(t: Tensors, w: Array) -> Array:
    bits = np.unpackbits(t["signs"].astype(np.uint8), axis=1, bitorder="little")[:, : w.shape[1]]
    return np.asarray(w + 0.5 * t["gain"][:, None] * (2.0 * bits - 1))


def network(t: Tensors, w: Array) -> Array:
    h = np.maximum(t["down"] @ w, 0)
    g = np.maximum(t["encoders"][0] @ h, 0)
    return np.asarray(w + 0.5 * t["up"] @ (np.maximum(t["decoders"][0] @ g, 0) + h))


def blockwise(turn: Callable[[Array], Array]) -> Callable[[Tensors, Array], Array]:
    return lambda t, w: w @ diagonal([turn(v) for v in t["rotation"]]).T


Method = tuple[str, dict[str, Any], dict[str, Any], dict[str, Array], Changed]


def low_rank() -> list[Method]:
    n = numbers
    pair = {"down": n(2, 4, seed=1), "up": n(6, 2, seed=2)}
    pixels = {"down": n(2, 2, 3, 3, seed=1), "up": n(4, 2, seed=2)}
    two = {"up_1": n(6, 2, seed=1), "down_1": n(2, 4, seed=2), "up_2": n(6, 2, seed=3), "down_2": n(2, 4, seed=4)}
    cores = {
        "up_1": n(4, 2, seed=1), "core_1": n(2, 2, 3, 3, seed=2), "inner_1": n(2, 2, seed=3),
        "up_2": n(4, 2, seed=4), "core_2": n(2, 2, 3, 3, seed=5), "inner_2": n(2, 2, seed=6),
    }  # fmt: skip
    half = {"rank": 2, "scale": 0.5}
    return [
        ("dora", half, LINEAR, {**pair, "magnitude": n(6, seed=3, positive=True)}, only(dora)),
        ("dora", half, BARE, {**pair, "magnitude": n(6, seed=3, positive=True)}, only(dora)),
        ("dora", half, CONV, {**pixels, "magnitude": n(4, seed=3, positive=True)}, only(dora)),
        ("hira", half, LINEAR, pair, only(lambda t, w: w * (1 + 0.5 * times(t["up"], t["down"])))),
        ("hira", half, CONV, pixels, only(lambda t, w: w * (1 + 0.5 * times(t["up"], t["down"])))),
        ("adalora", half, LINEAR, {"down": pair["down"], "values": n(2, seed=3), "up": pair["up"]},
         only(lambda t, w: w + 0.5 * t["up"] @ np.diag(t["values"]) @ t["down"])),
        ("loha", half, LINEAR, two, only(lambda t, w: w + 0.5 * (t["up_1"] @ t["down_1"]) * (t["up_2"] @ t["down_2"]))),
        ("loha", {**half, "tucker": True}, CONV, cores, only(lambda t, w: w + 0.5
         * times(t["up_1"], tucker(t["core_1"], t["inner_1"])) * times(t["up_2"], tucker(t["core_2"], t["inner_2"])))),
        ("lokr", {**half, "rows": 2, "columns": 2}, LINEAR,
         {"w1": n(2, 2, seed=1), "w2_up": n(3, 2, seed=2), "w2_down": n(2, 2, seed=3)},
         only(lambda t, w: w + 0.5 * np.kron(t["w1"], t["w2_up"] @ t["w2_down"]))),
        ("lokr", {**half, "rows": 2, "columns": 2, "first": "low-rank", "second": "whole"}, LINEAR,
         {"w1_up": n(2, 2, seed=1), "w1_down": n(2, 2, seed=4), "w2": n(3, 2, seed=2)},
         only(lambda t, w: w + 0.5 * np.kron(t["w1_up"] @ t["w1_down"], t["w2"]))),
        ("lokr", {**half, "rows": 2, "columns": 1, "second": "whole"}, CONV, {"w1": n(2, 1, seed=1), "w2": n(2, 2, 3, 3, seed=2)},
         only(lambda t, w: w + 0.5 * np.kron(t["w1"][:, :, None, None], t["w2"]))),
        ("locon", half, CONV, {"down": n(2, 2, seed=1), "core": n(2, 2, 3, 3, seed=2), "up": n(4, 2, seed=3)},
         only(lambda t, w: w + 0.5 * times(t["up"], tucker(t["core"], t["down"])))),
        ("vera", {"rank": 2}, LINEAR, {**pair, "inner": n(2, seed=3), "outer": n(6, seed=4)},
         only(lambda t, w: w + np.diag(t["outer"]) @ t["up"] @ np.diag(t["inner"]) @ t["down"])),
        ("randlora", {**half, "bases": 2}, LINEAR, {
            "large_out": n(6, 2, 2, seed=1), "small_in": n(2, 4, seed=2), "gamma_in": n(2, 4, seed=3), "coefficients": n(2, 2, seed=4),
        }, only(lambda t, w: w + 0.5 * np.einsum("orn,rn,ri,ni->oi", t["large_out"], t["coefficients"], t["small_in"], t["gamma_in"]))),
        ("randlora", {**half, "bases": 2, "narrow": "out"}, LINEAR, {
            "small_out": n(6, 2, seed=1), "gamma_out": n(6, 2, seed=2), "large_in": n(2, 2, 4, seed=3), "coefficients": n(2, 2, seed=4),
        }, only(lambda t, w: w + 0.5 * np.einsum("or,on,rn,rni->oi", t["small_out"], t["gamma_out"], t["coefficients"], t["large_in"]))),
        ("gralora", {**half, "blocks": 2}, LINEAR, {"down": n(2, 2, 2, 1, seed=1), "up": n(2, 2, 1, 3, seed=2)}, only(grid)),
        ("delora", {"rank": 2}, LINEAR, {**pair, "strength": np.array([1.5]), "gain": n(4, seed=3)}, only(delora)),
        ("tinylora", {"rank": 2, "count": 3}, LINEAR, {**pair, "projection": n(3, 2, 2, seed=3), "values": n(3, seed=4)},
         only(lambda t, w: w + t["up"] @ np.tensordot(t["values"], t["projection"], 1) @ t["down"])),
        ("psoft", {"rank": 2}, LINEAR, {**pair, "rotation": np.array([0.25]), "before": n(2, seed=3), "after": n(2, seed=4)},
         only(lambda t, w: w + t["up"] @ (np.diag(t["after"]) @ rotation(t["rotation"]) @ np.diag(t["before"]) - np.eye(2)) @ t["down"])),
        ("glora", {"rank": 2}, LINEAR, {
            "a_down": n(2, 4, seed=1), "a_up": n(6, 2, seed=2), "b_down": n(2, 4, seed=3), "b_up": n(6, 2, seed=4),
            "c": n(4, seed=5), "d": n(6, seed=6), "e": n(6, seed=7),
        }, lambda t, w, b: (w + w * (t["a_up"] @ t["a_down"]) + t["b_up"] @ t["b_down"], b + b * t["d"] + t["e"] + w @ t["c"])),
        ("glora-lycoris", half, LINEAR, {"a_down": n(2, 4, seed=1), "a_up": n(4, 2, seed=2), "b_down": n(2, 4, seed=3), "b_up": n(6, 2, seed=4)},
         only(lambda t, w: w + 0.5 * (w @ t["a_up"] @ t["a_down"] + t["b_up"] @ t["b_down"]))),
    ]  # fmt: skip


def others() -> list[Method]:
    n = numbers
    small = n(2, 1, seed=1) / 4
    spots = {"places": places(1, 7, 22)}
    return [
        ("ia3", {}, LINEAR, {"gain": n(6, seed=1)}, lambda t, w, b: (w * t["gain"][:, None], b * t["gain"])),
        ("ia3", {"axis": "in"}, LINEAR, {"gain_in": n(4, seed=1)}, only(lambda t, w: w * t["gain_in"])),
        ("ssf", {}, CONV, {"gain": n(4, seed=1), "shift": n(4, seed=2)},
         lambda t, w, b: (w * t["gain"].reshape(-1, 1, 1, 1), b * t["gain"] + t["shift"])),
        ("oft", {"block": 2}, LINEAR, {"rotation": small}, only(blockwise(lambda v: series(v, 5)))),
        ("oft", {"block": 2, "terms": 0}, LINEAR, {"rotation": small}, only(blockwise(rotation))),
        ("oft", {"block": 2, "terms": 0, "shared": True}, LINEAR, {"shared_rotation": small[0]},
         only(lambda t, w: w @ diagonal([rotation(t["shared_rotation"])] * 2).T)),
        ("diag-oft", {"block": 2, "rescale": True}, LINEAR, {"rotation": n(3, 1, seed=1) / 4, "gain": n(6, seed=2)},
         only(lambda t, w: t["gain"][:, None] * (diagonal([rotation(v) for v in t["rotation"]]) @ w))),
        ("boft", {"block": 2, "factors": 2}, LINEAR, {"rotation": n(2, 2, 1, seed=1) / 4, "gain": n(6, seed=2)},
         only(lambda t, w: t["gain"][:, None] * (w @ (butterfly(t["rotation"][1], 1) @ butterfly(t["rotation"][0], 0)).T))),
        ("hra", {"rank": 3}, LINEAR, {"vectors": n(4, 3, seed=1)}, only(reflections)),
        ("fourierft", {"count": 3, "scale": 3.0}, LINEAR, {**spots, "spectrum": n(3, seed=1)}, only(spectrum)),
        ("waveft", {"count": 3, "scale": 2.0}, LINEAR,
         {"filters": np.array([[0.75, 0.5], [0.5, -0.75]]), **spots, "spectrum": n(3, seed=1)}, only(haar)),
        ("c3a", {"block": 2}, LINEAR, {"kernel": n(3, 2, 2, seed=1)}, only(circulants)),
        ("miss", {"rank": 3}, LINEAR, {"block": n(3, 6, seed=1)}, only(tiles)),
        ("miss", {"rank": 2, "variant": "affine"}, LINEAR, {"square": n(3, 2, 2, seed=1)}, only(affine)),
        ("road", {"size": 2}, LINEAR, {"theta": n(3, seed=1), "alpha": n(3, seed=2)}, road),
        ("sparse", {"count": 3, "scale": 0.5}, LINEAR, {**spots, "values": n(3, seed=1)}, only(placed)),
        ("tokens", {"count": 2}, EMBEDDING, {"places": places(4, 1), "rows": n(2, 4, seed=1)}, only(tokens)),
        ("peanut", {"rank": 2, "depth": 1, "scale": 0.5}, LINEAR, {
            "down": n(2, 6, seed=1), "encoders": n(1, 2, 2, seed=2), "decoders": n(1, 2, 2, seed=3), "up": n(6, 2, seed=4),
        }, only(network)),
        ("deft", {"rank": 2, "scale": 0.5}, LINEAR, {"subspace": n(6, 2, seed=1), "content": n(2, 4, seed=2)},
         only(lambda t, w: w + t["subspace"] @ (0.5 * t["content"] - np.maximum(t["subspace"], 0).T @ w))),
        ("diff-sign", {"scale": 0.5}, LINEAR, {"signs": np.arange(6).reshape(6, 1) * 3 + 1, "gain": n(6, seed=1)}, only(signs)),
        ("diff-int8", {"scale": 0.5}, LINEAR, {"values": np.arange(-12, 12).reshape(6, 4), "gain": n(6, seed=1)},
         only(lambda t, w: w + 0.5 * t["gain"][:, None] * t["values"])),
    ]  # fmt: skip


Inserted = tuple[str, dict[str, Any], dict[str, Any], dict[str, Array], Callable[[Tensors, Array, Array], Array]]
"""As a method, with input and output to the new output."""


def phm(rule: Array, left: Array, right: Array) -> Array:
    return np.asarray(sum(np.kron(r, a @ b) for r, a, b in zip(rule, left, right, strict=True)))


def ends(t: Tensors, y: Array) -> Array:
    """DiReFT on the first token of a row."""
    new = y.copy()
    new[:, :1] += 0.5 * ((y[:, :1] @ t["down"].T + t["down_bias"]) @ t["up"].T)
    return new


def gate(t: Tensors, h: Array) -> Array:
    return np.asarray(sigmoid((h * t["gate"]).sum(-1, keepdims=True) + t["gate_bias"]).mean(-2, keepdims=True))


def inserted() -> list[Inserted]:
    n = numbers
    down, up = {"down": n(2, 4, seed=1), "down_bias": n(2, seed=2)}, {"up": n(4, 2, seed=3), "up_bias": n(4, seed=4)}
    gates = {"gate": n(4, seed=5), "gate_bias": n(1, seed=6)}
    relu = {"bottleneck": 2, "activation": "relu", "scale": 0.5}

    def bottleneck(t: Tensors, h: Array) -> Array:
        return 0.5 * (np.maximum(h @ t["down"].T + t["down_bias"], 0) @ t["up"].T + t["up_bias"])

    return [
        ("low-rank-adapter", {"bottleneck": 3, "scale": 0.5}, BLOCK, {
            "down_left": n(3, 1, seed=1), "down_right": n(1, 4, seed=2), "down_bias": n(3, seed=3),
            "up_left": n(4, 1, seed=4), "up_right": n(1, 3, seed=5), "up_bias": n(4, seed=6),
        }, lambda t, x, y: y + 0.5 * (gelu_new(y @ (t["down_left"] @ t["down_right"]).T + t["down_bias"])
                                      @ (t["up_left"] @ t["up_right"]).T + t["up_bias"])),
        ("compacter", {"bottleneck": 2, "division": 2, "scale": 0.5}, BLOCK, {
            "down_rule": n(2, 2, 2, seed=1), "down_left": n(2, 1, 1, seed=2), "down_right": n(2, 1, 2, seed=3), "down_bias": n(2, seed=4),
            "up_rule": n(2, 2, 2, seed=5), "up_left": n(2, 2, 1, seed=6), "up_right": n(2, 1, 1, seed=7), "up_bias": n(4, seed=8),
        }, lambda t, x, y: y + 0.5 * (gelu_new(y @ phm(t["down_rule"], t["down_left"], t["down_right"]).T + t["down_bias"])
                                      @ phm(t["up_rule"], t["up_left"], t["up_right"]).T + t["up_bias"])),
        ("parallel-adapter", relu, LINEAR, {**down, "up": n(6, 2, seed=3), "up_bias": n(6, seed=4)}, lambda t, x, y: y + bottleneck(t, x)),
        ("parallel-adapter", relu, BLOCK, {**down, **up}, lambda t, x, y: y + bottleneck(t, x)),
        ("gated-adapter", relu, BLOCK, {**gates, **down, **up}, lambda t, x, y: y + gate(t, y) * bottleneck(t, y)),
        ("gated-lora", {"rank": 2, "scale": 0.5}, LINEAR, {**gates, "down": n(2, 4, seed=1), "up": n(6, 2, seed=3)},
         lambda t, x, y: y + 0.5 * gate(t, x) * (x @ t["down"].T @ t["up"].T)),
        ("loreft", {"rank": 2, "scale": 0.5}, BLOCK, {"subspace": n(2, 4, seed=1), "source": n(2, 4, seed=2), "source_bias": n(2, seed=3)},
         lambda t, x, y: y + 0.5 * (y @ t["source"].T + t["source_bias"] - y @ t["subspace"].T) @ t["subspace"]),
        ("direft", {"rank": 2, "scale": 0.5, "positions": "ends", "prefix": 1}, BLOCK, {**down, "up": up["up"]}, lambda t, x, y: ends(t, y)),
    ]  # fmt: skip


def ports(kind: str, config: Mapping[str, Any], host: Mapping[str, Any]) -> list[str]:
    """The ports that a document has under a config on a host (section 5.4)."""
    document = tomllib.loads((KINDS / f"{kind}.toml").read_text(encoding="utf-8"))
    facts = {n: c["default"] for n, c in document["config"].items() if "default" in c} if "config" in document else {}
    facts |= {**config, "family": host["family"], "bias": host["bias"], "grouped": host.get("groups", 1) > 1}
    found = []
    for port, value in document["equations"].items():
        cases = value if isinstance(value, list) else [value]
        whens = [case.get("when", {}) if isinstance(case, dict) else {} for case in cases]
        if any(all(facts[n] in (v if isinstance(v, list) else [v]) for n, v in when.items()) for when in whens):
            found.append(port)
    return found


def methods() -> list[dict[str, Any]]:
    """Every port of every kind, on a host or two."""
    cases: list[dict[str, Any]] = []

    def case(kind: str, config: Any, host: Any, t: Tensors, port: str, value: Array, given: Mapping[str, Any]) -> None:
        said = ", ".join(f"{n} {v}" for n, v in config.items())
        where = f"{host['family']}{'' if host['bias'] else ' without bias'}"
        cases.append({
            "description": f"{kind}, {where}{said and '; ' + said}: {port}", "clause": "DH-5.8-1",
            "kind": kind, "version": 1, "config": config, "host": host, "port": port,
            **{n: tensor(a) for n, a in given.items() if a is not None},
            "tensors": {n: tensor(a) for n, a in t.items()},
            "valid": True, "expect": {"value": tensor(value)}, "tolerance": 1e-5,
        })  # fmt: skip

    for kind, config, host, t, changed in (*low_rank(), *others()):
        x, w, b = sample(host)
        assert w is not None
        new_w, new_b = changed(t, w, np.zeros(host["out"]) if b is None else b)
        for port in ports(kind, config, host):
            if port == "input":
                value = x @ changed(t, np.eye(host["in"]), np.zeros(host["in"]))[0].T
            elif port == "output":
                value = forward(host, x, new_w, None if b is None else new_b)
            else:
                value = new_w if port == "weight" else new_b
            given = {"output": {"x": x, "y": forward(host, x, w, b)}, "input": {"x": x}}.get(port, {})
            case(kind, config, host, t, port, value, {**given, "W": w, "b": b})
    for kind, config, host, t, output in inserted():
        x, w, b = sample(host)
        y = forward(host, x, w, b)
        case(kind, config, host, t, "output", output(t, x, y), {"x": x, "y": y, "W": w, "b": b})
    return cases
