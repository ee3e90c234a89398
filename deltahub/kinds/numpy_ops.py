"""The operations in NumPy: what each of them means, written for reading, independent of torch.

Convolutions, pooling and attention are spelled out by their definitions; nothing here is meant to be fast.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from itertools import product
from types import MappingProxyType
from typing import Any

import einops
import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

__all__ = ["ACTIVATION_TWINS", "TWINS", "convolve", "matmul"]

Array = Any
"""An array of NumPy, whose stubs lose the type in most of what follows."""

Axes = int | tuple[int, ...]

_erf = np.vectorize(math.erf, otypes=[np.float64])


def _typed(value: Array, like: Array) -> Array:
    """A result in the floating type of what it was made from; ``math`` and NumPy compute in double precision."""
    return value.astype(like.dtype) if like.dtype.kind == "f" else value


def _sigmoid(x: Array) -> Array:
    return _typed(1.0 / (1.0 + np.exp(-x)), x)


def _softplus(x: Array) -> Array:
    return _typed(np.logaddexp(x, 0.0), x)


def _elu(x: Array, alpha: float = 1.0) -> Array:
    return _typed(np.where(x > 0, x, alpha * np.expm1(np.minimum(x, 0))), x)


def _gelu(x: Array) -> Array:
    return _typed(x * 0.5 * (1.0 + _erf(x / math.sqrt(2.0))), x)


def _gelu_new(x: Array) -> Array:
    return _typed(0.5 * x * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3))), x)


def _silu(x: Array) -> Array:
    return x * _sigmoid(x)


def _relu6(x: Array) -> Array:
    return np.clip(x, 0, 6)


def _leaky_relu(x: Array, slope: float = 0.01) -> Array:
    return _typed(np.where(x > 0, x, slope * x), x)


def _selu(x: Array) -> Array:
    return _typed(1.0507009873554805 * _elu(x, 1.6732632423543772), x)


ACTIVATION_TWINS: Mapping[str, Callable[..., Array]] = MappingProxyType(
    {
        "elu": _elu,
        "gelu": _gelu,
        "gelu_new": _gelu_new,
        "hardswish": lambda x: _typed(x * _relu6(x + 3) / 6, x),
        "identity": lambda x: x,
        "leaky_relu": _leaky_relu,
        "mish": lambda x: x * np.tanh(_softplus(x)),
        "quick_gelu": lambda x: _typed(x / (1.0 + np.exp(-1.702 * x)), x),
        "relu": lambda x: np.maximum(x, 0),
        "relu6": _relu6,
        "selu": _selu,
        "sigmoid": _sigmoid,
        "silu": _silu,
        "softplus": _softplus,
        "swish": _silu,
        "tanh": np.tanh,
    }
)


def matmul(a: Array, b: Array) -> Array:
    """``a @ b``; a matrix by something of more axes contracts its last axis with the other's first."""
    return np.tensordot(a, b, 1) if a.ndim == 2 and b.ndim > 2 else np.matmul(a, b)


def _softmax(x: Array, axis: int) -> Array:
    e = np.exp(x - x.max(axis=axis, keepdims=True))
    return e / e.sum(axis=axis, keepdims=True)


def _log_softmax(x: Array, axis: int) -> Array:
    shifted = x - x.max(axis=axis, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=axis, keepdims=True))


def _norm(x: Array, axis: Axes, keep: bool = False) -> Array:  # noqa: FBT001, FBT002
    return np.sqrt(np.square(x).sum(axis=axis, keepdims=keep))


def _standard(x: Array, axes: tuple[int, ...], eps: float) -> Array:
    mean = x.mean(axis=axes, keepdims=True)
    return _typed((x - mean) / np.sqrt(x.var(axis=axes, keepdims=True) + eps), x)


def _group_norm(x: Array, groups: int, weight: Array | None, bias: Array | None, eps: float) -> Array:
    parts = x.reshape(x.shape[0], groups, -1)
    y = _standard(parts, (2,), eps).reshape(x.shape)
    by_channel = (1, -1) + (1,) * (x.ndim - 2)
    y = y if weight is None else y * weight.reshape(by_channel)
    return y if bias is None else y + bias.reshape(by_channel)


def _flatten(x: Array, start: int, end: int) -> Array:
    start, end = start % x.ndim, end % x.ndim
    return x.reshape((*x.shape[:start], math.prod(x.shape[start : end + 1]), *x.shape[end + 1 :]))


def _permute(x: Array, axes: Axes) -> Array:
    return np.transpose(x, axes if isinstance(axes, tuple) else (axes,))


def _pad(x: Array, widths: tuple[int, ...], value: float) -> Array:
    pairs = [(0, 0)] * x.ndim
    for i in range(len(widths) // 2):
        pairs[x.ndim - 1 - i] = (widths[2 * i], widths[2 * i + 1])
    return np.pad(x, pairs, constant_values=value)


def _diag(v: Array) -> Array:
    return v[..., None] * np.eye(v.shape[-1], dtype=v.dtype)


def _block_diag(x: Array) -> Array:
    n, a, b = x.shape
    out = np.zeros((n * a, n * b), x.dtype)
    for i in range(n):
        out[i * a : (i + 1) * a, i * b : (i + 1) * b] = x[i]
    return out


def _skew(v: Array, n: int) -> Array:
    upper = np.zeros((*v.shape[:-1], n, n), v.dtype)
    i, j = np.triu_indices(n, 1)
    upper[..., i, j] = v
    return upper - np.swapaxes(upper, -1, -2)


def _cayley(s: Array) -> Array:
    eye = np.eye(s.shape[-1], dtype=s.dtype)
    return np.linalg.inv(eye - s) @ (eye + s)


def _circulant(c: Array) -> Array:
    return np.stack([np.roll(c, j, axis=-1) for j in range(c.shape[-1])], axis=-1)


def _put(x: Array, index: Array, values: Array, axis: int) -> Array:
    out = np.moveaxis(x.copy(), axis, 0)
    out[index] = np.moveaxis(values, axis, 0)
    return np.moveaxis(out, 0, axis)


def _scatter_add(x: Array, axis: int, index: Array, values: Array) -> Array:
    out = x.copy()
    for at in np.ndindex(*index.shape):
        to = list(at)
        to[axis] = index[at]
        out[tuple(to)] += values[at]
    return out


def _each(value: Axes, n: int) -> tuple[int, ...]:
    return value if isinstance(value, tuple) else (value,) * n


def convolve(
    x: Array, weight: Array, bias: Array | None, stride: Axes, padding: Axes, dilation: Axes, groups: int
) -> Array:
    """Cross-correlation of ``[batch, channels, …]`` by its definition, for any number of spatial axes."""
    n = weight.ndim - 2
    strides, dilations = _each(stride, n), _each(dilation, n)
    x = np.pad(x, [(0, 0), (0, 0), *((p, p) for p in _each(padding, n))])
    reach = [d * (k - 1) + 1 for d, k in zip(dilations, weight.shape[2:], strict=True)]
    windows: Array = sliding_window_view(x, reach, axis=tuple(range(2, 2 + n)))
    windows = windows[(slice(None), slice(None), *(slice(None, None, s) for s in strides))]
    windows = windows[(..., *(slice(None, None, d) for d in dilations))]
    outputs = []
    for w, part in zip(np.split(weight, groups), np.split(windows, groups, axis=1), strict=True):
        inner = [1, *range(2 + n, 2 + 2 * n)]
        y = np.tensordot(part, w, axes=(inner, list(range(1, 2 + n))))
        outputs.append(np.moveaxis(y, -1, 1))
    y = np.concatenate(outputs, axis=1)
    return y if bias is None else y + bias.reshape((-1,) + (1,) * n)


def _avg_pool(
    x: Array, kernel: Axes, stride: Axes | None, padding: Axes, ceil: bool, count_pad: bool, n: int  # noqa: FBT001
) -> Array:  # fmt: skip
    kernels, pads = _each(kernel, n), _each(padding, n)
    strides = kernels if stride is None else _each(stride, n)
    lengths = []
    for size, k, s, p in zip(x.shape[-n:], kernels, strides, pads, strict=True):
        count = (size + 2 * p - k + (s - 1 if ceil else 0)) // s + 1
        # A window that would start in the padding behind the end is left out.
        lengths.append(count - 1 if ceil and (count - 1) * s >= size + p else count)
    out: Array = np.empty((*x.shape[:-n], *lengths), x.dtype)
    for at in product(*map(range, lengths)):
        where: list[slice] = []
        divisor = 1
        for i, size, k, s, p in zip(at, x.shape[-n:], kernels, strides, pads, strict=True):
            start, end = i * s - p, min(i * s - p + k, size + p)
            inside = slice(max(start, 0), min(end, size))
            where.append(inside)
            divisor *= end - start if count_pad else min(end, size) - max(start, 0)
        out[(..., *at)] = x[(..., *where)].sum(axis=tuple(range(-n, 0))) / divisor
    return out


def _adaptive_avg_pool(x: Array, size: Axes, n: int) -> Array:
    lengths = _each(size, n)
    out: Array = np.empty((*x.shape[:-n], *lengths), x.dtype)
    for at in product(*map(range, lengths)):
        spans = zip(at, x.shape[-n:], lengths, strict=True)
        where = [slice(i * full // to, -(-(i + 1) * full // to)) for i, full, to in spans]
        out[(..., *at)] = x[(..., *where)].mean(axis=tuple(range(-n, 0)))
    return out


def _interpolate(x: Array, size: Axes, mode: str) -> Array:
    for axis, to in zip((-2, -1), _each(size, 2), strict=True):
        full = x.shape[axis]
        if mode == "nearest":
            x = np.take(x, np.floor(np.arange(to) * (full / to)).astype(int), axis=axis)
            continue
        at = np.clip((np.arange(to) + 0.5) * full / to - 0.5, 0, None)
        low = np.minimum(np.floor(at).astype(int), full - 1)
        high = np.minimum(low + 1, full - 1)
        share = (at - low).astype(x.dtype).reshape((-1, 1) if axis == -2 else (-1,))
        x = np.take(x, low, axis=axis) * (1 - share) + np.take(x, high, axis=axis) * share
    return x


def _shrink2d(x: Array, by: int, how: str) -> Array:
    if how == "avg":
        return _avg_pool(x, by, by, 0, True, False, 2)  # noqa: FBT003
    return _adaptive_avg_pool(x, (max(1, x.shape[-2] // by), max(1, x.shape[-1] // by)), 2)


def _depthwise2d(x: Array, weight: Array, bias: Array | None) -> Array:
    return convolve(x, weight, bias, 1, weight.shape[-1] // 2, 1, weight.shape[0])


def _gated(x: Array, how: str, axis: int) -> Array:
    a, b = np.split(x, 2, axis)
    return a * (_sigmoid(b) if how == "sigmoid" else b)


def _attention(q: Array, k: Array, v: Array, scale: float | None, causal: bool) -> Array:  # noqa: FBT001
    scores = q @ np.swapaxes(k, -1, -2) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if causal:
        scores = np.where(np.tri(*scores.shape[-2:]) > 0, scores, -np.inf)
    return _typed(_softmax(scores, -1) @ v, v)


def _reduced(function: Callable[..., Array]) -> Callable[..., Array]:
    return lambda x, axis, keep: function(x, axis=axis, keepdims=keep)


TWINS: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {
        **{name: f for name, f in ACTIVATION_TWINS.items() if name != "identity"},
        "exp": np.exp,
        "log": np.log,
        "sqrt": np.sqrt,
        "rsqrt": lambda x: _typed(1 / np.sqrt(x), x),
        "square": np.square,
        "abs": np.abs,
        "sign": np.sign,
        "sin": np.sin,
        "cos": np.cos,
        "round": np.round,
        "floor": np.floor,
        "float32": lambda x: x.astype(np.float32),
        "stop_gradient": lambda x: x,
        "zeros_like": np.zeros_like,
        "ones_like": np.ones_like,
        "sum": _reduced(np.sum),
        "mean": _reduced(np.mean),
        "amax": _reduced(np.max),
        "amin": _reduced(np.min),
        "norm": _norm,
        "rms": lambda x, axis, keep: np.sqrt(np.square(x).mean(axis=axis, keepdims=keep)),
        "clip": np.clip,
        "minimum": np.minimum,
        "maximum": np.maximum,
        "like": lambda x, y: x.astype(y.dtype),
        "softmax": _softmax,
        "log_softmax": _log_softmax,
        "normalize": lambda x, axis, eps: x / np.maximum(_norm(x, axis, True), eps),  # noqa: FBT003
        "cumsum": np.cumsum,
        "group_norm": _group_norm,
        "reshape": np.reshape,
        "reshape_as": lambda x, y: x.reshape(y.shape),
        "expand_as": lambda x, y: np.broadcast_to(x, y.shape),
        "transpose": np.swapaxes,
        "permute": _permute,
        "unsqueeze": np.expand_dims,
        "squeeze": np.squeeze,
        "flatten": _flatten,
        "flip": np.flip,
        "roll": np.roll,
        "pad": _pad,
        "cat": np.concatenate,
        "stack": np.stack,
        "size": lambda x, axis: x.shape[axis],
        "rearrange": einops.rearrange,
        "reduce": einops.reduce,
        "repeat": einops.repeat,
        "einsum": lambda xs, pattern: einops.einsum(*xs, pattern),  # type: ignore[call-overload]
        "zeros": lambda shape, like: np.zeros(shape, like.dtype),
        "ones": lambda shape, like: np.ones(shape, like.dtype),
        "eye": lambda n, like: np.eye(n, dtype=like.dtype),
        "arange": lambda n, like: np.arange(n, dtype=like.dtype),
        "bmm": np.matmul,
        "kron": np.kron,
        "inverse": np.linalg.inv,
        "solve": lambda a, b: np.linalg.inv(a) @ b,
        "diag": _diag,
        "diagonal": lambda x: np.diagonal(x, axis1=-2, axis2=-1),
        "block_diag": _block_diag,
        "tril": np.tril,
        "triu": np.triu,
        "skew": _skew,
        "cayley": _cayley,
        "circulant": _circulant,
        "ifft2_real": lambda x: _typed(np.fft.ifft2(x).real, x),
        "gather": lambda x, axis, index: np.take_along_axis(x, index, axis),
        "take": np.take,
        "put": _put,
        "scatter_add": _scatter_add,
        "embedding": lambda index, table: table[index],
        "conv1d": convolve,
        "conv2d": convolve,
        "conv3d": convolve,
        "avg_pool1d": partial(_avg_pool, n=1),
        "avg_pool2d": partial(_avg_pool, n=2),
        "adaptive_avg_pool1d": lambda x, size: _adaptive_avg_pool(x, size, 1),
        "adaptive_avg_pool2d": lambda x, size: _adaptive_avg_pool(x, size, 2),
        "interpolate": _interpolate,
        "shrink2d": _shrink2d,
        "grow2d": lambda x, by, size: x if by == 1 else _interpolate(x, size, "bilinear"),
        "depthwise2d": _depthwise2d,
        "gated": _gated,
        "attention": _attention,
    }
)
"""Operations that mean the same on every host, by name."""
