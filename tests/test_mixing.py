"""Batches whose rows carry different deltas: each row is what it would be in a batch of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deltahub
from deltahub import kinds
from deltahub.errors import InjectionError, UsageError
from deltahub.mixing import MixedPlan
from tests.models import bert_classifier, gpt2, ids, llama
from tests.zoo import CASES, Case, configs, model_of, randomise

EACH = pytest.mark.parametrize("case", [pytest.param(c, id=c.id) for c in CASES])
ROWS = {
    "together": ["a", "a", "b", None],
    "interleaved": ["b", None, "a", "b"],
    "each its own": ["a", "b", "a b", None],
}


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> None:
    difference = float((a - b).detach().abs().max())
    assert difference <= tolerance * max(1.0, float(b.detach().abs().max())), f"differs by {difference:.3g}"


def names(row: str | None) -> list[str]:
    return [] if row is None else row.split(" ")


def two(model: nn.Module, kind: Any, targets: Any, **config: Any) -> None:
    """Deltas ``a`` and ``b`` of one kind, as if trained; neither acts."""
    for i, name in enumerate("ab"):
        delta = deltahub.attach(model, kind, targets, name=name, seed=3 + i, **config)
        randomise(delta.parameters(), seed=30 + i)
        delta.disable()


def row_by_row(model: nn.Module, rows: list[str | None], run: Any) -> Tensor:
    alone = []
    for i, row in enumerate(rows):
        with deltahub.using(model, *names(row)):
            alone.append(run()[i])
    return torch.stack(alone)


SEQUENCED = {"gated-adapter", "gated-lora", "loreft", "direft"}
"""Kinds whose equations look along the tokens of one sample: without that axis, a batch itself is the sequence."""


@EACH
def test_every_kind_on_every_host(case: Case) -> None:
    model, x = model_of(case.host)
    if case.kind in SEQUENCED and x.ndim == 2 and x.is_floating_point():
        x = torch.cat([x, x + 1, x - 1, x * 2])[:4, None].expand(-1, 3, -1) + torch.randn(4, 3, 1)
    else:
        x = torch.cat([x, *(case.host.input() for _ in range(3))])[:4]
    two(model, case.kind, "host", **dict(case.config))
    for rows in ("together", "interleaved"):
        with torch.no_grad():
            expected = row_by_row(model, ROWS[rows], lambda: model(x))
            with deltahub.using(model, ROWS[rows]):
                if x.ndim < 3 and deltahub.deltas(model)["a"].sites[0].bound.positional:
                    with pytest.raises(InjectionError) as caught:  # its positions would be the rows
                        model(x)
                    assert caught.value.code == "E_INJECTION_ROWS"
                else:
                    close(model(x), expected)


MODELS = {
    "bert": (bert_classifier, ["query", "output.dense", "LayerNorm", "word_embeddings"]),
    "llama": (llama, ["q_proj", "down_proj", "input_layernorm", "embed_tokens"]),
    "gpt2": (gpt2, ["c_attn", "c_fc"]),
}


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("name", MODELS)
def test_whole_models_with_several_kinds_at_once(name: str, rows: list[str | None]) -> None:
    make, targets = MODELS[name]
    model = make()
    rank = {"a": 2, "b": 5}
    for i, delta in enumerate("ab"):
        made = deltahub.attach(model, "lora", targets[:2], name=delta, rank=rank[delta], scale=0.7 + i, seed=i)
        randomise(made.parameters(), seed=i)
    for kind, target, config in (("bias", targets[-2], {}), ("adapter", targets[1], {"bottleneck": 3})):
        randomise(deltahub.attach(model, kind, target, name=kind, **config).parameters())
    chosen = [None if row is None else [*names(row), "bias"] if i else names(row) for i, row in enumerate(rows)]
    chosen[1] = [*(chosen[1] or []), "adapter"]
    batch = ids(4)
    alone = []
    with torch.no_grad():
        for i, row in enumerate(chosen):
            with deltahub.using(model, *(row or [])):
                alone.append(model(input_ids=batch).logits[i])
        with deltahub.using(model, chosen):
            close(model(input_ids=batch).logits, torch.stack(alone))


@pytest.mark.parametrize("kind", kinds.names())
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_every_kind_in_a_whole_model(name: str, kind: str) -> None:
    make, targets = MODELS[name]
    model = make()
    try:
        two(model, kind, targets[:1], **next(configs(kind)))
    except deltahub.DeltaHubError as error:
        pytest.skip(f"{kind} does not go on {targets[0]}: {error.code}")
    batch = ids(4)
    with torch.no_grad():
        expected = row_by_row(model, ROWS["interleaved"], lambda: model(input_ids=batch).logits)
        with deltahub.using(model, ROWS["interleaved"]):
            close(model(input_ids=batch).logits, expected)


def test_eight_low_rank_deltas_are_two_products() -> None:
    model = nn.Sequential(nn.Linear(6, 10))
    rows: list[str | None] = []
    for i in range(7):
        delta = deltahub.attach(model, "lora", "0", name=f"d{i}", rank=1 + i, scale=0.5 * i + 1, seed=i)
        randomise(delta.parameters(), seed=i)
        delta.scale = 1.0 + i
        rows.append(f"d{i}")
    rows.append(None)
    x = torch.randn(16, 3, 6)
    with torch.no_grad():
        for order in (rows, rows[::-1]):
            with deltahub.using(model, order):
                mixed = model(x)
                plan = model[0]._deltahub.plan()
                assert isinstance(plan, MixedPlan)
                assert plan.products is not None
                assert plan.products._stack is None  # a list that comes once is not worth a copy
                close(model(x), mixed)
                assert plan.products._stack is not None
            for i, row in enumerate(order):
                with deltahub.using(model, *names(row)):
                    close(mixed[2 * i : 2 * i + 2], model(x)[2 * i : 2 * i + 2])
        with deltahub.using(model, rows):  # what was stacked is noticed to have changed
            for _ in range(2):
                before = model(x)
            randomise(deltahub.deltas(model)["d3"].parameters(), seed=99)
            after = model(x)
            assert not torch.equal(before[6:8], after[6:8])
            assert torch.equal(before[:6], after[:6])
            deltahub.deltas(model)["d3"].scale = 0.0
            assert torch.equal(
                model(x)[6:8],
                model[0].weight.new_zeros(()) + nn.functional.linear(x, model[0].weight, model[0].bias)[6:8],
            )


def test_gradients_are_those_of_each_row_alone() -> None:
    model = bert_classifier()
    two(model, "lora", ["query", "dense"], rank=2)
    batch, rows = ids(4), ROWS["interleaved"]
    for p in model.parameters():
        p.grad = None
    row_by_row(model, rows, lambda: model(input_ids=batch).logits).square().sum().backward()
    parameters = [p for d in deltahub.deltas(model).values() for p in d.parameters()]
    expected = [p.grad.clone() for p in parameters]
    for p in parameters:
        p.grad = None
    with deltahub.using(model, rows):
        model(input_ids=batch).logits.square().sum().backward()
    for p, grad in zip(parameters, expected, strict=True):
        close(p.grad, grad, 1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("beams", [1, 3])
def test_generate(beams: int) -> None:
    model = llama()
    two(model, "lora", ["q_proj", "down_proj"], rank=2, scale=4.0)
    batch = ids(4, 5)
    options: dict[str, Any] = {
        "max_new_tokens": 6, "do_sample": False, "num_beams": beams, "pad_token_id": 0, "eos_token_id": None,
        "attention_mask": torch.ones_like(batch),
    }  # fmt: skip
    expected = row_by_row(model, ROWS["interleaved"], lambda: model.generate(batch, **options))
    with deltahub.using(model, ROWS["interleaved"]):
        assert torch.equal(model.generate(batch, **options), expected)
    assert len({tuple(row.tolist()) for row in expected[:, 5:]}) > 1


def test_compiles() -> None:
    model = nn.Sequential(nn.Linear(6, 10), nn.LayerNorm(10))
    two(model, "lora", "0", rank=2)
    x = torch.randn(4, 6)
    torch._dynamo.reset()
    with deltahub.using(model, ROWS["interleaved"]), torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        close(compiled(x), model(x))


REPLACED: dict[str, Any] = {
    "kind": "org.example.twice", "version": 1, "hosts": ["block", "linear"], "identity": False,
    "tensors": {"gain": {"shape": ["out"], "init": "normal(1)"}},
    "equations": {"replace": "base(x) + channel(gain) * base(x + gain)"},
}  # fmt: skip
INPUT: dict[str, Any] = {
    "kind": "org.example.in", "version": 1, "hosts": ["block", "linear"], "identity": False,
    "tensors": {"gain": {"shape": ["in"], "init": "normal(1)"}},
    "equations": {"input": "x * gain"},
}  # fmt: skip


class Scaled(nn.Module):
    """A block with a further argument that belongs to the batch."""

    def __init__(self, outputs: int = 1) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)
        self.outputs = outputs

    def forward(self, hidden_states: Tensor, by: Tensor) -> Any:
        y = torch.tanh(self.inner(hidden_states)) * by
        return y if self.outputs == 1 else (y, y.sum())


@pytest.mark.parametrize("document", [REPLACED, INPUT], ids=["replace", "input"])
@pytest.mark.parametrize("rows", ["together", "interleaved"])
def test_blocks_keep_their_other_arguments(document: dict[str, Any], rows: str) -> None:
    model = nn.ModuleDict({"block": Scaled()})
    two(model, document, "block")
    x, by = torch.randn(4, 3, 6), torch.randn(4, 3, 6)
    expected = row_by_row(model, ROWS[rows], lambda: model["block"](x, by))
    with deltahub.using(model, ROWS[rows]):
        close(model["block"](x, by), expected)


def test_what_cannot_be_mixed_says_so() -> None:
    model = nn.ModuleDict({"block": Scaled(outputs=2), "experts": nn.ModuleList([nn.Linear(6, 6)])})
    two(model, REPLACED, "block")
    with deltahub.using(model, ["a", "b"]), pytest.raises(InjectionError) as caught:
        model["block"](torch.randn(2, 6), torch.randn(2, 6))
    assert caught.value.code == "E_INJECTION_ROWS"
    deltahub.attach(model, "lora", "experts.0", name="routed", rank=2)
    with pytest.raises(InjectionError) as caught, deltahub.using(model, ["a", "routed"]):
        pass
    assert caught.value.code == "E_INJECTION_ROWS"
    assert "experts.0" in str(caught.value)


def test_a_batch_of_another_size_is_refused() -> None:
    model = nn.Sequential(nn.Linear(6, 10))
    two(model, "lora", "0", rank=2)
    with deltahub.using(model, ["a", "b", None]):
        for size in (2, 4):
            with pytest.raises(InjectionError) as caught:
                model(torch.randn(size, 6))
            assert caught.value.code == "E_INJECTION_ROWS"
        assert model(torch.randn(6, 6)).shape == (6, 10)  # two rows of each sample, together
        with pytest.raises(InjectionError) as caught:
            deltahub.deltas(model)["a"].enable()
        assert caught.value.code == "E_INJECTION_ROWS"
    x = torch.randn(2, 6)
    with deltahub.using(model):
        assert torch.equal(model(x), nn.functional.linear(x, model[0].weight, model[0].bias))


def test_names_and_a_list_together_are_refused() -> None:
    model = nn.Sequential(nn.Linear(6, 10))
    two(model, "lora", "0", rank=2)
    for given in (("a", ["b"]), (["a"], ["b"]), ([],)):
        with pytest.raises(UsageError) as caught, deltahub.using(model, *given):
            pass
        assert caught.value.code == "E_USAGE_ROWS"
    with pytest.raises(InjectionError) as unknown, deltahub.using(model, ["a", "c"]):
        pass
    assert unknown.value.code == "E_INJECTION_UNKNOWN"
    with deltahub.using(model, ["a", None]):
        assert deltahub.deltas(model)["a"].active
        assert not deltahub.deltas(model)["b"].active


def test_one_list_at_a_time_is_remembered() -> None:
    model = nn.Sequential(nn.Linear(6, 10))
    two(model, "lora", "0", rank=2)
    for i in range(20):
        with deltahub.using(model, ["a"] * (i + 1) + ["b"]):
            model(torch.randn(i + 2, 6))
    assert sum(isinstance(plan, MixedPlan) for plan in model[0]._deltahub.plans.values()) == 1
