"""A picture, in characters, of where a delta sits in its backbone: the tree of its targets."""

from __future__ import annotations

__all__ = ["draw"]

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from deltahub.errors import printable

if TYPE_CHECKING:
    from deltahub.manifest import Manifest

_MOST_LINES = 60
_SEPARATOR = re.compile(r"\.(?![^{]*\})")  # a dot that is not inside braces, as in {0..11}


@dataclass(kw_only=True, slots=True)
class _Node:
    notes: list[str] = field(default_factory=list)
    below: dict[str, _Node] = field(default_factory=dict)


def draw(manifest: Manifest) -> str:
    """One line per place, indented under what holds it, with the modules that act there."""
    root = _Node()
    for module in manifest.modules:
        for pattern in module.targets:
            at = root
            for part in _SEPARATOR.split(pattern):
                at = at.below.setdefault(part, _Node())
            at.notes.append(f"{module.name} ({module.kind})" if module.name != module.kind else module.kind)
    lines = _lines(root, "")
    width = max((len(line) for line, note in lines if note), default=0)
    drawn = [f"{line:<{width}}  ← {note}" if note else line for line, note in lines[:_MOST_LINES]]
    if len(lines) > _MOST_LINES:
        drawn.append(f"… and {len(lines) - _MOST_LINES} more lines")
    return printable_lines(["backbone", *drawn])


def printable_lines(lines: list[str]) -> str:
    return "\n".join(printable(line).replace("```", "'''") for line in lines)


def _lines(node: _Node, indent: str) -> list[tuple[str, str]]:
    out = []
    items = list(node.below.items())
    for n, (name, child) in enumerate(items):
        while len(child.below) == 1 and not child.notes:  # a chain is one line
            (more, child), *_ = child.below.items()
            name = f"{name}.{more}"
        last = n == len(items) - 1
        out.append((f"{indent}{'└── ' if last else '├── '}{name}", ", ".join(child.notes)))
        out += _lines(child, indent + ("    " if last else "│   "))
    return out
