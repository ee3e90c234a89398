"""A structure as a tree: in colour on a terminal, in plain text elsewhere, and as a picture."""

from __future__ import annotations

__all__ = ["as_png", "as_svg", "as_text", "drawn"]

import io
import re
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from deltahub.errors import UsageError, printable
from deltahub.inspecting.structure import Group, SiteSummary, fold

if TYPE_CHECKING:
    from rich.console import Group as Renderables
    from rich.text import Text

    from deltahub.inspecting.packages import Inspection, ModuleSummary
    from deltahub.inspecting.structure import Structure

_WIDE = 400
_MOST_LINES = 2000


def as_text(found: Inspection | Structure, *, width: int = _WIDE) -> str:
    """The tree in plain text, without colours and without trailing blanks."""
    from rich.console import Console

    console = Console(file=io.StringIO(), width=width, color_system=None, force_terminal=False)
    console.print(drawn(found), soft_wrap=True)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in text.splitlines())


def as_svg(found: Inspection | Structure, *, width: int = 120) -> str:
    """The tree as a picture that needs nothing else: no font and no style is fetched."""
    from rich._export_format import CONSOLE_SVG_FORMAT
    from rich.console import Console

    console = Console(file=io.StringIO(), width=width, record=True, force_terminal=True, color_system="truecolor")
    console.print(drawn(found))
    plain = re.sub(r"@font-face \{\{.*?\}\}\s*|<!--.*?-->\s*", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
    return str(console.export_svg(title=printable(found.source) or "deltahub", code_format=plain, unique_id="deltahub"))


_FONTS = {"darwin": "Menlo", "win32": "Consolas"}
_LETTER = (
    '<svg xmlns="http://www.w3.org/2000/svg" width="40" height="40">'
    '<text x="4" y="30" font-family="monospace">M</text></svg>'
)


def as_png(found: Inspection | Structure, *, width: int = 120, zoom: float = 1.0) -> bytes:
    """The same picture as pixels, in this machine's own font for code.

    Args:
        found: what to draw.
        width: characters in a line.
        zoom: how many pixels a unit of the SVG gets.

    Raises:
        UsageError: ``E_USAGE_PICTURE`` where the library for it is not installed, or there is no such font.
    """
    try:
        import resvg_py
    except ImportError:
        raise UsageError(
            "E_USAGE_PICTURE", "a PNG needs `resvg-py`", hint='pip install "deltahub[png]", or write an SVG'
        ) from None
    font = _FONTS.get(sys.platform, "DejaVu Sans Mono")

    def pixels(svg: str, scale: float) -> bytes:
        return bytes(resvg_py.svg_to_bytes(svg_string=svg, zoom=scale, monospace_family=font))

    if pixels(_LETTER, 1) == pixels(_LETTER.replace("M<", "<"), 1):
        raise UsageError("E_USAGE_PICTURE", "a PNG needs a font to write with", expected=font, hint="write an SVG")
    return pixels(as_svg(found, width=width).replace("Fira Code, monospace", "monospace"), zoom)


def count(number: float) -> str:
    """A number of parameters as people read it: ``109.5 M``."""
    for unit in ("", "k", "M", "G"):
        if number < 1000 or unit == "G":
            break
        number /= 1000
    return f"{number:.0f}" if not unit else f"{number:.1f} {unit}"


def size(number: float) -> str:
    """A number of bytes as people read it."""
    return f"{number:.0f} B" if number < 1000 else f"{count(number)}B"


def drawn(found: Inspection | Structure) -> Renderables:
    """What rich prints: a few lines on the whole, then the tree."""
    from rich.console import Group as Renderables
    from rich.tree import Tree

    from deltahub.inspecting.structure import Structure

    lines = list(_structure_head(found) if isinstance(found, Structure) else _package_head(found))
    top = fold(found.root)
    tree = Tree(_label(top, first=True, fallback=printable(found.source)), guide_style="dim")
    left = [_MOST_LINES]
    _add(tree, top, left)
    if left[0] <= 0:
        tree.add(_text(("… cut here", "dim")))
    return Renderables(*lines, _text(""), tree)


def _where(module: ModuleSummary) -> str:
    """A module's targets, and which part of them it is on."""
    rows, stack = module.part.get("rows"), module.part.get("stack")
    text = " ".join(module.targets)
    if rows:
        text += f" (outputs {rows['start']} to {rows['stop'] - 1} of every {rows['period']})"
    return text + (f" (each of {stack})" if stack else "")


def _text(*parts: str | tuple[str, str]) -> Text:
    from rich.text import Text

    return Text.assemble(*(printable(p) if isinstance(p, str) else (printable(p[0]), p[1]) for p in parts))


def _row(label: str, *parts: str | tuple[str, str]) -> Text:
    return _text((f"{label:<12}", "dim"), *parts)


def _structure_head(found: Structure) -> Iterator[Text]:
    where = found.source + (f"@{found.commit[:12]}" if found.commit else "")
    yield _row(found.what, *([where, "  "] if where else []), (found.class_name, "bold"))
    dtypes = ", ".join(f"{dtype} {100 * n / found.parameters:.3g} %" for dtype, n in found.dtypes.items())
    only = next(iter(found.dtypes), "") if len(found.dtypes) == 1 else dtypes
    yield _row("parameters", (f"{found.parameters:,}", "cyan"), f", {size(found.size)}, {only or 'none'}")
    if found.what == "model":
        share = f" ({100 * found.trainable / found.parameters:.3g} %)" if found.trainable and found.parameters else ""
        yield _row("trainable", (f"{found.trainable:,}", "yellow" if found.trainable else ""), share, " of these")
    for delta in found.deltas:
        share = "" if delta.share is None else f" ({100 * delta.share:.3g} % of the backbone)"
        yield _row(
            "delta",
            (delta.name, "bold green"),
            f" {delta.state}, {', '.join(delta.kinds)} at {delta.sites} place(s), {delta.parameters:,} numbers{share}",
        )
    for note in found.notes:
        yield _row("note", note)


def _package_head(found: Inspection) -> Iterator[Text]:
    origin = found.backbone.get("source") or {}
    at = f"@{origin['commit'][:12]}" if origin.get("commit") else ""
    yield _row("package", (found.source, "bold"), f"@{found.commit[:12]}" if found.commit else "")
    yield _row("format", found.spec_version, f", requires {', '.join(found.requires)}" if found.requires else "")
    yield _row("backbone", f"{origin.get('hub', '(not said where)')}{at} {origin.get('class', '')}".rstrip())
    share = "" if found.share is None else f", {100 * found.share:.3g} % of the backbone's bytes"
    total = f" in {len(found.files)} file(s), {size(sum(found.files.values()))}{share}"
    yield _row("parameters", (f"{found.parameters:,}", "cyan"), total)
    if found.kinds:
        yield _row("own kinds", f"{', '.join(found.kinds)} (data in the package; no code)")
    for setting in found.settings:
        yield _row("setting", f"{setting['on']}.{setting['path']}: {setting['was']!r} becomes {setting['value']!r}")
    yield _row("probe", "yes" if found.probe else "no")
    yield _text("")
    head = ("module", "kind", "sites", "parameters", "targets")
    rows = [(m.name, f"{m.kind}@{m.version}", m.sites, f"{m.parameters:,}", _where(m)) for m in found.modules]
    cells = [[str(cell) for cell in row] for row in [head, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head) - 1)]
    for n, row in enumerate(cells):
        padded = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False))
        yield _text((f"{padded}  {row[-1]}", "dim" if n == 0 else ""))


def _add(tree: Any, group: Group, left: list[int]) -> None:
    for inside in group.below:
        left[0] -= 1
        if left[0] <= 0:
            return
        branch = tree.add(_label(inside))
        _add(branch, inside, left)


def _label(group: Group, *, first: bool = False, fallback: str = "") -> Text:
    """One line: name, class, how many alike, weight, parameters, and what deltas do here."""
    node = group.nodes[0]
    parts: list[str | tuple[str, str]] = [(group.label or fallback or node.type, "bold")]
    if node.type and (group.label or not first):
        parts.append((f" ({node.type})", "dim"))
    if node.same:
        parts.append((f" is {node.same}", "dim"))
    if node.shape:
        parts.append((f" [{', '.join(map(str, node.shape))}]", "blue"))
    if len(group.nodes) > 1:
        parts.append((f" {len(group.nodes)} ×", "magenta"))
    if numbers := node.count:
        trainable = any(parameter.trainable for parameter in node.all_parameters())
        parts.append((f" {count(numbers)}", "yellow" if trainable else "cyan"))
    tied = [f"{parameter.name} = {parameter.tied}" for parameter in node.parameters if parameter.tied]
    if tied:
        parts.append((f" tied: {', '.join(tied)}", "dim"))
    for site in node.sites:
        parts += _site(site)
    return _text(*parts)


def _site(site: SiteSummary) -> Iterator[str | tuple[str, str]]:
    """What a delta does at a module: its name, kind, config, shapes, share."""
    who = f"{site.delta}/{site.module}" if site.delta and site.delta != site.module else site.module
    config = " ".join(f"{key}={value}" for key, value in site.config.items() if value is not False)
    yield ("  ← ", "bold green")
    yield (f"{who} " if who != site.kind.partition("@")[0] else "", "bold green")
    yield (site.kind + (f" {config}" if config else ""), "green")
    shapes = ", ".join(f"{name} [{', '.join(map(str, shape))}]" for name, shape in site.tensors.items())
    yield f" {shapes}" if shapes else ""
    share = "" if site.share is None else f" ({100 * site.share:.3g} %)"
    yield (f" {site.parameters:,}{share}", "cyan")
    if site.ports:
        yield (f" on {', '.join(site.ports)}", "dim")
