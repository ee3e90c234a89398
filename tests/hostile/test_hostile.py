"""Every numbered hostile input ends as the table says, within its limits, and leaves nothing behind."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from tests.hostile.sandbox import Sandbox
from tests.hostile.table import CASES

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits and /proc are Linux's")


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox() as warmed:
        yield warmed


def test_every_number_has_a_case() -> None:
    assert {case.number for case in CASES.values()} == set(range(1, 57))


@pytest.mark.parametrize("key", CASES)
def test_hostile(sandbox: Sandbox, key: str) -> None:
    answer = sandbox.judge(key)
    assert (answer["outcome"], answer["problems"]) == (CASES[key].code, []), answer["text"]
