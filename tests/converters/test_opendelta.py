"""Every type of OpenDelta's, as its real code wrote it, against the outputs that it gave.

``tests/fixtures/opendelta-types`` was written by OpenDelta 067eed2 with transformers 4.30.2 on tiny random backbones
(``tests/peers/opendelta.py``); the checkpoints of one backbone share its folder.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import deltahub
from deltahub.converters import import_, sniff
from deltahub.errors import DeltaHubError

pytestmark = pytest.mark.filterwarnings("ignore")
FIXTURES = Path(__file__).parents[1] / "fixtures" / "opendelta-types"
CASES = sorted(path.parent.relative_to(FIXTURES) for path in FIXTURES.glob("*/*/checkpoint"))
KINDS = {
    "bitfit": {"bias"},
    "compacter_w": {"compacter"},
    "lora": {"lora"},
    "low_rank_adapter": {"low-rank-adapter"},
    "parallel_adapter": {"parallel-adapter"},
    "prefix": {"prefix"},
    "prefix_flat": {"prefix"},
    "soft_prompt": {"prompt"},
}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gives_its_own_outputs(case: Path, tmp_path: Path) -> None:
    folder, backbone = FIXTURES / case, FIXTURES / case.parent / "backbone"
    assert sniff(folder / "checkpoint") == "opendelta"
    package = import_(folder / "checkpoint", tmp_path / "p", backbone=backbone, allow_pickle=True)
    assert KINDS[case.name] == {module.kind for module in package.manifest.modules} - {"assign"}
    model = deltahub.load(package.path, backbone=backbone)
    with np.load(folder / "reference.npz") as reference:
        given = {key[7:]: torch.from_numpy(reference[key]) for key in reference if key.startswith("input__")}
        want, bare = reference["delta__logits"], reference["base__logits"]
    with torch.no_grad():
        found = model(**given).logits.numpy()
    want = want[:, want.shape[1] - found.shape[1] :]  # OpenDelta's prompts give outputs too; ours are the tokens'
    assert np.abs(found - want).max() <= 1e-5
    assert np.abs(bare - want).max() > 1e-2


def changed(case: str, tmp_path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Path:
    copy = tmp_path / "checkpoint"
    shutil.copytree(FIXTURES / case / "checkpoint", copy)
    torch.save(change(torch.load(copy / "pytorch_model.bin", weights_only=True)), copy / "pytorch_model.bin")
    return copy


def without(word: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda tensors: {key: value for key, value in tensors.items() if word not in key}


def renamed(old: str, new: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda tensors: {key.replace(old, new): value for key, value in tensors.items()}


@pytest.mark.parametrize(
    ("case", "change", "code"),
    [
        ("t5/prefix_flat", renamed("SelfAttention", "layer_norm"), "E_CONVERT_TARGET"),
        ("t5/prefix_flat", without("past_value"), "E_CONVERT_MISSING"),
        ("gpt2/prefix", lambda t: {k: v[:7] if "trans.2" in k else v for k, v in t.items()}, "E_CONVERT_TARGET"),
        ("gpt2/prefix", lambda t: {k: v.T if "trans.0.w" in k else v for k, v in t.items()}, "E_CONVERT_SHAPE"),
        ("gpt2/prefix", renamed("h.0", "h.1"), "E_CONVERT_TARGET"),
        ("bert/parallel_adapter", renamed("intermediate.dense", "output.dense"), "E_CONVERT_KIND"),
        ("bert/soft_prompt", renamed("soft_prompt_layer", "classifier.soft_prompt_layer"), "E_CONVERT_TARGET"),
        ("bert/soft_prompt", lambda t: {**t, "soft_prompt_layer.more": torch.ones(1)}, "E_CONVERT_SURPLUS"),
        ("bert/compacter_w", without("phm_rule"), "E_CONVERT_MISSING"),
        ("bert/bitfit", lambda t: {**t, "nowhere.bias": torch.ones(3)}, "E_MERGE_TARGET"),
    ],
)
def test_files_that_do_not_fit(case: str, change: Any, code: str, tmp_path: Path) -> None:
    copy, backbone = changed(case, tmp_path, change), FIXTURES / case.partition("/")[0] / "backbone"
    with pytest.raises(DeltaHubError) as caught:
        import_(copy, tmp_path / "p", backbone=backbone, allow_pickle=True)
    assert caught.value.code == code, caught.value
    assert not (tmp_path / "p").exists()


def test_a_checkpoint_from_before_freezing_is_the_delta_alone(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    backbone = FIXTURES / "bert" / "backbone"
    whole = load_file(backbone / "model.safetensors")
    whole["bert.embeddings.position_ids"] = torch.arange(64)[None]
    copy = changed("bert/low_rank_adapter", tmp_path, lambda delta: {**whole, **delta})
    one = import_(copy, tmp_path / "one", backbone=backbone, allow_pickle=True)
    alone = FIXTURES / "bert" / "low_rank_adapter" / "checkpoint"
    two = import_(alone, tmp_path / "two", backbone=backbone, allow_pickle=True)
    assert one.manifest.modules == two.manifest.modules
    assert one.manifest.files == two.manifest.files


def test_what_adapters_of_the_first_version_sat_on(tmp_path: Path) -> None:
    """v0.0.1 put them after whole sublayers, residual included, and called low-rank ones by another word."""

    def old(tensors: dict[str, Any]) -> dict[str, Any]:
        found = {}
        for key, value in tensors.items():
            name = key.replace("low_rank_adapter", "lowrankadapter")
            found[name.replace("SelfAttention.o.", "").replace("DenseReluDense.wo.", "")] = value
        return found

    copy, backbone = changed("t5/low_rank_adapter", tmp_path, old), FIXTURES / "t5" / "backbone"
    package = import_(copy, tmp_path / "p", backbone=backbone, allow_pickle=True)
    (module,) = package.manifest.modules
    assert module.kind == "low-rank-adapter"
    assert "encoder.block.0.layer.0" in package.tensors(module.name)
    model = deltahub.load(package.path, backbone=backbone)
    plain = type(model).from_pretrained(backbone).eval()
    inner, x = model.encoder.block[0].layer[0], torch.randn(1, 4, 32)
    weights, part = torch.load(copy / "pytorch_model.bin", weights_only=True), "encoder.block.0.layer.0.lowrankadapter."
    tensors = {key.removeprefix(part): value for key, value in weights.items() if key.startswith(part)}
    with torch.no_grad():
        y = plain.encoder.block[0].layer[0](x)[0]
        h = y @ (tensors["down_sampler.W_left"] * tensors["down_sampler.W_right"]) + tensors["down_sampler.b"]
        h = torch.nn.functional.gelu(h, approximate="tanh")
        want = y + h @ (tensors["up_sampler.W_left"] * tensors["up_sampler.W_right"]) + tensors["up_sampler.b"]
        assert torch.allclose(inner(x)[0], want, atol=1e-4 * float(want.abs().max()))
