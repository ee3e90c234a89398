"""The stopwatch and the report that the benchmarks share."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import harness
from benchmarks.__main__ import main
from benchmarks.harness import Report, Timing, measure


def test_contestants_take_turns_and_undoing_is_not_timed() -> None:
    calls: list[str] = []

    def contestant(name: str) -> Callable[[], str]:
        return lambda: calls.append(name) or name

    timings = measure(
        {"a": contestant("a"), "b": contestant("b")},
        repeats=3,
        warmup=1,
        after={"a": lambda result: calls.append(f"undo {result}")},
    )
    assert calls == ["a", "undo a", "b", "b", "a", "undo a"] * 2
    assert [len(t.cpu) for t in timings.values()] == [3, 3]


def test_ratios_are_taken_within_rounds() -> None:
    noisy, base = Timing(cpu=[2.0, 20.0, 4.0], wall=[1, 1, 1]), Timing(cpu=[1.0, 10.0, 2.0], wall=[1, 1, 1])
    assert noisy.over(base) == 2.0
    assert noisy.median == 4.0


def test_a_report_says_what_was_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "OUT", tmp_path)
    report = Report(name="x", title="A title", note="A note.")
    report.add("case", {"a": Timing(cpu=[1.0], wall=[1.0]), "b": Timing(cpu=[3.0], wall=[2.0])}, base="a")
    report.goal("fast enough", 3.0, 10, at_least=True)
    report.goal("small enough", 3.0, 10, at_least=False)
    markdown, data = report.write()
    text = markdown.read_text(encoding="utf-8")
    assert "| b | 3.00 | 3.00 | 2.00 | 3.000 |" in text
    assert "| fast enough | 3 | 10 | **no** |" in text
    assert "| small enough | 3 | 10 | yes |" in text
    found = json.loads(data.read_text(encoding="utf-8"))
    assert [goal["met"] for goal in found["goals"]] == [False, True]
    assert found["machine"]["torch"]


def test_an_unknown_benchmark_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["speed"])
    assert stop.value.code == 2
    assert "speed" in capsys.readouterr().err
