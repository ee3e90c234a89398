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
    metadata_of,
    notes_of,
    opened,
    write_report,
)
from deltahub.converters.onnx.graphs import Graph
from deltahub.converters.onnx.proof import TOLERANCE, Parity, cases, effect, prove
from deltahub.converters.onnx.slots import Slot, filled
from deltahub.converters.onnx.slotting import trace_slots
from deltahub.converters.onnx.storing import write_data, write_model
from deltahub.converters.onnx.tasks import graphs_of, task_of
from deltahub.converters.onnx.tracing import values_of
from deltahub.errors import ConverterError

__all__ = ["DELTAS", "add_delta", "export_swappable"]

DELTAS = "deltas"
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}")


def export_swappable(
    source: nn.Module | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    task: str | None = None,
    graphs: Sequence[Graph] | None = None,
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
        graphs: the graphs themselves, for a model that no task fits.
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
        task = task or ("custom" if graphs is not None else task_of(model))
        chosen = list(graphs) if graphs is not None else graphs_of(model, task)
        opset = opset or min((one.opset or OPSET for one in chosen), default=OPSET)
        with clock("trace"):
            slots, traces = trace_slots(
                model, chosen, list(named.values()), task=None if graphs is not None else task, opset=opset
            )
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
        return {
            one["name"]: Slot(**{**one, "shape": tuple(one["shape"]), "scales": tuple(one["scales"])})
            for one in report.get("slots", ())
        }
    except (TypeError, KeyError) as error:
        raise ConverterError("E_ONNX_FILE", "the report's slots make no sense", where=folder / EXPORT) from error
