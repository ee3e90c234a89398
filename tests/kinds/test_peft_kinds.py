"""The same tensors in the real peft 0.21.2 and in our kinds give the same numbers, live and merged."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from deltahub import kinds
from deltahub.attaching import attach_parts
from deltahub.sites import Part
from tests.kinds import peft_mappings as maps

pytestmark = pytest.mark.filterwarnings("ignore")


class Toy(nn.Module):
    """One host with another layer around it, so that peft accepts it as a model."""

    def __init__(self, host: nn.Module) -> None:
        super().__init__()
        self.host = host
        self.last = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.host(x))


HOSTS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "linear": (lambda: nn.Linear(12, 8), lambda: torch.randn(2, 3, 12)),
    "tall": (lambda: nn.Linear(8, 12), lambda: torch.randn(2, 3, 8)),
    "bare": (lambda: nn.Linear(12, 8, bias=False), lambda: torch.randn(2, 3, 12)),
    "odd": (lambda: nn.Linear(11, 8), lambda: torch.randn(2, 3, 11)),
    "conv1d": (lambda: nn.Conv1d(6, 8, 3, padding=1, stride=2), lambda: torch.randn(2, 6, 9)),
    "conv2d": (lambda: nn.Conv2d(6, 8, 3, padding=1), lambda: torch.randn(2, 6, 5, 5)),
    "embedding": (lambda: nn.Embedding(20, 8), lambda: torch.randint(0, 20, (2, 5))),
    "norm": (lambda: nn.LayerNorm(8), lambda: torch.randn(2, 3, 8)),
}


@dataclass(frozen=True)
class Case:
    """A config of peft on a host, and what its tensors are in our kinds."""

    name: str
    host: str
    config: Callable[[], Any]
    entries: Callable[[Any], list[maps.Entry]]
    mergeable: bool = True
    patched: bool = field(default=False)


def config(name: str, **options: Any) -> Callable[[], Any]:
    return lambda: getattr(peft, name)(target_modules=["host"], **options)


CASES = [
    *(
        Case("dora", h, config("LoraConfig", r=4, lora_alpha=6, use_dora=True), maps.dora)
        for h in ("linear", "bare", "conv1d", "conv2d", "embedding")
    ),
    *(Case("hira", h, config("HiraConfig", r=4), maps.hira) for h in ("linear", "conv2d", "embedding")),
    Case("adalora", "linear", config("AdaLoraConfig", init_r=4, target_r=4, lora_alpha=6, total_step=10), maps.adalora),
    Case("loha", "linear", config("LoHaConfig", r=2, alpha=3), maps.loha),
    Case("loha", "conv1d", config("LoHaConfig", r=2, alpha=3), maps.loha),
    Case("loha", "conv2d", config("LoHaConfig", r=2, alpha=3), maps.loha),
    Case("loha-tucker", "conv2d", config("LoHaConfig", r=2, alpha=3, use_effective_conv2d=True), maps.loha),
    Case("lokr", "linear", config("LoKrConfig", r=1, alpha=3), maps.lokr),
    Case("lokr-both", "linear", config("LoKrConfig", r=1, alpha=3, decompose_both=True, decompose_factor=4), maps.lokr),
    Case("lokr-whole", "linear", config("LoKrConfig", r=8, alpha=3), maps.lokr),
    Case("lokr", "conv1d", config("LoKrConfig", r=1, alpha=3), maps.lokr),
    Case("lokr", "conv2d", config("LoKrConfig", r=1, alpha=3), maps.lokr),
    Case("lokr-tucker", "conv2d", config("LoKrConfig", r=1, alpha=3, use_effective_conv2d=True), maps.lokr),
    Case("lokr-whole", "conv2d", config("LoKrConfig", r=8, alpha=3), maps.lokr),
    Case("vera", "linear", config("VeraConfig", r=4), maps.vera),
    Case("pvera", "linear", config("PveraConfig", r=4), maps.pvera),
    Case("randlora", "linear", config("RandLoraConfig", r=3, randlora_alpha=6), maps.randlora),
    Case("randlora", "tall", config("RandLoraConfig", r=3, randlora_alpha=6), maps.randlora),
    Case("gralora", "linear", config("GraloraConfig", r=4, gralora_k=2, alpha=6, hybrid_r=0), maps.gralora),
    Case("gralora-hybrid", "linear", config("GraloraConfig", r=4, gralora_k=2, alpha=6, hybrid_r=2), maps.gralora),
    Case("delora", "linear", config("DeloraConfig", r=4, delora_lambda=3), maps.delora),
    Case("tinylora", "linear", config("TinyLoraConfig", r=2, u=3), maps.tinylora),
    Case("tinylora", "embedding", config("TinyLoraConfig", r=2, u=3), maps.tinylora),
    Case("psoft", "linear", config("PsoftConfig", r=4, psoft_alpha=6), maps.psoft),
    Case(
        "psoft-series",
        "linear",
        config("PsoftConfig", r=4, psoft_alpha=6, use_cayley_neumann=True, psoft_mag_a=False),
        maps.psoft,
    ),
    Case("vblora", "linear", config("VBLoRAConfig", r=4, num_vectors=8, vector_length=2), maps.vblora),
    Case("unilora", "linear", config("UniLoraConfig", r=4, theta_d_length=16), maps.vblora),
    Case("adamss", "linear", config("AdamssConfig", r=4, num_subspaces=2, subspace_rank=2), maps.adamss),
    Case("osf", "linear", config("OSFConfig", effective_rank=4), maps.osf),
    *(
        Case("oft", "linear", config("OFTConfig", oft_block_size=4, use_cayley_neumann=s, block_share=b), maps.oft)
        for s in (True, False)
        for b in (True, False)
    ),
    Case("oft", "embedding", config("OFTConfig", oft_block_size=4, use_cayley_neumann=False), maps.oft),
    Case("boft", "linear", config("BOFTConfig", boft_block_size=4), maps.boft),
    Case(
        "boft-butterfly",
        "tall",
        config("BOFTConfig", boft_block_size=2, boft_n_butterfly_factor=3),
        maps.boft,
        patched=True,
    ),
    *(
        Case("ia3", h, config("IA3Config", feedforward_modules=f), maps.ia3)
        for h in ("linear", "conv2d")
        for f in ([], ["host"])
    ),
    *(
        Case(f"road-{v}", "linear", config("RoadConfig", variant=f"road_{v}", group_size=4), maps.road)
        for v in (1, 2, 4)
    ),
    *(Case("miss", h, config("MissConfig", r=4), maps.miss) for h in ("linear", "odd")),
    Case("miss-mini", "linear", config("MissConfig", r=4, mini_r=4, init_weights="mini"), maps.miss),
    Case("miss-bat", "linear", config("MissConfig", r=4, init_weights="bat"), maps.miss),
    *(Case("hra", "linear", config("HRAConfig", r=3, apply_GS=g), maps.hra) for g in (False, True)),
    *(
        Case(f"glora-{p}", h, config("GloraConfig", r=4, config_A_B=p, config_C=c), maps.glora)
        for p, c, h in (
            ("lora", "lora", "linear"),
            ("vector", "vector", "linear"),
            ("constant", "none", "linear"),
            ("lora", "lora", "bare"),
        )
    ),
    *(
        Case(f"peanut-{d}", "linear", config("PeanutConfig", r=4, depth=d, act_fn="relu", scaling=0.5), maps.peanut)
        for d in (0, 1, 2)
    ),
    *(
        Case(f"deft-{d}", "linear", config("DeftConfig", r=4, decomposition_method=d, para=p), maps.deft)
        for d in ("relu", "qr")
        for p in (False, True)
    ),
    Case("fourierft", "linear", config("FourierFTConfig", n_frequency=10, scaling=20.0), maps.fourierft),
    *(
        Case(f"waveft-{f}", h, config("WaveFTConfig", n_frequency=10, scaling=2.0, wavelet_family=f), maps.waveft)
        for f, h in (("db1", "linear"), ("db2", "linear"), ("db3", "odd"), ("db1", "odd"))
    ),
    Case("waveft-direct", "linear", config("WaveFTConfig", n_frequency=10, scaling=2.0, use_idwt=False), maps.waveft),
    Case("c3a", "linear", config("C3AConfig", block_size=4), maps.c3a),
    Case("shira", "linear", config("ShiraConfig", r=2), maps.shira),
    Case("supertuning", "linear", config("SupertuningConfig", sparsity=0.8), maps.supertuning),
    Case("beft", "linear", config("BeftConfig"), maps.beft),
    Case("ln-tuning", "norm", config("LNTuningConfig"), maps.ln_tuning),
    Case(
        "trainable-tokens", "embedding", config("TrainableTokensConfig", token_indices=[1, 5, 7]), maps.trainable_tokens
    ),
]


def block_diagonal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several butterfly factors need a CUDA extension in peft; what that extension computes is this."""
    from peft.tuners.boft import layer

    class BlockDiagonal:
        @staticmethod
        def apply(blocks: Tensor) -> Tensor:
            return torch.stack([torch.block_diag(*one_factor) for one_factor in blocks])

    monkeypatch.setattr(layer, "get_fbd_cuda", lambda: True)
    monkeypatch.setattr(layer, "FastBlockDiag", BlockDiagonal)


@pytest.mark.parametrize("case", [pytest.param(c, id=f"{i}-{c.name}-{c.host}") for i, c in enumerate(CASES)])
def test_same_tensors_same_numbers(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    if case.patched:
        block_diagonal(monkeypatch)
    torch.manual_seed(0)
    make, inputs = HOSTS[case.host]
    ours = Toy(make()).eval()
    theirs = peft.get_peft_model(copy.deepcopy(ours), case.config()).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator) * 0.3)
    x = inputs()
    bare = ours(x)
    with torch.no_grad():
        entries = case.entries(theirs.base_model.model.host)
    parts = []
    for i, (name, options, tensors) in enumerate(entries):
        kind = kinds.get(name)
        held = {n: t.detach().clone() for n, t in tensors.items()}
        part = Part(name=f"p{i}", kind=kind, config=kind.check_config(options), paths=["host"], tensors={"host": held})
        parts.append(part)
    delta = attach_parts(ours, "it", parts)
    with torch.no_grad():
        expected, live = theirs(x), ours(x)
        assert (expected - bare).abs().max() > 1e-2, "the adapter does nothing"
        size = max(1.0, float(expected.abs().max()))
        assert (live - expected).abs().max() <= 1e-5 * size
        delta.merge()
        assert (ours(x) - expected).abs().max() <= 1e-5 * size
        if hasattr(theirs, "merge_and_unload"):
            assert (ours(x) - theirs.merge_and_unload()(x)).abs().max() <= 1e-5 * size
