"""Distillation on a CPU: a tiny UNet and a tiny PixArt, every logged term before and after.

The teachers have random weights with attention made sharp: what is shown is that the recipe learns, not what a picture
becomes. A term is the mean over the first five steps and over the last five.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import Report
from deltahub import presets
from deltahub.recipes import Options, distil, warm_start
from deltahub.recipes.data import random_batches
from tests.diffusion import pixart, unet

__all__ = ["run"]

STEPS = 200
LIMIT = 120.0
"""Seconds of CPU time that one distillation may take."""


def _teacher(make: Any) -> Any:
    model = make()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "attn1.to_q" in name or "attn1.to_k" in name:
                p.mul_(6)
    return model


def _one(make: Any, mode: str, loss: str, steps: int) -> tuple[dict[str, tuple[float, float]], float]:
    model = _teacher(make)
    delta = presets.attach_preset(model, "paper-table1", name="it", seed=0, kernel=3)
    warm_start(delta)
    # A random teacher cannot predict noise: the term against it would say nothing.
    options = Options(
        steps=steps, mode=mode, loss=loss, supervised=0.0, features=1.0, warmup=10, lr=3e-3, ema=0.95, save_every=0
    )
    batches = list(itertools.islice(random_batches(model, sizes=((16, 16), (8, 24)), seed=1), 32))
    began = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        result = distil(model, delta, itertools.cycle(batches), Path(folder), options=options)
    return {name: result.change(name) for name in result.history}, time.process_time() - began


def run(*, quick: bool = False) -> Report:
    """Both models, both modes, both losses."""
    found = {
        (name, mode, loss): _one(make, mode, loss, 40 if quick else STEPS)
        for name, make in (("UNet", unet), ("PixArt", pixart))
        for mode, loss in (("stream", "released"), ("stream", "paper"), ("teacher", "released"))
    }
    lines = ["| tiny model | mode | loss | term | first | last | CPU time |", "|---|---|---|---|--:|--:|--:|"]
    lines += [
        f"| {name} | {mode} | {loss} | {term} | {before:.2e} | {after:.2e} | {seconds:.0f} s |"
        for (name, mode, loss), (terms, seconds) in found.items()
        for term, (before, after) in terms.items()
    ]
    report = Report(name="distil", title="Distillation on a CPU", note="\n".join(lines))
    for case, (terms, seconds) in found.items():
        for term, (before, after) in terms.items():
            report.goal(f"{', '.join(case)}: {term}, last over first", after / before, 1.0, at_least=False)
        report.goal(f"{', '.join(case)}: seconds of CPU time", seconds, LIMIT, at_least=False)
    return report
