"""Checkpoints that OpenDelta and AdapterHub wrote, against the outputs that they gave.

``tests/fixtures/opendelta`` was written by OpenDelta 0.3.0 (transformers 4.30.2), ``tests/fixtures/adapters`` by
adapters 1.3.0 (transformers 4.57.6), both on tiny random backbones.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import deltahub
from deltahub.converters import import_, sniff
from deltahub.errors import DeltaHubError
from deltahub.package import Package
from tests.converters import tiny  # noqa: F401  (the backbones' library is imported there)

FIXTURES = Path(__file__).parents[1] / "fixtures"


def outputs(folder: Path, prefix: str) -> dict[str, torch.Tensor]:
    with np.load(folder / "reference.npz") as file:
        return {k.removeprefix(prefix): torch.from_numpy(file[k]) for k in file if k.startswith(prefix)}


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("lora_bert_cls", {"lora", "assign"}),
        ("adapter_t5", {"adapter"}),
        ("compacter_bert_cls", {"compacter"}),
        ("prefix_reparam_t5", {"prefix"}),
    ],
)
def test_opendelta_gives_its_own_outputs(name: str, kinds: set[str], tmp_path: Path) -> None:
    folder = FIXTURES / "opendelta" / name
    assert sniff(folder / "checkpoint") == "opendelta"
    package = import_(folder / "checkpoint", tmp_path / "p", backbone=folder / "backbone", allow_pickle=True)
    assert {module.kind for module in package.manifest.modules} == kinds
    model = deltahub.load(package.path, backbone=folder / "backbone")
    inputs = outputs(folder, "input__")
    with torch.no_grad():
        found = model(**inputs)
    assert float((found.logits - outputs(folder, "delta__")["logits"]).abs().max()) <= 1e-5
    assert float((found.logits - outputs(folder, "base__")["logits"]).abs().max()) > 1e-2


def refused(code: str, path: Path, tmp_path: Path, **options: Any) -> DeltaHubError:
    with pytest.raises(DeltaHubError) as caught:
        import_(path, tmp_path / "p", **options)
    assert caught.value.code == code, caught.value
    assert not (tmp_path / "p").exists()
    return caught.value


def test_a_pickle_has_to_be_allowed(tmp_path: Path) -> None:
    folder = FIXTURES / "opendelta" / "lora_bert_cls"
    refused("E_CONVERT_PICKLE", folder / "checkpoint", tmp_path, backbone=folder / "backbone")


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda t: {**t, "mystery": torch.zeros(2)}, "E_CONVERT_SURPLUS"),
        (
            lambda t: {k: v for k, v in t.items() if not k.endswith("0.attention.self.query.lora.lora_B")},
            "E_CONVERT_MISSING",
        ),
        (lambda t: {k.replace("layer.1", "layer.7"): v for k, v in t.items()}, "E_MERGE_TARGET"),
        (lambda t: {k: v[:2] if k.endswith("lora_A") else v for k, v in t.items()}, "E_CONVERT_RANK"),
        (lambda t: {k: v * float("nan") for k, v in t.items()}, "E_CONVERT_VALUES"),
        (lambda t: {**t, "bert.encoder.layer.0.attention.self.query.lora.extra": torch.zeros(1)}, "E_CONVERT_SURPLUS"),
    ],
)
def test_opendelta_files_that_do_not_fit(change: Any, code: str, tmp_path: Path) -> None:
    folder = FIXTURES / "opendelta" / "lora_bert_cls"
    copy = tmp_path / "checkpoint"
    shutil.copytree(folder / "checkpoint", copy)
    weights = torch.load(copy / "pytorch_model.bin", weights_only=True)
    torch.save(change(weights), copy / "pytorch_model.bin")
    refused(code, copy, tmp_path, backbone=folder / "backbone", allow_pickle=True)


def test_the_layout_of_opendelta_before_march_2022(tmp_path: Path) -> None:
    folder = FIXTURES / "opendelta" / "lora_bert_cls"
    copy = tmp_path / "checkpoint"
    shutil.copytree(folder / "checkpoint", copy)
    weights = torch.load(copy / "pytorch_model.bin", weights_only=True)
    torch.save({k.replace(".lora.lora_", ".lora_"): v for k, v in weights.items()}, copy / "pytorch_model.bin")
    one = import_(copy, tmp_path / "one", backbone=folder / "backbone", allow_pickle=True)
    two = import_(folder / "checkpoint", tmp_path / "two", backbone=folder / "backbone", allow_pickle=True)
    assert one.manifest.modules == two.manifest.modules
    assert one.manifest.files == two.manifest.files


def test_biases_and_low_rank_adapters_of_opendelta(tmp_path: Path) -> None:
    """No fixture holds these two: the keys are those of its sources, the sums are worked out by hand."""
    folder = FIXTURES / "opendelta" / "lora_bert_cls"
    site = "bert.encoder.layer.0.output.dense"
    generator = torch.Generator().manual_seed(0)
    weights = {
        f"{site}.low_rank_adapter.{side}_sampler.{name}": torch.randn(shape, generator=generator)
        for side, (a, b) in {"down": (32, 8), "up": (8, 32)}.items()
        for name, shape in {"W_left": (a, 1), "W_right": (1, b), "b": (b,)}.items()
    }
    weights["bert.encoder.layer.1.output.dense.bias"] = torch.randn(32, generator=generator)
    copy = tmp_path / "checkpoint"
    copy.mkdir()
    torch.save(weights, copy / "pytorch_model.bin")
    config = {"delta_type": "low_rank_adapter", "opendelta_version": "0.3.0", "non_linearity": "gelu_new"}
    (copy / "config.json").write_text(json.dumps(config), encoding="utf-8")
    package = import_(copy, tmp_path / "p", backbone=folder / "backbone", allow_pickle=True)
    assert {m.kind for m in package.manifest.modules} == {"bias", "low-rank-adapter"}
    model = deltahub.load(package.path, backbone=folder / "backbone")
    plain = torch.nn.Linear(64, 32)
    plain.load_state_dict({k: v for k, v in model.get_submodule(site).state_dict().items() if k in {"weight", "bias"}})
    x = torch.randn(2, 64, generator=generator)
    with torch.no_grad():
        y = plain(x)
        part = {k.rpartition("low_rank_adapter.")[2]: v for k, v in weights.items() if "low_rank" in k}
        h = y @ (part["down_sampler.W_left"] * part["down_sampler.W_right"]) + part["down_sampler.b"]
        h = torch.nn.functional.gelu(h, approximate="tanh")
        want = y + h @ (part["up_sampler.W_left"] * part["up_sampler.W_right"]) + part["up_sampler.b"]
        assert float((model.get_submodule(site)(x) - want).abs().max()) <= 1e-5 * float(want.abs().max())


@pytest.mark.parametrize(
    ("name", "kind"),
    [("lora", "lora"), ("ia3", "ia3"), ("pfeiffer", "ml.adapterhub.pfeiffer"), ("prefix", "prefix")],
)
def test_adapterhub_gives_its_own_outputs(name: str, kind: str, tmp_path: Path) -> None:
    folder, base = FIXTURES / "adapters" / name, FIXTURES / "adapters" / "backbone"
    assert sniff(folder) == "adapterhub"
    package = import_(folder, tmp_path / "p", backbone=base, allow_pickle=name == "prefix")
    assert {module.kind for module in package.manifest.modules} == {kind}
    model = deltahub.load(package.path, backbone=base)
    reference = outputs(folder, "")
    inputs = {k: reference[k] for k in ("input_ids", "attention_mask", "token_type_ids")}
    with torch.no_grad():
        found = model(**inputs)
    assert float((found.last_hidden_state - reference["last_hidden_state"]).abs().max()) <= 1e-5
    assert float((found.last_hidden_state - reference["base_last_hidden_state"]).abs().max()) > 1e-3


@pytest.mark.parametrize(
    ("name", "change", "code"),
    [
        ("pfeiffer", {"original_ln_after": False}, "E_CONVERT_UNSUPPORTED"),
        ("pfeiffer", {"residual_before_ln": False}, "E_CONVERT_UNSUPPORTED"),
        ("pfeiffer", {"scaling": "learned"}, "E_CONVERT_MISSING"),
        ("pfeiffer", {"scaling": [4]}, "E_CONVERT_CONFIG"),
        ("lora", {"use_gating": True}, "E_CONVERT_MISSING"),
        ("lora", {"composition_mode": "scale"}, "E_CONVERT_SHAPE"),
        ("pfeiffer", {"inv_adapter": "nice"}, "E_CONVERT_MISSING"),
        ("pfeiffer", {"phm_layer": True}, "E_CONVERT_MISSING"),
        ("lora", {"r": 8}, "E_CONVERT_RANK"),
        ("lora", {"architecture": "reft"}, "E_CONVERT_KIND"),
    ],
)
def test_adapterhub_configurations_that_do_not_fit(name: str, change: Any, code: str, tmp_path: Path) -> None:
    copy = tmp_path / "adapter"
    shutil.copytree(FIXTURES / "adapters" / name, copy)
    document = json.loads((copy / "adapter_config.json").read_text(encoding="utf-8"))
    document["config"].update(change)
    (copy / "adapter_config.json").write_text(json.dumps(document), encoding="utf-8")
    refused(code, copy, tmp_path, backbone=FIXTURES / "adapters" / "backbone")


def test_the_foreign_configuration_is_kept(tmp_path: Path) -> None:
    folder, base = FIXTURES / "adapters" / "lora", FIXTURES / "adapters" / "backbone"
    import_(folder, tmp_path / "p", backbone=base)
    kept = (Package.open(tmp_path / "p").manifest.extensions or {})["ml.adapterhub"]["config"]
    assert kept == json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
