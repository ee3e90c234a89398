"""A training step: forward, backward, AdamW, of a LoRA r=16 on all linear layers; time and memory."""

from __future__ import annotations

from benchmarks.harness import Report
from deltahub.benching.models import LINEARS, SHAPES
from deltahub.benching.turns import contest

__all__ = ["run"]


def run(*, quick: bool = False) -> Report:
    report = Report(
        name="training",
        title="A training step",
        note="Fresh processes in turns. Memory is what a step takes at its peak beyond what was there before it.",
    )
    cells = [[1, 1], [1, 128]] if quick else [[1, 1], [1, 128], [8, 128]]
    model = "shape:22-narrow"
    found = contest(["training"], model, pairs=2 if quick else 5, targets=LINEARS, rank=16, repeats=3, cells=cells)
    title = SHAPES["22-narrow"].title
    for rows, tokens in cells:
        cell = f"{rows}×{tokens}"
        timings = {side: found.timing(side, f"training: {cell}, step") for side in found.rounds}
        report.add(f"{title}: {cell}", timings, base="deltahub")
        ratio = timings["deltahub"].over(timings["peft"])
        report.goal(f"{cell}: a step, ours over peft's", ratio, 1.0, at_least=False)
        memory = {side: found.number(side, f"training: {cell}, bytes of a step") for side in found.rounds}
        for side, value in memory.items():
            report.number(f"{cell}: memory of a step, {side}", value / 1e6, "MB")
        if tokens > 1:
            over = memory["deltahub"] / memory["peft"]
            report.goal(f"{cell}: memory of a step, ours over peft's", over, 1.02, at_least=False)
    return report
