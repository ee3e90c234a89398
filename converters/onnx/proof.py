"""Proof: what ONNX Runtime computes with an export is what PyTorch computes, on the probe and on other sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from deltahub.converters.onnx.graphs import Graph
from deltahub.errors import ConverterError

if TYPE_CHECKING:
    from deltahub.package import Probe

__all__ = ["Case", "Parity", "cases", "compare", "effect", "prove"]

TOLERANCE: Mapping[torch.dtype, float] = {torch.float32: 1e-4, torch.float16: 2e-2, torch.float64: 1e-6}


@dataclass(frozen=True, kw_only=True)
class Parity:
    """One comparison.

    Attributes:
        graph: the graph's file.
        case: the sizes of the axes, or ``probe``.
        output: the output's name.
        difference: greatest absolute difference between ONNX Runtime and PyTorch.
        magnitude: greatest absolute value that PyTorch gives.
        allowed: the greatest difference that is accepted.
    """

    graph: str
    case: str
    output: str
    difference: float
    magnitude: float
    allowed: float


@dataclass(frozen=True, kw_only=True)
class Case:
    """Inputs, and what PyTorch makes of them."""

    graph: Graph
    name: str
    inputs: Mapping[str, Tensor]
    outputs: Sequence[Tensor]
    published: Mapping[str, Tensor]


def cases(model: nn.Module, graphs: Sequence[Graph], dtype: torch.dtype, probe: Probe | None) -> list[Case]:
    """What PyTorch computes for every graph: at all its sizes, and on the package's probe where it fits."""
    found = []
    for graph in graphs:
        for sizes in graph.sizes:
            inputs = graph.samples(sizes, dtype)
            name = ", ".join(f"{key}={value}" for key, value in sizes.items())
            outputs = compute(model, graph, inputs)
            found.append(Case(graph=graph, name=name, inputs=inputs, outputs=outputs, published={}))
        given = None if probe is None else probe_inputs(graph, probe.inputs)
        if probe is not None and given is not None:
            published = {one.name: probe.outputs[one.name] for one in graph.outputs if one.name in probe.outputs}
            outputs = compute(model, graph, given)
            found.append(Case(graph=graph, name="probe", inputs=given, outputs=outputs, published=published))
    return found


def compute(model: nn.Module, graph: Graph, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with torch.no_grad():
        out = graph.module(model)(*(value.to(device) for value in inputs.values()))
    return [value.detach().cpu() for value in out]


def probe_inputs(graph: Graph, given: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """A graph's inputs from a probe's, with the usual values for what it leaves out; ``None`` where that cannot be."""
    found: dict[str, Tensor] = {}
    ids = given.get("input_ids")
    for one in graph.inputs:
        if one.name in given:
            found[one.name] = given[one.name]
        elif ids is None:
            return None
        elif one.values == "mask":
            found[one.name] = torch.ones_like(ids)
        elif one.values == "types":
            found[one.name] = torch.zeros_like(ids)
        elif one.values == "positions":
            mask = found.get("attention_mask", torch.ones_like(ids))
            found[one.name] = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
        elif "past_sequence_length" in one.dims:
            shape = [ids.shape[0], *(0 if dim == "past_sequence_length" else int(dim) for dim in one.dims[1:])]
            found[one.name] = torch.zeros(shape)
        else:
            return None
    return found


def effect(model: nn.Module, found: Sequence[Case]) -> float:
    """How much the active deltas change what comes out; 0 where there are none."""
    from deltahub.composition import active_names, registry, using

    home = registry(model)
    if home is None or not active_names(home) or any(d.merged for d in home.values()):
        return 0.0
    first = {case.graph.file: case for case in reversed(found)}
    with using(model):
        return max(
            _greatest(a - b)
            for case in first.values()
            for a, b in zip(compute(model, case.graph, case.inputs), case.outputs, strict=True)
        )


def prove(
    folder: Path, found: Sequence[Case], tolerance: float, *, feeds: Mapping[str, Any] | None = None
) -> list[Parity]:
    """Run every case in ONNX Runtime and compare.

    Args:
        folder: where the graphs are.
        found: what PyTorch computed.
        tolerance: greatest difference, relative to the greatest value of the output where that is above 1.
        feeds: further inputs of every run, such as the tensors of a delta.

    Raises:
        ConverterError: ``E_ONNX_DIFFERS``, naming the graph, the sizes, the output and the difference.
    """
    from deltahub.converters.onnx.providers import open_session

    done: list[Parity] = []
    for graph in dict.fromkeys(case.graph.file for case in found):
        session = open_session(folder / graph, bounded=True)
        known = {one.name for one in (*session.get_inputs(), *session.get_overridable_initializers())}
        further = {name: value for name, value in (feeds or {}).items() if name in known}
        for case in found:
            if case.graph.file == graph:
                given = {name: value.numpy() for name, value in case.inputs.items()}
                done += compare(case, _run(session, {**given, **further}, case), tolerance)
    return done


def _run(session: Any, feeds: Mapping[str, Any], case: Case) -> Sequence[Any]:
    try:
        return cast("Sequence[Any]", session.run(None, feeds))
    except Exception as error:
        raise ConverterError("E_ONNX_RUNTIME", f"ONNX Runtime cannot run the graph: {error}",
                             where=f"{case.graph.file}, {case.name}", hint="try opset=20") from error  # fmt: skip


def compare(case: Case, outputs: Sequence[Any], tolerance: float) -> list[Parity]:
    """Compare the outputs of one run.

    Raises:
        ConverterError: ``E_ONNX_DIFFERS``.
    """
    done = []
    for one, expected, got in zip(case.graph.outputs, case.outputs, outputs, strict=True):
        pairs = [("", expected)]
        if one.name in case.published:
            pairs.append((" as published", case.published[one.name]))
        for said, wanted in pairs:
            done.append(_one(case, one, wanted, got, tolerance, said))
    return done


def _one(case: Case, one: Any, expected: Tensor, got: Any, tolerance: float, said: str) -> Parity:
    value = torch.from_numpy(np.ascontiguousarray(got))
    where = f"{case.graph.file}, {one.name}{said}, {case.name}"
    if value.shape != expected.shape:
        raise ConverterError("E_ONNX_DIFFERS", "the graph gives another shape than PyTorch", where=where,
                             expected=list(expected.shape), found=list(value.shape))  # fmt: skip
    mask = case.graph.compared(one, case.inputs)
    gap = value.double() - expected.double()
    reference = expected.double()
    if mask is not None:
        gap, reference = gap.masked_fill(~mask, 0), reference.masked_fill(~mask, 0)
    difference, magnitude = _greatest(gap), _greatest(reference)
    allowed = tolerance * max(1.0, magnitude)
    if not difference <= allowed:
        raise ConverterError(
            "E_ONNX_DIFFERS",
            "ONNX Runtime computes something else than PyTorch; nothing was written",
            where=where,
            expected=f"a difference of at most {allowed:.3g}",
            found=f"{difference:.3g}",
            hint="try another opset; if it stays, report the model's class with this message",
        )
    return Parity(graph=case.graph.file, case=case.name, output=one.name + said, difference=difference,
                  magnitude=magnitude, allowed=allowed)  # fmt: skip


def _greatest(value: Tensor) -> float:
    return float(value.abs().max()) if value.numel() else 0.0
