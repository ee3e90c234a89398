"""What sits at a host: the slot that keeps its sites and the plans that run them.

Plans are built once per set of active deltas and cached, so switching deltas changes one string and nothing that
depends on the size of the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

from torch import Tensor, nn

from deltahub.bound import Bound, Site
from deltahub.hosts import View, view_of
from deltahub.merging import Change, Merging, at_once, stored_transposed
from deltahub.mixing import MixedPlan, is_mixed, rows_of
from deltahub.places import Rows
from deltahub.plans import Caller, Plan, change_of
from deltahub.spanning import Held, Span
from deltahub.switching import Switch
from deltahub.targets import SITE_PREFIX

if TYPE_CHECKING:
    from deltahub.kinds import Kind

__all__ = ["SITE_PREFIX", "Bound", "Caller", "Part", "Plan", "Site", "Slot", "Switch", "change_of"]


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
