"""Exports in smaller numbers: what they lose is measured, and they run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deltahub.converters.onnx import Session, convert_precision, export_onnx
from deltahub.errors import ConverterError
from tests.converters.onnx_models import attached, make

pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = make("llama")
    attached(model, "lora", ["q_proj"], rank=2)
    place = tmp_path_factory.mktemp("onnx") / "out"
    export_onnx(model, place)
    return place


@pytest.mark.parametrize(("precision", "limit"), [("float16", 5e-3), ("int8", 0.2), ("int4", 0.6)])
def test_a_precision(precision: str, limit: float, folder: Path, tmp_path: Path) -> None:
    done = convert_precision(folder, tmp_path / "out", precision)
    assert done.after < done.before
    losses = {one.output: one for one in done.losses}
    assert 0 < losses["logits"].relative < limit
    assert json.loads((tmp_path / "out" / "export.json").read_text())["losses"]
    assert precision in str(done)
    session = Session(tmp_path / "out", provider="cpu")
    assert session.generate([[3, 4, 5]], max_new_tokens=3).shape == (1, 6)


def test_what_cannot_be_converted(folder: Path, tmp_path: Path) -> None:
    for precision in ("int3", "bfloat16"):
        with pytest.raises(ConverterError) as caught:
            convert_precision(folder, tmp_path / "out", precision)
        assert caught.value.code == "E_ONNX_PRECISION"
    convert_precision(folder, tmp_path / "half", "float16")
    with pytest.raises(ConverterError) as caught:
        convert_precision(tmp_path / "half", tmp_path / "again", "int8")
    assert caught.value.code == "E_ONNX_PRECISION"
    assert not (tmp_path / "again").exists()
