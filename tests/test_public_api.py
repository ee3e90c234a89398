"""What is public says so: ``__all__`` in every module, documented, importable, and nothing else looks public."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import deltahub

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"deltahub": "deltahub", "converters": "deltahub.converters"}


def module_files() -> dict[str, Path]:
    """Dotted name → file, for every module of the package."""
    found = {}
    for folder, prefix in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = list(path.relative_to(ROOT / folder).with_suffix("").parts)
            if parts[-1] == "__init__":
                parts.pop()
            found[".".join([prefix, *parts])] = path
    return found


MODULES = module_files()


def declared(tree: ast.Module) -> list[str] | None:
    for node in tree.body:
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        if any(isinstance(t, ast.Name) and t.id == "__all__" for t in targets):
            return list(ast.literal_eval(node.value))
    return None


# What others may use is decided by the rooms; a room of several files shares helpers between them.
ROOMS = [name for name in MODULES if name.count(".") == (2 if name.startswith("deltahub.converters.") else 1)]
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def tree_of(name: str) -> ast.Module:
    return ast.parse(MODULES[name].read_text(encoding="utf-8"))


def definitions(tree: ast.Module) -> dict[str, Definition]:
    """Top-level functions and classes, but for those that a decorator hands to somebody else: a command."""
    found = (node for node in tree.body if isinstance(node, Definition))
    return {n.name: n for n in found if not any(ast.unparse(d).startswith("app.") for d in n.decorator_list)}


@pytest.mark.parametrize("name", MODULES)
def test_every_module_declares_what_is_public(name: str) -> None:
    public = declared(tree_of(name))
    assert public is not None, f"{name} has no __all__"
    assert len(set(public)) == len(public)


@pytest.mark.parametrize("name", ROOMS)
def test_nothing_else_looks_public(name: str) -> None:
    tree = tree_of(name)
    hidden = [d for d in definitions(tree) if not d.startswith("_") and d not in (declared(tree) or ())]
    assert not hidden, f"{name}: {hidden} look public but are not in __all__"


@pytest.mark.parametrize("name", ROOMS)
def test_every_public_name_is_documented(name: str) -> None:
    """Wherever in the room it is defined."""
    public = declared(tree_of(name)) or []
    files = [module for module in MODULES if module == name or module.startswith(f"{name}.")]
    bare = [
        definition
        for module in files
        for definition, node in definitions(tree_of(module)).items()
        if definition in public and ast.get_docstring(node) is None
    ]
    assert not bare, f"{name}: {bare} have no docstring"


@pytest.mark.parametrize("name", MODULES)
def test_every_public_name_resolves(name: str) -> None:
    if name.endswith("__main__"):
        return
    module = importlib.import_module(name)
    for public in module.__all__:
        assert getattr(module, public) is not None


def test_package_lists_its_names() -> None:
    assert dir(deltahub) == sorted(deltahub.__all__)
    assert set(deltahub._ROOMS) | {"converters", "__version__"} == set(deltahub.__all__)


def test_version_is_the_distribution_s() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert deltahub.__version__ == project["version"]


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match=r"^module 'deltahub' has no attribute 'laod'$"):
        deltahub.laod  # noqa: B018


def test_light_names_stay_light() -> None:
    """The names that deal with packages and the Hub are reached without torch."""
    code = """
import sys, deltahub
for name in ("DeltaHubError", "pull", "search", "inspect", "fingerprint", "converters"):
    getattr(deltahub, name)
    assert "torch" not in sys.modules, name
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
