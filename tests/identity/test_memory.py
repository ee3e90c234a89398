"""Leaves are remembered for a tensor that did not change, and for no other."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from deltahub.identity import checkpoints, from_module


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    seen: list[str] = []
    real = checkpoints._hash

    def spy(jobs: object, *, bf16: bool) -> object:
        jobs = list(jobs)
        seen.extend(name for name, *_ in jobs)
        return real(jobs, bf16=bf16)

    monkeypatch.setattr(checkpoints, "_hash", spy)
    return seen


def test_a_second_check_hashes_nothing(hashed: list[str]) -> None:
    model = nn.Linear(40, 30)
    first = from_module(model)
    assert sorted(set(hashed)) == ["bias", "weight"]
    hashed.clear()
    assert from_module(model) == first
    assert hashed == []


@pytest.mark.parametrize(
    "write",
    [
        lambda w: w.add_(1e-7),
        lambda w: w[3, 5].fill_(2.0),
        lambda w: w.data.mul_(1.5),
        lambda w: setattr(w, "data", w.data.clone() + 1),
    ],
)
def test_a_write_is_seen(write: Callable[[torch.Tensor], object], hashed: list[str]) -> None:
    model = nn.Linear(40, 30)
    first = from_module(model)
    hashed.clear()
    with torch.no_grad():
        write(model.weight)
    second = from_module(model)
    assert "weight" in hashed
    assert second != first


def test_another_tensor_in_the_same_place_is_not_mistaken(hashed: list[str]) -> None:
    identities = set()
    for seed in range(5):
        torch.manual_seed(seed)
        model = nn.Linear(40, 30)  # the allocator gives the freed memory again
        identities.add(from_module(model).exact)
        del model
    assert len(identities) == 5
