"""A pipeline's attention distilled by the command line, published, loaded by name elsewhere, run, exported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import deltahub
from tests.diffusion import sample, unet_inputs
from tests.test_pipelines import image, pipeline

ROOT = Path(__file__).resolve().parents[2]
# The second level sees half of each side: 5, 7, 11 and 13 of these are odd.
SIZES = ((10, 14), (16, 24), (22, 18), (26, 10), (32, 8), (6, 42), (12, 20))


def command(hub: Any, home: Path, *arguments: str) -> str:
    """What a user types, in a process of its own with a home of its own."""
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_TOKEN": hub.token, "HF_HOME": str(home)}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, (arguments, done.stderr[-3000:])
    return done.stdout


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_from_a_pipelines_name_to_an_image_elsewhere(hub: Any, tmp_path: Path) -> None:
    from huggingface_hub import HfApi

    from deltahub.converters.onnx import export_onnx

    pipeline(tmp_path / "vocabulary").save_pretrained(tmp_path / "pipe")
    api = HfApi(endpoint=hub.url, token=hub.token)
    api.create_repo("org/pipe", exist_ok=True)
    commit = api.upload_folder(repo_id="org/pipe", folder_path=tmp_path / "pipe").oid

    options = ["--preset", "paper-table1", "--steps", "16", "--size", "32", "--batch", "2", "--supervised", "0"]
    options += ["--features", "1", "--warmup", "4", "--lr", "3e-3", "--device", "cpu", "--json", "--save-every", "0"]
    out, author = tmp_path / "out", tmp_path / "author"
    said = command(hub, author, "-m", "deltahub.cli", "recipe", "distil", "org/pipe", "--out", str(out), *options)
    losses = json.loads(said)["losses"]
    assert set(losses) == {"distilled", "features"}
    assert all(ends["last"] < ends["first"] for ends in losses.values()), losses
    source = json.loads((out / "package" / "delta.json").read_text())["backbone"]["source"]
    assert (source["hub"], source["commit"], source["subfolder"]) == ("org/pipe", commit, "unet")
    command(hub, author, "-m", "deltahub.cli", "push", str(out / "package"), "user/delta")

    pipe = deltahub.load(out / "package", backbone=tmp_path / "pipe")
    pipe.set_progress_bar_config(disable=True)
    torch.save(image(pipe), tmp_path / "published.pt")
    code = f"""
import sys, torch
sys.path.insert(0, {str(ROOT)!r})
import deltahub
from tests.test_pipelines import image
pipe = deltahub.load("user/delta")
pipe.set_progress_bar_config(disable=True)
print(torch.equal(image(pipe), torch.load({str(tmp_path / "published.pt")!r})))
"""
    assert command(hub, tmp_path / "reader", "-c", code).split()[-1] == "True"

    export_onnx(pipe.unet, tmp_path / "onnx", form="live")
    session = _session(tmp_path / "onnx")
    for height, width in SIZES:
        inputs = unet_inputs(height, width)
        given = {one.name: inputs[one.name].numpy() for one in session.get_inputs()}
        if len(session.get_inputs()[1].shape) == 1:
            given["timestep"] = inputs["timestep"].expand(2).numpy()
        found = torch.from_numpy(session.run(None, given)[0])
        assert float((found - sample(pipe.unet, inputs)).abs().max()) <= 1e-4


def _session(folder: Path) -> Any:
    import onnxruntime

    return onnxruntime.InferenceSession(next(folder.rglob("*.onnx")), providers=["CPUExecutionProvider"])
