"""Sites: one mechanism that puts every kind on every host, and takes it off again.

A touched module keeps its identity; its class is swapped for a subclass generated once per module type, whose
``forward`` consults a *plan*. Plans are built per set of active deltas and cached, so switching deltas changes one
string and nothing that depends on the size of the model. Without an active delta the original ``forward`` runs.

Composition on one module: deltas whose kind has ``weight`` or ``bias`` equations act on the module's own parameters,
in the order of attachment; those with live equations only wrap the result, in that order. Merging one is therefore
never a change of function.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from deltahub.attending import attending, attention_of
from deltahub.contexts import CARRIED, Block, block_of
from deltahub.errors import HostError, InjectionError
from deltahub.hosts import BLOCK, QUANTISED, View
from deltahub.mixing import MixedPlan
from deltahub.places import ParameterView
from deltahub.prompting import Prompted, transformer_of
from deltahub.sharing import sharded_as, shared
from deltahub.sites import Plan, Site, Slot, Switch
from deltahub.spanning import Span

__all__ = ["add_site", "add_span", "hosted", "merge_slot", "parameter_of", "remove_site", "remove_span", "slot_of"]


@functools.cache
def hosted(base: Any) -> type[nn.Module]:
    """The subclass of a module type that consults its slot; generated once per type."""
    names = list(inspect.signature(base.forward).parameters)[1:]
    first = names.pop(0) if names else None
    block = block_of(base)
    original = base.forward
    attend = attending(original) if attention_of(base) is not None else None
    transformer = transformer_of(base)

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        plan = self._deltahub.plan()
        context = kwargs.pop(CARRIED) if CARRIED in kwargs else {}
        if plan is None:
            return original(self, *args, **kwargs)
        if transformer is not None and kwargs.get("inputs_embeds") is not None:
            kwargs = {name: value for name, value in kwargs.items() if name != first}
            x, rest = kwargs.pop("inputs_embeds"), args[1:]
        elif args:
            x, rest = args[0], args[1:]
        elif first in kwargs:
            kwargs = dict(kwargs)
            x, rest = kwargs.pop(first), ()
        else:
            raise HostError("E_HOST_NO_INPUT", "a hosted module was called without an input", where=base.__name__)
        for span in plan.spans:
            span.put(x)
        runs = plan.acting(self)
        if not rest and not kwargs and plan.slot.view is not BLOCK:
            return plan.run(self, functools.partial(original, runs), x)
        if block is not None and _severed(plan):
            _check_heeded(block, dict(zip(names, rest, strict=False)) | kwargs if rest else kwargs, x)
        if transformer is not None:
            run: Callable[..., Any] = Prompted(
                original, transformer, names, plan, whole=self._deltahub.read or "labels" in context
            )
        else:
            run = original if attend is None else _attending(plan, original, attend)
        return _run_block(plan, self, x, _Body(runs, run, rest, kwargs, context))

    namespace = {
        "forward": forward,
        "deltahub_apply": lambda self, x, w: self._deltahub.view.partial(self, self._deltahub.base, x, w),
        "deltahub_base": original,
        "deltahub_weight": lambda self: self._deltahub.view.weight(self),
        "deltahub_bias": lambda self: self._deltahub.view.bias(self),
        "deltahub_context": _context,
        "__reduce_ex__": _reduce,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
    }
    return type(base.__name__, (base,), namespace)


def _attending(plan: Plan | MixedPlan, original: Callable[..., Any], attend: Callable[..., Any]) -> Callable[..., Any]:
    """How an attention runs: as it is, or with our look-up of its function."""
    if not plan.attended and not plan.rescored:
        return original
    return functools.partial(_seen, attend) if plan.sees else attend


def _seen(attend: Callable[..., Any], module: Any, value: Any, *rest: Any, **kwargs: Any) -> Any:
    """An attention whose further keys and values come out of its input."""
    seen = module._deltahub.seen
    seen.x = value
    try:
        return attend(module, value, *rest, **kwargs)
    finally:
        seen.x = None


def _context(self: nn.Module, name: str) -> Any:
    raise HostError(
        "E_HOST_CONTEXT", f"this host cannot give the context {name!r}", where=type(self).__name__
    )  # attach refuses before this can be reached


class _Body:
    """A block with its further arguments, or one that returns more than a tensor: its first output is the one meant."""

    __slots__ = ("context", "kwargs", "module", "original", "rest", "whole")

    def __init__(
        self,
        module: nn.Module,
        original: Callable[..., Any],
        rest: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: Mapping[str, Any],
    ) -> None:
        self.module = module
        self.original = original
        self.rest = rest
        self.kwargs = kwargs
        self.context = context
        self.whole: list[Any] = []

    def __call__(self, value: Any) -> Any:
        out = self.original(self.module, value, *self.rest, **self.kwargs)
        self.whole.append(out)
        return _first(out)


def _severed(plan: Plan | MixedPlan) -> bool:
    """Whether a replacement acts, on any row, that never runs the block."""
    if isinstance(plan, MixedPlan):
        return any(one is not None and one.severed for one in plan.plans)
    return plan.severed


def _run_block(plan: Plan | MixedPlan, module: nn.Module, x: Any, body: _Body) -> Any:
    if isinstance(plan, MixedPlan):
        y = plan.run(module, body, x, together=True)
        if len(body.whole) > 1 and not isinstance(body.whole[-1], Tensor):
            raise InjectionError(
                "E_INJECTION_ROWS",
                "a module that returns more than a tensor cannot run once for each delta of a batch",
                where=plan.path,
            )
    else:
        y = plan.run(module, body, x)
    return _with_first(body.whole[-1], y) if body.whole else y


def _check_heeded(block: Block, given: Mapping[str, Any], x: Any) -> None:
    """Refuse what a replacement would ignore: nothing of a call is dropped without a word."""
    for name in block.refuses:
        if given.get(name) is not None:
            raise HostError(
                "E_HOST_ARGUMENT",
                f"the replacement of this block cannot heed {name!r}",
                where=block.name,
                hint="call the model without it, or disable the delta",
            )
    if block.axes and x.ndim != block.axes:
        raise HostError(
            "E_HOST_ARGUMENT",
            "the replacement of this block takes a sequence of tokens",
            where=block.name,
            expected=f"{block.axes} axes",
            found=f"{x.ndim} axes",
        )


def _first(out: Any) -> Any:
    if isinstance(out, Tensor):
        return out
    if isinstance(out, (tuple, list)):
        return out[0]
    return out[next(iter(out))]  # a ModelOutput


def _with_first(out: Any, y: Any) -> Any:
    if isinstance(out, Tensor):
        return y
    if isinstance(out, tuple):
        rest = (y, *out[1:])
        return type(out)(*rest) if hasattr(out, "_fields") else rest
    if isinstance(out, list):
        return [y, *out[1:]]
    return type(out)(**{**out, next(iter(out)): y})


def _reduce(self: nn.Module, protocol: int) -> Any:
    """Pickle and copy a hosted module as its own class and state: the generated class has no importable name."""
    base = self._deltahub.base  # type: ignore[union-attr]
    return (_restore, (base,), self.__dict__)


def _restore(base: Any) -> nn.Module:
    return object.__new__(hosted(base))


def slot_of(module: nn.Module) -> Slot | None:
    """The slot of a hosted module, ``None`` for one that no delta touches."""
    return cast("Slot | None", module.__dict__.get("_deltahub"))


def add_site(module: nn.Module, site: Site, switch: Switch) -> None:
    """Register a site at its host, swapping the host's class at the first one."""
    slot = _slot(module, switch)
    site.__dict__["training"] = module.training  # past nn.Module's own setattr, which looks for parameters
    slot.named.setdefault(site.delta, []).append(site)
    slot.plans.clear()
    module._modules[site.key] = site


def _slot(module: nn.Module, switch: Switch) -> Slot:
    """A module's slot; a new one swaps its class."""
    slot = slot_of(module)
    if slot is None:
        slot = Slot(module=module, switch=switch)
        module.__dict__["_deltahub"] = slot
        object.__setattr__(module, "__class__", hosted(cast(Any, slot.base)))
    return slot


def remove_site(module: nn.Module, site: Site) -> None:
    """Take a site off; the last one restores the host's class."""
    slot = slot_of(module)
    if slot is None or site not in slot.named.get(site.delta, ()):
        return
    slot.named[site.delta].remove(site)
    if not slot.named[site.delta]:
        del slot.named[site.delta]
    slot.plans.clear()
    del module._modules[site.key]
    _leave(module, slot)


def add_span(module: nn.Module, span: Span, switch: Switch) -> None:
    """Let a module put what it is called with into a span."""
    _slot(module, switch).spans.append(span)
    _slot(module, switch).plans.clear()


def remove_span(module: nn.Module, span: Span) -> None:
    """The inverse of :func:`add_span`."""
    slot = slot_of(module)
    if slot is not None and span in slot.spans:
        slot.spans.remove(span)
        slot.plans.clear()
        _leave(module, slot)


def _leave(module: nn.Module, slot: Slot) -> None:
    """Restore a host's class where nothing is left on it."""
    if not slot.named and not slot.spans:
        del module.__dict__["_deltahub"]
        module.__class__ = slot.base


def merge_slot(module: nn.Module, merged: set[str]) -> None:
    """Make the module's stored parameters those of exactly the named deltas, from the kept originals.

    Args:
        module: a hosted module.
        merged: names of the deltas whose weight and bias equations are to be in the parameters.

    Raises:
        InjectionError: ``E_INJECTION_MERGE_ORDER`` where a delta before a merged one stays live,
            ``E_INJECTION_NONFINITE`` where the result overflows the weight's dtype.
    """
    slot = slot_of(module)
    assert slot is not None
    dual = [s for s in slot.sites if s.bound.mergeable]
    views = list(dict.fromkeys(s.view for s in dual))
    chosen = {view: _chosen(module, dual, merged, view) for view in views}
    before = None if slot.kept is None else {name: parameter_of(module, name) for name in slot.kept}
    if before is not None and slot.kept is not None:
        before = {n: None if v is None else v.detach().clone() if shared(v) else v.detach() for n, v in before.items()}
        _put(module, slot.kept)
    kept: dict[str, Tensor | None] = {}
    new: dict[str, Tensor | None] = {}
    try:
        for view, sites in chosen.items():
            if sites:
                own, values = _merged(module, slot, sites, view or slot.view)
                kept |= own
                new |= values
    except BaseException:
        _put(module, before or {})
        raise
    slot.kept = None
    if new:
        slot.kept = {k: None if v is None else v.detach().clone() if shared(v) else v.detach() for k, v in kept.items()}
        _put(module, new)
    for site in dual:
        site.merged = site in chosen[site.view]
    slot.plans.clear()


def _merged(
    module: nn.Module, slot: Slot, sites: list[Site], view: View
) -> tuple[dict[str, Tensor | None], dict[str, Tensor | None]]:
    """The parameters that sites change, as they are and as they become."""
    ports = {port for site in sites for port in site.bound.ports}
    where = f"{sites[0].path} ({slot.base.__name__})"
    if view is QUANTISED and "weight" in ports:
        raise HostError(
            "E_HOST_QUANTISED",
            "a weight that is kept in a few bits is not merged into: rounding it again would lose much of the delta",
            where=where,
            hint="keep the delta live, or merge into the original backbone and quantise what comes out",
        )
    named = [(p, n) for p, n in zip(("weight", "bias"), sites[0].parameters_there, strict=False) if p in ports]
    own = {name: parameter_of(module, name) for _, name in named}
    with torch.no_grad():
        weight, bias = slot.merged(module, sites, view)
        made = {"weight": view.stored(weight).contiguous(), "bias": bias}
        values = {name: made[port] for port, name in named}
        _check_finite(own, values, where)
        for name, value in values.items():
            before = own[name]
            values[name] = value if value is None or before is None else sharded_as(value, before)
    return own, values


def _chosen(module: nn.Module, dual: list[Site], merged: set[str], view: ParameterView | None) -> list[Site]:
    """The sites on one weight that are to be in it; refused where one before them stays live."""
    slot = cast(Slot, slot_of(module))
    here = [s for s in dual if s.view == view]
    chosen = [s for s in here if s.delta in merged]
    if here[: len(chosen)] != chosen:
        blocking = next(s for s in here if s.delta not in merged)
        raise InjectionError(
            "E_INJECTION_MERGE_ORDER",
            f"delta {blocking.delta!r} acts on this module's weight before the one to be merged",
            where=blocking.path,
            hint=f"merge {blocking.delta!r} first, or both together",
        )
    for site in chosen:
        if "bias" in site.bound.ports and not (view or slot.view).takes_bias(module):
            raise HostError(
                "E_HOST_NO_BIAS",
                "this module has no place for a bias, so a delta that adds one cannot be merged into it",
                where=f"{site.path} ({slot.base.__name__})",
                hint="keep the delta live, or leave this module out of its targets",
            )
    return chosen


def _check_finite(before: Mapping[str, Tensor | None], after: Mapping[str, Tensor | None], where: str) -> None:
    """Refuse a merge that overflows the dtype of the weight, as float16 does beyond 65504."""
    for name, value in after.items():
        old = before[name]
        if value is not None and not _finite(value) and (old is None or _finite(old)):
            raise InjectionError(
                "E_INJECTION_NONFINITE",
                f"merging gives a {name} that is not finite",
                where=where,
                found=str(value.dtype).removeprefix("torch."),
                hint="keep the delta live, or load the backbone in bfloat16 or float32",
            )


def _finite(value: Tensor) -> bool:
    """Whether nothing in it is NaN or infinite, in one pass and without a mask of its size."""
    if not value.is_floating_point() or not value.numel():
        return True
    least, greatest = torch.aminmax(value.detach())
    return bool(torch.isfinite(least) & torch.isfinite(greatest))


def _holder(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds a parameter, and its name there."""
    inner, _, last = name.rpartition(".")
    return module.get_submodule(inner), last


def parameter_of(module: nn.Module, name: str) -> Tensor | None:
    """A parameter by its name below a module; ``None`` where there is none."""
    holder, last = _holder(module, name)
    return cast("Tensor | None", holder._parameters.get(last))


def _put(module: nn.Module, values: Mapping[str, Tensor | None]) -> None:
    """Set the data of a module's own parameters; the ``Parameter`` objects stay, so that references to them hold."""
    for full, value in values.items():
        holder, name = _holder(module, full)
        parameter = holder._parameters.get(name)
        if parameter is not None and value is not None and shared(parameter):
            with torch.no_grad():  # what it holds of the whole cannot be exchanged
                parameter.copy_(value)
        elif parameter is not None and value is not None:
            parameter.data = value.data
        elif value is not None:
            holder._parameters[name] = nn.Parameter(value, requires_grad=False)
        elif name in holder._parameters:
            holder._parameters[name] = None
