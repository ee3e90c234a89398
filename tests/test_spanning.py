"""Spans: a delta from one module's input to another's output, beside everything that lies between them."""

from __future__ import annotations

import copy
import json
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import deltahub
from deltahub.errors import DeltaHubError
from tests.models import bert_classifier, gpt2, ids, llama
from tests.test_attending import bart, t5
from tests.zoo import randomise

pytestmark = pytest.mark.filterwarnings("ignore")
MODELS = {"bert": bert_classifier, "gpt2": gpt2, "llama": llama, "t5": t5, "bart": bart}
FEED_FORWARD = {
    "bert": ("intermediate.dense", "layer.*.output.dense"),
    "gpt2": ("mlp.c_fc", "mlp.c_proj"),
    "llama": ("up_proj", "down_proj"),
    "t5": ("DenseReluDense.wi", "DenseReluDense.wo"),
    "bart": ("fc1", "fc2"),
}


@torch.no_grad()
def run(model: nn.Module, rows: int = 2) -> Tensor:
    given = {"decoder_input_ids": ids(rows, seed=8)} if model.config.is_encoder_decoder else {}
    found: Tensor = model(input_ids=ids(rows), **given).logits
    return found


def beside(name: str, delta: str = "p", seed: int = 1, **options: Any) -> nn.Module:
    model = MODELS[name]()
    made = deltahub.attach(model, "parallel-adapter", name=delta, bottleneck=4, seed=seed, **options)
    randomise(made.parameters(), seed=seed)
    return model


def code_of(call: Callable[[], Any]) -> str:
    with pytest.raises(DeltaHubError) as caught:
        call()
    return caught.value.code


@pytest.mark.parametrize("name", MODELS)
def test_it_is_beside_the_whole_feed_forward_network(name: str) -> None:
    model = beside(name)
    sites = deltahub.deltas(model)["p"].sites
    modules = dict(model.named_modules())
    source, target = FEED_FORWARD[name]
    assert {s.path.rpartition(".")[2] for s in sites} == {target.rpartition(".")[2]}
    plain, inputs = MODELS[name](), {}
    for site in sites:
        assert site.span is not None
        assert site.span.source.endswith(source)
        assert site.bound.shape.d_in == site.bound.shape.d_out == 32

        def keep(module: Any, args: Any, *, site: Any = site) -> None:
            inputs[site.path] = args[0]

        def add(module: Any, args: Any, out: Tensor, *, site: Any = site) -> Tensor:
            down, down_bias, up, up_bias = site.tensors()
            return out + F.linear(torch.relu(F.linear(inputs[site.path], down, down_bias)), up, up_bias)

        plain.get_submodule(site.span.source).register_forward_pre_hook(keep)
        plain.get_submodule(site.path).register_forward_hook(add)
    assert torch.equal(run(model), run(plain))
    assert not torch.allclose(run(model), run(MODELS[name]()), atol=1e-4)
    assert all(s.path in modules for s in sites)


def test_a_fresh_one_changes_nothing_and_a_scale_of_zero_is_off() -> None:
    model = llama()
    delta = deltahub.attach(model, "parallel-adapter", bottleneck=4)
    assert torch.equal(run(model), run(llama()))
    randomise(delta.parameters())
    full = run(model)
    delta.scale = 0.0
    assert torch.allclose(run(model), run(llama()), atol=1e-6)
    delta.scale = 1.0
    assert torch.equal(run(model), full)


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_saved_and_loaded(name: str, tmp_path: Path) -> None:
    model = beside(name)
    deltahub.deltas(model)["p"].save(tmp_path / "p")
    (module,) = json.loads((tmp_path / "p" / "delta.json").read_text())["modules"]
    assert len(module["inputs"]) <= 2 * len(module["targets"])
    again = deltahub.load(tmp_path / "p", backbone=MODELS[name]())
    assert torch.equal(run(again), run(model))
    assert deltahub.verify(tmp_path / "p", backbone=MODELS[name]()).effect > 0


def test_order_of_inputs_and_targets_is_kept_where_an_abbreviation_would_change_it(tmp_path: Path) -> None:
    class Crossed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.b, self.a = nn.Linear(3, 3), nn.Linear(3, 3)
            self.x = nn.ModuleList(nn.Linear(3, 3) for _ in range(2))

        def forward(self, h: Tensor) -> Tensor:
            h = self.x[0](self.b(h))
            return self.x[1](self.a(h))

    torch.manual_seed(0)
    model = Crossed()
    plain = copy.deepcopy(model)
    made = deltahub.attach(model, "parallel-adapter", ["x.0", "x.1"], inputs=["b", "a"], name="p", bottleneck=2)
    assert [(s.span.source, s.path) for s in made.sites if s.span] == [("b", "x.0"), ("a", "x.1")]
    randomise(made.parameters())
    made.save(tmp_path / "p")
    h = torch.randn(2, 3)
    assert torch.equal(deltahub.load(tmp_path / "p", backbone=plain)(h), model(h))


def test_detaching_in_any_order_leaves_every_class_as_it_was() -> None:
    model = beside("gpt2", "one")
    lora = deltahub.attach(model, "lora", "mlp.c_fc", name="lora", rank=2)
    classes = {path: type(m) for path, m in gpt2().named_modules()}
    two = deltahub.attach(model, "parallel-adapter", "attn", inputs="ln_1", name="two", bottleneck=2)
    randomise([*lora.parameters(), *two.parameters()], seed=3)
    with deltahub.using(model, "one"):
        alone = run(model)
    assert torch.equal(alone, run(beside("gpt2", "one")))
    deltahub.deltas(model)["one"].detach()
    two.detach()
    with deltahub.using(model, "lora"):
        run(model)
    lora.detach()
    assert {path: type(m) for path, m in model.named_modules()} == classes
    assert torch.equal(run(model), run(gpt2()))


def test_copies_and_pickles_are_whole() -> None:
    model = beside("gpt2")
    expected = run(model)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(run(again), expected)
        randomise(deltahub.deltas(again)["p"].parameters(), seed=5)
        assert not torch.equal(run(again), expected)
    assert torch.equal(run(model), expected)


def test_compiles_exports_and_recomputes() -> None:
    model = beside("llama")
    given = {"input_ids": ids(), "use_cache": False}
    expected = model(**given).logits
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.allclose(compiled(**given).logits, expected, atol=1e-5)
    program = torch.export.export(model, (), given)
    assert torch.allclose(program.module()(**given).logits, expected, atol=1e-5)
    gradients = []
    for again in (False, True):
        model.train()
        if again:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(**given, labels=ids()).loss.backward()
        gradients.append([p.grad.clone() for p in deltahub.deltas(model)["p"].parameters() if p.grad is not None])
    assert len(gradients[0]) == 8
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))


def test_threads_do_not_meet() -> None:
    model = beside("gpt2")
    expected = {rows: run(model, rows) for rows in (1, 2, 3)}
    wrong: list[int] = []

    def serve(rows: int) -> None:
        for _ in range(5):
            if not torch.allclose(run(model, rows), expected[rows], atol=1e-5):
                wrong.append(rows)

    threads = [threading.Thread(target=serve, args=(rows,)) for rows in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_rows_of_a_batch_with_spans_of_their_own(name: str) -> None:
    model = beside(name, "a")
    randomise(deltahub.attach(model, "parallel-adapter", name="b", bottleneck=2).parameters(), seed=4)
    merged_kind = deltahub.attach(model, "dora", FEED_FORWARD[name][1], name="c", rank=2)
    randomise(merged_kind.parameters(), seed=5)
    rows: list[Any] = ["b", None, "a", ["a", "c"], ["b", "a"], "c"]
    alone = []
    for i, row in enumerate(rows):
        with deltahub.using(model, *([row] if isinstance(row, str) else row or [])):
            alone.append(run(model, 6)[i])
    with deltahub.using(model, rows):
        assert torch.allclose(run(model, 6), torch.stack(alone), atol=1e-5)


def test_what_cannot_span_is_refused_and_nothing_changes() -> None:
    model = bert_classifier()
    span = {"inputs": "intermediate.dense", "bottleneck": 2}
    assert code_of(lambda: deltahub.attach(model, "parallel-adapter", "output.dense", **span)) == "E_TARGET_SPANS"
    one = {"inputs": "intermediate.dense", "targets": "layer.*.output.dense"}
    assert code_of(lambda: deltahub.attach(model, "lora", **one, rank=2)) == "E_KIND_HOST"
    ids_in = {"inputs": "word_embeddings", "targets": "classifier", "bottleneck": 2}
    assert code_of(lambda: deltahub.attach(model, "parallel-adapter", **ids_in)) == "E_HOST_SPAN"
    factor = {
        "kind": "com.example.factor", "version": 1, "hosts": ["block"], "tensors": {"g": {"shape": ["in"]}},
        "equations": {"input": "x * g"},
    }  # fmt: skip
    assert code_of(lambda: deltahub.attach(model, factor, **one)) == "E_HOST_SPAN"
    assert not deltahub.deltas(model)
    backwards = {"inputs": "layer.*.output.dense", "targets": "intermediate.dense", "bottleneck": 2}
    deltahub.attach(model, "parallel-adapter", **backwards)
    assert code_of(lambda: run(model)) == "E_HOST_SPAN"


def test_a_span_from_what_another_delta_removes_is_a_conflict() -> None:
    model = gpt2()
    taken = {
        "kind": "com.example.taken", "version": 1, "hosts": ["block"], "tensors": {"c": {"shape": ["out"]}},
        "equations": {"replace": "x + c"},
    }  # fmt: skip
    deltahub.attach(model, taken, "h.0.mlp", name="taken")
    deltahub.attach(model, "parallel-adapter", "h.0.ln_2", inputs="h.0.ln_1", name="fine", bottleneck=2)
    spanning = {"targets": "h.1.mlp", "inputs": "h.0.mlp.c_fc", "name": "over", "bottleneck": 2}
    assert code_of(lambda: deltahub.attach(model, "parallel-adapter", **spanning)) == "E_INJECTION_CONFLICT"
