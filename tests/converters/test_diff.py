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
from deltahub.testing import LoopbackHub
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
        ({"form": "exact", "density": 0.1}, "E_DIFF_FORM"),
        ({"form": "auto"}, "E_DIFF_FORM"),
        ({"form": "auto", "bits": 2.0, "error": 0.1}, "E_DIFF_FORM"),
        ({"form": "auto", "bits": -1.0}, "E_DIFF_FORM"),
        ({}, "E_DIFF_EQUAL"),
    ],
)
def test_diffs_that_make_no_sense(options: dict[str, Any], code: str, backbone: Make, tmp_path: Path) -> None:
    base = backbone("llama")
    with pytest.raises(DeltaHubError) as caught:
        diff(base, base, tmp_path / "p", **options)
    assert caught.value.code == code
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize(("name", "size"), [("llama", 70), ("gpt2", 50)])
def test_a_resized_vocabulary(name: str, size: int, backbone: Make, tmp_path: Path) -> None:
    """Grown or shrunk, tied to the head or not: its size is a setting, and the package holds all of it."""
    base = backbone(name)
    model = tiny.load_model(name, base)
    model.resize_token_embeddings(size, mean_resizing=False)
    model.save_pretrained(tmp_path / "fine")
    report = diff(base, tmp_path / "fine", tmp_path / "p")
    assert [setting.path for setting in report.package.manifest.settings or ()] == ["vocab_size"]
    ids = torch.tensor([[1, 5, size - 1]])
    loaded = deltahub.load(tmp_path / "p", backbone=base)
    again = tiny.load_model(name, tmp_path / "fine")
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, again(ids).logits)


def test_a_tied_embedding_reaches_its_head(backbone: Make, tmp_path: Path) -> None:
    base = backbone("gpt2")
    fine = tuned(base, "gpt2", lambda m: m.transformer.wte.weight.mul_(1.5), torch.float32)
    report = diff(base, fine, tmp_path / "p")
    assert {one.name for one in report.parameters} == {"transformer.wte.weight", "lm_head.weight"}
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        loaded = deltahub.load(tmp_path / "p", backbone=base)(ids).logits
        assert torch.equal(loaded, tiny.load_model("gpt2", fine)(ids).logits)


def test_a_few_rows_and_a_bias_take_no_more_than_they_are(backbone: Make, tmp_path: Path) -> None:
    def change(model: torch.nn.Module) -> None:
        model.bert.embeddings.word_embeddings.weight[[3, 40]] += 0.5
        model.bert.encoder.layer[0].output.dense.bias += 0.25

    base = backbone("bert", dtype=torch.bfloat16)
    fine = tuned(base, "bert", change, torch.bfloat16)
    report = diff(base, fine, tmp_path / "p")
    assert {m.kind: m.paths for m in report.package.manifest.modules} == {
        "tokens": ("bert.embeddings.word_embeddings",),
        "bias": ("bert.encoder.layer.0.output.dense",),
    }
    assert all(one.relative == 0 for one in report.parameters)
    merge(report.package, tmp_path / "again", backbone=base)
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (fine / "model.safetensors").read_bytes()


def noisy(model: torch.nn.Module) -> None:
    """Changes of a few large directions and a little everywhere, in weights large enough to be worth a lossy form."""
    generator = torch.Generator().manual_seed(4)
    for layer in model.model.layers:
        for part in (layer.mlp.gate_proj, layer.mlp.up_proj):
            weight = part.weight
            left, right = torch.randn(len(weight), 2, generator=generator), torch.randn(2, 128, generator=generator)
            weight.add_(left @ right * 0.05 + torch.randn(weight.shape, generator=generator) * 0.01)
        layer.input_layernorm.weight.mul_(1.5)


@pytest.fixture
def wide(tmp_path: Path) -> tuple[Path, Path]:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=128, num_hidden_layers=1, num_attention_heads=4, intermediate_size=96, pad_token_id=0
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "wide")
    return tmp_path / "wide", tuned(tmp_path / "wide", "llama", noisy, torch.float32)


@pytest.mark.parametrize(
    ("form", "options", "bits", "relative"),
    [
        ("lowrank", {"rank": 2}, 1.2, 0.15),
        ("sparse", {"density": 0.1}, 6.41, 0.9),
        ("dare", {"density": 0.1}, 8.0, 4.0),
        ("sign", {}, 1.3, 0.8),
        ("int8", {}, 8.3, 0.02),
    ],
)
def test_lossy_forms(
    form: str, options: dict[str, Any], bits: float, relative: float, wide: tuple[Path, Path], tmp_path: Path
) -> None:
    """What the report says is what a merge gives; norms stay exact."""
    base, fine = wide
    report = diff(base, fine, tmp_path / "p", form=form, **options)
    forms = {one.name: one for one in report.parameters}
    assert forms["model.layers.0.input_layernorm.weight"].form == "exact"
    merge(report.package, tmp_path / "again", backbone=base)
    states = [tiny.load_model("llama", folder).state_dict() for folder in (base, fine, tmp_path / "again")]
    for name in ("gate_proj", "up_proj"):
        key = f"model.layers.0.mlp.{name}.weight"
        old, new, made = (state[key].double() for state in states)
        lost = float((made - new).norm() / (new - old).norm())
        assert forms[key].relative == pytest.approx(lost, abs=1e-4)
        assert 0 < lost < relative
        assert forms[key].bits < bits
        assert forms[key].form == ("sparse" if form == "dare" else form)


def test_signs_have_the_best_factors(wide: tuple[Path, Path], tmp_path: Path) -> None:
    base, fine = wide
    report = diff(base, fine, tmp_path / "p", form="sign")
    (module,) = (m for m in report.package.manifest.modules if m.kind == "diff-sign")
    states = [tiny.load_model("llama", folder).state_dict() for folder in (base, fine)]
    for path in module.paths:
        change = states[1][f"{path}.weight"] - states[0][f"{path}.weight"]
        signs = torch.where(change >= 0, 1.0, -1.0)
        fitted = torch.linalg.lstsq(signs[0][:, None], change[0][:, None]).solution
        assert float(report.package.tensor(f"{module.name}/{path}/gain")[0]) == pytest.approx(float(fitted), rel=1e-4)


def test_auto_keeps_to_its_budget(wide: tuple[Path, Path], tmp_path: Path) -> None:
    base, fine = wide
    found = {}
    for bits in (1.2, 4.0, 33.0):
        report = diff(base, fine, tmp_path / f"p{bits}", form="auto", bits=bits)
        weights = [one for one in report.parameters if one.name.endswith("_proj.weight")]
        assert sum(one.bits * one.numbers for one in weights) <= bits * sum(one.numbers for one in weights)
        found[bits] = max(one.relative for one in weights)
    assert found[1.2] > found[4.0] > found[33.0] == 0
    for error in (0.5, 0.02, 1e-9):
        report = diff(base, fine, tmp_path / f"e{error}", form="auto", error=error)
        assert max(one.relative for one in report.parameters) <= error * 1.01


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


def test_a_packed_package_is_loaded_as_it_is(exact: tuple[Path, Path], hub: LoopbackHub, tmp_path: Path) -> None:
    base, package = exact
    pack(package, tmp_path / "packed", backbone=base)
    ids = torch.arange(1, 9)[None]
    hub.create("acme/packed", {file.name: file.read_bytes() for file in (tmp_path / "packed").iterdir()})
    options: dict[str, Any] = {"endpoint": hub.url, "token": hub.token, "cache_dir": tmp_path / "cache"}
    models = [
        deltahub.load(package, backbone=base),
        deltahub.load(tmp_path / "packed", backbone=base),
        deltahub.load(tmp_path / "packed", backbone=tiny.load_model("llama", base, dtype=torch.bfloat16)),
        deltahub.load("acme/packed", backbone=base, **options),
    ]
    with torch.no_grad():
        wanted, *others = (model(ids).logits for model in models)
    assert all(torch.equal(wanted, one) for one in others)
    (tmp_path / "packed" / PACKED).unlink()
    with pytest.raises(DeltaHubError):
        deltahub.load(tmp_path / "packed", backbone=base)


def test_what_stayed_in_place_is_coded_by_its_place(backbone: Make, tmp_path: Path) -> None:
    """Half of the rows untouched, the others quite different: an exclusive or is the smaller code, and is taken."""
    base = backbone("llama", dtype=torch.bfloat16)

    def change(model: torch.nn.Module) -> None:
        for layer in model.model.layers:
            layer.mlp.gate_proj.weight[::2] = torch.randn(32, 32, generator=torch.Generator().manual_seed(1)).bfloat16()

    fine = tuned(base, "llama", change, torch.bfloat16)
    diff(base, fine, tmp_path / "p")
    pack(tmp_path / "p", tmp_path / "packed", backbone=base)
    with TensorFile.open(tmp_path / "packed" / PACKED) as file:
        assert {stream["codec"] for stream in json.loads(file.metadata["packed"])["streams"]} == {"xor"}
    unpack(tmp_path / "packed", tmp_path / "again", backbone=base)
    assert contents(tmp_path / "again") == contents(tmp_path / "p")


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
