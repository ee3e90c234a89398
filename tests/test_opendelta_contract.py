"""What OpenDelta promises, line by line: its matrix, its own nine steps, its rules of names, and its known faults.

Its matrix is 8 types of delta × 5 backbones × 2 scenarios; with current transformers it passes 61 of the 80 cells.
"""

from __future__ import annotations

import copy
import functools
import gc
import inspect
import pickle
import re
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deltahub
from deltahub.errors import DeltaHubError, TargetError
from tests.models import bert_classifier, gpt2, ids
from tests.test_attending import t5
from tests.zoo import randomise

pytestmark = pytest.mark.filterwarnings("ignore")

TYPES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "lora": ("lora", {"rank": 4, "scale": 2.0}),
    "adapter": ("adapter", {"bottleneck": 6}),
    "bitfit": ("bias", {}),
    "compacter": ("compacter", {"bottleneck": 8, "division": 4}),
    "low_rank_adapter": ("low-rank-adapter", {"bottleneck": 4}),
    "parallel_adapter": ("parallel-adapter", {"bottleneck": 6}),
    "prefix": ("prefix", {"length": 3, "reparametrised": True, "hidden": 8}),
    "soft_prompt": ("prompt", {"length": 4}),
}


def roberta() -> nn.Module:
    from transformers import RobertaConfig, RobertaForSequenceClassification

    torch.manual_seed(0)
    config = RobertaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=99,
        max_position_embeddings=64, num_labels=3,
    )  # fmt: skip
    return RobertaForSequenceClassification(config).eval()


def opt() -> nn.Module:
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    config = OPTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48, vocab_size=99,
        max_position_embeddings=64, word_embed_proj_dim=32,
    )  # fmt: skip
    return OPTForCausalLM(config).eval()


BACKBONES: Mapping[str, Callable[[], nn.Module]] = {
    "bert": bert_classifier,
    "roberta": roberta,
    "gpt2": gpt2,
    "t5": t5,
    "opt": opt,
}


class Two(nn.Module):
    """Two backbones in one module, as OpenDelta's ``user_defined.py`` wraps them."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first = first
        self.second = second

    def forward(self, **given: Tensor) -> Tensor:
        return self.first(**given).logits + 0.5 * self.second(**given).logits


@functools.cache
def _made(name: str) -> nn.Module:
    return BACKBONES[name]()


def fresh(name: str) -> nn.Module:
    """A backbone whose weights make it listen: a fresh one hardly sees what is added to it."""
    model = copy.deepcopy(_made(name))
    with torch.no_grad():
        for path, p in model.named_parameters():
            if p.ndim == 2 and name != "t5" and not any(word in path for word in ("embed", "wte", "wpe", "lm_head")):
                p.mul_(6)
    return model


def wrapped(name: str) -> nn.Module:
    return Two(fresh(name), fresh(name))


def given(name: str) -> dict[str, Tensor]:
    found = {"input_ids": ids(2, 5) % 90 + 3, "attention_mask": torch.ones(2, 5, dtype=torch.long)}
    found["attention_mask"][0, 4:] = 0
    return found | ({"decoder_input_ids": ids(2, 4, seed=8)} if name == "t5" else {})


@torch.no_grad()
def output(model: nn.Module, name: str) -> Tensor:
    found = model(**given(name))
    return found if isinstance(found, Tensor) else found.logits


def attached(model: nn.Module, delta: str, **options: Any) -> deltahub.Delta:
    """A delta of one of OpenDelta's types where its defaults put it, with values as if trained."""
    kind, config = TYPES[delta]
    found = deltahub.attach(model, kind, seed=1, **config, **options)
    randomise(found.parameters())
    return found


# --- the matrix: 8 × 5 × 2


@pytest.mark.parametrize("scenario", [fresh, wrapped])
@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("delta", TYPES)
def test_every_cell_of_the_matrix(delta: str, backbone: str, scenario: Any, tmp_path: Path) -> None:
    model = scenario(backbone)
    plain, keys = output(model, backbone), list(model.state_dict())
    found = attached(model, delta)
    changed = output(model, backbone)
    assert changed.shape == plain.shape
    assert not torch.allclose(changed, plain, atol=1e-4)
    assert found.num_parameters() > 0
    if scenario is wrapped:
        assert {site.path.partition(".")[0] for site in found.sites} == {"first", "second"}
    assert list(model.state_dict()) == keys
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in found.parameters()}
    found.save(tmp_path / "delta")
    again = deltahub.load(tmp_path / "delta", backbone=scenario(backbone))
    assert torch.allclose(output(again, backbone), changed, atol=1e-6)
    found.detach()
    assert torch.equal(output(model, backbone), plain)
    assert all(p.requires_grad for p in model.parameters())


# --- must_try.py: load, freeze, log, save, reload, detach, wrapped defaults, a regular expression, the optimiser


def test_a_wrapper_of_a_wrapper_has_the_defaults_of_its_backbone() -> None:
    class Wrapped(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.matrix = nn.Linear(3, 3)
            self.inner = inner

    model = Wrapped(Wrapped(t5()))
    found = deltahub.attach(model, "lora", rank=8)
    assert len(found.sites) == 8  # q and v of two layers of the encoder and of the decoder's own attention
    assert all(site.path.startswith("inner.inner.") for site in found.sites)


def test_a_regular_expression_becomes_a_function_or_a_glob() -> None:
    pattern = re.compile(r"decoder.*(0|1).*DenseReluDense\.wi")
    one = deltahub.attach(t5(), "lora", lambda path, module: bool(pattern.fullmatch(path)), rank=5)
    two = deltahub.attach(t5(), "lora", "decoder.**.DenseReluDense.wi", rank=5)
    three = deltahub.attach(t5(), "lora", "decoder.block.{0..1}.layer.2.DenseReluDense.wi", rank=5)
    assert len(one.sites) == 2
    assert [s.path for s in one.sites] == [s.path for s in two.sites] == [s.path for s in three.sites]


def test_the_optimiser_gets_the_delta_and_what_is_trained_beside_it() -> None:
    model = bert_classifier()
    found = deltahub.attach(model, "lora", rank=2)
    head = deltahub.attach(model, "assign", "classifier", name="head")
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    held = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    assert held == found.num_parameters() + head.num_parameters() == sum(p.numel() for p in trained)
    assert f"{found.num_parameters():,} parameters" in repr(found)
    model(input_ids=ids(), labels=torch.tensor([0, 1])).loss.backward()
    assert all(p.grad is None for n, p in model.named_parameters() if not p.requires_grad)
    found.requires_grad_(False)  # freezing twice, or one delta of two, is no error
    found.requires_grad_(False)
    assert all(p.requires_grad for p in head.parameters())


@pytest.mark.parametrize(
    ("delta", "config", "count"),
    [
        ("lora", {"rank": 8}, 589_824),
        ("adapter", {"bottleneck": 24}, 1_807_488),
        ("bias", {}, 202_752),
        ("low-rank-adapter", {"bottleneck": 24}, 114_048),
        ("compacter", {"bottleneck": 48, "division": 4}, 123_648),
        ("prompt", {"length": 100}, 76_800),
    ],
)
def test_as_many_parameters_as_with_opendelta(delta: str, config: dict[str, Any], count: int) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    with torch.device("meta"):
        model = BertForSequenceClassification(BertConfig(num_hidden_layers=24))
    found = deltahub.attach(model, delta, exclude="embeddings.LayerNorm", **config)
    assert found.num_parameters() == count


# --- rules of names


def test_names_end_at_dots_and_match_something() -> None:
    model = nn.ModuleDict({f"layer{i}": nn.ModuleDict({"query": nn.Linear(2, 2)}) for i in (1, 10, 11)})
    assert [s.path for s in deltahub.attach(model, "lora", "layer1.query", name="a", rank=1).sites] == ["layer1.query"]
    with pytest.raises(TargetError) as caught:
        deltahub.attach(model, "lora", "uery", name="b", rank=1)
    assert caught.value.code == "E_TARGET_NOTHING"
    with pytest.raises(TargetError) as near:
        deltahub.attach(model, "lora", "querry", name="b", rank=1)
    assert "query" in str(near.value)
    kept = deltahub.attach(model, "lora", "query", name="c", exclude="layer1.**", rank=1)
    assert [s.path for s in kept.sites] == ["layer10.query", "layer11.query"]


def test_exclusions_hold_for_every_kind_and_types_and_roles_are_names_too() -> None:
    for delta in ("lora", "adapter", "bias"):
        config = {"rank": 1} if delta == "lora" else {"bottleneck": 2} if delta == "adapter" else {}
        found = deltahub.attach(bert_classifier(), delta, exclude="layer.0.**", **config)
        assert not [s.path for s in found.sites if ".layer.0." in s.path]
    by_type = deltahub.attach(bert_classifier(), "lora", "type:Linear", exclude=["classifier", "pooler.**"], rank=1)
    assert len(by_type.sites) == 12
    by_role = deltahub.attach(gpt2(), "lora", "role:attention.qkv", rank=1)
    assert [s.path for s in by_role.sites] == [f"transformer.h.{i}.attn.c_attn" for i in range(2)]
    head = deltahub.attach(gpt2(), "assign", "lm_head")
    assert head.num_parameters() > 0


def test_settings_that_mean_nothing_are_refused() -> None:
    for options in ({"lora_rank": 4}, {"rank": 0}, {"rank": 4, "scaled": 2}):
        with pytest.raises(DeltaHubError) as caught:
            deltahub.attach(bert_classifier(), "lora", **options)
        assert caught.value.code == "E_KIND_CONFIG"


# --- what it documents, and what its own code fails


@pytest.mark.parametrize("delta", ["lora", "adapter", "bitfit", "compacter", "low_rank_adapter", "parallel_adapter"])
def test_a_fresh_delta_leaves_the_backbone_as_it_is(delta: str) -> None:
    model = fresh("t5")
    plain = output(model, "t5")
    kind, config = TYPES[delta]
    found = deltahub.attach(model, kind, **config)
    assert torch.allclose(output(model, "t5"), plain, atol=1e-6)
    before = found.num_parameters()
    output(model, "t5")
    assert found.num_parameters() == before  # none appears with the first forward pass


def test_many_tasks_served_by_attaching_and_detaching(tmp_path: Path) -> None:
    """One backbone, a package for each task, requests in any order; OpenDelta cannot attach again what it detached."""
    expected, tasks = {}, ("lora", "adapter", "bitfit", "prefix")
    for i, task in enumerate(tasks):
        model = fresh("bert")
        kind, config = TYPES[task]
        randomise(deltahub.attach(model, kind, name=task, **config).parameters(), seed=i)
        expected[task] = output(model, "bert")
        deltahub.deltas(model)[task].save(tmp_path / task)
    model = fresh("bert")
    plain = output(model, "bert")
    for task in (*tasks, *reversed(tasks), "adapter"):
        deltahub.load(tmp_path / task, backbone=model, name=task)
        assert torch.allclose(output(model, "bert"), expected[task], atol=1e-6)
        deltahub.deltas(model)[task].detach()
        assert torch.equal(output(model, "bert"), plain)
    for task in tasks:
        deltahub.load(tmp_path / task, backbone=model, name=task)
        deltahub.deltas(model)[task].disable()
    for task in ("prefix", "lora", "prefix", "bitfit", "adapter"):
        with deltahub.using(model, task):
            assert torch.allclose(output(model, "bert"), expected[task], atol=1e-6)
    assert torch.equal(output(model, "bert"), plain)
    rows = [*tasks[:3], None]
    four = {key: value[:1].repeat(4, 1) for key, value in given("bert").items()}
    with deltahub.using(model, rows), torch.no_grad():
        mixed = model(**four).logits
    for row, task in enumerate(rows):
        want = plain[0] if task is None else expected[task][0]
        assert torch.allclose(mixed[row], want, atol=1e-5)


def test_detaching_a_delta_that_came_first_and_saving_one_of_two(tmp_path: Path) -> None:
    model = fresh("bert")
    plain = output(model, "bert")
    first, second = attached(model, "lora", name="first"), attached(model, "adapter", name="second")
    with deltahub.using(model, "second"):
        alone = output(model, "bert")
    second.save(tmp_path / "second")
    first.detach()
    assert torch.equal(output(model, "bert"), alone)
    second.detach()
    assert torch.equal(output(model, "bert"), plain)
    assert not [name for name in vars(model.bert.encoder.layer[0].attention.self.query) if name == "forward"]
    again = deltahub.load(tmp_path / "second", backbone=model, name="second")
    assert torch.allclose(output(again, "bert"), alone, atol=1e-6)
    assert list(deltahub.deltas(again)) == ["second"]


def test_copies_are_copies_and_everything_pickles() -> None:
    model = fresh("bert")
    attached(model, "lora")
    expected = output(model, "bert")
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.bert.encoder.layer[0].attention.self.query.weight.zero_()
    assert torch.equal(output(model, "bert"), expected)
    assert not torch.equal(output(other, "bert"), expected)
    assert torch.equal(output(pickle.loads(pickle.dumps(model)), "bert"), expected)


@pytest.mark.parametrize("delta", TYPES)
def test_signature_state_and_the_callers_tensors_stay(delta: str) -> None:
    model = fresh("bert")
    signature, state = inspect.signature(model.forward), copy.deepcopy(model.state_dict())
    attached(model, delta)
    assert inspect.signature(model.forward) == signature
    inputs = given("bert")
    before = {key: value.clone() for key, value in inputs.items()}
    model(**inputs)
    assert all(torch.equal(value, before[key]) and value.shape == before[key].shape for key, value in inputs.items())
    model.load_state_dict(state, strict=True)


@pytest.mark.parametrize("delta", TYPES)
def test_bfloat16_is_attached_saved_and_loaded(delta: str, tmp_path: Path) -> None:
    model = fresh("t5").bfloat16()
    found = attached(model, delta)
    assert {p.dtype for p in found.parameters()} == {torch.bfloat16}
    expected = output(model, "t5")
    found.save(tmp_path / "delta")
    again = deltahub.load(tmp_path / "delta", backbone=fresh("t5").bfloat16())
    assert torch.allclose(output(again, "t5").float(), expected.float(), atol=0.05)


@pytest.mark.parametrize("delta", ["prefix", "soft_prompt", "lora", "parallel_adapter"])
def test_gpt2_generates(delta: str) -> None:
    model = fresh("gpt2")
    attached(model, delta)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    tokens = model.generate(**given("gpt2"), **options)
    assert tokens.shape == (2, 9)
    assert torch.equal(model.generate(**given("gpt2"), **options, use_cache=False), tokens)


def test_another_backbone_is_refused_before_anything_changes(tmp_path: Path) -> None:
    model = fresh("bert")
    attached(model, "lora").save(tmp_path / "delta")
    wrong = bert_classifier(seed=9)
    keys = {name: type(module) for name, module in wrong.named_modules()}
    with pytest.raises(DeltaHubError) as caught:
        deltahub.load(tmp_path / "delta", backbone=wrong)
    assert caught.value.code == "E_BACKBONE_MISMATCH"
    assert {name: type(module) for name, module in wrong.named_modules()} == keys


def test_ranks_above_one_and_factors_count() -> None:
    model = fresh("bert")
    deep = deltahub.attach(model, "low-rank-adapter", bottleneck=8, rank=3)
    randomise(deep.parameters())
    assert output(model, "bert").isfinite().all()
    deep.detach()
    found = {}
    for scale in (1.0, 4.0):
        delta = deltahub.attach(model, "parallel-adapter", bottleneck=4, scale=scale, seed=1)
        randomise(delta.parameters())
        found[scale] = output(model, "bert")
        delta.detach()
    assert not torch.allclose(found[1.0], found[4.0], atol=1e-3)


# --- composing for ever


def test_adding_removing_and_reordering_leaves_nothing_behind() -> None:
    model = fresh("bert")
    modules, plain = list(model.named_modules()), output(model, "bert")
    gone: list[weakref.ref[Any]] = []
    for turn in range(6):
        names = ["lora", "adapter", "bitfit", "prefix"]
        for name in names:
            found = attached(model, name, name=name)
            gone += [weakref.ref(p) for p in found.parameters()] + [weakref.ref(site) for site in found.sites]
        for order in (names, names[::-1], names[turn % 4 :], [names[turn % 4]]):
            with deltahub.using(model, *order):
                output(model, "bert")
        with deltahub.using(model, [names[turn % 4], None]):
            output(model, "bert")
        for name in (*names[turn % 4 :], *names[: turn % 4]):
            deltahub.deltas(model)[name].detach()
        del found
    assert [name for name, _ in model.named_modules()] == [name for name, _ in modules]
    assert all(type(a) is type(b) for (_, a), (_, b) in zip(model.named_modules(), modules, strict=True))
    assert not [name for name, module in modules for name in vars(module) if "deltahub" in name]
    assert torch.equal(output(model, "bert"), plain)
    gc.collect()
    assert not [ref for ref in gone if ref() is not None]


def test_switching_again_and_again_keeps_a_bounded_number_of_plans() -> None:
    model = fresh("bert")
    names = [attached(model, "lora", name=f"d{i}").name for i in range(6)]
    slot = model.bert.encoder.layer[0].attention.self.query._deltahub

    def held() -> int:
        return sum(len(value) for value in vars(slot).values() if isinstance(value, dict))

    sizes = []
    for turn in range(3):
        for i in range(64):
            chosen = [name for bit, name in enumerate(names) if i >> bit & 1]
            with deltahub.using(model, *(chosen if turn % 2 else chosen[::-1])):
                output(model, "bert") if i % 16 == 0 else None
        sizes.append(held())
    assert sizes[-1] <= sizes[1]
