"""Pages that are drawn from the data: the kinds, the error codes, the specification, the reference, the benchmarks."""

from __future__ import annotations

__all__ = [
    "benchmark_page",
    "error_page",
    "kind_page",
    "kinds_page",
    "on_files",
    "on_page_content",
    "plot",
    "reference_page",
    "spec_page",
]

import json
import re
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

from plots import benchmark_files, benchmark_page, plot  # noqa: E402
from reference import reference_page  # noqa: E402

from deltahub import kinds  # noqa: E402
from deltahub.explorer.equations import equation_rows  # noqa: E402


def on_files(files: Any, config: Any) -> Any:
    """Add the drawn pages to those that are written."""
    from mkdocs.structure.files import File

    pages = {"errors.md": error_page(), "spec.md": spec_page(), "kinds/index.md": kinds_page()}
    pages |= {f"kinds/{name}.md": kind_page(name) for name in kinds.names()}
    pages |= {"reference.md": reference_page(), **benchmark_files()}
    for path, text in pages.items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_content(html: str, **_: Any) -> str:
    """Docstrings are written for Sphinx's roles too; here a name in code says enough."""
    return re.sub(r":(?:py:)?(?:class|func|meth|mod|attr|data|exc):(?=<code)", "", html)


def kinds_page() -> str:
    """All kinds in a table."""
    lines = ["# Kinds", "", "A kind is a document: its config, its tensors, its equations.", ""]
    lines += ["| kind | | hosts | paper |", "|---|---|---|---|"]
    for name in kinds.names():
        document = kinds.get(name).document
        hosts = ", ".join(sorted(document.hosts))
        lines.append(f"| [{name}]({name}.md) | {_cell(document.title)} | {hosts} | {_paper(document.reference)} |")
    return "\n".join([*lines, ""])


def kind_page(name: str) -> str:
    """One kind: what it computes, its config and its tensors."""
    source: Mapping[str, Any] = kinds.get(name).document.source
    parts = [
        f"# {name}",
        f"{source.get('title', '')}. {_paper(source.get('reference'))}",
        source.get("description", ""),
    ]
    parts.append(f"Version {source['version']}; on {', '.join(sorted(source['hosts']))}.")
    if also := kinds.also_called(name):
        rows = [f"| {library} | {_cell(called)} |" for library, called in also.items()]
        parts.append("## What others call it\n\n| library | name |\n|---|---|\n" + "\n".join(rows))
    parts.append("## Equations")
    for entry in equation_rows(source["equations"]):
        when = f", where {entry['when']}" if entry["when"] else ""
        parts.append(f"`{entry['port']}`{when}:\n\n{entry['math']}\n\n```text\n{entry['text']}\n```")
    if source.get("config"):
        rows = [
            f"| `{key}` | {_field(field)} | {_cell(field.get('description', ''))} |"
            for key, field in source["config"].items()
        ]
        parts.append("## Config\n\n| name | | |\n|---|---|---|\n" + "\n".join(rows))
    if source.get("tensors"):
        rows = [f"| `{key}` | `{_list(t['shape'])}` | {_when(t)} |" for key, t in source["tensors"].items()]
        parts.append("## Tensors\n\n| name | shape | |\n|---|---|---|\n" + "\n".join(rows))
    return "\n\n".join(part for part in parts if part.strip()) + "\n"


def _list(values: Any) -> str:
    return f"[{', '.join(map(str, values))}]"


def _field(field: Mapping[str, Any]) -> str:
    bounds = [f"{key} {field[key]}" for key in ("minimum", "maximum") if key in field]
    if "enum" in field:
        bounds.append("one of " + ", ".join(f"`{value}`" for value in field["enum"]))
    bounds.append(f"default `{json.dumps(field['default'])}`" if "default" in field else "must be given")
    return _cell(", ".join([field["type"], *bounds]))


def _when(tensor: Mapping[str, Any]) -> str:
    said = [f"{key} = {json.dumps(_plain(value))}" for key, value in tensor.get("when", {}).items()]
    fixed = [] if tensor.get("trainable", True) else ["not trained"]
    return _cell("; ".join([*(["where " + ", ".join(said)] if said else []), *fixed]))


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _paper(reference: str | None) -> str:
    if reference and (match := re.fullmatch(r"arXiv:([\d.]+)", reference)):
        return f"[{reference}](https://arxiv.org/abs/{match[1]})"
    return _cell(reference or "")


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


def error_page() -> str:
    """Every code, its cause and what to do."""
    parts = ["# Error codes", "Every error has a code that does not change. Its message says where and what was found."]
    for path in sorted((ROOT / "spec" / "errors").glob("*.toml")):
        parts.append(f"## {path.stem}")
        for code, entry in tomllib.loads(path.read_text(encoding="utf-8")).items():
            clause = f" Clause {entry['clause']} of [the format](spec.md)." if "clause" in entry else ""
            parts.append(f"### `{code}`\n\n{_cell(entry['cause'])}\n\n**Do:** {_cell(entry['remedy'])}{clause}")
    return "\n\n".join(parts) + "\n"


def spec_page() -> str:
    """SPEC.md, with links into the repository as links here where there is such a page."""
    text = (ROOT / "SPEC.md").read_text(encoding="utf-8")
    text = re.sub(r"\]\(spec/kinds/([\w-]+)\.toml\)", r"](kinds/\1.md)", text)
    text = re.sub(r"\[([^\]]+)\]\((?!kinds/|https?:|#)[^)]+\)", r"\1", text)
    return re.sub(r"^```(\w+) \w+$", r"```\1", text, flags=re.MULTILINE)
