"""Every kind learns: from where its initialisers put it, a few steps of Adam bring its host closer to another one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import deltahub
from deltahub import kinds
from tests.zoo import CASES, Case, model_of

FIRST = list({case.kind: case for case in reversed(CASES)}.values())


def mean_square(model: nn.Module, x: Tensor, goal: Tensor) -> Tensor:
    found = model(x)
    return (found - goal).square().mean() if found.shape == goal.shape else (found.mean() - goal.mean()).square()


@pytest.mark.parametrize("case", [pytest.param(case, id=case.id) for case in FIRST])
def test_every_kind_comes_closer(case: Case) -> None:
    model, x = model_of(case.host)
    other, _ = model_of(case.host, seed=1)
    goal = other(x).detach()
    delta = deltahub.attach(model, case.kind, "host", name="it", seed=3, **dict(case.config))
    parameters = list(delta.parameters())
    assert parameters
    first = float(mean_square(model, x, goal).detach())
    # Rates as kinds want them: what multiplies or rotates moves by hundredths, coefficients of a spectrum by tenths.
    reached = []
    start = [p.detach().clone() for p in parameters]
    for rate in (3e-3, 3e-2, 0.3):
        with torch.no_grad():
            for p, value in zip(parameters, start, strict=True):
                p.copy_(value)
        optimizer = torch.optim.Adam(parameters, lr=rate)
        for _ in range(20):
            optimizer.zero_grad()
            loss = mean_square(model, x, goal)
            torch.autograd.backward(loss)
            optimizer.step()
        reached.append(float(mean_square(model, x, goal).detach()))
    assert min(reached) < 0.999 * first, f"from {first:.4g} to {reached}"


def test_none_is_forgotten() -> None:
    assert {case.kind for case in FIRST} == set(kinds.names())
