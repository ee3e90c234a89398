"""The backbone check as a user meets it, and the whole way from a package to a ready model."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

import deltahub
from deltahub.testing import LoopbackHub
from tests.models import bert_classifier, ids, llama
from tests.zoo import randomise

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids()).logits


@pytest.fixture
def backbone(tmp_path: Path) -> Path:
    llama().save_pretrained(tmp_path / "backbone")
    return tmp_path / "backbone"


@pytest.fixture
def package(tmp_path: Path, backbone: Path) -> Path:
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(backbone).eval()
    delta = deltahub.attach(model, "lora", ["q_proj", "down_proj"], rank=2, scale=2.0)
    randomise(delta.parameters())
    deltahub.save(model, tmp_path / "package", probe={"input_ids": ids()})
    return tmp_path / "package"


def expected(package: Path, backbone: Path) -> torch.Tensor:
    return logits(deltahub.load(package, backbone=backbone))


def code(package: Path, backbone: object, **options: object) -> str:
    with pytest.raises(deltahub.DeltaHubError) as caught:
        deltahub.load(package, backbone=backbone, **options)
    return caught.value.code


def report(model: nn.Module) -> object:
    (delta,) = deltahub.deltas(model).values()
    return delta.report


def test_a_model_is_rebuilt_checked_and_ready(package: Path, backbone: Path) -> None:
    model = deltahub.load(package, backbone=backbone)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert not model.training
    assert [level.name for level in report(model).identity.levels] == ["L2", "L3"]
    assert list(model.state_dict()) == list(llama().state_dict())
    live = deltahub.load(package, backbone=llama())
    assert torch.equal(logits(model), logits(live))


def test_load_merged_gives_a_plain_model(package: Path, backbone: Path) -> None:
    model = deltahub.load(package, backbone=backbone, merge=True)
    assert not deltahub.deltas(model)
    assert type(model.model.layers[0].self_attn.q_proj) is nn.Linear
    assert (logits(model) - expected(package, backbone)).abs().max() < 1e-5


def test_one_flipped_bit_in_a_touched_tensor_is_refused(package: Path, backbone: Path) -> None:
    flip(backbone, "model.layers.1.mlp.down_proj.weight")
    assert code(package, backbone) == "E_BACKBONE_MISMATCH"
    with pytest.raises(deltahub.DeltaHubError, match=r"model\.layers\.1\.mlp\.down_proj\.weight"):
        deltahub.load(package, backbone=backbone)


def test_one_flipped_bit_elsewhere_is_seen_by_the_full_check(package: Path, backbone: Path) -> None:
    flip(backbone, "model.embed_tokens.weight")
    assert code(package, backbone, verify="full") == "E_BACKBONE_MISMATCH"
    assert report(deltahub.load(package, backbone=backbone)).identity.level.name == "L3"


def flip(backbone: Path, name: str) -> None:
    from deltahub.tensors import TensorFile

    path = backbone / "model.safetensors"
    with TensorFile.open(path) as file:
        at = file[name].begin
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def test_no_check_is_said_aloud(package: Path, backbone: Path, caplog: pytest.LogCaptureFixture) -> None:
    flip(backbone, "model.layers.1.mlp.down_proj.weight")
    with caplog.at_level(logging.WARNING):
        model = deltahub.load(package, backbone=backbone, verify=None)
    assert report(model).identity is None
    assert "was not checked" in caplog.text


def test_a_half_precision_copy_is_the_same_backbone(package: Path, backbone: Path, tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    LlamaForCausalLM.from_pretrained(backbone, dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    model = deltahub.load(package, backbone=tmp_path / "half")
    assert report(model).identity.root == "bf16"
    assert model.dtype == torch.bfloat16
    assert (logits(model).float() - expected(package, backbone)).abs().max() < 5e-2
    in_memory = LlamaForCausalLM.from_pretrained(backbone, dtype=torch.bfloat16)
    assert report(deltahub.load(package, backbone=in_memory)).identity.root == "bf16"


def test_shards_do_not_matter(package: Path, backbone: Path, tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    LlamaForCausalLM.from_pretrained(backbone).save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    model = deltahub.load(package, backbone=tmp_path / "shards", verify="full")
    assert torch.equal(logits(model), expected(package, backbone))


def test_pickled_weights_only_when_asked_for(package: Path, backbone: Path, tmp_path: Path) -> None:
    wanted = expected(package, backbone)
    torch.save(llama().state_dict(), backbone / "pytorch_model.bin")
    (backbone / "model.safetensors").unlink()
    assert code(package, backbone) == "E_BACKBONE_WEIGHTS"
    assert torch.equal(logits(deltahub.load(package, backbone=backbone, allow_pickle=True)), wanted)


def test_tied_heads(tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    llama(tied=True).save_pretrained(tmp_path / "backbone")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "backbone").eval()
    delta = deltahub.attach(model, "lora", ["lm_head", "q_proj"], rank=2)
    randomise(delta.parameters())
    wanted = logits(model)
    deltahub.save(model, tmp_path / "package")
    loaded = deltahub.load(tmp_path / "package", backbone=tmp_path / "backbone", verify="full")
    assert torch.equal(logits(loaded), wanted)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_quantised_copy_is_another_backbone(package: Path) -> None:
    model = llama()
    torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, inplace=True)
    assert code(package, model).startswith(("E_BACKBONE", "E_IDENTITY"))


def test_a_class_with_a_head_takes_the_head_from_the_package(tmp_path: Path) -> None:
    from transformers import BertForSequenceClassification, BertModel

    base = bert_classifier()
    BertModel.save_pretrained(base.bert, tmp_path / "backbone")
    model = BertForSequenceClassification.from_pretrained(tmp_path / "backbone", num_labels=5).eval()
    deltahub.attach(model, "lora", "query", rank=2)
    deltahub.attach(model, "assign", "classifier", name="head")
    randomise([p for d in deltahub.deltas(model).values() for p in d.parameters()])
    wanted = logits(model)
    deltahub.save(model, tmp_path / "package")
    loaded = deltahub.load(tmp_path / "package", backbone=tmp_path / "backbone")
    assert torch.equal(logits(loaded), wanted)
    assert loaded.config.num_labels == 5


def test_half_a_model_is_refused(tmp_path: Path) -> None:
    """A package without the head that its class needs would leave random numbers in it."""
    from transformers import BertForSequenceClassification, BertModel

    BertModel.save_pretrained(bert_classifier().bert, tmp_path / "backbone")
    model = BertForSequenceClassification.from_pretrained(tmp_path / "backbone", num_labels=5)
    deltahub.attach(model, "lora", "query", rank=2)
    deltahub.save(model, tmp_path / "package")
    with pytest.raises(deltahub.DeltaHubError) as caught:
        deltahub.load(tmp_path / "package", backbone=tmp_path / "backbone")
    assert caught.value.code == "E_BACKBONE_HALF"
    assert "classifier" in str(caught.value)


def test_dtype_and_device_pass_through(package: Path, backbone: Path) -> None:
    model = deltahub.load(package, backbone=backbone, dtype=torch.bfloat16, device="cpu")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    model = deltahub.load(package, backbone=backbone, dtype="float64")
    assert {p.dtype for p in model.parameters()} == {torch.float64}


def test_from_a_hub_by_name_alone(tmp_path: Path, hub: LoopbackHub) -> None:
    """Backbone and delta both come from the Hub, each pinned to a commit; another commit of the backbone is seen."""
    from huggingface_hub import HfApi

    api = HfApi(endpoint=hub.url, token=hub.token)
    llama().save_pretrained(tmp_path / "llama")
    api.create_repo("org/llama")
    commit = api.upload_folder(repo_id="org/llama", folder_path=tmp_path / "llama").oid
    options = {"endpoint": hub.url, "token": hub.token, "cache_dir": tmp_path / "cache"}
    from huggingface_hub import snapshot_download
    from transformers import LlamaForCausalLM

    snapshot = snapshot_download("org/llama", revision=commit, **options)
    model = LlamaForCausalLM.from_pretrained(snapshot).eval()
    delta = deltahub.attach(model, "lora", "q_proj", rank=2)
    randomise(delta.parameters())
    wanted = logits(model)
    package = deltahub.save(model, tmp_path / "package", probe={"input_ids": ids()})
    assert package.manifest.backbone.source.commit == commit
    deltahub.push(tmp_path / "package", "user/delta", endpoint=hub.url, token=hub.token)
    loaded = deltahub.load("user/delta", **options)
    assert torch.equal(logits(loaded), wanted)
    assert [level.name for level in report(loaded).identity.levels] == ["L0", "L2", "L3"]
    assert deltahub.verify("user/delta", **options).probe == {"logits": 0.0}
    llama(seed=1).save_pretrained(tmp_path / "other")
    api.upload_folder(repo_id="org/llama", folder_path=tmp_path / "other")
    assert torch.equal(logits(deltahub.load("user/delta", **options)), wanted)
    with pytest.raises(deltahub.DeltaHubError) as caught:
        deltahub.load("user/delta", backbone="org/llama@main", **options)
    assert caught.value.code == "E_BACKBONE_MISMATCH"


def test_verify_replays_the_probe_and_proves_an_effect(package: Path, backbone: Path, tmp_path: Path) -> None:
    found = deltahub.verify(package, backbone=backbone)
    assert found.probe == {"logits": 0.0}
    assert found.effect > 1e-4
    model = llama()
    deltahub.attach(model, "lora", "q_proj", rank=2)
    deltahub.save(model, tmp_path / "fresh", probe={"input_ids": ids()})
    with pytest.raises(deltahub.DeltaHubError) as caught:
        deltahub.verify(tmp_path / "fresh", backbone=llama())
    assert caught.value.code == "E_PACKAGE_NO_EFFECT"


def test_a_probe_that_does_not_come_out_is_an_error(package: Path, backbone: Path, tmp_path: Path) -> None:
    flip(backbone, "model.embed_tokens.weight")
    path = backbone / "model.safetensors"
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    tensors["model.embed_tokens.weight"] += 1.0
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(deltahub.DeltaHubError) as caught:
        deltahub.verify(package, backbone=backbone)
    assert caught.value.code == "E_PACKAGE_PROBE_DIFFERS"


def test_a_live_model_is_left_alone_by_verify(package: Path) -> None:
    model = llama()
    before = logits(model)
    deltahub.verify(package, backbone=model)
    assert not deltahub.deltas(model)
    assert torch.equal(logits(model), before)


def test_saving_again_keeps_the_backbone_section(package: Path, backbone: Path, tmp_path: Path) -> None:
    model = deltahub.load(package, backbone=backbone)
    again = deltahub.save(model, tmp_path / "again")
    first = json.loads((package / "delta.json").read_text())
    second = json.loads((tmp_path / "again" / "delta.json").read_text())
    assert first["backbone"] == second["backbone"]
    assert again.manifest.modules[0].name == "lora"


def test_a_merged_delta_is_not_saved(package: Path, tmp_path: Path) -> None:
    model = deltahub.load(package, backbone=llama())
    (delta,) = deltahub.deltas(model).values()
    delta.merge()
    with pytest.raises(deltahub.DeltaHubError) as caught:
        delta.save(tmp_path / "again")
    assert caught.value.code == "E_INJECTION_MERGED"
    assert not (tmp_path / "again").exists()


def test_settings_are_undone_with_the_delta(package: Path, tmp_path: Path) -> None:
    shutil.copytree(package, tmp_path / "set")
    path = tmp_path / "set" / "delta.json"
    manifest = json.loads(path.read_text())
    manifest["settings"] = [{"on": "config", "path": "use_cache", "was": True, "value": False}]
    path.write_text(json.dumps(manifest))
    model = deltahub.load(tmp_path / "set", backbone=llama())
    assert model.config.use_cache is False
    (delta,) = deltahub.deltas(model).values()
    delta.detach()
    assert model.config.use_cache is True
    manifest["settings"][0]["was"] = False
    path.write_text(json.dumps(manifest))
    other = llama()
    assert code(tmp_path / "set", other) == "E_BACKBONE_SETTING_WAS"
    assert not deltahub.deltas(other)
