"""What servers take: their limits, exact expansions, approximations, and one scale through every format and back."""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

import deltahub
from deltahub.converters import export_, import_
from deltahub.converters.serving import engines
from deltahub.errors import ConverterError, DeltaHubError
from deltahub.package import Package
from tests.converters import tiny

peft = pytest.importorskip("peft")
IDS = torch.arange(1, 13).view(2, 6)


def run(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS)[0]
    return found


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("backbone") / "llama"
    tiny.make_model("llama").save_pretrained(folder)
    return folder


def packaged(base: Path, folder: Path, *deltas: tuple[str, dict[str, Any]]) -> tuple[Package, Tensor]:
    model = tiny.load_model("llama", base)
    made = []
    for i, (kind, options) in enumerate(deltas):
        delta = deltahub.attach(model, kind, name=f"d{i}", **options)
        tiny.randomise(delta, i + 1)
        made.append(delta)
    expected = run(model)
    return tiny.package_of(folder, model, made, base), expected


def read_by_peft(base: Path, folder: Path) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return run(peft.PeftModel.from_pretrained(tiny.load_model("llama", base), folder).eval())


MIXED = (
    ("lora", {"targets": ["q_proj"], "rank": 3, "scale": 2.5}),
    ("lora", {"targets": ["up_proj"], "rank": 5, "scale": 0.3}),
)


@pytest.mark.parametrize("name", engines())
def test_each_engine_gets_what_it_takes(name: str, base: Path, tmp_path: Path) -> None:
    package, expected = packaged(base, tmp_path / "p", *MIXED)
    folder = export_(package, tmp_path / "out", to="peft", target=name)
    limits = engines()[name]
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    ranks = {
        value.shape[0] for key, value in load_file(folder / "adapter_model.safetensors").items() if "lora_A" in key
    }
    assert config["lora_alpha"] == config["r"]
    assert config["alpha_pattern"] == config["rank_pattern"]
    if limits["uniform"]:
        assert ranks == {max(5, limits["least"])}
        assert config["rank_pattern"] == {}
    else:
        assert ranks == {3, 5}
    assert (read_by_peft(base, folder) - expected).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("name", "deltas", "reason"),
    [
        ("vllm", [("lora", {"targets": ["q_proj"], "rank": 2}), ("dora", {"targets": ["k_proj"], "rank": 2})], "dora"),
        ("vllm", [("lora", {"targets": ["q_proj"], "rank": 2, "biased": True})], "bias of its own"),
        ("vllm", [("bias", {"targets": ["q_proj"]})], "no low-rank update"),
        ("tgi", [("lora", {"targets": ["lm_head"], "rank": 2})], "knows no lm_head"),
        ("lorax", [("lora", {"targets": ["model.embed_tokens"], "rank": 2})], "knows no embed_tokens"),
        ("lorax", [("lora", {"targets": ["q_proj"], "rank": 200})], "128 is the largest"),
        ("trtllm", [("ia3", {"targets": ["q_proj"]})], "no low-rank update"),
    ],
)
def test_the_rest_is_refused_with_the_reason(name: str, deltas: Any, reason: str, base: Path, tmp_path: Path) -> None:
    package, _ = packaged(base, tmp_path / "p", *deltas)
    with pytest.raises(ConverterError) as caught:
        export_(package, tmp_path / "out", to="peft", target=name)
    assert caught.value.code == "E_CONVERT_EXPORT"
    assert reason in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_an_engine_that_is_not_known(base: Path, tmp_path: Path) -> None:
    package, _ = packaged(base, tmp_path / "p", *MIXED)
    with pytest.raises(DeltaHubError) as caught:
        export_(package, tmp_path / "out", to="peft", target="abacus")
    assert caught.value.code == "E_USAGE_ENGINE"


@pytest.mark.parametrize(
    ("kind", "options", "rank"),
    [
        ("adalora", {"rank": 3, "scale": 1.5}, 3),
        ("loha", {"rank": 2, "scale": 1.5}, 4),
        ("lokr", {"rank": 2, "rows": 4, "columns": 2, "scale": 0.7}, 4),
        ("lokr", {"rank": 2, "rows": 4, "columns": 2, "first": "low-rank"}, 4),
        ("lokr", {"rows": 8, "columns": 2, "second": "whole"}, 8),
    ],
)
def test_products_become_pairs_without_loss(kind: str, options: Any, rank: int, base: Path, tmp_path: Path) -> None:
    package, expected = packaged(base, tmp_path / "p", (kind, {"targets": ["q_proj"], **options}))
    folder = export_(package, tmp_path / "out", to="peft", target="vllm")
    assert json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["r"] == rank
    assert (read_by_peft(base, folder) - expected).abs().max() <= 1e-5


def test_an_approximation_says_what_is_lost(base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    package, expected = packaged(base, tmp_path / "p", ("dora", {"targets": ["q_proj"], "rank": 2}))
    bare = run(tiny.load_model("llama", base))
    with caplog.at_level(logging.INFO, "deltahub"):
        rough = export_(package, tmp_path / "rough", to="peft", target="vllm", approximate=4, backbone=base)
    assert "of its size is lost" in caplog.text
    assert "--max-lora-rank 8" in caplog.text
    fine = export_(package, tmp_path / "fine", to="peft", target="vllm", approximate=32, backbone=base)
    lost = (read_by_peft(base, rough) - expected).abs().max()
    assert (read_by_peft(base, fine) - expected).abs().max() <= 1e-5 < lost < (bare - expected).abs().max()
    with pytest.raises(ConverterError) as caught:
        export_(package, tmp_path / "no", to="peft", target="vllm", approximate=4)
    assert caught.value.code == "E_CONVERT_BACKBONE"


def changes(base: Path, package: Package) -> dict[str, Tensor]:
    """What a package adds to each weight, in float64."""
    found: dict[str, Tensor] = {}
    for module in package.manifest.modules:
        config = package.config(module.name)
        for path, tensors in package.tensors(module.name).items():
            change = tensors["up"].double() @ tensors["down"].double() * float(config["scale"])
            found[path] = found.get(path, 0) + change
    return found


FORMATS = ("peft", "peft baked", "vllm", "lorax", "mlx", "gguf", "kohya", "diffusers")


@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_one_scale_through_every_format(data: st.DataObject, base: Path, tmp_path_factory: Any) -> None:
    """Random alphas, ranks, square roots and patterns: what comes back adds the same to every weight."""
    pytest.importorskip("gguf")
    place = tmp_path_factory.mktemp("case")
    numbers = st.one_of(st.integers(1, 64), st.floats(0.125, 100.0, allow_subnormal=False))
    config = {
        "r": data.draw(st.integers(1, 9)),
        "lora_alpha": data.draw(numbers),
        "use_rslora": data.draw(st.booleans()),
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "rank_pattern": data.draw(
            st.dictionaries(st.sampled_from(["q_proj", "layers.1.mlp.down_proj"]), st.integers(1, 9))
        ),
        "alpha_pattern": data.draw(st.dictionaries(st.sampled_from(["v_proj", "layers.0.self_attn.q_proj"]), numbers)),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(tiny.load_model("llama", base), peft.LoraConfig(**config))
    torch.manual_seed(5)
    expected = {}
    for name, module in model.base_model.model.named_modules():
        if hasattr(module, "lora_A"):
            with torch.no_grad():
                a, b = module.lora_A["default"].weight.normal_(), module.lora_B["default"].weight.normal_()
            expected[name] = b.double() @ a.double() * module.scaling["default"]
    model.save_pretrained(place / "peft")
    package = import_(place / "peft", place / "package", backbone=base)
    chosen = data.draw(st.sampled_from(FORMATS))
    targets = FORMATS if chosen == "peft" else (chosen, FORMATS[0])
    for target in dict.fromkeys(targets):
        for path, change in changes(base, through(target, package, base, place)).items():
            error = (change - expected[path]).abs().max() / expected[path].abs().max()
            assert error <= 4e-7, (target, path)


def through(target: str, package: Package, base: Path, place: Path) -> Package:
    """Out into a format and back."""
    out = place / f"{target} out"
    if target in {"kohya", "diffusers"}:
        model = tiny.load_model("llama", base)
        file = export_(package, out.with_suffix(".safetensors"), to=target, backbone=model)
        return import_(file, place / f"{target} back", from_=target, backbone=model)
    if target == "gguf":
        export_(package, out, to="gguf", backbone=base)
        return import_(out, place / "gguf back", from_="gguf", backbone=base)
    options: dict[str, Any] = {"bake": True} if target == "peft baked" else {}
    options |= {"target": target} if target in engines() else {}
    export_(package, out, to="mlx" if target == "mlx" else "peft", **options)
    return import_(out, place / f"{target} back", backbone=base)


@pytest.mark.parametrize("target", ["peft", "mlx", "gguf", "kohya", "diffusers", "import"])
def test_no_space_leaves_nothing_behind(
    target: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno
    import os

    package, _ = packaged(base, tmp_path / "p", *MIXED)
    export_(package, tmp_path / "adapter", to="peft")
    model = tiny.load_model("llama", base)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if target == "gguf":
        gguf = pytest.importorskip("gguf")
        monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", full)
    monkeypatch.setattr(os, "fsync", full)
    before = sorted(tmp_path.rglob("*"))
    out = tmp_path / ("out.safetensors" if target == "kohya" else "out")
    needs = {"gguf": base, "kohya": model, "diffusers": model, "import": base}
    options: dict[str, Any] = {"backbone": needs[target]} if target in needs else {}
    with pytest.raises(DeltaHubError) as caught:  # noqa: PT012
        if target == "import":
            import_(tmp_path / "adapter", out, **options)
        else:
            export_(package, out, to=target, **options)
    assert "No space left" in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before
