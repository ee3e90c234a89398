"""Several deltas on one model: order, switching, conflicts, and leaving in any order."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

import deltahub
from deltahub.errors import InjectionError, UsageError
from tests.models import bert_classifier, ids, llama
from tests.zoo import Block, randomise


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids()).logits


def three(model: nn.Module) -> list[deltahub.Delta]:
    found = [
        deltahub.attach(model, "lora", "query", name="a", rank=2, seed=1),
        deltahub.attach(model, "adapter", ["query", "output.dense"], name="b", bottleneck=3, seed=2),
        deltahub.attach(model, "lora", ["query", "value"], name="c", rank=3, scale=0.5, seed=3),
    ]
    for i, delta in enumerate(found):
        randomise(delta.parameters(), seed=10 + i)
    return found


@pytest.mark.parametrize("order", list(itertools.permutations("abc")))
def test_detaching_in_any_order_restores_the_rest_exactly(order: tuple[str, ...]) -> None:
    model = bert_classifier()
    plain = logits(model)
    three(model)
    left = ["a", "b", "c"]
    for name in order:
        left.remove(name)
        with deltahub.using(model, *left):
            expected = logits(model)
        deltahub.deltas(model)[name].detach()
        assert torch.equal(logits(model), expected)
    assert torch.equal(logits(model), plain)
    assert all(p.requires_grad for p in model.parameters())
    assert not [n for n, _ in model.named_modules() if "deltahub" in n]


def test_a_mergeable_delta_acts_on_the_weight_whatever_stands_before_it() -> None:
    model = bert_classifier()
    a, b, c = three(model)
    live = logits(model)
    a.merge()
    assert (logits(model) - live).abs().max() < 1e-5
    c.merge()
    assert (logits(model) - live).abs().max() < 1e-5
    c.unmerge()
    a.unmerge()
    assert torch.equal(logits(model), live)
    assert not b.merged


def test_merging_the_second_before_the_first_is_refused() -> None:
    model = bert_classifier()
    _, _, c = three(model)
    live = logits(model)
    with pytest.raises(InjectionError) as caught:
        c.merge()
    assert caught.value.code == "E_INJECTION_MERGE_ORDER"
    assert torch.equal(logits(model), live)
    assert not any(site.merged for d in deltahub.deltas(model).values() for site in d.sites)


def test_a_later_delta_that_reads_the_weight_sees_the_earlier_one() -> None:
    """A kind with a weight equation only, after a LoRA: live and merged agree in either state of the first."""
    document = {
        "kind": "org.example.square", "version": 1, "hosts": ["linear"], "identity": False,
        "tensors": {"gain": {"shape": ["out", "in"], "init": "normal(0.1)"}},
        "equations": {"weight": "W + gain * W * W"},
    }  # fmt: skip
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5))
    a = deltahub.attach(model, "lora", "0", name="a", rank=2, seed=1)
    randomise(a.parameters())
    b = deltahub.attach(model, document, "0", name="b", seed=2)
    x = torch.randn(3, 6)
    live = model(x)
    down, up = a.tensors()["a/0/down"], a.tensors()["a/0/up"]
    weight = model[0].weight + up @ down
    weight = weight + b.tensors()["b/0/gain"] * weight * weight
    assert torch.allclose(live, x @ weight.T + model[0].bias, atol=1e-5)
    a.merge()
    b.merge()
    assert torch.allclose(model(x), live, atol=1e-5)


def test_using_restores_what_was_active_even_after_an_error() -> None:
    model = bert_classifier()
    three(model)
    before = logits(model)
    with pytest.raises(RuntimeError, match="in between"), deltahub.using(model, "a"):
        raise RuntimeError("in between")
    assert torch.equal(logits(model), before)
    with pytest.raises(InjectionError) as caught, deltahub.using(model, "aa"):
        pass
    assert caught.value.code == "E_INJECTION_UNKNOWN"
    assert "'a'" in str(caught.value)
    with deltahub.using(model):
        assert torch.equal(logits(model), logits(bert_classifier()))


def test_two_heads_conflict_only_while_both_act() -> None:
    model = bert_classifier()
    one = deltahub.attach(model, "assign", "classifier", name="one")
    before = logits(model)
    with pytest.raises(InjectionError) as caught:
        deltahub.attach(model, "assign", "classifier", name="two")
    assert caught.value.code == "E_INJECTION_CONFLICT"
    assert list(deltahub.deltas(model)) == ["one"]
    assert torch.equal(logits(model), before)
    one.disable()
    two = deltahub.attach(model, "assign", "classifier", name="two")
    randomise(two.parameters())
    with deltahub.using(model, "one"):
        assert torch.equal(logits(model), before)
    with pytest.raises(InjectionError):
        one.enable()
    assert two.active


def test_scale_multiplies_the_effect() -> None:
    model = nn.Sequential(nn.Linear(6, 5))
    delta = deltahub.attach(model, "lora", "0", rank=2, scale=2.0)
    randomise(delta.parameters())
    x = torch.randn(3, 6)
    bare = nn.Sequential(nn.Linear(6, 5))
    bare.load_state_dict(model.state_dict())
    effect = model(x) - bare(x)
    delta.scale = 0.25
    assert torch.allclose(model(x), bare(x) + 0.25 * effect, atol=1e-5)
    delta.merge()
    assert torch.allclose(model(x), bare(x) + 0.25 * effect, atol=1e-5)
    delta.scale = 1.0
    assert delta.merged
    assert torch.allclose(model(x), bare(x) + effect, atol=1e-5)
    for bad in (float("nan"), float("inf")):
        with pytest.raises(UsageError):
            delta.scale = bad


def test_one_name_twice_is_refused() -> None:
    model = llama()
    deltahub.attach(model, "lora", "q_proj", rank=2)
    with pytest.raises(InjectionError) as caught:
        deltahub.attach(model, "lora", "v_proj", rank=2)
    assert caught.value.code == "E_INJECTION_NAME_TAKEN"


def test_a_part_of_a_model_with_deltas_is_not_a_second_root() -> None:
    model = llama()
    deltahub.attach(model, "lora", "q_proj", rank=2)
    with pytest.raises(InjectionError) as caught:
        deltahub.attach(model.model, "lora", "q_proj", name="inner", rank=2)
    assert caught.value.code == "E_INJECTION_NESTED"


def test_generate_and_caches_work_with_live_deltas() -> None:
    model = llama()
    delta = deltahub.attach(model, "lora", "role:attention.query", rank=2, scale=3.0)
    randomise(delta.parameters())
    live = model.generate(ids(1, 4), max_new_tokens=8, do_sample=False, pad_token_id=0)
    delta.merge()
    assert torch.equal(model.generate(ids(1, 4), max_new_tokens=8, do_sample=False, pad_token_id=0), live)


def test_a_block_called_with_keywords_and_more_outputs() -> None:
    model = nn.ModuleDict({"block": Block(6)})
    delta = deltahub.attach(model, "adapter", "block", bottleneck=2)
    randomise(delta.parameters())
    x = torch.randn(2, 3, 6)
    y, inner = model["block"](x, 2.0)
    again, inner_again = model["block"](hidden_states=x, scale=2.0)
    assert torch.equal(y, again)
    assert torch.equal(inner, inner_again)
    with deltahub.using(model):
        assert not torch.equal(model["block"](x, 2.0)[0], y)
        assert torch.equal(model["block"](x, 2.0)[1], inner)


def test_dropout_acts_on_the_deltas_own_input_while_training() -> None:
    model = nn.Sequential(nn.Linear(50, 5))
    delta = deltahub.attach(model, "lora", "0", rank=4, dropout=0.5)
    randomise(delta.parameters())
    x = torch.randn(2, 50)
    model.eval()
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))


def test_a_scale_changes_under_compilation_without_a_graph_break() -> None:
    model = nn.Sequential(nn.Linear(6, 5))
    delta = deltahub.attach(model, "lora", "0", rank=2)
    randomise(delta.parameters())
    x = torch.randn(3, 6)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for scale in (1.0, 0.5, 2.0, 0.0):
        delta.scale = scale
        assert torch.allclose(compiled(x), model(x), atol=1e-6)
