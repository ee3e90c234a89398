"""The layout of the released ΔConvFusion checkpoints, and ONNX that is right on odd maps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import deltahub
from deltahub import presets
from deltahub.converters import delta_conv
from deltahub.converters.formats import import_, sniff
from deltahub.errors import ConverterError, KindError
from deltahub.tensors import write
from tests.diffusion import inputs_of, pixart, sample, unet
from tests.zoo import randomise

NAMES = {"inner": "conv_up", "mix": "conv_out", "average": "conv_pool"}


def released(folder: Path, delta: Any) -> Path:
    """A delta's tensors in the layout of the authors' files."""
    found: dict[str, torch.Tensor] = {}
    for name, value in delta.tensors().items():
        _, path, tensor = name.split("/")
        block = f"{path.removesuffix('.attn1')}.conv1"
        if tensor == "depthwise":
            for i, window in enumerate(value):
                found[f"{block}.gates.{i}.conv_spatial.weight"] = window.squeeze(1).permute(1, 2, 0).contiguous()
        else:
            stem, _, bias = tensor.partition("_")
            found[f"{block}.{NAMES[stem]}.{bias or 'weight'}"] = value
    write(folder / "ConvFusion.safetensors", found)
    return folder / "ConvFusion.safetensors"


@pytest.mark.parametrize(("make", "gate"), [(unet, "mul_sqrt"), (pixart, "sigmoid")])
def test_a_released_file_becomes_a_package(make: Any, gate: str, tmp_path: Path) -> None:
    model = make()
    kernels = {"down_blocks": 7, "mid_block": 3, "up_blocks": 9, "transformer_blocks": 13}
    kind = {"gate": gate, "pool": "adaptive"}
    deltas = [
        deltahub.attach(model, "delta-conv", f"{stem}.**.attn1", name=f"d{side}", kernel=side, seed=side, **kind)
        for stem, side in kernels.items()
        if any(n.startswith(stem) for n, _ in model.named_modules())
    ]
    for delta in deltas:
        randomise(delta.parameters())
    inputs = inputs_of(model, 14, 22)
    expected = sample(model, inputs)

    class Joined:
        def tensors(self) -> dict[str, torch.Tensor]:
            return {name: value for delta in deltas for name, value in delta.tensors().items()}

    file = released(tmp_path, Joined())
    assert sniff(file) == "delta_conv"
    bare = make()
    package = import_(file, tmp_path / "package", backbone=bare)
    assert not deltahub.deltas(bare)
    assert all(module.removes for module in package.manifest.modules)
    again = deltahub.load(tmp_path / "package", backbone=bare)
    assert torch.allclose(sample(again, inputs), expected, atol=1e-6)


def test_what_is_missing_surplus_or_of_another_shape_is_refused(tmp_path: Path) -> None:
    model = pixart()
    delta = deltahub.attach(model, "delta-conv", "**.attn1", name="it", kernel=3, seed=1)
    file = released(tmp_path, delta)
    from deltahub.tensors import TensorFile

    whole = TensorFile.read(file).tensors()
    first = "transformer_blocks.0.conv1"
    cases = {
        "missing": {k: v for k, v in whole.items() if k != f"{first}.conv_up.weight"},
        "stages": {**whole, f"{first}.gates.2.conv_spatial.weight": whole[f"{first}.gates.0.conv_spatial.weight"]},
        "window": {**whole, f"{first}.gates.0.conv_spatial.weight": torch.zeros(3, 5, 16)},
        "backbone": {k: torch.zeros(8) if k == f"{first}.conv_out.bias" else v for k, v in whole.items()},
        "key": {**whole, "other.weight": torch.zeros(1)},
    }
    shapes = dict.fromkeys(("window", "backbone"), "E_CONVERT_SHAPE")
    codes = {"missing": "E_CONVERT_MISSING", "stages": "E_CONVERT_SURPLUS", "key": "E_CONVERT_KEY", **shapes}
    for name, tensors in cases.items():
        write(tmp_path / f"{name}.safetensors", tensors)
        with pytest.raises(ConverterError) as caught:
            delta_conv.import_(tmp_path / f"{name}.safetensors", tmp_path / "out", backbone=pixart())
        assert caught.value.code == codes[name]
        assert not (tmp_path / "out").exists()


def test_pooling_whose_export_would_be_wrong_is_refused(tmp_path: Path) -> None:
    from deltahub.converters.onnx import export_onnx

    model = unet()
    presets.attach_preset(model, "paper-table1", name="it", seed=0, kernel=3, pool="adaptive")
    with pytest.raises(KindError) as caught:
        export_onnx(model, tmp_path / "onnx", form="live")
    assert caught.value.code == "E_KIND_EXPORT"
    assert not (tmp_path / "onnx").exists()
