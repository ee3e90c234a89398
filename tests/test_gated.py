"""Compositions with gates: MAM and UniPELT as presets, and the gated prefix that the latter is made of."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import deltahub
from deltahub import presets
from deltahub.errors import DeltaHubError
from tests.models import bert_classifier, gpt2, ids, llama
from tests.test_attending import bart, fresh, inputs, logits, t5
from tests.zoo import randomise

pytestmark = pytest.mark.filterwarnings("ignore")
MODELS = {"bert": bert_classifier, "gpt2": gpt2, "llama": llama, "t5": t5, "bart": bart}
TARGETS = {"bert": "attention.self", "gpt2": "attn", "llama": "self_attn", "t5": "SelfAttention", "bart": "self_attn"}


def gated(name: str, delta: str = "p", length: int = 3, seed: int = 1) -> nn.Module:
    model = fresh(name)
    made = deltahub.attach(model, "gated-prefix", TARGETS[name], name=delta, length=length, seed=seed)
    randomise(made.parameters(), seed=seed)
    return model


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_a_gate_multiplies_keys_and_values_of_its_row(name: str, implementation: str) -> None:
    model = gated(name)
    model.set_attn_implementation(implementation)
    given = inputs(name)
    found = logits(model, given)
    # Row by row, with a prefix whose keys and values were multiplied by what the gate says of that row there.
    seen: dict[str, torch.Tensor] = {}
    hooks = [
        model.get_submodule(site.path).register_forward_pre_hook(
            lambda m, args, kwargs, path=site.path: seen.__setitem__(
                path, args[0] if args else kwargs["hidden_states"]
            ),
            with_kwargs=True,
        )
        for site in deltahub.deltas(model)["p"].sites
    ]
    logits(model, given)
    for hook in hooks:
        hook.remove()
    for row in range(3):
        plain = fresh(name)
        plain.set_attn_implementation(implementation)
        delta = deltahub.attach(plain, "prefix", TARGETS[name], length=3)
        for site, other in zip(deltahub.deltas(model)["p"].sites, delta.sites, strict=True):
            key, value, gate, bias = site.tensors()
            open_ = torch.sigmoid(seen[site.path][row] @ gate + bias).mean()
            other.tensors()[0].data, other.tensors()[1].data = (open_ * key).detach(), (open_ * value).detach()
        assert torch.allclose(logits(plain, given)[row], found[row], atol=1e-5)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_rows_of_a_batch_with_gates_and_prefixes_of_their_own(name: str) -> None:
    model = gated(name, "a", length=2)
    randomise(deltahub.attach(model, "gated-prefix", TARGETS[name], name="b", length=4).parameters(), seed=3)
    randomise(deltahub.attach(model, "prefix", TARGETS[name], name="c", length=1).parameters(), seed=4)
    rows = ["b", None, ["a", "c"], "c"]
    given = inputs(name, batch=4)
    alone = []
    for i, row in enumerate(rows):
        with deltahub.using(model, *([row] if isinstance(row, str) else row or [])):
            alone.append(logits(model, given)[i])
    with deltahub.using(model, rows):
        assert torch.allclose(logits(model, given), torch.stack(alone), atol=1e-5)


@pytest.mark.parametrize("preset", ["mam", "unipelt"])
@pytest.mark.parametrize("name", MODELS)
def test_presets_train_save_and_load(name: str, preset: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    delta = (
        presets.attach_preset(model, preset, bottleneck=4, length=3, hidden=5, seed=0)
        if preset == "mam"
        else (presets.attach_preset(model, preset, bottleneck=4, length=3, rank=2, seed=0))
    )
    assert delta.name == preset
    assert delta.parts[0].name == "prefix"
    randomise(delta.parameters())
    given = inputs(name)
    expected = logits(model, given)
    given_labels = {**given, "labels": torch.arange(3)} if name == "bert" else {**given, "labels": given["input_ids"]}
    given_labels.pop("decoder_input_ids", None)
    model(**given_labels).loss.backward()
    assert all(p.grad is not None for p in delta.parameters())
    delta.save(tmp_path / "p")
    again = deltahub.load(tmp_path / "p", backbone=MODELS[name]())
    assert torch.allclose(logits(again, given), expected, atol=1e-5)
    with deltahub.using(again):
        assert not torch.allclose(logits(again, given), expected, atol=1e-4)
    delta.detach()
    assert torch.equal(logits(model, given), logits(MODELS[name](), given))


def test_a_preset_refuses_config_values_that_none_of_its_kinds_has() -> None:
    with pytest.raises(DeltaHubError) as caught:
        presets.attach_preset(bert_classifier(), "mam", rank=3)
    assert caught.value.code == "E_USAGE_PRESET"
    assert not deltahub.deltas(bert_classifier())


def test_gated_prefixes_generate_compile_and_hold_nothing_back() -> None:
    model = gated("llama")
    words = model.generate(ids(2, 5), max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert words.shape == (2, 9)
    x = ids(2, 5)
    expected = logits(model, {"input_ids": x})
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.allclose(compiled(input_ids=x, use_cache=False).logits, expected, atol=1e-5)
    program = torch.export.export(model, (), {"input_ids": x, "use_cache": False})
    assert torch.allclose(program.module()(input_ids=x, use_cache=False).logits, expected, atol=1e-5)
    assert all(m._deltahub.seen.x is None for m in model.modules() if hasattr(m, "_deltahub"))
