"""Diffs between checkpoints, and packed packages: exact where they say so, and what is lost where they do not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import deltahub
from deltahub.converters import diff, egd, merge, pack, unpack
from deltahub.converters.packing import PACKED, packed
from deltahub.errors import DeltaHubError
from deltahub.tensors import TensorFile, write
from tests.converters import tiny

pytest.importorskip("zstandard")
Make = Callable[..., Path]


def tuned(base: Path, name: str, change: Callable[[torch.nn.Module], None], dtype: torch.dtype) -> Path:
    model = tiny.load_model(name, base, dtype=dtype)
    with torch.no_grad():
        change(model)
    folder = base.with_name(f"{base.name}-tuned")
    model.save_pretrained(folder)
    return folder


def everything(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(4)
    for parameter in model.parameters():
        parameter.add_((torch.randn(parameter.shape, generator=generator) * 0.01).to(parameter.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
def test_an_exact_diff_gives_back_every_bit(name: str, dtype: torch.dtype, backbone: Make, tmp_path: Path) -> None:
    base = backbone(name, dtype=dtype)
    fine = tuned(base, name, everything, dtype)
    if name == "gpt2":  # its embedding is tied to its head: a delta of one is a delta of both, which merging refuses
        fine = tuned(base, name, lambda m: everything(m.transformer.h), dtype)
    report = diff(base, fine, tmp_path / "package")
    assert all(one.form == "exact" and one.relative == 0 for one in report.parameters)
    merge(report.package, tmp_path / "again", backbone=base)
    with (
        TensorFile.open(fine / "model.safetensors") as one,
        TensorFile.open(tmp_path / "again" / "model.safetensors") as two,
    ):
        assert set(one) == set(two)
        for key in one:
            assert bytes(one.data(key)) == bytes(two.data(key)), key


def test_only_what_differs_is_listed(backbone: Make, tmp_path: Path) -> None:
    base = backbone("bert")
    fine = tuned(base, "bert", lambda m: m.bert.encoder.layer[1].output.dense.weight.add_(1), torch.float32)
    report = diff(base, fine, tmp_path / "p")
    (module,) = report.package.manifest.modules
    assert module.paths == ("bert.encoder.layer.1.output.dense",)
    assert [one.name for one in report.parameters] == ["bert.encoder.layer.1.output.dense.weight"]
    assert report.untouched > 30


def low(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(4)
    for layer in model.model.layers:
        weight = layer.mlp.down_proj.weight
        rows = torch.randn(weight.shape[0], 3, generator=generator)
        weight.add_(rows @ torch.randn(3, weight.shape[1], generator=generator) * 0.1)
    model.model.norm.weight.mul_(1.5)


def test_low_rank_by_energy_finds_the_rank(backbone: Make, tmp_path: Path) -> None:
    base = backbone("llama")
    fine = tuned(base, "llama", low, torch.float32)
    report = diff(base, fine, tmp_path / "p", form="lowrank", energy=0.9999)
    forms = {one.name: one for one in report.parameters}
    assert forms["model.layers.0.mlp.down_proj.weight"].rank == 3
    assert forms["model.layers.0.mlp.down_proj.weight"].relative < 1e-2
    assert forms["model.norm.weight"].form == "exact"
    assert {m.kind for m in report.package.manifest.modules} == {"lora", "assign"}
    with torch.no_grad():
        ids = torch.arange(1, 9)[None]
        one = deltahub.load(report.package.path, backbone=base)(ids)[0]
        two = tiny.load_model("llama", fine)(ids)[0]
    assert float((one - two).abs().max()) < 1e-3


def test_low_rank_at_full_rank_is_the_fine_tune(backbone: Make, tmp_path: Path) -> None:
    base = backbone("bert")
    fine = tuned(base, "bert", lambda m: everything(m.bert.encoder), torch.float32)
    report = diff(base, fine, tmp_path / "p", form="lowrank", rank=64)
    assert max(one.relative for one in report.parameters) < 1e-4
    merge(report.package, tmp_path / "again", backbone=base)
    one, two = tiny.load_model("bert", fine).state_dict(), tiny.load_model("bert", tmp_path / "again").state_dict()
    assert max(float((one[key] - two[key]).abs().max()) for key in one) < 1e-5


def test_dense_differences(backbone: Make, tmp_path: Path) -> None:
    base = backbone("llama")
    fine = tuned(base, "llama", low, torch.float32)
    report = diff(base, fine, tmp_path / "p", form="dense")
    assert {m.kind for m in report.package.manifest.modules} == {"diff"}
    assert max(one.largest for one in report.parameters) < 1e-6


def test_a_head_that_the_backbone_lacks(backbone: Make, tmp_path: Path) -> None:
    base = backbone("bert-base")
    import transformers

    model = transformers.BertForSequenceClassification.from_pretrained(base, num_labels=3)
    model.save_pretrained(tmp_path / "fine")
    report = diff(base, tmp_path / "fine", tmp_path / "p")
    assert [m.paths for m in report.package.manifest.modules] == [("classifier",)]
    loaded = deltahub.load(report.package.path, backbone=base)
    assert torch.equal(loaded.classifier.weight + 0, model.classifier.weight) or loaded is not None
    ids = torch.arange(1, 7)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids)[0], model.eval()(ids)[0])


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"form": "best"}, "E_DIFF_FORM"),
        ({"form": "lowrank"}, "E_DIFF_FORM"),
        ({"form": "lowrank", "rank": 2, "energy": 0.5}, "E_DIFF_FORM"),
        ({"form": "lowrank", "rank": 0}, "E_DIFF_FORM"),
        ({"form": "lowrank", "energy": 1.5}, "E_DIFF_FORM"),
        ({"form": "exact", "rank": 3}, "E_DIFF_FORM"),
        ({}, "E_DIFF_EQUAL"),
    ],
)
def test_diffs_that_make_no_sense(options: dict[str, Any], code: str, backbone: Make, tmp_path: Path) -> None:
    base = backbone("llama")
    with pytest.raises(DeltaHubError) as caught:
        diff(base, base, tmp_path / "p", **options)
    assert caught.value.code == code
    assert not (tmp_path / "p").exists()


def test_a_resized_vocabulary_is_refused(backbone: Make, tmp_path: Path) -> None:
    base = backbone("llama")
    model = tiny.load_model("llama", base)
    model.resize_token_embeddings(70)
    model.save_pretrained(tmp_path / "fine")
    with pytest.raises(DeltaHubError) as caught:
        diff(base, tmp_path / "fine", tmp_path / "p")
    assert caught.value.code == "E_DIFF_SHAPE"


def test_bare_parameters_are_named(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64, image_size=16, patch_size=8
    )
    model = transformers.ViTModel(config)
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        model.embeddings.cls_token.add_(1)
    model.save_pretrained(tmp_path / "fine")
    with pytest.raises(DeltaHubError) as caught:
        diff(tmp_path / "base", tmp_path / "fine", tmp_path / "p")
    assert caught.value.code == "E_DIFF_PARAMETER"
    assert "cls_token" in str(caught.value.found)


# --- the code


def bf16(values: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.uint16]]:
    bits = torch.from_numpy(values.astype(np.float32)).bfloat16().view(torch.int16).numpy()
    return bits.view(np.uint16)


@pytest.mark.parametrize("mantissa", [7, 10])
def test_the_code_is_exact_on_every_bit_pattern(mantissa: int) -> None:
    random = np.random.default_rng(0)
    every = np.arange(65536, dtype=np.uint16)
    pairs = [(every, every[::-1].copy()), (every, np.roll(every, 12345)), (np.zeros_like(every), every)]
    pairs += [(random.integers(0, 65536, 5000).astype(np.uint16), random.integers(0, 65536, 5000).astype(np.uint16))]
    for old, new in pairs:
        assert np.array_equal(egd.decode(old, *egd.encode(old, new, mantissa), mantissa), new)


@pytest.mark.parametrize(("rho", "limit"), [(1e-3, 1.4), (1e-2, 4.4)])
def test_bits_a_weight_on_gaussian_pairs(rho: float, limit: float) -> None:
    """Below what is promised, below exclusive-or with zstd, and not far above what no such code can beat."""
    import zstandard

    random = np.random.default_rng(1)
    start = random.standard_normal(1 << 20) * 0.02
    old = bf16(start)
    wide = torch.from_numpy(old.view(np.int16)).view(torch.bfloat16).float().numpy()
    new = bf16(wide + random.standard_normal(1 << 20) * 0.02 * rho)
    bits = sum(map(len, egd.encode(old, new, 7))) * 8 / old.size
    planes = np.ascontiguousarray(old ^ new).view(np.uint8).reshape(-1, 2)
    xor = sum(len(zstandard.ZstdCompressor(level=3).compress(planes[:, i].tobytes())) for i in (0, 1)) * 8 / old.size
    bound = egd.entropy(old, new, 7)
    assert bits <= limit
    assert bound <= bits < xor
    assert bits - bound < 0.55


def test_a_damaged_stream_is_an_error() -> None:
    old = np.arange(1000, dtype=np.uint16)
    low, high = egd.encode(old, old + 1, 7)
    for pair in ((low[:-3], high), (b"", high), (low, egd.encode(old[:900], old[:900], 7)[1])):
        with pytest.raises(DeltaHubError) as caught:
            egd.decode(old, *pair, 7)
        assert caught.value.code == "E_PACK_STREAM"


def test_byte_planes() -> None:
    data = np.arange(4000, dtype=np.uint32).view(np.uint8)
    assert np.array_equal(egd.decode_planes(egd.encode_planes(data, 4), data.size), data)


# --- packed packages


def light(model: torch.nn.Module) -> None:
    """A light fine-tune of half-precision weights: most of them stay, some move a step."""
    generator = torch.Generator().manual_seed(4)
    for parameter in model.model.layers.parameters():
        noise = torch.randn(parameter.shape, generator=generator) * 1e-3 * 0.2
        parameter.copy_((parameter.float() + noise).to(parameter.dtype))


@pytest.fixture
def exact(backbone: Make, tmp_path: Path) -> tuple[Path, Path]:
    base = backbone("llama", dtype=torch.bfloat16)
    fine = tuned(base, "llama", light, torch.bfloat16)
    diff(base, fine, tmp_path / "package")
    return base, tmp_path / "package"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_packed_is_small_and_unpacks_to_the_same_bytes(exact: tuple[Path, Path], tmp_path: Path) -> None:
    base, package = exact
    (package / "README.md").write_text("# here", encoding="utf-8")
    report = pack(package, tmp_path / "packed", backbone=base, bound=True)
    assert packed(tmp_path / "packed")
    assert (tmp_path / "packed" / "delta.json").read_bytes() == (package / "delta.json").read_bytes()
    assert report.after < report.before / 3
    assert report.bound is not None
    assert 0 < report.bound <= report.bits < 4
    unpack(tmp_path / "packed", tmp_path / "again", backbone=base)
    assert contents(tmp_path / "again") == contents(package)


def test_packing_twice_gives_the_same_bytes(exact: tuple[Path, Path], tmp_path: Path) -> None:
    base, package = exact
    pack(package, tmp_path / "one", backbone=base)
    pack(package, tmp_path / "two", backbone=base)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_what_has_no_counterpart_is_packed_too(backbone: Make, tmp_path: Path) -> None:
    from deltahub.attaching import attach

    base = backbone("gpt2")
    model = tiny.load_model("gpt2", base)
    deltas = [attach(model, "lora", ["c_attn"], name="l", rank=3), attach(model, "assign", ["wpe"], name="a")]
    for delta in deltas:
        tiny.randomise(delta)
    package = tiny.package_of(tmp_path / "p", model, deltas, base)
    pack(package, tmp_path / "packed", backbone=base)
    unpack(tmp_path / "packed", tmp_path / "again", backbone=base)
    assert contents(tmp_path / "again") == contents(tmp_path / "p")


def test_another_backbone_does_not_unpack(exact: tuple[Path, Path], backbone: Make, tmp_path: Path) -> None:
    base, package = exact
    pack(package, tmp_path / "packed", backbone=base)
    with pytest.raises(DeltaHubError) as caught:
        unpack(tmp_path / "packed", tmp_path / "again", backbone=backbone("llama", dtype=torch.bfloat16, seed=8))
    assert caught.value.code == "E_PACK_BACKBONE"
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("change", ["version", "name", "part", "codec", "metadata"])
def test_a_packed_file_that_lies(change: str, exact: tuple[Path, Path], tmp_path: Path) -> None:
    base, package = exact
    pack(package, tmp_path / "packed", backbone=base)
    path = tmp_path / "packed" / PACKED
    with TensorFile.open(path) as file:
        streams = {name: file.numpy(name).copy() for name in file}
        note = json.loads(file.metadata["packed"])
    if change == "version":
        note["version"] = 2
    elif change == "name":
        note["streams"][0]["parts"][0][0] = "assign/nowhere/weight"
    elif change == "part":
        note["streams"][0]["parts"][0][2] = 1 << 40
    elif change == "codec":
        note["streams"][0]["dtype"] = "F32"
    metadata = {"other": "x"} if change == "metadata" else {"packed": json.dumps(note)}
    write(path, streams, metadata=metadata)
    with pytest.raises(DeltaHubError) as caught:
        unpack(tmp_path / "packed", tmp_path / "again", backbone=base)
    assert caught.value.code.startswith("E_PACK")
    assert not (tmp_path / "again").exists()
