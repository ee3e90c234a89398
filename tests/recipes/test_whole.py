"""From a pipeline's folder and a folder of images to a package, by the command line's own verb."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import deltahub
from tests.diffusion import unet_inputs
from tests.test_pipelines import pipeline


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("with_images", [True, False])
def test_the_verb_ends_in_a_package_that_loads(tmp_path: Path, with_images: bool) -> None:
    from PIL import Image
    from typer.testing import CliRunner

    from deltahub.cli import app

    pipeline(tmp_path / "vocabulary").save_pretrained(tmp_path / "pipe")
    images = tmp_path / "images"
    images.mkdir()
    for i in range(3):
        Image.new("RGB", (40, 30), (80 * i, 20, 200)).save(images / f"{i}.png")
        (images / f"{i}.txt").write_text("a b")
    options = [
        "--preset",
        "paper-table1",
        "--steps",
        "4",
        "--size",
        "32",
        "--batch",
        "2",
        "--out",
        str(tmp_path / "out"),
    ]
    options += ["--device", "cpu", "--warmup", "1", "--json", "--save-every", "2"]
    options += ["--images", str(images)] if with_images else []
    done = CliRunner().invoke(app, ["recipe", "distil", str(tmp_path / "pipe"), *options])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert set(found["losses"]) == {"supervised", "distilled", "features"}
    pipe = deltahub.load(tmp_path / "out" / "package", backbone=tmp_path / "pipe")
    assert type(pipe).__name__ == "StableDiffusionPipeline"
    with torch.no_grad():
        assert pipe.unet(**unet_inputs(10, 14)).sample.isfinite().all()
    assert deltahub.verify(tmp_path / "out" / "package", backbone=tmp_path / "pipe").probe
