"""A delta that was trained in a pipeline's denoiser comes back in that pipeline, through a Hub, in another process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import deltahub
from deltahub import presets
from deltahub.errors import BackboneError
from tests.diffusion import unet, unet_inputs
from tests.zoo import randomise

ROOT = Path(__file__).resolve().parents[1]


def pipeline(folder: Path) -> Any:
    """A Stable Diffusion pipeline with every part built from config."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    torch.manual_seed(0)
    text = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=len(words) - 2,
        eos_token_id=len(words) - 1,
        pad_token_id=len(words) - 1,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
    )
    made = StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=CLIPTextModel(text).eval(),
        tokenizer=CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16),
        unet=unet(),
        scheduler=DDIMScheduler(num_train_timesteps=20),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    made.set_progress_bar_config(disable=True)
    return made


def image(pipe: Any) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    options = {"num_inference_steps": 2, "height": 24, "width": 40, "output_type": "pt", "generator": generator}
    return pipe("a b c", **options).images


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_pushed_and_loaded_by_name_in_another_process(hub: Any, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline
    from huggingface_hub import HfApi

    pipeline(tmp_path / "vocabulary").save_pretrained(tmp_path / "pipe")
    api = HfApi(endpoint=hub.url, token=hub.token)
    api.create_repo("org/pipe", exist_ok=True)
    commit = api.upload_folder(repo_id="org/pipe", folder_path=tmp_path / "pipe").oid

    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "pipe", safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    bare = image(pipe)
    delta = presets.attach_preset(pipe.unet, "paper-table1", name="it", seed=1, kernel=3)
    randomise(delta.parameters())
    expected = image(pipe)
    assert not torch.equal(expected, bare)
    package = delta.save(tmp_path / "package", probe=unet_inputs(10, 14))
    source = package.manifest.backbone.source.model_dump(by_alias=True)
    assert source["pipeline"] == "StableDiffusionPipeline"
    assert source["subfolder"] == "unet"
    manifest = json.loads((tmp_path / "package" / "delta.json").read_text())
    manifest["backbone"]["source"] |= {"hub": "org/pipe", "commit": commit}
    (tmp_path / "package" / "delta.json").write_text(json.dumps(manifest))
    deltahub.push(tmp_path / "package", "user/delta", endpoint=hub.url, token=hub.token)

    torch.save(expected, tmp_path / "expected.pt")
    code = f"""
import sys, torch
sys.path.insert(0, {str(ROOT)!r})
import deltahub
from tests.test_pipelines import image
pipe = deltahub.load("user/delta", endpoint={hub.url!r}, token={hub.token!r}, cache_dir={str(tmp_path / "cache")!r})
assert type(pipe).__name__ == "StableDiffusionPipeline"
pipe.set_progress_bar_config(disable=True)
assert list(deltahub.deltas(pipe)) == ["delta"]
assert torch.equal(image(pipe), torch.load({str(tmp_path / "expected.pt")!r}))
with deltahub.using(pipe):
    assert not torch.equal(image(pipe), torch.load({str(tmp_path / "expected.pt")!r}))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]

    live = StableDiffusionPipeline.from_pretrained(tmp_path / "pipe", safety_checker=None)
    live.set_progress_bar_config(disable=True)
    assert deltahub.load(tmp_path / "package", backbone=live) is live
    assert torch.equal(image(live), expected)
    local = deltahub.load(tmp_path / "package", backbone=tmp_path / "pipe")
    local.set_progress_bar_config(disable=True)
    assert torch.equal(image(local), expected)
    only = deltahub.load(tmp_path / "package", backbone=unet())
    assert type(only).__name__ == "UNet2DConditionModel"

    index = json.loads((tmp_path / "pipe" / "model_index.json").read_text())
    index["vae"] = ["pipeline_code", "Evil"]
    (tmp_path / "pipe" / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(BackboneError) as caught:
        deltahub.load(tmp_path / "package", backbone=tmp_path / "pipe")
    assert caught.value.code == "E_BACKBONE_CODE"
