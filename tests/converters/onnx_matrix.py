"""The export matrix: architectures × kinds × forms, each cell run in ONNX Runtime and compared with PyTorch.

``python -m tests.converters.onnx_matrix`` prints it and writes ``docs/onnx-matrix.md``.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import deltahub
from deltahub import kinds
from deltahub.converters.onnx import export_onnx
from deltahub.converters.onnx.tasks import graphs_of, task_of
from deltahub.errors import DeltaHubError
from tests.converters.onnx_models import MODELS, TARGETS, make
from tests.zoo import configs

__all__ = ["ARCHITECTURE_KINDS", "FORMS", "LIMIT", "cell", "cells", "main"]

FORMS = ("merged", "live", "swappable")
LIMIT = 1e-4
ARCHITECTURE_KINDS = ("lora", "adapter", "bias")
"""Kinds that are tried on every architecture; all the others on the classifier."""
_REASONS = {
    "E_ONNX_UNMERGEABLE": "no merged form", "E_ONNX_SLOT": "no slots", "E_KIND_HOST": "needs another host",
    "E_HOST_CONTEXT": "needs another host", "E_KIND_CONFIG": "needs another host", "E_HOST_NO_BIAS": "no bias there",
    "E_KIND_SHAPE": "needs another host", "E_TARGET_NOTHING": "needs another host",
}  # fmt: skip


def cells() -> Iterator[tuple[str, str, str]]:
    """Architecture, kind, form."""
    for kind in kinds.names():
        for form in FORMS:
            yield "bert-classifier", kind, form
    for name in MODELS:
        for kind in ARCHITECTURE_KINDS:
            for form in FORMS:
                if name != "bert-classifier":
                    yield name, kind, form


def _attach(model: Any, name: str, kind: str) -> None:
    """A delta of the kind that does something, with the first config of the test zoo."""
    problem: DeltaHubError | None = None
    for targets in (TARGETS[name], ["attention"]):
        try:
            delta = deltahub.attach(model, kind, targets, name="one", seed=0, **next(configs(kind)))
        except DeltaHubError as error:
            problem = problem or error
            continue
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for _, site in (pair for part in delta.parts for pair in part.sites):
                for tensor in site.tensors():
                    if tensor.is_floating_point() and isinstance(tensor, nn.Parameter):
                        tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.1)
                    elif tensor.dtype in {torch.int8, torch.uint8}:  # equal ones leave a normalised input as it is
                        tensor.copy_(torch.randint(0, 100, tensor.shape, generator=generator))
        return
    assert problem is not None
    raise problem


def _runs(model: nn.Module) -> bool:
    """Whether PyTorch itself runs the model with this delta at the sizes that are tried."""
    try:
        for graph in graphs_of(model, task_of(model)):
            for sizes in graph.sizes:
                with torch.no_grad():
                    graph.module(model)(*graph.samples(sizes).values())
    except (RuntimeError, ValueError):
        return False
    return True


def cell(name: str, kind: str, form: str) -> tuple[float, float] | str:
    """The greatest difference relative to what is allowed at 1, and the effect; or why it cannot work."""
    model = make(name)
    try:
        _attach(model, name, kind)
        if not _runs(model):
            return "needs another host"
        with tempfile.TemporaryDirectory() as place:
            done = export_onnx(model, Path(place) / "out", form=form)
    except DeltaHubError as error:
        found = str(error.found or "").split(":")[0]
        more = f" ({found})" if error.code == "E_ONNX_UNSUPPORTED" else ""
        return _REASONS.get(error.code, error.code) + more
    return max(p.difference / max(1.0, p.magnitude) for p in done.parity), done.effect


def table(rows: Sequence[str], first: str, results: dict[tuple[str, str], tuple[float, float] | str]) -> str:
    lines = [f"| {first} | {' | '.join(FORMS)} |", "|---" * (len(FORMS) + 1) + "|"]
    for row in rows:
        shown = []
        for form in FORMS:
            result = results[row, form]
            shown.append(result if isinstance(result, str) else f"{result[0]:.0e}")
        lines.append(f"| {row} | {' | '.join(shown)} |")
    return "\n".join(lines)


_HEAD = """# What exports to ONNX

Written by `python -m tests.converters.onnx_matrix`; the same cells run in the tests. Each number is the greatest
difference between ONNX Runtime (CPU, float32) and PyTorch over at least four sets of inputs of different sizes, odd
ones and empty pasts included, divided by the output's greatest value where that is above 1. The limit is 1e-4.

*no merged form*: the kind is not a change of weights; export it live. *no slots*: swappable graphs have slots for lora,
adapter and bias. *needs another host*: the kind acts on something that this architecture does not offer at the targets
that were tried. *no bias there*: the module has no place for the bias that the merged form needs; export it live.
`E_ONNX_UNSUPPORTED` names an operation without a translation; such a kind is exported merged.
"""


def main() -> int:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    results: dict[tuple[str, str, str], tuple[float, float] | str] = {}
    for name, kind, form in cells():
        results[name, kind, form] = found = cell(name, kind, form)
        shown = found if isinstance(found, str) else f"{found[0]:.1e}, effect {found[1]:.2g}"
        print(f"{name}  {kind}  {form}: {shown}", flush=True)
    one = {(k, f): r for (n, k, f), r in results.items() if n == "bert-classifier"}
    parts = [_HEAD, "\n## Every kind on a classifier (BERT)\n", table(list(kinds.names()), "kind", one)]
    for kind in ARCHITECTURE_KINDS:
        chosen = {(n, f): r for (n, k, f), r in results.items() if k == kind}
        parts += [f"\n## `{kind}` on every architecture\n", table(list(MODELS), "architecture", chosen)]
    page = Path(__file__).resolve().parents[2] / "docs" / "onnx-matrix.md"
    page.parent.mkdir(exist_ok=True)
    page.write_text("\n".join(parts) + "\n", encoding="utf-8")
    print("written:", page)
    return int(any(not isinstance(r, str) and r[0] > LIMIT for r in results.values()))


if __name__ == "__main__":
    sys.exit(main())
