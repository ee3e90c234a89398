"""Prompts against peft: outputs, loss, gradients and words, from the same tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import deltahub
from tests.models import gpt2, llama
from tests.test_prompting import LENGTH, MODELS, batch, code_of, run
from tests.zoo import randomise

pytestmark = pytest.mark.filterwarnings("ignore")


def theirs(name: str, implementation: str = "sdpa", **options: Any) -> Any:
    from peft import PromptTuningConfig, get_peft_model

    make, task = MODELS[name]
    config = PromptTuningConfig(task_type=task, num_virtual_tokens=LENGTH, **options)
    model = make()
    model.set_attn_implementation(implementation)
    return get_peft_model(model, config).eval()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_outputs_loss_and_gradients_equal_peft(name: str, implementation: str) -> None:
    other = theirs(name, implementation)
    weight = other.prompt_encoder["default"].embedding.weight
    torch.nn.init.normal_(weight)
    model = MODELS[name][0]()
    model.set_attn_implementation(implementation)
    delta = deltahub.attach(model, "prompt", length=LENGTH)
    (site,) = delta.sites
    (own,) = delta.parameters()
    own.data = weight.detach()[:LENGTH].clone()
    given = batch(name, labels=True)
    before = {key: value.clone() for key, value in given.items()}
    a, b = other(**given), model(**given)
    expected = a.logits[:, LENGTH:] if MODELS[name][1] == "CAUSAL_LM" else a.logits
    assert torch.allclose(b.logits, expected, atol=1e-5)
    assert torch.allclose(b.loss, a.loss, atol=1e-6)
    a.loss.backward()
    b.loss.backward()
    assert own.grad is not None
    assert own.grad.abs().max() > 0
    assert torch.allclose(own.grad, weight.grad[:LENGTH], atol=1e-6)
    assert all(torch.equal(value, before[key]) for key, value in given.items())
    assert type(site.bound.shape.d_out) is int


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_what_is_generated_equals_peft(name: str) -> None:
    other = theirs(name)
    weight = other.prompt_encoder["default"].embedding.weight
    torch.nn.init.normal_(weight)
    model = MODELS[name][0]()
    deltahub.attach(model, "prompt", length=LENGTH).sites[0].tensors()[0].data = weight.detach().clone()
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    given = batch(name)
    assert torch.equal(model.generate(**given, **options), other.generate(**given, **options))


def test_p_tuning_equals_peft_and_is_saved_as_what_it_gives(tmp_path: Path) -> None:
    from peft import PromptEncoderConfig, get_peft_model
    from peft.utils import get_peft_model_state_dict

    other = get_peft_model(
        llama(), PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=LENGTH, encoder_hidden_size=12)
    ).eval()
    encoder = other.prompt_encoder["default"]
    model = llama()
    delta = deltahub.attach(model, "prompt", length=LENGTH, network="mlp", hidden=12, name="p")
    (site,) = delta.sites
    layers = [encoder.embedding, encoder.mlp_head[0], encoder.mlp_head[2], encoder.mlp_head[4]]
    values = [layers[0].weight] + [t for layer in layers[1:] for t in (layer.weight, layer.bias)]
    for own, value in zip(site.tensors(), values, strict=True):
        own.data = value.detach().clone()
    given = batch("llama", labels=True)
    with torch.no_grad():
        a, b = other(**given), model(**given)
    assert torch.allclose(b.logits, a.logits[:, LENGTH:], atol=1e-5)
    assert torch.allclose(b.loss, a.loss, atol=1e-6)
    delta.save(tmp_path / "p")
    manifest = json.loads((tmp_path / "p" / "delta.json").read_text())
    assert manifest["modules"][0]["config"]["network"] == "none"
    assert list(manifest["backbone"]["leaves"]) == ["model.embed_tokens.weight"]
    again = deltahub.load(tmp_path / "p", backbone=llama())
    (stored,) = deltahub.deltas(again)["p"].tensors().values()
    assert torch.allclose(stored, get_peft_model_state_dict(other)["prompt_embeddings"], atol=1e-6)
    assert torch.allclose(run(again, batch("llama")), run(model, batch("llama")), atol=1e-5)


@pytest.mark.parametrize("task", [0, 2])
def test_multitask_prompts_equal_peft(task: int) -> None:
    from peft import MultitaskPromptTuningConfig, get_peft_model

    config = MultitaskPromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=LENGTH, num_tasks=3, num_ranks=2)
    other = get_peft_model(gpt2(), config).eval()
    theirs = other.prompt_encoder["default"]
    values = [theirs.embedding.weight, theirs.prefix_task_cols, theirs.prefix_task_rows]
    randomise(values)
    model = gpt2()
    delta = deltahub.attach(model, "multitask-prompt", length=LENGTH, tasks=3, rank=2, task=task)
    for own, value in zip(delta.sites[0].tensors(), values, strict=True):
        own.data = value.detach().clone()
    given = batch("gpt2")
    with torch.no_grad():
        expected = other(**given, task_ids=torch.full((3,), task)).logits[:, LENGTH:]
    assert torch.allclose(run(model, given), expected, atol=1e-5)
    assert code_of(lambda: deltahub.attach(gpt2(), "multitask-prompt", length=2, tasks=2, task=2)) == "E_KIND_SHAPE"


def test_cpt_is_saved_as_a_prompt_and_a_cartridge_as_a_prefix() -> None:
    from peft import CartridgeConfig, CPTConfig, get_peft_model
    from peft.utils import get_peft_model_state_dict

    given = batch("llama", rows=2)
    cpt = CPTConfig(
        task_type="CAUSAL_LM", cpt_token_ids=[3, 4, 5, 6], cpt_mask=[1] * 4, cpt_tokens_type_mask=[1, 2, 3, 4],
        opt_projection_epsilon=0.2, opt_projection_format_epsilon=0.1,
    )  # fmt: skip
    other = get_peft_model(llama(), cpt).eval()
    torch.nn.init.normal_(other.prompt_encoder["default"].delta_embedding.weight, std=0.05)
    model = llama()
    (own,) = deltahub.attach(model, "prompt", length=LENGTH).parameters()
    own.data = get_peft_model_state_dict(other)["prompt_embeddings"].clone()
    assert torch.allclose(run(model, given), run(other, given)[:, LENGTH:], atol=1e-5)

    other = get_peft_model(llama(), CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=LENGTH)).eval()
    for part in other.prompt_encoder["default"].parameters():
        torch.nn.init.normal_(part)
    model = llama()
    sites = deltahub.attach(model, "prefix", "self_attn", length=LENGTH).sites
    layers = get_peft_model_state_dict(other)["prompt_embeddings"].view(LENGTH, len(sites), 2, -1)
    for i, site in enumerate(sites):
        for j, tensor in enumerate(site.tensors()):
            tensor.data = layers[:, i, j].clone()
    # peft counts the cartridge among the positions of the tokens.
    shifted = {**given, "position_ids": torch.arange(LENGTH, LENGTH + 6)[None]}
    assert torch.allclose(run(model, shifted), run(other, given), atol=1e-5)
