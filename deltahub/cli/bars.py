"""Bars on standard error for whatever takes longer than a moment."""

from __future__ import annotations

__all__ = ["Bars"]

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

_MOMENT = 0.5


class Bars:
    """Listens to :mod:`deltahub.progress`; a step that ends within a moment is never drawn."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._since: dict[int, float] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._progress.live.is_started:
            self._progress.stop()

    def begin(self, label: str, total: int | None) -> int:
        """A step begins; it is drawn once it has lasted a moment."""
        task = self._progress.add_task(label, total=total, visible=False)
        self._since[task] = time.monotonic()
        return task

    def advance(self, step: int, amount: int) -> None:
        """So many bytes more are done."""
        visible = time.monotonic() - self._since[step] > _MOMENT
        self._progress.update(TaskID(step), advance=amount, visible=visible)
        if visible and not self._progress.live.is_started:
            self._progress.start()

    def end(self, step: int) -> None:
        """A step is over."""
        del self._since[step]
        self._progress.remove_task(TaskID(step))
        if not self._since:
            self._stop()
