"""Batches whose rows carry different deltas: what a host does for a list of deltas per row.

Rows are never reordered at the model's boundary: which of a model's arguments have the batch as their first axis, and
which only happen to have the same length, no shape can tell, and a key-value cache would keep the wrong order. Every
host works on the rows of each delta instead: on views where they lie together, else on one gathered copy of its input
and output, a thousandth of what its weight costs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltahub.attending import Extra
from deltahub.errors import InjectionError
from deltahub.products import Products, SiteLike
from deltahub.prompting import Prompts

__all__ = [
    "Layout",
    "MixedPlan",
    "check_mixable",
    "is_mixed",
    "mixed_key",
    "rows_of",
]

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
    """Whether a switch's key stands for rows that carry different deltas."""
    return key.startswith(_MARK)


def rows_of(key: str) -> list[str]:
    """The key of each row."""
    return key.removeprefix(_MARK).split("\t")


def _refuse(what: str, **more: Any) -> InjectionError:
    return InjectionError("E_INJECTION_ROWS", what, **more)


class _Plan(Protocol):
    """What is used of :class:`deltahub.sites.Plan`."""

    attended: tuple[Any, ...]
    prompted: tuple[Any, ...]
    sees: bool
    rescored: tuple[Any, ...]
    severed: bool
    spans: tuple[Any, ...]
    staged: bool
    weighted: tuple[Any, ...]
    wrapped: tuple[Any, ...]

    def enter(self, module: nn.Module, call: Callable[[Any], Any], x: Any) -> tuple[list[Any], Any]: ...
    def leave(self, module: nn.Module, call: Callable[[Any], Any], xs: Sequence[Any], y: Any) -> Any: ...
    def run(self, module: nn.Module, call: Callable[[Any], Any], x: Any) -> Any: ...
    def further(self, module: nn.Module, key: Tensor, x: Tensor | None) -> Extra | None: ...
    def prompt(self) -> Tensor | None: ...
    def rescore(self, module: nn.Module, scores: Tensor) -> Tensor: ...


def check_mixable(sites: Sequence[SiteLike]) -> None:
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
        if site.view is not None:
            raise _refuse(
                "a parameter that its module uses by itself is the same for all rows of a batch",
                where=site.path,
                hint="run the rows of each delta as a batch of their own",
            )
        if "past" in site.bound.ports:
            raise _refuse("keys and values that have positions of their own cannot be mixed", where=site.path)
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
        parts: Sequence[Tensor] = torch.split(self.gathered(x), self.sizes)
        return parts

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The inverse of :meth:`split`."""
        return self.scattered(torch.cat(list(parts)))


class _Together:
    """A block for some rows of a batch: always run over the whole batch, for its other arguments belong to it."""

    def __init__(self, call: Callable[[Any], Any], layout: Layout, x: Tensor, parts: Sequence[Tensor]) -> None:
        self.call, self.layout, self.parts = call, layout, parts
        self.x = x
        self.y: Sequence[Tensor] | None = None

    def rows(self, group: int, value: Any) -> Any:
        """What the block makes of these rows, among the others as they are."""
        if value is self.parts[group]:
            if self.y is None:
                self.y = self.layout.split(self.call(self.x))
            return self.y[group]
        parts = [value if i == group else part for i, part in enumerate(self.parts)]
        return self.layout.split(self.call(self.layout.join(parts)))[group]


class _Some:
    """A block as the plan of one group calls it; what is known of the whole call is known of its rows."""

    __slots__ = ("context", "group", "together")

    def __init__(self, together: _Together, group: int) -> None:
        self.together, self.group = together, group
        self.context = getattr(together.call, "context", {})

    def __call__(self, value: Any) -> Any:
        return self.together.rows(self.group, value)


class MixedPlan:
    """What a host does for a list of deltas per row.

    Args:
        slot: the host's own.
        plans: for each row, the plan of its deltas here; ``None`` where none of them acts here.
    """

    __slots__ = (
        "_layouts", "_looked", "attended", "idle", "members", "path", "plans", "positional", "products", "prompted",
        "rescored", "rows", "sees", "slot", "spans", "staged",
    )  # fmt: skip

    def __init__(self, slot: Any, plans: Sequence[_Plan | None]) -> None:
        self.slot = slot
        self.path: str = slot.sites[0].path if slot.sites else slot.spans[0].source
        self.rows = len(plans)
        groups: dict[int, list[int]] = {}
        for row, plan in enumerate(plans):
            groups.setdefault(id(plan), []).append(row)
        self.members = list(groups.values())
        self.plans = [plans[rows[0]] for rows in self.members]
        self.staged = all(plan is None or plan.staged for plan in self.plans)
        self.attended = any(plan is not None and plan.attended for plan in self.plans)
        self.spans = tuple(dict.fromkeys(span for plan in self.plans if plan is not None for span in plan.spans))
        self.sees = any(plan is not None and plan.sees for plan in self.plans)
        self.prompted = any(plan is not None and plan.prompted for plan in self.plans)
        self.rescored = any(plan is not None and plan.rescored for plan in self.plans)
        acting = [site for plan in self.plans if plan is not None for site in plan.wrapped]
        self.idle = not any(plan is not None and (plan.weighted or plan.wrapped) for plan in self.plans)
        self.positional = any(site.bound.positional for site in acting)
        self.products: Products | None = None
        self._looked = False
        self._layouts: dict[int, Layout] = {}

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

    def acting(self, module: nn.Module) -> nn.Module:
        """The module that runs: itself, for no row has a parameter of its own."""
        return module

    def run(self, module: nn.Module, call: Callable[[Any], Any], x: Any, *, together: bool = False) -> Any:
        """The host with each row's deltas.

        Args:
            module: the host.
            call: runs the original module.
            x: its input, rows first.
            together: whether the module has other arguments or outputs, and so only runs over the whole batch.
        """
        if self.idle:  # it is only where spans begin
            return call(x)
        if not isinstance(x, Tensor) or not x.ndim:
            raise _refuse("a module whose input is no tensor cannot be mixed", where=self.path, found=type(x).__name__)
        if self.positional and x.ndim < 3:
            raise _refuse(
                "a kind looks along the positions of its input, and here are none besides the rows of the batch",
                where=self.path,
                hint="run the rows of each delta as a batch of their own",
            )
        if x.shape[0] == 1 and self.rows > 1 and not together:
            x = x.expand(self.rows, *x.shape[1:])  # what all rows share, such as positions
        layout = self.layout(x.shape[0])
        held = self._held()
        if self.staged:
            return self._staged(module, call, x, layout, held)
        parts = layout.split(x)
        whole = _Together(call, layout, x, parts) if together else None
        results = []
        for i, (plan, part) in enumerate(zip(self.plans, parts, strict=True)):
            own = call if whole is None else _Some(whole, i)
            self._hand(held, i)
            results.append(own(part) if plan is None else plan.run(module, own, part))
        return layout.join(results)

    def further(self, module: nn.Module, key: Tensor, x: Tensor | None) -> Extra | None:
        """What the rows of an attention attend to besides their own keys: one length for all, the rest unseen."""
        own_x: Sequence[Tensor | None] = [None] * len(self.plans) if x is None else self.layout(x.shape[0]).split(x)
        both = zip(self.plans, own_x, strict=True)
        found = [None if plan is None else plan.further(module, key, rows) for plan, rows in both]
        length = max((one.key.shape[2] for one in found if one is not None), default=0)
        if not length:
            return None
        layout = self.layout(key.shape[0])
        keys, values, weights = [], [], []
        for one, rows in zip(found, layout.sizes, strict=True):
            own = 0 if one is None else one.key.shape[2]
            weight = key.new_zeros(rows, own)
            if one is None:
                blank = key.new_zeros(rows, key.shape[1], length, key.shape[3])
                keys.append(blank)
                values.append(blank)
            else:
                keys.append(F.pad(one.key, (0, 0, length - own, 0)).expand(rows, -1, -1, -1))
                values.append(F.pad(one.value, (0, 0, length - own, 0)).expand(rows, -1, -1, -1))
                weight = weight if one.weight is None else one.weight.expand(rows, -1)
            weights.append(F.pad(weight, (length - own, 0), value=float("-inf")))
        return Extra(
            key=layout.join(keys), value=layout.join(values), weight=layout.join(weights), placed=((length, False),)
        )

    def prompts(self, rows: int) -> Prompts | None:
        """What stands before the tokens of each row."""
        found = [None if plan is None else plan.prompt() for plan in self.plans]
        some = next((value for value in found if value is not None), None)
        if some is None:
            return None
        times = sum(self.layout(rows).sizes) // self.rows
        of = {row: group for group, members in enumerate(self.members) for row in members}
        return Prompts(
            values=tuple(some[:0] if value is None else value for value in found),
            groups=tuple(of[row // times] for row in range(rows)),
        )

    def rescore(self, module: nn.Module, scores: Tensor) -> Tensor:
        """What becomes of the bias that an attention adds to the scores of each row."""
        layout = self.layout(scores.shape[0] if scores.shape[0] > 1 else self.rows)
        parts = layout.split(scores.expand(sum(layout.sizes), -1, -1, -1))
        both = zip(self.plans, parts, strict=True)
        return layout.join([part if plan is None else plan.rescore(module, part) for plan, part in both])

    def _held(self) -> Mapping[Any, Sequence[Tensor]]:
        """What has come along the spans that end here, group by group."""
        ending = {
            site.span for plan in self.plans if plan is not None for site in plan.wrapped if site.span is not None
        }
        held = {}
        for span in ending:
            x = span.take()
            x = x.expand(self.rows, *x.shape[1:]) if x.shape[0] == 1 else x
            held[span] = self.layout(x.shape[0]).split(x)
        return held

    def _hand(self, held: Mapping[Any, Sequence[Tensor]], group: int) -> None:
        """Let the plan of a group find its rows of what has come along."""
        plan = self.plans[group]
        for site in () if plan is None else plan.wrapped:
            if site.span is not None:
                site.span.put(held[site.span][group])

    def _leave(
        self, group: int, module: nn.Module, call: Callable[[Any], Any], seen: Sequence[Any], y: Tensor, held: Any
    ) -> Tensor:
        plan = self.plans[group]
        if plan is None:
            return y
        self._hand(held, group)
        return cast(Tensor, plan.leave(module, call, seen, y))

    def _staged(
        self,
        module: nn.Module,
        call: Callable[[Any], Any],
        x: Tensor,
        layout: Layout,
        held: Mapping[Any, Sequence[Tensor]],
    ) -> Tensor:
        """Inputs changed row by row, the module run once, outputs changed row by row."""
        if any("input" in s.bound.ports for p in self.plans if p is not None for s in p.wrapped):
            entered = [
                ([], part) if plan is None else plan.enter(module, call, part)
                for plan, part in zip(self.plans, layout.split(x), strict=True)
            ]
            xs: Sequence[Sequence[Any]] = [seen for seen, _ in entered]
            y = self._same_rows(call(layout.join([part for _, part in entered])), x)
        else:
            y = self._same_rows(call(x), x)
            products = self._products_for(y) if layout.equal else None
            if products is not None:
                return layout.scattered(products.add(layout.gathered(x), layout.gathered(y)))
            xs = [
                [part] * (0 if plan is None else len(plan.wrapped))
                for plan, part in zip(self.plans, layout.split(x), strict=True)
            ]
        both = zip(xs, layout.split(y), strict=True)
        return layout.join([self._leave(i, module, call, seen, part, held) for i, (seen, part) in enumerate(both)])

    def _products_for(self, y: Tensor) -> Products | None:
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        if not self._looked:
            self.products, self._looked = Products.of(self.plans, self.slot.switch), True
        return self.products if self.products is not None and self.products.ready(y) else None

    def _same_rows(self, y: Any, x: Tensor) -> Tensor:
        if not isinstance(y, Tensor) or y.shape[:1] != x.shape[:1]:
            found = list(y.shape) if isinstance(y, Tensor) else type(y).__name__
            raise _refuse("this module's output does not follow the rows of its input", where=self.path, found=found)
        return y
