"""Attaching, saving, loading, switching: both libraries in fresh processes that take turns, three models."""

from __future__ import annotations

from benchmarks.harness import Report
from deltahub.benching.models import LINEARS, SHAPES
from deltahub.benching.turns import Contest, contest

__all__ = ["run"]

OURS, PEFT = "deltahub", "peft"
HASHING = "SHA-256 of the file is {hash:.1f} ms, a tenth of peft is {tenth:.1f} ms"
READING = "reading, and an object for each tensor, is {floor:.1f} ms"


def _attach(report: Report, found: Contest, title: str) -> None:
    sites = found.number(OURS, "attach: sites")
    timings = {side: found.timing(side, "attach: attach") for side in found.rounds}
    own = found.timing(OURS, "attach: attach, in the backbone's dtype")
    report.add(
        f"{title}: attach at {sites:.0f} sites", {**timings, "deltahub, in the backbone's dtype": own}, base=OURS
    )
    drawn = "fresh numbers take most of it; see the row of the backbone without values, where there are none"
    report.goal(
        f"{title}: attach, times faster than get_peft_model", timings[PEFT].over(own), 20, at_least=True, limit=drawn
    )
    report.goal(f"{title}: the same with tensors in float32", timings[PEFT].over(timings[OURS]), 10, at_least=True)


def _load(report: Report, found: Contest, title: str) -> None:
    again, first = found.timing(OURS, "load: load"), found.timing(OURS, "load: load, first time")
    theirs, lean = found.timing(PEFT, "load: load"), found.timing(PEFT, "load: load, leanest options")
    floor = found.timing(OURS, "load: floor: reading the file, a tensor object each")
    hashed = found.timing(OURS, "load: floor: SHA-256 of the file")
    report.add(
        f"{title}: load {found.number(OURS, 'load: bytes') / 1e6:.1f} MB onto a model in memory",
        {
            "deltahub": again,
            "deltahub, first time on this machine": first,
            "peft": theirs,
            "peft, leanest options": lean,
            "floor: reading the file, a tensor object each": floor,
            "floor: SHA-256 of the file": hashed,
        },
        base="deltahub",
    )
    report.add(f"{title}: save", {side: found.timing(side, "load: save") for side in found.rounds}, base=OURS)
    said = HASHING.format(hash=hashed.median, tenth=theirs.median / 10)
    report.goal(f"{title}: load, times faster than from_pretrained", theirs.over(again), 10, at_least=True)
    report.goal(
        f"{title}: load for the first time, every byte hashed", theirs.over(first), 10, at_least=True, limit=said
    )
    limit = READING.format(floor=floor.median)
    report.goal(f"{title}: load over reading and objects", again.over(floor), 2, at_least=False, limit=limit)


def _switch(report: Report, found: Contest, title: str, resident: list[int]) -> None:
    last = {}
    for count in resident:
        last = {side: found.timing(side, f"switch: {count} resident") for side in found.rounds}
        report.add(f"{title}: switch, {count} resident", last, base=OURS)
    report.goal(f"{title}: switch, times faster than set_adapter", last[PEFT].over(last[OURS]), 10, at_least=True)
    few = found.timing(OURS, f"switch: {resident[0]} resident")
    ratio = last[OURS].over(few)
    report.goal(f"{title}: switch among {resident[-1]} over among {resident[0]}", ratio, 1.5, at_least=False)


def run(*, quick: bool = False) -> Report:
    report = Report(
        name="life",
        title="A LoRA, r=16 on all linear layers: attach, save, load, switch",
        note="Each library in processes of its own that take turns, one thread each, files in the system's cache; the "
        "same modules and the same float32 tensors on both sides. `load` of DeltaHub checks the backbone (a model in "
        "memory is hashed once and remembered) and the package (hashed the first time, then remembered while path, "
        "inode, size and times are the same); peft checks neither.",
    )
    pairs = 2 if quick else 5
    cases: dict[str, tuple[list[str], list[int]]] = {
        "12": (["attach", "load", "switch"], [2, 8] if quick else [2, 8, 100]),
        "22": (["attach", "load"], []),
        "80-meta": (["attach"], []),
    }
    for name, (tasks, resident) in cases.items():
        if quick and name != "12":
            continue
        found = contest(tasks, f"shape:{name}", pairs=pairs, targets=LINEARS, rank=16, repeats=5, resident=resident)
        title = SHAPES[name].title
        _attach(report, found, title)
        if "load" in tasks:
            _load(report, found, title)
        if resident:
            _switch(report, found, title, resident)
    return report
