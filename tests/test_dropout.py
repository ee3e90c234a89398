"""Dropout is honoured or refused: a kind that never sees an input cannot drop from one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import deltahub
from deltahub.errors import DeltaHubError
from tests.models import llama
from tests.zoo import randomise


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6))


@pytest.mark.parametrize(("kind", "config"), [("assign", {}), ("hira", {"rank": 2}), ("sparse", {"count": 2})])
def test_a_kind_of_the_weight_alone_refuses_dropout(kind: str, config: dict[str, int]) -> None:
    m = model()
    with pytest.raises(DeltaHubError) as caught:
        deltahub.attach(m, kind, "0", dropout=0.1, **config)
    assert caught.value.code == "E_USAGE_DROPOUT"
    assert type(m[0]) is nn.Linear
    deltahub.attach(m, kind, "0", **config)


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_so_do_prefixes_and_prompts(kind: str) -> None:
    with pytest.raises(DeltaHubError) as caught:
        deltahub.attach(llama(), kind, dropout=0.1, length=2)
    assert caught.value.code == "E_USAGE_DROPOUT"


@pytest.mark.parametrize("dropout", [-0.1, 1.0])
def test_it_is_a_probability(dropout: float) -> None:
    with pytest.raises(DeltaHubError) as caught:
        deltahub.attach(model(), "lora", "0", rank=2, dropout=dropout)
    assert caught.value.code == "E_USAGE_DROPOUT"


def test_what_a_composition_could_not_heed_is_refused_while_training() -> None:
    m = model()
    first = deltahub.attach(m, "lora", "0", name="first", rank=2, dropout=0.5)
    second = deltahub.attach(m, "dora", "0", name="second", rank=2)
    randomise([*first.parameters(), *second.parameters()])
    x = torch.randn(2, 6)
    m.eval()
    m(x)
    m.train()
    with pytest.raises(DeltaHubError) as caught:
        m(x)
    assert caught.value.code == "E_INJECTION_DROPOUT"
    with deltahub.using(m, "first"):
        assert not torch.equal(m(x), m(x))
