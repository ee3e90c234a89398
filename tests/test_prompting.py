"""Prompts: learned embeddings before those of a transformer's tokens, on five architectures."""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deltahub
from deltahub import prompting
from deltahub.errors import DeltaHubError
from tests.models import bert_classifier, gpt2, ids, llama
from tests.test_attending import bart, t5
from tests.zoo import randomise

pytestmark = pytest.mark.filterwarnings("ignore")

MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "bert": (bert_classifier, "SEQ_CLS"),
    "gpt2": (gpt2, "CAUSAL_LM"),
    "llama": (llama, "CAUSAL_LM"),
    "t5": (t5, "SEQ_2_SEQ_LM"),
    "bart": (bart, "SEQ_2_SEQ_LM"),
}
LENGTH = 4


def batch(name: str, rows: int = 3, length: int = 6, *, labels: bool = False) -> dict[str, Tensor]:
    given = {"input_ids": ids(rows, length), "attention_mask": torch.ones(rows, length, dtype=torch.long)}
    task = MODELS[name][1]
    if labels:
        given["labels"] = torch.arange(rows) if task == "SEQ_CLS" else ids(rows, length, seed=9)
    elif task == "SEQ_2_SEQ_LM":
        given["decoder_input_ids"] = ids(rows, 4, seed=9)
    return given


def prompted(name: str, length: int = LENGTH, delta: str = "p", **options: Any) -> nn.Module:
    model = MODELS[name][0]()
    randomise(deltahub.attach(model, "prompt", name=delta, length=length, seed=1, **options).parameters())
    return model


@torch.no_grad()
def run(model: nn.Module, given: dict[str, Tensor]) -> Tensor:
    found: Tensor = model(**given).logits
    return found


def code_of(call: Callable[[], Any]) -> str:
    with pytest.raises(DeltaHubError) as caught:
        call()
    return caught.value.code


# ------------------------------------------------------------------------------------------------ masks, positions


@pytest.mark.parametrize("name", MODELS)
def test_no_mask_is_a_mask_of_ones_and_embeddings_are_as_good_as_tokens(name: str) -> None:
    model = prompted(name)
    given = batch(name)
    expected = run(model, given)
    rest = {k: v for k, v in given.items() if k != "attention_mask"}
    assert torch.allclose(run(model, rest), expected, atol=1e-5)
    tokens = rest.pop("input_ids")
    embedded = model.get_input_embeddings()(tokens).detach()
    with_embeddings = {**rest, "inputs_embeds": embedded}
    assert torch.allclose(run(model, with_embeddings), expected, atol=1e-5)
    with deltahub.using(model):
        bare = run(model, {**rest, "inputs_embeds": embedded})
        assert torch.equal(bare, run(MODELS[name][0](), {**rest, "inputs_embeds": embedded}))
        assert not torch.allclose(bare, expected, atol=1e-3)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_positions_and_types_of_the_caller_are_behind_those_of_the_prompt(name: str) -> None:
    model = prompted(name)
    given = batch(name)
    positions = torch.arange(6)[None]
    assert torch.allclose(run(model, {**given, "position_ids": positions}), run(model, given), atol=1e-5)
    assert not torch.allclose(run(model, {**given, "position_ids": positions + 3}), run(model, given), atol=1e-5)
    if name == "bert":
        types = torch.zeros(3, 6, dtype=torch.long)
        assert torch.equal(run(model, {**given, "token_type_ids": types}), run(model, given))
        assert not torch.allclose(run(model, {**given, "token_type_ids": types + 1}), run(model, given), atol=1e-5)


def test_padding_changes_nothing() -> None:
    model = prompted("bert")
    given = batch("bert")
    longer = {k: nn.functional.pad(v, (0, 2)) for k, v in given.items()}
    assert torch.allclose(run(model, longer), run(model, given), atol=1e-5)


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
def test_hidden_states_are_those_of_the_tokens(name: str) -> None:
    model = prompted(name)
    given = batch(name, labels=True)
    out = model(**given, output_hidden_states=True)
    assert {h.shape[1] for h in out.hidden_states} == {6}
    values = model(**given, return_dict=False)
    assert torch.equal(values[0], out.loss)
    assert torch.equal(values[1], out.logits)


# ---------------------------------------------------------------------------------------------------- generation

OPTIONS: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def loud(name: str, **options: Any) -> nn.Module:
    """One whose words depend on what it is told."""
    model = prompted(name, **options)
    with torch.no_grad():
        for path, p in model.named_parameters():
            if p.ndim == 2 and "deltahub" not in path and not any(w in path for w in ("embed", "shared", "wte", "wpe")):
                p.mul_({"bart": 15.0}.get(name, 3.0))
    return model


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("name", ["gpt2", "llama", "t5", "bart"])
def test_generate_with_and_without_a_cache(name: str, beams: int, implementation: str) -> None:
    targets = ["role:encoder", "role:decoder"] if name in {"t5", "bart"} else None
    model = loud(name, targets=targets)
    model.set_attn_implementation(implementation)
    given = {k: v for k, v in batch(name).items() if k != "decoder_input_ids"}
    cached = model.generate(**given, **OPTIONS, num_beams=beams)
    assert torch.equal(model.generate(**given, **OPTIONS, num_beams=beams, use_cache=False), cached)
    with deltahub.using(model):
        assert not torch.equal(model.generate(**given, **OPTIONS, num_beams=beams), cached)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_rows_padded_on_the_left_say_what_they_say_alone(name: str) -> None:
    model = loud(name)
    whole = model.generate(ids(1, 4), **OPTIONS)[0, 4:]
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids(1, 4)], 1)
    given = torch.cat([padded, ids(2, 7, seed=3)])
    mask = torch.ones_like(given)
    mask[0, :3] = 0
    assert torch.equal(model.generate(given, attention_mask=mask, **OPTIONS)[0, 7:], whole)


def test_a_cache_of_other_deltas_and_masks_that_were_made_already_are_refused() -> None:
    model = prompted("llama")
    with deltahub.using(model):
        cache = model(input_ids=ids(1, 5)).past_key_values
    step = {"input_ids": ids(1, 1), "attention_mask": torch.ones(1, 6), "past_key_values": cache}
    assert code_of(lambda: model(**step)) == "E_HOST_PROMPT"
    whole = {"input_ids": ids(1, 3), "attention_mask": torch.zeros(1, 1, 3, 3)}
    assert code_of(lambda: model(**whole)) == "E_HOST_PROMPT"
    static = {"cache_implementation": "static", "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    assert code_of(lambda: model.generate(ids(1, 3), **OPTIONS, **static, disable_compile=True)) == "E_HOST_PROMPT"


# --------------------------------------------------------------------------------------------------- composition


@pytest.mark.parametrize("name", MODELS)
def test_rows_of_a_batch_have_prompts_of_different_lengths(name: str) -> None:
    targets = ["role:encoder", "role:decoder"] if name == "t5" else None
    model = prompted(name, 2, "a", targets=targets)
    randomise(deltahub.attach(model, "prompt", targets, name="b", length=5, start="tokens").parameters(), seed=4)
    given = batch(name, rows=4)
    given["attention_mask"][1, -2:] = 0
    rows: list[Any] = ["b", None, "a", ["a", "b"]]
    alone = []
    for i, row in enumerate(rows):
        with deltahub.using(model, *([row] if isinstance(row, str) else row or [])):
            alone.append(run(model, given)[i])
    expected = torch.stack(alone)
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        for options in (given, {k: v for k, v in given.items() if k != "attention_mask"}):
            with deltahub.using(model, rows):
                found = run(model, options)
            kept = [0, 2, 3] if "attention_mask" not in options else range(4)
            assert all(torch.allclose(found[i], expected[i], atol=1e-5) for i in kept)


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
def test_rows_with_prompts_of_their_own_generate_and_have_a_loss(name: str) -> None:
    model = loud(name, length=2, delta="a")
    randomise(deltahub.attach(model, "prompt", name="b", length=5, start="tokens").parameters(), seed=4)
    given = {k: v for k, v in batch(name, rows=3).items() if k != "decoder_input_ids"}
    alone, losses = [], []
    labels = batch(name, rows=3, labels=True)["labels"]
    for i, row in enumerate(["b", None, "a"]):
        one = {k: v[i : i + 1] for k, v in given.items()}
        with deltahub.using(model, *([row] if row else [])):
            alone.append(model.generate(**one, **OPTIONS)[0])
            losses.append(model(**one, labels=labels[i : i + 1]).loss)
    with deltahub.using(model, ["b", None, "a"]):
        assert torch.equal(model.generate(**given, **OPTIONS), torch.stack(alone))
        counted = model(**given, labels=labels).loss
    counts = torch.tensor([6.0, 6.0 if name == "t5" else 5.0, 6.0])  # nothing foretells a first token without a prompt
    assert torch.allclose(counted, (torch.stack(losses) * counts).sum() / counts.sum(), atol=1e-5)


def test_rows_of_a_transformer_that_counts_its_positions_need_prompts_of_one_length() -> None:
    model = prompted("bart", 2, "a", targets="role:decoder")
    deltahub.attach(model, "prompt", "role:decoder", name="b", length=3)
    with deltahub.using(model, ["a", "b"]):
        assert code_of(lambda: run(model, batch("bart", rows=2))) == "E_HOST_PROMPT"
    with deltahub.using(model, ["b", "b"]):
        run(model, batch("bart", rows=2))


def test_several_prompts_stand_one_before_the_other() -> None:
    model = prompted("llama", 2, "one")
    randomise(deltahub.attach(model, "prompt", name="two", length=3).parameters(), seed=4)
    both = run(model, batch("llama"))
    one, two = (deltahub.deltas(model)[n].sites[0].tensors()[0].detach() for n in ("one", "two"))
    again = llama()
    deltahub.attach(again, "prompt", length=5).sites[0].tensors()[0].data = torch.cat([two, one])
    assert torch.allclose(run(again, batch("llama")), both, atol=1e-6)
    deltahub.deltas(model)["two"].scale = 0.0
    deltahub.deltas(model)["one"].scale = 0.0
    assert torch.equal(run(model, batch("llama")), run(llama(), batch("llama")))
    assert code_of(lambda: setattr(deltahub.deltas(model)["one"], "scale", 0.5)) == "E_USAGE_SCALE"


def test_beside_other_kinds_on_the_same_transformer() -> None:
    model = prompted("gpt2")
    randomise(deltahub.attach(model, "lora", "c_attn", rank=2, name="lora").parameters(), seed=2)
    randomise(deltahub.attach(model, "adapter", "transformer", bottleneck=2, name="after").parameters(), seed=3)
    randomise(deltahub.attach(model, "prefix", "attn", length=2, name="prefix").parameters(), seed=3)
    found = run(model, batch("gpt2"))
    assert found.shape[1] == 6
    with deltahub.using(model, "lora", "after", "prefix"):
        assert not torch.allclose(run(model, batch("gpt2")), found, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_detaching_leaves_no_trace_and_copies_are_whole(name: str) -> None:
    model = prompted(name)
    given = batch(name, labels=True)
    expected = model(**given).loss
    copied = copy.deepcopy(model)
    assert torch.equal(copied(**given).loss, expected)
    randomise(deltahub.deltas(copied)["p"].parameters(), seed=7)
    assert not torch.equal(copied(**given).loss, expected)
    assert torch.equal(model(**given).loss, expected)
    second = deltahub.attach(model, "prompt", name="q", length=2)
    deltahub.deltas(model)["p"].detach()
    assert any(m._forward_pre_hooks for m in model.modules())
    second.detach()
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert torch.equal(model(**given).loss, MODELS[name][0]()(**given).loss)


@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_compiles_and_exports(name: str) -> None:
    model = prompted(name)
    given = batch(name) | ({} if name == "bert" else {"use_cache": False})
    expected = run(model, given)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.allclose(compiled(**given).logits, expected, atol=1e-5)
    program = torch.export.export(model, (), given)
    assert torch.allclose(program.module()(**given).logits, expected, atol=1e-5)


def test_what_is_no_transformer_is_refused_and_tokens_are_a_start() -> None:
    assert code_of(lambda: deltahub.attach(bert_classifier(), "prompt", "encoder", length=2)) == "E_KIND_HOST"
    model = bert_classifier()
    delta = deltahub.attach(model, "prompt", length=3, start="tokens")
    assert torch.equal(next(delta.parameters()), model.get_input_embeddings().weight[:3])


def test_the_table_says_what_is_so() -> None:
    for entry in prompting._table().values():
        library, _, name = entry.name.partition(".")
        package = importlib.import_module(library)
        found = getattr(package, name, None)
        if found is None:
            family = {"T5Stack": "t5", "OPTDecoder": "opt", "BartEncoder": "bart", "BartDecoder": "bart"}
            module = family.get(name, "mbart")
            found = getattr(importlib.import_module(f"{library}.models.{module}.modeling_{module}"), name)
        names = list(inspect.signature(found.forward).parameters)[1:]
        assert names[0] == "input_ids"
        assert {"inputs_embeds", "attention_mask"} <= set(names)
        assert entry.positions != "given" or "position_ids" in names
        assert entry.causal in {"always", "never", "config.is_decoder", "is_decoder"}
        assert functools.partial(prompting.transformer_of, found)() == entry
