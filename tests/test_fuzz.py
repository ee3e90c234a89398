"""The fuzz targets under hypothesis: a short walk over every parser, from seeds that are right."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deltahub.errors import DeltaHubError
from fuzz.targets import SEEDS, TARGETS

TOKENS = [
    b"{", b"}", b"[", b"]", b'"', b",", b":", b"..", b"0", b"-1", b"1e999", b"NaN", b"null", b"true", b"\xff", b"\0",
    b"\n", b"\\ud800", "\u202e".encode(), b"9" * 30, b"(", b")", b" @ ", b"**", b"lambda", b".__class__", b"=",
    b"for i in range(9)",
]  # fmt: skip


@st.composite
def mutated(draw: st.DrawFn, name: str) -> bytes:
    data = draw(st.sampled_from(SEEDS[name]) | st.binary(max_size=64))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(data)))
        cut = draw(st.integers(0, 8))
        new = draw(st.sampled_from(TOKENS) | st.binary(max_size=4))
        data = data[:at] + new + data[min(at + cut, len(data)) :]
    return data


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("which", ["seeds", "mutated"])
def test_a_parser_refuses_by_name_or_reads_what_others_read(name: str, which: str) -> None:
    if which == "seeds":
        for seed in SEEDS[name]:
            with contextlib.suppress(DeltaHubError):
                TARGETS[name](seed)
        return

    @settings(max_examples=80, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(mutated(name))
    def check(data: bytes) -> None:
        with contextlib.suppress(DeltaHubError):
            TARGETS[name](data)

    check()
