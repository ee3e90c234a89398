"""LoRA of language models in the layouts of MLX-LM, llama.cpp, torchtune, Unsloth and Axolotl.

MLX and torchtune do not install beside the rest: what they compute is written out here from their sources (mlx-lm
0.32.2 ``LoRALinear`` and ``DoRALinear``, torchtune 0.6.1 ``tune_to_peft_adapter_weights``). GGUF is read by
the real package.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import deltahub
from deltahub.converters import export_, import_, sniff
from deltahub.converters.heads import halves, pairs
from deltahub.errors import ConverterError, DeltaHubError
from tests.converters import tiny

peft = pytest.importorskip("peft")
IDS = torch.arange(1, 13).view(2, 6)
TARGETS = ["q_proj", "k_proj", "down_proj"]


def run(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS)[0]
    return found


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("backbone") / "llama"
    tiny.make_model("llama").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor]:
    """A real PEFT adapter with several ranks and alphas, and its outputs."""
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=TARGETS, rank_pattern={"k_proj": 2}, alpha_pattern={"down_proj": 1},
        use_rslora=True, task_type="CAUSAL_LM",
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(tiny.load_model("llama", base), config).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder)
    return folder, run(model)


@pytest.fixture
def package(base: Path, trained: tuple[Path, Tensor], tmp_path: Path) -> Path:
    return import_(trained[0], tmp_path / "package", backbone=base).path


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


PREFIX = "base_model.model."
SPELLINGS: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
    "no prefix": lambda t: {k.removeprefix(PREFIX): v for k, v in t.items()},
    "one level less": lambda t: {k.replace(f"{PREFIX}model.", PREFIX): v for k, v in t.items()},
    "adapter's name": lambda t: {k.replace(".weight", ".default.weight"): v for k, v in t.items()},
    "another name": lambda t: {k.replace(".weight", ".sft_v2.weight"): v for k, v in t.items()},
    "fsdp": lambda t: {
        k.replace(".layers.", "._fsdp_wrapped_module.layers.").replace(
            ".self_attn.", "._checkpoint_wrapped_module.self_attn."
        ): v
        for k, v in t.items()
    },
    "compiled": lambda t: {k.replace(PREFIX, f"{PREFIX}_orig_mod."): v for k, v in t.items()},
    "vision model": lambda t: {k.replace(f"{PREFIX}model.", f"{PREFIX}model.language_model."): v for k, v in t.items()},
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_keys_as_trainers_write_them(spelling: str, base: Path, trained: Any, tmp_path: Path) -> None:
    folder, expected = trained
    copy = tmp_path / "adapter"
    copy.mkdir()
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    # what Unsloth adds, and a regular expression for targets
    config |= {
        "auto_mapping": {
            "base_model_class": "LlamaForCausalLM",
            "parent_library": "transformers.models.llama.modeling_llama",
            "unsloth_fixed": True,
        }
    }
    config |= {"target_modules": r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj|k_proj|down_proj))"}
    (copy / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(SPELLINGS[spelling](weights(folder)), copy / "adapter_model.safetensors")
    package = import_(copy, tmp_path / "package", backbone=base)
    assert (run(deltahub.load(package.path, backbone=base)) - expected).abs().max() <= 1e-6


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda t: {k.removeprefix(PREFIX) if "layers.0" in k else k: v for k, v in t.items()}, "E_CONVERT_KEY"),
        (
            lambda t: {k.replace(".weight", f".{'ab'['layers.0' in k]}.weight"): v for k, v in t.items()},
            "E_CONVERT_KEY",
        ),
        (lambda t: {k: v[:0] if "down_proj.lora_B" in k else v for k, v in t.items()}, "E_CONVERT_SHAPE"),
        (lambda t: {k.replace(PREFIX, "somewhere."): v for k, v in t.items()}, "E_MERGE_TARGET"),
    ],
)
def test_keys_that_nobody_writes(change: Any, code: str, base: Path, trained: Any, tmp_path: Path) -> None:
    copy = tmp_path / "adapter"
    copy.mkdir()
    (copy / "adapter_config.json").write_bytes((trained[0] / "adapter_config.json").read_bytes())
    save_file(change(weights(trained[0])), copy / "adapter_model.safetensors")
    with pytest.raises(DeltaHubError) as caught:
        import_(copy, tmp_path / "package", backbone=base)
    assert caught.value.code == code, caught.value
    assert not (tmp_path / "package").exists()


# ---- torchtune


def tuned(trained: Path, folder: Path) -> Path:
    """The same adapter under torchtune's names, with queries and keys in pairs."""
    names = {"self_attn": "attn", "down_proj": "w2", "lora_A": "lora_a", "lora_B": "lora_b"}
    tensors = {}
    for key, value in weights(trained).items():
        new = key.removeprefix(f"{PREFIX}model.")
        for old, name in names.items():
            new = new.replace(old, name)
        heads = 4 if "q_proj" in key else 2 if "k_proj" in key else 0
        tensors[new] = pairs(value, heads).contiguous() if heads and "lora_B" in key else value
    folder.mkdir()
    config = json.loads((trained / "adapter_config.json").read_text(encoding="utf-8"))
    (folder / "adapter_config.json").write_text(json.dumps({**config, "target_modules": ["q_proj", "k_proj", "w2"]}))
    torch.save(tensors, folder / "adapter_model.pt")
    return folder


def test_torchtune(base: Path, trained: Any, tmp_path: Path) -> None:
    folder = tuned(trained[0], tmp_path / "tuned")
    assert sniff(folder) == "torchtune"
    with pytest.raises(ConverterError) as caught:
        import_(folder, tmp_path / "package", backbone=base)
    assert caught.value.code == "E_CONVERT_PICKLE"
    package = import_(folder, tmp_path / "package", backbone=base, allow_pickle=True)
    assert (run(deltahub.load(package.path, backbone=base)) - trained[1]).abs().max() <= 1e-6
    tensors = torch.load(folder / "adapter_model.pt", weights_only=True)
    torch.save({**tensors, "layers.0.attn.pos": torch.ones(1)}, folder / "adapter_model.pt")
    with pytest.raises(ConverterError) as caught:
        import_(folder, tmp_path / "other", backbone=base, allow_pickle=True)
    assert caught.value.code == "E_CONVERT_KEY"


def test_pairs_and_halves_are_what_torchtune_and_llama_cpp_do() -> None:
    value = torch.randn(24, 3)
    theirs = value.view(4, 3, 2, 3).transpose(1, 2).reshape(24, 3)  # torchtune: _permute_lora_matrix
    assert torch.equal(halves(value, 4), theirs)
    permuted = value.reshape(4, 2, 3, 3).swapaxes(1, 2).reshape(24, 3)  # llama.cpp: permute
    assert torch.equal(pairs(value, 4), permuted)
    assert torch.equal(halves(pairs(value, 4), 4), value)


# ---- MLX-LM


def mlx_forward(base: Path, folder: Path) -> Tensor:
    """What mlx-lm computes: ``y + scale * ((x @ lora_a) @ lora_b)`` at the modules that the file names."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    tensors = load_file(folder / "adapters.safetensors")
    model = tiny.load_model("llama", base)
    scale, rank = config["lora_parameters"]["scale"], config["lora_parameters"]["rank"]
    for key, a in tensors.items():
        if key.endswith("lora_a"):
            module: Any = model.get_submodule(key.removesuffix(".lora_a"))
            b = tensors[key.replace("lora_a", "lora_b")]
            assert a.shape == (module.in_features, rank)
            assert b.shape == (rank, module.out_features)
            inner = key.split(".")[:-1]
            assert ".".join(inner[3:]) in config["lora_parameters"]["keys"]
            with torch.no_grad():
                module.weight += (scale * b.T) @ a.T
    assert config["num_layers"] == -1
    return run(model)


def test_mlx_there_and_back(base: Path, trained: Any, package: Path, tmp_path: Path) -> None:
    folder = export_(package, tmp_path / "mlx", to="mlx")
    assert sniff(folder) == "mlx"
    assert (mlx_forward(base, folder) - trained[1]).abs().max() <= 1e-5
    again = import_(folder, tmp_path / "again", backbone=base)
    assert (run(deltahub.load(again.path, backbone=base)) - trained[1]).abs().max() <= 1e-5
    second = export_(again, tmp_path / "second", to="mlx")
    for name in ("adapters.safetensors", "adapter_config.json"):
        assert (folder / name).read_bytes() == (second / name).read_bytes()


def test_dora_of_mlx(base: Path, tmp_path: Path) -> None:
    model = tiny.load_model("llama", base)
    path, rank, scale = "model.layers.1.mlp.up_proj", 2, 3.0
    module: Any = model.get_submodule(path)
    torch.manual_seed(1)
    a, b, m = torch.randn(32, rank), torch.randn(rank, 64) * 0.3, torch.rand(64) + 0.5
    folder = tmp_path / "mlx"
    folder.mkdir()
    save_file({f"{path}.lora_a": a, f"{path}.lora_b": b, f"{path}.m": m}, folder / "adapters.safetensors")
    config = {
        "fine_tune_type": "dora",
        "num_layers": 1,
        "lora_parameters": {"rank": rank, "scale": scale, "dropout": 0.0},
    }
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    with torch.no_grad():
        adapted = module.weight + (scale * b.T) @ a.T
        module.weight.copy_(adapted * (m / adapted.norm(dim=1))[:, None])
    package = import_(folder, tmp_path / "package", backbone=base)
    assert (run(deltahub.load(package.path, backbone=base)) - run(model)).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("config", "tensors", "code"),
    [
        ({"lora_parameters": {"rank": 2}}, {}, "E_CONVERT_CONFIG"),
        ({"fine_tune_type": "full", "lora_parameters": {"rank": 2, "scale": 1}}, {}, "E_CONVERT_KIND"),
        ({"lora_parameters": {"rank": 3, "scale": 1}}, {}, "E_CONVERT_SHAPE"),
        ({"lora_parameters": {"rank": 2, "scale": 1}}, {"model.norm.weight": torch.ones(3)}, "E_CONVERT_SURPLUS"),
        ({"lora_parameters": {"rank": 2, "scale": 1}}, {"lm_head.lora_a": torch.ones(32, 2)}, "E_CONVERT_MISSING"),
    ],
)
def test_what_mlx_would_not_write(config: Any, tensors: Any, code: str, base: Path, tmp_path: Path) -> None:
    path = "model.layers.0.mlp.up_proj"
    folder = tmp_path / "mlx"
    folder.mkdir()
    pair = {f"{path}.lora_a": torch.ones(32, 2), f"{path}.lora_b": torch.ones(2, 64)}
    save_file({**pair, **tensors}, folder / "adapters.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(DeltaHubError) as caught:
        import_(folder, tmp_path / "package", backbone=base)
    assert caught.value.code == code, caught.value
    assert not (tmp_path / "package").exists()


# ---- llama.cpp


def test_gguf_there_and_back(base: Path, trained: Any, package: Path, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    file = export_(package, tmp_path / "lora.gguf", to="gguf", backbone=base)
    assert sniff(file) == "gguf"
    reader = gguf.GGUFReader(str(file))
    said = {name: reader.fields[name].contents() for name in reader.fields}
    assert said["general.architecture"] == "llama"
    assert said["general.type"] == "adapter"
    assert said["adapter.type"] == "lora"
    assert said["adapter.lora.alpha"] == 0.0
    read = {one.name: torch.from_numpy(one.data.copy()) for one in reader.tensors}
    assert "blk.1.attn_q.weight.lora_a" in read
    model = tiny.load_model("llama", base)
    names = {"attn_q": ("self_attn.q_proj", 4), "attn_k": ("self_attn.k_proj", 2), "ffn_down": ("mlp.down_proj", 0)}
    for key, a in read.items():
        if key.endswith("lora_a"):
            _, number, stem, *_ = key.split(".")
            path, heads = names[stem]
            change = read[key.replace("lora_a", "lora_b")] @ a
            module: Any = model.get_submodule(f"model.layers.{number}.{path}")
            with torch.no_grad():  # the runtime adds it to a weight whose rows its converter has permuted
                own = pairs(module.weight, heads) if heads else module.weight
                new = own + change
                module.weight.copy_(halves(new, heads) if heads else new)
    assert (run(model) - trained[1]).abs().max() <= 1e-5
    again = import_(file, tmp_path / "again", backbone=base)
    assert (run(deltahub.load(again.path, backbone=base)) - trained[1]).abs().max() <= 1e-5
    assert export_(again, tmp_path / "second.gguf", to="gguf", backbone=base).read_bytes() == file.read_bytes()


def test_gguf_with_an_alpha_for_all(base: Path, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(str(tmp_path / "lora.gguf"), "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 8.0)
    writer.add_tensor("blk.0.ffn_up.weight.lora_a", torch.ones(2, 32).numpy())
    writer.add_tensor("blk.0.ffn_up.weight.lora_b", torch.ones(64, 2).half().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    package = import_(tmp_path / "lora.gguf", tmp_path / "package", backbone=base)
    assert package.config(package.manifest.modules[0].name)["scale"] == 4.0
    data = (tmp_path / "lora.gguf").read_bytes()
    for cut in (3, 40, len(data) // 2, len(data) - 9):
        (tmp_path / "cut.gguf").write_bytes(data[:cut])
        with pytest.raises(DeltaHubError):
            import_(tmp_path / "cut.gguf", tmp_path / "no", from_="gguf", backbone=base)
        assert not (tmp_path / "no").exists()


def test_gguf_refuses_what_llama_cpp_would_skip(base: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    model = tiny.load_model("llama", base)
    for name, targets in (("embedding", ["model.embed_tokens"]), ("norm", ["model.norm"])):
        kind = "lora" if name == "embedding" else "diff"
        delta = deltahub.attach(model, kind, targets=targets, name=name, **({"rank": 2} if kind == "lora" else {}))
        package = delta.save(tmp_path / name)
        with pytest.raises(ConverterError) as caught:
            export_(package, tmp_path / "no.gguf", to="gguf", backbone=base)
        assert caught.value.code == "E_CONVERT_EXPORT"
        assert targets[0] in str(caught.value)
        assert list(tmp_path.glob("*.part")) == []
        delta.detach()
    big = deltahub.attach(model, "lora", targets=["q_proj"], rank=2, scale=1e6)
    with torch.no_grad():
        for parameter in big.parameters():
            parameter.fill_(1.0)
    package = big.save(tmp_path / "big")
    with pytest.raises(ConverterError) as caught:
        export_(package, tmp_path / "no.gguf", to="gguf", backbone=base, dtype="float16")
    assert caught.value.code == "E_MERGE_NONFINITE"
    assert not (tmp_path / "no.gguf").exists()


# ---- embeddings of pictures' words, and pictures


def test_textual_inversion(tmp_path: Path) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=8, bos_token_id=18, eos_token_id=19, pad_token_id=19,
    )  # fmt: skip
    encoder = CLIPTextModel(config).eval()
    vectors = torch.randn(2, 8)
    save_file({"<cat>": vectors}, tmp_path / "cat.safetensors")
    assert sniff(tmp_path / "cat.safetensors") == "textual_inversion"
    with pytest.raises(ConverterError) as caught:
        import_(tmp_path / "cat.safetensors", tmp_path / "p", backbone=encoder)
    assert caught.value.code == "E_CONVERT_PLACES"
    package = import_(tmp_path / "cat.safetensors", tmp_path / "p", backbone=encoder, places=[3, 7])
    ids = torch.tensor([[18, 3, 7, 1, 19]])
    with torch.no_grad():
        before = encoder(ids)[0]
        model = deltahub.load(package.path, backbone=encoder, merge=True)
        table = next(v for n, v in model.named_parameters() if "token_embedding" in n)
        assert torch.equal(table[[3, 7]], vectors)
        assert not torch.equal(model(ids)[0], before)
    with pytest.raises(ConverterError) as caught:
        import_(tmp_path / "cat.safetensors", tmp_path / "q", backbone=encoder, places=[3, 20])
    assert caught.value.code == "E_CONVERT_SHAPE"


def test_an_ip_adapter_is_told_and_refused(tmp_path: Path) -> None:
    save_file(
        {"image_proj.proj.weight": torch.ones(1), "ip_adapter.1.to_k_ip.weight": torch.ones(1)},
        tmp_path / "ip.safetensors",
    )
    assert sniff(tmp_path / "ip.safetensors") == "ip_adapter"
    with pytest.raises(ConverterError) as caught:
        import_(tmp_path / "ip.safetensors", tmp_path / "p", backbone="anything")
    assert caught.value.code == "E_CONVERT_KIND"


# ---- the command line


def test_the_command_line(base: Path, trained: Any, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from deltahub.cli import app

    def said(*words: object) -> Any:
        found = CliRunner().invoke(app, [str(word) for word in words])
        assert found.exit_code == 0, found.output
        return found

    said("convert", trained[0], "--backbone", base, "--out", tmp_path / "package")
    said("export", "peft", tmp_path / "package", "--target", "lorax", "--out", tmp_path / "lorax")
    said("export", "mlx", tmp_path / "package", "--out", tmp_path / "mlx")
    said("export", "gguf", tmp_path / "package", "--backbone", base, "--out", tmp_path / "lora.gguf")
    said("convert", tmp_path / "package", "--to", "peft", "--target", "vllm", "--out", tmp_path / "vllm")
    for name in ("lorax", "mlx", "vllm", "lora.gguf"):
        said("convert", tmp_path / name, "--backbone", base, "--out", tmp_path / f"{name} package")
        model = deltahub.load(tmp_path / f"{name} package", backbone=base)
        assert (run(model) - trained[1]).abs().max() <= 1e-5
    wrong = CliRunner().invoke(app, ["convert", str(tmp_path / "mlx"), "--alpha", "3", "--out", str(tmp_path / "no")])
    assert wrong.exit_code != 0
    assert not (tmp_path / "no").exists()


def test_options_that_a_format_does_not_have(base: Path, trained: Any, tmp_path: Path) -> None:
    with pytest.raises(DeltaHubError) as caught:
        import_(trained[0], tmp_path / "package", backbone=base, alpha=3)
    assert caught.value.code == "E_USAGE_OPTION"
    assert not (tmp_path / "package").exists()
