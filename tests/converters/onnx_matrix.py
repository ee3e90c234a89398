"""The export matrix: architectures × kinds × forms, each cell run in ONNX Runtime and compared with PyTorch.

``python -m tests.converters.onnx_matrix`` prints it and writes ``docs/onnx-matrix.md``.

Every kind has a host of its own in :class:`Hosts`, whose result is an output of the graph by itself: one export proves
all of them, each by its own numbers. On the architectures the usual kinds act at once where they can.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import deltahub
from deltahub import kinds
from deltahub.converters.onnx import OnnxExport, export_onnx, proof
from deltahub.converters.onnx.graphs import Graph, Input, Output
from deltahub.converters.onnx.tasks import graphs_of, task_of
from deltahub.delta import Delta
from deltahub.errors import DeltaHubError
from tests.converters.onnx_models import MODELS, PREFIXED, TARGETS, make
from tests.zoo import configs

__all__ = ["FORMS", "KINDS", "LIMIT", "REFUSED", "Cell", "architecture", "hosted", "main", "possible"]

FORMS = ("merged", "live", "swappable")
LIMIT = 1e-4
KINDS = ("lora", "adapter", "bias", "prefix")
"""Kinds that are tried on every architecture; all the others on hosts of their own."""
REASONS = {"E_ONNX_UNMERGEABLE": "no merged form"}
ELSEWHERE = {
    name: f"acts on {', '.join(kinds.get(name).document.hosts)}"
    for name in kinds.names()
    if not {"linear", "conv"} & set(kinds.get(name).document.hosts)
}
"""Kinds that need a part of a whole model."""
Cells = dict[tuple[str, str], "Cell"]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One cell of the matrix.

    Attributes:
        difference: the greatest, over the output's greatest value where that is above 1.
        effect: how much the delta changes what comes out.
        sizes: how many sets of inputs were run.
        reason: why there is nothing of all this.
    """

    difference: float = 0.0
    effect: float = 0.0
    sizes: int = 0
    reason: str = ""

    def __str__(self) -> str:
        return self.reason or f"{self.difference:.0e}"


def shake(delta: Delta, *, seed: int = 1) -> None:
    """Give a delta values with which it does something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, site in (pair for part in delta.parts for pair in part.sites):
            for tensor in site.tensors():
                if tensor.is_floating_point() and isinstance(tensor, nn.Parameter):
                    tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.1)
                elif tensor.dtype in {torch.int8, torch.uint8}:
                    tensor.copy_(torch.randint(0, 100, tensor.shape, generator=generator))


class Hosts(nn.Module):
    """A host for every kind, side by side: what each makes of the same inputs is an output."""

    def __init__(self, names: Sequence[str], width: int = 32) -> None:
        super().__init__()
        self.hosts = nn.ModuleDict()
        for name in names:
            families = kinds.get(name).document.hosts
            self.hosts[name] = (
                nn.Linear(width, width) if "linear" in families else nn.Conv1d(width, width, 3, padding=1)
            )

    def forward(self, x: Tensor) -> list[Tensor]:
        return [
            host(x) if isinstance(host, nn.Linear) else host(x.transpose(1, 2)).transpose(1, 2)
            for host in self.hosts.values()
        ]


def _graph(model: Hosts) -> Graph:
    dims = ("batch_size", "length", 32)
    return Graph(
        file="model.onnx", call=lambda m, i: m(i["x"]), inputs=(Input(name="x", dims=dims),),
        outputs=tuple(Output(name=name, dims=dims) for name in model.hosts),
        sizes=tuple({"batch_size": b, "length": n} for b, n in ((2, 7), (1, 1), (3, 13), (5, 2))),
    )  # fmt: skip


_SOLVES = ("E_ONNX_UNSUPPORTED", "ONNX has nothing that solves linear equations")
_LIVE_ONLY = ("E_ONNX_UNMERGEABLE", "no merged form")
REFUSED: dict[tuple[str, str], tuple[str, str]] = {
    **{(kind, form): _SOLVES for kind in ("boft", "diag-oft", "hra", "psoft") for form in ("live", "swappable")},
    **{
        (kind, "merged"): _LIVE_ONLY
        for kind in kinds.names()
        if kind not in ELSEWHERE and not {"weight", "bias"} & set(kinds.get(kind).document.equations)
    },
}
"""Cells that cannot be: the error, and why."""


def possible(form: str) -> list[str]:
    """Kinds that have this form on a host of their own."""
    return [kind for kind in kinds.names() if kind not in ELSEWHERE and (kind, form) not in REFUSED]


def _attached(names: Sequence[str]) -> tuple[Hosts, dict[str, float]]:
    """Hosts with a delta of each of these kinds, and how much each changes there."""
    torch.manual_seed(0)
    model = Hosts(names).eval()
    x = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        plain = model(x)
        for kind in names:
            shake(deltahub.attach(model, kind, [f"hosts.{kind}"], name=kind, seed=0, **next(configs(kind))))
        changed = model(x)
    gaps = [float((a - b).abs().max()) for a, b in zip(plain, changed, strict=True)]
    return model, dict(zip(names, gaps, strict=True))


def hosted(names: Sequence[str], form: str) -> dict[str, Cell]:
    """The cells of kinds on hosts of their own, by one export.

    Raises:
        DeltaHubError: what the export says where it cannot be.
    """
    model, effects = _attached(names)
    done = _export(model, form, graphs=[_graph(model)])
    cells = {}
    for kind in names:
        mine = [p for p in done.parity if p.output == kind and (form != "swappable" or p.case.startswith(f"{kind}: "))]
        cells[kind] = _cell(mine, effects[kind])
    return cells


def _cell(parity: Sequence[Any], effect: float) -> Cell:
    graphs = {one.graph: len({p.case for p in parity if p.graph == one.graph}) for one in parity}
    worst = max(one.difference / max(1.0, one.magnitude) for one in parity)
    return Cell(difference=worst, effect=effect, sizes=min(graphs.values()))


def _export(model: nn.Module, form: str, **options: Any) -> OnnxExport:
    with tempfile.TemporaryDirectory() as place:
        return export_onnx(model, Path(place) / "out", form=form, **options)


def _together(name: str, chosen: Sequence[str]) -> nn.Module:
    """An architecture with a delta of each of these kinds."""
    model = make(name)
    for kind in chosen:
        targets = None if kind == "prefix" else TARGETS[name]
        shake(deltahub.attach(model, kind, targets, name=kind, seed=0, **next(configs(kind))))
    return model


def architecture(name: str) -> Cells:
    """The cells of the usual kinds on an architecture.

    Merged exports are one by one, and share their trace. Live, all act at once: a cell's effect is what its kind adds
    to the others. A swappable export proves each by itself.
    """
    nowhere = set() if name in PREFIXED else {"prefix"}
    cells: Cells = {(kind, form): Cell(reason="no host") for kind in nowhere for form in FORMS}
    present = [kind for kind in KINDS if kind not in nowhere]
    for kind in present:
        try:
            done = _export(_together(name, [kind]), "merged")
            cells[kind, "merged"] = _cell(done.parity, done.effect)
        except DeltaHubError as error:
            cells[kind, "merged"] = Cell(reason=REASONS[error.code])
    model = _together(name, present)
    done = _export(model, "live")
    for kind in present:
        cells[kind, "live"] = _cell(done.parity, _added(model, kind))
    done = _export(model, "swappable")
    for kind in present:
        mine = [one for one in done.parity if one.case.startswith(f"{kind}: ")]
        cells[kind, "swappable"] = _cell(mine, _added(model, kind))
    return cells


def _added(model: nn.Module, kind: str) -> float:
    """How much the model's outputs change when one of its deltas stops."""
    graph = graphs_of(model, task_of(model))[-1]
    inputs = graph.samples(graph.sizes[0])
    outs = []
    for enabled in (True, False):
        deltahub.deltas(model)[kind].enable() if enabled else deltahub.deltas(model)[kind].disable()
        outs.append(proof.compute(model, graph, inputs))
    deltahub.deltas(model)[kind].enable()
    return max(float((a - b).abs().max()) for a, b in zip(*outs, strict=True))


def table(rows: Sequence[str], first: str, columns: Sequence[str], cells: Mapping[tuple[str, str], Cell]) -> str:
    lines = [f"| {first} | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {row} | {' | '.join(str(cells[row, column]) for column in columns)} |" for row in rows]
    return "\n".join(lines)


_HEAD = """# What exports to ONNX

Written by `python -m tests.converters.onnx_matrix`; the same cells run in the tests. Each number is the greatest
difference between ONNX Runtime (CPU, float32) and PyTorch over at least four sets of inputs of different sizes, odd
ones and empty pasts included, divided by the output's greatest value where that is above 1. The limit is 1e-4.

*merged*: a plain graph with the delta in its weights. *live*: the delta's own operations stay in the graph.
*swappable*: a graph with slots, in which the delta is put per run.
"""


def main() -> int:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    cells: Cells = {(kind, form): Cell(reason=why) for kind, why in ELSEWHERE.items() for form in FORMS}
    cells.update({key: Cell(reason=why) for key, (_, why) in REFUSED.items()})
    for form in FORMS:
        cells.update({(kind, form): cell for kind, cell in hosted(possible(form), form).items()})
    parts = [_HEAD, "\n## Every kind, on a host of its own\n", table(list(kinds.names()), "kind", FORMS, cells)]
    rows: dict[str, Cells] = {}
    for name in MODELS:
        rows[name] = architecture(name)
        print(name, {key: str(cell) for key, cell in rows[name].items()}, flush=True)
    for kind in KINDS:
        found = {(name, form): found[kind, form] for name, found in rows.items() for form in FORMS}
        parts += [f"\n## `{kind}` on every architecture\n", table(list(MODELS), "architecture", FORMS, found)]
    page = Path(__file__).resolve().parents[2] / "docs" / "onnx-matrix.md"
    page.write_text("\n".join(parts) + "\n", encoding="utf-8")
    print("written:", page)
    every = [*cells.values(), *(cell for found in rows.values() for cell in found.values())]
    return int(any(cell.difference > LIMIT for cell in every))


if __name__ == "__main__":
    sys.exit(main())
