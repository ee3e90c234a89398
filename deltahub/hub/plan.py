"""A picture, as SVG, of where a delta sits in its backbone: layers from left to right, places in a layer downwards.

It is drawn from the manifest alone, by this file alone, and the same package gives the same bytes. What a package calls
its modules and paths is text in it, never markup.
"""

from __future__ import annotations

__all__ = ["PICTURE", "plan"]

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING

from deltahub.errors import printable

if TYPE_CHECKING:
    from deltahub.manifest import Manifest

PICTURE = "delta.svg"
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#8a6d00", "#666666")
"""Okabe and Ito's, which people who see fewer colours tell apart as well."""
_ROW, _CELL, _WIDEST, _LETTER = 22, 22, 640, 7.3
_MOST_ROWS, _MOST_LAYERS, _LONGEST = 48, 400, 46
_NUMBER = re.compile(r"\d{1,6}")
_STYLE = (
    "text{font:12px ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;fill:#24292f}"
    ".dim{fill:#6e7781}.cell{fill:#eaeef2}.back{fill:#ffffff}"
    "@media(prefers-color-scheme:dark){text{fill:#e6edf3}.dim{fill:#8b949e}.cell{fill:#30363d}.back{fill:#0d1117}}"
)


@dataclass(kw_only=True, slots=True)
class _Stack:
    """Modules in a row that are numbered: what acts at which of them, by the path inside."""

    last: int = 0
    rows: dict[str, dict[int, list[int]]] = field(default_factory=dict)


def plan(manifest: Manifest, parameters: Mapping[str, int] | None = None) -> str:
    """The picture.

    Args:
        manifest: the package's.
        parameters: how many numbers each module holds, by module name.
    """
    stacks, single = _sorted(manifest)
    names = [*single, *(row for stack in stacks.values() for row in stack.rows)]
    left = 16 + _LETTER * max((len(_cut(name)) for name in names), default=1)
    parts: list[str] = []
    y, width = 28.0, left + 240.0
    left_rows = _MOST_ROWS
    for name, acting in single.items():
        if left_rows <= 0:
            break
        parts += [_label(name, y), *_box(left, y, _CELL, acting)]
        y, left_rows = y + _ROW, left_rows - 1
    for prefix, stack in stacks.items():
        if left_rows <= 0:
            break
        rows = dict(list(stack.rows.items())[:left_rows])
        left_rows -= len(rows)
        drawn, y, right = _grid(prefix, stack, rows, left, y)
        parts += drawn
        width = max(width, right)
    hidden = len(names) - (_MOST_ROWS - max(left_rows, 0))
    if hidden > 0:
        parts.append(f'<text class="dim" x="12" y="{y + 15:g}">… and {hidden} more rows</text>')
        y += _ROW
    y += 12
    for n, module in enumerate(manifest.modules):
        count = f", {parameters[module.name]:,} numbers" if parameters and module.name in parameters else ""
        called = module.name if module.name == module.kind else f"{module.name}: {module.kind}"
        text = f"{called} at {len(module.paths):,} place{'s' if len(module.paths) != 1 else ''}{count}"
        parts += [*_box(12, y, 14, [n]), f'<text x="34" y="{y + 12:g}">{_safe(_cut(text, 90))}</text>']
        width = max(width, 46 + _LETTER * min(len(text), 90))
        y += _ROW
    return _framed(parts, width, y + 6, _told(manifest))


def _told(manifest: Manifest) -> str:
    """What the picture shows, for whoever does not see it."""
    kinds = ", ".join(dict.fromkeys(module.kind for module in manifest.modules))
    return f"{kinds} at {sum(len(module.paths) for module in manifest.modules):,} places of the backbone"


def _sorted(manifest: Manifest) -> tuple[dict[str, _Stack], dict[str, list[int]]]:
    """Places in numbered stacks, and places by themselves, with the numbers of the modules that act there."""
    stacks: dict[str, _Stack] = {}
    single: dict[str, list[int]] = {}
    for n, module in enumerate(manifest.modules):
        for path in module.paths:
            parts = path.split(".")
            at = next((i for i, part in enumerate(parts) if _NUMBER.fullmatch(part)), None)
            if at is None or int(parts[at]) >= _MOST_LAYERS:
                single.setdefault(path, []).append(n)
                continue
            stack = stacks.setdefault(".".join(parts[:at]), _Stack())
            stack.last = max(stack.last, int(parts[at]))
            row = stack.rows.setdefault(".".join(parts[at + 1 :]) or "(whole)", {})
            row.setdefault(int(parts[at]), []).append(n)
    return stacks, single


def _grid(
    prefix: str, stack: _Stack, rows: Mapping[str, Mapping[int, list[int]]], left: float, y: float
) -> tuple[list[str], float, float]:
    layers = stack.last + 1
    step = min(_CELL, _WIDEST / layers)
    every = next(n for n in (1, 2, 4, 5, 10, 20, 50, 100) if n * step >= 3 * _LETTER or n == 100)
    title = f"{prefix or '(top)'}: {layers} layer{'s' if layers != 1 else ''}"
    out = [f'<text class="dim" x="12" y="{y + 24:g}">{_safe(_cut(title, 60))}</text>']
    y += 32
    for name, acting in rows.items():
        out.append(_label(name, y))
        for layer in range(layers):
            out += _box(left + layer * step, y, step, acting.get(layer, []))
        y += _ROW
    for layer in range(0, layers, every):
        x = left + (layer + 0.5) * step
        out.append(f'<text class="dim" text-anchor="middle" x="{x:g}" y="{y + 12:g}">{layer}</text>')
    return out, y + 20, left + layers * step + 16


def _box(x: float, y: float, step: float, acting: list[int]) -> list[str]:
    """A cell: empty, or a stripe for each module that acts there."""
    gap = 2 if step > 6 else 0.5
    wide, high = step - gap, min(18, max(step - gap, 10))
    if not acting:
        return [f'<rect class="cell" x="{x:g}" y="{y:g}" width="{wide:g}" height="{high:g}" rx="2"/>']
    each = high / len(acting)
    return [
        f'<rect class="at" fill="{_COLOURS[n % len(_COLOURS)]}" x="{x:g}" y="{y + i * each:g}" width="{wide:g}" '
        f'height="{each:g}" rx="2"/>'
        for i, n in enumerate(acting)
    ]


def _label(name: str, y: float) -> str:
    return f'<text x="12" y="{y + 13:g}">{_safe(_cut(name))}</text>'


def _cut(text: str, length: int = _LONGEST) -> str:
    """A name that is at most so long; what tells places apart is at its end."""
    return text if len(text) <= length else f"…{text[1 - length :]}"


def _safe(text: str) -> str:
    return escape(printable(text))


def _framed(parts: list[str], width: float, height: float, told: str) -> str:
    size = f'width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" role="img" {size}><title>{_safe(told)}</title>'
    back = '<rect class="back" width="100%" height="100%" rx="6"/>'
    return "\n".join([head, f"<style>{_STYLE}</style>", back, *parts, "</svg>", ""])
