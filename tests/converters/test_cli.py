"""The verbs of the converters: they reach the functions behind them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from deltahub.cli import app
from tests.converters import tiny

Make = Callable[..., Path]


def run(*arguments: object, code: int = 0) -> dict[str, object]:
    result = CliRunner().invoke(app, [str(a) for a in arguments] + ["--json"])
    assert result.exit_code == code, result.output
    found: dict[str, object] = json.loads(result.stdout)
    return found


def test_from_two_checkpoints_to_a_package_and_back(backbone: Make, tmp_path: Path) -> None:
    pytest.importorskip("zstandard")
    base = backbone("llama", dtype=torch.bfloat16)
    model = tiny.load_model("llama", base)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(1.01)
    model.save_pretrained(tmp_path / "tuned")
    found = run("diff", base, tmp_path / "tuned", "--out", tmp_path / "p")
    assert len(found["parameters"]) == 1  # type: ignore[arg-type]
    packed = run("pack", tmp_path / "p", "--backbone", base, "--out", tmp_path / "packed")
    assert packed["after"] < packed["before"]  # type: ignore[operator]
    run("unpack", tmp_path / "packed", "--backbone", base, "--out", tmp_path / "again")
    merged = run("merge", tmp_path / "again", "--backbone", base, "--out", tmp_path / "merged")
    assert len(merged["changed"]) == 1  # type: ignore[arg-type]
    one, two = tiny.load_model("llama", tmp_path / "merged"), model
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_an_adapter_of_another_library(backbone: Make, tmp_path: Path) -> None:
    fixtures = Path(__file__).parents[1] / "fixtures" / "adapters"
    run("convert", fixtures / "lora", "--backbone", fixtures / "backbone", "--out", tmp_path / "p")
    run("convert", tmp_path / "p", "--to", "peft", "--out", tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()
    error = run("convert", tmp_path / "p", "--to", "nothing", "--out", tmp_path / "x", code=1)
    assert error["error"]["code"] == "E_CONVERT_FORMAT"  # type: ignore[index]
