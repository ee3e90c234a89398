"""ΔConvBlock and LinFusion's attention against independent modules, in every variant, and their presets."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import deltahub
from deltahub import kinds, presets
from deltahub.errors import DeltaHubError, KindError, UsageError
from deltahub.kinds import reference
from deltahub.kinds.host_shape import HostShape
from tests.diffusion import inputs_of, pixart, sample, unet
from tests.zoo import randomise

SHAPE = HostShape(family="block", d_in=16, d_out=16)
VARIANTS = [
    {"kernel": 3},
    {"kernel": 11, "pool": "adaptive"},
    {"kernel": 5, "stages": 4, "merge": "sum", "gate": "div_sqrt", "bias_depthwise": True},
    {"kernel": 3, "stages": 3, "divisor_1": 2, "divisor_2": 4, "divisor_3": 5, "gate": "sigmoid", "pool": "adaptive"},
    {"kernel": 1, "stages": 1, "reduction": 4, "bias_in": False, "bias_out": False, "bias_average": False},
    {"kernel": 3, "merge": "sum", "gate": "mul_sqrt"},
    {"kernel": 3, "merge": "sum", "gate": "sigmoid"},
    {"kernel": 3, "merge": "concat", "gate": "div_sqrt"},
]  # fmt: skip


class Given:
    """A host that knows its grid."""

    def __init__(self, grid: tuple[int, int]) -> None:
        self.grid = grid

    def deltahub_context(self, name: str) -> Any:
        assert name == "grid"
        return self.grid


def drawn(name: str, config: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return {n: torch.randn(s.shape) * 0.3 for n, s in kinds.get(name).tensors(config, SHAPE).items()}


def spelled(t: dict[str, Tensor], config: dict[str, Any], x: Tensor, grid: tuple[int, int]) -> Tensor:
    """The block as its paper and code say, written with torch's own functions."""
    c = {**kinds.get("delta-conv").check_config(config)}
    height, width = grid
    inner = 16 // c["reduction"]
    m = F.linear(x, t["inner"], t.get("inner_bias")).mT.reshape(len(x), inner, height, width)
    stages = []
    for i in range(c["stages"]):
        by = c[f"divisor_{i + 1}"]
        u = m
        if by > 1 and c["pool"] == "adaptive":
            u = F.adaptive_avg_pool2d(m, (max(1, height // by), max(1, width // by)))
        elif by > 1:
            u = F.avg_pool2d(m, by, ceil_mode=True, count_include_pad=False)
        bias = t["depthwise_bias"][i] if "depthwise_bias" in t else None
        u = F.conv2d(u, t["depthwise"][i], bias, padding=c["kernel"] // 2, groups=inner)
        a, b = u.chunk(2, 1)
        factor = {"mul_sqrt": (inner // 2) ** 0.5, "div_sqrt": 16**-0.5, "sigmoid": 1.0}[c["gate"]]
        u = a * (b.sigmoid() if c["gate"] == "sigmoid" else b) * factor
        stages.append(F.interpolate(u, (height, width), mode="bilinear", align_corners=False) if by > 1 else u)
    joined = torch.cat(stages, 1) if c["merge"] == "concat" else torch.stack(stages).sum(0)
    y = F.linear(joined.flatten(2).mT, t["mix" if c["merge"] == "concat" else "mix_sum"], t.get("mix_bias"))
    return y + F.linear(x.mean(1, keepdim=True), t["average"], t.get("average_bias"))


@pytest.mark.parametrize("config", VARIANTS)
@pytest.mark.parametrize("grid", [(6, 8), (7, 5), (2, 1)])
def test_every_variant_is_what_was_published(config: dict[str, Any], grid: tuple[int, int]) -> None:
    t = drawn("delta-conv", config)
    x = torch.randn(2, grid[0] * grid[1], 16)
    port = kinds.get("delta-conv").compile(config, SHAPE)["replace"]
    found = port.fn(Given(grid), x, *t.values())
    assert torch.allclose(found, spelled(t, config, x, grid), atol=1e-5)
    arrays = {n: v.numpy() for n, v in t.items()}
    host = reference.Host(shape=SHAPE, context={"grid": grid})
    document = kinds.get("delta-conv").document
    again = reference.run(document, kinds.get("delta-conv").check_config(config), "replace", host, arrays, x=x.numpy())
    np.testing.assert_allclose(again, found.numpy(), atol=1e-4)
    assert port.uses == {"host", "x", "grid"}


class LinFusion(nn.Module):
    """Generalised linear attention as its authors wrote it down."""

    def __init__(self, t: dict[str, Tensor], heads: int) -> None:
        super().__init__()
        self.t, self.heads = t, heads

    def near(self, name: str, x: Tensor) -> Tensor:
        t = self.t
        if f"{name}_down" not in t:
            return x
        h = F.linear(x, t[f"{name}_down"], t[f"{name}_down_bias"])
        h = F.leaky_relu(F.layer_norm(h, h.shape[-1:], t[f"{name}_norm"], t[f"{name}_norm_bias"]))
        return x + F.linear(h, t[f"{name}_up"], t[f"{name}_up_bias"])

    def forward(self, x: Tensor) -> Tensor:
        t, n = self.t, x.shape[1]
        q, k, v = (
            F.linear(s, t[name], t.get(f"{name}_bias")).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for name, s in (("query", self.near("query", x)), ("key", self.near("key", x)), ("value", x))
        )
        q, k = F.elu(q) + 1, F.elu(k) + 1
        z = q @ k.mean(-2, keepdim=True).mT + 1e-4
        y = q @ ((k.mT * n**-0.5) @ (v * n**-0.5)) / z
        return F.linear(y.transpose(1, 2).flatten(2), t["result"], t["result_bias"])


@pytest.mark.parametrize(
    "config", [{"heads": 2, "middle": 6}, {"heads": 4, "middle": 3, "biased": True}, {"heads": 1, "projected": False}]
)
def test_linear_attention_is_what_was_published(config: dict[str, Any]) -> None:
    t = drawn("linear-attention", config)
    x = torch.randn(2, 12, 16)
    found = kinds.get("linear-attention").compile(config, SHAPE)["replace"].fn(None, x, *t.values())
    assert torch.allclose(found, LinFusion(t, config["heads"])(x), atol=1e-5)
    arrays = {n: v.numpy() for n, v in t.items()}
    document = kinds.get("linear-attention").document
    whole = kinds.get("linear-attention").check_config(config)
    again = reference.run(document, whole, "replace", reference.Host(shape=SHAPE), arrays, x=x.numpy())
    np.testing.assert_allclose(again, found.numpy(), atol=1e-4)


def test_windows_of_an_even_side_and_widths_without_halves_are_refused() -> None:
    for config, code in (({"kernel": 4}, "E_KIND_CONFIG"), ({"kernel": 3, "reduction": 16}, "E_KIND_SHAPE")):
        with pytest.raises(KindError) as caught:
            kinds.get("delta-conv").compile(config, SHAPE)
        assert caught.value.code == code


def test_both_kinds_replace_the_attention_of_a_model() -> None:
    configs = {"delta-conv": {"kernel": 5}, "linear-attention": {"heads": 2}}
    for make, (kind, config) in itertools.product((unet, pixart), configs.items()):
        model = make()
        inputs = inputs_of(model, 12, 20)
        bare = sample(model, inputs)
        delta = deltahub.attach(model, kind, "role:attention", seed=1, **config)
        randomise(delta.parameters())
        found = sample(model, inputs)
        assert found.shape == bare.shape
        assert not torch.equal(found, bare)
        assert delta.parts[0].removes
        delta.detach()
        assert torch.equal(sample(model, inputs), bare)


def sd15_in_small() -> Any:
    """All sixteen attention sites of SD 1.5, at the least width."""
    down = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    up = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    return unet(
        layers=2, block_out_channels=(8, 8, 16, 16), down_block_types=down, up_block_types=up, norm_num_groups=4
    )


def sdxl_in_small() -> Any:
    return unet(
        layers=2,
        block_out_channels=(8, 8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        use_linear_projection=True,
        norm_num_groups=4,
    )


@pytest.mark.parametrize(
    ("preset", "make", "sites", "kernels"),
    [
        ("sd15-released", sd15_in_small, 16, {7: 2, 9: 5, 5: 5, 3: 1, 11: 3}),
        ("sdxl-released", sdxl_in_small, 70, {9: 4 + 10 + 30, 7: 20, 13: 6}),
        ("pixart-released", pixart, 2, {13: 2}),
        ("paper-table1", unet, 7, {13: 7}),
    ],
)
def test_presets(preset: str, make: Any, sites: int, kernels: dict[int, int]) -> None:
    model = make()
    delta = presets.attach_preset(model, preset, name="it", seed=0)
    assert len(delta.sites) == sites
    found: dict[int, int] = {}
    for site in delta.sites:
        side = site.bound.config["kernel"]
        found[side] = found.get(side, 0) + 1
    assert found == kernels
    assert all("attn1" in site.path for site in delta.sites)
    inputs = inputs_of(model, 16, 24)
    assert sample(model, inputs).isfinite().all()


def test_presets_by_name() -> None:
    assert {"paper-table1", "pixart-released", "sd15-released", "sdxl-released"} < set(presets.names())
    with pytest.raises(UsageError, match="sd15-released") as caught:
        presets.get("sd15")
    assert caught.value.code == "E_USAGE_PRESET"
    delta = presets.attach_preset(pixart(), "pixart-released", targets="transformer_blocks.0.attn1", pool="avg")
    assert [site.path for site in delta.sites] == ["transformer_blocks.0.attn1"]
    assert delta.sites[0].bound.config["pool"] == "avg"
    with pytest.raises(UsageError):
        presets.attach_preset(unet(), "sd15-released", targets="mid_block.**.attn1")
    with pytest.raises(DeltaHubError):
        presets.attach_preset(pixart(), "sd15-released")
