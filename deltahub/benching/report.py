"""Rows of measurements and goals, as Markdown and as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deltahub.benching.stopwatch import Timing, machine

__all__ = ["Report"]


@dataclass(kw_only=True)
class Report:
    """What one benchmark found.

    Attributes:
        name: of its files.
        title: its heading.
        note: what a reader must know, above the tables.
        rows: one per case and contestant: median and least processor time, wall time, and the ratio to one of them.
        numbers: what is not a time, by what it is of.
        goals: what was wanted, what was found, and whether that is enough.
        tell: hears of each as it comes.
    """

    name: str
    title: str
    note: str = ""
    rows: list[dict[str, Any]] = field(default_factory=list)
    numbers: list[dict[str, Any]] = field(default_factory=list)
    goals: list[dict[str, Any]] = field(default_factory=list)
    tell: Callable[[str], object] = lambda _: None

    def add(self, case: str, timings: Mapping[str, Timing], *, base: str) -> None:
        """Add one row per contestant, with its ratio to ``base``: the median of the ratios within each round."""
        for contestant, timing in timings.items():
            alike = len(timing.cpu) == len(timings[base].cpu)
            ratio = timing.over(timings[base]) if alike else timing.median / timings[base].median
            self.rows.append(
                {"case": case, "contestant": contestant, **timing.to_dict(), f"over {base}": round(ratio, 4)}
            )
        self.tell(case + ": " + ", ".join(f"{n} {t.median:.2f} ms" for n, t in timings.items()))

    def number(self, text: str, value: float, unit: str = "") -> None:
        """Note a number."""
        self.numbers.append({"what": text, "value": value, "unit": unit})
        self.tell(f"{text}: {value:.4g} {unit}")

    def goal(self, text: str, value: float, bound: float, *, at_least: bool, limit: str = "") -> None:
        """Note whether a goal is met; a missed one is reported, not hidden, with the limit that stops it if known."""
        met = value >= bound if at_least else value <= bound
        entry = {"goal": text, "value": round(value, 4), "bound": bound, "at_least": at_least, "met": met}
        self.goals.append({**entry, **({"limit": limit} if limit and not met else {})})
        self.tell(f"{'ok  ' if met else 'MISS'} {text}: {value:.3g} ({'≥' if at_least else '≤'} {bound})")

    def data(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {
            "name": self.name,
            "title": self.title,
            "note": self.note,
            "machine": machine(),
            "rows": self.rows,
            "numbers": self.numbers,
            "goals": self.goals,
        }

    def markdown(self) -> str:
        return markdown(self.data())

    def write_to(self, folder: Path) -> list[Path]:
        """Write ``<name>.md`` and ``<name>.json`` into a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / f"{self.name}.md", folder / f"{self.name}.json"]
        paths[0].write_text(self.markdown(), encoding="utf-8")
        paths[1].write_text(json.dumps(self.data(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        return paths


def markdown(data: Mapping[str, Any]) -> str:
    """The tables of :meth:`Report.data`."""
    lines = [f"## {data['title']}", "", *([data["note"], ""] if data["note"] else [])]
    for case in dict.fromkeys(row["case"] for row in data["rows"]):
        rows = [row for row in data["rows"] if row["case"] == case]
        base = next(key for key in rows[0] if key.startswith("over "))
        lines += [f"**{case}**", "", f"| | CPU ms | least | wall ms | {base} |", "|---|--:|--:|--:|--:|"]
        lines += [
            "| {contestant} | {cpu_ms:.2f} | {cpu_ms_min:.2f} | {wall_ms:.2f} |".format(**r) + f" {r[base]:.3f} |"
            for r in rows
        ]
        lines.append("")
    if data["numbers"]:
        lines += [
            "| | |",
            "|---|--:|",
            *(f"| {n['what']} | {n['value']:.4g} {n['unit']} |" for n in data["numbers"]),
            "",
        ]
    if data["goals"]:
        lines += ["| goal | measured | bound | met |", "|---|--:|--:|---|"]
        for g in data["goals"]:
            said = "yes" if g["met"] else "**no**" + (f": {g['limit']}" if g.get("limit") else "")
            lines.append(f"| {g['goal']} | {g['value']:.3g} | {g['bound']} | {said} |")
        lines.append("")
    lines.append(", ".join(f"{key} {value}" for key, value in data["machine"].items()))
    return "\n".join(lines) + "\n"
