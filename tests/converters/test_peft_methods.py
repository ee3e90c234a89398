"""PEFT's other methods, each trained, saved and run by PEFT itself."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import deltahub
from deltahub import kinds
from deltahub.converters import import_
from deltahub.errors import DeltaHubError
from tests.converters import tiny
from tests.converters.test_peft import edit, run, saved

peft = pytest.importorskip("peft")
Make = Callable[..., Path]
pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # of torch, in PEFT's own SHiRA

Q = {"target_modules": ["q_proj", "down_proj"]}
CASES: dict[str, tuple[str, Callable[[], Any]]] = {
    "ia3": ("llama", lambda: peft.IA3Config(**Q, feedforward_modules=["down_proj"])),
    "ia3 bias": ("bert", lambda: peft.IA3Config(target_modules=["query", "dense"], feedforward_modules=["dense"])),
    "loha": ("llama", lambda: peft.LoHaConfig(**Q, r=3, alpha=5)),
    "loha patterns": ("llama", lambda: peft.LoHaConfig(**Q, r=3, alpha=5, alpha_pattern={"q_proj": 2})),
    "lokr": ("llama", lambda: peft.LoKrConfig(**Q, r=2, alpha=3)),
    "lokr both": ("llama", lambda: peft.LoKrConfig(**Q, r=1, alpha=3, decompose_both=True, decompose_factor=8)),
    "lokr whole": ("llama", lambda: peft.LoKrConfig(**Q, r=64, alpha=3)),
    "hira": ("llama", lambda: peft.HiraConfig(**Q, r=2)),
    "hra": ("llama", lambda: peft.HRAConfig(**Q, r=4)),
    "hra orthogonal": ("llama", lambda: peft.HRAConfig(**Q, r=4, apply_GS=True)),
    "oft": ("llama", lambda: peft.OFTConfig(**Q, oft_block_size=4, r=0)),
    "oft exact": ("llama", lambda: peft.OFTConfig(**Q, oft_block_size=4, r=0, use_cayley_neumann=False)),
    "oft shared": ("llama", lambda: peft.OFTConfig(**Q, oft_block_size=4, r=0, block_share=True)),
    "boft": ("llama", lambda: peft.BOFTConfig(**Q, boft_block_size=4, boft_n_butterfly_factor=2)),
    "road": ("bert", lambda: peft.RoadConfig(target_modules=["query"], group_size=8, variant="road_2")),
    "miss": ("llama", lambda: peft.MissConfig(**Q, r=4)),
    "delora": ("llama", lambda: peft.DeloraConfig(**Q, r=2)),
    "c3a": ("llama", lambda: peft.C3AConfig(**Q, block_size=8)),
    "adalora": ("llama", lambda: peft.AdaLoraConfig(**Q, init_r=3, lora_alpha=5, total_step=10)),
    "shira": ("llama", lambda: peft.ShiraConfig(**Q, r=2)),
    "beft": ("bert", lambda: peft.BeftConfig(target_modules=["query", "dense"])),
    "gralora": ("llama", lambda: peft.GraloraConfig(**Q, r=8, alpha=12, gralora_k=2)),
    "norms": ("bert", lambda: peft.LNTuningConfig(target_modules=["LayerNorm"])),
    "tokens": ("llama", lambda: peft.TrainableTokensConfig(target_modules=["embed_tokens"], token_indices=[3, 7])),
    "dora": ("llama", lambda: peft.LoraConfig(**Q, r=3, lora_alpha=4, use_dora=True)),
    "dora bias": ("bert", lambda: peft.LoraConfig(target_modules=["query"], r=3, lora_alpha=4, use_dora=True)),
    "lora and tokens": (
        "llama",
        lambda: peft.LoraConfig(**Q, r=3, trainable_token_indices={"embed_tokens": [2, 9]}),
    ),
}
NEEDS = {"norms": "assign", "shira": "sparse", "beft": "bias", "dora bias": "dora", "lora and tokens": "tokens"}


def adapter(case: str, base: Path, folder: Path) -> tuple[Path, torch.Tensor]:
    name, config = CASES[case]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(tiny.load_model(name, base), config())
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            with torch.no_grad():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return saved(model.eval(), folder), run(model)


@pytest.mark.parametrize("case", CASES)
def test_what_peft_computes(case: str, backbone: Make, tmp_path: Path) -> None:
    if NEEDS.get(case, case.split()[0]) not in kinds.names():
        pytest.skip("there is no such kind")
    name = CASES[case][0]
    base = backbone(name)
    folder, expected = adapter(case, base, tmp_path / "adapter")
    package = import_(folder, tmp_path / "p", backbone=base)
    assert float((run(deltahub.load(package.path, backbone=base)) - expected).abs().max()) <= 2e-6
    assert float((run(tiny.load_model(name, base)) - expected).abs().max()) > 1e-5  # it has an effect


@pytest.mark.parametrize(
    ("case", "change", "code"),
    [
        ("loha", {"use_effective_conv2d": True, "invented": 1}, "E_CONVERT_CONFIG"),
        ("loha", {"alpha_pattern": {"(a+)+": 1}}, "E_CONVERT_PATTERN"),
        ("loha", {"r": 4}, "E_CONVERT_RANK"),
        ("ia3", {"bias": "all"}, "E_CONVERT_CONFIG"),
        ("tokens", {"token_indices": [3, 3]}, "E_CONVERT_CONFIG"),
        ("tokens", {"token_indices": [1, 2, 3]}, "E_CONVERT_CONFIG"),
        ("adalora", {"lora_alpha": None}, "E_CONVERT_CONFIG"),
        ("gralora", {"hybrid_r": 2}, "E_CONVERT_CONFIG"),
        ("ia3", {"peft_type": "XLORA"}, "E_CONVERT_KIND"),
    ],
)
def test_what_does_not_fit(case: str, change: dict[str, Any], code: str, backbone: Make, tmp_path: Path) -> None:
    base = backbone(CASES[case][0])
    folder, _ = adapter(case, base, tmp_path / "adapter")
    edit(folder, **change)
    with pytest.raises(DeltaHubError) as caught:
        import_(folder, tmp_path / "p", backbone=base)
    assert caught.value.code == code, caught.value
    assert not (tmp_path / "p").exists()
