"""A batch whose rows carry different deltas: as many LoRAs as rows, beside a single one, and beside a pass for each."""

from __future__ import annotations

from benchmarks.harness import Report
from deltahub.benching.models import LINEARS, SHAPES
from deltahub.benching.turns import contest

__all__ = ["run"]


def run(*, quick: bool = False) -> Report:
    report = Report(
        name="mixed",
        title="A LoRA (r=16, all linear layers) of its own for every row of a batch",
        note="Fresh processes in turns; no cache, no gradients. peft's way is `adapter_names`.",
    )
    title, tokens = SHAPES["12"].title, [1] if quick else [1, 32]
    for count in (8,) if quick else (8, 32):
        found = contest(
            ["mixed"],
            "shape:12",
            pairs=2 if quick else 5,
            targets=LINEARS,
            rank=16,
            repeats=3,
            deltas=count,
            tokens=tokens,
        )
        for length in tokens:
            cell = f"{count}×{length}"
            one, each, naive = (
                {side: found.timing(side, f"mixed: {cell}, {what}") for side in found.rounds}
                for what in ("one for all", "one for each row", "a pass for each")
            )
            rows = {
                f"{side}, {what}": timing[side]
                for side in found.rounds
                for what, timing in (("one for all rows", one), ("one for each row", each), ("a pass for each", naive))
            }
            report.add(f"{title}, {cell}", rows, base="deltahub, one for all rows")
            ours, theirs = (each[side].median - one[side].median for side in ("deltahub", "peft"))
            over = each["deltahub"].over(one["deltahub"])
            report.goal(f"{cell}: one for each row over one for all", over, 1.15, at_least=False)
            report.goal(f"{cell}: what that adds, ours over peft's", ours / theirs, 0.2, at_least=False)
            faster = naive["deltahub"].over(each["deltahub"])
            report.goal(f"{cell}: times faster than a pass for each", faster, 3, at_least=True)
    return report
