"""PEFT adapters written by PEFT itself: read, run, written, and read by PEFT again."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import deltahub
from deltahub.converters import convert, export_, formats, import_, sniff
from deltahub.converters.peft_config import Scales, literal
from deltahub.errors import ConverterError, DeltaHubError
from deltahub.package import Package
from deltahub.tensors import TensorFile, write
from tests.converters import tiny

peft = pytest.importorskip("peft")
Make = Callable[..., Path]
IDS = torch.arange(1, 13).view(2, 6)

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("bert", {"target_modules": ["query", "value"], "r": 4, "lora_alpha": 6}),
    "bert head": ("bert", {"target_modules": ["query"], "r": 3, "task_type": "SEQ_CLS"}),
    "bert bias": ("bert", {"target_modules": ["query"], "r": 3, "bias": "lora_only"}),
    "bert all biases": ("bert", {"target_modules": ["query"], "r": 3, "bias": "all"}),
    "bert embedding": ("bert", {"target_modules": ["word_embeddings", "dense"], "r": 4}),
    "bert saved": ("bert", {"target_modules": ["query"], "modules_to_save": ["pooler.dense", "LayerNorm"], "r": 2}),
    "llama": ("llama", {"target_modules": ["q_proj", "down_proj"], "r": 4, "lora_alpha": 3, "task_type": "CAUSAL_LM"}),
    "llama rslora": ("llama", {"target_modules": ["q_proj"], "r": 8, "lora_alpha": 5, "use_rslora": True}),
    "llama all": ("llama", {"target_modules": "all-linear", "r": 2}),
    "llama regex": ("llama", {"target_modules": r".*\.(q|k)_proj", "r": 2}),
    "llama lora bias": ("llama", {"target_modules": ["q_proj"], "r": 2, "lora_bias": True}),
    "llama patterns": (
        "llama",
        {
            "target_modules": ["q_proj", "v_proj"],
            "r": 4,
            "lora_alpha": 7,
            "rank_pattern": {"layers.1.self_attn.q_proj": 2, "v_proj": 3},
            "alpha_pattern": {"v_proj": 11, r"^model\.layers\.0\.self_attn\.q_proj": 1},
        },
    ),
    "llama some layers": ("llama", {"target_modules": ["q_proj"], "r": 2, "layers_to_transform": [1]}),
    "gpt2": ("gpt2", {"target_modules": ["c_attn", "mlp.c_proj"], "r": 4, "fan_in_fan_out": True}),
}


def run(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(input_ids=IDS)[0]
    return out


def trained(name: str, base: Path, config: dict[str, Any], seed: int = 3, **kinds: Any) -> Any:
    """A real PEFT model with random values in everything that PEFT would have trained."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(tiny.load_model(name, base), peft.LoraConfig(**config))
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            with torch.no_grad():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def saved(model: Any, folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(backbone: Make, tmp_path: Path) -> Callable[..., tuple[Path, Path, torch.Tensor]]:
    def make(case: str, **changes: Any) -> tuple[Path, Path, torch.Tensor]:
        name, config = CASES[case]
        base = backbone(name)
        model = trained(name, base, {**config, **changes})
        return base, saved(model, tmp_path / "adapter"), run(model)

    return make


@pytest.mark.parametrize("case", CASES)
def test_there_and_back(case: str, adapter: Callable[..., Any], tmp_path: Path) -> None:
    base, folder, expected = adapter(case)
    name = CASES[case][0]
    assert sniff(folder) == "peft"
    package = import_(folder, tmp_path / "package", backbone=base)
    model = deltahub.load(package.path, backbone=base)
    assert float((run(model) - expected).abs().max()) <= 1e-6
    assert float((run(tiny.load_model(name, base)) - expected).abs().max()) > 1e-4  # it has an effect
    written = export_(package, tmp_path / "written", to="peft", backbone=base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = peft.PeftModel.from_pretrained(tiny.load_model(name, base), written).eval()
    assert float((run(again) - expected).abs().max()) <= 1e-6
    pairs(folder, written)


def pairs(one: Path, other: Path) -> None:
    """The low-rank tensors are bit for bit those of the original."""
    with (
        TensorFile.open(one / "adapter_model.safetensors") as a,
        TensorFile.open(other / "adapter_model.safetensors") as b,
    ):
        for key in a:
            if "lora_" in key:
                assert bytes(a.data(key)) == bytes(b.data(key)), key
        assert set(b) <= set(a)


@pytest.mark.parametrize("case", ["bert", "llama patterns", "gpt2", "llama rslora"])
def test_baked_scales_give_the_same_function(case: str, adapter: Callable[..., Any], tmp_path: Path) -> None:
    base, folder, expected = adapter(case)
    import_(folder, tmp_path / "package", backbone=base)
    written = export_(tmp_path / "package", tmp_path / "written", to="peft", backbone=base, bake=True)
    config = json.loads((written / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["lora_alpha"] == config["r"]
    assert config["alpha_pattern"] == config["rank_pattern"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = peft.PeftModel.from_pretrained(tiny.load_model(CASES[case][0], base), written).eval()
    assert float((run(again) - expected).abs().max()) <= 2e-6


def test_a_convolution_there_and_back(tmp_path: Path) -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 8, 3, padding=1)
            self.norm = torch.nn.BatchNorm2d(8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.norm(self.conv(x))
            return result

    torch.manual_seed(0)
    base = Net().eval()
    x = torch.randn(2, 3, 9, 9)
    import copy

    tuned = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2, target_modules=["conv"]))
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    with torch.no_grad():
        expected = tuned.eval()(x)
    folder = saved(tuned, tmp_path / "adapter")
    package = import_(folder, tmp_path / "package", backbone=base)
    loaded = deltahub.load(package.path, backbone=copy.deepcopy(base))
    with torch.no_grad():
        assert float((loaded(x) - expected).abs().max()) <= 1e-6
    written = export_(package, tmp_path / "written", to="peft", backbone=base)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), written).eval()
    with torch.no_grad():
        assert float((again(x) - expected).abs().max()) <= 1e-6


def test_a_head_of_another_size_becomes_a_setting(backbone: Make, tmp_path: Path) -> None:
    base = backbone("bert-base")
    import transformers

    start = transformers.BertForSequenceClassification.from_pretrained(base, num_labels=5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(start, peft.LoraConfig(target_modules=["query"], r=2, task_type="SEQ_CLS")).eval()
    expected = run(model)
    package = import_(saved(model, tmp_path / "a"), tmp_path / "p", backbone=base)
    (setting,) = package.manifest.settings or ()
    assert (setting.path, setting.was, setting.value) == ("num_labels", 3, 5)
    assert float((run(deltahub.load(package.path, backbone=base)) - expected).abs().max()) <= 1e-6


# --- what PEFT lets through


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config.update(changes)
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}), encoding="utf-8")


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    path = folder / "adapter_model.safetensors"
    with TensorFile.open(path) as file:
        tensors = {name: file.torch(name).clone() for name in file}
    write(path, change(tensors), metadata={"format": "pt"})


def refused(code: str, folder: Path, out: Path, **options: Any) -> DeltaHubError:
    with pytest.raises(DeltaHubError) as caught:
        import_(folder, out, **options)
    assert caught.value.code == code, caught.value
    assert not out.exists()
    return caught.value


def test_fault_1_another_backbone_is_refused_when_it_is_loaded(
    adapter: Callable[..., Any], backbone: Make, tmp_path: Path
) -> None:
    base, folder, _ = adapter("llama")
    package = import_(folder, tmp_path / "p", backbone=base)
    with pytest.raises(DeltaHubError) as caught:
        deltahub.load(package.path, backbone=backbone("llama", seed=9))
    assert caught.value.code == "E_BACKBONE_MISMATCH"


def test_fault_2_more_layers_than_the_backbone(adapter: Callable[..., Any], tmp_path: Path) -> None:
    base, folder, _ = adapter("llama")
    rewrite(folder, lambda t: t | {k.replace("layers.1", "layers.7"): v for k, v in t.items() if "layers.1" in k})
    assert "layers.7" in str(refused("E_MERGE_TARGET", folder, tmp_path / "p", backbone=base).where)


def test_fault_3_a_wrong_prefix(adapter: Callable[..., Any], tmp_path: Path) -> None:
    base, folder, _ = adapter("llama")
    rewrite(folder, lambda t: {k.replace("base_model.model.", "wrong."): v for k, v in t.items()})
    refused("E_MERGE_TARGET", folder, tmp_path / "p", backbone=base)


def test_fault_4_fewer_layers_than_the_backbone(adapter: Callable[..., Any], tmp_path: Path) -> None:
    base, folder, _ = adapter("llama")
    rewrite(folder, lambda t: {k: v for k, v in t.items() if "layers.1" not in k})
    error = refused("E_CONVERT_INCOMPLETE", folder, tmp_path / "p", backbone=base)
    assert "layers.1" in str(error.found)


def test_fault_5_nan(adapter: Callable[..., Any], tmp_path: Path) -> None:
    base, folder, _ = adapter("llama")

    def poison(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        next(iter(tensors.values()))[0, 0] = float("nan")
        return tensors

    rewrite(folder, poison)
    refused("E_CONVERT_VALUES", folder, tmp_path / "p", backbone=base)


def test_fault_6_a_wrong_shape_leaves_everything_as_it_was(adapter: Callable[..., Any], tmp_path: Path) -> None:
    base, folder, _ = adapter("llama")
    rewrite(folder, lambda t: {k: v[:, :-1] if "lora_A" in k else v for k, v in t.items()})
    model = tiny.load_model("llama", base)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    refused("E_CONVERT_SITE", folder, tmp_path / "p", backbone=model)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_fault_8_an_adapter_on_a_tied_head_keeps_its_own_weight(backbone: Make, tmp_path: Path) -> None:
    base = backbone("gpt2")
    model = trained("gpt2", base, {"target_modules": ["lm_head"], "r": 2})
    expected = run(model)
    package = import_(saved(model, tmp_path / "a"), tmp_path / "p", backbone=base)
    loaded = deltahub.load(package.path, backbone=base)
    assert float((run(loaded) - expected).abs().max()) <= 1e-5
    with pytest.raises(DeltaHubError) as caught:
        deltahub.converters.merge(package, tmp_path / "merged", backbone=base)
    assert caught.value.code == "E_MERGE_TIED"


def test_fault_11_half_of_the_tensors(adapter: Callable[..., Any], tmp_path: Path) -> None:
    base, folder, _ = adapter("llama")
    rewrite(folder, lambda t: {k: v for k, v in t.items() if "layers.0" not in k or "lora_B" not in k})
    assert "layers.0" in str(refused("E_CONVERT_MISSING", folder, tmp_path / "p", backbone=base).found)


def test_fault_12_a_rank_that_the_tensors_contradict(adapter: Callable[..., Any], tmp_path: Path) -> None:
    base, folder, _ = adapter("llama")
    edit(folder, r=8)
    refused("E_CONVERT_RANK", folder, tmp_path / "p", backbone=base)


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
def test_fault_13_a_regular_expression_is_never_run(key: str, adapter: Callable[..., Any], tmp_path: Path) -> None:
    base, folder, _ = adapter("llama")
    edit(folder, **{key: {"(([a-z_0-9.])+)+!": 4}})
    refused("E_CONVERT_PATTERN", folder, tmp_path / "p", backbone=base)


def test_fault_13_nor_as_a_target(adapter: Callable[..., Any], tmp_path: Path) -> None:
    base, folder, _ = adapter("llama")
    edit(folder, target_modules="(([a-z_0-9.])+)+!")
    assert import_(folder, tmp_path / "p", backbone=base).manifest.modules  # targets come from the keys


def test_fault_14_a_rank_of_a_million(adapter: Callable[..., Any], tmp_path: Path) -> None:
    base, folder, _ = adapter("llama")
    edit(folder, r=1_000_000)
    refused("E_CONVERT_RANK", folder, tmp_path / "p", backbone=base)


@pytest.mark.parametrize("start", ["pissa", "olora", "loftq", "corda", "lora_ga", "pissa_niter_4"])
def test_fault_17_an_initialisation_that_changed_the_backbone(
    start: str, adapter: Callable[..., Any], tmp_path: Path
) -> None:
    base, folder, _ = adapter("llama")
    edit(folder, init_lora_weights=start)
    refused("E_CONVERT_UNSUPPORTED", folder, tmp_path / "p", backbone=base)


@pytest.mark.parametrize(
    "change",
    [
        {"layer_replication": [[0, 2], [1, 2]]},
        {"alora_invocation_tokens": [1, 2]},
        {"target_parameters": ["mlp.experts.gate_up_proj"]},
        {"use_bdlora": {"x": 1}},
        {"use_qalora": True},
    ],
)
def test_flags_that_change_the_arithmetic(change: Any, adapter: Callable[..., Any], tmp_path: Path) -> None:
    base, folder, _ = adapter("llama")
    edit(folder, **change)
    refused("E_CONVERT_UNSUPPORTED", folder, tmp_path / "p", backbone=base)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"use_next_years_idea": True}, "E_CONVERT_CONFIG"),
        ({"lora_alpha": ...}, "E_CONVERT_CONFIG"),
        ({"r": True}, "E_CONVERT_CONFIG"),
        ({"peft_type": "BONE"}, "E_CONVERT_KIND"),
        ({"alpha_pattern": {"no_such": 3}}, "E_CONVERT_PATTERN"),
        ({"target_modules": ["q_proj", "down_proj", "o_proj"]}, "E_CONVERT_INCOMPLETE"),
        ({"target_modules": ["q_proj"]}, "E_CONVERT_INCOMPLETE"),
    ],
)
def test_configurations_that_do_not_fit(
    change: dict[str, Any], code: str, adapter: Callable[..., Any], tmp_path: Path
) -> None:
    base, folder, _ = adapter("llama")
    edit(folder, **change)
    refused(code, folder, tmp_path / "p", backbone=base)


def test_unknown_keys_are_named(adapter: Callable[..., Any], tmp_path: Path) -> None:
    base, folder, _ = adapter("llama")
    rewrite(folder, lambda t: t | {"base_model.model.model.layers.0.mystery": torch.zeros(2)})
    assert "mystery" in str(refused("E_CONVERT_SURPLUS", folder, tmp_path / "p", backbone=base).found)


def test_wrappers_names_are_seen_through(adapter: Callable[..., Any], tmp_path: Path) -> None:
    base, folder, expected = adapter("llama")
    rewrite(
        folder,
        lambda t: {
            k.replace("layers.0.", "layers.0._fsdp_wrapped_module.").replace(
                "model.model.", "model._orig_mod.model."
            ): v
            for k, v in t.items()
        },
    )
    package = import_(folder, tmp_path / "p", backbone=base)
    assert float((run(deltahub.load(package.path, backbone=base)) - expected).abs().max()) <= 1e-6


def test_a_pickle_only_where_it_is_allowed(adapter: Callable[..., Any], tmp_path: Path) -> None:
    base, folder, expected = adapter("llama")
    path = folder / "adapter_model.safetensors"
    with TensorFile.open(path) as file:
        torch.save({name: file.torch(name).clone() for name in file}, folder / "adapter_model.bin")
    path.unlink()
    refused("E_CONVERT_PICKLE", folder, tmp_path / "p", backbone=base)
    package = import_(folder, tmp_path / "p", backbone=base, allow_pickle=True)
    assert float((run(deltahub.load(package.path, backbone=base)) - expected).abs().max()) <= 1e-6


def test_adapters_in_inner_folders_are_named(adapter: Callable[..., Any], tmp_path: Path) -> None:
    base, folder, _ = adapter("llama")
    outer = tmp_path / "outer"
    outer.mkdir()
    folder.rename(outer / "mine")
    assert "mine" in str(refused("E_CONVERT_CONFIG", outer, tmp_path / "p", backbone=base, from_="peft").found)
    refused("E_CONVERT_FORMAT", outer, tmp_path / "p", backbone=base)


def test_scales_of_every_spelling() -> None:
    """Random alphas, ranks and patterns: the factor is PEFT's own."""
    import random

    choose = random.Random(0)
    for _ in range(30):
        r, alpha = choose.randint(1, 9), choose.randint(1, 40)
        patterns = {"a.q": choose.randint(1, 9)} if choose.random() < 0.5 else {}
        alphas = {"q": choose.randint(1, 40)} if choose.random() < 0.5 else {}
        config = {"r": r, "lora_alpha": alpha, "rank_pattern": patterns, "alpha_pattern": alphas}
        config["use_rslora"] = choose.random() < 0.5
        model = torch.nn.Sequential()
        model.add_module("a", torch.nn.Module())
        model.a.q, model.b = torch.nn.Linear(16, 16), torch.nn.Linear(16, 16)
        tuned = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q", "b"], **config))
        for path in ("a.q", "b"):
            layer = tuned.get_submodule(f"base_model.model.{path}")
            assert Scales(config).of(path, layer.r["default"]) == layer.scaling["default"]


@pytest.mark.parametrize(
    ("pattern", "name"),
    [
        ("q_proj", ("q_proj", False)),
        (r"layers\.1\.q_proj", ("layers.1.q_proj", False)),
        (r"^model\.q$", ("model.q", True)),
        (r".*\.gate_up_proj", ("gate_up_proj", False)),
        (r".*x\.gate_up_proj", None),
        ("a|b", None),
        ("(a+)+", None),
        ("", None),
    ],
)
def test_which_patterns_are_names(pattern: str, name: object) -> None:
    assert literal(pattern) == name


def test_what_peft_cannot_say_is_refused(backbone: Make, tmp_path: Path) -> None:
    from deltahub.attaching import attach

    base = backbone("bert")
    model = tiny.load_model("bert", base)
    delta = attach(model, "adapter", ["output.dense"], bottleneck=4)
    package = tiny.package_of(tmp_path / "p", model, [delta], base)
    with pytest.raises(ConverterError) as caught:
        export_(package, tmp_path / "out", to="peft")
    assert caught.value.code == "E_CONVERT_EXPORT"
    assert not (tmp_path / "out").exists()


def test_converting_by_name(adapter: Callable[..., Any], tmp_path: Path) -> None:
    base, folder, _ = adapter("llama")
    package = convert(folder, tmp_path / "p", backbone=base)
    assert Package.open(package).manifest.extensions
    assert (convert(package, tmp_path / "x", to="peft", backbone=base) / "adapter_config.json").is_file()
    assert "peft" in formats()
    with pytest.raises(ConverterError) as caught:
        convert(package, tmp_path / "y", to="no such format")
    assert caught.value.code == "E_CONVERT_FORMAT"
