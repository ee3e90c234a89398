"""Importing the library in a fresh interpreter."""

from __future__ import annotations

from benchmarks.harness import Report
from deltahub.benching.turns import imports

__all__ = ["run"]


def run(*, quick: bool = False) -> Report:
    report = Report(name="imports", title="Importing", note="Fresh interpreters in turns, without their own start.")
    found = imports(("deltahub", "peft", "torch"), pairs=3 if quick else 5)
    timings = {name: found.timing(name, "import") for name in found.rounds}
    report.add("import", timings, base="deltahub")
    report.number("modules that are loaded by deltahub", found.number("deltahub", "modules"))
    report.number("modules that are loaded by peft", found.number("peft", "modules"))
    report.goal("import deltahub: torch among them", found.number("deltahub", "torch"), 0, at_least=False)
    ratio = timings["peft"].over(timings["deltahub"])
    report.goal("import: times less CPU than peft", ratio, 20, at_least=True)
    return report
