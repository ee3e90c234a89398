"""The stopwatch and the report that the benchmarks share."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import harness
from benchmarks import kinds as training
from benchmarks.__main__ import main
from benchmarks.harness import Report, Timing, measure
from deltahub import kinds


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


def test_the_readme_shows_how_every_kind_was_trained() -> None:
    """A new kind says in ``benchmarks/kinds.py`` how it is trained; ``python -m benchmarks.kinds NAME`` adds a row."""
    known = training.SETTINGS.keys() | training.ABSENT.keys()
    assert set(kinds.names()) <= known
    assert not training.SETTINGS.keys() & training.ABSENT.keys()
    text = training.README.read_text(encoding="utf-8")
    table = text.partition(training.BEGIN)[2].partition(training.END)[0]
    rows = training.rows_in(table)
    assert rows.keys() == {training.HEAD, *training.SETTINGS}
    assert table.strip() == training.table(rows.values())
    assert f"{training.STEPS} steps" in text
    alone = rows.pop(training.HEAD)
    behind = {name for name, row in rows.items() if row.loss >= alone.loss or row.accuracy <= alone.accuracy}
    assert not behind, "kinds that do not learn"


def test_an_unknown_benchmark_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["speed"])
    assert stop.value.code == 2
    assert "speed" in capsys.readouterr().err


@pytest.mark.slow
def test_fresh_processes_take_turns_on_equal_work() -> None:
    from deltahub.benching.turns import contest

    found = contest(
        ["attach", "load", "switch", "forward", "mixed"],
        "shape:tiny",
        sides=["deltahub"],
        pairs=1,
        warmup=0,
        targets=["q_proj"],
        rank=2,
        repeats=1,
        resident=[2],
        cells=[[1, 3]],
        tokens=[1],
        deltas=2,
    )
    assert found.number("deltahub", "attach: sites") == 2
    assert found.number("deltahub", "load: bytes") > 0
    assert {"attach: attach", "load: load, first time", "switch: 2 resident", "forward: 1×3, merged"} <= set(
        found.metrics("deltahub")
    )
    assert all(found.timing("deltahub", metric).median >= 0 for metric in found.metrics("deltahub"))


def test_a_process_that_fails_says_why() -> None:
    from deltahub.benching.turns import contest
    from deltahub.errors import UsageError

    with pytest.raises(UsageError) as caught:
        contest(["attach"], "shape:nothing", sides=["deltahub"], pairs=1, warmup=0)
    assert caught.value.code == "E_USAGE_BENCH"
    assert "KeyError" in str(caught.value.found)


@pytest.mark.filterwarnings("ignore")  # peft's own
def test_both_sides_hold_the_same_numbers() -> None:
    import torch

    from deltahub.benching.models import model_of
    from deltahub.benching.sides import SIDES, paths_on

    outputs = []
    for make in SIDES.values():
        model = model_of("shape:tiny")
        side = make(model, paths_on(model, ["q_proj", "down_proj"]), 2)
        side.attach()
        side.fill()
        with torch.no_grad():
            outputs.append(side.live(input_ids=torch.tensor([[1, 2, 3]])).logits)
        side.clear()
        assert not [name for name, _ in model.named_parameters() if "lora" in name or "deltahub" in name]
    torch.testing.assert_close(outputs[0], outputs[1])


def test_a_slope_is_the_power_of_growth() -> None:
    from benchmarks.scaling import slope

    assert slope([(x, 3 * x**2) for x in (1.0, 4.0, 9.0)]) == pytest.approx(2)
