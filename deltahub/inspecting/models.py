"""A live module's structure; one on the meta device has it as well."""

from __future__ import annotations

__all__ = ["site_of", "structure_of"]

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import nn

from deltahub.backbones.libraries import class_name
from deltahub.composition import active_names, deltas, registry
from deltahub.hosts import BLOCK, view_of
from deltahub.injection import slot_of
from deltahub.inspecting.structure import DeltaSummary, Node, Parameter, SiteSummary, Structure, totals
from deltahub.sites import SITE_PREFIX

if TYPE_CHECKING:
    from deltahub.sites import Site

Sites = Mapping[str, Iterable[SiteSummary]]


def structure_of(
    model: nn.Module,
    *,
    source: str = "",
    what: str = "model",
    sites: Sites | None = None,
    stored: Mapping[str, str] | None = None,
    **known: Any,
) -> Structure:
    """What a module is made of, and where its deltas sit.

    Args:
        model: any module.
        source: what to call it.
        what: ``model`` or ``backbone``.
        sites: path to what a package would put there; for a module without deltas of its own.
        stored: dtypes of parameters as a checkpoint has them, by name, instead of the module's own.
        known: further fields of the structure.
    """
    walker = _Walker(sites or {}, stored or {})
    root = walker.node(model, "", "")
    sums = totals(root)
    found = tuple(_delta(model, delta, sums["parameters"]) for delta in deltas(model).values())
    return Structure(
        source=source,
        what=what,
        root=root,
        **{"class_name": class_name(model) or root.type, "deltas": found, **sums, **known},
    )


def _delta(model: nn.Module, delta: Any, backbone: int) -> DeltaSummary:
    home = registry(model)
    assert home is not None
    acting = "active" if delta.name in active_names(home) else "inactive"
    count = sum(tensor.numel() for tensor in delta.tensors().values())
    return DeltaSummary(
        name=delta.name,
        kinds=tuple(dict.fromkeys(f"{part.kind.name}@{part.kind.version}" for part in delta.parts)),
        sites=len(delta.sites),
        parameters=count,
        share=count / backbone if backbone else None,
        state="merged" if delta.merged else acting,
    )


class _Walker:
    """One walk over one model: what was met already is not counted again."""

    def __init__(self, sites: Sites, stored: Mapping[str, str]) -> None:
        self.sites = sites
        self.stored = stored
        self.parameters: dict[int, str] = {}
        self.modules: dict[int, str] = {}

    def node(self, module: nn.Module, name: str, path: str) -> Node:
        slot = slot_of(module)
        base: type[nn.Module] = slot.base if slot is not None else type(module)
        if id(module) in self.modules:
            return Node(name=name, type=base.__name__, same=self.modules[id(module)])
        self.modules[id(module)] = path
        own = tuple(self.parameter(n, p, path) for n, p in module._parameters.items() if p is not None)
        children = tuple(
            self.node(child, n, f"{path}.{n}" if path else n)
            for n, child in module._modules.items()
            if child is not None and not n.startswith(SITE_PREFIX)
        )
        family, shape, host = _host(module, base, children)
        count = sum(parameter.count for parameter in own) or None
        if slot is not None:
            sites = tuple(site_of(site, count) for site in slot.sites)
        else:
            sites = tuple(_shared(site, count) for site in self.sites.get(path, ()))
        return Node(
            name=name,
            type=base.__name__,
            family=family,
            shape=shape,
            host=host,
            parameters=own,
            sites=sites,
            children=children,
        )

    def parameter(self, name: str, parameter: nn.Parameter, path: str) -> Parameter:
        full = f"{path}.{name}" if path else name
        first = self.parameters.setdefault(id(parameter), full)
        return Parameter(
            name=name,
            shape=tuple(parameter.shape),
            dtype=self.stored.get(full) or str(parameter.dtype).removeprefix("torch."),
            trainable=parameter.requires_grad,
            tied=first if first != full else "",
        )


def _host(
    module: nn.Module, base: type[nn.Module], children: tuple[Node, ...]
) -> tuple[str, tuple[int, ...], dict[str, Any]]:
    """Family, canonical weight's shape, and the facts that a kind's shapes depend on."""
    view = view_of(module, base)
    if view is BLOCK:
        # As deltahub.hosts.block_width finds it, without another walk for every block.
        widths = (child.host.get("out") for child in reversed(children))
        width = next((width for width in widths if width is not None), None)
        return "block", (), {"in": width, "out": width}
    facts = view.shape(module, base)
    host = {
        "in": facts.d_in,
        "out": facts.d_out,
        "kernel": facts.kernel,
        "bias": facts.bias,
        "grouped": facts.grouped,
        "channels_first": facts.channels_first,
    }
    return facts.family, facts.weight_shape or (), host


def site_of(site: Site, host: int | None) -> SiteSummary:
    """A site of a live model; ``host`` is how many numbers its module holds itself."""
    bound = site.bound
    tensors = dict(zip(site.names, site.tensors(), strict=True))
    count = sum(tensor.numel() for tensor in tensors.values())
    return SiteSummary(
        delta=site.delta,
        module=site.module,
        kind=f"{bound.kind.name}@{bound.kind.version}",
        config=dict(bound.config),
        ports=tuple(sorted(bound.ports)),
        tensors={name: tuple(tensor.shape) for name, tensor in tensors.items()},
        parameters=count,
        trainable=sum(p.numel() for p in site._parameters.values() if p is not None and p.requires_grad),
        share=count / host if host else None,
    )


def _shared(site: SiteSummary, host: int | None) -> SiteSummary:
    return replace(site, share=site.parameters / host if host else None)
