"""A kind attached without targets goes where its document says."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import deltahub
from deltahub import kinds
from deltahub.errors import TargetError
from tests.models import bert_classifier, gpt2, ids, llama
from tests.test_attending import bart, t5
from tests.zoo import configs, randomise

MODELS = {"bert": bert_classifier, "gpt2": gpt2, "llama": llama, "t5": t5, "bart": bart}
PUT = [name for name in kinds.names() if kinds.get(name).document.targets]
# Which modules targets stand for depends on the targets alone: one kind of each list goes on every model.
FIRST = list({tuple(kinds.get(name).document.targets): name for name in reversed(PUT)}.values())


def logits(model: nn.Module) -> torch.Tensor:
    given = {"decoder_input_ids": ids(seed=8)} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=ids(), **given).logits


@pytest.mark.parametrize(
    ("name", "kind"), [(n, k) for n in MODELS for k in PUT if n == "bert" or k in {*FIRST, "lora", "prefix", "prompt"}]
)
def test_every_kind_that_names_targets_finds_them(name: str, kind: str) -> None:
    model = MODELS[name]()
    bare = logits(model)
    delta = deltahub.attach(model, kind, **next(configs(kind)))
    assert delta.sites
    randomise(delta.parameters())
    assert not torch.equal(logits(model), bare)
    delta.detach()
    assert torch.equal(logits(model), bare)


def test_roles_that_an_architecture_lacks_are_passed_over() -> None:
    assert [s.path for s in deltahub.attach(bert_classifier(), "lora", rank=1).sites] == [
        f"bert.encoder.layer.{i}.attention.self.{n}" for i in range(2) for n in ("query", "value")
    ]
    assert [s.path for s in deltahub.attach(gpt2(), "lora", rank=1).sites] == [
        f"transformer.h.{i}.attn.c_attn" for i in range(2)
    ]
    only = deltahub.attach(bert_classifier(), "adapter", bottleneck=2, exclude="layer.0.**")
    assert {s.path.split(".")[3] for s in only.sites} == {"1"}


def test_types_are_targets_also_where_a_delta_sits_already() -> None:
    model = llama()
    one = deltahub.attach(model, "lora", "type:Linear", exclude="lm_head", name="one", rank=1)
    two = deltahub.attach(model, "lora", "type:torch.nn.modules.linear.Linear", exclude="lm_head", name="two", rank=1)
    assert len(one.sites) == len(two.sites) == 14


def test_nothing_to_go_to_is_an_error() -> None:
    for model, kind, code in (
        (bert_classifier(), "diff", "E_TARGET_NOTHING"),
        (nn.Sequential(nn.Linear(2, 2)), "lora", "E_TARGET_ARCHITECTURE"),
        (nn.Sequential(nn.Linear(2, 2)), "prefix", "E_TARGET_NOTHING"),
    ):
        with pytest.raises(TargetError) as caught:
            deltahub.attach(model, kind, **next(configs(kind)))
        assert caught.value.code == code
        assert not deltahub.deltas(model)
