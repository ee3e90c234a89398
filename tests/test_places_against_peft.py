"""The same tensors on parts of modules in the real peft and in DeltaHub give the same numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deltahub import kinds
from deltahub.attaching import attach_parts
from deltahub.delta import Delta
from deltahub.sites import Part

pytestmark = pytest.mark.filterwarnings("ignore")
RANK, ALPHA = 2, 6


def lora(model: nn.Module, tensors: dict[str, dict[str, Tensor]], stack: int = 0) -> Delta:
    kind = kinds.get("lora")
    config = kind.check_config({"rank": RANK, "scale": ALPHA / RANK})
    part = Part(name="it", kind=kind, config=config, paths=list(tensors), tensors=tensors, stack=stack)
    return attach_parts(model, "it", [part])


def wrapped(model: nn.Module, **options: Any) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    theirs = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, **options)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.2)
    return theirs


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x, x, x, need_weights=False)[0]


def test_multihead_attention() -> None:
    """PEFT 0.21.2 adds the update of ``out_proj`` twice: once by hand, once by the layer that it has made of it."""
    x = torch.randn(2, 5, 8)
    theirs, ours = wrapped(Attending(), target_modules=["attn"]), Attending().eval()
    state = {name: value.detach().clone() for name, value in theirs.named_parameters() if "lora_" in name}
    whole, out = (f"base_model.model.attn.{inner}lora_{{}}.default.weight" for inner in ("", "base_layer.out_proj."))
    tensors = {
        "attn.in_proj_weight": {"down": state[whole.format("A")], "up": state[whole.format("B")]},
        "attn.out_proj": {"down": state[out.format("A")], "up": 2 * state[out.format("B")]},
    }
    assert len(state) == 4
    with torch.no_grad():
        bare, expected = ours(x), theirs(x)
        delta = lora(ours, tensors)
        assert (ours(x) - expected).abs().max() <= 1e-6
        assert (bare - expected).abs().max() > 1e-2
        delta.merge()
        assert (ours(x) - expected).abs().max() <= 1e-6


def mixture(name: str) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        name, vocab_size=50, hidden_size=16, intermediate_size=12, moe_intermediate_size=12, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, num_experts=4, num_local_experts=4,
        num_experts_per_tok=2,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("parameter", ["gate_up_proj", "down_proj"])
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_experts(name: str, parameter: str) -> None:
    """PEFT keeps ``lora_A`` by expert and then rank, ``lora_B`` by rank and then expert."""
    ids = torch.randint(0, 50, (2, 6), generator=torch.Generator().manual_seed(2))
    theirs = wrapped(mixture(name), target_modules=[], target_parameters=[f"mlp.experts.{parameter}"])
    tensors = {}
    for path, module in theirs.base_model.model.named_modules():
        if path.endswith("mlp.experts") and hasattr(module, "lora_A"):
            down, up = module.lora_A["default"].weight.detach(), module.lora_B["default"].weight.detach()
            tensors[f"{path}.{parameter}"] = {
                "down": down.reshape(4, RANK, -1).clone(),
                "up": up.reshape(up.shape[0], RANK, 4).permute(2, 0, 1).clone(),
            }
    assert len(tensors) == 2
    ours = mixture(name)
    with torch.no_grad():
        bare, expected = ours(input_ids=ids).logits, theirs(input_ids=ids).logits
        delta = lora(ours, tensors, stack=4)
        assert (ours(input_ids=ids).logits - expected).abs().max() <= 1e-6
        assert (bare - expected).abs().max() > 1e-3
        delta.merge()
        assert (ours(input_ids=ids).logits - expected).abs().max() <= 1e-6
