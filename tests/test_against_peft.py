"""The same tensors in the real peft and in DeltaHub give the same numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import deltahub
from deltahub import kinds
from deltahub.attaching import attach_parts
from deltahub.sites import Part
from tests.models import bert_classifier, gpt2, ids, llama

pytestmark = pytest.mark.filterwarnings("ignore")

MODELS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "bert": (bert_classifier, ["query", "value", "intermediate.dense"]),
    "llama": (llama, ["q_proj", "v_proj", "down_proj"]),
    "gpt2": (gpt2, ["c_attn", "c_fc"]),
}


def randomised(model: nn.Module, needle: str) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if needle in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.1)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids()).logits


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_lora(name: str, rslora: bool) -> None:
    from peft import LoraConfig, get_peft_model

    make, targets = MODELS[name]
    theirs = get_peft_model(
        make(), LoraConfig(r=4, lora_alpha=12, target_modules=targets, use_rslora=rslora, lora_dropout=0.0)
    ).eval()
    randomised(theirs, "lora_")
    ours = make()
    tensors = {}
    for path, module in theirs.base_model.model.named_modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            tensors[path] = {
                "down": module.lora_A["default"].weight.detach().clone(),
                "up": module.lora_B["default"].weight.detach().clone(),
            }
    kind = kinds.get("lora")
    scale = 12 / 4**0.5 if rslora else 12 / 4
    config = kind.check_config({"rank": 4, "scale": scale})
    delta = attach_parts(ours, "it", [Part(name="it", kind=kind, config=config, paths=list(tensors), tensors=tensors)])
    assert len(delta.sites) == len(tensors) > 0
    expected = logits(theirs)
    assert not torch.allclose(expected, logits(make()), atol=1e-3)
    assert (logits(ours) - expected).abs().max() <= 1e-6
    delta.merge()
    assert (logits(ours) - logits(theirs.merge_and_unload())).abs().max() <= 1e-6


def test_lora_on_a_convolution_and_an_embedding() -> None:
    from peft import LoraConfig, get_peft_model

    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(20, 8)
            self.conv = nn.Conv1d(8, 6, 3, stride=2, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(self.embed(x).transpose(1, 2))

    torch.manual_seed(0)
    base = Small()
    ours = copy.deepcopy(base)
    theirs = get_peft_model(base, LoraConfig(r=2, lora_alpha=3, target_modules=["embed", "conv"])).eval()
    randomised(theirs, "lora_")
    inner = theirs.base_model.model
    tensors = {
        "embed": {
            "down": inner.embed.lora_embedding_A["default"].detach().clone(),
            "up": inner.embed.lora_embedding_B["default"].detach().clone(),
        },
        "conv": {
            "down": inner.conv.lora_A["default"].weight.detach().clone(),
            "up": inner.conv.lora_B["default"].weight.detach().clone().flatten(1),
        },
    }
    kind = kinds.get("lora")
    config = kind.check_config({"rank": 2, "scale": 1.5})
    attach_parts(ours, "it", [Part(name="it", kind=kind, config=config, paths=["embed", "conv"], tensors=tensors)])
    x = torch.randint(0, 20, (3, 9))
    assert (ours(x) - theirs(x)).abs().max() <= 1e-6


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_trained_biases(name: str) -> None:
    """peft's ``bias="all"`` stores absolute values; a ``bias`` delta stores the difference."""
    from peft import LoraConfig, get_peft_model

    make, targets = MODELS[name]
    theirs = get_peft_model(make(), LoraConfig(r=1, target_modules=targets, bias="all")).eval()
    randomised(theirs, ".bias")
    ours = make()
    found = {}
    for path, module in theirs.base_model.model.named_modules():
        own = path.replace(".base_layer", "")
        bias = getattr(module, "bias", None)
        if isinstance(bias, Tensor) and "lora_" not in path and own in dict(ours.named_modules()):
            found[own] = bias.detach() - ours.get_submodule(own).bias.detach()
    tensors = {path: {"value": value} for path, value in found.items()}
    kind = kinds.get("bias")
    part = Part(name="it", kind=kind, config=kind.check_config({}), paths=list(tensors), tensors=tensors)
    attach_parts(ours, "it", [part])
    assert (logits(ours) - logits(theirs)).abs().max() <= 1e-6


def test_modules_to_save_are_assigned() -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["query"], modules_to_save=["classifier"])
    theirs = get_peft_model(bert_classifier(), config).eval()
    randomised(theirs, "modules_to_save")
    saved = theirs.base_model.model.classifier.modules_to_save["default"]
    ours = bert_classifier()
    delta = deltahub.attach(ours, "assign", "classifier")
    with torch.no_grad():
        for name, p in delta.named_parameters():
            p.copy_(getattr(saved, name.rpartition("/")[2]))
    assert (logits(ours) - logits(theirs)).abs().max() <= 1e-6
