"""The swappable form: one backbone graph with slots, and deltas as small files chosen per run."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deltahub.converters.onnx.exporting import (
    EXPORT,
    OPSET,
    Clock,
    OnnxExport,
    evaluating,
    live_sites,
    metadata_of,
    notes_of,
    opened,
    write_report,
)
from deltahub.converters.onnx.graphs import Graph
from deltahub.converters.onnx.proof import TOLERANCE, Parity, cases, effect, prove
from deltahub.converters.onnx.slots import RULES, Slot, filled, neutral, rule_of, slots_of, with_slots
from deltahub.converters.onnx.storing import write_data, write_model
from deltahub.converters.onnx.tasks import graphs_of, task_of
from deltahub.converters.onnx.tracing import Traced, structure, trace, values_of
from deltahub.errors import ConverterError

__all__ = ["DELTAS", "add_delta", "export_swappable"]

DELTAS = "deltas"
_TRACE = "deltahub-slots"
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}")


def export_swappable(
    source: nn.Module | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    task: str | None = None,
    opset: int | None = None,
    tolerance: float | None = None,
    overwrite: bool = False,
    **loading: Any,
) -> OnnxExport:
    """One graph with slots wherever the deltas of a model act, and each delta as a file beside it.

    The graph is compared without any delta, with each by itself, and with all that may act at once.

    Args:
        source: a model with deltas, active or not, or a package.
        out: the new folder.
        task: what the graph is for; by default what the model's class says.
        opset: version of ONNX's operators.
        tolerance: as for :func:`export_onnx`.
        overwrite: replace an existing folder.
        loading: options of :func:`deltahub.load`.

    Raises:
        ConverterError: as :func:`export_onnx`, and ``E_ONNX_SLOT`` for a kind without slots.
    """
    from deltahub.composition import deltas
    from deltahub.converters.onnx.carried import carry
    from deltahub.converters.shards import new_folder

    clock = Clock()
    with clock("load"):
        subject = opened(source, torch.float32, None, loading)
    model = subject.model
    named = dict(deltas(model))
    if not named:
        raise ConverterError("E_ONNX_SLOT", "the model has no deltas, so it is not known where slots should be",
                             where=type(model).__name__, hint="attach one; its values do not matter")  # fmt: skip
    with evaluating(model), new_folder(Path(out), overwrite=overwrite) as folder:
        task = task or task_of(model)
        chosen = graphs_of(model, task)
        opset = opset or min((one.opset or OPSET for one in chosen), default=OPSET)
        with clock("trace"):
            slots, traces = _traced(model, chosen, list(named.values()), task=task, opset=opset)
        with clock("write"):
            data = write_data(folder, values_of(model), traces, None)
            carry(model, folder)
            said = metadata_of(subject, form="swappable", task=task, opset=opset)
            for one, traced in zip(chosen, traces, strict=True):
                write_model(folder / one.file, traced, data, said)
            (folder / DELTAS).mkdir()
            values = {name: write_delta(folder, slots, delta) for name, delta in named.items()}
        with clock("proof"):
            parity, change = _prove(model, folder, chosen, values, tolerance or TOLERANCE[torch.float32])
        result = OnnxExport(
            folder=Path(out), form="swappable", task=task, graphs=tuple(one.file for one in chosen),
            parity=tuple(parity), effect=change, cached=all(one.cached for one in traces), seconds=clock.seconds,
            bytes=sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()),
            notes=() if change else notes_of([], 0.0, parity)[:1],
        )  # fmt: skip
        write_report(
            folder, result, chosen, traces, data, subject.facts, opset=opset, dtype=torch.float32,
            further={"slots": [asdict(slot) for slot in slots.values()]},
        )  # fmt: skip
    return result


def _traced(
    model: nn.Module, graphs: Sequence[Graph], chosen: Sequence[Any], *, task: str, opset: int
) -> tuple[dict[str, Slot], list[Traced]]:
    """Trace with one site of size 1 for every slot, and turn those sites' tensors into inputs with neutral defaults."""
    from deltahub.attaching import attach_parts
    from deltahub.composition import using
    from deltahub.sites import Part

    wanted: dict[tuple[str, tuple[tuple[str, Any], ...]], dict[str, Any]] = {}
    for delta in chosen:
        for part in delta.parts:
            rule = rule_of(part.kind.name)
            said = {k: v for k, v in part.config.items() if k not in rule.config}
            for name, value in rule.fixed.items():
                if said.get(name) != value:
                    raise ConverterError("E_ONNX_SLOT", f"slots of the kind {part.kind.name!r} need another config",
                                         where=f"{delta.name}/{part.name}", expected={name: value},
                                         found={name: said.get(name)})  # fmt: skip
            group = wanted.setdefault((part.kind.name, tuple(sorted(said.items()))), {})
            group.update(dict.fromkeys(site.path for _, site in part.sites))
            group.setdefault("", part.kind)
    parts: list[Part] = []
    for (name, facts), group in wanted.items():
        kind = group.pop("")
        config = kind.check_config({**RULES[name].config, **dict(facts)})
        parts.append(Part(name=f"{name}-{len(parts)}", kind=kind, config=config, paths=list(group)))
    _check_once(parts)
    delta = attach_parts(model, _TRACE, parts, active=False, generator=torch.Generator().manual_seed(0), frozen=False)
    try:
        with using(model, _TRACE):
            sites = live_sites(model)
            slots = {slot.name: slot for site in sites for slot in slots_of(site)}
            key = structure(model, sites, f"{task} slots")
            open_graphs = [with_slots(one, sites, slots) for one in graphs]
            traces = [trace(model, one, opset=opset, dtype=torch.float32, key=key) for one in open_graphs]
        made = [_defaulted(one, slots) for one in traces]
    finally:
        delta.detach()
    used = {name for one in made for name in one.inputs}
    return {name: replace(slot, used=name in used) for name, slot in slots.items()}, made


def _check_once(parts: Sequence[Any]) -> None:
    seen: dict[tuple[str, str], Any] = {}
    for part in parts:
        for path in part.paths:
            other = seen.setdefault((part.kind.name, path), part)
            if other is not part:
                raise ConverterError("E_ONNX_SLOT", "two deltas need slots of different config here", where=path,
                                     expected=dict(other.config), found=dict(part.config))  # fmt: skip


def _defaulted(traced: Traced, slots: Mapping[str, Slot]) -> Traced:
    """Slots that the graph uses become inputs that may be left out; the others are no inputs of it."""
    import onnx
    from onnx import numpy_helper

    model = onnx.load_model_from_string(traced.data)
    graph = model.graph
    read = {name for node in graph.node for name in node.input}
    kept = []
    for one in list(graph.input):
        slot = slots.get(one.name)
        if slot is None:
            continue
        if one.name in read:
            graph.initializer.append(numpy_helper.from_array(neutral(slot).numpy(), one.name))
            kept.append(one.name)
        else:
            graph.input.remove(one)
    return replace(traced, data=model.SerializeToString(), inputs=tuple(kept))


def write_delta(folder: Path, slots: Mapping[str, Slot], delta: Any) -> dict[str, Tensor]:
    """Write one delta's values of slots into the folder's ``deltas``; gives them."""
    from deltahub.tensors import write

    values = slot_values(slots, delta)
    facts = {"name": delta.name, "kinds": sorted({f"{p.kind.name}@{p.kind.version}" for p in delta.parts})}
    write(folder / DELTAS / f"{delta.name}.safetensors", values, metadata={"deltahub": json.dumps(facts)})
    return values


def slot_values(slots: Mapping[str, Slot], delta: Any) -> dict[str, Tensor]:
    """A delta as values of slots, its scale folded in."""
    values: dict[str, Tensor] = {}
    for part in delta.parts:
        for _, site in part.sites:
            tensors = dict(zip(site.names, (t.detach().cpu() for t in site.tensors()), strict=True))
            found = filled(slots, part.kind.name, part.config, site.path, tensors, strength=delta.scale)
            if found.keys() & values.keys():
                raise ConverterError("E_ONNX_SLOT", "two parts of one delta need the same slot", where=site.path)
            values.update(found)
    return {name: value.contiguous() for name, value in values.items()}


def _prove(
    model: nn.Module, folder: Path, graphs: Sequence[Graph], values: Mapping[str, Mapping[str, Tensor]],
    tolerance: float,
) -> tuple[list[Parity], float]:  # fmt: skip
    """Compare without a delta, and with each."""
    from deltahub.composition import using

    done: list[Parity] = []
    change = 0.0
    with using(model):
        done += prove(folder, cases(model, graphs, torch.float32, None), tolerance)
    for name, given in values.items():
        with using(model, name):
            known = cases(model, graphs, torch.float32, None)
            change = max(change, effect(model, known))
            inputs = {key: value.numpy() for key, value in given.items()}
            done += [replace(p, case=f"{name}: {p.case}") for p in prove(folder, known, tolerance, feeds=inputs)]
    return done, change


def add_delta(folder: str | os.PathLike[str], source: Any, *, name: str | None = None, overwrite: bool = False) -> Path:
    """Put another delta beside a swappable export: a package, its folder, or its Hub name. Nothing is traced.

    Raises:
        ConverterError: ``E_ONNX_SLOT`` where the graph has no slot for it, ``E_ONNX_FILE``, ``E_ONNX_BACKBONE`` where
            the delta was made for another backbone.
    """
    from deltahub.converters.packages import opened as open_package
    from deltahub.tensors import write

    place = Path(folder)
    report = read_report(place)
    slots = slots_in(report, place)
    package = open_package(source)
    name = name or re.sub(r"[^A-Za-z0-9_-]+", "-", package.path.resolve().name)
    if not _NAME.fullmatch(name):
        raise ConverterError("E_ONNX_SLOT", "a delta's name is letters, digits, '_' and '-'", found=name)
    target = place / DELTAS / f"{name}.safetensors"
    if target.exists() and not overwrite:
        raise ConverterError("E_ONNX_FILE", "there is a delta of this name already", where=target)
    made = package.manifest.backbone.identity
    own = report["backbone"]["identity"]
    if own["exact"] != made.exact and own["bf16"] != made.bf16:
        raise ConverterError("E_ONNX_BACKBONE", "the delta was made for another backbone", where=package.path,
                             expected=own["exact"], found=made.exact)  # fmt: skip
    values: dict[str, Tensor] = {}
    for module in package.manifest.modules:
        config = package.config(module.name)
        for path, tensors in package.tensors(module.name).items():
            values.update(filled(slots, module.kind, config, path, tensors))
    facts = {"name": name, "kinds": sorted({f"{m.kind}@{m.version}" for m in package.manifest.modules})}
    write(target, {k: v.contiguous() for k, v in values.items()}, metadata={"deltahub": json.dumps(facts)})
    return target


def read_report(folder: Path) -> dict[str, Any]:
    """An export's ``export.json``.

    Raises:
        ConverterError: ``E_ONNX_FILE``.
    """
    try:
        found = json.loads((folder / EXPORT).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConverterError("E_ONNX_FILE", f"the folder holds no export: {error}", where=folder / EXPORT) from error
    if not isinstance(found, dict) or found.get("schema") != 1 or not isinstance(found.get("files"), dict):
        raise ConverterError("E_ONNX_FILE", "this is no report of an export that is known here", where=folder / EXPORT)
    return found


def slots_in(report: Mapping[str, Any], folder: Path) -> dict[str, Slot]:
    try:
        return {one["name"]: Slot(**{**one, "shape": tuple(one["shape"])}) for one in report.get("slots", ())}
    except (TypeError, KeyError) as error:
        raise ConverterError("E_ONNX_FILE", "the report's slots make no sense", where=folder / EXPORT) from error
