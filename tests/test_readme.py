"""README.md does what it says: its Python runs, in a fresh process, against a Hub on loopback with a tiny backbone."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from deltahub.testing import LoopbackHub

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BACKBONE = "sentence-transformers/all-MiniLM-L6-v2"
ORDER = ("Train and publish", "Load", "A kind is a document")


def blocks(language: str, heading: str | None = None) -> list[str]:
    """The code blocks of a language, of one section or of what stands before the first."""
    sections = re.split(r"^## (.+)$", README, flags=re.MULTILINE)
    text = sections[0] if heading is None else sections[sections.index(heading) + 1]
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def test_every_python_block_is_run_below() -> None:
    run = blocks("python") + [block for heading in ORDER for block in blocks("python", heading)]
    assert len(run) == README.count("```python\n")


def test_the_python_runs(hub: LoopbackHub, tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    BertModel(config).save_pretrained(tmp_path / "tiny")
    hub.create(BACKBONE, {file.name: file.read_bytes() for file in (tmp_path / "tiny").iterdir()})
    for document in blocks("toml", "A kind is a document"):
        name = document.splitlines()[0].removeprefix("# ")
        (tmp_path / name).write_text(document, encoding="utf-8")
    published, *others = ("\n".join(blocks("python", heading)) for heading in ORDER)
    program = "\n".join([published, *blocks("python"), *others, "assert not torch.equal(logits, bare)"])
    (tmp_path / "readme.py").write_text(program, encoding="utf-8")
    home = {"HF_HOME": str(tmp_path / "home"), "DELTAHUB_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "readme.py"],
        cwd=tmp_path,
        env=os.environ | hub.environment() | home,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "backbone" in done.stdout  # the report
    assert {"delta.json", "delta.safetensors"} <= {file.name for file in (tmp_path / "delta").iterdir()}
    assert "com.example.cubic" in (tmp_path / "with-its-own-kind" / "delta.json").read_text(encoding="utf-8")


@pytest.mark.parametrize("target", re.findall(r"\]\(([^)#:]+)\)", README))
def test_links_lead_somewhere(target: str) -> None:
    assert (ROOT / target).exists()


def test_commands_exist() -> None:
    from typer.testing import CliRunner

    from deltahub.cli import app

    section = README.split("## Commands")[1].split("## ")[0]
    named = [word for line in re.findall(r"^    deltahub (.+?)  ", section, re.MULTILINE) for word in line.split(" · ")]
    verbs = {words.split()[0] for words in named}
    assert {"demo", "kinds", "pull", "push", "search"} <= verbs
    for verb in verbs:
        assert CliRunner().invoke(app, [verb, "--help"]).exit_code == 0, verb
    make = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert all(f"\n{target}:" in make for target in re.findall(r"^make (\w+)", README, re.MULTILINE))
