"""Adapters of PEFT given to ``deltahub.load`` as they are: from a folder, and from a Hub."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import deltahub
from deltahub.errors import ConverterError, DeltaHubError, HubError
from tests.converters import tiny

peft = pytest.importorskip("peft")
IDS = torch.arange(1, 13).view(2, 6)


def run(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS)[0]
    return found


def adapter(base: Path, folder: Path, named: str | None = None, **config: Any) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(tiny.load_model("llama", base), peft.LoraConfig(task_type="CAUSAL_LM", **config))
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        model.eval().save_pretrained(folder)
    if named is not None:
        document = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        document["base_model_name_or_path"] = named
        (folder / "adapter_config.json").write_text(json.dumps(document), encoding="utf-8")
    return run(model)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tiny.make_model("llama").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_a_folder_on_the_backbone_that_it_names(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = adapter(base, tmp_path / "adapter", target_modules=["q_proj"], r=3, lora_alpha=5, use_rslora=True)
    model = deltahub.load(tmp_path / "adapter")
    assert (run(model) - expected).abs().max() <= 1e-6
    report = deltahub.deltas(model)["adapter"].report
    assert "that these are the same weights is not known" in str(report)
    assert "that these are the same weights is not known" in caplog.text
    assert report.path == tmp_path / "adapter"
    monkeypatch.chdir(tmp_path)
    other = deltahub.load("adapter", backbone=tiny.load_model("llama", base), name="it")
    assert (run(other) - expected).abs().max() <= 1e-6
    assert "was put on the one that was given" in str(deltahub.deltas(other)["it"].report)
    assert deltahub.verify(tmp_path / "adapter", backbone=base).effect > 0
    merged = deltahub.load(tmp_path / "adapter", merge=True)
    assert (run(merged) - expected).abs().max() <= 1e-5


def test_from_a_hub_with_its_backbone(hub: Any, base: Path, cache: Path, tmp_path: Path) -> None:
    from huggingface_hub import HfApi

    client = {"endpoint": hub.url, "token": hub.token, "cache_dir": cache}
    api = HfApi(endpoint=hub.url, token=hub.token)
    expected = adapter(base, tmp_path / "adapter", "org/base", target_modules=["v_proj", "up_proj"], r=2)
    commits = {}
    for repo, folder in (("org/base", base), ("user/lora", tmp_path / "adapter")):
        api.create_repo(repo)
        commits[repo] = api.upload_folder(repo_id=repo, folder_path=folder).oid
    model = deltahub.load("user/lora", **client)
    assert (run(model) - expected).abs().max() <= 1e-6
    report = deltahub.deltas(model)["lora"].report
    assert report.commit == commits["user/lora"]
    assert "the newest was taken" in str(report)
    pinned = deltahub.load(f"user/lora@{commits['user/lora']}", **client, local_files_only=True)
    assert (run(pinned) - expected).abs().max() <= 1e-6
    with pytest.raises(HubError) as caught:
        deltahub.load("org/base", **client)  # neither a package nor an adapter
    assert caught.value.code == "E_HUB_NOT_A_PACKAGE"


@pytest.mark.parametrize(
    ("named", "code"), [("/home/somebody/models/llama", "E_CONVERT_BACKBONE"), ("", "E_CONVERT_BACKBONE")]
)
def test_a_backbone_on_somebody_elses_disk(
    named: str, code: str, hub: Any, base: Path, cache: Path, tmp_path: Path
) -> None:
    from huggingface_hub import HfApi

    adapter(base, tmp_path / "adapter", named, target_modules=["q_proj"], r=2)
    api = HfApi(endpoint=hub.url, token=hub.token)
    api.create_repo("user/lora")
    api.upload_folder(repo_id="user/lora", folder_path=tmp_path / "adapter")
    with pytest.raises(ConverterError) as caught:
        deltahub.load("user/lora", endpoint=hub.url, token=hub.token, cache_dir=cache)
    assert caught.value.code == code
    model = deltahub.load("user/lora", endpoint=hub.url, token=hub.token, cache_dir=cache, backbone=base)
    assert deltahub.deltas(model)


def test_the_wrong_architecture_and_a_pickle(base: Path, tmp_path: Path) -> None:
    adapter(base, tmp_path / "adapter", target_modules=["q_proj"], r=2)
    live = tiny.make_model("bert")
    before = {name: value.clone() for name, value in live.state_dict().items()}
    with pytest.raises(DeltaHubError):
        deltahub.load(tmp_path / "adapter", backbone=live)
    assert all(torch.equal(value, before[name]) for name, value in live.state_dict().items())
    from safetensors.torch import load_file

    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    torch.save(tensors, tmp_path / "adapter" / "adapter_model.bin")
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(DeltaHubError) as caught:
        deltahub.load(tmp_path / "adapter")
    assert caught.value.code == "E_CONVERT_PICKLE"
    assert deltahub.deltas(deltahub.load(tmp_path / "adapter", allow_pickle=True))
