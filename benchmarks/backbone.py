"""Verifying a backbone's files: the first time at the rate of SHA-256, the second time from a stamp."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import deltahub
from benchmarks.harness import LAYERS12, LAYERS22, Report, build, measure
from deltahub import identity
from deltahub.manifest import Manifest

__all__ = ["run"]

FIRST, AGAIN, HASHING = "first time", "second time", "floor: SHA-256 of as many bytes, on all cores"


def run(*, quick: bool = False) -> Report:
    report = Report(
        name="backbone",
        title="Verifying a backbone's files",
        note="All tensors (level full) of a backbone on disk, files in the system's cache. Goals are of wall time.",
    )
    shape = LAYERS12 if quick else LAYERS22
    with tempfile.TemporaryDirectory(prefix="deltahub-bench-verify-") as home:
        folder, cache = Path(home) / "base", Path(home) / "cache"
        os.environ["DELTAHUB_CACHE"] = str(cache)
        model = build(shape)
        model.save_pretrained(folder)
        loaded = type(model).from_pretrained(folder, dtype=shape.dtype)
        delta = deltahub.attach(loaded, "lora", ["q_proj"], rank=2, scale=1.0)
        delta.save(Path(home) / "package", backbone=folder)
        section = Manifest.parse((Path(home) / "package" / "delta.json").read_bytes()).backbone
        del model, loaded, delta
        content = (folder / "model.safetensors").read_bytes()
        cores = os.cpu_count() or 1
        part = -(-len(content) // (4 * cores))
        parts = [memoryview(content)[at : at + part] for at in range(0, len(content), part)]

        def floor() -> None:
            with ThreadPoolExecutor(cores) as pool:
                list(pool.map(lambda piece: hashlib.sha256(piece).digest(), parts))

        def again() -> object:
            return identity.check(section, files=folder, level=identity.Level.L4)

        def first() -> object:
            shutil.rmtree(cache, ignore_errors=True)
            return again()

        again()
        timings = measure({HASHING: floor, FIRST: first, AGAIN: again}, repeats=3 if quick else 5)
        report.add(f"{shape.name}, {len(content) / 1e9:.2f} GB", timings, base=HASHING)
        rate = min(timings[HASHING].wall) / min(timings[FIRST].wall)
        report.goal("first time: share of SHA-256's rate on all cores", rate, 0.8, at_least=True)
        report.goal("second time, wall ms", min(timings[AGAIN].wall), 5, at_least=False)
    return report
