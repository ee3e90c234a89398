"""How fresh tensors start. Random numbers are drawn on the generator's device, so a seed means the same everywhere.

Uniform numbers are most of what a fresh delta costs, and torch draws them one by one. On a CPU they come from a stream
of NumPy's SFC64 instead, a third of the time, seeded by one number from torch's generator: a seed still decides every
tensor, and what torch draws afterwards. Sixteen bits make a number of sixteen bits, thirty-two any other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deltahub.errors import KindError
from deltahub.kinds.compile import build
from deltahub.kinds.host_shape import HostShape
from deltahub.kinds.layout import TensorSpec

__all__ = ["Draws", "initial"]

Draw = Callable[..., Tensor]

_PIECE = 1 << 16
"""Numbers that are drawn at once, so that their bits stay in the processor's cache."""


class Draws:
    """Where the fresh tensors of one delta get their random numbers: a generator, and a stream seeded by it."""

    __slots__ = ("_bits", "generator")

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator
        self._bits: np.random.SFC64 | None = None

    def uniform(self, shape: tuple[int, ...], bound: float, dtype: torch.dtype) -> Tensor:
        """Numbers between ``-bound`` and ``bound``, of the generator's device."""
        if self.generator.device.type != "cpu":
            return torch.empty(shape, device=self.generator.device, dtype=dtype).uniform_(
                -bound, bound, generator=self.generator
            )
        count, width = math.prod(shape), 2 if dtype.itemsize == 2 else 4
        wide, factor = torch.float64 if dtype == torch.float64 else torch.float32, bound / 2 ** (8 * width - 1)
        if count <= _PIECE:
            drawn = self._signed(count, width).to(wide).mul_(factor).view(shape)
            return drawn if dtype is wide else drawn.to(dtype)
        value = torch.empty(count, dtype=dtype)
        for at in range(0, count, _PIECE):
            piece = value[at : at + _PIECE]
            piece.copy_(self._signed(len(piece), width).to(wide).mul_(factor))
        return value.view(shape)

    def _signed(self, count: int, width: int) -> Tensor:
        """Whole numbers of ``width`` bytes, all of them equally likely."""
        if self._bits is None:
            self._bits = np.random.SFC64(int(torch.randint(2**63 - 1, (), generator=self.generator)))
        bits = self._bits.random_raw(-(-count * width // 8)).view(f"i{width}")
        return torch.from_numpy(bits if len(bits) == count else bits[:count])


def _fans(shape: tuple[int, ...]) -> tuple[int, int]:
    """Inputs and outputs of one unit, as torch counts them: everything behind the second axis is a window."""
    if len(shape) < 2:
        return (shape[0] if shape else 1,) * 2
    window = math.prod(shape[2:])
    return shape[1] * window, shape[0] * window


def _normal(shape: tuple[int, ...], g: torch.Generator, std: float) -> Tensor:
    return torch.empty(shape, device=g.device).normal_(0.0, std, generator=g)


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
    "xavier_normal": _xavier_normal,
    "orthogonal": _orthogonal,
    "eye": _eye,
    "indices": _indices,
    "paired": _paired,
}
_BOUNDS: Mapping[str, Callable[..., float]] = {
    "uniform": lambda shape, bound: bound,
    "kaiming_uniform": lambda shape: 1.0 / math.sqrt(_fans(shape)[0]),
    "xavier_uniform": lambda shape, gain=1.0: gain * math.sqrt(6.0 / sum(_fans(shape))),
}
"""The largest number of each uniform initialiser."""

_FRESH = frozenset({"ones", "normal", "xavier_normal"})
"""Draws that are contiguous, of the asked shape, and in nobody else's memory."""


_ANYWHERE = frozenset(_DRAWS) - {"eye", "indices", "orthogonal"} | frozenset(_BOUNDS)
"""Initialisers that fill any shape."""


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
    generator: torch.Generator | Draws,
    *,
    W: Tensor | None,
    b: Tensor | None,
    dtype: torch.dtype,
    device: torch.device | str | None,
) -> Tensor:
    """A fresh tensor of its own memory; on ``meta`` nothing is drawn for it.

    Raises:
        KindError: ``E_KIND_INIT`` if its initialiser cannot give a tensor of this shape on this host.
    """
    fixed = dtype if spec.dtype == "float" else getattr(torch, spec.dtype)
    draws = generator if isinstance(generator, Draws) else Draws(generator)
    generator = draws.generator
    try:
        if device is not None and torch.device(device).type == "meta" and spec.init in _ANYWHERE:
            return torch.empty(spec.shape, dtype=fixed, device="meta")
        if spec.init == "zeros":  # half of all fresh tensors: made where and as they are wanted, not cast
            return torch.zeros(spec.shape, dtype=fixed, device=generator.device if device is None else device)
        if spec.init in _BOUNDS:
            value = draws.uniform(spec.shape, _BOUNDS[spec.init](spec.shape, *spec.arguments), fixed)
            return value if device is None or value.device == device else value.to(device)
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
