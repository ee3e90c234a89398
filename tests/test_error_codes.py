"""The codes in the source are the codes in ``spec/errors``: none undescribed, none left over."""

from __future__ import annotations

import ast
import re
import tomllib
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CODE = re.compile(r"E_[A-Z0-9]+(?:_[A-Z0-9]+)*")


def codes_in(tree: ast.AST) -> tuple[set[str], list[int]]:
    """Whole string constants that are codes; and the lines that put a code together out of parts."""
    whole, built = set(), []
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            first = node.values[0] if node.values else None
            if isinstance(first, ast.Constant) and str(first.value).startswith("E_"):
                built.append(node.lineno)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and CODE.fullmatch(node.value):
            whole.add(node.value)
    return whole, built


@cache
def source_codes() -> dict[str, set[Path]]:
    found: dict[str, set[Path]] = {}
    for folder in ("deltahub", "converters"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            whole, built = codes_in(ast.parse(path.read_text(encoding="utf-8")))
            assert not built, f"{path}: codes are written out in full, not built (lines {built})"
            for code in whole:
                found.setdefault(code, set()).add(path)
    return found


@cache
def described() -> dict[str, tuple[Path, dict[str, object]]]:
    entries: list[tuple[str, Path, dict[str, object]]] = []
    for path in sorted((ROOT / "spec" / "errors").glob("*.toml")):
        document = tomllib.loads(path.read_text(encoding="utf-8"))
        entries.extend((code, path, entry) for code, entry in document.items())
    twice = [code for code, n in Counter(code for code, _, _ in entries).items() if n > 1]
    assert not twice, f"described in two files: {twice}"
    return {code: (path, entry) for code, path, entry in entries}


def test_every_code_raised_is_described() -> None:
    missing = {code: [p.name for p in paths] for code, paths in source_codes().items() if code not in described()}
    assert not missing


def test_every_code_described_is_raised() -> None:
    left = {code: path.name for code, (path, _) in described().items() if code not in source_codes()}
    assert not left


def test_every_description_is_complete() -> None:
    for code, (path, entry) in described().items():
        assert CODE.fullmatch(code), f"{path.name}: {code}"
        assert set(entry) - {"clause"} == {"cause", "remedy"}, f"{path.name}: {code}"
        assert all(isinstance(v, str) and v.strip() for v in entry.values()), f"{path.name}: {code}"
        assert re.fullmatch(r"DH-[A-Z0-9.-]+", str(entry.get("clause", "DH-1"))), f"{path.name}: {code}"


@pytest.mark.parametrize(
    ("source", "codes", "built"),
    [
        ('raise KindError("E_KIND_CONFIG", "x")', {"E_KIND_CONFIG"}, []),
        ('"""Raises E_NOT_HERE."""', set(), []),
        ('TABLE = {"a": "E_A_B1"}', {"E_A_B1"}, []),
        ('f"E_{x}"', set(), [1]),
    ],
)
def test_codes_are_read_from_source(source: str, codes: set[str], built: list[int]) -> None:
    assert codes_in(ast.parse(source)) == (codes, built)
