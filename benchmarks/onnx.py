"""ONNX Runtime against PyTorch: latency, swapping, and what an export costs.

An export is measured in a child process that does nothing else, from a package and a backbone on disk, so that the peak
of its memory is the export's own. On a machine with a GPU that ONNX Runtime can use, the sessions run there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import deltahub
from benchmarks.harness import LAYERS12, LAYERS22, LAYERS22_NARROW, Report, Shape, build, measure, random_lora
from deltahub.converters.onnx import Session, export_onnx

__all__ = ["run"]

_TARGETS = ["q_proj", "v_proj"]
_DELTAS = 8
_CHILD = """
import json, sys, threading, time, warnings
warnings.simplefilter("ignore")
import psutil
from deltahub.converters.onnx import export_onnx
peak, stop, me = [0, 0], threading.Event(), psutil.Process()
def watch():
    while not stop.wait(0.02):
        now = me.memory_info()
        peak[0], peak[1] = max(peak[0], now.rss), max(peak[1], now.rss - now.shared)
thread = threading.Thread(target=watch)
thread.start()
start = time.monotonic()
try:
    done = export_onnx(sys.argv[1] + "/package", sys.argv[1] + "/out", backbone=sys.argv[1] + "/base")
finally:
    stop.set()
    thread.join()
print(json.dumps({"seconds": time.monotonic() - start, "rss": peak[0], "own": peak[1], "steps": dict(done.seconds),
                  "difference": done.difference}))
"""


def _latency(report: Report, shape: Shape, folder: Path, repeats: int) -> None:
    model = build(shape)
    delta = deltahub.attach(model, "lora", _TARGETS, rank=8)
    random_lora(delta.named_parameters())
    export_onnx(model, folder, task="text-generation")
    session = Session(folder, verify=False)
    delta.merge()
    device = torch.device("cuda" if session.choice.provider == "cuda" and torch.cuda.is_available() else "cpu")
    model = model.to(device)
    compiled = torch.compile(model)
    for batch, length in ((1, 128), (8, 32)):
        ids = torch.randint(1, shape.vocab, (batch, length))
        feeds = {"input_ids": ids.numpy(), "attention_mask": torch.ones_like(ids).numpy()}

        def call(what: Any, given: torch.Tensor = ids) -> Any:
            with torch.no_grad():
                return what(input_ids=given.to(device), use_cache=False).logits.cpu()

        contestants = {
            "PyTorch": lambda: call(model),
            "PyTorch, compiled": lambda: call(compiled),
            "ONNX Runtime": lambda given=feeds: session.run(given),
        }
        case = f"{shape.name}, batch {batch}, {length} tokens, {session.choice.provider}"
        report.add(case, measure(contestants, repeats=repeats, warmup=2), base="PyTorch")


def _swapping(report: Report, folder: Path) -> None:
    """Eight deltas on one backbone file."""
    model = build(LAYERS22_NARROW)
    names = [f"d{i}" for i in range(_DELTAS)]
    for i, name in enumerate(names):
        delta = deltahub.attach(model, "lora", _TARGETS, name=name, rank=2 + 2 * i)
        random_lora(delta.named_parameters(), seed=i)
        delta.disable()
    done = export_onnx(model, folder, form="swappable", task="text-generation")
    session = Session(folder, verify=False)
    session.use(*names)  # reads them all
    times = []
    for i in range(50 * _DELTAS):
        start = time.perf_counter()
        session.use(names[i % _DELTAS])
        times.append(time.perf_counter() - start)
    sizes = [path.stat().st_size for path in (folder / "deltas").iterdir()]
    backbone = (folder / "model.onnx_data").stat().st_size
    report.goal(f"{_DELTAS} deltas on one file: greatest difference", done.difference, 1e-4, at_least=False)
    report.goal("swapping one for another, milliseconds", float(np.median(times)) * 1e3, 1.0, at_least=False)
    report.goal("the largest delta's file over the backbone's", max(sizes) / backbone, 0.05, at_least=False)


def _exporting(report: Report, shape: Shape, folder: Path) -> None:
    """Wall time and peak memory of an export from disk."""
    model = build(shape)
    model.save_pretrained(folder / "base")
    model = type(model).from_pretrained(folder / "base", dtype=shape.dtype)
    delta = deltahub.attach(model, "lora", _TARGETS, rank=8)
    random_lora(delta.named_parameters())
    deltahub.save(model, folder / "package")
    size = 4 * sum(p.numel() for n, p in model.named_parameters() if "deltahub" not in n)
    del model, delta
    root = str(Path(__file__).resolve().parents[1])
    environment = {**os.environ, "PYTHONPATH": root}
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, str(folder)], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    found = json.loads(done.stdout.splitlines()[-1])
    print(f"  {shape.name}: {size / 1e9:.2f} GB as float32, {found}", flush=True)
    report.note += (
        f" Export of {shape.name} in float32 ({size / 1e9:.2f} GB): {found['seconds']:.0f} s wall, peak RSS "
        f"{found['rss'] / 1e9:.2f} GB, without mapped files {found['own'] / 1e9:.2f} GB; by step: "
        + ", ".join(f"{name} {seconds:.0f} s" for name, seconds in found["steps"].items())
        + "."
    )
    if size > 1e9:  # what the libraries take by themselves is more than a small model
        report.goal("peak memory of an export over the model's bytes", found["rss"] / size, 1.5, at_least=False)
        report.goal("the same without files that are mapped", found["own"] / size, 1.5, at_least=False)
    report.goal("its greatest difference", found["difference"], 1e-3, at_least=False)


def run(*, quick: bool = False) -> Report:
    report = Report(name="onnx", title="ONNX Runtime against PyTorch", note="A LoRA of rank 8 on q and v.")
    with tempfile.TemporaryDirectory(prefix="deltahub-onnx-") as place:
        folder = Path(place)
        os.environ["DELTAHUB_CACHE"] = str(folder / "cache")
        for i, shape in enumerate((LAYERS22_NARROW,) if quick else (LAYERS12, LAYERS22_NARROW)):
            _latency(report, shape, folder / f"latency-{i}", 5 if quick else 15)
        _swapping(report, folder / "swap")
        (folder / "export").mkdir()
        _exporting(report, LAYERS22_NARROW if quick else LAYERS22, folder / "export")
    return report
