"""Looking at things: folding, live models with deltas, packages in their backbones, backbones by headers alone."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import deltahub
from deltahub.cli import app
from deltahub.errors import DeltaHubError
from deltahub.inspecting import Group, Inspection, Structure, fold, inspect, to_svg, to_text
from deltahub.testing import LoopbackHub
from tests.models import bert_classifier, gpt2, llama


def labels(group: Group) -> list[str]:
    found = [group.label]
    for inside in group.below:
        found += labels(inside)
    return found


def run(*args: object, code: int = 0) -> Any:
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    assert result.exit_code == code, result.output
    return result


def test_equal_siblings_are_folded() -> None:
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 8), nn.Linear(4, 4)])
    model.query, model.key = nn.Linear(4, 4), nn.Linear(4, 4)
    found = fold(inspect(model).root)
    assert labels(found) == ["", "layers", "0-1", "2", "3", "query, key"]
    assert [len(group.nodes) for group in found.below[0].below] == [2, 1, 1]
    many = nn.Module()
    for letter in "abcdefgh":
        many.add_module(letter, nn.Linear(2, 2))
    assert labels(fold(inspect(many).root)) == ["", "a, b, c, … h"]


def test_what_is_trained_differs() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    assert labels(fold(inspect(model).root))[1:] == ["0-1"]
    model[1].requires_grad_(False)
    found = inspect(model)
    assert labels(fold(found.root))[1:] == ["0", "1"]
    assert (found.parameters, found.trainable, found.size) == (40, 20, 160)


def test_a_live_model_with_deltas() -> None:
    model = bert_classifier()
    plain = inspect(model)
    delta = deltahub.attach(model, "lora", ["query", "value"], rank=2)
    found = deltahub.inspect(model)
    assert isinstance(found, Structure)
    assert found.class_name == "transformers.BertForSequenceClassification"
    assert found.parameters == plain.parameters == sum(p.numel() for p in bert_classifier().parameters())
    assert found.trainable == 0
    (summary,) = found.deltas
    assert (summary.name, summary.sites, summary.state) == ("lora", 4, "active")
    assert summary.parameters == delta.num_parameters()
    assert summary.share == pytest.approx(summary.parameters / found.parameters)
    sites = {path: node.sites for path, node in found.root.walk() if node.sites}
    assert list(sites) == [f"bert.encoder.layer.{n}.attention.self.{w}" for n in range(2) for w in ("query", "value")]
    (site,) = sites["bert.encoder.layer.0.attention.self.query"]
    assert site.tensors == {"down": (2, 32), "up": (32, 2)}
    assert site.ports == ("output", "weight")
    assert site.share == pytest.approx(128 / (32 * 32 + 32))
    text = str(found)
    assert "0-1 (BertLayer) 2 ×" in text
    assert "query (Linear) [32, 32] 1.1 k  ← lora@1 rank=2 scale=1.0 down [2, 32], up [32, 2] 128 (12.1 %)" in text
    delta.merge()
    assert inspect(model).deltas[0].state == "merged"
    delta.detach()
    assert str(inspect(model)) != str(plain) or not inspect(model).deltas


def test_tied_parameters_count_once() -> None:
    model = llama(tied=True)
    found = inspect(model)
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert "tied: weight = model.embed_tokens.weight" in str(found)
    shared = nn.Sequential(nn.Linear(2, 2))
    shared.add_module("again", shared[0])
    assert inspect(shared).parameters == 6
    assert "again (Linear) is 0" in str(inspect(shared))


def test_a_large_architecture_is_quick() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    start = time.process_time()
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig())
    found = inspect(model)
    text = str(found)
    assert time.process_time() - start < 2.0
    assert found.parameters == 6_738_415_616
    assert len(text.splitlines()) < 30
    assert "0-31 (LlamaDecoderLayer) 32 × 202.4 M" in text


@pytest.fixture
def package(tmp_path: Path) -> tuple[Path, Path]:
    """A package and its backbone's folder."""
    bert_classifier().save_pretrained(tmp_path / "base")
    from transformers import BertForSequenceClassification

    model = BertForSequenceClassification.from_pretrained(tmp_path / "base")
    delta = deltahub.attach(model, "lora", ["query", "value"], rank=2)
    delta.save(tmp_path / "delta")
    return tmp_path / "delta", tmp_path / "base"


def test_a_package_in_its_backbone(package: tuple[Path, Path]) -> None:
    folder, base = package
    alone, inside = inspect(folder), inspect(folder, backbone=base)
    assert isinstance(alone, Inspection)
    assert isinstance(inside, Inspection)
    assert alone.share is not None
    assert 0 < alone.share < 1
    assert "query, value 2 ×  ← lora@1" in str(alone)
    (site,) = next(node for _, node in inside.root.walk() if node.sites).sites
    assert site.share == pytest.approx(128 / (32 * 32 + 32))
    text = run("inspect", folder, "--backbone", base).stdout
    assert "dense (Linear) [32, 32]" in text
    assert json.loads(run("inspect", folder, "--json").stdout)["root"]["children"]
    error = json.loads(run("inspect", folder, "--whole", "--json", code=1).stdout)["error"]
    assert error["code"] in {"E_BACKBONE_SOURCE", "E_BACKBONE_FETCH", "E_BACKBONE_OFFLINE", "E_BACKBONE_NOT_FOUND"}


def test_a_backbone_in_a_folder(tmp_path: Path) -> None:
    gpt2().to(torch.bfloat16).save_pretrained(tmp_path / "base")
    found = inspect(tmp_path / "base")
    assert isinstance(found, Structure)
    assert found.what == "backbone"
    assert found.class_name == "transformers.GPT2LMHeadModel"
    assert set(found.dtypes) == {"bfloat16"}
    assert found.parameters == sum(p.numel() for p in gpt2().parameters())
    assert "c_attn (Conv1D) [96, 32]" in run("inspect", tmp_path / "base").stdout


def test_a_backbone_on_the_hub_costs_no_weights(tmp_path: Path, hub: LoopbackHub, cache: Path) -> None:
    llama().to(torch.float16).save_pretrained(tmp_path / "base")
    files = {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()}
    hub.create("acme/base", files)
    hub.log.clear()
    found = inspect("acme/base", endpoint=hub.url, token=hub.token, cache_dir=cache)
    assert isinstance(found, Structure)
    assert found.commit
    assert set(found.dtypes) == {"float16"}
    assert found.parameters == sum(p.numel() for p in llama().parameters())
    assert not list(cache.rglob("*.safetensors"))
    offline = inspect("acme/base", cache_dir=cache, endpoint=hub.url, local_files_only=True)
    assert offline.parameters == found.parameters


def test_an_architecture_that_nobody_knows(tmp_path: Path) -> None:
    """Names, shapes and dtypes are there; nothing is imported for them."""
    llama().save_pretrained(tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    config["architectures"] = ["EvilForCausalLM"]
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    found = inspect(tmp_path / "base")
    assert isinstance(found, Structure)
    assert found.parameters == sum(p.numel() for p in llama().parameters())
    assert "the architecture is not known" in found.notes[0]
    assert "0-1 2 ×" in str(found)
    with pytest.raises(DeltaHubError, match=r"E_HUB_NOT_A_PACKAGE|E_HUB_SOURCE"):
        inspect(tmp_path)


def test_pictures(tmp_path: Path, package: tuple[Path, Path]) -> None:
    svg = tmp_path / "delta.svg"
    run("inspect", package[0], "--svg", svg)
    text = svg.read_text()
    assert text.startswith("<svg")
    assert "query" in text
    assert "http" not in text.replace("http://www.w3.org/", "")
    assert to_svg(inspect(package[0])) == text


def test_a_picture_in_pixels(tmp_path: Path, package: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from deltahub.inspecting import drawing, to_png

    pytest.importorskip("resvg_py")
    png = tmp_path / "delta.png"
    try:
        run("inspect", package[0], "--png", png)
    except AssertionError:
        with pytest.raises(DeltaHubError, match="a font to write with"):  # a machine without any
            to_png(inspect(package[0]))
        return
    data = png.read_bytes()
    assert data.startswith(b"\x89PNG")
    assert int.from_bytes(data[16:20]) > 800
    assert len(to_png(inspect(package[0]), zoom=2.0)) > len(data)
    monkeypatch.setattr(drawing, "_FONTS", {sys.platform: "No Such Font At All"})
    with pytest.raises(DeltaHubError, match="E_USAGE_PICTURE"):
        to_png(inspect(package[0]))
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(DeltaHubError, match=r"deltahub\[png\]"):
        to_png(inspect(package[0]))


def test_seven_billion_parameters_without_one_of_them(tmp_path: Path) -> None:
    from transformers import LlamaConfig

    config = LlamaConfig()  # the first Llama of that size
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    found = inspect(tmp_path)
    assert isinstance(found, Structure)
    assert found.parameters == 6_738_415_616
    assert "0-31 (LlamaDecoderLayer) 32 × 202.4 M" in str(found)


def test_nothing_in_a_name_reaches_the_terminal() -> None:
    model = nn.Module()
    model._modules["\x1b[2J[red]"] = nn.Linear(2, 2)
    text = to_text(inspect(model))
    assert "\x1b" not in text
    assert "[red]" in text


def test_a_package_is_inspected_without_torch(package: tuple[Path, Path]) -> None:
    code = "import sys, deltahub; print(deltahub.inspect(sys.argv[1])); assert 'torch' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-c", code, package[0]],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[1],
    )
    assert done.returncode == 0, done.stderr
