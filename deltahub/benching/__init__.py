"""Measuring: DeltaHub beside peft on a user's own backbone, in fresh processes that take turns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deltahub.benching.report import Report

__all__ = ["bench"]


def bench(
    model: str,
    targets: str | Sequence[str] | None = None,
    *,
    rank: int = 16,
    pairs: int = 5,
    repeats: int = 5,
    tokens: Sequence[int] = (1, 128),
) -> Report:
    """Measure a LoRA's life on a backbone: attach, save, load, switch, and forward passes of one row.

    Each library works in a process of its own, in turns; what is reported are medians of the processor's time, and of
    the ratios within each pair. Without peft there is nothing to compare with, and DeltaHub is measured alone.

    Args:
        model: a folder, a repository, or ``shape:12`` for a Llama-shaped model with random weights.
        targets: as for ``deltahub.attach``; both libraries get the same modules.
        rank: of the LoRA.
        pairs: processes of each library that count; one more of each comes before them.
        repeats: calls that count in each of them.
        tokens: lengths of the forward passes; none for a model that takes no token ids.

    Raises:
        UsageError: ``E_USAGE_BENCH`` with what a process said before it failed.
    """
    from deltahub.benching.report import Report
    from deltahub.benching.turns import contest, sides_here

    report = Report(name="bench", title=f"A LoRA of rank {rank} on {model}", note=_NOTE)
    sides = sides_here()
    cells = [[1, count] for count in tokens]
    options: dict[str, Any] = {"targets": targets, "rank": rank, "repeats": repeats, "cells": cells, "resident": [2, 8]}
    tasks = ["attach", "load", "switch", *(["forward"] if cells else [])]
    found = contest(tasks, model, sides=sides, pairs=pairs, **options)
    for metric in found.metrics(sides[0]):
        timings = {side: found.timing(side, metric) for side in sides if found.has(side, metric)}
        report.add(metric, timings, base=sides[0])
    return report


_NOTE = (
    "Each library in processes of its own that take turns, one thread each. `load` of DeltaHub checks the backbone and "
    "the package; peft checks neither. Floors are what reading or hashing the file takes by itself."
)
