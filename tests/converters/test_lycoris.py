"""LyCORIS files, written by the real LyCORIS 4.1: read, run, and written again byte for byte."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import deltahub
from deltahub.converters import export_, import_, sniff
from deltahub.converters.lycoris_kinds import document
from deltahub.errors import ConverterError, DeltaHubError
from deltahub.package import Package

lycoris = pytest.importorskip("lycoris")
pytestmark = pytest.mark.filterwarnings("ignore")


class Net(nn.Module):
    """A linear layer, convolutions with and without a window, a norm; underscores in a name."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, 16, 3, padding=1)
        self.block = nn.ModuleDict({"to_q": nn.Linear(16, 8), "norm": nn.LayerNorm(8)})
        self.out = nn.ModuleList([nn.Conv2d(8, 8, 1)])

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        h = self.block["norm"](self.block["to_q"](h.permute(0, 2, 3, 1)))
        found: Tensor = self.out[0](h.permute(0, 3, 1, 2))
        return found


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def images() -> Tensor:
    return torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(1))


def trained(algo: str, file: Path, *, dtype: torch.dtype | None = None, **options: Any) -> Tensor:
    """A file of LyCORIS with random values in it, and the outputs with them."""
    logging.getLogger("LyCORIS").setLevel(logging.ERROR)
    lycoris.LycorisNetwork.apply_preset({"enable_conv": True, "target_module": ["Net"], "unet_target_module": []})
    model = net()
    torch.manual_seed(2)
    settings = {"linear_dim": 2, "linear_alpha": 3, "conv_dim": 3, "conv_alpha": 1, **options}
    network = lycoris.create_lycoris(model, 1.0, algo=algo, **settings)
    network.apply_to()
    network.eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
        if dtype is not None:
            network.to(dtype).float()
        expected: Tensor = model(images())
    network.save_weights(str(file), dtype, {"ss_network_module": "lycoris.kohya", "ss_network_dim": "2", "é": "ß"})
    return expected


CASES: list[tuple[str, dict[str, Any]]] = [
    ("lora", {"train_norm": True}),
    ("lora", {"use_tucker": True}),
    ("lora", {"rs_lora": True}),
    ("lora", {"dora_wd": True}),
    ("lora", {"dora_wd": True, "wd_on_output": False}),
    ("lora", {"dora_wd": True, "use_tucker": True}),
    ("loha", {}),
    ("loha", {"use_tucker": True}),
    ("loha", {"dora_wd": True}),
    ("lokr", {"factor": 2}),
    ("lokr", {"factor": 4, "decompose_both": True, "linear_dim": 1, "conv_dim": 1}),
    ("lokr", {"full_matrix": True}),
    ("lokr", {"use_tucker": True, "factor": 2, "conv_dim": 1}),
    ("lokr", {"factor": 2, "dora_wd": True}),
    ("glora", {}),
    ("diag-oft", {}),
    ("diag-oft", {"rescaled": True}),
    ("boft", {"rescaled": True, "linear_dim": 4, "conv_dim": 4}),
    ("ia3", {}),
    ("full", {}),
]


@pytest.mark.parametrize(("algo", "options"), CASES, ids=[f"{a}-{'-'.join(o)}" for a, o in CASES])
def test_there_and_back(algo: str, options: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "them.safetensors"
    expected = trained(algo, file, **options)
    assert sniff(file) == "kohya"
    package = import_(file, tmp_path / "package", backbone=net())
    model = deltahub.load(package.path, backbone=net())
    with torch.no_grad():
        assert (model(images()) - expected).abs().max() <= 1e-5
        assert (net()(images()) - expected).abs().max() > 1e-3
    written = export_(package, tmp_path / "again.safetensors", to="kohya")
    assert written.read_bytes() == file.read_bytes()
    assert export_(tmp_path / "package", tmp_path / "folder", to="kohya").is_dir()


@pytest.mark.parametrize(("algo", "options"), [("lora", {}), ("loha", {}), ("lokr", {"factor": 2}), ("glora", {})])
def test_written_afresh_and_read_by_lycoris(algo: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Without the original's header the names are made anew; the real library puts the same numbers on the model."""
    expected = trained(algo, tmp_path / "them.safetensors", **options)
    package = import_(tmp_path / "them.safetensors", tmp_path / "package", backbone=net())
    bare = Package.open(without_extensions(package.path))
    written = export_(bare, tmp_path / "new.safetensors", to="kohya", backbone=net())
    ours = {key.replace("lora_unet_", "lycoris_"): value for key, value in load_file(written).items()}
    save_file(ours, tmp_path / "ours.safetensors")
    model = net()
    network, _ = lycoris.create_lycoris_from_weights(1.0, str(tmp_path / "ours.safetensors"), model)
    network.apply_to()
    network.eval()
    with torch.no_grad():
        if algo == "lora":  # 4.1.3 guesses the others' forms from shapes, and not always right
            assert (model(images()) - expected).abs().max() <= 1e-5
    theirs = load_file(tmp_path / "them.safetensors")
    assert theirs.keys() == ours.keys()
    for key, value in ours.items():
        if key.endswith("alpha") and key.replace("alpha", "lokr_w2") in ours:
            continue  # it means nothing where both factors are whole
        assert torch.equal(value.reshape(-1), theirs[key].reshape(-1).to(value.dtype)), key


def without_extensions(folder: Path) -> Path:
    import json

    document = json.loads((folder / "delta.json").read_text(encoding="utf-8"))
    del document["extensions"]
    (folder / "delta.json").write_text(json.dumps(document), encoding="utf-8")
    return folder


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_comes_back_as_it_was(dtype: torch.dtype, tmp_path: Path) -> None:
    trained("loha", tmp_path / "them.safetensors", dtype=dtype)
    package = import_(tmp_path / "them.safetensors", tmp_path / "package", backbone=net())
    written = export_(package, tmp_path / "again.safetensors", to="kohya")
    assert written.read_bytes() == (tmp_path / "them.safetensors").read_bytes()


def changed(tmp_path: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], algo: str = "lora") -> Path:
    trained(algo, tmp_path / "them.safetensors")
    save_file(change(load_file(tmp_path / "them.safetensors")), tmp_path / "bad.safetensors")
    return tmp_path / "bad.safetensors"


def without(*ends: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {key: value for key, value in tensors.items() if not key.endswith(ends)}


@pytest.mark.parametrize(
    ("algo", "change", "code", "named"),
    [
        ("lora", lambda t: {**t, "lycoris_conv_in.surprise": torch.zeros(2)}, "E_CONVERT_KEY", "surprise"),
        ("lora", lambda t: {**t, "lycoris_conv_in.rescale": torch.zeros(2)}, "E_CONVERT_SURPLUS", "rescale"),
        ("lora", without("conv_in.lora_up.weight"), "E_CONVERT_MISSING", "lora_up.weight"),
        ("lora", without("conv_in.alpha"), "E_CONVERT_MISSING", "lycoris_conv_in.alpha"),
        ("lora", lambda t: {k.replace("_out_0", "_out_1"): v for k, v in t.items()}, "E_CONVERT_TARGET", "out_1"),
        ("lora", lambda t: {k: v * float("nan") for k, v in t.items()}, "E_CONVERT_VALUES", "lycoris"),
        (
            "lora",
            lambda t: {k: v[:1] if k.endswith("q.lora_up.weight") else v for k, v in t.items()},
            "E_CONVERT_SHAPE",
            "lora_up",
        ),
        (
            "diag-oft",
            lambda t: {k: v + 0.01 if k.endswith("alpha") else v * 9 for k, v in t.items()},
            "E_CONVERT_UNSUPPORTED",
            "alpha",
        ),
    ],
)
def test_what_does_not_fit_is_named(
    algo: str, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], code: str, named: str, tmp_path: Path
) -> None:
    file = changed(tmp_path, change, algo)
    with pytest.raises(DeltaHubError) as caught:
        import_(file, tmp_path / "package", from_="kohya", backbone=net())
    assert caught.value.code == code, caught.value
    assert named in str(caught.value)
    assert not (tmp_path / "package").exists()


def test_names_that_collide_are_refused(tmp_path: Path) -> None:
    class Twins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a_b = nn.Linear(4, 4)
            self.a = nn.ModuleDict({"b": nn.Linear(4, 4)})
            self.c = nn.Linear(4, 4)

    def file(name: str) -> Path:
        tensors = {
            f"lycoris_{name}.lora_up.weight": torch.ones(4, 1),
            f"lycoris_{name}.lora_down.weight": torch.ones(1, 4),
        }
        save_file({**tensors, f"lycoris_{name}.alpha": torch.tensor(1.0)}, tmp_path / f"{name}.safetensors")
        return tmp_path / f"{name}.safetensors"

    with pytest.raises(ConverterError) as caught:
        import_(file("a_b"), tmp_path / "package", backbone=Twins())
    assert caught.value.code == "E_CONVERT_COLLISION"
    assert import_(file("c"), tmp_path / "package", backbone=Twins()).manifest.modules[0].paths == ("c",)
    delta = deltahub.attach(model := Twins(), "lora", targets=["a_b"], rank=1)
    package = delta.save(tmp_path / "ours")
    with pytest.raises(ConverterError) as caught:
        export_(package, tmp_path / "out.safetensors", to="kohya", backbone=model)
    assert caught.value.code == "E_CONVERT_COLLISION"
    assert not (tmp_path / "out.safetensors").exists()


def test_no_alpha_is_never_guessed_in_silence(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = changed(tmp_path, without(".alpha"))
    package = import_(file, tmp_path / "package", backbone=net())
    assert "no alpha" in caplog.text
    assert package.manifest.extensions["com.github.kohya-ss"]["alpha"] == "none in the file: a scale of 1"
    assert {package.config(module.name)["scale"] for module in package.manifest.modules} == {1.0}
    assert export_(package, tmp_path / "again.safetensors", to="kohya").read_bytes() == file.read_bytes()
    told = import_(file, tmp_path / "told", backbone=net(), alpha=4)
    assert {
        told.config(module.name)["scale"] * told.config(module.name)["rank"] for module in told.manifest.modules
    } == {4}
    # what was said by whoever converted it is nowhere in that file, so it is written anew
    again = load_file(export_(told, tmp_path / "told.safetensors", to="kohya", backbone=net()))
    assert {float(value) for key, value in again.items() if key.endswith("alpha")} == {4.0}


def test_kinds_that_travel_are_no_built_in_ones() -> None:
    from deltahub import kinds

    assert document("lora") is None
    assert document("com.github.kohakublueleaf.lora-dora") is None
    for name in ("oft", "boft", "ia3", "loha-dora", "lokr-dora", "locon-dora"):
        found = document(f"com.github.kohakublueleaf.{name}")
        assert found is not None
        assert kinds.get(str(found["kind"]), documents=(found,)).version == 1


@pytest.mark.parametrize("kept", ["", "!", "eA==", "eNoDAAAAAAE=", 7, None])
def test_a_package_that_lies_about_its_file_is_written_afresh(kept: object, tmp_path: Path) -> None:
    """What a stranger's package says under ``extensions`` is only believed as far as its tensors bear it out."""
    import base64
    import json
    import zlib

    trained("lora", tmp_path / "them.safetensors")
    folder = import_(tmp_path / "them.safetensors", tmp_path / "package", backbone=net()).path
    document = json.loads((folder / "delta.json").read_text(encoding="utf-8"))
    section = document["extensions"]["com.github.kohya-ss"]
    if kept is None:  # a header that asks for other places than the tensors fill
        inner = json.loads(zlib.decompress(base64.b64decode(section["file"])))
        inner["header"] = inner["header"].replace('"data_offsets":[0,', '"data_offsets":[9,')
        kept = base64.b64encode(zlib.compress(json.dumps(inner).encode())).decode()
    section["file"] = kept
    (folder / "delta.json").write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(ConverterError) as caught:
        export_(folder, tmp_path / "again.safetensors", to="kohya")
    assert caught.value.code == "E_CONVERT_BACKBONE"
    assert not (tmp_path / "again.safetensors").exists()
    written = export_(folder, tmp_path / "again.safetensors", to="kohya", backbone=net())
    assert len(load_file(written)) == len(load_file(tmp_path / "them.safetensors"))
