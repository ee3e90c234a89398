"""Deltas that are products of two matrices: found in their equations, done all at once where a batch mixes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from deltahub.kinds.torch_ops import SETTLED

__all__ = ["LowRank", "Products", "SiteLike", "looks_along", "low_rank"]


class SiteLike(Protocol):
    """What is used of :class:`deltahub.sites.Site`."""

    delta: str
    path: str
    dropout: float
    training: bool
    bound: Any
    names: tuple[str, ...]
    rows: Any
    view: Any

    def tensors(self) -> list[Tensor]: ...


class _Plan(Protocol):
    staged: bool
    wrapped: tuple[Any, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class LowRank:
    """An output equation of the form ``y + factor · up(down(x))``: the places of the two tensors, and the factor."""

    down: int
    up: int
    factor: float


def low_rank(port: Any) -> LowRank | None:
    """What an output equation amounts to, if it is a product of two matrices; found in its graph, not by its name."""
    nodes: list[Any] = list(port.graph.nodes)
    inputs = [n for n in nodes if n.op == "placeholder"]
    x, y = inputs[1], inputs[2]
    tensors = {n: i for i, n in enumerate(inputs[3:])}
    result = nodes[-1].args[0]
    if result.target not in {SETTLED["add"], SETTLED["add_scaled"]} or result.args[0] is not y:
        return None
    outer = result.args[1]
    if getattr(outer, "target", None) is not F.linear or len(outer.args) != 2 or outer.args[1] not in tensors:
        return None
    inner = outer.args[0]
    if getattr(inner, "target", None) is F.linear:
        source = inner.args
    elif getattr(inner, "target", None) is SETTLED["host_apply"] and port.origin[2].family == "linear":
        source = inner.args[1:]
    else:
        return None
    if len(source) != 2 or source[0] is not x or source[1] not in tensors:
        return None
    factor = float(result.kwargs.get("alpha", 1.0))
    return LowRank(down=tensors[source[1]], up=tensors[outer.args[1]], factor=factor)


def looks_along(graph: Any) -> bool:
    """Whether an equation does something along axis -2 of what comes out of its host's activations."""
    nodes = list(graph.nodes)
    tainted = {n for n in nodes if n.op == "placeholder" and n.name in {"x", "y"}}
    found = False

    def visit(value: Any) -> Any:
        nonlocal found
        found = found or (isinstance(value, int) and value == -2)
        return value

    for node in nodes:
        if node.op == "call_function" and not tainted.isdisjoint(node.all_input_nodes):
            tainted.add(node)
            torch.fx.node.map_aggregate((node.args, node.kwargs), visit)
    return found


class Products:
    """Groups that are low-rank products and nothing else, all at once: two batched products over stacked tensors.

    Stacks are made when a list of deltas comes for the second time, as it does while text is generated, and kept until
    one of the tensors changes. They serve computations without gradients; groups of one size; any ranks.
    """

    __slots__ = ("_came", "_key", "_stack", "entries", "switch")

    def __init__(self, entries: Sequence[tuple[SiteLike, LowRank] | None], switch: Any) -> None:
        self.entries = tuple(entries)
        self.switch = switch
        self._came = False
        self._key: object = None
        self._stack: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of(cls, plans: Sequence[_Plan | None], switch: Any) -> Products | None:
        """``None`` where a group is something else, or there is one group only."""
        found: list[tuple[SiteLike, LowRank] | None] = []
        for plan in plans:
            if plan is None:
                found.append(None)
                continue
            if not plan.staged or len(plan.wrapped) != 1 or "input" in plan.wrapped[0].bound.ports:
                return None
            site = plan.wrapped[0]
            product = low_rank(site.bound.ports["output"]) if "output" in site.bound.ports else None
            if product is None or site.dropout or site.rows is not None or site.span is not None:
                return None
            found.append((site, product))
        return cls(found, switch) if len(found) > 1 else None

    def ready(self, y: Tensor) -> bool:
        """Whether the stacks are those of the tensors as they are now."""
        try:
            key = self._now(y)
        except RuntimeError:  # tensors made in inference mode do not say when they change
            return False
        if key == self._key:
            return True
        if not self._came:
            self._came = True
            return False
        self._stack, self._key = self._stacked(y), key
        return True

    def _now(self, y: Tensor) -> object:
        strength = self.switch.strength
        key: list[object] = [y.dtype, y.device, strength and sorted(strength.items())]
        for entry in self.entries:
            if entry is not None:
                for tensor in entry[0].tensors():
                    key += (tensor.data_ptr(), tensor._version)
        return key

    def _stacked(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """``down`` as ``[groups, in, rank]``, ``factor · up`` as ``[groups, rank, out]``; absent ranks are zeros."""
        pairs = [None if e is None else (e[0].tensors()[e[1].down], e[0].tensors()[e[1].up]) for e in self.entries]
        some = next(pair for pair in pairs if pair is not None)
        rank = max(pair[0].shape[0] for pair in pairs if pair is not None)
        downs = y.new_zeros(len(pairs), some[0].shape[1], rank)
        ups = y.new_zeros(len(pairs), rank, some[1].shape[0])
        for i, (entry, pair) in enumerate(zip(self.entries, pairs, strict=True)):
            if entry is not None and pair is not None:
                own = pair[0].shape[0]
                downs[i, :, :own] = pair[0].mT
                factor = entry[1].factor * self.switch.strength.get(entry[0].delta, 1.0)
                ups[i, :own] = pair[1].mT * factor
        return downs, ups

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """``y`` plus the products; both with the rows of a group together."""
        assert self._stack is not None
        downs, ups = self._stack
        groups = len(self.entries)
        h = torch.bmm(x.reshape(groups, -1, x.shape[-1]).to(downs.dtype), downs)
        return torch.baddbmm(y.reshape(groups, -1, y.shape[-1]), h, ups).reshape(y.shape)
