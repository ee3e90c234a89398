"""The documentation: every block of code runs, pages are drawn from the data, and the site builds without a warning."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from deltahub import kinds
from deltahub.cli import app

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the pages promise: a folder with a small backbone and a delta for it."""
    import torch

    import deltahub
    from tests.models import bert_classifier

    bert_classifier().save_pretrained(tmp_path / "backbone")
    model = type(bert_classifier()).from_pretrained(tmp_path / "backbone")
    delta = deltahub.attach(model, "lora", ["query", "value"], rank=2)
    for parameter in delta.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    delta.save(tmp_path / "delta")
    for library, parts in {"opendelta": ("lora_bert_cls",), "adapters": ("lora", "backbone")}.items():
        for part in parts:  # what the page on moving here converts
            folder = {"opendelta": "opendelta", "adapters": f"adapterhub/{part}"}[library]
            shutil.copytree(ROOT / "tests" / "fixtures" / library / part, tmp_path / folder)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_code_runs(path: Path, workplace: Path) -> None:
    names: dict[str, Any] = {}
    for language, text in BLOCK.findall(path.read_text(encoding="utf-8")):
        if language == "python":
            exec(compile(text, str(path), "exec"), names)
        elif language == "sh":
            for line in text.splitlines():
                program, *arguments = shlex.split(line)
                assert program == "deltahub"
                result = CliRunner().invoke(app, arguments)
                assert result.exit_code == 0, f"{line}\n{result.output}"
        else:
            assert language == "text", language


def drawn() -> Any:
    import importlib.util

    spec = importlib.util.spec_from_file_location("docs_pages", ROOT / "docs" / "pages.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pages_are_drawn_from_the_data() -> None:
    pages = drawn()
    table = pages.kinds_page()
    for name in kinds.names():
        assert f"[{name}]({name}.md)" in table
        page = pages.kind_page(name)
        assert "<math" in page
        assert all(f"`{key}`" in page for key in kinds.get(name).document.source.get("config", {}))
    errors = pages.error_page()
    for path in (ROOT / "spec" / "errors").glob("*.toml"):
        assert all(f"### `{code}`" in errors for code in tomllib.loads(path.read_text(encoding="utf-8")))
    assert "(spec/" not in pages.spec_page()


def test_every_public_name_is_in_the_reference() -> None:
    import deltahub

    page = drawn().reference_page()
    for name in set(deltahub.__all__) - {"__version__", "converters"}:
        assert f"      heading: {name}\n" in page, name
    listed = [line for line in page.splitlines() if line.startswith("::: ")]
    assert len(set(listed)) == len(listed) > 60


@pytest.mark.skipif(not find_spec("matplotlib"), reason="needs matplotlib, of the extra docs")
def test_benchmarks_are_drawn_from_what_was_measured() -> None:
    import json
    import xml.etree.ElementTree as ET

    pages = drawn()
    rows = [{"contestant": "floor: nothing", "cpu_ms": 0.01}, {"contestant": "deltahub.load", "cpu_ms": 20.0}]
    picture = pages.plot(rows)
    assert ET.fromstring(picture).tag.endswith("svg")
    assert "deltahub.load" in picture
    assert pages.plot(rows) == picture
    page = pages.benchmark_page()
    for path in (ROOT / "benchmarks" / "out").glob("*.json"):
        result = json.loads(path.read_text(encoding="utf-8"))
        assert all(goal["goal"].replace("|", "/") in page for goal in result.get("goals", ())), path.stem


@pytest.mark.slow
@pytest.mark.skipif(
    not all(map(find_spec, ("mkdocs", "material", "mkdocstrings", "matplotlib"))), reason="needs the extra docs"
)
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path / "site"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "WARNING -" not in done.stderr
    html = (tmp_path / "site" / "kinds" / "lora" / "index.html").read_text(encoding="utf-8")
    assert "<math" in html
    assert (tmp_path / "site" / "tutorials" / "explore" / "index.html").is_file()
    drawn_plots = {path.stem.rpartition("-")[0] for path in (tmp_path / "site" / "benchmarks").glob("*.svg")}
    measured = {path.stem for path in (ROOT / "benchmarks" / "out").glob("*.json")}
    assert drawn_plots <= measured, "plots of what was measured, and of nothing else"
    reference = (tmp_path / "site" / "reference" / "index.html").read_text(encoding="utf-8")
    assert "Attach a fresh delta" in reference
    assert ":class:" not in reference
