"""Prefixes: learned keys and values before an attention's own, on five architectures, in both implementations."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import deltahub
from deltahub.attaching import attach_parts
from deltahub.errors import HostError, KindError
from deltahub.kinds import get
from deltahub.sites import Part
from tests.models import bert_classifier, gpt2, ids, llama
from tests.zoo import randomise

pytestmark = pytest.mark.filterwarnings("ignore")
FIXTURES = Path(__file__).parent / "fixtures"


def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(
        d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=99, decoder_start_token_id=0,
        pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    return T5ForConditionalGeneration(config).eval()


def bart() -> nn.Module:
    from transformers import BartConfig, BartForConditionalGeneration

    torch.manual_seed(0)
    config = BartConfig(
        d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=48, decoder_ffn_dim=48, vocab_size=99, max_position_embeddings=64, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, forced_eos_token_id=None,
    )  # fmt: skip
    return BartForConditionalGeneration(config).eval()


MODELS: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "bert": (bert_classifier, "attention.self"),
    "gpt2": (gpt2, "attn"),
    "llama": (llama, "self_attn"),
    "t5": (t5, ["SelfAttention", "EncDecAttention"]),
    "bart": (bart, ["self_attn", "encoder_attn"]),
}


def inputs(name: str, batch: int = 3, length: int = 6) -> dict[str, Tensor]:
    given = {"input_ids": ids(batch, length), "attention_mask": torch.ones(batch, length, dtype=torch.long)}
    given["attention_mask"][0, :2] = 0
    return given | ({"decoder_input_ids": ids(batch, 4, seed=9)} if name in {"t5", "bart"} else {})


def logits(model: nn.Module, given: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**given).logits


def prefixed(name: str, length: int = 3, delta: str = "p", **config: Any) -> nn.Module:
    _, targets = MODELS[name]
    model = fresh(name)
    randomise(deltahub.attach(model, "prefix", targets, name=delta, length=length, seed=1, **config).parameters())
    return model


@pytest.mark.parametrize("name", MODELS)
def test_eager_and_sdpa_agree_and_nothing_of_the_callers_changes(name: str) -> None:
    model = prefixed(name)
    given = inputs(name)
    before = {key: value.clone() for key, value in given.items()}
    found = {}
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        found[implementation] = logits(model, given)
        plain = logits(model, {k: v for k, v in given.items() if k != "attention_mask"})
        assert torch.allclose(plain[1:], found[implementation][1:], atol=1e-5)  # no mask is a mask of ones
    assert torch.allclose(found["sdpa"], found["eager"], atol=1e-5)
    assert all(torch.equal(value, before[key]) for key, value in given.items())
    with deltahub.using(model):
        assert not torch.allclose(logits(model, given), found["eager"], atol=1e-3)
        assert torch.equal(logits(model, given), logits(_like(name), given))


def fresh(name: str) -> nn.Module:
    """With weights that make it listen: attention is almost uniform in a model as it is initialised."""
    model = MODELS[name][0]()
    with torch.no_grad():
        for path, p in model.named_parameters():
            if p.ndim == 2 and not any(word in path for word in ("embed", "shared", "wte", "lm_head")):
                p.mul_({"t5": 1.5, "bart": 15}.get(name, 6))
    return model


def _like(name: str) -> nn.Module:
    model = fresh(name)
    model.set_attn_implementation("eager")
    return model


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_equals_a_cache_that_begins_with_the_prefix(name: str, implementation: str) -> None:
    from transformers import DynamicCache

    model = prefixed(name, length=4)
    model.set_attn_implementation(implementation)
    x = ids(2, 5)
    cache = DynamicCache()
    for layer, site in enumerate(deltahub.deltas(model)["p"].sites):
        key, value = (t.detach().view(1, 4, -1, 8).transpose(1, 2).expand(2, -1, -1, -1) for t in site.tensors())
        cache.update(key, value, layer)
    ours = logits(model, {"input_ids": x})
    positions = torch.arange(5)[None]
    with deltahub.using(model), torch.no_grad():
        theirs = model(
            input_ids=x, past_key_values=cache, position_ids=positions, attention_mask=torch.ones(2, 9)
        ).logits
    assert torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_equals_peft(name: str) -> None:
    from peft import PrefixTuningConfig, get_peft_model

    make, targets = MODELS[name]
    theirs = get_peft_model(make(), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()
    weight = theirs.prompt_encoder["default"].embedding.weight
    torch.nn.init.normal_(weight)
    x = ids(2, 5)
    ours = make()
    delta = deltahub.attach(ours, "prefix", targets, length=4)
    layers = weight.detach().view(4, len(delta.sites), 2, -1)
    for i, site in enumerate(delta.sites):
        for j, tensor in enumerate(site.tensors()):
            tensor.data = layers[:, i, j].clone()
    with torch.no_grad():
        expected = theirs(input_ids=x, attention_mask=torch.ones_like(x)).logits
    # peft counts the prefix among the positions of the tokens.
    found = logits(ours, {"input_ids": x, "position_ids": torch.arange(4, 9)[None]})
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("name", ["gpt2", "llama", "t5", "bart"])
def test_generate_with_and_without_a_cache(name: str, beams: int, implementation: str) -> None:
    model = prefixed(name)
    model.set_attn_implementation(implementation)
    given = {k: v for k, v in inputs(name).items() if k != "decoder_input_ids"}
    options = {"max_new_tokens": 5, "do_sample": False, "num_beams": beams, "pad_token_id": 0, "eos_token_id": None}
    cached = model.generate(**given, **options)
    assert torch.equal(model.generate(**given, **options, use_cache=False), cached)
    with deltahub.using(model):
        assert not torch.equal(model.generate(**given, **options), cached)


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_a_reparametrised_prefix_is_saved_folded(name: str, tmp_path: Path) -> None:
    model = prefixed(name, reparametrised=True, hidden=5)
    given = inputs(name)
    deltahub.deltas(model)["p"].save(tmp_path / "p")
    manifest = json.loads((tmp_path / "p" / "delta.json").read_text())
    assert manifest["modules"][0]["config"]["reparametrised"] is False
    again = deltahub.load(tmp_path / "p", backbone=fresh(name))
    assert {key.rpartition("/")[2] for key in deltahub.deltas(again)["p"].tensors()} == {"key", "value"}
    assert torch.allclose(logits(again, given), logits(model, given), atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_rows_of_a_batch_have_prefixes_of_different_lengths(name: str) -> None:
    make, targets = MODELS[name]
    model = make()
    for i, length in enumerate((2, 5)):
        delta = deltahub.attach(model, "prefix", targets, name="ab"[i], length=length, seed=i)
        randomise(delta.parameters(), seed=i)
    given = inputs(name, batch=4)
    alone = []
    for i, row in enumerate(("b", None, "a", "b")):
        with deltahub.using(model, *([row] if row else [])):
            alone.append(logits(model, given)[i])
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        with deltahub.using(model, ["b", None, "a", "b"]):
            assert torch.allclose(logits(model, given), torch.stack(alone), atol=1e-5)


def test_two_prefixes_stand_side_by_side_and_the_scale_fades_one_out() -> None:
    model = prefixed("llama", delta="one")
    randomise(deltahub.attach(model, "prefix", "self_attn", name="two", length=2).parameters(), seed=4)
    given = inputs("llama")
    both = logits(model, given)
    with deltahub.using(model, "one"):
        one = logits(model, given)
    two = deltahub.deltas(model)["two"]
    distances = []
    for scale in (1.0, 0.5, 1e-3, 0.0):
        two.scale = scale
        distances.append(float((logits(model, given) - one).abs().max()))
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] == 0.0
    assert distances[-2] < 1e-2
    two.scale = 1.0
    assert torch.equal(logits(model, given), both)
    two.scale = -1.0
    with pytest.raises(HostError) as caught:
        logits(model, given)
    assert caught.value.code == "E_HOST_ATTENTION"


def test_what_is_no_attention_is_refused() -> None:
    model = bert_classifier()
    for target in ("query", "intermediate"):
        with pytest.raises(KindError) as caught:
            deltahub.attach(model, "prefix", target, length=2)
        assert caught.value.code == "E_KIND_HOST"
    with pytest.raises(HostError) as refused:
        deltahub.attach(model, "prefix", "attention.self", length=2, relative_bias="none")
    assert refused.value.code == "E_HOST_ATTENTION"
    model.set_attn_implementation("flex_attention")
    deltahub.attach(model, "prefix", "attention.self", length=2)
    with pytest.raises(HostError) as late:
        logits(model, inputs("bert"))
    assert late.value.code == "E_HOST_ATTENTION"


def test_compiles_and_exports() -> None:
    model = prefixed("llama")
    x = ids(2, 5)
    expected = model(input_ids=x, use_cache=False).logits
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.allclose(compiled(input_ids=x, use_cache=False).logits, expected, atol=1e-6)
    program = torch.export.export(model, (), {"input_ids": x, "use_cache": False})
    assert torch.allclose(program.module()(input_ids=x, use_cache=False).logits, expected, atol=1e-6)


def _attach(model: nn.Module, modules: dict[str, tuple[dict[str, Any], dict[str, dict[str, Tensor]]]]) -> None:
    kind = get("prefix")
    parts = [
        Part(name=name, kind=kind, config=kind.check_config(config), paths=list(tensors), tensors=tensors)
        for name, (config, tensors) in modules.items()
    ]
    attach_parts(model, "p", parts)


def test_numbers_of_adapterhub() -> None:
    from safetensors.torch import load_file
    from transformers import BertModel

    folder = FIXTURES / "adapters"
    model = BertModel.from_pretrained(folder / "backbone").eval()
    stored = load_file(folder / "prefix" / "tensors_dedup.safetensors")
    named = {key.partition("self_prefix.")[2]: value for key, value in stored.items() if "self_prefix" in key}
    hidden = torch.tanh(named["wte.weight"] @ named["control_trans.0.weight"].T + named["control_trans.0.bias"])
    flat = hidden @ named["control_trans.2.weight"].T + named["control_trans.2.bias"]
    layers = flat.view(5, 3, 2, 32)
    tensors = {
        f"encoder.layer.{i}.attention.self": {"key": layers[:, i, 0].clone(), "value": layers[:, i, 1].clone()}
        for i in range(3)
    }
    _attach(model, {"p": ({"length": 5}, tensors)})
    _compare(model, np.load(folder / "prefix" / "reference.npz"), "", "last_hidden_state")


def test_numbers_of_opendelta_with_its_quirk() -> None:
    from transformers import T5ForConditionalGeneration

    folder = FIXTURES / "opendelta" / "prefix_reparam_t5"
    model = T5ForConditionalGeneration.from_pretrained(folder / "backbone").eval()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    stored = torch.load(folder / "checkpoint" / "pytorch_model.bin", weights_only=True)
    named = {key.partition("reparams.")[2]: value for key, value in stored.items() if "reparams" in key}
    hidden = torch.tanh(named["wte.weight"] @ named["control_trans.0.weight"].T + named["control_trans.0.bias"])
    flat = hidden @ named["control_trans.2.weight"].T + named["control_trans.2.bias"]
    paths = [path for path, _ in model.named_modules() if path.endswith("SelfAttention")]
    layers = flat.view(flat.shape[0], -1, 2, model.config.d_model)
    parts: dict[str, tuple[dict[str, Any], dict[str, dict[str, Tensor]]]] = {}
    for i, path in enumerate(paths):
        first = "block.0." in path
        config = {"length": flat.shape[0], "relative_bias": "all" if first else "none"}
        pair = {"key": layers[:, i, 0].clone(), "value": layers[:, i, 1].clone()}
        parts.setdefault("first" if first else "rest", (config, {}))[1][path] = pair
    _attach(model, parts)
    _compare(model, np.load(folder / "reference.npz"), "input__", None)


def _compare(model: nn.Module, reference: Any, prefix: str, output: str | None) -> None:
    names = ("input_ids", "attention_mask", "token_type_ids", "decoder_input_ids")
    given = {n: torch.from_numpy(reference[prefix + n]) for n in names if prefix + n in reference}
    with torch.no_grad():
        found = model(**given)
    expected = reference[output] if output else reference[next(k for k in reference if k.startswith("delta__"))]
    value = found[output] if output else found.logits
    assert np.abs(value.numpy() - expected).max() < 1e-5
