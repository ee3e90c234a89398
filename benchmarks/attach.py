"""Attaching a fresh LoRA r=16 to all linear layers: ``deltahub.attach`` and ``peft.get_peft_model``."""

from __future__ import annotations

import torch

import deltahub
from benchmarks.harness import LAYERS12, LAYERS22, LINEARS, RANK, SCALE, Report, Shape, build, measure, peft_config

__all__ = ["run"]

FLOOR = "floor: drawing the initial numbers"
OURS, PEFT, LEAN = "deltahub.attach", "peft.get_peft_model", "the same, low_cpu_mem_usage, no autocast"


def _case(report: Report, shape: Shape, *, repeats: int) -> None:
    from peft import get_peft_model

    ours, theirs, lean = build(shape), build(shape), build(shape)

    def detach(delta: deltahub.Delta) -> None:
        delta.detach()

    def unload(model: object) -> None:
        model.unload()  # type: ignore[attr-defined]

    shapes = [tuple(m.weight.shape) for n, m in ours.named_modules() if n.rsplit(".", 1)[-1] in LINEARS]

    def numbers() -> list[torch.Tensor]:
        drawn = [torch.empty(RANK, wide).uniform_(-0.1, 0.1) for _, wide in shapes]
        return drawn + [torch.zeros(high, RANK) for high, _ in shapes]

    timings = measure(
        {
            FLOOR: numbers,
            OURS: lambda: deltahub.attach(ours, "lora", LINEARS, name="a", rank=RANK, scale=SCALE),
            PEFT: lambda: get_peft_model(theirs, peft_config()),
            LEAN: lambda: get_peft_model(lean, peft_config(), low_cpu_mem_usage=True, autocast_adapter_dtype=False),
        },
        after={OURS: detach, PEFT: unload, LEAN: unload},
        repeats=repeats,
        warmup=2,
    )
    report.add(shape.name, timings, base=OURS)
    ratio = timings[PEFT].over(timings[OURS])
    report.goal(f"attach, {shape.name}: times faster than get_peft_model", ratio, 10, at_least=True)
    floor = timings[FLOOR].median
    ratio = (timings[PEFT].median - floor) / (timings[OURS].median - floor)
    report.goal(f"the same without the time to draw the numbers, {shape.name}", ratio, 10, at_least=True)


def run(*, quick: bool = False) -> Report:
    report = Report(
        name="attach",
        title="Attaching a fresh LoRA, r=16, on all linear layers",
        note="Tensors are initialised on both sides, except in peft's `low_cpu_mem_usage`, which leaves them empty.",
    )
    for shape in (LAYERS12,) if quick else (LAYERS12, LAYERS22):
        _case(report, shape, repeats=5 if quick else 11)
    return report
