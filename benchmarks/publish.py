"""Saving, pushing to and pulling from a Hub on this machine: one delta, and a hundred."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import torch
from huggingface_hub import constants
from torch import nn

import deltahub
from benchmarks.harness import Report, measure
from deltahub.testing import serve_hub

__all__ = ["run"]

WIDTH, LAYERS = 512, 24


def run(*, quick: bool = False) -> Report:
    report = Report(
        name="publish",
        title="Saving, pushing and pulling",
        note=f"A LoRA on {LAYERS} linear layers of width {WIDTH}; the Hub runs in the same process.",
    )
    many = 10 if quick else 100
    with tempfile.TemporaryDirectory(prefix="deltahub-bench-publish-") as home, serve_hub(Path(home) / "hub") as hub:
        constants.HF_HUB_OFFLINE = False  # the Hub of this benchmark is on this machine
        place = Path(home)
        model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))
        delta = deltahub.attach(model, "lora", [str(i) for i in range(LAYERS)], rank=16, scale=1.0)
        with torch.no_grad():
            for p in delta.parameters():
                p.uniform_(-0.02, 0.02)
        turn = iter(range(10_000))

        def save() -> Path:
            return Path(delta.save(place / f"saved-{next(turn)}").path)

        package = save()
        content = (package / "delta.safetensors").read_bytes()

        def copy() -> None:
            (place / f"copied-{next(turn)}").write_bytes(content)

        def push() -> str:
            name = f"user/delta-{next(turn)}"
            deltahub.push(package, name, endpoint=hub.url, token=hub.token)
            return name

        name = push()

        def pull() -> None:
            cache = place / f"cache-{next(turn)}"
            deltahub.pull(name, endpoint=hub.url, token=hub.token, cache_dir=cache)
            shutil.rmtree(cache)

        one = {"floor: writing the bytes": copy, "save": save, "push": push, "pull, nothing cached": pull}
        timings = measure(one, repeats=3 if quick else 5)
        report.add(f"one delta, {len(content) / 1e6:.1f} MB", timings, base="floor: writing the bytes")
        several = measure({k: _times(v, many) for k, v in one.items() if k != "push"}, repeats=1, warmup=0)
        report.add(f"{many} deltas", several, base="floor: writing the bytes")
        for label in ("save", "pull, nothing cached"):
            each = several[label].median / timings[label].median / many
            report.goal(f"{label}: each of {many} over one alone", each, 1.3, at_least=False)
    return report


def _times(call: object, count: int) -> object:
    def many() -> None:
        for _ in range(count):
            call()  # type: ignore[operator]

    return many
