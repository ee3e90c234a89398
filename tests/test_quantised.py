"""Linear layers whose weights are kept in eight or four bits: live deltas act on them, merges are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deltahub
from deltahub.errors import DeltaHubError
from deltahub.hosts import QUANTISED, view_of
from deltahub.package import Package
from tests.zoo import randomise

pytestmark = pytest.mark.filterwarnings("ignore")


def plain() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 8)).requires_grad_(False)


def by_torchao(bits: int) -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    from torchao.quantization.granularity import PerGroup

    model = plain()
    config: Any = quantization.Int8WeightOnlyConfig()
    if bits == 4:
        config = quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))
    quantization.quantize_(model, config)
    return model


def by_bitsandbytes(bits: int) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    model, source = plain(), plain()
    for name in ("0", "2"):
        old = source.get_submodule(name)
        size = (old.in_features, old.out_features)
        if bits == 8:
            new = bnb.nn.Linear8bitLt(*size, has_fp16_weights=False)
        else:
            new = bnb.nn.Linear4bit(*size, compute_dtype=torch.float32, quant_type="nf4")
        new.load_state_dict(old.state_dict())
        model.register_module(name, new)
    return model.to("cpu").requires_grad_(False)


WAYS: dict[str, tuple[Callable[[int], nn.Module], int]] = {
    "torchao, 8 bits": (by_torchao, 8),
    "torchao, 4 bits": (by_torchao, 4),
    "bitsandbytes, 8 bits": (by_bitsandbytes, 8),
    "bitsandbytes, 4 bits": (by_bitsandbytes, 4),
}
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 2},
    "adapter": {"bottleneck": 2},
    "bias": {"scale": 1.0},
    "ia3": {},
    "dora": {"rank": 2},
    "hira": {"rank": 2},
    "diff": {},
}


def numbers(model: nn.Module) -> nn.Module:
    """The same model with the numbers that the bits stand for."""
    made = plain()
    with torch.no_grad():
        for name in ("0", "2"):
            host = model.get_submodule(name)
            assert view_of(host) is QUANTISED
            made.get_submodule(name).weight.copy_(QUANTISED.weight(host))
    return made


def attached(model: nn.Module, kind: str) -> Any:
    delta = deltahub.attach(model, kind, ["0", "2"], name="it", seed=1, **KINDS[kind])
    randomise(delta.parameters())
    return delta


@pytest.mark.parametrize("way", WAYS)
def test_live_deltas_on_quantised_weights(way: str) -> None:
    make, bits = WAYS[way]
    x = torch.randn(5, 64)
    tolerance = 0.05 if way == "bitsandbytes, 8 bits" else 1e-4  # it rounds activations too
    for kind in KINDS:
        model = make(bits)
        other = numbers(model)
        bare = model(x)
        assert (bare - other(x)).abs().max() <= tolerance
        delta, same = attached(model, kind), attached(other, kind)
        live = model(x)
        assert (live - other(x)).abs().max() <= 3 * tolerance * max(1.0, float(live.detach().abs().max()))
        assert not torch.allclose(live, bare, atol=1e-3)
        live.square().sum().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in delta.parameters())
        assert {n: t.shape for n, t in delta.tensors().items()} == {n: t.shape for n, t in same.tensors().items()}
        delta.detach()
        assert torch.equal(model(x), bare)


@pytest.mark.parametrize("way", WAYS)
def test_a_merge_into_quantised_weights_is_refused(way: str) -> None:
    make, bits = WAYS[way]
    model, x = make(bits), torch.randn(5, 64)
    lora, bias = attached(model, "lora"), deltahub.attach(model, "bias", ["0", "2"], scale=1.0, frozen=False)
    randomise(bias.parameters())
    live: Tensor = model(x)
    with pytest.raises(DeltaHubError) as caught:
        lora.merge()
    assert caught.value.code == "E_HOST_QUANTISED"
    assert torch.equal(model(x), live)
    lora.disable()
    alone = model(x)
    lora.detach()
    bias.merge()  # biases are as they always were
    assert torch.allclose(model(x), alone, atol=1e-5)


def test_a_backbone_that_was_quantised_in_memory_is_what_its_files_hold(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    whole = plain()
    delta = attached(whole, "lora")
    x = torch.randn(5, 64)
    delta.save(tmp_path / "package")
    (tmp_path / "backbone").mkdir()
    delta.detach()
    save_file(whole.state_dict(), tmp_path / "backbone" / "model.safetensors")
    (tmp_path / "backbone" / "config.json").write_text('{"architectures": ["BertModel"], "model_type": "bert"}')
    model = by_torchao(8)
    with pytest.raises(DeltaHubError) as caught:
        deltahub.load(tmp_path / "package", backbone=model)
    assert caught.value.code == "E_IDENTITY_VALUES"
    assert not deltahub.deltas(model)
    deltahub.load(tmp_path / "package", backbone=model, verify=None, name="it")
    assert (model(x) - numbers(model)(x)).abs().max() > 1e-3
    deltahub.deltas(model)["it"].detach()
    fresh = attached(model, "lora")
    with pytest.raises(DeltaHubError) as caught:
        fresh.save(tmp_path / "again")
    assert caught.value.code == "E_IDENTITY_VALUES"
    package = fresh.save(tmp_path / "again", backbone=tmp_path / "backbone")
    assert package.manifest.backbone.identity == Package.open(tmp_path / "package").manifest.backbone.identity
