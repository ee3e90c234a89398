"""The Python reference: which names there are is asked of the package, what they say is read by mkdocstrings."""

from __future__ import annotations

__all__ = ["reference_page"]

import importlib
from collections.abc import Iterator

import deltahub

ROOMS = {
    "deltahub.training": "Training",
    "deltahub.hub": "The Hub",
    "deltahub.sign": "Signatures",
    "deltahub.converters": "Converters",
    "deltahub.inspecting": "Looking",
    "deltahub.explorer": "The explorer",
    "deltahub.recipes": "Recipes",
    "deltahub.testing": "For tests",
    "deltahub.errors": "Errors",
}


def reference_page() -> str:
    """Every public name of the package and of the rooms that users meet, each once."""
    shown: set[str] = set()
    parts = ["# Python", "What is public is here. `import deltahub` is light: torch is loaded when a name needs it."]
    parts += ["## deltahub", *_entries("deltahub", shown)]
    for room, title in ROOMS.items():
        entries = list(_entries(room, shown))
        if entries:
            parts += [f"## {title}: `{room}`", *entries]
    return "\n\n".join(parts) + "\n"


def _entries(room: str, shown: set[str]) -> Iterator[str]:
    module = deltahub if room == "deltahub" else importlib.import_module(room)
    for name in sorted(module.__all__, key=str.lower):
        value = getattr(module, name)
        home = getattr(value, "__module__", None)
        where = f"{home}.{getattr(value, '__qualname__', name)}"
        if not isinstance(home, str) or not home.startswith("deltahub") or where in shown:
            continue
        shown.add(where)
        yield f"::: {where}\n    options:\n      heading: {name}\n      toc_label: {name}"
