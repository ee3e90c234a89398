"""The three ways to have DeltaHub: a wheel, an editable install, and a checkout with nothing installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
LINKS = {"converters": "../converters", "spec": "../spec"}

PROBE = """
import pathlib, sys
import deltahub, deltahub.converters, deltahub.spec, deltahub.errors
for module in (deltahub, deltahub.converters, deltahub.spec):
    folder = pathlib.Path(module.__file__).resolve()
    assert folder.is_relative_to(pathlib.Path(sys.argv[1]).resolve()), folder
    assert module.__name__.startswith("deltahub")
kinds = pathlib.Path(deltahub.spec.__file__).parent / "kinds"
assert (kinds / "lora.toml").is_file(), list(kinds.iterdir())
"""


def run(code: str, *args: object, cwd: Path, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | ({"PYTHONPATH": str(path)} if path else {})
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is shipped: builds leave `build/` and `*.egg-info` behind, and must not find old ones."""
    copy = tmp_path_factory.mktemp("checkout")
    for folder in ("deltahub", "converters", "spec"):
        shutil.copytree(ROOT / folder, copy / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, copy / file)
    return copy


def build(checkout: Path, out: Path, hook: str) -> Path:
    out.mkdir()
    code = f"""
import sys
from setuptools import build_meta
print(build_meta.{hook}(sys.argv[1], {{"editable_mode": "compat"}}))
"""
    done = run(code, out, cwd=checkout)
    assert done.returncode == 0, done.stderr[-3000:]
    (wheel,) = out.glob("*.whl")
    return wheel


def shipped_files() -> set[str]:
    """What a wheel must hold: all modules, and all of the specification but its conformance suite."""
    wanted = {"deltahub/py.typed"}
    for folder, inside in (("deltahub", "deltahub"), ("converters", "deltahub/converters"), ("spec", "deltahub/spec")):
        for path in (ROOT / folder).rglob("*"):
            name = path.relative_to(ROOT / folder).as_posix()
            if "__pycache__" in path.parts or not path.is_file() or name.startswith("conformance/"):
                continue
            if path.suffix in {".py", ".html", ".css", ".js"} or folder == "spec":
                wanted.add(f"{inside}/{name}")
    return wanted


def test_packages_are_the_tree() -> None:
    """setuptools takes only what is listed; a folder that is forgotten would be missing from the wheel."""
    files = (Path(name) for name in shipped_files() if name.endswith(".py"))
    tree = {".".join(path.parent.parts) for path in files}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == tree


@pytest.mark.parametrize("name", LINKS)
def test_links(name: str) -> None:
    link = ROOT / "deltahub" / name
    assert link.is_symlink()
    assert str(link.readlink()) == LINKS[name]  # relative: a clone anywhere resolves it


def test_checkout_with_nothing_installed(checkout: Path) -> None:
    done = run(PROBE, checkout, cwd=checkout)
    assert done.returncode == 0, done.stderr


def test_bare_converters_is_refused(checkout: Path) -> None:
    done = run("import converters", cwd=checkout)
    assert done.returncode == 1
    assert done.stderr.strip().endswith("ImportError: import deltahub.converters, not converters")


@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
def test_wheel(checkout: Path, tmp_path: Path, links: bool) -> None:
    """Also from a checkout where links are text files, as git makes them with core.symlinks=false."""
    source = tmp_path / "source"
    shutil.copytree(checkout, source, symlinks=True)
    for name, target in LINKS.items():
        if not links:
            (source / "deltahub" / name).unlink()
            (source / "deltahub" / name).write_text(target, encoding="utf-8")
    wheel = build(source, tmp_path / "dist", "build_wheel")
    with zipfile.ZipFile(wheel) as archive:
        names = {n for n in archive.namelist() if ".dist-info/" not in n}
        licence = [n for n in archive.namelist() if n.endswith("licenses/LICENSE")]
        archive.extractall(tmp_path / "site")
    assert names == shipped_files()
    assert licence
    done = run(PROBE, tmp_path / "site", cwd=tmp_path, path=tmp_path / "site")
    assert done.returncode == 0, done.stderr


def test_editable(checkout: Path, tmp_path: Path) -> None:
    wheel = build(checkout, tmp_path / "dist", "build_editable")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    # A .pth file works only in a site directory; one that is added at run time is as good as any. What it adds
    # goes first, because the environment of these tests may have an editable install of its own.
    code = f"""
import site, sys
before = list(sys.path)
site.addsitedir({str(tmp_path / "site")!r})
sys.path[:] = [p for p in sys.path if p not in before] + before
{PROBE}"""
    done = run(code, checkout, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_constraints_pin_exactly() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    names = [line.split("==")[0].lower().replace("_", "-") for line in lines]
    assert all(line.count("==") == 1 and not set(line) & set("@/ ;#+") for line in lines)
    assert names == sorted(set(names))
    pins = dict(zip(names, (line.split("==")[1] for line in lines), strict=True))
    assert pins["torch"] == "2.13.0"
    wanted = {r.split(";")[0] for extra in PROJECT["project"]["optional-dependencies"].values() for r in extra}
    wanted |= set(PROJECT["project"]["dependencies"])
    for requirement in wanted:
        name = requirement
        for mark in "[=<>!~":
            name = name.split(mark)[0]
        assert name in {"deltahub", "onnxruntime"} or name.replace("_", "-").lower() in pins, requirement
