"""Imports point down only, and the rooms that need no torch load none."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[1]

# Lowest first; a room may import the rooms before it.
LAYERS = (
    "errors",
    "limits",
    "progress",
    "tensors",
    "targets",
    "manifest",
    "identity",
    "kinds",
    "sharing",
    "hosts",
    "places",
    "merging",
    "attending",
    "spanning",
    "prompting",
    "products",
    "mixing",
    "hearing",
    "contexts",
    "package",
    "switching",
    "bound",
    "plans",
    "sites",
    "injection",
    "backbones",
    "sign",
    "hub",
    "composition",
    "roles",
    "saving",
    "choosing",
    "delta",
    "training",
    "attaching",
    "effects",
    "presets",
    "loading",
    "inspecting",
    "explorer",
    "converters",
    "opening",
    "recipes",
    "demo",
    "benching",
    "conformance",
    "doctor",
    "cli",
)
# Beside the stack: what it may import, and nothing else.
APART: dict[str, set[str]] = {"testing": {"errors"}, "spec": set()}
# The package itself is the index of all rooms: its look-ups are lazy and may name any.
INDEX = "__init__"

TORCH_FREE = (
    "deltahub",
    "deltahub.errors",
    "deltahub.limits",
    "deltahub.tensors",
    "deltahub.targets",
    "deltahub.manifest",
    "deltahub.identity",
    "deltahub.kinds.document",
    "deltahub.kinds.language",
    "deltahub.kinds.reference",
    "deltahub.package",
    "deltahub.hub",
    "deltahub.inspecting",
    "deltahub.backbones",
    "deltahub.testing",
    "deltahub.cli",
)


def room_of(path: Path, root: Path) -> str:
    """Name the room of a file under ``root/deltahub`` (its converters are seen through the link)."""
    first = path.relative_to(root / "deltahub").parts[0]
    return first.removesuffix(".py")


def sources(root: Path) -> Iterator[Path]:
    """All Python files of the package; ``rglob`` does not follow links, so converters are walked by name."""
    for folder in (root / "deltahub", root / "deltahub" / "converters"):
        yield from (p for p in sorted(folder.rglob("*.py")) if "__pycache__" not in p.parts)


def imported_rooms(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Every ``deltahub`` room that a module imports, inside functions and for types too."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            module = node.module or ""
            names = [f"deltahub.{a.name}" for a in node.names] if module == "deltahub" else [module]
        for name in names:
            parts = name.split(".")
            if parts[0] == "deltahub" and len(parts) > 1:
                yield parts[1], node.lineno


def violations(root: Path) -> list[str]:
    rank = {room: i for i, room in enumerate(LAYERS)}
    found = []
    for path in dict.fromkeys(sources(root)):
        room = room_of(path, root)
        if room == INDEX:
            continue
        if room not in rank and room not in APART:
            found.append(f"{room} is not in the list of rooms")
            continue
        for other, line in imported_rooms(ast.parse(path.read_text(encoding="utf-8"))):
            if other == room or other.startswith("_") or not other.islower():
                continue
            if room in APART:
                if other not in APART[room]:
                    found.append(f"{path.name}:{line}: {room} stands apart and imports {other}")
            elif other in rank and rank[other] > rank[room]:
                found.append(f"{path.name}:{line}: {room} imports {other}, which is above it")
    return found


def test_imports_point_down() -> None:
    assert violations(ROOT) == []


def test_every_room_is_listed() -> None:
    rooms = {room_of(p, ROOT) for p in sources(ROOT)} - {INDEX}
    assert rooms <= set(LAYERS) | set(APART)


@pytest.mark.parametrize(
    ("room", "line", "says"),
    [
        ("manifest", "from deltahub.converters import merge", "manifest imports converters, which is above it"),
        ("manifest", "from deltahub import hub", "manifest imports hub, which is above it"),
        ("errors", "def f():\n    import deltahub.cli", "errors imports cli, which is above it"),
        ("testing", "import deltahub.tensors", "testing stands apart and imports tensors"),
        ("attic", "x = 1", "attic is not in the list of rooms"),
    ],
)
def test_a_planted_upward_import_is_caught(tmp_path: Path, room: str, line: str, says: str) -> None:
    (tmp_path / "deltahub").mkdir()
    (tmp_path / "deltahub" / f"{room}.py").write_text(line, encoding="utf-8")
    assert len(found := violations(tmp_path)) == 1
    assert found[0].endswith(says)


def test_torch_free_rooms_load_no_torch() -> None:
    """One process, each room in turn: the first that loads torch is named."""
    code = f"""
import importlib, sys
for name in {TORCH_FREE!r}:
    importlib.import_module(name)
    assert "torch" not in sys.modules, name + " loads torch"
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_help_loads_no_torch() -> None:
    code = """
import sys
sys.argv = ["deltahub", "--help"]
from deltahub.cli import main
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
heavy = {"torch", "transformers", "diffusers", "sentence_transformers"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout
