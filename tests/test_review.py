"""Every place that opens a file, imports by name, runs code or a program, or unpickles has been looked at.

``tests/reviewed.toml`` lists them, each with the reason why it is harmless. A new one fails here until somebody has
thought about where its argument comes from; so does an entry whose place is gone.
"""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("deltahub", "converters", "spec")
BUILTINS = {"open", "eval", "exec", "compile", "__import__", "import_module", "breakpoint", "FileIO", "urlopen"}
MODULES = {
    "subprocess": None,
    "runpy": None,
    "pty": None,
    "ctypes": None,
    "importlib": {"import_module", "reload"},
    "os": {"open", "fork", "popen", "system", "startfile", "posix_spawn", "posix_spawnp"},
    "torch": {"load"},
    "np": {"load", "memmap", "fromfile"},
    "yaml": {"load", "unsafe_load", "full_load", "load_all"},
    "webbrowser": None,
}
UNPICKLERS = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "code", "codeop"}
WHOLE = {"read_text", "read_bytes", "write_text", "write_bytes", "unpack_archive", "extractall"}
OURS = {"TensorFile", "Package"}
"""Readers of ours, whose own opening is in the list."""


def sensitive(path: Path) -> Iterator[str]:
    """What a file does that must be reviewed, as ``how it is written``."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from (f"import {name}" for name in names if name.partition(".")[0] in UNPICKLERS)
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            owner, _, last = name.rpartition(".")
            module = owner.partition(".")[0]
            builtin = not owner and name in BUILTINS
            listed = module in MODULES and last in (MODULES[module] or {last})
            opens = last in WHOLE or (last == "open" and owner not in OURS)
            entry_point = last == "load" and not node.args and not node.keywords
            starts = module == "os" and last.startswith(("exec", "spawn"))
            if builtin or listed or opens or entry_point or starts:
                yield name


def found() -> dict[str, set[str]]:
    places: dict[str, set[str]] = {}
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            if not any(parent.is_symlink() for parent in [path, *path.parents]):
                names = set(sensitive(path))
                if names:
                    places[path.relative_to(ROOT).as_posix()] = names
    return places


def test_every_sensitive_place_was_reviewed() -> None:
    reviewed = tomllib.loads((ROOT / "tests" / "reviewed.toml").read_text("utf-8"))
    listed = {path: set(entries) for path, entries in reviewed.items()}
    places = found()
    new = {path: names - listed.get(path, set()) for path, names in places.items() if names - listed.get(path, set())}
    gone = {path: names - places.get(path, set()) for path, names in listed.items() if names - places.get(path, set())}
    assert (new, gone) == ({}, {}), "review them, and say in tests/reviewed.toml why they are harmless"
    assert all(len(reason) > 10 for entries in reviewed.values() for reason in entries.values())


def test_what_is_looked_for(tmp_path: Path) -> None:
    source = tmp_path / "x.py"
    source.write_text(
        "import pickle\nimport subprocess\nfrom marshal import loads\neval('1')\nexec('')\n__import__('os')\n"
        "subprocess.run([])\nos.system('')\ntorch.load('x')\nyaml.load('')\nPath('x').open()\nentry.load()\n"
        "compile('', '', 'exec')\nre.compile('')\nmodel.eval()\nTensorFile.open('x')\nos.execv('', [])\n"
    )
    assert set(sensitive(source)) == {
        "import pickle", "import marshal", "eval", "exec", "__import__", "subprocess.run", "os.system", "torch.load",
        "yaml.load", "Path('x').open", "entry.load", "compile", "os.execv",
    }  # fmt: skip
