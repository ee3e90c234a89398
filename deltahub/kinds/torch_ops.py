"""The operations in torch: plain functions of tensors, the only targets that a compiled equation may hold.

Each takes its operation's parameters in order, defaults filled in. Operations whose channel axis or number of weight
axes the compiler settles stand under their settled names (``linear_first`` …).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import einops
import torch
import torch.nn.functional as F
from torch import Tensor

from deltahub.kinds.map_ops import MAP_FUNCTIONS

__all__ = ["ACTIVATION_FUNCTIONS", "FUNCTIONS", "SETTLED", "TARGETS"]

Axes = int | tuple[int, ...]


def _host_apply(host: Any, x: Tensor, w: Tensor) -> Tensor:
    return host.deltahub_apply(x, w)  # type: ignore[no-any-return]


def _host_base(host: Any, x: Tensor) -> Tensor:
    return host.deltahub_base(x)  # type: ignore[no-any-return]


def _host_context(host: Any, name: str) -> Any:
    return host.deltahub_context(name)


def _host_weight(host: Any) -> Tensor:
    return host.deltahub_weight()  # type: ignore[no-any-return]


def _host_bias(host: Any) -> Tensor:
    return host.deltahub_bias()  # type: ignore[no-any-return]


def _no_bias(w: Tensor) -> Tensor:
    """The bias of a module that has none: zeros."""
    return w.new_zeros(w.shape[:1])


def _embedding_apply(x: Tensor, w: Tensor) -> Tensor:
    return F.embedding(x, w.T)


def _linear_first(h: Tensor, w: Tensor, bias: Tensor | None, spatial: int) -> Tensor:
    w = w.reshape(w.shape + (1,) * spatial)
    return (F.conv1d, F.conv2d, F.conv3d)[spatial - 1](h, w, bias)


def _channel_first(v: Tensor, spatial: int) -> Tensor:
    return v.reshape(v.shape + (1,) * spatial)


def _channel_last(v: Tensor) -> Tensor:
    return v


def _layer_norm_last(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def _layer_norm_first(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, spatial: int) -> Tensor:
    return _layer_norm_last(x.movedim(-1 - spatial, -1), weight, bias, eps).movedim(-1, -1 - spatial)


def _rms_norm_last(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return x if weight is None else x * weight


def _rms_norm_first(x: Tensor, weight: Tensor | None, eps: float, spatial: int) -> Tensor:
    return _rms_norm_last(x.movedim(-1 - spatial, -1), weight, eps).movedim(-1, -1 - spatial)


def _along(v: Tensor, trailing: int) -> Tensor:
    return v.reshape(v.shape + (1,) * trailing)


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b``; a matrix by something of more axes contracts its last axis with the other's first."""
    if a.ndim == 2 and b.ndim > 2:
        return torch.matmul(a, b.flatten(1)).reshape(a.shape[:1] + b.shape[1:])
    return torch.matmul(a, b)


def _add_matmul(a: Tensor, b: Tensor, c: Tensor, factor: float) -> Tensor:
    """``a + factor * b @ c``, for matrices of one dtype without the product in memory."""
    if a.ndim == b.ndim == c.ndim == 2 and a.dtype == b.dtype == c.dtype and a.shape == (b.shape[0], c.shape[1]):
        return torch.addmm(a, b, c, alpha=factor)
    return a + _matmul(b if factor == 1 else factor * b, c)


def _gelu_new(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def _float32(x: Tensor) -> Tensor:
    return x.to(torch.float32)


def _like(x: Tensor, y: Tensor) -> Tensor:
    return x.to(y.dtype)


def _norm(x: Tensor, axis: Axes, keep: bool) -> Tensor:  # noqa: FBT001
    result: Tensor = torch.linalg.vector_norm(x, 2, axis, keep)
    return result


def _rms(x: Tensor, axis: Axes, keep: bool) -> Tensor:  # noqa: FBT001
    return x.square().mean(axis, keep).sqrt()


def _normalize(x: Tensor, axis: Axes, eps: float) -> Tensor:
    return x / _norm(x, axis, True).clamp_min(eps)  # noqa: FBT003


def _shape(lengths: Axes) -> tuple[int, ...]:
    return lengths if isinstance(lengths, tuple) else (lengths,)


def _reshape(x: Tensor, shape: Axes) -> Tensor:
    return x.reshape(_shape(shape))


def _reshape_as(x: Tensor, y: Tensor) -> Tensor:
    return x.reshape(y.shape)


def _permute(x: Tensor, axes: Axes) -> Tensor:
    return x.permute(_shape(axes))


def _flip(x: Tensor, axes: Axes) -> Tensor:
    return torch.flip(x, _shape(axes))


def _pad(x: Tensor, widths: Axes, value: float) -> Tensor:
    return F.pad(x, _shape(widths), value=value)


def _size(x: Tensor, axis: int) -> int:
    return x.shape[axis]


def _einsum(xs: tuple[Tensor, ...], pattern: str) -> Tensor:
    result: Tensor = einops.einsum(*xs, pattern)  # type: ignore[call-overload]
    return result


def _zeros(shape: Axes, like: Tensor) -> Tensor:
    return like.new_zeros(_shape(shape))


def _ones(shape: Axes, like: Tensor) -> Tensor:
    return like.new_ones(_shape(shape))


def _eye(n: int, like: Tensor) -> Tensor:
    return torch.eye(n, dtype=like.dtype, device=like.device)


def _arange(n: int, like: Tensor) -> Tensor:
    return torch.arange(n, dtype=like.dtype, device=like.device)


def _diagonal(x: Tensor) -> Tensor:
    return x.diagonal(0, -2, -1)


def _block_diag(x: Tensor) -> Tensor:
    n, a, b = x.shape
    eye = torch.eye(n, dtype=x.dtype, device=x.device)
    return (eye[:, None, :, None] * x[:, :, None, :]).reshape(n * a, n * b)


def _skew(v: Tensor, n: int) -> Tensor:
    i, j = torch.triu_indices(n, n, 1, device=v.device)
    if v.shape[-1] != n * (n - 1) // 2:
        raise ValueError(f"skew({n}) needs {n * (n - 1) // 2} values, not {v.shape[-1]}")
    upper = v.new_zeros((*v.shape[:-1], n * n)).index_copy(-1, i * n + j, v)
    upper = upper.reshape(*v.shape[:-1], n, n)
    return upper - upper.mT


def _cayley(s: Tensor) -> Tensor:
    eye = torch.eye(s.shape[-1], dtype=s.dtype, device=s.device)
    result: Tensor = torch.linalg.solve(eye - s, eye + s)
    return result


def _circulant(c: Tensor) -> Tensor:
    n = c.shape[-1]
    i = torch.arange(n, device=c.device)
    return c[..., (i[:, None] - i[None, :]) % n]


def _ifft2_real(x: Tensor) -> Tensor:
    result: Tensor = torch.fft.ifft2(x).real
    return result


def _gather(x: Tensor, axis: int, index: Tensor) -> Tensor:
    return torch.gather(x, axis, index.long())


def _take(x: Tensor, index: Tensor, axis: int) -> Tensor:
    return torch.index_select(x, axis, index.long())


def _put(x: Tensor, index: Tensor, values: Tensor, axis: int) -> Tensor:
    return torch.index_copy(x, axis, index.long(), values.to(x.dtype))


def _scatter_add(x: Tensor, axis: int, index: Tensor, values: Tensor) -> Tensor:
    return torch.scatter_add(x, axis, index.long(), values.to(x.dtype))


def _embedding(index: Tensor, table: Tensor) -> Tensor:
    return F.embedding(index.long(), table)


def _avg_pool1d(x: Tensor, kernel: Axes, stride: Axes | None, padding: Axes, ceil: bool, count_pad: bool) -> Tensor:  # noqa: FBT001
    return F.avg_pool1d(x, kernel, kernel if stride is None else stride, padding, ceil, count_pad)


def _avg_pool2d(x: Tensor, kernel: Axes, stride: Axes | None, padding: Axes, ceil: bool, count_pad: bool) -> Tensor:  # noqa: FBT001
    return F.avg_pool2d(x, kernel, stride, padding, ceil, count_pad)


def _attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None, causal: bool) -> Tensor:  # noqa: FBT001
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)


def _identity(x: Tensor) -> Tensor:
    return x


ACTIVATION_FUNCTIONS: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {
        "elu": F.elu,
        "gelu": F.gelu,
        "gelu_new": _gelu_new,
        "hardswish": F.hardswish,
        "identity": _identity,
        "leaky_relu": F.leaky_relu,
        "mish": F.mish,
        "quick_gelu": _quick_gelu,
        "relu": torch.relu,
        "relu6": F.relu6,
        "selu": torch.selu,
        "sigmoid": torch.sigmoid,
        "silu": F.silu,
        "softplus": F.softplus,
        "swish": F.silu,
        "tanh": torch.tanh,
    }
)

SETTLED: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {
        "host_apply": _host_apply,
        "host_base": _host_base,
        "host_context": _host_context,
        "host_weight": _host_weight,
        "host_bias": _host_bias,
        "no_bias": _no_bias,
        "embedding_apply": _embedding_apply,
        "linear_last": F.linear,
        "linear_first": _linear_first,
        "channel_last": _channel_last,
        "channel_first": _channel_first,
        "layer_norm_last": _layer_norm_last,
        "layer_norm_first": _layer_norm_first,
        "rms_norm_last": _rms_norm_last,
        "rms_norm_first": _rms_norm_first,
        "along": _along,
        "matmul": _matmul,
        "add": operator.add,
        "sub": operator.sub,
        "mul": operator.mul,
        "div": operator.truediv,
        "floordiv": operator.floordiv,
        "pow": operator.pow,
        "neg": operator.neg,
        "index": operator.getitem,
        "add_scaled": torch.add,
        "sub_scaled": torch.sub,
        "add_matmul": _add_matmul,
    }
)
"""What the compiler emits for syntax, for the host, and for operations that depend on the host's layout."""

FUNCTIONS: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {
        **{name: f for name, f in ACTIVATION_FUNCTIONS.items() if name != "identity"},
        "exp": torch.exp,
        "log": torch.log,
        "sqrt": torch.sqrt,
        "rsqrt": torch.rsqrt,
        "square": torch.square,
        "abs": torch.abs,
        "sign": torch.sign,
        "sin": torch.sin,
        "cos": torch.cos,
        "round": torch.round,
        "floor": torch.floor,
        "float32": _float32,
        "stop_gradient": Tensor.detach,
        "zeros_like": torch.zeros_like,
        "ones_like": torch.ones_like,
        "sum": torch.sum,
        "mean": torch.mean,
        "amax": torch.amax,
        "amin": torch.amin,
        "norm": _norm,
        "rms": _rms,
        "clip": torch.clip,
        "minimum": torch.minimum,
        "maximum": torch.maximum,
        "like": _like,
        "softmax": torch.softmax,
        "log_softmax": torch.log_softmax,
        "normalize": _normalize,
        "cumsum": torch.cumsum,
        "group_norm": F.group_norm,
        "reshape": _reshape,
        "reshape_as": _reshape_as,
        "expand_as": Tensor.expand_as,
        "transpose": torch.transpose,
        "permute": _permute,
        "unsqueeze": torch.unsqueeze,
        "squeeze": torch.squeeze,
        "flatten": torch.flatten,
        "flip": _flip,
        "roll": torch.roll,
        "pad": _pad,
        "cat": torch.cat,
        "stack": torch.stack,
        "size": _size,
        "rearrange": einops.rearrange,
        "reduce": einops.reduce,
        "repeat": einops.repeat,
        "einsum": _einsum,
        "zeros": _zeros,
        "ones": _ones,
        "eye": _eye,
        "arange": _arange,
        "bmm": torch.matmul,
        "kron": torch.kron,
        "inverse": torch.linalg.inv,
        "solve": torch.linalg.solve,
        "diag": torch.diag_embed,
        "diagonal": _diagonal,
        "block_diag": _block_diag,
        "tril": torch.tril,
        "triu": torch.triu,
        "skew": _skew,
        "cayley": _cayley,
        "circulant": _circulant,
        "ifft2_real": _ifft2_real,
        "gather": _gather,
        "take": _take,
        "put": _put,
        "scatter_add": _scatter_add,
        "embedding": _embedding,
        "conv1d": F.conv1d,
        "conv2d": F.conv2d,
        "conv3d": F.conv3d,
        "avg_pool1d": _avg_pool1d,
        "avg_pool2d": _avg_pool2d,
        "adaptive_avg_pool1d": F.adaptive_avg_pool1d,
        "adaptive_avg_pool2d": F.adaptive_avg_pool2d,
        "attention": _attention,
        **MAP_FUNCTIONS,
    }
)
"""Operations that mean the same on every host, by name."""

TARGETS = frozenset(FUNCTIONS.values()) | frozenset(SETTLED.values()) | frozenset(ACTIVATION_FUNCTIONS.values())
"""Every function that a compiled graph may call; a graph that holds another is refused."""
