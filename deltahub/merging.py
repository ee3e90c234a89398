"""Deltas computed into a weight, in pieces: one arithmetic for models in memory and for checkpoints that are streamed.

A float32 copy of a large half-precision weight costs more time in memory traffic than the sum itself, so the weight is
worked through in blocks along one of its axes wherever the kinds' equations treat that axis element by element. Which
blocks are taken depends on shapes alone; so a merge in memory and a merge from disk to disk give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from deltahub.kinds.document import Document
from deltahub.kinds.fields import pick
from deltahub.kinds.host_shape import HostShape
from deltahub.kinds.layout import conditions
from deltahub.kinds.tree import Binary, Call, Name, Negative, Node, Number, Program

if TYPE_CHECKING:
    from deltahub.kinds import Port
    from deltahub.places import Rows

__all__ = ["Change", "Merging", "at_once", "blend", "stored_transposed"]

BLOCK = 1 << 20
"""Elements of a block, which fits a processor's cache as float32."""


class _Described(Protocol):
    @property
    def document(self) -> Document: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """One site's part in a merge: a kind bound to a config and a host, its tensors, and the user's strength.

    Attributes:
        kind: where its equations come from.
        config: its config, the strength already multiplied in where the document names a number for it.
        shape: the host's facts.
        ports: the compiled equations.
        tensors: in the order of the document; in any floating dtype.
        strength: interpolates between what was and what becomes, where it is not 1.
        rows: the outputs that it acts on; ``None`` for all.
        stack: how many linear maps the weight is; each tensor then has an axis of this length before its own.
    """

    kind: _Described
    config: Mapping[str, object]
    shape: HostShape
    ports: Mapping[str, Port]
    names: Sequence[str]
    tensors: Sequence[Tensor]
    strength: float = 1.0
    rows: Rows | None = None
    stack: int = 0

    def one(self, index: int) -> Change:
        """What it is to one map of its stack."""
        return replace(self, tensors=[tensor[index] for tensor in self.tensors], stack=0)

    def new(self, port: str, host: Any, w: Tensor, b: Tensor | None) -> Tensor:
        """What its equation makes of a weight (``weight``) or a bias (``bias``), the rest of which stays."""
        value = w if port == "weight" else b
        assert value is not None
        axis = value.ndim - (2 if port == "weight" else 1)
        own_w, own_b = w, b
        if self.rows is not None:
            own_w = self.rows.take(w, -2)
            own_b = None if b is None else self.rows.take(b, -1)
        fn, tensors = self.ports[port].fn, _like(self.tensors, w)
        if self.stack:
            stacked = (0, None if own_b is None else 0, *(0 for _ in tensors))
            result = torch.vmap(partial(fn, host), in_dims=stacked)(own_w, own_b, *tensors)
        else:
            result = fn(host, own_w, own_b, *tensors)
        if self.rows is None:
            return blend(value, result, self.strength)
        return self.rows.put(value, blend(self.rows.take(value, axis), result, self.strength), axis)


def blend(old: Tensor, new: Tensor, strength: float) -> Tensor:
    """``old + strength · (new − old)``, exactly ``new`` for 1."""
    return new if strength == 1.0 else old + strength * (new - old)


@cache
def stored_transposed(canonical: Callable[[Tensor], Tensor]) -> bool:
    """Whether a view's canonical weight is its stored one with the axes exchanged."""
    return canonical(torch.empty(2, 3, device="meta")).shape[0] == 3


class _Value(NamedTuple):
    """What is known of an intermediate value: its shape, and which of its axes is the one that is cut."""

    shape: tuple[int, ...]
    axis: int | None


_Facts = Mapping[str, "_Value | float"]


class _WholeError(Exception):
    """The equation cannot be worked through in pieces."""


def _elementwise(left: _Value, right: _Value) -> _Value:
    rank = max(len(left.shape), len(right.shape))
    cut: set[int] = set()
    for value in (left, right):
        if value.axis is not None:
            cut.add(value.axis + rank - len(value.shape))
    shape = torch.broadcast_shapes(left.shape, right.shape)  # type: ignore[no-untyped-call]
    if not cut:
        return _Value(tuple(shape), None)
    if len(cut) > 1:
        raise _WholeError
    axis = cut.pop()
    for value in (left, right):
        own = axis - (rank - len(value.shape))
        if value.axis is None and own >= 0 and value.shape[own] != 1:
            raise _WholeError  # a whole tensor against a piece
    return _Value(tuple(shape), axis)


def _product(left: _Value, right: _Value) -> _Value:
    if len(left.shape) != 2 or len(right.shape) < 2 or left.axis == 1 or right.axis == 0:
        raise _WholeError
    if left.axis is not None and right.axis is not None:
        raise _WholeError
    return _Value((left.shape[0], *right.shape[1:]), left.axis if left.axis is not None else right.axis)


def _along(value: _Value, axis: int, rank: int) -> _Value:
    """A vector laid along an axis of the weight: ones follow."""
    if len(value.shape) != 1 or axis >= rank:
        raise _WholeError
    return _Value((*value.shape, *(1,) * (rank - 1 - axis)), value.axis)


def _follow(node: Node, facts: _Facts) -> _Value:
    if isinstance(node, Number):
        return _Value((), None)
    if isinstance(node, Negative):
        return _follow(node.value, facts)
    if isinstance(node, Name):
        value = facts.get(node.name)
        if isinstance(value, _Value):
            return value
        if isinstance(value, int | float):
            return _Value((), None)
    if isinstance(node, Binary) and node.operator in {"+", "-", "*", "/"}:
        return _elementwise(_follow(node.left, facts), _follow(node.right, facts))
    if isinstance(node, Binary) and node.operator == "@":
        return _product(_follow(node.left, facts), _follow(node.right, facts))
    if isinstance(node, Call) and node.op in _ALONG and not node.kwargs:
        weight = facts["W"]
        assert isinstance(weight, _Value)
        return _along(_follow(node.args[0], facts), _ALONG[node.op], len(weight.shape))
    raise _WholeError


_ALONG = {"rows": 0, "columns": 1}
_CUT_NAMES = {0: "out", 1: "in"}


def _cut_axis(document: Document, name: str, axis: int) -> int | None:
    """Which axis of a tensor runs along the cut axis of the weight.

    Raises:
        _WholeError: two of them do, or its shape is not plain.
    """
    dims = document.tensors[name].dims
    found = []
    for at, dim in enumerate(dims):
        if dim.spread == "weight" and len(dims) == 1:
            return axis
        if dim.spread is not None:
            if at != len(dims) - 1:
                raise _WholeError
            continue
        words = dim.text.replace("(", " ").replace(")", " ").split()
        if words == [_CUT_NAMES[axis]]:
            found.append(at)
        elif _CUT_NAMES[axis] in words:
            raise _WholeError  # in // 4 and the like
    if len(found) > 1:
        raise _WholeError
    return found[0] if found else None


def _program(change: Change, port: str) -> Program | None:
    cases = change.kind.document.equations.get(port)
    return None if cases is None else pick(cases, conditions(change.config, change.shape))


def _cuts(change: Change, weight: tuple[int, ...], axis: int) -> tuple[int | None, ...] | None:
    """Which axis of each tensor is to be cut along with the weight's; ``None`` where the change needs it whole."""
    port = change.ports.get("weight")
    if port is None:
        return (None,) * len(change.tensors)
    program = _program(change, "weight")
    if program is None or port.uses & {"b", "host"}:
        return None
    facts: dict[str, _Value | float] = {
        name: value for name, value in change.config.items() if isinstance(value, int | float)
    }
    facts["W"] = _Value(weight, axis)
    try:
        cuts = tuple(_cut_axis(change.kind.document, name, axis) for name in change.names)
        for name, tensor, cut in zip(change.names, change.tensors, cuts, strict=True):
            facts[name] = _Value(tuple(tensor.shape), cut)
        for name, node in program.steps:
            facts[name] = _follow(node, facts)
        result = _follow(program.result, facts)
    except (_WholeError, RuntimeError):  # torch's own word for shapes that do not broadcast
        return None
    return cuts if result == (weight, axis) else None


class Merging:
    """What several deltas make of one module's weight and bias, in pieces or at once.

    Args:
        changes: in the order in which they act.
        weight: shape of the canonical weight.
        transposed: whether the weight is stored with its first two axes exchanged, as an embedding is.
        host: given to equations that ask for it.
    """

    def __init__(
        self, changes: Sequence[Change], weight: Sequence[int], *, transposed: bool = False, host: Any = None
    ) -> None:
        self.changes = tuple(changes)
        self.shape = tuple(weight)
        self.host = host
        axis = 1 if transposed else 0
        cuts = [_cuts(change, self.shape, axis) for change in self.changes] if len(self.shape) > axis else [None]
        entangled = any("W" in c.ports["bias"].uses for c in self.changes if "bias" in c.ports)
        partly = any(c.rows is not None or c.stack for c in self.changes)
        self.axis = None if partly or entangled or any(one is None for one in cuts) else axis
        """The axis of the canonical weight that is cut: that of the rows as they are stored. ``None``: never cut."""
        self._cuts = cuts

    @property
    def sets_weight(self) -> bool:
        return any("weight" in change.ports for change in self.changes)

    @property
    def sets_bias(self) -> bool:
        return any("bias" in change.ports for change in self.changes)

    def pieces(self) -> Iterator[tuple[int, int]]:
        """Where to cut: start and stop along :attr:`axis`; whole, if it is ``None``."""
        length = self.shape[self.axis or 0] if self.shape else 1
        step = length
        if self.axis is not None and length:
            row = max(1, prod(self.shape) // length)
            step = max(16, BLOCK // row // 16 * 16)
        for start in range(0, max(length, 1), max(step, 1)):
            yield start, min(length, start + step)

    def weight(self, piece: Tensor, at: tuple[int, int], dtype: torch.dtype | None = None) -> Tensor:
        """One piece of the new weight: computed in float32 at least, cast once.

        Args:
            piece: the canonical weight between ``at`` along :attr:`axis`.
            at: one of :meth:`pieces`.
            dtype: what to cast to; by default what was given.
        """
        assert self.axis is not None
        w = piece.to(torch.promote_types(piece.dtype, torch.float32))
        for change, cuts in zip(self.changes, self._cuts, strict=True):
            if "weight" not in change.ports:
                continue
            assert cuts is not None
            tensors = [
                t if cut is None else t.narrow(cut, at[0], at[1] - at[0])
                for t, cut in zip(change.tensors, cuts, strict=True)
            ]
            new = change.ports["weight"].fn(self.host, w, None, *_like(tensors, w))
            w = blend(w, new, change.strength)
        return w.to(dtype or piece.dtype)

    def bias(self, bias: Tensor | None, dtype: torch.dtype, to: torch.dtype | None = None) -> Tensor | None:
        """The new bias where no equation for it reads the weight.

        Args:
            bias: the old one, if there is any.
            dtype: of the weight, which a new bias takes.
            to: what to cast to; by default what was given.
        """
        b = None if bias is None else bias.to(torch.promote_types(bias.dtype, torch.float32))
        for change in self.changes:
            if "bias" in change.ports:
                own = torch.zeros(self.shape[0], dtype=torch.promote_types(dtype, torch.float32)) if b is None else b
                own = own.to(bias.device if bias is not None else own.device)
                new = change.ports["bias"].fn(self.host, None, own, *_like(change.tensors, own))
                b = blend(own, new, change.strength)
        return None if b is None else b.to(to or (dtype if bias is None else bias.dtype))

    def changed(
        self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """New weight (canonical) and bias in one piece, where they cannot be cut; map by map of a stack."""
        if not any(change.stack for change in self.changes):
            return at_once(self.changes, self.host, weight, bias, dtype)
        made = torch.empty_like(weight, dtype=dtype or weight.dtype)
        biases = []
        for i, one in enumerate(weight):
            own = None if bias is None else bias[i]
            made[i], new_bias = at_once([c.one(i) for c in self.changes], self.host, one, own, dtype)
            biases.append(new_bias)
        whole = [one for one in biases if one is not None]
        return made, torch.stack(whole) if whole else None

    def whole(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """New weight (canonical) and bias, piece by piece where that is possible."""
        if self.axis is not None:
            if not self.sets_weight:
                return weight, self.bias(bias, weight.dtype)
            new = torch.empty_like(weight)
            for at in self.pieces():
                part = weight.narrow(self.axis, at[0], at[1] - at[0])
                new.narrow(self.axis, at[0], at[1] - at[0]).copy_(self.weight(part, at))
            return new, self.bias(bias, weight.dtype)
        return self.changed(weight, bias)


def at_once(
    changes: Sequence[Change], host: Any, weight: Tensor, bias: Tensor | None, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor | None]:
    """New weight (canonical) and bias in one piece; gradients flow to the changes' tensors."""
    w = weight.to(torch.promote_types(weight.dtype, torch.float32))
    b = None if bias is None else bias.to(w.dtype)
    for change in changes:
        new_w, new_b = w, b
        if "bias" in change.ports:
            own = w.new_zeros(w.shape[: 2 if change.stack else 1]) if b is None else b
            new_b = change.new("bias", host, w, own)
        if "weight" in change.ports:
            new_w = change.new("weight", host, w, b)
        w, b = new_w, new_b  # both equations saw what the change before left
    to = dtype or weight.dtype
    return w.to(to), None if b is None else b.to(to)


def _like(tensors: Sequence[Tensor], like: Tensor) -> list[Tensor]:
    """Floating tensors in the dtype of the computation, on its device."""
    return [t.to(like) if t.is_floating_point() else t.to(like.device) for t in tensors]
