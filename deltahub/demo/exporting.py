"""The delta in another runtime: exported to ONNX, compared, and timed against PyTorch."""

from __future__ import annotations

import importlib.util
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deltahub.demo.steps import Steps, folder_bytes
from deltahub.demo.training import Texts, predict

__all__ = ["export"]

_TOLERANCE = 1e-4
_REPEATS = 7


def export(steps: Steps, model: Any, test: Texts) -> None:
    """Export the model with its live deltas, and let ONNX Runtime classify the texts."""
    with steps.step('export_onnx(model, "onnx", form="live"): the whole delta, adapters included') as step:
        if importlib.util.find_spec("onnxruntime") is None or importlib.util.find_spec("onnxscript") is None:
            step.note('left out: ONNX Runtime is not installed (pip install "deltahub[onnx]")')
            return
        from deltahub.converters.onnx import Session, export_onnx

        out = Path.home() / "onnx"
        done = export_onnx(model, out, form="live")
        step.bytes = folder_bytes(out)
        for line in str(done).splitlines()[1:]:
            step.note(line)
        session = Session(out, provider="cpu", threads=torch.get_num_threads())
        got = np.concatenate([session.run(_arrays(batch))["logits"] for batch in test.batches()])
        expected = predict(model, test)
        difference = float((torch.from_numpy(got) - expected).abs().max())
        step.check(f"ONNX Runtime = PyTorch on the held-out sentences: {difference:.2g}", difference <= _TOLERANCE)
        same = bool((torch.from_numpy(got).argmax(1) == expected.argmax(1)).all())
        step.check("the same class for every one of them", same)
        batch = next(iter(test.batches()))
        arrays = _arrays(batch)
        ours, theirs = _milliseconds(lambda: session.run(arrays)), _milliseconds(lambda: _forward(model, batch))
        shape = "×".join(map(str, batch["input_ids"].shape))
        step.note(f"{shape} tokens: ONNX Runtime {ours:.1f} ms, PyTorch {theirs:.1f} ms, CPU, {os.cpu_count()} cores")


def _arrays(batch: dict[str, Tensor]) -> dict[str, Any]:
    return {name: value.numpy() for name, value in batch.items()}


@torch.no_grad()
def _forward(model: Any, batch: dict[str, Tensor]) -> None:
    model(**batch)


def _milliseconds(call: Callable[[], object]) -> float:
    call()
    times = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)
