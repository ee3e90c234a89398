"""What sits at a host: the site with its tensors, the plan that runs it, the slot that keeps both.

A *plan* is what a host does for one set of active deltas. Plans are built once per set and cached, so switching
deltas changes one string and nothing that depends on the size of the model.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from deltahub.attending import Extra, joined
from deltahub.errors import HostError, KindError
from deltahub.hosts import View, view_of
from deltahub.merging import Change, Merging, at_once, blend, stored_transposed
from deltahub.mixing import MixedPlan, is_mixed, looks_along, low_rank, rows_of
from deltahub.places import ParameterView, Rows, with_parameters
from deltahub.prompting import Prompts, embeddings_before
from deltahub.sharing import replicated, sharded_as, shared, whole
from deltahub.spanning import Held, Span
from deltahub.switching import Switch
from deltahub.targets import SITE_PREFIX

if TYPE_CHECKING:
    from deltahub.kinds import Kind, Port
    from deltahub.kinds.host_shape import HostShape

__all__ = ["SITE_PREFIX", "Bound", "Caller", "Part", "Plan", "Site", "Slot", "Switch", "change_of"]

_LIVE = ("input", "output", "replace")
_MERGED = ("weight", "bias")
_FURTHER = frozenset({"kv", "past"})


_KEPT_STRENGTHS = 16


class Bound:
    """A kind with a config, bound to the facts of a host: its compiled ports. Pickles as data, copies as itself."""

    __slots__ = (
        "_given",
        "_strong",
        "config",
        "context",
        "kind",
        "live",
        "mergeable",
        "ports",
        "positional",
        "reads_weight",
        "severs",
        "shape",
    )

    def __init__(
        self, kind: Kind, config: Mapping[str, object], shape: HostShape, *, runs: bool = True, whole: bool = True
    ) -> None:
        """Compile the ports.

        Args:
            kind: the kind.
            config: its config.
            shape: the facts of the host; where a site is on some of its rows or on one map of a stack, of that alone.
            runs: whether the host is run as a module, so that live equations have something to act on.
            whole: whether a site is on all of the host's outputs; an ``output`` equation alone can act on some.

        Raises:
            KindError: ``E_KIND_HOST`` where no equation is left.
        """
        self.kind = kind
        self.config = dict(config)
        self.shape = shape
        self._given = (runs, whole)
        self._strong: dict[float, Bound] = {}
        self.ports: dict[str, Port] = dict(kind.compile(self.config, shape))
        self.mergeable = any(port in self.ports for port in _MERGED)
        live = {port for port in _LIVE if port in self.ports}
        if not runs or (not whole and live - {"output"}):
            if not self.mergeable:
                raise KindError(
                    "E_KIND_HOST",
                    f"kind {kind.name!r} has no equation for the weight, and a "
                    + ("part of a host" if runs else "parameter")
                    + " is nothing else",
                    hint="another target or kind",
                )
            self.ports = {name: port for name, port in self.ports.items() if name not in live}
            live = set()
        self.live = bool(live)
        """Whether it runs by live equations; otherwise the host runs with the changed weight and bias."""
        self.reads_weight = any(self.ports[p].uses & {"W", "b"} for p in _LIVE if p in self.ports)
        self.severs = "replace" in self.ports and not self.ports["replace"].uses & {"base", "W", "b"}
        """Whether the host, with all its parameters, is never run."""
        asked = {name for port in self.ports.values() for name in port.uses}
        self.context = frozenset(asked & set(kind.document.context))
        """What the equations ask of the surroundings."""

        self.positional = any(looks_along(self.ports[p].graph) for p in _LIVE if p in self.ports)
        """Whether it looks along the axis before the last, which is the batch where there is none of positions."""

    def __reduce__(self) -> tuple[object, ...]:
        return (_bound, (self.kind, self.config, self.shape, *self._given))

    def __deepcopy__(self, memo: dict[int, object]) -> Bound:
        return self

    def strengthened(self, strength: float) -> Bound:
        """The same with the config number that the document calls its strength multiplied.

        Kept, because a compiled forward pass must find it ready; :class:`deltahub.delta.Delta` asks for it when a
        scale is set.
        """
        found = self._strong.get(strength)
        if found is None:
            name = self.kind.document.strength
            assert name is not None
            config = {**self.config, name: cast(float, self.config[name]) * strength}
            found = _bound(self.kind, config, self.shape, *self._given)
            if len(self._strong) >= _KEPT_STRENGTHS:
                self._strong.pop(next(iter(self._strong)))
            self._strong[strength] = found
        return found


def _bound(kind: Kind, config: Mapping[str, object], shape: HostShape, runs: bool, whole: bool) -> Bound:  # noqa: FBT001
    return Bound(kind, config, shape, runs=runs, whole=whole)


def _never(*args: object) -> None:
    """A hook of a module that is never called."""


_SEEN = OrderedDict({0: _never})
"""What makes ``nn.TransformerEncoderLayer`` run its modules: it looks for hooks before it computes without them."""


class Site(nn.Module):
    """One delta module at one host: its tensors, and what they do there.

    Registered as a child of the host, so that ``parameters()``, ``to()``, optimisers and wrappers see its tensors,
    but absent from ``state_dict()``: the backbone's own keys stay what they were.
    """

    delta: str
    module: str
    path: str
    bound: Bound
    dropout: float
    merged: bool
    names: tuple[str, ...]
    mixed: bool
    view: ParameterView | None
    rows: Rows | None
    stack: int
    span: Span | None

    def __init__(
        self,
        *,
        delta: str,
        module: str,
        path: str,
        bound: Bound,
        tensors: Mapping[str, Tensor],
        dropout: float = 0.0,
        view: ParameterView | None = None,
        rows: Rows | None = None,
        stack: int = 0,
        span: Span | None = None,
    ) -> None:
        super().__init__()
        # None of these is a parameter or a module, and attaching makes many sites: past nn.Module's own setattr.
        self.__dict__.update(
            delta=delta, module=module, path=path, bound=bound, dropout=dropout, merged=False, names=tuple(tensors),
            view=view, rows=rows, stack=stack, span=span, _forward_hooks=_SEEN,
        )  # fmt: skip
        for name, tensor in tensors.items():
            if isinstance(tensor, nn.Parameter):
                self._parameters[name] = tensor
            else:
                self._buffers[name] = tensor
        self.__dict__["mixed"] = bool(self._buffers)

    @property
    def key(self) -> str:
        own = "" if self.view is None else f":{self.view.weight_name}"
        return f"{SITE_PREFIX}{self.delta}:{self.module}{own}".replace(".", "·")

    @property
    def parameters_there(self) -> tuple[str, ...]:
        """Names, below its module, of the parameters that it is on; of a module's own, those it may have."""
        view = self.view
        names = ("weight", "bias") if view is None else (view.weight_name, view.bias_name)
        return tuple(name for name in names if name is not None)

    def tensors(self) -> list[Tensor]:
        """The site's tensors in the order of its kind's document."""
        if not self.mixed:
            return cast("list[Tensor]", list(self._parameters.values()))
        parameters, buffers = self._parameters, self._buffers
        return [cast(Tensor, parameters[n] if n in parameters else buffers[n]) for n in self.names]

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        destination = kwargs.get("destination", args[0] if args else None)
        return {} if destination is None else destination

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """The backbone's checkpoints know nothing of a site."""

    def extra_repr(self) -> str:
        kind = self.bound.kind
        return f"{kind.name}@{kind.version}, " + ", ".join(
            f"{n}={tuple(t.shape)}" for n, t in zip(self.names, self.tensors(), strict=True)
        )


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

    def __init__(self, slot: Slot, sites: Sequence[Site], spans: Sequence[Span] = ()) -> None:
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


class Slot:
    """What a hosted module knows of its deltas; lives in the module's ``__dict__``."""

    def __init__(self, *, module: nn.Module, switch: Switch) -> None:
        self.base: type[nn.Module] = type(module)
        self.view: View = view_of(module)
        self.switch = switch
        self.named: dict[str, list[Site]] = {}
        """The sites here by delta, in the order of attachment."""
        self.spans: list[Span] = []
        """Those that begin here."""
        self.plans: dict[str, Plan | MixedPlan | None] = {}
        self.kept: dict[str, Tensor | None] | None = None
        """The module's own weight and bias while deltas are merged into it."""
        self.seen = Held()
        """The input of an attention while it runs."""
        self.read = False
        """Whether another module attends to what a transformer gives, so that a prompt's positions stay in it."""

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "plans": {}}

    @property
    def sites(self) -> list[Site]:
        """All sites here, in the order of attachment."""
        return [site for sites in self.named.values() for site in sites]

    def plan(self) -> Plan | MixedPlan | None:
        """The plan for the deltas that are active now; ``None`` where none of them acts here."""
        switch = self.switch
        key = switch.here.key
        if key is None:
            key = switch.key
        try:
            return self.plans[key]
        except KeyError:
            return self._build(key)

    def _build(self, key: str) -> Plan | MixedPlan | None:
        if is_mixed(key):
            return self._mixed(key)
        sites = [s for name in dict.fromkeys(key.split("\n")) for s in self.named.get(name, ())]
        live = [s for s in sites if not s.merged]
        acting = key.split("\n")
        spans = [span for span in self.spans if span.delta in acting]
        plan = Plan(self, sites, spans) if live or spans else None
        self.plans[key] = plan
        return plan

    def _mixed(self, key: str) -> MixedPlan | None:
        """The plan for a list of deltas per row; the one for another list is forgotten."""
        for other in [k for k in list(self.plans) if is_mixed(k)]:
            self.plans.pop(other, None)  # another thread may have been here
        unlike: dict[tuple[int, ...], Plan] = {}
        chosen: list[Plan | None] = []
        for row in rows_of(key):
            plan = cast("Plan | None", self.plans[row] if row in self.plans else self._build(row))
            if plan is not None:  # deltas that have no site here make no difference
                plan = unlike.setdefault(tuple(id(s) for s in (*plan.weighted, *plan.wrapped, *plan.spans)), plan)
            chosen.append(plan)
        mixed = MixedPlan(self, chosen) if unlike else None
        self.plans[key] = mixed
        return mixed

    def transformed(
        self, module: nn.Module, sites: Sequence[Site], view: View | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Weight and bias (canonical) after the given sites, computed in float32 and cast back once."""
        view = view or self.view
        return at_once([self._change(s) for s in sites], module, view.weight(module), view.bias(module))

    def merged(self, module: nn.Module, sites: Sequence[Site], view: View) -> tuple[Tensor, Tensor | None]:
        """The same for good, piece by piece: the bits that a merge from disk to disk gives."""
        weight, transposed = view.weight(module), stored_transposed(view.canonical)
        merging = Merging([self._change(s) for s in sites], weight.shape, transposed=transposed, host=module)
        return merging.whole(weight, view.bias(module))

    def _change(self, site: Site) -> Change:
        strength = self.switch.strength.get(site.delta, 1.0)
        return change_of(site.bound, site.names, site.tensors(), strength, rows=site.rows, stack=site.stack)


@dataclass(kw_only=True)
class Part:
    """One entry of a manifest's ``modules``: a kind with a config at some targets.

    Attributes:
        name: the entry's name, unique in its delta.
        kind: the kind's document with its functions.
        config: the kind's config, defaults filled in.
        paths: exact paths of modules, or of parameters that are hosts of their own, in order.
        tensors: stored tensors by path and name; ``None`` for fresh ones.
        removes: parameters of the backbone that the entry makes unused.
        dropout: probability of dropping the delta's own input while training; not part of a package.
        rows: the outputs of each host that it is on; ``None`` for all.
        stack: how many linear maps each host is; 0 for hosts that are no stacks.
        inputs: paths of the modules whose inputs are read in place of the hosts' own, in the order of ``paths``; none
            for hosts that read their own.
        sources: those modules, once attached.
        sites: the hosts and sites, once attached.
    """

    name: str
    kind: Kind
    config: Mapping[str, object]
    paths: Sequence[str]
    tensors: Mapping[str, Mapping[str, Tensor]] | None = None
    removes: Sequence[str] = ()
    dropout: float = 0.0
    rows: Rows | None = None
    stack: int = 0
    inputs: Sequence[str] = ()
    sources: list[nn.Module] = field(default_factory=list)
    sites: list[tuple[nn.Module, Site]] = field(default_factory=list)
