"""Baked checkpoints: plain to the backbone's own library, whole to deltahub; and how a merge ends or is resumed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import deltahub
from deltahub.converters import shards
from deltahub.converters.merge import merge
from deltahub.errors import ConverterError, DeltaHubError
from deltahub.testing import LoopbackHub
from tests.converters import tiny

Make = Callable[..., Path]
IDS = torch.arange(1, 9)[None]


def mixed(base: Path, out: Path, **options: Any) -> Any:
    """A model with a delta that merges in part: low-rank updates, one of them on a tied embedding, and adapters."""
    model = tiny.load_model("gpt2", base)
    delta = deltahub.attach(model, "lora", ["c_attn", "wte"], name="mixed", rank=2)
    other = deltahub.attach(model, "adapter", ["mlp"], name="other", bottleneck=3)
    tiny.randomise(delta)
    tiny.randomise(other, 2)
    tiny.package_of(out, model, [delta, other], base, **options)
    with torch.no_grad():
        return model(IDS).logits


def test_what_cannot_be_merged_lies_beside_the_weights(backbone: Make, tmp_path: Path) -> None:
    base = backbone("gpt2")
    wanted = mixed(base, tmp_path / "package")
    report = merge(tmp_path / "package", tmp_path / "out", backbone=base, bake=True)
    assert {one.rpartition("/")[2] for one in report.live} == {
        "transformer.wte", "transformer.h.0.mlp", "transformer.h.1.mlp",
    }  # fmt: skip
    assert len(report.changed) == 2
    loaded = deltahub.load(tmp_path / "out")
    with torch.no_grad():
        assert torch.allclose(loaded(IDS).logits, wanted, atol=1e-5)
    plain = tiny.load_model("gpt2", tmp_path / "out")
    with deltahub.using(loaded), torch.no_grad():
        assert torch.equal(plain(IDS).logits, loaded(IDS).logits)
    manifest = json.loads((tmp_path / "out" / "delta.json").read_text(encoding="utf-8"))
    assert manifest["backbone"]["source"] == {"class": "transformers.GPT2LMHeadModel"}
    shutil.copytree(tmp_path / "out", tmp_path / "altered")
    other = backbone("gpt2", seed=5) / "model.safetensors"
    shutil.copyfile(other, tmp_path / "altered" / "model.safetensors")
    with pytest.raises(DeltaHubError):
        deltahub.load(tmp_path / "altered")


def test_a_weight_goes_into_what_stays_live(backbone: Make, tmp_path: Path) -> None:
    base = backbone("gpt2")
    model = tiny.load_model("gpt2", base)
    delta = deltahub.attach(model, "lora", ["c_attn", "wte"], name="low", rank=2, scale=4.0)
    tiny.randomise(delta)
    package = tiny.package_of(tmp_path / "package", model, [delta], base)
    merge(package, tmp_path / "out", backbone=base, bake=True, weights=0.5)
    delta.scale = 0.5
    with torch.no_grad():
        assert torch.allclose(deltahub.load(tmp_path / "out")(IDS).logits, model(IDS).logits, atol=1e-5)


def test_a_kind_without_a_strength_takes_no_weight(backbone: Make, tmp_path: Path) -> None:
    base = backbone("gpt2")
    mixed(base, tmp_path / "package")
    for options in ({"weights": 0.5}, {"method": "linear"}):
        with pytest.raises(ConverterError) as caught:
            merge(tmp_path / "package", tmp_path / "no", backbone=base, bake=True, **options)
        assert caught.value.code == "E_MERGE_BAKE"
        assert not (tmp_path / "no").exists()


def test_a_baked_repository_loads_by_its_name(backbone: Make, hub: LoopbackHub, tmp_path: Path) -> None:
    base = backbone("gpt2")
    wanted = mixed(base, tmp_path / "package")
    merge(tmp_path / "package", tmp_path / "out", backbone=base, bake=True)
    hub.create("acme/baked", {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()})
    options: dict[str, Any] = {"endpoint": hub.url, "token": hub.token, "cache_dir": tmp_path / "cache"}
    with torch.no_grad():
        assert torch.allclose(deltahub.load("acme/baked", **options)(IDS).logits, wanted, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_a_denoiser_is_baked_with_its_pipeline(tmp_path: Path) -> None:
    """Replaced attention, as a distilled convolution is: by itself, and within the pipeline it was published for."""
    from tests.test_pipelines import pipeline as built

    pipeline = built(tmp_path / "vocabulary")
    pipeline.save_pretrained(tmp_path / "base")
    model = type(pipeline.unet).from_pretrained(str(tmp_path / "base" / "unet"))
    paths = [name for name, _ in model.named_modules() if name.endswith("attn1")]
    delta = deltahub.attach(model, "delta-conv", paths, kernel=3)
    tiny.randomise(delta)
    lora = deltahub.attach(model, "lora", ["attn2.to_q"], name="lora", rank=2)
    tiny.randomise(lora, 3)
    inputs = {"sample": torch.randn(1, 4, 8, 8), "timestep": torch.tensor([3]), "encoder_hidden_states": None}
    inputs["encoder_hidden_states"] = torch.randn(1, 5, model.config.cross_attention_dim)
    with torch.no_grad():
        wanted = model(**inputs).sample
    deltahub.save(model, tmp_path / "package")
    report = merge(tmp_path / "package", tmp_path / "out", backbone=tmp_path / "base", bake=True)
    assert len(report.live) == len(paths)
    loaded = deltahub.load(tmp_path / "out")
    assert type(loaded).__name__ == type(pipeline).__name__
    with torch.no_grad():
        assert torch.allclose(loaded.unet(**inputs).sample, wanted, atol=1e-5)


def test_a_probe_is_replayed_before_the_folder_is_there(backbone: Make, tmp_path: Path) -> None:
    base = backbone("bert")
    model = tiny.load_model("bert", base)
    delta = deltahub.attach(model, "lora", ["query"], rank=2)
    tiny.randomise(delta)
    delta.save(tmp_path / "package", backbone=base, probe={"input_ids": IDS})
    report = merge(tmp_path / "package", tmp_path / "out", backbone=base)
    assert report.probe is not None
    assert max(report.probe.values()) < 1e-5
    from deltahub.converters import merge as module

    assert merge(tmp_path / "package", tmp_path / "quick", backbone=base, replay=False).probe is None
    before = sorted(tmp_path.iterdir())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("deltahub.merging.blend", lambda old, new, strength: old)
        with pytest.raises(DeltaHubError) as caught:
            module(tmp_path / "package", tmp_path / "wrong", backbone=base)
    assert caught.value.code == "E_PACKAGE_PROBE_DIFFERS"
    assert sorted(tmp_path.iterdir()) == before


def test_an_interrupted_merge_is_taken_up_again(
    backbone: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = backbone("bert", shard="20KB")
    model = tiny.load_model("bert", base)
    delta = deltahub.attach(model, "lora", ["query"], rank=2)
    tiny.randomise(delta)
    package = tiny.package_of(tmp_path / "package", model, [delta], base)
    merge(package, tmp_path / "wanted", backbone=base)
    write, count = shards.write_shard, 0

    def until(*arguments: Any) -> None:
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt
        write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr("deltahub.converters.carrying.write_shard", until)
        with pytest.raises(KeyboardInterrupt):
            merge(package, tmp_path / "out", backbone=base)
    (part,) = tmp_path.glob(".out.*.part")
    (part / "config.json").write_text("half")
    report = merge(package, tmp_path / "out", backbone=base)
    assert report.resumed == 2
    contents = [{p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("wanted", "out")]
    assert contents[0] == contents[1]
    assert not list(tmp_path.glob(".*.part"))


def test_a_backbone_at_an_address(backbone: Make, tmp_path: Path) -> None:
    import fsspec

    base = backbone("bert")
    model = tiny.load_model("bert", base)
    delta = deltahub.attach(model, "lora", ["query"], rank=2)
    tiny.randomise(delta)
    package = tiny.package_of(tmp_path / "package", model, [delta], base)
    memory = fsspec.filesystem("memory")
    memory.put(str(base), "/bucket/base", recursive=True)
    merge(package, tmp_path / "wanted", backbone=base)
    merge(package, tmp_path / "out", backbone="memory://bucket/base")
    name = "model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "wanted" / name).read_bytes()
    with pytest.raises(ConverterError) as caught:
        merge(package, tmp_path / "no", backbone="memory://bucket/nothing")
    assert caught.value.code == "E_MERGE_SOURCE"
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
