"""How time and memory grow: with sites, with resident deltas, with bytes. Straight lines on logarithmic axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness import OUT, Report
from deltahub.benching.models import LINEARS
from deltahub.benching.turns import contest

__all__ = ["run", "slope"]

Points = list[tuple[float, float]]


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Of the line that fits best on logarithmic axes: 1 is proportional, 2 quadratic."""
    xs, ys = [math.log(x) for x, _ in points], [math.log(y) for _, y in points]
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True)) / sum((a - x) ** 2 for a in xs)


def _draw(report: Report, name: str, curves: dict[str, Points], *, title: str, x: str, y: str) -> None:
    from deltahub.recipes.plot import loglog

    loglog(OUT / f"{name}.png", {f"{k}, slope {slope(v):.2f}": v for k, v in curves.items()}, title=title, x=x, y=y)
    report.note += f" Drawn: `{name}.png`."
    for label, points in curves.items():
        report.number(f"{title}: slope, {label}", slope(points))


def run(*, quick: bool = False) -> Report:
    report = Report(name="scaling", title="Scaling", note="CPU time of one thread; a slope of 1 is proportional.")
    Path(OUT).mkdir(exist_ok=True)
    pairs = 1 if quick else 2
    by_sites: dict[str, Points] = {}
    for layers in (4, 16, 64) if quick else (4, 16, 64, 256):
        found = contest(
            ["attach", "load"], f"layers:{layers}", pairs=pairs, warmup=0, targets=LINEARS, rank=4, repeats=3
        )
        sites = found.number("deltahub", "attach: sites")
        for side in found.rounds:
            for task in ("attach", "load"):
                point = (sites, found.timing(side, f"{task}: {task}").median)
                by_sites.setdefault(f"{side}, {task}", []).append(point)
    _draw(report, "scaling-sites", by_sites, title="Time over sites", x="sites", y="CPU ms")
    for task in ("attach", "load"):
        line = slope(by_sites[f"deltahub, {task}"])
        report.goal(f"{task}: slope of time over sites", line, 1.1, at_least=False)

    counts = [3, 10, 30] if quick else [3, 10, 30, 100]
    deltas: dict[str, Points] = {}
    sides: dict[str, list[int]] = {"deltahub": [*counts, 300, 1000] if not quick else counts, "peft": counts}
    for side, wanted in sides.items():
        found = contest(
            ["resident"], "layers:12", sides=[side], pairs=1, warmup=0, targets=LINEARS, rank=64, resident=wanted
        )
        deltas[side] = [(n, found.timing(side, f"resident: loading the last of {n}").median) for n in wanted]
        over = found.number(side, f"resident: {wanted[-1]} resident, memory over the files' bytes")
        report.number(f"{side}: memory of {wanted[-1]} resident deltas over their files' bytes", over)
    _draw(report, "scaling-deltas", deltas, title="Loading one more", x="resident deltas", y="CPU ms for the last")
    line = slope(deltas["deltahub"])
    report.goal("loading one more: slope of time over resident deltas", line, 0.1, at_least=False)
    return report
