"""From a model with deltas to one graph with slots for them, and for others of their kinds at the same places."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from deltahub.converters.onnx.exporting import live_sites
from deltahub.converters.onnx.graphs import Graph
from deltahub.converters.onnx.rules import Host, Rule, neutral, numbers_of, open_axes, open_numbers, rule_for
from deltahub.converters.onnx.slots import STRENGTH, Slot, slot_name, with_slots
from deltahub.converters.onnx.tracing import Traced, structure, trace
from deltahub.errors import ConverterError

if TYPE_CHECKING:
    from deltahub.kinds import Kind
    from deltahub.sites import Part, Site

__all__ = ["trace_slots"]

_TRACE, _TRIED = "deltahub-slots", ("deltahub-first", "deltahub-second")
Calls = dict[str, tuple[tuple[Any, ...], Mapping[str, Any]]]


@dataclass(kw_only=True)
class Group:
    """Hosts that get slots of one kind with one config.

    Attributes:
        kind: the kind.
        config: with the numbers that are open at the size of the trace, and those that multiply at 1.
        open: the numbers that are open.
        given: the config of the first delta.
        paths: the hosts.
        rule: how the kind behaves there; ``None`` where none of the hosts runs in the graphs.
    """

    kind: Kind
    config: dict[str, Any]
    open: tuple[str, ...]
    given: Mapping[str, Any]
    paths: dict[str, None] = field(default_factory=dict)
    rule: Rule | None = None


def trace_slots(
    model: nn.Module, graphs: Sequence[Graph], deltas: Sequence[Any], *, task: str | None, opset: int
) -> tuple[dict[str, Slot], list[Traced]]:
    """Trace with one site for every slot, and turn those sites' tensors into inputs with neutral defaults.

    Raises:
        ConverterError: ``E_ONNX_SLOT`` for a kind without neutral values, or deltas whose configs exclude each other.
    """
    from deltahub.attaching import attach_parts
    from deltahub.composition import using

    groups = _groups(deltas)
    calls = _calls(model, graphs, [path for group in groups for path in group.paths])
    for group in groups:
        path = next((path for path in group.paths if path in calls), None)
        if path is not None:
            group.rule = _tried(model, group, path, calls[path])
            group.config.update({name: group.given[name] for name in group.rule.fixed if name != STRENGTH})
    parts = [_part(group, f"slots-{i}") for i, group in enumerate(groups)]
    generator = torch.Generator().manual_seed(0)
    delta = attach_parts(model, _TRACE, parts, active=False, generator=generator, frozen=False)
    try:
        with using(model, _TRACE):
            slots: dict[str, Slot] = {}
            defaults: dict[str, Tensor] = {}
            for i, (group, part) in enumerate(zip(groups, parts, strict=True)):
                for _, site in part.sites:
                    made = _slots_at(site, group, i)
                    slots.update({one.name: one for one, _ in made})
                    defaults.update({one.name: value for one, value in made})
            sites = live_sites(model)
            key = None if task is None else structure(model, sites, f"{task} slots")
            open_graphs = [with_slots(one, sites, slots) for one in graphs]
            traces = [trace(model, one, opset=opset, dtype=torch.float32, key=key) for one in open_graphs]
        done = [_defaulted(one, defaults) for one in traces]
    finally:
        delta.detach()
    used = {name for one in done for name in one.inputs}
    return {name: replace(slot, used=name in used) for name, slot in slots.items()}, done


def _groups(deltas: Sequence[Any]) -> list[Group]:
    found: dict[str, Group] = {}
    taken: dict[tuple[str, str], tuple[str, Group]] = {}
    for delta in deltas:
        for part in delta.parts:
            if part.rows is not None or part.stack:
                raise ConverterError("E_ONNX_SLOT", "there are no slots for some rows of a module, or for stacks",
                                     where=f"{delta.name}/{part.name}", hint='export it with form="live"')  # fmt: skip
            for _, site in part.sites:
                shape = site.bound.shape
                wide = open_numbers(part.kind, part.config, shape)
                scalable = dict.fromkeys(numbers_of(part.kind, part.config), 1.0)
                config = _checked(part.kind, {**part.config, **wide, **scalable}, {**part.config, **wide})
                key = repr((part.kind.name, part.kind.version, sorted(config.items()), shape.family))
                group = found.setdefault(key, Group(kind=part.kind, config=config, open=tuple(wide), given=part.config))
                other = taken.setdefault((part.kind.name, site.path), (key, group))
                if other[0] != key:
                    raise ConverterError("E_ONNX_SLOT", "two deltas need slots of different config here",
                                         where=site.path, expected=other[1].config, found=config)  # fmt: skip
                group.paths[site.path] = None
    return list(found.values())


def _checked(kind: Kind, config: Mapping[str, Any], otherwise: Mapping[str, Any]) -> dict[str, Any]:
    from deltahub.errors import KindError

    try:
        return dict(kind.check_config(config))
    except KindError:
        return dict(kind.check_config(otherwise))


def _part(group: Group, name: str) -> Part:
    from deltahub.sites import Part

    return Part(name=name, kind=group.kind, config=group.config, paths=list(group.paths))


def _calls(model: nn.Module, graphs: Sequence[Graph], paths: Sequence[str]) -> Calls:
    """How the model calls these hosts, at the sizes that the graphs are traced with."""
    from deltahub.composition import using
    from deltahub.converters.onnx.proof import compute
    from deltahub.sites import SITE_PREFIX

    modules = {name: module for name, module in model.named_modules() if SITE_PREFIX not in name}
    found: Calls = {}

    def seen(path: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if path not in found:
                found[path] = (copy.deepcopy(args), copy.deepcopy(kwargs))

        return hook

    with ExitStack() as stack:
        stack.enter_context(using(model))
        for path in dict.fromkeys(paths):
            if path in modules:  # a host may also be a parameter, which nobody calls
                handle = modules[path].register_forward_pre_hook(seen(path), with_kwargs=True)
                stack.callback(handle.remove)
        for graph in graphs:
            compute(model, graph, graph.samples(graph.sizes[0]))
    return found


@contextmanager
def _two(model: nn.Module, group: Group, path: str) -> Iterator[tuple[Site, Site]]:
    """Two deltas with one site each, for as long as the block runs."""
    from deltahub.attaching import attach_parts

    alone = replace(group, paths={path: None})
    with ExitStack() as stack:
        sites: list[Site] = []
        for name in _TRIED:
            part = _part(alone, "tried")
            generator = torch.Generator().manual_seed(len(sites))
            delta = attach_parts(model, name, [part], active=False, generator=generator, frozen=False)
            stack.callback(delta.detach)
            sites.append(part.sites[0][1])
        yield sites[0], sites[1]


def _tried(model: nn.Module, group: Group, path: str, call: tuple[tuple[Any, ...], Mapping[str, Any]]) -> Rule:
    with _two(model, group, path) as sites:
        host = Host(root=model, module=model.get_submodule(path), sites=sites, call=call)
        return rule_for(host, open_axes(group.kind, group.config, sites[0].bound.shape, group.open))


def _slots_at(site: Site, group: Group, order: int) -> list[tuple[Slot, Tensor]]:
    """A site's slots, with their defaults."""
    from deltahub.converters.onnx.rules import along
    from deltahub.tensors import dtype_name

    rule = group.rule or Rule(scales={}, fixed=(), adds=False, empty=False, small=False)
    numbers = {name for scales in rule.scales.values() for name in scales}
    said = {name: value for name, value in group.config.items() if name not in numbers | set(group.open)}
    if STRENGTH in rule.fixed:
        said[STRENGTH] = 1.0
    axes = open_axes(group.kind, group.config, site.bound.shape, group.open)
    made = []
    for name, value in zip(site.names, site.tensors(), strict=True):
        slot = Slot(
            name=slot_name(group.kind.name, site.path, name), kind=group.kind.name, config=said, path=site.path,
            tensor=name, dtype=dtype_name(value.dtype), shape=axes[name], scales=rule.scales.get(name, ()),
            adds=rule.adds, along=along(axes[name]), order=order,
        )  # fmt: skip
        made.append((slot, neutral(value, axes[name], empty=rule.empty, small=rule.small)))
    return made


def _defaulted(traced: Traced, defaults: Mapping[str, Tensor]) -> Traced:
    """Slots that the graph uses become inputs that may be left out; the others are no inputs of it."""
    import onnx
    from onnx import numpy_helper

    model = onnx.load_model_from_string(traced.data)
    graph = model.graph
    read = {name for node in graph.node for name in node.input}
    kept = []
    for one in list(graph.input):
        value = defaults.get(one.name)
        if value is None:
            continue
        if one.name not in read:
            graph.input.remove(one)
            continue
        graph.initializer.append(numpy_helper.from_array(value.numpy(), one.name))
        for i, (dim, size) in enumerate(zip(one.type.tensor_type.shape.dim, value.shape, strict=True)):
            if dim.HasField("dim_value") and dim.dim_value != size:  # one element for all
                dim.dim_param = f"{one.name}.{i}"
        kept.append(one.name)
    return replace(traced, data=model.SerializeToString(), inputs=tuple(kept))
