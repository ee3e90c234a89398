"""How fresh tensors start. Random numbers are drawn on the generator's device, so a seed means the same everywhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from deltahub.errors import KindError
from deltahub.kinds.compile import build
from deltahub.kinds.host_shape import HostShape
from deltahub.kinds.layout import TensorSpec

__all__ = ["initial"]

Draw = Callable[..., Tensor]


def _fans(shape: tuple[int, ...]) -> tuple[int, int]:
    """Inputs and outputs of one unit, as torch counts them: everything behind the second axis is a window."""
    if len(shape) < 2:
        return (shape[0] if shape else 1,) * 2
    window = math.prod(shape[2:])
    return shape[1] * window, shape[0] * window


def _uniform(shape: tuple[int, ...], g: torch.Generator, bound: float) -> Tensor:
    return torch.empty(shape, device=g.device).uniform_(-bound, bound, generator=g)


def _normal(shape: tuple[int, ...], g: torch.Generator, std: float) -> Tensor:
    return torch.empty(shape, device=g.device).normal_(0.0, std, generator=g)


def _kaiming_uniform(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    return _uniform(shape, g, 1.0 / math.sqrt(_fans(shape)[0]))


def _xavier_uniform(shape: tuple[int, ...], g: torch.Generator, gain: float = 1.0) -> Tensor:
    return _uniform(shape, g, gain * math.sqrt(6.0 / sum(_fans(shape))))


def _xavier_normal(shape: tuple[int, ...], g: torch.Generator, gain: float = 1.0) -> Tensor:
    return _normal(shape, g, gain * math.sqrt(2.0 / sum(_fans(shape))))


def _orthogonal(shape: tuple[int, ...], g: torch.Generator, gain: float = 1.0) -> Tensor:
    rows, columns = shape[0], math.prod(shape[1:])
    q, r = torch.linalg.qr(_normal((max(rows, columns), min(rows, columns)), g, 1.0))
    q = q * r.diagonal().sign()  # makes the decomposition unique, and the distribution uniform
    value: Tensor = gain * (q if rows >= columns else q.T).reshape(shape)
    return value


def _eye(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    return torch.eye(*shape[-2:], device=g.device).expand(shape)


def _indices(shape: tuple[int, ...], g: torch.Generator, bound: float) -> Tensor:
    """Distinct whole numbers below a bound, in random order."""
    count = math.prod(shape)
    if bound < count:
        raise ValueError(f"{count} distinct indices below {int(bound)} do not exist")
    if bound <= 4 * count:
        return torch.randperm(int(bound), generator=g, device=g.device)[:count].reshape(shape)
    # Far fewer than there are: draw and drop repeats, so that no list of all of them is made.
    found = torch.empty(0, dtype=torch.int64, device=g.device)
    while len(found) < count:
        found = torch.cat([found, torch.randint(int(bound), (2 * count,), generator=g, device=g.device)])
        found = torch.unique(found)
    return found[torch.randperm(len(found), generator=g, device=g.device)[:count]].reshape(shape)


def _paired(shape: tuple[int, ...], g: torch.Generator, std: float) -> Tensor:
    """Columns that come in equal pairs; the last of an odd number is alone."""
    half = _normal((*shape[:-1], (shape[-1] + 1) // 2), g, std)
    return half.repeat_interleave(2, -1)[..., : shape[-1]]


_DRAWS: Mapping[str, Draw] = {
    "zeros": lambda shape, g: torch.zeros(shape, device=g.device),
    "ones": lambda shape, g: torch.ones(shape, device=g.device),
    "constant": lambda shape, g, value: torch.full(shape, float(value), device=g.device),
    "normal": _normal,
    "uniform": _uniform,
    "kaiming_uniform": _kaiming_uniform,
    "xavier_uniform": _xavier_uniform,
    "xavier_normal": _xavier_normal,
    "orthogonal": _orthogonal,
    "eye": _eye,
    "indices": _indices,
    "paired": _paired,
}
_FRESH = frozenset({"ones", "normal", "uniform", "kaiming_uniform", "xavier_uniform", "xavier_normal"})
"""Draws that are contiguous, of the asked shape, and in nobody else's memory."""


def _same(value: Tensor, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape itself, if the value has it: nothing is broadcast into a tensor that is stored."""
    if tuple(value.shape) != shape:
        raise ValueError(f"it gives the shape {list(value.shape)}")
    return shape


def _check_bound(spec: TensorSpec, dtype: torch.dtype) -> None:
    if spec.init == "indices" and not dtype.is_floating_point and spec.arguments[0] - 1 > torch.iinfo(dtype).max:
        raise ValueError(f"{dtype} does not hold indices up to {int(spec.arguments[0]) - 1}")


def _copied(spec: TensorSpec, W: Tensor | None, b: Tensor | None) -> Tensor:
    if spec.init == "bias" and b is None:
        return torch.zeros(spec.shape)
    source = W if spec.init == "weight" else b
    if source is None:
        raise ValueError("there is no weight to copy")
    return source.detach()


def _singular(spec: TensorSpec, W: Tensor | None) -> Tensor:
    """The first singular vectors of the weight: those of the inputs, or those of the outputs times the values."""
    if W is None:
        raise ValueError("there is no weight to decompose")
    u, s, v = torch.linalg.svd(W.detach().float().flatten(1), full_matrices=False)
    rank = spec.shape[0] if spec.init == "singular_in" else spec.shape[-1]
    if rank > len(s):
        raise ValueError(f"the weight has {len(s)} singular values")
    # The sign that a decomposition leaves open: the largest entry of every output vector is positive.
    sign = u.gather(0, u.abs().argmax(0, keepdim=True)).sign()[0, :rank]
    value: Tensor = sign[:, None] * v[:rank] if spec.init == "singular_in" else u[:, :rank] * (sign * s[:rank])
    return value


def _evaluated(spec: TensorSpec, W: Tensor | None, b: Tensor | None) -> Tensor:
    assert spec.expression is not None
    if W is None:
        raise ValueError("there is no weight to start from")
    # The canonical weight alone tells all that such an expression may ask of a host.
    family: Any = "norm" if W.ndim == 1 else "conv" if W.ndim > 2 else "linear"
    d_in = W.shape[1] if W.ndim > 1 else None
    shape = HostShape(family=family, d_in=d_in, d_out=W.shape[0], kernel=tuple(W.shape[2:]), bias=b is not None)
    built = build(
        spec.expression,
        inputs=("host", "W", "b"),
        tensors=(),
        absent=frozenset(),
        values=dict(spec.values),
        shape=shape,
        live=False,
    )
    value: Tensor = built.fn(None, W.detach().float(), None if b is None else b.detach().float())
    return value


def initial(
    spec: TensorSpec,
    generator: torch.Generator,
    *,
    W: Tensor | None,
    b: Tensor | None,
    dtype: torch.dtype,
    device: torch.device | str | None,
) -> Tensor:
    """A fresh tensor of its own memory.

    Raises:
        KindError: ``E_KIND_INIT`` if its initialiser cannot give a tensor of this shape on this host.
    """
    fixed = dtype if spec.dtype == "float" else getattr(torch, spec.dtype)
    try:
        if spec.init == "zeros":  # half of all fresh tensors: made where and as they are wanted, not cast
            return torch.zeros(spec.shape, dtype=fixed, device=generator.device if device is None else device)
        if spec.init in _FRESH and fixed is torch.get_default_dtype() and device in {None, generator.device}:
            return _DRAWS[spec.init](spec.shape, generator, *spec.arguments)
        with torch.no_grad():
            if spec.init in {"weight", "bias"}:
                value = _copied(spec, W, b)
            elif spec.init in {"singular_in", "singular_out"}:
                value = _singular(spec, W)
            elif spec.init == "expression":
                value = _evaluated(spec, W, b)
            else:
                value = _DRAWS[spec.init](spec.shape, generator, *spec.arguments)
            value = value.reshape(_same(value, spec.shape))
            _check_bound(spec, fixed)
            where = value.device if device is None else torch.device(device)
            return value.to(device=where, dtype=fixed, copy=True, memory_format=torch.contiguous_format)
    except (ValueError, RuntimeError, TypeError) as error:
        raise KindError(
            "E_KIND_INIT",
            f"initialiser {spec.init!r} cannot fill a tensor of shape {list(spec.shape)}: {error}",
            hint="another initialiser, or another target",
        ) from None
