"""The verbs: export a package, run the export."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import deltahub
from deltahub.cli import app
from deltahub.tensors import TensorFile, write
from tests.converters.onnx_models import attached, make

pytest.importorskip("onnxruntime")


def test_export_and_run(tmp_path: Path) -> None:
    base = make("gpt2")
    base.save_pretrained(tmp_path / "base")  # type: ignore[operator]
    model = type(base).from_pretrained(tmp_path / "base").eval()  # type: ignore[attr-defined]
    attached(model, "lora", ["c_attn"], rank=2)
    deltahub.save(model, tmp_path / "package", probe={"input_ids": torch.arange(1, 7)[None]})

    def call(*arguments: str, code: int = 0) -> str:
        done = CliRunner().invoke(app, [*arguments])
        assert done.exit_code == code, done.output
        return done.output

    out = str(tmp_path / "out")
    printed = call("export", "onnx", str(tmp_path / "package"), "--out", out, "--backbone", str(tmp_path / "base"))
    assert "greatest difference from PyTorch" in printed
    assert "probe" in printed
    takes = json.loads(call("run", "onnx", out, "--json"))
    assert "input_ids" in takes["result"]
    tokens = json.loads(call("run", "onnx", out, "--ids", "4,5,6", "--generate", "5", "--json"))
    with torch.no_grad():
        expected = model.generate(torch.tensor([[4, 5, 6]]), max_new_tokens=5, do_sample=False)  # type: ignore[operator]
    assert tokens["result"]["row 0"][: expected.shape[1]] == expected[0].tolist()
    write(tmp_path / "in.safetensors", {"input_ids": np.array([[4, 5, 6]])})
    call("run", "onnx", out, "--inputs", str(tmp_path / "in.safetensors"), "--out", str(tmp_path / "got.safetensors"))
    with TensorFile.read(tmp_path / "got.safetensors") as file, torch.no_grad():
        difference = file.torch("logits") - model(torch.tensor([[4, 5, 6]])).logits
        assert difference.abs().max() < 1e-4
    assert "E_ONNX_INPUT" in call("run", "onnx", out, "--ids", "one", code=1)
    assert "E_ONNX_FILE" in call("run", "onnx", str(tmp_path / "nowhere"), code=1)
