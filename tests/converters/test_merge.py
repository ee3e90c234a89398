"""Streamed merges: the bits of a merge in memory, bytes where nothing changes, and a refusal where nothing fits."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from deltahub.attaching import attach
from deltahub.converters.merge import merge
from deltahub.errors import ConverterError, DeltaHubError, IdentityError
from deltahub.tensors import TensorFile, write
from tests.converters import tiny

Make = Callable[..., Path]
CASES = [
    ("bert", "lora", ["query", "intermediate.dense"], {"rank": 4, "scale": 2.0}),
    ("bert", "assign", ["classifier"], {}),
    ("bert", "bias", ["query", "LayerNorm"], {}),
    ("bert", "diff", ["word_embeddings", "pooler.dense"], {}),
    ("llama", "lora", ["q_proj", "down_proj", "embed_tokens"], {"rank": 3, "scale": -0.5}),
    ("gpt2", "lora", ["c_attn", "c_fc", "wpe"], {"rank": 4, "scale": 1.5}),
    ("gpt2", "diff", ["c_proj", "ln_f"], {}),
]


def prepared(
    name: str, base: Path, kind: str, targets: Any, config: dict[str, Any], tmp_path: Path, **load: Any
) -> Any:
    model = tiny.load_model(name, base, **load)
    delta = attach(model, kind, targets, **config)
    tiny.randomise(delta)
    return model, delta, tiny.package_of(tmp_path / f"package-{kind}", model, [delta], base)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert value.dtype == other[key].dtype, key
        assert torch.equal(value, other[key]), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "kind", "targets", "config"), CASES)
def test_streamed_is_merged_in_memory(
    name: str, kind: str, targets: Any, config: dict[str, Any], dtype: torch.dtype, backbone: Make, tmp_path: Path
) -> None:
    base = backbone(name, dtype=dtype)
    model, delta, package = prepared(name, base, kind, targets, config, tmp_path, dtype=dtype)
    report = merge(package, tmp_path / "out", backbone=base)
    delta.merge(permanently=True)
    same(model.state_dict(), tiny.load_model(name, tmp_path / "out", dtype=dtype).state_dict())
    assert report.changed
    assert not report.added
    assert (tmp_path / "out" / "config.json").read_bytes() == (base / "config.json").read_bytes()


def test_untouched_tensors_keep_their_place_and_header(backbone: Make, tmp_path: Path) -> None:
    base = backbone("llama")
    _, _, package = prepared("llama", base, "lora", ["layers.1.self_attn.q_proj"], {"rank": 2}, tmp_path)
    report = merge(package, tmp_path / "out", backbone=base)
    old, new = (base / "model.safetensors").read_bytes(), (tmp_path / "out" / "model.safetensors").read_bytes()
    head = struct.unpack("<Q", old[:8])[0] + 8
    assert old[:head] == new[:head]
    file = TensorFile.open(base / "model.safetensors")
    (changed,) = report.changed
    for name, info in file.items():
        assert (old[info.begin : info.end] == new[info.begin : info.end]) == (name != changed)
    assert report.copied + file[changed].end - file[changed].begin + head == len(old) == report.written


def test_shards_stay_and_can_be_made_anew(backbone: Make, tmp_path: Path) -> None:
    base = backbone("bert", shard="20KB")
    model, delta, package = prepared("bert", base, "lora", ["query"], {"rank": 2}, tmp_path)
    merge(package, tmp_path / "same", backbone=base)
    assert {p.name for p in base.iterdir()} | {"merge.json"} == {p.name for p in (tmp_path / "same").iterdir()}
    merge(package, tmp_path / "one", backbone=base, max_shard_bytes=1 << 30)
    assert (tmp_path / "one" / "model.safetensors").is_file()
    assert not list((tmp_path / "one").glob("*index*"))
    merge(package, tmp_path / "many", backbone=base, max_shard_bytes=9000)
    delta.merge(permanently=True)
    for folder in ("same", "one", "many"):
        same(model.state_dict(), tiny.load_model("bert", tmp_path / folder).state_dict())


def test_a_head_that_the_backbone_lacks_is_added(backbone: Make, tmp_path: Path) -> None:
    base = backbone("bert-base")
    model, delta, package = prepared_head(base, tmp_path)
    report = merge(package, tmp_path / "out", backbone=base)
    assert report.added == ("classifier.bias", "classifier.weight")
    delta.merge(permanently=True)
    same(model.state_dict(), tiny.load_model("bert", tmp_path / "out").state_dict())
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["BertForSequenceClassification"]


def prepared_head(base: Path, tmp_path: Path) -> Any:
    import transformers

    model = transformers.BertForSequenceClassification.from_pretrained(base)
    delta = attach(model, "assign", ["classifier"])
    tiny.randomise(delta)
    return model, delta, tiny.package_of(tmp_path / "head", model, [delta], base)


def test_several_deltas_with_weights(backbone: Make, tmp_path: Path) -> None:
    base = backbone("llama")
    model = tiny.load_model("llama", base)
    one = attach(model, "lora", ["q_proj", "k_proj"], name="one", rank=2, scale=2.0)
    two = attach(model, "diff", ["q_proj"], name="two")
    tiny.randomise(one, 1)
    tiny.randomise(two, 2)
    packages = [tiny.package_of(tmp_path / d.name, model, [d], base) for d in (one, two)]
    merge(packages, tmp_path / "out", backbone=base, weights=[0.5, -1.5])
    one.scale, two.scale = 0.5, -1.5
    one.merge()
    two.merge()
    same(model.state_dict(), tiny.load_model("llama", tmp_path / "out").state_dict())
    record = json.loads((tmp_path / "out" / "merge.json").read_text(encoding="utf-8"))
    assert [d["weight"] for d in record["deltas"]] == [0.5, -1.5]
    assert [d["kinds"] for d in record["deltas"]] == [["lora@1"], ["diff@1"]]


def test_another_dtype_is_rounded_once(backbone: Make, tmp_path: Path) -> None:
    base = backbone("llama")
    _, _, package = prepared("llama", base, "diff", ["q_proj"], {}, tmp_path)
    merge(package, tmp_path / "wide", backbone=base)
    merge(package, tmp_path / "out", backbone=base, dtype="bfloat16")
    wide = tiny.load_model("llama", tmp_path / "wide")
    half = tiny.load_model("llama", tmp_path / "out")
    same(wide.to(torch.bfloat16).state_dict(), half.state_dict())
    assert json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))["dtype"] == "bfloat16"


def test_a_value_too_large_for_the_dtype_is_an_error(backbone: Make, tmp_path: Path) -> None:
    base = backbone("llama")
    model, delta, _ = prepared("llama", base, "diff", ["q_proj"], {}, tmp_path)
    with torch.no_grad():
        next(delta.parameters()).fill_(1e6)
    package = tiny.package_of(tmp_path / "big", model, [delta], base)
    refused("E_MERGE_NONFINITE", package, tmp_path, backbone=base, dtype=torch.float16)


def refused(code: str, package: Any, tmp_path: Path, **options: Any) -> DeltaHubError:
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(DeltaHubError) as caught:
        merge(package, tmp_path / "out", **options)
    assert caught.value.code == code, caught.value
    assert sorted(p.name for p in tmp_path.iterdir()) == before  # nothing is left behind
    return caught.value


def test_what_cannot_be_merged_is_listed(backbone: Make, tmp_path: Path) -> None:
    base = backbone("bert")
    model = tiny.load_model("bert", base)
    delta = attach(model, "adapter", ["output.dense"], bottleneck=4)
    package = tiny.package_of(tmp_path / "p", model, [delta], base)
    error = refused("E_MERGE_UNMERGEABLE", package, tmp_path, backbone=base)
    assert len([error.found, *error.also]) == len(delta.sites)
    assert "encoder.layer.0" in str(error.found)


def test_a_tied_weight_is_refused(backbone: Make, tmp_path: Path) -> None:
    base = backbone("gpt2")
    _, _, package = prepared("gpt2", base, "lora", ["wte"], {"rank": 2}, tmp_path)
    assert "lm_head" in str(refused("E_MERGE_TIED", package, tmp_path, backbone=base).found)


def test_a_bias_that_has_no_place_is_refused(backbone: Make, tmp_path: Path) -> None:
    base = backbone("llama")
    _, _, package = prepared("llama", base, "bias", ["q_proj"], {}, tmp_path)
    refused("E_MERGE_BIAS", package, tmp_path, backbone=base)


def test_two_that_set_one_parameter_are_refused(backbone: Make, tmp_path: Path) -> None:
    base = backbone("bert")
    _, _, package = prepared("bert", base, "assign", ["classifier"], {}, tmp_path)
    refused("E_MERGE_CONFLICT", [package, package], tmp_path, backbone=base)


def test_another_architecture_is_refused(backbone: Make, tmp_path: Path) -> None:
    base, other = backbone("bert"), backbone("bert-base")
    _, _, package = prepared("bert", base, "lora", ["query"], {"rank": 2}, tmp_path)
    with pytest.raises(IdentityError):
        merge(package, tmp_path / "out", backbone=other)
    assert not (tmp_path / "out").exists()


def test_another_backbone_of_the_same_shape_is_refused(backbone: Make, tmp_path: Path) -> None:
    base, other = backbone("llama"), backbone("llama", seed=5)
    _, _, package = prepared("llama", base, "lora", ["q_proj"], {"rank": 2}, tmp_path)
    refused("E_BACKBONE_MISMATCH", package, tmp_path, backbone=other)


def test_an_existing_folder_is_left_alone(backbone: Make, tmp_path: Path) -> None:
    base = backbone("llama")
    _, _, package = prepared("llama", base, "lora", ["q_proj"], {"rank": 2}, tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("here")
    refused("E_MERGE_OUTPUT", package, tmp_path, backbone=base)
    merge(package, tmp_path / "out", backbone=base, overwrite=True)
    assert not (tmp_path / "out" / "mine").exists()
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"weights": [1.0, 2.0]}, "E_MERGE_WEIGHTS"),
        ({"weights": float("nan")}, "E_MERGE_WEIGHTS"),
        ({"dtype": "int8"}, "E_MERGE_DTYPE"),
        ({"max_shard_bytes": 0}, "E_MERGE_SHARD"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], code: str, backbone: Make, tmp_path: Path) -> None:
    base = backbone("llama")
    _, _, package = prepared("llama", base, "lora", ["q_proj"], {"rank": 2}, tmp_path)
    refused(code, package, tmp_path, backbone=base, **options)


def test_a_quantised_weight_is_refused(backbone: Make, tmp_path: Path) -> None:
    base = backbone("llama")
    path = base / "model.safetensors"
    with TensorFile.open(path) as file:
        tensors = {name: file.torch(name).clone() for name in file}
        metadata = file.metadata
    name = "model.layers.0.self_attn.q_proj.weight"
    _, delta, _ = prepared("llama", base, "lora", ["q_proj"], {"rank": 2}, tmp_path)
    tensors[name] = (tensors[name] * 10).to(torch.int8)
    write(path, tensors, metadata=metadata)
    package = tiny.package_of(tmp_path / "p", delta._model, [delta], base)
    refused("E_MERGE_QUANTISED", package, tmp_path, backbone=base)


def test_a_tensor_in_two_files_is_refused(backbone: Make, tmp_path: Path) -> None:
    from deltahub.converters.checkpoint import Checkpoint

    base = backbone("llama")
    with pytest.raises(ConverterError) as caught:
        Checkpoint([base / "model.safetensors", base / "model.safetensors"])
    assert caught.value.code == "E_MERGE_CHECKPOINT"


def test_memory_stays_within_blocks(tmp_path: Path) -> None:
    """A weight that is large beside a block: what is held at once is a few blocks, not the weight."""
    import tracemalloc

    from deltahub.converters.checkpoint import Checkpoint

    write(tmp_path / "m.safetensors", {"w": torch.zeros(4096, 4096)})
    with Checkpoint([tmp_path / "m.safetensors"]) as checkpoint:
        tracemalloc.start()
        for start in range(0, 4096, 256):
            assert checkpoint.rows("w", start, start + 256).shape == (256, 4096)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 3 * 256 * 4096 * 4
