"""Batches whose rows carry different deltas: what a host does for a list of deltas per row.

Rows are never reordered at the model's boundary: which of a model's arguments have the batch as their first axis, and
which only happen to have the same length, no shape can tell, and a key-value cache would keep the wrong order. Every
host works on the rows of each delta instead: on views where they lie together, else on one gathered copy of its input
and output, a thousandth of what its weight costs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltahub.errors import InjectionError
from deltahub.kinds.torch_ops import SETTLED

if TYPE_CHECKING:
    from torch import fx

__all__ = ["MixedPlan", "check_mixable", "is_mixed", "mixed_key", "rows_of"]

_MARK = "\0"

_ROUTED = frozenset({"experts"})
"""Modules below which rows of one sample are no longer together: tokens go where a router sends them."""
_BATCHLESS = frozenset({"relative_attention_bias"})
"""Modules that see positions only, no samples."""
_WHOLE_CONTEXT = frozenset({"group", "taps"})
"""Context that speaks of the whole batch."""


def mixed_key(rows: Sequence[Sequence[str]]) -> str:
    """Which deltas act on each row, as one string for :class:`deltahub.sites.Switch`."""
    return _MARK + "\t".join("\n".join(names) for names in rows)


def is_mixed(key: str) -> bool:
    return key.startswith(_MARK)


def rows_of(key: str) -> list[str]:
    """The key of each row."""
    return key.removeprefix(_MARK).split("\t")


def _refuse(what: str, **more: Any) -> InjectionError:
    return InjectionError("E_INJECTION_ROWS", what, **more)


class _Site(Protocol):
    delta: str
    path: str
    dropout: float
    training: bool
    bound: Any
    names: tuple[str, ...]

    def tensors(self) -> list[Tensor]: ...


class _Plan(Protocol):
    """What is used of :class:`deltahub.sites.Plan`."""

    severed: bool
    staged: bool
    weighted: tuple[Any, ...]
    wrapped: tuple[Any, ...]

    def enter(self, module: nn.Module, x: Any) -> tuple[list[Any], Any]: ...
    def leave(self, module: nn.Module, call: Callable[[Any], Any], xs: Sequence[Any], y: Any) -> Any: ...
    def run(self, module: nn.Module, call: Callable[[Any], Any], x: Any) -> Any: ...


def check_mixable(sites: Sequence[_Site]) -> None:
    """Refuse sites whose hosts do not see one sample after the other, or whose kinds speak of the whole batch.

    Raises:
        InjectionError: ``E_INJECTION_ROWS``.
    """
    for site in sites:
        document = site.bound.kind.document
        used = {name for port in site.bound.ports.values() for name in port.uses}
        if whole := used & _WHOLE_CONTEXT & set(document.context):
            raise _refuse(
                f"kind {document.name!r} cannot act on some rows of a batch only",
                where=site.path,
                found=f"it asks for {', '.join(sorted(whole))}",
            )
        parts = site.path.split(".")
        if _ROUTED & set(parts[:-1]) or parts[-1] in _BATCHLESS:
            why = "its tokens are routed" if _ROUTED & set(parts[:-1]) else "it sees positions, not samples"
            raise _refuse(
                f"rows of a batch cannot be told apart here: {why}",
                where=site.path,
                hint="run the rows of each delta as a batch of their own",
            )


class Layout:
    """Where the rows of each group lie in a batch: slices where they lie together, one gather otherwise."""

    __slots__ = ("_tensors", "equal", "order", "sizes")

    def __init__(self, members: Sequence[Sequence[int]], times: int) -> None:
        order = [row * times + j for rows in members for row in rows for j in range(times)]
        self.sizes = [len(rows) * times for rows in members]
        self.equal = len(set(self.sizes)) == 1
        self.order = None if order == list(range(len(order))) else order
        self._tensors: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def _indices(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self._tensors:
            order = torch.tensor(self.order, device=device)
            self._tensors[device] = order, torch.argsort(order)
        return self._tensors[device]

    def gathered(self, x: Tensor) -> Tensor:
        """The rows, group after group."""
        return x if self.order is None else x.index_select(0, self._indices(x.device)[0])

    def scattered(self, x: Tensor) -> Tensor:
        """The inverse of :meth:`gathered`."""
        return x if self.order is None else x.index_select(0, self._indices(x.device)[1])

    def split(self, x: Tensor) -> Sequence[Tensor]:
        """The rows of each group."""
        return self.gathered(x).split(self.sizes)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The inverse of :meth:`split`."""
        return self.scattered(torch.cat(list(parts)))


@dataclass(frozen=True, kw_only=True, slots=True)
class LowRank:
    """An output equation of the form ``y + factor · up(down(x))``: the places of the two tensors, and the factor."""

    down: int
    up: int
    factor: float


def low_rank(port: Any) -> LowRank | None:
    """What an output equation amounts to, if it is a product of two matrices; found in its graph, not by its name."""
    graph: fx.Graph = port.graph
    nodes = list(graph.nodes)
    inputs = [n for n in nodes if n.op == "placeholder"]
    x, y = inputs[1], inputs[2]
    tensors = {n: i for i, n in enumerate(inputs[3:])}
    result = cast("fx.Node", nodes[-1].args[0])
    if result.target not in {SETTLED["add"], SETTLED["add_scaled"]} or result.args[0] is not y:
        return None
    outer = result.args[1]
    if getattr(outer, "target", None) is not F.linear or len(outer.args) != 2 or outer.args[1] not in tensors:  # type: ignore[union-attr]
        return None
    inner: Any = outer.args[0]  # type: ignore[union-attr]
    if getattr(inner, "target", None) is F.linear:
        source = inner.args
    elif getattr(inner, "target", None) is SETTLED["host_apply"] and port.origin[2].family == "linear":
        source = inner.args[1:]
    else:
        return None
    if len(source) != 2 or source[0] is not x or source[1] not in tensors:
        return None
    return LowRank(
        down=tensors[source[1]],
        up=tensors[outer.args[1]],
        factor=float(result.kwargs.get("alpha", 1.0)),  # type: ignore[union-attr, index, arg-type]
    )


class _Together:
    """A block for some rows of a batch: always run over the whole batch, for its other arguments belong to it."""

    def __init__(self, call: Callable[[Any], Any], layout: Layout, x: Tensor, parts: Sequence[Tensor]) -> None:
        self.call, self.layout, self.parts = call, layout, parts
        self.x = x
        self.y: Sequence[Tensor] | None = None

    def of(self, group: int) -> Callable[[Any], Any]:
        def call(value: Any) -> Any:
            if value is self.parts[group]:
                if self.y is None:
                    self.y = self.layout.split(self.call(self.x))
                return self.y[group]
            parts = [value if i == group else part for i, part in enumerate(self.parts)]
            return self.layout.split(self.call(self.layout.join(parts)))[group]

        return call


class MixedPlan:
    """What a host does for a list of deltas per row.

    Args:
        path: of the host, for messages.
        plans: for each row, the plan of its deltas here; ``None`` where none of them acts here.
        strength: the user's scale of each delta.
    """

    __slots__ = ("_layouts", "_stack", "_stack_key", "low", "members", "path", "plans", "rows", "staged", "strength")

    def __init__(self, path: str, plans: Sequence[_Plan | None], strength: Mapping[str, float]) -> None:
        self.path = path
        self.strength = strength
        self.rows = len(plans)
        groups: dict[int, list[int]] = {}
        for row, plan in enumerate(plans):
            groups.setdefault(id(plan), []).append(row)
        self.members = list(groups.values())
        self.plans = [plans[rows[0]] for rows in self.members]
        self.staged = all(plan is None or plan.staged for plan in self.plans)
        self.low = self._low_rank()
        self._layouts: dict[int, Layout] = {}
        self._stack: tuple[Tensor, Tensor] | None = None
        self._stack_key: tuple[object, ...] | None = None

    def _low_rank(self) -> list[tuple[_Site, LowRank] | None] | None:
        """The site of each group where all are low-rank products alone, so that one batched product does them all."""
        found: list[tuple[_Site, LowRank] | None] = []
        for plan in self.plans:
            if plan is None:
                found.append(None)
                continue
            if not plan.staged or len(plan.wrapped) != 1 or "input" in plan.wrapped[0].bound.ports:
                return None
            site = plan.wrapped[0]
            port = site.bound.ports["output"]
            product = None if port.uses & {"W", "b", "base"} else low_rank(port)
            if product is None:
                return None
            found.append((site, product))
        return found

    def layout(self, size: int) -> Layout:
        """How a first axis of this length is divided among the groups.

        Raises:
            InjectionError: ``E_INJECTION_ROWS`` where it is no multiple of the number of rows.
        """
        times, rest = divmod(size, self.rows)
        if rest or not times:
            raise _refuse(
                "the first axis of this module's input does not follow the batch",
                where=self.path,
                expected=f"{self.rows} rows as given to `using`, or a multiple of it",
                found=size,
            )
        if times not in self._layouts:
            self._layouts[times] = Layout(self.members, times)
        return self._layouts[times]

    def run(self, module: nn.Module, call: Callable[[Any], Any], x: Any, *, together: bool = False) -> Any:
        """The host with each row's deltas.

        Args:
            module: the host.
            call: runs the original module.
            x: its input, rows first.
            together: whether the module has other arguments or outputs, and so only runs over the whole batch.
        """
        if not isinstance(x, Tensor) or not x.ndim:
            raise _refuse("a module whose input is no tensor cannot be mixed", where=self.path, found=type(x).__name__)
        if x.shape[0] == 1 and self.rows > 1 and not together:
            x = x.expand(self.rows, *x.shape[1:])  # what all rows share, such as positions
        layout = self.layout(x.shape[0])
        if self.staged:
            return self._staged(module, call, x, layout)
        parts = layout.split(x)
        whole = _Together(call, layout, x, parts) if together else None
        results = []
        for i, (plan, part) in enumerate(zip(self.plans, parts, strict=True)):
            own = call if whole is None else whole.of(i)
            results.append(own(part) if plan is None else plan.run(module, own, part))
        return layout.join(results)

    def _staged(self, module: nn.Module, call: Callable[[Any], Any], x: Tensor, layout: Layout) -> Tensor:
        """Inputs changed row by row, the module run once, outputs changed row by row."""
        if self.low is not None:
            y = self._same_rows(call(x), x)
            if layout.equal and len(self.plans) > 1 and self._undropped():
                return self._product(x, y, layout)
            xs: Sequence[Any] = [[part] for part in layout.split(x)]
        elif any("input" in s.bound.ports for p in self.plans if p is not None for s in p.wrapped):
            entered = [
                ([], part) if plan is None else plan.enter(module, part)
                for plan, part in zip(self.plans, layout.split(x), strict=True)
            ]
            xs = [seen for seen, _ in entered]
            y = self._same_rows(call(layout.join([part for _, part in entered])), x)
        else:
            y = self._same_rows(call(x), x)
            xs = [
                [part] * (0 if plan is None else len(plan.wrapped))
                for plan, part in zip(self.plans, layout.split(x), strict=True)
            ]
        parts = layout.split(y)
        return layout.join(
            [
                part if plan is None else plan.leave(module, call, seen, part)
                for plan, seen, part in zip(self.plans, xs, parts, strict=True)
            ]
        )

    def _same_rows(self, y: Any, x: Tensor) -> Tensor:
        if not isinstance(y, Tensor) or y.shape[:1] != x.shape[:1]:
            found = list(y.shape) if isinstance(y, Tensor) else type(y).__name__
            raise _refuse("this module's output does not follow the rows of its input", where=self.path, found=found)
        return y

    def _undropped(self) -> bool:
        low = self.low or ()
        return not any(entry is not None and entry[0].dropout and entry[0].training for entry in low)

    def _product(self, x: Tensor, y: Tensor, layout: Layout) -> Tensor:
        """All rows in two batched products: groups of one size, ranks filled up with zeros."""
        down, up = self._stacked(y)
        groups, out = len(self.plans), layout.gathered(y)
        h = torch.bmm(layout.gathered(x).reshape(groups, -1, x.shape[-1]).to(down.dtype), down.mT)
        value = torch.baddbmm(out.reshape(groups, -1, out.shape[-1]), h, up.mT)
        return layout.scattered(value.reshape(out.shape))

    def _stacked(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """``down`` and ``factor · up`` of every group; kept while they stay the same and no gradient is wanted."""
        assert self.low is not None
        chosen: list[tuple[Tensor, Tensor, float] | None] = []
        for entry in self.low:
            if entry is None:
                chosen.append(None)
                continue
            site, product = entry
            tensors = site.tensors()
            factor = product.factor * self.strength.get(site.delta, 1.0)
            chosen.append((tensors[product.down], tensors[product.up], factor))
        key = None if torch.compiler.is_compiling() else _version(chosen, y)
        if key is not None and key == self._stack_key:
            assert self._stack is not None
            return self._stack
        stack = _stack(chosen, y)
        self._stack_key, self._stack = key, None if key is None else stack
        return stack


def _version(chosen: Sequence[tuple[Tensor, Tensor, float] | None], y: Tensor) -> tuple[object, ...] | None:
    """What tells whether tensors are what they were; ``None`` where that cannot be told, or gradients flow."""
    parts: list[object] = [y.dtype, y.device]
    graded = torch.is_grad_enabled()
    for entry in chosen:
        if entry is None:
            continue
        for tensor in entry[:2]:
            if tensor.is_inference() or (graded and tensor.requires_grad):
                return None
            parts += (tensor.data_ptr(), tensor._version)
        parts.append(entry[2])
    return tuple(parts)


def _stack(chosen: Sequence[tuple[Tensor, Tensor, float] | None], y: Tensor) -> tuple[Tensor, Tensor]:
    rank = max(entry[0].shape[0] for entry in chosen if entry is not None)
    down, up, _ = next(entry for entry in chosen if entry is not None)
    downs, ups = [], []
    for entry in chosen:
        if entry is None:
            downs.append(y.new_zeros(rank, down.shape[1]))
            ups.append(y.new_zeros(up.shape[0], rank))
            continue
        missing = rank - entry[0].shape[0]
        downs.append(F.pad(entry[0].to(y), (0, 0, 0, missing)))
        ups.append(F.pad((entry[1] * entry[2] if entry[2] != 1.0 else entry[1]).to(y), (0, missing)))
    return torch.stack(downs), torch.stack(ups)
