"""A trial run of a compiled equation on the meta device: sizes and shapes are known before any memory is taken."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from deltahub.errors import KindError
from deltahub.kinds.document import LIVE_PORTS
from deltahub.kinds.host_shape import HostShape
from deltahub.kinds.layout import TensorSpec
from deltahub.kinds.tree import Place

__all__ = ["check"]

MERGED_FLOOR, MERGED_GROWTH = 2**26, 8
"""An intermediate result of a merged form may have so many elements, or so many times those of weight and tensors."""
LIVE_FLOOR, LIVE_GROWTH = 2**20, 32
"""One of a live form may have so many, so many times those of the activations, and a merged form's beyond its floor."""
TOTAL = 16
"""All intermediate results together, in units of the largest allowed one."""

_WIDTH = 48
"""Stands for a width that neither the host nor the tensors tell."""
_ROWS, _GRID, _TAPS = 4, (4, 6), 16


class _Meta:
    """A host for the trial run: it has shapes and nothing else."""

    def __init__(self, shape: HostShape) -> None:
        self.shape = shape
        inner = shape.d_in if shape.family != "norm" else shape.d_out
        width = inner or shape.d_out or _WIDTH
        outer = shape.d_out or shape.d_in or _WIDTH
        groups = 2 if shape.grouped and shape.family == "conv" else 1
        self.outer = outer
        if shape.family == "embedding":
            self.x = torch.empty(_ROWS, prod(_GRID), dtype=torch.int64, device="meta")
        else:
            self.x = self.map(width * groups, 15)
        one = all(k == 1 for k in shape.kernel)
        self.y = self.map(outer, 15 if one else 13)
        weight = shape.weight_shape
        self.W = None if weight is None else torch.empty(weight, device="meta", dtype=torch.float32)
        self.scores = torch.empty(_ROWS, 2, 24, 24, device="meta", dtype=torch.float32)
        self.b = torch.empty(outer, device="meta", dtype=torch.float32) if shape.bias else None

    def map(self, channels: int, length: int) -> Tensor:
        """Activations: positions then channels, or channels then positions."""
        if self.shape.channels_first:
            return torch.empty(
                _ROWS, channels, *(length + i for i in range(self.shape.spatial)), device="meta", dtype=torch.float32
            )
        return torch.empty(_ROWS, prod(_GRID), channels, device="meta", dtype=torch.float32)

    def deltahub_apply(self, x: Tensor, w: Tensor) -> Tensor:
        family = self.shape.family
        if family == "linear":
            return torch.nn.functional.linear(x, w)
        if family == "embedding":
            return torch.nn.functional.embedding(x, w.T)
        if family == "conv":
            assert self.W is not None
            if w.shape[1:] != self.W.shape[1:] or x.shape[1] != self.x.shape[1]:
                raise ValueError(f"the host takes weights [any, {', '.join(map(str, self.W.shape[1:]))}]")
            return torch.empty(x.shape[0], w.shape[0], *self.y.shape[2:], device="meta", dtype=torch.float32)
        if family == "norm" and w.shape == (self.shape.d_out,):
            return torch.empty_like(x)
        raise ValueError(f"a {family} cannot be applied with this weight")

    def deltahub_base(self, x: Tensor) -> Tensor:
        if x.shape[1:] != self.x.shape[1:]:
            raise ValueError("the module was given an input of another shape")
        return torch.empty(x.shape[0], *self.y.shape[1:], device="meta", dtype=torch.float32)

    def deltahub_weight(self) -> Tensor | None:
        return self.W

    def deltahub_bias(self) -> Tensor | None:
        return self.b

    def deltahub_context(self, name: str) -> object:
        return {"grid": _GRID, "group": 2, "taps": (self.y,) * _TAPS}[name]

    def given(self, name: str) -> object:
        return self if name == "host" else getattr(self, name)

    def expected(self, port: str) -> Sequence[int | None]:
        """The shape that a port's value must have; ``None`` stands for any length."""
        if port in {"kv", "past"}:
            return (2, None, self.outer)
        if port == "prompt":
            return (None, self.outer)
        if port == "scores":
            return self.scores.shape
        if port == "weight":
            assert self.W is not None
            return self.W.shape
        if port == "bias":
            return torch.Size([self.y.shape[-1] if self.shape.d_out is None else self.shape.d_out])
        return self.x.shape if port == "input" else self.y.shape


def check(
    graph: fx.Graph,
    *,
    port: str,
    inputs: tuple[str, ...],
    specs: Mapping[str, TensorSpec],
    shape: HostShape,
    place: Place,
) -> None:
    """Run a graph on the meta device and look at every intermediate result.

    Raises:
        KindError: ``E_KIND_SHAPE`` if an operation does not fit its arguments, or the value has another shape than its
            port's; ``E_KIND_LIMIT`` if a result would be too large.
    """
    host = _Meta(shape)
    arguments: list[object] = [host.given(name) for name in inputs]
    arguments += [torch.empty(s.shape, dtype=_dtype(s.dtype), device="meta") for s in specs.values()]
    limit = MERGED_GROWTH * (sum(prod(s.shape) for s in specs.values()) + shape.weight_size)
    if port in LIVE_PORTS:
        limit += LIVE_FLOOR + LIVE_GROWTH * (host.x.numel() + host.y.numel())
    else:
        limit = max(limit, MERGED_FLOOR)
    remaining = iter(arguments)
    total = 0
    environment: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            environment[node] = next(remaining)
        elif node.op == "output":
            result = fx.node.map_arg(node.args[0], environment.__getitem__)
        else:
            value = environment[node] = _run(node, environment)
            size = value.numel() if isinstance(value, Tensor) else 0
            total += size
            if size > limit or total > TOTAL * limit:
                at: Place = node.meta["place"]
                raise at.error("E_KIND_LIMIT", f"the result would have {size} elements; at most {limit} are allowed")
    expected = host.expected(port)
    if port in {"kv", "past"} and isinstance(result, Tensor) and result.ndim > len(expected):
        expected = (2, _ROWS, None, host.outer)  # keys and values of each row
    if not isinstance(result, Tensor) or not _agree(result.shape, expected):
        found = list(result.shape) if isinstance(result, Tensor) else type(result).__name__
        shown = [length if length is not None else "any" for length in expected]
        error = place.error("E_KIND_SHAPE", f"the value of {port!r} must have the shape {shown}, not {found}")
        raise error


def _agree(found: Sequence[int], expected: Sequence[int | None]) -> bool:
    return len(found) == len(expected) and all(e is None or e == f for f, e in zip(found, expected, strict=True))


def _run(node: fx.Node, environment: Mapping[fx.Node, Any]) -> Any:
    args = fx.node.map_arg(node.args, environment.__getitem__)
    kwargs = fx.node.map_arg(node.kwargs, environment.__getitem__)
    assert callable(node.target)
    try:
        return node.target(*args, **kwargs)
    except KindError:
        raise
    except Exception as error:  # whatever torch or einops says of shapes, it is the document that is wrong
        place: Place = node.meta["place"]
        shapes = [list(a.shape) for a in args if isinstance(a, Tensor)]
        reason = str(error).strip().split("\n")[0]
        raise place.error("E_KIND_SHAPE", f"the operation does not fit its arguments {shapes}: {reason}") from None


def _dtype(name: str) -> torch.dtype:
    dtype: torch.dtype = torch.float32 if name == "float" else getattr(torch, name)
    return dtype
