"""The benchmarks as a page: what the last run wrote, in tables and as pictures."""

from __future__ import annotations

__all__ = ["benchmark_files", "benchmark_page", "plot"]

import io
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

OUT = Path(__file__).resolve().parents[1] / "benchmarks" / "out"
OURS, OTHERS, FLOOR = "#0072b2", "#b0b7be", "#e3e6e9"


def results() -> dict[str, Mapping[str, Any]]:
    """What was measured: name to document."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(OUT.glob("*.json"))}


def benchmark_files() -> dict[str, str]:
    """The page and its pictures: path in the site to content."""
    found = {"benchmarks/index.md": benchmark_page()}
    for name, result in results().items():
        for n, (_, rows) in enumerate(cases(result)):
            found[f"benchmarks/{name}-{n}.svg"] = plot(rows)
    return found


def cases(result: Mapping[str, Any]) -> list[tuple[str, list[Mapping[str, Any]]]]:
    """The rows of each case, for those with something to compare."""
    grouped = itertools.groupby(result["rows"], key=lambda row: row["case"])
    return [(case, rows) for case, group in grouped if len(rows := list(group)) > 1]


def benchmark_page() -> str:
    """All of them, with the machine that each ran on."""
    parts = [
        "# Benchmarks",
        "`make bench` measures; these are the numbers of its last run, floors included. Bars are CPU ",
    ]
    parts[-1] += (
        "time in milliseconds, the median of the repeats; blue is DeltaHub, the palest a floor that nobody is below."
    )
    for name, result in results().items():
        machine = result["machine"]
        parts.append(f"## {result.get('title', name.replace('_', ' ').capitalize())}")
        if result.get("note"):
            parts.append(str(result["note"]))
        versions = ", ".join(f"{key} {machine[key]}" for key in ("torch", "transformers", "peft") if machine.get(key))
        parts.append(f"{machine['cpu']}, {machine['cores']} cores, load {machine['load']} meanwhile; {versions}.")
        for n, (case, rows) in enumerate(cases(result)):
            told = ", ".join(f"{row['contestant']} {row['cpu_ms']:.3g} ms" for row in rows)
            parts.append(f"**{case}**\n\n![{told}]({name}-{n}.svg)".replace("|", "/"))
        if result.get("goals"):
            parts.append(
                "| goal | measured | bound | met |\n|---|---:|---:|---|\n" + "\n".join(map(_goal, result["goals"]))
            )
    return "\n\n".join(parts) + "\n"


def _goal(goal: Mapping[str, Any]) -> str:
    met = "yes" if goal["met"] else "no"
    return f"| {_cell(goal['goal'])} | {_number(goal['value'])} | {_number(goal['bound'])} | {met} |"


def _cell(text: str) -> str:
    return text.replace("|", "/")


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else str(value)


def plot(rows: Sequence[Mapping[str, Any]]) -> str:
    """Bars of one case, as SVG; the same numbers give the same text."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    names = [str(row["contestant"]) for row in rows]
    values = [float(row["cpu_ms"]) for row in rows]
    with mpl.rc_context(
        {"svg.hashsalt": "deltahub", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9}
    ):
        figure = Figure(figsize=(8, 0.5 + 0.34 * len(rows)), layout="constrained")
        axes = figure.add_subplot()
        bars = axes.barh(range(len(rows)), values, color=[_colour(name) for name in names], height=0.7)
        axes.bar_label(bars, labels=[f"{value:.3g} ms" for value in values], padding=4)
        axes.set_yticks(range(len(rows)), names)
        axes.invert_yaxis()
        positive = [value for value in values if value > 0]
        if positive and max(positive) > 60 * min(positive):
            axes.set_xscale("log")
        else:
            axes.set_xlim(0, max([*values, 1e-9]) * 1.15)
        axes.spines[["top", "right"]].set_visible(False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def _colour(name: str) -> str:
    if name.startswith(("floor", "bare")):
        return FLOOR
    return OURS if "deltahub" in name.lower() or "converters." in name else OTHERS
