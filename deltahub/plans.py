"""What a host does for one set of active deltas."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

import torch.nn.functional as F
from torch import Tensor, nn

from deltahub.attending import Extra, joined
from deltahub.bound import Bound, Site
from deltahub.errors import HostError, InjectionError
from deltahub.hosts import View
from deltahub.merging import Change, blend
from deltahub.places import Rows, with_parameters
from deltahub.products import low_rank
from deltahub.prompting import Prompts, embeddings_before
from deltahub.sharing import replicated, sharded_as, shared, whole
from deltahub.spanning import Span
from deltahub.switching import Switch

__all__ = ["Caller", "Plan", "change_of"]

_LIVE = ("input", "output", "replace")
_FURTHER = frozenset({"kv", "past"})


class _Slot(Protocol):
    """What is used of :class:`deltahub.sites.Slot`."""

    base: type[nn.Module]
    view: View
    switch: Switch

    def transformed(
        self, module: nn.Module, sites: Sequence[Site], view: View | None = None
    ) -> tuple[Tensor, Tensor | None]: ...


def _cast(tensors: Sequence[Tensor], like: Tensor) -> Sequence[Tensor]:
    """Floating tensors in the dtype of the computation; gradients flow to the originals."""
    dtype = like.dtype
    if shared(like):
        tensors = [replicated(t, like) for t in tensors]
    if not dtype.is_floating_point:  # token ids say nothing about the dtype of what follows
        return tensors
    for t in tensors:
        if t.dtype != dtype and t.is_floating_point():
            return [t.to(dtype) if t.is_floating_point() else t for t in tensors]
    return tensors


class Plan:
    """What a host does for one set of active deltas.

    Attributes:
        weighted: sites that change the module's weight or bias before it is applied, in order.
        wrapped: sites whose live equations wrap the result, innermost first.
        attended: sites that give attention further keys and values.
        sees: whether one of them looks at the attention's input.
        rescored: sites that change what attention adds to its scores.
        prompted: sites that give a transformer embeddings before those of its tokens.
        staged: whether the module runs exactly once, as it is, between equations of its input and of its output.
        inside: sites on parameters that the module uses by itself, with the way in which each is seen.
        spans: those that begin with what the module is called with.
    """

    __slots__ = (
        "attended", "inside", "plain", "prompted", "rescored", "sees", "severed", "slot", "spans", "staged", "weighted",
        "wrapped",
    )  # fmt: skip

    def __init__(self, slot: _Slot, sites: Sequence[Site], spans: Sequence[Span] = ()) -> None:
        self.slot = slot
        self.spans = tuple(spans)
        inside = [s for s in sites if s.view is not None and not s.merged]
        views = dict.fromkeys(s.view for s in inside if s.view is not None)
        self.inside = tuple((view, [s for s in inside if s.view == view]) for view in views)
        sites = [s for s in sites if s.view is None]
        dual = [s for s in sites if s.bound.mergeable and not s.merged]
        # A site may run its live form only where nothing after it reads the weight that it would have changed.
        count = 0
        for i, site in enumerate(dual):
            if not site.bound.live:
                count = i + 1
            elif site.bound.reads_weight:
                count = i
        self.weighted = tuple(dual[:count])
        self.wrapped = (*dual[count:], *(s for s in sites if not s.bound.mergeable))
        self.severed = any(s.bound.severs for s in self.wrapped)
        self.plain = count == 0 and all(set(s.bound.ports) & set(_LIVE) == {"output"} for s in self.wrapped)
        self.attended = tuple(s for s in self.wrapped if _FURTHER & set(s.bound.ports))
        self.sees = any("x" in port.uses for s in self.attended for p, port in s.bound.ports.items() if p in _FURTHER)
        self.rescored = tuple(s for s in self.wrapped if "scores" in s.bound.ports)
        self.prompted = tuple(s for s in self.wrapped if "prompt" in s.bound.ports)
        self.staged = count == 0 and not any("replace" in s.bound.ports for s in self.wrapped)

    def acting(self, module: nn.Module) -> nn.Module:
        """The module that runs: one with other parameters where sites are on them."""
        if not self.inside:
            return module
        values: dict[str, Tensor | None] = {}
        for view, sites in self.inside:
            values |= view.acting(module, *self.slot.transformed(module, sites, view))
        return with_parameters(module, self.slot.base, values)

    def innermost(self, module: nn.Module, call: Callable[[Any], Any], x: Any) -> Any:
        """The host itself, with the weighted sites' weight and bias."""
        if not self.weighted:
            return call(x)
        for site in self.weighted:
            if site.dropout and site.training:
                raise InjectionError(
                    "E_INJECTION_DROPOUT",
                    "a delta trains with dropout, and another on the same module reads the weight that it changes",
                    where=site.path,
                    hint="attach it without dropout, or after the other",
                )
        slot, view = self.slot, self.slot.view
        weight, bias = slot.transformed(module, self.weighted)
        if shared(module.weight):
            weight = view.canonical(sharded_as(view.stored(weight), cast(Tensor, module.weight)))
            bias = None if bias is None else sharded_as(bias, cast(Tensor, module.bias))
        return view.apply(module, slot.base, x, weight, bias)

    def run(self, module: nn.Module, call: Callable[[Any], Any], x: Any) -> Any:
        if not self.plain:
            return self.level(len(self.wrapped), module, call, x)
        y = call(x)
        for site in self.wrapped:
            y = self.output(site, module, call, x, y)
        return y

    def host(self, site: Site, module: nn.Module, call: Callable[[Any], Any]) -> Any:
        """What an equation's ``host`` is: the module, or a stand-in where its weight is another for this site."""
        return Caller(self, 0, module, call, site.rows) if site.bound.reads_weight or site.bound.context else module

    def level(self, depth: int, module: nn.Module, call: Callable[[Any], Any], x: Any) -> Any:
        """The host with its ``depth`` innermost wrapping sites."""
        if depth == 0:
            return self.innermost(module, call, x)
        site = self.wrapped[depth - 1]
        ports = site.bound.ports
        if "replace" in ports:
            caller = Caller(self, depth - 1, module, call)
            tensors = _cast(site.tensors(), x)
            y = ports["replace"].fn(caller, x, *tensors)
            s = self.slot.switch.strength.get(site.delta, 1.0)
            return y if s == 1.0 else blend(caller.deltahub_base(x), y, s)
        inner = self.input(site, module, call, x) if "input" in ports else x
        y = self.level(depth - 1, module, call, inner)
        return self.output(site, module, call, x, y) if "output" in ports else y

    def enter(self, module: nn.Module, call: Callable[[Any], Any], x: Any) -> tuple[list[Any], Any]:
        """What each wrapped site sees, and what the module of a staged plan gets."""
        seen: list[Any] = [x] * len(self.wrapped)
        for depth in reversed(range(len(self.wrapped))):
            site = self.wrapped[depth]
            seen[depth] = x
            if "input" in site.bound.ports:
                x = self.input(site, module, call, x)
        return seen, x

    def leave(self, module: nn.Module, call: Callable[[Any], Any], xs: Sequence[Any], y: Any) -> Any:
        """What becomes of the output of a staged plan's module."""
        for site, x in zip(self.wrapped, xs, strict=True):
            if "output" in site.bound.ports:
                y = self.output(site, module, call, x, y)
        return y

    def further(self, module: nn.Module, key: Tensor, x: Tensor | None) -> Extra | None:
        """What an attention attends to besides its own keys."""
        return joined(self.attended, self.slot.switch.strength, module, key, x) if self.attended else None

    def prompt(self) -> Tensor | None:
        """What stands before a transformer's tokens."""
        return embeddings_before(self.prompted, self.slot.switch.strength)

    def prompts(self, rows: int) -> Prompts | None:
        """The same for a batch."""
        value = self.prompt()
        return None if value is None else Prompts(values=(value,))

    def rescore(self, module: nn.Module, scores: Tensor) -> Tensor:
        """What becomes of the bias that an attention adds to its scores."""
        for site in self.rescored:
            s = self.slot.switch.strength.get(site.delta, 1.0)
            scores = blend(scores, site.bound.ports["scores"].fn(module, scores, *_cast(site.tensors(), scores)), s)
        return scores

    def input(self, site: Site, module: nn.Module, call: Callable[[Any], Any], x: Any) -> Any:
        """What a site makes of its host's input; all of it, where several processes share it."""
        strength, like, x = self.slot.switch.strength.get(site.delta, 1.0), x, whole(x)
        new = site.bound.ports["input"].fn(self.host(site, module, call), x, *_cast(site.tensors(), x))
        return replicated(blend(x, new, strength), like)

    def output(self, site: Site, module: nn.Module, call: Callable[[Any], Any], x: Any, y: Any) -> Any:
        strength = self.slot.switch.strength.get(site.delta, 1.0)
        bound = site.bound
        if strength != 1.0 and bound.kind.document.strength:
            bound, strength = bound.strengthened(strength), 1.0
        if site.span is not None:
            x = site.span.take()
        if site.dropout and site.training and x.is_floating_point():
            x = F.dropout(x, site.dropout)
        port, rows, like = bound.ports["output"], site.rows, y
        if shared(y) and (rows is not None or low_rank(port) is None):
            x, y = whole(x), whole(y)  # only a product of matrices is left to be computed in shares
        host, tensors = self.host(site, module, call), _cast(site.tensors(), y)
        if rows is None:
            new = blend(y, port.fn(host, x, y, *tensors), strength)
        else:
            part = rows.take(y, -1)
            new = rows.put(y, blend(part, port.fn(host, x, part, *tensors), strength), -1)
        return new if like is y else replicated(new, like)


class Caller:
    """The host as an equation of a ``replace`` sees it: ``base(x)`` is everything inside this site."""

    __slots__ = ("call", "depth", "module", "plan", "rows")

    def __init__(
        self, plan: Plan, depth: int, module: nn.Module, call: Callable[[Any], Any], rows: Rows | None = None
    ) -> None:
        self.rows = rows
        self.plan = plan
        self.depth = depth
        self.module = module
        self.call = call

    def deltahub_base(self, x: Any) -> Any:
        return self.plan.level(self.depth, self.module, self.call, x)

    def deltahub_apply(self, x: Any, weight: Tensor) -> Any:
        return self.module.deltahub_apply(x, weight)  # type: ignore[operator]

    def deltahub_weight(self) -> Tensor:
        weight = self.plan.slot.transformed(self.module, self.plan.weighted)[0]
        return weight if self.rows is None else self.rows.take(weight, 0)

    def deltahub_bias(self) -> Tensor | None:
        bias = self.plan.slot.transformed(self.module, self.plan.weighted)[1]
        return bias if bias is None or self.rows is None else self.rows.take(bias, 0)

    def deltahub_context(self, name: str) -> Any:
        known = getattr(self.call, "context", {})
        if name not in known:
            raise HostError(
                "E_HOST_CONTEXT",
                f"this block was called by itself, and only the model around it knows the {name}",
                where=type(self.module).__name__,
                hint="call the model that the delta was attached to",
            )
        return known[name]


def change_of(
    bound: Bound,
    names: Sequence[str],
    tensors: Sequence[Tensor],
    strength: float = 1.0,
    *,
    rows: Rows | None = None,
    stack: int = 0,
) -> Change:
    """What a site does to a weight and a bias, with these tensors and at this strength."""
    if strength != 1.0 and bound.kind.document.strength:
        bound, strength = bound.strengthened(strength), 1.0
    return Change(
        kind=bound.kind,
        config=bound.config,
        shape=bound.shape,
        ports=bound.ports,
        names=tuple(names),
        tensors=tuple(tensors),
        strength=strength,
        rows=rows,
        stack=stack,
    )
