"""LoRA files of diffusion pipelines, written by diffusers and PEFT: read, run, written, and read by diffusers again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import deltahub
from deltahub.converters import export_, import_, sniff
from deltahub.converters.naming import Names
from deltahub.errors import ConverterError, DeltaHubError
from tests.diffusion import flux, sample, unet, unet_inputs
from tests.test_pipelines import pipeline

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")
IDS = torch.arange(10)[None]
SINGLE = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("pipeline")
    pipeline(place / "vocabulary").save_pretrained(place / "pipe")
    return place / "pipe"


def fresh(folder: Path) -> Any:
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)


def randomised(model: Any, **config: Any) -> Any:
    model.add_adapter(peft.LoraConfig(**config))
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_" in name:
                value.add_(torch.randn(value.shape, generator=generator) * 0.1)
    return model.eval()


def text(pipe: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = pipe.text_encoder(IDS)[0]
    return found


def close(one: Tensor, other: Tensor) -> bool:
    return float((one - other).abs().max()) <= 1e-5


@pytest.fixture
def trained(folder: Path, tmp_path: Path) -> Callable[..., tuple[Path, Any]]:
    def make(*, alphas: bool, convolutions: bool = True) -> tuple[Path, Any]:
        from diffusers import StableDiffusionPipeline
        from peft.utils import get_peft_model_state_dict

        pipe = fresh(folder)
        more = ["conv1", "proj_in"] if convolutions else []
        alpha = 8 if alphas else 4
        randomised(pipe.unet, r=4, lora_alpha=alpha, target_modules=["to_q", "to_out.0", *more])
        randomised(pipe.text_encoder, r=2, lora_alpha=3 if alphas else 2, target_modules=["q_proj", "fc1"])
        told = {}
        if alphas:
            told["unet_lora_adapter_metadata"] = pipe.unet.peft_config["default"].to_dict()
            told["text_encoder_lora_adapter_metadata"] = pipe.text_encoder.peft_config["default"].to_dict()
        StableDiffusionPipeline.save_lora_weights(
            tmp_path / "lora",
            unet_lora_layers=get_peft_model_state_dict(pipe.unet),
            text_encoder_lora_layers=get_peft_model_state_dict(pipe.text_encoder),
            **told,
        )
        return tmp_path / "lora", pipe

    return make


@pytest.mark.parametrize("alphas", [True, False])
def test_what_diffusers_saves(alphas: bool, trained: Any, folder: Path, tmp_path: Path) -> None:
    saved, pipe = trained(alphas=alphas)
    out = tmp_path / "packages"
    assert sniff(saved) == "diffusers"
    import_(saved, out, backbone=folder)
    assert sorted(one.name for one in out.iterdir()) == ["text_encoder", "unet"]
    one = deltahub.load(out / "unet", backbone=folder)
    assert type(one).__name__ == "StableDiffusionPipeline"
    assert close(sample(one.unet, unet_inputs()), sample(pipe.unet, unet_inputs()))
    both = deltahub.load(out / "text_encoder", backbone=one)
    assert both is one
    assert close(text(both), text(pipe))
    assert list(deltahub.deltas(both)) == ["unet"]
    assert list(deltahub.deltas(both.text_encoder)) == ["text_encoder"]
    at_once = deltahub.load(out, backbone=folder)
    assert close(sample(at_once.unet, unet_inputs()), sample(pipe.unet, unet_inputs()))
    assert close(text(at_once), text(pipe))
    written = export_(out, tmp_path / "again", to="diffusers") / "pytorch_lora_weights.safetensors"
    assert written.read_bytes() == (saved / "pytorch_lora_weights.safetensors").read_bytes()


def bare(packages: Path, target: Path) -> Path:
    shutil.copytree(packages, target)
    for place in target.glob("**/delta.json"):
        document = json.loads(place.read_text(encoding="utf-8"))
        del document["extensions"]
        place.write_text(json.dumps(document), encoding="utf-8")
    return target


def test_written_afresh_and_read_by_diffusers(trained: Any, folder: Path, tmp_path: Path) -> None:
    saved, pipe = trained(alphas=True)
    import_(saved, tmp_path / "packages", backbone=folder)
    packages = bare(tmp_path / "packages", tmp_path / "bare")
    written = export_(packages, tmp_path / "new", to="diffusers", backbone=folder)
    theirs = fresh(folder)
    theirs.load_lora_weights(written)
    assert close(sample(theirs.unet, unet_inputs()), sample(pipe.unet, unet_inputs()))
    assert close(text(theirs), text(pipe))
    kohya = export_(packages, tmp_path / "kohya.safetensors", to="kohya", backbone=folder)
    assert sniff(kohya) == "kohya"
    assert "lora_te_text_model_encoder_layers_0_mlp_fc1.alpha" in load_file(kohya)
    import_(kohya, tmp_path / "back", backbone=folder)
    again = deltahub.load(tmp_path / "back" / "unet", backbone=folder)
    assert close(sample(again.unet, unet_inputs()), sample(pipe.unet, unet_inputs()))
    assert close(text(deltahub.load(tmp_path / "back" / "text_encoder", backbone=folder)), text(pipe))
    only = {key: value for key, value in load_file(kohya).items() if key.startswith("lora_unet")}
    save_file(only, tmp_path / "unet.safetensors")
    theirs = fresh(folder)
    theirs.load_lora_weights(tmp_path, weight_name="unet.safetensors")
    assert close(sample(theirs.unet, unet_inputs()), sample(pipe.unet, unet_inputs()))


def test_keys_of_attention_processors(trained: Any, folder: Path, tmp_path: Path) -> None:
    """The spelling of diffusers 0.17 to 0.21, with and without the name of the part."""
    saved, pipe = trained(alphas=False, convolutions=False)
    tensors = load_file(saved / "pytorch_lora_weights.safetensors")
    for prefix in ("unet.", ""):
        old = {}
        for key, value in tensors.items():
            if key.startswith("unet."):
                name = key.removeprefix("unet.").replace(".to_q.", ".processor.to_q_lora.")
                name = name.replace(".to_out.0.", ".processor.to_out_lora.").replace("lora_A.", "down.")
                old[prefix + name.replace("lora_B.", "up.")] = value
        file = tmp_path / f"old{prefix}safetensors.safetensors"
        save_file(old, file)
        assert sniff(file) == "diffusers"
        package = import_(file, tmp_path / f"package-{prefix}", backbone=folder)
        model = deltahub.load(package.path, backbone=folder)
        assert close(sample(model.unet, unet_inputs()), sample(pipe.unet, unet_inputs()))


def sdxl() -> Any:
    """Blocks as SDXL's: one without attention, two with, two layers in each, the added conditions."""
    return unet(
        layers=2,
        block_out_channels=(32, 64, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=64,
    )


def test_names_of_sdxl_are_those_that_diffusers_reads(tmp_path: Path) -> None:
    """Every module gets a LoRA of its own; what diffusers makes of our file has to land on the same ones."""
    from diffusers.loaders.lora_conversion_utils import (
        _convert_non_diffusers_lora_to_diffusers,
        _maybe_map_sgm_blocks_to_diffusers,
    )

    model = sdxl()
    names = Names(model)
    paths = [n for n, m in model.named_modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))]
    tensors: dict[str, Tensor] = {}
    for i, path in enumerate(paths):
        theirs = names.theirs([path])
        assert theirs is not None, path
        assert names.find(theirs.replace(".", "_"), flat=True, where="").paths == (path,)
        label = f"lora_unet_{theirs.replace('.', '_')}"
        tensors[f"{label}.lora_down.weight"] = torch.full((1, 1), float(i))
        tensors[f"{label}.lora_up.weight"] = torch.full((1, 1), float(i))
        tensors[f"{label}.alpha"] = torch.tensor(1.0)
    found, _ = _convert_non_diffusers_lora_to_diffusers(_maybe_map_sgm_blocks_to_diffusers(tensors, model.config))
    landed = {}
    for key, value in found.items():
        name = key.removeprefix("unet.").replace(".processor", "").replace("_lora", ".lora")
        if ".down." in name:
            landed[name.partition(".lora")[0].replace(".to_out", ".to_out.0").replace(".to_out.0.0", ".to_out.0")] = (
                int(value)
            )
    assert {paths[number]: path for path, number in landed.items()} == {path: path for path in paths}


def flux_file(model: Any, tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(6)
    names = Names(model)
    known = dict(model.named_modules())
    groups = list(names.fused())
    single = [
        (path,)
        for path, module in known.items()
        if isinstance(module, torch.nn.Linear) and names.theirs([path]) and not any(path in group for group in groups)
    ]
    tensors: dict[str, Tensor] = {}
    for group in [*groups, *single]:
        theirs = names.theirs(group)
        assert theirs is not None
        out = sum(known[path].out_features for path in group)
        label = f"lora_unet_{theirs.replace('.', '_')}"
        tensors[f"{label}.lora_down.weight"] = torch.randn(2, known[group[0]].in_features, generator=generator)
        tensors[f"{label}.lora_up.weight"] = torch.randn(out, 2, generator=generator)
        tensors[f"{label}.alpha"] = torch.tensor(1.0)
    save_file(tensors, tmp_path / "flux.safetensors")
    return tmp_path / "flux.safetensors"


def changes(model: Any, reference: Any) -> dict[str, Tensor]:
    own, base = dict(model.named_parameters()), dict(reference.named_parameters())
    return {name: own[name] - value for name, value in base.items()}


def test_fused_modules_of_flux(tmp_path: Path) -> None:
    """kohya's file, in which queries, keys and values are one: the same weights as diffusers' own conversion gives."""
    from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers

    torch.manual_seed(0)
    model = flux()
    model.save_pretrained(tmp_path / "transformer")
    file = flux_file(model, tmp_path)
    package = import_(file, tmp_path / "package", backbone=tmp_path / "transformer")
    ours = deltahub.load(package.path, backbone=tmp_path / "transformer", merge=True)
    stored = load_file(file)
    # diffusers has the widths of the published model written into its conversion of this one
    plain = {key: value for key, value in stored.items() if "_blocks_" in key and "_linear1" not in key}
    theirs = _convert_kohya_flux_lora_to_diffusers(plain)
    moved = {name: value for name, value in changes(ours, model).items() if float(value.abs().max()) > 0}
    seen = 0
    for key, down in theirs.items():
        if key.endswith("lora_A.weight"):
            path = key.removeprefix("transformer.").removesuffix(".lora_A.weight")
            expected = theirs[key.replace("lora_A", "lora_B")] @ down
            assert close(moved[f"{path}.weight"], expected), path
            seen += 1
    assert seen == 16
    fused = torch.cat([moved[f"single_transformer_blocks.0.{name}.weight"] for name in SINGLE])
    label = "lora_unet_single_blocks_0_linear1.lora_"
    assert close(fused, stored[f"{label}up.weight"] @ stored[f"{label}down.weight"] / 2)
    label = "lora_unet_final_layer_adaLN_modulation_1.lora_"
    shift, scale = (stored[f"{label}up.weight"] @ stored[f"{label}down.weight"] / 2).chunk(2)
    assert close(moved["norm_out.linear.weight"], torch.cat([scale, shift]))  # diffusers has them the other way round
    assert export_(package, tmp_path / "again.safetensors", to="kohya").read_bytes() == file.read_bytes()
    shutil.copytree(package.path, tmp_path / "x")
    new = export_(bare(tmp_path / "x", tmp_path / "bare"), tmp_path / "new.safetensors", to="kohya", backbone=model)
    before, after = load_file(file), load_file(new)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_separate_updates_of_modules_that_flux_fuses(tmp_path: Path) -> None:
    """They become one of the sum of their ranks, which is exact; half of a fused module is refused."""
    torch.manual_seed(0)
    model = flux()
    group = next(one for one in Names(model).fused() if len(one) == 3)
    delta = deltahub.attach(model, "lora", targets=list(group), rank=2, scale=1.5)
    with torch.no_grad():
        for parameter in delta.parameters():
            parameter.normal_()
    package = delta.save(tmp_path / "package")
    delta.detach()
    file = export_(package, tmp_path / "out.safetensors", to="kohya", backbone=model)
    assert {tuple(value.shape) for key, value in load_file(file).items() if "down" in key} == {(6, 32)}
    again = import_(file, tmp_path / "again", backbone=model)
    one, other = flux(), flux()
    for target in (one, other):
        target.load_state_dict(model.state_dict())
    one = deltahub.load(package.path, backbone=one, merge=True)
    other = deltahub.load(again.path, backbone=other, merge=True)
    for path in group:
        assert close(one.get_submodule(path).weight, other.get_submodule(path).weight)
    half = deltahub.attach(model, "lora", targets=[group[0]], rank=2).save(tmp_path / "half")
    with pytest.raises(ConverterError) as caught:
        export_(half, tmp_path / "no.safetensors", to="kohya", backbone=model)
    assert caught.value.code == "E_CONVERT_EXPORT"
    assert "to_k" in str(caught.value)


class DiffusionPipeline:
    """What is asked of a live pipeline: its parts by their names, and what its class is called."""

    def __init__(self, **parts: Any) -> None:
        self.__dict__ |= parts


class StableDiffusionXLPipeline(DiffusionPipeline): ...


class FluxPipeline(DiffusionPipeline): ...


def clip(width: int) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(width)
    config = CLIPTextConfig(
        vocab_size=20, hidden_size=width, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=8, bos_token_id=18, eos_token_id=19, pad_token_id=19,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if width == 16 else CLIPTextModel)(config).eval()


def t5() -> Any:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)).eval()


@pytest.mark.parametrize(
    ("pipe", "labels"),
    [
        (
            lambda: StableDiffusionXLPipeline(unet=sdxl(), text_encoder=clip(8), text_encoder_2=clip(16)),
            {
                "lora_te1_text_model_encoder_layers_0_self_attn_q_proj": (8, 8),
                "lora_te2_text_model_encoder_layers_0_mlp_fc1": (16, 8),
                "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q": (64, 64),
            },
        ),
        (
            lambda: FluxPipeline(transformer=flux(), text_encoder=clip(8), text_encoder_2=t5()),
            {
                "lora_te1_text_model_encoder_layers_0_self_attn_q_proj": (8, 8),
                "lora_te3_encoder_block_0_layer_0_SelfAttention_q": (8, 8),
                "lora_unet_double_blocks_0_img_attn_proj": (32, 32),
            },
        ),
    ],
    ids=["sdxl", "flux"],
)
def test_two_text_encoders(pipe: Any, labels: dict[str, tuple[int, int]], tmp_path: Path) -> None:
    whole = pipe()
    tensors: dict[str, Tensor] = {}
    for label, (inner, outer) in labels.items():
        tensors[f"{label}.lora_down.weight"] = torch.randn(2, inner)
        tensors[f"{label}.lora_up.weight"] = torch.randn(outer, 2)
        tensors[f"{label}.alpha"] = torch.tensor(1.0)
    save_file(tensors, tmp_path / "whole.safetensors", {"format": "pt"})
    import_(tmp_path / "whole.safetensors", tmp_path / "packages", backbone=whole)
    names = {place.name for place in (tmp_path / "packages").iterdir()}
    assert names == {"text_encoder", "text_encoder_2", "unet" if hasattr(whole, "unet") else "transformer"}
    packages = bare(tmp_path / "packages", tmp_path / "bare")
    written = load_file(export_(packages, tmp_path / "again.safetensors", to="kohya", backbone=whole))
    assert written.keys() == tensors.keys()
    assert all(torch.equal(written[key], value) for key, value in tensors.items())


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda t: {**t, "unet.mystery.lora_A.weight": torch.zeros(1, 1)}, "E_CONVERT_TARGET"),
        (lambda t: {**t, "unet.mystery": torch.zeros(1, 1)}, "E_CONVERT_KEY"),
        (lambda t: dict(list(t.items())[1:]), "E_CONVERT_MISSING"),
        (lambda t: {k.replace("text_encoder", "text_encoder_2"): v for k, v in t.items()}, "E_CONVERT_BACKBONE"),
        (lambda t: {k: v / 0 for k, v in t.items()}, "E_CONVERT_VALUES"),
    ],
)
def test_what_does_not_fit(change: Any, code: str, trained: Any, folder: Path, tmp_path: Path) -> None:
    saved, _ = trained(alphas=False, convolutions=False)
    save_file(change(load_file(saved / "pytorch_lora_weights.safetensors")), tmp_path / "bad.safetensors")
    with pytest.raises(DeltaHubError) as caught:
        import_(tmp_path / "bad.safetensors", tmp_path / "packages", from_="diffusers", backbone=folder)
    assert caught.value.code == code, caught.value
    assert not (tmp_path / "packages").exists()


def test_a_cut_file_and_a_part_for_the_whole(trained: Any, folder: Path, tmp_path: Path) -> None:
    saved, pipe = trained(alphas=False, convolutions=False)
    with pytest.raises(ConverterError) as caught:
        import_(saved, tmp_path / "packages", backbone=pipe.unet)
    assert caught.value.code == "E_CONVERT_BACKBONE"
    file = saved / "pytorch_lora_weights.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(DeltaHubError):
        import_(file, tmp_path / "packages", from_="diffusers", backbone=folder)
    assert not (tmp_path / "packages").exists()
