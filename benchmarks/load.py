"""Loading a LoRA r=16 on all linear layers from disk onto a model that is in memory: ours and peft's.

peft checks nothing about the backbone. Ours is measured at three depths: headers only, the tensors that the delta
touches (here nine tenths of the model, hashed anew because a model in memory has no file to remember), and none.
"""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path
from typing import Any

import torch

import deltahub
from benchmarks.harness import LAYERS12, LAYERS22, LINEARS, RANK, SCALE, Report, Shape, build, measure, peft_config
from deltahub.attaching import attach_parts
from deltahub.package import Package
from deltahub.sites import Part

__all__ = ["run"]

OURS, HASHED, UNCHECKED = "deltahub.load, headers", "deltahub.load, every touched tensor", "deltahub.load, no check"
FLOOR = "floor: reading and hashing the file"
INJECTION = "deltahub, injection of a package that is open"
PEFT, LEAN = "PeftModel.from_pretrained", "the same, low_cpu_mem_usage, no autocast"


def _packages(shape: Shape, folder: Path) -> None:
    """The same LoRA in both formats."""
    from peft import get_peft_model

    model = get_peft_model(build(shape), peft_config())
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.uniform_(-0.02, 0.02, generator=generator)
    model.save_pretrained(folder / "peft")
    given = {name: p for name, p in model.named_parameters() if "lora_" in name}
    ours = build(shape)
    delta = deltahub.attach(ours, "lora", LINEARS, name="a", rank=RANK, scale=SCALE, dtype=torch.float32)
    with torch.no_grad():
        for name, p in delta.named_parameters():
            _, path, tensor = name.split("/")
            side = {"down": "lora_A", "up": "lora_B"}[tensor]
            p.copy_(given[f"base_model.model.{path}.{side}.default.weight"])
    deltahub.save(ours, folder / "deltahub")


def _case(report: Report, shape: Shape, folder: Path, *, repeats: int) -> None:
    from peft import PeftModel

    _packages(shape, folder)
    ours, theirs = build(shape), build(shape)
    package, adapter = folder / "deltahub", str(folder / "peft")

    def detach(model: Any) -> None:
        for delta in deltahub.deltas(model).values():
            delta.detach()

    def unload(model: Any) -> None:
        model.unload()

    opened = Package.open(package)

    def inject() -> Any:
        parts = [
            Part(name=m.name, kind=opened.kind(m.name), config=opened.config(m.name), paths=m.paths,
                 tensors=opened.tensors(m.name))
            for m in opened.manifest.modules
        ]  # fmt: skip
        attach_parts(ours, "opened", parts)
        return ours

    timings = measure(
        {
            FLOOR: lambda: hashlib.sha256((package / "delta.safetensors").read_bytes()).digest(),
            INJECTION: inject,
            OURS: lambda: deltahub.load(package, backbone=ours, verify="structure"),
            HASHED: lambda: deltahub.load(package, backbone=ours),
            UNCHECKED: lambda: deltahub.load(package, backbone=ours, verify=None),
            PEFT: lambda: PeftModel.from_pretrained(theirs, adapter),
            LEAN: lambda: PeftModel.from_pretrained(
                theirs, adapter, low_cpu_mem_usage=True, autocast_adapter_dtype=False
            ),
        },
        after={INJECTION: detach, OURS: detach, HASHED: detach, UNCHECKED: detach, PEFT: unload, LEAN: unload},
        repeats=repeats,
        warmup=2,
    )
    report.add(shape.name, timings, base=OURS)
    for label, mine in (("injection", INJECTION), ("whole load, every byte hashed", OURS)):
        ratio = timings[PEFT].over(timings[mine])
        report.goal(f"{label}, {shape.name}: times faster than from_pretrained", ratio, 10, at_least=True)


def run(*, quick: bool = False) -> Report:
    report = Report(
        name="load",
        title="Loading a LoRA, r=16 on all linear layers, onto a model in memory",
        note="The same tensors in both formats, from a warm file cache. Every byte of our package is hashed each time; "
        "peft verifies neither its file nor the backbone.",
    )
    for shape in (LAYERS12,) if quick else (LAYERS12, LAYERS22):
        with tempfile.TemporaryDirectory() as folder:
            _case(report, shape, Path(folder), repeats=5 if quick else 11)
    return report
