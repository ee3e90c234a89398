"""Several processes distil one delta: each sees its own batches, all hold the same tensors, one writes the package."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import deltahub
from tests.diffusion import inputs_of, pixart, sample

ROOT = Path(__file__).resolve().parents[2]

SCRIPT = """
import itertools, json, os, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from deltahub import presets
from deltahub.recipes import Options, distil, warm_start
from deltahub.recipes.data import random_batches
from tests.diffusion import inputs_of, pixart

out = Path(sys.argv[1])
model = pixart()
delta = presets.attach_preset(model, "paper-table1", name="it", seed=0, kernel=3)
warm_start(delta)
options = Options(steps=6, supervised=0.0, features=1.0, warmup=2, lr=3e-3, ema=0.9, save_every=3)
batches = random_batches(model, sizes=((8, 8),), seed=1)
result = distil(model, delta, batches, out, options=options, probe=inputs_of(model, 8, 8))
total = sum(float(p.detach().double().sum()) for p in delta.parameters())
rank = os.environ.get("RANK", "0")
(out / f"told-{rank}.json").write_text(json.dumps({"total": total, "losses": result.history["features"]}))
"""


@pytest.mark.slow
def test_two_processes_train_one_delta(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    out = tmp_path / "out"
    out.mkdir()
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launch, str(script), str(out)],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=300, env=_environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((out / f"told-{rank}.json").read_text()) for rank in (0, 1))
    assert first["total"] == second["total"], "the gradients were averaged"
    assert first["losses"] != second["losses"], "each had batches of its own"
    assert len(first["losses"]) == 6
    assert (out / "losses.csv").read_text().count("\n") == 7

    model = pixart()
    deltahub.load(out / "package", backbone=model)
    (delta,) = deltahub.deltas(model).values()
    assert sum(float(p.detach().double().sum()) for p in delta.parameters()) == first["total"]
    assert torch.isfinite(sample(model, inputs_of(model, 8, 12))).all()


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "1"}
