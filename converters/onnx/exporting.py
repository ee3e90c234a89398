"""Exporting: a delta with its backbone as graphs for ONNX Runtime, proved against PyTorch before anything is there."""

from __future__ import annotations

import gc
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from deltahub.converters.onnx.carried import carry, describe
from deltahub.converters.onnx.graphs import Graph
from deltahub.converters.onnx.proof import TOLERANCE, Case, Parity, cases, effect, prove
from deltahub.converters.onnx.providers import runtime
from deltahub.converters.onnx.storing import Data, write_data, write_model
from deltahub.converters.onnx.tasks import graphs_of, task_of
from deltahub.converters.onnx.tracing import Traced, structure, trace, values_of
from deltahub.errors import ConverterError, InjectionError

if TYPE_CHECKING:
    from deltahub.package import Probe

__all__ = ["EXPORT", "OPSET", "OnnxExport", "Subject", "export_onnx"]

OPSET = 24
"""The first whose ``Attention`` all the models run with; older ones spell attention out."""
EXPORT = "export.json"
SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class OnnxExport:
    """What an export made.

    Attributes:
        folder: where it is.
        form: ``merged``, ``live`` or ``swappable``.
        task: what the graphs are for.
        graphs: their files.
        parity: every comparison with PyTorch.
        effect: how much the delta changes what comes out.
        bytes: of all files.
        cached: whether every trace came from the cache.
        seconds: wall time by step.
        notes: what a reader should know.
    """

    folder: Path
    form: str
    task: str
    graphs: tuple[str, ...]
    parity: tuple[Parity, ...]
    effect: float
    bytes: int
    cached: bool
    seconds: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def difference(self) -> float:
        """The greatest absolute difference between ONNX Runtime and PyTorch."""
        return max((one.difference for one in self.parity), default=0.0)

    def __str__(self) -> str:
        shapes = len({(one.graph, one.case) for one in self.parity})
        lines = [
            f"{self.form} export for {self.task}: {', '.join(self.graphs)} in {self.folder}, {self.bytes / 1e6:.1f} MB",
            f"the greatest difference from PyTorch over {shapes} sets of inputs is {self.difference:.2g}",
            f"the delta's effect is {self.effect:.2g}",
            *self.notes,
        ]
        return "\n".join(lines)


@dataclass(kw_only=True)
class Subject:
    """What is exported: a model, where it came from, and whether it is ours to change."""

    model: nn.Module
    owned: bool
    probe: Probe | None
    facts: dict[str, Any]


def export_onnx(
    source: nn.Module | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    form: str = "merged",
    task: str | None = None,
    graphs: Sequence[Graph] | None = None,
    dtype: torch.dtype | str | None = None,
    opset: int | None = None,
    tolerance: float | None = None,
    probe: Probe | None = None,
    overwrite: bool = False,
    **loading: Any,
) -> OnnxExport:
    """Export a delta on its backbone to ONNX, run it in ONNX Runtime, and compare it with PyTorch.

    Args:
        source: a model with active deltas, or a package as :func:`deltahub.load` takes it.
        out: the new folder; absent or whole afterwards.
        form: ``merged`` (one plain graph), ``live`` (the delta's own operations stay in it), or ``swappable`` (slots
            for deltas that are chosen per run).
        task: what the graphs are for; by default what the model's class says.
        graphs: the graphs themselves, for a model that no task fits.
        dtype: ``float32`` by default, or ``float16``.
        opset: version of ONNX's operators; by default 24, or what suits the model.
        tolerance: greatest difference that is accepted, relative to an output's greatest value above 1.
        probe: known inputs; those of the package by default.
        overwrite: replace an existing folder.
        loading: options of :func:`deltahub.load`, such as ``backbone``.

    Raises:
        ConverterError: ``E_ONNX_UNSUPPORTED``, ``E_ONNX_STATIC``, ``E_ONNX_DIFFERS``, ``E_ONNX_UNMERGEABLE``,
            ``E_ONNX_TASK``, ``E_ONNX_DTYPE``, ``E_ONNX_SPACE``, ``E_ONNX_TOO_LARGE``, ``E_ONNX_LIBRARY``; nothing is
            left behind.
    """
    runtime()
    if form not in {"merged", "live", "swappable"}:
        raise ConverterError("E_ONNX_FORM", "there is no such form", expected="merged, live, swappable", found=form)
    if form == "swappable":
        from deltahub.converters.onnx.swapping import export_swappable

        return export_swappable(
            source, out, task=task, graphs=graphs, opset=opset, tolerance=tolerance, overwrite=overwrite, **loading
        )
    clock = Clock()
    wanted = checked_dtype(dtype)
    with clock("load"):
        subject = opened(source, wanted, probe, loading)
    return _export(subject, Path(out), clock, form=form, task=task, graphs=graphs, dtype=wanted, opset=opset,
                   tolerance=tolerance, overwrite=overwrite)  # fmt: skip


def _export(
    subject: Subject, out: Path, clock: Clock, *, form: str, task: str | None, graphs: Sequence[Graph] | None,
    dtype: torch.dtype, opset: int | None, tolerance: float | None, overwrite: bool,
) -> OnnxExport:  # fmt: skip
    from deltahub.converters.shards import new_folder

    model = subject.model
    with evaluating(model), new_folder(out, overwrite=overwrite) as folder:
        task = task or ("custom" if graphs is not None else task_of(model))
        chosen = list(graphs) if graphs is not None else graphs_of(model, task)
        with clock("reference"):
            known = cases(model, chosen, dtype, subject.probe)
            change = effect(model, known)
        opset = opset or min((one.opset or OPSET for one in chosen), default=OPSET)
        with merged(model, merge=form == "merged", forever=subject.owned):
            with clock("trace"):
                known_task = None if graphs is not None else task
                traces, filled = traced(model, chosen, form=form, task=known_task, opset=opset, dtype=dtype)
            with clock("write"):
                data = write_data(folder, {**values_of(model), **filled}, traces, None)
                carry(model, folder)
                said = metadata_of(subject, form=form, task=task, opset=opset)
                for one, made in zip(chosen, traces, strict=True):
                    write_model(folder / one.file, made, data, said)
        release(subject)
        del model
        with clock("proof"):
            parity = prove(folder, known, tolerance if tolerance is not None else TOLERANCE[dtype])
        result = OnnxExport(
            folder=out, form=form, task=task, graphs=tuple(one.file for one in chosen), parity=tuple(parity),
            effect=change, bytes=sum(f.stat().st_size for f in folder.iterdir()),
            cached=all(one.cached for one in traces), seconds=clock.seconds, notes=notes_of(known, change, parity),
        )  # fmt: skip
        write_report(folder, result, chosen, traces, data, subject.facts, opset=opset, dtype=dtype)
    return result


def traced(
    model: nn.Module, graphs: Sequence[Graph], *, form: str, task: str | None, opset: int, dtype: torch.dtype
) -> tuple[list[Traced], dict[str, torch.Tensor]]:
    """The graphs of a model, and the values that are weights of theirs without being tensors of it."""
    if form == "live" and task is not None and dtype == torch.float32:
        from deltahub.converters.onnx.fixing import trace_fixed

        found = trace_fixed(model, graphs, task=task, opset=opset)
        if found is not None:
            return found
    key = None if task is None else structure(model, live_sites(model), task)
    return [trace(model, one, opset=opset, dtype=dtype, key=key) for one in graphs], {}


def notes_of(known: Sequence[Case], change: float, parity: Sequence[Parity]) -> tuple[str, ...]:
    greatest = max((one.difference for one in parity), default=0.0)
    notes = []
    if change == 0:
        notes.append("no delta acts, or it changes nothing: the comparison says nothing about a delta")
    elif change < 10 * greatest:
        notes.append("the delta's effect is not far above the difference: the comparison says little about it")
    if not any(case.name == "probe" for case in known):
        notes.append("there was no probe that fits: random inputs of several sizes were compared")
    return tuple(notes)


def checked_dtype(dtype: torch.dtype | str | None) -> torch.dtype:
    found: Any = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype or torch.float32
    if not isinstance(found, torch.dtype) or found not in TOLERANCE:
        raise ConverterError("E_ONNX_DTYPE", "graphs cannot be made and proved in this dtype", found=dtype,
                             expected=", ".join(str(one).removeprefix("torch.") for one in TOLERANCE),
                             hint="int8 and int4 are made from a float32 export: see convert_precision")  # fmt: skip
    return found


def opened(
    source: nn.Module | str | os.PathLike[str], dtype: torch.dtype, probe: Probe | None, loading: Mapping[str, Any]
) -> Subject:
    """The model with its deltas: as given, or loaded from a package."""
    if isinstance(source, nn.Module):
        if loading:
            from deltahub.errors import UsageError

            raise UsageError("E_ONNX_OPTIONS", "these options are for packages, and a model was given",
                             found=", ".join(loading))  # fmt: skip
        from deltahub.composition import registry, require_unmixed

        home = registry(source)
        if home is not None:
            require_unmixed(home)
        own = {p.dtype for p in source.parameters() if p.is_floating_point()}
        if own - {dtype}:
            raise ConverterError(
                "E_ONNX_DTYPE", "the model's parameters are not of the dtype asked for",
                expected=dtype, found=", ".join(sorted(map(str, own))), hint="convert the model with .to() first",
            )  # fmt: skip
        return Subject(model=source, owned=False, probe=probe, facts=describe(source))
    from deltahub.hub import pull
    from deltahub.loading import load
    from deltahub.package import Package

    if probe is None:
        fetching = ("revision", "cache_dir", "token", "endpoint", "local_files_only", "lock", "policy")
        pulled = pull(source, **{name: loading[name] for name in fetching if name in loading})
        with Package.open(
            pulled.path, root=pulled.root, allow_nonfinite=bool(loading.get("allow_nonfinite"))
        ) as package:
            probe = package.probe()
    model = load(source, dtype=dtype, **loading)
    facts = describe(model)
    return Subject(model=model, owned=True, probe=probe, facts=facts)


def live_sites(model: nn.Module) -> list[Any]:
    """Sites that act while the model runs, in the order of its modules."""
    from deltahub.injection import slot_of
    from deltahub.sites import Plan

    found: list[Any] = []
    for module in model.modules():
        slot = slot_of(module)
        plan = None if slot is None else slot.plan()
        if isinstance(plan, Plan):
            found += [*plan.weighted, *plan.wrapped]
    return found


@contextmanager
def merged(model: nn.Module, *, merge: bool, forever: bool) -> Iterator[None]:
    """The model with its active deltas in its weights, and as it was afterwards."""
    from deltahub.composition import active_names, registry

    home = registry(model)
    done = []
    try:
        if merge and home is not None:
            for name in active_names(home):
                delta = home[name]
                if not delta.merged:
                    delta.merge(permanently=forever)
                    done.append(delta)
    except InjectionError as error:
        undo(done, forever=forever)
        raise ConverterError(
            "E_ONNX_UNMERGEABLE", f"this delta cannot be exported merged: {error.what}", where=error.where,
            found=error.found, hint='keep its operations in the graph: form="live"',
        ) from error  # fmt: skip
    try:
        yield
    finally:
        undo(done, forever=forever)


def undo(done: Sequence[Any], *, forever: bool) -> None:
    for delta in reversed(done):
        if not forever:
            delta.unmerge()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    del model  # a model that is ours is let go of inside the block
    try:
        yield
    finally:
        for module in training:
            module.training = True


def release(subject: Subject) -> None:
    """Let go of a model that nobody else holds: ONNX Runtime is about to map its own weights."""
    if subject.owned:
        subject.model = nn.Module()
        gc.collect()


def metadata_of(subject: Subject, *, form: str, task: str, opset: int) -> dict[str, str]:
    """The metadata of a graph, which every runtime can read."""
    facts = {"schema": SCHEMA, "form": form, "task": task, "opset": opset, **subject.facts}
    return {
        f"deltahub.{key}": value if isinstance(value, str) else json.dumps(value, sort_keys=True)
        for key, value in sorted(facts.items())
    }


def write_report(
    folder: Path, result: OnnxExport, graphs: Sequence[Graph], traces: Sequence[Traced], data: Data,
    facts: Mapping[str, Any], *, opset: int, dtype: torch.dtype, further: Mapping[str, Any] | None = None,
) -> None:  # fmt: skip
    """Write ``export.json``: what is in the folder, with digests, and what was compared."""
    from deltahub.tensors import sha256_file

    files = {}
    for path in sorted(p for p in folder.iterdir() if p.suffix == ".onnx"):
        size, digest = sha256_file(path)
        files[path.name] = {"size": size, "sha256": digest}
    files[data.file] = {"size": data.size, "sha256": data.sha256}
    weights = {}
    for one, traced in zip(graphs, traces, strict=True):
        weights[one.file] = {
            name: {"tensor": w.name, "transposed": w.transposed, **asdict(data.places[w])}
            for name, w in sorted(traced.weights.items())
        }
    report = {
        "schema": SCHEMA, "form": result.form, "task": result.task, "opset": opset,
        "dtype": str(dtype).removeprefix("torch."), **facts,
        "graphs": [
            {
                "file": one.file,
                "inputs": [asdict(i) for i in one.inputs],
                "outputs": [asdict(o) for o in one.outputs],
                "sizes": [dict(sizes) for sizes in one.sizes],
                "left": one.left,
            }
            for one in graphs
        ],
        "files": files,
        "parity": {
            "runtime": runtime().__version__, "provider": "cpu", "greatest": result.difference,
            "effect": result.effect, "cases": [asdict(one) for one in result.parity],
        },
        "notes": list(result.notes),
        "seconds": {name: round(value, 3) for name, value in result.seconds.items()},
        **(further or {}),
        "weights": weights,
    }  # fmt: skip
    (folder / EXPORT).write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


class Clock:
    """Wall time by step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, step: str) -> Iterator[None]:
        start = time.monotonic()
        try:
            yield
        finally:
            self.seconds[step] = self.seconds.get(step, 0.0) + time.monotonic() - start
