"""Vectors of the expression language: every op and the grammar; values in plain NumPy. Used by generate.py."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np

__all__ = ["Array", "conv", "document", "gelu", "layer_norm", "numbers", "tensor", "valid"]

Array = np.ndarray[Any, Any]


def numbers(*shape: int, seed: int = 0, positive: bool = False) -> Array:
    """Multiples of 1/8 in −2 … 2 (or 1/8 … 2): exact in every floating dtype that matters."""
    low = 1 if positive else -16
    return np.random.default_rng([seed, *shape]).integers(low, 17, shape) / 8


def tensor(array: Any) -> dict[str, Any]:
    """A tensor as a request or an expectation carries it."""
    array = np.asarray(array)
    if array.dtype.kind in "iu":
        return {"shape": list(array.shape), "dtype": "I64", "data": [int(v) for v in array.ravel()]}
    return {"shape": list(array.shape), "data": [float(f"{v:.7g}") + 0.0 for v in array.astype("f8").ravel()]}


def document(
    expression: Any, tensors: dict[str, Array] | None = None, port: str = "replace", **more: Any
) -> dict[str, Any]:
    """A kind that consists of one equation on a block."""
    shapes = {
        n: {"shape": list(a.shape)} | ({"dtype": "int64", "trainable": False} if a.dtype.kind in "iu" else {})
        for n, a in (tensors or {}).items()
    }
    return {
        "kind": "com.example.case",
        "version": 1,
        "hosts": ["block"],
        **({"tensors": shapes} if shapes else {}),
        **more,
        "equations": {port: expression},
    }


ERF = np.vectorize(math.erf)
A, B, C, D = numbers(2, 3, seed=1), numbers(3, 4, seed=2), numbers(3, seed=3), numbers(3, 3, seed=4)
IDX = np.array([2, 0])
X = numbers(2, 3)
POS = numbers(2, 3, positive=True)
MAPS = numbers(1, 2, 4, 4, seed=5)
SEQ = numbers(1, 2, 6, seed=6)
SPD = np.array([[2.0, 1.0, 0.0], [1.0, 3.0, 0.5], [0.0, 0.5, 2.5]])


def sigmoid(x: Array) -> Array:
    return np.asarray(1 / (1 + np.exp(-x)))


def softplus(x: Array) -> Array:
    return np.asarray(np.log1p(np.exp(x)))


def gelu(x: Array) -> Array:
    return np.asarray(x * (1 + ERF(x / math.sqrt(2))) / 2)


def gelu_new(x: Array) -> Array:
    return np.asarray(x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2)


def elu(x: Array, alpha: float = 1.0) -> Array:
    return np.where(x > 0, x, alpha * (np.exp(np.minimum(x, 0)) - 1))


def softmax(x: Array, axis: int = -1) -> Array:
    e = np.exp(x - x.max(axis, keepdims=True))
    return np.asarray(e / e.sum(axis, keepdims=True))


def layer_norm(x: Array, eps: float = 1e-5, axis: int | tuple[int, ...] = -1) -> Array:
    return np.asarray((x - x.mean(axis, keepdims=True)) / np.sqrt(x.var(axis, keepdims=True) + eps))


def windows(x: Array, size: int) -> Array:
    """Means over non-overlapping windows of the last axis."""
    return np.asarray(x.reshape(*x.shape[:-1], -1, size).mean(-1))


def conv(
    x: Array, w: Array, b: Array | None = None, stride: int = 1, padding: int = 0, groups: int = 1, dilation: int = 1
) -> Array:
    """Convolution by its definition, over any number of axes of space."""
    space = x.ndim - 2
    x = np.pad(x, [(0, 0), (0, 0)] + [(padding, padding)] * space)
    reach = [dilation * (k - 1) + 1 for k in w.shape[2:]]
    out = [(n - r) // stride + 1 for n, r in zip(x.shape[2:], reach, strict=True)]
    y = np.zeros((x.shape[0], w.shape[0], *out))
    per_in, per_out = w.shape[1], w.shape[0] // groups
    for o in range(w.shape[0]):
        first = (o // per_out) * per_in
        for at in np.ndindex(*out):
            cut = tuple(slice(a * stride, a * stride + r, dilation) for a, r in zip(at, reach, strict=True))
            y[(slice(None), o, *at)] = (
                (x[(slice(None), slice(first, first + per_in), *cut)] * w[o]).reshape(x.shape[0], -1).sum(-1)
            )
    return y if b is None else y + b.reshape(-1, *[1] * space)


def bilinear(x: Array, size: tuple[int, int]) -> Array:
    """Bilinear resizing with half-pixel centres, edges repeated."""
    for axis, n in ((-2, size[0]), (-1, size[1])):
        old = x.shape[axis]
        at = np.clip((np.arange(n) + 0.5) * old / n - 0.5, 0, None)
        low = np.minimum(np.floor(at).astype(int), old - 1)
        high = np.minimum(low + 1, old - 1)
        part = (at - low).reshape([-1] + [1] * (-axis - 1))
        x = np.take(x, low, axis) * (1 - part) + np.take(x, high, axis) * part
    return x


def circulant(c: Array) -> Array:
    return np.stack([np.roll(c, j) for j in range(len(c))], axis=1)


def skew(v: Array, n: int) -> Array:
    u = np.zeros((n, n))
    u[np.triu_indices(n, 1)] = v
    return np.asarray(u - u.T)


Row = tuple[str, Array, dict[str, Array], Callable[..., Any]]


def elementwise() -> list[Row]:
    plain: dict[str, Callable[[Array], Any]] = {
        "exp": np.exp, "square": np.square, "abs": np.abs, "sign": np.sign, "sin": np.sin, "cos": np.cos,
        "round": np.round, "floor": np.floor, "relu": lambda x: np.maximum(x, 0), "relu6": lambda x: np.clip(x, 0, 6),
        "gelu": gelu, "gelu_new": gelu_new, "quick_gelu": lambda x: x * sigmoid(1.702 * x), "silu": lambda x: x * sigmoid(x),
        "swish": lambda x: x * sigmoid(x), "mish": lambda x: x * np.tanh(softplus(x)),
        "hardswish": lambda x: x * np.clip(x + 3, 0, 6) / 6,
        "selu": lambda x: 1.0507009873554805 * elu(x, 1.6732632423543772),
        "tanh": np.tanh, "sigmoid": sigmoid, "softplus": softplus, "float32": lambda x: x, "stop_gradient": lambda x: x,
        "zeros_like": np.zeros_like, "ones_like": np.ones_like,
    }  # fmt: skip
    rows: list[Row] = [(f"{name}(x)", 2 * X, {}, lambda x, f=f: f(x)) for name, f in plain.items()]
    rows += [(f"{n}(x)", POS, {}, f) for n, f in (("log", np.log), ("sqrt", np.sqrt), ("rsqrt", lambda x: x**-0.5))]
    rows += [
        ("activation(x, 'gelu')", X, {}, gelu),
        ("activation(x, 'identity')", X, {}, lambda x: x),
        ("activation(x, 'silu')", X, {}, lambda x: x * sigmoid(x)),
        ("leaky_relu(x)", X, {}, lambda x: np.where(x > 0, x, 0.01 * x)),
        ("leaky_relu(x, slope=0.5)", X, {}, lambda x: np.where(x > 0, x, 0.5 * x)),
        ("elu(x)", X, {}, elu),
        ("elu(x, alpha=0.5)", X, {}, lambda x: elu(x, 0.5)),
        ("clip(x, -0.5, 1)", X, {}, lambda x: np.clip(x, -0.5, 1)),
        ("minimum(x, a)", X, {"a": A}, np.minimum),
        ("maximum(x, a)", X, {"a": A}, np.maximum),
        ("like(a, x)", X, {"a": A}, lambda x, a: a),
    ]
    return rows


def axes() -> list[Row]:
    reductions: dict[str, Callable[..., Any]] = {
        "sum": np.sum, "mean": np.mean, "amax": np.max, "amin": np.min,
        "norm": lambda x, axis, **k: np.sqrt(np.sum(x * x, axis, **k)),
        "rms": lambda x, axis, **k: np.sqrt(np.mean(x * x, axis, **k)),
    }  # fmt: skip
    rows: list[Row] = []
    for name, f in reductions.items():
        rows.append((f"{name}(x, -1)", X, {}, lambda x, f=f: f(x, -1)))
        rows.append((f"{name}(x, (0, 1), keep=1)", X, {}, lambda x, f=f: f(x, (0, 1), keepdims=True)))
    rows += [
        ("softmax(x)", X, {}, softmax),
        ("softmax(x, axis=0)", X, {}, lambda x: softmax(x, 0)),
        ("log_softmax(x)", X, {}, lambda x: np.log(softmax(x))),
        ("normalize(x)", X, {}, lambda x: x / np.sqrt((x * x).sum(-1, keepdims=True))),
        ("normalize(x * 0, eps=0.5)", X, {}, lambda x: x * 0),
        ("cumsum(x, -1)", X, {}, lambda x: np.cumsum(x, -1)),
        ("layer_norm(x)", X, {}, layer_norm),
        ("layer_norm(x, a, b, eps=0.1)", X, {"a": C, "b": D[0]}, lambda x, a, b: layer_norm(x, 0.1) * a + b),
        ("rms_norm(x)", X, {}, lambda x: x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6)),
        ("rms_norm(x, a)", X, {"a": C}, lambda x, a: x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * a),
        ("group_norm(x, 2)", numbers(1, 4, 3), {}, lambda x: layer_norm(x.reshape(1, 2, 6)).reshape(x.shape)),
        ("group_norm(x, 1, a, b)", numbers(1, 3, 2), {"a": C, "b": D[0]},
         lambda x, a, b: layer_norm(x, axis=(1, 2)) * a[:, None] + b[:, None]),
        ("linear(x, a)", X, {"a": numbers(4, 3)}, lambda x, a: x @ a.T),
        ("linear(x, a, b)", X, {"a": numbers(4, 3), "b": numbers(4)}, lambda x, a, b: x @ a.T + b),
        ("x * channel(a)", X, {"a": C}, lambda x, a: x * a),
    ]  # fmt: skip
    return rows


def shapes() -> list[Row]:
    x3 = numbers(2, 3, 4)
    return [
        ("reshape(x, (3, -1))", X, {}, lambda x: x.reshape(3, -1)),
        ("reshape_as(x, a)", X, {"a": numbers(3, 2)}, lambda x, a: x.reshape(a.shape)),
        ("expand_as(a, x)", X, {"a": C}, lambda x, a: np.broadcast_to(a, x.shape)),
        ("transpose(x)", X, {}, lambda x: x.T),
        ("transpose(x, 0, 1)", x3, {}, lambda x: x.swapaxes(0, 1)),
        ("permute(x, (2, 0, 1))", x3, {}, lambda x: x.transpose(2, 0, 1)),
        ("unsqueeze(x, 1)", X, {}, lambda x: x[:, None]),
        ("squeeze(x, 1)", numbers(2, 1, 3), {}, lambda x: x[:, 0]),
        ("flatten(x)", x3, {}, lambda x: x.ravel()),
        ("flatten(x, 1, 2)", x3, {}, lambda x: x.reshape(2, 12)),
        ("flip(x, 1)", X, {}, lambda x: x[:, ::-1]),
        ("flip(x, (0, 1))", X, {}, lambda x: x[::-1, ::-1]),
        ("roll(x, 1, 1)", X, {}, lambda x: np.roll(x, 1, 1)),
        ("roll(x, -1, 0)", X, {}, lambda x: np.roll(x, -1, 0)),
        ("pad(x, (1, 2))", X, {}, lambda x: np.pad(x, ((0, 0), (1, 2)))),
        ("pad(x, (0, 1, 2, 0), value=0.5)", X, {}, lambda x: np.pad(x, ((2, 0), (0, 1)), constant_values=0.5)),
        ("cat(x, a)", X, {"a": A}, lambda x, a: np.concatenate([x, a], -1)),
        ("cat(x, a, x, axis=0)", X, {"a": A}, lambda x, a: np.concatenate([x, a, x], 0)),
        ("stack(x, a)", X, {"a": A}, lambda x, a: np.stack([x, a])),
        ("stack(x, a, axis=-1)", X, {"a": A}, lambda x, a: np.stack([x, a], -1)),
        ("x * size(x, 1) + size(x, -2)", X, {}, lambda x: x * 3 + 2),
        ("rearrange(x, 'b (h w) -> h b w', h=2)", numbers(2, 6), {}, lambda x: x.reshape(2, 2, 3).transpose(1, 0, 2)),
        ("rearrange(x, '... a b -> ... (b a)')", x3, {}, lambda x: x.transpose(0, 2, 1).reshape(2, 12)),
        ("reduce(x, 'a b c -> a c', 'mean')", x3, {}, lambda x: x.mean(1)),
        ("reduce(x, 'a (b n) -> a b', 'max', n=3)", numbers(2, 6), {}, lambda x: x.reshape(2, 2, 3).max(-1)),
        ("reduce(x, 'a b -> a', 'sum')", X, {}, lambda x: x.sum(1)),
        ("reduce(x, 'a b -> a', 'min')", X, {}, lambda x: x.min(1)),
        ("reduce(x, 'a b -> a', 'prod')", X, {}, lambda x: x.prod(1)),
        ("repeat(x, 'a b -> a n b', n=2)", X, {}, lambda x: np.repeat(x[:, None], 2, 1)),
        ("einsum(x, a, 'b i, i o -> b o')", X, {"a": B}, lambda x, a: x @ a),
        ("einsum(x, a, x, 'b i, i o, c i -> o c')", X, {"a": B}, lambda x, a: np.einsum("bi,io,ci->oc", x, a, x)),
        ("x + zeros((2, 3), like=x)", X, {}, lambda x: x),
        ("x + ones(3, like=x)", X, {}, lambda x: x + 1),
        ("x @ eye(3, like=x)", X, {}, lambda x: x),
        ("x * arange(3, like=x)", X, {}, lambda x: x * np.arange(3)),
    ]  # fmt: skip


def algebra() -> list[Row]:
    q, k, v = numbers(1, 2, 3, 4, seed=7), numbers(1, 2, 5, 4, seed=8), numbers(1, 2, 5, 2, seed=9)
    v3 = np.array([0.5, -0.25, 1.0])
    return [
        ("bmm(x, a)", numbers(2, 2, 3), {"a": numbers(2, 3, 4)}, lambda x, a: x @ a),
        ("bmm(x, a) * 2", numbers(2, 2, 3), {"a": B}, lambda x, a: x @ a * 2),
        ("kron(x, a)", X, {"a": numbers(2, 2)}, lambda x, a: np.kron(x, a)),
        ("inverse(x)", SPD, {}, np.linalg.inv),
        ("solve(x, a)", SPD, {"a": B}, np.linalg.solve),
        ("diag(x)", C, {}, np.diag),
        ("diag(x) * 2", X, {}, lambda x: np.stack([2 * np.diag(r) for r in x])),
        ("diagonal(x)", numbers(2, 3, 3), {}, lambda x: np.stack([np.diag(m) for m in x])),
        ("block_diag(x)", numbers(2, 2, 3), {},
         lambda x: np.block([[x[0], np.zeros((2, 3))], [np.zeros((2, 3)), x[1]]])),
        ("tril(x)", D, {}, np.tril),
        ("triu(x, 1)", D, {}, lambda x: np.triu(x, 1)),
        ("skew(x, 3)", v3, {}, lambda x: skew(x, 3)),
        ("cayley(skew(x, 3))", v3, {},
         lambda x: np.linalg.inv(np.eye(3) - skew(x, 3)) @ (np.eye(3) + skew(x, 3))),
        ("circulant(x)", C, {}, circulant),
        ("ifft2_real(x)", numbers(4, 4), {}, lambda x: np.fft.ifft2(x).real),
        ("gather(x, 1, a)", X, {"a": np.array([[2, 0], [1, 1]])}, lambda x, a: np.take_along_axis(x, a, 1)),
        ("take(x, a)", D, {"a": IDX}, lambda x, a: x[a]),
        ("take(x, a, axis=1)", X, {"a": IDX}, lambda x, a: x[:, a]),
        ("put(x, a, b)", D, {"a": IDX, "b": A}, lambda x, a, b: np.stack([b[1], x[1], b[0]])),
        ("scatter_add(x, 1, a, b)", X, {"a": np.array([[0, 0], [1, 2]]), "b": numbers(2, 2)},
         lambda x, a, b: np.stack([x[0] + [b[0, 0] + b[0, 1], 0, 0], x[1] + [0, b[1, 0], b[1, 1]]])),
        ("embedding(a, x)", D, {"a": np.array([[2, 0], [1, 1]])}, lambda x, a: x[a]),
        ("attention(x, a, b)", q, {"a": k, "b": v}, lambda x, a, b: softmax(x @ a.swapaxes(-1, -2) / 2) @ b),
        ("attention(x, a, b, scale=0.25)", q, {"a": k, "b": v},
         lambda x, a, b: softmax(x @ a.swapaxes(-1, -2) / 4) @ b),
        ("attention(x, x, x, causal=1)", q, {},
         lambda x: softmax(np.where(np.tril(np.ones((3, 3))) > 0, x @ x.swapaxes(-1, -2) / 2, -np.inf)) @ x),
    ]  # fmt: skip


def maps() -> list[Row]:
    return [
        ("conv1d(x, a)", SEQ, {"a": numbers(3, 2, 3)}, conv),
        ("conv1d(x, a, b, stride=2, padding=1)", SEQ, {"a": numbers(3, 2, 3), "b": C},
         lambda x, a, b: conv(x, a, b, stride=2, padding=1)),
        ("conv1d(x, a, dilation=2)", SEQ, {"a": numbers(3, 2, 2)}, lambda x, a: conv(x, a, dilation=2)),
        ("conv2d(x, a, padding=1, groups=2)", MAPS, {"a": numbers(4, 1, 3, 3)},
         lambda x, a: conv(x, a, padding=1, groups=2)),
        ("conv2d(x, a, b)", MAPS, {"a": numbers(3, 2, 1, 1), "b": C}, conv),
        ("conv3d(x, a)", numbers(1, 1, 2, 3, 3), {"a": numbers(2, 1, 2, 2, 2)}, conv),
        ("avg_pool1d(x, 2)", SEQ, {}, lambda x: windows(x, 2)),
        ("avg_pool1d(x, 2, stride=1)", SEQ, {}, lambda x: (x[..., :-1] + x[..., 1:]) / 2),
        ("avg_pool2d(x, 2)", MAPS, {}, lambda x: windows(windows(x, 2).swapaxes(-1, -2), 2).swapaxes(-1, -2)),
        ("adaptive_avg_pool1d(x, 3)", SEQ, {}, lambda x: windows(x, 2)),
        ("adaptive_avg_pool2d(x, (2, 2))", MAPS, {},
         lambda x: windows(windows(x, 2).swapaxes(-1, -2), 2).swapaxes(-1, -2)),
        ("interpolate(x, (6, 3))", MAPS, {}, lambda x: bilinear(x, (6, 3))),
        ("interpolate(x, (8, 2), mode='nearest')", MAPS, {}, lambda x: x[:, :, [0, 0, 1, 1, 2, 2, 3, 3]][..., [0, 2]]),
    ]  # fmt: skip


def language() -> list[tuple[str | list[str], str, Row]]:
    a = {"a": numbers(2, 3, seed=10)}
    w4, k = numbers(4, 2), numbers(2, 3, 3, 3, seed=11)
    program = "h = x * 2  # twice\n\n  # a line of its own\ng = (h +\n     a)\ng - x"
    rows: list[tuple[str | list[str], str, str, Array, dict[str, Array], Callable[..., Any]]] = [
        ("DH-5.6-6", "elementwise arithmetic", "x + a * x - a / 2", X, a, lambda x, a: x + a * x - a / 2),
        ("DH-5.6-6", "broadcasting", "x * a", X, {"a": numbers(2, 1)}, lambda x, a: x * a),
        ("DH-5.6-6", "broadcasting to more axes", "x + a", X, {"a": numbers(4, 1, 3)}, lambda x, a: x + a),
        ("DH-5.6-6", "powers of tensors", "x ** 2 + 2 ** x", X, {}, lambda x: x**2 + 2.0**x),
        ("DH-5.6-1", "unary minus binds less than a power", "-x ** 2", X, {}, lambda x: -(x**2)),
        ("DH-5.6-1", "a power is grouped from the right", "x * 2 ** 3 ** 2", X, {}, lambda x: x * 512),
        ("DH-5.6-1", "a negative exponent", "x * 2 ** -2", X, {}, lambda x: x / 4),
        ("DH-5.6-1", "the others are grouped from the left", "x - 1 - 2 * 8 / 4 / 2", X, {}, lambda x: x - 3),
        ("DH-5.6-1", "numbers in every notation", "x * 1e1 + 1000 + .5 + 1. + 1.5E-1", X, {}, lambda x: x * 10 + 1001.65),
        ("DH-5.6-7", "whole division and true division of numbers", "x * (7 // 2) + 7 / 2 + -7 // 2", X, {},
         lambda x: x * 3 + 3.5 - 4),
        ("DH-5.6-6", "@ of two matrices", "x @ a", X, {"a": B}, lambda x, a: x @ a),
        ("DH-5.6-6", "@ of a matrix and a vector", "x @ a", X, {"a": C}, lambda x, a: x @ a),
        ("DH-5.6-6", "@ of two vectors", "x @ a", C, {"a": C}, lambda x, a: x @ a),
        ("DH-5.6-6", "@ of a matrix and a kernel", "a @ x", k, {"a": w4}, lambda x, a: np.tensordot(a, x, (1, 0))),
        (["DH-5.6-1", "DH-5.6-8"], "assignments, comments, blank lines, a line in brackets", program, X, a, lambda x, a: x * 2 + a - x),
        ("DH-5.6-8", "the last line alone is the value", "h = x + 1\nx", X, {}, lambda x: x),
        ("DH-5.6-1", "the whole program may be indented", "    h = x + 1\n    h * 2", X, {}, lambda x: (x + 1) * 2),
        ("DH-5.6-4", "a loop that adds", "sum(x * i for i in range(4))", X, {}, lambda x: x * 6),
        ("DH-5.6-4", "a loop with a start", "sum(x ** i for i in range(1, 4))", X, {}, lambda x: x + x**2 + x**3),
        ("DH-5.6-4", "a loop that joins", "cat(x * i for i in range(3))", X, {}, lambda x: np.concatenate([x * 0, x, x * 2], -1)),
        ("DH-5.6-4", "a loop that joins along an axis", "cat((x * i for i in range(2)), axis=0)", X, {},
         lambda x: np.concatenate([x * 0, x])),
        ("DH-5.6-4", "a loop that stacks", "stack(x + i for i in range(2))", X, {}, lambda x: np.stack([x, x + 1])),
        ("DH-5.6-4", "a chain of matrix products, from left to right", "chain(x[i] for i in range(3))", numbers(3, 2, 2), {},
         lambda x: x[0] @ x[1] @ x[2]),
        ("DH-5.6-4", "a loop in a loop", "sum(sum(x * i * j for j in range(i + 1)) for i in range(3))", X, {}, lambda x: x * 7),
        ("DH-5.6-4", "subscripts", "x[0] + x[-1, 1:] [0]", X, {}, lambda x: x[0] + x[-1, 1]),
        ("DH-5.6-4", "slices, steps and dots", "x[..., ::2] + x[:, :2]", X, {}, lambda x: x[..., ::2] + x[:, :2]),
    ]  # fmt: skip
    return [(c, d, (e, x, t, f)) for c, d, e, x, t, f in rows]


RENAMED = {"x": "p", "a": "q", "b": "r"}
"""In the rows above, x, a and b are tensors; in documents, x and b are the host's."""


def renamed(text: str) -> str:
    return re.sub(r"\b[xab]\b", lambda m: RENAMED[m[0]], text)


def _case(clause: str | list[str], description: str, row: Row) -> dict[str, Any]:
    expression, x, tensors, f = row
    value = np.asarray(f(x, *tensors.values()))
    *steps, last = renamed(expression).split("\n")
    given = {RENAMED[n]: a for n, a in {"x": x, **tensors}.items()}
    # The bias of a host may have any length, so that every value fits, in a row.
    program = "\n".join([*steps, f"{last[: len(last) - len(last.lstrip())]}reshape({last.strip()}, (-1,))"])
    return {
        "description": description,
        "clause": clause,
        "document": document(program, given, "bias", hosts=["linear"]),
        "config": {},
        "host": {"family": "linear", "in": 3, "out": value.size, "bias": True},
        "port": "bias",
        "W": tensor(np.zeros((value.size, 3))),
        "b": tensor(np.zeros(value.size)),
        "tensors": {n: tensor(a) for n, a in given.items()},
        "valid": True,
        "expect": {"value": tensor(value.ravel())},
        "tolerance": 1e-5,
    }


def valid() -> list[dict[str, Any]]:
    """Every op of the table on a block, and the grammar."""
    rows = [*elementwise(), *axes(), *shapes(), *algebra(), *maps()]
    return [_case("DH-5.7-1", row[0], row) for row in rows] + [_case(c, d, row) for c, d, row in language()]
